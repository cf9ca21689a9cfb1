"""A frame as one JSON document: the line that sinks write.

Its keys and labels change only when rows come and go, and are laid out then. The values of all tables leave the
arena at once, msgspec writes them in one go, and they are joined with what stands between them (docs/adr/014).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from operator import itemgetter, truediv
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from agent.frame import Frame
from agent.pool import Buffer
from agent.serializers.document import DEGRADED, Identity, head, in_unicode, key_of, timestamp
from agent.table import Column, Kind, Labels, Table, TableSpec

Places = npt.NDArray[np.intp]

# 2^64-1 has 20 digits, a float64 at most 24 characters.
_VALUE_BYTES = 24
_KEPT_LAYOUTS = 8


class _Sort(IntEnum):
    """How a value is made and written. Values are encoded sort by sort, in this order."""

    COUNT = 0
    WHOLE_GAUGE = 1
    TIME = 2  # a counter of a part of its unit
    GAUGE = 3


def _sort(column: Column) -> _Sort:
    if column.kind is Kind.COUNTER:
        return _Sort.COUNT if column.integral else _Sort.TIME
    return _Sort.WHOLE_GAUGE if column.integral else _Sort.GAUGE


@dataclass(frozen=True, slots=True)
class _Layout:
    """Of a line whose tables have certain rows.

    Attributes:
        places: of each sort, where its values are in the arena's counters or gauges.
        pers: of how many of its counter's unit each TIME value is one.
        order: puts the texts of all values in the order of the line.
        parts: what stands before each value, the place for it, and so on; the last is behind them all.
        need_bytes: what the line takes at most.
    """

    places: Sequence[Places]
    pers: Sequence[int]
    order: itemgetter[Any]
    parts: list[bytes]
    need_bytes: int


class JsonSerializer:
    """Writes frames as JSON, without a line feed at the end; what is unknown or no number becomes null.

    Args:
        specs: the tables that may come.
        identity: the host, the run and the tags of the header.
        rates: whether derived columns are written.
    """

    def __init__(self, specs: Iterable[TableSpec], identity: Identity, rates: bool = True) -> None:
        self._forms = {spec.name: _Form(spec, rates) for spec in specs}
        self._start = _text(head(identity))[:-1] + b',"sequence":'
        self._tags = b',"tags":' + _text(identity.tags)
        self._encode = msgspec.json.Encoder().encode
        self._encode_into = msgspec.json.Encoder().encode_into
        self._shape: tuple[Any, ...] = ()
        self._layout: _Layout
        self._kept: dict[tuple[str, ...], tuple[Any, _Layout]] = {}

    def write(self, frame: Frame, buffer: Buffer, tables: Collection[str] = (), left_out: Collection[str] = ()) -> None:
        """Makes `buffer.data` the frame's line; it is sized beforehand and does not regrow meanwhile.

        Args:
            tables: the names of those that are written; all without any.
            left_out: the names of those that are left out and named in the header, as `degraded`.
        """
        shown = [
            table for name, table in frame.tables.items() if name not in left_out and (not tables or name in tables)
        ]
        rows = [(table.spec.name, table.labels, table.dropped) for table in shown]
        shape = (frame.arena, frame.arena.regrown, tuple(left_out), rows)
        if shape != self._shape:
            self._layout = self._layout_of(shape, shown, left_out)
            self._shape = shape
        layout, side = self._layout, frame.arena.now
        counts, whole_gauges, times, gauges = layout.places
        counters: list[int | None] = side.counters.take(counts).tolist()
        parts_of_units: list[int | None] = side.counters.take(times).tolist()
        if all(table.complete for table in shown):
            seconds: Iterable[float | None] = map(truediv, parts_of_units, layout.pers)
        else:
            _forget(counters, side.unknown.take(counts))
            _forget(parts_of_units, side.unknown.take(times))
            pairs = zip(parts_of_units, layout.pers, strict=True)
            seconds = [None if value is None else value / per for value, per in pairs]
        numbers = self._encode(
            [frame.sequence, frame.time_unix_ns, *counters, *np.trunc(side.gauges.take(whole_gauges)).tolist()]
        )
        fractions = self._encode([*seconds, *side.gauges.take(gauges).tolist(), frame.interval_seconds])
        # Whole numbers have no point, and no sign when they are 0.
        texts = (numbers[1:-1] + b",").replace(b".0,", b",").replace(b"-0,", b"0,") + fractions[1:-1]
        parts = layout.parts
        parts[1::2] = layout.order(texts.split(b","))
        parts[2] = b',"time":"%b","time_unix_ns":' % timestamp(frame.time_unix_ns).encode()
        line = b"".join(parts)
        buffer.make_room(max(layout.need_bytes, len(line)))
        self._encode_into(msgspec.Raw(line), buffer.data)

    def _layout_of(self, shape: Any, shown: Sequence[Table], left_out: Collection[str]) -> _Layout:
        """The layout of a shape. Probes of several intervals make few choices of tables, whose layouts are kept."""
        names = tuple([table.spec.name for table in shown])
        kept = self._kept.pop(names, None)
        if kept is None or kept[0] != shape:
            kept = shape, self._lay_out(shown, left_out)
        self._kept[names] = kept
        if len(self._kept) > _KEPT_LAYOUTS:
            del self._kept[next(iter(self._kept))]
        return kept[1]

    def _lay_out(self, shown: Sequence[Table], left_out: Collection[str]) -> _Layout:
        pieces = [self._start, b"", b',"interval_seconds":']
        carried = self._tags
        if left_out:
            carried += b',"%b":' % DEGRADED.encode() + _text([self._forms[name].key for name in left_out])
        sorts, places, pers = [np.empty(0, np.intp)], [np.empty(0, np.intp)], []
        for table in shown:
            form = self._forms[table.spec.name]
            made = form.pieces(table)
            made[0] = carried + made[0]
            carried = made.pop()
            pieces += made
            sorts.append(np.tile(form.sorts, table.count))
            places.append(form.places(table))
            pers += form.pers * table.count
        pieces.append(carried + b"}")
        parts = [b""] * (2 * len(pieces) - 1)
        parts[::2] = pieces
        sort, place = np.concatenate(sorts), np.concatenate(places)
        # In the order of sorts, behind sequence and time; the interval is last.
        order = np.empty(len(sort), dtype=np.intp)
        order[np.argsort(sort, kind="stable")] = np.arange(len(sort)) + 2
        return _Layout(
            places=[place[sort == each] for each in _Sort],
            pers=pers,
            order=itemgetter(0, 1, len(sort) + 2, *order.tolist()),
            parts=parts,
            need_bytes=sum(map(len, pieces)) + _VALUE_BYTES * len(pieces) + 2 * _VALUE_BYTES,
        )


class _Form:
    """What a table's rows look like in a line.

    Attributes:
        key: the table's.
        sorts: (d,) of its columns, in declared order.
        pers: those of its columns that are times.
    """

    def __init__(self, spec: TableSpec, rates: bool) -> None:
        columns = [column for column in spec.columns if rates or not column.derived]
        self.key = key_of(spec)
        self.sorts = np.array([_sort(column) for column in columns], dtype=np.intp)
        self.pers = [column.per for column in columns if _sort(column) is _Sort.TIME]
        self._labels = [_text(name) + b":" for name in spec.labels]
        self._columns = [_text(column.name) + b":" for column in columns]
        self._is_counter = np.array([column.kind is Kind.COUNTER for column in columns], dtype=np.bool_)
        indexes = [(spec.counter_index | spec.gauge_index)[column.name] for column in columns]
        self._indexes = np.array(indexes, dtype=np.intp)
        self._known: dict[Labels, bytes] = {}

    def places(self, table: Table) -> Places:
        """Where the values of its rows are in the arena's arrays, row by row."""
        rows = np.arange(table.count)[:, None]
        counters = table.counters_start + rows * table.counters.shape[1]
        gauges = table.gauges_start + rows * table.gauges.shape[1]
        found: Places = np.where(self._is_counter, counters, gauges).__add__(self._indexes).ravel()
        return found

    def pieces(self, table: Table) -> list[bytes]:
        """What stands before each of its values, and last what stands behind them all."""
        self._known = {labels: self._known.get(labels) or self._written(labels) for labels in table.labels}
        opening = b"," + _text(self.key) + b":"
        pieces = [opening + (b"[" if self._labels else b"")]
        for row, labels in enumerate(table.labels):
            start = (b",{" if row else b"{") + self._known[labels]
            if self._columns:
                first, *others = self._columns
                pieces[-1] += start + (b"," if self._labels else b"") + first
                pieces += [b"," + name for name in others]
                pieces.append(b"}")
            else:
                pieces[-1] += start + b"}"
        pieces[-1] += b"]" if self._labels else b""
        if table.dropped:
            pieces[-1] += b"," + _text(f"{self.key}_rows_dropped") + b":%d" % table.dropped
        return pieces

    def _written(self, labels: Labels) -> bytes:
        return b",".join([name + _text(label) for name, label in zip(self._labels, labels, strict=True)])


def _text(value: Any) -> bytes:
    """A value in JSON."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return msgspec.json.encode(in_unicode(value))


def _forget(values: list[int | None], unknown: npt.NDArray[np.bool_]) -> None:
    """Makes None of the values that are unknown."""
    for place in np.flatnonzero(unknown).tolist():
        values[place] = None
