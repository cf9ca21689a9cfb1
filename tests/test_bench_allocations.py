"""Transient allocations: as many as the code makes, at the lines that make them, and none that only memray causes."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.bench.allocations import Tally, load_memray, tallied
from agent.bench.parts import Part
from agent.errors import UsageError

memray = load_memray()
KEPT: list[object] = [None] * 100


def ten_objects() -> None:
    for place in range(10):
        KEPT[place] = object()


def a_buffer() -> None:
    KEPT[0] = bytearray(100_000)


def nothing() -> None: ...


def fifty_calls() -> None:
    for _ in KEPT[:50]:
        nothing()


def generator() -> Iterator[int]:
    yield from (1, 2, 3)


def a_generator_that_goes_on() -> None:
    for _ in generator():
        nothing()


def tally_of(*works: Callable[[], object], tidy: Callable[[], object] = nothing) -> Tally:
    return tallied(memray, [Part(work.__name__, work, None) for work in works], tidy)


def test_as_many_as_are_made_in_each_repetition() -> None:
    tally = tally_of(nothing, ten_objects, a_buffer)
    none, objects, buffer = (tally.allocations(part) for part in range(3))
    assert none == (0, 0)
    assert objects.blocks == 10 + 2  # range(10) and its iterator
    assert 10 * sys.getsizeof(object()) < objects.size_bytes < 10 * sys.getsizeof(object()) + 200
    assert buffer.blocks == 2  # the object, and what it points to
    assert 100_000 <= buffer.size_bytes < 100_200


def test_what_memray_causes_itself_is_taken_off() -> None:
    tally = tally_of(fifty_calls, a_generator_that_goes_on)
    assert tally.allocations(0).blocks <= 3  # a list, its items and an iterator; none for each of fifty calls
    # Two objects with a frame each of their own, and iterators; not an allocation for each time that it goes on.
    assert tally.allocations(1).blocks <= 4
    assert all(count >= 0 for part in tally.counts for count in part.values())


def test_what_runs_between_the_parts_is_not_counted() -> None:
    assert tally_of(nothing, tidy=ten_objects).allocations(0) == (0, 0)
    assert tally_of(ten_objects, tidy=nothing).allocations(0).blocks == 12


def test_lines_are_told_with_their_share() -> None:
    def both() -> None:
        ten_objects()
        a_buffer()

    tally = tally_of(both)
    first, second, third = tally.lines(0, 0.05)
    source = Path(__file__).read_text().splitlines()

    def text_of(place: str) -> str:
        file, _, number = place.rpartition(":")
        assert file == "tests/test_bench_allocations.py"
        return source[int(number) - 1].strip()

    assert (text_of(first.place), first.function) == ("KEPT[place] = object()", "ten_objects")
    assert (first.allocations, round(first.share_ratio, 3)) == (10, round(10 / 14, 3))
    assert {text_of(second.place), text_of(third.place)} == {"for place in range(10):", "KEPT[0] = bytearray(100_000)"}
    assert [line.allocations for line in tally.lines(0, 0.2)] == [10]


def test_its_files_are_removed_and_the_profiler_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def look(*_: Any) -> None: ...

    def fails() -> None:
        seen.extend(tmp_path.rglob("*"))
        raise RuntimeError

    sys.setprofile(look)
    try:
        tally_of(ten_objects)
        assert sys.getprofile() is look
    finally:
        sys.setprofile(None)
    with pytest.raises(RuntimeError):
        tally_of(fails)
    assert seen
    assert list(tmp_path.iterdir()) == []
    assert tally_of(ten_objects).allocations(0).blocks == 12


def test_without_memray_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "memray", None)
    with pytest.raises(UsageError) as raised:
        load_memray()
    assert str(raised.value) == 'bench: to count allocations it needs memray: expected pip install "hostprobe[bench]"'
