"""The line that a long command draws on a terminal."""

from __future__ import annotations

import io
import sys
import time
from contextlib import suppress

import pytest

from agent import progress


class Terminal(io.StringIO):
    """A stderr that says it is one."""

    def isatty(self) -> bool:
        return True


class Gone(Terminal):
    """A terminal that was closed."""

    def write(self, text: str, /) -> int:
        raise OSError(5, "Input/output error")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, to be set."""
    seconds = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_bar_fills_up_and_is_erased(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.Bar(4) as bar:
        bar.advance("first")
        now[0] += progress.REDRAW_SECONDS / 2
        bar.advance("too early to be drawn")
        now[0] += progress.REDRAW_SECONDS
        bar.advance("third")
    assert screen.getvalue().split("\r\x1b[K") == [
        "",
        "[#######.......................] 25 %, first",
        "[######################........] 75 %, third",
        "",
    ]


def test_a_bar_is_erased_when_it_is_interrupted(now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with suppress(KeyboardInterrupt), progress.Bar(2) as bar:
        bar.advance("something")
        raise KeyboardInterrupt
    assert screen.getvalue().endswith("something\r\x1b[K")


@pytest.mark.parametrize("stderr", [io.StringIO(), None])
def test_nothing_is_drawn_elsewhere(stderr: io.StringIO | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    assert not progress.has_terminal()
    with progress.Bar(1) as bar:
        bar.advance("something")
    assert stderr is None or stderr.getvalue() == ""


def test_a_terminal_that_has_gone_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Gone()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.Bar(1) as bar:
        bar.advance("something")
    assert screen.getvalue() == ""
