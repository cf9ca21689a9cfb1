"""Whether the agent does its work: cycles end, and the sinks' threads live.

Cheap to ask, from any thread: nothing is measured, only what the cycle and the sinks' workers note anyway is looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from agent.delivery import Circuit, ticks_apart
from agent.sink_worker import SinkWorker
from agent.telemetry import CycleMeter
from agent.units import Duration

_INTERVALS_MAX = 3
_SILENCE_NS_MIN = 10_000_000_000  # a short interval is missed by a busy host now and then


class Health:
    """What is wrong, as lines that name no secret.

    Args:
        interval: between two frames, as configured.
        clock_ns: the monotonic clock that cycles are stamped with.
    """

    def __init__(
        self,
        meter: CycleMeter,
        interval: Duration,
        workers: Sequence[SinkWorker],
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._meter = meter
        self._workers = workers
        self._clock_ns = clock_ns
        self.keep(interval)

    def keep(self, interval: Duration) -> None:
        """The interval that is configured from now on."""
        self._began_ns = self._clock_ns()
        self._interval_ns = interval.ns
        self._silence_ns_max = max(_INTERVALS_MAX * self._interval_ns, _SILENCE_NS_MIN)

    def problems(self) -> list[str]:
        """What only a restart may mend, a line each; none while the agent is healthy.

        No cycle has ended for 3 intervals, at least 10 seconds, beyond the time for which it holds back; or the
        thread of a sink has ended, and not because its reader has gone.
        """
        problems = [f"sink {worker.name}: its thread has ended" for worker in self._workers if worker.has_crashed]
        silence_ns = self._clock_ns() - max(self._meter.ended_ns, self._began_ns)
        if silence_ns > self.patience_ns:
            every = Duration((self._interval_ns + self._held_back_ns) / 1e9)
            problems.insert(0, f"no cycle has ended for {silence_ns // 1_000_000_000}s: expected one every {every}")
        return problems

    @property
    def patience_ns(self) -> int:
        """How old the latest frame may be while all is well."""
        return self._silence_ns_max + self._held_back_ns

    @property
    def _held_back_ns(self) -> int:
        return (ticks_apart(self._meter.throttle) - 1) * self._interval_ns

    def hindrances(self) -> list[str]:
        """Why its frames may not arrive, a line each: problems, no frame yet, sinks that fail or lack room."""
        hindrances = self.problems()
        if not self._meter.frames:
            hindrances.append("no frame yet")
        for worker in self._workers:
            if worker.oversized_bytes:
                fault = f"a frame of {worker.oversized_bytes} bytes doesn't fit into its buffer"
                hindrances.append(f"sink {worker.name}: {fault}")
            if worker.circuit is not Circuit.CLOSED and not worker.reader_gone:
                hindrances.append(f"sink {worker.name}: its circuit is {worker.circuit}, its peer fails")
        return hindrances
