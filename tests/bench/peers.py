"""What hostprobe costs beside its peers: the same families, the same interval, each a process of its own.

    make bench-peers ARGS=--help    # installs them
    python tests/bench/peers.py [--interval SECONDS] [--intervals N] [--turns N] [--only WORD]

In turns: a program is started, warms up, is measured for some intervals and ends; figures are medians of the turns.
CPU is user and system of the program with all threads and children; memory is what it has at the end of a turn. Those
that write do so to a file; those that are scraped are asked once an interval. A ratio is to hostprobe that hands its
figures out in the same way. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import collectd  # noqa: E402
import glances  # noqa: E402
from peer import Cost, Peer, Program, Scraped, Written, median, turn  # noqa: E402

from tests.engines.process import LOCALHOST, free_ports, program  # noqa: E402

WARM_UP_SECONDS = 3.0
DEBIAN_S, TODAY_S = "prometheus-node-exporter", "node_exporter"
CONFIGURATION = """
template = "{template}"
agent.interval = "{interval_milliseconds}ms"
probes.sockets.enabled = {sockets}
"""
SCRAPED = """
[sinks.main]
type = "prometheus"
names = "node_exporter"
address = "{host}:{port}"
"""
MINIMAL_COLLECTORS = ("cpu", "meminfo", "loadavg", "stat")
UNSOCKETED_COLLECTORS = (
    *MINIMAL_COLLECTORS, "diskstats", "netdev", "netclass", "filesystem", "pressure", "vmstat", "time", "uname",
)  # fmt: skip
STANDARD_COLLECTORS = (*UNSOCKETED_COLLECTORS, "sockstat", "netstat", "tcpstat")

Made = Callable[[Path, float], Program]


def hostprobe(template: str, folder: Path, interval_seconds: float, is_scraped: bool = False) -> Program:
    """By a template; "unsocketed" is the standard one without sockets."""
    text = CONFIGURATION.format(
        template="minimal" if template == "minimal" else "standard",
        interval_milliseconds=round(interval_seconds * 1000),
        sockets=str(template == "standard").lower(),
    )
    output: Scraped | Written
    if is_scraped:
        (port,) = free_ports(1)
        text += SCRAPED.format(host=LOCALHOST, port=port)
        output = Scraped(port, interval_seconds)
    else:
        output = Written(folder, "hostprobe.log", b'{"schema":')
    folder.mkdir(parents=True, exist_ok=True)
    (path := folder / "hostprobe.toml").write_text(text)
    command = [sys.executable, "-m", "agent", "run", "--config", str(path)]
    return Program(folder, "hostprobe", command, output, {"PYTHONPATH": str(ROOT)})


def node_exporter(binary: str, collectors: Sequence[str], folder: Path, interval_seconds: float) -> Program:
    """With these collectors alone."""
    (port,) = free_ports(1)
    command = [
        program(binary), f"--web.listen-address={LOCALHOST}:{port}", "--web.disable-exporter-metrics",
        "--collector.disable-defaults", *(f"--collector.{name}" for name in collectors),
    ]  # fmt: skip
    return Program(folder, "node_exporter", command, Scraped(port, interval_seconds))


def psutil_loop(families: str, folder: Path, interval_seconds: float) -> Program:
    """psutil and json.dumps."""
    command = [sys.executable, str(Path(__file__).with_name("psutil_loop.py")), str(interval_seconds), families]
    return Program(folder, "psutil", command, Written(folder, "psutil.log", b"\n"))


def groups(interval_seconds: float) -> dict[str, list[Peer]]:
    """Who is measured, by the families that all of a group collect."""

    def peer(name: str, made: Made, is_scraped: bool = False) -> Peer:
        return Peer(name, is_scraped, lambda folder: made(folder, interval_seconds))

    def common(
        families: str, collectors: Sequence[str], plugins: tuple[str, ...], collectd_plugins: tuple[str, ...]
    ) -> list[Peer]:
        written = [
            peer(
                f"collectd, {writer}",
                lambda folder, seconds, writer=writer: collectd.collectd(folder, seconds, collectd_plugins, writer),
            )
            for writer in (collectd.WRITERS if collectd_plugins else ())
        ]
        return [
            peer("hostprobe", partial(hostprobe, families)),
            *written,
            peer("psutil, json.dumps", partial(psutil_loop, families)),
            peer("Glances", lambda folder, seconds: glances.glances(folder, seconds, plugins)),
            peer("hostprobe, scraped", partial(hostprobe, families, is_scraped=True), True),
            peer("node_exporter, Debian's", partial(node_exporter, DEBIAN_S, collectors), True),
            peer("node_exporter, today's", partial(node_exporter, TODAY_S, collectors), True),
        ]

    return {
        "Minimal: CPU, memory, swap, load": common(
            "minimal", MINIMAL_COLLECTORS, glances.MINIMAL, collectd.MINIMAL
        ),
        "Standard without sockets": common(
            "unsocketed", UNSOCKETED_COLLECTORS, glances.UNSOCKETED, collectd.UNSOCKETED
        ),
        "Standard, with sockets": common("standard", STANDARD_COLLECTORS, glances.STANDARD, ()),
    }  # fmt: skip


def table(peers: Sequence[Peer], costs: Sequence[Cost]) -> str:
    """In Markdown."""
    beside = list(zip(peers, costs, strict=True))
    ours = {peer.is_scraped: cost.cpu_us for peer, cost in beside if peer.name.startswith("hostprobe")}
    lines = [
        "| | CPU a cycle | times hostprobe's | resident | proportional | private | bytes a cycle |",
        "|---|---|---|---|---|---|---|",
    ]
    for peer, cost in beside:
        memory = (cost.resident_bytes, cost.proportional_bytes, cost.private_bytes)
        lines.append(
            f"| {peer.name} | {cost.cpu_us:,.0f} µs | {cost.cpu_us / ours[peer.is_scraped]:.2f} | "
            + " | ".join(f"{size / 1e6:.1f} MB" for size in memory)
            + f" | {cost.output_bytes:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures, and prints a table for each group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interval", type=float, default=1.0, help="of all programs, in seconds")
    parser.add_argument("--intervals", type=int, default=10, help="measured in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", help="groups with this word alone")
    arguments = parser.parse_args()
    chosen = {name: peers for name, peers in groups(arguments.interval).items() if arguments.only in name}
    costs: dict[tuple[str, str], list[Cost]] = {}
    with tempfile.TemporaryDirectory(prefix="hostprobe-peers-") as scratch:
        for _ in range(arguments.turns):
            for name, peers in chosen.items():
                for peer in peers:
                    folder = Path(tempfile.mkdtemp(dir=scratch))
                    cost = turn(peer, folder, arguments.interval, arguments.intervals, WARM_UP_SECONDS)
                    costs.setdefault((name, peer.name), []).append(cost)
                    print(f"{name}: {peer.name}: {cost.cpu_us:,.0f} µs", file=sys.stderr)
    for name, peers in chosen.items():
        print(f"{name}:\n\n{table(peers, [median(costs[name, peer.name]) for peer in peers])}\n")


if __name__ == "__main__":
    main()
