"""What a service manager is told: sd_notify(3), by datagrams to the socket of $NOTIFY_SOCKET."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

_SOCKET_VARIABLE = "NOTIFY_SOCKET"
_WATCHDOG_VARIABLE = "WATCHDOG_USEC"
_WATCHDOG_PID_VARIABLE = "WATCHDOG_PID"
_WATCHDOG_SECONDS_MIN = 0.02  # one that wants to hear oftener would keep a CPU busy


class Notifier:
    """Tells the service manager how the agent does; without one it does nothing.

    What can't be sent is not sent: a manager that has gone must not end the agent.

    Args:
        environment: os.environ unless given.
        clock_ns: the monotonic clock.

    Attributes:
        watchdog_seconds: how often at least it must hear from the agent; 0 where it doesn't listen.
    """

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        environment = os.environ if environment is None else environment
        self._clock_ns = clock_ns
        self._socket: socket.socket | None = None
        self._status = ""
        self._address = environment.get(_SOCKET_VARIABLE, "")
        if self._address.startswith("@"):  # an abstract one
            self._address = f"\0{self._address[1:]}"
        if self._address.startswith(("/", "\0")) and hasattr(socket, "AF_UNIX"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | getattr(socket, "SOCK_CLOEXEC", 0))
            self._socket.setblocking(False)
        microseconds = environment.get(_WATCHDOG_VARIABLE, "")
        is_ours = environment.get(_WATCHDOG_PID_VARIABLE, str(os.getpid())) == str(os.getpid())
        listens = self._socket is not None and is_ours and microseconds.isdecimal()
        self.watchdog_seconds = max(int(microseconds) / 1e6, _WATCHDOG_SECONDS_MIN) if listens else 0.0
        self._pinged_ns = clock_ns()

    @property
    def pause_seconds(self) -> float:
        """How long the agent may sleep before it has to ping again; infinite without a watchdog."""
        if not self.watchdog_seconds:
            return float("inf")
        return max(self.watchdog_seconds / 2 - (self._clock_ns() - self._pinged_ns) / 1e9, 0.0)

    @property
    def is_heard(self) -> bool:
        """Whether there is a service manager that listens."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """The agent runs, or runs again after `reloading`."""
        self._status = status
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """It reads its configuration again."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={self._clock_ns() // 1000}")

    def stopping(self) -> None:
        """It ends, and delivers what it holds."""
        self._send("STOPPING=1\nSTATUS=delivering what is held")

    def extend(self, seconds: float) -> None:
        """Starting, reloading or stopping takes so much longer."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def status(self, text: str) -> None:
        """One line on how it does; the same again is not sent."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def ping(self, is_well: Callable[[], bool]) -> None:
        """For the watchdog, twice in its time: all is well, or nothing where it isn't."""
        if self.pause_seconds == 0:
            self._pinged_ns = self._clock_ns()
            if is_well():
                self._send("WATCHDOG=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.sendto(text.encode(errors="replace"), self._address)
