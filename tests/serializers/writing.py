"""Frames for tests of formats, what writes them, and what of them a reader must find."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from agent import __version__
from agent.assembly import Agent
from agent.config import load
from agent.frame import Frame
from agent.logs import Log
from agent.pool import Buffer
from agent.serializers import formats
from agent.serializers.document import Identity
from agent.serializers.families import Naming
from agent.serializers.frame_tables import FRAME, LEFT_OUT, UNAME
from agent.table import COUNTER_MAX, NAN, Kind, Labels, Table, TableSpec, counter, gauge, rate

SECOND_NS = 1_000_000_000
TIME_NS = 1_795_217_867_123_456_789
IDENTITY = Identity(
    host="web-1",
    instance="6f0c",
    tags={"env": "prod", "rack": "42"},
    started_unix_ns=TIME_NS - 5 * SECOND_NS,
    boot_unix_ns=TIME_NS - 1000 * SECOND_NS,
    uname=("Linux", "6.1.0", "#1 SMP", "x86_64", "web-1", "(none)"),
)

TIMES = TableSpec(
    "times",
    "Every kind of column, in an order that is not the order of the arrays.",
    rate("events_per_second", "events/second", 'Events "a" second.', "events_total"),
    gauge("load1", "load", "Load."),
    counter("busy_seconds_total", "seconds", "Busy,\nin all.", per=100),
    gauge("used_ratio", "ratio", "Share.", derived=True),
    counter("events_total", "events", r"Events \o/."),
    gauge("threads", "tasks", "Threads."),
)
DISK = TableSpec(
    "disk",
    "A row each.",
    counter("reads_total", "reads", "Reads."),
    gauge("in_progress", "requests", "Now."),
    counter("busy_seconds_total", "seconds", "Busy.", per=1000),
    gauge("wait_seconds", "seconds", "Waiting."),
    rate("reads_per_second", "reads/second", "Reads a second.", "reads_total"),
    labels=("device", "kind"),
    rows=4,
)
OWN = TableSpec(
    "agent_probe",
    "One of the agent's own.",
    counter("failures_total", "failures", "Failures."),
    gauge("up", "boolean", "Whether."),
    labels=("probe",),
)
BARE = TableSpec("bare", "Labels and nothing else.", labels=("name",))
SHARES = TableSpec("shares", "Nothing but what is derived.", gauge("free_ratio", "ratio", "Share.", derived=True))
SPECS = (TIMES, DISK, OWN, BARE, SHARES)
SERIES_FORMATS: list[formats.Name] = [name for name in formats.FORMATS if name not in ("json", "msgpack")]

_TEXTS = [
    None,
    "",
    "vda",
    "vdb",
    "sd a",
    "sd_a",
    "sd_a-2",
    'q"uo\\te',
    "line\nfeed",
    "a,b=c",
    "\t\0",
    " \0",
    " \0\n",
    "\udcff\udcfe",
    "🦀",
]

Row = tuple[Labels, Sequence[int | None], Sequence[float]]
"""A row's labels, counters and gauges."""


class Known(NamedTuple):
    """One value that a reader must find."""

    table: str
    labels: Labels
    column: str
    value: float


class Series(NamedTuple):
    """One that a reader of series must find, its labels sorted."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


def serializer(
    format: formats.Name,
    specs: Iterable[TableSpec] = SPECS,
    identity: Identity = IDENTITY,
    rates: bool = True,
    names: formats.Names = "hostprobe",
) -> Any:
    """A new one of a format."""
    options = {"names": names} if formats.FORMATS[format].has_names else {}
    return formats.load(format)(specs, identity, rates, **options)


class Writer:
    """Frames in, payloads out, with one serializer and one buffer."""

    def __init__(self, format: formats.Name, specs: Sequence[TableSpec] = SPECS, **options: Any) -> None:
        self.frame = Frame(specs)
        self.buffer = Buffer()
        self.serializer = serializer(format, specs, **options)

    def begin(self, time_ns: int | None = None) -> Frame:
        """The next frame, by the monotonic clock a second after the one before; by the wall clock too unless given."""
        seconds = self.frame.sequence
        self.frame.begin(TIME_NS + seconds * SECOND_NS if time_ns is None else time_ns, seconds * SECOND_NS)
        return self.frame

    def put(self, spec: TableSpec, *rows: Row) -> Table:
        """A table of these rows."""
        return put(self.frame, spec, rows)

    def payload(self, tables: Sequence[str] = (), left_out: Sequence[str] = ()) -> bytes:
        """The frame as it is written."""
        self.serializer.write(self.frame, self.buffer, tables, left_out)
        found = bytes(self.buffer.data)
        self.buffer.clear()
        return found

    def text(self) -> str:
        """The same, decoded."""
        return self.payload().decode("utf-8", "strict")


def put(frame: Frame, spec: TableSpec, rows: Sequence[Row]) -> Table:
    table = frame.open(spec)
    if spec.labels:
        table.claim([labels for labels, _, _ in rows])
    for row, (_, counters, gauges) in enumerate(rows):
        table.put_counters(row, counters)
        table.put_gauges(row, gauges)
    return table


@contextmanager
def collected(template: str) -> Iterator[tuple[Agent, Frame]]:
    """A frame of this host, its second one, with what the agent collects of itself."""
    agent = Agent(load(None, template, {}), Log("warning", "json"), sinks=False)
    try:
        agent.cycle.collect()
        agent.cycle.collect()
        yield agent, agent.cycle.frame
    finally:
        agent.close()


def known(
    frame: Frame,
    identity: Identity = IDENTITY,
    rates: bool = True,
    tables: Mapping[str, Table] | None = None,
) -> list[Known]:
    """Every known value of a frame, and of the tables that formats of series have beside it.

    Args:
        tables: those that are told of; the frame's without any.
    """
    shown = frame.tables if tables is None else tables
    own = (identity.host, identity.instance, __version__)
    figures = (frame.sequence, frame.time_unix_ns / 1e9, frame.interval_seconds, 0)
    found = [Known(FRAME.name, own, column.name, value) for column, value in zip(FRAME.columns, figures, strict=True)]
    for name, table in shown.items():
        for row in range(table.count):
            found += [Known(name, table.labels[row], column, value) for column, value in _values(table, row, rates)]
    found += [Known(LEFT_OUT.name, (name,), "rows", table.dropped) for name, table in shown.items() if table.dropped]
    return [one for one in found if math.isfinite(one.value)]


def _values(table: Table, row: int, rates: bool) -> Iterator[tuple[str, float]]:
    spec = table.spec
    for column in spec.columns:
        if column.derived and not rates:
            continue
        if column.kind is Kind.COUNTER:
            index = spec.counter_index[column.name]
            if not table.unknown[row, index]:
                count = int(table.counters[row, index])
                yield column.name, count if column.per == 1 else count / column.per
        else:
            value = float(table.gauges[row, spec.gauge_index[column.name]])
            yield column.name, int(value) if column.integral and abs(value) <= 2**53 else value


def series(values: Iterable[Known], specs: Iterable[TableSpec], naming: Naming, **also: str) -> list[Series]:
    """What these values are called by a naming, sorted.

    Args:
        also: labels that all of them have.
    """
    found = []
    by_column: dict[tuple[str, str], list[Known]] = {}
    for one in values:
        by_column.setdefault((one.table, one.column), []).append(one)
    for spec in (FRAME, LEFT_OUT, UNAME, *specs):
        columns = {column.name: column for column in spec.columns}
        for family in naming(spec, True):
            for source in family.sources:
                for one in by_column.get((spec.name, source.column), ()):
                    row = dict(zip(spec.labels, one.labels, strict=True))
                    if source.only and row[source.only[0]] != source.only[1]:
                        continue
                    labels = also | {name: row[label] or "" for name, label in family.labels} | dict(source.labels)
                    is_whole = columns[source.column].integral
                    value = one.value // source.per if is_whole else one.value / source.per
                    found.append(Series(family.name, tuple(sorted(labels.items())), value))
    return sorted(found)


class Story:
    """Frames in which everything changes, by a seed."""

    def __init__(self, seed: int, specs: tuple[TableSpec, ...] = SPECS) -> None:
        self.random = random.Random(seed)
        self.frame = Frame(specs)
        self._specs = specs
        self._labels: dict[str, list[Labels]] = {}

    def frames(self, count: int) -> Iterator[Frame]:
        for number in range(count):
            step_ns = self.random.choice([SECOND_NS, SECOND_NS, 1, -3 * SECOND_NS])
            self.frame.begin(TIME_NS + number * 10 * SECOND_NS + step_ns, number * SECOND_NS)
            for spec in self.random.sample(self._specs, len(self._specs)) if number % 7 == 6 else self._specs:
                fate = self.random.random()
                if fate < 0.12:
                    continue  # its probe isn't due
                self._fill(spec)
                if fate > 0.93:
                    self.frame.discard([spec])
            self.frame.derive()
            yield self.frame

    def _fill(self, spec: TableSpec) -> None:
        table = self.frame.open(spec)
        if spec.labels:
            table.claim(self._next_labels(spec), self.random.choice([None, None, 3]))
        table.continues = self.random.random() < 0.9
        for row in range(table.count):
            table.put_counters(row, [self._counter() for _ in spec.counters])
            table.put_gauges(row, [self._gauge() for _ in spec.gauges])

    def _next_labels(self, spec: TableSpec) -> list[Labels]:
        labels = self._labels.get(spec.name, [])
        fate = self.random.random()
        if fate < 0.5:
            pass  # the same object
        elif fate < 0.6:
            labels = list(labels)
        elif fate < 0.75:
            labels = self.random.sample(labels, len(labels))
        else:
            made = [tuple(self.random.choice(_TEXTS) for _ in spec.labels) for _ in range(self.random.randrange(6))]
            labels = list(dict.fromkeys(made + labels[: self.random.randrange(6)]))
        if self.random.random() < 0.05:
            labels = labels + labels[:1]  # two rows of the same key
        self._labels[spec.name] = labels
        return labels

    def _counter(self) -> int | None:
        exact = self.random.choice([0, 1, 2**53 + 1, 2**63 - 1, 2**63, COUNTER_MAX, None])
        return exact if self.random.random() < 0.2 else self.random.randrange(1000)

    def _gauge(self) -> float:
        odd = self.random.choice([NAN, -0.0, -7.0, 1e23, float("inf"), 2.0**53, 5e-324, 0.1])
        return odd if self.random.random() < 0.2 else float(self.random.randrange(1000))

    def choice(self) -> tuple[list[str], list[str]]:
        """Which tables are wanted, and which a full ring leaves out."""
        names = [spec.name for spec in self._specs]
        if self.random.random() < 0.6:
            return [], []
        wanted = self.random.sample(names, self.random.randrange(len(names)))
        return wanted, self.random.sample(list(self.frame.tables), min(1, len(self.frame.tables)))
