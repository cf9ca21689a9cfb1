"""Columns and tables: exact counters, unknowns, rows and their limit."""

from __future__ import annotations

import numpy as np
import pytest

from agent.table import COUNTER_MAX, Table, TableSpec, gauge
from tests.tables import DISKS


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
