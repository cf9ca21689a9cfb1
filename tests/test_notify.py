"""What a service manager hears, on a real notify socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.notify import Notifier


class Clock:
    now_ns = 1_000_000_000

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The manager's end, and the name of its socket."""
    name = f"@hostprobe-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0" + name[1:] if request.param == "abstract" else name)
        listening.setblocking(False)
        yield listening, name


def heard(listening: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(listening.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_what_is_told_in_its_order(manager: tuple[socket.socket, str], clock: Clock) -> None:
    listening, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name}, clock)
    assert notifier.is_heard
    notifier.ready("0 frames")
    notifier.status("0 frames")
    notifier.status("1 frame")
    notifier.status("1 frame")
    notifier.reloading()
    notifier.ready("1 frame, reload failed: größe")
    notifier.stopping()
    notifier.close()
    notifier.status("unheard")
    assert heard(listening) == [
        "READY=1\nSTATUS=0 frames",
        "STATUS=1 frame",
        "RELOADING=1\nMONOTONIC_USEC=1000000",
        "READY=1\nSTATUS=1 frame, reload failed: größe",
        "STOPPING=1\nSTATUS=delivering what is held",
    ]


def test_the_watchdog_hears_twice_in_its_time_and_only_that_all_is_well(
    manager: tuple[socket.socket, str], clock: Clock
) -> None:
    listening, name = manager
    notifier = Notifier({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}, clock)
    assert (notifier.watchdog_seconds, notifier.pause_seconds) == (10.0, 5.0)
    notifier.ping(lambda: True)
    assert heard(listening) == []
    clock.now_ns += 4_000_000_000
    assert notifier.pause_seconds == 1.0
    clock.now_ns += 1_000_000_000
    notifier.ping(lambda: True)
    notifier.ping(lambda: True)
    assert heard(listening) == ["WATCHDOG=1"]
    clock.now_ns += 5_000_000_000
    notifier.ping(lambda: False)
    assert notifier.pause_seconds == 5.0  # no spinning meanwhile
    assert heard(listening) == []
    clock.now_ns += 9_000_000_000
    notifier.ping(lambda: True)
    assert heard(listening) == ["WATCHDOG=1"]
    notifier.close()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NOTIFY_SOCKET": ""},
        {"NOTIFY_SOCKET": "relative"},
        {"NOTIFY_SOCKET": "vsock:2:1234"},
        {"WATCHDOG_USEC": "1000000"},
    ],
)
def test_without_a_manager_nothing_is_told(environment: dict[str, str], clock: Clock) -> None:
    notifier = Notifier(environment, clock)
    assert (notifier.is_heard, notifier.watchdog_seconds, notifier.pause_seconds) == (False, 0.0, float("inf"))
    notifier.ready("")
    notifier.ping(lambda: True)
    notifier.close()


@pytest.mark.parametrize("name", ["gone", "x" * 300])
def test_a_manager_that_has_gone_ends_nothing(name: str, tmp_path: Path, clock: Clock) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / name)}, clock)
    notifier.ready("0 frames")
    notifier.close()


def test_a_manager_that_does_not_listen_holds_nobody_up(tmp_path: Path, clock: Clock) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}, clock)
        for number in range(10_000):
            notifier.status(str(number))
        notifier.close()


@pytest.mark.parametrize(("pid", "usec"), [(str(os.getpid() + 1), "1000000"), (str(os.getpid()), "soon")])
def test_the_watchdog_of_another_process_is_none_of_ours(
    manager: tuple[socket.socket, str], clock: Clock, pid: str, usec: str
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager[1], "WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}, clock)
    assert notifier.watchdog_seconds == 0
    notifier.close()
