"""`hostprobe bench` as a user runs it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.__main__ import main
from agent.bench.report import Row
from tests.hosts import saved_host

REPOSITORY = Path(__file__).parent.parent
PATIENCE_SECONDS = 60


def started(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOSTPROBE")}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment} | options
    command = [sys.executable, "-m", "agent", "bench", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, **options)


def bench(*arguments: object) -> tuple[int, str, str]:
    """Status, stdout and stderr."""
    with started(*arguments) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, stdout.decode(), stderr.decode()


SAVED = ("--root", saved_host("vm"), "--cycles", 3)


def test_the_table_of_this_host() -> None:
    status, stdout, stderr = bench("--template", "standard", "--cycles", 3)
    assert (status, stderr) == (0, "")
    parts = re.findall(r"^(\S+(?: \S+)?)  +[0-9.]+  ", stdout, re.MULTILINE)
    probes = ["host", "cpu", "memory", "load", "disk_io", "filesystem", "network", "pressure", "sockets", "agent"]
    names = [f"probe {name}" for name in probes]
    assert parts == ["frame.begin", *names, "frame.derive", "format json", "publish", "ring push", "cycle"]
    assert "template standard, 3 cycles\n" in stdout
    assert "4 netlink dumps\n" in stdout
    assert max(map(len, stdout.split("\n"))) <= 120


def test_a_report_is_kept_and_compared(tmp_path: Path) -> None:
    status, stdout, stderr = bench(*SAVED, "--format", "json", "--profile")
    assert (status, stderr) == (0, "")
    document = json.loads(stdout)
    assert document["schema"] == "hostprobe-bench/1"
    assert document["profile"][0]["share_ratio"] > 0.05
    assert all(set(row) == set(Row.__struct_fields__) for row in document["rows"])
    altered = json.loads(stdout)
    for row in altered["rows"]:
        row["allocations"] /= 2
    path = tmp_path / "before.json"
    path.write_text(json.dumps(altered))
    status, stdout, _ = bench(*SAVED, "--format", "json", "--compare", path)
    assert status == 0
    for row, before in zip(json.loads(stdout)["rows"], document["rows"], strict=True):
        changes = row["changes_percent"]
        # What depends on the clock's digits and on the process's own figures differs by a few.
        assert changes["allocations"] == pytest.approx(100, abs=5)
        assert changes["allocated_bytes"] == pytest.approx(0, abs=5)
        if before["payload_bytes"]:
            assert changes["payload_bytes"] == pytest.approx(0, abs=1)
        for count in ("collector_runs", "reallocations"):
            assert changes[count] == (None if before[count] is None else 0)
    status, stdout, _ = bench(*SAVED, "--compare", path)
    assert status == 0
    assert re.search(r"^changes since \S+Z, hostprobe \S+ template standard, 3 cycles$", stdout, re.MULTILINE)
    assert len(re.findall(r"^  change  ", stdout, re.MULTILINE)) == len(document["rows"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cycles", "0"], "argument --cycles: '0': expected a number of cycles from 1 up"),
        (["--cycles", "few"], "argument --cycles: 'few': expected a number of cycles from 1 up"),
        (["--template", "huge"], '--template: template = "huge": expected'),
        (["--compare", "/no/such/file"], "--compare: /no/such/file: No such file or directory: expected a report of"),
        (["--compare", "/dev/null"], "--compare: /dev/null: Input data was truncated: expected a report of"),
        (["--root", "/no/such"], "--root: agent.root = /no/such"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"hostprobe: {message}")
    assert printed.err.count("\n") == 1


def test_without_memray(tmp_path: Path) -> None:
    (tmp_path / "memray.py").write_text("raise ModuleNotFoundError(name='memray')\n")
    path = {"PYTHONPATH": str(tmp_path)}
    for arguments, status in (([*SAVED, "--format", "json"], 0), ([*SAVED, "--profile"], 2)):
        with started(*arguments, env=os.environ | path) as process:
            stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        needed = 'hostprobe: bench: to count allocations it needs memray: expected pip install "hostprobe[bench]"\n'
        assert (process.returncode, stderr.decode()) == (status, needed)
        if not status:
            document = json.loads(stdout)
            assert document["memray"] is None
            assert {row["allocations"] for row in document["rows"]} == {None}


def on_a_terminal(
    arguments: list[object], feed: Callable[[subprocess.Popen[bytes], int], bytes]
) -> tuple[int, str, str]:
    """Status, stdout and what was drawn of a process whose stderr is a terminal; `feed` gives what it has read."""
    master, slave = pty.openpty()
    with started(*arguments, stderr=slave) as process:
        os.close(slave)
        drawn = feed(process, master)
        stdout, _ = process.communicate(timeout=PATIENCE_SECONDS)
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux says so at the end
            break
        if not part:
            break
        drawn += part
    os.close(master)
    return process.returncode, stdout.decode(), drawn.decode()


def test_progress_on_a_terminal_is_erased_at_the_end() -> None:
    status, stdout, drawn = on_a_terminal([*SAVED], lambda *_: b"")
    assert (status, "\ncycle " in stdout) == (0, True)
    draws = drawn.split("\r\x1b[K")
    assert (draws[0], draws[-1]) == ("", "")
    assert len(draws) > 2
    assert all(re.fullmatch(r"\[#*\.*\] \d+ %, [a-z_. ]+", draw) for draw in draws[1:-1])


def test_interrupting_ends_with_130_and_prints_nothing() -> None:
    def interrupt(process: subprocess.Popen[bytes], master: int) -> bytes:
        drawn = b""
        while b"%" not in drawn:
            drawn += os.read(master, 4096)
        process.send_signal(signal.SIGINT)
        return drawn

    arguments = ["--root", saved_host("vm"), "--cycles", 1_000_000]
    status, stdout, drawn = on_a_terminal(arguments, interrupt)
    assert (status, stdout) == (130, "")
    assert drawn.endswith("\r\x1b[K")
