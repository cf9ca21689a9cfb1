"""What a scrape costs: hostprobe with the names of node_exporter, its collection included, beside node_exporter.

    make test-engines ARGS="-k node_exporter"    # installs both node_exporters
    python tests/bench/scrape.py [SCRAPES]

The agent collects every 100 ms, and whoever is measured is scraped as often, in turns of 50: so a scrape of the agent
has the CPU time of one cycle in it. node_exporter has the collectors of the same families, `COLLECTORS`, and tcpstat,
which is off by default, for the TCP states. CPU time is that of the whole process, user and system. The kernel's
part is what a process of its own takes to read hostprobe's sources as often, and to do nothing with them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import urllib3

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.engines.node_exporter import NodeExporter  # noqa: E402
from tests.engines.process import free_ports, patiently  # noqa: E402

TURN_SCRAPES = 50
INTERVAL_SECONDS = 0.1
COLLECTORS = (
    "cpu", "meminfo", "loadavg", "diskstats", "netdev", "netclass", "filesystem", "pressure", "sockstat", "netstat",
    "vmstat", "stat", "time", "uname", "tcpstat",
)  # fmt: skip
CONFIGURATION = """
template = "standard"
agent.interval = "100ms"
[sinks.main]
type = "prometheus"
names = "node_exporter"
address = "127.0.0.1:{port}"
"""


READER = """
import sys, time
from agent.assembly import Agent
from agent.bench.floor import RawReader, first_cycle, together
from agent.config import load
from agent.logs import Log
raw = RawReader(together(first_cycle(Agent(load(None, "standard", {}, {}), Log(), sinks=False)).values()))
while True:
    raw.read()
    print(flush=True)
    sys.stdin.readline()
"""


class Read:
    """The kernel's part: its sources are read raw when it is told to."""

    series = 0
    size_bytes = 0

    def __init__(self) -> None:
        self.name = "the kernel's part"
        self.milliseconds: list[float] = []
        self.resident_bytes = 0
        self.child = subprocess.Popen(
            [sys.executable, "-c", READER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._process = psutil.Process(self.child.pid)

    def answers(self) -> bool:
        """Whether it has read once."""
        assert self.child.stdout is not None
        return bool(self.child.stdout.readline())

    def turn(self) -> None:
        """Some readings; notes the CPU milliseconds of each."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        before = cpu_seconds(self._process)
        for _ in paced():
            self.child.stdin.write(b"\n")
            self.child.stdin.flush()
            self.child.stdout.readline()
        self.milliseconds.append((cpu_seconds(self._process) - before) * 1000 / TURN_SCRAPES)


class Scraped:
    """One who is scraped over a kept connection, and what it took."""

    def __init__(self, name: str, process: psutil.Process, port: int) -> None:
        self.name = name
        self._process = process
        self._pool = urllib3.HTTPConnectionPool("127.0.0.1", port)
        self.milliseconds: list[float] = []
        self.series = 0
        self.size_bytes = 0
        self.resident_bytes = 0

    def answers(self) -> bool:
        """Whether it has something to tell."""
        try:
            return self._pool.request("GET", "/metrics", retries=False).status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def turn(self) -> None:
        """Some scrapes; notes the CPU milliseconds of each."""
        before = cpu_seconds(self._process)
        for _ in paced():
            body = self._pool.request("GET", "/metrics", headers={"Accept-Encoding": "identity"}).data
        self.milliseconds.append((cpu_seconds(self._process) - before) * 1000 / TURN_SCRAPES)
        self.series = sum(not line.startswith(b"#") for line in body.splitlines())
        self.size_bytes = len(body)
        self.resident_bytes = self._process.memory_info().rss


def paced() -> Iterator[None]:
    """As often as the agent collects, a turn long."""
    deadline = time.monotonic()
    for _ in range(TURN_SCRAPES):
        deadline += INTERVAL_SECONDS
        time.sleep(max(deadline - time.monotonic(), 0))
        yield


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of all its threads."""
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Prints the table."""
    turns = max(int(sys.argv[1]) if len(sys.argv) > 1 else 300, TURN_SCRAPES) // TURN_SCRAPES
    only = ["--collector.disable-defaults", "--web.disable-exporter-metrics", *(f"--collector.{c}" for c in COLLECTORS)]
    with tempfile.TemporaryDirectory() as folder:
        (port,) = free_ports(1)
        (path := Path(folder, "hostprobe.toml")).write_text(CONFIGURATION.format(port=port))
        agent = subprocess.Popen([sys.executable, "-m", "agent", "run", "--config", path], cwd=ROOT)
        reader = Read()
        exporters = [
            NodeExporter(Path(folder, "debian"), arguments=only),
            NodeExporter(Path(folder, "today"), "node_exporter", only),
        ]
        try:
            sides: list[Scraped | Read] = [Scraped("hostprobe", psutil.Process(agent.pid), port), reader]
            for name, exporter in zip(("node_exporter (Debian)", "node_exporter (today)"), exporters, strict=True):
                exporter.start()
                assert exporter.process is not None
                sides.append(Scraped(name, psutil.Process(exporter.process.pid), exporter.port))
            for side in sides:
                patiently(side.answers, side.name)
            for _ in range(turns):
                for side in sides:
                    side.turn()
        finally:
            for process in (agent, reader.child):
                process.terminate()
                process.wait()
            for exporter in exporters:
                exporter.stop()
    ours = statistics.median(sides[0].milliseconds)
    print(f"{turns * TURN_SCRAPES} scrapes of each, CPU of user and system, medians of {turns} turns\n")
    print(f"{'':24}{'series':>8}{'bytes':>9}{'ms CPU':>9}{'times':>8}{'resident':>10}")
    for side in sides:
        median = statistics.median(side.milliseconds)
        resident = f"{side.resident_bytes / 1e6:.1f} MB" if side.resident_bytes else "-"
        print(f"{side.name:24}{side.series:8}{side.size_bytes:9}{median:9.2f}{median / ours:8.1f}{resident:>10}")


if __name__ == "__main__":
    main()
