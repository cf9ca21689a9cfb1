"""Rates and ratios: the growth of counters between two collections, divided by time or by other growth.

All tables of a frame are computed at once, as one flat array of growth: a call of NumPy for
each table would cost more than the numbers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from agent.table import NAN, Table, TableSpec

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
_ELAPSED = -1


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of the fraction line of a table's derived columns, as sums of weighted growth.

    Attributes:
        places: (t,) counters that are added, the columns' behind one another; `_ELAPSED` for seconds.
        weights: (t,) how many of the shown unit one is.
        sizes: (d,) how many of them each column adds.
    """

    places: Places
    weights: Floats
    sizes: Places


@dataclass(frozen=True, slots=True)
class _Derivation:
    """What a table derives from its counters.

    Attributes:
        over, by: above and below the fraction line.
        used: the counters that take part; a row of which one is unknown or fell has no rates.
        ceilings: (d,) 1 for ratios, which rounding may carry above it, else infinity.
        target: the slice of derived gauges, d of them.
    """

    used: Places
    over: _Side
    by: _Side
    ceilings: Floats
    target: slice


def _derivation(spec: TableSpec) -> _Derivation:
    """The derivation of a table that derives something."""
    counters, index = spec.counters, spec.counter_index
    derived = [column for column in spec.gauges if column.over]

    def side(terms: Sequence[tuple[str, ...]]) -> _Side:
        places = [index[name] if name else _ELAPSED for names in terms for name in names]
        weights = [1.0 if place == _ELAPSED else 1 / counters[place].per for place in places]
        return _Side(np.array(places), np.array(weights), np.array([len(names) for names in terms]))

    return _Derivation(
        used=np.array(sorted({index[name] for column in derived for name in column.over + column.by})),
        over=side([column.over for column in derived]),
        by=side([column.by or ("",) for column in derived]),
        ceilings=np.array([1.0 if column.unit == "ratio" else np.inf for column in derived]),
        target=slice(len(spec.gauges) - len(derived), len(spec.gauges)),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the derived values of some tables come from; good for as long as their row counts stay.

    The flat array of growth has each table's counters, row by row, and then the seconds of each table.

    Attributes:
        derivations: of each table.
        size: growth values without the seconds.
        terms, weights: (t,) the places in it that are added, all above the line before all below.
        starts: (2 * v,) where each sum of them begins.
        ceilings: (v,) the highest that each derived value can be.
        ends: (tables,) the derived values of each table end here.
    """

    derivations: Sequence[_Derivation]
    size: int
    terms: Places
    weights: Floats
    starts: Places
    ceilings: Floats
    ends: Sequence[int]


class Rates:
    """Fills the rates and ratios of tables; keeps its plan while the tables have as many rows."""

    def __init__(self) -> None:
        self._derivations: dict[str, _Derivation] = {}
        self._shape: list[tuple[str, int]] = []
        self._plan: _Plan

    def fill(self, pairs: Sequence[tuple[Table, Table]]) -> None:
        """Fills the derived columns of each first table from the growth since the second one, an earlier one.

        A row that was not there before, or one of whose used counters is unknown or fell,
        keeps NaN in all of them.
        """
        fresh: list[Table] = []
        older: list[Table] = []
        seconds: list[float] = []
        shape: list[tuple[str, int]] = []
        for table, previous in pairs:
            elapsed_ns = table.monotonic_ns - previous.monotonic_ns
            if elapsed_ns > 0 and table.count and table.continues:
                fresh.append(table)
                older.append(previous)
                seconds.append(elapsed_ns / 1e9)
                shape.append((table.spec.name, table.count))
        if not fresh:
            return
        if shape != self._shape:
            self._plan = self._make_plan(fresh)
            self._shape = shape
        plan = self._plan
        aligned = list(map(_aligned, fresh, older))
        now = np.concatenate([table.counters[: table.count].ravel() for table in fresh])
        before = np.concatenate([counters.ravel() for counters, _ in aligned])
        growth = np.empty(plan.size + len(fresh))
        growth[: plan.size] = now - before
        growth[plan.size :] = seconds
        unusable = now < before
        if unusable.any() or any(unknown is not None for _, unknown in aligned):
            start = 0
            for (_, unknown), table, derivation in zip(aligned, fresh, plan.derivations, strict=True):
                stop = start + table.counters[: table.count].size
                rows = unusable[start:stop].reshape(table.count, -1)
                if unknown is not None:
                    rows |= unknown
                growth[start:stop].reshape(rows.shape)[rows[:, derivation.used].any(axis=1)] = NAN
                start = stop
        sums = np.add.reduceat(growth[plan.terms] * plan.weights, plan.starts)
        over, by = sums[: len(plan.ceilings)], sums[len(plan.ceilings) :]
        derived = np.full(len(over), NAN)
        np.divide(over, by, out=derived, where=by > 0)
        np.minimum(derived, plan.ceilings, out=derived)
        start = 0
        for table, derivation, end in zip(fresh, plan.derivations, plan.ends, strict=True):
            table.gauges[: table.count, derivation.target] = derived[start:end].reshape(table.count, -1)
            start = end

    def _make_plan(self, tables: Sequence[Table]) -> _Plan:
        derivations = [self._derivation(table.spec) for table in tables]
        size = sum(table.counters[: table.count].size for table in tables)
        above = _Terms(size)
        below = _Terms(size)
        for table, derivation in zip(tables, derivations, strict=True):
            above.add(derivation.over, table)
            below.add(derivation.by, table)
        sizes = np.concatenate(above.sizes + below.sizes)
        ceilings = [np.tile(each.ceilings, table.count) for each, table in zip(derivations, tables, strict=True)]
        return _Plan(
            derivations=derivations,
            size=size,
            terms=np.concatenate(above.places + below.places),
            weights=np.concatenate(above.weights + below.weights),
            starts=np.cumsum(sizes) - sizes,
            ceilings=np.concatenate(ceilings),
            ends=np.cumsum([len(part) for part in ceilings]).tolist(),
        )

    def _derivation(self, spec: TableSpec) -> _Derivation:
        derivation = self._derivations.get(spec.name)
        if derivation is None:
            derivation = self._derivations[spec.name] = _derivation(spec)
        return derivation


class _Terms:
    """One side of the fraction line for all rows of all tables, while a plan is made."""

    def __init__(self, size: int) -> None:
        self._start = 0
        self._seconds = size
        self.places: list[Places] = []
        self.weights: list[Floats] = []
        self.sizes: list[Places] = []

    def add(self, side: _Side, table: Table) -> None:
        count, width = table.count, len(table.spec.counters)
        rows = self._start + np.arange(count)[:, None] * width
        self.places.append(np.where(side.places == _ELAPSED, self._seconds, rows + side.places).ravel())
        self.weights.append(np.tile(side.weights, count))
        self.sizes.append(np.tile(side.sizes, count))
        self._start += count * width
        self._seconds += 1


def _aligned(table: Table, previous: Table) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_] | None]:
    """The previous counters of the table's rows, and which of both are unknown; None where all are known."""
    count = table.count
    if table.labels is previous.labels or table.labels == previous.labels:
        if table.complete and previous.complete:
            return previous.counters[:count], None
        return previous.counters[:count], table.unknown[:count] | previous.unknown[:count]
    place = {labels: row for row, labels in enumerate(previous.labels)}
    rows = np.array([place.get(labels, -1) for labels in table.labels])
    unknown = table.unknown[:count] | previous.unknown[rows]
    unknown[rows < 0] = True
    return previous.counters[rows], unknown
