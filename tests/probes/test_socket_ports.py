"""The lowest ports of many: the same rows as of a list of all, in memory that doesn't grow with them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agent.table import Table
from probes.netlink import Reply
from probes.socket_ports import LowestPorts
from probes.socket_rows import ListeningRows
from probes.socket_tables import LISTENING
from probes.socket_tallies import INET_RECORD, InetTally


def bound(port: int, address: int = 0, inode: int = 1) -> bytes:
    record = np.zeros(1, dtype=INET_RECORD)
    record["family"], record["state"], record["local_port"], record["inode"] = 2, 7, port, inode
    record["local"] = address.to_bytes(16, "little")
    return record.tobytes()


def chosen_rows(tcp: bytes, udp: bytes, limit: int, left_out: int = 0) -> tuple[Any, ...]:
    rows, table = ListeningRows(), Table(LISTENING.without_optional())
    rows.select(tcp, udp, limit, True, left_out)
    rows.fill(table)
    return table.labels, table.dropped, table.gauges[: table.count, :2].tolist(), rows.inodes()


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=40), max_size=8),
    st.integers(1, 40),
    st.integers(0, 20),
    st.booleans(),
)
def test_the_lowest_ports_are_those_that_are_shown(
    parts: list[list[tuple[int, int]]], limit: int, spare: int, has_tcp: bool
) -> None:
    """The same rows, in the same order, with as many left out, as of a list of all."""
    tally = InetTally(1 << 7, ports=limit)
    assert tally._ports is not None
    tally._ports.room = (limit + spare) * INET_RECORD.itemsize  # so that a few are many
    every = b""
    for part in parts:
        records = [bound(port, address, len(every) + place) for place, (port, address) in enumerate(part)]
        every += b"".join(records)
        if len(part) % 2:
            tally._list(b"".join(records))
        else:
            for record in records:
                tally.add(record)
    tcp = bound(80) + bound(443) if has_tcp else b""
    assert repr(chosen_rows(tcp, tally.listed, limit, tally.left_out)) == repr(chosen_rows(tcp, every, limit))


def test_memory_is_that_of_the_limit_however_many_ports_are_bound() -> None:
    few, many = InetTally(1 << 7, ports=100), InetTally(1 << 7, ports=100)
    for tally, count in ((few, 4000), (many, 20_000)):
        for port in range(count, 0, -1):
            tally.add(bound(port))
            assert len(tally._listed_rows) <= (100 + 1024 + 1) * INET_RECORD.itemsize
    assert (few.left_out + len(few.listed) // INET_RECORD.itemsize) == 4000
    assert (many.left_out + len(many.listed) // INET_RECORD.itemsize) == 20_000
    ports = np.frombuffer(many.listed, dtype=INET_RECORD)["local_port"]
    assert sorted(ports.tolist())[:100] == list(range(1, 101))


def test_what_is_left_out_counts_once_by_netlink_and_by_record() -> None:
    """A message whose port is too high is told by its own bytes, a record by its; both are the same number."""
    ports = LowestPorts(1, INET_RECORD.itemsize)
    kept = ports.lowest(bytearray(bound(5) + bound(9, 7) + bound(9, 8)))
    assert (kept, ports.left_out(), ports.has_left_out) == (bound(5), 2, True)
    data = bytearray()
    for record in (bound(9, 7), bound(5), bound(4), bound(9, 9)):
        data += bytes(16) + record[:72]
    reply = Reply(data)
    at = np.arange(4) * 22
    assert ports.wanted(reply, at).tolist() == [22, 44]
    assert ports.left_out() == 3


def test_an_address_that_was_left_out_comes_again() -> None:
    """Of one port some addresses are kept, and others not: a few records more don't bring one of those back."""
    ports = LowestPorts(1, INET_RECORD.itemsize)
    ports.room = 2 * INET_RECORD.itemsize
    kept = ports.lowest(bytearray(bound(5, 3) + bound(5, 1) + bound(5, 2)))
    assert (kept, ports.left_out()) == (bound(5, 1), 2)
    assert (ports.lowest(kept + bound(5, 3)), ports.left_out()) == (bound(5, 1), 2)
