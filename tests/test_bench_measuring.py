"""What a bench finds: a row for each part, and figures that agree with each other."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import config
from agent.bench import measuring
from agent.bench.measuring import Collections, Times, measure, steadiness
from agent.bench.report import COLUMNS, Report, Row
from agent.config import Config
from agent.discovery import PROBES
from agent.errors import UsageError
from agent.frame import Frame
from agent.pool import Buffer, Pool
from agent.serializers.formats import FORMATS
from agent.table import TableSpec, gauge
from probes.probe import ProbeSettings
from probes.procfs import Host
from tests.hosts import saved_host

OBJECTS = 1000
FAKE = TableSpec("fake", "A probe that allocates.", gauge("objects", "objects", "How many."))


class FakeProbe:
    """Allocates a known number of objects; they are gone when it is collected again."""

    Settings = ProbeSettings
    tables = (FAKE,)

    def __init__(self, settings: ProbeSettings, host: Host) -> None:
        self._kept: list[object] = [None] * OBJECTS

    def collect(self, frame: Frame) -> None:
        for place in range(OBJECTS):
            self._kept[place] = object()
        frame.open(FAKE).put_gauges(0, (OBJECTS,))

    def close(self) -> None: ...


class LeakingProbe(FakeProbe):
    """Keeps them."""

    def collect(self, frame: Frame) -> None:
        self._kept.extend([object(), object()])
        frame.open(FAKE).put_gauges(0, (OBJECTS,))


class FailingProbe(FakeProbe):
    """Fails."""

    def collect(self, frame: Frame) -> None:
        raise OSError(5, "the moon\nis down")


@pytest.fixture(autouse=True)
def _collector_as_it_was() -> Iterator[None]:
    """The warm-up of a cycle freezes the collector for the process."""
    threshold = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)


def configuration(template: str = "standard", root: Path | str | None = None, **sections: Any) -> Config:
    root = saved_host("vm") if root is None else root
    return config.load(None, template, {"test": {"agent": {"root": str(root)}, **sections}}, {})


def bench(loaded: Config, cycles: int = 5, **options: Any) -> Report:
    return measure(loaded, cycles, **options)


def with_fake(monkeypatch: pytest.MonkeyPatch, probe: type[FakeProbe]) -> Config:
    monkeypatch.setitem(PROBES, "fake", f"{__name__}:{probe.__name__}")
    return configuration("minimal", probes={"fake": {}})


def rows_of(report: Report) -> dict[str, Row]:
    rows = {row.part: row for row in report.rows}
    assert len(rows) == len(report.rows)
    return rows


@pytest.mark.parametrize("template", ["minimal", "standard", "full"])
def test_a_row_for_each_part_of_a_cycle(template: str) -> None:
    loaded = configuration(template)
    report = bench(loaded)
    names = [f"probe {name}" for name in loaded.probes]
    assert [row.part for row in report.rows] == [
        "frame.begin", *names, "frame.derive", "format json", "publish", "ring push", "cycle"
    ]  # fmt: skip
    assert (report.template, report.cycles, report.profile) == (template, 5, None)
    assert all(row.median_microseconds and row.p99_microseconds for row in report.rows)
    assert all(row.median_microseconds <= row.p99_microseconds for row in report.rows)  # type: ignore[operator]
    assert all(row.allocations and row.allocated_bytes for row in report.rows)


def test_figures_agree_with_each_other() -> None:
    report = bench(configuration("full"))
    rows = rows_of(report)
    cycle = rows["cycle"]
    probes = [row for name, row in rows.items() if name.startswith("probe ")]
    for figure in ("allocations", "allocated_bytes"):
        largest = max(getattr(row, figure) for row in probes)
        together = sum(getattr(row, figure) for row in probes)
        assert largest < together < getattr(cycle, figure)
    assert rows["publish"].allocations > rows["format json"].allocations  # type: ignore[operator]
    assert rows["ring push"].payload_bytes == rows["format json"].payload_bytes > 5000  # type: ignore[operator]
    for row in report.rows:
        if row.floor_microseconds is not None:
            assert row.floor_ratio == round(row.median_microseconds / row.floor_microseconds, 3)  # type: ignore[operator]
    has_floor = {name for name, row in rows.items() if row.floor_ratio is not None}
    assert has_floor == {f"probe {name}" for name in configuration("full").probes} - {"probe cpu"} | {"cycle"}
    assert report.floor.files > 20
    assert (report.floor.places, report.floor.dumps) == (0, 0)


def test_this_host_is_asked_by_netlink_and_statvfs() -> None:
    report = bench(configuration(root="/"), cycles=2)
    assert report.floor.places >= 1
    assert report.floor.dumps == 4


def test_psutil_has_no_floor() -> None:
    loaded = config.load(None, "minimal", {"test": {"agent": {"source": "psutil"}}}, {})
    report = bench(loaded, cycles=2)
    assert (report.floor.files, report.floor.places, report.floor.dumps) == (0, 0, 0)
    assert {row.floor_ratio for row in report.rows} == {None}
    assert rows_of(report)["probe memory"].median_microseconds


def test_formats_of_the_sinks_and_json() -> None:
    sinks = {
        "main": {"format": "prometheus", "names": "node_exporter", "tables": ["cpu"]},
        "more": {"type": "udp", "address": "127.0.0.1:9", "format": "influx"},
        "same": {"type": "file", "path": "/no/such/place", "format": "influx", "buffer": {"size": "1MiB"}},
    }
    report = bench(configuration("minimal", sinks=sinks))
    formats = [row.part for row in report.rows if row.part.startswith("format ")]
    assert formats == ["format prometheus, node_exporter", "format influx", "format json"]
    rows = rows_of(report)
    assert rows["ring push"].payload_bytes == rows[formats[0]].payload_bytes
    assert len({rows[name].payload_bytes for name in formats}) == 3


def test_all_formats() -> None:
    report = bench(configuration("minimal"), cycles=1, all_formats=True)
    assert [row.part for row in report.rows if row.part.startswith("format ")] == [f"format {name}" for name in FORMATS]


def test_a_probe_that_allocates_a_known_number(monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows_of(bench(with_fake(monkeypatch, FakeProbe)))["probe fake"]
    assert row.allocations is not None
    assert OBJECTS <= row.allocations < OBJECTS * 2  # and an int for most of the places
    before = rows_of(bench(configuration("minimal")))["cycle"].allocations
    monkeypatch.setattr(sys.modules[__name__], "OBJECTS", 2000)
    twice = rows_of(bench(with_fake(monkeypatch, FakeProbe)))
    added = twice["probe fake"].allocations - row.allocations  # type: ignore[operator]
    assert 1000 <= added <= 2001
    assert twice["cycle"].allocations > before + 2000  # type: ignore[operator]


def test_a_leak_shows_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cycles = 50
    rows = rows_of(bench(with_fake(monkeypatch, LeakingProbe), cycles))
    assert 2 * cycles <= rows["probe fake"].net_blocks <= 2 * cycles + 5  # type: ignore[operator]
    assert rows["cycle"].net_blocks >= 2 * cycles  # type: ignore[operator]
    others = [row.net_blocks for name, row in rows.items() if name not in ("probe fake", "cycle")]
    assert max(blocks for blocks in others if blocks is not None) < cycles


def test_a_probe_that_fails_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    report = bench(with_fake(monkeypatch, FailingProbe))
    rows = rows_of(report)
    assert rows["probe fake"] == Row(part="probe fake", failure="OSError: [Errno 5] the moon\nis down")
    assert rows["probe load"].allocations
    assert b"\nprobe fake failed: 'OSError: [Errno 5] the moon\\nis down'" in report.text()


def test_lines_with_most_allocations() -> None:
    report = bench(configuration(), profile=True)
    assert report.profile
    shares = [line.share_ratio for line in report.profile]
    assert shares == sorted(shares, reverse=True)
    assert min(shares) > 0.05
    assert sum(shares) <= 1
    for line in report.profile:
        file, _, number = line.place.rpartition(":")
        text = (Path(__file__).parents[1] / file).read_text().splitlines()[int(number) - 1]
        assert text.strip()
        cycle = rows_of(report)["cycle"].allocations
        assert line.allocations == pytest.approx(line.share_ratio * cycle, rel=0.01)  # type: ignore[operator]


def test_without_memray_all_else_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "memray", None)
    said: list[str] = []
    report = bench(configuration(), complain=said.append)
    assert said == ['bench: to count allocations it needs memray: expected pip install "hostprobe[bench]"']
    assert report.memray is None
    for row in report.rows:
        assert (row.allocations, row.allocated_bytes) == (None, None)
        assert row.median_microseconds is not None
    with pytest.raises(UsageError, match="needs memray"):
        bench(configuration(), profile=True, complain=said.append)
    assert len(said) == 1


def test_the_configured_peers_and_buffers_are_left_alone(tmp_path: Path) -> None:
    ring, file = tmp_path / "main.ring", tmp_path / "out.jsonl"
    sinks = {"main": {"type": "file", "path": str(file), "buffer": {"path": str(ring)}}}
    bench(configuration("minimal", sinks=sinks), cycles=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["256B", "16KiB"])
@pytest.mark.parametrize("when_full", ["drop_oldest", "drop_newest", "drop_priority", "sample"])
def test_a_small_ring(size: str, when_full: str) -> None:
    buffer = {"size": size, "when_full": when_full}
    rows = rows_of(bench(configuration("minimal", sinks={"main": {"buffer": buffer}}), cycles=2))
    assert rows["cycle"].median_microseconds


def test_every_probe_is_collected_in_every_cycle() -> None:
    probes = {"memory": {"interval": "30s"}, "load": {"interval": "20s"}}
    loaded = configuration("minimal", probes=probes)
    often = rows_of(bench(configuration("minimal")))["cycle"]
    seldom = rows_of(bench(loaded))["cycle"]
    assert seldom.allocations > often.allocations - 5  # type: ignore[operator]


def test_nothing_stays_open() -> None:
    bench(configuration(), cycles=1)
    before = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors())
    callbacks = list(gc.callbacks)
    bench(configuration(), cycles=1)
    assert sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors()) == before
    assert gc.callbacks == callbacks


def _descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def test_an_interruption_gives_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bench(configuration(), cycles=1)
    before = len(_descriptors())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "steadiness", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(configuration(), cycles=1)
    assert len(_descriptors()) == before


def test_quantiles() -> None:
    times = Times()
    taken = iter([0, 5000, 0, 1000, 0, 3000])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter_ns", lambda: next(taken))
        for _ in range(3):
            times.time("work", lambda: None)
    assert times.quantile_microseconds("work", 0.5) == 3
    assert times.quantile_microseconds("work", 0.99) == 5
    assert times.quantile_microseconds("another", 0.5) is None


def test_runs_of_the_collector_are_counted() -> None:
    with Collections() as collections:
        gc.collect()
        gc.collect()
    gc.collect()
    assert collections.runs == 2
    assert collections.longest_ns > 0


def test_what_is_kept_and_made_anew() -> None:
    kept: list[object] = [None] * 100
    places = iter(range(100))
    pool: Pool[Buffer] = Pool(Buffer, keep=1 << 20)
    pool.acquire()

    def work() -> None:
        kept[next(places)] = object()
        pool.acquire()

    found = steadiness(work, lambda: None, [pool], 100)
    assert 100 <= found.net_blocks <= 110
    assert (found.collector_runs, found.reallocations) == (0, 100)
    found = steadiness(lambda: gc.collect(), lambda: None, [], 3)
    assert found.collector_runs == 3
    assert found.collector_pause_microseconds > 0


def test_every_figure_has_a_column() -> None:
    figures = {name for name in Row.__struct_fields__ if name not in ("part", "failure")}
    assert {column.name for column in COLUMNS} == figures
