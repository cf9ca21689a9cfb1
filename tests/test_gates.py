"""What a cycle may cost, in figures that no clock and no neighbour changes: whoever makes it dearer learns it here.

The standard template on the saved host `vm`, whose files don't change. A limit has a stated margin over what was
measured, for other versions of Python and NumPy; whoever saves much lowers it.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import config
from agent.assembly import Agent
from agent.bench.allocations import Allocations, load_memray, tallied
from agent.bench.floor import first_cycle, together
from agent.bench.measuring import Steadiness, steadiness
from agent.bench.parts import Cycles, Part, without_peers
from agent.logs import Log
from agent.pool import Buffer
from tests.hosts import saved_host

HERE = Path(__file__).parent
MARGIN = 1.05
ALLOCATIONS = 1600  # measured on 2026-11-21, Python 3.11, NumPy 2.4
ALLOCATED_BYTES = 300_000
PAYLOAD_BYTES = {"json": 6334, "msgpack": 5665, "graphite": 12_215}
"""Of the tables that the saved host fills; the agent's own figures have other digits each time."""
WARM_UP_CYCLES = 50
NET_BLOCKS = 50
# Each takes 200 KB of resident memory and more; the standard template with its stdout sink needs none of them.
SPARED_MODULES = {"asyncio", "ipaddress", "json", "pathlib", "psutil", "random", "shutil", "ssl", "structlog"}
STEADY_CYCLES = 2000
READS_BESIDE_SOURCES = 3
OWN_TABLES = ("agent", "agent_probe", "agent_sink")


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    """It has collected a first frame; the collector's settings are restored at the end."""
    threshold = gc.get_threshold()
    overrides = {"test": {"agent": {"root": str(saved_host("vm")), "hostname": "web"}}}
    built = Agent(without_peers(config.load(None, "standard", overrides, {})), Log())
    built.exporter.open()
    yield built
    built.exporter.close(0)
    built.close()
    gc.unfreeze()
    gc.set_threshold(*threshold)


@pytest.fixture(scope="module")
def source_count(agent: Agent) -> int:
    return len(together(first_cycle(agent).values()).files)


@pytest.fixture(scope="module")
def cycles(agent: Agent, source_count: int) -> Iterator[Cycles]:
    """Warmed up."""
    built = Cycles(agent)
    for _ in range(WARM_UP_CYCLES):
        built.run()
        built.tidy()
    yield built
    built.tidy()


def reads() -> int:
    """System calls of this process that read, as Linux counts them; asking is one, that the next answer has in it."""
    figures = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(figures["syscr"])


def test_steady_state(cycles: Cycles) -> None:
    # Several, as Python's free lists fill up for longer with pytest's objects about: what leaks, leaks in each.
    runs = [steadiness(cycles.run, cycles.tidy, cycles.pools, STEADY_CYCLES) for _ in range(3)]
    found = min(runs, key=lambda run: run.net_blocks)
    assert found.net_blocks < NET_BLOCKS
    assert found == Steadiness(found.net_blocks, 0, 0.0, 0)


def test_transient_allocations_of_a_cycle(cycles: Cycles) -> None:
    found = tallied(load_memray(), [Part("cycle", cycles.run, None)], cycles.tidy).allocations(0)
    limit = Allocations(ALLOCATIONS * MARGIN, ALLOCATED_BYTES * MARGIN)
    assert found.blocks <= limit.blocks
    assert found.size_bytes <= limit.size_bytes
    assert found.blocks > limit.blocks / 2, "much was saved: the limit can be lowered"


@pytest.mark.parametrize("name", PAYLOAD_BYTES)
def test_bytes_of_a_frame(agent: Agent, cycles: Cycles, name: str) -> None:
    frame = agent.cycle.frame
    for second in (1, 2):  # rates over one second; the files say the same both times
        frame.begin(1_795_000_000_000_000_000 + second * 10**9, second * 10**9)
        for scheduled in agent.cycle.probes:
            scheduled.probe.collect(frame)
        frame.derive()
    frame.sequence = 1000
    buffer = Buffer()
    agent.serializer(name).write(frame, buffer, (), OWN_TABLES)  # type: ignore[arg-type]
    assert len(buffer.data) == PAYLOAD_BYTES[name]


def test_reads_of_a_cycle(cycles: Cycles, source_count: int) -> None:
    cycles.run()
    start, asked = reads(), reads()
    for _ in range(10):
        cycles.run()
    cycles.tidy()
    in_all = reads() - asked - (asked - start)
    assert in_all % 10 == 0
    assert source_count - 5 <= in_all // 10 <= source_count + READS_BESIDE_SOURCES


def test_modules_that_a_running_agent_does_without() -> None:
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from agent.__main__ import main\n"
        "status = main(['run', '--template', 'standard', '--interval', '10ms', '--cycles', '3'])\n"
        "print(status, *set(sys.modules) - before, file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=HERE)
    status, *imported = run.stderr.split()
    assert status == "0"
    assert "numpy" in imported
    assert SPARED_MODULES.isdisjoint(imported)
