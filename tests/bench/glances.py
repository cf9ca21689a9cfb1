"""Glances without a terminal, with the plugins of hostprobe's families."""

from __future__ import annotations

from pathlib import Path

from peer import Program, Replaced

from tests.engines.process import ENGINES

BINARY = str(ENGINES / "glances" / "bin" / "glances")
MINIMAL = ("cpu", "mem", "memswap", "load")
UNSOCKETED = (*MINIMAL, "percpu", "diskio", "fs", "network", "uptime")
STANDARD = (*UNSOCKETED, "connections")


def glances(folder: Path, interval_seconds: float, plugins: tuple[str, ...]) -> Program:
    """Exports JSON to a file, which it writes anew each time; `--stdout-json` ends after one line in version 4.5.8."""
    path = folder / "export.json"
    command = [
        BINARY, "--quiet", "--config", "/dev/null", "--disable-check-update", "--time", f"{interval_seconds:g}",
        "--disable-plugin", "all", "--enable-plugin", ",".join(plugins),
        "--export", "json", "--export-json-file", str(path),
    ]  # fmt: skip
    return Program(folder, "glances", command, Replaced(path, interval_seconds))
