"""The ring against a plain deque, at its edges, in its memory, and between two threads."""

from __future__ import annotations

import gc
import sys
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.ring import MIN_BYTES, Record, Ring, WhenFull

HEADER_BYTES = 24
JOIN_SECONDS = 60


def need(length: int) -> int:
    """Bytes of the block that a payload of this length occupies."""
    return -(-(HEADER_BYTES + length) // 8) * 8


@dataclass
class Held:
    """A record of the model: what it is, and which bytes of the block it occupies."""

    payload: bytes
    count: int
    sequence: int
    stamp_ns: int
    start: int
    stop: int


class Model:
    """The ring's promises, told by a deque and a search for gaps."""

    def __init__(self, size: int, when_full: WhenFull) -> None:
        self.size = size
        self.when_full = when_full
        self.held: deque[Held] = deque()
        self.head = 0
        self.pushed = self.taken = self.dropped = 0
        self.closed = False

    def gap(self, skipped: int, wanted: int) -> int | None:
        """Where `wanted` bytes are free behind the newest record once the oldest `skipped` are gone."""
        held = list(self.held)[skipped:]
        if not held:
            return 0 if wanted <= self.size else None
        behind = [record.start for record in held if record.start >= self.head]
        if min(behind, default=self.size) - self.head >= wanted:
            return self.head
        if not behind and held[0].start >= wanted:
            return 0
        return None

    def push(self, payload: bytes, sequence: int, stamp_ns: int, count: int) -> bool:
        self.pushed += count
        wanted = need(len(payload))
        most_dropped = len(self.held) if self.when_full is WhenFull.DROP_OLDEST else 0
        if not self.closed and wanted <= self.size:
            for skipped in range(most_dropped + 1):
                start = self.gap(skipped, wanted)
                if start is not None:
                    for _ in range(skipped):
                        self.dropped += self.held.popleft().count
                    self.held.append(Held(payload, count, sequence, stamp_ns, start, start + wanted))
                    self.head = start + wanted
                    return True
        self.dropped += count
        return False

    def take(self) -> Held | None:
        if not self.held:
            return None
        self.taken += self.held[0].count
        return self.held.popleft()

    @property
    def used_bytes(self) -> int:
        if not self.held:
            return 0
        tail = self.held[0].start
        return self.head - tail if self.head > tail else self.size - tail + self.head


class RingMachine(RuleBasedStateMachine):
    @initialize(
        size=st.one_of(st.integers(MIN_BYTES, 520), st.integers(MIN_BYTES, 5000)),
        when_full=st.sampled_from(WhenFull),
    )
    def make(self, size: int, when_full: WhenFull) -> None:
        self.ring = Ring(size, when_full)
        self.model = Model(size - size % 8, when_full)
        self.buffer = bytearray()
        self.sequence = 0

    def _push(self, length: int, count: int) -> None:
        self.sequence += count
        payload = bytes((self.sequence + place) % 251 for place in range(length))
        arguments = (self.sequence, 10 * self.sequence, count)
        assert self.ring.push(payload, *arguments) == self.model.push(payload, *arguments)

    @rule(length=st.one_of(st.integers(0, 80), st.integers(0, 600)), count=st.sampled_from((1, 1, 1, 2, 7, 1000)))
    def push(self, length: int, count: int) -> None:
        self._push(length, count)

    @rule(below=st.integers(0, 9))
    def push_what_just_fills_an_empty_ring(self, below: int) -> None:
        self._push(self.model.size - HEADER_BYTES - below, 1)

    @rule(above=st.one_of(st.integers(1, 9), st.integers(1, 5000)))
    def push_what_never_fits(self, above: int) -> None:
        dropped = self.ring.dropped
        held = len(self.ring)
        self._push(self.model.size - HEADER_BYTES + above, 3)
        assert (self.ring.dropped, len(self.ring)) == (dropped + 3, held)

    @rule(below=st.integers(0, 9))
    def push_what_just_fills_the_gap(self, below: int) -> None:
        """The free bytes at the head: a record that ends where the block or the oldest record does."""
        behind = [record.start for record in self.model.held if record.start >= self.model.head]
        gap = min(behind, default=self.model.size) - self.model.head
        self._push(max(gap - HEADER_BYTES - below, 0), 1)

    @rule()
    def take(self) -> None:
        expected = self.model.take()
        record = self.ring.take(self.buffer)
        if expected is None:
            assert record is None
            return
        assert record == Record(len(expected.payload), expected.count, expected.sequence, expected.stamp_ns)
        assert self.buffer[: record.size] == expected.payload

    @precondition(lambda self: self.model.held)
    @rule()
    def take_waits_for_nothing_that_is_there(self) -> None:
        expected = self.model.take()
        record = self.ring.take(self.buffer, wait=True)
        assert expected is not None
        assert record is not None
        assert self.buffer[: record.size] == expected.payload

    @rule()
    def drop_held(self) -> None:
        held = sum(record.count for record in self.model.held)
        assert self.ring.drop_held() == held
        self.model.dropped += held
        self.model.held.clear()

    @precondition(lambda self: self.sequence > 50)
    @rule()
    def close(self) -> None:
        self.ring.close()
        self.model.closed = True

    @invariant()
    def agrees(self) -> None:
        ring, model = self.ring, self.model
        if not model.held:
            model.head = 0  # an empty ring starts anew
        assert (ring.pushed, ring.taken, ring.dropped) == (model.pushed, model.taken, model.dropped)
        assert len(ring) == sum(record.count for record in model.held)
        assert ring.pushed == ring.taken + len(ring) + ring.dropped
        assert ring.held_bytes == sum(len(record.payload) for record in model.held)
        assert ring.used_ratio == model.used_bytes / model.size
        assert 0 <= ring.used_ratio <= 1
        assert ring.oldest_stamp_ns == (model.held[0].stamp_ns if model.held else None)

    def teardown(self) -> None:
        """What is left comes out whole and in order."""
        if not hasattr(self, "ring"):
            return
        while self.model.held:
            self.take()
            self.agrees()
        assert self.ring.take(self.buffer) is None


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def push(ring: Ring, *payloads: bytes) -> list[bool]:
    """Pushes payloads; their sequences go on from what was pushed before."""
    return [ring.push(payload, ring.pushed + 1, 1000 + ring.pushed) for payload in payloads]


def take_all(ring: Ring) -> list[bytes]:
    buffer = bytearray()
    payloads = []
    while (record := ring.take(buffer)) is not None:
        payloads.append(bytes(buffer[: record.size]))
    return payloads


def eighths(size: int, count: int) -> list[bytes]:
    """Payloads of which eight fill a ring of `size` bytes to its last byte."""
    return [bytes([number]) * (size // 8 - HEADER_BYTES) for number in range(1, count + 1)]


@pytest.mark.parametrize("when_full", WhenFull)
def test_exactly_full(when_full: WhenFull) -> None:
    ring = Ring(512, when_full)
    payloads = eighths(512, 8)
    assert all(push(ring, *payloads))
    assert ring.used_ratio == 1.0
    assert take_all(ring) == payloads
    assert ring.used_ratio == 0.0
    assert (ring.pushed, ring.taken, ring.dropped, ring.held_bytes) == (8, 8, 0, 0)


@pytest.mark.parametrize("when_full", WhenFull)
def test_exactly_full_behind_a_wrap(when_full: WhenFull) -> None:
    """Head meets tail in the middle of the block."""
    ring = Ring(512, when_full)
    payloads = eighths(512, 11)
    push(ring, *payloads[:8])
    buffer = bytearray()
    for _ in range(3):
        ring.take(buffer)
    assert all(push(ring, *payloads[8:]))
    assert ring.used_ratio == 1.0
    assert take_all(ring) == payloads[3:]
    assert ring.dropped == 0


@pytest.mark.parametrize("when_full", WhenFull)
def test_one_record_fills_it_whole(when_full: WhenFull) -> None:
    ring = Ring(256, when_full)
    payload = bytes(range(232))
    assert push(ring, payload) == [True]
    assert ring.used_ratio == 1.0
    assert take_all(ring) == [payload]


@pytest.mark.parametrize("when_full", WhenFull)
def test_a_size_is_rounded_down_to_eight(when_full: WhenFull) -> None:
    ring = Ring(263, when_full)
    assert ring.size == 256
    assert push(ring, bytes(233)) == [False]
    assert push(ring, bytes(232)) == [True]


@pytest.mark.parametrize("when_full", WhenFull)
def test_a_wrap_loses_nothing(when_full: WhenFull) -> None:
    """Lengths that leave a rest at the end of the block each time, for many rounds."""
    ring = Ring(1000, when_full)
    buffer = bytearray()
    expected: deque[bytes] = deque()
    for number in range(5000):
        payload = number.to_bytes(4, "big") * (1 + number % 23)
        assert push(ring, payload) == [True]
        expected.append(payload)
        if len(expected) == 6:
            for _ in range(1 + number % 3):
                record = ring.take(buffer)
                assert record is not None
                assert buffer[: record.size] == expected.popleft()
    assert take_all(ring) == list(expected)
    assert (ring.taken, ring.dropped) == (5000, 0)


@pytest.mark.parametrize(("length", "dropped"), [(0, 1), (40, 1), (41, 2), (104, 2), (105, 3), (488, 8)])
def test_drop_oldest_drops_just_as_many_as_needed(length: int, dropped: int) -> None:
    ring = Ring(512)
    payloads = eighths(512, 8)
    push(ring, *payloads)
    newest = b"n" * length
    assert push(ring, newest) == [True]
    assert ring.dropped == dropped
    assert take_all(ring) == [*payloads[dropped:], newest]


def test_drop_newest_keeps_the_old() -> None:
    ring = Ring(512, WhenFull.DROP_NEWEST)
    payloads = eighths(512, 8)
    push(ring, *payloads)
    assert push(ring, b"", b"more", b"y" * 400) == [False] * 3
    assert ring.dropped == 3
    assert take_all(ring) == payloads
    assert push(ring, b"now there is room") == [True]


@pytest.mark.parametrize("when_full", WhenFull)
def test_too_large_is_dropped_and_costs_no_other(when_full: WhenFull) -> None:
    ring = Ring(512, when_full)
    push(ring, b"kept")
    assert push(ring, bytes(489), bytes(5000)) == [False, False]
    assert ring.dropped == 2
    assert take_all(ring) == [b"kept"]


def test_a_batch_is_one_record_and_counts_as_many() -> None:
    ring = Ring(1024)
    row = bytes(range(88))
    buffer = bytearray()
    assert ring.push(row * 10, 1, 5, count=10)
    assert ring.push(b"single", 11, 6)
    assert (ring.pushed, len(ring)) == (11, 11)
    assert ring.take(buffer) == Record(880, 10, 1, 5)
    assert buffer[:880] == row * 10
    assert (ring.taken, len(ring)) == (10, 1)
    assert ring.push(row * 10, 12, 7, count=10)  # fits just before the single one
    assert (ring.dropped, len(ring)) == (0, 11)
    assert ring.push(row * 10, 22, 8, count=10)
    assert (ring.pushed, ring.taken, ring.dropped, len(ring)) == (31, 10, 11, 10)
    assert not ring.push(row * 12, 32, 9, count=12)
    assert (ring.dropped, len(ring)) == (23, 10)
    assert ring.drop_held() == 10


@pytest.mark.parametrize("payload", [b"abcdefgh", bytearray(b"abcdefgh"), memoryview(b"xabcdefgh")[1:]])
def test_takes_any_bytes(payload: bytes | bytearray | memoryview) -> None:
    ring = Ring(256)
    assert ring.push(payload, 1, 1)
    assert take_all(ring) == [b"abcdefgh"]


def test_full_64_bits_of_sequence_and_stamp() -> None:
    ring = Ring(256)
    ring.push(b"x", 2**64 - 1, 2**63)
    assert ring.oldest_stamp_ns == 2**63
    assert ring.take(bytearray()) == Record(1, 1, 2**64 - 1, 2**63)


def test_take_makes_its_buffer_longer_never_shorter() -> None:
    ring = Ring(512)
    push(ring, b"a" * 100, b"b" * 3)
    buffer = bytearray(10)
    ring.take(buffer)
    assert buffer == b"a" * 100
    ring.take(buffer)
    assert buffer == b"bbb" + b"a" * 97


def test_a_buffer_that_cannot_grow_loses_no_record() -> None:
    ring = Ring(512)
    push(ring, b"a" * 100)
    buffer = bytearray(10)
    with memoryview(buffer), pytest.raises(BufferError):
        ring.take(buffer)
    assert (len(ring), ring.taken) == (1, 0)
    assert take_all(ring) == [b"a" * 100]


@pytest.mark.parametrize("when_full", WhenFull)
def test_drop_held(when_full: WhenFull) -> None:
    ring = Ring(512, when_full)
    payloads = eighths(512, 10)
    push(ring, *payloads[:8])
    ring.take(bytearray())
    ring.take(bytearray())
    push(ring, *payloads[8:])
    assert ring.drop_held() == 8
    assert (len(ring), ring.held_bytes, ring.used_ratio, ring.dropped) == (0, 0, 0.0, 8)
    assert ring.drop_held() == 0
    push(ring, b"again")
    assert take_all(ring) == [b"again"]


def test_close_lets_held_ones_be_taken_and_nothing_in() -> None:
    ring = Ring(512)
    push(ring, b"one", b"two")
    ring.close()
    assert push(ring, b"late") == [False]
    buffer = bytearray()
    assert [ring.take(buffer, wait=True) is not None for _ in range(3)] == [True, True, False]
    assert (ring.taken, ring.dropped) == (2, 1)


class Reader:
    """A thread that takes, waiting, until the ring is closed and empty."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.got: list[tuple[Record, bytes]] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        buffer = bytearray()
        while (record := self.ring.take(buffer, wait=True)) is not None:
            self.got.append((record, bytes(buffer[: record.size])))

    def join(self) -> None:
        self.thread.join(JOIN_SECONDS)
        assert not self.thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    """Waits for a condition; fails after a minute."""
    deadline = time.monotonic() + JOIN_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.0005)


def test_a_waiting_take_wakes_on_push_and_on_close() -> None:
    ring = Ring(512)
    reader = Reader(ring)
    for number in range(50):
        until(lambda: ring._waiting)  # it is inside the wait, not before it
        push(ring, b"%d" % number)
        until(lambda: len(reader.got) > number)  # noqa: B023  # called before the loop goes on
    assert reader.thread.is_alive()
    until(lambda: ring._waiting)
    ring.close()
    reader.join()
    assert [payload for _, payload in reader.got] == [b"%d" % number for number in range(50)]


@pytest.mark.parametrize("when_full", WhenFull)
@pytest.mark.parametrize("size", [4096, 1 << 20])
def test_two_threads_order_and_accounting(when_full: WhenFull, size: int) -> None:
    """100,000 records against a reader that is at times slower, at times faster."""
    count = 100_000
    ring = Ring(size, when_full)
    reader = Reader(ring)
    for sequence in range(1, count + 1):
        ring.push(b"%d:" % sequence + b"x" * (sequence % 61), sequence, sequence)
    ring.close()
    reader.join()
    sequences = [record.sequence for record, _ in reader.got]
    assert sequences == sorted(set(sequences))
    assert all(payload.startswith(b"%d:" % record.sequence) for record, payload in reader.got)
    assert all(record.size == len(b"%d:" % record.sequence) + record.sequence % 61 for record, _ in reader.got)
    assert (ring.pushed, ring.taken, len(ring)) == (count, len(sequences), 0)
    assert ring.dropped == count - len(sequences)
    if when_full is WhenFull.DROP_OLDEST:
        assert sequences[-1] == count


def test_two_threads_lose_nothing_when_the_writer_waits_for_room() -> None:
    count = 100_000
    ring = Ring(2048, WhenFull.DROP_NEWEST)
    reader = Reader(ring)
    refused = 0
    for sequence in range(1, count + 1):
        while not ring.push(b"%d" % sequence, sequence, sequence):
            refused += 1
            time.sleep(0)
    ring.close()
    reader.join()
    assert [record.sequence for record, _ in reader.got] == list(range(1, count + 1))
    assert (ring.taken, ring.dropped, ring.pushed) == (count, refused, count + refused)


def test_len_is_never_seen_negative() -> None:
    """By any thread, also while the writer drops and the reader takes."""
    ring = Ring(256)
    reader = Reader(ring)
    seen: list[int] = []
    errors: list[Exception] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            try:
                seen.append(len(ring))
            except ValueError as error:
                errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    watcher = threading.Thread(target=look, daemon=True)
    try:
        watcher.start()
        for sequence in range(30_000):
            ring.push(b"x" * 40, sequence, sequence)
        done.set()
        watcher.join(JOIN_SECONDS)
        ring.close()
        reader.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert seen
    assert max(seen) <= 256 // need(40)


class Queue(Protocol):
    """What `fill_and_measure` fills."""

    def push(self, payload: bytes, sequence: int, stamp_ns: int) -> bool: ...


class AppendingQueue:
    """The naive one: it keeps everything."""

    def __init__(self) -> None:
        self.payloads: deque[bytes] = deque()

    def push(self, payload: bytes, sequence: int, stamp_ns: int) -> bool:
        self.payloads.append(bytes(bytearray(payload)))
        return True


QUEUE_BYTES = 1 << 20


def fill_and_measure(queue: Queue) -> int:
    """The most memory that Python held while 50 times `QUEUE_BYTES` were pushed and nobody took."""
    payload = bytes(1000)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for sequence in range(50 * QUEUE_BYTES // len(payload)):
            queue.push(payload, sequence, sequence)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("when_full", WhenFull)
def test_memory_is_bounded(when_full: WhenFull) -> None:
    """The block itself is a mapping of fixed size, which tracemalloc doesn't see: it can't grow."""
    ring = Ring(QUEUE_BYTES, when_full)
    block = ring._block
    assert fill_and_measure(ring) < 10_000
    assert ring._block is block
    assert block.nbytes == QUEUE_BYTES
    assert ring.pushed == 50 * QUEUE_BYTES // 1000
    assert 0 < len(ring) <= QUEUE_BYTES // 1000


def test_the_measure_catches_a_queue_that_grows() -> None:
    assert fill_and_measure(AppendingQueue()) > 40 * QUEUE_BYTES


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
def test_a_drained_ring_stays_small_in_resident_memory() -> None:
    """A healthy sink's ring starts anew at its beginning, so most of its pages are never touched."""
    ring = Ring(256 << 20)
    buffer = bytearray(4096)
    payload = bytes(4096)
    before = resident_bytes()
    for sequence in range(100_000):  # 400 MB in all
        ring.push(payload, sequence, sequence)
        ring.take(buffer)
    assert resident_bytes() - before < 8 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("when_full", WhenFull)
def test_a_million_pushes_allocate_nothing_that_stays(when_full: WhenFull) -> None:
    ring = Ring(QUEUE_BYTES, when_full)
    payload = bytes(256)

    def million() -> None:
        for sequence in range(1, 1_000_001):
            ring.push(payload, sequence, sequence)

    for sequence in range(5000):
        ring.push(payload, sequence, sequence)
    gc.collect()
    runs_before = collector_runs()
    blocks_before = sys.getallocatedblocks()
    million()
    blocks = sys.getallocatedblocks() - blocks_before
    runs = collector_runs() - runs_before
    assert blocks < 10
    assert runs == 0
    assert ring.pushed == 1_005_000
    assert ring.pushed == len(ring) + ring.dropped


def collector_runs() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())
