"""A sink's ring, and the thread that claims from it, delivers and settles.

Whatever a sink does, frames wait in its ring, are delivered in order, and leave it by one of two
doors: taken, or dropped for a reason that is counted. Always: pushed + recovered = taken + dropped
+ backlog.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from operator import add

from agent.delivery import Breaker, Circuit, Drop, batch_records, pause_seconds
from agent.errors import RejectedError, SinkClosedError, SinkError, UsageError, free_frames
from agent.frame import Frame
from agent.latency import LatencyHistogram
from agent.logs import Episode, Log
from agent.pool import BUFFER_START_BYTES
from agent.ring import NO_INSTANCE, Ring
from agent.ring_records import Payload, Record, need, slices
from agent.ring_recovery import check_place, open_ring
from agent.sinks.sink import Sink, SinkSettings


@dataclass(frozen=True, slots=True)
class SinkConfig:
    """A sink and what the exporter must know of its settings.

    Attributes:
        place: where it is configured, for messages.
    """

    name: str
    sink: Sink
    settings: SinkSettings
    place: str = ""


class SinkWorker:
    """One sink's way out.

    A batch that couldn't be delivered is tried again, with growing random pauses, until it is, or
    grows too old; a breaker spares a peer that has failed five times in a row. Meanwhile the ring
    holds what comes.

    Args:
        instance: the run, 16 bytes; tells its frames from those that a buffer's file held.
        timed_every: one frame in so many is timed from its stamp to its delivery.
        clock_ns: the monotonic clock that frames are stamped with.

    Attributes:
        sink: what it delivers to.
        ring: the sink's ring, once it is open.
        sent_bytes: payload bytes delivered since the start.
        failures, retries: deliveries that failed; those that were tried again.
        thinned_frames: frames that were pushed without some of their tables.
        oversized_bytes: of the latest frame, if it didn't fit into the ring at all; else 0.
        breaker: as the last delivery left it.
        reader_gone: whether the sink's reader has left for good.
    """

    ring: Ring

    def __init__(
        self,
        config: SinkConfig,
        log: Log,
        on_closed: Callable[[], None],
        instance: bytes = NO_INSTANCE,
        timed_every: int = 1,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.name = config.name
        self.settings = config.settings
        self.latency = LatencyHistogram()
        self.sent_bytes = 0
        self.failures = 0
        self.retries = 0
        self.failures_in_a_row = 0
        self.thinned_frames = 0
        self.oversized_bytes = 0
        self.breaker = Breaker()
        self.reader_gone = False
        self.sink = config.sink
        self._place = config.place or f"sinks.{config.name}"
        self._log = log
        self._on_closed = on_closed
        self._instance = instance
        self.timed_every = timed_every
        self._clock_ns = clock_ns
        self._batch = config.settings.batch.min
        self._failing = Episode()
        self._refusing = Episode()
        self._alone = False  # after a rejection: each payload of the batch goes alone
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._deadline_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name=f"sink {config.name}", daemon=True)

    @property
    def frames(self) -> tuple[int, int, int]:
        """Frames sent, dropped and in the backlog at one moment: together all that were pushed or recovered."""
        return self.ring.account

    @property
    def circuit(self) -> Circuit:
        """What the breaker is at this moment."""
        return self.breaker.at(self._now_seconds()).circuit

    @property
    def has_crashed(self) -> bool:
        """Whether its thread has ended by a defect: not at the end of the agent, nor because its reader has gone."""
        has_ended = self._thread.ident is not None and not self._thread.is_alive()
        return has_ended and not self.reader_gone and not self._stopping.is_set()

    def open(self) -> None:
        """Opens the ring and the sink.

        Raises:
            UsageError: one of them can't start.
        """
        buffer = self.settings.buffer
        try:
            if buffer.path:
                opened = open_ring(buffer.path, buffer.size, buffer.when_full, buffer.sync, self._instance)
                self.ring = opened.ring
                for notice in opened.notices:
                    self._log.warning("buffer repaired", sink=self.name, reason=notice)
                if self.ring.recovered:
                    self._log.info("buffer recovered", sink=self.name, frames=len(self.ring))
            else:
                self.ring = Ring(buffer.size, buffer.when_full, instance=self._instance)
            if buffer.populate:
                self.ring.populate()
        except UsageError as error:
            raise UsageError(f"{self._place}.buffer.path: {error}") from None
        except OSError as error:
            what = f"{self._place}.buffer.size = {buffer.size}: {error.strerror}"
            raise UsageError(what, "buffers that this host has memory for") from None
        with self._usage_errors():
            self.sink.open()
        self._tell_notices()

    def check(self) -> None:
        """Finds out whether ring and sink could start; a buffer's file, which may be in use, stays untouched.

        Raises:
            UsageError: one of them couldn't.
        """
        try:
            check_place(self.settings.buffer.path)
        except UsageError as error:
            raise UsageError(f"{self._place}.buffer.path: {error}") from None
        with self._usage_errors():
            getattr(self.sink, "check", self.sink.open)()
            self.sink.close()
        self._tell_notices()

    def _tell_notices(self) -> None:
        """Logs what the sink has to say, each once."""
        notices = getattr(self.sink, "notices", [])
        while notices:
            self._log.warning("sink says", sink=self.name, reason=notices.pop(0))

    @contextmanager
    def _usage_errors(self) -> Iterator[None]:
        """Adds where the sink is configured."""
        try:
            yield
        except UsageError as error:
            raise UsageError(f"{self._place}: {error}") from None
        except Exception as error:  # somebody else's sink
            raise UsageError(f"{self._place}: {type(error).__name__}: {error}") from None

    def start(self) -> None:
        self._thread.start()

    def push(self, payload: Payload, frame: Frame, is_thinned: bool) -> None:
        """Copies a frame's payload into the ring."""
        if self.ring.push(payload, frame.sequence, frame.monotonic_ns, 1, frame.time_unix_ns):
            self.oversized_bytes = 0
        elif need(len(payload)) > self.ring.size:
            if not self.oversized_bytes:  # once an episode
                fault = f"a frame of {len(payload)} bytes, and a ring of {self.ring.size}"
                self._log.warning("sink's buffer.size is too small for a frame", sink=self.name, reason=fault)
            self.oversized_bytes = len(payload)
        self.thinned_frames += is_thinned

    def finish(self, deadline_seconds: float) -> None:
        """Lets the thread deliver what is held until a moment of the monotonic clock, without waiting for it."""
        self._deadline_seconds = deadline_seconds
        self._stopping.set()
        self.ring.close()

    def join(self) -> None:
        """Waits for the thread up to its deadline.

        What it has not delivered by then stays in the buffer's file, or is counted as dropped without one.
        """
        if self._thread.ident is not None:
            self._thread.join(max(self._deadline_seconds - self._now_seconds(), 0))
        self._ended.set()
        self._leave()
        if not self._thread.is_alive():
            self._close_sink()
        self.ring.unmap()  # a thread that hangs settles nothing any more

    def has_ended_within(self, seconds: float) -> bool:
        """Waits for the thread at most so long; whether it has ended, or never ran."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def go_on_from(self, former: SinkWorker) -> None:
        """Counts on from where the sink's former worker ended; the ring is open, and nothing pushed yet."""
        ring, before = self.ring, former.ring
        ring.pushed += before.pushed - before.account[2]  # what it left in its file, this ring has found there
        ring.recovered, ring.taken = ring.recovered + before.recovered, ring.taken + before.taken
        ring.drops[:] = map(add, ring.drops, before.drops)
        self.sent_bytes, self.thinned_frames = former.sent_bytes, former.thinned_frames
        self.failures, self.retries = former.failures, former.retries

    def _close_sink(self) -> None:
        try:
            self.sink.close()
        except Exception as error:  # somebody else's sink
            self._log.warning("sink does not close", sink=self.name, reason=repr(error))

    def _now_seconds(self) -> float:
        return self._clock_ns() / 1e9

    def _leave(self) -> None:
        """Lets go of what is held: the next process has it, or it is given up."""
        if self.ring.outlives_process:
            self.ring.release()
        else:
            self.ring.drop_held(Drop.SHUTDOWN)

    def _run(self) -> None:
        self._claim_and_deliver()
        if self._ended.is_set() and not self.reader_gone:
            self._close_sink()  # nobody has waited for it so long

    def _claim_and_deliver(self) -> None:
        buffer = bytearray(BUFFER_START_BYTES)
        batch = self.settings.batch
        while not self._ended.is_set():
            size = batch.records if isinstance(batch.records, int) else self._adapted()
            claimed = self.ring.claim(buffer, size, batch.bytes, wait=True, linger_seconds=batch.linger)
            if not claimed:
                return
            with memoryview(buffer) as whole:
                payloads = slices(whole, claimed)
                goes_on = self._deliver(claimed, payloads)
                for payload in payloads:
                    payload.release()
            if not goes_on:
                return

    def _adapted(self) -> int:
        batch = self.settings.batch
        self._batch = batch_records(self.ring.used_ratio, batch.min, batch.max, self._batch)
        return self._batch

    def _deliver(self, claimed: Sequence[Record], payloads: Sequence[memoryview]) -> bool:
        """Delivers a batch, trying again as often as it takes; False when the sink is done for."""
        done = 0
        self._alone = False
        while True:
            done += self._drop_aged(claimed[done:])
            if done == len(claimed):
                return True
            stop = done + 1 if self._alone else len(claimed)
            settled, pause = self._attempt(claimed[done:stop], payloads[done:stop])
            done += settled
            if pause is not None and not self._wait(pause):
                return False

    def _attempt(self, batch: Sequence[Record], payloads: Sequence[memoryview]) -> tuple[int, float | None]:
        """Delivers some payloads once; how many are settled, and the seconds to wait after a failure."""
        began = self._now_seconds()
        self._set_breaker(self.breaker.at(began))
        try:
            self.sink.deliver(payloads)
        except SinkClosedError as error:
            settled = self._settle(batch[: error.delivered])
            self._on_reader_gone()
            return settled, 0.0
        except RejectedError as error:
            settled = self._settle(batch[: error.delivered])
            if error.each and len(batch) - settled > 1:
                self._alone = True
                return settled, None
            self._settle(batch[settled:], Drop.REJECTED)
            self._count_rejection(str(error))
            return len(batch), None
        except SinkError as error:
            free_frames(error)
            self._tell_notices()
            settled = self._settle(batch[: error.delivered])
            return settled, self._count_failure(str(error), began, error.retry_after_seconds or 0.0)
        except Exception as error:  # a defect in a sink must not end its thread unseen
            free_frames(error)
            return 0, self._count_failure(f"{type(error).__name__}: {error}", began)
        self._settle(batch)
        self._tell_notices()
        if not self._alone:  # what goes alone are the others of a refused batch
            self._refusing.ends()
        if self._failing.ends():
            self._log.info("sink delivers again", sink=self.name, failures=self.failures_in_a_row)
        self._count_answer()
        return len(batch), None

    def _wait(self, seconds: float) -> bool:
        """Waits before the next try; False where there is none: the agent ends, or the reader has gone.

        At the end of the agent a buffer's file keeps what a failing sink doesn't take, and a peer that
        has been away for long gets one last try. Else it is tried as long as there is time.
        """
        if self._stopping.is_set():
            is_left_alone = self.ring.outlives_process or self.breaker.circuit is not Circuit.CLOSED
            if is_left_alone or self._now_seconds() + seconds >= self._deadline_seconds:
                return False
            self._ended.wait(seconds)
        else:
            self._stopping.wait(seconds)
        if self._ended.is_set():
            return False
        self.retries += 1
        return True

    def _drop_aged(self, claimed: Sequence[Record]) -> int:
        """Gives up the oldest payloads where they are older than `max_age`; how many."""
        max_age_ns = self.settings.retry.max_age.ns
        if not max_age_ns:
            return 0
        oldest_ns = self._clock_ns() - max_age_ns
        return self._settle(list(takewhile(lambda record: record.stamp_ns < oldest_ns, claimed)), Drop.AGED)

    def _settle(self, batch: Sequence[Record], dropped: Drop | None = None) -> int:
        """Delivered, or given up for a reason; how many."""
        if self._ended.is_set() or not batch:  # whoever ended this has counted what was left
            return len(batch)
        self.ring.settle(len(batch), dropped)
        if dropped is None:
            now_ns = self._clock_ns()
            for record in batch:
                self.sent_bytes += record.size
                if record.is_own and record.sequence % self.timed_every == 0:
                    self.latency.add(now_ns - record.stamp_ns)
        return len(batch)

    def _count_failure(self, reason: str, began_seconds: float, retry_after_seconds: float = 0.0) -> float:
        """Counts a failed delivery; how long to wait before the next one."""
        now = self._now_seconds()
        self.failures += 1
        self.failures_in_a_row += 1
        if self._failing.begins(now):
            self._log.warning("sink fails, its ring holds the frames", sink=self.name, reason=reason)
        self._set_breaker(self.breaker.after_failure(now - began_seconds, now), reason)
        retry = self.settings.retry
        if self.breaker.circuit is Circuit.OPEN:
            pause = self.breaker.open_until_seconds - now
        else:
            pause = pause_seconds(self.breaker.failures, retry.base, retry.cap)
        return max(pause, retry_after_seconds)

    def _count_rejection(self, reason: str) -> None:
        self.failures += 1
        if self.failures_in_a_row:  # it was away, and is another peer now for all that we know
            self._refusing = Episode()
        if self._refusing.begins(self._now_seconds()):
            self._log.warning("sink's peer refuses frames, they are dropped", sink=self.name, reason=reason)
        self._failing.ends()
        self._count_answer()

    def _count_answer(self) -> None:
        """The peer is there: failures are no longer in a row."""
        if self.failures_in_a_row:
            self.failures_in_a_row = 0
            self._set_breaker(self.breaker.after_success())

    def _set_breaker(self, breaker: Breaker, reason: str = "") -> None:
        changed = breaker.circuit is not self.breaker.circuit
        self.breaker = breaker
        if changed:
            why = {"failures": self.failures_in_a_row, "reason": reason} if reason else {}
            self._log.info("sink's circuit", sink=self.name, circuit=breaker.circuit, **why)

    def _on_reader_gone(self) -> None:
        self.reader_gone = True
        self.ring.close()
        self._leave()
        self._ended.set()
        self._on_closed()
