"""Rows for single sockets: labels that stay, what is shown when there are too many, owners, unknowns."""

from __future__ import annotations

import math
import socket
from typing import Any

import numpy as np
import pytest

from agent.table import Labels, Table, TableSpec
from probes.owners import Owner
from probes.socket_rows import InetRows, ListeningRows, RowLabels, UnixRows, unix_path
from probes.socket_tables import CONNECTIONS, LISTENING, UDP_SOCKETS, UNIX_SOCKETS
from probes.socket_tallies import INET_RECORD, LISTEN, UNIX_RECORD, UNKNOWN, Records, unix_record

V4, V6 = socket.AF_INET, socket.AF_INET6


def record(
    local: str = "127.0.0.1", port: int = 80, remote: str = "0.0.0.0", remote_port: int = 0, **more: int
) -> bytes:
    made = np.zeros(1, dtype=INET_RECORD)
    family = V6 if ":" in local else V4
    made["family"], made["local_port"], made["remote_port"], made["rtt_us"] = family, port, remote_port, UNKNOWN
    made["local"] = socket.inet_pton(family, local).ljust(16, b"\0")
    made["remote"] = socket.inet_pton(V6 if ":" in remote else V4, remote).ljust(16, b"\0")
    for name, value in more.items():
        made[name] = value
    return made.tobytes()


def records(*made: bytes) -> Records:
    return np.frombuffer(b"".join(made), dtype=INET_RECORD)


def shown(table: Table) -> list[tuple[Any, ...]]:
    """Each row's labels and gauges, None where unknown."""
    rows = zip(table.labels, table.gauges[: table.count].tolist(), strict=True)
    return [(*labels, *(None if math.isnan(value) else value for value in values)) for labels, values in rows]


def plain(spec: TableSpec) -> Table:
    return Table(spec.without_optional())


def test_labels_stay_the_same_objects_while_their_rows_do() -> None:
    made: list[bytes] = []

    def make(key: bytes) -> Labels:
        made.append(key)
        return (key.hex(),)

    def keys(*numbers: int) -> Any:
        return np.array(numbers, dtype=np.uint8).reshape(-1, 1)

    rows = RowLabels(make)
    first = rows.of(keys(1, 2), None)
    assert rows.of(keys(1, 2), None) is first
    assert rows.of(keys(3, 2), None) == [("03",), ("02",)]
    assert made == [b"\1", b"\2", b"\3"]
    rows.of(keys(1), None)
    assert made == [b"\1", b"\2", b"\3", b"\1"], "a row that went away is not remembered"
    owned = rows.of(keys(1), [(7, "nginx")])
    assert owned == [("01", "nginx")]
    assert rows.of(keys(1), [(7, "nginx")]) is owned
    assert rows.of(keys(1), [None]) == [("01", None)]
    assert rows.of(keys(), None) == []


def listen(rows: ListeningRows, tcp: bytes, udp: bytes = b"", limit: int = 100, limits_known: bool = True) -> Table:
    table = plain(LISTENING)
    rows.select(tcp, udp, limit, limits_known)
    rows.fill(table)
    return table


def test_listeners_that_share_an_address_and_port_are_one_row() -> None:
    tcp = record(port=443, receive_queue=1, send_queue=10) + record("::1", 443, send_queue=5)
    tcp += record(port=443, receive_queue=2, send_queue=20) + record(port=22, send_queue=128)
    udp = record(port=53) + record("::ffff:127.0.0.1", 9)
    rows = ListeningRows()
    expected = [
        ("tcp", "ipv4", "127.0.0.1", "22", 0, 128),
        ("tcp", "ipv4", "127.0.0.1", "443", 3, 30),
        ("tcp", "ipv6", "::1", "443", 0, 5),
        ("udp", "ipv6", "127.0.0.1", "9", None, None),
        ("udp", "ipv4", "127.0.0.1", "53", None, None),
    ]
    for _ in range(2):
        assert shown(listen(rows, tcp, udp)) == expected
    assert shown(listen(rows, tcp, udp, limits_known=False))[1] == ("tcp", "ipv4", "127.0.0.1", "443", 3, None)
    changed = tcp.replace(record(port=22, send_queue=128), record(port=22, receive_queue=9, send_queue=128))
    assert shown(listen(rows, changed, udp))[0] == ("tcp", "ipv4", "127.0.0.1", "22", 9, 128)
    assert shown(listen(rows, b"", udp)) == expected[3:]
    assert shown(listen(rows, b"")) == []


def test_the_longest_accept_queues_are_shown_when_there_are_more_listeners() -> None:
    tcp = b"".join(record(port=port, receive_queue=queue) for port, queue in ((1, 0), (2, 7), (3, 0), (4, 9)))
    table = listen(ListeningRows(), tcp, record(port=5), limit=3)
    assert [row[3:5] for row in shown(table)] == [("1", 0), ("2", 7), ("4", 9)]
    assert table.dropped == 2


def test_a_connection_has_what_the_kernel_says_of_it() -> None:
    rows = InetRows(with_state=True)
    table = plain(CONNECTIONS)
    made = records(
        record("10.0.0.1", 22, "10.0.0.2", 50000, state=1, receive_queue=3, send_queue=4, uid=1000, inode=77,
               rtt_us=1500, retransmits=2, timer=1),
        record("::ffff:10.0.0.1", 80, "::ffff:10.0.0.9", 1, state=6),
        record("::1", 80, "::1", 2, state=12, rtt_us=0),
        record("10.0.0.1", 1, "10.0.0.2", 2, state=4, uid=5),
        record("10.0.0.1", 1, "10.0.0.2", 2, state=200, inode=1),
    )  # fmt: skip
    rows.fill(table, made, 9)
    assert shown(table) == [
        ("ipv4", "10.0.0.1", "22", "10.0.0.2", "50000", "established", 3, 4, 1000, 77, 0.0015, 2),
        ("ipv6", "10.0.0.1", "80", "10.0.0.9", "1", "time_wait", 0, 0, None, None, None, 0),
        ("ipv6", "::1", "80", "::1", "2", "syn_recv", 0, 0, None, None, None, 0),
        ("ipv4", "10.0.0.1", "1", "10.0.0.2", "2", "fin_wait1", 0, 0, 5, None, None, 0),
        ("ipv4", "10.0.0.1", "1", "10.0.0.2", "2", "200", 0, 0, 0, 1, None, 0),
    ]
    assert table.dropped == 4
    again = plain(CONNECTIONS)
    changed = made.copy()
    changed["timer"], changed["retransmits"] = 7, 9
    rows.fill(again, changed, 5)
    assert again.labels is table.labels, "what isn't part of the key changes no label"


@pytest.mark.parametrize(("timer", "shown_count"), [(0, 3), (1, 3), (2, 0), (3, 3), (4, 0)])
def test_probes_are_no_retransmits(timer: int, shown_count: int) -> None:
    table = plain(CONNECTIONS)
    InetRows(with_state=True).fill(table, records(record(state=1, inode=5, timer=timer, retransmits=3)), 1)
    assert shown(table)[0][-1] == shown_count


@pytest.mark.parametrize(
    ("state", "uid", "inode", "expected"),
    [(3, 1000, 0, None), (12, 1000, 0, None), (3, 1000, 7, 1000), (4, 1000, 0, 1000), (6, 0, 0, None), (1, 0, 7, 0)],
)
def test_what_is_no_whole_socket_yet_has_no_user(state: int, uid: int, inode: int, expected: int | None) -> None:
    """In the text it has the listener's."""
    table = plain(CONNECTIONS)
    InetRows(with_state=True).fill(table, records(record(state=state, uid=uid, inode=inode)), 1)
    assert shown(table)[0][8:10] == (expected, inode or None)


def test_owners_are_beside_their_sockets() -> None:
    owners: list[Owner | None] = [(42, "sshd"), None]
    table = Table(UDP_SOCKETS)
    InetRows(with_state=False).fill(table, records(record(inode=5), record("::", 9, "::", inode=6)), 2, owners)
    assert shown(table) == [
        ("ipv4", "127.0.0.1", "80", "0.0.0.0", "0", "sshd", 0, 0, 0, 5, 42),
        ("ipv6", "::", "9", "::", "0", None, 0, 0, 0, 6, None),
    ]
    table, rows = Table(LISTENING), ListeningRows()
    rows.select(record(port=2, inode=8) + record(port=1, inode=7) + record(port=2, inode=9), b"", 10, True)
    assert rows.inodes() == [7, 8]
    rows.fill(table, owners)
    assert shown(table) == [
        ("tcp", "ipv4", "127.0.0.1", "1", "sshd", 0, 0, 42),
        ("tcp", "ipv4", "127.0.0.1", "2", None, 0, 0, None),
    ]


def test_unix_rows() -> None:
    made = (
        unix_record(1, LISTEN, 10, b"/run/a b\0", (3, 128), 0),
        unix_record(2, 7, 11, b"\0ab\0c", (5, 0), 1000),
        unix_record(5, 1, 12, b"", (0, 6), UNKNOWN),
        unix_record(99, 99, 13, b"\xff"),
    )
    table = plain(UNIX_SOCKETS)
    UnixRows().fill(table, np.frombuffer(b"".join(made), dtype=UNIX_RECORD), 5)
    assert shown(table) == [
        ("10", "stream", "listen", "/run/a b", None, None, 3, 128, 0),
        ("11", "dgram", "close", "@ab@c", 5, 0, None, None, 1000),
        ("12", "seqpacket", "established", "", 0, 6, None, None, None),
        ("13", "99", "99", "\\xff", None, None, None, None, None),
    ]
    assert table.dropped == 1


@pytest.mark.parametrize(
    ("name", "path"), [(b"", ""), (b"/a\0/b", "/a"), (b"\0", "@"), (b"\0x\0", "@x@"), ("/é".encode(), "/é")]
)
def test_paths(name: bytes, path: str) -> None:
    assert unix_path(name) == path
