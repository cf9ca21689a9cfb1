"""Logging by structlog, to stderr: console on a terminal, JSON lines otherwise."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import msgspec

_QUIET_SECONDS = 60.0
LEVELS = ("debug", "info", "warning", "error")


class Log:
    """The agent's logger: one line an event, with its fields.

    structlog takes some 7 MB of resident memory (it imports asyncio and ssl), so it is
    imported when there is something to say; a healthy agent says nothing.

    Args:
        level: the least of `LEVELS` that is written.
        format: "console", "json", or "auto" by what stderr is.
    """

    def __init__(self, level: str = "info", format: str = "auto") -> None:
        self._level = LEVELS.index(level)
        self._format = format
        self._structlog: Any = None

    def load(self) -> None:
        """Imports structlog now, where memory is to be taken at the start."""
        self._structlog = self._structlog or _structlog(self._format)

    def debug(self, event: str, **fields: Any) -> None:
        self._write(0, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._write(1, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write(2, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write(3, event, fields)

    def _write(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if level >= self._level and sys.stderr is not None:
            with suppress(OSError, ValueError):  # a stderr that is full, closed or gone must not end a thread
                self.load()
                if self._structlog is not None:
                    getattr(self._structlog, LEVELS[level])(event, **fields)
                else:
                    line = msgspec.json.encode({**fields, "event": event, "level": LEVELS[level]}, enc_hook=str)
                    print(line.decode(), file=sys.stderr, flush=True)


class Episode:
    """Trouble that is told when it begins and when it ends, and at most once a minute where it comes and goes."""

    __slots__ = ("_is_on", "_is_told", "_told_seconds")

    def __init__(self) -> None:
        self._is_on = self._is_told = False
        self._told_seconds = -_QUIET_SECONDS

    def begins(self, now_seconds: float) -> bool:
        """Trouble: whether to tell it."""
        if not self._is_on:
            self._is_on = True
            self._is_told = now_seconds - self._told_seconds >= _QUIET_SECONDS
            if self._is_told:
                self._told_seconds = now_seconds
                return True
        return False

    def ends(self) -> bool:
        """No trouble: whether to tell it, as its beginning was told."""
        tells, self._is_on, self._is_told = self._is_told, False, False
        return tells


def _structlog(format: str) -> Any:
    """structlog's logger; None while it can't be imported, as when no file can be opened any more."""
    try:
        import structlog
    except (ImportError, OSError):
        return None
    terminal = sys.stderr.isatty()
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=terminal)
        if format == "console" or (format == "auto" and terminal)
        else structlog.processors.JSONRenderer()
    )
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
    )
