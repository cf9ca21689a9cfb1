"""A frame as one document: a header, then the tables, whose rows are Structs.

The Structs' fields are the table's labels and columns in declared order, so that msgspec writes them
without building dictionaries. Whole columns leave NumPy by `tolist`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

import msgspec

from agent.frame import Frame
from agent.pool import Buffer
from agent.serializers.rows import Rows, expression, finite
from agent.table import Kind, TableSpec

SCHEMA = "hostprobe/1"
HEADER = ("schema", "host", "instance", "sequence", "time", "time_unix_ns", "interval_seconds", "tags")
DEGRADED = "degraded"  # a key of the header that is there only in a frame that was thinned
RESERVED = (*HEADER, DEGRADED, "part", "parts")  # the last two are those of a frame that was split into datagrams

# What a value can take in text: 2^64-1 has 20 digits, a float64 at most 24 characters, a
# label mostly less than a path of this length. Longer ones only make the buffer grow once.
_VALUE_BYTES = 24
_LABEL_BYTES = 64


class Identity(msgspec.Struct, frozen=True):
    """Who speaks: the same in every frame of one run.

    Attributes:
        started_unix_ns: when the run began; where the counters of its own tables began.
        boot_unix_ns: when the host began, and with it the kernel's counters; None where unknown.
        uname: the labels of the table `uname`; none where unknown.
    """

    host: str
    instance: str
    tags: Mapping[str, str]
    started_unix_ns: int = 0
    boot_unix_ns: int | None = None
    uname: tuple[str, ...] = ()


class Document:
    """Puts frames together, ready to be encoded.

    Args:
        specs: the tables that may come.
        identity: the host, the run and the tags of the header.
        rates: whether derived columns are written.
        has_nan: whether the encoder writes NaN as null itself.
    """

    def __init__(self, specs: Iterable[TableSpec], identity: Identity, rates: bool, has_nan: bool) -> None:
        self._rows = {spec.name: _Rows(spec, rates, has_nan) for spec in specs}
        self._identity = identity
        header = {"schema": SCHEMA, "host": identity.host, "instance": identity.instance, "tags": identity.tags}
        self._header_bytes = len(msgspec.json.encode(header)) + 256
        self.need_bytes = 0

    def of(self, frame: Frame, tables: Collection[str], left_out: Collection[str]) -> dict[str, Any]:
        """The frame's document; `need_bytes` is what its JSON takes at most, but for labels of unusual length.

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
            "interval_seconds": interval if interval == interval else None,
            "tags": identity.tags,
        }
        need_bytes = self._header_bytes
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
        self.need_bytes = need_bytes
        return document


class DocumentSerializer:
    """Writes frames as documents into a reused buffer, by an encoder of msgspec's.

    Args:
        specs: the tables that may come.
        identity: the host, the run and the tags of the header.
        rates: whether derived columns are written.

    Attributes:
        has_nan: whether the encoder writes NaN as null itself.
    """

    has_nan: ClassVar[bool]
    encoder: ClassVar[type[msgspec.json.Encoder] | type[msgspec.msgpack.Encoder]]

    def __init__(self, specs: Iterable[TableSpec], identity: Identity, rates: bool = True) -> None:
        self._document = Document(specs, identity, rates, self.has_nan)
        self._encoder = self.encoder()

    def write(self, frame: Frame, buffer: Buffer, tables: Collection[str] = (), left_out: Collection[str] = ()) -> None:
        """Makes `buffer.data` the frame's document; it is sized beforehand and does not regrow meanwhile.

        Args:
            tables: the names of those that are written; all without any.
            left_out: the names of those that are left out and named in the header, as `degraded`.
        """
        document = self._document.of(frame, tables, left_out)
        buffer.make_room(self._document.need_bytes)
        try:
            self._encoder.encode_into(document, buffer.data)
        except UnicodeEncodeError:  # a label with bytes that are no UTF-8
            self._encoder.encode_into(in_unicode(document), buffer.data)


def key_of(spec: TableSpec) -> str:
    """A table's key in a line: its name, but `host` is the header's already and becomes `host_table`."""
    return f"{spec.name}_table" if spec.name in RESERVED else spec.name


def in_unicode(value: Any) -> Any:
    """A document whose texts had bytes that are no UTF-8, as Python's own file names have them, without those."""
    value = msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, Mapping):
        return {key: in_unicode(item) for key, item in value.items()}
    return [in_unicode(item) for item in value] if isinstance(value, list) else value


class _Rows:
    """Turns one table's rows into Structs.

    They are made by `row(labels[0], c[0], c[1] / 100, g[0], …)`, compiled once.
    """

    def __init__(self, spec: TableSpec, rates: bool, has_nan: bool) -> None:
        self.key = key_of(spec)
        self.labelled = bool(spec.labels)
        columns = [column for column in spec.columns if rates or not column.derived]
        names = [*spec.labels, *(column.name for column in columns)]
        row = msgspec.defstruct(f"{spec.name}_row", [(name, Any) for name in names], gc=False)
        labels = [f"labels[{place}]" for place in range(len(spec.labels))]

        def result(guarded: bool) -> str:
            values = [expression(spec, column, guarded=guarded) for column in columns]
            if not has_nan:
                values = [
                    finite(value) if c.kind is Kind.GAUGE else value for value, c in zip(values, columns, strict=True)
                ]
            return f"row({', '.join([*labels, *values])})"

        self.of = Rows(result, {"row": row}).of
        name_bytes = sum(len(name) + 4 for name in names)
        self.row_bytes = name_bytes + len(columns) * _VALUE_BYTES + len(spec.labels) * (_LABEL_BYTES + 2) + 2
        self.static_bytes = 2 * len(spec.name) + 48
