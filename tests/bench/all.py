"""Runs the comparison with hostprobe's peers and the scaling, and writes their tables into docs/performance.md.

    make bench-peers [ARGS="--short"]    # installs the peers first
    python tests/bench/all.py [--short] [--busy]

What is between the two markers in the page is replaced, with the date, the machine and all versions; the plot goes to
docs/scaling.svg. On a machine that is at work (a load average of 1 or more before or after the peers) or with --short
the tables are printed and nothing is written: they are no figures then. It takes some 20 minutes, --short some 4.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from agent import __version__  # noqa: E402
from tests.engines.process import ENGINES, program  # noqa: E402

PAGE = ROOT / "docs/performance.md"
PLOT = ROOT / "docs/scaling.svg"
BEGIN, END = "<!-- written by make bench-peers: from here -->", "<!-- written by make bench-peers: to here -->"
LOAD_MAX = 1.0
GLANCES_VERSION = "import importlib.metadata; print(importlib.metadata.version('glances'))"
SHORT = {
    "peers.py": ["--intervals", "4", "--turns", "1"],
    "scaling.py": ["--rounds", "3", "--sockets", "100", "1000", "5000"],
}
SECTION = """\
Measured on {date} on {machine}, {cores} cores, Linux {kernel}, Python {python}, NumPy {numpy}; hostprobe {hostprobe},
node_exporter {debian} (Debian's) and {today} (today's), collectd {collectd}, psutil {psutil}, Glances {glances}.
On yours:

    make bench-peers
    .venv/bin/python tests/bench/peers.py --help
    .venv/bin/python tests/bench/scaling.py --help

### Beside its peers

Each is a process of its own, with one cycle a second, and is measured in turns. Between two cycles the CPU's caches go
to others, so a cycle is dearer here than in a loop. CPU is user and system of all threads and children. The first of a
table write to a file; the others are scraped, hostprobe then with the names of node_exporter. hostprobe's figures about
itself are among its output. collectd, psutil and Glances have no pressure, psutil and Glances no paging. Proportional
memory divides what other processes map too, which for Python programs is the Python of the benchmark as well; private
memory is what would be free without the program.

{peers}

### As the host grows

{scaling}

![Time of a cycle by CPUs, disks, interfaces and sockets](scaling.svg)
"""


def figures(script: str, arguments: Sequence[str]) -> str:
    """The tables that a benchmark prints."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def version_of(*command: str) -> str:
    """The first version in what a program says; collectd does so with status 1."""
    said = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    found = re.search(r"\d+\.\d+(\.\d+)*", said)
    return found[0] if found else "?"


def section(peers: str, scaling: str) -> str:
    """What stands between the markers."""
    models = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return SECTION.format(
        date=datetime.date.today(),
        machine=models[0].strip() if models else platform.machine(),
        cores=os.cpu_count(),
        kernel=".".join(platform.release().split(".")[:2]),
        python=platform.python_version(),
        numpy=version("numpy"),
        hostprobe=__version__,
        debian=version_of(program("prometheus-node-exporter"), "--version"),
        # Built from a module, it doesn't know its own version; what it was built from does.
        today=(ENGINES / ".node_exporter").read_text().rpartition("@v")[2].strip(),
        collectd=version_of(program("collectd"), "-h"),
        psutil=version("psutil"),
        glances=version_of(str(ENGINES / "glances/bin/python"), "-c", GLANCES_VERSION),
        peers=peers,
        scaling=scaling,
    )


def main() -> None:
    """Measures, prints, and writes where the figures are good."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="to see that it works")
    parser.add_argument("--busy", action="store_true", help="write even though the machine is at work")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1, f"{PAGE} has no place for the tables: {BEGIN} and {END}"
    load = os.getloadavg()[0]
    short = SHORT if arguments.short else {}
    with tempfile.TemporaryDirectory() as folder:
        plot = Path(folder, PLOT.name)
        peers = figures("peers.py", short.get("peers.py", ()))
        load = max(load, os.getloadavg()[0])  # the peers are idle nearly all of the time
        text = section(peers, figures("scaling.py", [*short.get("scaling.py", ()), "--plot", str(plot)]))
        print(text)
        if not arguments.short and (arguments.busy or load < LOAD_MAX):
            PLOT.write_bytes(plot.read_bytes())
            PAGE.write_text(f"{page[: page.index(BEGIN)]}{BEGIN}\n\n{text}\n{page[page.index(END) :]}")
            print(f"written: {PAGE}, {PLOT}", file=sys.stderr)
        else:
            why = "--short" if arguments.short else f"the machine is at work, with a load average of {load:.1f}"
            print(f"{PAGE} is left alone: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
