"""What a ring promises, told by a plain deque, and the state machine that compares the two."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.delivery import Drop, WhenFull
from agent.ring import Ring
from agent.ring_records import Record

HEADER_BYTES = 60
INSTANCE = b"the ring's maker"


def need(length: int) -> int:
    """Bytes of the block that a payload of this length occupies."""
    return -(-(HEADER_BYTES + length) // 8) * 8


@dataclass(eq=False)
class Held:
    """A record of the model: what it is, and which bytes of the block it occupies."""

    payload: bytes
    sequence: int
    stamp_ns: int
    records: int
    time_unix_ns: int
    start: int = 0
    stop: int = 0

    def record(self) -> Record:
        """What a claim says of it."""
        return Record(len(self.payload), self.records, self.sequence, self.stamp_ns, True)


class Model:
    """The ring's promises, told by a deque and a search for gaps.

    Attributes:
        held: what lies in the block, claimed ones included.
        claimed: the reader's; those that are held no more are in doubt.
    """

    def __init__(self, size: int, when_full: WhenFull) -> None:
        self.size = size
        self.when_full = when_full
        self.held: deque[Held] = deque()
        self.claimed: list[Held] = []
        self.head = 0
        self.pushed = self.taken = self.recovered = 0
        self.drops = [0] * len(Drop)
        self.takes_next = True
        self.closed = False

    @property
    def in_doubt(self) -> list[Held]:
        return [record for record in self.claimed if record not in self.held]

    @property
    def all_held(self) -> list[Held]:
        return [*self.in_doubt, *self.held]

    @property
    def used_bytes(self) -> int:
        if not self.held:
            return 0
        tail = self.held[0].start
        return self.head - tail if self.head > tail else self.size - tail + self.head

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

    def push(self, record: Held) -> bool:
        wanted = need(len(record.payload))
        self.pushed += record.records
        if self.closed or wanted > self.size:
            self.drops[Drop.SHUTDOWN if self.closed else Drop.FULL] += record.records
            return False
        if self.gap(0, wanted) is None:
            if self.when_full is WhenFull.SAMPLE:
                self.takes_next = not self.takes_next
            if self.when_full is WhenFull.DROP_NEWEST or not self.takes_next:
                self.drops[Drop.FULL if self.takes_next else Drop.SAMPLED] += record.records
                return False
        while (start := self.gap(0, wanted)) is None:
            self._leave_block(Drop.FULL)
        record.start, record.stop = start, start + wanted
        self.held.append(record)
        self.head = record.stop
        return True

    def claim(self, payloads: int, payload_bytes: int) -> list[Held]:
        size = 0
        for record in list(self.held)[:payloads]:
            size += len(record.payload)
            if self.claimed and size > payload_bytes:
                break
            self.claimed.append(record)
        return self.claimed

    def settle(self, payloads: int, dropped: Drop | None) -> None:
        for record in self.claimed[:payloads]:
            if record in self.held:
                assert self.held.popleft() is record
            if dropped is None:
                self.taken += record.records
            else:
                self.drops[dropped] += record.records
        del self.claimed[:payloads]
        self._start_anew()

    def release(self) -> None:
        self.drops[Drop.FULL] += sum(record.records for record in self.in_doubt)
        self.claimed = []

    def drop_held(self, reason: Drop) -> None:
        self.drops[reason] += sum(record.records for record in self.all_held)
        self.claimed = []
        self.held.clear()
        self._start_anew()

    def reopen(self) -> None:
        """Another process has the file."""
        self.claimed = []
        self.pushed = self.taken = 0
        self.drops = [0] * len(Drop)
        self.recovered = sum(record.records for record in self.held)
        self.takes_next = True
        self.closed = False

    def _leave_block(self, reason: Drop) -> None:
        record = self.held.popleft()
        if record not in self.claimed:
            self.drops[reason] += record.records
        self._start_anew()

    def _start_anew(self) -> None:
        """An empty ring begins at its start again."""
        if not self.held:
            self.head = 0


def agree(ring: Ring, model: Model) -> None:
    """Every figure of a ring is the model's."""
    held = sum(record.records for record in model.all_held)
    assert (ring.pushed, ring.taken, ring.recovered) == (model.pushed, model.taken, model.recovered)
    assert ring.drops == model.drops
    assert ring.dropped == sum(model.drops)
    assert ring.account == (model.taken, ring.dropped, held)
    assert len(ring) == held
    assert ring.pushed + ring.recovered == ring.taken + len(ring) + ring.dropped
    assert ring.held_bytes == sum(len(record.payload) for record in model.all_held)
    assert ring.used_ratio == model.used_bytes / model.size
    assert 0 <= ring.used_ratio <= 1
    oldest = [*model.claimed, *model.held]
    assert ring.oldest_stamp_ns == (oldest[0].stamp_ns if oldest else None)


class RingMachine(RuleBasedStateMachine):
    """Does the same to a ring and to the model; a subclass says where the ring's block is."""

    sizes: st.SearchStrategy[int]
    most_records = 1000

    def make_ring(self, size: int, when_full: WhenFull) -> Ring:
        raise NotImplementedError

    def observe(self) -> None:
        """Something is about to be done to the ring: `self.model` is as before."""

    def compare(self) -> None:
        """It was done, to the model too."""
        agree(self.ring, self.model)

    @initialize(data=st.data(), when_full=st.sampled_from(WhenFull))
    def make(self, data: st.DataObject, when_full: WhenFull) -> None:
        size = data.draw(self.sizes)
        self.model = Model(size - size % 8, when_full)
        self.buffer = bytearray()
        self.sequence = 0
        self.ring = self.make_ring(size, when_full)
        self.compare()

    def _push(self, length: int, records: int = 1) -> None:
        self.sequence += records
        payload = bytes((self.sequence + place) % 251 for place in range(length))
        record = Held(payload, self.sequence, 10 * self.sequence, records, 20 * self.sequence)
        self.observe()
        had_room = self.ring.has_room(length)
        assert had_room == (not self.model.closed and self.model.gap(0, need(length)) is not None)
        pushed = self.ring.push(payload, self.sequence, record.stamp_ns, records, record.time_unix_ns)
        assert pushed == self.model.push(record)
        assert pushed or not had_room
        self.compare()

    @rule(length=st.one_of(st.integers(0, 80), st.integers(0, 600)), records=st.sampled_from((1, 1, 1, 2, 7, 1000)))
    def push(self, length: int, records: int) -> None:
        self._push(length, records)

    @rule(lengths=st.lists(st.integers(0, 40), max_size=9))
    def push_small_ones(self, lengths: list[int]) -> None:
        for length in lengths:
            self._push(length)

    @rule(below=st.integers(0, 9))
    def push_what_just_fills_an_empty_ring(self, below: int) -> None:
        self._push(self.model.size - HEADER_BYTES - below)

    @rule(above=st.one_of(st.integers(1, 9), st.integers(1, 5000)))
    def push_what_never_fits(self, above: int) -> None:
        held, dropped = len(self.ring), self.ring.dropped
        self._push(self.model.size - HEADER_BYTES + above, 3)
        assert (self.ring.dropped, len(self.ring)) == (dropped + 3, held)

    @rule(below=st.integers(0, 9))
    def push_what_just_fills_the_gap(self, below: int) -> None:
        """The free bytes at the head: a record that ends where the block or the oldest record does."""
        behind = [record.start for record in self.model.held if record.start >= self.model.head]
        gap = min(behind, default=self.model.size) - self.model.head
        self._push(max(gap - HEADER_BYTES - below, 0))

    @precondition(lambda self: not self.model.claimed)
    @rule(
        payloads=st.integers(1, 6),
        payload_bytes=st.one_of(st.just(1 << 62), st.integers(0, 300)),
        waits=st.booleans(),
    )
    def claim(self, payloads: int, payload_bytes: int, waits: bool) -> None:
        expected = self.model.claim(payloads, payload_bytes)
        can_wait = waits and bool(self.model.held or self.model.closed)
        self.observe()
        claimed = self.ring.claim(self.buffer, payloads, payload_bytes, wait=can_wait)
        assert claimed == [record.record() for record in expected]
        content = b"".join(record.payload for record in expected)
        assert self.buffer[: len(content)] == content
        self.compare()

    @rule(payloads=st.integers(0, 7), dropped=st.sampled_from((None, None, Drop.AGED, Drop.REJECTED)))
    def settle(self, payloads: int, dropped: Drop | None) -> None:
        self.observe()
        self.ring.settle(payloads, dropped)
        self.model.settle(payloads, dropped)
        self.compare()

    @rule()
    def release(self) -> None:
        self.observe()
        self.ring.release()
        self.model.release()
        self.compare()

    @rule(reason=st.sampled_from((Drop.SHUTDOWN, Drop.REJECTED)))
    def drop_held(self, reason: Drop) -> None:
        self.observe()
        self.ring.drop_held(reason)
        self.model.drop_held(reason)
        self.compare()

    @precondition(lambda self: self.sequence > 50)
    @rule()
    def close(self) -> None:
        self.ring.close()
        self.model.closed = True
        self.compare()

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "ring"):
            agree(self.ring, self.model)

    def teardown(self) -> None:
        """What is left comes out whole and in order."""
        if not hasattr(self, "ring"):
            return
        self.release()
        while self.model.held:
            self.claim(1, 0, False)
            self.settle(1, None)
        assert self.ring.claim(self.buffer) == []


def drained(ring: Ring, payloads: int = 1) -> Iterator[tuple[Record, bytes]]:
    """What a ring holds, each claimed and settled."""
    buffer = bytearray()
    while claimed := ring.claim(buffer, payloads):
        start = 0
        for record in claimed:
            yield record, bytes(buffer[start : start + record.size])
            start += record.size
        ring.settle(len(claimed))
