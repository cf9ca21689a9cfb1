"""Formats of text in which each value is a series of its own, such as `name{label="value"} 12.5`.

What stands between the values changes only when rows come and go, or values become unknown: it is laid out
then. A frame's values are written in one go by msgspec, and joined with what stands between them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from itertools import chain, compress
from typing import NamedTuple

import msgspec

from agent.frame import Frame
from agent.pool import Buffer
from agent.serializers.document import Identity
from agent.serializers.frame_tables import FRAME_TABLES, FrameTables
from agent.table import Labels, Table, TableSpec

Cell = tuple[bytes, bytes]
"""What stands directly before a value, and directly behind it."""

_NULL = b"null"


class Group(NamedTuple):
    """Values that share something that is written only where one of them is known.

    Attributes:
        header: before the first known one.
        cells: in the order of the values.
        separator: before each other one.
        trailer: behind the last known one.
    """

    header: bytes
    cells: Sequence[Cell]
    separator: bytes = b""
    trailer: bytes = b""


class Block:
    """One table of a format.

    Args:
        values: its values, flat, of a table and the one that was collected before it; NaN or None is unknown.
        groups: what stands between the values, in their order, for these rows.
    """

    def __init__(
        self,
        values: Callable[[Table, Table | None], list[float | None]],
        groups: Callable[[Sequence[Labels]], Iterable[Group]],
    ) -> None:
        self.values = values
        self._groups = groups
        self._labels: Sequence[Labels] | None = None
        self._made: list[Group] = []
        self._known: Sequence[bool] | None = None
        self._pieces: list[bytes] = []

    def pieces(self, labels: Sequence[Labels], known: Sequence[bool]) -> list[bytes]:
        """What stands before each known value, and last what stands behind them all."""
        if labels != self._labels:
            self._made = list(self._groups(labels))
            self._labels = labels
            self._known = None
        if known != self._known:
            self._pieces = _merged(self._made, known)
            self._known = known
        return self._pieces


def _merged(groups: Iterable[Group], known: Sequence[bool]) -> list[bytes]:
    pieces = []
    carried = b""
    place = 0
    for header, cells, separator, trailer in groups:
        is_open = False
        for before, behind in cells:
            if known[place]:
                pieces.append(carried + (separator if is_open else header) + before)
                carried = behind
                is_open = True
            place += 1
        if is_open:
            carried += trailer
    return [*pieces, carried]


class SeriesSerializer:
    """Writes frames as such a text into a reused buffer, without the last line feed.

    A format gives the block of a table.

    Args:
        specs: the tables that may come.
        identity: the host, the run and the tags.
        rates: whether derived columns are written.

    Attributes:
        is_state: whether a payload tells also of the tables that weren't due.
        stamp: in a block's pieces, stands for the frame's time; empty where lines have none.
        end: what a payload ends with.
    """

    is_state = False
    has_uname = False
    stamp = b""
    end = b""

    def __init__(self, specs: Iterable[TableSpec], identity: Identity, rates: bool = True) -> None:
        self._identity = identity
        self._rates = rates
        self._frame_tables = FrameTables(identity, self.has_uname)
        self._blocks = {spec.name: self.block(spec) for spec in (*FRAME_TABLES, *specs)}
        self._encoder = msgspec.json.Encoder()
        self._shape: list[tuple[str, Sequence[Labels]]] = []
        self._known: list[bool] = []
        self._pieces: list[bytes] = []

    def block(self, spec: TableSpec) -> Block:
        """What the format makes of a table."""
        raise NotImplementedError

    def time(self, time_unix_ns: int) -> bytes:
        """What takes the place of `stamp`."""
        raise NotImplementedError

    def write(self, frame: Frame, buffer: Buffer, tables: Collection[str] = (), left_out: Collection[str] = ()) -> None:
        """Makes `buffer.data` the frame's text; parameters as JsonSerializer.write has them."""
        shown = self._frame_tables.of(frame, tables, left_out, self.is_state)
        values: list[float | None] = []
        counts = []
        for table in shown:
            name = table.spec.name
            found = self._blocks[name].values(table, frame.previous(name))
            values += found
            counts.append(len(found))
        texts = self._encoder.encode(values)[1:-1].split(b",")
        known = [text != _NULL for text in texts]
        if _NULL in texts:
            texts = list(compress(texts, known))
        shape = [(table.spec.name, table.labels) for table in shown]
        if known != self._known or shape != self._shape:
            self._lay_out(shape, counts, known)
        parts = [b""] * (2 * len(texts) + 1)
        parts[::2] = self._pieces
        parts[1::2] = texts
        text = b"".join(parts)
        if self.stamp:
            text = text.replace(self.stamp, self.time(frame.time_unix_ns))
        buffer.make_room(len(text))
        self._encoder.encode_into(msgspec.Raw(text), buffer.data)

    def _lay_out(self, shape: list[tuple[str, Sequence[Labels]]], counts: Sequence[int], known: list[bool]) -> None:
        pieces = [b""]
        start = 0
        for (name, labels), count in zip(shape, counts, strict=True):
            first, *others = self._blocks[name].pieces(labels, known[start : start + count])
            pieces[-1] += first
            pieces += others
            start += count
        pieces[-1] = pieces[-1].removesuffix(b"\n") + self.end
        self._shape, self._known, self._pieces = shape, known, pieces


def by_row(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The values of a table's rows, one row behind the other."""
    return list(rows[0]) if len(rows) == 1 else list(chain.from_iterable(rows))


def by_column(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The values of a table's rows, one column behind the other."""
    return list(rows[0]) if len(rows) == 1 else list(chain.from_iterable(zip(*rows, strict=True)))


def told_apart(rows: Sequence[Hashable]) -> list[dict[str, str]]:
    """For each row the label that tells it from an equal one before it, `repeat`, counted from 2; mostly none.

    Sockets that share a port have equal rows, and no format may have a series twice.

    Args:
        rows: their labels, as the format writes them where it doesn't write all as they are.
    """
    seen: dict[Hashable, int] = {}
    labels = []
    for row in rows:
        seen[row] = seen.get(row, 0) + 1
        labels.append({"repeat": str(seen[row])} if seen[row] > 1 else {})
    return labels


def plain(label: str | None) -> str:
    """A label's value as text; bytes that are no UTF-8, as mount points may have, as their escapes."""
    if label is None:
        return ""
    return label if label.isascii() else label.encode(errors="backslashreplace").decode()
