"""Looking into a ring's file, also while an agent uses it: nothing is locked and nothing is written.

An agent at work may write over a record while it is read: its number is then no longer one that the
state holds. It was delivered or dropped meanwhile, and is no damage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from agent.errors import UsageError
from agent.ring_file import PAGE_BYTES, DamagedError, block_bytes, is_ring, other_version, owner_pid, read_state
from agent.ring_records import FIELDS, HEADER, NUMBER_MASK, Header, State, checksum, need, survivors, whole_at
from agent.ring_recovery import mapped, searched, with_newest
from agent.units import Size


@dataclass
class Run:
    """What of one run of the agent waits: from which sequence to which, and how many frames."""

    first: int
    last: int
    frames: int


@dataclass
class Report:
    """What a ring's file holds.

    Attributes:
        block_bytes: the capacity, headers of records included.
        used_bytes: what of it is occupied; None where the file doesn't tell.
        frames, payload_bytes: those that are whole.
        runs: by instance, in the order in which they come.
        oldest_unix_ns, newest_unix_ns: stamps of the first and the last frame; None without any.
        process: who has the file open now; None for nobody.
        damage: what is wrong, a line each.
    """

    path: str
    block_bytes: int
    used_bytes: int | None = None
    frames: int = 0
    payload_bytes: int = 0
    runs: dict[str, Run] = field(default_factory=dict)
    oldest_unix_ns: int | None = None
    newest_unix_ns: int | None = None
    process: int | None = None
    damage: list[str] = field(default_factory=list)

    def text(self) -> bytes:
        """For reading."""
        used = (
            "unknown"
            if self.used_bytes is None
            else f"{Size(self.used_bytes)}, {self.used_bytes / self.block_bytes:.1%}"
        )
        lines = [
            f"{self.path}: ring of {Size(self.block_bytes)}, "
            + (f"open in process {self.process}" if self.process else "open in no process"),
            f"  used      {used}",
            f"  frames    {self.frames}, {self.payload_bytes} bytes",
        ]
        if self.oldest_unix_ns is not None and self.newest_unix_ns is not None:
            lines += [f"  oldest    {_time(self.oldest_unix_ns)}", f"  newest    {_time(self.newest_unix_ns)}"]
        for instance, run in self.runs.items():
            lines.append(f"  instance  {instance}: sequences {run.first} to {run.last}, {run.frames} frames")
        lines += [f"  damage    {line}" for line in self.damage or ["none"]]
        return "\n".join(lines).encode()

    def add(self, header: Header) -> None:
        """Counts a frame, or a batch of records."""
        self.frames += header.records
        self.payload_bytes += header.length
        last = header.sequence + header.records - 1
        run = self.runs.setdefault(header.instance.hex(), Run(header.sequence, last, 0))
        run.last = last
        run.frames += header.records
        self.newest_unix_ns = header.time_unix_ns
        if self.oldest_unix_ns is None:
            self.oldest_unix_ns = header.time_unix_ns


class Spool:
    """A ring's file, open for reading.

    Attributes:
        report: what `records` has found so far.

    Raises:
        UsageError: it can't be read, or is no ring.
    """

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            page = os.pread(self._fd, PAGE_BYTES, 0)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}", "a ring's file that can be read") from None
        if not is_ring(page):
            self.close()
            raise UsageError(f"{path}: is no ring", "a file that hostprobe keeps a sink's buffer in")
        with memoryview(page) as view:
            self.report = Report(path, block_bytes(view))
            self.report.process = _locker(self._fd)
            if self.report.process is not None and other_version(page) is None:
                self.report.process = owner_pid(view)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def records(self) -> Iterator[tuple[Header, bytes]]:
        """The frames that the file holds now, oldest first, without those that leave it before they are read."""
        with mapped(self._fd) as whole, whole[:PAGE_BYTES] as page, whole[PAGE_BYTES:] as block:
            state = self._state(page, block)
            if state is None:
                area, known = searched(whole)  # as an agent that opens it does: what was delivered stays so
                with area:
                    yield from self._survivors(area, known)
                return
            self.report.used_bytes = state.used
            place, number, last = state.tail, state.number - state.headers, state.number
            while number < last:
                place = 0 if place == state.end else place
                found = _copy_at(block, place, number)
                if found is None:
                    now = self._state(page, block)
                    gone = 0 if now is None else (now.number - now.headers - number) & NUMBER_MASK
                    if not 0 < gone <= NUMBER_MASK // 2:
                        yield from self._survivors(block, state._replace(headers=last - number))
                        return
                    if now is None or number + gone >= last:
                        return
                    place, number = now.tail, number + gone
                    continue
                self.report.add(found[0])
                yield found
                place += need(found[0].length)
                number += 1

    def _state(self, page: memoryview, block: memoryview) -> State | None:
        try:
            return with_newest(page, block, read_state(page, len(block), self.report.path)[1])
        except DamagedError as error:
            self.report.damage.append(str(error))
            return None

    def _survivors(self, block: memoryview, state: State | None) -> Iterator[tuple[Header, bytes]]:
        """What is whole behind damage."""
        kept = 0
        with block[: len(block) & ~7] as aligned:
            for place, header in survivors(aligned, state):
                kept += 1
                self.report.add(header)
                yield header, bytes(aligned[place + HEADER.size : place + HEADER.size + header.length])
        if state is not None and kept < state.headers:
            what = f"{state.headers - kept} of the newest {state.headers} records are not whole"
            self.report.damage.append(f"{self.report.path}: {what}")


def _time(unix_ns: int) -> str:
    seconds, nanoseconds = divmod(unix_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09}Z"


def _copy_at(block: memoryview, place: int, number: int) -> tuple[Header, bytes] | None:
    """The whole record of this number at an offset, in bytes that nobody writes over."""
    header = whole_at(block, place)
    if header is None or header.number != number & NUMBER_MASK:
        return None
    payload = bytes(block[place + HEADER.size : place + HEADER.size + header.length])
    return (header, payload) if checksum(FIELDS.pack(*header[1:]), payload) == header.checksum else None


def _locker(fd: int) -> int | None:
    """The process that holds the lock, by the kernel's list: asking for it could refuse an agent that starts.

    The kernel names one of another PID namespace 0; the file itself knows better, where it is of our version.
    """
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii") as locks:  # proc_locks(5): … FLOCK ADVISORY WRITE pid device …
            return next((int(entry[4]) for entry in map(str.split, locks) if device in entry), None)
    except OSError:
        return None
