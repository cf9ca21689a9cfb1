"""Collects with psutil and json.dumps, as its users do, and writes a line each interval to its standard output.

    python tests/bench/psutil_loop.py SECONDS minimal|unsocketed|standard

A process of its own for tests/bench/peers.py, so it imports nothing of hostprobe's. `unsocketed` is the standard
template without sockets.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

MINIMAL: Mapping[str, Callable[[], Any]] = {
    "cpu": lambda: psutil.cpu_times()._asdict(),
    "cpu_stats": lambda: psutil.cpu_stats()._asdict(),
    "memory": lambda: psutil.virtual_memory()._asdict(),
    "swap": lambda: psutil.swap_memory()._asdict(),
    "load": psutil.getloadavg,
}
UNSOCKETED = MINIMAL | {
    "cpu_core": lambda: [times._asdict() for times in psutil.cpu_times(percpu=True)],
    "disk_io": lambda: {name: disk._asdict() for name, disk in psutil.disk_io_counters(perdisk=True).items()},
    "filesystem": lambda: {
        part.mountpoint: psutil.disk_usage(part.mountpoint)._asdict() for part in psutil.disk_partitions()
    },
    "network": lambda: {name: nic._asdict() for name, nic in psutil.net_io_counters(pernic=True).items()},
    "interfaces": lambda: {name: nic._asdict() for name, nic in psutil.net_if_stats().items()},
    "boot_time": psutil.boot_time,
}
STANDARD = UNSOCKETED | {
    "sockets": lambda: [(c.family, c.type, c.laddr, c.raddr, c.status) for c in psutil.net_connections("inet")],
    "unix": lambda: len(psutil.net_connections("unix")),
}
FAMILIES = {"minimal": MINIMAL, "unsocketed": UNSOCKETED, "standard": STANDARD}


def main() -> None:
    """Runs until it is killed."""
    interval_seconds, families = float(sys.argv[1]), FAMILIES[sys.argv[2]]
    due = time.monotonic()
    while True:
        print(json.dumps({name: read() for name, read in families.items()}), flush=True)
        due += interval_seconds
        time.sleep(max(due - time.monotonic(), 0))


if __name__ == "__main__":
    main()
