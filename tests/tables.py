"""Tables for tests, and cycles that fill them."""

from __future__ import annotations

from collections.abc import Sequence

from agent.frame import Frame
from agent.table import Labels, Table, TableSpec, counter, gauge, rate, ratio

SECOND = 1_000_000_000
DISKS = TableSpec(
    "disks",
    "For tests.",
    rate("bytes_per_second", "bytes/second", ".", "bytes_total"),
    counter("bytes_total", "bytes", "."),
    gauge("queue", "requests", "."),
    counter("seconds_total", "seconds", ".", per=1000),
    ratio("busy_ratio", "ratio", ".", ["seconds_total"], ["span_seconds_total"]),
    gauge("half", "requests", ".", derived=True),
    counter("span_seconds_total", "seconds", ".", per=100),
    rate("busy_per_second", "ratio", ".", "seconds_total"),
    counter("aside_total", "bytes", "."),
    labels=("device",),
    rows=4,
    keep_rows=64,
)
MEMORY = TableSpec("memory", "For tests.", gauge("free", "bytes", "."), counter("faults_total", "faults", "."))


def fill(frame: Frame, rows: dict[str, Sequence[int | None]], labels: Sequence[Labels] | None = None) -> Table:
    table = frame.open(DISKS)
    table.claim(labels if labels is not None else [(name,) for name in rows])
    for row, values in enumerate(rows.values()):
        table.put_counters(row, values)
    return table


def cycle(frame: Frame, seconds: float, rows: dict[str, Sequence[int | None]]) -> dict[str, list[float]]:
    """A cycle `seconds` after the start: bytes a second, busy ratio, busy a second, of each device."""
    frame.begin(5 * SECOND, int(seconds * SECOND))
    table = fill(frame, rows)
    frame.derive()
    return {table.labels[row][0]: table.gauges[row, 2:].tolist() for row in range(table.count)}
