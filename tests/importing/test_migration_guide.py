"""docs/migration.md: its columns exist, its units are psutil's where it can be asked, its example runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.assembly import catalogue
from agent.serializers.names.node_exporter import families
from tests.importing.imported import Result

REPOSITORY = Path(__file__).parents[2]
GUIDE = (REPOSITORY / "docs/migration.md").read_text()
HEADER = re.compile(r"\| (node_exporter|Telegraf|collectd|psutil) \| unit there \| hostprobe \| theirs is \|\n")
PRODUCTS = ("node_exporter", "Telegraf", "collectd", "psutil")
NEAR_RATIO = 0.2
"""How far apart two readings of a figure may be that other programs change in between."""
TRIES = 5
SETTINGS = {"agent.root"}
OF_IPV4_ALONE = {"node_netstat_Udp_InErrors"}
"""What hostprobe doesn't say under node_exporter's name, as it means something else there."""


def rows(product: str) -> list[list[str]]:
    """The cells of a product's table."""
    start = next(match.end() for match in HEADER.finditer(GUIDE) if match[1] == product)
    lines = GUIDE[start:].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def columns() -> set[str]:
    """Every column as the guide names it."""
    return {f"{spec.name}.{column.name}" for spec in catalogue() for column in spec.columns}


@pytest.mark.parametrize("product", PRODUCTS)
def test_tables_have_rows_of_four_cells(product: str) -> None:
    found = rows(product)
    assert len(found) >= 15
    assert all(len(cells) == 4 for cells in found)


@pytest.mark.parametrize("product", PRODUCTS)
def test_each_row_names_columns_that_there_are(product: str) -> None:
    for theirs, _, ours, _ in rows(product):
        names = re.findall(r"`([^`]+)`", ours)
        assert names, theirs
        assert set(names) <= columns(), theirs


def test_columns_in_the_text_are_there_too() -> None:
    tables = {name.partition(".")[0] for name in columns()}
    named = {name for name in re.findall(r"`([a-z_]+\.[a-z0-9_]+)`", GUIDE) if name.partition(".")[0] in tables}
    assert len(named) > 90
    assert named - SETTINGS <= columns()


def test_conversions_are_factors_or_words() -> None:
    for product in PRODUCTS:
        for theirs, unit, _, conversion in rows(product):
            assert conversion, theirs
            if unit == "%":
                assert "× 100" in conversion, theirs
            if unit == "ms":
                assert "× 1000" in conversion, theirs
            if unit == "KiB":
                assert conversion == "/ 1024", theirs


def test_names_of_node_exporter_are_those_that_hostprobe_can_speak() -> None:
    spoken = {family.name for spec in catalogue() for family in families(spec, rates=True)}
    for theirs, *_ in rows("node_exporter"):
        used = set(re.findall(r"\bnode_[a-zA-Z0-9_]+", theirs))
        assert used - OF_IPV4_ALONE <= spoken, theirs


@cache
def frame() -> dict[str, Any]:
    """A frame of this host; its rates are since the frame before."""
    command = [sys.executable, "-m", "agent", "once", "--template", "full", "--wait", "0.5s"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, timeout=60)
    return dict(json.loads(done.stdout))


def ours(column: str, device: str) -> float | None:
    """A column's value; of a table with rows, that of the row in question."""
    table, _, name = column.partition(".")
    key, label = {
        "cpu_core": ("core", "0"),
        "filesystem": ("mountpoint", "/"),
        "disk_io": ("device", device),
        "network": ("interface", "lo"),
    }.get(table, ("", ""))
    value = frame()["host_table" if table == "host" else table]
    row = next((each for each in value if each[key] == label), {}) if key else value
    return row.get(name)  # type: ignore[no-any-return]


def psutil_rows() -> list[list[str]]:
    return [cells for cells in rows("psutil") if cells[0] != "`psutil.cpu_percent()`"]


@pytest.mark.parametrize("cells", psutil_rows(), ids=lambda cells: cells[0])
def test_units_are_those_of_psutil(cells: list[str]) -> None:
    pair = compared(cells)
    for _ in range(TRIES):
        if is_near(cells, *pair):
            return
        frame.cache_clear()  # something was going on
        pair = compared(cells)
    pytest.fail(f"{cells[0]}: {pair[0]}, and by {cells[2]} {pair[1]}")


def is_near(cells: list[str], theirs: float, by_ours: float | None) -> bool:
    """Whether two readings are the same figure; what is null here is 0 there."""
    slack = 1.0 if cells[1] == "%" or "getloadavg" in cells[0] else 0.0
    return theirs == (0 if by_ours is None else pytest.approx(by_ours, rel=NEAR_RATIO, abs=slack))


def compared(cells: list[str]) -> tuple[float, float | None]:
    """What psutil says, and what follows from hostprobe's columns by the row of the guide."""
    device = max(psutil.disk_io_counters(perdisk=True).items(), key=lambda item: item[1].read_bytes)[0]
    expression = cells[0].strip("`")
    expression = expression.replace("disk_io_counters()", f"disk_io_counters(perdisk=True)[{device!r}]")
    expression = expression.replace("net_io_counters()", 'net_io_counters(pernic=True)["lo"]')
    values = [ours(name, device) for name in re.findall(r"`([^`]+)`", cells[2])]
    theirs = float(eval(expression, {"psutil": psutil}))
    match = re.match(r"([×/]) ([0-9]+)", cells[3])
    assert match or cells[3] == "the sum"
    factor = 1.0 if match is None else float(match[2]) if match[1] == "×" else 1 / float(match[2])
    return theirs, None if None in values else sum(value for value in values if value is not None) * factor


def block(start: str) -> str:
    """The indented block that begins with this line."""
    lines = GUIDE[GUIDE.index(f"\n    {start}") + 1 :].splitlines()
    end = next(number for number, line in enumerate(lines) if line and not line.startswith("    "))
    return textwrap.dedent("\n".join(lines[:end])).strip() + "\n"


def test_the_example_is_what_the_import_prints(tmp_path: Path) -> None:
    printed = Result(tmp_path, block("[agent]\n      interval")).text
    parts = block("# not carried over: agent.flush_interval").strip().split("\n\n")
    assert len(parts) == 6
    at = 0
    for part in parts:
        for line in part.splitlines():
            at = printed.index(f"{line}\n", at) + len(line)
    shown = {line for part in parts for line in part.splitlines()}
    left = [line for line in printed.splitlines() if line and line not in shown]
    rest = r"# Written by|# `hostprobe check|template =|\[probes\.|enabled = |exclude_types = \[|    \"|\]$"
    assert [line for line in left if not re.match(rest, line)] == []
