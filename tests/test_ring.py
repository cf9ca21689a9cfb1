"""The ring in memory against the model, at its edges, in its memory, and between threads."""

from __future__ import annotations

import gc
import sys
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from agent.delivery import Drop, WhenFull
from agent.ring import MIN_BYTES, Ring
from agent.ring_records import HEADER, Record
from agent.ring_recovery import open_ring
from tests.ring_model import HEADER_BYTES, INSTANCE, RingMachine, drained, need

JOIN_SECONDS = 60
EVICTING = [WhenFull.DROP_OLDEST, WhenFull.DROP_PRIORITY]


def test_the_header_has_the_size_that_the_model_counts_with() -> None:
    assert HEADER.size == HEADER_BYTES


class MemoryRingMachine(RingMachine):
    sizes = st.one_of(st.integers(MIN_BYTES, 520), st.integers(MIN_BYTES, 5000))

    def make_ring(self, size: int, when_full: WhenFull) -> Ring:
        return Ring(size, when_full, instance=INSTANCE)


TestMemoryRingMachine = MemoryRingMachine.TestCase
TestMemoryRingMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def push(ring: Ring, *payloads: bytes) -> list[bool]:
    """Pushes payloads; their sequences go on from what was pushed before."""
    return [ring.push(payload, ring.pushed + 1, 1000 + ring.pushed) for payload in payloads]


def take_all(ring: Ring) -> list[bytes]:
    return [payload for _, payload in drained(ring)]


def take(ring: Ring, buffer: bytearray | None = None) -> Record:
    """The oldest record, delivered."""
    (record,) = ring.claim(bytearray() if buffer is None else buffer)
    ring.settle(1)
    return record


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
    for _ in range(3):
        take(ring)
    assert all(push(ring, *payloads[8:]))
    assert ring.used_ratio == 1.0
    assert take_all(ring) == payloads[3:]
    assert ring.dropped == 0


@pytest.mark.parametrize("when_full", WhenFull)
def test_one_record_fills_it_whole(when_full: WhenFull) -> None:
    ring = Ring(256, when_full)
    payload = bytes(range(256 - HEADER_BYTES))
    assert push(ring, payload) == [True]
    assert ring.used_ratio == 1.0
    assert take_all(ring) == [payload]


@pytest.mark.parametrize("when_full", WhenFull)
def test_a_size_is_rounded_down_to_eight(when_full: WhenFull) -> None:
    ring = Ring(263, when_full)
    assert ring.size == 256
    assert push(ring, bytes(257 - HEADER_BYTES)) == [False]
    assert push(ring, bytes(256 - HEADER_BYTES)) == [True]


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
                record = take(ring, buffer)
                assert buffer[: record.size] == expected.popleft()
    assert take_all(ring) == list(expected)
    assert (ring.taken, ring.dropped) == (5000, 0)


@pytest.mark.parametrize("when_full", EVICTING)
@pytest.mark.parametrize(("length", "dropped"), [(0, 1), (4, 1), (5, 2), (68, 2), (69, 3), (452, 8)])
def test_drop_oldest_drops_just_as_many_as_needed(length: int, dropped: int, when_full: WhenFull) -> None:
    ring = Ring(512, when_full)
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
    assert ring.drops[Drop.FULL] == 3
    assert take_all(ring) == payloads
    assert push(ring, b"now there is room") == [True]


def test_sample_takes_every_second_once_it_is_full() -> None:
    ring = Ring(512, WhenFull.SAMPLE)
    payloads = eighths(512, 14)
    assert push(ring, *payloads) == [True] * 8 + [False, True] * 3
    assert (ring.drops[Drop.SAMPLED], ring.drops[Drop.FULL]) == (3, 3)
    assert take_all(ring) == payloads[3:8] + payloads[9::2]


@pytest.mark.parametrize("when_full", WhenFull)
def test_too_large_is_dropped_and_costs_no_other(when_full: WhenFull) -> None:
    ring = Ring(512, when_full)
    push(ring, b"kept")
    assert push(ring, bytes(513 - HEADER_BYTES), bytes(5000)) == [False, False]
    assert ring.dropped == 2
    assert take_all(ring) == [b"kept"]


def test_a_batch_is_one_record_and_counts_as_many() -> None:
    ring = Ring(1024)
    row = bytes(range(88))
    buffer = bytearray()
    assert ring.push(row * 6, 1, 5, records=6)
    assert ring.push(b"single", 7, 6)
    assert (ring.pushed, len(ring)) == (7, 7)
    assert take(ring, buffer) == Record(528, 6, 1, 5, True)
    assert buffer[:528] == row * 6
    assert (ring.taken, len(ring)) == (6, 1)
    assert ring.push(row * 6, 8, 7, records=6)  # fits just before the single one
    assert (ring.dropped, len(ring)) == (0, 7)
    assert ring.push(row * 6, 14, 8, records=6)
    assert (ring.pushed, ring.taken, ring.dropped, len(ring)) == (19, 6, 7, 6)
    assert not ring.push(row * 12, 20, 9, records=12)
    assert (ring.dropped, len(ring)) == (19, 6)
    ring.drop_held()
    assert ring.drops == [19, 0, 0, 0, 0, 6]


@pytest.mark.parametrize("payload", [b"abcdefgh", bytearray(b"abcdefgh"), memoryview(b"xabcdefgh")[1:]])
def test_takes_any_bytes(payload: bytes | bytearray | memoryview) -> None:
    ring = Ring(256)
    assert ring.push(payload, 1, 1)
    assert take_all(ring) == [b"abcdefgh"]


def test_full_64_bits_of_sequence_and_stamp() -> None:
    ring = Ring(256)
    ring.push(b"x", 2**64 - 1, 2**63)
    assert ring.oldest_stamp_ns == 2**63
    assert take(ring) == Record(1, 1, 2**64 - 1, 2**63, True)


def test_a_claim_makes_its_buffer_longer_never_shorter() -> None:
    ring = Ring(512)
    push(ring, b"a" * 100, b"b" * 3, b"c" * 50, b"d" * 60)
    buffer = bytearray(10)
    take(ring, buffer)
    assert buffer == b"a" * 100
    take(ring, buffer)
    assert buffer == b"bbb" + b"a" * 97
    ring.claim(buffer, 2)
    assert buffer == b"c" * 50 + b"d" * 60


def test_a_buffer_that_cannot_grow_loses_no_record() -> None:
    ring = Ring(512)
    push(ring, b"a" * 100)
    buffer = bytearray(10)
    with memoryview(buffer), pytest.raises(BufferError):
        ring.claim(buffer)
    assert ring.account == (0, 0, 1)
    assert take_all(ring) == [b"a" * 100]


@pytest.mark.parametrize(("payload_bytes", "claimed"), [(0, 1), (100, 1), (101, 1), (102, 2), (106, 2), (107, 3)])
def test_a_claim_is_bounded_by_bytes_and_a_larger_one_goes_alone(payload_bytes: int, claimed: int) -> None:
    ring = Ring(1024)
    push(ring, b"a" * 100, b"bb", b"c" * 5)
    assert [record.sequence for record in ring.claim(bytearray(), 9, payload_bytes)] == [1, 2, 3][:claimed]


def test_what_is_claimed_stays_until_it_is_settled() -> None:
    ring = Ring(512)
    push(ring, b"one", b"two", b"three")
    assert len(ring.claim(bytearray(), 2)) == 2
    with pytest.raises(AssertionError):
        ring.claim(bytearray())
    ring.settle(1)
    assert ring.account == (1, 0, 2)
    ring.release()
    assert ring.account == (1, 0, 2)
    assert take_all(ring) == [b"two", b"three"]


@pytest.mark.parametrize("ending", ["delivered", "aged", "released", "given up"])
def test_a_claimed_record_that_must_make_room_is_in_doubt(ending: str) -> None:
    """It is neither taken nor dropped before its delivery has ended."""
    ring = Ring(512)
    payloads = eighths(512, 11)
    push(ring, *payloads[:8])
    claimed = ring.claim(bytearray(), 4)
    push(ring, *payloads[8:])
    assert ring.account == (0, 0, 11)
    assert ring.held_bytes == sum(map(len, payloads))
    assert ring.oldest_stamp_ns == claimed[0].stamp_ns
    if ending == "released":
        ring.release()
        assert (ring.account, ring.drops[Drop.FULL]) == ((0, 3, 8), 3)
    elif ending == "given up":
        ring.drop_held(Drop.REJECTED)
        assert (ring.account, ring.drops[Drop.REJECTED]) == ((0, 11, 0), 11)
    else:
        reason = None if ending == "delivered" else Drop.AGED
        ring.settle(2, reason)
        ring.settle(2, reason)
        assert (ring.account, ring.drops[Drop.AGED]) == ((0, 4, 7), 4) if reason else ((4, 0, 7), 0)
    assert take_all(ring) == {"released": payloads[3:], "given up": []}.get(ending, payloads[4:])


def test_who_has_nothing_claimed_settles_nothing() -> None:
    ring = Ring(512)
    push(ring, b"one")
    ring.claim(bytearray())
    ring.release()
    ring.settle(1)
    assert ring.account == (0, 0, 1)


@pytest.mark.parametrize("when_full", WhenFull)
def test_drop_held(when_full: WhenFull) -> None:
    ring = Ring(512, when_full)
    payloads = eighths(512, 10)
    push(ring, *payloads[:8])
    take(ring)
    take(ring)
    push(ring, *payloads[8:])
    ring.drop_held()
    assert (len(ring), ring.held_bytes, ring.used_ratio, ring.drops[Drop.SHUTDOWN]) == (0, 0, 0.0, 8)
    ring.drop_held()
    assert ring.dropped == 8
    push(ring, b"again")
    assert take_all(ring) == [b"again"]


def test_close_lets_held_ones_be_claimed_and_nothing_in() -> None:
    ring = Ring(512)
    push(ring, b"one", b"two")
    ring.close()
    assert push(ring, b"late") == [False]
    for left in (1, 1, 0):
        assert len(ring.claim(bytearray(), wait=True, linger_seconds=10 * JOIN_SECONDS)) == left
        ring.settle(1)
    assert (ring.taken, ring.drops[Drop.SHUTDOWN]) == (2, 1)


def test_what_another_process_pushed_has_its_stamp_on_this_clock() -> None:
    """As far as the wall clocks agree: its own monotonic reading means nothing here."""
    ring = Ring(512, instance=b"another instance")
    ring.push(b"x", 7, 1, time_unix_ns=time.time_ns())
    ring._instance = INSTANCE
    second_ns = 1_000_000_000
    stamp_ns = ring.oldest_stamp_ns
    assert stamp_ns is not None
    assert abs(stamp_ns - time.monotonic_ns()) < 60 * second_ns
    record = take(ring)
    assert (record.stamp_ns, record.is_own) == (stamp_ns, False)


def test_a_ring_in_memory_does_not_outlive_the_process() -> None:
    ring = Ring(512)
    push(ring, b"one")
    assert not ring.outlives_process
    ring.unmap()
    assert take_all(ring) == [b"one"]


class Reader:
    """A thread that claims and settles, waiting, until the ring is closed and empty."""

    def __init__(self, ring: Ring, payloads: int = 1, linger_seconds: float = 0.0) -> None:
        self.ring = ring
        self.batches: list[int] = []
        self.got: list[tuple[Record, bytes]] = []
        self._limits = payloads, linger_seconds
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        buffer = bytearray()
        payloads, linger_seconds = self._limits
        while claimed := self.ring.claim(buffer, payloads, wait=True, linger_seconds=linger_seconds):
            start = 0
            for record in claimed:
                self.got.append((record, bytes(buffer[start : start + record.size])))
                start += record.size
            self.batches.append(len(claimed))
            self.ring.settle(len(claimed))

    def join(self) -> None:
        self.thread.join(JOIN_SECONDS)
        assert not self.thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    """Waits for a condition; fails after a minute."""
    deadline = time.monotonic() + JOIN_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.0005)


def test_a_waiting_claim_wakes_on_push_and_on_close() -> None:
    ring = Ring(512)
    reader = Reader(ring)
    for number in range(50):
        until(lambda: ring._wanted)  # it is inside the wait, not before it
        push(ring, b"%d" % number)
        until(lambda: len(reader.got) > number)  # noqa: B023  # called before the loop goes on
    assert reader.thread.is_alive()
    until(lambda: ring._wanted)
    ring.close()
    reader.join()
    assert [payload for _, payload in reader.got] == [b"%d" % number for number in range(50)]


def test_a_lingering_claim_waits_for_as_many_as_it_may_have() -> None:
    ring = Ring(4096)
    reader = Reader(ring, payloads=3, linger_seconds=10 * JOIN_SECONDS)
    for number in range(7):
        until(lambda: ring._wanted == 3 if number % 3 else ring._wanted == 1)  # noqa: B023
        push(ring, b"%d" % number)
    until(lambda: ring._wanted == 3)
    assert reader.batches == [3, 3]
    ring.close()  # ends its lingering too
    reader.join()
    assert reader.batches == [3, 3, 1]


def test_a_lingering_claim_waits_for_bytes_too() -> None:
    ring = Ring(4096)
    claimed: list[int] = []
    buffer = bytearray()

    def claim() -> None:
        claimed.append(len(ring.claim(buffer, 9, 100, wait=True, linger_seconds=10 * JOIN_SECONDS)))

    thread = threading.Thread(target=claim, daemon=True)
    thread.start()
    push(ring, bytes(50))
    until(lambda: ring._wanted == 9)
    push(ring, bytes(49))
    assert not claimed
    push(ring, bytes(1))
    thread.join(JOIN_SECONDS)
    assert claimed == [3]


def test_a_lingering_claim_ends_with_what_there_is() -> None:
    ring = Ring(512)
    push(ring, b"one")
    assert len(ring.claim(bytearray(), 9, wait=True, linger_seconds=0.01)) == 1


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
    if when_full in EVICTING:
        assert sequences[-1] == count


@pytest.mark.parametrize("when_full", WhenFull)
def test_several_writers_and_a_reader_of_batches(when_full: WhenFull) -> None:
    check_several_writers(Ring(8192, when_full))


def check_several_writers(ring: Ring) -> None:
    """Each writer's records come in its order, each is whole, and all are accounted for."""
    writers, count = 4, 10_000
    reader = Reader(ring, payloads=7)

    def write(writer: int) -> None:
        for number in range(count):
            ring.push(b"%d %d" % (writer, number), number, number)

    threads = [threading.Thread(target=write, args=(writer,), daemon=True) for writer in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_SECONDS)
    ring.close()
    reader.join()
    got = [tuple(map(int, payload.split())) for _, payload in reader.got]
    for writer in range(writers):
        numbers = [number for who, number in got if who == writer]
        assert numbers == sorted(set(numbers))
    assert ring.pushed == writers * count
    assert ring.account == (len(got), writers * count - len(got), 0)


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
    assert max(seen) <= 256 // need(40) + 1  # the claimed one, in doubt


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
        take(ring, buffer)
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
@pytest.mark.parametrize("in_file", [False, True])
def test_memory_that_is_taken_at_the_start_does_not_grow_any_more(in_file: bool, tmp_path: Path) -> None:
    size = 64 << 20
    ring = open_ring(str(tmp_path / "ring"), size).ring if in_file else Ring(size)
    before = resident_bytes()
    ring.populate()
    populated = resident_bytes()
    assert populated - before > 0.95 * size
    for sequence in range(size // 70_000):
        ring.push(bytes(65_000), sequence, sequence)
    assert ring.used_ratio > 0.9
    assert resident_bytes() - populated < 0.02 * size
    ring.unmap()
