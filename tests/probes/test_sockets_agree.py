"""Netlink and text, row by row, where the kernel puts other figures into them: timers, users of half a socket."""

from __future__ import annotations

import ctypes
import os
import socket
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agent.frame import Frame
from probes.netlink import ALL_STATES, SockDiag
from probes.procfs import Host
from probes.socket_tables import NEW_SYN_RECV, SYN_RECV
from probes.socket_tallies import InetTally
from probes.sockets import SocketsProbe, SocketsSettings
from tests.figures import rows
from tests.socket_zoo import _fill, in_namespace

SETTLE_SECONDS = 20
UID = 4711
TIMER_KEEPALIVE, TIMER_ZERO_WINDOW = 2, 4
_SO_ATTACH_FILTER = 26
Rows = list[dict[str, Any]]


class Reading(NamedTuple):
    """The same sockets by both ways, and what the kernel's records say: state, timer, retransmits, user."""

    netlink: Rows
    text: Rows
    records: list[tuple[int, int, int, int]]


def deafen(opened: socket.socket) -> None:
    """It answers nothing from now on: a filter (linux/filter.h) that lets no packet through."""
    program = ctypes.create_string_buffer(b"\x06" + bytes(7))  # BPF_RET 0
    opened.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(_Program(1, ctypes.addressof(program))))


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def reading() -> Reading:
    """Opens a connection under each of the timers and half a connection of another user's listener."""
    with ExitStack() as stack:

        def pair() -> tuple[socket.socket, socket.socket]:
            client = stack.enter_context(socket.create_connection(listener.getsockname()))
            return client, stack.enter_context(listener.accept()[0])

        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        waiting = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        waiting.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 600)
        os.fchown(waiting.fileno(), UID, -1)
        stack.enter_context(socket.create_connection(waiting.getsockname()))

        diag = stack.enter_context(Closing(SockDiag()))
        full, reader = pair()
        _fill(full)
        await_probe(diag, TIMER_ZERO_WINDOW)
        deafen(reader)
        idle, deaf = pair()
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            idle.setsockopt(socket.IPPROTO_TCP, option, 1)
        idle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        deafen(deaf)
        await_probe(diag, TIMER_KEEPALIVE)
        await_probe(diag, TIMER_ZERO_WINDOW)
        return compared(stack, diag)


def await_probe(diag: SockDiag, timer: int) -> None:
    """Waits until the kernel has counted a probe under a timer."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while timer not in {found for _, found, again, _ in records(diag) if again}:
        assert time.monotonic() < deadline, f"no probe was counted: {records(diag)}"
        time.sleep(0.02)


class Closing:
    """`with` for what has a `close`."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __enter__(self) -> Any:
        return self._thing

    def __exit__(self, *_: object) -> None:
        self._thing.close()


def records(diag: SockDiag) -> list[tuple[int, int, int, int]]:
    tally = diag.tcp(ALL_STATES, partial(InetTally, 0, 0xFFFF, 100), True)
    assert tally.busiest is not None
    found: list[tuple[int, int, int, int]] = tally.busiest.records()[["state", "timer", "retransmits", "uid"]].tolist()
    return found


def compared(stack: ExitStack, diag: SockDiag) -> Reading:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "proc").mkdir()
    for link, target in (("stat", "/proc/stat"), ("net", "/proc/self/net")):
        (folder / "proc" / link).symlink_to(target)
    hosts = [stack.enter_context(Closing(Host(root))) for root in ("/", str(folder))]
    settings = SocketsSettings(connections=True, row_limit=100)
    netlink, text = (stack.enter_context(Closing(SocketsProbe(settings, host))) for host in hosts)
    return Reading(connections(netlink), connections(text), records(diag))


def connections(probe: SocketsProbe) -> Rows:
    frame = Frame(probe.tables)
    frame.begin(0, 0)
    probe.collect(frame)
    found = [
        {name: value for name, value in row.items() if name != "rtt_seconds"} for row in rows(frame, "connections")
    ]
    return sorted(found, key=lambda row: (row["local_port"], row["remote_port"]))


@pytest.fixture(scope="module")
def read() -> Reading:
    if os.geteuid() != 0:
        pytest.skip("a socket of another user takes root")
    found: Reading = in_namespace(reading)
    return found


def test_the_kernel_counts_probes_where_it_counts_what_was_sent_again(read: Reading) -> None:
    """Otherwise the next tests prove nothing."""
    counted = {timer for _, timer, again, _ in read.records if again}
    assert counted >= {TIMER_KEEPALIVE, TIMER_ZERO_WINDOW}
    assert any(state in (SYN_RECV, NEW_SYN_RECV) for state, *_ in read.records)


def test_rows_are_the_same(read: Reading) -> None:
    """What half a connection sent again the text doesn't tell."""
    assert len(read.netlink) == 6
    halves = [row for row in read.text if row["state"] == "syn_recv"]
    assert [row["retransmits"] for row in halves] == [None]
    expected = [row | {"retransmits": None} if row["state"] == "syn_recv" else row for row in read.netlink]
    assert read.text == expected


def test_nothing_was_sent_again(read: Reading) -> None:
    assert {row["retransmits"] for row in read.netlink} == {0}


def test_half_a_connection_has_no_user(read: Reading) -> None:
    for found in (read.netlink, read.text):
        (half,) = [row for row in found if row["state"] == "syn_recv"]
        assert (half["uid"], half["inode"]) == (None, None)
        assert UID not in [row["uid"] for row in found]


def below_another_root(pid: int) -> dict[str, Any]:
    """The listeners below /proc/PID/root, whose link says "/"."""
    host = Host(f"/proc/{pid}/root")
    probe = SocketsProbe(SocketsSettings(), host)
    frame = Frame(probe.tables)
    frame.begin(0, 0)
    probe.collect(frame)
    ports = [row["port"] for row in rows(frame, "listening")]
    probe.close()
    host.close()
    return {"ports": ports, "limits": [row["accept_queue_limit"] for row in rows(frame, "listening")]}


def ports_of_this_namespace() -> list[dict[str, Any]]:
    """One listener here, that process 1 has not: asked here, and by the root of a process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return [{"ports": [str(server.getsockname()[1])]}, below_another_root(os.getpid())]


def test_the_root_of_a_process_is_another_host() -> None:
    """Its sockets are those of its process 1, not the ones that netlink tells this process."""
    ours, theirs = in_namespace(ports_of_this_namespace)
    assert ours["ports"][0] not in theirs["ports"]
    assert set(theirs["limits"]) <= {None}, "from text"
