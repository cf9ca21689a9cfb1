"""The real program against saved hosts: their whole frame, as it was once looked through by eye.

python tests/test_golden.py     writes the frames anew, on purpose; then look through the difference
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from agent import config  # noqa: E402
from agent.assembly import Agent, catalogue  # noqa: E402
from agent.logs import Log  # noqa: E402
from agent.pool import Buffer  # noqa: E402
from agent.serializers.schema import line_schema  # noqa: E402
from tests.hosts import write_large_host  # noqa: E402

FIXTURES = ROOT / "tests/fixtures"
HOSTS = ("vm", "old", "damaged")
OF_THIS_RUN = ("host", "instance", "time", "time_unix_ns", "agent", "agent_probe", "agent_sink")


def frame_of(host: str) -> dict[str, Any]:
    """A saved host's frame, without what belongs to this run and to this machine's statvfs."""
    command = [sys.executable, "-m", "agent", "once", "--wait", "0", "--template", "full", "--root", FIXTURES / host]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOSTPROBE")}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, timeout=60)
    frame: dict[str, Any] = json.loads(run.stdout)
    jsonschema.validate(frame, line_schema(catalogue()))
    for key in OF_THIS_RUN:
        del frame[key]
    for row in frame.get("filesystem", ()):
        for column in row.keys() - {"mountpoint", "device", "type"}:
            row[column] = "masked"
    return frame


def golden_of(host: str) -> Path:
    return FIXTURES / "golden" / f"{host}.json"


@pytest.mark.parametrize("host", HOSTS)
def test_a_saved_host_gives_its_frame(host: str) -> None:
    assert frame_of(host) == json.loads(golden_of(host).read_text())


def test_an_old_kernel_has_nulls_and_no_guesses() -> None:
    frame = frame_of("old")
    assert frame["pressure"] == []
    memory = frame["memory"]
    assert (memory["available_bytes"], memory["used_bytes"], memory["used_ratio"]) == (None, None, None)
    assert memory["total_bytes"] > 0
    assert frame["paging"]["oom_kills_total"] is None
    assert all(disk["flushes_total"] is None and disk["discards_total"] is None for disk in frame["disk_io"])
    assert all(disk["reads_total"] is not None for disk in frame["disk_io"])
    assert frame["cpu"]["guest_nice_seconds_total"] is None


def test_the_vm_is_what_its_files_say() -> None:
    frame = frame_of("vm")
    proc = FIXTURES / "vm/proc"
    words = (proc / "stat").read_text().splitlines()[0].split()
    assert frame["cpu"]["user_seconds_total"] == int(words[1]) / 100
    assert frame["cpu"]["idle_seconds_total"] == int(words[4]) / 100
    meminfo = dict(line.split()[:2] for line in (proc / "meminfo").read_text().splitlines())
    assert frame["memory"]["total_bytes"] == int(meminfo["MemTotal:"]) * 1024
    assert frame["memory"]["available_bytes"] == int(meminfo["MemAvailable:"]) * 1024
    sda = next(line.split() for line in (proc / "diskstats").read_text().splitlines() if line.split()[2] == "vda")
    (disk,) = [disk for disk in frame["disk_io"] if disk["device"] == "vda"]
    assert (disk["read_bytes_total"], disk["io_seconds_total"]) == (int(sda[5]) * 512, int(sda[12]) / 1000)
    rows = [line.split() for name in ("tcp", "tcp6") for line in (proc / "1/net" / name).read_text().splitlines()[1:]]
    assert frame["tcp"]["sockets"] == len(rows)
    assert frame["tcp"]["established"] == sum(row[3] == "01" for row in rows)
    assert frame["tcp"]["listen"] == sum(row[3] == "0A" for row in rows)
    assert frame["load"]["load1"] == float((proc / "loadavg").read_text().split()[0])


def test_a_large_host(tmp_path: Path) -> None:
    write_large_host(tmp_path, cycle=0)
    overrides = {"--root": {"agent": {"root": str(tmp_path)}}}
    agent = Agent(config.load(template="standard", overrides=overrides, environment={}), Log(), sinks=False)
    agent.cycle.collect()
    write_large_host(tmp_path, cycle=1)
    agent.cycle.collect()
    buffer = Buffer()
    agent.serializer.write(agent.cycle.frame, buffer)
    frame = json.loads(bytes(buffer.data))
    agent.close()
    jsonschema.validate(frame, line_schema(catalogue()))
    assert (len(frame["cpu_core"]), len(frame["disk_io"]), len(frame["network"])) == (256, 64, 128)
    assert frame["network_rows_dropped"] == 300 - 128
    assert frame["cpu"]["logical_count"] == 256
    assert all(0 <= core["usage_ratio"] <= 1 for core in frame["cpu_core"])
    first = frame["disk_io"][0]
    assert first["read_bytes_per_second"] > 0
    total = sum(disk["read_bytes_per_second"] for disk in frame["disk_io"])
    assert frame["io"]["read_bytes_per_second"] == pytest.approx(total)


if __name__ == "__main__":
    for name in HOSTS:
        golden_of(name).parent.mkdir(exist_ok=True)
        golden_of(name).write_text(json.dumps(frame_of(name), indent=1, ensure_ascii=False) + "\n")
        print(golden_of(name))
