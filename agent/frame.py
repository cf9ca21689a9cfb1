"""Frame: all tables of one cycle, under one stamp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agent.arena import Arena
from agent.rates import Rates
from agent.table import NAN, Labels, Table, TableSpec


class Frame:
    """All tables of one cycle, under one wall-clock stamp and one monotonic reading.

    One object serves every cycle: `begin` starts the next one, probes `open` their
    tables and fill them. What a table held when it was last collected stays until it
    is collected again, for the rates.

    Args:
        specs: the tables that may come.

    Attributes:
        arena: the arrays of the tables.
        tables: those of this cycle, by name, in the order in which they were opened.
        interval_seconds: since the frame before, by the monotonic clock; NaN at the first.
    """

    def __init__(self, specs: Iterable[TableSpec]) -> None:
        self.arena = Arena(specs)
        self._collected: set[str] = set()  # tables that the side before holds, be it from an earlier cycle
        self._failed: set[str] = set()  # tables of probes that failed when they were last due
        self._rates = Rates()
        self.tables: dict[str, Table] = {}
        self.sequence = 0
        self.time_unix_ns = 0
        self.monotonic_ns = 0
        self.interval_seconds = NAN

    def begin(self, time_unix_ns: int, monotonic_ns: int) -> None:
        """Starts the next cycle; the tables of the last one become the previous ones."""
        opened = self.tables.keys()
        if opened != self._collected:
            now, before = self.arena.now.tables, self.arena.before.tables
            for name in self._collected - opened:  # it wasn't due: what is known of it goes along
                now[name].take_over(before[name])
            self._collected |= opened
        self.arena.turn()
        self.tables.clear()
        if self.sequence:
            self.interval_seconds = (monotonic_ns - self.monotonic_ns) / 1e9
        self.sequence += 1
        self.time_unix_ns = time_unix_ns
        self.monotonic_ns = monotonic_ns

    def open(self, spec: TableSpec) -> Table:
        """An empty table for a probe to fill in this cycle; one without labels has its row."""
        assert spec.name not in self.tables, f"{spec.name}: opened twice in a cycle"
        table = self.arena.now.tables[spec.name]
        table.reset()
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
                table.clear()

    def previous(self, name: str) -> Table | None:
        """The table as it was collected the time before, by its name."""
        return self.arena.before.tables[name] if name in self._collected else None

    def latest(self) -> dict[str, Table]:
        """The tables of this cycle, and of each probe that wasn't due those of its last collection.

        A probe that failed when it was last due has none.
        """
        if self._collected <= self.tables.keys():
            return self.tables
        before = self.arena.before.tables
        held = {name: table for name, table in before.items() if name in self._collected and name not in self._failed}
        return held | self.tables

    def change(self, specs: Iterable[TableSpec], keeps: bool = True) -> None:
        """Other tables may come from now on; the sequence goes on.

        Args:
            keeps: whether what is known of tables that stay goes along, for their rates.
        """
        old, self.arena = self.arena, Arena(specs)
        held = {name: old.before.tables[name] for name in self._collected} | self.tables if keeps else {}
        self._collected = set()
        for name, table in held.items():
            kept = self.arena.before.tables.get(name)
            if kept is not None and kept.spec is table.spec:
                if kept.capacity < table.capacity:
                    self.arena.grow(name, table.capacity)
                kept.take_over(table)
                self._collected.add(name)
        self._failed &= self._collected
        self._rates = Rates()
        self.tables.clear()

    def derive(self) -> None:
        """Computes the rates and ratios of this cycle's tables, which are filled."""
        self._rates.fill(
            self.arena,
            [table for name, table in self.tables.items() if table.spec.derives and name in self._collected],
        )


_ONE_ROW: Sequence[Labels] = ((),)
