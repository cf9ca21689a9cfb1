"""Load averages and the scheduler's queue: /proc/loadavg, and /proc/stat for blocked tasks."""

from __future__ import annotations

import re

from agent.errors import ProbeError
from agent.frame import Frame
from agent.table import NAN, Priority, TableSpec, gauge
from probes.probe import ProbeSettings
from probes.procfs import ONE_RECORD, Host, KeyedText, scheduler_part

LOAD = TableSpec(
    "load",
    "How many tasks want to run.",
    gauge("load1", "load", "Tasks running, runnable or in uninterruptible sleep, averaged over 1 minute."),
    gauge("load5", "load", "The same averaged over 5 minutes."),
    gauge("load15", "load", "The same averaged over 15 minutes."),
    gauge("runnable", "tasks", "Tasks running or waiting for a CPU now."),
    gauge("blocked", "tasks", "Tasks in uninterruptible sleep for IO now."),
    gauge("threads", "tasks", "Tasks (threads of all processes) that exist now."),
    priority=Priority.HIGH,
)


class LoadProbe:
    """The `load` table from procfs."""

    Settings = ProbeSettings
    tables = (LOAD,)

    def __init__(self, settings: ProbeSettings, host: Host) -> None:
        self._loadavg = host.proc("loadavg", ONE_RECORD)
        self._stat = host.proc("stat", ONE_RECORD)
        self._blocked = KeyedText(b"procs_blocked")

    def collect(self, frame: Frame) -> None:
        load1, load5, load15, runnable, threads = parse_loadavg(self._loadavg.read())
        (blocked,) = self._blocked.pick(scheduler_part(self._stat.read(frame.sequence)))
        frame.open(LOAD).put_gauges(0, (load1, load5, load15, runnable, NAN if blocked is None else blocked, threads))

    def close(self) -> None: ...


class PsutilLoadProbe:
    """The `load` table where there is no procfs: the averages."""

    Settings = ProbeSettings
    tables = (LOAD,)

    def __init__(self, settings: ProbeSettings, host: Host) -> None:
        import psutil

        self._getloadavg = psutil.getloadavg

    def collect(self, frame: Frame) -> None:
        frame.open(LOAD).put_gauges(0, self._getloadavg())

    def close(self) -> None: ...


def parse_loadavg(text: bytes) -> tuple[float, float, float, float, float]:
    """load1, load5, load15, runnable and all tasks, of `0.20 0.18 0.12 1/80 11206`.

    Raises:
        ProbeError: it doesn't look like this.
    """
    match = _LOADAVG.fullmatch(text)
    if match is None:
        raise ProbeError(f"loadavg: {text[:60]!r} is not `0.20 0.18 0.12 1/80 11206`")
    return float(match[1]), float(match[2]), float(match[3]), float(match[4]), float(match[5])


_AVERAGE = rb"(\d{1,9}\.\d{1,9})"
_LOADAVG = re.compile(rb"%b %b %b (\d{1,9})/(\d{1,9}) \d+\n" % ((_AVERAGE,) * 3))
