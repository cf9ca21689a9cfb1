"""Reads frames as JSON lines and says what is missing, repeated or out of order, in constant memory.

Memory is bounded by one line of `LINE_BYTES_MAX` (twice, while it is put together), `BUFFER_BYTES` of a file, and
for each instance of the agent 300 bytes, its part of the report, and `GAPS_MAX` ranges of missing numbers.
"""

from __future__ import annotations

import gzip
import io
import os
import select
import stat
import sys
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, BinaryIO, Literal, cast

import msgspec

from agent.errors import UsageError
from agent.progress import REDRAW_SECONDS, draw, has_terminal

LINE_BYTES_MAX = 64 << 20
BUFFER_BYTES = 256 << 10
GAPS_MAX = 10_000
RANGES_SHOWN = 10
REASON_LENGTH_MAX = 200
CLOCK_STEP_NS = 100_000_000  # the clocks' own noise stays far below this; whoever sets a clock moves it further
STDIN = "-"
COUNTS = ("frames", "missing", "repeated", "reordered", "degraded", "interleaved", "clock_steps")


class Header(msgspec.Struct, gc=False):
    """What this module needs of a line; the decoder checks the syntax of all the rest, and skips it."""

    schema: Literal["hostprobe/1"]
    host: Annotated[str, msgspec.Meta(max_length=1024)]
    instance: Annotated[str, msgspec.Meta(max_length=1024)]
    sequence: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    time_unix_ns: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    interval_seconds: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    degraded: object = None


class Gaps(msgspec.Struct, gc=False):
    """Ranges of sequence numbers that have not come yet, apart from each other, in ascending order.

    Attributes:
        frames: how many numbers all ranges hold, forgotten ones too.
        forgotten: how many ranges are counted and no longer known, because there were more than `GAPS_MAX`.
    """

    firsts: list[int] = []
    lasts: list[int] = []
    frames: int = 0
    forgotten: int = 0

    def add(self, first: int, last: int) -> Gaps:
        """Adds a range that meets no other, unless it is empty; where it is then: here, or in place of `NO_GAPS`."""
        if first > last:
            return self
        gaps = Gaps() if self is NO_GAPS else self
        index = bisect_right(gaps.firsts, first)
        gaps._replace(slice(index, index), [(first, last)])
        gaps.frames += last - first + 1
        return gaps

    def fill(self, number: int) -> bool:
        """Takes a number out of its range, which shrinks, splits or vanishes; False where none has it."""
        index = bisect_right(self.firsts, number) - 1
        if index < 0 or number > self.lasts[index]:
            return False
        parts = [(self.firsts[index], number - 1), (number + 1, self.lasts[index])]
        self._replace(slice(index, index + 1), [part for part in parts if part[0] <= part[1]])
        self.frames -= 1
        return True

    def _replace(self, where: slice, ranges: list[tuple[int, int]]) -> None:
        self.firsts[where] = [first for first, _ in ranges]
        self.lasts[where] = [last for _, last in ranges]
        if len(self.firsts) > GAPS_MAX:  # a frame for the oldest is the least likely to come; the report shows some
            del self.firsts[RANGES_SHOWN], self.lasts[RANGES_SHOWN]
            self.forgotten += 1


NO_GAPS = Gaps()  # of all instances without any: an agent that starts over and over makes many of a few frames


class Instance(msgspec.Struct, gc=False):
    """What came from one start of an agent.

    Attributes:
        first: the lowest sequence number that came; nothing before it is called missing, for files are rotated.
        last: the highest one; `wall_ns` is its stamp.
        frames: all that came, repeated ones too.
        repeated: frames whose number had come before.
        reordered: frames that came, for the first time, after a higher number.
        interleaved: frames that came after a later instance of the same host had begun.
        largest_step_ns: of the wall clock against the monotonic one; negative is back in time.
    """

    name: str
    first: int
    last: int
    gaps: Gaps = msgspec.field(default_factory=lambda: NO_GAPS)
    wall_ns: int | None = None
    frames: int = 0
    repeated: int = 0
    reordered: int = 0
    degraded: int = 0
    interleaved: int = 0
    clock_steps: int = 0
    largest_step_ns: int = 0

    @property
    def missing(self) -> int:
        return self.gaps.frames

    def count(self, header: Header) -> None:
        """Counts a frame."""
        self.frames += 1
        self.degraded += bool(header.degraded)
        ahead = header.sequence - self.last
        if ahead <= 0:
            self._count_late(header.sequence)
            return
        if ahead == 1:
            self._compare_clocks(header)
        else:
            self.gaps = self.gaps.add(self.last + 1, header.sequence - 1)
        self.last = header.sequence
        self.wall_ns = header.time_unix_ns

    def _count_late(self, sequence: int) -> None:
        if sequence < self.first:
            self.gaps = self.gaps.add(sequence + 1, self.first - 1)
            self.first = sequence
        elif not self.gaps.fill(sequence):
            self.repeated += 1
            return
        self.reordered += 1

    def _compare_clocks(self, header: Header) -> None:
        """The interval is monotonic, so what the wall clock says more or less was a step of it."""
        if self.wall_ns is not None and header.interval_seconds is not None:
            step_ns = header.time_unix_ns - self.wall_ns - round(header.interval_seconds * 1e9)
            if abs(step_ns) > CLOCK_STEP_NS:
                self.clock_steps += 1
                self.largest_step_ns = max(self.largest_step_ns, step_ns, key=abs)

    def document(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "instance": self.name,
            "first_sequence": self.first,
            "last_sequence": self.last,
            "not_seen_before_first": self.first - 1,
            **{name: getattr(self, name) for name in COUNTS},
            "missing_ranges": len(self.gaps.firsts) + self.gaps.forgotten,
            "first_missing_ranges": list(zip(self.gaps.firsts, self.gaps.lasts, strict=True))[:RANGES_SHOWN],
            "largest_clock_step_seconds": self.largest_step_ns / 1e9 if self.clock_steps else None,
            "exact": self.gaps.forgotten == 0,
        }

    def lines(self) -> Iterator[str]:
        """The figures, for people; rare things only where there is something to say."""
        yield f"  sequence     {self.first} to {self.last}"
        if self.first > 1:
            yield f"  not seen     {self.first - 1} before the first; they are not called missing"
        yield f"  frames       {self.frames}\n  missing      {self.missing}{self._ranges()}"
        yield f"  repeated     {self.repeated}\n  reordered    {self.reordered}"
        largest = f", the largest {self.largest_step_ns / 1e9:+.3f} s" if self.clock_steps else ""
        yield f"  clock steps  {self.clock_steps}{largest}"
        if self.interleaved:
            yield f"  interleaved  {self.interleaved} came after a later instance had begun"
        if self.degraded:
            yield f"  degraded     {self.degraded}"
        if self.gaps.forgotten:
            yield f"  not exact    of more than {GAPS_MAX} missing ranges, {self.gaps.forgotten} were forgotten;"
            yield "               what came late for them counts as repeated, and stays missing"

    def _ranges(self) -> str:
        ranges = zip(self.gaps.firsts[:RANGES_SHOWN], self.gaps.lasts, strict=False)
        text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
        more = len(self.gaps.firsts) + self.gaps.forgotten - RANGES_SHOWN
        return (f": {text}" if text else "") + (f" and {more} more ranges" if more > 0 else "")


class Verification:
    """Counts the frames of any number of streams, as if they were one.

    Attributes:
        hosts: the instances of each, by name; all in the order in which they came first.
        lines: how many were read, empty ones too.
        not_frames: lines that no frame could be read from; `first_not_frame` says where and why.
        cut: streams that broke off with an error, and where, and the error.
    """

    def __init__(self) -> None:
        self.hosts: dict[str, dict[str, Instance]] = {}
        self.lines = 0
        self.not_frames = 0
        self.first_not_frame: str | None = None
        self.cut: list[str] = []
        self._latest: dict[str, Instance] = {}
        self._decode = msgspec.json.Decoder(Header).decode

    def read(self, stream: BinaryIO, name: str) -> None:
        """Counts the lines of a stream to its end."""
        number = offset = 0
        try:
            while line := stream.readline(LINE_BYTES_MAX + 1):
                self.lines += 1
                number += 1
                reason = self._count(line)
                if reason is not None:
                    self.not_frames += 1
                    self.first_not_frame = self.first_not_frame or f"{name}:{number}, byte {offset}: {reason}"
                offset += len(line)
                is_long = len(line) > LINE_BYTES_MAX
                while is_long and line and not line.endswith(b"\n"):  # the rest of it
                    line = stream.readline(BUFFER_BYTES)
                    offset += len(line)
        except (OSError, EOFError, zlib.error) as error:  # the last two: a torn or damaged gzip file
            self.cut.append(f"{name}, byte {offset}: {shown(_why(error))}")

    def _count(self, line: bytes) -> str | None:
        """Counts a line's frame; where there is none, says why."""
        if len(line) > LINE_BYTES_MAX:
            return f"a line of more than {LINE_BYTES_MAX} bytes"
        try:
            header = self._decode(line)
            if not line.isascii():
                line.decode()  # the decoder doesn't look into the strings that it skips
        except (ValueError, RecursionError) as error:
            if line.isspace():
                return None
            torn = "" if line.endswith(b"\n") else "no line feed at the end: "
            return torn + shown(str(error)[:REASON_LENGTH_MAX])
        instances = self.hosts.setdefault(header.host, {})
        instance = instances.get(header.instance)
        if instance is None:
            instance = Instance(header.instance, header.sequence, header.sequence - 1)
            instances[header.instance] = self._latest[header.host] = instance
        elif instance is not self._latest[header.host]:
            instance.interleaved += 1
        instance.count(header)
        return None

    @property
    def status(self) -> int:
        """1 where a frame is missing, or can't be known not to be."""
        return int(bool(self.cut or self.totals()["missing"]))

    def totals(self) -> dict[str, int]:
        """Sums over all instances, and the lines that gave no frame."""
        all_instances = [instance for instances in self.hosts.values() for instance in instances.values()]
        sums = {name: sum(getattr(instance, name) for instance in all_instances) for name in COUNTS}
        return {"hosts": len(self.hosts), "instances": len(all_instances), **sums, "not_frames": self.not_frames}

    def json(self) -> bytes:
        """The report as one JSON document, put together in place: its objects would be several times its size."""
        hosts = [{"host": host, "instances": ()} for host in self.hosts]
        end = {"total": self.totals(), "first_not_frame": self.first_not_frame, "not_read_to_the_end": self.cut}
        *starts, rest = _json({"hosts": hosts, **end}).split(b'"instances": []')  # no text in it has bare quotes
        report = io.BytesIO()
        for start, instances in zip(starts, self.hosts.values(), strict=True):
            separator = start + b'"instances": ['
            for instance in instances.values():
                report.write(separator + (b"\n" + _json(instance.document())).replace(b"\n", b"\n" + b" " * 8))
                separator = b","
            report.write(b"\n      ]")
        report.write(rest)
        return report.getvalue()

    def text(self) -> bytes:
        """The report for people: a block for each instance, then the total in one line."""
        report = io.BytesIO()
        for host, instances in self.hosts.items():
            for number, instance in enumerate(instances.values(), 1):
                name = f"host {shown(host)}, instance {shown(instance.name)} ({number} of {len(instances)})"
                report.write("\n".join([name, *instance.lines(), "\n"]).encode())
        rest = [f"not read to the end: {where}\n" for where in self.cut]
        if self.first_not_frame is not None:
            rest.insert(0, f"not frames: {self.not_frames}, the first: {self.first_not_frame}\n")
        totals = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self.totals().items())
        report.write("\n".join([*rest, f"total: {totals}"]).encode())
        return report.getvalue()


class Progress:
    """One line on a terminal, drawn over again as bytes come in."""

    def __init__(self, verification: Verification, bytes_total: int | None) -> None:
        self._verification = verification
        self._bytes_total = bytes_total
        self._bytes = 0
        self._start = self._drawn = time.monotonic()

    def advance(self, count: int) -> None:
        """Counts bytes, and draws when it is time."""
        self._bytes += count
        now = time.monotonic()
        if now - self._drawn >= REDRAW_SECONDS:
            self._drawn = now
            draw(self._text(now - self._start))

    def _text(self, seconds: float) -> str:
        rate = self._bytes / seconds
        done = f"{self._bytes / 1e6:.0f} MB, {self._verification.lines} lines, {rate / 1e6:.0f} MB/s"
        if not self._bytes_total:
            return done
        left = max(self._bytes_total - self._bytes, 0)  # a file may grow while it is read
        return f"{100 * self._bytes // (self._bytes + left)} %, {done}, {left / max(rate, 1):.0f} s left"


class _File(io.FileIO):
    """A file that tells of what is read, and waits where whoever shares stdin made it non-blocking."""

    def __init__(self, file: str | int, advance: Callable[[int], None] | None) -> None:
        super().__init__(file, closefd=isinstance(file, str))
        self._advance = advance

    def readinto(self, buffer: Any) -> int:
        while (count := super().readinto(buffer)) is None:
            select.select((self,), (), ())
        if self._advance is not None:
            self._advance(count)
        return count


def verify(paths: Sequence[str]) -> Verification:
    """Reads all files, in their order; `-` is stdin, and names in .gz are unpacked.

    Raises:
        UsageError: a file can't be read; none is read then.
    """
    sizes = [_size(path) for path in paths]
    verification = Verification()
    terminal = has_terminal()
    total = sum(size or 0 for size in sizes) if all(sizes) else None
    advance = Progress(verification, total).advance if terminal else None
    try:
        for path in paths:
            _read(path, verification, advance)
    finally:
        if terminal:
            draw("")
    return verification


def _size(path: str) -> int | None:
    """Bytes of a file that can be read; None where nobody knows. It isn't opened: a FIFO's writer would notice."""
    try:
        if path == STDIN and sys.stdin is None:
            raise OSError(None, "it is closed")
        status = os.stat(0 if path == STDIN else path)
        if stat.S_ISDIR(status.st_mode):
            raise OSError(None, "Is a directory")
        if path != STDIN and not os.access(path, os.R_OK):
            raise OSError(None, "Permission denied")
    except (OSError, ValueError) as error:  # the latter: a NUL in the name
        raise UsageError(f"{shown(path)}: {_why(error)}", "a file that can be read") from None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _read(path: str, verification: Verification, advance: Callable[[int], None] | None) -> None:
    name = "stdin" if path == STDIN else shown(path)
    try:
        file = _File(0 if path == STDIN else path, advance)
    except OSError as error:  # it was there a moment ago
        verification.cut.append(f"{name}: {_why(error)}")
        return
    with io.BufferedReader(file, BUFFER_BYTES) as buffered:
        # Its own readline gives all that stands before the damage in a torn file; a reader around it wouldn't.
        stream = gzip.GzipFile(fileobj=buffered) if path.endswith(".gz") else buffered
        verification.read(cast(BinaryIO, stream), name)


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value))


def shown(text: str) -> str:
    """Text from outside, without what a terminal would take for a command."""
    return text if text and text.isprintable() else ascii(text)


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
