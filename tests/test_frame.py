"""Columns, tables and frames: exact counters, unknowns, rates and ratios, rows, reuse, one stamp for all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from agent.frame import COUNTER_MAX, Frame, Labels, Table, TableSpec, counter, gauge, rate, ratio

SECOND = 1_000_000_000
DISKS = TableSpec(
    "disks",
    "For tests.",
    rate("bytes_per_second", "bytes/second", ".", "bytes_total"),
    counter("bytes_total", "bytes", "."),
    gauge("queue", "requests", "."),
    counter("seconds_total", "seconds", ".", per=1000),
    ratio("busy_ratio", "ratio", ".", ["seconds_total"], ["span_seconds_total"]),
    gauge("half", "requests", ".", derived=True),
    counter("span_seconds_total", "seconds", ".", per=100),
    rate("busy_per_second", "ratio", ".", "seconds_total"),
    counter("aside_total", "bytes", "."),
    labels=("device",),
    rows=4,
    keep_rows=64,
)
MEMORY = TableSpec("memory", "For tests.", gauge("free", "bytes", "."), counter("faults_total", "faults", "."))
NAN = math.nan


def fill(frame: Frame, rows: dict[str, Sequence[int | None]], labels: Sequence[Labels] | None = None) -> Table:
    table = frame.open(DISKS)
    table.claim(labels if labels is not None else [(name,) for name in rows])
    for row, values in enumerate(rows.values()):
        table.put_counters(row, values)
    return table


def cycle(frame: Frame, seconds: float, rows: dict[str, Sequence[int | None]]) -> dict[str, list[float]]:
    """A cycle `seconds` after the start: bytes a second, busy ratio, busy a second, of each device."""
    frame.begin(5 * SECOND, int(seconds * SECOND))
    table = fill(frame, rows)
    frame.derive([DISKS])
    return {table.labels[row][0]: table.gauges[row, 2:].tolist() for row in range(table.count)}


def test_the_order_of_columns_and_arrays() -> None:
    assert [column.name for column in DISKS.counters] == [
        "bytes_total", "seconds_total", "span_seconds_total", "aside_total",
    ]  # fmt: skip
    assert [column.name for column in DISKS.gauges] == [
        "queue", "half", "bytes_per_second", "busy_ratio", "busy_per_second",
    ]  # fmt: skip
    whole = {column.name for column in DISKS.columns if column.integral}
    assert whole == {"bytes_total", "queue", "half", "aside_total"}
    with pytest.raises(AssertionError, match="declared twice"):
        TableSpec("twice", ".", gauge("free", "bytes", "."), gauge("free", "bytes", "."))


def test_counters_are_exact_up_to_the_last_bit() -> None:
    table = Table(DISKS)
    table.claim([("a",)])
    table.put_counters(0, [COUNTER_MAX, COUNTER_MAX - 1, 2**63, 2**53 + 1])
    assert table.counters[0].tolist() == [COUNTER_MAX, COUNTER_MAX - 1, 2**63, 2**53 + 1]
    assert table.complete


@pytest.mark.parametrize("unknown", [None, -1, COUNTER_MAX + 1, -(2**70)])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_unknown_counter_is_masked_and_the_others_stay(unknown: int | None, place: int) -> None:
    values: list[int | None] = [COUNTER_MAX, 2, 3, 4]
    values[place] = unknown
    table = Table(DISKS)
    table.claim([("a",), ("b",)])
    table.put_counters(1, values)
    assert not table.complete
    assert table.unknown.tolist()[:2] == [[False] * 4, [index == place for index in range(4)]]
    assert [value for index, value in enumerate(table.counters[1].tolist()) if index != place] == [
        value for index, value in enumerate(values) if index != place
    ]


def test_counters_from_a_position_and_forgotten_ones() -> None:
    table = Table(DISKS)
    table.claim([("a",), ("b",)])
    table.put_counters(0, [7, None], start=2)
    table.forget_counters(1, 1, 3)
    assert table.counters[0].tolist() == [0, 0, 7, 0]
    assert table.unknown[:2].tolist() == [[False, False, False, True], [False, True, True, False]]
    table.clear()
    table.claim([("a",)])
    table.forget_counters(0)
    assert table.unknown[0].all()


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
        frame.derive([DISKS])
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
        frame.derive([DISKS])
        seen.append(frame.tables["disks"].gauges[0, 2])
    assert np.isnan(seen[:2]).all()
    assert seen[2] == 10.0


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


@pytest.mark.parametrize(("limit", "count", "dropped"), [(None, 5, 0), (5, 5, 0), (6, 5, 0), (4, 4, 1), (1, 1, 4)])
def test_the_row_limit_counts_what_it_leaves_out(limit: int | None, count: int, dropped: int) -> None:
    table = Table(DISKS)
    assert table.claim([(str(row),) for row in range(5)], limit) == count
    assert (table.count, table.dropped, len(table.labels)) == (count, dropped, count)
    assert list(table.labels) == [(str(row),) for row in range(count)]
    with pytest.raises(AssertionError, match="claimed twice"):
        table.claim([("x",)])


@pytest.mark.parametrize(("rows", "capacity"), [(4, 4), (5, 8), (8, 8), (9, 16), (33, 64)])
def test_a_table_grows_to_a_power_of_two(rows: int, capacity: int) -> None:
    table = Table(DISKS)
    table.claim([(str(row),) for row in range(rows)])
    assert table.capacity == len(table.counters) == len(table.unknown) == capacity
    assert np.isnan(table.gauges).all()
    assert not table.counters.any()


def test_rates_while_the_number_of_rows_grows_and_shrinks() -> None:
    frame = Frame([DISKS])
    for second, rows in enumerate((2, 40, 3, 100, 1, 100), 1):
        values = cycle(frame, second, {str(row): [second * 10 + row, 0, 0, 0] for row in range(rows)})
        if second > 1:
            assert values["0"][0] == 10.0
    assert sum(not math.isnan(value[0]) for value in values.values()) == 1


def test_a_table_is_cleared_when_it_is_given_back() -> None:
    frame = Frame([DISKS])
    for second in range(1, 4):
        cycle(frame, second, {"a": [7, None, 7, 7], "b": [8, 8, 8, 8]})
    tables = [frame.tables["disks"]]
    frame.close()
    for table in tables:
        assert (table.count, table.complete, table.labels) == (0, True, ())
        assert not table.counters.any()
        assert not table.unknown.any()
        assert np.isnan(table.gauges).all()


def test_two_tables_serve_any_number_of_cycles() -> None:
    frame = Frame([DISKS])
    seen = set()
    for second in range(1, 20):
        cycle(frame, second, {"a": [second, 0, 0, 0]})
        seen.add(id(frame.tables["disks"]))
        assert frame.pools["disks"].out_count <= 2
    assert len(seen) == frame.pools["disks"].made == 2
    assert frame.pools["disks"].regrown == 0
    frame.close()
    assert frame.pools["disks"].out_count == 0


def test_a_table_that_is_not_due_gets_a_rate_over_the_longer_time() -> None:
    frame = Frame([DISKS, MEMORY])
    cycle(frame, 1, {"a": [100, 0, 0, 0]})
    for second in (2, 3):
        frame.begin(1, second * SECOND)
        frame.open(MEMORY)
        frame.derive([MEMORY])
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
    assert frame.pools["disks"].out_count == 2
