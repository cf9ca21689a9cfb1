"""Logging by structlog, to stderr: console on a terminal, JSON lines otherwise; to journald with its priorities."""

from __future__ import annotations

import atexit
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from agent.errors import is_journal

LEVELS = ("debug", "info", "warning", "error")
_PRIORITIES = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>"}  # sd-daemon(3)
_QUIET_SECONDS = 60.0
_LINES_MAX = 10
"""Of one cause in its first minute: as much as a circuit that opens and closes a few times; the eleventh tells no
more than that it goes on, which a count does better."""
_LINES_MAX_THEN = 1
"""In each minute that follows one in which lines were held back."""
_CAUSES_MAX = 256
_OTHER = ("", "")
"""The cause of what comes while there are `_CAUSES_MAX` others: (256 + 1) · (10 + 1) lines a minute at most."""
_LATEST_MAX = 10
_LATEST_ALIKE_MAX = 3
_WORTH_KEEPING = LEVELS.index("warning")


class Told(NamedTuple):
    """A line of the log."""

    time_unix_ns: int
    level: str
    event: str
    fields: dict[str, str]


class _Cause:
    """What one event of one subject has written since `began_seconds`, and what was held back."""

    __slots__ = ("began_seconds", "event", "fields", "held_back", "held_seconds", "left", "level")

    def __init__(self, event: str, now_seconds: float, lines_max: int = _LINES_MAX) -> None:
        self.began_seconds = now_seconds
        self.event = event
        self.left = lines_max
        self.held_back = self.level = 0
        self.held_seconds = now_seconds
        self.fields: dict[str, Any] = {}

    def admits(self, level: int, fields: dict[str, Any], now_seconds: float) -> bool:
        """Whether one more line may be written; else it is counted, and the last one kept."""
        if self.left:
            self.left -= 1
            return True
        self.held_back += 1
        self.held_seconds = now_seconds
        self.level = max(self.level, level)
        self.fields = fields
        return False


class Log:
    """The agent's logger: one line an event, with its fields.

    Whoever calls, and how often: the same event of the same subject (the field `sink` or `probe`, else
    `reason`) is written ten times in a minute at most, and once in the next ones while it goes on so. When
    a minute is over one line, "log lines held back", says how many more there were, and what the last of
    them said. Debug is not limited.

    structlog takes some 7 MB of resident memory (it imports asyncio and ssl), so it is
    imported when there is something to say; a healthy agent says nothing.

    Args:
        level: the least of `LEVELS` that is written.
        format: "console", "json", or "auto" by what stderr is.
        clock_seconds: for the minutes.

    Attributes:
        latest: the last warnings and errors, whether they were written or not; the oldest first, at
            most three of one cause.
        unwritten: lines that stderr didn't take since the last one that it took.
    """

    def __init__(
        self, level: str = "info", format: str = "auto", clock_seconds: Callable[[], float] = time.monotonic
    ) -> None:
        self.latest: tuple[Told, ...] = ()
        self.unwritten = 0
        self._clock_seconds = clock_seconds
        self._lock = threading.Lock()
        self._causes: dict[tuple[str, str], _Cause] = {}  # in the order of their beginning
        self._timer: threading.Timer | None = None
        self.change(level, format)

    def change(self, level: str, format: str) -> None:
        """Goes on with another level and format."""
        self._level = LEVELS.index(level)
        self._least = min(self._level, _WORTH_KEEPING)
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

    def close(self) -> None:
        """Tells at once what was held back; a process that ends does it by itself."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
                atexit.unregister(self.close)
            held_back = [cause for cause in self._causes.values() if cause.held_back]
            self._causes.clear()
        self._tell_held_back(held_back)

    def _write(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if level < self._least:
            return
        if level:
            now = self._clock_seconds()
            with self._lock:
                ended = self._ended(now)
                cause = self._cause(event, fields, now)
                admitted = cause.admits(level, fields, now)
                if not admitted and self._timer is None:
                    self._wait_for(cause, now)
            if ended:
                self._tell_held_back(ended)
            if not admitted:
                return
        if level >= _WORTH_KEEPING:
            self._keep(Told(time.time_ns(), LEVELS[level], event, {k: str(v) for k, v in fields.items()}))
        self._print(level, event, fields)

    def _cause(self, event: str, fields: dict[str, Any], now_seconds: float) -> _Cause:
        key = (event, _subject(fields))
        cause = self._causes.get(key)
        if cause is None and len(self._causes) >= _CAUSES_MAX:
            key, event = _OTHER, "many"
            cause = self._causes.get(key)
        if cause is None:
            cause = self._causes[key] = _Cause(event, now_seconds)
        return cause

    def _ended(self, now_seconds: float) -> list[_Cause]:
        """Forgets the causes whose minute is over; those of them that have something to tell."""
        ended = []
        while self._causes:
            key, oldest = next(iter(self._causes.items()))
            if now_seconds - oldest.began_seconds < _QUIET_SECONDS:
                break
            del self._causes[key]
            if oldest.held_back:
                ended.append(oldest)
                self._causes[key] = _Cause(oldest.event, now_seconds, _LINES_MAX_THEN)
        return ended

    def _wait_for(self, cause: _Cause, now_seconds: float) -> None:
        """Has somebody tell what is held back, should no line come when the minute is over."""
        seconds = max(cause.began_seconds + _QUIET_SECONDS - now_seconds, 0.01)
        self._timer = threading.Timer(seconds, self._on_time)
        self._timer.daemon = True
        atexit.register(self.close)
        with suppress(RuntimeError):  # no thread can be had: then the next line tells it, or the end
            self._timer.start()

    def _on_time(self) -> None:
        now = self._clock_seconds()
        with self._lock:
            self._timer = None
            atexit.unregister(self.close)
            ended = self._ended(now)
            waiting = next((cause for cause in self._causes.values() if cause.held_back), None)
            if waiting is not None:
                self._wait_for(waiting, now)
        self._tell_held_back(ended)

    def _tell_held_back(self, ended: list[_Cause]) -> None:
        now = self._clock_seconds()
        for cause in ended:
            what = {"of": cause.event, "lines": cause.held_back, "last_seconds_ago": round(now - cause.held_seconds, 1)}
            self._print(cause.level, "log lines held back", {**cause.fields, **what})

    def _keep(self, told: Told) -> None:
        """Keeps a line for the status; a flood of one cause takes only its own lines' places."""
        with self._lock:
            kept = list(self.latest)
            alike = [other for other in kept if other.event == told.event and _is_alike(other.fields, told.fields)]
            if len(alike) == _LATEST_ALIKE_MAX:
                kept.remove(alike[0])
            self.latest = (*kept[1 - _LATEST_MAX :], told)

    def _print(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if level < self._level or sys.stderr is None:
            return
        try:
            self._line(LEVELS[level], event, fields)
        except (OSError, ValueError):  # a stderr that is full, closed or gone must not end a thread
            self.unwritten += 1
            return
        if self.unwritten:
            lines, self.unwritten = self.unwritten, 0
            self._print(_WORTH_KEEPING, "log could not be written", {"lines": lines})

    def _line(self, level: str, event: str, fields: dict[str, Any]) -> None:
        self.load()
        if self._structlog is not None:
            getattr(self._structlog, level)(event, **fields)
            return
        line = msgspec.json.encode({**_encodable(fields), "event": event, "level": level}, enc_hook=str).decode()
        print(f"{_PRIORITIES[level] if is_journal() else ''}{line}", file=sys.stderr, flush=True)


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


def _subject(fields: dict[str, Any]) -> str:
    """Whom a line is about; what it says where it is about nobody."""
    subject = fields.get("sink") or fields.get("probe") or fields.get("reason", "")
    return subject if type(subject) is str else str(subject)


def _is_alike(fields: dict[str, str], others: dict[str, str]) -> bool:
    return _subject(fields) == _subject(others)


def _encodable(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields whose texts are UTF-8, also where a path's bytes are not."""
    return {
        name: value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
        for name, value in fields.items()
    }


def _structlog(format: str) -> Any:
    """structlog's logger; None while it can't be imported, as when no file can be opened any more."""
    try:
        import structlog
    except (ImportError, OSError):
        return None
    journal, terminal = is_journal(), sys.stderr.isatty()
    processors: list[Any] = [structlog.processors.add_log_level]
    if not journal or format != "auto":  # the journal has a time of its own
        processors.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    if format == "console" or (format == "auto" and terminal):
        processors.append(structlog.dev.ConsoleRenderer(colors=terminal))
    else:
        processors.append(structlog.processors.JSONRenderer())
    if journal:
        processors.append(lambda _, level, line: f"{_PRIORITIES[level]}{line}")
    return structlog.wrap_logger(structlog.PrintLogger(sys.stderr), processors=processors)
