"""Protobuf messages whose numbers are put in anew for each frame.

A message is built by the protobuf library only when rows come and go, or values become unknown: with a mark of 8
bytes for each value, which is then looked for in its text. A frame is a copy of that text with its numbers in their
places.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from agent.frame import Frame
from agent.pool import Buffer
from agent.serializers.document import Identity
from agent.serializers.families import Family, Naming, Source
from agent.serializers.frame_tables import FRAME_TABLES, FrameTables
from agent.serializers.rows import Rows, expression, tuple_of
from agent.serializers.series import by_column
from agent.table import Labels, Table, TableSpec

Places = npt.NDArray[np.intp]
_EIGHT = np.arange(8)
_MARK = struct.Struct("<Q")
_MARK_TOP = 0x41 << 56  # a mark is an ordinary number, also as a double


class Point(NamedTuple):
    """One known value of a table.

    Attributes:
        row: its place among the table's rows.
        family, source: what it is.
        is_integer: whether it is shown as a whole number.
        mark: the 8 bytes that stand for it, little-endian; an ordinary number, also as a double.
    """

    row: int
    family: Family
    source: Source
    is_integer: bool
    mark: bytes


class Cast(NamedTuple):
    """The message of some rows.

    Attributes:
        text: with marks in the places of the values.
        points: in the order of their places.
    """

    text: bytes
    points: Sequence[Point]


class Layout(NamedTuple):
    """A whole frame's message, and where its numbers go.

    Attributes:
        text: the message.
        slots: (n, 8) the bytes of each value in it.
        packing: packs the values.
        points: of each value the table, what it is, and its row's labels.
    """

    text: bytes
    slots: Places
    packing: struct.Struct
    points: Sequence[tuple[str, Point, Labels]]


class CastBlock:
    """One table of a format.

    Args:
        families: what it becomes.
        only_int64: whether whole numbers must fit into 64 bits with a sign.
    """

    def __init__(self, spec: TableSpec, families: Sequence[Family], only_int64: bool) -> None:
        self.spec = spec
        columns = {column.name: column for column in spec.columns}
        self._sources = [
            (family, source, columns[source.column].integral) for family in families for source in family.sources
        ]

        def result(guarded: bool) -> str:
            return tuple_of(
                [
                    expression(spec, columns[s.column], s.per, only_int64=only_int64, guarded=guarded, only=s.only)
                    for _, s, _ in self._sources
                ]
            )

        self._rows = Rows(result)

    def values(self, table: Table) -> list[float | None]:
        """The table's values, one column of all rows behind the other; NaN or None is unknown."""
        return by_column(self._rows.of(table))

    def points(self, count: int, known: Sequence[bool]) -> list[Point]:
        """The known ones among the values of so many rows."""
        base = int.from_bytes(os.urandom(4), "little") << 24  # nobody can put a mark into a label beforehand
        every = ((row, *source) for source in self._sources for row in range(count))
        return [Point(*point, _MARK.pack(_MARK_TOP | base + i)) for i, point in enumerate(compress(every, known))]


class CastSerializer:
    """Writes frames as protobuf into a reused buffer.

    A format gives the cast of a table, and what stands around all of them.

    Args:
        specs: the tables that may come.
        identity: the host, the run and the tags.
        rates: whether derived columns are written.
        naming: what columns become.
    """

    only_int64 = False

    def __init__(
        self, specs: Iterable[TableSpec], identity: Identity, rates: bool, naming: Naming, has_uname: bool = False
    ) -> None:
        self._frame_tables = FrameTables(identity, has_uname)
        self._blocks = {
            spec.name: CastBlock(spec, naming(spec, rates), self.only_int64) for spec in (*FRAME_TABLES, *specs)
        }
        self._encoder = msgspec.msgpack.Encoder()
        self._casts: dict[str, tuple[tuple[Any, ...], Cast]] = {}
        self._shape: list[tuple[str, Sequence[Labels]]] = []
        self._known: list[bool] = []
        self._form = 0
        self._layout: Layout

    def form(self, frame: Frame) -> int:
        """What of a frame the text depends on, beside its rows: it is laid out anew when this changes."""
        return 0

    def cast(self, block: CastBlock, labels: Sequence[Labels], points: Sequence[Point], form: int) -> bytes:
        """The message of a table's known values."""
        raise NotImplementedError

    def around(self, texts: Sequence[bytes]) -> tuple[bytes, bytes]:
        """What stands before and behind the messages of all tables."""
        return b"", b""

    def letter(self, point: Point) -> str:
        """How a value is packed, as `struct` names it."""
        return "d"

    def stamp(self, data: npt.NDArray[np.uint8], layout: Layout, frame: Frame, bits: npt.NDArray[np.int64]) -> None:
        """Puts the frame's time into the message, whose values have these bits."""
        raise NotImplementedError

    def write(self, frame: Frame, buffer: Buffer, tables: Collection[str] = (), left_out: Collection[str] = ()) -> None:
        """Makes `buffer.data` the frame's message; parameters as JsonSerializer.write has them."""
        shown = self._frame_tables.of(frame, tables, left_out)
        values: list[Any] = []
        counts = []
        for table in shown:
            found = self._blocks[table.spec.name].values(table)
            values += found
            counts.append(len(found))
        known = [value is not None and value - value == 0 for value in values]  # neither NaN nor infinite
        shape = [(table.spec.name, table.labels) for table in shown]
        form = self.form(frame)
        if known != self._known or shape != self._shape or form != self._form:
            self._layout = self._laid_out(shape, counts, known, form)
            self._shape, self._known, self._form = shape, known, form
        layout = self._layout
        packed = layout.packing.pack(*compress(values, known))
        buffer.make_room(len(layout.text))
        self._encoder.encode_into(msgspec.Raw(layout.text), buffer.data)
        data = np.frombuffer(buffer.data, dtype=np.uint8)
        data[layout.slots] = np.frombuffer(packed, dtype=np.uint8).reshape(-1, 8)
        self.stamp(data, layout, frame, np.frombuffer(packed, dtype="<i8"))

    def _laid_out(
        self, shape: Sequence[tuple[str, Sequence[Labels]]], counts: Sequence[int], known: Sequence[bool], form: int
    ) -> Layout:
        casts = []
        start = 0
        for (name, labels), count in zip(shape, counts, strict=True):
            casts.append(self._cast(name, labels, known[start : start + count], form))
            start += count
        before, behind = self.around([cast.text for cast in casts])
        text = b"".join([before, *(cast.text for cast in casts), behind])
        points = [
            (name, point, labels[point.row])
            for (name, labels), cast in zip(shape, casts, strict=True)
            for point in cast.points
        ]
        places = np.empty(len(points), dtype=np.intp)
        place = len(before)
        for number, (_, point, _) in enumerate(points):
            place = text.index(point.mark, place)
            places[number] = place
            place += 8
        packing = struct.Struct("<" + "".join(self.letter(point) for _, point, _ in points))
        return Layout(text, places[:, None] + _EIGHT, packing, points)

    def _cast(self, name: str, labels: Sequence[Labels], known: Sequence[bool], form: int) -> Cast:
        key = (labels, known, form)
        held = self._casts.get(name)
        if held is None or held[0] != key:
            block = self._blocks[name]
            points = block.points(len(labels), known)
            held = self._casts[name] = (key, Cast(self.cast(block, labels, points, form), points))
        return held[1]
