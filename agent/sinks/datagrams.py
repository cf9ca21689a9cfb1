"""Frames as datagrams: a frame that fits goes whole, a larger one is split by table and row.

    datagram = sequence u64 | nanoseconds u64 | CRC-32 u32 | JSON        (big-endian)

The sequence counts an agent's datagrams by one from 1, so a gap is what the network lost. Nanoseconds are the frame's
`time_unix_ns`. The checksum is that of the 16 bytes before it and of the JSON.

The JSON is a frame, or, where it has a `part`, one of a frame's `parts` (numbers from 1). All parts have the frame's
`instance` and `sequence`; the first has also all the rest that is no table. To put a frame together again, take the
parts of an instance and sequence, each number once, in the order of their numbers: the lists under the same name
follow each other, the objects under the same name become one, and any other value is there once.

A table's rows are spread as lists; a table of one row stays whole, unless it is larger than a part and is spread by
columns. A row larger than a part can't be sent: it is left out, and counted in the table's `_rows_dropped`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import Annotated

import msgspec

from agent.serializers.document import RESERVED

HEADER_BYTES = 20
_HEADER = struct.Struct("!QQ")
_CHECKSUM = struct.Struct("!I")
_PART_KEYS = ("part", "parts")
_COMMON_KEYS = ("instance", "sequence")
_DROPPED = "_rows_dropped"

_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_elements = msgspec.json.Decoder(list[msgspec.Raw])
_count = msgspec.json.Decoder(int)


class _Stamp(msgspec.Struct):
    time_unix_ns: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


_stamp = msgspec.json.Decoder(_Stamp)


def nanoseconds_of(frame: bytes | memoryview) -> int:
    """A frame's `time_unix_ns`; ValueError where it has none."""
    return _stamp.decode(frame).time_unix_ns


def header(sequence: int, nanoseconds: int, text: bytes | memoryview) -> bytes:
    """What stands in front of a datagram's JSON."""
    start = _HEADER.pack(sequence, nanoseconds)
    return start + _CHECKSUM.pack(zlib.crc32(text, zlib.crc32(start)))


def split(frame: bytes | memoryview, limit_bytes: int) -> list[bytes]:
    """The JSON of a frame's datagrams, each of at most `limit_bytes`.

    Values are taken as they are written: nothing is encoded anew, and sizes are those of the bytes.

    Raises:
        ValueError: it is no frame, or what isn't a table is too large for one datagram.
    """
    text = bytes(frame)  # neither the result nor an error's traceback may hold the caller's buffer
    if len(text) <= limit_bytes:
        return [text]
    document = {name: bytes(value).strip() for name, value in _members.decode(text).items()}
    for name in _COMMON_KEYS:
        if name not in document:
            raise ValueError(f"a frame without {name}")
    for name in _PART_KEYS:
        if name in document:
            raise ValueError(f"{name} is no name for a table of a frame that has to be split")
    digits = len(str(len(text) // limit_bytes + 1))
    while len(parts := _split(document, limit_bytes, digits)) >= 10**digits:
        digits += 1
    return parts


def packed(payload: bytes | memoryview, limit_bytes: int, is_lines: bool) -> tuple[list[bytes], int]:
    """A payload of another format as datagrams without a header: whole lines, as many as there is room for.

    Returns:
        The datagrams, and the bytes of the longest line; one above the limit is in none of them.
    """
    text = bytes(payload)
    lines = text.split(b"\n") if is_lines and len(text) > limit_bytes else [text]
    longest_bytes = max(map(len, lines))
    datagrams: list[bytes] = []
    held: list[bytes] = []
    held_bytes = 0
    for line in lines:
        if len(line) > limit_bytes:
            continue
        if held_bytes + len(line) > limit_bytes:
            datagrams.append(b"\n".join(held))
            held, held_bytes = [], 0
        held.append(line)
        held_bytes += len(line) + 1
    if held:
        datagrams.append(b"\n".join(held))
    return datagrams, longest_bytes


def _split(document: dict[str, bytes], limit_bytes: int, digits: int) -> list[bytes]:
    """The parts, which have room for numbers of so many digits: how many there are is known only at the end."""
    common = b",".join(_member(name, document[name]) for name in _COMMON_KEYS)
    form = b'{%b,"part":%d,"parts":%d%b}'
    room_bytes = limit_bytes - len(form % (common, 0, 0, b"")) - 2 * (digits - 1)
    rest = {name: value for name, value in document.items() if name not in _COMMON_KEYS}
    tables = {name: value for name, value in rest.items() if value[:1] in (b"[", b"{") and name not in RESERVED}
    top = {name: value for name, value in rest.items() if name not in tables}
    packing = _Packing(room_bytes)
    pieces = []
    for name, value in tables.items():
        opening, closing = b"," + _member(name, value[:1]), value[-1:]
        items, dropped = _items(value, room_bytes - len(opening) - len(closing))
        if dropped:
            top[name + _DROPPED] = b"%d" % (_count.decode(top.get(name + _DROPPED, b"0")) + dropped)
        pieces.append((opening, items, closing))
    packing.put(b"".join(b"," + _member(name, value) for name, value in top.items()))
    for opening, items, closing in pieces:
        packing.add(opening, items, closing)
    bodies = packing.bodies()
    return [form % (common, number, len(bodies), body) for number, body in enumerate(bodies, 1)]


def _items(table: bytes, room_bytes: int) -> tuple[list[bytes], int]:
    """What of a table, without its brackets, must stay together and is at most so large; how many rows are not."""
    if table[:1] == b"[":
        rows = [bytes(row) for row in _elements.decode(table)]
        kept = [row for row in rows if len(row) <= room_bytes]
        return kept or [b""], len(rows) - len(kept)
    if len(table) - 2 <= room_bytes:
        return [table[1:-1]], 0
    columns = [_member(name, value) for name, value in _members.decode(table).items()]
    if max(map(len, columns), default=0) > room_bytes:
        return [], 1
    return columns or [b""], 0


def _member(name: str, value: bytes | msgspec.Raw) -> bytes:
    return b"%b:%b" % (msgspec.json.encode(name), value)


class _Packing:
    """Fills part after part, in the order in which it is given things.

    Args:
        room_bytes: how much a part holds, without what all parts have.
    """

    def __init__(self, room_bytes: int) -> None:
        self._room_bytes = room_bytes
        self._left_bytes = room_bytes
        self._texts: list[bytes] = []
        self._bodies: list[bytes] = []

    def put(self, top: bytes) -> None:
        """What isn't a table, into the first part."""
        if len(top) > self._room_bytes:
            raise ValueError(f"its header has {len(top)} bytes, and a datagram room for {self._room_bytes}")
        self._texts.append(top)
        self._left_bytes -= len(top)

    def add(self, opening: bytes, items: Iterable[bytes], closing: bytes) -> None:
        """A table's items, between its brackets in each part that has any of them."""
        brackets_bytes = len(opening) + len(closing)
        is_open = False
        for item in items:
            need_bytes = len(item) + (1 if is_open else brackets_bytes)
            if need_bytes > self._left_bytes:
                if is_open:
                    self._texts.append(closing)
                    is_open = False
                self._turn()
                need_bytes = len(item) + brackets_bytes
                if need_bytes > self._room_bytes:
                    raise ValueError(f"a table's name has {len(opening)} bytes")
            self._texts += (b"," if is_open else opening, item)
            self._left_bytes -= need_bytes
            is_open = True
        if is_open:
            self._texts.append(closing)

    def bodies(self) -> list[bytes]:
        """The parts so far."""
        return [*self._bodies, b"".join(self._texts)]

    def _turn(self) -> None:
        self._bodies.append(b"".join(self._texts))
        self._texts.clear()
        self._left_bytes = self._room_bytes
