"""Waiting that a signal or another thread can end."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from types import FrameType

_LONGEST_POLL_SECONDS = 86_400.0  # poll(2) takes milliseconds in 32 bits; whoever waits longer asks again


_RELOAD = getattr(signal, "SIGHUP", None)  # not on Windows


class Waker:
    """Sleeps until a time is up, SIGTERM, SIGINT or SIGHUP comes, or another thread asks to stop.

    It waits in poll(2) on a pipe. A `threading.Event` would be a trap here: a signal
    handler that sets it while its own thread is inside `wait` can deadlock.

    Attributes:
        stopped: whether it is time to stop.
        reload_is_due: whether SIGHUP has come; whoever reloads sets it back before.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.reload_is_due = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)

    def catch_signals(self) -> None:
        """SIGTERM and SIGINT stop, a second one ends the process at once; only the main thread can call this."""
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def catch_reload(self) -> None:
        """SIGHUP asks to reload; only the main thread can call this."""
        if _RELOAD is not None:
            signal.signal(_RELOAD, self._on_reload)

    def ignore_reload(self) -> None:
        """SIGHUP does nothing any more, also while the interpreter ends."""
        if _RELOAD is not None:
            signal.signal(_RELOAD, signal.SIG_IGN)

    def _on_reload(self, number: int, frame: FrameType | None) -> None:
        self.reload_is_due = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        for caught in (signal.SIGTERM, signal.SIGINT):  # whoever asks twice doesn't want to wait for what hangs
            signal.signal(caught, signal.SIG_DFL)

    def stop(self) -> None:
        """Stops from another thread."""
        self.stopped = True
        with suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._writer, b"\0")

    def wait(self, seconds: float) -> bool:
        """Sleeps for at most `seconds`; returns whether to stop."""
        if not self.stopped and seconds > 0 and self._poll.poll(min(seconds, _LONGEST_POLL_SECONDS) * 1000):
            os.read(self._reader, 4096)
        return self.stopped
