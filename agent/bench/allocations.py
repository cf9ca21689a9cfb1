"""Transient allocations, counted by memray: which part of a cycle makes how many, of how many bytes, and where.

memray sees every call of the interpreter's allocators and of malloc, in their order; what comes out of an object's free
list is no allocation. For memray to look, the interpreter makes a frame object at each call of a Python function, which
it doesn't otherwise: a second run counts those calls, and they are taken off.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from agent.bench.parts import Part
from agent.extras import needed

REPETITIONS = 20
_PACKAGE = Path(__file__).parents[2]
_FREES = ("FREE", "PYMALLOC_FREE", "MUNMAP")
_RESUME_PLACE = 3  # bits of RESUME's argument: 0 at the start of a function, else a generator goes on

Place = tuple[str, str, int]
"""Function, file and line."""


class Allocations(NamedTuple):
    """What one repetition allocates: how many blocks, and their bytes together."""

    blocks: float
    size_bytes: float


class Line(NamedTuple):
    """A line of source, and what it allocates.

    Attributes:
        place: file and line.
        share_ratio: of the cycle's allocations.
        allocations: of a cycle.
    """

    place: str
    function: str
    share_ratio: float
    allocations: float


class Tally:
    """Allocations by part, and by the place where they are made.

    Args:
        parts: which run one behind the other, over and over.
    """

    def __init__(self, parts: int, repetitions: int) -> None:
        self.counts: list[Counter[Place]] = [Counter() for _ in range(parts)]
        self.sizes = [0] * parts
        self._repetitions = repetitions
        self._marks = 0

    def mark(self) -> None:
        """A part begins, or it ends."""
        self._marks += 1

    def add(self, place: Place, size: int, count: int = 1) -> None:
        """Counts an allocation, or takes it off by a negative count, unless none of the parts is running."""
        if self._marks % 2:
            part = self._marks // 2 % len(self.counts)
            self.counts[part][place] += count
            self.sizes[part] += count * size

    def begin_again(self) -> None:
        """The parts are run anew, from the first one on."""
        self._marks = 0

    def allocations(self, part: int) -> Allocations:
        """Of a part, by repetition."""
        return Allocations(
            round(max(self.counts[part].total(), 0) / self._repetitions, 1),
            round(max(self.sizes[part], 0) / self._repetitions, 1),
        )

    def lines(self, part: int, least_ratio: float) -> list[Line]:
        """The lines of a part that make more than a share of its allocations, the most first."""
        total = max(self.counts[part].total(), 1)
        found = [(count, place) for place, count in self.counts[part].items() if count > least_ratio * total]
        return [
            Line(f"{_shown(file)}:{number}", function, count / total, count / self._repetitions)
            for count, (function, file, number) in sorted(found, reverse=True)
        ]


def load_memray() -> Any:
    """memray.

    Raises:
        UsageError: it isn't installed; names the command that installs it.
    """
    return needed("memray", "bench", "bench: to count allocations it needs memray")


def tallied(memray: Any, parts: Sequence[Part], tidy: Callable[[], object], repetitions: int = REPETITIONS) -> Tally:
    """Runs the parts under memray, and once more to count calls.

    Args:
        tidy: called behind the last part of each repetition; it isn't counted.
    """
    tally = Tally(len(parts), repetitions)
    with tempfile.TemporaryDirectory(prefix="hostprobe-bench-") as folder:
        path = Path(folder) / "allocations"
        with memray.Tracker(path, trace_python_allocators=True, follow_fork=False):
            _run(parts, tidy, repetitions)
        for place, size in _records(memray, path):
            if place[0] == _mark.__name__ and place[1] == __file__:
                tally.mark()
            elif place[0] != _run.__name__ or place[1] != __file__:
                tally.add(place, size)
    tally.begin_again()
    _take_calls_off(tally, parts, tidy, repetitions)
    return tally


def _run(parts: Sequence[Part], tidy: Callable[[], object], repetitions: int) -> None:
    for _ in repeat(None, repetitions):
        for part in parts:
            _mark()
            part.work()
            _mark()
        tidy()


def _mark() -> object:
    """An allocation that can be told from all others, by this function's name."""
    return object()


def _records(memray: Any, path: Path) -> Iterator[tuple[Place, int]]:
    """Every allocation in its order: the place and the bytes; those of no Python function are passed over."""
    frees = {int(memray.AllocatorType[name]) for name in _FREES}
    places: dict[int, Place | None] = {}
    with memray.FileReader(path) as reader:
        for record in reader.get_allocation_records():
            if record.allocator in frees:
                continue
            stack = record.stack_id
            if stack not in places:
                places[stack] = next(iter(record.stack_trace(max_stacks=1)), None)
            place = places[stack]
            if place is not None:
                yield place, record.size


def _take_calls_off(tally: Tally, parts: Sequence[Part], tidy: Callable[[], object], repetitions: int) -> None:
    """Counts the calls of Python functions by their callers' lines, where memray has seen their frame objects."""
    mark_code, run_code = _mark.__code__, _run.__code__

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event != "call":
            return
        caller = frame.f_back
        if frame.f_code is mark_code:
            tally.mark()
        elif caller is not None and caller.f_code is not run_code and _begins(frame):
            code = caller.f_code
            tally.add((code.co_name, code.co_filename, caller.f_lineno), sys.getsizeof(frame), -1)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        _run(parts, tidy, repetitions)
    finally:
        sys.setprofile(before)


def _begins(frame: FrameType) -> bool:
    """Whether a function is called, and not a generator that goes on."""
    return not frame.f_code.co_code[frame.f_lasti + 1] & _RESUME_PLACE


def _shown(file: str) -> str:
    """A path as it is below hostprobe's own packages, or below site-packages."""
    path = Path(file)
    if path.is_relative_to(_PACKAGE):
        return str(path.relative_to(_PACKAGE))
    return file.partition("/site-packages/")[2] or file
