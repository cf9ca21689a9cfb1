"""The real program against saved hosts: whole frames, looked through by eye against the text that they come from.

    python tests/test_golden.py

writes tests/fixtures/golden/ anew, on purpose and never by a test run: then look through the difference line by line.
What belongs to this machine and moment is not compared: who speaks and when, what the agent costs, and what
statvfs says of this machine's disks.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from agent import config  # noqa: E402
from agent.assembly import Agent, catalogue  # noqa: E402
from agent.logs import Log  # noqa: E402
from agent.pool import Buffer  # noqa: E402
from agent.serializers.schema import line_schema  # noqa: E402
from tests.hosts import disk_names, interface_names, saved_host, write_large_host  # noqa: E402

GOLDEN = REPOSITORY / "tests/fixtures/golden"
HOSTS = ("vm", "old", "damaged")
OF_THIS_RUN = ("host", "instance", "time", "time_unix_ns", "agent", "agent_probe", "agent_sink")
FROM_THE_MOUNT_TABLE = ("mountpoint", "device", "type", "read_only")
SECTOR_BYTES = 512

Line = dict[str, Any]


def line_of(host: str) -> Line:
    """What the program prints for a saved host."""
    command = [sys.executable, "-m", "agent", "once", "--root", str(saved_host(host))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOSTPROBE")}
    run = subprocess.run(
        [*command, "--wait", "0", "--template", "full"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        check=True,
        timeout=60,
    )
    line: Line = json.loads(run.stdout)
    return line


def masked(line: Line) -> str:
    """The line as text, indented, in its order, without what belongs to this machine and moment."""
    line = line | dict.fromkeys(OF_THIS_RUN, "…")
    line["filesystem"] = [
        {name: value if name in FROM_THE_MOUNT_TABLE else "…" for name, value in row.items()}
        for row in line["filesystem"]
    ]
    return json.dumps(line, indent=2, ensure_ascii=False) + "\n"


def golden_path(host: str) -> Path:
    return GOLDEN / f"{host}.json"


def lines_of(host: str, name: str) -> list[list[str]]:
    """The words of each line of a saved file below proc."""
    return [line.split() for line in (saved_host(host) / "proc" / name).read_text().splitlines()]


def by_label(rows: list[Line], label: str) -> dict[str, Line]:
    return {row[label]: row for row in rows}


@pytest.fixture(scope="module")
def lines() -> dict[str, Line]:
    return {host: line_of(host) for host in HOSTS}


@pytest.mark.parametrize("host", HOSTS)
def test_line_is_the_golden_one(lines: dict[str, Line], host: str) -> None:
    golden, line = golden_path(host).read_text(), masked(lines[host])
    difference = difflib.unified_diff(golden.splitlines(), line.splitlines(), "golden", "now", lineterm="", n=4)
    if golden != line:
        pytest.fail("\n".join(difference), pytrace=False)


@pytest.mark.parametrize("host", HOSTS)
def test_line_validates(lines: dict[str, Line], host: str) -> None:
    jsonschema.validate(lines[host], line_schema(catalogue()))


@pytest.mark.parametrize("host", ["vm", "old"])
def test_figures_are_those_of_the_text(lines: dict[str, Line], host: str) -> None:
    line = lines[host]
    stat = {words[0]: words[1:] for words in lines_of(host, "stat")}
    rows = [("cpu", line["cpu"]), *((f"cpu{row['core']}", row) for row in line["cpu_core"])]
    assert len(rows) == 3
    for name, row in rows:
        ticks = dict(zip(["user", "nice", "system", "idle", "iowait", "irq", "softirq"], stat[name], strict=False))
        assert {key: row[f"{key}_seconds_total"] for key in ticks} == {k: int(v) / 100 for k, v in ticks.items()}
    meminfo = {words[0]: int(words[1]) * 1024 for words in lines_of(host, "meminfo")}
    memory = {"MemTotal:": "total", "MemFree:": "free", "Cached:": "cached", "Buffers:": "buffers", "Dirty:": "dirty"}
    assert {key: line["memory"][f"{name}_bytes"] for key, name in memory.items()} == {k: meminfo[k] for k in memory}
    assert line["swap"]["used_bytes"] == meminfo["SwapTotal:"] - meminfo["SwapFree:"]
    vmstat = {words[0]: int(words[1]) for words in lines_of(host, "vmstat")}
    assert line["paging"]["in_bytes_total"] == vmstat["pgpgin"] * 1024
    assert line["swap"]["out_bytes_total"] == vmstat["pswpout"] * 4096
    assert [row["device"] for row in line["disk_io"]] == [words[2] for words in lines_of(host, "diskstats")]
    for row, words in zip(line["disk_io"], lines_of(host, "diskstats"), strict=True):
        assert (row["reads_total"], row["writes_total"]) == (int(words[3]), int(words[7]))
        assert row["read_bytes_total"] == int(words[5]) * SECTOR_BYTES
        assert row["write_bytes_total"] == int(words[9]) * SECTOR_BYTES
        assert row["io_seconds_total"] == int(words[12]) / 1000
    states = [words[3] for words in lines_of(host, "1/net/tcp")[1:]]
    expected = {"established": "01", "time_wait": "06", "listen": "0A"}
    assert {name: line["tcp"][name] for name in expected} == {k: states.count(v) for k, v in expected.items()}
    assert line["tcp"]["sockets"] == len(states)
    assert line["unix"]["sockets"] == len(lines_of(host, "1/net/unix")) - 1
    assert [line["load"][name] for name in ("load1", "load5", "load15")] == [
        float(word) for word in lines_of(host, "loadavg")[0][:3]
    ]


def test_vm_has_the_pressure_of_its_text(lines: dict[str, Line]) -> None:
    for resource, row in by_label(lines["vm"]["pressure"], "resource").items():
        for kind, *words in lines_of("vm", f"pressure/{resource}"):
            figures = {key: float(value) for key, value in (word.split("=") for word in words)}
            assert row[f"{kind}_seconds_total"] == figures.pop("total") / 1e6
            assert {key: row[f"{kind}_{key}_ratio"] for key in figures} == {
                k: round(v * 100) / 10_000 for k, v in figures.items()
            }


def test_old_kernel_leaves_unknown_what_it_does_not_tell(lines: dict[str, Line]) -> None:
    line = lines["old"]
    assert not (saved_host("old") / "proc/pressure").exists()
    assert line["pressure"] == []
    assert "MemAvailable:" not in [words[0] for words in lines_of("old", "meminfo")]
    assert [line["memory"][name] for name in ("available_bytes", "used_bytes", "used_ratio")] == [None] * 3
    assert "oom_kill" not in [words[0] for words in lines_of("old", "vmstat")]
    assert line["paging"]["oom_kills_total"] is None
    assert {len(words) for words in lines_of("old", "diskstats")} == {3 + 11}
    assert {row[name] for row in line["disk_io"] for name in ("discards_total", "flushes_total")} == {None}
    assert len(lines_of("old", "stat")[0]) == 1 + 9
    assert {row["guest_nice_seconds_total"] for row in (line["cpu"], *line["cpu_core"])} == {None}
    # The hardware is summed; partitions and what is stacked on it are not.
    assert line["io"]["read_bytes_total"] == by_label(line["disk_io"], "device")["sda"]["read_bytes_total"]


def test_damaged_host_gives_no_wrong_number(lines: dict[str, Line]) -> None:
    line = lines["damaged"]
    up = {row["probe"]: row["up"] for row in line["agent_probe"]}
    assert [name for name, value in up.items() if value == 0] == ["host", "load", "sockets"]
    assert not line.keys() & {"host_table", "load", "tcp", "udp", "unix", "listening"}
    assert (line["cpu"]["user_seconds_total"], line["cpu"]["system_seconds_total"]) == (301854 / 100, None)  # 11x922
    cores = by_label(line["cpu_core"], "core")
    assert list(cores) == ["0", "1", "3"]
    assert cores["0"]["system_seconds_total"] is None  # -21045
    assert (cores["1"]["system_seconds_total"], cores["1"]["idle_seconds_total"]) == (16474 / 100, None)  # ends there
    assert (cores["3"]["user_seconds_total"], cores["3"]["nice_seconds_total"]) == (None, 1 / 100)  # 2^64
    memory = line["memory"]
    assert memory["total_bytes"] == 3848656 * 1024
    assert [memory[f"{name}_bytes"] for name in ("free", "available", "used", "buffers", "dirty")] == [None] * 5
    disks = by_label(line["disk_io"], "device")
    assert list(disks) == ["sda", "sdb", "sdc", "sdd", "sd\\xff\\xe9", "sdh"]
    assert disks["sda"]["reads_total"] == 116378  # the first line of that name
    assert (disks["sdb"]["reads_total"], disks["sdb"]["read_bytes_total"]) == (None, None)
    assert (disks["sdd"]["read_bytes_total"], disks["sdd"]["writes_total"]) == (None, None)  # 2^55 sectors; 2^64
    for name in ("sdc", "sdh"):  # too short; two lines in one
        assert {value for key, value in disks[name].items() if key != "device"} == {None}
    assert (line["io"]["reads_total"], line["io"]["writes_total"]) == (None, 2 * 459391)
    interfaces = by_label(line["network"], "interface")
    assert list(interfaces) == ["lo", "eth0", "eth1", "e\\xff\\xe92", "eth4"]
    eth0, eth4 = interfaces["eth0"], interfaces["eth4"]
    assert [eth0[f"receive_{name}_total"] for name in ("bytes", "packets", "errors")] == [None, None, 2]
    assert (eth0["mtu_bytes"], eth0["speed_bytes_per_second"]) == (None, None)
    assert (eth4["receive_bytes_total"], eth4["receive_packets_total"]) == (None, 2**64 - 1)
    assert {value for row in line["pressure"] for key, value in row.items() if key != "resource"} == {None}


def two_cycles(root: Path, **network: object) -> Line:
    """The second line of the large host."""
    write_large_host(root, cycle=0)
    overrides = {"test": {"agent": {"root": str(root)}, "probes": {"network": network}}}
    agent = Agent(config.load(template="full", overrides=overrides, environment={}), Log("error"), sinks=False)
    buffer = Buffer()
    try:
        agent.cycle.collect()
        write_large_host(root, cycle=1)
        agent.cycle.collect()
        agent.serializer("json").write(agent.cycle.frame, buffer)
    finally:
        agent.close()
    line: Line = json.loads(bytes(buffer.data))
    jsonschema.validate(line, line_schema(catalogue()))
    assert {row["up"] for row in line["agent_probe"]} == {1}
    return line


def test_large_host_has_every_row(tmp_path: Path) -> None:
    line = two_cycles(tmp_path)
    assert line["cpu"]["logical_count"] == 256
    assert [row["core"] for row in line["cpu_core"]] == [str(cpu) for cpu in range(256)]
    assert [row["device"] for row in line["disk_io"]] == [*disk_names(64), "loop0", "dm-0"]
    assert [row["interface"] for row in line["network"]] == interface_names(300)
    assert not [key for key in line if key.endswith("_rows_dropped")]


def test_large_host_has_the_rates_between_its_cycles(tmp_path: Path) -> None:
    line = two_cycles(tmp_path)
    seconds = line["interval_seconds"]
    for cpu, row in enumerate(line["cpu_core"]):
        busy = (cpu % 7 * 100 + 1) + 1 + 60 + 3 + 1  # user, nice, system, softirq, steal
        assert row["usage_ratio"] == pytest.approx(busy / (busy + 300 + 5))  # idle, iowait
    steps = [index % 5 + 1 for index in range(66)]
    for step, row in zip(steps, line["disk_io"], strict=True):
        assert row["read_bytes_per_second"] * seconds == pytest.approx(step * 6400 * SECTOR_BYTES)
        assert row["writes_per_second"] * seconds == pytest.approx(step * 200)
        assert row["utilization_ratio"] == pytest.approx(min(1, step * 0.3 / seconds))
        assert row["read_latency_seconds"] == pytest.approx(50 / 100 / 1000)
        assert row["write_latency_seconds"] == pytest.approx(400 / 200 / 1000)
    # The 64 disks, neither loop0 nor dm-0.
    assert line["io"]["write_bytes_per_second"] * seconds == pytest.approx(sum(steps[:64]) * 12_800 * SECTOR_BYTES)
    for index, row in enumerate(line["network"]):
        step = index % 6 + 1
        assert row["receive_bytes_per_second"] * seconds == pytest.approx(step * 125_000)
        assert row["transmit_bytes_per_second"] * seconds == pytest.approx(step * 250_000)


def test_large_host_counts_what_the_row_limit_leaves_out(tmp_path: Path) -> None:
    line = two_cycles(tmp_path, row_limit=20)
    assert [row["interface"] for row in line["network"]] == interface_names(300)[:20]
    assert line["network_rows_dropped"] == 280
    assert [key for key in line if key.endswith("_rows_dropped")] == ["network_rows_dropped"]


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in HOSTS:
        golden_path(name).write_text(masked(line_of(name)))
        print(golden_path(name))
