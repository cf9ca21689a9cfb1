"""The arrays of all tables of a frame, one block a kind, so that what is done to all of them is one call of NumPy.

A call costs more than a hundred numbers, and a small array as much as a large one. There are two
sides that take turns: what this cycle fills, and what the cycle before has filled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from agent.table import NAN, Table, TableSpec

KEPT_CYCLES = 60
"""A table with more rows than its spec's `keep_rows` keeps the room for them this long after it needed it last."""


class Side:
    """One of the two: every table's arrays, one behind the other.

    Attributes:
        counters: uint64, shape (counters of all tables,); blank ones are 0.
        gauges: float64, shape (gauges of all tables,); blank ones are NaN.
        unknown: bool, shape of `counters`.
        tables: by name; their arrays are views.
    """

    __slots__ = ("counters", "gauges", "tables", "unknown")

    def __init__(self, specs: Iterable[TableSpec], arena: Arena) -> None:
        self.tables = {spec.name: Table(spec, partial(arena.grow, spec.name)) for spec in specs}
        self.counters: npt.NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
        self.gauges: npt.NDArray[np.float64] = np.empty(0)
        self.unknown: npt.NDArray[np.bool_] = np.empty(0, dtype=np.bool_)

    def blank(self) -> None:
        """Every value as in a new table; what the tables say of themselves stays."""
        self.counters.fill(0)
        self.gauges.fill(NAN)
        self.unknown.fill(False)

    def lay_out(self, rows: Mapping[str, int]) -> None:
        """Makes the arrays for so many rows of each table, with what they hold now."""
        specs = [table.spec for table in self.tables.values()]
        counters = sum(rows[spec.name] * len(spec.counters) for spec in specs)
        self.counters = np.zeros(counters, dtype=np.uint64)
        self.gauges = np.full(sum(rows[spec.name] * len(spec.gauges) for spec in specs), NAN)
        self.unknown = np.zeros(counters, dtype=np.bool_)
        counters_start = gauges_start = 0
        for name, table in self.tables.items():
            counters_stop = counters_start + rows[name] * len(table.spec.counters)
            gauges_stop = gauges_start + rows[name] * len(table.spec.gauges)
            table.move(
                rows[name],
                self.counters[counters_start:counters_stop],
                self.gauges[gauges_start:gauges_stop],
                self.unknown[counters_start:counters_stop],
            )
            table.counters_start, table.gauges_start = counters_start, gauges_start
            counters_start, gauges_start = counters_stop, gauges_stop


class Arena:
    """Both sides. A table that outgrows its room makes it lay out all of them anew; in steady state none does.

    Args:
        specs: the tables that may come.

    Attributes:
        now: what this cycle fills.
        before: what the cycle before has filled.
        made, regrown: how many times arrays were made: at the start, and for other numbers of rows.
    """

    def __init__(self, specs: Iterable[TableSpec]) -> None:
        specs = list(specs)
        self._rows = {spec.name: spec.rows for spec in specs}
        self._keep = {spec.name: spec.keep_rows for spec in specs}
        self._cycle = 0
        self._needed: dict[str, int] = {}  # the cycle in which a table above its limit last needed the room
        self.now, self.before = Side(specs, self), Side(specs, self)
        self.made = 0
        self.regrown = -1
        self._lay_out()
        self.made = 1

    def turn(self) -> None:
        """What was filled becomes what was before, and its place is taken by what was there, blank."""
        if self._needed:
            self._let_go()
        self.now, self.before = self.before, self.now
        self.now.blank()
        self._cycle += 1

    def grow(self, name: str, rows: int) -> None:
        """Makes room for so many rows of a table; what the tables hold stays."""
        self._rows[name] = rows
        if rows > self._keep[name]:
            self._needed[name] = self._cycle
        self._lay_out()

    def _let_go(self) -> None:
        """Takes the room back from tables that were large for a moment."""
        for name, cycle in list(self._needed.items()):
            if max(self.now.tables[name].count, self.before.tables[name].count) > self._keep[name]:
                self._needed[name] = self._cycle
            elif self._cycle - cycle >= KEPT_CYCLES:
                del self._needed[name]
                self._rows[name] = self._keep[name]
                self._lay_out()

    def _lay_out(self) -> None:
        for side in (self.now, self.before):
            side.lay_out(self._rows)
        self.regrown += 1
