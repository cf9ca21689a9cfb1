"""The metrics reference, in its three forms."""

from __future__ import annotations

import json
import re

import pytest

from agent.assembly import catalogue
from agent.serializers import catalogue as rendering
from agent.serializers.frame_tables import FRAME_TABLES
from agent.table import TableSpec, counter, gauge, rate

SPECS = list(catalogue())
SMALL = (
    TableSpec("load", "How many tasks want to run.", gauge("load1", "load", "Over 1 minute.")),
    TableSpec(
        "disk",
        "What disks do.",
        counter("reads_total", "reads", "Reads."),
        rate("reads_per_second", "reads/second", "Reads a second.", "reads_total"),
        labels=("device", "kind"),
    ),
)


NAMES = (
    "| column | Prometheus | node_exporter | OpenTelemetry | Influx | Graphite, StatsD |\n|---|---|---|---|---|---|\n"
)


def test_text_is_a_line_a_column() -> None:
    assert rendering.text(SMALL) == (
        "load.load1             gauge    load          Over 1 minute.\n"
        "disk.reads_total       counter  reads         Reads.\n"
        "disk.reads_per_second  gauge    reads/second  Reads a second."
    )


def test_markdown_has_a_table_a_table() -> None:
    text = rendering.markdown(SMALL)
    assert text.startswith("# Metrics\n\n")
    assert text.endswith(
        "## load\n\nHow many tasks want to run. One object.\n\n"
        "| column | kind | unit | meaning |\n|---|---|---|---|\n| `load1` | gauge | load | Over 1 minute. |\n\n"
        f"{NAMES}"
        "| `load1` | `hostprobe_load_load1` | `node_load1` | `hostprobe.load.load1` | `load load1` | `load.load1` |\n\n"
        "## disk\n\nWhat disks do. A row for each `device` `kind`.\n\n"
        "| column | kind | unit | meaning |\n|---|---|---|---|\n| `reads_total` | counter | reads | Reads. |\n"
        "| `reads_per_second` | gauge, derived | reads/second | Reads a second. |\n\n"
        f"{NAMES}"
        "| `reads_total` | `hostprobe_disk_reads_total{device,kind}` |  | `hostprobe.disk.reads{device,kind}`"
        " | `disk,device,kind reads_total` | `disk.DEVICE.KIND.reads_total` |\n"
        "| `reads_per_second` | `hostprobe_disk_reads_per_second{device,kind}` |"
        "  | `hostprobe.disk.reads_per_second{device,kind}`"
        " | `disk,device,kind reads_per_second` | `disk.DEVICE.KIND.reads_per_second` |"
    )


@pytest.mark.parametrize("spec", [*SPECS, *FRAME_TABLES], ids=lambda spec: spec.name)
def test_every_column_has_a_name_in_each_format(spec: TableSpec) -> None:
    """But for the sum of another table's counter, and what node_exporter doesn't know."""
    rows = re.findall(
        r"^\| `(\w+)` \|(.*) \|$", rendering.markdown([spec]).partition("| Prometheus |")[2], re.MULTILINE
    )
    assert [name for name, _ in rows] == [column.name for column in spec.columns]
    for name, cells in rows:
        prometheus, _, *others = (cell.strip() for cell in cells.split(" | "))
        assert prometheus or (spec.name, name) == ("agent", "probe_failures_total")
        assert len(others) == 3
        assert all(others)


def test_a_name_has_the_labels_that_a_series_has() -> None:
    (cores,) = (spec for spec in SPECS if spec.name == "cpu_core")
    text = rendering.markdown([cores])
    assert '`hostprobe_cpu_core_user_seconds_total{core}` | `node_cpu_seconds_total{cpu,mode="user"}` |' in text
    assert "`cpu_core,core user_seconds_total` | `cpu_core.CORE.user_seconds_total` |" in text


def test_json_says_everything() -> None:
    load, disk = json.loads(rendering.json(SMALL))
    column = {"name": "load1", "kind": "gauge", "unit": "load", "derived": False, "help": "Over 1 minute."}
    assert load == {
        "table": "load",
        "help": "How many tasks want to run.",
        "labels": [],
        "optional": [],
        "columns": [column],
    }
    assert disk["labels"] == ["device", "kind"]
    assert [column["derived"] for column in disk["columns"]] == [False, True]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_declarations_read_well_in_the_reference(spec: TableSpec) -> None:
    """What a Markdown cell, a schema and a Prometheus name need of every declaration."""
    assert re.fullmatch(r"[A-Z].*[.]", spec.help)
    for column in spec.columns:
        assert re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", column.name)
        assert re.fullmatch(r"[^|\n]*[.]", column.help), f"{column.name}: {column.help}"
        assert column.unit
        assert column.name.endswith("_total") == (column.kind == "counter"), column.name
        for unit in ("seconds", "bytes", "ratio"):
            if column.unit == unit:
                assert unit in column.name.split("_"), column.name


def test_a_table_that_has_another_key_in_a_line_says_so() -> None:
    host = TableSpec("host", "The host.", gauge("uptime_seconds", "seconds", "Up."))
    assert "## host\n\nThe host. One object. In a JSON line its key is `host_table`.\n" in rendering.markdown([host])
    assert "In a JSON line" not in rendering.markdown(SMALL)
