"""The arena: two sides that take turns, room that grows and is given back."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from agent.arena import KEPT_CYCLES, Arena
from agent.frame import Frame
from agent.table import Table, TableSpec, counter, gauge
from tests.tables import DISKS, MEMORY, SECOND, cycle, fill

BARE = TableSpec("bare", "Labels and nothing else.", labels=("name",))


def names(count: int) -> dict[str, list[int]]:
    return {str(row): [row, row, row, row] for row in range(count)}


def test_the_tables_of_a_side_are_views_of_its_arrays_and_overlap_nowhere() -> None:
    side = Arena([DISKS, MEMORY, BARE]).now
    for number, table in enumerate(side.tables.values(), 1):
        table.counters[:] = number
        table.gauges[:] = number
        table.unknown[:] = True
    assert side.counters.tolist() == [1] * DISKS.rows * 4 + [2]
    assert side.gauges.tolist() == [1.0] * DISKS.rows * 5 + [2.0]
    assert side.unknown.all()
    memory = side.tables["memory"]
    assert (memory.counters_start, memory.gauges_start) == (DISKS.rows * 4, DISKS.rows * 5)


def test_sides_take_turns_and_what_comes_is_blank() -> None:
    arena = Arena([DISKS])
    first, second = arena.now, arena.before
    first.counters[:], first.gauges[:], first.unknown[:] = 1, 1.0, True
    arena.turn()
    assert (arena.now, arena.before) == (second, first)
    arena.turn()
    assert arena.now is first
    assert not first.counters.any()
    assert not first.unknown.any()
    assert np.isnan(first.gauges).all()


@pytest.mark.parametrize(("rows", "capacity"), [(4, 4), (5, 8), (8, 8), (9, 16), (33, 64)])
def test_room_for_more_rows_is_made_at_once_and_keeps_what_tables_hold(rows: int, capacity: int) -> None:
    frame = Frame([MEMORY, DISKS])
    cycle(frame, 1, names(2))
    frame.begin(1, 2 * SECOND)
    memory = frame.open(MEMORY)
    memory.put_gauges(0, [5.0])
    memory.put_counters(0, [6])
    table = fill(frame, names(rows))
    assert table.capacity == len(table.counters) == len(table.unknown) == capacity
    assert table.counters.tolist() == [[row] * 4 if row < rows else [0] * 4 for row in range(capacity)]
    assert np.isnan(table.gauges).all()
    assert (memory.gauges[0, 0], memory.counters[0, 0]) == (5.0, 6)
    before = frame.previous("disks")
    assert before is not None
    assert before.capacity == capacity
    assert before.counters[:2].tolist() == [[0] * 4, [1] * 4]
    assert frame.arena.regrown == (capacity > DISKS.rows)


def test_rates_go_on_while_the_arena_is_laid_out_anew() -> None:
    frame = Frame([DISKS])
    cycle(frame, 1, {"a": [100, 0, 0, 0]})
    assert cycle(frame, 2, {"a": [110, 0, 0, 0]})["a"][0] == 10.0
    grown = cycle(frame, 3, {"a": [140, 0, 0, 0]} | names(9))
    assert grown["a"][0] == 30.0
    assert np.isnan(grown["8"][0])
    assert cycle(frame, 4, {"a": [150, 0, 0, 0]} | names(9))["a"][0] == 10.0


def test_a_table_that_stays_large_makes_no_array() -> None:
    frame = Frame([DISKS])
    for second in range(1, 2 * KEPT_CYCLES + 10):
        cycle(frame, second, names(DISKS.keep_rows + 1))
    assert frame.arena.regrown == 1
    assert frame.tables["disks"].capacity == 2 * DISKS.keep_rows


def test_room_of_a_table_that_was_large_for_a_moment_is_given_back() -> None:
    frame = Frame([DISKS, MEMORY])
    cycle(frame, 1, names(DISKS.keep_rows + 1))
    for second in range(2, 10):
        cycle(frame, second, names(3))
    assert frame.tables["disks"].capacity == 2 * DISKS.keep_rows
    rates = [cycle(frame, second, {"a": [second * 7, 0, 0, 0]}) for second in range(10, KEPT_CYCLES + 10)]
    assert frame.tables["disks"].capacity == DISKS.keep_rows
    assert frame.arena.regrown == 2
    assert [rate["a"][0] for rate in rates[1:]] == [7.0] * (KEPT_CYCLES - 1)
    for second in range(100, 200):
        cycle(frame, second, names(DISKS.keep_rows))
    assert frame.arena.regrown == 2


def test_a_table_that_is_large_now_and_then_keeps_its_room() -> None:
    frame = Frame([DISKS])
    for second in range(1, 5 * KEPT_CYCLES):
        cycle(frame, second, names(DISKS.keep_rows + 1 if second % (KEPT_CYCLES // 2) == 0 else 2))
    assert frame.arena.regrown == 1


def test_a_table_that_is_not_due_is_given_its_room_back_too() -> None:
    """And what it held, which is kept for when it is due, fits."""
    frame = Frame([DISKS, MEMORY])
    cycle(frame, 1, names(DISKS.keep_rows + 1))
    cycle(frame, 2, {"a": [5, 0, 0, 0]})
    for second in range(3, 3 + 2 * KEPT_CYCLES):
        frame.begin(1, second * SECOND)
        frame.open(MEMORY)
    assert frame.arena.before.tables["disks"].capacity == DISKS.keep_rows
    last = 3 + 2 * KEPT_CYCLES
    assert cycle(frame, last, {"a": [5 + last - 2, 0, 0, 0]})["a"][0] == 1.0


def test_without_tables_and_without_columns() -> None:
    frame = Frame([])
    frame.begin(1, 1)
    frame.derive()
    assert frame.tables == {}
    frame = Frame([BARE])
    frame.begin(1, 1)
    table = frame.open(BARE)
    table.claim([(str(row),) for row in range(20)])
    assert (table.counters.shape, table.gauges.shape) == ((32, 0), (32, 0))


class Watched(list[tuple[str, ...]]):
    """A list that can be referred to weakly."""


def test_labels_are_held_no_longer_than_two_cycles() -> None:
    frame = Frame([DISKS])
    frame.begin(1, 1)
    labels = Watched([("a",)])
    frame.open(DISKS).claim(labels)
    seen = weakref.ref(labels)
    del labels
    for second in (2, 3):
        assert seen() is not None
        cycle(frame, second, names(1))
    assert seen() is None


def test_a_table_of_its_own_has_its_own_arrays() -> None:
    table = Table(TableSpec("own", ".", counter("a_total", "a", "."), gauge("b", "b", "."), labels=("l",)))
    table.claim([("x",), ("y",), ("z",), ("u",), ("v",)])
    assert table.counters.shape == (8, 1)
    assert np.isnan(table.gauges).all()
