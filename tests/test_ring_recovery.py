"""Rings in files: killed between any two stores, damaged anywhere, full disks, other processes."""

from __future__ import annotations

import errno
import mmap
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from agent import ring_file, ring_recovery
from agent.delivery import Drop, WhenFull
from agent.errors import UsageError
from agent.ring import Ring
from agent.ring_file import PAGE_BYTES, Sync, locked
from agent.ring_records import HEADER, walk
from agent.ring_recovery import open_ring
from agent.spool import Spool
from tests.ring_model import INSTANCE, Held, RingMachine, drained
from tests.test_ring import check_several_writers

MEMORY_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else None
SLOTS_AT = (1024, 2048)
SLOT_BYTES = 68
HEAD_BYTES = 36
ASIDE = re.compile(r".*\.\d{8}T\d{6}Z(\.\d+)?$")
NEWEST_KEPT = "the state with its newest record was torn; that record is whole and is kept"


# Killed between any two stores ---------------------------------------------------------------


class RecordedMap(mmap.mmap):
    """A part of a ring's file that tells of each store, when half of it is done and when all of it is."""

    on_store: Callable[[], None]

    def __setitem__(self, place: Any, content: Any) -> None:
        start, half = place.start or 0, len(content) // 2
        super().__setitem__(slice(start, start + half), bytes(content[:half]))
        self.on_store()
        super().__setitem__(slice(start + half, start + len(content)), bytes(content[half:]))
        self.on_store()

    release = mmap.mmap.close


class RecordedSlot:
    """The place of a state in a recorded page."""

    def __init__(self, page: RecordedMap, place: int) -> None:
        self._page, self._place = page, place

    def __setitem__(self, all_of_it: slice, content: bytes) -> None:
        assert all_of_it == slice(None)
        self._page[self._place : self._place + SLOT_BYTES] = content

    def release(self) -> None:
        pass


class FileRingMachine(RingMachine):
    """The same as in memory; and the file, as it is at any moment, is one that the model allows."""

    sizes = st.integers(256, 600)

    def __init__(self) -> None:
        super().__init__()
        self.shots: list[bytes] = []
        self.place = tempfile.TemporaryDirectory(dir=MEMORY_DISK)
        self.path = f"{self.place.name}/ring"
        self.before: list[Held] = []

    def make_ring(self, size: int, when_full: WhenFull) -> Ring:
        opened = open_ring(self.path, size, when_full, instance=INSTANCE)
        assert not opened.notices
        self._record(opened.ring)
        return opened.ring

    def _record(self, ring: Ring) -> None:
        file = ring._file
        assert file is not None
        self.fd = file._fd
        for view in (file.page, file.block, *file._slots):
            view.release()
        page = RecordedMap(file._fd, PAGE_BYTES)
        block = RecordedMap(file._fd, ring.size, offset=PAGE_BYTES)
        page.on_store = block.on_store = self._shoot
        file.page, file.block, ring._block = page, block, block  # type: ignore[assignment]
        file._slots = [RecordedSlot(page, place) for place in SLOTS_AT]  # type: ignore[misc]

    def _shoot(self) -> None:
        self.shots.append(os.pread(self.fd, PAGE_BYTES + self.ring.size, 0))

    def observe(self) -> None:
        self.shots.clear()
        self.before = list(self.model.held)

    def compare(self) -> None:
        super().compare()
        after = list(self.model.held)
        is_push = bool(after) and after[-1] not in self.before
        most_gone = len(self.before) - len(after) + 1 if is_push else 0
        allowed = [after, *(self.before[gone:] for gone in range(most_gone + 1))]
        for shot in dict.fromkeys(self.shots):
            assert self._reopened(shot) in [[stored(record) for record in records] for records in allowed]
        self.shots.clear()

    def _reopened(self, shot: bytes) -> list[tuple[Any, ...]]:
        copy = f"{self.place.name}/copy"
        Path(copy).write_bytes(shot)
        opened = open_ring(copy, self.ring.size, self.ring.when_full, instance=INSTANCE)
        try:
            assert opened.notices in ([], [f"{copy}: {NEWEST_KEPT}"])
            return contents(opened.ring)
        finally:
            opened.ring.unmap()

    @rule()
    def reopen(self) -> None:
        """The process ends, and another one begins."""
        self.ring.unmap()
        self.model.reopen()
        self.ring = self.make_ring(self.model.size, self.model.when_full)
        self.before = list(self.model.held)
        self.compare()

    def teardown(self) -> None:
        try:
            super().teardown()
        finally:
            if hasattr(self, "ring"):
                self.ring.unmap()
            self.place.cleanup()


TestFileRingMachine = FileRingMachine.TestCase
TestFileRingMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def stored(record: Held) -> tuple[Any, ...]:
    return (record.payload, record.records, record.sequence, record.stamp_ns, record.time_unix_ns, INSTANCE)


def contents(ring: Ring) -> list[tuple[Any, ...]]:
    """What a ring's file holds, as it lies there."""
    file = ring._file
    assert file is not None
    return [
        (bytes(file.block[place + HEADER.size : place + HEADER.size + header.length]), header.records, *header[4:])
        for place, header in walk(file.block, file.state)
    ]


# Damaged anywhere ----------------------------------------------------------------------------

SIZE = 600
SECOND = 1_000_000_000


def payload_of(number: int) -> bytes:
    return b"%04d:" % number * (1 + number % 4)


@dataclass
class Sample:
    """A ring's file in which the records 4 to 8 lie around the block's end, and what had been pushed."""

    content: bytes
    held: list[int]
    places: dict[int, range]
    newest_slot: int


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    path = tmp_path_factory.mktemp("sample") / "ring"
    ring = open_ring(str(path), SIZE, instance=INSTANCE).ring
    for number in range(9):
        assert ring.push(payload_of(number), number, number * SECOND, 1, number * SECOND)
        if number == 5:
            ring.claim(bytearray(), 2)
            ring.settle(2)
    file = ring._file
    assert file is not None
    content = path.read_bytes()
    newest_slot = SLOTS_AT[file._generation & 1]
    ring.unmap()
    again = open_ring(str(path), SIZE, instance=INSTANCE).ring
    file = again._file
    assert file is not None
    places = {
        header.sequence: range(place, place + HEADER.size + header.length)
        for place, header in walk(file.block, file.state)
    }
    again.unmap()
    starts = [place.start for place in places.values()]
    assert starts != sorted(starts), "it lies around the end"
    return Sample(content, list(places), places, newest_slot)


def contents_now(ring: Ring) -> list[tuple[Any, ...]]:
    file = ring._file
    assert file is not None
    file.state = type(file.state)(
        ring._head, ring._tail, ring._end, ring._used, ring._headers, ring._records, ring._number
    )
    return contents(ring)


@dataclass
class Reopened:
    """What came of a file: the numbers that were served, and the figures."""

    numbers: list[int]
    notices: list[str]
    damaged: int
    recovered: int
    aside: list[Path]


def reopened(
    content: bytes, size: int = SIZE, place: Path | None = None, when_full: WhenFull = WhenFull.DROP_OLDEST
) -> Reopened:
    """Opens a file of this content; whatever it is, there is a ring that works, and only what was pushed comes out."""
    with tempfile.TemporaryDirectory(dir=place or MEMORY_DISK) as directory:
        path = Path(directory, "ring")
        path.write_bytes(content)
        opened = open_ring(str(path), size, when_full, instance=INSTANCE)
        ring = opened.ring
        recovered, damaged = ring.recovered, ring.drops[Drop.DAMAGED]
        aside = [other for other in Path(directory).iterdir() if other.name != "ring"]
        for other in aside:
            assert ASIDE.match(other.name)
            kept = other.read_bytes()
            assert kept[:64] + kept[72:] == content[:64] + content[72:]  # but for who has it open
            assert str(other) in opened.notices[0]
        assert ring.account == (0, ring.dropped, recovered - ring.dropped)
        assert path.stat().st_size == PAGE_BYTES + size
        held = len(ring)
        got = list(drained(ring, 2))
        assert len(got) == held
        numbers = [int(payload[:4]) for _, payload in got]
        for number, (record, payload) in zip(numbers, got, strict=True):
            assert payload == payload_of(number)
            assert (record.sequence, record.stamp_ns, record.is_own) == (number, number * SECOND, True)
        assert numbers == sorted(set(numbers))
        for round_ in range(30):
            ring.push(payload_of(round_), round_, 0)
        kept = contents_now(ring)
        ring.unmap()
        again = open_ring(str(path), size, when_full, instance=INSTANCE)
        assert again.notices == []
        assert contents(again.ring) == kept != []
        again.ring.unmap()
        return Reopened(numbers, opened.notices, damaged, recovered, aside)


def flipped(content: bytes, bit: int) -> bytes:
    copy = bytearray(content)
    copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


def test_the_sample_is_whole(sample: Sample) -> None:
    assert reopened(sample.content) == Reopened(sample.held, [], 0, len(sample.held), [])


def test_any_bit_of_the_head(sample: Sample) -> None:
    """The states are whole: nothing is lost, and nothing that was delivered comes again."""
    for bit in range(8 * HEAD_BYTES):
        result = reopened(flipped(sample.content, bit))
        assert (result.numbers, result.damaged, len(result.aside)) == (sample.held, 0, 1)


def test_any_bit_of_a_state(sample: Sample) -> None:
    """The other state is true too: it is that before the newest record, which is whole in its place."""
    for slot in SLOTS_AT:
        for bit in range(8 * slot, 8 * (slot + SLOT_BYTES)):
            result = reopened(flipped(sample.content, bit))
            assert (result.numbers, result.damaged, result.aside) == (sample.held, 0, [])
            assert result.recovered == len(sample.held)
            assert len(result.notices) == (slot == sample.newest_slot)
            assert all(notice.endswith(f"/ring: {NEWEST_KEPT}") for notice in result.notices)


def test_a_torn_state_whose_record_went_back_to_the_start(tmp_path: Path) -> None:
    """The newest record lies at the start, and the state before it is of a head near the end."""
    path = tmp_path / "ring"
    ring = open_ring(str(path), SIZE, instance=INSTANCE).ring
    for number in range(8):
        ring.push(payload_of(number), number, number * SECOND, 1, number * SECOND)
        if number == 5:
            ring.claim(bytearray(), 4)
            ring.settle(4)
    held = contents_now(ring)
    file = ring._file
    assert file is not None
    newest = HEADER.size + len(payload_of(7))
    assert newest <= ring._head < newest + 8, "it lies at the start"
    assert ring._end < SIZE
    slot = SLOTS_AT[file._generation & 1]
    figures = (ring._head, ring._tail, ring._end, ring._used, ring._headers, ring._records, ring._number)
    ring.unmap()
    damaged = flipped(path.read_bytes(), 8 * (slot + 3))
    path.write_bytes(damaged)
    for notices in ([f"{path}: {NEWEST_KEPT}"], []):
        opened = open_ring(str(path), SIZE, instance=INSTANCE)
        ring = opened.ring
        assert opened.notices == notices, "it is repaired once"
        assert (ring._head, ring._tail, ring._end, ring._used, ring._headers, ring._records, ring._number) == figures
        assert contents_now(ring) == held
        ring.unmap()
    assert reopened(flipped(damaged, 3)).numbers == [payload[2] for payload in held], "a salvage takes it too"


def test_a_torn_state_of_a_settling_takes_no_older_record(tmp_path: Path) -> None:
    """Whole records of an earlier round lie at the head and at the start; neither was pushed last."""
    path = tmp_path / "ring"
    ring = open_ring(str(path), SIZE, instance=INSTANCE).ring
    for number in range(12):
        ring.push(payload_of(0), number, number)
    ring.claim(bytearray(), 1)
    ring.settle(1)
    file = ring._file
    assert file is not None
    slot = SLOTS_AT[file._generation & 1]
    held = len(ring)
    ring.unmap()
    path.write_bytes(flipped(path.read_bytes(), 8 * slot))
    opened = open_ring(str(path), SIZE, instance=INSTANCE)
    assert (opened.notices, len(opened.ring)) == ([], held + 1)
    assert [record.sequence for record, _ in drained(opened.ring)] == list(range(11 - held, 12))
    opened.ring.unmap()


def test_any_bit_of_the_first_page_that_means_nothing(sample: Sample) -> None:
    meaning = {*range(HEAD_BYTES)}
    for slot in SLOTS_AT:
        meaning.update(range(slot, slot + SLOT_BYTES))
    for byte in [HEAD_BYTES, 71, 72, 1023, 1092, 2047, 2116, *range(HEAD_BYTES, PAGE_BYTES, 97), PAGE_BYTES - 1]:
        if byte not in meaning:
            assert reopened(flipped(sample.content, 8 * byte + byte % 8)).numbers == sample.held


def test_any_bit_of_the_block(sample: Sample) -> None:
    """Costs no record but the one that it lies in; the newest one is a torn tail."""
    owners = {byte: number for number, place in sample.places.items() for byte in place}
    for bit in range(8 * PAGE_BYTES, 8 * len(sample.content)):
        result = reopened(flipped(sample.content, bit))
        damaged = owners.get(bit // 8 - PAGE_BYTES)
        assert result.numbers == [number for number in sample.held if number != damaged]
        assert result.recovered == len(sample.held)
        assert result.damaged == (damaged is not None)
        assert len(result.aside) == (damaged is not None and damaged != sample.held[-1])


@pytest.mark.parametrize("torn", [1, 2, 5])
def test_a_torn_tail_is_dropped_and_counted(sample: Sample, torn: int) -> None:
    content = bytearray(sample.content)
    for number in sample.held[-torn:]:
        content[PAGE_BYTES + sample.places[number].stop - 3] ^= 0xFF
    result = reopened(bytes(content))
    assert (result.numbers, result.damaged, result.aside) == (sample.held[:-torn], torn, [])
    assert result.recovered == len(sample.held)
    assert re.search(rf"/ring: its newest {torn} records were torn and are dropped$", result.notices[0])


def test_a_torn_tail_is_repaired_once(sample: Sample, tmp_path: Path) -> None:
    """Also where nothing is pushed before the next start."""
    path = tmp_path / "ring"
    path.write_bytes(flipped(sample.content, 8 * (PAGE_BYTES + sample.places[sample.held[-1]].start + 30)))
    for damaged in (1, 0):
        opened = open_ring(str(path), SIZE)
        assert (len(opened.notices), opened.ring.drops[Drop.DAMAGED]) == (damaged, damaged)
        assert len(opened.ring) == len(sample.held) - 1
        opened.ring.unmap()


@pytest.mark.parametrize("damaged", [[4], [5], [4, 5], [5, 7], [6, 8], [4, 8]])
def test_damage_between_whole_records_sets_the_file_aside(sample: Sample, damaged: list[int]) -> None:
    content = bytearray(sample.content)
    damaged = [sample.held[number - 4] for number in damaged]
    for number in damaged:
        content[PAGE_BYTES + sample.places[number].start + 20] ^= 0xFF
    result = reopened(bytes(content))
    assert result.numbers == [number for number in sample.held if number not in damaged]
    assert (result.damaged, result.recovered, len(result.aside)) == (len(damaged), len(sample.held), 1)
    kept = len(sample.held) - len(damaged)
    assert re.search(rf"damaged between whole records; .*, {kept} records kept, {len(damaged)} lost$", *result.notices)


def test_both_states_lost(sample: Sample) -> None:
    """Nothing tells what was delivered: whatever is whole comes, and the loss counts as one."""
    content = bytearray(sample.content)
    for slot in SLOTS_AT:
        content[slot + 9] ^= 1
    result = reopened(bytes(content))
    assert result.numbers[-len(sample.held) :] == sample.held
    assert (result.damaged, len(result.aside)) == (1, 1)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage(sample: Sample, data: st.DataObject) -> None:
    content = bytearray(sample.content)
    interesting = st.one_of(st.integers(0, 100), st.integers(1020, 2120), st.integers(PAGE_BYTES - 9, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(interesting)
        length = data.draw(st.integers(1, 300))
        kind = data.draw(st.sampled_from(("zeros", "ones", "noise", "flip", "moved")))
        stop = min(start + length, len(content))
        match kind:
            case "zeros":
                content[start:stop] = bytes(stop - start)
            case "ones":
                content[start:stop] = b"\xff" * (stop - start)
            case "noise":
                content[start:stop] = random.Random(length).randbytes(stop - start)
            case "flip":
                content[start] ^= 1 << length % 8
            case "moved":
                content[start:stop] = sample.content[start - length : stop - length].ljust(stop - start, b"\0")[
                    : stop - start
                ]
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    reopened(bytes(content[:cut]) + data.draw(st.binary(max_size=80)))


def test_any_truncation(sample: Sample) -> None:
    for length in [0, 1, 35, 36, 1023, 1092, 2116, 4095, *range(PAGE_BYTES, len(sample.content), 3)]:
        result = reopened(sample.content[:length])
        expected = [number for number, place in sample.places.items() if PAGE_BYTES + place.stop <= length]
        assert result.numbers == expected
        assert len(result.aside) == (length > 0)
        if length >= PAGE_BYTES:
            assert result.recovered == len(sample.held)


@pytest.mark.parametrize("more", [b"\0", b"x", bytes(5), bytes(8), bytes(PAGE_BYTES), b"a line\n" * 99])
def test_an_extension(sample: Sample, more: bytes) -> None:
    result = reopened(sample.content + more)
    assert (result.numbers, result.damaged, len(result.aside)) == (sample.held, 0, 1)
    assert "has another size than 4696 bytes" in result.notices[0]


FOREIGN = {
    "text": b"not a ring at all\n" * 1000,
    "line": b"x\n",
    "zeros with a few bytes": bytes(3000) + b"abc" + bytes(1693),
    "a few bytes at the place of a state": bytes(1024) + b"abc" + bytes(PAGE_BYTES + SIZE - 1027),
    "picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + random.Random(1).randbytes(9000),
    "magic and no more": b"hostprobe ring\r\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_set_aside(name: str) -> None:
    result = reopened(FOREIGN[name])
    assert (result.numbers, result.recovered, len(result.aside)) == ([], 0, 1)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, PAGE_BYTES + SIZE, 99_999])
def test_empty_and_all_zero_files_are_fresh(size: int) -> None:
    assert reopened(bytes(size)) == Reopened([], [], 0, 0, [])


# Other versions ------------------------------------------------------------------------------


def of_version(content: bytes, version: int, **head: int) -> bytes:
    """A file's content as a ring of another version, with its head's checksum made right."""
    changed = bytearray(content)
    changed[16:20] = struct.pack("<I", version)
    changed[20:24] = struct.pack("<I", head.get("page_bytes", PAGE_BYTES))
    changed[32:36] = struct.pack("<I", zlib.crc32(changed[:32]))
    return bytes(changed)


@pytest.mark.parametrize(("version", "age"), [(0, "older"), (2, "newer"), (0xFFFF_FFFF, "newer")])
def test_another_version_is_set_aside_whole_and_its_records_are_kept(sample: Sample, version: int, age: str) -> None:
    content = of_version(sample.content, version)
    for size in (SIZE, 9000):
        result = reopened(content, size)
        assert (result.numbers, result.damaged, result.recovered) == (sample.held, 0, len(sample.held))
        (notice,), (aside,) = result.notices, result.aside
        assert f"is a ring of version {version}, {age} than 1, which is this hostprobe's; set aside as " in notice
        assert notice.endswith(f"{len(sample.held)} records kept")
        assert re.fullmatch(rf"ring\.version{version}\.\d{{8}}T\d{{6}}Z", aside.name)


def test_not_a_byte_of_another_version_is_touched(sample: Sample, tmp_path: Path) -> None:
    """Neither by who sets it aside, nor by who is refused, nor by who looks into it."""
    path = tmp_path / "ring"
    content = of_version(sample.content[:64] + bytes(range(8)) + sample.content[72:], 2)
    path.write_bytes(content)
    lock = locked(str(path))
    with pytest.raises(UsageError, match=r"/ring: another process has it open"):
        open_ring(str(path), SIZE)
    spool = Spool(str(path))
    assert [header.sequence for header, _ in spool.records()] == sample.held
    assert spool.report.process == os.getpid()
    spool.close()
    os.close(lock)
    assert path.read_bytes() == content
    open_ring(str(path), SIZE).ring.unmap()
    (aside,) = (other for other in tmp_path.iterdir() if other != path)
    assert aside.read_bytes() == content


def slots_of(content: bytes, change: Callable[[list[int]], list[int]]) -> bytes:
    """A file whose states have other numbers in the same places, with checksums that are right."""
    changed = bytearray(content)
    for slot in SLOTS_AT:
        numbers = change(list(struct.unpack_from("<8Q", changed, slot)))
        packed = struct.pack("<8Q", *numbers)
        changed[slot : slot + SLOT_BYTES] = packed + struct.pack("<I", zlib.crc32(packed))
    return bytes(changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda numbers: [numbers[0], *numbers[:0:-1]],
        lambda numbers: [numbers[0], 0, 0, SIZE, 0, 0, 0, 0],
        lambda numbers: [numbers[0], 0, 0, SIZE, 0, 0, 0, 1 << 20],
        lambda numbers: [*numbers[:-1], numbers[-1] - 1],
        lambda numbers: [*numbers[:5], numbers[5] - 2, numbers[6], numbers[7] - 2],
        lambda numbers: [*numbers[:5], 1, 1, numbers[7]],
        lambda numbers: [*numbers[:2], 1 << 40, *numbers[3:]],
        lambda numbers: [1 << 63] * 8,
    ],
)
def test_what_another_versions_states_say_must_be_borne_out_by_the_records(
    sample: Sample, change: Callable[[list[int]], list[int]], tmp_path: Path
) -> None:
    """Its numbers may mean something else: no record that can be read is given up for them."""
    content = slots_of(of_version(sample.content, 2), change)
    result = reopened(content)
    assert result.numbers[-len(sample.held) :] == sample.held
    assert (result.damaged, len(result.aside)) == (1, 1)
    (tmp_path / "ring").write_bytes(content)
    spool = Spool(str(tmp_path / "ring"))
    assert [header.sequence for header, _ in spool.records()] == result.numbers, "spool says what would be kept"
    spool.close()


@pytest.mark.parametrize("first_page", [64, 2048, 4096, 8192])
def test_records_of_another_version_are_found_where_its_block_lies(sample: Sample, first_page: int) -> None:
    head = of_version(sample.content, 2, page_bytes=first_page)[:64]
    result = reopened(head.ljust(first_page, b"\0") + sample.content[PAGE_BYTES:] + bytes(16))
    assert result.numbers[-len(sample.held) :] == sample.held
    assert len(result.aside) == 1


def test_what_was_delivered_of_another_version_does_not_come_again(tmp_path: Path) -> None:
    """Also where all was, and where nothing was ever pushed."""
    for pushed, taken in ((6, 4), (6, 6), (1, 1), (0, 0)):
        path = tmp_path / f"{pushed}-{taken}"
        ring = open_ring(str(path), SIZE, instance=INSTANCE).ring
        for number in range(pushed):
            ring.push(payload_of(number), number, number * SECOND, 1, number * SECOND)
        ring.claim(bytearray(), taken)
        ring.settle(taken)
        ring.unmap()
        result = reopened(of_version(path.read_bytes(), 7))
        assert (result.numbers, result.damaged) == (list(range(taken, pushed)), 0)


def test_any_truncation_of_another_version(sample: Sample) -> None:
    for length in [36, 1023, 2116, *range(PAGE_BYTES, len(sample.content), 7)]:
        result = reopened(of_version(sample.content, 2)[:length])
        whole = [number for number, place in sample.places.items() if PAGE_BYTES + place.stop <= length]
        assert set(whole) <= set(result.numbers)
        assert len(result.aside) == 1


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_behind_another_versions_head(sample: Sample, seed: int) -> None:
    noise = random.Random(seed)
    content = of_version(sample.content[:36], 2) + noise.randbytes(noise.randrange(9000))
    result = reopened(content)
    assert (result.numbers, len(result.aside)) == ([], 1)
    assert result.damaged == (len(content) >= PAGE_BYTES)


def test_up_and_down_and_up_again_loses_and_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change of the version sets a file aside, and none takes the place of another; all can be looked into."""
    path = tmp_path / "ring"
    asides: dict[str, bytes] = {}
    delivered: list[int] = []
    for round_, version in enumerate((1, 2, 1, 1, 3, 2, 1)):
        monkeypatch.setattr(ring_file, "VERSION", version)
        opened = open_ring(str(path), 9000, instance=INSTANCE)
        ring = opened.ring
        for number in range(10 * round_, 10 * round_ + 10):
            ring.push(payload_of(number), number, number * SECOND, 1, number * SECOND)
        delivered += [record.sequence for record in ring.claim(bytearray(), 7)]
        ring.settle(7)
        ring.unmap()
        for name, content in asides.items():
            assert (tmp_path / name).read_bytes() == content
        new = {other.name for other in tmp_path.iterdir()} - asides.keys() - {"ring"}
        assert len(new) == len(opened.notices) == (round_ > 0 and round_ != 3)
        asides.update({name: (tmp_path / name).read_bytes() for name in new})
    assert delivered == list(range(49))
    assert len(asides) == 5
    for name in asides:
        run = subprocess.run(
            [sys.executable, "-m", "agent", "spool", tmp_path / name, "--dump"],
            capture_output=True,
            timeout=60,
            cwd=Path(__file__).parents[1],
            check=False,
        )
        assert run.stdout.splitlines()
        is_of_this = ".version1." in name
        assert (run.returncode, b"is a ring of version" in run.stderr) == ((0, False) if is_of_this else (1, True))
    again = open_ring(str(path), 9000, instance=INSTANCE).ring
    assert [record.sequence for record, _ in drained(again)] == list(range(49, 70))
    again.unmap()


def test_setting_another_version_aside_where_there_is_no_space(sample: Sample, small_disk: Path) -> None:
    path = small_disk / "ring"
    content = of_version(sample.content, 2)
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"/ring\.new: No space left on device: expected a disk with"):
        open_ring(str(path), 70_000)
    assert (os.listdir(small_disk), path.read_bytes()) == (["ring"], content)


# Other sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("when_full", WhenFull)
def test_another_size_takes_what_is_there_along(sample: Sample, when_full: WhenFull) -> None:
    larger = reopened(sample.content, 9000, when_full=when_full)
    assert (larger.numbers, larger.damaged, len(larger.aside)) == (sample.held, 0, 1)
    smaller = reopened(sample.content, 256, when_full=when_full)
    assert smaller.recovered == len(sample.held)
    assert 0 < len(smaller.numbers) < len(sample.held)
    assert set(smaller.numbers) <= set(sample.held)
    if when_full is WhenFull.DROP_OLDEST:
        assert smaller.numbers == sample.held[-len(smaller.numbers) :]


def test_a_record_too_large_for_the_new_size_is_counted(tmp_path: Path) -> None:
    path = str(tmp_path / "ring")
    ring = open_ring(path, 1000).ring
    ring.push(bytes(500), 1, 1, records=3)
    ring.push(b"small", 4, 1)
    ring.unmap()
    ring = open_ring(path, 300).ring
    assert (ring.recovered, ring.drops[Drop.FULL], ring.account) == (4, 3, (0, 3, 1))
    ring.unmap()


def test_a_recovered_record_keeps_its_maker_and_its_time(tmp_path: Path) -> None:
    """Also where it was salvaged; its stamp is on this process's clock, and no latency is taken from it."""
    path = str(tmp_path / "ring")
    ring = open_ring(path, 1000, instance=b"an earlier agent").ring
    ring.push(b"old", 7, 123, time_unix_ns=5 * SECOND)
    ring.unmap()
    for size in (1000, 2000):
        ring = open_ring(path, size, instance=INSTANCE).ring
        assert [stored[2:] for stored in contents_now(ring)] == [(7, 123, 5 * SECOND, b"an earlier agent")]
        (record,) = ring.claim(bytearray())
        assert (record.is_own, record.stamp_ns) == (False, 5 * SECOND - ring._clocks_apart_ns)
        ring.unmap()


def test_what_an_earlier_round_left_is_not_taken_for_a_record_of_this_one(tmp_path: Path) -> None:
    """Delivered records lie whole in the block, behind the head; damage before them doesn't bring them back."""
    path = tmp_path / "ring"
    ring = open_ring(str(path), 1000).ring
    for number in range(10):
        ring.push(payload_of(0), number, number)
    ring.drop_held()
    for number in range(10, 13):
        ring.push(payload_of(0), number, number)
    ring.unmap()
    content = bytearray(path.read_bytes())
    content[PAGE_BYTES + 72 + 40] ^= 1  # in the second of the three
    path.write_bytes(content)
    opened = open_ring(str(path), 1000)
    assert [record.sequence for record, _ in drained(opened.ring)] == [10, 12]
    opened.ring.unmap()


def test_numbers_go_round(tmp_path: Path) -> None:
    """After 4,294,967,296 records of a ring; also where they must be put in order again."""
    path = tmp_path / "ring"
    ring = open_ring(str(path), SIZE, instance=INSTANCE).ring
    ring._number = (1 << 32) - 3
    for number in range(7):
        ring.push(payload_of(number), number, number * SECOND, 1, number * SECOND)
    ring.unmap()
    content = path.read_bytes()
    assert reopened(content).numbers == list(range(7))
    assert reopened(flipped(content, 8 * (PAGE_BYTES + 80 + 30))).numbers == [0, 2, 3, 4, 5, 6]


# Setting aside -------------------------------------------------------------------------------


def test_names_set_aside_do_not_collide(tmp_path: Path) -> None:
    path = tmp_path / "ring"
    for number in range(5):
        path.write_bytes(b"foreign %d" % number)
        open_ring(str(path), SIZE).ring.unmap()
    aside = [other for other in tmp_path.iterdir() if other != path]
    assert sorted(other.read_bytes() for other in aside) == [b"foreign %d" % number for number in range(5)]
    assert all(ASIDE.match(other.name) for other in aside)


def test_a_rest_of_a_killed_salvage_is_written_over(sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / "ring"
    path.write_bytes(flipped(sample.content, 3))
    (tmp_path / "ring.new").write_bytes(b"a rest" * 9999)
    opened = open_ring(str(path), SIZE)
    assert len(opened.ring) == len(sample.held)
    opened.ring.unmap()
    assert not (tmp_path / "ring.new").exists()


def test_a_rest_that_is_somebodys_ring_is_left_alone(sample: Sample, tmp_path: Path) -> None:
    """Another sink's file may be named so; it is not taken away under its feet."""
    path = tmp_path / "ring"
    damaged = flipped(sample.content, 3)
    path.write_bytes(damaged)
    other = open_ring(f"{path}.new", SIZE).ring
    other.push(b"alive", 1, 1)
    fds = set(os.listdir("/proc/self/fd"))
    with pytest.raises(UsageError, match=rf"/ring\.new: process {os.getpid()} has it open: expected "):
        open_ring(str(path), SIZE)
    assert set(os.listdir("/proc/self/fd")) == fds
    assert path.read_bytes()[100:] == damaged[100:]
    assert sorted(os.listdir(tmp_path)) == ["ring", "ring.new"]
    other.unmap()
    again = open_ring(f"{path}.new", SIZE).ring
    assert [payload for _, payload in drained(again)] == [b"alive"]
    again.unmap()


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_hard_links(
    sample: Sample, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    result = reopened(flipped(sample.content, 3), place=tmp_path)
    assert (result.numbers, result.damaged, len(result.aside)) == (sample.held, 0, 1)


def test_a_symbolic_link_stays(sample: Sample, tmp_path: Path) -> None:
    """What is set aside and replaced is the file that it leads to."""
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "ring", tmp_path / "disk" / "real"
    link.symlink_to(Path("disk", "real"))
    target.write_bytes(flipped(sample.content, 3))
    opened = open_ring(str(link), SIZE)
    opened.ring.unmap()
    assert os.listdir(tmp_path / "disk") != ["real"], "set aside beside the file itself"
    assert sorted(os.listdir(tmp_path)) == ["disk", "ring"]
    assert os.readlink(link) == "disk/real"
    again = open_ring(str(link), SIZE)
    assert (again.notices, len(again.ring)) == ([], len(sample.held))
    again.ring.unmap()


def test_whoever_salvages_is_told_by_its_process(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by that of the dead one that had the file before; for the new file too."""
    path = tmp_path / "ring"
    content = bytearray(flipped(sample.content, 3 * 8 * 9))
    content[64:72] = struct.pack("<Q", 999_999_999)
    path.write_bytes(content)
    seen: list[str] = []
    real = ring_recovery.survivors

    def survivors(*arguments: Any) -> Any:
        for name in ("ring", "ring.new"):
            with pytest.raises(UsageError) as error:
                locked(str(tmp_path / name))
            seen.append(str(error.value).split(": ")[1])
        return real(*arguments)

    monkeypatch.setattr(ring_recovery, "survivors", survivors)
    open_ring(str(path), SIZE).ring.unmap()
    assert seen == [f"process {os.getpid()} has it open"] * 2


SALVAGE = """
import os, signal, sys
from agent import ring_file, ring_recovery
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def after(real):
    def call(*arguments):
        real(*arguments)
        die()
    return call
path, point = sys.argv[1:]
match point:
    case "before the new file": os.unlink = die
    case "while records are pushed": ring_recovery.Ring.recover = after(ring_recovery.Ring.recover)
    case "before the link": os.link = die
    case "after the link": os.link = after(os.link)
    case "before it is replaced": os.replace = die
    case "after it was replaced": os.replace = after(os.replace)
ring_recovery.open_ring(path, 600)
"""


@pytest.mark.parametrize("point", re.findall(r'case "([^"]*)"', SALVAGE))
def test_a_salvage_that_is_killed(sample: Sample, tmp_path: Path, point: str) -> None:
    path = tmp_path / "ring"
    damaged = flipped(sample.content, 3)
    path.write_bytes(damaged)
    with program(SALVAGE, path, point) as run:
        assert run.wait(60) == -signal.SIGKILL
    if point == "after it was replaced":
        assert path.read_bytes() != damaged
    else:
        assert path.read_bytes()[100:] == damaged[100:]
    opened = open_ring(str(path), SIZE, instance=INSTANCE)
    assert [record.sequence for record, _ in drained(opened.ring)] == sample.held
    opened.ring.unmap()
    aside = [other for other in tmp_path.iterdir() if other != path]
    assert aside
    assert all(ASIDE.match(other.name) and other.read_bytes()[100:] == damaged[100:] for other in aside)


@pytest.mark.parametrize("functions", [["link"], ["replace"], ["link without links", "replace"]])
def test_a_file_that_cannot_be_set_aside(
    sample: Sample, tmp_path: Path, functions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ring"
    damaged = flipped(sample.content, 3)
    path.write_bytes(damaged)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    def has_none(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    fds = set(os.listdir("/proc/self/fd"))
    for function in functions:
        monkeypatch.setattr(os, function.split()[0], has_none if " " in function else refuse)
    with pytest.raises(UsageError, match=r"/ring: it can't be set aside: Permission denied: expected "):
        open_ring(str(path), SIZE)
    monkeypatch.undo()
    assert set(os.listdir("/proc/self/fd")) == fds
    assert path.read_bytes()[100:] == damaged[100:]
    assert not (tmp_path / "ring.new").exists()
    opened = open_ring(str(path), SIZE)
    assert len(opened.ring) == len(sample.held)
    opened.ring.unmap()


@pytest.mark.parametrize("sync", Sync)
def test_a_salvage_waits_for_the_disk_once(
    sample: Sample, tmp_path: Path, sync: Sync, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ring"
    path.write_bytes(flipped(sample.content, 3))
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    opened = open_ring(str(path), SIZE, sync=sync)
    assert len(calls) == 1
    opened.ring.unmap()


# Killed for real -----------------------------------------------------------------------------

WRITER = """
import os, random, sys
from agent.delivery import WhenFull
from agent.ring_recovery import open_ring
path, start, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(seed)
ring = open_ring(path, 5000, WhenFull.DROP_NEWEST).ring
buffer = bytearray()
pushed = start
while True:
    if ring.push(b"%d " % pushed * draw.randrange(1, 30), pushed, pushed):
        os.write(1, b"p%d\\n" % pushed)
        pushed += 1
    if draw.random() < 0.4:
        claimed = ring.claim(buffer, draw.randrange(1, 6))
        done = claimed[: draw.randrange(0, 6)]
        ring.settle(len(done))
        if done:
            os.write(1, b"s%d\\n" % done[-1].sequence)
        ring.release()
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """What it holds goes from the first that was not settled to the last that was pushed."""
    path = tmp_path / "ring"
    pushed = settled = -1
    for seed in range(20):
        with program(WRITER, path, pushed + 1, seed) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(random.Random(seed).randrange(1, 400))]
            writer.kill()
            lines += writer.stdout.readlines()
        for line in lines:
            if line.endswith(b"\n"):
                pushed, settled = (int(line[1:]), settled) if line[:1] == b"p" else (pushed, int(line[1:]))
        opened = open_ring(str(path), 5000, WhenFull.DROP_NEWEST)
        assert opened.notices == []
        held = [payload for _, payload in copies(opened.ring)]
        numbers = [int(payload.split()[0]) for payload in held]
        assert all(
            payload == b"%d " % number * payload.count(b" ") for number, payload in zip(numbers, held, strict=True)
        )
        # The kill may fall between an action and its report: one push more, one settling (of 5 at most) more.
        first, last = (numbers[0], numbers[-1]) if numbers else (pushed + 1, pushed)
        assert numbers == list(range(first, last + 1))
        assert pushed <= last <= pushed + 1 or not numbers
        assert settled + 1 <= first <= settled + 6
        pushed, settled = last, first - 1
        opened.ring.unmap()


def copies(ring: Ring) -> list[tuple[Any, bytes]]:
    """What a ring holds, which stays in it."""
    buffer = bytearray()
    start, found = 0, []
    for record in ring.claim(buffer, 1 << 30):
        found.append((record, bytes(buffer[start : start + record.size])))
        start += record.size
    ring.release()
    return found


def program(text: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-B", "-c", text, *map(str, arguments)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )


# Threads and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("when_full", WhenFull)
def test_several_writers_and_a_reader_on_a_file(tmp_path: Path, when_full: WhenFull) -> None:
    ring = open_ring(str(tmp_path / "ring"), 8192, when_full).ring
    check_several_writers(ring)
    ring.unmap()


def test_opening_a_large_full_ring_does_not_hold_it_in_memory(tmp_path: Path) -> None:
    """Neither where all is whole nor where it is damaged in the middle."""
    path, size = tmp_path / "ring", 64 << 20
    ring = open_ring(str(path), size).ring
    payload = bytes(8192)
    for number in range(size // 8192):
        ring.push(payload, number, number)
    held = len(ring)
    ring.unmap()
    tracemalloc.start()
    try:
        opened = open_ring(str(path), size)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
        assert len(opened.ring) == held
        opened.ring.unmap()
        with path.open("r+b") as file:
            file.seek(32 << 20)
            file.write(b"damage")
        tracemalloc.reset_peak()
        opened = open_ring(str(path), size)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
        assert (len(opened.ring), opened.ring.drops[Drop.DAMAGED]) == (held - 1, 1)
        opened.ring.unmap()
    finally:
        tracemalloc.stop()


def test_a_million_pushes_into_a_file_leave_no_more_behind_than_in_memory(tmp_path: Path) -> None:
    ring = open_ring(str(tmp_path / "ring"), 1 << 20).ring
    payload = bytes(256)
    for sequence in range(5000):
        ring.push(payload, sequence, sequence)
    blocks = sys.getallocatedblocks()
    for sequence in range(100_000):
        ring.push(payload, sequence, sequence)
    assert sys.getallocatedblocks() - blocks < 10
    ring.unmap()
