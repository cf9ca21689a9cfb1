"""A frame as one JSON document: the line that sinks write.

Each table's rows become Structs whose fields are the table's labels and columns in
declared order, so that msgspec writes them without building dictionaries. Whole columns
leave NumPy by `tolist`; NaN and unknown counters become null.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from agent.frame import Frame
from agent.pool import Buffer
from agent.table import Column, Kind, Table, TableSpec

SCHEMA = "hostprobe/1"
HEADER = ("schema", "host", "instance", "sequence", "time", "time_unix_ns", "interval_seconds", "tags")
DEGRADED = "degraded"  # a key of the header that is there only in a frame that was thinned
RESERVED = (*HEADER, DEGRADED, "part", "parts")  # the last two are those of a frame that was split into datagrams

# What a value can take in text: 2^64-1 has 20 digits, a float64 at most 24 characters, a
# label mostly less than a path of this length. Longer ones only make the buffer grow once.
_VALUE_BYTES = 24
_LABEL_BYTES = 64
_EXACT = 2.0**53  # a whole float64 beyond is no exact number of anything: it keeps its exponent; NaN becomes null


class Identity(msgspec.Struct, frozen=True):
    """Who speaks: the same in every frame of one run."""

    host: str
    instance: str
    tags: Mapping[str, str]


class JsonSerializer:
    """Writes frames as JSON into a reused buffer, without a line feed at the end.

    Args:
        specs: the tables that may come.
        identity: the host, the run and the tags of the header.
        rates: whether derived columns are written.
    """

    def __init__(self, specs: Iterable[TableSpec], identity: Identity, rates: bool = True) -> None:
        self._rows = {spec.name: _Rows(spec, rates) for spec in specs}
        self._identity = identity
        self._encoder = msgspec.json.Encoder()
        header = {"schema": SCHEMA, "host": identity.host, "instance": identity.instance, "tags": identity.tags}
        self._header_bytes = len(self._encoder.encode(header)) + 256

    def write(self, frame: Frame, buffer: Buffer, tables: Collection[str] = (), left_out: Collection[str] = ()) -> None:
        """Makes `buffer.data` the frame's JSON; it is sized beforehand and does not regrow meanwhile.

        Args:
            tables: the names of those that are written; all without any.
            left_out: the names of those that are left out and named in the header, as `degraded`.
        """
        identity = self._identity
        seconds, nanoseconds = divmod(frame.time_unix_ns, 1_000_000_000)
        interval = frame.interval_seconds
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "host": identity.host,
            "instance": identity.instance,
            "sequence": frame.sequence,
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09}Z",
            "time_unix_ns": frame.time_unix_ns,
            "interval_seconds": interval,
            "tags": identity.tags,
        }
        need = self._header_bytes
        if left_out:
            document[DEGRADED] = [self._rows[name].key for name in left_out]
            need += _LABEL_BYTES * len(left_out)
        for name, table in frame.tables.items():
            if name in left_out or (tables and name not in tables):
                continue
            rows = self._rows[name]
            need += rows.static_bytes + table.count * rows.row_bytes
            found = rows.of(table)
            document[rows.key] = found if rows.labelled else found[0]
            if table.dropped:
                document[f"{rows.key}_rows_dropped"] = table.dropped
        if need > buffer.capacity:
            buffer.reserve(1 << need.bit_length())
        try:
            self._encoder.encode_into(document, buffer.data)
        except UnicodeEncodeError:  # a label with bytes that are no UTF-8, as Python's own file names have them
            self._encoder.encode_into(_in_unicode(msgspec.to_builtins(document)), buffer.data)


def key_of(spec: TableSpec) -> str:
    """A table's key in a line: its name, but `host` is the header's already and becomes `host_table`."""
    return f"{spec.name}_table" if spec.name in RESERVED else spec.name


def _in_unicode(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {key: _in_unicode(item) for key, item in value.items()}
    return [_in_unicode(item) for item in value] if isinstance(value, list) else value


class _Rows:
    """Turns one table's rows into Structs.

    What makes a Struct of a row's labels, counters and gauges is compiled once from the
    declarations, `lambda labels, c, g: row(labels[0], c[0], c[1] / 100, g[0], …)`: a loop
    that asks each column what it is would take several times as long.
    """

    def __init__(self, spec: TableSpec, rates: bool) -> None:
        self.key = key_of(spec)
        self.labelled = bool(spec.labels)
        columns = [column for column in spec.columns if rates or not column.derived]
        names = [*spec.labels, *(column.name for column in columns)]
        self._make = _compile(spec, columns, names, "c[{0}] / {1}")
        self._make_incomplete = _compile(spec, columns, names, "None if c[{0}] is None else c[{0}] / {1}")
        name_bytes = sum(len(name) + 4 for name in names)
        self.row_bytes = name_bytes + len(columns) * _VALUE_BYTES + len(spec.labels) * (_LABEL_BYTES + 2) + 2
        self.static_bytes = 2 * len(spec.name) + 48

    def of(self, table: Table) -> list[Any]:
        """The table's rows, in their order."""
        count = table.count
        shown_counters, shown_gauges = table.counters, table.gauges
        if count < table.capacity:
            shown_counters, shown_gauges = shown_counters[:count], shown_gauges[:count]
        counters: list[list[Any]] = shown_counters.tolist()
        make = self._make
        if not table.complete:
            make = self._make_incomplete
            for row, index in np.argwhere(table.unknown[:count]).tolist():
                counters[row][index] = None
        return list(map(make, table.labels, counters, shown_gauges.tolist()))


def _compile(spec: TableSpec, columns: Sequence[Column], names: Sequence[str], scaled: str) -> Callable[..., Any]:
    """A function of a row's labels, counters and gauges; `scaled` shows a counter in another unit."""

    def expression(column: Column) -> str:
        if column.kind is Kind.COUNTER:
            index = spec.counter_index[column.name]
            return f"c[{index}]" if column.per == 1 else scaled.format(index, column.per)
        value = f"g[{spec.gauge_index[column.name]}]"
        # NaN fails the comparison, and stays what it is.
        return f"int({value}) if -{_EXACT} <= {value} <= {_EXACT} else {value}" if column.integral else value

    row = msgspec.defstruct(f"{spec.name}_row", [(name, Any) for name in names], gc=False)
    values = [f"labels[{place}]" for place in range(len(spec.labels))] + [expression(column) for column in columns]
    make: Callable[..., Any] = eval(f"lambda labels, c, g: row({', '.join(values)})", {"row": row, "int": int})
    return make
