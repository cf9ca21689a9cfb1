"""The ring: a bounded queue of payloads in one contiguous block of bytes.

    ┌──────────┬───────────────┬───────────────┬─ ─ ─ ─ ─ ─ ─ ─┐
    │   free   │ header payload│ header payload│      free     │
    └──────────┴───────────────┴───────────────┴─ ─ ─ ─ ─ ─ ─ ─┘
               tail (take)                     head (push)

A record is a header (payload bytes, count, sequence, stamp) and its payload, padded to
eight bytes. It never wraps: where the rest of the block is too short, a mark sends the
reader back to the start. Push and take move offsets and copy bytes; nothing grows.

A block of equal small records is pushed as one record with a count, so that its cost
does not depend on how many they are; it is taken, or dropped, as a whole, and every
figure counts the records in it. Always: pushed = taken + held + dropped.
"""

from __future__ import annotations

import mmap
import struct
import threading
from enum import StrEnum
from typing import NamedTuple

_HEADER = struct.Struct("<IIQQ")  # payload bytes, records in it, first sequence, stamp in ns
_ALIGN = 8
_BACK_TO_START = 0xFFFF_FFFF
MIN_BYTES = 256

Payload = bytes | bytearray | memoryview


class WhenFull(StrEnum):
    """What a full ring does with a record that doesn't fit."""

    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"


class Record(NamedTuple):
    """What `take` took: its payload is in the caller's buffer."""

    size: int
    records: int
    sequence: int
    stamp_ns: int


class Ring:
    """A bounded queue of payloads, safe for one writer and one reader on threads of their own.

    Args:
        size: bytes of the block, headers included; rounded down to a multiple of eight.
        when_full: whether the oldest records make room or the new one is dropped.

    Attributes:
        pushed, taken, dropped: records since the start; held ones are `len(ring)`.
    """

    def __init__(self, size: int, when_full: WhenFull = WhenFull.DROP_OLDEST) -> None:
        assert size >= MIN_BYTES, f"a ring of {size} bytes holds nothing"
        self.size = size - size % _ALIGN
        self.when_full = when_full
        # Pages of an anonymous mapping take memory when they are first written. A ring that is
        # emptied starts anew at its beginning, so a healthy sink's ring stays small in memory.
        self._block = memoryview(mmap.mmap(-1, self.size))
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._waiting = False
        self._closed = False
        self._head = 0
        self._tail = 0
        self._records = 0  # headers in the block, marks not counted
        self._used = 0  # bytes from tail to head, the skipped end included
        self.held_bytes = 0
        self.pushed = 0
        self.taken = 0
        self.dropped = 0

    def __len__(self) -> int:
        with self._lock:
            return self.pushed - self.taken - self.dropped

    @property
    def used_ratio(self) -> float:
        """The part of the block that records occupy, 0 to 1."""
        return self._used / self.size

    @property
    def oldest_stamp_ns(self) -> int | None:
        """The stamp of the record that `take` would take, None when the ring is empty."""
        with self._lock:
            if not self._records:
                return None
            return int(_HEADER.unpack_from(self._block, self._tail)[3])

    def push(self, payload: Payload, sequence: int, stamp_ns: int, count: int = 1) -> bool:
        """Copies a payload into the ring.

        Args:
            payload: the bytes of one record, or of `count` records one behind the other.
            sequence: of the record, or of the first of them.
            stamp_ns: the monotonic reading of its frame.
            count: how many records the payload is.

        Returns:
            False if it was dropped: it doesn't fit, or the ring is closed.
        """
        length = len(payload)
        need = _HEADER.size + length
        need += -need % _ALIGN
        with self._lock:
            self.pushed += count
            if self._closed or not self._make_room(need):
                self.dropped += count
                return False
            head = self._head
            _HEADER.pack_into(self._block, head, length, count, sequence, stamp_ns)
            start = head + _HEADER.size
            self._block[start : start + length] = payload
            self._head = head + need
            self._used += need
            self._records += 1
            self.held_bytes += length
            if self._waiting:
                self._filled.notify()
        return True

    def take(self, into: bytearray, wait: bool = False) -> Record | None:
        """Copies the oldest record's payload to the start of `into`, and removes it.

        `into` is made longer where it is too short, and never shorter.

        Args:
            wait: whether to wait for a record, until the ring is closed and empty.

        Returns:
            None if there is no record.
        """
        with self._lock:
            while wait and not self._records and not self._closed:
                self._waiting = True
                self._filled.wait()
                self._waiting = False
            if not self._records:
                return None
            length, count, sequence, stamp_ns = _HEADER.unpack_from(self._block, self._tail)
            start = self._tail + _HEADER.size
            if len(into) < length:
                into.extend(bytes(length - len(into)))
            into[:length] = self._block[start : start + length]
            self._remove(length, count)
            self.taken += count
            return Record(length, count, sequence, stamp_ns)

    def close(self) -> None:
        """Wakes the reader; what is held can still be taken, nothing more can be pushed."""
        with self._lock:
            self._closed = True
            self._filled.notify_all()

    def drop_held(self) -> int:
        """Gives up everything that is held, counted as dropped; returns how many records."""
        with self._lock:
            dropped_before = self.dropped
            while self._records:
                self._drop_oldest()
            return self.dropped - dropped_before

    def _make_room(self, need: int) -> bool:
        """Moves the head, and drops what the policy allows, until `need` bytes fit at it."""
        if need > self.size:
            return False
        while True:
            if self._head >= self._tail and self._used < self.size:  # free: behind head, and before tail
                if self.size - self._head >= need:
                    return True
                if self._tail >= need:
                    self._skip_to_start()
                    return True
            elif self._tail - self._head >= need:
                return True
            if self.when_full is WhenFull.DROP_NEWEST:
                return False
            self._drop_oldest()

    def _skip_to_start(self) -> None:
        rest = self.size - self._head
        if rest >= 4:
            struct.pack_into("<I", self._block, self._head, _BACK_TO_START)
        self._used += rest
        self._head = 0

    def _drop_oldest(self) -> None:
        length, count, _, _ = _HEADER.unpack_from(self._block, self._tail)
        self._remove(length, count)
        self.dropped += count

    def _remove(self, length: int, count: int) -> None:
        need = _HEADER.size + length
        need += -need % _ALIGN
        self._tail += need
        self._used -= need
        self._records -= 1
        self.held_bytes -= length
        self._wrap_tail()

    def _wrap_tail(self) -> None:
        """Past the end or at a mark, the next record is at the start; an empty ring starts anew."""
        if not self._records:
            self._head = self._tail = self._used = 0
            return
        rest = self.size - self._tail
        if rest == 0 or struct.unpack_from("<I", self._block, self._tail)[0] == _BACK_TO_START:
            self._used -= rest
            self._tail = 0
