"""The agent's own figures against what the system says of this process."""

from __future__ import annotations

import gc
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.delivery import Breaker, Circuit, Drop
from agent.exporter import Exporter
from agent.frame import Frame
from agent.logs import Log
from agent.ring_records import need
from agent.sink_worker import SinkConfig
from agent.sinks.file import FileSettings, FileSink
from agent.sinks.sink import BufferSettings
from agent.table import Priority, Table
from agent.telemetry import AgentProbe, CycleMeter, ProbeMeter
from agent.units import Size

PATIENCE_SECONDS = 60


def values(table: Table, row: int = 0) -> dict[str, Any]:
    """A row by column name, in shown units; None is unknown."""
    found: dict[str, Any] = {}
    for index, column in enumerate(table.spec.counters):
        known = not table.unknown[row, index]
        found[column.name] = int(table.counters[row, index]) / column.per if known else None
    for index, column in enumerate(table.spec.gauges):
        value = float(table.gauges[row, index])
        found[column.name] = None if math.isnan(value) else value
    return found


class Setup:
    """An agent's probe over two meters and two sinks: a file, and a device that is always full."""

    def __init__(self, path: Path) -> None:
        self.meter = CycleMeter()
        self.probes = [ProbeMeter("cpu"), ProbeMeter("agent")]
        configs = []
        for name, target in (("good", str(path)), ("bad", "/dev/full")):
            settings = FileSettings(type="file", path=target, buffer=BufferSettings(size=Size(4096)))
            configs.append(SinkConfig(name, FileSink(settings), settings))
        self.exporter = Exporter(configs, Log("error"))
        self.exporter.open()
        self.probe = AgentProbe(self.meter, self.probes, self.exporter.workers)
        self.frame = Frame(self.probe.tables)

    def collect(self) -> dict[str, Table]:
        self.frame.begin(time.time_ns(), time.monotonic_ns())
        self.probe.collect(self.frame)
        return self.frame.tables

    def push(self, payload: bytes, sequence: int, stamp_ns: int) -> None:
        for worker in self.exporter.workers:
            worker.ring.push(payload, sequence, stamp_ns)

    def agent(self) -> dict[str, Any]:
        return values(self.collect()["agent"])

    def sinks(self) -> dict[str, dict[str, Any]]:
        table = self.collect()["agent_sink"]
        return {labels[0]: values(table, row) for row, labels in enumerate(table.labels)}


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    made = Setup(tmp_path / "out")
    yield made
    made.exporter.close(PATIENCE_SECONDS)
    made.probe.close()


def test_what_the_process_costs_lies_between_two_readings_of_the_system(setup: Setup) -> None:
    """CPU time, context switches and collector runs only grow: read before, by the agent, and after."""
    sum(range(200_000))
    time.sleep(0)

    def reading() -> dict[str, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "cpu_seconds_total": time.process_time(),
            "voluntary_context_switches_total": usage.ru_nvcsw,
            "involuntary_context_switches_total": usage.ru_nivcsw,
            "collector_runs_total": sum(generation["collections"] for generation in gc.get_stats()),
        }

    for _ in range(5):
        before = reading()
        shown = setup.agent()
        after = reading()
        for name in before:
            assert before[name] <= shown[name] <= after[name], name
        assert shown["cpu_seconds_total"] > 0
        gc.collect()


def test_cpu_time_is_psutils(setup: Setup) -> None:
    """psutil counts in ticks of 10 ms; user and system are rounded apart."""
    tick_seconds = 2 / os.sysconf("SC_CLK_TCK")
    before = sum(psutil.Process().cpu_times()[:2])
    shown = setup.agent()["cpu_seconds_total"]
    after = sum(psutil.Process().cpu_times()[:2])
    assert before - tick_seconds <= shown <= after + tick_seconds


def test_resident_memory_is_psutils(setup: Setup) -> None:
    """Grown by 64 MiB in between, both say so; apart by what the reading itself touches."""
    slack = 1 << 20
    for size in (1, 64 << 20, 1):
        ballast = bytearray(b"x") * size
        shown = setup.agent()["resident_bytes"]
        assert abs(shown - psutil.Process().memory_info().rss) < slack
        assert len(ballast) == size


def test_allocated_blocks_are_pythons(setup: Setup) -> None:
    setup.agent()
    before = sys.getallocatedblocks()
    held = [object() for _ in range(50_000)]
    shown = setup.agent()["allocated_blocks"]
    assert len(held) == 50_000
    assert before + 50_000 <= shown <= sys.getallocatedblocks() + 1000


def test_what_the_cycle_did(setup: Setup) -> None:
    setup.meter.missed_cycles = 3
    setup.meter.frames = 2**40
    setup.meter.payload_bytes = 2**63
    setup.meter.probe_failures = 9
    shown = setup.agent()
    assert shown["cycle_seconds"] is None  # there was no cycle yet
    assert shown["missed_cycles_total"] == 3
    assert shown["frames_total"] == 2**40
    assert shown["payload_bytes_total"] == 2**63
    assert shown["probe_failures_total"] == 9
    setup.meter.cycle_seconds = 0.25
    assert setup.agent()["cycle_seconds"] == 0.25


def test_a_row_for_each_probe(setup: Setup) -> None:
    setup.probes[0].seconds = 0.5
    setup.probes[0].up = 0.0
    setup.probes[0].failures = 7
    table = setup.collect()["agent_probe"]
    assert list(table.labels) == [("cpu",), ("agent",)]
    assert values(table, 0) == {"seconds": 0.5, "failures_total": 7, "up": 0.0}
    assert values(table, 1) == {"seconds": None, "failures_total": 0, "up": None}


def test_an_idle_sink(setup: Setup) -> None:
    assert setup.sinks()["good"] == {
        "sent_frames_total": 0,
        "sent_bytes_total": 0,
        "dropped_frames_total": 0,
        "failures_total": 0,
        "retries_total": 0,
        "backlog_frames": 0,
        "backlog_bytes": 0,
        "ring_used_ratio": 0,
        "oldest_seconds": None,
        "circuit_open": 0,
        "latency_p50_seconds": None,
        "latency_p99_seconds": None,
        "circuit_half_open": 0,
        "recovered_frames_total": 0,
        "thinned_frames_total": 0,
        "dropped_full_frames_total": 0,
        "dropped_aged_frames_total": 0,
        "dropped_rejected_frames_total": 0,
        "dropped_damaged_frames_total": 0,
        "dropped_sampled_frames_total": 0,
        "dropped_shutdown_frames_total": 0,
    }


def test_a_column_for_each_reason_of_a_drop(setup: Setup) -> None:
    ring = setup.exporter.workers[0].ring
    for count, reason in enumerate(Drop, 1):
        ring.drops[reason] = count
    good = setup.sinks()["good"]
    assert [good[f"dropped_{reason.word}_frames_total"] for reason in Drop] == [1, 2, 3, 4, 5, 6]
    assert good["dropped_frames_total"] == 21
    assert setup.sinks()["bad"]["dropped_frames_total"] == 0


def test_each_counter_of_a_sink_has_its_own_column(setup: Setup) -> None:
    worker = setup.exporter.workers[0]
    worker.sent_bytes, worker.failures, worker.retries, worker.thinned_frames = 11, 12, 13, 14
    worker.ring.taken, worker.ring.recovered = 15, 20
    good = setup.sinks()["good"]
    assert (good["sent_frames_total"], good["sent_bytes_total"]) == (15, 11)
    assert (good["failures_total"], good["retries_total"]) == (12, 13)
    assert (good["thinned_frames_total"], good["recovered_frames_total"]) == (14, 20)
    assert good["backlog_frames"] == 5


def test_the_circuit_of_a_sink(setup: Setup) -> None:
    worker = setup.exporter.workers[0]

    def shown(breaker: Breaker) -> tuple[float, float]:
        worker.breaker = breaker
        good = setup.sinks()["good"]
        return good["circuit_open"], good["circuit_half_open"]

    assert shown(Breaker(failures=4)) == (0, 0)
    assert shown(Breaker(Circuit.OPEN, open_until_seconds=time.monotonic() + 3600)) == (1, 0)
    assert shown(Breaker(Circuit.OPEN, open_until_seconds=time.monotonic())) == (1, 1)  # its time is up
    assert shown(Breaker(Circuit.HALF_OPEN, 2)) == (1, 1)
    assert shown(Breaker()) == (0, 0)


def test_how_far_the_agent_holds_back(setup: Setup) -> None:
    assert setup.agent()["throttle_ratio"] == 0
    setup.meter.throttle = 0.7
    assert setup.agent()["throttle_ratio"] == 0.7


def test_the_agents_own_tables_are_kept_longest() -> None:
    assert {spec.priority for spec in AgentProbe.tables} == {Priority.HIGH}


def test_what_waits_in_a_ring(setup: Setup) -> None:
    """Before the sinks' threads start, everything is backlog."""
    stamp = time.monotonic_ns() - 5_000_000_000
    for number in range(3):
        setup.push(b"x" * 1000, number + 1, stamp + number)
    good = setup.sinks()["good"]
    assert (good["backlog_frames"], good["backlog_bytes"]) == (3, 3000)
    assert good["ring_used_ratio"] == 3 * need(1000) / 4096
    assert good["oldest_seconds"] == (setup.frame.monotonic_ns - stamp) / 1e9 >= 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")
def test_every_frame_is_sent_dropped_or_backlog(setup: Setup) -> None:
    """At each collection, while both sinks' threads work: one delivers, one fails and its ring drops."""
    setup.exporter.start(lambda: None)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    wrong = []
    try:
        for number in range(1, 5001):
            setup.push(b"x" * 100, number, time.monotonic_ns())
            for name, shown in setup.sinks().items():
                total = shown["sent_frames_total"] + shown["dropped_frames_total"] + shown["backlog_frames"]
                if total != number or shown["backlog_frames"] < 0 or not 0 <= shown["ring_used_ratio"] <= 1:
                    wrong.append((number, name, shown))
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    good, bad = setup.exporter.workers
    deadline = time.monotonic() + PATIENCE_SECONDS
    while good.frames[2] or bad.circuit is Circuit.CLOSED:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    sinks = setup.sinks()
    assert sinks["good"]["sent_frames_total"] + sinks["good"]["dropped_frames_total"] == 5000
    assert sinks["good"]["sent_bytes_total"] == 100 * sinks["good"]["sent_frames_total"]
    assert sinks["good"]["circuit_open"] == 0
    assert 0 < sinks["good"]["latency_p50_seconds"] <= sinks["good"]["latency_p99_seconds"]
    assert sinks["bad"]["sent_frames_total"] == 0
    assert sinks["bad"]["circuit_open"] == 1
    assert sinks["bad"]["failures_total"] >= 5
    assert sinks["bad"]["retries_total"] >= 4
    assert sinks["bad"]["backlog_frames"] > 0
    assert sinks["bad"]["oldest_seconds"] > 0
    assert sinks["bad"]["latency_p50_seconds"] is None
    assert sinks["bad"]["dropped_full_frames_total"] == sinks["bad"]["dropped_frames_total"] > 0


def test_a_system_without_statm_asks_psutil(setup: Setup, tmp_path: Path) -> None:
    setup.probe._memory._statm.close()
    setup.probe._memory._statm.path = str(tmp_path / "absent")
    assert abs(setup.agent()["resident_bytes"] - psutil.Process().memory_info().rss) < 1 << 20
