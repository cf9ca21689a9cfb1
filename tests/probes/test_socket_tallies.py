"""Tallies against what a kernel said: recorded replies, their variants, and the busiest of many."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ProbeError
from probes import netlink
from probes.netlink import INET, Reply, messages
from probes.socket_tallies import (
    INET_RECORD,
    LISTEN,
    UNIX_RECORD,
    UNKNOWN,
    Busiest,
    InetTally,
    Records,
    UnixTally,
    inet_rank,
    merged,
    unix_rank,
    unix_record,
)
from tests.recorded import REQUESTS, SEQUENCE, attributes_of, datagrams, messages_of

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the recorded replies are little-endian")

EVERY_STATE = 0xFFFF
INET_NAMES = ("tcp", "udp", "udp6")
MANY = 5000


@pytest.fixture(params=["one by one", "at once"])
def walked_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through a datagram: Python's from message to message, and NumPy's."""
    monkeypatch.setattr(netlink, "_WALKED_BYTES", 1 << 30 if request.param == "one by one" else 0)


def tallied(name: str, tally: Any, change: Callable[[bytes], bytes] = bytes) -> Any:
    """A recorded dump, counted."""
    size = netlink.UNIX_BYTES if name == "unix" else INET.itemsize
    finished = False
    for datagram in map(change, datagrams(name)):
        assert not finished
        finished = messages(Reply(bytearray(datagram)), len(datagram), SEQUENCE, REQUESTS[name][0], size, tally)
    assert finished
    return tally


def sockets_in(name: str) -> Iterator[bytes]:
    """The sockets of a recorded dump, fixed structure and attributes."""
    for datagram in datagrams(name):
        yield from (message.payload for message in messages_of(datagram) if message.kind == REQUESTS[name][0])


def inet_fields(payload: bytes) -> tuple[Any, ...]:
    """Family, state, retransmits, ports, addresses, queues, user, inode, round trip time: read by hand."""
    family, state, _, retransmits, local_port, remote_port = struct.unpack_from("=4B2s2s", payload)
    received, sent, uid, inode = struct.unpack_from("=4I", payload, 56)
    info = attributes_of(payload[72:]).get(2)
    rtt = UNKNOWN if info is None else struct.unpack_from("=I", info, 68)[0]
    ports = int.from_bytes(local_port, "big"), int.from_bytes(remote_port, "big")
    return family, state, retransmits, *ports, payload[8:24], payload[24:40], received, sent, uid, inode, rtt


def unix_fields(payload: bytes) -> tuple[Any, ...]:
    """Type, state, inode, queues, user, name: read by hand."""
    _, kind, state, inode = struct.unpack_from("=3BxI", payload)
    attributes = attributes_of(payload[16:])
    queues = struct.unpack("=II", attributes[4])
    return kind, state, inode, *queues, struct.unpack("=I", attributes[7])[0], attributes.get(0, b"")


def inet_rows(records: Records) -> list[tuple[Any, ...]]:
    names = ["family", "state", "retransmits", "local_port", "remote_port", "local", "remote"]
    return records[[*names, "receive_queue", "send_queue", "uid", "inode", "rtt_us"]].tolist()


def unix_rows(records: Records) -> list[tuple[Any, ...]]:
    rows = records[["type", "state", "inode", "receive_queue", "send_queue", "uid"]].tolist()
    names = [bytes(record["name"])[: record["name_bytes"]] for record in records]
    return [(*row, name) for row, name in zip(rows, names, strict=True)]


@pytest.mark.usefixtures("walked_bytes")
@pytest.mark.parametrize("name", INET_NAMES)
def test_records_are_what_the_kernel_said(name: str) -> None:
    expected = [inet_fields(payload) for payload in sockets_in(name)]
    tally = tallied(name, InetTally(0, EVERY_STATE, MANY))
    assert sorted(inet_rows(tally.busiest.records())) == sorted(expected)
    assert tally.busiest.seen == sum(tally.states) == len(expected)
    for state in range(256):
        assert tally.states[state] == sum(row[1] == state for row in expected)
    listed = tallied(name, InetTally(1 << LISTEN | 1 << 7)).listed
    without_rtt = [(*row[:-1], UNKNOWN) for row in expected if row[1] in (LISTEN, 7)]
    assert [(*row[:-1], UNKNOWN) for row in inet_rows(np.frombuffer(listed, dtype=INET_RECORD))] == without_rtt
    if name == "tcp":
        assert {row[1] for row in expected} >= {1, 2, 3, 5, 6, 8, 10}, "the zoo has these states"
        assert any(row[-1] not in (0, UNKNOWN) for row in expected)


@pytest.mark.usefixtures("walked_bytes")
def test_unix_records_are_what_the_kernel_said() -> None:
    expected = [unix_fields(payload) for payload in sockets_in("unix")]
    tally = tallied("unix", UnixTally(MANY))
    assert sorted(unix_rows(tally.busiest.records())) == sorted(expected)
    assert tally.busiest.seen == len(expected)
    assert tally.listening == sum(row[1] == LISTEN for row in expected)
    for kind in range(256):
        assert tally.types[kind] == sum(row[0] == kind for row in expected)
    counted = tallied("unix", UnixTally())
    assert (counted.types, counted.listening, counted.busiest) == (tally.types, tally.listening, None)


def longer(kind: int, extra: bytes) -> Callable[[bytes], bytes]:
    """Puts an attribute that nobody knows in front of those of every socket: a later kernel's."""

    def change(datagram: bytes) -> bytes:
        changed = b""
        while datagram:
            (size, found) = struct.unpack_from("=IH", datagram)
            message, datagram = datagram[:size], datagram[(size + 3) & ~3 :]
            if found in (18, 20):
                fixed = 16 + (16 if kind == 20 else 72)
                message = message[:fixed] + extra + message[fixed:]
            changed += struct.pack("=I", len(message)) + message[4:] + bytes(-len(message) % 4)
        return changed

    return change


@pytest.mark.usefixtures("walked_bytes")
@pytest.mark.parametrize("extra", [struct.pack("=HH", 4, 77), struct.pack("=HHQ", 12, 0x8000 | 99, 1)])
def test_attributes_of_a_later_kernel_are_passed_over(extra: bytes) -> None:
    tally = tallied("tcp", InetTally(0, EVERY_STATE, MANY), longer(18, extra))
    assert sorted(inet_rows(tally.busiest.records())) == sorted(map(inet_fields, sockets_in("tcp")))
    unix = tallied("unix", UnixTally(MANY), longer(20, extra))
    assert sorted(unix_rows(unix.busiest.records())) == sorted(map(unix_fields, sockets_in("unix")))


@pytest.mark.usefixtures("walked_bytes")
@pytest.mark.parametrize("extra", [bytes(4), struct.pack("=HH", 3, 2), struct.pack("=HH", 60000, 2)])
def test_a_damaged_attribute_ends_them_and_the_socket_counts(extra: bytes) -> None:
    """What stands behind it can't be found; the socket is there all the same."""
    tally = tallied("tcp", InetTally(0, EVERY_STATE, MANY), longer(18, extra))
    expected = sorted((*inet_fields(payload)[:-1], UNKNOWN) for payload in sockets_in("tcp"))
    assert sorted(inet_rows(tally.busiest.records())) == expected


@pytest.mark.parametrize("name", REQUESTS)
@given(data=st.data())
def test_damage_ends_in_counts_or_a_probe_error(name: str, data: st.DataObject) -> None:
    damaged = bytearray(next(datagrams(name)))
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(damaged) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        damaged[start : start + len(patch)] = patch
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    tally: Any = UnixTally(10) if name == "unix" else InetTally(1 << LISTEN, EVERY_STATE, 10)
    size = netlink.UNIX_BYTES if name == "unix" else INET.itemsize
    try:
        messages(Reply(damaged), len(damaged), SEQUENCE, REQUESTS[name][0], size, tally)
    except ProbeError:
        return
    counted = sum(tally.types if name == "unix" else tally.states)
    assert 0 <= counted <= len(damaged) / (16 + size)
    assert len(tally.busiest.records()) <= 10


def inet(state: int, received: int, sent: int, inode: int, port: int = 0) -> bytes:
    record = np.zeros(1, dtype=INET_RECORD)
    record["local_port"] = port
    record["state"], record["receive_queue"], record["send_queue"], record["inode"] = state, received, sent, inode
    return record.tobytes()


sockets = st.lists(st.tuples(st.sampled_from([1, 6, 8]), st.integers(0, 5), st.integers(0, 3)), max_size=60)


@given(st.lists(st.tuples(st.booleans(), sockets), max_size=12), st.integers(1, 40), st.integers(0, 30))
def test_the_busiest_stay_whatever_comes_first(
    parts: list[tuple[bool, list[tuple[int, int, int]]]], limit: int, spare: int
) -> None:
    busiest = Busiest(limit, INET_RECORD, inet_rank)
    busiest._room = (limit + spare) * INET_RECORD.itemsize  # so that a few are many
    every = []
    for at_once, part in parts:
        records = [inet(*socket, len(every) + place) for place, socket in enumerate(part)]
        every += [(*socket, len(every) + place) for place, socket in enumerate(part)]
        if at_once:
            offered = np.frombuffer(b"".join(records), dtype=INET_RECORD)
            busiest.add_all(offered[busiest.wants(inet_rank(offered))])
        else:
            for record in records:
                busiest.add(record)
    expected = sorted(every, key=lambda socket: (-(socket[1] + socket[2]), socket[0] != 1))[:limit]
    assert busiest.records()["inode"].tolist() == [inode for *_, inode in expected]
    assert busiest.seen == len(every)


def test_memory_is_that_of_the_limit() -> None:
    busiest = Busiest(10, INET_RECORD, inet_rank)
    many = np.frombuffer(inet(1, 5, 0, 1) * 300, dtype=INET_RECORD)
    for _ in range(100):
        busiest.add_all(many[busiest.wants(inet_rank(many))])
        assert len(busiest._rows) <= busiest._room + many.nbytes
    assert len(busiest._rows) <= busiest._room
    assert busiest.seen == 30_000


def test_two_lists_become_one() -> None:
    def part(rows: Iterable[tuple[int, int, int, int]]) -> Busiest:
        busiest = Busiest(2, INET_RECORD, inet_rank)
        for row in rows:
            busiest.add(inet(*row, port=8080))
        return busiest

    records, seen = merged([part([(6, 9, 0, 1), (1, 0, 0, 2), (6, 0, 0, 3)]), part([(6, 0, 4, 4), (1, 0, 0, 5)])], 3)
    assert (records["inode"].tolist(), seen) == ([1, 4, 2], 5)
    assert records["local_port"].tolist() == [8080] * 3
    assert bytes(records[0])[4:6] == (8080).to_bytes(2, "big")


def test_of_a_unix_listener_the_limit_is_no_business() -> None:
    rows = [
        unix_record(1, LISTEN, 1, b"", (0, 4096)),
        unix_record(1, 1, 2, b""),
        unix_record(1, LISTEN, 3, b"", (2, 5)),
    ]
    ranks = unix_rank(np.frombuffer(b"".join(rows), dtype=UNIX_RECORD)).tolist()
    assert ranks == [0, 1, 4]


def test_a_name_that_is_too_long_is_cut() -> None:
    (record,) = np.frombuffer(unix_record(1, 1, 7, b"x" * 200), dtype=UNIX_RECORD)
    assert (record["name_bytes"], bytes(record["name"])) == (108, b"x" * 108)
