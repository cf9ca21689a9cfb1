"""A table's rows as Python values, by functions that are compiled once from its declaration.

A loop that asks each column what it is would take several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from agent.table import Column, Kind, Table, TableSpec

EXACT_MAX = 2**53
"""A whole float64 beyond is no exact number of anything: as a float it keeps its exponent."""

INT64_MAX = 2**63 - 1
"""What formats with signed integers can hold."""


def expression(
    spec: TableSpec,
    column: Column,
    per: int = 1,
    only_int64: bool = False,
    guarded: bool = False,
    only: tuple[str, str] | None = None,
) -> str:
    """Python for a column's shown value, of a row's counters `c` and gauges `g`.

    An unknown counter is None where it is `guarded`, an unknown gauge NaN or None.

    Args:
        per: the shown value is divided by it.
        only_int64: a whole number beyond 64 bits with a sign is None.
        guarded: counters may be None.
        only: a key label and its value: None in the other rows.
    """
    if only is not None:
        value = expression(spec, column, per, only_int64, guarded)
        return f"({value}) if labels[{spec.labels.index(only[0])}] == {only[1]!r} else None"
    if column.kind is Kind.COUNTER:
        value = f"c[{spec.counter_index[column.name]}]"
        shown = f"{value} / {column.per * per}"
        if column.integral:
            shown = f"{value} // {per}" if per > 1 else value
        none_if = []
        if guarded and (shown != value or only_int64):
            none_if.append(f"{value} is None")
        if only_int64 and column.integral:
            none_if.append(f"{value} > {INT64_MAX}")
        return f"None if {' or '.join(none_if)} else {shown}" if none_if else shown
    value = f"g[{spec.gauge_index[column.name]}]"
    shown = f"{value} / {per}" if per > 1 else value
    if not column.integral:
        return shown
    # NaN fails the comparison, and stays what it is.
    if only_int64:
        return f"int({shown}) if {-(2**63)} <= {value} < {2**63} else None"
    return f"int({shown}) if {-EXACT_MAX} <= {value} <= {EXACT_MAX} else {shown}"


def finite(value: str) -> str:
    """Python for a value that is None where it is NaN or infinite."""
    return f"x if (x := {value}) - x == 0 else None"


def compiled(arguments: str, result: str, names: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """The function of these arguments that returns this expression."""
    function: Callable[..., Any] = eval(f"lambda {arguments}: {result}", {"int": int, **(names or {})})
    return function


def counters_of(table: Table) -> list[list[Any]]:
    """A row of counters for each row of the table, in declared order and in the kernel's units; None if unknown."""
    count = table.count
    shown = table.counters if count == table.capacity else table.counters[:count]
    counters: list[list[Any]] = shown.tolist()
    if not table.complete:
        for row, index in np.argwhere(table.unknown[:count]).tolist():
            counters[row][index] = None
    return counters


def gauges_of(table: Table) -> list[list[float]]:
    """A row of gauges for each row of the table, in the order of the spec's `gauges`."""
    shown = table.gauges if table.count == table.capacity else table.gauges[: table.count]
    gauges: list[list[float]] = shown.tolist()
    return gauges


class Rows:
    """Makes one object of each row of a table.

    Args:
        result: the expression that makes it, of `labels`, `c` and `g`, given whether counters may be None.
        names: what the expression may use.
    """

    def __init__(self, result: Callable[[bool], str], names: Mapping[str, Any] | None = None) -> None:
        self._make = compiled("labels, c, g", result(False), names)
        self._make_guarded = compiled("labels, c, g", result(True), names)

    def of(self, table: Table) -> list[Any]:
        """The table's rows, in their order."""
        make = self._make if table.complete else self._make_guarded
        return list(map(make, table.labels, counters_of(table), gauges_of(table)))


def tuple_of(expressions: Sequence[str]) -> str:
    """The expression of a tuple."""
    return f"({', '.join(expressions)},)" if expressions else "()"
