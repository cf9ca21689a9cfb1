"""collectd, with the plugins of hostprobe's families."""

from __future__ import annotations

from pathlib import Path

from peer import Program, Written

from tests.engines.process import program

MINIMAL = ("cpu", "memory", "swap", "load")
UNSOCKETED = (*MINIMAL, "vmem", "contextswitch", "uptime", "disk", "df", "interface")
WRITERS = {
    # What write_log says goes to the log, and the log to the standard output, as one JSON array a value.
    "write_log": '<Plugin write_log>\n  Format "JSON"\n</Plugin>\n',
    "csv": '<Plugin csv>\n  DataDir "{folder}/csv"\n</Plugin>\n',
}
# A plugin takes the interval that stands before it.
CONFIGURATION = """
Hostname "bench"
FQDNLookup false
Interval {interval_seconds}
BaseDir "{folder}"
PIDFile "{folder}/collectd.pid"
{load}LoadPlugin logfile
<Plugin logfile>
  LogLevel info
  File STDOUT
  Timestamp false
</Plugin>
<Plugin cpu>
  ReportByCpu {per_core}
  ReportByState true
  ValuesPercentage false
</Plugin>
"""


def collectd(folder: Path, interval_seconds: float, plugins: tuple[str, ...], writer: str) -> Program:
    """In the foreground, without sockets.

    Args:
        writer: "csv", a file for each value and day, or "write_log".
    """
    text = (CONFIGURATION + WRITERS[writer]).format(
        folder=folder,
        interval_seconds=interval_seconds,
        load="".join(f"LoadPlugin {plugin}\n" for plugin in (*plugins, writer)),
        per_core=str("disk" in plugins).lower(),
    )
    path = folder / "collectd.conf"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if writer == "csv":
        output = Written(folder, "csv/**/*", b"\n", counted="csv/bench/load/*")
    else:
        output = Written(folder, "collectd.log", b'"plugin":"load"')
    return Program(folder, "collectd", [program("collectd"), "-f", "-C", str(path)], output)
