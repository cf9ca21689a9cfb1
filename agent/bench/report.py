"""The report of a bench: a table for people, JSON for keeping, and what has changed since an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from agent.errors import UsageError
from agent.verification import shown

PART_WIDTH = 24


class Column(NamedTuple):
    """A figure of a row: the row's attribute, two lines of heading, and how it is written."""

    name: str
    heading: tuple[str, str]
    decimals: int = 0


COLUMNS = (
    Column("median_microseconds", ("median", "µs"), 1),
    Column("p99_microseconds", ("p99", "µs"), 1),
    Column("floor_microseconds", ("kernel", "µs"), 1),
    Column("floor_ratio", ("ratio", ""), 2),
    Column("payload_bytes", ("payload", "bytes")),
    Column("allocations", ("allo-", "cations")),
    Column("allocated_bytes", ("allocated", "bytes")),
    Column("net_blocks", ("net", "blocks")),
    Column("collector_runs", ("GC", "runs")),
    Column("collector_pause_microseconds", ("GC pause", "µs"), 1),
    Column("reallocations", ("reallo-", "cations")),
)
LEGEND = (
    "median, p99      of one repetition; a cycle's parts were timed in cycles of their own",
    "kernel, ratio    the median of the same sources read raw, in turns with it, and its own median divided by that",
    "allocations, allocated   of one repetition, transient ones and others, by memray",
    "net blocks, GC, reallocations   over all repetitions; a probe's with a frame of its own",
)


class Row(msgspec.Struct, kw_only=True, omit_defaults=False):
    """What a part of a cycle costs; None for what was not measured, or can't be.

    Attributes:
        part: "probe cpu", "format json", "cycle".
        failure: why the probe failed; it has no figures then.
        median_microseconds, p99_microseconds: of a repetition.
        floor_microseconds, floor_ratio: median of the same sources read raw, and `median_microseconds` divided by it.
        payload_bytes: of a repetition.
        allocations, allocated_bytes: of a repetition.
        net_blocks, collector_runs, reallocations: over all repetitions.
        collector_pause_microseconds: the longest.
    """

    part: str
    failure: str | None = None
    median_microseconds: float | None = None
    p99_microseconds: float | None = None
    floor_microseconds: float | None = None
    floor_ratio: float | None = None
    payload_bytes: int | None = None
    allocations: float | None = None
    allocated_bytes: float | None = None
    net_blocks: int | None = None
    collector_runs: int | None = None
    collector_pause_microseconds: float | None = None
    reallocations: int | None = None

    def changes_percent(self, before: Row | None) -> dict[str, float | None]:
        """By how much each figure is more than before; None where either is unknown, or it was 0 and is no more."""
        return {
            column.name: _change(getattr(before, column.name, None), getattr(self, column.name)) for column in COLUMNS
        }


class Sources(msgspec.Struct, kw_only=True):
    """How much the kernel's floor reads: files, places that stat and statvfs are asked of, and netlink dumps."""

    files: int
    places: int
    dumps: int


class ProfileLine(msgspec.Struct, kw_only=True):
    """A line of source, its share of a cycle's allocations, and how many of a cycle those are."""

    place: str
    function: str
    share_ratio: float
    allocations: float


class Report(msgspec.Struct, kw_only=True):
    """What a bench has found, and where.

    Attributes:
        time: RFC 3339, UTC.
        configuration: the file, or "" without one.
        memray: its version; None where it isn't installed.
        profile: the lines with the most allocations; None where it wasn't asked for.
    """

    schema: Literal["hostprobe-bench/1"]
    hostprobe: str
    time: str
    kernel: str
    cpu_count: int
    cpu_model: str
    python: str
    memray: str | None
    configuration: str
    template: str
    cycles: int
    floor: Sources
    rows: list[Row]
    profile: list[ProfileLine] | None

    def json(self, before: Report | None = None) -> bytes:
        """As one document; compared with an earlier one, each row has its `changes_percent`."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        if before is not None:
            for row, written in zip(self.rows, document["rows"], strict=True):
                written["changes_percent"] = row.changes_percent(before._row(row.part))
        return msgspec.json.format(msgspec.json.encode(document), indent=2)

    def text(self, before: Report | None = None) -> bytes:
        """As a table; compared with an earlier one, each row has its changes below it."""
        lines = self._titles("")
        if before is not None:
            lines += before._titles("changes since ")
        floor = self.floor
        lines += ["", *_aligned(self._cells(before)), "", *LEGEND]
        lines.append(f"the kernel's floor: {floor.files} files, {floor.places} statvfs, {floor.dumps} netlink dumps")
        lines += [f"{row.part} failed: {shown(row.failure)}" for row in self.rows if row.failure is not None]
        if before is not None and (gone := [row.part for row in before.rows if self._row(row.part) is None]):
            lines.append(f"not in this run: {', '.join(map(shown, gone))}")
        if self.profile is not None:
            lines += ["", "lines with more than 5 % of a cycle's allocations:"]
            lines += [
                f"{line.share_ratio:7.1%}  {line.allocations:7.1f} a cycle  {line.place} {line.function}"
                for line in self.profile
            ]
        return "\n".join(lines).encode()

    def _titles(self, what: str) -> list[str]:
        run = f"{what}{self.time}, hostprobe {self.hostprobe}, template {self.template}, {self.cycles} cycles"
        host = f"{' ' * len(what)}Linux {self.kernel}, {self.cpu_count} × {self.cpu_model}, Python {self.python}"
        return [shown(run), shown(host)]

    def _row(self, part: str) -> Row | None:
        return next((row for row in self.rows if row.part == part), None)

    def _cells(self, before: Report | None) -> list[list[str]]:
        """The table's texts, a list each line."""
        lines = [["part", *(column.heading[0] for column in COLUMNS)], ["", *(column.heading[1] for column in COLUMNS)]]
        for row in self.rows:
            lines.append([_cut(row.part), *(_figure(getattr(row, column.name), column) for column in COLUMNS)])
            if before is not None:
                changes = row.changes_percent(before._row(row.part))
                lines.append(["  change", *(_percent(change) for change in changes.values())])
        return lines


def read(path: str) -> Report:
    """The report that an earlier bench has written with `--format json`.

    Raises:
        UsageError: the file can't be read, or is no such report.
    """
    expected = "a report of hostprobe bench --format json"
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Report)
    except OSError as error:
        raise UsageError(f"--compare: {shown(path)}: {error.strerror}", expected) from None
    except (ValueError, RecursionError) as error:  # no JSON, not this schema; a NUL in the name
        raise UsageError(f"--compare: {shown(path)}: {shown(str(error))}", expected) from None


def _change(before: float | None, now: float | None) -> float | None:
    if before is None or now is None or (before == 0 and now != 0):
        return None
    return 0.0 if before == now else round((now - before) / abs(before) * 100, 3)


def _figure(value: float | None, column: Column) -> str:
    if value is None:
        return "-"
    return f"{value:.{column.decimals if abs(value) < 10_000 else 0}f}"


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:+.{int(abs(value) < 99.95)}f}%" if value else "0%"


def _cut(part: str) -> str:
    return part if len(part) <= PART_WIDTH else f"{part[: PART_WIDTH - 1]}…"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right, two blanks between them."""
    first, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return [
        "".join(
            [line[0].ljust(first), *(f"  {cell:>{width}}" for cell, width in zip(line[1:], widths, strict=True))]
        ).rstrip()
        for line in lines
    ]
