"""Column, TableSpec and Table: how figures are declared, and what they are kept in.

A column is declared once, in a `TableSpec`; the arrays, the JSON schema, the metrics
reference and every format's names are derived from that declaration. A `Table` is the
filled thing: arrays from a pool, rows of labels beside them.

Counters are exact uint64 in the kernel's own unit (`Column.per` of them make one of the
column's unit), with a mask for the unknown ones. Gauges are float64 and NaN when unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
import numpy.typing as npt

Labels = tuple[str | None, ...]
"""One row's key: the values of a table's key labels, in their order; None where one is unknown."""

COUNTER_MAX = 2**64 - 1
NAN = math.nan


class Kind(StrEnum):
    """Whether a column only grows, or is a value of the moment."""

    COUNTER = "counter"
    GAUGE = "gauge"


class Priority(IntEnum):
    """What a sink's ring goes without first when it fills up: tables of low priority."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


@dataclass(frozen=True, slots=True)
class Column:
    """One declared metric; made by `counter`, `gauge`, `rate` and `ratio`.

    Attributes:
        unit: of the shown value: "seconds", "bytes", "ratio", or what is counted.
        per: counters only: how many of the stored unit make one shown unit.
        derived: computed beside what was read; left out with `agent.rates = false`.
        over: derived from counters: the value is their growth (or its sum) …
        by: … divided by these counters' growth; by elapsed seconds where empty.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    per: int = 1
    derived: bool = False
    over: tuple[str, ...] = ()
    by: tuple[str, ...] = ()

    @property
    def integral(self) -> bool:
        """Whether the shown values are whole numbers: all but seconds, ratios, loads and rates."""
        if self.kind is Kind.COUNTER:
            return self.per == 1
        return self.unit not in ("seconds", "ratio", "load") and not self.unit.endswith("/second")


def counter(name: str, unit: str, help: str, *, per: int = 1) -> Column:
    """A count that only grows, exact up to 2^64-1, stored in 1/`per` of `unit`."""
    return Column(name, Kind.COUNTER, unit, help, per=per)


def gauge(name: str, unit: str, help: str, *, derived: bool = False) -> Column:
    """A value of the moment; `derived` where the probe computes it from others of the same moment."""
    return Column(name, Kind.GAUGE, unit, help, derived=derived)


def rate(name: str, unit: str, help: str, *over: str) -> Column:
    """Growth of counters a second, since the previous time that the table was collected."""
    return Column(name, Kind.GAUGE, unit, help, derived=True, over=over)


def ratio(name: str, unit: str, help: str, over: Sequence[str], by: Sequence[str]) -> Column:
    """Growth of some counters divided by the growth of others, in the shown units of both."""
    return Column(name, Kind.GAUGE, unit, help, derived=True, over=tuple(over), by=tuple(by))


class TableSpec:
    """What a table is: its name, key labels, columns and capacities. Immutable.

    Gauges are stored in the order: those that a probe fills, as declared; then those
    derived by the probe; then those derived from counters. Counters as declared.

    Args:
        name: as it stands in the output.
        columns: in the order of the output.
        labels: names of the key labels; without any the table is one row.
        rows: rows that there is room for at the start; it grows with the first that need more.
        keep_rows: room for more rows than this is given back when they have gone.
        help: one sentence: the table's subject.
        optional: labels and columns that are there only where a setting asks for them.
        priority: when a sink's ring fills up, tables of low priority are left out first.

    Attributes:
        derives: some columns are computed from counters (agent/rates.py).
    """

    def __init__(
        self,
        name: str,
        help: str,
        *columns: Column,
        labels: Sequence[str] = (),
        rows: int = 4,
        keep_rows: int = 1024,
        optional: Sequence[str] = (),
        priority: Priority = Priority.NORMAL,
    ) -> None:
        self.name = name
        self.priority = priority
        self.help = help
        self.columns = columns
        self.labels = tuple(labels)
        self.optional = frozenset(optional)
        self.rows = rows if labels else 1
        self.keep_rows = keep_rows
        self.counters = tuple(c for c in columns if c.kind is Kind.COUNTER)
        gauges = [c for c in columns if c.kind is Kind.GAUGE]
        self.gauges = tuple(
            [c for c in gauges if not c.derived]
            + [c for c in gauges if c.derived and not c.over]
            + [c for c in gauges if c.over]
        )
        self.counter_index = {c.name: i for i, c in enumerate(self.counters)}
        self.gauge_index = {c.name: i for i, c in enumerate(self.gauges)}
        assert len(self.counter_index) + len(self.gauge_index) == len(columns), f"{name}: a column declared twice"
        assert self.optional <= {*labels, *self.counter_index, *self.gauge_index}, f"{name}: optional is no name of it"
        self.derives = any(c.over for c in columns)

    def without_optional(self) -> TableSpec:
        """The same table where the setting doesn't ask."""
        return TableSpec(
            self.name,
            self.help,
            *(column for column in self.columns if column.name not in self.optional),
            labels=[name for name in self.labels if name not in self.optional],
            rows=self.rows,
            keep_rows=self.keep_rows,
            priority=self.priority,
        )


class Table:
    """A filled `TableSpec`: the rows of one cycle, in arrays of its own or views of an arena's.

    Args:
        grow: makes room for so many rows, by `move`; where there is none, the table makes its own arrays.

    Attributes:
        counters: uint64, shape (capacity, counters of the spec), rows beyond `count` are 0.
        gauges: float64, shape (capacity, gauges of the spec), rows beyond `count` are NaN.
        counters_start, gauges_start: where they begin in the arena's.
        unknown: bool, shape of `counters`; True where the counter is not known.
        complete: no counter is unknown, so `unknown` need not be looked at.
        continues: the counters go on from those of the previous table; a probe sets False
            where they count something else from now on, so that no rate is made of the change.
        labels: a key a row; shared with the probe, never changed in place.
        dropped: rows that the row limit left out.
        monotonic_ns: the frame's monotonic reading.
    """

    __slots__ = (
        "_grow",
        "capacity",
        "complete",
        "continues",
        "count",
        "counters",
        "counters_start",
        "dropped",
        "gauges",
        "gauges_start",
        "labels",
        "monotonic_ns",
        "spec",
        "unknown",
    )

    counters: npt.NDArray[np.uint64]
    gauges: npt.NDArray[np.float64]
    unknown: npt.NDArray[np.bool_]

    def __init__(self, spec: TableSpec, grow: Callable[[int], None] | None = None) -> None:
        self.spec = spec
        self.count = 0
        self.dropped = 0
        self.complete = True
        self.continues = True
        self.labels: Sequence[Labels] = ()
        self.monotonic_ns = 0
        self.capacity = 0
        self.counters_start = self.gauges_start = 0
        self._grow = grow or self._allocate
        if grow is None:
            self._allocate(spec.rows)

    def _allocate(self, rows: int) -> None:
        counters = rows * len(self.spec.counters)
        gauges = np.full(rows * len(self.spec.gauges), NAN)
        self.move(rows, np.zeros(counters, dtype=np.uint64), gauges, np.zeros(counters, dtype=np.bool_))

    def move(
        self,
        capacity: int,
        counters: npt.NDArray[np.uint64],
        gauges: npt.NDArray[np.float64],
        unknown: npt.NDArray[np.bool_],
    ) -> None:
        """Goes on in other arrays, flat and blank ones for so many rows, with what it holds."""
        old = (self.counters, self.gauges, self.unknown) if self.capacity else ()
        self.counters = counters.reshape(capacity, -1) if counters.size else np.zeros((capacity, 0), dtype=np.uint64)
        self.gauges = gauges.reshape(capacity, -1) if gauges.size else np.zeros((capacity, 0))
        self.unknown = unknown.reshape(self.counters.shape)
        self.capacity = capacity
        for held, array in zip(old, (self.counters, self.gauges, self.unknown), strict=False):
            array[: self.count] = held[: self.count]

    def reset(self) -> None:
        """What it says of itself is that of a new table; the arrays stay as they are."""
        self.count = 0
        self.dropped = 0
        self.complete = True
        self.continues = True
        self.labels = ()

    def clear(self) -> None:
        """Back to the state of a new table, arrays kept."""
        self.counters[: self.count] = 0
        self.gauges[: self.count] = NAN
        self.unknown[: self.count] = False
        self.reset()

    def take_over(self, other: Table) -> None:
        """Becomes a copy of another table of the spec, of at most the same capacity."""
        self.count, self.dropped, self.labels = other.count, other.dropped, other.labels
        self.complete, self.continues, self.monotonic_ns = other.complete, other.continues, other.monotonic_ns
        self.counters[: other.capacity] = other.counters
        self.gauges[: other.capacity] = other.gauges
        self.unknown[: other.capacity] = other.unknown

    def claim(self, labels: Sequence[Labels], row_limit: int | None = None, left_out: int = 0) -> int:
        """Takes a row for each of `labels`, at most `row_limit`; counts the rest, and `left_out` before, as dropped.

        Call it once, before any row is filled. A list that is the same object at each
        cycle spares the comparison of its items.

        Returns:
            How many rows there are to fill.
        """
        assert self.count == 0, f"{self.spec.name}: rows claimed twice"
        count = len(labels)
        self.dropped = left_out
        if row_limit is not None and count > row_limit:
            self.dropped += count - row_limit
            count = row_limit
            labels = labels[:count]
        if count > self.capacity:
            self._grow(1 << (count - 1).bit_length())
        self.count = count
        self.labels = labels
        return count

    def put_counters(self, row: int, values: Sequence[int | None], start: int = 0) -> None:
        """Fills a row's counters from position `start`, in declared order; None is unknown.

        A number that no kernel counter can have (below 0, above 2^64-1) is unknown too.
        """
        try:
            self.counters[row, start : start + len(values)] = values  # type: ignore[assignment]  # None raises
        except (TypeError, OverflowError):
            for index, value in enumerate(values, start):
                if value is None or not 0 <= value <= COUNTER_MAX:
                    self.unknown[row, index] = True
                    self.complete = False
                else:
                    self.counters[row, index] = value

    def forget_counters(self, row: int, start: int = 0, stop: int | None = None) -> None:
        """Marks a row's counters from `start` up to `stop` as unknown."""
        self.unknown[row, start:stop] = True
        self.complete = False

    def put_gauges(self, row: int, values: Sequence[float]) -> None:
        """Fills a row's gauges, those that a probe fills first, in declared order; NaN is unknown."""
        self.gauges[row, : len(values)] = values
