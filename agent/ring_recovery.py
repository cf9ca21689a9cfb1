"""Opening a ring's file, whatever state it is in.

A file that can't be used as it is (no ring, another version or size, damage between whole records)
is set aside under another name, and what is whole in it goes into a new file first: a crash at any
point leaves the old file in its place, or the new one.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from agent.delivery import WhenFull
from agent.errors import UsageError
from agent.ring import NO_INSTANCE, Ring
from agent.ring_file import (
    PAGE_BYTES,
    DamagedError,
    RingFile,
    Sync,
    has_torn_slot,
    is_ring,
    latest_state,
    locked,
    other_version,
    set_aside_name,
)
from agent.ring_records import (
    ALIGN,
    HEADER,
    NO_HEADER,
    NUMBER_MASK,
    Found,
    State,
    need,
    survivors,
    walk,
    whole_at,
)

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # by file systems that have none


@dataclass
class Opened:
    """A ring over a file, and what had to be done for it.

    Attributes:
        notices: a line for each thing that an operator should know.
    """

    ring: Ring
    notices: list[str] = field(default_factory=list)


def open_ring(
    path: str,
    size: int,
    when_full: WhenFull = WhenFull.DROP_OLDEST,
    sync: Sync = Sync.NEVER,
    instance: bytes = NO_INSTANCE,
) -> Opened:
    """The ring of a file, with every whole record that it holds.

    Args:
        path: where it stands, or a symbolic link to it, which stays.
        size: bytes of the block, rounded down to a multiple of eight.

    Raises:
        UsageError: the file can't be made, or another process has it.
    """
    path = os.path.realpath(path)
    size -= size % ALIGN
    try:
        file = RingFile(path, size, sync)
    except DamagedError as reason:
        return _salvaged(path, size, when_full, sync, instance, str(reason))
    state = with_newest(file.page, file.block, file.state)
    whole = _whole(file.block, state)
    if whole.headers == state.headers:
        notices = []
        if state != file.state:
            file.state = state
            file.publish(*state)
            notices = [f"{path}: the state with its newest record was torn; that record is whole and is kept"]
        return Opened(Ring(size, when_full, file, instance), notices)
    if sum(1 for _ in survivors(file.block, state)) > whole.headers:
        file.close()
        return _salvaged(path, size, when_full, sync, instance, f"{path}: damaged between whole records")
    lost = state.records - whole.records
    file.state = whole
    file.publish(*file.state)
    opened = Opened(Ring(size, when_full, file, instance))
    opened.ring.recover_damaged(lost)
    opened.notices.append(f"{path}: its newest {lost} records were torn and are dropped")
    return opened


def with_newest(page: memoryview, block: memoryview, state: State) -> State:
    """The state with the record that was pushed after it, where the slot that told of that one is torn.

    No other record ever had its number, so one that lies whole where a push would have put it was pushed.
    """
    if not has_torn_slot(page):
        return state
    for place in (state.head, 0):
        header = whole_at(block, place)
        if header is None or header.number != state.number:
            continue
        end, skipped = (state.end, 0) if place == state.head else (state.head, len(block) - state.head)
        room = need(header.length)
        return State(
            head=place + room,
            tail=state.tail,
            end=end,
            used=state.used + skipped + room,
            headers=state.headers + 1,
            records=state.records + header.records,
            number=(state.number + 1) & NUMBER_MASK,
        )
    return state


def searched(whole: memoryview) -> tuple[memoryview, State | None]:
    """Where in a file's bytes to look for records, and the state that tells which of them it holds.

    The state is None where none is whole, or it can't be relied on: a file of another version may have other
    things in the same place. Then whatever is whole counts, anywhere in the file: a record that comes twice
    is better than one that never comes.
    """
    with whole[:PAGE_BYTES] as page:
        latest, is_ours = latest_state(page), other_version(page) is None
        block = whole[PAGE_BYTES:]
        state = with_newest(page, block, latest[1]) if latest else None
    if is_ours or (state is not None and _bears_out(block, state)):
        return block, state
    block.release()
    return whole[:], None


def _bears_out(block: memoryview, state: State) -> bool:
    """Whether the whole records of a block are those of a state: the oldest where it says, the newest the last."""
    oldest = whole_at(block, state.tail) if state.tail < len(block) else None
    if state.headers and (oldest is None or oldest.number != (state.number - state.headers) & NUMBER_MASK):
        return False
    newest = deque(survivors(block, None), maxlen=1)
    return newest[0].header.number == (state.number - 1) & NUMBER_MASK if newest else not state.number


def _whole(block: memoryview, state: State) -> State:
    """The state that ends before the first record that is not whole."""
    headers = records = 0
    newest = Found(0, NO_HEADER)
    for newest in walk(block, state):
        headers += 1
        records += newest.header.records
    number = (state.number - state.headers + headers) & NUMBER_MASK
    if not headers:
        return State(end=len(block), number=number)
    head = newest.place + need(newest.header.length)
    if newest.place >= state.tail:
        return State(head, state.tail, len(block), head - state.tail, headers, records, number)
    return State(head, state.tail, state.end, len(block) - state.tail + head, headers, records, number)


def _salvaged(path: str, size: int, when_full: WhenFull, sync: Sync, instance: bytes, reason: str) -> Opened:
    """A new ring with what is whole in the file, which keeps its content under another name."""
    lock = locked(path)
    try:
        fresh = f"{path}.new"
        rest = locked(fresh)  # of an attempt that was killed, if it isn't a ring that somebody has named so
        try:
            os.unlink(fresh)
        finally:
            os.close(rest)
        file = RingFile(fresh, size, sync)
        try:
            ring = Ring(size, when_full, file, instance)
            with mapped(lock) as whole:
                lost = _recover(ring, whole)
            file.flush()
            aside = _set_aside(path, file, other_version(os.pread(lock, PAGE_BYTES, 0)))
        except Exception:
            file.close()
            os.unlink(fresh)
            raise
    except OSError as error:
        raise UsageError(f"{path}: it can't be set aside: {error.strerror}", "a directory to write in") from None
    finally:
        os.close(lock)
    kept = f"{len(ring)} records kept" + (f", {lost} lost" if lost else "")
    return Opened(ring, [f"{reason}; set aside as {aside}, {kept}"])


def _set_aside(path: str, fresh: RingFile, version: int | None) -> str:
    """Gives a file another name, and its own to a new ring; returns the other one.

    Where a file can't have two names, a kill between the two renames leaves none at `path`.
    """
    aside = set_aside_name(path, version)
    try:
        os.link(path, aside)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.rename(path, aside)
    try:
        fresh.replace(path)
    except OSError:
        os.rename(aside, path)  # does nothing where both are names of it
        raise
    return aside


@contextmanager
def mapped(fd: int) -> Iterator[memoryview]:
    """A file's bytes, for reading."""
    if not os.fstat(fd).st_size:
        yield memoryview(b"")
        return
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as bytes_of_file, memoryview(bytes_of_file) as whole:
        yield whole


def _recover(ring: Ring, whole: memoryview) -> int:
    """Pushes what is whole in a file's bytes; returns how many records were lost, 1 where nothing tells how many."""
    block, state = searched(whole)
    with block:
        kept = 0
        for place, header in survivors(block, state):
            with block[place + HEADER.size : place + HEADER.size + header.length] as payload:
                ring.recover(header, payload)
            kept += header.records
        lost = state.records - kept if state else int(is_ring(bytes(whole[:PAGE_BYTES])) or kept > 0)
    ring.recover_damaged(lost)
    return lost


def check_place(path: str) -> None:
    """Finds out whether a ring's file could be opened at a path, "" for none, without touching it.

    Raises:
        UsageError: it couldn't.
    """
    folder = os.path.dirname(path) or "."
    if path and not os.path.isdir(folder):
        raise UsageError(f"{path}: its directory is absent", "a directory to write in")
    if path and os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{path}: is no regular file", "a file for a ring")
    if path and not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UsageError(f"{path}: it can't be written", "a file for a ring that can be written")
