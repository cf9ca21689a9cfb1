"""A program that is measured beside others: run as a process of its own, and what it took for a while."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Protocol

import psutil
import urllib3

from tests.engines.process import Engine, answers

CPUCLOCK_SCHED = 2  # linux/posix-timers.h: what clock_getcpuclockid(3) makes a clock of


class Output(Protocol):
    """Where a program's figures go."""

    def is_there(self) -> bool:
        """Whether there are any yet."""
        ...

    def pass_time(self, seconds: float) -> tuple[float, float]:
        """Lets some time pass; the cycles that it had, and the bytes that came."""
        ...


class Written:
    """Figures that are appended to files.

    Args:
        folder, pattern: the files, by a shell pattern.
        once_a_cycle: what stands in the counted files once for every cycle.
        counted: a pattern of those files; the same unless told otherwise.
    """

    def __init__(self, folder: Path, pattern: str, once_a_cycle: bytes, counted: str = "") -> None:
        self._folder = folder
        self._pattern = pattern
        self._once_a_cycle = once_a_cycle
        self._counted = counted or pattern

    def is_there(self) -> bool:
        return self._progress()[0] > 0

    def pass_time(self, seconds: float) -> tuple[float, float]:
        cycles, size = self._progress()
        time.sleep(seconds)
        cycles_then, size_then = self._progress()
        return cycles_then - cycles, size_then - size

    def _progress(self) -> tuple[int, int]:
        counted = (path.read_bytes().count(self._once_a_cycle) for path in self._folder.glob(self._counted))
        return sum(counted), sum(path.stat().st_size for path in self._folder.glob(self._pattern) if path.is_file())


class Replaced:
    """A file that is written anew at each cycle; the cycles are counted by the clock."""

    def __init__(self, path: Path, interval_seconds: float) -> None:
        self._path = path
        self._interval_seconds = interval_seconds

    def is_there(self) -> bool:
        return self._path.is_file() and self._path.stat().st_size > 0

    def pass_time(self, seconds: float) -> tuple[float, float]:
        time.sleep(seconds)
        cycles = seconds / self._interval_seconds
        return cycles, cycles * self._path.stat().st_size


class Scraped:
    """What answers on /metrics, asked once an interval over a kept connection; a scrape is a cycle."""

    def __init__(self, port: int, interval_seconds: float) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._interval_seconds = interval_seconds
        self._pool = urllib3.PoolManager()

    def is_there(self) -> bool:
        return answers(self._url)

    def pass_time(self, seconds: float) -> tuple[float, float]:
        scrapes, size = round(seconds / self._interval_seconds), 0
        due = time.monotonic()
        for _ in range(scrapes):
            size += len(self._pool.request("GET", self._url, headers={"Accept-Encoding": "identity"}).data)
            due += self._interval_seconds
            time.sleep(max(due - time.monotonic(), 0))
        return scrapes, size


class Program(Engine):
    """A command, whose standard output is NAME.log in its folder; ready when its first figures are there."""

    stop_seconds = 5.0

    def __init__(
        self,
        folder: Path,
        name: str,
        command: Sequence[str],
        output: Output,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        super().__init__(folder)
        self.output = output
        self._command = command
        self._variables = variables or {}

    def command(self) -> Sequence[str]:
        return self._command

    def environment(self) -> dict[str, str]:
        """Nothing of it is written to this user's home."""
        return {**super().environment(), "HOME": str(self.folder), "TMPDIR": str(self.folder), **self._variables}

    def is_ready(self) -> bool:
        return self.output.is_there()


@dataclass(frozen=True)
class Peer:
    """Who is measured.

    Attributes:
        name: in the tables.
        is_scraped: its figures are fetched; else they are written. Compared with hostprobe doing the same.
        program: makes it, in a folder that is its own.
    """

    name: str
    is_scraped: bool
    program: Callable[[Path], Program]


@dataclass(frozen=True)
class Cost:
    """What a program took: CPU and bytes are of one cycle, memory is that of all its processes in bytes."""

    cpu_us: float
    resident_bytes: float
    proportional_bytes: float
    private_bytes: float
    output_bytes: float


def median(costs: Sequence[Cost]) -> Cost:
    """Each figure's median."""
    return Cost(*(statistics.median(figures) for figures in zip(*map(astuple, costs), strict=True)))


def turn(peer: Peer, folder: Path, interval_seconds: float, intervals: int, warm_up_seconds: float) -> Cost:
    """Starts a program, lets it warm up, measures it for some intervals, and ends it."""
    with peer.program(folder) as program:
        assert program.process is not None
        process = psutil.Process(program.process.pid)
        program.output.pass_time(warm_up_seconds)
        # Many collect on the second: half an interval later nobody is at work when the clocks are read.
        time.sleep(-(time.time() + interval_seconds / 2) % interval_seconds)
        before = cpu_nanoseconds(process)
        cycles, size = program.output.pass_time(intervals * interval_seconds)
        cpu_us = (cpu_nanoseconds(process) - before) / 1000
        assert cycles > 0, f"{peer.name} wrote nothing in {intervals} intervals: {program.log_text()[-1000:]}"
        return Cost(cpu_us / cycles, *memory_bytes(process), size / cycles)


def cpu_nanoseconds(process: psutil.Process) -> int:
    """User and system time of a process and of all that it has started; of those that have ended, in clock ticks.

    The process's own clock counts threads that have ended, which its tasks' schedstat don't, and isn't rounded to ticks
    of 10 ms, of which a cycle takes a tenth.
    """
    ended = process.cpu_times()
    living = sum(time.clock_gettime_ns(~one.pid << 3 | CPUCLOCK_SCHED) for one in family(process))
    return living + int((ended.children_user + ended.children_system) * 1e9)


def memory_bytes(process: psutil.Process) -> tuple[int, int, int]:
    """Resident, proportional and private memory of a process and of all that it has started."""
    resident = proportional = private = 0
    for one in family(process):
        rollup = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()[1:]
        kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup}
        resident += kib["Rss"] * 1024
        proportional += kib["Pss"] * 1024
        private += (kib["Private_Clean"] + kib["Private_Dirty"]) * 1024
    return resident, proportional, private


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it has started and that still run."""
    return [process, *process.children(recursive=True)]
