"""A ring's block in a mapped file, so that what is held outlives the process.

    ┌──────────────┬────────┬────────┬───────────────────────────────┐
    │ magic, sizes │ slot 0 │ slot 1 │ the block, as in memory …     │
    └──────────────┴────────┴────────┴───────────────────────────────┘
      page 0                           page 1 and further

A slot is a `State` with a generation and a checksum. The two are written in turn, so one is
whole at every moment; of two whole ones the higher generation counts. A record is written before
the state that holds it, and a state without a record before that record is written over: a
process that is killed between any two stores leaves a file whose state is true.

What stands before slot 0 but the process is the same in every version. All else of another version's file may mean
something else: it is only read, and what its records don't bear out isn't believed.

The kernel keeps what a killed process has stored. What a power failure keeps is a matter of `Sync`.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import threading
import time
from contextlib import suppress
from enum import StrEnum
from zlib import crc32

from agent.errors import UsageError
from agent.ring_records import ALIGN, CHECKSUM, State

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

VERSION = 1
PAGE_BYTES = 4096
_MAGIC = b"hostprobe ring\r\n"
_HEAD = struct.Struct("<16sIIQ")  # magic, version, page bytes, block bytes; behind it their CRC-32
_PID_AT = 64
_PID = struct.Struct("<Q")
_SLOT = struct.Struct("<QQQQQQQQ")  # generation, then a State; behind it their CRC-32
_SLOT_BYTES = _SLOT.size + CHECKSUM.size
_SLOTS_AT = (1024, 2048)
_SYNC_SECONDS = 1.0
_READ_BYTES = 1 << 20


class Sync(StrEnum):
    """When a ring's file goes to the disk: what a power failure can take."""

    NEVER = "never"
    INTERVAL = "interval"
    ALWAYS = "always"


class RingFile:
    """The mapped file of one ring, locked for this process.

    Args:
        path: where it stands; it is made, whole, where it doesn't.
        size: bytes of the block, a multiple of eight.

    Attributes:
        block: the block's memory.
        state: as it was found, or as it was repaired before a ring had it.
        is_new: nothing was in it.
        is_flushed_each_push: whether every record must be on the disk before its push is done.

    Raises:
        DamagedError: there is a file that is no ring of this size, or whose head is damaged; it is
            untouched, but for who has it open.
        UsageError: it can't be made or mapped, or another process has it.
    """

    def __init__(self, path: str, size: int, sync: Sync = Sync.NEVER) -> None:
        assert size % ALIGN == 0, size
        self.path = path
        self.size = size
        self.is_flushed_each_push = sync is Sync.ALWAYS
        self._sync = sync
        self._stop = threading.Event()
        self._generation = self._flushed = 0  # of the state, and of that which the disk has
        self.is_new = False
        self._fd = locked(path)
        try:
            self.is_new = _is_unused(self._fd)
            if self.is_new:
                _make(self._fd, path, size)
            elif os.fstat(self._fd).st_size != PAGE_BYTES + size:
                with memoryview(os.pread(self._fd, PAGE_BYTES, 0)) as page:
                    _check_version(page, path)
                raise DamagedError(f"{path}: has another size than {PAGE_BYTES + size} bytes")
            self._map = mmap.mmap(self._fd, PAGE_BYTES + size)
        except Exception as error:
            if self.is_new:
                with suppress(OSError):
                    os.unlink(path)
            self._unlock()
            if isinstance(error, OSError):
                raise UsageError(f"{path}: {error.strerror}", f"a file that {size} bytes can be mapped in") from None
            raise
        whole = memoryview(self._map)
        self.page, self.block = whole[:PAGE_BYTES], whole[PAGE_BYTES:]
        self._slots = [whole[place : place + _SLOT_BYTES] for place in _SLOTS_AT]  # at hand, for speed
        whole.release()
        try:
            self._generation, self.state = read_state(self.page, size, path)
            self._flushed = self._generation
        except DamagedError:
            self.close()
            raise
        if sync is Sync.INTERVAL:
            threading.Thread(target=self._sync_often, name=f"sync {path}", daemon=True).start()

    def publish(self, head: int, tail: int, end: int, used: int, headers: int, records: int, number: int) -> None:
        """Makes a `State` the one that the next process finds."""
        self._generation = generation = self._generation + 1
        slot = _SLOT.pack(generation, head, tail, end, used, headers, records, number)
        self._slots[generation & 1][:] = slot + CHECKSUM.pack(crc32(slot))

    def flush(self) -> None:
        """Waits until the disk has what was stored; one that fails is no reason to lose frames in memory."""
        self._flushed = self._generation
        with suppress(OSError):
            os.fdatasync(self._fd)

    def _sync_often(self) -> None:
        while not self._stop.wait(_SYNC_SECONDS):
            if self._flushed != self._generation:
                self.flush()

    def replace(self, path: str) -> None:
        """Takes the place of the file at `path`, on the disk too."""
        os.replace(self.path, path)
        self.path = path
        with suppress(OSError):
            directory = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def close(self) -> None:
        """Gives the memory back, and lets another process have the file."""
        self._stop.set()
        if self._flushed != self._generation and self._sync is not Sync.NEVER:
            self.flush()
        for view in (self.page, self.block, *self._slots):
            view.release()
        self._map.close()
        self._unlock()

    def _unlock(self) -> None:
        os.close(self._fd)
        self._fd = -1  # for a thread that syncs at this moment


class DamagedError(Exception):
    """A file that is there is no ring that can be used as it is; its text says why."""


def read_state(page: memoryview, size: int, path: str) -> tuple[int, State]:
    """The generation and the state of a file's first page.

    Args:
        size: what its block must have.

    Raises:
        DamagedError: the page is not one of a ring of this size and version, or no slot is whole.
    """
    head = bytes(page[: _HEAD.size])
    magic, _, page_bytes, block_bytes = _HEAD.unpack(head)
    if magic != _MAGIC:
        raise DamagedError(f"{path}: is no ring")
    if not _is_checked(page[: _HEAD.size + CHECKSUM.size]):
        raise DamagedError(f"{path}: its head is damaged")
    _check_version(page, path)
    if (page_bytes, block_bytes) != (PAGE_BYTES, size):
        raise DamagedError(f"{path}: is a ring of {block_bytes} bytes, not {size}")
    latest = latest_state(page)
    if latest is None:
        raise DamagedError(f"{path}: neither of its two states is whole")
    return latest


def _check_version(page: memoryview, path: str) -> None:
    version = other_version(page)
    if version is not None and _is_checked(page[: _HEAD.size + CHECKSUM.size]):
        age = "newer" if version > VERSION else "older"
        raise DamagedError(f"{path}: is a ring of version {version}, {age} than {VERSION}, which is this hostprobe's")


def is_ring(page: bytes) -> bool:
    """Whether a file that begins so is, or was, a ring."""
    return len(page) == PAGE_BYTES and page.startswith(_MAGIC)


def other_version(page: memoryview | bytes) -> int | None:
    """The version of a ring that isn't of ours, maybe by damage; None for one of ours and for what is no ring."""
    if len(page) < _HEAD.size or page[: len(_MAGIC)] != _MAGIC:
        return None
    version = int(_HEAD.unpack_from(page)[1])
    return None if version == VERSION else version


def block_bytes(page: memoryview) -> int:
    """The size of the block by the file's own head, whatever is wrong with it."""
    return int(_HEAD.unpack_from(page)[3])


def latest_state(page: memoryview) -> tuple[int, State] | None:
    """The generation and the state of the newest whole slot, whatever is wrong with the head."""
    whole = [_SLOT.unpack_from(slot) for slot in _slots(page) if _is_checked(slot)]
    if not whole:
        return None
    generation, *numbers = max(whole)
    return generation, State._make(numbers)


def has_torn_slot(page: memoryview) -> bool:
    """Whether a slot was written and is not whole: damaged since, or its store was cut short."""
    return any(any(slot) and not _is_checked(slot) for slot in _slots(page))


def _slots(page: memoryview) -> list[memoryview]:
    return [page[place : place + _SLOT_BYTES] for place in _SLOTS_AT]


def _checked(content: bytes) -> bytes:
    return content + CHECKSUM.pack(crc32(content))


def _is_checked(content: memoryview) -> bool:
    return len(content) > CHECKSUM.size and _checked(bytes(content[: -CHECKSUM.size])) == content


def owner_pid(page: memoryview) -> int:
    """The process that last opened the file."""
    return int(_PID.unpack_from(page, _PID_AT)[0])


def set_aside_name(path: str, version: int | None = None) -> str:
    """A name beside a file that isn't taken, with the time; and with the version where it is another one's."""
    marked = path if version is None else f"{path}.version{version}"
    name = stamped = f"{marked}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    number = 1
    while os.path.lexists(name):
        name, number = f"{stamped}.{number}", number + 1
    return name


def locked(path: str) -> int:
    """A descriptor of the file, made where it is absent, that no other process has locked.

    A ring says from then on that it is this process's: what comes next, a salvage, may take long.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}", "a file for a ring that can be written") from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UsageError(f"{path}: is no regular file", "a file for a ring")
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                _sign(fd)
                return fd
        except FileNotFoundError:
            pass  # renamed or removed since it was opened
        except BlockingIOError:
            page = os.pread(fd, PAGE_BYTES, 0)
            pid = 0 if other_version(page) else int.from_bytes(page[_PID_AT : _PID_AT + _PID.size], "little")
            owner = f"process {pid}" if pid else "another process"
            os.close(fd)
            raise UsageError(f"{path}: {owner} has it open", "a ring's file for each agent and sink") from None
        except OSError as error:
            os.close(fd)
            raise UsageError(
                f"{path}: it can't be locked: {error.strerror}", "a file system that locks files"
            ) from None
        except UsageError:
            os.close(fd)
            raise
        os.close(fd)


def _sign(fd: int) -> None:
    with suppress(OSError):  # whoever is refused is told a wrong number, and that is all
        page = os.pread(fd, PAGE_BYTES, 0)
        if is_ring(page) and other_version(page) is None:
            os.pwrite(fd, _PID.pack(os.getpid()), _PID_AT)


def _is_unused(fd: int) -> bool:
    """Whether a file was never completed: empty, or allocated and nothing written."""
    place = 0
    while chunk := os.pread(fd, _READ_BYTES, place):
        if chunk.count(0) < len(chunk):
            return False
        place += len(chunk)
    return True


def _make(fd: int, path: str, size: int) -> None:
    """Takes all of the file's space now, so that a full disk is an error at the start and never later.

    What makes it a ring is one small write at last, which a kill can't tear.
    """
    try:
        os.ftruncate(fd, PAGE_BYTES + size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, PAGE_BYTES + size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UsageError(f"{path}: {error.strerror}", f"a disk with {PAGE_BYTES + size} bytes of space") from None
        raise
    head = _checked(_HEAD.pack(_MAGIC, VERSION, PAGE_BYTES, size)).ljust(_PID_AT, b"\0") + _PID.pack(os.getpid())
    os.pwrite(fd, head.ljust(_SLOTS_AT[0], b"\0") + _checked(_SLOT.pack(2, *State(end=size))), 0)
