"""node_exporter's names: that nothing is lost or told twice, and hostprobe's own names for the rest."""

from __future__ import annotations

import re
from collections import Counter
from mmap import PAGESIZE
from pathlib import Path

import pytest

from agent.assembly import catalogue
from agent.serializers.families import Family, Source
from agent.serializers.frame_tables import FRAME, FRAME_TABLES, UNAME
from agent.serializers.names import hostprobe, naming
from agent.serializers.names.node_exporter import families
from agent.table import Kind, TableSpec, counter, gauge
from probes.cpu import CPU, CPU_CORE
from probes.disk_io import DISK_IO, IO
from probes.filesystem import FILESYSTEM
from probes.memory import MEMORY, PAGING, SWAP
from probes.network import NETWORK
from probes.pressure import PRESSURE
from probes.socket_tables import TCP, UDP

SPECS = [*FRAME_TABLES, *catalogue()]
PAGE = (Path(__file__).parents[2] / "docs/node_exporter.md").read_text()
NAME = r"[a-zA-Z_][a-zA-Z0-9_]*"


def claimed(spec: TableSpec) -> list[Family]:
    return [family for family in families(spec, True) if family.name.startswith("node_")]


def columns_of(families: list[Family]) -> set[str]:
    return {source.column for family in families for source in family.sources}


def named(spec: TableSpec, name: str) -> Family:
    (family,) = [family for family in families(spec, True) if family.name == name]
    return family


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
class TestEveryTable:
    def test_no_column_is_lost(self, spec: TableSpec) -> None:
        assert columns_of(families(spec, True)) == columns_of(hostprobe.families(spec, True))

    def test_derived_columns_go_with_the_rates(self, spec: TableSpec) -> None:
        derived = {column.name for column in spec.columns if column.derived}
        assert columns_of(families(spec, False)) == columns_of(families(spec, True)) - derived

    def test_what_node_exporter_lacks_keeps_its_own_name(self, spec: TableSpec) -> None:
        taken = columns_of(claimed(spec))
        own = [family for family in families(spec, True) if not family.name.startswith("node_")]
        assert own == [family for family in hostprobe.families(spec, True) if family.sources[0].column not in taken]

    def test_kinds_are_those_of_the_columns(self, spec: TableSpec) -> None:
        kinds = {column.name: column.kind for column in spec.columns}
        for family in families(spec, True):
            assert {kinds[source.column] for source in family.sources} == {family.kind}, family.name

    def test_what_is_divided_is_whole(self, spec: TableSpec) -> None:
        columns = {column.name: column for column in spec.columns}
        for family in families(spec, True):
            for source in family.sources:
                assert source.per == 1 or columns[source.column].unit == "bytes", family.name

    def test_series_of_a_family_differ(self, spec: TableSpec) -> None:
        for family in families(spec, True):
            constant = [source.labels for source in family.sources]
            assert len(set(constant)) == len(constant), family.name
            assert {len(labels) for labels in constant} == {0 if len(constant) == 1 else 1}, family.name
            names = [name for name, _ in (*family.labels, *constant[0])]
            assert len(set(names)) == len(names), family.name

    def test_a_family_has_every_key_label_unless_there_is_one_row_of_it(self, spec: TableSpec) -> None:
        for family in claimed(spec):
            expected = [] if spec.name in ("frame", "pressure") else sorted(spec.labels)
            assert sorted(label for _, label in family.labels) == expected, family.name

    def test_names_and_help_can_be_written(self, spec: TableSpec) -> None:
        for family in families(spec, True):
            assert re.fullmatch(NAME, family.name)
            assert all(re.fullmatch(NAME, name) for name, _ in family.labels)
            assert family.help

    def test_the_page_has_its_rows(self, spec: TableSpec) -> None:
        for family in claimed(spec):
            constant = [source.labels[0] for source in family.sources if source.labels]
            columns = ", ".join(f"`{spec.name}.{source.column}`" for source in family.sources)
            columns += "".join(f" of `{s.only[0]}` {s.only[1]}" for s in family.sources if s.only)
            labels = [f"`{name}`" for name, _ in family.labels]
            labels += [f"`{constant[0][0]}`: {', '.join(value for _, value in constant)}"] if constant else []
            per = f" / {family.sources[0].per}" if family.sources[0].per not in (1, PAGESIZE) else ""
            per = " / page size" if family.sources[0].per == PAGESIZE else per
            kind = "untyped" if family.untyped else family.kind.value
            row = f"| `{family.name}` | {kind} | {', '.join(labels)} | {columns}{per} |"
            assert f"\n{row}\n" in PAGE, row


def test_a_name_is_of_one_table_and_one_family() -> None:
    names = Counter(family.name for spec in SPECS for family in families(spec, True))
    assert set(names.values()) == {1}


def test_the_page_claims_nothing_else() -> None:
    rows = re.findall(r"^\| `(node_\w+)` \| (?:counter|gauge|untyped) \|", PAGE, re.MULTILINE)
    assert Counter(rows) == Counter(family.name for spec in SPECS for family in claimed(spec))


def test_it_is_what_a_configuration_calls_so() -> None:
    assert naming("node_exporter") is families


def test_label_maps() -> None:
    assert {spec.name: dict(claimed(spec)[0].labels) for spec in (CPU_CORE, DISK_IO, FILESYSTEM, NETWORK)} == {
        "cpu_core": {"cpu": "core"},
        "disk_io": {"device": "device"},
        "filesystem": {"device": "device", "fstype": "type", "mountpoint": "mountpoint"},
        "network": {"device": "interface"},
    }
    assert named(FRAME, "node_time_seconds").labels == ()
    assert {name for name, _ in named(UNAME, "node_uname_info").labels} == set(UNAME.labels)


def test_cpu_time_is_told_by_core_and_the_sum_by_its_own_name() -> None:
    time = named(CPU_CORE, "node_cpu_seconds_total")
    assert {dict(source.labels)["mode"]: source.column for source in time.sources} == {
        mode: f"{mode}_seconds_total"
        for mode in ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    }
    guest = named(CPU_CORE, "node_cpu_guest_seconds_total")
    assert {dict(source.labels)["mode"]: source.column for source in guest.sources} == {
        "user": "guest_seconds_total",
        "nice": "guest_nice_seconds_total",
    }
    assert named(CPU, "hostprobe_cpu_user_seconds_total").sources == (Source("user_seconds_total"),)
    assert [family.name for family in families(IO, True) if family.name.startswith("node_")] == []


def test_pressure_has_the_resource_in_its_names() -> None:
    for family in claimed(PRESSURE):
        resource, state = family.name.removeprefix("node_pressure_").split("_")[:2]
        column = {"waiting": "some_seconds_total", "stalled": "full_seconds_total"}[state]
        assert family.sources == (Source(column, only=("resource", resource)),)


def test_units_of_the_kernel_come_back() -> None:
    assert named(PAGING, "node_vmstat_pgpgin").sources == (Source("in_bytes_total", per=1024),)
    assert named(SWAP, "node_vmstat_pswpin").sources == (Source("in_bytes_total", per=PAGESIZE),)
    assert named(DISK_IO, "node_disk_discarded_sectors_total").sources == (Source("discard_bytes_total", per=512),)
    assert named(UDP, "node_sockstat_UDP_mem").sources == (Source("memory_bytes", per=PAGESIZE),)
    assert named(UDP, "node_sockstat_UDP_mem_bytes").sources == (Source("memory_bytes"),)


def test_what_has_no_type_there_keeps_its_kind_here() -> None:
    untyped = {family.name: family.kind for spec in SPECS for family in claimed(spec) if family.untyped}
    assert all(re.match("node_(vmstat|netstat)_", name) for name in untyped)
    assert {name for name, kind in untyped.items() if kind is Kind.GAUGE} == {"node_netstat_Tcp_CurrEstab"}
    assert not named(MEMORY, "node_memory_MemTotal_bytes").untyped


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (TCP, "hostprobe_tcp_in_use"),  # node_exporter tells TCP and TCP6 apart
        (UDP, "hostprobe_udp_in_datagrams_total"),
        (NETWORK, "hostprobe_network_up"),  # up here also where the driver tells no state
        (FILESYSTEM, "hostprobe_filesystem_stalled"),
        (MEMORY, "hostprobe_memory_hugepages_total_bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_is_only_similar_has_its_own_name(spec: TableSpec, name: str) -> None:
    assert named(spec, name).labels == tuple((label, label) for label in spec.labels)


def test_a_column_that_a_table_lacks_leaves_its_families_out() -> None:
    spec = TableSpec(
        "swap", "Swap space.", gauge("total_bytes", "bytes", "All."), counter("odd_total", "pages", "Odd.")
    )
    assert [family.name for family in families(spec, True)] == [
        "node_memory_SwapTotal_bytes",
        "hostprobe_swap_odd_total",
    ]
