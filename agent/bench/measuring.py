"""The bench itself: what a cycle costs on this host, in this run, whole and in parts, beside the kernel's floor.

Both sides of a ratio run in turns, in one process. What is timed is not looked at otherwise: blocks, the collector
and memray have passes of their own, so that no figure has another one's cost in it.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import repeat
from typing import Any, NamedTuple

from agent import __version__
from agent.assembly import Agent
from agent.bench.allocations import Allocations, load_memray, tallied
from agent.bench.floor import RawReader, Sources, first_cycle, together
from agent.bench.parts import Cycles, Part, Reuse, without_peers
from agent.bench.report import ProfileLine, Report, Row
from agent.bench.report import Sources as SourceCounts
from agent.config import Config
from agent.errors import UsageError
from agent.logs import Log
from agent.progress import Bar

WARM_UP_CYCLES = 500  # until Python's free lists have filled up: what they hold counts as blocks
WARM_UP_SECONDS = 2.0  # at most, on a host where a cycle is dear
TURN_CYCLES = 20
LEAST_SHARE_RATIO = 0.05
WHOLE = "cycle"


class Times:
    """How long each of some works took, in ns."""

    def __init__(self) -> None:
        self._taken: dict[str, list[int]] = {}

    def time(self, name: str, work: Callable[[], object]) -> None:
        """Does a work once, and takes its time."""
        start = time.perf_counter_ns()
        work()
        end = time.perf_counter_ns()
        self._taken.setdefault(name, []).append(end - start)

    def quantile_microseconds(self, name: str, quantile: float) -> float | None:
        """None for a work that was never done."""
        taken = sorted(self._taken.get(name, ()))
        return taken[round(quantile * (len(taken) - 1))] / 1000 if taken else None


class Steadiness(NamedTuple):
    """What many repetitions leave behind, and how often the collector ran meanwhile; its longest run in µs."""

    net_blocks: int
    collector_runs: int
    collector_pause_microseconds: float
    reallocations: int


class Collections:
    """The runs of the cyclic collector while it is entered.

    Attributes:
        runs: how many.
        longest_ns: the longest of them.
    """

    def __init__(self) -> None:
        self.runs = 0
        self.longest_ns = 0
        self._start_ns = 0

    def __enter__(self) -> Collections:
        gc.callbacks.append(self._look)
        return self

    def _look(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._start_ns = time.perf_counter_ns()
        else:
            self.runs += 1
            self.longest_ns = max(self.longest_ns, time.perf_counter_ns() - self._start_ns)

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._look)


def steadiness(
    work: Callable[[], object], tidy: Callable[[], object], pools: Sequence[Reuse], repetitions: int
) -> Steadiness:
    """Repeats a work that has been warmed up.

    Args:
        tidy: called behind each repetition.
        pools: whose arrays and buffers it uses.
    """
    reallocations = sum(pool.made + pool.regrown for pool in pools)
    with Collections() as collections:
        blocks = sys.getallocatedblocks()
        for _ in repeat(None, repetitions):
            work()
            tidy()
        blocks = sys.getallocatedblocks() - blocks
    return Steadiness(
        blocks,
        collections.runs,
        collections.longest_ns / 1000,
        sum(pool.made + pool.regrown for pool in pools) - reallocations,
    )


def measure(
    config: Config,
    cycles: int,
    *,
    all_formats: bool = False,
    profile: bool = False,
    complain: Callable[[str], object] = lambda _: None,
) -> Report:
    """Runs the bench.

    Args:
        cycles: repetitions of everything but what memray looks at.
        all_formats: whether to write every format, or JSON and those of the sinks.
        profile: whether to say which lines allocate the most.
        complain: told why there will be no allocations.

    Raises:
        UsageError: the agent can't be built, a format needs a package that isn't there, or `profile` needs memray.
    """
    memray = _memray(profile, complain)
    with ExitStack() as opened:
        agent = Agent(without_peers(config), Log("warning", config.log.format))
        opened.callback(agent.close)
        opened.callback(agent.exporter.close, 0.0)
        agent.exporter.open()
        sources = first_cycle(agent)
        whole = Cycles(agent, all_formats)
        opened.callback(whole.tidy)
        return _Bench(whole, sources, cycles, opened).report(config, memray, profile)


class _Bench:
    """The passes over one agent's cycle."""

    def __init__(self, cycle: Cycles, sources: dict[str, Sources], cycles: int, opened: ExitStack) -> None:
        self._cycle = cycle
        self._count = cycles
        self._turns = -(-cycles // TURN_CYCLES)
        self._floors = {f"probe {name}": RawReader(each) for name, each in sources.items() if any(each)}
        self._whole_floor = RawReader(together(sources.values()))
        opened.callback(self._whole_floor.close)
        for reader in self._floors.values():
            opened.callback(reader.close)
        self._times, self._floor_times = Times(), Times()
        self._whole = Part(WHOLE, cycle.run, cycle.run, cycle.pools)
        self._steadiness: dict[str, Steadiness] = {}
        self._allocations: dict[str, Allocations] = {}
        self._profile: list[ProfileLine] = []

    def report(self, config: Config, memray: Any, profile: bool) -> Report:
        parts = [*self._cycle.parts, self._whole]
        with Bar(2 * self._turns + len(parts) + 2 * (memray is not None)) as bar:
            self._warm_up()
            self._in_turns(bar)
            self._repeat(self._whole, bar)
            if memray is not None:
                self._tally(memray, bar)
            for part in self._cycle.parts:  # last: the probes have frames of their own here
                self._repeat(part, bar)
        sources = self._whole_floor.sources
        return Report(
            schema="hostprobe-bench/1",
            hostprobe=__version__,
            time=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            kernel=platform.release(),
            cpu_count=os.cpu_count() or 1,
            cpu_model=_cpu_model(),
            python=platform.python_version(),
            memray=None if memray is None else str(memray.__version__),
            configuration=config.where,
            template=config.template,
            cycles=self._count,
            floor=SourceCounts(files=len(sources.files), places=len(sources.places), dumps=len(sources.dumps)),
            rows=[self._row(part) for part in parts],
            profile=self._profile if profile else None,
        )

    def _warm_up(self) -> None:
        deadline = time.monotonic() + WARM_UP_SECONDS
        for done in range(WARM_UP_CYCLES):
            self._cycle.run()
            self._cycle.tidy()
            if done >= TURN_CYCLES and time.monotonic() > deadline:
                return

    def _in_turns(self, bar: Bar) -> None:
        """Takes the times: some cycles in parts and as many readings of their sources, then the same of whole ones."""
        cycle, times, floor_times = self._cycle, self._times, self._floor_times
        floors = [(name, reader.read) for name, reader in self._floors.items()]
        whole_floor = self._whole_floor
        left = self._count
        while left:
            turn = min(TURN_CYCLES, left)
            left -= turn
            for _ in range(turn):
                for part in cycle.parts:
                    times.time(part.name, part.work)
                cycle.tidy()
            for _ in range(turn):
                for name, read_part in floors:
                    floor_times.time(name, read_part)
            bar.advance("parts of a cycle")
            for _ in range(turn):
                times.time(WHOLE, cycle.run)
                cycle.tidy()
            for _ in range(turn if any(whole_floor.sources) else 0):
                floor_times.time(WHOLE, whole_floor.read)
            bar.advance("whole cycles")

    def _repeat(self, part: Part, bar: Bar) -> None:
        """Finds out what many repetitions of a part leave behind."""
        bar.advance(f"steady state of {part.name}")
        if part.alone is not None:
            for _ in range(TURN_CYCLES):
                part.alone()
                self._cycle.tidy()
            self._steadiness[part.name] = steadiness(part.alone, self._cycle.tidy, part.pools, self._count)

    def _tally(self, memray: Any, bar: Bar) -> None:
        bar.advance("allocations of the parts")
        parts = self._cycle.parts
        tally = tallied(memray, parts, self._cycle.tidy)
        self._allocations |= {part.name: tally.allocations(index) for index, part in enumerate(parts)}
        bar.advance("allocations of whole cycles")
        tally = tallied(memray, [self._whole], self._cycle.tidy)
        self._allocations[WHOLE] = tally.allocations(0)
        self._profile = [
            ProfileLine(
                place=line.place,
                function=line.function,
                share_ratio=round(line.share_ratio, 4),
                allocations=round(line.allocations, 1),
            )
            for line in tally.lines(0, LEAST_SHARE_RATIO)
        ]

    def _row(self, part: Part) -> Row:
        name = part.name
        failure = self._cycle.failures.get(name.removeprefix("probe "))
        if failure is not None:
            return Row(part=name, failure=failure)
        row = Row(
            part=name,
            median_microseconds=self._times.quantile_microseconds(name, 0.5),
            p99_microseconds=self._times.quantile_microseconds(name, 0.99),
            floor_microseconds=self._floor_times.quantile_microseconds(name, 0.5),
            payload_bytes=None if part.payload is None else len(part.payload()),
        )
        if row.median_microseconds is not None and row.floor_microseconds:
            row.floor_ratio = round(row.median_microseconds / row.floor_microseconds, 3)
        if name in self._allocations:
            row.allocations, row.allocated_bytes = self._allocations[name]
        if name in self._steadiness:
            steady = self._steadiness[name]
            row.net_blocks, row.collector_runs, row.collector_pause_microseconds, row.reallocations = steady
        return row


def _memray(profile: bool, complain: Callable[[str], object]) -> Any:
    """memray, or None where it isn't installed and can be done without."""
    try:
        return load_memray()
    except UsageError as error:
        if profile:
            raise
        complain(str(error))
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
