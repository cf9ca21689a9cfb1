"""What a cycle costs: against the same sources read raw, and against psutil with json.dumps.

    python tests/bench/cycle.py [--cycles N] [--template NAME] [--changing]

Both sides of a ratio run in turns in one process; figures are medians of the turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from agent import config  # noqa: E402
from agent.assembly import Agent  # noqa: E402
from agent.bench.floor import RawReader, first_cycle, together  # noqa: E402
from agent.delivery import Drop  # noqa: E402
from agent.frame import Frame  # noqa: E402
from agent.logs import Log  # noqa: E402
from probes.pressure import PressureProbe  # noqa: E402
from probes.procfs import KeyedText  # noqa: E402
from probes.rows import RowReader  # noqa: E402

Work = Callable[[], object]


def by_psutil(process: psutil.Process) -> bytes:
    """The same families as psutil's users collect them."""
    data = {
        "cpu": psutil.cpu_times()._asdict(),
        "cpu_core": [times._asdict() for times in psutil.cpu_times(percpu=True)],
        "cpu_stats": psutil.cpu_stats()._asdict(),
        "memory": psutil.virtual_memory()._asdict(),
        "swap": psutil.swap_memory()._asdict(),
        "load": psutil.getloadavg(),
        "disk_io": {name: disk._asdict() for name, disk in psutil.disk_io_counters(perdisk=True).items()},
        "filesystem": {
            part.mountpoint: psutil.disk_usage(part.mountpoint)._asdict() for part in psutil.disk_partitions()
        },
        "network": {name: nic._asdict() for name, nic in psutil.net_io_counters(pernic=True).items()},
        "interfaces": {name: nic._asdict() for name, nic in psutil.net_if_stats().items()},
        "sockets": [(c.family, c.type, c.laddr, c.raddr, c.status) for c in psutil.net_connections("inet")],
        "unix": len(psutil.net_connections("unix")),
        "boot_time": psutil.boot_time(),
        "agent": [process.memory_info()._asdict(), process.cpu_times()._asdict(), process.num_ctx_switches()._asdict()],
    }
    return json.dumps(data).encode()


def in_turns(works: dict[str, Work], rounds: int, repeats: int, tidy: Work) -> dict[str, tuple[float, float]]:
    """Median microseconds a call, elapsed and of CPU, each work in its turn; `tidy` is called, untimed, after each."""
    elapsed: dict[str, list[float]] = {name: [] for name in works}
    cpu: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                work()
            elapsed[name].append((time.perf_counter() - start) / repeats * 1e6)
            cpu[name].append((time.process_time() - start_cpu) / repeats * 1e6)
            tidy()
    return {name: (statistics.median(elapsed[name]), statistics.median(cpu[name])) for name in works}


def steady_state(agent: Agent, cycles: int) -> None:
    for tick in range(200):
        agent.cycle.run(tick)
    pools = [agent.cycle.buffers, agent.cycle.frame.arena]
    regrown = sum(pool.regrown + pool.made for pool in pools)
    runs = sum(generation["collections"] for generation in gc.get_stats())
    blocks = sys.getallocatedblocks()
    for tick in range(cycles):
        agent.cycle.run(tick)
    blocks = sys.getallocatedblocks() - blocks
    runs = sum(generation["collections"] for generation in gc.get_stats()) - runs
    regrown = sum(pool.regrown + pool.made for pool in pools) - regrown
    print(
        f"over {cycles} cycles: {blocks} net blocks, {runs} collector runs, {regrown} arrays or buffers made or regrown"
    )


def parse_always() -> None:
    """As on a host where every file says something else in each cycle."""
    collect = PressureProbe.collect

    def without_memory(probe: PressureProbe, frame: Frame) -> None:
        probe._parsed = {}
        collect(probe, frame)

    KeyedText.pick, RowReader.parse = KeyedText._picked, RowReader._parsed
    PressureProbe.collect = without_memory


def apart(agent: Agent) -> None:
    """Each part in a loop of its own, where the CPU's caches hold what it needs."""
    cycle, sources = agent.cycle, first_cycle(agent)
    (worker,) = agent.exporter.workers
    cycle.run(0)
    works: dict[str, Work] = {"derive": cycle.frame.derive, "publish": cycle.publish, "turn": cycle.frame.arena.turn}
    raws: dict[str, Work] = {}
    for scheduled in cycle.probes:
        frame, collect = Frame(scheduled.probe.tables), scheduled.probe.collect
        works[scheduled.meter.name] = lambda frame=frame, collect=collect: (frame.begin(0, 0), collect(frame))
        raws[scheduled.meter.name] = RawReader(together([sources[scheduled.meter.name]])).read
    took, raw = (
        sum(elapsed for elapsed, _ in in_turns(each, 15, 40, lambda: worker.ring.drop_held(Drop.FULL)).values())
        for each in (works, raws)
    )
    print(f"each part in a loop of its own: {took:.1f} µs in all, raw {raw:.1f} µs: {took / raw:.2f}")


def process_figures(template: str) -> None:
    command = [sys.executable, "-m", "agent"]
    once = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([*command, "once", "--wait", "0"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        once.append(time.perf_counter() - start)
    print(f"once --wait 0: {statistics.median(once):.3f} s")
    run = subprocess.run(
        [*command, "run", "--template", template, "--interval", "50ms", "--cycles", "40"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    last = json.loads(run.stdout.splitlines()[-1])["agent"]
    print(f"resident memory of run, template {template}, at its 40th frame: {last['resident_bytes'] / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--template", default="standard")
    parser.add_argument("--changing", action="store_true", help="parse texts also where they are those of before")
    arguments = parser.parse_args()
    if arguments.changing:
        parse_always()
    sinks = {"--bench": {"sinks": {"main": {"type": "file", "path": os.devnull}}}}
    agent = Agent(config.load(template=arguments.template, overrides=sinks, environment={}), Log())
    agent.exporter.open()
    # Its sink is not started yet: a cycle ends with the push.
    raw = RawReader(together(first_cycle(agent).values()))
    agent.cycle.run(0)
    (worker,) = agent.exporter.workers
    process = psutil.Process()
    ticks = iter(range(1, 1 << 60))
    figures = in_turns(
        {
            "raw": raw.read,
            "cycle": lambda: agent.cycle.run(next(ticks)),
            "collect": lambda: agent.cycle.collect(),
            "psutil": lambda: by_psutil(process),
        },
        rounds=15,
        repeats=40,
        tidy=lambda: worker.ring.drop_held(Drop.FULL),
    )
    for name, (elapsed, cpu) in figures.items():
        print(f"{name:8} {elapsed:8.1f} µs  {cpu:8.1f} µs of CPU")
    cycle, raw = figures["cycle"], figures["raw"]
    print(f"cycle / raw: {cycle[0] / raw[0]:.2f} elapsed, {cycle[1] / raw[1]:.2f} CPU")
    print(f"psutil / cycle: {figures['psutil'][1] / cycle[1]:.2f} CPU")
    apart(agent)
    agent.exporter.start(lambda: None)
    steady_state(agent, arguments.cycles)
    process_figures(arguments.template)
    agent.exporter.close(5)


if __name__ == "__main__":
    main()
