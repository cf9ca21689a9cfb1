"""The report of a bench: its table, its JSON, and what it says of an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.bench.report import COLUMNS, ProfileLine, Report, Row, Sources, read
from agent.errors import UsageError

CPU = Row(
    part="probe cpu",
    median_microseconds=20.04,
    p99_microseconds=100.0,
    floor_microseconds=10.0,
    floor_ratio=2.004,
    allocations=100.5,
    allocated_bytes=2000.0,
    net_blocks=0,
    collector_runs=0,
    collector_pause_microseconds=0.0,
    reallocations=0,
)
JSON = Row(part="format json", median_microseconds=50.0, p99_microseconds=60.0, payload_bytes=8000)
FAILED = Row(part="probe load", failure="ProbeError: loadavg: \x1b[2J")


def report_of(*rows: Row, **changed: Any) -> Report:
    fields: dict[str, Any] = {
        "schema": "hostprobe-bench/1",
        "hostprobe": "0.1.0",
        "time": "2026-11-21T10:00:00Z",
        "kernel": "6.18.0",
        "cpu_count": 2,
        "cpu_model": "AMD EPYC",
        "python": "3.11.7",
        "memray": "1.20.0",
        "configuration": "",
        "template": "standard",
        "cycles": 300,
        "floor": Sources(files=25, places=1, dumps=4),
        "rows": list(rows),
        "profile": None,
    }
    return Report(**fields | changed)


def table_of(text: bytes) -> list[list[str]]:
    """The words of the table's lines below its two headings."""
    lines = text.decode().split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith("part"))
    return [line.split() for line in lines[start + 2 : lines.index("", start)]]


def test_the_table() -> None:
    lines = report_of(CPU, JSON).text().decode().split("\n")
    assert lines[:7] == [
        "2026-11-21T10:00:00Z, hostprobe 0.1.0, template standard, 300 cycles",
        "Linux 6.18.0, 2 × AMD EPYC, Python 3.11.7",
        "",
        "part         median    p99  kernel  ratio  payload    allo-  allocated     net    GC  GC pause  reallo-",
        "                 µs     µs      µs           bytes  cations      bytes  blocks  runs        µs  cations",
        "probe cpu      20.0  100.0    10.0   2.00        -      100       2000       0     0       0.0        0",
        "format json    50.0   60.0       -      -     8000        -          -       -     -         -        -",
    ]
    assert lines[-1] == "the kernel's floor: 25 files, 1 statvfs, 4 netlink dumps"


def test_a_probe_that_failed() -> None:
    text = report_of(CPU, FAILED).text()
    assert table_of(text)[1] == ["probe", "load", *["-"] * len(COLUMNS)]
    assert b"\nprobe load failed: 'ProbeError: loadavg: \\x1b[2J'" in text
    assert b"\x1b" not in text


def test_large_figures_and_long_names_fit_into_120_columns() -> None:
    figures = {column.name: 123_456.7 if column.decimals else 99_999 for column in COLUMNS}
    figures |= {"floor_ratio": 123.45, "allocated_bytes": 12_345_678}
    before = dict.fromkeys(figures, 20000) | {"floor_ratio": 12.3, "allocated_bytes": 2_000_000}
    name = "format prometheus, node_exporter"
    row, earlier = Row(part=name, **figures), Row(part=name, **before)
    for text in (report_of(CPU, row).text(), report_of(CPU, row).text(report_of(CPU, earlier))):
        assert "format prometheus, node…" in text.decode()
        assert max(map(len, text.decode().split("\n"))) <= 120


def test_json_has_every_field_and_reads_back() -> None:
    report = report_of(CPU, FAILED, profile=[ProfileLine(place="a.py:1", function="f", share_ratio=0.5, allocations=9)])
    document = json.loads(report.json())
    assert set(document) == set(Report.__struct_fields__)
    assert document["rows"][0] == {name: getattr(CPU, name) for name in Row.__struct_fields__}
    assert document["rows"][1]["median_microseconds"] is None
    assert msgspec.json.decode(report.json(), type=Report) == report


def test_compared_with_itself_nothing_has_changed(tmp_path: Path) -> None:
    report = report_of(CPU, JSON, FAILED)
    path = tmp_path / "before.json"
    path.write_bytes(report.json(report))  # what was compared itself is as good
    before = read(str(path))
    assert before == report
    for row in json.loads(report.json(before))["rows"]:
        assert row["changes_percent"] == {column.name: None if row[column.name] is None else 0.0 for column in COLUMNS}
    changes = [line for line in table_of(report.text(before)) if line[0] == "change"]
    assert [set(line[1:]) for line in changes] == [{"0%", "-"}, {"0%", "-"}, {"-"}]


def test_changes_in_percent() -> None:
    before = report_of(CPU, JSON, time="2026-11-20T09:00:00Z", template="minimal", cpu_model="ARM")
    now = report_of(
        msgspec.structs.replace(
            CPU, median_microseconds=30.06, floor_ratio=1.002, allocations=None, allocated_bytes=42_000.0, net_blocks=3
        ),
        msgspec.structs.replace(JSON, payload_bytes=7992),
        msgspec.structs.replace(JSON, part="format otlp"),
    )
    changes = {row["part"]: row["changes_percent"] for row in json.loads(now.json(before))["rows"]}
    assert changes["probe cpu"] == {
        "median_microseconds": 50.0,
        "p99_microseconds": 0.0,
        "floor_microseconds": 0.0,
        "floor_ratio": -50.0,
        "payload_bytes": None,
        "allocations": None,
        "allocated_bytes": 2000.0,
        "net_blocks": None,  # no percentage of nothing
        "collector_runs": 0.0,
        "collector_pause_microseconds": 0.0,
        "reallocations": 0.0,
    }
    assert changes["format json"]["payload_bytes"] == -0.1
    assert set(changes["format otlp"].values()) == {None}
    text = now.text(before)
    assert table_of(text)[1] == ["change", "+50.0%", "0%", "0%", "-50.0%", "-", "-", "+2000%", "-", "0%", "0%", "0%"]
    assert b"\nchanges since 2026-11-20T09:00:00Z, hostprobe 0.1.0, template minimal, 300 cycles\n" in text
    assert b"\n              Linux 6.18.0, 2 \xc3\x97 ARM, Python 3.11.7\n" in text


def test_parts_that_are_no_more() -> None:
    before = report_of(CPU, JSON, Row(part="probe \x1b[2J"))
    text = report_of(CPU).text(before)
    assert text.endswith(b"\nnot in this run: format json, 'probe \\x1b[2J'")


def test_a_profile() -> None:
    lines = [
        ProfileLine(place="probes/procfs.py:234", function="pick", share_ratio=0.2137, allocations=662.04),
        ProfileLine(place="agent/rates.py:7", function="fill", share_ratio=0.06, allocations=99),
    ]
    assert report_of(CPU, profile=lines).text().decode().split("\n")[-3:] == [
        "lines with more than 5 % of a cycle's allocations:",
        "  21.4%    662.0 a cycle  probes/procfs.py:234 pick",
        "   6.0%     99.0 a cycle  agent/rates.py:7 fill",
    ]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Input data was truncated"),
        (b"{", "Input data was truncated"),
        (b"[]", "Expected `object`, got `array`"),
        (b'{"schema": "hostprobe/1"}', "Invalid enum value 'hostprobe/1' - at `$.schema`"),
        (b'{"schema": "hostprobe-bench/1"}', "Object missing required field `hostprobe`"),
        (b"\xff\xfe", "JSON is malformed"),
        (b"[" * 100_000, ""),
    ],
)
def test_a_damaged_file(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    path.write_bytes(data)
    with pytest.raises(UsageError) as raised:
        read(str(path))
    assert str(raised.value).startswith(f"--compare: {path}: {reason}")
    assert str(raised.value).endswith(": expected a report of hostprobe bench --format json")
    assert "\n" not in str(raised.value)


def test_every_cut_of_a_report_is_damaged(tmp_path: Path) -> None:
    data = report_of(CPU).json()
    path = tmp_path / "before.json"
    for length in range(0, len(data) - 1, 7):
        path.write_bytes(data[:length])
        with pytest.raises(UsageError):
            read(str(path))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("absent", "No such file or directory"), ("", "Is a directory"), ("x\0y", "embedded null byte")],
)
def test_a_file_that_cannot_be_read(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=reason):
        read(f"{tmp_path}/{name}")
