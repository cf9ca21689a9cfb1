"""Cycles of an agent in this process, on this host or a written large one, for tests/bench/scaling.py.

A cycle is collected, serialized and pushed, as in `hostprobe run`; no sink takes it from the ring. Times are of CPU,
medians of turns.
"""

from __future__ import annotations

import copy
import gc
import itertools
import os
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cycle import in_turns

from agent import config
from agent.assembly import Agent
from agent.delivery import Drop
from agent.frame import Frame
from agent.logs import Log
from agent.pool import BUFFER_KEEP_BYTES, Buffer, Pool, buffer_pool
from agent.table import TableSpec
from tests.engines.process import ENGINES
from tests.hosts import write_large_host

SMALL = {"cpus": 2, "disks": 1, "interfaces": 2}
LARGE = {"cpus": 256, "disks": 64, "interfaces": 300}
SOCKETLESS = {"sockets": {"enabled": False}}
UNLIMITED = {name: {"row_limit": 1024} for name in ("disk_io", "filesystem", "network")}
MEASURED_CYCLES = 10
WARM_UP_CYCLES = 5


class Cycles:
    """An agent that is driven by hand.

    Args:
        root: "/", or a folder that holds proc and sys.
        probes: settings of the configuration's probes.
    """

    def __init__(self, root: str, template: str = "standard", probes: Mapping[str, Mapping[str, Any]] = {}) -> None:
        main = {"type": "file", "path": os.devnull, "buffer": {"size": "16MiB"}}
        tree = {"agent": {"root": root}, "probes": dict(probes), "sinks": {"main": main}}
        self.agent = Agent(config.load(template=template, overrides={"--bench": tree}, environment={}), Log("error"))
        self.agent.exporter.open()
        (self._worker,) = self.agent.exporter.workers
        self._ticks = itertools.count()
        for _ in range(WARM_UP_CYCLES):
            self.run()
        assert not self.agent.meter.probe_failures, f"a probe fails on {root}"
        self.tidy()

    def run(self) -> None:
        """One cycle."""
        self.agent.cycle.run(next(self._ticks))

    def tidy(self) -> None:
        """Makes room in the ring."""
        self._worker.ring.drop_held(Drop.FULL)

    def frame_bytes(self) -> int:
        """Size of the frame as JSON."""
        buffer = Buffer()
        self.agent.serializer("json").write(self.agent.cycle.frame, buffer)
        return len(buffer.data)

    def close(self) -> None:
        self.agent.exporter.close(0)
        self.agent.close()


def cpu_us(works: Mapping[str, Cycles], rounds: int) -> dict[str, float]:
    """CPU microseconds of a cycle of each, in turns."""

    def tidy() -> None:
        for work in works.values():
            work.tidy()

    figures = in_turns({name: work.run for name, work in works.items()}, rounds, MEASURED_CYCLES, tidy)
    return {name: cpu for name, (_, cpu) in figures.items()}


def growth(axis: str, counts: Sequence[int], rounds: int) -> list[dict[str, float]]:
    """What a cycle of the standard template without sockets takes on a small host that has more of one sort."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = {}
        for count in counts:
            root = Path(folder, str(count))
            write_large_host(root, **(SMALL | {axis: count}), sockets=10)
            hosts[str(count)] = Cycles(str(root), probes=SOCKETLESS | UNLIMITED)
        figures = cpu_us(hosts, rounds)
        rows = [
            {"count": count, "cpu_us": figures[str(count)], "frame_bytes": hosts[str(count)].frame_bytes()}
            for count in counts
        ]
        for host in hosts.values():
            host.close()
    return rows


def templates(rounds: int) -> list[dict[str, Any]]:
    """What a cycle takes by template, here and on the large host."""
    kinds: dict[str, tuple[str, Mapping[str, Mapping[str, Any]]]] = {
        "minimal": ("minimal", {}),
        "standard, sockets off": ("standard", SOCKETLESS),
        "standard": ("standard", {}),
        "full": ("full", {}),
    }
    rows: dict[str, dict[str, Any]] = {name: {"template": name} for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        write_large_host(Path(folder), **LARGE)
        for place, root in (("here", "/"), ("large", folder)):
            works = {name: Cycles(root, template, probes) for name, (template, probes) in kinds.items()}
            figures = cpu_us(works, rounds)
            for name, work in works.items():
                rows[name][place] = {"cpu_us": figures[name], "frame_bytes": work.frame_bytes()}
                work.close()
    return list(rows.values())


class Unkept(Frame):
    """Without the arrays that take turns: each cycle makes those of its tables."""

    def begin(self, time_unix_ns: int, monotonic_ns: int) -> None:
        super().begin(time_unix_ns, monotonic_ns)
        self.arena.now.lay_out(self.arena._rows)


def pools(rounds: int) -> list[dict[str, Any]]:
    """What pools and presized tables and buffers change on the large host: standard, sockets off, no row limits.

    Presized is made for what the host has. What is not starts with a row a table and the least buffer, and grows once.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_large_host(Path(folder), **LARGE)
        kinds = [(True, True), (True, False), (False, True)]
        works: dict[str, Cycles] = {}
        renewals: dict[str, Callable[[], None]] = {}
        for has_pools, is_presized in kinds:
            name = f"{has_pools} {is_presized}"
            works[name] = work = Cycles(folder, probes=SOCKETLESS | UNLIMITED)
            renewals[name] = partial(renew, work, has_pools, is_presized, *needs(work))
            renewals[name]()
            for _ in range(WARM_UP_CYCLES):
                work.run()
        figures = cpu_us(works, rounds)
        for has_pools, is_presized in kinds:
            name = f"{has_pools} {is_presized}"
            work = works[name]
            work.tidy()
            row = {"pools": has_pools, "presized": is_presized, "cpu_us": figures[name]}
            rows.append(row | {"peak_bytes": peak_bytes(work.run)} | allocations(work.run))
        # The first cycle of a new frame, whose files are open already.
        firsts = in_turns(
            {name: lambda name=name: (renewals[name](), works[name].run()) for name in works},
            rounds, 3, lambda: [work.tidy() for work in works.values()],
        )  # fmt: skip
        for row in rows:
            row["first_us"] = firsts[f"{row['pools']} {row['presized']}"][1]
        for work in works.values():
            work.close()
    return rows


def needs(work: Cycles) -> tuple[dict[str, int], int]:
    """The rows of each of its tables, and the bytes of its frame."""
    return {name: table.count for name, table in work.agent.cycle.frame.tables.items()}, work.frame_bytes()


def renew(work: Cycles, has_pools: bool, is_presized: bool, rows: Mapping[str, int], size: int) -> None:
    """Gives it a new frame and new buffers."""
    cycle = work.agent.cycle
    specs = [sized(spec, rows.get(spec.name, 1) if is_presized else 1) for spec in work.agent._what.specs]
    cycle.frame = Frame(specs) if has_pools else Unkept(specs)
    cycle.buffers = Pool(partial(Buffer, size + size // 8), BUFFER_KEEP_BYTES) if is_presized else buffer_pool()
    if not has_pools:
        cycle.buffers._keep = -1


def sized(spec: TableSpec, rows: int) -> TableSpec:
    """The same table, made for so many rows and kept whatever it grew to."""
    changed = copy.copy(spec)
    changed.rows = rows if spec.labels else 1
    changed.keep_rows = 1 << 20
    return changed


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that Python and NumPy have for a cycle, above what they had before it."""
    gc.collect()
    tracemalloc.start()
    for _ in range(3):  # what is kept from one cycle to the next has been replaced
        work()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    work()
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return most


def allocations(work: Callable[[], object]) -> dict[str, float | None]:
    """Allocations of a cycle and their bytes, Python's small ones included, as memray counts them; None without it."""
    sys.path.append(str(ENGINES / "memray"))
    try:
        import memray
    except ImportError:
        return {"allocations": None, "allocated_bytes": None}
    finally:
        sys.path.pop()
    freeing = {memray.AllocatorType.FREE, memray.AllocatorType.MUNMAP, memray.AllocatorType.PYMALLOC_FREE}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "records")
        with memray.Tracker(path, trace_python_allocators=True):
            for _ in range(MEASURED_CYCLES):
                work()
        count = size = 0
        with memray.FileReader(path) as records:
            for record in records.get_allocation_records():
                if record.allocator not in freeing:
                    count += record.n_allocations
                    size += record.size
    return {"allocations": count / MEASURED_CYCLES, "allocated_bytes": size / MEASURED_CYCLES}
