"""Pressure stall information: /proc/pressure (Linux 4.20; Documentation/accounting/psi.rst).

`some`: at least one task was held up by lack of the resource; `full`: all that were not
idle were. `full` of the CPU came later (5.13) and is always 0 for the whole host; IRQs
(6.1) have only `full`.
"""

from __future__ import annotations

import os
import re

from agent.frame import Frame
from agent.table import NAN, Labels, Priority, TableSpec, counter, gauge
from probes.probe import ProbeSettings
from probes.procfs import Host

RESOURCES = ("cpu", "memory", "io", "irq")

_SOME = "Share of time in which at least one task waited for the resource, averaged over {} seconds."
_FULL = "Share of time in which all tasks that were not idle waited, averaged over {} seconds."

PRESSURE = TableSpec(
    "pressure",
    "Time in which tasks were held up by lack of a resource.",
    *(gauge(f"some_avg{seconds}_ratio", "ratio", _SOME.format(seconds)) for seconds in (10, 60, 300)),
    counter("some_seconds_total", "seconds", "Time in which at least one task waited.", per=1_000_000),
    *(gauge(f"full_avg{seconds}_ratio", "ratio", _FULL.format(seconds)) for seconds in (10, 60, 300)),
    counter("full_seconds_total", "seconds", "Time in which all tasks that were not idle waited.", per=1_000_000),
    labels=("resource",),
    priority=Priority.HIGH,
)

Line = tuple[float, float, float, int | None]
"""The three averages as ratios and the total in microseconds."""
_UNKNOWN: Line = (NAN, NAN, NAN, None)


class PressureProbe:
    """The `pressure` table from procfs; without PSI in the kernel it has no rows."""

    Settings = ProbeSettings
    tables = (PRESSURE,)

    def __init__(self, settings: ProbeSettings, host: Host) -> None:
        # Made when the kernel starts, or never.
        files = [(resource, host.proc(f"pressure/{resource}")) for resource in RESOURCES]
        self._files = [(resource, file) for resource, file in files if os.path.exists(file.path)]
        self._labels: list[Labels] = []
        self._parsed: dict[bytes, tuple[Line, Line]] = {}  # of the texts of the cycle before

    def collect(self, frame: Frame) -> None:
        texts = [(resource, file.read()) for resource, file in self._files]
        labels = [(resource,) for resource, text in texts if text]
        if labels != self._labels:
            self._labels = list(labels)
        table = frame.open(PRESSURE)
        count = table.claim(self._labels)
        self._parsed = {text: self._parsed.get(text) or parse_pressure(text) for _, text in texts if text}
        if self._parsed:
            lines = [self._parsed[text] for _, text in texts if text]
            table.gauges[:count] = [some[:3] + full[:3] for some, full in lines]
            for row, (some, full) in enumerate(lines):
                table.put_counters(row, (some[3], full[3]))

    def close(self) -> None: ...


class PsutilPressureProbe:
    """No such figures in psutil: the table is absent."""

    Settings = ProbeSettings
    tables = (PRESSURE,)

    def __init__(self, settings: ProbeSettings, host: Host) -> None: ...

    def collect(self, frame: Frame) -> None: ...

    def close(self) -> None: ...


def parse_pressure(text: bytes) -> tuple[Line, Line]:
    """`some` and `full` of a file of two lines `some avg10=0.20 avg60=0.18 avg300=0.12 total=5373338`.

    A line that is absent, looks otherwise or has been cut is unknown.
    """
    some = full = _UNKNOWN
    for kind, avg10, avg60, avg300, total in _LINE.findall(text):
        # Read as hundredths: a division would make 0.005600000000000001 of the kernel's 0.56.
        line = float(avg10 + b"e-2"), float(avg60 + b"e-2"), float(avg300 + b"e-2"), int(total)
        if kind == b"some":
            some = line
        else:
            full = line
    return some, full


_PERCENT = rb"([0-9]{1,9}\.[0-9]{1,9})"
_LINE = re.compile(
    rb"^(some|full) avg10=%b avg60=%b avg300=%b total=([0-9]{1,20})(?: .*)?\n" % ((_PERCENT,) * 3), re.MULTILINE
)
