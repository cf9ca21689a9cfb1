"""Puts the parts together: from a checked configuration to a cycle that can run."""

from __future__ import annotations

import gc
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import msgspec

from agent import discovery
from agent.config import Config
from agent.cycle import Cycle, ScheduledProbe, Serializer
from agent.errors import HostprobeError, UsageError
from agent.exporter import Exporter, Writer
from agent.health import Health
from agent.layers import where
from agent.logs import Log
from agent.serializers import formats
from agent.serializers.document import Identity
from agent.serializers.frame_tables import FRAME_TABLES
from agent.sink_worker import SinkConfig, SinkWorker
from agent.sinks.sink import Sink
from agent.table import Priority, TableSpec
from agent.telemetry import AgentProbe, CycleMeter, ProbeMeter
from probes.host import boot_unix_ns, uname
from probes.procfs import Host


class Agent:
    """Everything of one run, built and connected; nothing has started yet.

    Args:
        config: a checked configuration.
        sinks: whether to build the sinks; `once` prints its frame itself.

    Raises:
        UsageError: the root can't be read as configured.
    """

    def __init__(self, config: Config, log: Log, sinks: bool = True) -> None:
        self.config = config
        self.meter = CycleMeter()
        self._log = log
        instance = uuid.uuid4()
        with ExitStack() as opened:
            self.host = _host(config)
            opened.callback(self.host.close)
            if sinks:
                every = _timed_every(config)
                self.exporter = Exporter(_sinks(config), log, instance.bytes, _priorities(config), every)
            else:
                self.exporter = Exporter([], log)
            self.health = Health(self.meter, config.agent.interval, self.exporter.workers)
            probes = _probes(config, self.host, {}, self.meter, self.exporter.workers)
            for scheduled in probes:
                opened.callback(scheduled.probe.close)
            self._what = _What(_specs(probes), _identity(config, self.host, instance.hex), config.agent.rates)
            self._introduce((worker.sink for worker in self.exporter.workers), self._what.identity)
            serializers = _serializers(config, self._what, self.exporter.workers)
            self.cycle = Cycle(probes, self.meter, serializers, self.exporter, log)
            opened.pop_all()  # from now on `close` gives back what is held

    def reload(self, config: Config, meanwhile: Callable[[], bool] = lambda: False) -> None:
        """Goes on with another configuration; nothing changes before all of it has been built and checked.

        Probes and sinks whose settings are the same go on, with their rings, their rates and the sequence; others are
        exchanged, which delivers what a sink still holds for at most `agent.shutdown_timeout`.

        Args:
            meanwhile: called now and then while it waits for that; whether to wait no longer.

        Raises:
            UsageError: it can't be had; all is as it was.
        """
        old = self.config
        keeps_host = (config.agent.root, config.agent.source) == (old.agent.root, old.agent.source)
        with ExitStack() as opened:
            host = self.host
            if not keeps_host:
                host = _host(config)
                opened.callback(host.close)
            identity = _identity(config, host, self._what.identity.instance)
            identity = msgspec.structs.replace(identity, started_unix_ns=self._what.identity.started_unix_ns)
            is_renamed = identity.host != self._what.identity.host
            workers = self.exporter.with_sinks(
                _sinks(config), _timed_every(config), lambda old: not (is_renamed and hasattr(old.sink, "host"))
            )
            old_sinks = {sink.name: sink for sink in _sinks(old)}
            running = {scheduled.meter.name: scheduled for scheduled in self.cycle.probes}
            kept = {
                name: running[name]
                for name, settings in config.probes.items()
                if keeps_host and settings == old.probes.get(name)
            }
            probes = _probes(config, host, kept, self.meter, self.exporter.workers)
            for probe in _not_in(self.cycle.probes, probes):
                opened.callback(probe.close)
            what = _What(_specs(probes), identity, config.agent.rates)
            written = self.cycle.serializers if what == self._what else {}
            serializers = _serializers(config, what, workers, written)
            new = [worker for worker in workers if worker not in self.exporter.workers]
            self._introduce((worker.sink for worker in new), identity)
            self._introduce((sink.sink for sink in old_sinks.values()), self._what.identity)
            self.exporter.check(new)
            timeout_seconds = config.agent.shutdown_timeout
            self.exporter.exchange(workers, _priorities(config), timeout_seconds, old_sinks.__getitem__, meanwhile)
            opened.pop_all()
        gone = [probe.close for probe in _not_in(probes, self.cycle.probes)]
        self.cycle.change(probes, serializers, keeps_host)
        if not keeps_host:
            gone.append(self.host.close)
        for close in gone:
            self._try(close)
        self.health.keep(config.agent.interval)
        self.config, self.host, self._what = config, host, what
        gc.collect()  # the arena that has gone is a circle, and its like would be many before the collector comes

    def _try(self, close: Callable[[], object]) -> None:
        try:
            close()
        except Exception as error:  # somebody else's probe
            self._log.warning("probe does not close", reason=f"{type(error).__name__}: {error}")

    @property
    def identity(self) -> Identity:
        """Whose frames they are."""
        return self._what.identity

    def _introduce(self, sinks: Iterable[Sink], identity: Identity) -> None:
        """Tells the sinks that want to know who and how the agent is."""
        for sink in sinks:
            if hasattr(sink, "host"):
                sink.host = identity.host
            if hasattr(sink, "watch"):
                sink.watch(self.health)

    def serializer(self, format: formats.Name, names: formats.Names = "hostprobe") -> Serializer:
        """A serializer of this run's frames.

        Raises:
            UsageError: the format needs a package that isn't there.
        """
        return self._what.serializer(format, names)

    def close(self) -> None:
        """Gives back what is held; the exporter is closed by whoever started it."""
        self.cycle.close()
        self.host.close()


class _What(NamedTuple):
    """What serializers write: which tables, whose, and whether with rates."""

    specs: Sequence[TableSpec]
    identity: Identity
    rates: bool

    def serializer(self, format: formats.Name, names: formats.Names) -> Serializer:
        options = {"names": names} if formats.FORMATS[format].has_names else {}
        serializer: Serializer = formats.load(format)(self.specs, self.identity, self.rates, **options)
        return serializer


def _serializers(
    config: Config, what: _What, workers: Iterable[SinkWorker], written: Mapping[Writer, Serializer] = {}
) -> dict[Writer, Serializer]:
    """One for each writer of the workers; those that have `written` before go on."""
    serializers: dict[Writer, Serializer] = {}
    for worker in workers:
        settings = worker.settings
        writer = settings.format, settings.names, settings.tables
        try:
            serializers[writer] = (
                serializers.get(writer) or written.get(writer) or what.serializer(settings.format, settings.names)
            )
        except UsageError as error:
            raise UsageError(f"{config.place('sinks', worker.name)}: {error}") from None
    return serializers


def _probes(
    config: Config,
    host: Host,
    kept: Mapping[str, ScheduledProbe],
    meter: CycleMeter,
    workers: Sequence[SinkWorker],
) -> list[ScheduledProbe]:
    """The probes of a configuration, in the order of collection.

    Args:
        kept: those that go on as they are, by name.
    """
    scheduled: list[ScheduledProbe] = []
    meters = [kept[name].meter if name in kept else ProbeMeter(name) for name in config.probes]
    for probe_meter in meters:
        name = probe_meter.name
        probe_class = discovery.load("probes", name)
        assert probe_class is not None, f"{name}: the configuration was checked"
        if probe_class is AgentProbe:
            probe: Any = AgentProbe(meter, meters, workers)
        elif name in kept:
            probe = kept[name].probe
        else:
            if host.uses_psutil:
                probe_class = discovery.psutil_variant(probe_class)
            probe = _built(config.place("probes", name), probe_class, config.probes[name], host)
        every = config.every(name)
        goes_on = name in kept and kept[name].probe is probe and kept[name].every == every
        scheduled.append(kept[name] if goes_on else ScheduledProbe(probe, probe_meter, every))
    return scheduled


def _not_in(others: Sequence[ScheduledProbe], probes: Sequence[ScheduledProbe]) -> list[Any]:
    """The probes that aren't among the others."""
    return [each.probe for each in probes if all(each.probe is not other.probe for other in others)]


def _specs(probes: Iterable[ScheduledProbe]) -> list[TableSpec]:
    return _tables((scheduled.meter.name, scheduled.probe) for scheduled in probes)


def _identity(config: Config, host: Host, instance: str) -> Identity:
    return Identity(
        host=config.agent.hostname or socket.gethostname().encode(errors="replace").decode(),
        instance=instance,
        tags=config.agent.tags,
        started_unix_ns=time.time_ns(),
        boot_unix_ns=boot_unix_ns(host),
        uname=uname(host),
    )


def _host(config: Config) -> Host:
    layer = where(config.layers, ("agent", "root"))
    try:
        return Host(config.agent.root, config.agent.source)
    except UsageError as error:
        raise UsageError(f"{layer}{error}") from None
    except OSError as error:
        what = f"{layer}agent.root = {config.agent.root}: {error.strerror}"
        raise UsageError(what, "a directory that holds proc and sys") from None


def _sinks(config: Config) -> list[SinkConfig]:
    sinks = []
    for name, settings in config.sinks.items():
        sink_class = discovery.load("sinks", settings.type)
        assert sink_class is not None, f"{name}: the configuration was checked"
        place = config.place("sinks", name)
        sinks.append(SinkConfig(name, _built(place, sink_class, settings), settings, place))
    return sinks


def _priorities(config: Config) -> dict[str, Priority]:
    specs = _tables((name, discovery.load("probes", name)) for name in config.probes)
    priorities = {spec.name: spec.priority for spec in specs}
    return priorities | {name: Priority[word.upper()] for name, word in config.agent.priorities.items()}


def _timed_every(config: Config) -> int:
    return 1 if config.agent.interval >= 1 else 100


def _built(name: str, kind: Any, *arguments: Any) -> Any:
    """A probe or a sink that may be someone else's: what its constructor raises becomes one line."""
    try:
        return kind(*arguments)
    except HostprobeError:
        raise
    except Exception as error:
        raise UsageError(f"{name}: it does not start: {type(error).__name__}: {error}") from None


def _tables(probes: Iterable[tuple[str, Any]]) -> list[TableSpec]:
    """The tables of some probes, in their order.

    Raises:
        UsageError: two probes, one of which is not ours, fill tables of the same name.
    """
    owners = {spec.name: "hostprobe itself" for spec in FRAME_TABLES}
    specs = []
    for name, probe in probes:
        for spec in probe.tables:
            owner = owners.setdefault(spec.name, f"probes.{name}")
            if owner != f"probes.{name}":
                raise UsageError(f"probes.{name}: its table {spec.name}", f"another name, {owner} has this one")
            specs.append(spec)
    return specs


def catalogue() -> Iterable[TableSpec]:
    """Every table that there is, in the order of the probes, added ones included."""
    return _tables((name, discovery.load("probes", name)) for name in discovery.names("probes"))
