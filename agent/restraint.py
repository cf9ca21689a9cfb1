"""Self-restraint: what the agent costs and loses, and how far it therefore holds back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from agent.config import AgentSettings
from agent.delivery import Drop, Strain, throttle, ticks_apart
from agent.logs import Log
from agent.sink_worker import SinkWorker
from agent.telemetry import CycleMeter, ProcessMemory

_LOOK_EVERY_NS = 1_000_000_000
_LOOKS = 20
"""Drops and CPU are those since so many looks ago."""


class Restraint:
    """Looks at the agent at most once a second; says how many ticks lie before the next frame.

    A ring in a file is no memory of the agent's: the kernel can have its pages back at any time.

    Args:
        cause: why the agent holds back already, which has been told.

    Attributes:
        cause: why it holds back; empty where it doesn't.
    """

    def __init__(
        self,
        settings: AgentSettings,
        meter: CycleMeter,
        sinks: Sequence[SinkWorker],
        log: Log,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        cpu_ns: Callable[[], int] = time.process_time_ns,
        cause: str = "",
    ) -> None:
        self._settings = settings
        self._meter = meter
        self._sinks = sinks
        self._log = log
        self._clock_ns = clock_ns
        self._cpu_ns = cpu_ns
        self._memory = ProcessMemory()
        self._file_bytes = sum(sink.settings.buffer.size for sink in sinks if sink.settings.buffer.path)
        self._looked_ns = 0
        self._history: deque[tuple[int, int, list[tuple[int, list[int]]]]] = deque(maxlen=_LOOKS)
        self.cause = cause
        self._losing: set[str] = set()  # sinks in an episode of drops, which is logged once
        self._look()

    def ticks(self) -> int:
        """How many intervals the next frame lies ahead: 1 while all is well."""
        if self._clock_ns() - self._looked_ns >= _LOOK_EVERY_NS:
            self._look()
        return ticks_apart(self._meter.throttle)

    @property
    def resident_bytes(self) -> float:
        """At the last look."""
        return self._resident_bytes

    def close(self) -> None:
        """Closes the file that memory is read from."""
        self._memory.close()

    def _look(self) -> None:
        self._looked_ns = self._clock_ns()
        counts = [(sink.ring.pushed + sink.ring.recovered, sink.ring.drops.copy()) for sink in self._sinks]
        self._history.append((self._meter.frames, self._cpu_ns(), counts))
        held_back, cause = throttle(self._strain(), self._settings.max_memory, self._settings.max_cpu_ratio)
        self._meter.throttle = held_back
        if cause and cause != self.cause:  # how far is another figure at each look where it is the CPU
            self._log.warning("agent holds back", cause=cause, throttle_ratio=round(held_back, 3))
        elif self.cause and not cause:
            self._log.info("agent keeps its interval again")
        self.cause = cause

    def _strain(self) -> Strain:
        frames_before, cpu_before, counts_before = self._history[0]
        frames, cpu, counts = self._history[-1]
        drop_ratios = [0.0]
        for sink, (came, drops), (came_before, drops_before) in zip(self._sinks, counts, counts_before, strict=True):
            lost = {reason.word: drops[reason] - drops_before[reason] for reason in Drop}
            drop_ratios.append(sum(lost.values()) / max(came - came_before, 1))
            self._tell(sink, lost)
        interval_ns = self._settings.interval.ns
        self._resident_bytes = self._memory.resident_bytes(self._file_bytes)
        return Strain(
            ring_used_ratio=max((sink.ring.used_ratio for sink in self._sinks), default=0.0),
            drop_ratio=max(drop_ratios),
            resident_bytes=self._resident_bytes,
            cpu_ratio=(cpu - cpu_before) / ((frames - frames_before) * interval_ns) if frames > frames_before else 0.0,
        )

    def _tell(self, sink: SinkWorker, lost: dict[str, int]) -> None:
        """Says once an episode that a sink loses frames, and why."""
        reasons = {reason: count for reason, count in lost.items() if count}
        if not reasons:
            self._losing.discard(sink.name)
        elif sink.name not in self._losing:
            self._log.warning("sink loses frames", sink=sink.name, dropped_frames=reasons)
            self._losing.add(sink.name)
