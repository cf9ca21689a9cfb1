"""Durations and sizes in human form: "250ms", "10s", "4MiB"."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = r"([0-9]{1,19}(?:\.[0-9]{1,18})?)"
_DURATION = re.compile(_NUMBER + r"\s*(ns|us|ms|s|m|h|d)")
_SIZE = re.compile(_NUMBER + r"\s*(B|kB|KB|MB|GB|KiB|MiB|GiB)")
_NANOSECONDS = {
    "d": 86_400 * 10**9,
    "h": 3600 * 10**9,
    "m": 60 * 10**9,
    "s": 10**9,
    "ms": 10**6,
    "us": 10**3,
    "ns": 1,
}
_BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# Far above any sense, and far below where clocks, timeouts and offsets overflow.
_LONGEST_DAYS = 3650
_LARGEST_GIB = 2**30


class Duration(float):
    """Seconds, written with their unit."""

    expected = f'a duration such as "250ms", "10s" or "1m", {_LONGEST_DAYS}d at most'

    @classmethod
    def parse(cls, value: Any) -> Duration:
        """Raises ValueError, saying what was expected, for anything but a duration's text."""
        match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
        if match is None:
            raise ValueError(cls.expected)
        nanoseconds = _amount(match[1], _NANOSECONDS[match[2]])
        if nanoseconds > _LONGEST_DAYS * _NANOSECONDS["d"]:
            raise ValueError(cls.expected)
        return cls(nanoseconds / 1e9)

    @property
    def ns(self) -> int:
        return round(self * 1e9)

    def __str__(self) -> str:
        nanoseconds = self.ns
        for unit, size in _NANOSECONDS.items():
            if nanoseconds and nanoseconds % size == 0:
                return f"{nanoseconds // size}{unit}"
        return "0s"


class Size(int):
    """Bytes, written with their unit; a bare number is bytes."""

    expected = f'a size such as "64KiB", "4MiB" or a number of bytes, {_LARGEST_GIB}GiB at most'

    @classmethod
    def parse(cls, value: Any) -> Size:
        """Raises ValueError, saying what was expected, for anything but a size."""
        size = -1
        if isinstance(value, int) and not isinstance(value, bool):
            size = value
        elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
            size = _amount(match[1], _BYTES[match[2]])
        if not 0 <= size <= _LARGEST_GIB * _BYTES["GiB"]:
            raise ValueError(cls.expected)
        return cls(size)

    def __str__(self) -> str:
        for unit in ("GiB", "MiB", "KiB"):
            if self and self % _BYTES[unit] == 0:
                return f"{self // _BYTES[unit]}{unit}"
        return f"{int(self)}B"


LONGEST_INTERVAL = Duration(86_400)
"""Of the agent, between two frames: poll(2), which waits for it, takes at most 24 days."""


def _amount(number: str, unit: int) -> int:
    """A number of units in whole parts of the smallest one; exact where the number is whole."""
    return int(number) * unit if number.isdecimal() else round(float(number) * unit)
