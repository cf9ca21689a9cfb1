"""Small real sinks for tests, and workers and exporters over them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent.delivery import WhenFull
from agent.errors import SinkClosedError, SinkError
from agent.exporter import Exporter
from agent.logs import Log
from agent.sink_worker import SinkConfig, SinkWorker
from agent.sinks.file import FileSettings, FileSink
from agent.sinks.sink import BatchSettings, BufferSettings, RetrySettings, SinkSettings
from agent.units import Duration, Size

PATIENCE_SECONDS = 60


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
        self.started = 0
        self.closed = False

    def open(self) -> None: ...

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        self.started += 1
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


class ScriptedSink:
    """Does what the script says, a step a delivery: raises an error, or takes all (None); at its end, `then`.

    Attributes:
        batches: what each delivery was called with.
        taken: payloads delivered.
        before: called at the start of each delivery.
    """

    Settings = SinkSettings

    def __init__(self, *script: Exception | None, then: Exception | None = None) -> None:
        self.script = list(script)
        self.then = then
        self.batches: list[list[bytes]] = []
        self.taken: list[bytes] = []
        self.before: Callable[[], object] = lambda: None
        self.closed = 0

    def open(self) -> None: ...

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        self.before()
        self.batches.append([bytes(payload) for payload in payloads])
        step = self.script.pop(0) if self.script else self.then
        if step is None:
            self.taken += self.batches[-1]
            return
        if isinstance(step, SinkError):
            self.taken += self.batches[-1][: step.delivered]
        raise step.with_traceback(None)

    def close(self) -> None:
        self.closed += 1


class PickySink(ScriptedSink):
    """Refuses what `bad` is true of, and takes nothing of a batch in which there is one."""

    def __init__(self, bad: Callable[[bytes], bool], error: Callable[[], Exception]) -> None:
        super().__init__()
        self.bad = bad
        self.error = error

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        self.script = [self.error() if any(self.bad(bytes(payload)) for payload in payloads) else None]
        super().deliver(payloads)


class Clock:
    """A monotonic clock that stands still; the waits of a worker move it, and are kept in `waits`."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000 * 10**9
        self.waits: list[float] = []

    def __call__(self) -> int:
        return self.now_ns

    @property
    def seconds(self) -> float:
        return self.now_ns / 1e9

    def pass_seconds(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)

    def event(self) -> threading.Event:
        clock = self

        class Event(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                assert timeout is not None
                if not self.is_set():
                    clock.waits.append(timeout)
                    clock.pass_seconds(max(timeout, 0))
                return self.is_set()

        return Event()


def settings(
    size: int = 1 << 20,
    when_full: WhenFull = WhenFull.DROP_OLDEST,
    path: Path | str = "",
    tables: tuple[str, ...] = (),
    base: float = 0.001,
    cap: float = 5,
    max_age: float = 0,
    **batch: Any,
) -> SinkSettings:
    for name in ("bytes", "linger"):
        if name in batch:
            batch[name] = (Size if name == "bytes" else Duration)(batch[name])
    return SinkSettings(
        tables=tables,
        buffer=BufferSettings(size=Size(size), when_full=when_full, path=str(path)),
        batch=BatchSettings(**batch),
        retry=RetrySettings(base=Duration(base), cap=Duration(cap), max_age=Duration(max_age)),
    )


def config(sink: Any, name: str = "sink", **kinds: Any) -> SinkConfig:
    return SinkConfig(name, sink, settings(**kinds))


def file_config(path: Path, name: str = "file", buffer: str = "1MiB") -> SinkConfig:
    kinds = FileSettings(
        type="file",
        path=str(path),
        buffer=BufferSettings(size=Size.parse(buffer)),
        retry=RetrySettings(base=Duration(0.001)),
    )
    return SinkConfig(name, FileSink(kinds), kinds)


def opened(sink: Any, clock: Clock | None = None, timed_every: int = 1, **kinds: Any) -> SinkWorker:
    """A worker whose thread has not started; with a clock, its waits take no time."""
    log = Log("info", "json")
    clock_ns = clock or time.monotonic_ns
    worker = SinkWorker(config(sink, **kinds), log, lambda: None, b"i" * 16, timed_every, clock_ns)
    if clock is not None:
        worker._stopping, worker._ended = clock.event(), clock.event()
    worker.open()
    return worker


def put(worker: SinkWorker, first: int, last: int, width: int = 0) -> None:
    """Pushes numbers, stamped with the worker's clock."""
    for sequence in range(first, last + 1):
        worker.ring.push(b"%0*d" % (width, sequence), sequence, worker._clock_ns(), 1, time.time_ns())


def drain(worker: SinkWorker) -> None:
    """Lets the thread work until the ring is empty or the sink done for; nothing can be pushed any more."""
    worker.ring.close()
    worker.start()
    worker._thread.join(PATIENCE_SECONDS)
    assert not worker._thread.is_alive()


def started(*configs: SinkConfig, on_reader_gone: Callable[[], None] = lambda: None) -> Exporter:
    exporter = Exporter(configs, Log("info", "json"))
    exporter.open()
    exporter.start(on_reader_gone)
    return exporter


def push(exporter: Exporter, first: int, last: int, width: int = 0) -> None:
    """Pushes numbers into every ring, with spaces behind them."""
    for sequence in range(first, last + 1):
        for worker in exporter.workers:
            worker.ring.push(b"%d" % sequence + b" " * width, sequence, time.monotonic_ns())


def accounted(worker: SinkWorker) -> bool:
    return sum(worker.frames) == worker.ring.pushed + worker.ring.recovered


def numbers(path: Path) -> list[int]:
    return [int(line) for line in path.read_bytes().splitlines()]


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The log's lines since the last call."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]
