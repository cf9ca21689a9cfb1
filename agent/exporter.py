"""The exporter: one ring and one thread for each sink.

A slow or failing sink delays neither the cycle nor another sink: the cycle only copies
a payload into a ring, and what the ring can't hold is dropped by the sink's own policy
and counted. For each sink, always: pushed = sent + dropped + backlog.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agent.errors import SinkClosedError, SinkError
from agent.logs import Log
from agent.pool import BUFFER_START_BYTES
from agent.ring import Payload, Record, Ring
from agent.sinks.sink import Sink, SinkSettings

_FIRST_RETRY_SECONDS = 0.1
_LAST_RETRY_SECONDS = 5.0
OPEN_AFTER_FAILURES = 5


class LatencyHistogram:
    """Latencies in 512 buckets, eight for each power of two nanoseconds (12 % wide).

    Older ones lose weight: all counts are halved whenever there are 1,024.
    """

    __slots__ = ("_buckets", "_total")

    def __init__(self) -> None:
        self._buckets = np.zeros(512, dtype=np.int64)
        self._total = 0

    def add(self, nanoseconds: int) -> None:
        power = max(nanoseconds, 8).bit_length() - 1
        self._buckets[power * 8 + (max(nanoseconds, 8) >> (power - 3)) - 8] += 1
        self._total += 1
        if self._total >= 1024:
            self._buckets //= 2
            self._total = int(self._buckets.sum())

    def quantiles_seconds(self, *quantiles: float) -> list[float]:
        """The upper bound of the bucket that holds each quantile; NaN without any latency."""
        # The sum comes from the same reading: the sink's thread may be just between halving and summing up.
        cumulative = self._buckets.cumsum()
        total = int(cumulative[-1])
        if not total:
            return [float("nan")] * len(quantiles)
        places = np.searchsorted(cumulative, [quantile * total for quantile in quantiles])
        return [(int(place) % 8 + 9) * 2.0 ** (int(place) // 8 - 3) / 1e9 for place in places]


@dataclass(frozen=True, slots=True)
class SinkConfig:
    """A sink and what the exporter must know of its settings."""

    name: str
    sink: Sink
    settings: SinkSettings


class SinkWorker:
    """A sink's ring, and the thread that takes from it and delivers.

    A payload that couldn't be delivered is tried again, with doubling pauses, until it
    is; meanwhile the ring holds what comes.

    Attributes:
        sent_frames, sent_bytes: delivered since the start.
        failures, retries: deliveries that failed; those that were tried again.
        failures_in_a_row: since the last success.
        reader_gone: whether the sink's reader has left for good.
    """

    def __init__(self, config: SinkConfig, log: Log, on_closed: Callable[[], None]) -> None:
        self.name = config.name
        self.format = config.settings.format
        self.ring = Ring(config.settings.buffer.size, config.settings.buffer.when_full)
        self.latency = LatencyHistogram()
        self.sent_frames = 0
        self.sent_bytes = 0
        self.failures = 0
        self.retries = 0
        self.failures_in_a_row = 0
        self.reader_gone = False
        self._given_up = 0
        self._abandoned = False  # by `join`: what the thread still does is not counted any more
        self._counting = threading.Lock()
        self._in_flight: Record | None = None
        self._sink = config.sink
        self._log = log
        self._on_closed = on_closed
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"sink {config.name}", daemon=True)

    @property
    def dropped_frames(self) -> int:
        return self.ring.dropped + self._given_up

    @property
    def backlog_frames(self) -> int:
        """Frames in the ring, and the one that is being delivered."""
        return self.frames[2]

    @property
    def frames(self) -> tuple[int, int, int]:
        """Frames sent, dropped and in the backlog at one moment: together all that were pushed."""
        sent, dropped = self.sent_frames, self.dropped_frames
        return sent, dropped, self.ring.pushed - sent - dropped

    @property
    def backlog_bytes(self) -> int:
        in_flight = self._in_flight
        return self.ring.held_bytes + (in_flight.size if in_flight else 0)

    @property
    def oldest_stamp_ns(self) -> int | None:
        """The monotonic stamp of the oldest frame that is not delivered."""
        in_flight = self._in_flight
        return in_flight.stamp_ns if in_flight else self.ring.oldest_stamp_ns

    @property
    def circuit_open(self) -> bool:
        """Whether the sink has failed so often in a row that it is only probed."""
        return self.failures_in_a_row >= OPEN_AFTER_FAILURES

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Lets the thread deliver what is held, without waiting for it."""
        self._stopping.set()
        self.ring.close()

    def join(self, timeout_seconds: float) -> None:
        """Waits for the thread; what it has not delivered by then is counted as dropped."""
        if self._thread.ident is not None:
            self._thread.join(max(timeout_seconds, 0))
        self.ring.drop_held()
        with self._counting:
            self._abandoned = True
            self._given_up += self.backlog_frames
            self._in_flight = None
        if not self._thread.is_alive():
            self._sink.close()

    def _run(self) -> None:
        buffer = bytearray(BUFFER_START_BYTES)
        while (record := self.ring.take(buffer, wait=True)) is not None:
            self._in_flight = record
            with memoryview(buffer) as whole, whole[: record.size] as payload:
                if not self._deliver(record, payload):
                    return

    def _deliver(self, record: Record, payload: memoryview) -> bool:
        """Delivers a record, trying again as often as it takes; False when the sink is done for."""
        pause_seconds = _FIRST_RETRY_SECONDS
        while True:
            try:
                self._sink.deliver([payload])
            except SinkClosedError:
                self.reader_gone = True
                self._give_up(record)
                self.ring.close()
                self.ring.drop_held()
                self._on_closed()
                return False
            except SinkError as error:
                self._count_failure(str(error))
            except Exception as error:  # a defect in a sink must not end its thread unseen
                self._count_failure(f"{type(error).__name__}: {error}")
            else:
                self._count_delivery(record)
                return True
            if self._stopping.is_set() and self.failures_in_a_row > 1:
                self._give_up(record)
                return False
            self._stopping.wait(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _LAST_RETRY_SECONDS)
            self.retries += 1

    def _count_delivery(self, record: Record) -> None:
        self.latency.add(time.monotonic_ns() - record.stamp_ns)
        with self._counting:
            self._in_flight = None
            if not self._abandoned:
                self.sent_frames += record.records
                self.sent_bytes += record.size
        if self.failures_in_a_row:
            self._log.info("sink delivers again", sink=self.name, failures=self.failures_in_a_row)
            self.failures_in_a_row = 0

    def _count_failure(self, reason: str) -> None:
        self.failures += 1
        self.failures_in_a_row += 1
        if self.failures_in_a_row == 1:  # once an episode
            self._log.warning("sink fails, its ring holds the frames", sink=self.name, reason=reason)

    def _give_up(self, record: Record) -> None:
        with self._counting:
            self._in_flight = None
            if not self._abandoned:
                self._given_up += record.records


class Exporter:
    """All sinks: hands each frame's payload to the ring of every sink of its format.

    Attributes:
        workers: one a sink, in the order of the configuration.
        reader_gone: set when a sink's reader has left for good (a closed stdout pipe).
    """

    def __init__(self, sinks: Sequence[SinkConfig], log: Log) -> None:
        self.reader_gone = threading.Event()
        self._log = log
        self._sinks = sinks
        self._wake: Callable[[], None] = lambda: None
        self.workers = [SinkWorker(config, log, self._on_closed) for config in sinks]
        self.formats: Mapping[str, list[SinkWorker]] = {
            name: [worker for worker in self.workers if worker.format == name]
            for name in dict.fromkeys(worker.format for worker in self.workers)
        }

    def open(self) -> None:
        """Opens the sinks.

        Raises:
            UsageError: a sink can't start.
        """
        for config in self._sinks:
            config.sink.open()

    def start(self, on_reader_gone: Callable[[], None]) -> None:
        """Starts the sinks' threads.

        Args:
            on_reader_gone: called, from a sink's thread, when a sink's reader has left.
        """
        self._wake = on_reader_gone
        for worker in self.workers:
            worker.start()

    def push(self, format: str, payload: Payload, sequence: int, stamp_ns: int) -> None:
        """Copies a payload into the ring of every sink that takes this format."""
        for worker in self.formats[format]:
            worker.ring.push(payload, sequence, stamp_ns)

    def close(self, timeout_seconds: float) -> None:
        """Delivers what is held for at most `timeout_seconds` in all; the rest is dropped, counted and logged."""
        deadline = time.monotonic() + timeout_seconds
        dropped_before = [worker.dropped_frames for worker in self.workers]
        for worker in self.workers:
            worker.finish()
        for worker, dropped in zip(self.workers, dropped_before, strict=True):
            worker.join(deadline - time.monotonic())
            lost = worker.dropped_frames - dropped
            if lost and not worker.reader_gone:
                self._log.warning("frames not delivered at shutdown", sink=worker.name, dropped_frames=lost)

    def _on_closed(self) -> None:
        self.reader_gone.set()
        self._wake()
