"""Sockets by psutil: how many share an address, what it can't tell, and what it can't read."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from agent.frame import Frame
from probes.procfs import Host
from probes.sockets import PsutilSocketsProbe, SocketsProbe, SocketsSettings
from tests.figures import only_row, rows
from tests.kernel_lists import STATES
from tests.socket_zoo import in_namespace, open_zoo

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads this machine's sockets")
V4, V6, STREAM, DGRAM = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM


class Entry(NamedTuple):
    """psutil's `sconn`, whose order is part of what the probe takes for granted."""

    fd: int
    family: int
    type: int
    laddr: tuple[Any, ...]
    raddr: tuple[Any, ...]
    status: str
    pid: int | None


def test_an_entry_is_what_psutil_has() -> None:
    assert psutil._ntuples.sconn._fields == Entry._fields


def collect(probe: Any) -> Frame:
    frame = Frame(probe.tables)
    frame.begin(1, 1)
    probe.collect(frame)
    return frame


def by_psutil(**settings: Any) -> Frame:
    return collect(PsutilSocketsProbe(SocketsSettings(row_limit=5000, **settings), Host("/", "psutil")))


def counts(folder: str) -> list[dict[str, Any]]:
    """The zoo's states, counted by psutil and by netlink; four UDP sockets and four listeners share a port besides."""
    host = Host()
    probe = SocketsProbe(SocketsSettings(row_limit=5000), host)
    with open_zoo(Path(folder)), ExitStack() as stack:
        for kind in (STREAM, DGRAM):
            port = 0
            for _ in range(4):
                one = stack.enter_context(socket.socket(V4, kind))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                one.bind(("127.0.0.1", port))
                port = one.getsockname()[1]
                if kind == STREAM:
                    one.listen()
        found = []
        for frame in (collect(probe), by_psutil()):
            tcp = only_row(frame, "tcp")
            labels = sorted(map(repr, frame.tables["listening"].labels))
            found.append({name: tcp[name] for name in (*STATES.values(), "sockets")} | {"labels": labels})
            found[-1]["udp"] = only_row(frame, "udp")["sockets"]
    probe.close()
    host.close()
    return found


@linux
def test_every_socket_is_counted_where_its_process_is_known(tmp_path: Path) -> None:
    netlink, psutils = in_namespace(counts, str(tmp_path))
    assert psutils == netlink
    assert netlink["listen"] >= 4
    assert netlink["udp"] >= 4


def with_line_feeds(folder: str) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    with socket.socket(socket.AF_UNIX) as odd, socket.create_server(("127.0.0.1", 0)):
        odd.bind(os.path.join(folder, "two\nlines of it"))
        frame = by_psutil()
        return only_row(frame, "unix"), rows(frame, "listening"), only_row(frame, "tcp")


@linux
def test_a_unix_path_that_psutil_cannot_read_costs_the_unix_figures_alone(tmp_path: Path) -> None:
    unix, listening, tcp = in_namespace(with_line_feeds, str(tmp_path))
    assert set(unix.values()) == {None}
    assert len(listening) == tcp["listen"] == 1


def listener(pid: int | None, fd: int, port: int = 80) -> Entry:
    return Entry(fd, V4, STREAM, ("127.0.0.1", port), (), psutil.CONN_LISTEN, pid)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_entries(platform: str, *inet: Entry) -> None:
        monkeypatch.setattr(psutil, "net_connections", lambda kind: list(inet) if kind == "inet" else [])
        monkeypatch.setattr(sys, "platform", platform)

    return set_entries


@pytest.mark.parametrize(
    ("platform", "inet", "expected"),
    [
        ("linux", [listener(7, 3), listener(7, 4), listener(8, 3)], 3),
        ("linux", [listener(7, 3), listener(None, -1)], None),  # it may stand for several
        ("darwin", [listener(7, 3)], 1),
        ("darwin", [listener(7, 3), listener(8, 3)], None),  # forked, or SO_REUSEPORT: nobody can say
        ("darwin", [listener(7, 3), listener(7, 4, port=81)], 2),
    ],
)
def test_listeners_that_share_an_address(
    entries: Callable[..., None], platform: str, inet: list[Entry], expected: int | None
) -> None:
    entries(platform, *inet)
    frame = by_psutil(processes=True)
    tcp = only_row(frame, "tcp")
    assert (tcp["listen"], tcp["sockets"], tcp["established"]) == (expected, expected, 0)
    assert [row["pid"] for row in rows(frame, "listening")][:1] == [7]


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_connection_is_one_socket_whoever_holds_it(entries: Callable[..., None], platform: str) -> None:
    ends = (("127.0.0.1", 80), ("127.0.0.1", 5000), psutil.CONN_ESTABLISHED)
    entries(
        platform, Entry(3, V4, STREAM, *ends, 9), Entry(3, V4, STREAM, *ends, 7), Entry(-1, V4, STREAM, *ends, None)
    )
    frame = by_psutil(connections=True, processes=True)
    assert (only_row(frame, "tcp")["established"], only_row(frame, "tcp")["sockets"]) == (1, 1)
    assert [row["pid"] for row in rows(frame, "connections")] == [7]


def test_udp_sockets_that_share_an_address(entries: Callable[..., None]) -> None:
    bound = Entry(3, V4, DGRAM, ("0.0.0.0", 53), (), psutil.CONN_NONE, 7)
    entries("linux", bound, bound._replace(fd=4), bound._replace(family=V6, laddr=("::", 53)))
    assert only_row(by_psutil(), "udp")["sockets"] == 3
    entries("linux", bound, bound._replace(fd=-1, pid=None))
    assert only_row(by_psutil(), "udp")["sockets"] is None
    entries("darwin", bound, bound._replace(fd=4))
    assert only_row(by_psutil(), "udp")["sockets"] is None
