"""docs/tuning.md and docs/capacity.md: their examples run, their tables are held against what they were measured on.

`python -m tests.test_guides` prints the sizes of rows and the capacities of tables as docs/capacity.md has them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest

from agent import config, discovery
from agent.assembly import Agent
from agent.logs import Log
from agent.pool import Buffer
from agent.ring_records import HEADER_BYTES, need
from agent.serializers import formats
from agent.table import TableSpec
from agent.units import Duration, Size
from tests.hosts import saved_host, write_large_host

REPOSITORY = Path(__file__).parents[1]
TUNING = (REPOSITORY / "docs/tuning.md").read_text()
CAPACITY = (REPOSITORY / "docs/capacity.md").read_text()
FORMATS: tuple[formats.Name, ...] = get_args(formats.Name)
TABLES = (
    *("cpu_core", "disk_io", "filesystem", "network"),
    *("listening", "connections", "udp_sockets", "unix_sockets"),
)
"""Those whose rows depend on the host."""
WORDS = {
    "CPU": "cpu_core",
    "disk": "disk_io",
    "mount": "filesystem",
    "interface": "network",
    "listener": "listening",
    "connection": "connections",
    "Unix socket": "unix_sockets",
}
FILLED = {
    "size_bytes": 107_374_182_400,
    "free_bytes": 64_424_509_440,
    "available_bytes": 59_055_800_320,
    "used_bytes": 42_949_672_960,
    "used_ratio": 0.421052631578947,
    "inodes": 6_553_600,
    "inodes_free": 6_012_345,
    "inodes_used_ratio": 0.08258819580078125,
    "accept_queue_limit": 4096,
    "rtt_seconds": 0.000247,
}
"""What a saved tree doesn't tell and a live host does; 0 where it isn't named."""
RECORD_BYTES = 60
RING_USED_MOST = 0.75
BENCH_SECONDS = 60


class Sizes(NamedTuple):
    """Of a host's frame in each format: the whole, each table with the frame's rest, and how many rows there were."""

    whole: dict[str, int]
    with_table: dict[tuple[str, str], int]
    rows: dict[str, int]


@contextmanager
def collected(count: int, template: str = "full") -> Iterator[Agent]:
    """An agent that has collected a host three times whose tables have each some `count` rows."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = {"a test": {"agent": {"root": folder, "hostname": "web-1"}}}
        write_host(Path(folder), count, 0)
        agent = Agent(config.load(template=template, overrides=overrides, environment={}), Log("error"))
        agent.exporter.open()
        try:
            for cycle in range(3):
                write_host(Path(folder), count, cycle)
                agent.cycle.collect()
            yield agent
        finally:
            agent.exporter.close(0)
            agent.close()


def write_host(root: Path, count: int, cycle: int) -> None:
    """The large host of tests/hosts.py, with as many listeners, bound UDP sockets and Unix sockets beside."""
    write_large_host(root, cpus=count, disks=count, interfaces=count + 9, sockets=count + 1, cycle=cycle)
    tail = "00000000:00000000 00:00000000 00000000"
    address, none = "B80D0120000000000000000001000000", "0" * 32  # 2001:db8::1, ::
    net = root / "proc/1/net"
    lines = {
        "tcp6": f"9: {address}:{{port:04X}} {none}:0000 0A {tail} 0 0 {{inode}} 1 0 100 0 0 10 0\n",
        "udp": f"9: 010200C0:{{port:04X}} 00000000:0000 07 {tail} 0 0 {{inode}} 2 0 0\n",
        "unix": "0000000000000000: 00000003 00000000 00000000 0001 03 {inode} /run/service/{port}.sock\n",
    }
    for name, line in lines.items():
        with (net / name).open("a") as file:
            file.writelines(line.format(port=8000 + index, inode=50_000 + index) for index in range(count))


def fill(agent: Agent) -> None:
    """Puts plausible values where a saved tree has none, so that no series is left out."""
    for name in TABLES:
        table = agent.cycle.frame.tables[name]
        for index, column in enumerate(table.spec.gauges):
            cells = table.gauges[: table.count, index]
            cells[np.isnan(cells)] = FILLED.get(column.name, 0)


@cache
def sizes(count: int) -> Sizes:
    """Of a frame whose tables have each some `count` rows."""
    with collected(count) as agent:
        fill(agent)
        frame, buffer = agent.cycle.frame, Buffer()
        written: dict[tuple[str, str], int] = {}
        for name in FORMATS:
            serializer = agent.serializer(name)
            for table in ("", *TABLES):
                buffer.clear()
                serializer.write(frame, buffer, (table,) if table else ())
                written[name, table] = len(buffer.data)
        rows = {table: frame.tables[table].count for table in TABLES}
    return Sizes({name: written[name, ""] for name in FORMATS}, written, rows)


def row_bytes(format: str, table: str) -> float:
    """What one more row takes: between a host with few and one with many."""
    few, many = sizes(16), sizes(96)
    grown = many.with_table[format, table] - few.with_table[format, table]
    return grown / (many.rows[table] - few.rows[table])


def rest_bytes(format: str) -> float:
    """What a frame has besides the rows of those tables."""
    many = sizes(96)
    return many.whole[format] - sum(row_bytes(format, table) * many.rows[table] for table in TABLES)


def table_specs() -> dict[str, TableSpec]:
    """Every table with key labels, by name."""
    specs = [spec for name in discovery.PROBES for spec in discovery.load("probes", name).tables]  # type: ignore[union-attr]
    return {spec.name: spec for spec in specs if spec.labels}


def cell_bytes(spec: TableSpec) -> int:
    """Of a row: a counter is 8 bytes and one that says whether it is known, a gauge 8."""
    return 9 * len(spec.counters) + 8 * len(spec.gauges)


def cells_of(page: str, header: str) -> dict[str, list[str]]:
    """The cells of the page's table with this header, by its first column; commas and backticks are taken off."""
    lines = page[page.index(f"{header}\n") :].split("\n\n")[0].splitlines()[2:]
    rows = [[re.sub("[`,]", "", cell).strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def block(page: str, start: str) -> str:
    """The indented block of the page that begins with this line, dedented."""
    lines = page[page.index(f"\n    {start}") + 1 :].splitlines()
    end = next((i for i, line in enumerate(lines) if line and not line.startswith("    ")), len(lines))
    return textwrap.dedent("\n".join(lines[:end])).rstrip() + "\n"


def alert_rules() -> str:
    """The rules of docs/tuning.md, as a file for Prometheus."""
    return block(TUNING, "groups:")


ROWS_HEADER = f"| format | the rest | {' | '.join(f'`{name}`' for name in TABLES)} |"
HOSTS_HEADER = "| host | `json` | `prometheus` | `otlp` | `remote_write` |"
CAPACITIES_HEADER = "| table | rows at the start | bytes a row | at the start | with 1,024 rows |"
RING_HEADER = "| bytes of a frame | interval | 10 minutes | 1 hour | 8 hours | 1 day |"


@pytest.mark.parametrize("format", FORMATS)
def test_rows_take_what_the_page_says(format: str) -> None:
    rest, *each = map(int, cells_of(CAPACITY, ROWS_HEADER)[format])
    assert dict(zip(TABLES, each, strict=True)) == pytest.approx(
        {name: row_bytes(format, name) for name in TABLES}, rel=0.02, abs=1
    )
    assert rest == pytest.approx(rest_bytes(format), rel=0.08)


@pytest.mark.parametrize("format", FORMATS)
def test_a_frame_of_another_size_follows_from_its_rows(format: str) -> None:
    rest, *each = map(int, cells_of(CAPACITY, ROWS_HEADER)[format])
    found = sizes(48)
    assert rest + sum(size * found.rows[name] for size, name in zip(each, TABLES, strict=True)) == pytest.approx(
        found.whole[format], rel=0.03
    )


def test_frames_of_hosts_follow_from_the_rows() -> None:
    rows = cells_of(CAPACITY, ROWS_HEADER)
    shown = cells_of(CAPACITY, HOSTS_HEADER)
    assert len(shown) >= 3
    for host, cells in shown.items():
        counts = {word: int(count) for count, word in re.findall(r"([0-9]+) (Unix socket|[A-Za-z]+?)s?\b", host)}
        for name, cell in zip(("json", "prometheus", "otlp", "remote_write"), cells, strict=True):
            rest, *each = map(int, rows[name])
            by_table = dict(zip(TABLES, each, strict=True))
            assert int(cell) == rest + sum(count * by_table[WORDS[word]] for word, count in counts.items())


def test_tables_have_the_capacities_of_the_page() -> None:
    page = {name: list(map(int, cells)) for name, cells in cells_of(CAPACITY, CAPACITIES_HEADER).items()}
    expected = {
        name: [spec.rows, cell_bytes(spec), 2 * spec.rows * cell_bytes(spec), 2 * 1024 * cell_bytes(spec)]
        for name, spec in table_specs().items()
    }
    assert page == expected
    assert {spec.keep_rows for spec in table_specs().values()} == {1024}


def test_the_bytes_of_a_row_are_those_of_its_arrays() -> None:
    with collected(16) as agent:
        for name, filled in agent.cycle.frame.tables.items():
            size = filled.counters.nbytes + filled.gauges.nbytes + filled.unknown.nbytes
            assert size == filled.capacity * cell_bytes(filled.spec), name


@pytest.mark.parametrize("count", [900, 1100])
def test_no_array_is_made_while_the_rows_stay(count: int, tmp_path: Path) -> None:
    write_large_host(tmp_path, cpus=2, disks=1, interfaces=2, sockets=count)
    tree = {"agent": {"root": str(tmp_path)}, "probes": {"sockets": {"row_limit": 4096}}}
    agent = Agent(config.load(template="full", overrides={"a test": tree}, environment={}), Log("error"))
    for _ in range(5):
        agent.cycle.collect()
    arena = agent.cycle.frame.arena
    before = arena.regrown
    for _ in range(10):
        agent.cycle.collect()
    assert agent.cycle.frame.tables["connections"].count == count
    assert arena.regrown == before
    agent.close()


def test_rings_follow_from_the_formula() -> None:
    outages = [Duration(seconds) for seconds in (600, 3600, 28_800, 86_400)]
    for size, (interval, *cells) in cells_of(CAPACITY, RING_HEADER).items():
        frames = [outage / float(interval.removesuffix(" s")) for outage in outages]
        expected = [count * (int(size) + RECORD_BYTES) / RING_USED_MOST / 2**20 for count in frames]
        assert [float(cell.removesuffix(" MiB")) for cell in cells] == pytest.approx(expected, rel=0.02, abs=0.05)


def test_a_record_has_60_bytes_of_its_own_and_up_to_7_of_padding() -> None:
    assert HEADER_BYTES == RECORD_BYTES
    assert {need(size) - size - RECORD_BYTES for size in range(8000, 8100)} == set(range(8))


def test_the_ring_of_the_page_loads(tmp_path: Path) -> None:
    path = tmp_path / "hostprobe.toml"
    path.write_text(block(CAPACITY, "[sinks.central]"))
    (central,) = (sink for name, sink in config.load(str(path), environment={}).sinks.items() if name == "central")
    assert central.buffer.size == Size(64 << 20)


def test_the_bytes_of_each_table_of_this_host() -> None:
    once = ["once", "--wait", "0", "--root", str(saved_host("vm"))]
    line = subprocess.run(
        [sys.executable, "-m", "agent", *once], cwd=REPOSITORY, capture_output=True, check=True, timeout=60
    ).stdout
    program = block(CAPACITY, "import json, sys")
    told = subprocess.run(
        [sys.executable, "-c", program], input=line, capture_output=True, check=True, timeout=60
    ).stdout.decode()
    found = {words[0]: list(map(int, words[1:])) for words in map(str.split, told.splitlines())}
    document = json.loads(line)
    for name in ("network", "agent_probe"):
        match = re.search(rf'"{name}":(\[.*?\])', line.decode())
        assert match is not None
        # Python writes 6e-05 for 0.00006.
        assert found[name] == [len(document[name]), pytest.approx(len(match[1]), rel=0.02)]
    assert "schema" not in found


def test_settings_of_the_tuning_page_load(tmp_path: Path) -> None:
    path = tmp_path / "hostprobe.toml"
    path.write_text(block(TUNING, "[probes.sockets]"))
    loaded = config.load(str(path), environment={})
    assert [loaded.every(name) for name in ("sockets", "filesystem")] == [6, 30]


def test_the_cpu_of_a_frame_of_the_page() -> None:
    cycles = ["run", "--template", "minimal", "--interval", "10ms", "--cycles", "8"]
    lines = subprocess.run(
        [sys.executable, "-m", "agent", *cycles], cwd=REPOSITORY, capture_output=True, check=True, timeout=60
    ).stdout
    frames = [json.loads(line)["agent"] for line in lines.splitlines()]
    grown = frames[-1]["cpu_seconds_total"] - frames[2]["cpu_seconds_total"]
    told = subprocess.run(
        [sys.executable, "-c", block(TUNING, "import json, sys")],
        input=lines,
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    assert told.decode() == f"{grown / 5 * 1000:.2f} ms of CPU a frame\n"


def test_alert_rules_name_metrics_that_there_are() -> None:
    used = set(re.findall(r"\bhostprobe_[a-z0-9_]+", alert_rules()))
    catalogue = (REPOSITORY / "docs/metrics.md").read_text()
    assert len(used) >= 10
    assert used <= set(re.findall(r"`(hostprobe_[a-z0-9_]+)", catalogue))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What makes the page's package an installed one: its metadata lie in a folder of the path."""
    folder = tmp_path_factory.mktemp("package")
    metadata = folder / "hostprobe_softirqs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hostprobe-softirqs\nVersion: 1.0\n")
    group = block(TUNING, '[project.entry-points."hostprobe.probes"]')
    name, place = re.findall(r'^(\w+) = "(.+)"$', group, re.MULTILINE)[0]
    (metadata / "entry_points.txt").write_text(f"[hostprobe.probes]\n{name} = {place}\n")
    (folder / "own.toml").write_text(block(TUNING, 'template = "minimal"'))
    own = {name: value for name, value in os.environ.items() if not name.startswith("HOSTPROBE")}
    return own | {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def written() -> str:
    """The probe as the page has it first."""
    return block(TUNING, "from agent.frame import Frame")


@pytest.fixture(scope="module")
def improved(written: str) -> str:
    """The same with the page's other `collect` in place of the first."""
    start = written.index("    def __init__")
    imports = block(TUNING, "import numpy as np")
    return imports + written[:start] + textwrap.indent(block(TUNING, "def __init__"), "    ")


def run(environment: Mapping[str, str], source: str, *arguments: str) -> Any:
    """The JSON that a command with the page's configuration and a version of its probe prints."""
    folder = Path(environment["PYTHONPATH"])
    (folder / "hostprobe_softirqs.py").write_text(source)
    command = [sys.executable, "-B", "-m", "agent", arguments[0], "--config", str(folder / "own.toml"), *arguments[1:]]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, check=False, timeout=BENCH_SECONDS
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return json.loads(done.stdout)


def softirqs() -> dict[str, int]:
    """What the kernel says, read another way."""
    lines = Path("/proc/softirqs").read_text().splitlines()[1:]
    return {line.split(":")[0].strip(): sum(map(int, line.split(":")[1].split())) for line in lines}


@pytest.mark.parametrize("version", ["written", "improved"])
def test_both_versions_of_the_probe_tell_the_truth(
    version: str, environment: Mapping[str, str], request: pytest.FixtureRequest
) -> None:
    before = softirqs()
    rows = run(environment, request.getfixturevalue(version), "once", "--wait", "0")["softirqs"]
    after = softirqs()
    assert [row["kind"] for row in rows] == list(before)
    for row in rows:
        assert before[row["kind"]] <= row["served_total"] <= after[row["kind"]]


def test_the_improved_probe_allocates_less(environment: Mapping[str, str], written: str, improved: str) -> None:
    def report(source: str) -> dict[str, Any]:
        document = run(environment, source, "bench", "--cycles", "20", "--format", "json", "--profile")
        assert document["profile"], "no line is named"
        (row,) = (row for row in document["rows"] if row["part"] == "probe softirqs")
        return dict(row)

    first, second = report(written), report(improved)
    assert second["allocations"] < 0.6 * first["allocations"]
    for row in (first, second):
        assert row["reallocations"] == row["collector_runs"] == 0
        assert row["net_blocks"] < 20


def main() -> None:
    print(ROWS_HEADER, f"|{'---|' * (len(TABLES) + 2)}", sep="\n")
    for name in FORMATS:
        cells = [rest_bytes(name), *(row_bytes(name, table) for table in TABLES)]
        print(f"| `{name}` | {' | '.join(f'{cell:,.0f}' for cell in cells)} |")
    print("", CAPACITIES_HEADER, "|---|---|---|---|---|", sep="\n")
    for name, spec in table_specs().items():
        size = cell_bytes(spec)
        print(f"| `{name}` | {spec.rows} | {size} | {2 * spec.rows * size:,} | {2 * 1024 * size:,} |")


if __name__ == "__main__":
    main()
