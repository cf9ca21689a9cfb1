"""Rates and ratios: the growth of counters between two collections, divided by time or by other growth.

All tables of a frame are computed at once, as one flat array of growth from the two sides of the arena.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from agent.arena import Arena
from agent.table import NAN, Table, TableSpec

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
Counters = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
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
    """Where the derived values of some tables come from; good for as long as rows and arrays stay what they are.

    The flat array of growth has the used counters, table by table and row by row, and then the seconds of each table.

    Attributes:
        derivations: of each table.
        counters: (n,) the places of the used counters in the arena's.
        starts: the growth of each table's counters begins here.
        rows: (n,) which row each of them is of, those of all tables numbered through.
        terms, weights: (t,) the places in the growth that are added, all above the line before all below.
        sums: (2 * v,) where each sum of them begins.
        ceilings: (v,) the highest that each derived value can be.
        targets: (v,) the places of the derived values in the arena's gauges.
    """

    derivations: Sequence[_Derivation]
    counters: Places
    starts: Sequence[int]
    rows: Places
    terms: Places
    weights: Floats
    sums: Places
    ceilings: Floats
    targets: Places


class Rates:
    """Fills the rates and ratios of tables; keeps its plan while the tables have as many rows."""

    def __init__(self) -> None:
        self._derivations: dict[str, _Derivation] = {}
        self._shape: list[tuple[str, int]] = []
        self._layout = -1
        self._plan: _Plan

    def fill(self, arena: Arena, tables: Iterable[Table]) -> None:
        """Fills the derived columns of tables of the arena's present side from the growth since the one before.

        A row that was not there before, or one of whose used counters is unknown or fell,
        keeps NaN in all of them.
        """
        fresh: list[Table] = []
        older: list[Table] = []
        seconds: list[float] = []
        shape: list[tuple[str, int]] = []
        are_aligned = are_complete = True
        for table in tables:
            name = table.spec.name
            before = arena.before.tables[name]
            elapsed_ns = table.monotonic_ns - before.monotonic_ns
            if elapsed_ns > 0 and table.count and table.continues:
                fresh.append(table)
                older.append(before)
                seconds.append(elapsed_ns / 1e9)
                shape.append((name, table.count))
                are_aligned = are_aligned and (table.labels is before.labels or table.labels == before.labels)
                are_complete = are_complete and table.complete and before.complete
        if not fresh:
            return
        if shape != self._shape or arena.regrown != self._layout:
            self._plan = self._make_plan(fresh)
            self._shape, self._layout = shape, arena.regrown
        plan = self._plan
        now, then = arena.now.counters.take(plan.counters), arena.before.counters.take(plan.counters)
        unknown = None
        if not are_complete:
            unknown = arena.now.unknown.take(plan.counters) | arena.before.unknown.take(plan.counters)
        if not are_aligned:
            unknown = np.zeros(len(now), dtype=np.bool_) if unknown is None else unknown
            for table, before, derivation, start in zip(fresh, older, plan.derivations, plan.starts, strict=True):
                if table.labels != before.labels:
                    _align(table, before, derivation.used, then[start:], unknown[start:])
        growth = np.empty(len(now) + len(fresh))
        growth[: len(now)] = now - then
        growth[len(now) :] = seconds
        unusable = now < then
        if unknown is not None:
            unusable |= unknown
        if unusable.any():
            rows = np.zeros(plan.rows[-1] + 1, dtype=np.bool_)
            rows[plan.rows[unusable]] = True
            growth[: len(now)][rows[plan.rows]] = NAN
        sums = np.add.reduceat(growth.take(plan.terms) * plan.weights, plan.sums)
        over, by = sums[: len(plan.ceilings)], sums[len(plan.ceilings) :]
        derived = np.full(len(over), NAN)
        np.divide(over, by, out=derived, where=by > 0)
        np.minimum(derived, plan.ceilings, out=derived)
        arena.now.gauges[plan.targets] = derived

    def _make_plan(self, tables: Sequence[Table]) -> _Plan:
        derivations = [self._derivation(table.spec) for table in tables]
        sizes = [table.count * len(each.used) for table, each in zip(tables, derivations, strict=True)]
        ends = list(accumulate(sizes))
        above, below = _Terms(ends[-1]), _Terms(ends[-1])
        counters, rows, targets = [], [], []
        row_count = 0
        for table, derivation in zip(tables, derivations, strict=True):
            above.add(derivation.over, derivation, table.count)
            below.add(derivation.by, derivation, table.count)
            row = np.arange(table.count)[:, None]
            counters.append((table.counters_start + row * table.counters.shape[1] + derivation.used).ravel())
            rows.append(np.repeat(row_count + row[:, 0], len(derivation.used)))
            derived = np.arange(table.gauges.shape[1])[derivation.target]
            targets.append((table.gauges_start + row * table.gauges.shape[1] + derived).ravel())
            row_count += table.count
        terms = np.concatenate(above.sizes + below.sizes)
        ceilings = [np.tile(each.ceilings, table.count) for each, table in zip(derivations, tables, strict=True)]
        return _Plan(
            derivations=derivations,
            counters=np.concatenate(counters),
            starts=[end - size for end, size in zip(ends, sizes, strict=True)],
            rows=np.concatenate(rows),
            terms=np.concatenate(above.places + below.places),
            weights=np.concatenate(above.weights + below.weights),
            sums=np.cumsum(terms) - terms,
            ceilings=np.concatenate(ceilings),
            targets=np.concatenate(targets),
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

    def add(self, side: _Side, derivation: _Derivation, count: int) -> None:
        width = len(derivation.used)
        rows = self._start + np.arange(count)[:, None] * width
        places = np.searchsorted(derivation.used, side.places)
        self.places.append(np.where(side.places == _ELAPSED, self._seconds, rows + places).ravel())
        self.weights.append(np.tile(side.weights, count))
        self.sizes.append(np.tile(side.sizes, count))
        self._start += count * width
        self._seconds += 1


def _align(table: Table, before: Table, used: Places, then: Counters, unknown: Mask) -> None:
    """Puts the previous counters of the table's rows where those of other rows stood, and marks the rows that are new.

    Args:
        used: which counters of a row.
        then, unknown: the used counters of the table's rows, and those of later tables.
    """
    place = {labels: row for row, labels in enumerate(before.labels)}
    rows = np.array([place.get(labels, -1) for labels in table.labels])
    size = table.count * len(used)
    then[:size] = before.counters[rows][:, used].ravel()
    is_unknown = table.unknown[: table.count] | before.unknown[rows]
    is_unknown[rows < 0] = True
    unknown[:size] = is_unknown[:, used].ravel()
