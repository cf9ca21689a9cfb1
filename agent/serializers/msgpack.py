"""A frame as one MessagePack map, of the shape of a JSON line.

Rows are Structs, whose fields are the table's labels and columns in declared order, so that msgspec writes them
without building dictionaries.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from agent.frame import Frame
from agent.pool import Buffer
from agent.serializers.document import DEGRADED, Identity, head, in_unicode, key_of, timestamp
from agent.serializers.rows import Rows, expression, finite
from agent.table import Kind, TableSpec

_VALUE_BYTES = 9
_LABEL_BYTES = 64  # mostly less than a path of this length; longer ones only make the buffer grow once


class MsgpackSerializer:
    """Writes frames as MessagePack, unknown values as nil; a payload says itself where it ends.

    Args:
        specs: the tables that may come.
        identity: the host, the run and the tags of the header.
        rates: whether derived columns are written.
    """

    def __init__(self, specs: Iterable[TableSpec], identity: Identity, rates: bool = True) -> None:
        self._rows = {spec.name: _Rows(spec, rates) for spec in specs}
        self._head = head(identity)
        self._tags = identity.tags
        self._head_bytes = len(msgspec.json.encode([in_unicode(self._head), in_unicode(self._tags)])) + 256
        self._encoder = msgspec.msgpack.Encoder()

    def write(self, frame: Frame, buffer: Buffer, tables: Collection[str] = (), left_out: Collection[str] = ()) -> None:
        """Makes `buffer.data` the frame's map; parameters as JsonSerializer.write has them."""
        interval = frame.interval_seconds
        document = self._head | {
            "sequence": frame.sequence,
            "time": timestamp(frame.time_unix_ns),
            "time_unix_ns": frame.time_unix_ns,
            "interval_seconds": interval if interval == interval else None,
            "tags": self._tags,
        }
        need_bytes = self._head_bytes
        if left_out:
            document[DEGRADED] = [self._rows[name].key for name in left_out]
            need_bytes += _LABEL_BYTES * len(left_out)
        for name, table in frame.tables.items():
            if name in left_out or (tables and name not in tables):
                continue
            rows = self._rows[name]
            need_bytes += rows.static_bytes + table.count * rows.row_bytes
            found = rows.of(table)
            document[rows.key] = found if rows.labelled else found[0]
            if table.dropped:
                document[f"{rows.key}_rows_dropped"] = table.dropped
        buffer.make_room(need_bytes)
        try:
            self._encoder.encode_into(document, buffer.data)
        except UnicodeEncodeError:  # a label with bytes that are no UTF-8
            self._encoder.encode_into(in_unicode(document), buffer.data)


class _Rows:
    """Turns one table's rows into Structs.

    They are made by `row(labels[0], c[0], c[1] / 100, g[0], …)`, compiled once.
    """

    def __init__(self, spec: TableSpec, rates: bool) -> None:
        self.key = key_of(spec)
        self.labelled = bool(spec.labels)
        columns = [column for column in spec.columns if rates or not column.derived]
        names = [*spec.labels, *(column.name for column in columns)]
        row = msgspec.defstruct(f"{spec.name}_row", [(name, Any) for name in names], gc=False)
        labels = [f"labels[{place}]" for place in range(len(spec.labels))]

        def result(guarded: bool) -> str:
            values = [expression(spec, column, guarded=guarded) for column in columns]
            values = [
                finite(value) if c.kind is Kind.GAUGE else value for value, c in zip(values, columns, strict=True)
            ]
            return f"row({', '.join([*labels, *values])})"

        self.of = Rows(result, {"row": row}).of
        name_bytes = sum(len(name) + 4 for name in names)
        self.row_bytes = name_bytes + len(columns) * _VALUE_BYTES + len(spec.labels) * (_LABEL_BYTES + 2) + 2
        self.static_bytes = 2 * len(spec.name) + 48
