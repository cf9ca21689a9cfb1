"""What a probe is: its settings, its tables, and one method that fills them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import translate
from functools import lru_cache
from typing import Annotated, ClassVar, Protocol

import msgspec

from agent.frame import Frame
from agent.table import TableSpec
from agent.units import Duration

RowLimit = Annotated[int, msgspec.Meta(ge=1)]
"""How many rows a table has at most; what is left out is counted."""


class ProbeSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A probe's section of the configuration; a probe with settings of its own adds to it."""

    enabled: bool = True
    interval: Duration | None = None


class DeviceSettings(ProbeSettings, frozen=True, kw_only=True):
    """Settings of a probe that has a row for each of the host's devices.

    A device is kept where it matches `include` and not `exclude`, both shell patterns.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    row_limit: RowLimit = 64


class Probe(Protocol):
    """Reads one part of the host and fills its tables.

    The constructor takes the probe's settings and the `Host`, and opens what it keeps
    open. `collect` opens its tables in the frame and fills them; it takes no time
    stamp and starts no thread that the cycle would wait for. A `ProbeError` that it
    raises (or any other exception) is counted and logged by the cycle, which goes on.
    What an operator should know though nothing failed, it may append to a list `notices`: it is logged and removed.
    """

    Settings: ClassVar[type[ProbeSettings]]
    tables: ClassVar[tuple[TableSpec, ...]]

    def collect(self, frame: Frame) -> None: ...

    def close(self) -> None: ...


class NameFilter:
    """Which names shell patterns select."""

    def __init__(self, include: Iterable[str], exclude: Iterable[str] = ()) -> None:
        self._include = _any_of(include)
        self._exclude = _any_of(exclude)

    def keeps(self, name: str) -> bool:
        return self._include.match(name) is not None and self._exclude.match(name) is None


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """Matches what any of the patterns matches, and nothing where there are none."""
    return re.compile("|".join(translate(pattern) for pattern in patterns) or r"(?!)")


CACHED_NAMES = 4096


@lru_cache(maxsize=CACHED_NAMES)
def as_text(name: bytes) -> str:
    """A name of the kernel's as text, the same object each time; bytes that are no UTF-8 become escapes, `\\xff`.

    The least recently used of more than `CACHED_NAMES` are forgotten.
    """
    return name.decode("utf-8", "backslashreplace")
