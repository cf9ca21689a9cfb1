"""`hostprobe import` as a process: the file on stdout, what is lost on stderr, status 2 with one line for bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.importing.imported import FIXTURES, loaded
from tests.processes import hostprobe, usage_error


@pytest.mark.parametrize("kind", FIXTURES)
@pytest.mark.parametrize("flag", [True, False])
def test_it_prints_a_file_that_loads_and_tells_what_is_lost(kind: str, flag: bool, tmp_path: Path) -> None:
    status, stdout, stderr = hostprobe("import", FIXTURES[kind], *(("--from", kind) if flag else ()))
    assert status == 0
    assert loaded(tmp_path, stdout).agent.hostname == "web-1"
    lines = stderr.splitlines()
    assert len(lines) >= 15
    assert all(line.startswith("hostprobe: not carried over: ") for line in lines)


@pytest.mark.parametrize("arguments", [["nowhere.conf"], [str(FIXTURES["telegraf"]), "--from", "collectd"], []])
def test_bad_input_is_one_line_and_status_2(arguments: list[str]) -> None:
    assert usage_error("import", *arguments)
