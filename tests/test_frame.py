"""Frames: one stamp for all tables, tables that take turns."""

from __future__ import annotations

import math

import numpy as np
import pytest

from agent.frame import Frame
from agent.table import Table
from tests.tables import DISKS, MEMORY, SECOND, cycle, fill


def test_one_stamp_and_one_interval_for_all_tables() -> None:
    frame = Frame([DISKS, MEMORY])
    frame.begin(123, 4 * SECOND)
    assert (frame.sequence, frame.time_unix_ns, frame.monotonic_ns) == (1, 123, 4 * SECOND)
    assert math.isnan(frame.interval_seconds)
    fill(frame, {"a": [1, 2, 3, 4]})
    frame.open(MEMORY).put_gauges(0, [5.0])
    assert {table.monotonic_ns for table in frame.tables.values()} == {4 * SECOND}
    assert list(frame.tables) == ["disks", "memory"]
    frame.begin(456, 4 * SECOND + SECOND // 4)
    assert (frame.sequence, frame.time_unix_ns, frame.interval_seconds) == (2, 456, 0.25)
    assert frame.tables == {}


def test_a_table_without_labels_has_its_row_from_the_start() -> None:
    frame = Frame([MEMORY])
    frame.begin(1, 1)
    table = frame.open(MEMORY)
    assert (table.count, list(table.labels), table.capacity) == (1, [()], 1)
    assert math.isnan(table.gauges[0, 0])
    with pytest.raises(AssertionError, match="opened twice"):
        frame.open(MEMORY)


def test_a_table_is_as_good_as_new_when_it_is_opened_again() -> None:
    frame = Frame([DISKS])
    for second in range(1, 4):
        cycle(frame, second, {"a": [7, None, 7, 7], "b": [8, 8, 8, 8]})
        table = frame.tables["disks"]
        table.put_gauges(1, [0.5])
        table.dropped, table.continues = 3, False
        frame.begin(1, second * SECOND)
        table = frame.open(DISKS)
        assert (table.count, table.dropped, table.complete, table.continues, table.labels) == (0, 0, True, True, ())
        assert not table.counters.any()
        assert not table.unknown.any()
        assert np.isnan(table.gauges).all()


def test_two_tables_serve_any_number_of_cycles() -> None:
    frame = Frame([DISKS])
    seen = set()
    for second in range(1, 20):
        cycle(frame, second, {"a": [second, 0, 0, 0]})
        seen.add(id(frame.tables["disks"]))
    assert len(seen) == 2
    assert (frame.arena.made, frame.arena.regrown) == (1, 0)


# What was collected before


def content(table: Table | None) -> tuple[object, ...]:
    """What a table has in its first row, and says of itself."""
    assert table is not None
    row = table.counters[0].tolist(), table.unknown[0].tolist(), float(table.gauges[0, 0])
    return list(table.labels), *row, table.complete, table.monotonic_ns


def first_counters(tables: dict[str, Table]) -> dict[str, int]:
    return {name: int(table.counters[0, 0]) for name, table in tables.items()}


def test_previous_is_the_table_of_the_last_collection() -> None:
    frame = Frame([DISKS, MEMORY])
    frame.begin(1, 1)
    assert frame.previous("disks") is None
    fill(frame, {"a": [1, None, 3, 4]}).put_gauges(0, [0.5])
    assert frame.previous("disks") is None
    first = ([("a",)], [1, 0, 3, 4], [False, True, False, False], 0.5, False, 1)
    for moment in range(2, 5):  # it isn't due for a while
        frame.begin(moment, moment)
        assert content(frame.previous("disks")) == first
    fill(frame, {"b": [5, 6, 7, 8]}).put_gauges(0, [1.5])
    assert content(frame.previous("disks")) == first
    frame.begin(5, 5)
    assert content(frame.previous("disks")) == ([("b",)], [5, 6, 7, 8], [False] * 4, 1.5, True, 4)


def test_a_table_that_was_discarded_is_nobodys_previous() -> None:
    frame = Frame([DISKS])
    frame.begin(1, 1)
    fill(frame, {"a": [1, 2, 3, 4]})
    first = content(frame.tables["disks"])
    frame.begin(2, 2)
    fill(frame, {"a": [5, 6, 7, 8]})
    frame.discard([DISKS])
    assert frame.tables == {}
    assert content(frame.previous("disks"))[1] == [1, 2, 3, 4]
    frame.begin(3, 3)
    assert content(frame.previous("disks"))[1] == [1, 2, 3, 4]
    assert content(frame.previous("disks"))[0] == first[0]
    assert not frame.open(DISKS).counters.any()


def test_latest_is_this_cycles_tables_and_the_last_of_those_that_were_not_due() -> None:
    frame = Frame([DISKS, MEMORY])
    frame.begin(1, 1)
    fill(frame, {"a": [1, 2, 3, 4]})
    frame.open(MEMORY).put_counters(0, [5])
    assert first_counters(frame.latest()) == {"disks": 1, "memory": 5}
    for _ in range(2):
        frame.begin(2, 2)
        assert first_counters(frame.latest()) == {"disks": 1, "memory": 5}
    frame.open(MEMORY).put_counters(0, [6])
    assert first_counters(frame.latest()) == {"disks": 1, "memory": 6}
    assert list(frame.tables) == ["memory"]
    fill(frame, {"b": [2, 2, 3, 4]})
    assert first_counters(frame.latest()) == {"disks": 2, "memory": 6}
    frame.begin(3, 3)
    assert first_counters(frame.latest()) == {"disks": 2, "memory": 6}


@pytest.mark.parametrize("opened", [True, False])
def test_a_probe_that_failed_has_no_latest_tables_until_it_is_collected_again(opened: bool) -> None:
    """Whether it failed half-way or before it had a table, and although it was well before."""
    frame = Frame([DISKS, MEMORY])
    for _ in range(2):
        frame.begin(1, 1)
        frame.open(MEMORY).put_counters(0, [9])
        fill(frame, {"a": [1, 2, 3, 4]})
    frame.begin(2, 2)
    if opened:
        fill(frame, {"a": [5, 6, 7, 8]})
    frame.discard([DISKS])
    assert first_counters(frame.latest()) == {"memory": 9}
    frame.begin(3, 3)  # none is due
    assert first_counters(frame.latest()) == {"memory": 9}
    fill(frame, {"a": [6, 6, 7, 8]})
    assert first_counters(frame.latest()) == {"disks": 6, "memory": 9}
    frame.begin(4, 4)
    assert first_counters(frame.latest()) == {"disks": 6, "memory": 9}


def test_a_probe_that_fails_again_in_the_cycle_in_which_it_was_to_recover() -> None:
    frame = Frame([DISKS])
    frame.begin(1, 1)
    fill(frame, {"a": [1, 2, 3, 4]})
    for second in range(2, 5):
        frame.begin(second, second)
        fill(frame, {"a": [5, 6, 7, 8]})
        frame.discard([DISKS])
        assert frame.latest() == {}
    frame.begin(9, 9)
    assert frame.latest() == {}
