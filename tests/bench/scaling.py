"""How the cost of a cycle grows with the host: CPUs, disks, interfaces and sockets; templates; pools.

    python tests/bench/scaling.py [--rounds N] [--plot FILE.svg] [--sockets N ...]

The large host is a written proc and sys, so what its kernel would take to write them is not in the figures; the sockets
are real ones, in a network namespace of their own, which takes root. Each part runs in a process of its own. Prints
tables in Markdown; the plot is drawn by matplotlib and allocations are counted by memray, which `make bench-peers`
installs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

AXES = {
    "cpus": (2, 8, 32, 64, 128, 256),
    "disks": (1, 4, 16, 32, 64),
    "interfaces": (2, 16, 64, 128, 200, 300),
}
PARTS = (*AXES, "sockets", "templates", "pools")
TITLES = {
    "cpus": "CPUs",
    "disks": "disks, each with a file system",
    "interfaces": "network interfaces",
    "sockets": "TCP sockets",
}
SOCKETS = (100, 300, 1000, 3000, 10_000, 20_000)
CAPTIONS = {
    "cpus": """\
A cycle of the standard template without sockets and without row limits, on a written host that is small otherwise. The
files of all interfaces after the first 128 are opened at each cycle, which makes those dearer:""",
    "sockets": "Real sockets, time elapsed:",
    "templates": """\
By template; the large host has 256 CPUs, 64 disks, 300 interfaces, and 500 sockets as text:""",
    "pools": """\
With the arena and pools or with arrays and buffers made anew in each cycle, and made for what the host has or grown
from one row: the large host without sockets and without row limits. The first cycle is that of a new frame, its making
included; all files are open already:""",
}
PLOT_PYTHON = ROOT / "build/engines/plot/bin/python"


def sockets(counts: Sequence[int], rounds: int) -> list[dict[str, float]]:
    """What TCP sockets cost: the kernel's dump alone, with the probe and its JSON, and psutil."""
    import psutil
    from sockets import Collected, RawDump, in_turns

    from probes.procfs import Host
    from tests.socket_zoo import enter_namespace, open_many

    enter_namespace()
    host = Host()
    rows = []
    for count in counts:
        with open_many(count):
            raw, collected = RawDump("tcp"), Collected(host)
            figures = in_turns(
                {
                    "raw_us": raw.read,
                    "probe_us": collected.collect_and_serialize,
                    "psutil_us": lambda: psutil.net_connections("tcp"),
                },
                rounds,
            )
            rows.append({"count": count, **figures})
            raw.close()
            collected.close()
    host.close()
    return rows


def part(name: str, rounds: int, counts: Sequence[int]) -> Any:
    """The figures of one part, in this process."""
    import large_host

    if name == "sockets":
        return sockets(counts, rounds)
    if name in AXES:
        return large_host.growth(name, AXES[name], rounds)
    return {"templates": large_host.templates, "pools": large_host.pools}[name](rounds)


def apart(name: str, rounds: int, counts: Sequence[int]) -> Any:
    """The figures of one part, from a process of its own; None, and why, where it can't be measured."""
    print(f"scaling: {name}", file=sys.stderr)
    options = ["--part", name, "--rounds", str(rounds), "--sockets", *map(str, counts)]
    done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"scaling: {name}: not measured", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def growth_table(axis: str, rows: Sequence[Mapping[str, float]]) -> str:
    """By how many there are of one sort."""
    lines = [f"| {TITLES[axis]} | CPU a cycle | each one more | bytes a frame |", "|---|---|---|---|"]
    for before, row in zip([None, *rows], rows, strict=False):
        each = ""
        if before is not None:
            each = f"{(row['cpu_us'] - before['cpu_us']) / (row['count'] - before['count']):.1f} µs"
        lines.append(f"| {row['count']} | {row['cpu_us']:,.0f} µs | {each} | {row['frame_bytes']:,} |")
    return "\n".join(lines)


def socket_table(rows: Sequence[Mapping[str, float]]) -> str:
    """By how many sockets there are."""
    lines = [
        f"| {TITLES['sockets']} | the kernel's dump alone | hostprobe's probe, with its JSON | times the dump |"
        " psutil | times hostprobe's |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        raw, probe, psutil = row["raw_us"], row["probe_us"], row["psutil_us"]
        lines.append(
            f"| {row['count']:,} | {raw:,.0f} µs | {probe:,.0f} µs | {probe / raw:.2f} | {psutil:,.0f} µs |"
            f" {psutil / probe:.1f} |"
        )
    return "\n".join(lines)


def template_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Here and on the large host."""
    lines = [
        "| template | CPU a cycle, this host | bytes | CPU a cycle, large host | bytes |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        figures = (f"{row[place]['cpu_us']:,.0f} µs | {row[place]['frame_bytes']:,}" for place in ("here", "large"))
        lines.append(f"| {row['template']} | {' | '.join(figures)} |")
    return "\n".join(lines)


def pool_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """With and without pools and presized tables."""
    lines = [
        "| pools | presized | CPU a cycle | the first cycle | allocations | allocated in all | most at once |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        words = " | ".join("yes" if row[name] else "no" for name in ("pools", "presized"))
        lines.append(
            f"| {words} | {row['cpu_us']:,.0f} µs | {row['first_us']:,.0f} µs | {_count(row['allocations'])} |"
            f" {_kib(row['allocated_bytes'])} | {_kib(row['peak_bytes'])} |"
        )
    return "\n".join(lines)


def _count(value: float | None) -> str:
    return "not counted" if value is None else f"{value:,.0f}"


def _kib(value: float | None) -> str:
    return "not counted" if value is None else f"{value / 1024:,.0f} KiB"


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Draws how time grows, in a process that has matplotlib."""
    panels = []
    for axis in (*AXES, "sockets"):
        rows = figures[axis] or []
        names = {"probe_us": "hostprobe", "raw_us": "the kernel's dump alone"} if axis == "sockets" else {"cpu_us": ""}
        series = [
            {"name": name, "x": [row["count"] for row in rows], "y": [row[key] for row in rows]}
            for key, name in names.items()
        ]
        panels.append(
            {"title": TITLES[axis], "y": "µs" if axis == "sockets" else "µs of CPU a cycle", "series": series}
        )
    command = [str(PLOT_PYTHON), str(Path(__file__).with_name("plot.py")), str(path)]
    subprocess.run(command, input=json.dumps(panels), text=True, check=True)


def main() -> None:
    """Measures each part, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sockets", type=int, nargs="*", default=SOCKETS)
    parser.add_argument("--plot", type=Path, help="draws the growth into this file")
    parser.add_argument("--part", choices=PARTS, help="prints this one as JSON")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(part(arguments.part, arguments.rounds, arguments.sockets)))
        return
    if arguments.plot and not PLOT_PYTHON.exists():
        parser.error("--plot needs matplotlib: make bench-peers installs it")
    figures = {name: apart(name, arguments.rounds, arguments.sockets) for name in PARTS}
    for name in PARTS:
        if name in CAPTIONS:
            print(f"{CAPTIONS[name]}\n")
        if figures[name] is None:
            print(f"Not measured: {name}.\n")
        elif name in AXES:
            print(f"{growth_table(name, figures[name])}\n")
        else:
            table = {"sockets": socket_table, "templates": template_table, "pools": pool_table}[name]
            print(f"{table(figures[name])}\n")
    if arguments.plot:
        plot(figures, arguments.plot)


if __name__ == "__main__":
    main()
