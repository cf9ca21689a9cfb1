"""A ring's file: who may have it, what it takes to make it, and when it goes to the disk."""

from __future__ import annotations

import errno
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import ring_file, ring_records
from agent.errors import UsageError
from agent.ring import Ring
from agent.ring_file import (
    PAGE_BYTES,
    DamagedError,
    RingFile,
    Sync,
    block_bytes,
    is_ring,
    latest_state,
    owner_pid,
    read_state,
    set_aside_name,
)
from agent.ring_records import HEADER, State, survivors
from agent.ring_recovery import mapped, open_ring
from tests.test_ring import until

SIZE = 600
root_on_linux = sys.platform.startswith("linux") and os.geteuid() == 0


@pytest.fixture
def file(tmp_path: Path) -> Iterator[RingFile]:
    file = RingFile(str(tmp_path / "ring"), SIZE)
    yield file
    file.close()


def test_a_new_file_is_whole(file: RingFile) -> None:
    content = Path(file.path).read_bytes()
    assert len(content) == PAGE_BYTES + SIZE
    assert is_ring(content[:PAGE_BYTES])
    assert not is_ring(content[: PAGE_BYTES - 1])
    assert not is_ring(bytes(PAGE_BYTES))
    assert (file.is_new, file.state) == (True, State(end=SIZE))
    assert (block_bytes(file.page), owner_pid(file.page)) == (SIZE, os.getpid())
    assert os.stat(file.path).st_mode & 0o777 == 0o600
    assert os.stat(file.path).st_blocks * 512 >= PAGE_BYTES + SIZE


def test_the_newest_whole_state_counts(file: RingFile) -> None:
    states = [State(head=8 * number, end=SIZE, number=number) for number in range(5)]
    for state in states:
        file.publish(*state)
        assert read_state(file.page, SIZE, "")[1] == state
    newest = 1024 if file._generation % 2 == 0 else 2048
    file.page[newest + 8] ^= 1
    assert read_state(file.page, SIZE, "")[1] == states[-2]
    file.page[newest ^ 3072] ^= 1
    assert latest_state(file.page) is None
    with pytest.raises(DamagedError, match=r"^x: neither of its two states is whole$"):
        read_state(file.page, SIZE, "x")


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    path = str(tmp_path / "ring")
    for number in range(1, 6):
        file = RingFile(path, SIZE)
        assert (file.is_new, file.state.number) == (number == 1, number - 1)
        file.publish(*State(end=SIZE, number=number))
        file.close()


def test_a_name_that_is_set_aside_is_free(tmp_path: Path) -> None:
    names: list[str] = []
    for _ in range(5):
        names.append(set_aside_name(str(tmp_path / "ring")))
        os.symlink("nowhere", names[-1])
    assert len(set(names)) == 5
    assert all(re.fullmatch(r".*/ring\.\d{8}T\d{6}Z(\.\d)?", name) for name in names)


def test_an_empty_file_is_mapped_as_nothing(tmp_path: Path) -> None:
    with (tmp_path / "empty").open("w+b") as empty, mapped(empty.fileno()) as whole:
        assert len(whole) == 0


def test_a_block_beyond_32_gibibytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are put in order by their number wherever they lie; the holes between them are not searched here."""
    ring = open_ring(str(tmp_path / "ring"), SIZE).ring
    for number in range(3):
        ring.push(b"%04d" % number, number, number)
    ring.unmap()
    content = (tmp_path / "ring").read_bytes()[PAGE_BYTES:]
    places = [(32 << 30) + 128, 64, (33 << 30)]
    with (tmp_path / "large").open("w+b") as large:
        large.truncate(34 << 30)
        for number, place in enumerate(places):
            os.pwrite(large.fileno(), content[64 * number : 64 * (number + 1)], place)
        marks = sorted([*places, 34 << 30])
        monkeypatch.setattr(ring_records, "_next_mark", lambda _, place: next(mark for mark in marks if mark >= place))
        with mapped(large.fileno()) as block:
            found = list(survivors(block, None))
    assert HEADER.size + 4 == 64
    assert [(place, header.sequence) for place, header in found] == [*zip(places, range(3), strict=True)]


# Who may have it -----------------------------------------------------------------------------

HOLDER = """
import sys
from agent.ring_recovery import open_ring
ring = open_ring(sys.argv[1], 600).ring
ring.push(b"from the first", 1, 1)
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    path = str(tmp_path / "ring")
    command = [sys.executable, "-B", "-c", HOLDER, path]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"open\n"
        for size in (600, 1200):
            with pytest.raises(UsageError) as error:
                open_ring(path, size)
            assert str(error.value) == (
                f"{path}: process {first.pid} has it open: expected a ring's file for each agent and sink"
            )
        assert os.listdir(tmp_path) == ["ring"]
        first.send_signal(signal.SIGKILL)
        first.wait(60)
        opened = open_ring(path, 600)
    assert owner_pid(memoryview(Path(path).read_bytes())) == os.getpid()
    assert len(opened.ring) == 1
    assert opened.ring.outlives_process
    opened.ring.unmap()


def test_a_second_ring_in_this_process_is_refused(file: RingFile) -> None:
    with pytest.raises(UsageError, match=f"/ring: process {os.getpid()} has it open"):
        RingFile(file.path, SIZE)


def test_a_lock_on_a_file_without_a_pid(tmp_path: Path) -> None:
    """Somebody has just begun to make it."""
    path = str(tmp_path / "ring")
    fd = ring_file.locked(path)
    with pytest.raises(UsageError, match="/ring: another process has it open"):
        RingFile(path, SIZE)
    os.ftruncate(fd, PAGE_BYTES)
    with pytest.raises(UsageError, match="/ring: another process has it open"):
        RingFile(path, SIZE)
    os.close(fd)


def test_a_ring_tells_who_has_it_before_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is made now, and one that a dead process had."""
    path = tmp_path / "ring"
    seen: list[str] = []
    real = mmap.mmap

    def look(fd: int, length: int) -> mmap.mmap:
        with pytest.raises(UsageError) as error:
            ring_file.locked(str(path))
        seen.append(str(error.value).split(": ")[1])
        return real(fd, length)

    monkeypatch.setattr(mmap, "mmap", look)
    RingFile(str(path), SIZE).close()
    with path.open("r+b") as ring:
        ring.seek(64)
        ring.write((999_999_999).to_bytes(8, "little"))
    RingFile(str(path), SIZE).close()
    assert seen == [f"process {os.getpid()} has it open"] * 2


@pytest.mark.parametrize("content", [b"text\n" * 2000, b"hostprobe ring\r\n and no page", bytes(9000)])
def test_what_is_no_ring_is_locked_and_not_written_to(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ring").write_bytes(content)
    os.close(ring_file.locked(str(tmp_path / "ring")))
    assert (tmp_path / "ring").read_bytes() == content


def test_a_ring_that_cannot_be_signed_is_locked_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    RingFile(str(tmp_path / "ring"), SIZE).close()
    monkeypatch.setattr(os, "pwrite", refuse)
    again = RingFile(str(tmp_path / "ring"), SIZE)
    with pytest.raises(UsageError, match="has it open"):
        RingFile(again.path, SIZE)
    again.close()


def test_a_file_that_is_replaced_while_it_is_being_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is on the file that stands there, not on one that was set aside or removed meanwhile."""
    path = tmp_path / "ring"
    real = ring_file.fcntl.flock
    rounds: list[Callable[[], object]] = [path.unlink, lambda: os.replace(tmp_path / "other", path)]
    (tmp_path / "other").write_bytes(b"other")

    def flock(fd: int, how: int) -> None:
        if rounds:
            rounds.pop(0)()
        real(fd, how)

    monkeypatch.setattr(ring_file.fcntl, "flock", flock)
    fds = set(os.listdir("/proc/self/fd"))
    fd = ring_file.locked(str(path))
    assert os.path.samestat(os.fstat(fd), path.stat())
    assert not rounds
    os.close(fd)
    assert set(os.listdir("/proc/self/fd")) == fds


def test_a_closed_ring_lets_go_of_all_it_had(tmp_path: Path) -> None:
    path = str(tmp_path / "ring")
    fds = set(os.listdir("/proc/self/fd"))
    for sync in Sync:
        ring = open_ring(path, SIZE, sync=sync).ring
        ring.push(b"one", 1, 1)
        ring.unmap()
        assert not ring.outlives_process
        assert not ring.push(b"late", 2, 2)
        assert (ring.claim(bytearray(), wait=True), ring.oldest_stamp_ns) == ([], None)
        ring.unmap()
    for content in (b"foreign", b"hostprobe ring\r\n" + bytes(PAGE_BYTES + SIZE - 16)):
        Path(path).write_bytes(content)
        with pytest.raises(DamagedError):
            RingFile(path, SIZE)
        kept = Path(path).read_bytes()
        assert kept[:64] + kept[72:] == content[:64] + content[72:]  # but for who has it open
    assert set(os.listdir("/proc/self/fd")) == fds
    until(lambda: not syncing_threads())


# What it takes to make it --------------------------------------------------------------------


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = sorted(os.listdir(tmp_path))
    for path, why in {
        str(tmp_path): "Is a directory",
        f"{tmp_path}/fifo": "is no regular file",
        "/dev/null": "is no regular file",
        f"{tmp_path}/absent/ring": "No such file or directory",
    }.items():
        with pytest.raises(UsageError) as error:
            open_ring(path, SIZE)
        assert re.fullmatch(
            rf"{re.escape(path)}: {why}: expected a file for a ring( that can be written)?", str(error.value)
        )
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(not root_on_linux, reason="becomes another user, which needs root")
def test_a_file_of_somebody_else(tmp_path: Path) -> None:
    """Root may write anything, so a process that is nobody tries."""
    (tmp_path / "ring").write_bytes(b"")
    (tmp_path / "ring").chmod(0o444)
    for parent in [tmp_path, *tmp_path.parents][:3]:
        parent.chmod(0o755)
    program = (
        "import os, sys\nfrom agent.errors import UsageError\nfrom agent.ring_recovery import open_ring\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        open_ring(path, 600)\n"
        "    except UsageError as error:\n        print(error)\n"
    )
    paths = [str(tmp_path / "ring"), "/etc/hostprobe-test-ring"]
    run = subprocess.run(
        [sys.executable, "-B", "-c", program, *paths],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert run.stderr == ""
    why = "Permission denied: expected a file for a ring that can be written"
    assert run.stdout.splitlines() == [f"{path}: {why}" for path in paths]


@pytest.mark.parametrize("size", [62 << 10, 1 << 20, 1 << 60])
def test_a_disk_without_space_is_an_error_at_the_start(small_disk: Path, size: int) -> None:
    """And at no later time: what the disk has room for is taken whole."""
    path = small_disk / "ring"
    with pytest.raises(UsageError) as error:
        open_ring(str(path), size)
    why = "No space left on device: expected a disk with"
    assert str(error.value) == f"{path}: {why} {PAGE_BYTES + size} bytes of space"
    assert os.listdir(small_disk) == []
    ring = open_ring(str(path), 40 << 10).ring
    (small_disk / "filler").write_bytes(bytes(20 << 10))
    for number in range(100):
        ring.push(bytes(1000), number, number)
    assert ring.used_ratio > 0.9
    ring.unmap()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(UsageError, match=f"{os.strerror(number)}: expected a disk with 4696 bytes of space"):
        open_ring(str(tmp_path / "ring"), SIZE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("is_empty_before", [False, True])
@pytest.mark.parametrize("call", ["ftruncate", "posix_fallocate", "pwrite"])
def test_an_error_while_it_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, is_empty_before: bool
) -> None:
    path = tmp_path / "ring"
    if is_empty_before:
        path.touch()

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    fds = set(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UsageError) as error:
        open_ring(str(path), SIZE)
    assert str(error.value) == f"{path}: Input/output error: expected a file that 600 bytes can be mapped in"
    assert os.listdir(tmp_path) == []
    assert set(os.listdir("/proc/self/fd")) == fds


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(ring_file.fcntl, "flock", refuse)
    with pytest.raises(UsageError, match="/ring: it can't be locked: No locks available: expected a file system that"):
        open_ring(str(tmp_path / "ring"), SIZE)


# When it goes to the disk --------------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was asked to go to the disk."""
    calls: list[int] = []
    monkeypatch.setattr(os, "fdatasync", calls.append)
    return calls


def syncing_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sync ")]


def test_never(tmp_path: Path, synced: list[int]) -> None:
    ring = open_ring(str(tmp_path / "ring"), SIZE).ring
    exercise(ring)
    ring.unmap()
    assert synced == []
    assert syncing_threads() == []


def test_always_waits_for_each_push_before_it_says_yes(tmp_path: Path, synced: list[int]) -> None:
    ring = open_ring(str(tmp_path / "ring"), SIZE, sync=Sync.ALWAYS).ring
    for number in range(30):
        assert ring.push(b"x" * number, number, number)
        assert len(synced) == number + 1
    ring.close()
    ring.push(b"late", 99, 99)
    assert len(synced) == 30
    ring.drop_held()
    ring.unmap()
    assert len(synced) == 31
    assert syncing_threads() == []


def test_interval_syncs_what_has_changed_and_ends(
    tmp_path: Path, synced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most once a round of its thread, which waits a second between two."""
    rounds = threading.Semaphore(0)
    waited: list[float] = []
    waiting: list[bool] = []

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if self not in clocks:  # that of a thread's own start
                return super().wait(timeout)
            waited.append(timeout or 0)
            waiting.append(True)
            rounds.acquire()
            return self.is_set()

        def set(self) -> None:
            super().set()
            rounds.release()

    clocks: list[Clock] = []

    def clock() -> Clock:
        clocks.append(Clock())
        return clocks[-1]

    class Threading:
        Event = staticmethod(clock)
        Thread = threading.Thread

    def one_round() -> None:
        seen = len(waiting)
        rounds.release()
        until(lambda: len(waiting) > seen)

    monkeypatch.setattr(ring_file, "threading", Threading)
    ring = open_ring(str(tmp_path / "ring"), SIZE, sync=Sync.INTERVAL).ring
    (thread,) = syncing_threads()
    until(lambda: waiting)
    one_round()
    assert synced == [], "nothing has changed"
    exercise(ring)
    assert synced == []
    one_round()
    assert len(synced) == 1
    one_round()
    assert len(synced) == 1
    ring.push(b"one", 1, 1)
    one_round()
    assert len(synced) == 2
    ring.push(b"two", 2, 2)
    ring.unmap()
    assert len(synced) == 3
    thread.join(60)
    assert not thread.is_alive()
    assert set(waited) == {1.0}


def exercise(ring: Ring) -> None:
    for number in range(20):
        ring.push(b"x" * 50, number, number)
    ring.claim(bytearray(), 3)
    ring.settle(3)


@pytest.mark.parametrize("sync", [Sync.ALWAYS, Sync.INTERVAL])
def test_a_sick_disk_costs_no_frame_in_memory(tmp_path: Path, sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", refuse)
    ring = open_ring(str(tmp_path / "ring"), SIZE, sync=sync).ring
    assert ring.push(b"one", 1, 1)
    ring.unmap()


def test_a_rename_goes_to_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.path.samestat(os.fstat(fd), tmp_path.stat())))
    monkeypatch.chdir(tmp_path)
    for path in ("ring", str(tmp_path / "ring")):
        Path(path).write_bytes(b"foreign")
        open_ring(path, SIZE).ring.unmap()
    assert synced == [True, True]


def test_a_salvage_without_space(small_disk: Path) -> None:
    path = small_disk / "ring"
    ring = open_ring(str(path), SIZE).ring
    exercise(ring)
    held = len(ring)
    ring.unmap()
    damaged = b"H" + path.read_bytes()[1:]
    path.write_bytes(damaged)
    for _ in range(2):
        with pytest.raises(UsageError, match=r"/ring\.new: No space left on device: expected a disk with"):
            open_ring(str(path), 70_000)
        assert [other.name for other in small_disk.iterdir()] == ["ring"]
        assert path.read_bytes() == damaged
    opened = open_ring(str(path), SIZE)
    assert len(opened.ring) == held
    opened.ring.unmap()
