"""The exporter with real sinks on real descriptors: pipes, files, devices."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.errors import SinkClosedError, SinkError, UsageError
from agent.exporter import OPEN_AFTER_FAILURES, Exporter, LatencyHistogram, SinkConfig, SinkWorker
from agent.logs import Log
from agent.ring import WhenFull
from agent.sinks.file import FileSettings, FileSink
from agent.sinks.sink import BufferSettings, SinkSettings
from agent.units import Size

PATIENCE_SECONDS = 60
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")


def until(condition: Callable[[], Any], what: str = "condition") -> None:
    """Waits for a condition; fails after a minute."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"never true: {what}"
        time.sleep(0.001)


class PipeSink:
    """Lines into a pipe of its own; blocks while the pipe is full and nobody reads."""

    Settings = SinkSettings

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.delivered = 0
        self.closed = False

    def open(self) -> None: ...

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        for delivered, payload in enumerate(payloads):
            line = bytes(payload) + b"\n"
            try:
                while line:
                    line = line[os.write(self.writer, line) :]
            except BrokenPipeError:
                raise SinkClosedError("its reader has gone", delivered) from None
            self.delivered += 1

    def close(self) -> None:
        if not self.closed:
            os.close(self.writer)
        self.closed = True

    def stall(self) -> None:
        """Fills the pipe with empty lines, so that the very next delivery blocks until somebody reads."""
        os.set_blocking(self.writer, False)
        for size in (4096, 1):
            with suppress(BlockingIOError):
                while True:
                    os.write(self.writer, b"\n" * size)
        os.set_blocking(self.writer, True)

    def read_all(self) -> list[bytes]:
        """The lines up to the writer's end, without empty ones."""
        with os.fdopen(self.reader, "rb") as file:
            return [line for line in file.read().splitlines() if line]


class FlakySink:
    """Raises what `errors` holds, one a delivery, then takes everything."""

    Settings = SinkSettings

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.payloads: list[bytes] = []

    def open(self) -> None: ...

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.payloads += [bytes(payload) for payload in payloads]

    def close(self) -> None: ...


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


def file_config(path: Path, name: str = "file", buffer: str = "1MiB") -> SinkConfig:
    settings = FileSettings(type="file", path=str(path), buffer=BufferSettings(size=Size.parse(buffer)))
    return SinkConfig(name, FileSink(settings), settings)


def config(sink: Any, name: str, size: int = 1 << 20, when_full: WhenFull = WhenFull.DROP_OLDEST) -> SinkConfig:
    return SinkConfig(name, sink, SinkSettings(buffer=BufferSettings(size=Size(size), when_full=when_full)))


def started(*configs: SinkConfig, on_reader_gone: Callable[[], None] = lambda: None) -> Exporter:
    exporter = Exporter(configs, Log("info", "json"))
    exporter.open()
    exporter.start(on_reader_gone)
    return exporter


def push(exporter: Exporter, first: int, last: int, width: int = 0) -> None:
    for sequence in range(first, last + 1):
        exporter.push("json", b"%d" % sequence + b" " * width, sequence, time.monotonic_ns())


def accounted(worker: SinkWorker) -> bool:
    return worker.ring.pushed == worker.sent_frames + worker.dropped_frames + worker.backlog_frames


def numbers(path: Path) -> list[int]:
    return [int(line) for line in path.read_bytes().splitlines()]


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The log's lines since the last call."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


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
        assert worker.backlog_bytes == 0
        assert worker.oldest_stamp_ns is None
        p50, p99 = worker.latency.quantiles_seconds(0.5, 0.99)
        assert 0 < p50 <= p99
    assert pipe.closed


def test_each_format_has_its_sinks(tmp_path: Path) -> None:
    exporter = Exporter([file_config(tmp_path / "a", "a"), file_config(tmp_path / "b", "b")], Log())
    assert {name: [worker.name for worker in workers] for name, workers in exporter.formats.items()} == {
        "json": ["a", "b"]
    }


@pytest.mark.parametrize("when_full", WhenFull)
def test_a_stalled_sink_delays_nobody(
    tmp_path: Path, pipes: Callable[[], PipeSink], capsys: pytest.CaptureFixture[str], when_full: WhenFull
) -> None:
    """Nobody reads the pipe until the file has everything: were they tied together, this would not end."""
    pipe = pipes()
    pipe.stall()
    exporter = started(config(pipe, "stalled", 64 << 10, when_full), file_config(tmp_path / "out", buffer="16MiB"))
    stalled, file = exporter.workers
    push(exporter, 1, 5000, width=250)  # 1.3 MB; the ring holds 64 KiB
    until(lambda: file.sent_frames == 5000, "the file has all")
    assert numbers(tmp_path / "out") == list(range(1, 5001))
    assert file.dropped_frames == 0
    assert stalled.sent_frames == 0
    assert stalled.dropped_frames == stalled.ring.dropped
    held = (64 << 10) // 280  # 24 of header and 254 of payload, in eights
    assert held - 1 <= stalled.backlog_frames <= held + 1
    assert stalled.backlog_bytes >= stalled.backlog_frames * 251
    assert stalled.ring.used_ratio > 0.9
    assert stalled.oldest_stamp_ns is not None
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
    assert (arrived[-1] == 5000) == (when_full is WhenFull.DROP_OLDEST)
    assert events(capsys) == []


def test_a_failing_sink_is_retried_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its directory goes away and comes back, twice: two episodes, logged once each."""
    directory = tmp_path / "logs"
    exporter = Exporter([file_config(directory / "out")], Log("info", "json"))
    directory.mkdir()
    exporter.open()
    exporter.start(lambda: None)
    (worker,) = exporter.workers
    push(exporter, 1, 10)
    until(lambda: worker.sent_frames == 10)
    kept = [numbers(directory / "out")]
    for episode in (1, 2):
        shutil.rmtree(directory)
        failures = worker.failures
        push(exporter, 10 * episode + 1, 10 * episode + 10)
        until(lambda: worker.failures >= failures + 3, "three failures")  # noqa: B023
        assert worker.failures_in_a_row >= 3
        assert worker.backlog_frames == 10
        assert accounted(worker)
        directory.mkdir()
        until(lambda: worker.sent_frames == 10 * episode + 10, "delivered")  # noqa: B023
        until(lambda: not worker.failures_in_a_row)
        kept.append(numbers(directory / "out"))
    exporter.close(PATIENCE_SECONDS)
    assert [number for part in kept for number in part] == list(range(1, 31))
    assert worker.frames == (30, 0, 0)
    assert worker.retries == worker.failures >= 6
    logged = events(capsys)
    assert [line["event"] for line in logged] == ["sink fails, its ring holds the frames", "sink delivers again"] * 2
    assert all(line["sink"] == "file" for line in logged)
    assert "out: No such file or directory" in logged[0]["reason"]
    assert logged[1]["failures"] + logged[3]["failures"] == worker.failures


@linux
def test_a_device_that_is_full_opens_the_circuit(capsys: pytest.CaptureFixture[str]) -> None:
    exporter = started(file_config(Path("/dev/full")))
    (worker,) = exporter.workers
    assert not worker.circuit_open
    push(exporter, 1, 3)
    until(lambda: worker.failures >= OPEN_AFTER_FAILURES, "five failures")
    assert worker.circuit_open
    assert worker.frames == (0, 0, 3)
    exporter.close(PATIENCE_SECONDS)
    assert worker.frames == (0, 3, 0)
    logged = events(capsys)
    assert [line["event"] for line in logged] == [
        "sink fails, its ring holds the frames",
        "frames not delivered at shutdown",
    ]
    assert "No space left on device" in logged[0]["reason"]
    assert logged[1]["dropped_frames"] == 3


def test_a_defect_in_a_sink_does_not_end_its_thread(capsys: pytest.CaptureFixture[str]) -> None:
    sink = FlakySink(ZeroDivisionError("oh"), SinkError("busy"), KeyError("x"))
    exporter = started(config(sink, "flaky"))
    (worker,) = exporter.workers
    push(exporter, 1, 5)
    until(lambda: worker.sent_frames == 5)
    exporter.close(PATIENCE_SECONDS)
    assert sink.payloads == [b"1", b"2", b"3", b"4", b"5"]
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
    exporter = started(config(pipe, "stuck"), file_config(tmp_path / "out"))
    stuck, file = exporter.workers
    push(exporter, 1, 1000)
    until(lambda: file.sent_frames == 1000)
    until(lambda: stuck.ring.taken == 1, "the first frame is in flight")
    exporter.close(0.2)
    assert stuck.frames == (0, 1000, 0)
    assert stuck.backlog_bytes == 0
    assert file.frames == (1000, 0, 0)
    logged = events(capsys)
    assert [(line["event"], line["sink"], line["dropped_frames"]) for line in logged] == [
        ("frames not delivered at shutdown", "stuck", 1000)
    ]
    assert not pipe.closed  # its thread still uses it
    # The write gets through after all: what was counted as dropped is not counted a second time.
    got = b""
    while not got.endswith(b"\n1\n"):
        got += os.read(pipe.reader, 65536)
    stuck._thread.join(PATIENCE_SECONDS)
    assert not stuck._thread.is_alive()
    assert pipe.delivered == 1
    assert stuck.frames == (0, 1000, 0)


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
    until(lambda: worker.sent_frames == 5)
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


def test_the_account_is_exact_at_every_moment(tmp_path: Path) -> None:
    """Read by the pushing thread, as the agent's probe does, while the sink's thread delivers and the ring drops."""
    exporter = started(file_config(tmp_path / "out", buffer="2KiB"))
    (worker,) = exporter.workers
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    wrong = []
    try:
        for sequence in range(1, 20_001):
            exporter.push("json", b"x" * 50, sequence, sequence)
            sent, dropped, backlog = worker.frames
            if sent + dropped + backlog != sequence or not 0 <= backlog <= 2048 // 80 + 1:
                wrong.append((sequence, sent, dropped, backlog))
    finally:
        sys.setswitchinterval(interval)
    exporter.close(PATIENCE_SECONDS)
    assert wrong == []
    assert worker.sent_frames == (tmp_path / "out").read_bytes().count(b"\n")
    assert worker.sent_frames + worker.dropped_frames == 20_000


def test_no_latency_is_nan() -> None:
    assert np.isnan(LatencyHistogram().quantiles_seconds(0.5, 0.99)).all()


@pytest.mark.parametrize("scale", [50, 1e4, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("shape", ["lognormal", "uniform", "same"])
def test_latency_quantiles_are_within_a_bucket(scale: float, shape: str) -> None:
    """An eighth above the exact quantile at most, and never below it."""
    random = np.random.default_rng(7)
    values = {
        "lognormal": random.lognormal(0, 1, 1000) * scale,
        "uniform": (1 + random.random(1000)) * scale,
        "same": np.full(1000, scale),
    }[shape].astype(np.int64)
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(int(value))
    for quantile in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = max(float(np.percentile(values, 100 * quantile, method="inverted_cdf")), 8.0)
        (seconds,) = histogram.quantiles_seconds(quantile)
        # To the nanosecond: a bucket holds whole ones, and its bound is the next one's beginning.
        assert exact <= seconds * 1e9 * (1 + 1e-9)
        assert seconds * 1e9 <= exact * 1.125 + 1


def test_latencies_at_both_ends() -> None:
    histogram = LatencyHistogram()
    for nanoseconds in (-5, 0, 1, 2**62, 2**63 - 1):
        histogram.add(nanoseconds)
    low, high = histogram.quantiles_seconds(0.5, 1.0)
    assert low == 9e-9
    assert high == 2**63 / 1e9


def test_latencies_are_bounded_and_the_latest_count() -> None:
    """A million latencies in 512 buckets; what was slow long ago has no weight left."""
    histogram = LatencyHistogram()
    for _ in range(1000):
        histogram.add(10**9)
    for _ in range(100_000):
        histogram.add(1000)
        assert histogram._total < 1024
    assert histogram._buckets.size == 512
    assert histogram._total == histogram._buckets.sum()
    assert max(histogram.quantiles_seconds(0.5, 0.99)) < 2e-6


def test_latencies_read_while_another_thread_adds_and_halves() -> None:
    """A quantile from between halving the buckets and summing them up would be centuries."""
    histogram = LatencyHistogram()
    done = threading.Event()

    def add() -> None:
        while not done.is_set():
            histogram.add(1000)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    writer = threading.Thread(target=add, daemon=True)
    writer.start()
    try:
        until(lambda: histogram._total > 0)
        seen = [histogram.quantiles_seconds(0.5, 0.99) for _ in range(30_000)]
    finally:
        sys.setswitchinterval(interval)
        done.set()
        writer.join(PATIENCE_SECONDS)
    assert max(map(max, seen)) < 2e-6
