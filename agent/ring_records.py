"""How records lie in a ring's block, and how to find the whole ones again after a crash.

A record is a header and its payload, padded to eight bytes; it never wraps:

    mark │ CRC-32 │ length │ records │ number │ sequence │ stamp │ wall clock │ instance │ payload …
    4 B     u32      u32       u32      u32       u64       u64       u64         16 B

The checksum is over what follows it in the header, and the payload; a ring in memory leaves it 0.
`number` counts the headers of a block by one, so that what an earlier round left behind is never
taken for a part of this one. The mark occurs in no UTF-8 text: the search for records in a damaged
block computes checksums only where one can be.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

Payload = bytes | bytearray | memoryview

HEADER = struct.Struct("<4xIIIIQQQ16s")
FIELDS = struct.Struct("<IIIQQQ16s")  # the header behind its checksum
CHECKSUM = struct.Struct("<I")
MARK = b"\xffrec"
ALIGN = 8
_PADDING = ALIGN - 1
NUMBER_MASK = 0xFFFF_FFFF

HEADER_BYTES = HEADER.size
_SIZES = struct.Struct("<II")
_SIZES_AT = 8
_FIELDS_AT = HEADER.size - FIELDS.size
_SEARCHED_BYTES = 1 << 16


class Header(NamedTuple):
    """A record's header."""

    checksum: int
    length: int
    records: int
    number: int
    sequence: int
    stamp_ns: int
    time_unix_ns: int
    instance: bytes


class Record(NamedTuple):
    """What was claimed: its payload is in the caller's buffer, behind those before it.

    Attributes:
        size: bytes of the payload.
        stamp_ns: on this process's monotonic clock, also where another one has pushed it.
        is_own: whether it was pushed through this ring object, and not recovered.
    """

    size: int
    records: int
    sequence: int
    stamp_ns: int
    is_own: bool


NO_HEADER = Header(0, 0, 0, 0, 0, 0, 0, bytes(16))


class State(NamedTuple):
    """Where a ring's records are, offsets in bytes, and how many.

    Attributes:
        head, tail: where the next record goes, and where the oldest one is.
        end: where the reader goes back to the block's start: the rest was too short for a record.
        used: bytes from tail to head, a skipped end included.
        headers: how many there are; a batch of equal records shares one.
        records: what those count.
        number: of the next header.
    """

    head: int = 0
    tail: int = 0
    end: int = 0
    used: int = 0
    headers: int = 0
    records: int = 0
    number: int = 0


def need(length: int) -> int:
    """Bytes of the block that a payload of this length occupies."""
    return (HEADER_BYTES + length + _PADDING) & ~_PADDING


def checksum(fields: Payload, payload: Payload) -> int:
    """The CRC-32 of a record, from the header's packed `FIELDS` and the payload."""
    return zlib.crc32(payload, zlib.crc32(fields))


def header_at(block: memoryview, place: int) -> Header:
    """The header at an offset, whatever it holds."""
    return Header._make(HEADER.unpack_from(block, place))


def sizes_at(block: memoryview, place: int) -> tuple[int, int]:
    """The length and the records of the header at an offset."""
    return _SIZES.unpack_from(block, place + _SIZES_AT)


def whole_at(block: memoryview, place: int) -> Header | None:
    """The header of the record at an offset, None where no whole record is."""
    start = place + HEADER.size
    if start > len(block) or block[place : place + len(MARK)] != MARK:
        return None
    header = header_at(block, place)
    fields, payload = block[place + _FIELDS_AT : start], block[start : start + header.length]
    return header if checksum(fields, payload) == header.checksum else None


class Found(NamedTuple):
    """A whole record, and where it is."""

    place: int
    header: Header


def walk(block: memoryview, state: State) -> Iterator[Found]:
    """The records from tail to head, in order, up to the first that is not whole."""
    place, first = state.tail, state.number - state.headers
    for number in range(first, state.number):
        if place == state.end:
            place = 0
        header = whole_at(block, place)
        if header is None or header.number != number & NUMBER_MASK:
            return
        yield Found(place, header)
        place += need(header.length)


def survivors(block: memoryview, state: State | None) -> Iterator[Found]:
    """The whole records that lie anywhere in a block, in the order in which they were pushed.

    Where the state is known, those that it holds; else also what an earlier round left behind.
    """
    first, headers = (state.number - state.headers, state.headers) if state else (0, NUMBER_MASK + 1)
    behinds, places = array("I"), array("Q")  # 12 bytes each: how far behind the first one, and where
    place = 0
    while place < len(block):
        header = whole_at(block, place)
        if header is None:
            place = _next_mark(block, place + ALIGN)
            continue
        behind = (header.number - first) & NUMBER_MASK
        if behind < headers:
            behinds.append(behind)
            places.append(place)
        place += need(header.length)
    _, firsts = np.unique(np.asarray(behinds), return_index=True)  # in order, each number once
    for index in firsts:
        yield Found(places[index], header_at(block, places[index]))


def _next_mark(block: memoryview, place: int) -> int:
    """The next offset where a header may be; the block's end without any."""
    mark = int.from_bytes(MARK, "little")
    last = len(block) - len(block) % ALIGN
    while place < last:
        words = np.frombuffer(block[place : min(place + _SEARCHED_BYTES, last)], dtype="<u4")
        (hits,) = np.nonzero(words[::2] == mark)
        if len(hits):
            return place + int(hits[0]) * ALIGN
        place += _SEARCHED_BYTES
    return len(block)


def slices(whole: memoryview, claimed: Sequence[Record]) -> list[memoryview]:
    """Each payload of a batch in the buffer where they lie one behind the other."""
    slices, start = [], 0
    for record in claimed:
        slices.append(whole[start : start + record.size])
        start += record.size
    return slices
