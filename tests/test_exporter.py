"""The exporter with real sinks on real descriptors: pipes, files, devices; and what of a frame goes where."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent.assembly import Agent
from agent.config import load as config_of
from agent.delivery import OPEN_AFTER_FAILURES, Circuit, Drop, WhenFull
from agent.errors import SinkError, UsageError
from agent.exporter import Dialect, Exporter, Output
from agent.frame import Frame
from agent.logs import Log
from agent.pool import Buffer
from agent.ring_records import need
from agent.serializers.document import Identity
from agent.serializers.json_lines import JsonSerializer
from agent.serializers.remote_write import write_request_class
from agent.sink_worker import SinkConfig
from agent.sinks.sink import SinkSettings
from agent.table import Priority, TableSpec, gauge
from probes.disk_io import DISK_IO
from tests.serializers.writing import serializer
from tests.workers import (
    PATIENCE_SECONDS,
    PipeSink,
    ScriptedSink,
    accounted,
    config,
    events,
    file_config,
    numbers,
    push,
    started,
    until,
)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")


@pytest.fixture
def pipes() -> Iterator[Callable[[], PipeSink]]:
    """Makes pipe sinks; closes whatever of them is open afterwards, which also frees a stuck writer."""
    made: list[PipeSink] = []

    def make() -> PipeSink:
        made.append(PipeSink())
        return made[-1]

    yield make
    for sink in made:
        for descriptor in (sink.reader, sink.writer):
            with suppress(OSError):
                os.close(descriptor)


def test_frames_arrive_in_order_at_every_sink(tmp_path: Path, pipes: Callable[[], PipeSink]) -> None:
    pipe = pipes()
    exporter = started(file_config(tmp_path / "a"), config(pipe, "pipe"), file_config(tmp_path / "b", "file2"))
    push(exporter, 1, 2000)
    exporter.close(PATIENCE_SECONDS)
    expected = list(range(1, 2001))
    assert numbers(tmp_path / "a") == expected
    assert numbers(tmp_path / "b") == expected
    assert [int(line) for line in pipe.read_all()] == expected
    for worker in exporter.workers:
        assert worker.frames == (2000, 0, 0)
        assert worker.sent_bytes == sum(len(str(number)) for number in expected)
        assert (worker.failures, worker.retries, worker.failures_in_a_row) == (0, 0, 0)
        assert worker.ring.held_bytes == 0
        assert worker.ring.oldest_stamp_ns is None
        p50, p99 = worker.latency.quantiles_seconds(0.5, 0.99)
        assert 0 < p50 <= p99
    assert pipe.closed


def test_formats_and_workers(tmp_path: Path) -> None:
    exporter = Exporter([file_config(tmp_path / "a", "a"), file_config(tmp_path / "b", "b")], Log())
    assert [worker.name for worker in exporter.workers] == ["a", "b"]


@pytest.mark.parametrize("when_full", WhenFull)
def test_a_stalled_sink_delays_nobody(
    tmp_path: Path, pipes: Callable[[], PipeSink], capsys: pytest.CaptureFixture[str], when_full: WhenFull
) -> None:
    """Nobody reads the pipe until the file has everything: were they tied together, this would not end."""
    pipe = pipes()
    pipe.stall()
    stalling = config(pipe, "stalled", size=64 << 10, when_full=when_full)
    exporter = started(stalling, file_config(tmp_path / "out", buffer="16MiB"))
    stalled, file = exporter.workers
    push(exporter, 1, 5000, width=250)  # 1.3 MB; the ring holds 64 KiB
    until(lambda: file.frames[0] == 5000, "the file has all")
    assert numbers(tmp_path / "out") == list(range(1, 5001))
    assert file.frames[1] == 0
    assert stalled.frames[0] == 0
    assert stalled.frames[1] == stalled.ring.dropped
    held = (64 << 10) // need(254)
    assert held - 1 <= stalled.frames[2] <= held + 10  # and the batch that the sink has
    assert stalled.ring.held_bytes >= stalled.frames[2] * 251
    assert stalled.ring.used_ratio > 0.9
    assert stalled.ring.oldest_stamp_ns is not None
    assert accounted(stalled)
    assert stalled.ring.pushed == 5000
    # Its reader wakes up: what the ring still holds arrives, in order, and only the counted ones are missing.
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.extend(pipe.read_all()), daemon=True)
    reader.start()
    exporter.close(PATIENCE_SECONDS)
    reader.join(PATIENCE_SECONDS)
    assert not reader.is_alive()
    arrived = [int(line) for line in got]
    assert arrived == sorted(set(arrived))
    assert stalled.frames == (len(arrived), 5000 - len(arrived), 0)
    assert (arrived[-1] >= 4999) == (when_full is not WhenFull.DROP_NEWEST)
    assert events(capsys) == []


def test_a_failing_sink_is_retried_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its directory goes away and comes back, twice within a minute: told once."""
    directory = tmp_path / "logs"
    exporter = Exporter([file_config(directory / "out")], Log("info", "json"))
    directory.mkdir()
    exporter.open()
    exporter.start(lambda: None)
    (worker,) = exporter.workers
    push(exporter, 1, 10)
    until(lambda: worker.frames[0] == 10)
    kept = [numbers(directory / "out")]
    for episode in (1, 2):
        shutil.rmtree(directory)
        failures = worker.failures
        push(exporter, 10 * episode + 1, 10 * episode + 10)
        until(lambda: worker.failures >= failures + 3, "three failures")  # noqa: B023
        assert worker.failures_in_a_row >= 3
        assert worker.frames[2] == 10
        assert accounted(worker)
        directory.mkdir()
        until(lambda: worker.frames[0] == 10 * episode + 10, "delivered")  # noqa: B023
        until(lambda: not worker.failures_in_a_row)
        kept.append(numbers(directory / "out"))
    exporter.close(PATIENCE_SECONDS)
    assert [number for part in kept for number in part] == list(range(1, 31))
    assert worker.frames == (30, 0, 0)
    assert worker.retries == worker.failures >= 6
    logged = events(capsys)
    told = [line for line in logged if line["event"] != "sink's circuit"]
    assert [line["event"] for line in told] == ["sink fails, its ring holds the frames", "sink delivers again"]
    assert all(line["sink"] == "file" for line in logged)
    assert "out: No such file or directory" in told[0]["reason"]
    assert 3 <= told[1]["failures"] < worker.failures


@linux
def test_a_device_that_is_full_opens_the_circuit(capsys: pytest.CaptureFixture[str]) -> None:
    exporter = started(file_config(Path("/dev/full")))
    (worker,) = exporter.workers
    assert worker.circuit is Circuit.CLOSED
    push(exporter, 1, 3)
    until(lambda: worker.failures >= OPEN_AFTER_FAILURES, "five failures")
    assert worker.circuit is Circuit.OPEN
    assert worker.frames == (0, 0, 3)
    exporter.close(PATIENCE_SECONDS)
    assert worker.frames == (0, 3, 0)
    logged = events(capsys)
    assert [line["event"] for line in logged] == [
        "sink fails, its ring holds the frames",
        "sink's circuit",
        "frames not delivered in time",
    ]
    assert "No space left on device" in logged[0]["reason"]
    assert logged[2]["dropped_frames"] == 3


def test_a_defect_in_a_sink_does_not_end_its_thread(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ScriptedSink(ZeroDivisionError("oh"), SinkError("busy"), KeyError("x"))
    exporter = started(config(sink, "flaky"))
    (worker,) = exporter.workers
    push(exporter, 1, 5)
    until(lambda: worker.frames[0] == 5)
    exporter.close(PATIENCE_SECONDS)
    assert sink.taken == [b"1", b"2", b"3", b"4", b"5"]
    assert (worker.failures, worker.retries, worker.failures_in_a_row) == (3, 3, 0)
    assert [line.get("reason") for line in events(capsys)] == ["ZeroDivisionError: oh", None]


def test_shutdown_flushes_what_the_rings_hold(tmp_path: Path) -> None:
    """Everything is pushed before the threads start: all of it is backlog when the shutdown begins."""
    exporter = Exporter([file_config(tmp_path / "out")], Log())
    exporter.open()
    push(exporter, 1, 3000)
    (worker,) = exporter.workers
    assert worker.frames == (0, 0, 3000)
    exporter.start(lambda: None)
    exporter.close(PATIENCE_SECONDS)
    assert numbers(tmp_path / "out") == list(range(1, 3001))


def test_shutdown_of_an_exporter_that_never_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exporter = Exporter([file_config(tmp_path / "out")], Log("info", "json"))
    exporter.open()
    push(exporter, 1, 3)
    exporter.close(1)
    assert exporter.workers[0].frames == (0, 3, 0)
    assert [line["dropped_frames"] for line in events(capsys)] == [3]


def test_shutdown_with_a_stuck_sink_ends_and_counts_the_rest(
    tmp_path: Path, pipes: Callable[[], PipeSink], capsys: pytest.CaptureFixture[str]
) -> None:
    """It returns although the sink's thread hangs for ever in a write; the pipe is read only afterwards."""
    pipe = pipes()
    pipe.stall()
    exporter = started(config(pipe, "stuck", records=1), file_config(tmp_path / "out"))
    stuck, file = exporter.workers
    push(exporter, 1, 1000)
    until(lambda: file.frames[0] == 1000)
    until(lambda: pipe.started == 1, "the first frame is in flight")
    exporter.close(0.2)
    assert stuck.frames == (0, 1000, 0)
    assert stuck.ring.held_bytes == 0
    assert file.frames == (1000, 0, 0)
    logged = events(capsys)
    assert [(line["event"], line["sink"], line["dropped_frames"]) for line in logged] == [
        ("frames not delivered in time", "stuck", 1000)
    ]
    assert not pipe.closed  # its thread still uses it
    # The write gets through after all: what was counted as dropped is not counted a second time.
    got = b""
    while not got.endswith(b"\n1\n"):
        got += os.read(pipe.reader, 65536)
    stuck._thread.join(PATIENCE_SECONDS)
    assert not stuck._thread.is_alive()
    assert pipe.delivered == 1
    assert (stuck.frames, stuck.sent_bytes) == ((0, 1000, 0), 0)


@linux
def test_shutdown_counts_what_a_failing_sink_gives_up_while_another_flushes(
    pipes: Callable[[], PipeSink], capsys: pytest.CaptureFixture[str]
) -> None:
    """The log must name all of it, also the frame that the sink's own thread gave up."""
    pipe = pipes()
    pipe.stall()
    exporter = started(config(pipe, "stuck"), file_config(Path("/dev/full"), "failing"))
    stuck, failing = exporter.workers
    push(exporter, 1, 1000)
    until(lambda: failing.failures >= 2)
    exporter.close(1.0)  # the stuck one takes the whole second; meanwhile the failing one's thread ends
    assert failing.frames == (0, 1000, 0)
    logged = {line["sink"]: line["dropped_frames"] for line in events(capsys) if "dropped_frames" in line}
    assert logged == {"stuck": 1000, "failing": 1000}
    assert stuck.frames == (0, 1000, 0)


def test_a_reader_that_leaves_is_told_and_nothing_logged(
    pipes: Callable[[], PipeSink], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = pipes()
    called: list[str] = []
    exporter = started(config(pipe, "pipe"), on_reader_gone=lambda: called.append(threading.current_thread().name))
    (worker,) = exporter.workers
    push(exporter, 1, 5)
    until(lambda: worker.frames[0] == 5)
    assert not exporter.reader_gone.is_set()
    os.close(pipe.reader)
    push(exporter, 6, 8)
    assert exporter.reader_gone.wait(PATIENCE_SECONDS)
    until(lambda: called == ["sink pipe"])
    push(exporter, 9, 10)  # into a ring that is closed
    exporter.close(PATIENCE_SECONDS)
    assert worker.frames == (5, 5, 0)
    assert worker.failures == 0
    assert events(capsys) == []


@linux
def test_a_reader_that_leaves_hides_no_other_sinks_losses(
    pipes: Callable[[], PipeSink], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = pipes()
    exporter = started(config(pipe, "pipe"), file_config(Path("/dev/full"), "failing"))
    os.close(pipe.reader)
    push(exporter, 1, 4)
    assert exporter.reader_gone.wait(PATIENCE_SECONDS)
    exporter.close(PATIENCE_SECONDS)
    assert {line["sink"]: line["dropped_frames"] for line in events(capsys) if "dropped_frames" in line} == {
        "failing": 4
    }


def test_a_sink_that_cannot_start(tmp_path: Path) -> None:
    exporter = Exporter([file_config(tmp_path / "absent" / "out")], Log())
    with pytest.raises(UsageError, match="No such file or directory: expected a file that can be written"):
        exporter.open()


def test_a_buffer_in_a_file_hands_over_to_the_next_exporter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the first one could not deliver comes first, in order, and is not counted as dropped before."""
    away = ScriptedSink(None, SinkError("away", 3), then=SinkError("away"))
    first = started(config(away, "tcp", path=tmp_path / "ring", records=10))
    push(first, 1, 40)
    until(lambda: first.workers[0].failures >= 2)
    first.close(PATIENCE_SECONDS)
    delivered = len(away.taken)
    assert first.workers[0].frames == (delivered, 0, 40 - delivered)
    assert [line["event"] for line in events(capsys) if line["event"].startswith("frames")] == []
    sink = ScriptedSink()
    second = Exporter([config(sink, "tcp", path=tmp_path / "ring", records=10)], Log("info", "json"), b"j" * 16)
    second.open()
    push(second, 41, 50)
    second.start(lambda: None)
    second.close(PATIENCE_SECONDS)
    assert [int(line) for line in away.taken + sink.taken] == list(range(1, 51))
    assert second.workers[0].frames == (50 - delivered, 0, 0)
    assert [(line["event"], line["frames"]) for line in events(capsys)] == [("buffer recovered", 40 - delivered)]


@linux
def test_a_stuck_sink_leaves_its_file(tmp_path: Path, pipes: Callable[[], PipeSink]) -> None:
    """It returns although the thread hangs; what the thread holds stays in the file too."""
    pipe = pipes()
    pipe.stall()
    exporter = started(config(pipe, "stuck", path=tmp_path / "ring", records=4))
    (worker,) = exporter.workers
    push(exporter, 1, 20)
    until(lambda: pipe.started == 1)
    exporter.close(0.1)
    assert worker.frames == (0, 0, 20)
    assert not pipe.closed
    os.close(pipe.reader)
    worker._thread.join(PATIENCE_SECONDS)
    assert worker.frames == (0, 0, 20)


@linux
def test_three_sinks_do_not_touch_each_other(
    tmp_path: Path, pipes: Callable[[], PipeSink], capsys: pytest.CaptureFixture[str]
) -> None:
    """One stalls, one's disk is full, one is well: it has every frame, in order, before the others move."""
    pipe = pipes()
    pipe.stall()
    exporter = started(
        config(pipe, "stalled", size=16 << 10),
        file_config(Path("/dev/full"), "refusing", "32KiB"),
        file_config(tmp_path / "out", "healthy", "16MiB"),
    )
    stalled, refusing, healthy = exporter.workers
    push(exporter, 1, 3000, width=50)
    until(lambda: healthy.frames == (3000, 0, 0), "the healthy one has all")
    until(lambda: refusing.circuit is Circuit.OPEN)
    assert numbers(tmp_path / "out") == list(range(1, 3001))
    assert (healthy.failures, healthy.retries, healthy.ring.used_ratio) == (0, 0, 0)
    assert stalled.failures == 0
    assert (stalled.frames[0], refusing.frames[0]) == (0, 0)
    for worker in exporter.workers:
        assert accounted(worker)
        assert worker.ring.pushed == 3000
    # Each has lost what its own ring couldn't hold, and the larger ring less.
    assert refusing.frames[1] < stalled.frames[1]
    exporter.close(0.1)
    assert healthy.frames == (3000, 0, 0)
    assert stalled.frames == refusing.frames == (0, 3000, 0)
    logged = {line["sink"] for line in events(capsys)}
    assert logged == {"stalled", "refusing"}


def test_the_account_is_exact_at_every_moment(tmp_path: Path) -> None:
    """Read by the pushing thread, as the agent's probe does, while the sink's thread delivers and the ring drops."""
    exporter = started(file_config(tmp_path / "out", buffer="2KiB"))
    (worker,) = exporter.workers
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    wrong = []
    try:
        for sequence in range(1, 20_001):
            worker.ring.push(b"x" * 50, sequence, sequence)
            sent, dropped, backlog = worker.frames
            if sent + dropped + backlog != sequence or not 0 <= backlog <= 2 * (2048 // need(50)):
                wrong.append((sequence, sent, dropped, backlog))
    finally:
        sys.setswitchinterval(interval)
    exporter.close(PATIENCE_SECONDS)
    assert wrong == []
    assert worker.frames[0] == (tmp_path / "out").read_bytes().count(b"\n")
    assert worker.frames[0] + worker.frames[1] == 20_000


# What of a frame goes where

CPU = TableSpec("cpu", "High.", gauge("load", "load", "."), priority=Priority.HIGH)
DISK = TableSpec("disk", "Normal.", gauge("queue", "requests", "."), labels=("device",))
SOCKET = TableSpec("socket", "Low.", gauge("bytes", "bytes", "."), labels=("peer",), priority=Priority.LOW)
SPECS = (CPU, DISK, SOCKET)
PRIORITIES = {spec.name: spec.priority for spec in SPECS}


class Publisher:
    """An exporter whose threads never start, and frames of three tables; keeps what was serialized."""

    def __init__(self, *configs: SinkConfig, sockets: int = 3, disks: int = 1, **arguments: Any) -> None:
        self.exporter = Exporter(configs, Log("info", "json"), **{"priorities": PRIORITIES, **arguments})
        self.exporter.open()
        self.frame = Frame(SPECS)
        self.sockets, self.disks = sockets, disks
        self.serializer = JsonSerializer(SPECS, Identity("h", "i", {}))
        self.written: list[tuple[Output, list[str]]] = []

    def __call__(self, frames: int = 1) -> None:
        for _ in range(frames):
            self.frame.begin(time.time_ns(), time.monotonic_ns())
            self.frame.open(CPU)
            self.frame.open(DISK).claim([(f"vd{number}",) for number in range(self.disks)])
            self.frame.open(SOCKET).claim([(f"peer{number}",) for number in range(self.sockets)])
            self.exporter.publish(self.frame, self.serialize)

    def serialize(self, output: Output, left_out: Sequence[str]) -> bytearray:
        self.written.append((output, list(left_out)))
        buffer = Buffer()
        self.serializer.write(self.frame, buffer, output.tables, left_out)
        return buffer.data

    def lines(self, worker: int = 0) -> list[dict[str, Any]]:
        """What a ring holds, oldest first; it is empty afterwards."""
        ring, found, into = self.exporter.workers[worker].ring, [], bytearray()
        while claimed := ring.claim(into):
            found.append(json.loads(into[: claimed[0].size]))
            ring.settle(1)
        return found

    def fill(self, ratio: float, worker: int = 0) -> None:
        """Occupies this part of a ring, and a bit more, with one record."""
        ring = self.exporter.workers[worker].ring
        before = ring.used_ratio
        ring.push(bytes(round(ring.size * ratio) - need(0) + 8), 0, 0)
        assert before + ratio <= ring.used_ratio < before + ratio + 0.01


def tables(line: dict[str, Any]) -> list[str]:
    return [name for name in ("cpu", "disk", "socket") if name in line]


def full_config(name: str = "sink", size: int = 64 << 10, **kinds: Any) -> SinkConfig:
    return config(ScriptedSink(), name, size=size, **kinds)


def test_sinks_that_want_the_same_share_one_payload() -> None:
    publish = Publisher(full_config("a"), full_config("b"), full_config("c", tables=("cpu",)), full_config("d"))
    publish(2)
    assert sorted(output.tables for output, _ in publish.written) == [(), (), ("cpu",), ("cpu",)]
    a, b, c, d = (publish.lines(worker) for worker in range(4))
    assert a == b == d
    assert [tables(line) for line in a] == [["cpu", "disk", "socket"]] * 2
    assert [tables(line) for line in c] == [["cpu"]] * 2
    assert [line["sequence"] for line in c] == [1, 2]
    assert all("degraded" not in line for line in a + c)
    assert [worker.thinned_frames for worker in publish.exporter.workers] == [0] * 4


def test_sinks_of_different_formats_or_names_have_their_own_payloads() -> None:
    """One serializer a dialect, and one payload for sinks that have the same one and want the same tables."""
    dialects: list[Dialect] = [
        ("json", "hostprobe"),
        ("prometheus", "hostprobe"),
        ("prometheus", "node_exporter"),
        ("influx", "hostprobe"),
        ("prometheus", "hostprobe"),
    ]
    publish = Publisher(
        *(
            SinkConfig(str(number), ScriptedSink(), SinkSettings(format=dialect[0], names=dialect[1]))
            for number, dialect in enumerate(dialects)
        )
    )
    serializers = {dialect: serializer(dialect[0], SPECS, names=dialect[1]) for dialect in dialects}
    payloads: dict[Dialect, bytes] = {}

    def serialize(output: Output, left_out: Sequence[str]) -> bytearray:
        dialect = output.format, output.names
        assert dialect not in payloads
        buffer = Buffer()
        serializers[dialect].write(publish.frame, buffer, output.tables, left_out)
        payloads[dialect] = bytes(buffer.data)
        return buffer.data

    publish.frame.begin(time.time_ns(), time.monotonic_ns())
    publish.frame.open(CPU).put_gauges(0, (0.5,))
    publish.exporter.publish(publish.frame, serialize)
    assert len(set(payloads.values())) == 4
    assert b"\nhostprobe_cpu_load" in payloads["prometheus", "hostprobe"]
    for dialect, worker in zip(dialects, publish.exporter.workers, strict=True):
        into = bytearray()
        (record,) = worker.ring.claim(into)
        assert into[: record.size] == payloads[dialect]


def test_sinks_with_other_tables_have_serializers_of_their_own() -> None:
    """What a serializer keeps of the frame before is of the same tables: both sinks hear of a series that ends."""
    peer = {"type": "remote_write", "url": "http://127.0.0.1:1/"}
    sinks = {"a": peer, "b": peer | {"tables": ["disk_io"]}, "c": peer, "main": {"enabled": False}}
    agent = Agent(config_of(template="standard", overrides={"test": {"sinks": sinks}}, environment={}), Log("error"))
    agent.exporter.open()
    device = ("gone-soon",)
    for devices in ([device], []):
        agent.cycle.frame.begin(time.time_ns(), time.monotonic_ns())
        table = agent.cycle.frame.open(DISK_IO)
        for row in range(table.claim(devices)):
            table.put_counters(row, [1] * len(DISK_IO.counters))
        agent.cycle.publish()
    ends = []
    for worker in agent.exporter.workers:
        records = worker.ring.claim(into := bytearray(), 2)
        assert len(records) == 2
        request = write_request_class().FromString(bytes(into[records[0].size : sum(r.size for r in records)]))
        ends.append(sum(math.isnan(series.samples[0].value) for series in request.timeseries))
    assert ends == [len(DISK_IO.counters)] * 3
    agent.exporter.close(0)
    agent.close()


def test_a_ring_keeps_what_a_frame_is_stamped_with() -> None:
    publish = Publisher(full_config(), instance=b"k" * 16, timed_every=7)
    publish(3)
    (worker,) = publish.exporter.workers
    (record,) = worker.ring.claim(bytearray())
    assert record[1:3] == (1, 1)
    assert record.is_own
    worker.ring.settle(1)
    (record, second) = worker.ring.claim(bytearray(), 5)
    assert (record.sequence, second.sequence) == (2, 3)
    assert second.stamp_ns == publish.frame.monotonic_ns
    assert (worker._instance, worker.timed_every) == (b"k" * 16, 7)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.5, [["cpu", "disk", "socket"]] * 4),
        (0.76, [["cpu", "disk"], ["cpu", "disk", "socket"]] * 2),
        (0.91, [["cpu"]] * 4),
    ],
)
def test_a_ring_that_fills_up_goes_without_tables(ratio: float, expected: list[list[str]]) -> None:
    publish = Publisher(full_config(), full_config("empty"))
    publish.fill(ratio)
    publish(4)
    full, empty = publish.exporter.workers
    (record,) = full.ring.claim(bytearray())
    assert record.sequence == 0
    full.ring.settle(1)
    lines = publish.lines()
    assert [tables(line) for line in lines] == expected
    for line in lines:
        left_out = [name for name in ("cpu", "disk", "socket") if name not in line]
        assert line.get("degraded", []) == left_out
        assert line["sequence"] in (1, 2, 3, 4)
    assert full.thinned_frames == sum(names != ["cpu", "disk", "socket"] for names in expected)
    assert [tables(line) for line in publish.lines(1)] == [["cpu", "disk", "socket"]] * 4  # it is another's ring
    assert empty.thinned_frames == 0


def test_only_tables_that_a_sink_wants_are_missed() -> None:
    publish = Publisher(full_config(tables=("cpu", "socket")), full_config("cpu", tables=("cpu",)))
    publish.fill(0.95, 0)
    publish.fill(0.95, 1)
    publish()
    wanted, alone = publish.exporter.workers
    assert (wanted.thinned_frames, alone.thinned_frames) == (1, 0)
    wanted.ring.claim(bytearray())
    wanted.ring.settle(1)
    (line,) = publish.lines()
    assert (tables(line), line["degraded"]) == (["cpu"], ["socket"])
    alone.ring.claim(bytearray())
    alone.ring.settle(1)
    (line,) = publish.lines(1)
    assert (tables(line), "degraded" in line) == (["cpu"], False)


def test_a_table_that_has_no_priority_is_normal() -> None:
    publish = Publisher(full_config(), priorities={"disk": Priority.HIGH, "socket": Priority.LOW})
    publish.fill(0.76)
    publish()
    publish.fill(0.15)
    publish()
    assert [left_out for _, left_out in publish.written] == [["socket"], ["cpu", "socket"]]


def test_drop_priority_makes_the_frame_smaller_before_it_drops_another() -> None:
    """Room for a frame without its sockets, not for all of it; then for its high tables; then the oldest go."""
    publish = Publisher(
        full_config(when_full=WhenFull.DROP_PRIORITY), full_config("whole", when_full=WhenFull.DROP_OLDEST), sockets=900
    )
    small, whole = publish.exporter.workers
    for worker in (0, 1):
        publish.fill(0.6, worker)
    publish()
    assert [output.least for output, _ in publish.written] == [Priority.LOW, Priority.NORMAL]
    assert (small.frames, small.thinned_frames) == ((0, 0, 2), 1)
    assert (whole.frames, whole.thinned_frames) == ((0, 1, 1), 0)  # its oldest made room
    small.ring.claim(bytearray())
    small.ring.settle(1)
    (line,) = publish.lines()
    assert (tables(line), line["degraded"]) == (["cpu", "disk"], ["socket"])
    assert tables(publish.lines(1)[0]) == ["cpu", "disk", "socket"]


def test_drop_priority_goes_down_as_far_as_it_must() -> None:
    publish = Publisher(full_config(when_full=WhenFull.DROP_PRIORITY), disks=1200)
    publish.fill(0.6)
    publish()
    assert [output.least for output, _ in publish.written] == [Priority.LOW, Priority.NORMAL, Priority.HIGH]
    assert publish.exporter.workers[0].frames == (0, 0, 2)


def test_drop_priority_goes_down_to_the_high_tables_and_then_drops_the_oldest() -> None:
    publish = Publisher(full_config(when_full=WhenFull.DROP_PRIORITY, size=2000))
    (worker,) = publish.exporter.workers
    publish.sockets = 100
    publish(3)
    assert worker.ring.drops[Drop.FULL] == 0
    least = [output.least for output, _ in publish.written]
    assert least[:2] == [Priority.LOW, Priority.NORMAL]
    publish(40)
    assert worker.ring.drops[Drop.FULL] > 0
    assert sum(worker.frames) == 43
    assert worker.thinned_frames == 43
    lines = publish.lines()
    assert [line["sequence"] for line in lines] == list(range(44 - len(lines), 44))
    assert {tuple(tables(line)) for line in lines} <= {("cpu",), ("cpu", "disk")}
    assert ["cpu"] in [tables(line) for line in lines]


def test_sample_keeps_every_second_new_frame() -> None:
    publish = Publisher(full_config(when_full=WhenFull.SAMPLE, size=4000))
    (worker,) = publish.exporter.workers
    publish(200)
    drops = worker.ring.drops
    assert drops[Drop.SAMPLED] == pytest.approx(drops[Drop.FULL], abs=10)
    assert drops[Drop.SAMPLED] + drops[Drop.FULL] == worker.frames[1]
    sequences = [line["sequence"] for line in publish.lines()]
    gaps = [after - before for before, after in itertools.pairwise(sequences)]
    assert set(gaps) <= {1, 2}  # a shorter one may fit without making room
    assert gaps.count(2) > len(gaps) / 2
    assert sequences[-1] >= 199


def test_a_frame_too_large_for_its_ring_is_dropped_and_the_next_one_goes() -> None:
    publish = Publisher(full_config(size=2000), sockets=1000)
    publish()
    publish.sockets = 1
    publish()
    assert publish.exporter.workers[0].frames == (0, 1, 1)
    assert publish.lines()[0]["sequence"] == 2


def test_check_opens_the_sinks_and_closes_them(tmp_path: Path) -> None:
    sink = ScriptedSink()
    Exporter([config(sink), file_config(tmp_path / "out")], Log()).check()
    assert sink.closed == 1
    with pytest.raises(UsageError, match="No such file"):
        Exporter([file_config(tmp_path / "absent" / "out")], Log()).check()
