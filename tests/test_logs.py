"""Log lines as they come out, and that structlog is not there before there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agent.logs import LEVELS, Episode, Log

HERE = Path(__file__).parents[1]


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_structlog_is_imported_with_the_first_line() -> None:
    program = (
        "import sys\n"
        "from agent.logs import Log\n"
        "import agent.commands, agent.exporter, agent.cycle\n"
        "log = Log('info', 'json')\n"
        "log.debug('not written')\n"
        "print('structlog' in sys.modules)\n"
        "log.info('written')\n"
        "print('structlog' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=HERE, check=False
    )
    assert run.stdout == "False\nTrue\n"
    assert json.loads(run.stderr)["event"] == "written"


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_lets_itself_and_what_is_above_through(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(level, "json")
    for name in LEVELS:
        getattr(log, name)("something", of=name)
    expected = LEVELS[LEVELS.index(level) :]
    assert [(line["level"], line["of"]) for line in lines(capsys)] == [(name, name) for name in expected]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not in tuple"):
        Log("loud")


def test_a_json_line_says_what_when_and_how_bad(capsys: pytest.CaptureFixture[str]) -> None:
    before = datetime.now(UTC)
    Log("info", "json").warning("sink fails", sink="main", reason='a "quoted"\nreason', failures=3, ratio=0.5)
    after = datetime.now(UTC)
    (line,) = lines(capsys)
    stamp = datetime.fromisoformat(line.pop("timestamp"))
    assert stamp.utcoffset() == timedelta(0)
    assert before <= stamp <= after
    assert line == {
        "event": "sink fails",
        "level": "warning",
        "sink": "main",
        "reason": 'a "quoted"\nreason',
        "failures": 3,
        "ratio": 0.5,
    }


def test_auto_is_json_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Log().info("started", sinks=["main"])
    (line,) = lines(capsys)
    assert (line["event"], line["sinks"]) == ("started", ["main"])


def test_the_console_format_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    Log("info", "console").error("sink fails", sink="main")
    captured = capsys.readouterr()
    assert captured.out == ""
    (text,) = captured.err.splitlines()
    assert "error" in text
    assert "sink fails" in text
    assert "sink=main" in text
    assert "\x1b" not in text  # no colours into a file
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_auto_is_console_on_a_terminal() -> None:
    import os
    import pty

    leader, follower = pty.openpty()
    try:
        run = subprocess.run(
            [sys.executable, "-c", "from agent.logs import Log; Log().info('to a terminal', sink='main')"],
            stdout=subprocess.PIPE,
            stderr=follower,
            timeout=60,
            cwd=HERE,
            check=False,
        )
        text = os.read(leader, 65536).decode()
    finally:
        os.close(leader)
        os.close(follower)
    assert run.stdout == b""
    assert "to a terminal" in text
    assert "\x1b[" in text
    assert not text.startswith("{")


def test_a_line_is_written_where_no_file_can_be_opened_any_more() -> None:
    """structlog is imported at the first line; without it the line still comes, as JSON."""
    program = (
        "import os, resource, sys\n"
        "from agent.logs import Log\n"
        "log = Log('info', 'json')\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 10))\n"
        "log.warning('probe fails', probe='cpu', reason='Too many open files')\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))\n"
        "log.warning('second')\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    first, second = (json.loads(line) for line in run.stderr.splitlines())
    assert (first["event"], first["reason"], first["level"]) == ("probe fails", "Too many open files", "warning")
    assert (second["event"], "timestamp" in second) == ("second", True)


def test_an_episode_is_told_at_both_ends_and_not_again_within_a_minute() -> None:
    episode = Episode()
    assert not episode.ends()  # there was none
    assert [episode.begins(now) for now in (0.0, 1.0, 100.0)] == [True, False, False]  # one that goes on
    assert [episode.ends(), episode.ends()] == [True, False]
    told = [(episode.begins(now), episode.ends()) for now in (59.9, 60.0, 119.9, 120.0)]
    assert told == [(False, False), (True, True), (False, False), (True, True)]
