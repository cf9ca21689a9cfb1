"""The names of OpenTelemetry's semantic conventions (1.44.0), and `hostprobe.<table>.<column>` where they have none.

A metric of the conventions comes from one table alone, so that a sum over its attributes counts nothing twice:
`system.cpu.time` from `cpu`, which every template has and which outlives a full ring, never from `cpu_core`. A column
has such a name only where it is what the conventions mean; docs/opentelemetry.md says which are not, and why.

hostprobe's own names leave out `_total`, which the kind says, and keep the unit, which the conventions allow where a
name would be ambiguous without: tables have `used_bytes` and `used_ratio`, `reads` and `reads_per_second`.
"""

from __future__ import annotations

from agent.serializers.families import Family, Label, Source
from agent.table import Column, Kind, TableSpec

PREFIX = "hostprobe"
SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
"""Which version of the conventions the names are of, as OTLP says it."""
INTEGERS = frozenset({"cpu.logical_number"})
"""Attributes whose values the conventions want as integers."""

_UNITS = {
    "seconds": "s",
    "bytes": "By",
    "ratio": "1",
    "boolean": "1",
    "load": "{task}",
    "flushes": "{flush}",
    "processes": "{process}",
    "retries": "{retry}",
    "switches": "{switch}",
}
"""UCUM of the units that are not what is counted in the plural, or whose plural is more than an s."""

_ATTRIBUTES = {
    "cpu_core": {"core": "cpu.logical_number"},
    "disk_io": {"device": "system.device"},
    "filesystem": {
        "mountpoint": "system.filesystem.mountpoint",
        "device": "system.device",
        "type": "system.filesystem.type",
    },
    "network": {"interface": "network.interface.name"},
}
"""By table, what the conventions call key labels; all others keep their names."""


def families(spec: TableSpec, rates: bool) -> list[Family]:
    """The families that the conventions know, then one for each column that is in none of them."""
    columns = {column.name: column for column in spec.columns if rates or not column.derived}
    attributes = _ATTRIBUTES.get(spec.name, {})
    labels = tuple((attributes.get(label, label), label) for label in spec.labels)
    found = []
    for family in _AGREED.get(spec.name, ()):
        sources = tuple(source for source in family.sources if source.column in columns)
        if sources:
            found.append(family._replace(sources=sources, labels=family.labels or labels))
    taken = {source.column for family in found for source in family.sources}
    return found + [_own(spec, column, labels) for name, column in columns.items() if name not in taken]


def ucum(unit: str) -> str:
    """A column's unit in UCUM; what is counted is an annotation, such as `{packet}`."""
    if unit.endswith("/second"):
        return f"{ucum(unit.removesuffix('/second'))}/s"
    return _UNITS.get(unit) or f"{{{unit.removesuffix('s')}}}"


def _own(spec: TableSpec, column: Column, labels: tuple[Label, ...]) -> Family:
    name = f"{PREFIX}.{spec.name}.{column.name.removesuffix('_total')}"
    return Family(name, column.kind, ucum(column.unit), column.help, (Source(column.name),), labels)


def _counter(name: str, unit: str, help: str, *sources: Source, labels: tuple[Label, ...] = ()) -> Family:
    return Family(name, Kind.COUNTER, unit, help, sources, labels)


def _gauge(name: str, unit: str, help: str, *sources: Source) -> Family:
    return Family(name, Kind.GAUGE, unit, help, sources)


def _amount(name: str, unit: str, help: str, *sources: Source) -> Family:
    """An UpDownCounter of the conventions."""
    return Family(name, Kind.GAUGE, unit, help, sources, additive=True)


def _by(attribute: str, *also: Label, **columns: str) -> list[Source]:
    """A source for each value of an attribute."""
    return [Source(column, (*also, (attribute, value))) for value, column in columns.items()]


_AGREED = {
    "host": (_gauge("system.uptime", "s", "Time since the host was booted.", Source("uptime_seconds")),),
    "cpu": (
        _counter(
            "system.cpu.time",
            "s",
            "CPU time by mode, all CPUs together.",
            *_by(
                "cpu.mode",
                user="user_seconds_total",
                nice="nice_seconds_total",
                system="system_seconds_total",
                idle="idle_seconds_total",
                iowait="iowait_seconds_total",
                interrupt="irq_seconds_total",
                softirq="softirq_seconds_total",
                steal="steal_seconds_total",
            ),
        ),
        _amount("system.cpu.logical.count", "{cpu}", "CPUs that are online.", Source("logical_count")),
        _counter("system.process.created", "{process}", "Processes and threads created.", Source("forks_total")),
    ),
    "memory": (
        _amount(
            "system.memory.usage",
            "By",
            "Memory by state.",
            *_by(
                "system.memory.state",
                used="used_bytes",
                free="free_bytes",
                cached="cached_bytes",
                buffers="buffers_bytes",
            ),
        ),
        _gauge(
            "system.memory.utilization",
            "1",
            "Memory by state, divided by all memory.",
            *_by("system.memory.state", used="used_ratio"),
        ),
        _amount("system.memory.limit", "By", "Memory that the kernel manages.", Source("total_bytes")),
        _amount(
            "system.memory.linux.available",
            "By",
            "Memory that programs can get without swapping.",
            Source("available_bytes"),
        ),
        _amount("system.memory.linux.shared", "By", "tmpfs and shared memory.", Source("shared_bytes")),
        _amount(
            "system.memory.linux.slab.usage",
            "By",
            "Kernel caches by state.",
            *_by("system.memory.linux.slab.state", reclaimable="slab_reclaimable_bytes"),
        ),
    ),
    "swap": (
        _amount(
            "system.paging.usage",
            "By",
            "Swap space by state.",
            *_by("system.paging.state", used="used_bytes", free="free_bytes"),
        ),
        _gauge(
            "system.paging.utilization",
            "1",
            "Swap space by state, divided by all swap space.",
            *_by("system.paging.state", used="used_ratio"),
        ),
    ),
    "paging": (_counter("system.paging.faults", "{fault}", "Page faults of both types.", Source("faults_total")),),
    "disk_io": (
        _counter(
            "system.disk.io",
            "By",
            "Bytes read and written.",
            *_by("disk.io.direction", read="read_bytes_total", write="write_bytes_total"),
        ),
        _counter(
            "system.disk.operations",
            "{operation}",
            "Reads and writes completed.",
            *_by("disk.io.direction", read="reads_total", write="writes_total"),
        ),
        _counter(
            "system.disk.io_time",
            "s",
            "Time in which at least one request was being served.",
            Source("io_seconds_total"),
        ),
        _counter(
            "system.disk.operation_time",
            "s",
            "Time that reads and writes took, summed over them.",
            *_by("disk.io.direction", read="read_seconds_total", write="write_seconds_total"),
        ),
        _counter(
            "system.disk.merged",
            "{operation}",
            "Reads and writes merged with an adjacent one before they were issued.",
            *_by("disk.io.direction", read="reads_merged_total", write="writes_merged_total"),
        ),
    ),
    "filesystem": (
        _amount(
            "system.filesystem.usage",
            "By",
            "Space by state, root's reserve in what is free.",
            *_by("system.filesystem.state", used="used_bytes", free="free_bytes"),
        ),
        _gauge(
            "system.filesystem.utilization",
            "1",
            "Used space divided by used and available, as df shows it.",
            *_by("system.filesystem.state", used="used_ratio"),
        ),
        _amount("system.filesystem.limit", "By", "Size of the file system.", Source("size_bytes")),
    ),
    "network": (
        _counter(
            "system.network.io",
            "By",
            "Bytes received and sent.",
            *_by("network.io.direction", receive="receive_bytes_total", transmit="transmit_bytes_total"),
        ),
        _counter(
            "system.network.packet.count",
            "{packet}",
            "Packets received and sent.",
            *_by("network.io.direction", receive="receive_packets_total", transmit="transmit_packets_total"),
            # The only one of its kind that the conventions left with this attribute.
            labels=(("system.device", "interface"),),
        ),
        _counter(
            "system.network.packet.dropped",
            "{packet}",
            "Packets dropped, those that the device missed included.",
            *_by("network.io.direction", receive="receive_drops_total", transmit="transmit_drops_total"),
        ),
        _counter(
            "system.network.errors",
            "{error}",
            "Packets received with an error, and those that could not be sent.",
            *_by("network.io.direction", receive="receive_errors_total", transmit="transmit_errors_total"),
        ),
    ),
    "tcp": (
        _amount(
            "system.network.connection.count",
            "{connection}",
            "TCP sockets by state, IPv4 and IPv6 together.",
            *_by(
                "network.connection.state",
                ("network.transport", "tcp"),
                established="established",
                syn_sent="syn_sent",
                syn_received="syn_recv",
                fin_wait_1="fin_wait1",
                fin_wait_2="fin_wait2",
                time_wait="time_wait",
                closed="close",
                close_wait="close_wait",
                last_ack="last_ack",
                listen="listen",
                closing="closing",
            ),
        ),
    ),
}
"""By table, the families of the conventions; where labels are empty they are those of the table."""
