"""Which probes and sinks there are: those of hostprobe, and those that others add.

A package adds one by an entry point in the group `hostprobe.probes` or `hostprobe.sinks`;
the entry's name is the name of its section in the configuration.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from agent.errors import UsageError

PROBES = {
    "host": "probes.host:HostProbe",
    "cpu": "probes.cpu:CpuProbe",
    "memory": "probes.memory:MemoryProbe",
    "load": "probes.load:LoadProbe",
    "disk_io": "probes.disk_io:DiskIoProbe",
    "filesystem": "probes.filesystem:FilesystemProbe",
    "network": "probes.network:NetworkProbe",
    "pressure": "probes.pressure:PressureProbe",
    "sockets": "probes.sockets:SocketsProbe",
    "agent": "agent.telemetry:AgentProbe",
}
"""In the order of the tables in a line; `agent` is last, so that it sees the cycle."""

SINKS = {
    "stdout": "agent.sinks.stdout:StdoutSink",
    "file": "agent.sinks.file:FileSink",
    "tcp": "agent.sinks.stream:TcpSink",
    "unix": "agent.sinks.stream:UnixSink",
    "udp": "agent.sinks.udp:UdpSink",
    "http": "agent.sinks.http:HttpSink",
    "prometheus": "agent.sinks.prometheus:PrometheusSink",
    "remote_write": "agent.sinks.remote_write:RemoteWriteSink",
    "otlp": "agent.sinks.otlp:OtlpSink",
    "kafka": "agent.sinks.kafka:KafkaSink",
    "nats": "agent.sinks.nats:NatsSink",
}

_BUILT_IN = {"probes": PROBES, "sinks": SINKS}


def load(kind: str, name: str) -> Any | None:
    """The class of a probe or a sink, imported now; None where there is none of this name.

    Args:
        kind: "probes" or "sinks".
    """
    place = _BUILT_IN[kind].get(name)
    if place is not None:
        module, _, attribute = place.partition(":")
        return getattr(import_module(module), attribute)
    for entry in _entry_points(kind):
        if entry.name == name:
            return _loaded(entry, kind)
    return None


def _loaded(entry: Any, kind: str) -> Any:
    try:
        return entry.load()
    except Exception as error:  # whatever the import of someone else's module may raise
        raise UsageError(f"{kind}.{entry.name}: {entry.value}: {type(error).__name__}: {error}") from None


def psutil_variant(probe: Any) -> Any:
    """The class that collects a probe's tables by psutil: `PsutilXProbe` beside `XProbe`, else itself."""
    module = import_module(probe.__module__)
    return getattr(module, f"Psutil{probe.__name__}", probe)


def names(kind: str) -> list[str]:
    """Every name of the kind, hostprobe's own first."""
    return [*_BUILT_IN[kind], *(entry.name for entry in _entry_points(kind) if entry.name not in _BUILT_IN[kind])]


def _entry_points(kind: str) -> Any:
    # Reading every package's metadata takes memory and time: only for names that aren't ours.
    from importlib.metadata import entry_points

    return entry_points(group=f"hostprobe.{kind}")
