"""A run: the loop of cycles, what a service manager hears of it, and another configuration without an end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from agent import __version__
from agent.assembly import Agent
from agent.config import Config
from agent.control import ControlSocket, LogLine, ProbeState, SinkState, State
from agent.cycle import Schedule
from agent.delivery import Circuit, ticks_apart
from agent.errors import UsageError
from agent.layers import demand_file
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
        self._reloaded_unix_ns = 0
        self._control: ControlSocket | None = None
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
            opened.callback(self._exchange_control, None)
            self._exchange_control(self._new_control(agent.config))
            self._notifier.ready(self.status)
            while not self._waits():
                agent.cycle.run(self._schedule.tick)
                if agent.meter.frames == self._cycles:
                    return True
                agent.meter.missed_cycles += self._schedule.advance(self._restraint.ticks())
                self._tell()
                if self._waker.reload_is_due:
                    self._reload()
        return False

    @property
    def status(self) -> str:
        """One line on how the agent does, without a secret."""
        workers = self._agent.exporter.workers
        parts = [f"{self._agent.meter.frames} frames", f"{sum(worker.frames[2] for worker in workers)} in backlog"]
        parts += [f"sink {worker.name} fails" for worker in workers if worker.circuit is not Circuit.CLOSED]
        if self._reload_error:
            parts.append(f"reload failed: {self._reload_error}")
        elif self._log.latest and self._log.latest[-1].time_unix_ns > self._recently_unix_ns:
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
        while (left := self._schedule.seconds_left()) > 0:
            if self._waker.reload_is_due:
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

    @property
    def _recently_unix_ns(self) -> int:
        """What was told before is no part of the present state."""
        return max(time.time_ns() - _RECENT_NS, self._reloaded_unix_ns)

    def _meanwhile(self) -> bool:
        """While a reload waits: the watchdog hears, and a signal to stop is a reason to wait no longer."""
        self._ping()
        return self._waker.stopped

    def _new_control(self, config: Config) -> ControlSocket | None:
        path = control_path(config.agent.control_socket)
        return ControlSocket(path, self.state) if path else None

    def _exchange_control(self, new: ControlSocket | None) -> None:
        old, self._control = self._control, new
        if old is not None:
            old.close()

    def _reload(self) -> None:
        """Goes on with the configuration as it is written now; a wrong one changes nothing."""
        self._waker.reload_is_due = False
        agent, before = self._agent, self._agent.config
        self._notifier.reloading()
        control = self._control
        try:
            demand_file(before.where)
            config = self._load()
            if config.agent.control_socket != before.agent.control_socket:
                control = self._new_control(config)
            try:
                agent.reload(config, self._meanwhile)
            except UsageError:
                if control is not None and control is not self._control:
                    control.close()
                raise
        except UsageError as error:
            self._reload_error = str(error)
            agent.meter.reload_failures += 1
            self._log.error("configuration not taken, the old one stays in force", reason=str(error))
        else:
            self._reload_error = ""
            self._reloaded_unix_ns = time.time_ns()
            agent.meter.reloads += 1
            if control is not self._control:
                self._exchange_control(control)
            if config.log != before.log:
                self._log.change(config.log.level, config.log.format)
            self._log.info("configuration taken", config=config.where or f"template {config.template}")
            if (config.agent.interval, config.agent.align) != (before.agent.interval, before.agent.align):
                self._schedule = self._new_schedule()
        self._restraint.close()
        self._restraint = self._new_restraint(self._restraint.cause)
        self._notifier.ready(self.status)

    def _new_schedule(self) -> Schedule:
        settings = self._agent.config.agent
        return Schedule(settings.interval.ns, settings.align)

    def _new_restraint(self, cause: str = "") -> Restraint:
        agent = self._agent
        return Restraint(agent.config.agent, agent.meter, list(agent.exporter.workers), self._log, cause=cause)


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
