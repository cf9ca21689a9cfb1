"""Sockets in every state, in a namespace of their own: what was opened, ss, /proc/net and our tables agree."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agent.frame import Frame
from probes.procfs import Host
from probes.sockets import SocketsProbe, SocketsSettings
from tests.figures import only_row, rows
from tests.kernel_lists import (
    STATES,
    UNIX_TYPES,
    InetRow,
    UnixRow,
    inet_text_rows,
    ss,
    tcp_rows,
    udp_rows,
    unix_rows,
    unix_text_rows,
    why_no_ss,
)
from tests.socket_zoo import in_namespace, open_zoo

TRIES = 50
SS = ("-tan", "-ltn", "-uan", "-xa")
TEXTS = ("tcp", "tcp6", "udp", "udp6", "unix")

Rows = list[dict[str, Any]]


class Ours(NamedTuple):
    """What our tables have of what stays the same while nothing happens."""

    states: dict[str, float | None]
    unix: dict[str, float | None]
    listening: Rows
    connections: Rows
    udp_sockets: Rows
    unix_sockets: Rows


class Reading(NamedTuple):
    """A moment in which nothing changed, as everybody saw it."""

    ours: Ours
    by_text: Ours
    ss: dict[str, str]
    texts: dict[str, str]
    tcp: list[InetRow]
    udp: list[InetRow]
    unix: list[UnixRow]
    unix_waiting: int
    pid: int


def reading() -> Reading:
    """Opens the zoo and reads it by every way; called in a namespace."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for link, target in (("stat", "/proc/stat"), ("net", "/proc/self/net")):
            (folder / "text/proc").mkdir(parents=True, exist_ok=True)
            (folder / "text/proc" / link).symlink_to(target)
        hosts = Host(), Host(str(folder / "text"))  # another root is read as text
        local, text = (
            SocketsProbe(
                SocketsSettings(
                    row_limit=5000, connections=True, udp_sockets=True, unix_sockets=True, processes=host.is_local
                ),
                host,
            )
            for host in hosts
        )
        with open_zoo(folder) as zoo:
            for _ in range(TRIES):
                before = collect(local)
                by_text = collect(text)
                by_ss = {option: ss(option) for option in SS}
                texts = {each: Path("/proc/self/net", each).read_text() for each in TEXTS}
                if collect(local) == before:
                    break
            else:
                raise AssertionError("sockets that nobody uses keep changing")
        for each in (local, text, *hosts):
            each.close()
        return Reading(before, by_text, by_ss, texts, zoo.tcp, zoo.udp, zoo.unix, zoo.unix_waiting, os.getpid())


def collect(probe: SocketsProbe) -> Ours:
    frame = Frame(probe.tables)
    frame.begin(0, 0)
    probe.collect(frame)
    tcp = only_row(frame, "tcp")
    return Ours(
        {name: tcp[name] for name in (*STATES.values(), "sockets")},
        only_row(frame, "unix"),
        *(rows(frame, name) for name in ("listening", "connections", "udp_sockets", "unix_sockets")),
    )


@pytest.fixture(scope="module")
def read() -> Reading:
    reason = why_no_ss()
    if reason is not None:
        pytest.skip(reason)
    if not Path("/proc/net/if_inet6").exists():
        pytest.skip("IPv6 is off")
    found: Reading = in_namespace(reading)
    return found


def assert_as_opened(found: Sequence[InetRow], opened: Sequence[InetRow]) -> None:
    """The same sockets, and the same queues where the zoo knows them."""
    found = sorted(found, key=lambda row: row[:6])
    opened = sorted(opened, key=lambda row: row[:6])
    assert [row[:6] for row in found] == [row[:6] for row in opened]
    for row, expected in zip(found, opened, strict=True):
        for queue, known in ((6, expected[6]), (7, expected[7])):
            assert known is None or row[queue] in (known, None), expected
        assert expected[6] is not None or expected.state == "listen" or row[6], "a queue that was filled is empty"


def listeners(tcp: Sequence[InetRow], udp: Sequence[InetRow], limits: bool = True) -> Rows:
    """The rows that `listening` has to have: queues of sockets that share an address and a port summed."""
    queues: dict[tuple[str, str, str, int], list[float | None]] = {}
    for protocol, listed, state in (("tcp", tcp, "listen"), ("udp", udp, "close")):
        for row in listed:
            if row.state != state:
                continue
            key = protocol, row.family, row.local_address, row.local_port
            if protocol == "udp":
                queues[key] = [None, None]
                continue
            assert row.receive_queue is not None
            sums = queues.setdefault(key, [0, 0 if limits else None])
            sums[0] = (sums[0] or 0) + row.receive_queue
            if limits:
                assert row.send_queue is not None
                sums[1] = (sums[1] or 0) + row.send_queue
    return [
        dict(zip(("protocol", "family", "address", "port"), (*key[:3], str(key[3])), strict=True))
        | {"accept_queue": queue, "accept_queue_limit": limit}
        for key, (queue, limit) in sorted(queues.items(), key=lambda item: (item[0][0], item[0][3], item[0][1:3]))
    ]


OWNER = ("pid", "process")


def without(names: Sequence[str], found: Rows) -> Rows:
    """The rows without some of their columns."""
    return [{name: value for name, value in row.items() if name not in names} for row in found]


def inet_rows(found: Rows, states: bool = True) -> list[InetRow]:
    """Rows of `connections` or `udp_sockets` as ss has them; a UDP socket's state is whether it has a peer."""
    return sorted(
        InetRow(
            row["family"],
            row["local_address"],
            int(row["local_port"]),
            row["remote_address"],
            int(row["remote_port"]),
            row["state"] if states else "established" if row["remote_port"] != "0" else "close",
            row["receive_queue_bytes"],
            row["send_queue_bytes"],
        )
        for row in found
    )


def in_order(found: Rows) -> Rows:
    """By protocol and port; what of these is the same, in any order."""
    return sorted(found, key=lambda row: (row["protocol"], int(row["port"]), row["family"], row["address"]))


def states_of(tcp: Sequence[InetRow]) -> dict[str, float]:
    counts = Counter(row.state for row in tcp)
    return {**{name: counts[name] for name in STATES.values()}, "sockets": len(tcp)}


def unix_of(unix: Sequence[UnixRow]) -> dict[str, float]:
    types, states = (Counter(row[place] for row in unix) for place in (1, 2))
    return {
        "sockets": len(unix),
        **{name: types[name] for name in ("stream", "dgram", "seqpacket")},
        "listening": states["listen"],
    }


def test_the_zoo_has_every_state_type_and_queue(read: Reading) -> None:
    """Otherwise the comparisons below compare less than they say."""
    assert {row.state for row in read.tcp} == set(STATES.values()) - {"close"}
    assert {row.state for row in read.udp} == {"established", "close"}
    assert {(row.type, row.state) for row in read.unix} == {
        (kind, state)
        for kind in UNIX_TYPES.values()
        for state in ("established", "close", "listen")
        if (kind, state) != ("dgram", "listen")
    }
    for listed in (read.tcp, read.udp):
        assert {row.family for row in listed} == {"ipv4", "ipv6"}
        assert {(row.family, row.local_address) for row in listed} >= {("ipv6", "127.0.0.1"), ("ipv6", "::")}
    for row in tcp_rows(read.ss["-tan"]):
        assert row.state not in ("fin_wait1", "last_ack", "closing") or row.send_queue, row
    assert any("\n" in row.path for row in read.unix)


def test_ss_has_what_was_opened(read: Reading) -> None:
    assert_as_opened(tcp_rows(read.ss["-tan"]), read.tcp)
    assert_as_opened(udp_rows(read.ss["-uan"]), read.udp)
    found = unix_rows(read.ss["-xa"])
    assert [row[:4] for row in found] == [row[:4] for row in sorted(read.unix, key=lambda row: row.inode)]
    opened = {row.inode: row for row in read.unix}
    for row in found:
        assert row.receive_queue == opened[row.inode].receive_queue, row
        assert opened[row.inode].send_queue in (row.send_queue, None), row


def test_text_has_what_was_opened(read: Reading) -> None:
    """But for connections of Unix sockets that wait to be accepted: it alone has those."""
    assert_as_opened(inet_text_rows(read.texts["tcp"]) + inet_text_rows(read.texts["tcp6"]), read.tcp)
    assert_as_opened(inet_text_rows(read.texts["udp"]) + inet_text_rows(read.texts["udp6"]), read.udp)
    found = unix_text_rows(read.texts["unix"])
    waiting = [row for row in found if not row.inode]
    assert len(waiting) == read.unix_waiting
    assert sorted(row[:4] for row in found if row.inode) == sorted(row[:4] for row in read.unix)


def test_states_are_those_of_ss_and_text(read: Reading) -> None:
    assert read.ours.states == states_of(tcp_rows(read.ss["-tan"]))
    assert read.ours.states == states_of(inet_text_rows(read.texts["tcp"]) + inet_text_rows(read.texts["tcp6"]))
    assert read.ours.states == states_of(read.tcp)


def test_listeners_and_their_queues_are_those_of_ss(read: Reading) -> None:
    tcp, udp = tcp_rows(read.ss["-ltn"]), udp_rows(read.ss["-uan"])
    assert without(OWNER, in_order(read.ours.listening)) == listeners(tcp, udp)
    assert sum(row["accept_queue"] or 0 for row in read.ours.listening) == 3 * (3 + 1 + 4)


def test_listeners_are_those_of_text(read: Reading) -> None:
    tcp, udp = (
        [row for name in names for row in inet_text_rows(read.texts[name])] for names in (TEXTS[:2], TEXTS[2:4])
    )
    without_limits = [row | {"accept_queue_limit": None} for row in without(OWNER, in_order(read.ours.listening))]
    assert without_limits == listeners(tcp, udp, limits=False)


def test_unix_sockets_are_those_of_ss_and_text(read: Reading) -> None:
    assert read.ours.unix == unix_of(unix_rows(read.ss["-xa"]))
    assert read.ours.unix == unix_of([row for row in unix_text_rows(read.texts["unix"]) if row.inode])


def test_the_tables_are_the_same_from_text(read: Reading) -> None:
    """A limit of an accept queue has netlink alone."""
    assert read.by_text.states == read.ours.states
    assert read.by_text.listening == [row | {"accept_queue_limit": None} for row in without(OWNER, read.ours.listening)]


def test_unix_sockets_are_the_same_from_text(read: Reading) -> None:
    assert read.by_text.unix == read.ours.unix


def test_connections_are_those_of_ss(read: Reading) -> None:
    expected = [row for row in tcp_rows(read.ss["-tan"]) if row.state != "listen"]
    assert inet_rows(read.ours.connections) == sorted(expected)
    assert_as_opened(inet_rows(read.ours.connections), [row for row in read.tcp if row.state != "listen"])


def test_udp_sockets_are_those_of_ss(read: Reading) -> None:
    assert inet_rows(read.ours.udp_sockets, states=False) == udp_rows(read.ss["-uan"])


def test_unix_rows_are_those_of_ss(read: Reading) -> None:
    found = [
        UnixRow(
            int(row["inode"]),
            row["type"],
            row["state"],
            row["path"],
            row["accept_queue" if row["state"] == "listen" else "receive_queue_bytes"],
            row["accept_queue_limit" if row["state"] == "listen" else "send_queue_bytes"],
        )
        for row in read.ours.unix_sockets
    ]
    assert sorted(found) == unix_rows(read.ss["-xa"])
    for row in read.ours.unix_sockets:
        unknown = ("receive_queue_bytes", "send_queue_bytes") if row["state"] == "listen" else ("accept_queue",)
        assert {row[name] for name in unknown} == {None}
        assert row["uid"] == os.getuid()


def test_the_busiest_come_first(read: Reading) -> None:
    for found in (read.ours.connections, read.ours.udp_sockets):
        queues = [row["receive_queue_bytes"] + row["send_queue_bytes"] for row in found]
        assert queues == sorted(queues, reverse=True)
        assert queues[0] > 0
    idle = [row["state"] for row in read.ours.connections if not row["receive_queue_bytes"] + row["send_queue_bytes"]]
    assert idle == sorted(idle, key=lambda state: state != "established")


def test_every_socket_that_is_held_is_held_by_the_zoo(read: Reading) -> None:
    for found in read.ours[2:]:
        for row in found:
            if row.get("inode", "held") is None or row.get("state") == "syn_recv":
                assert (row["pid"], row["process"]) == (None, None)
            elif row["pid"] is not None:
                assert row["pid"] == read.pid
                assert row["process"].startswith("python")
    for found in (read.ours.listening, read.ours.udp_sockets, read.ours.unix_sockets):
        assert all(row["pid"] == read.pid for row in found)
    assert sum(row["pid"] is None for row in read.ours.connections) < len(read.ours.connections) / 2


def test_rows_are_the_same_from_text(read: Reading) -> None:
    """Round trips, what half a connection sent again and what is queued in Unix sockets netlink alone tells.

    A path's line feed cuts it in the text.
    """

    def by_key(found: Rows) -> Rows:
        return sorted(found, key=lambda row: str(tuple(row.values())))

    alone = (*OWNER, "rtt_seconds")
    connections = [
        row | {"retransmits": None} if row["state"] == "syn_recv" else row
        for row in without(alone, read.ours.connections)
    ]
    assert by_key(without(["rtt_seconds"], read.by_text.connections)) == by_key(connections)
    assert any(row["rtt_seconds"] for row in read.ours.connections)
    assert by_key(read.by_text.udp_sockets) == by_key(without(OWNER, read.ours.udp_sockets))
    identity = ("inode", "type", "state")
    by_text = [[row[name] for name in identity] + [row["path"].partition("\n")[0]] for row in read.by_text.unix_sockets]
    ours = [[row[name] for name in identity] + [row["path"].partition("\n")[0]] for row in read.ours.unix_sockets]
    assert sorted(by_text) == sorted(ours)
