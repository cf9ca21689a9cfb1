"""StatsD: `hostprobe.web-1.disk_io.vda.reads_total:12|c`, and DogStatsD with tags instead of nodes.

Counters are sent as their growth since the table was last collected, so a frame that is lost, or left
out, is missing in their sums. What is unknown, and a counter that fell, is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from agent.serializers.frame_tables import FRAME
from agent.serializers.paths import PREFIX, row_paths
from agent.serializers.rows import compiled, counters_of, expression, gauges_of, tuple_of
from agent.serializers.series import Block, Group, SeriesSerializer, by_row, plain, told_apart
from agent.table import Column, Kind, Labels, Table, TableSpec


class StatsdSerializer(SeriesSerializer):
    """Writes frames as StatsD: a line a metric, labels as nodes of its path.

    A gauge below 0 would be taken for a change, and is left out; hostprobe has none.
    """

    def block(self, spec: TableSpec) -> Block:
        columns = [column for column in spec.columns if self._rates or not column.derived]
        make = compiled("c, p, g", tuple_of([_growth(spec, column, False) for column in columns]))
        make_guarded = compiled("c, p, g", tuple_of([_growth(spec, column, True) for column in columns]))

        def values(table: Table, previous: Table | None) -> list[float | None]:
            counters, gauges = counters_of(table), gauges_of(table)
            if previous is None or not table.continues:
                return by_row(list(map(make_guarded, counters, [_NOTHING] * table.count, gauges)))
            is_whole = table.complete and previous.complete
            before: Sequence[Any] = counters_of(previous)
            if table.labels is not previous.labels and table.labels != previous.labels:
                held = dict(zip(previous.labels, before, strict=True))
                before = [held.get(labels, _NOTHING) for labels in table.labels]
                is_whole = False
            return by_row(list(map(make if is_whole else make_guarded, counters, before, gauges)))

        return Block(values, lambda labels: self._groups(spec, columns, labels))

    def _groups(self, spec: TableSpec, columns: Sequence[Column], labels: Sequence[Labels]) -> Iterable[Group]:
        shown: Sequence[Labels] = [()] if spec is FRAME else labels
        for path in row_paths(spec, self._identity.host, shown):
            yield Group(b"", [(f"{path}{column.name}:".encode(), _behind(column, b"")) for column in columns])


class DogStatsdSerializer(StatsdSerializer):
    """Writes frames as DogStatsD: `hostprobe.disk_io.reads_total:12|c|#host:web-1,device:vda`."""

    def _groups(self, spec: TableSpec, columns: Sequence[Column], labels: Sequence[Labels]) -> Iterable[Group]:
        texts = []
        for row in labels:
            tags = {**self._identity.tags, "host": self._identity.host}
            if spec is not FRAME:
                tags |= {name: plain(value) for name, value in zip(spec.labels, row, strict=True) if value is not None}
            # A colon ends a name, and not a value.
            shown = {_tag(name).replace(":", "_"): _tag(value) for name, value in tags.items() if name}
            texts.append(",".join(f"{name}:{value}" for name, value in shown.items()))
        names = [f"{PREFIX}.{spec.name}.{column.name}:".encode() for column in columns]
        for text, repeat in zip(texts, told_apart(texts), strict=True):
            tail = f"|#{text}{''.join(f',{name}:{value}' for name, value in repeat.items())}".encode()
            yield Group(b"", [(name, _behind(column, tail)) for name, column in zip(names, columns, strict=True)])


class _Nothing:
    """A row that was not there: each of its counters is unknown."""

    def __getitem__(self, _: int) -> None:
        return None


_NOTHING = _Nothing()


def _growth(spec: TableSpec, column: Column, guarded: bool) -> str:
    """Python for a gauge's value, or a counter's growth since the row `p`."""
    if column.kind is Kind.GAUGE:
        value = f"g[{spec.gauge_index[column.name]}]"
        return f"({expression(spec, column)}) + 0 if {value} >= 0 else None"  # a 0 with a sign would be a change too
    now, before = (f"{row}[{spec.counter_index[column.name]}]" for row in "cp")
    growth = f"({now} - {before}){'' if column.per == 1 else f' / {column.per}'}"
    known = f"{now} is not None and {before} is not None and " if guarded else ""
    return f"{growth} if {known}{now} >= {before} else None"


def _behind(column: Column, tags: bytes) -> bytes:
    return (b"|c" if column.kind is Kind.COUNTER else b"|g") + tags + b"\n"


def _tag(text: str) -> str:
    """A tag's name or value without what ends one."""
    return re.sub(r"[|,#\s\0-\x1f\x7f]", "_", text)
