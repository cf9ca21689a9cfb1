"""Rows as Python values: what each expression makes of a row's counters and gauges."""

from __future__ import annotations

import math

import pytest

from agent.serializers.rows import Rows, compiled, counters_of, expression, finite, gauges_of, tuple_of
from agent.table import COUNTER_MAX, NAN, Table
from tests.serializers.writing import DISK, TIMES

TIMES_COLUMNS = {column.name: column for column in TIMES.columns}
EVENTS, BUSY = TIMES_COLUMNS["events_total"], TIMES_COLUMNS["busy_seconds_total"]
THREADS, LOAD = TIMES_COLUMNS["threads"], TIMES_COLUMNS["load1"]


def shown(column: object, value: float | None, **options: object) -> object:
    """What a column's expression makes of a value, whose place is found by the declaration."""
    c: list[object] = [None, None]
    g: list[object] = [NAN] * len(TIMES.gauges)
    if column in TIMES.counters:
        c[TIMES.counters.index(column)] = value  # type: ignore[arg-type]
    else:
        g[TIMES.gauges.index(column)] = value  # type: ignore[arg-type]
    return compiled("c, g", expression(TIMES, column, **options))(c, g)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        (COUNTER_MAX, {}, COUNTER_MAX),
        (COUNTER_MAX, {"per": 4096}, 2**52 - 1),
        (4095, {"per": 4096}, 0),
        (2**63 - 1, {"only_int64": True}, 2**63 - 1),
        (2**63, {"only_int64": True}, None),
        (None, {"guarded": True}, None),
        (None, {"guarded": True, "per": 4096}, None),
        (None, {"guarded": True, "only_int64": True}, None),
        (7, {"guarded": True, "only_int64": True}, 7),
    ],
)
def test_whole_counters(value: int | None, options: dict[str, object], expected: int | None) -> None:
    found = shown(EVENTS, value, **options)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        (81_233, {}, 812.33),
        (0, {}, 0.0),
        (81_233, {"per": 60}, 81_233 / 6000),
        (81_233, {"only_int64": True}, 812.33),
        (COUNTER_MAX, {"only_int64": True}, COUNTER_MAX / 100),
        (None, {"guarded": True}, None),
        (None, {"guarded": True, "per": 60, "only_int64": True}, None),
    ],
)
def test_counters_of_a_part_of_their_unit(
    value: int | None, options: dict[str, object], expected: float | None
) -> None:
    found = shown(BUSY, value, **options)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        (12.0, {}, 12),
        (-0.0, {}, 0),
        (2.0**53, {}, 2**53),
        (2.0**54, {}, 2.0**54),  # no exact number of anything
        (1e23, {}, 1e23),
        (8192.0, {"per": 4096}, 2),
        (math.inf, {}, math.inf),
        (2.0**54, {"only_int64": True}, 2**54),
        (-(2.0**63), {"only_int64": True}, -(2**63)),
        (2.0**63, {"only_int64": True}, None),
        (math.inf, {"only_int64": True}, None),
        (NAN, {"only_int64": True}, None),
    ],
)
def test_whole_gauges(value: float, options: dict[str, object], expected: float | None) -> None:
    found = shown(THREADS, value, **options)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize("options", [{}, {"only_int64": True}, {"guarded": True}])
def test_other_gauges_are_as_they_are(options: dict[str, object]) -> None:
    assert [shown(LOAD, value, **options) for value in (0.5, 3.0, math.inf)] == [0.5, 3.0, math.inf]
    assert shown(LOAD, 3.0, per=2) == 1.5
    assert math.isnan(shown(LOAD, NAN, **options))  # type: ignore[arg-type]
    assert math.isnan(shown(THREADS, NAN))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0), (0.0, 0.0), (-3, -3), (COUNTER_MAX, COUNTER_MAX), (1e300, 1e300), (5e-324, 5e-324)]
    + [(value, None) for value in (NAN, math.inf, -math.inf)],
)
def test_finite(value: float, expected: float | None) -> None:
    found = compiled("value", finite("value"))(value)
    assert (found, type(found)) == (expected, type(expected))


def table() -> Table:
    """Three rows of a capacity of four; of the second one each counter is unknown in turn."""
    found = Table(DISK)
    found.claim([("a", None), ("b", None), ("c", None)])
    for row in range(3):
        found.put_counters(row, (None if row == 1 else COUNTER_MAX - row, row))
        found.put_gauges(row, (row, row / 2, NAN))
    return found


def test_counters_and_gauges_are_those_of_the_rows_that_there_are() -> None:
    found = table()
    assert counters_of(found) == [[COUNTER_MAX, 0], [None, 1], [COUNTER_MAX - 2, 2]]
    assert [row[:2] for row in gauges_of(found)] == [[0.0, 0.0], [1.0, 0.5], [2.0, 1.0]]
    found.clear()
    assert (counters_of(found), gauges_of(found)) == ([], [])
    found.claim([(str(row), None) for row in range(4)])  # as many as there is room for
    assert counters_of(found) == [[0, 0]] * 4
    assert len(gauges_of(found)) == 4


def test_rows_are_made_by_one_of_two_functions() -> None:
    asked = []

    def result(guarded: bool) -> str:
        asked.append(guarded)
        return f"(labels[0], c[0], g[0], twice({guarded}))"

    rows = Rows(result, {"twice": lambda value: 2 * value})
    assert sorted(asked) == [False, True]
    found = table()
    assert rows.of(found) == [("a", COUNTER_MAX, 0.0, 2), ("b", None, 1.0, 2), ("c", COUNTER_MAX - 2, 2.0, 2)]
    found.clear()
    found.claim([("a", None)])
    assert [row[-1] for row in rows.of(found)] == [0]


@pytest.mark.parametrize(("expressions", "expected"), [([], ()), (["1"], (1,)), (["1", "2"], (1, 2))])
def test_tuple_of(expressions: list[str], expected: tuple[int, ...]) -> None:
    assert compiled("", tuple_of(expressions))() == expected
