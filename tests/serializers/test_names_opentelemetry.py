"""The names for OpenTelemetry: what its conventions say, hostprobe's own, and that nothing is told twice."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from agent.assembly import catalogue
from agent.serializers.families import Family
from agent.serializers.names import opentelemetry
from agent.serializers.names.opentelemetry import families, ucum
from agent.table import Kind, TableSpec, counter, gauge
from probes.cpu import CPU, CPU_CORE
from probes.filesystem import FILESYSTEM
from probes.load import LOAD
from probes.memory import MEMORY
from probes.network import NETWORK
from probes.socket_tables import LISTENING, TCP, UDP

SPECS = list(catalogue())
PAGE = (Path(__file__).parents[2] / "docs/opentelemetry.md").read_text()

MOUNT = "system.device system.filesystem.type system.filesystem.mode system.filesystem.mountpoint"
# Transcribed from the conventions, model/system/metrics.yaml of 1.44.0: instrument, unit, attributes.
CONVENTIONS = {
    "system.uptime": ("gauge", "s", ""),
    "system.cpu.logical.count": ("updowncounter", "{cpu}", ""),
    "system.cpu.time": ("counter", "s", "cpu.mode cpu.logical_number"),
    "system.process.created": ("counter", "{process}", ""),
    "system.memory.usage": ("updowncounter", "By", "system.memory.state"),
    "system.memory.limit": ("updowncounter", "By", ""),
    "system.memory.utilization": ("gauge", "1", "system.memory.state"),
    "system.memory.linux.available": ("updowncounter", "By", ""),
    "system.memory.linux.shared": ("updowncounter", "By", ""),
    "system.memory.linux.slab.usage": ("updowncounter", "By", "system.memory.linux.slab.state"),
    "system.paging.usage": ("updowncounter", "By", "system.paging.state system.device"),
    "system.paging.utilization": ("gauge", "1", "system.paging.state system.device"),
    "system.paging.faults": ("counter", "{fault}", "system.paging.fault.type"),
    "system.disk.io": ("counter", "By", "system.device disk.io.direction"),
    "system.disk.operations": ("counter", "{operation}", "system.device disk.io.direction"),
    "system.disk.io_time": ("counter", "s", "system.device"),
    "system.disk.operation_time": ("counter", "s", "system.device disk.io.direction"),
    "system.disk.merged": ("counter", "{operation}", "system.device disk.io.direction"),
    "system.filesystem.usage": ("updowncounter", "By", f"system.filesystem.state {MOUNT}"),
    "system.filesystem.utilization": ("gauge", "1", f"system.filesystem.state {MOUNT}"),
    "system.filesystem.limit": ("updowncounter", "By", MOUNT),
    "system.network.io": ("counter", "By", "network.interface.name network.io.direction"),
    "system.network.packet.count": ("counter", "{packet}", "system.device network.io.direction"),
    "system.network.packet.dropped": ("counter", "{packet}", "network.interface.name network.io.direction"),
    "system.network.errors": ("counter", "{error}", "network.interface.name network.io.direction"),
    "system.network.connection.count": (
        "updowncounter",
        "{connection}",
        "network.interface.name network.connection.state network.transport",
    ),
}
# From the registry of attributes; softirq is none of cpu.mode's, which the conventions allow.
VALUES = {
    "cpu.mode": "user system nice idle iowait interrupt steal softirq",
    "system.memory.state": "used free buffers cached",
    "system.memory.linux.slab.state": "reclaimable unreclaimable",
    "system.paging.state": "used free",
    "disk.io.direction": "read write",
    "system.filesystem.state": "used free reserved",
    "network.io.direction": "transmit receive",
    "network.transport": "tcp udp pipe unix quic",
    "network.connection.state": """closed close_wait closing established fin_wait_1 fin_wait_2 last_ack listen
        syn_received syn_sent time_wait""",
}
UNITS = {
    "seconds": "s",
    "bytes": "By",
    "ratio": "1",
    "boolean": "1",
    "load": "{task}",
    "bytes/second": "By/s",
    "reads/second": "{read}/s",
    "writes/second": "{write}/s",
    "id": "{id}",
    "blocks": "{block}",
    "connections": "{connection}",
    "cpus": "{cpu}",
    "cycles": "{cycle}",
    "reloads": "{reload}",
    "datagrams": "{datagram}",
    "discards": "{discard}",
    "failures": "{failure}",
    "faults": "{fault}",
    "flushes": "{flush}",
    "forks": "{fork}",
    "frames": "{frame}",
    "inodes": "{inode}",
    "interrupts": "{interrupt}",
    "packets": "{packet}",
    "processes": "{process}",
    "reads": "{read}",
    "requests": "{request}",
    "retries": "{retry}",
    "runs": "{run}",
    "segments": "{segment}",
    "sockets": "{socket}",
    "switches": "{switch}",
    "tasks": "{task}",
    "writes": "{write}",
}
UCUM = r"(s|By|1|\{[a-z]+\})(/s)?"
NAME = r"[a-z][a-z0-9]*([._][a-z0-9]+)*"
INSTRUMENTS = {"counter": "Counter", "updowncounter": "UpDownCounter", "gauge": "Gauge"}


def instrument(family: Family) -> str:
    return "updowncounter" if family.additive else family.kind.value


def agreed(spec: TableSpec) -> list[Family]:
    return [family for family in families(spec, True) if not family.name.startswith("hostprobe.")]


def named(spec: TableSpec, name: str) -> Family:
    (family,) = [family for family in families(spec, True) if family.name == name]
    return family


def series(family: Family) -> dict[str, str]:
    """The column that each value of the last attribute is taken from."""
    return {source.labels[-1][1]: source.column for source in family.sources}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
class TestEveryTable:
    def test_every_column_is_told_once(self, spec: TableSpec) -> None:
        told = Counter(source.column for family in families(spec, True) for source in family.sources)
        assert told == dict.fromkeys((column.name for column in spec.columns), 1)

    def test_derived_columns_go_with_the_rates(self, spec: TableSpec) -> None:
        told = {source.column for family in families(spec, False) for source in family.sources}
        assert told == {column.name for column in spec.columns if not column.derived}
        assert all(family.sources for family in families(spec, False))

    def test_kinds_and_units_are_those_of_the_columns(self, spec: TableSpec) -> None:
        kinds = {column.name: column.kind for column in spec.columns}
        units = {column.name: ucum(column.unit) for column in spec.columns}
        for family in families(spec, True):
            assert {kinds[source.column] for source in family.sources} == {family.kind}
            assert not (family.additive and family.kind is Kind.COUNTER)
            assert re.fullmatch(UCUM, family.unit), family
            # What is counted may have another word in the conventions; a measure may not.
            for source in family.sources:
                assert "{" in units[source.column] + family.unit or family.unit == units[source.column]
                assert ("{" in units[source.column]) == ("{" in family.unit)

    def test_series_of_a_family_differ(self, spec: TableSpec) -> None:
        for family in families(spec, True):
            attributes = [source.labels for source in family.sources]
            assert len(set(attributes)) == len(attributes), family.name
            names = {tuple(name for name, _ in labels) for labels in attributes}
            assert len(names) == 1, family.name
            assert not set(*names) & {name for name, _ in family.labels}

    def test_every_key_label_is_an_attribute(self, spec: TableSpec) -> None:
        for family in families(spec, True):
            assert tuple(label for _, label in family.labels) == spec.labels
            assert len({name for name, _ in family.labels}) == len(spec.labels)

    def test_the_conventions_know_the_others(self, spec: TableSpec) -> None:
        for family in agreed(spec):
            expected_instrument, unit, attributes = CONVENTIONS[family.name]
            assert (instrument(family), family.unit) == (expected_instrument, unit)
            names = {name for name, _ in family.labels}
            for source in family.sources:
                names |= dict(source.labels).keys()
                assert all(value in VALUES[name].split() for name, value in source.labels)
            assert names <= set(attributes.split())

    def test_the_page_has_its_rows(self, spec: TableSpec) -> None:
        for family in agreed(spec):
            constant = [f"`{name}` {value}" for name, value in family.sources[0].labels[:-1]]
            varying = [f"{source.labels[-1][1]} `{source.column}`" for source in family.sources if source.labels]
            state = [f"`{family.sources[0].labels[-1][0]}`: {', '.join(varying)}"] if varying else []
            keys = [f"`{name}`" for name, _ in family.labels]
            column = "" if varying else f".{family.sources[0].column}"
            cells = (
                f"`{family.name}`",
                INSTRUMENTS[instrument(family)],
                f"`{family.unit}`",
                f"`{spec.name}{column}`",
                "; ".join([*state, *constant, *keys]),
            )
            assert f"\n| {' | '.join(cells)} |\n" in PAGE, "| " + " | ".join(cells) + " |"


def test_a_name_is_of_one_table_and_one_family() -> None:
    names = Counter(family.name for spec in SPECS for family in families(spec, True))
    assert set(names.values()) == {1}
    assert all(re.fullmatch(NAME, name) for name in names)
    assert {name for name in names if not name.startswith("hostprobe.")} == set(CONVENTIONS)


def test_no_name_ends_with_total() -> None:
    assert [f.name for spec in SPECS for f in families(spec, True) if f.name.endswith("_total")] == []


@pytest.mark.parametrize("unit", UNITS)
def test_units(unit: str) -> None:
    assert ucum(unit) == UNITS[unit]


def test_every_unit_that_occurs_is_in_the_list() -> None:
    assert {column.unit for spec in SPECS for column in spec.columns} <= UNITS.keys()


def test_cpu_time_is_there_without_cores_and_its_modes_make_up_the_whole() -> None:
    time = named(CPU, "system.cpu.time")
    assert (time.unit, time.kind, time.labels) == ("s", Kind.COUNTER, ())
    assert series(time) == {
        "user": "user_seconds_total",
        "nice": "nice_seconds_total",
        "system": "system_seconds_total",
        "idle": "idle_seconds_total",
        "iowait": "iowait_seconds_total",
        "interrupt": "irq_seconds_total",
        "softirq": "softirq_seconds_total",
        "steal": "steal_seconds_total",
    }
    (usage,) = [column for column in CPU.columns if column.name == "usage_ratio"]
    assert {source.column for source in time.sources} == set(usage.by)
    assert agreed(CPU_CORE) == []
    core = named(CPU_CORE, "hostprobe.cpu_core.idle_seconds")
    assert core.labels == (("cpu.logical_number", "core"),)
    assert core.labels[0][0] in opentelemetry.INTEGERS


def test_golden_families() -> None:
    usage = named(MEMORY, "system.memory.usage")
    assert (usage.unit, usage.kind, usage.additive, usage.labels) == ("By", Kind.GAUGE, True, ())
    assert series(usage) == {
        "used": "used_bytes",
        "free": "free_bytes",
        "cached": "cached_bytes",
        "buffers": "buffers_bytes",
    }
    disk = named(FILESYSTEM, "system.filesystem.usage")
    assert series(disk) == {"used": "used_bytes", "free": "free_bytes"}
    assert disk.labels == (
        ("system.filesystem.mountpoint", "mountpoint"),
        ("system.device", "device"),
        ("system.filesystem.type", "type"),
    )
    io = named(NETWORK, "system.network.io")
    assert series(io) == {"receive": "receive_bytes_total", "transmit": "transmit_bytes_total"}
    assert io.labels == (("network.interface.name", "interface"),)
    assert named(NETWORK, "system.network.packet.count").labels == (("system.device", "interface"),)
    connections = named(TCP, "system.network.connection.count")
    assert len(connections.sources) == 11
    assert {source.labels[0] for source in connections.sources} == {("network.transport", "tcp")}
    assert series(connections)["syn_received"] == "syn_recv"
    assert series(connections)["closed"] == "close"


def test_own_names_keep_table_column_and_unit() -> None:
    up = named(NETWORK, "hostprobe.network.up")
    assert (up.unit, up.kind, up.additive) == ("1", Kind.GAUGE, False)
    assert up.labels == (("network.interface.name", "interface"),)
    assert named(UDP, "hostprobe.udp.memory_bytes").unit == "By"
    segments = named(TCP, "hostprobe.tcp.retransmitted_segments")
    assert (segments.unit, segments.kind) == ("{segment}", Kind.COUNTER)
    assert segments.help == "Segments sent again."
    assert [family.name for family in families(LOAD, True)][:2] == ["hostprobe.load.load1", "hostprobe.load.load5"]
    assert named(LISTENING, "hostprobe.listening.accept_queue").labels[0] == ("protocol", "protocol")


def test_a_table_without_its_optional_columns() -> None:
    spec = LISTENING.without_optional()
    assert [family.name for family in families(spec, True)] == [
        "hostprobe.listening.accept_queue",
        "hostprobe.listening.accept_queue_limit",
    ]
    assert {family.labels for family in families(spec, True)} == {
        tuple((label, label) for label in ("protocol", "family", "address", "port"))
    }


def test_another_probe_s_table_of_the_same_name_has_names_for_what_it_has() -> None:
    spec = TableSpec("memory", "Other.", gauge("free_bytes", "bytes", "."), counter("moves_total", "pages", "."))
    usage, moves = families(spec, True)
    assert (usage.name, series(usage)) == ("system.memory.usage", {"free": "free_bytes"})
    assert (moves.name, moves.unit) == ("hostprobe.memory.moves", "{page}")


def test_the_page_says_the_version() -> None:
    version = opentelemetry.SCHEMA_URL.rpartition("/")[2]
    assert f"version {version} of the semantic conventions" in PAGE
    assert opentelemetry.__doc__ is not None
    assert f"({version})" in opentelemetry.__doc__
