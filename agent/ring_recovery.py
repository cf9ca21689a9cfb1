"""Opening a ring's file, whatever state it is in.

A file that can't be used as it is (no ring, another version or size, damage between whole records)
is set aside under another name, and what is whole in it goes into a new file first: a crash at any
point leaves the old file in its place, or the new one.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from agent.delivery import WhenFull
from agent.errors import UsageError
from agent.ring import NO_INSTANCE, Ring
from agent.ring_file import (
    PAGE_BYTES,
    DamagedError,
    RingFile,
    Sync,
    is_ring,
    latest_state,
    locked,
    set_aside_name,
)
from agent.ring_records import ALIGN, HEADER, NO_HEADER, NUMBER_MASK, Found, State, need, survivors, walk


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
        size: bytes of the block, rounded down to a multiple of eight.

    Raises:
        UsageError: the file can't be made, or another process has it.
    """
    size -= size % ALIGN
    try:
        file = RingFile(path, size, sync)
    except DamagedError as reason:
        return _salvaged(path, size, when_full, sync, instance, str(reason))
    whole = _whole(file.block, file.state)
    if whole.headers == file.state.headers:
        return Opened(Ring(size, when_full, file, instance))
    if sum(1 for _ in survivors(file.block, file.state)) > whole.headers:
        file.close()
        return _salvaged(path, size, when_full, sync, instance, f"{path}: damaged between whole records")
    lost = file.state.records - whole.records
    file.state = whole
    file.publish(*file.state)
    opened = Opened(Ring(size, when_full, file, instance))
    opened.ring.recover_damaged(lost)
    opened.notices.append(f"{path}: its newest {lost} records were torn and are dropped")
    return opened


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
        with suppress(FileNotFoundError):  # of an attempt that was killed
            os.unlink(fresh)
        file = RingFile(fresh, size, sync)
        try:
            ring = Ring(size, when_full, file, instance)
            with mapped(lock) as whole:
                lost = _recover(ring, whole)
            file.flush()
            aside = set_aside_name(path)
            os.link(path, aside)
            file.replace(path)
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
    page, block = whole[:PAGE_BYTES], whole[PAGE_BYTES:]
    with page, block:
        latest = latest_state(page)
        state = latest[1] if latest else None
        kept = 0
        for place, header in survivors(block, state):
            with block[place + HEADER.size : place + HEADER.size + header.length] as payload:
                ring.recover(header, payload)
            kept += header.records
        lost = state.records - kept if state else int(is_ring(bytes(page)) or kept > 0)
    ring.recover_damaged(lost)
    return lost
