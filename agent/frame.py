"""Frame: all tables of one cycle, under one stamp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from agent.pool import Pool
from agent.rates import Rates
from agent.table import NAN, Labels, Table, TableSpec


class Frame:
    """All tables of one cycle, under one wall-clock stamp and one monotonic reading.

    One object serves every cycle: `begin` starts the next one, probes `open` their
    tables and fill them. What a table held when it was last collected stays until it
    is collected again, for the rates.

    Attributes:
        tables: those of this cycle, by name, in the order in which they were opened.
        interval_seconds: since the frame before, by the monotonic clock; NaN at the first.
    """

    def __init__(self, specs: Iterable[TableSpec]) -> None:
        self._pools = {spec.name: Pool(partial(Table, spec), keep=spec.keep_rows) for spec in specs}
        self._previous: dict[str, Table] = {}
        self._spare: dict[str, Table] = {}
        self._failed: set[str] = set()  # tables of probes that failed when they were last due
        self._rates = Rates()
        self.tables: dict[str, Table] = {}
        self.sequence = 0
        self.time_unix_ns = 0
        self.monotonic_ns = 0
        self.interval_seconds = NAN

    def begin(self, time_unix_ns: int, monotonic_ns: int) -> None:
        """Starts the next cycle; the tables of the last one become the previous ones."""
        for name, table in self.tables.items():
            replaced = self._previous.get(name)
            self._previous[name] = table
            if replaced is None:
                continue
            if replaced.capacity == replaced.spec.rows:
                replaced.clear()
                self._spare[name] = replaced  # as it was made: it takes turns with the one that follows
            else:
                self._pools[name].release(replaced)
        self.tables.clear()
        if self.sequence:
            self.interval_seconds = (monotonic_ns - self.monotonic_ns) / 1e9
        self.sequence += 1
        self.time_unix_ns = time_unix_ns
        self.monotonic_ns = monotonic_ns

    def open(self, spec: TableSpec) -> Table:
        """An empty table for a probe to fill in this cycle; one without labels has its row."""
        assert spec.name not in self.tables, f"{spec.name}: opened twice in a cycle"
        table = self._spare.pop(spec.name, None) or self._pools[spec.name].acquire()
        table.monotonic_ns = self.monotonic_ns
        if self._failed:
            self._failed.discard(spec.name)
        if not spec.labels:
            table.count = 1
            table.labels = _ONE_ROW
        self.tables[spec.name] = table
        return table

    def discard(self, specs: Iterable[TableSpec]) -> None:
        """Takes the tables of a probe that failed half-way out of this cycle."""
        for spec in specs:
            self._failed.add(spec.name)
            table = self.tables.pop(spec.name, None)
            if table is not None:
                self._pools[spec.name].release(table)

    def previous(self, name: str) -> Table | None:
        """The table as it was collected the time before, by its name."""
        return self._previous.get(name)

    def latest(self) -> dict[str, Table]:
        """The tables of this cycle, and of each probe that wasn't due those of its last collection.

        A probe that failed when it was last due has none.
        """
        if self._previous.keys() <= self.tables.keys():
            return self.tables
        held = {name: table for name, table in self._previous.items() if name not in self._failed}
        return held | self.tables

    def derive(self) -> None:
        """Computes the rates and ratios of this cycle's tables, which are filled."""
        previous = self._previous
        self._rates.fill(
            [(table, previous[name]) for name, table in self.tables.items() if table.spec.derives and name in previous]
        )

    def close(self) -> None:
        """Gives every table back."""
        for held in (self.tables, self._previous, self._spare):
            for name, table in held.items():
                self._pools[name].release(table)
            held.clear()

    @property
    def pools(self) -> dict[str, Pool[Table]]:
        """The pool of each table, by the table's name."""
        return self._pools


_ONE_ROW: Sequence[Labels] = ((),)
