"""The ring: a bounded queue of payloads in one contiguous block of bytes.

    ┌──────────┬───────────────┬───────────────┬─ ─ ─ ─ ─ ─ ─ ─┐
    │   free   │ header payload│ header payload│      free     │
    └──────────┴───────────────┴───────────────┴─ ─ ─ ─ ─ ─ ─ ─┘
               tail (claim, settle)            head (push)

The block is anonymous memory, or a mapped file that outlives the process (`ring_file`); the code
is the same. Push, claim and settle move offsets and copy bytes; nothing grows.

The reader claims a batch, which stays where it is, and settles it when the sink has delivered.
A claimed record that must make room meanwhile is in doubt: it is taken if the delivery succeeds.

A block of equal small records is pushed as one with a count, so that its cost does not depend on
how many they are; it is taken, or dropped, as a whole, and every figure counts the records in it.
Always: pushed + recovered = taken + held + dropped.
"""

from __future__ import annotations

import threading
import time
from zlib import crc32

from agent.delivery import Drop, WhenFull
from agent.ring_file import RingFile
from agent.ring_memory import anonymous, populate
from agent.ring_records import (
    ALIGN,
    CHECKSUM,
    FIELDS,
    HEADER_BYTES,
    MARK,
    NUMBER_MASK,
    Header,
    Payload,
    Record,
    State,
    header_at,
    need,
    sizes_at,
)

MIN_BYTES = 256
NO_INSTANCE = bytes(16)
_UNCHECKED = MARK + bytes(CHECKSUM.size)


class Ring:
    """A bounded queue of payloads, safe for any number of writers and one reader on threads of their own.

    Args:
        size: bytes of the block, headers included; rounded down to a multiple of eight.
        when_full: whether the oldest records make room or the new one is dropped.
        file: the block's file, whose state holds whole records only; anonymous memory without.
        instance: who pushes, 16 bytes; kept beside each record.

    Attributes:
        pushed, taken: records since the start; held ones are `len(ring)`.
        recovered: records that the file held, those included that were damaged.
        drops: records given up, by reason: `drops[Drop.FULL]`.
        held_bytes: of the payloads held.
    """

    def __init__(
        self,
        size: int,
        when_full: WhenFull = WhenFull.DROP_OLDEST,
        file: RingFile | None = None,
        instance: bytes = NO_INSTANCE,
    ) -> None:
        assert size >= MIN_BYTES, f"a ring of {size} bytes holds nothing"
        self.size = size - size % ALIGN
        self.when_full = when_full
        self._block = memoryview(anonymous(self.size)) if file is None else file.block
        self._file = file
        self._is_flushed = file is not None and file.is_flushed_each_push
        self._instance = instance
        self._clocks_apart_ns = time.time_ns() - time.monotonic_ns()  # for stamps of other processes
        self._lock = threading.Lock()
        self._filled = threading.Condition(self._lock)
        self._wanted = 0  # headers that the reader waits for; 0 while it doesn't
        self._wanted_bytes = 0
        self._closed = False
        self._claimed: list[Record] = []
        self._in_doubt = 0  # of the claimed ones, from their start, those that have made room
        self._takes_next = True  # by WhenFull.SAMPLE
        state = State(end=self.size) if file is None else file.state
        self._head, self._tail, self._end, self._used, self._headers, self._records, self._number = state
        self.held_bytes = 0
        self.pushed = 0
        self.taken = 0
        self.recovered = state.records
        self.drops = [0] * len(Drop)
        place = self._tail
        for _ in range(self._headers):
            place = 0 if place == self._end else place
            length, _ = sizes_at(self._block, place)
            self.held_bytes += length
            place += need(length)

    def __len__(self) -> int:
        with self._lock:
            return self.pushed + self.recovered - self.taken - self.dropped

    @property
    def account(self) -> tuple[int, int, int]:
        """Records taken, dropped and held at one moment: together all that were pushed or recovered."""
        with self._lock:
            dropped = self.dropped
            return self.taken, dropped, self.pushed + self.recovered - self.taken - dropped

    @property
    def dropped(self) -> int:
        """Records given up, for all reasons."""
        return sum(self.drops)

    @property
    def used_ratio(self) -> float:
        """The part of the block that records occupy, 0 to 1."""
        return self._used / self.size

    @property
    def outlives_process(self) -> bool:
        """Whether what is held is there for the next process."""
        return self._file is not None

    @property
    def oldest_stamp_ns(self) -> int | None:
        """The stamp of the oldest record held, claimed ones included; None when there is none."""
        with self._lock:
            if self._claimed:
                return self._claimed[0].stamp_ns
            return self._own_stamp_ns(header_at(self._block, self._tail)) if self._headers else None

    def push(self, payload: Payload, sequence: int, stamp_ns: int, records: int = 1, time_unix_ns: int = 0) -> bool:
        """Copies a payload into the ring.

        Args:
            payload: the bytes of one record, or of some one behind the other.
            sequence: of the record, or of the first of them.
            stamp_ns: the monotonic reading of its frame.
            records: how many records the payload is.
            time_unix_ns: the wall clock's reading of its frame, for whoever recovers it.

        Returns:
            False if it was dropped: it doesn't fit, or the ring is closed.
        """
        room = need(len(payload))
        with self._lock:
            self.pushed += records
            if self._closed or room > self.size:
                self.drops[Drop.SHUTDOWN if self._closed else Drop.FULL] += records
                return False
            if not self._fits(room) and not self._make_room(room, records):
                return False
            self._append(payload, room, records, sequence, stamp_ns, time_unix_ns, self._instance)
            if self._is_flushed and self._file is not None:
                self._file.flush()
            if self._wanted and (self._headers >= self._wanted or self.held_bytes >= self._wanted_bytes):
                self._filled.notify()
        return True

    def populate(self) -> None:
        """Takes all of the block's memory now, and not as it fills up."""
        populate(self._block, is_file=self._file is not None)

    def has_room(self, length: int) -> bool:
        """Whether a payload of this length, which is pushed next, would fit without dropping any."""
        with self._lock:
            return not self._closed and self._fits(need(length))

    def recover(self, header: Header, payload: Payload) -> None:
        """Pushes a record that another ring's file held, as it was."""
        with self._lock:
            self.recovered += header.records
            room = need(len(payload))
            if room > self.size:
                self.drops[Drop.FULL] += header.records
            elif self._fits(room) or self._make_room(room, header.records):
                _, _, records, _, sequence, stamp_ns, time_unix_ns, instance = header
                self._append(payload, room, records, sequence, stamp_ns, time_unix_ns, instance)

    def recover_damaged(self, records: int) -> None:
        """Counts records that the file held and that are not whole."""
        with self._lock:
            self.recovered += records
            self.drops[Drop.DAMAGED] += records

    def claim(
        self,
        into: bytearray,
        payloads: int = 1,
        payload_bytes: int = 1 << 62,
        wait: bool = False,
        linger_seconds: float = 0.0,
    ) -> list[Record]:
        """Copies the oldest payloads to the start of `into`, one behind the other; they stay held until settled.

        `into` is made longer where it is too short, and never shorter.

        Args:
            payloads: the most that are claimed.
            payload_bytes: the most bytes that they have in all; a single larger one is claimed alone.
            wait: whether to wait for the first, until the ring is closed and empty.
            linger_seconds: how long to wait for others, once there is one, until there are as many as may be claimed.

        Returns:
            What was claimed; empty if there is nothing.
        """
        with self._lock:
            assert not self._claimed, "claimed again before all were settled"
            if wait:
                self._wait(payloads, payload_bytes, linger_seconds)
            claimed: list[Record] = []
            place = self._tail
            size = 0
            for _ in range(min(payloads, self._headers)):
                place = 0 if place == self._end else place
                header = header_at(self._block, place)
                length = header.length
                if claimed and size + length > payload_bytes:
                    break
                if len(into) < size + length:
                    into.extend(bytes(size + length - len(into)))
                start = place + HEADER_BYTES
                into[size : size + length] = self._block[start : start + length]
                own = header.instance == self._instance
                claimed.append(Record(length, header.records, header.sequence, self._own_stamp_ns(header), own))
                size += length
                place += need(length)
            self._claimed = claimed
            return claimed.copy()

    def settle(self, payloads: int, dropped: Drop | None = None) -> None:
        """Removes the oldest claimed payloads: they are delivered, or given up for a reason.

        A reader that was given up itself finds nothing claimed any more, and settles nothing.
        """
        with self._lock:
            self._settle(payloads, dropped)
            self._publish()

    def release(self) -> None:
        """Claims nothing any more: what was not settled is claimed again next time, or was dropped meanwhile."""
        with self._lock:
            for record in self._claimed[: self._in_doubt]:
                self.held_bytes -= record.size
                self.drops[Drop.FULL] += record.records
            self._claimed.clear()
            self._in_doubt = 0

    def close(self) -> None:
        """Wakes the reader; what is held can still be claimed, nothing more can be pushed."""
        with self._lock:
            self._closed = True
            self._filled.notify_all()

    def drop_held(self, reason: Drop = Drop.SHUTDOWN) -> None:
        """Gives up everything that is held, the claimed ones too."""
        with self._lock:
            self._settle(len(self._claimed), reason)
            while self._headers:
                self._drop_oldest(reason)
            self._publish()

    def unmap(self) -> None:
        """Gives a file back; the ring can't be used any more."""
        if self._file is not None:
            with self._lock:
                self._closed = True
                self._file.close()
                self._file = None
                self._headers = 0

    def _own_stamp_ns(self, header: Header) -> int:
        """The stamp on this process's monotonic clock; that of another one began elsewhere."""
        if header.instance == self._instance:
            return header.stamp_ns
        return header.time_unix_ns - self._clocks_apart_ns

    def _wait(self, payloads: int, payload_bytes: int, linger_seconds: float) -> None:
        self._wanted = 1
        while not self._headers and not self._closed:
            self._filled.wait()
        if linger_seconds:
            self._wanted, self._wanted_bytes = payloads, payload_bytes
            deadline = time.monotonic() + linger_seconds
            while self._headers < payloads and self.held_bytes < payload_bytes and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0 or not self._filled.wait(left):
                    break
        self._wanted = 0

    def _settle(self, payloads: int, dropped: Drop | None) -> None:
        for record in self._claimed[:payloads]:
            if self._in_doubt:
                self._in_doubt -= 1
            else:
                self._remove(record.size, record.records)
            self.held_bytes -= record.size
            if dropped is None:
                self.taken += record.records
            else:
                self.drops[dropped] += record.records
        del self._claimed[:payloads]

    def _append(
        self, payload: Payload, room: int, records: int, sequence: int, stamp_ns: int, unix_ns: int, instance: bytes
    ) -> None:
        """Writes a record at the head, where there is room; it is there once its state is published."""
        head, length, block, file = self._head, len(payload), self._block, self._file
        fields = FIELDS.pack(length, records, self._number, sequence, stamp_ns, unix_ns, instance)
        start = head + HEADER_BYTES
        if file is None:
            block[head:start] = _UNCHECKED + fields
        else:
            block[head:start] = MARK + CHECKSUM.pack(crc32(payload, crc32(fields))) + fields
        block[start : start + length] = payload
        self._head = head + room
        self._used += room
        self._headers += 1
        self._records += records
        self._number = (self._number + 1) & NUMBER_MASK
        self.held_bytes += length
        if file is not None:
            file.publish(self._head, self._tail, self._end, self._used, self._headers, self._records, self._number)

    def _publish(self) -> None:
        """Makes the present state the one that the next process finds, where there will be one."""
        if self._file is not None:
            self._file.publish(
                self._head, self._tail, self._end, self._used, self._headers, self._records, self._number
            )

    def _fits(self, room: int) -> bool:
        """Whether `room` bytes are free behind the newest record; the head is where they are then."""
        head, tail = self._head, self._tail
        if head < tail or self._used == self.size:
            return tail - head >= room
        if self.size - head >= room:  # free: behind head, and before tail
            return True
        if tail < room:
            return False
        self._used += self.size - head
        self._end = head
        self._head = 0
        return True

    def _make_room(self, room: int, records: int) -> bool:
        """Drops the oldest records until `room` bytes fit at the head, or the new one, as the policy says."""
        if self.when_full is WhenFull.DROP_NEWEST:
            self.drops[Drop.FULL] += records
            return False
        if self.when_full is WhenFull.SAMPLE:
            self._takes_next = not self._takes_next
            if not self._takes_next:
                self.drops[Drop.SAMPLED] += records
                return False
        self._drop_oldest(Drop.FULL)
        while not self._fits(room):
            self._drop_oldest(Drop.FULL)
        if self._file is not None:
            self._publish()  # before the records that are gone are written over
        return True

    def _drop_oldest(self, reason: Drop) -> None:
        length, records = sizes_at(self._block, self._tail)
        self._remove(length, records)
        if self._in_doubt < len(self._claimed):
            self._in_doubt += 1
        else:
            self.held_bytes -= length
            self.drops[reason] += records

    def _remove(self, length: int, records: int) -> None:
        """Moves the tail past a record; at the end it goes on at the start, and an empty ring starts anew."""
        room = need(length)
        self._tail += room
        self._used -= room
        self._headers -= 1
        self._records -= records
        if not self._headers:
            self._head = self._tail = self._used = 0
            self._end = self.size
        elif self._tail == self._end:
            self._used -= self.size - self._end
            self._tail = 0
            self._end = self.size
