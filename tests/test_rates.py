"""Rates and ratios: from the growth since the last collection, or null."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from agent.frame import Frame
from agent.table import COUNTER_MAX
from tests.tables import DISKS, MEMORY, SECOND, cycle, fill


def test_rates_and_ratios_between_two_cycles() -> None:
    frame = Frame([DISKS])
    first = cycle(frame, 1, {"a": [1000, 500, 100, 0], "b": [0, 0, 0, 0]})
    assert np.isnan([*first["a"], *first["b"]]).all()
    second = cycle(frame, 5, {"a": [3000, 1500, 500, 0], "b": [4, 100, 40, 0]})
    assert second["a"] == [500.0, 0.25, 0.25]
    assert second["b"] == [1.0, 0.25, 0.025]


def test_a_rate_is_exact_beside_the_largest_counters() -> None:
    frame = Frame([DISKS])
    cycle(frame, 1, {"a": [COUNTER_MAX - 30, 0, 0, 0]})
    assert cycle(frame, 11, {"a": [COUNTER_MAX, 0, 0, 0]})["a"][0] == 3.0


def test_rows_are_matched_by_label() -> None:
    frame = Frame([DISKS])
    start: dict[str, Sequence[int | None]] = {"a": [10, 0, 0, 0], "b": [200, 0, 0, 0], "c": [3000, 0, 0, 0]}
    cycle(frame, 1, start)
    moved = cycle(frame, 2, {"c": [3003, 0, 0, 0], "new": [9, 0, 0, 0], "a": [11, 0, 0, 0]})
    assert (moved["c"][0], moved["a"][0]) == (3.0, 1.0)
    assert math.isnan(moved["new"][0])
    back = cycle(frame, 3, {"a": [12, 0, 0, 0], "b": [201, 0, 0, 0], "c": [3006, 0, 0, 0], "new": [10, 0, 0, 0]})
    assert (back["a"][0], back["c"][0], back["new"][0]) == (1.0, 3.0, 1.0)
    assert math.isnan(back["b"][0])  # it was away: nobody knows what it did
    none = cycle(frame, 4, {})
    assert none == {}
    assert math.isnan(cycle(frame, 5, start)["a"][0])


def test_equal_labels_in_another_list_are_the_same_rows() -> None:
    frame = Frame([DISKS])
    labels = [("a",), ("b",)]
    for second, copy in enumerate((labels, labels, list(labels)), 1):
        frame.begin(1, second * SECOND)
        fill(frame, {"a": [second, 0, 0, 0], "b": [second * 2, 0, 0, 0]}, copy)
        frame.derive()
        values = frame.tables["disks"].gauges[:2, 2].tolist()
        assert np.isnan(values).all() if second == 1 else values == [1.0, 2.0]


def test_a_counter_that_fell_or_is_unknown_nulls_its_row_only() -> None:
    for other in ([9, 0, 0, 0], [None, 0, 0, 0]):
        frame = Frame([DISKS])
        cycle(frame, 1, {"a": [10, 0, 0, 0], "b": [10, 0, 0, 0]})
        after = cycle(frame, 2, {"a": other, "b": [12, 0, 0, 0]})
        assert np.isnan(after["a"]).all()
        assert after["b"][0] == 2.0
        known = cycle(frame, 3, {"a": [20, 0, 0, 0], "b": [14, 0, 0, 0]})
        assert known["b"][0] == 2.0
        assert math.isnan(known["a"][0]) == (other[0] is None)


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_what_was_unknown_before_has_no_rate_in_either_order(names: str) -> None:
    frame = Frame([DISKS])
    cycle(frame, 1, {"a": [10, 0, 0, None], "b": [None, 0, 0, 0]})
    after = cycle(frame, 2, {name: [12, 0, 0, 0] for name in names})
    assert after["a"][0] == 2.0  # `aside_total` takes part in no rate
    assert math.isnan(after["b"][0])


def test_a_zero_divisor_gives_null() -> None:
    frame = Frame([DISKS])
    cycle(frame, 1, {"a": [0, 0, 7, 0]})
    after = cycle(frame, 2, {"a": [1, 100, 7, 0]})["a"]
    assert after[0] == 1.0
    assert math.isnan(after[1])


def test_ratios_stop_at_one_and_rates_do_not() -> None:
    frame = Frame([DISKS])
    cycle(frame, 1, {"a": [0, 0, 0, 0]})
    assert cycle(frame, 2, {"a": [500, 1003, 100, 0]})["a"] == [500.0, 1.0, 1.0]


def test_no_time_between_frames_gives_no_rate() -> None:
    frame = Frame([DISKS])
    cycle(frame, 1, {"a": [0, 0, 0, 0]})
    assert np.isnan(cycle(frame, 1, {"a": [5, 5, 5, 5]})["a"]).all()


def test_counters_that_do_not_continue_have_no_rate_for_a_cycle() -> None:
    frame = Frame([DISKS])
    seen = []
    for second, continues in enumerate((True, False, True), 1):
        frame.begin(1, second * SECOND)
        fill(frame, {"a": [second * 10, 0, 0, 0]}).continues = continues
        frame.derive()
        seen.append(frame.tables["disks"].gauges[0, 2])
    assert np.isnan(seen[:2]).all()
    assert seen[2] == 10.0


def test_rates_while_the_number_of_rows_grows_and_shrinks() -> None:
    frame = Frame([DISKS])
    for second, rows in enumerate((2, 40, 3, 100, 1, 100), 1):
        values = cycle(frame, second, {str(row): [second * 10 + row, 0, 0, 0] for row in range(rows)})
        if second > 1:
            assert values["0"][0] == 10.0
    assert sum(not math.isnan(value[0]) for value in values.values()) == 1


def test_a_table_that_is_not_due_gets_a_rate_over_the_longer_time() -> None:
    frame = Frame([DISKS, MEMORY])
    cycle(frame, 1, {"a": [100, 0, 0, 0]})
    for second in (2, 3):
        frame.begin(1, second * SECOND)
        frame.open(MEMORY)
        frame.derive()
        assert "disks" not in frame.tables
    assert cycle(frame, 5, {"a": [500, 0, 0, 0]})["a"][0] == 100.0
    assert frame.interval_seconds == 2.0


def test_a_discarded_table_leaves_the_one_before_for_the_next_rate() -> None:
    frame = Frame([DISKS, MEMORY])
    cycle(frame, 1, {"a": [100, 0, 0, 0]})
    frame.begin(1, 2 * SECOND)
    fill(frame, {"a": [1, 0, 0, 0]})
    frame.discard([DISKS, MEMORY])
    assert frame.tables == {}
    assert cycle(frame, 3, {"a": [140, 0, 0, 0]})["a"][0] == 20.0
