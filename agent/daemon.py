"""A run: the loop of cycles, what a service manager hears of it, and another configuration without an end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing

from agent import __version__
from agent.assembly import Agent
from agent.config import Config
from agent.control import ControlSocket, LogLine, ProbeState, SinkState, State
from agent.cycle import Schedule
from agent.delivery import Circuit, ticks_apart
from agent.errors import UsageError
from agent.logs import Log
from agent.notify import Notifier
from agent.restraint import Restraint
from agent.sink_worker import SinkWorker
from agent.telemetry import ProbeMeter
from agent.waker import Waker

_STATUS_EVERY_NS = 5_000_000_000
_RECENT_NS = 600_000_000_000


class Daemon:
    """Runs an agent whose sinks have started.

    Args:
        load: reads the configuration again.
        cycles: after how many frames it ends; 0: never.
    """

    def __init__(
        self, agent: Agent, waker: Waker, notifier: Notifier, log: Log, load: Callable[[], Config], cycles: int = 0
    ) -> None:
        self._agent = agent
        self._waker = waker
        self._notifier = notifier
        self._log = log
        self._load = load
        self._cycles = cycles
        self._told_ns = 0
        self._reload_error = ""
        self._schedule = self._new_schedule()
        self._restraint = self._new_restraint()

    def run(self) -> bool:
        """Runs until it is told to stop, or `cycles` are done: True then.

        Raises:
            UsageError: there can be no control socket.
        """
        agent = self._agent
        with ExitStack() as opened:
            opened.callback(lambda: self._restraint.close())
            path = control_path(agent.config.agent.control_socket)
            if path:
                opened.enter_context(closing(ControlSocket(path, self.state)))
            self._notifier.ready(self.status)
            while not self._waits():
                agent.cycle.run(self._schedule.tick)
                if agent.meter.frames == self._cycles:
                    return True
                agent.meter.missed_cycles += self._schedule.advance(self._restraint.ticks())
                self._tell()
        return False

    @property
    def status(self) -> str:
        """One line on how the agent does, without a secret."""
        workers = self._agent.exporter.workers
        parts = [f"{self._agent.meter.frames} frames", f"{sum(worker.frames[2] for worker in workers)} in backlog"]
        parts += [f"sink {worker.name} fails" for worker in workers if worker.circuit is not Circuit.CLOSED]
        if self._reload_error:
            parts.append(f"reload failed: {self._reload_error}")
        elif self._log.latest and time.time_ns() - self._log.latest[-1].time_unix_ns < _RECENT_NS:
            parts.append(f"last warning: {self._log.latest[-1].event}")
        return ", ".join(parts)

    def state(self) -> State:
        """How the agent does, for its control socket; from any thread."""
        agent = self._agent
        meter, config = agent.meter, agent.config
        return State(
            version=__version__,
            pid=os.getpid(),
            host=agent.identity.host,
            instance=agent.identity.instance,
            config=config.where or f"template {config.template}",
            uptime_seconds=max(time.time_ns() - agent.identity.started_unix_ns, 0) / 1e9,
            cpu_seconds=time.process_time(),
            resident_bytes=_known(self._restraint.resident_bytes),
            interval_seconds=float(config.agent.interval) * ticks_apart(meter.throttle),
            frames=meter.frames,
            missed_cycles=meter.missed_cycles,
            problems=agent.health.problems(),
            reloads=meter.reloads,
            reload_failures=meter.reload_failures,
            reload_error=self._reload_error,
            sinks=[_sink_state(worker) for worker in list(agent.exporter.workers)],
            probes=[_probe_state(scheduled.meter) for scheduled in agent.cycle.probes],
            latest=[LogLine(*told) for told in list(self._log.latest)],
        )

    def _waits(self) -> bool:
        """Sleeps until the next cycle, and does meanwhile what is asked for; whether to stop."""
        while (left := self._schedule.seconds_left()) > 0 or self._waker.reload_is_due:
            if self._waker.reload_is_due:
                self._waker.reload_is_due = False
                self._reload()
            elif self._waker.wait(min(left, self._notifier.pause_seconds)):
                return True
            self._ping()
        return self._waker.stopped

    def _ping(self) -> None:
        """The watchdog hears from an agent whose cycles end and whose sinks' threads live."""
        self._notifier.ping(lambda: not self._agent.health.problems())

    def _tell(self) -> None:
        self._ping()
        now_ns = time.monotonic_ns()
        if self._notifier.is_heard and now_ns - self._told_ns >= _STATUS_EVERY_NS:
            self._told_ns = now_ns
            self._notifier.status(self.status)

    def _reload(self) -> None:
        """Goes on with the configuration as it is written now; a wrong one changes nothing."""
        agent, before = self._agent, self._agent.config
        self._notifier.reloading()
        try:
            config = self._load()
            agent.reload(config)
        except UsageError as error:
            self._reload_error = str(error)
            agent.meter.reload_failures += 1
            self._log.error("configuration not taken, the old one stays in force", reason=str(error))
        else:
            self._reload_error = ""
            agent.meter.reloads += 1
            if config.log != before.log:
                self._log.change(config.log.level, config.log.format)
            self._log.info("configuration taken", config=config.where or f"template {config.template}")
            if (config.agent.interval, config.agent.align) != (before.agent.interval, before.agent.align):
                self._schedule = self._new_schedule()
            self._restraint.close()
            self._restraint = self._new_restraint()
        self._notifier.ready(self.status)

    def _new_schedule(self) -> Schedule:
        settings = self._agent.config.agent
        return Schedule(settings.interval.ns, settings.align)

    def _new_restraint(self) -> Restraint:
        agent = self._agent
        return Restraint(agent.config.agent, agent.meter, agent.exporter.workers, self._log)


def control_path(configured: str, environment: Mapping[str, str] | None = None) -> str:
    """Where the control socket is, "" for none: as configured, or in the directory that the service manager gives."""
    environment = os.environ if environment is None else environment
    given = environment.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return configured or (os.path.join(given, "control.sock") if given else "")


def _known(value: float) -> float | None:
    return value if value == value else None


def _sink_state(worker: SinkWorker) -> SinkState:
    sent, dropped, backlog = worker.frames
    (median,) = worker.latency.quantiles_seconds(0.5)
    return SinkState(
        name=worker.name,
        type=worker.settings.type,
        circuit=worker.circuit.value,
        sent_frames=sent,
        dropped_frames=dropped,
        backlog_frames=backlog,
        backlog_bytes=worker.ring.held_bytes,
        failures=worker.failures,
        latency_seconds=_known(median),
    )


def _probe_state(meter: ProbeMeter) -> ProbeState:
    up = _known(meter.up)
    return ProbeState(meter.name, None if up is None else bool(up), meter.failures, _known(meter.seconds))
