"""The cycle: one stamp, the due probes, one frame, and the next deadline.

This is the one place that reads the clocks for a frame, and the one boundary that
catches whatever a probe raises.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from agent.exporter import Exporter, Output, Writer
from agent.frame import Frame
from agent.logs import Log
from agent.pool import Buffer, Pool, buffer_pool
from agent.telemetry import CycleMeter, ProbeMeter
from probes.probe import Probe

WARM_UP_CYCLES = 3
# A frame's rows are container objects for as long as it is serialized; with the default
# of 700 a host with many rows would run the collector for nothing that is a cycle.
_COLLECTOR_THRESHOLD = 50_000
_CLOCK_STEP_NS = 1_000_000  # less between the two clocks is the time it takes to read them


class Serializer(Protocol):
    """Turns a frame, or some of its tables, into bytes; `buffer.data` is the payload afterwards."""

    def write(
        self, frame: Frame, buffer: Buffer, tables: Collection[str] = (), left_out: Collection[str] = ()
    ) -> None: ...


@dataclass(slots=True)
class ScheduledProbe:
    """A probe that is collected at the ticks that `every` divides, and at once where one was skipped."""

    probe: Probe
    meter: ProbeMeter
    every: int = 1
    _next_tick: int = 0

    def is_due(self, tick: int) -> bool:
        """Whether to collect at this tick; the answer is given once. Ticks go back when the clock is set."""
        if self._next_tick - self.every < tick < self._next_tick:
            return False
        self._next_tick = (tick // self.every + 1) * self.every
        return True


class Cycle:
    """Collects, serializes and pushes one frame after the other.

    Args:
        probes: in the order of collection.
        serializers: one for each writer of the exporter's sinks.
    """

    def __init__(
        self,
        probes: Sequence[ScheduledProbe],
        meter: CycleMeter,
        serializers: Mapping[Writer, Serializer],
        exporter: Exporter,
        log: Log,
    ) -> None:
        self.frame = Frame(spec for scheduled in probes for spec in scheduled.probe.tables)
        self.buffers: Pool[Buffer] = buffer_pool()
        self._meter = meter
        self._take(probes, serializers)
        self._exporter = exporter
        self._log = log

    def _take(self, probes: Sequence[ScheduledProbe], serializers: Mapping[Writer, Serializer]) -> None:
        self.probes = probes
        self._with_notices = [scheduled for scheduled in probes if hasattr(scheduled.probe, "notices")]
        self.serializers = serializers

    def change(
        self, probes: Sequence[ScheduledProbe], serializers: Mapping[Writer, Serializer], is_same_host: bool = True
    ) -> None:
        """Goes on with other probes and serializers. The sequence goes on, and so do rates of tables that stay.

        Args:
            is_same_host: whether the counters go on from those of the last frame.
        """
        specs = [spec for scheduled in probes for spec in scheduled.probe.tables]
        if not is_same_host or specs != [spec for scheduled in self.probes for spec in scheduled.probe.tables]:
            self.frame.change(specs, is_same_host)
        self._take(probes, serializers)

    def run(self, tick: int) -> None:
        """One cycle: the frame of this moment, in the rings of all sinks.

        Args:
            tick: counts the intervals, skipped ones included.
        """
        meter = self._meter
        self.collect(tick)
        self.publish()
        meter.frames += 1
        meter.ended_ns = time.monotonic_ns()
        meter.cycle_seconds = (meter.ended_ns - self.frame.monotonic_ns) / 1e9
        if meter.frames == WARM_UP_CYCLES:
            freeze()

    def collect(self, tick: int | None = None) -> None:
        """Fills the frame of this moment with the tables of the probes that are due; of all without a tick."""
        frame = self.frame
        frame.begin(time.time_ns(), time.monotonic_ns())
        start = time.perf_counter_ns()
        for scheduled in self.probes:
            if tick is not None and not scheduled.is_due(tick):
                continue
            meter = scheduled.meter
            try:
                scheduled.probe.collect(frame)
            except Exception as error:
                frame.discard(scheduled.probe.tables)
                self._count_failure(meter, error)
            else:
                meter.up = 1.0
                if meter.failing:
                    self._log.info("probe works again", probe=meter.name)
                    meter.failing = ""
            end = time.perf_counter_ns()
            meter.seconds = (end - start) / 1e9
            start = end
        frame.derive()
        for scheduled in self._with_notices:
            notices = scheduled.probe.notices  # type: ignore[attr-defined]
            while notices:
                self._log.warning("probe says", probe=scheduled.meter.name, reason=notices.pop(0))

    def _count_failure(self, meter: ProbeMeter, error: Exception) -> None:
        self._meter.probe_failures += 1
        meter.failures += 1
        meter.up = 0.0
        if not meter.failing:  # once an episode
            self._log.warning("probe fails", probe=meter.name, reason=f"{type(error).__name__}: {error}")
            meter.failing = type(error).__name__

    def publish(self) -> None:
        """Serializes the frame, once for all sinks that want the same of it, and pushes it."""
        buffer = self.buffers.acquire()
        try:
            self._exporter.publish(self.frame, partial(self._serialize, buffer))
        finally:
            self.buffers.release(buffer)

    def _serialize(self, buffer: Buffer, output: Output, left_out: Collection[str]) -> bytearray:
        if len(buffer.data) < buffer.capacity:  # another sink's payload is in it
            buffer.clear()
        self.serializers[output.writer].write(self.frame, buffer, output.tables, left_out)
        self._meter.payload_bytes += len(buffer.data)
        return buffer.data

    def close(self) -> None:
        """Closes the probes."""
        for scheduled in self.probes:
            scheduled.probe.close()


def freeze() -> None:
    """Takes what the start made out of the collector's sight; nothing of it becomes garbage.

    The steady state makes no reference cycles. The collector stays on, for what errors
    leave behind, but isn't woken by a frame's short-lived rows.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTOR_THRESHOLD, 20, 100)


class Schedule:
    """Deadlines on the monotonic clock that don't drift: tick n is n intervals after the first.

    Args:
        interval_ns: between two ticks.
        align: ticks fall on multiples of the interval since 1970, by the wall clock, so that
            hosts sample together. When the wall clock is set, the next ticks follow it.
        clocks: give the monotonic and the wall clock in ns.
    """

    def __init__(
        self,
        interval_ns: int,
        align: bool,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._interval_ns = interval_ns
        self._align = align
        self._monotonic_ns = monotonic_ns
        self._time_ns = time_ns
        self.tick = 0
        self._deadline_ns = monotonic_ns()
        self._wall_offset_ns = 0
        if align:
            self._anchor()

    def seconds_left(self) -> float:
        """Until the deadline; 0 or less when it is due."""
        if self._align:
            self._follow_wall_clock()
        return (self._deadline_ns - self._monotonic_ns()) / 1e9

    def advance(self, ticks: int = 1) -> int:
        """Sets the next deadline after a cycle has run; returns how many were missed meanwhile.

        Deadlines that have passed already are skipped, never caught up in a burst.

        Args:
            ticks: how many intervals later it is at the earliest.
        """
        late_ns = self._monotonic_ns() - self._deadline_ns
        steps = max(ticks, math.ceil(late_ns / self._interval_ns))
        self._deadline_ns += steps * self._interval_ns
        self.tick += steps
        return steps - ticks

    def _follow_wall_clock(self) -> None:
        """A clock that was set moves the deadline; by more than half an interval, the tick as well."""
        shift_ns = self._time_ns() - self._monotonic_ns() - self._wall_offset_ns
        if abs(shift_ns) > self._interval_ns // 2:
            self._anchor()
        elif abs(shift_ns) > _CLOCK_STEP_NS:
            self._deadline_ns -= shift_ns
            self._wall_offset_ns += shift_ns

    def _anchor(self) -> None:
        """The deadline is the next multiple of the interval by the wall clock, the tick how many those are."""
        wall_ns, monotonic_ns = self._time_ns(), self._monotonic_ns()
        self._wall_offset_ns = wall_ns - monotonic_ns
        self.tick = -(-wall_ns // self._interval_ns)
        self._deadline_ns = monotonic_ns + self.tick * self._interval_ns - wall_ns
