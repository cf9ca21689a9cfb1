"""Puts the parts together: from a checked configuration to a cycle that can run."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

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
from agent.sink_worker import SinkConfig
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
        instance = uuid.uuid4()
        with ExitStack() as opened:
            self.host = _host(config)
            opened.callback(self.host.close)
            self.exporter = _exporter(config, log, instance.bytes) if sinks else Exporter([], log)
            self.health = Health(self.meter, config.agent.interval, self.exporter.workers)
            probes = self._probes()
            for scheduled in probes:
                opened.callback(scheduled.probe.close)
            self._specs = _tables((scheduled.meter.name, scheduled.probe) for scheduled in probes)
            self._identity = _identity(config, self.host, instance.hex)
            self._introduce()
            self.cycle = Cycle(probes, self.meter, self._serializers(), self.exporter, log)
            opened.pop_all()  # from now on `close` gives back what is held

    def _introduce(self) -> None:
        """Tells the sinks that want to know who and how the agent is."""
        for worker in self.exporter.workers:
            if hasattr(worker.sink, "host"):
                worker.sink.host = self._identity.host
            if hasattr(worker.sink, "watch"):
                worker.sink.watch(self.health)

    def _serializers(self) -> dict[Writer, Serializer]:
        serializers: dict[Writer, Serializer] = {}
        for worker in self.exporter.workers:
            settings = worker.settings
            writer = settings.format, settings.names, settings.tables
            try:
                serializers[writer] = serializers.get(writer) or self.serializer(settings.format, settings.names)
            except UsageError as error:
                raise UsageError(f"{self.config.place('sinks', worker.name)}: {error}") from None
        return serializers

    def serializer(self, format: formats.Name, names: formats.Names = "hostprobe") -> Serializer:
        """A serializer of this run's frames.

        Raises:
            UsageError: the format needs a package that isn't there.
        """
        options = {"names": names} if formats.FORMATS[format].has_names else {}
        serializer: Serializer = formats.load(format)(self._specs, self._identity, self.config.agent.rates, **options)
        return serializer

    def _probes(self) -> Sequence[ScheduledProbe]:
        scheduled: list[ScheduledProbe] = []
        meters = [ProbeMeter(name) for name in self.config.probes]
        for meter in meters:
            probe_class = discovery.load("probes", meter.name)
            assert probe_class is not None, f"{meter.name}: the configuration was checked"
            if probe_class is AgentProbe:
                probe: Any = AgentProbe(self.meter, meters, self.exporter.workers)
            else:
                if self.host.uses_psutil:
                    probe_class = discovery.psutil_variant(probe_class)
                place = self.config.place("probes", meter.name)
                probe = _built(place, probe_class, self.config.probes[meter.name], self.host)
            scheduled.append(ScheduledProbe(probe, meter, self.config.every(meter.name)))
        return scheduled

    def close(self) -> None:
        """Gives back what is held; the exporter is closed by whoever started it."""
        self.cycle.close()
        self.host.close()


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


def _exporter(config: Config, log: Log, instance: bytes) -> Exporter:
    sinks = []
    for name, settings in config.sinks.items():
        sink_class = discovery.load("sinks", settings.type)
        assert sink_class is not None, f"{name}: the configuration was checked"
        place = config.place("sinks", name)
        sinks.append(SinkConfig(name, _built(place, sink_class, settings), settings, place))
    specs = _tables((name, discovery.load("probes", name)) for name in config.probes)
    priorities = {spec.name: spec.priority for spec in specs}
    priorities |= {name: Priority[word.upper()] for name, word in config.agent.priorities.items()}
    timed_every = 1 if config.agent.interval >= 1 else 100
    return Exporter(sinks, log, instance, priorities, timed_every)


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
