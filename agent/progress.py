"""What a long command draws on a terminal meanwhile: one line on stderr, drawn over again, erased at the end."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from types import TracebackType

REDRAW_SECONDS = 0.1
_BAR_WIDTH = 30


def has_terminal() -> bool:
    """Whether stderr is a terminal; nothing is drawn elsewhere."""
    return sys.stderr is not None and sys.stderr.isatty()


def draw(text: str) -> None:
    """Puts `text` in place of what was drawn before; nothing erases that."""
    with suppress(OSError):  # the terminal has gone; the report matters
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


class Bar:
    """A bar that fills with the steps of a command; entered while it runs, and erased however that ends.

    Args:
        steps: how many there are in all.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._done = 0
        self._drawn_seconds = -REDRAW_SECONDS
        self._is_shown = has_terminal()

    def __enter__(self) -> Bar:
        return self

    def advance(self, what: str) -> None:
        """Counts a step, of which `what` tells; draws when it is time."""
        self._done += 1
        now_seconds = time.monotonic()
        if self._is_shown and now_seconds - self._drawn_seconds >= REDRAW_SECONDS:
            self._drawn_seconds = now_seconds
            filled = _BAR_WIDTH * self._done // self._steps
            bar = "#" * filled + "." * (_BAR_WIDTH - filled)
            draw(f"[{bar}] {100 * self._done // self._steps} %, {what}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_shown:
            draw("")
