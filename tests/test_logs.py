"""Log lines as they come out, and that structlog is not there before there is one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agent import logs
from agent.logs import LEVELS, Episode, Log
from agent.sinks.secret import Secret
from tests.processes import environment, frames, hostprobe

HERE = Path(__file__).parents[1]
HELD_BACK = "log lines held back"


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


# Held back -----------------------------------------------------------------------------------


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def summary(of: str, count: int, **last: Any) -> dict[str, Any]:
    return {"event": HELD_BACK, "level": "warning", "of": of, "lines": count, "last_seconds_ago": 0.0, **last}


def untimed(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    assert all(line.pop("timestamp") for line in found)
    return found


def test_a_flood_of_one_cause_is_ten_lines_and_a_count_then_one_a_minute(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log = Log("info", "json", clock)
    for number in range(1000):
        log.warning("probe fails", probe="cpu", reason=f"no {number}")
    told = untimed(capsys.readouterr().err)
    assert [line["reason"] for line in told] == [f"no {number}" for number in range(10)]

    clock.now += 59.9
    log.warning("probe fails", probe="cpu", reason="last")
    assert capsys.readouterr().err == ""
    clock.now += 0.1
    log.info("something else")
    held, line = untimed(capsys.readouterr().err)
    assert held == summary("probe fails", 991, probe="cpu", reason="last") | {"last_seconds_ago": 0.1}
    assert line["event"] == "something else"

    for minute in range(3):  # and while it goes on
        for number in range(50):
            log.warning("probe fails", probe="cpu", reason=f"{minute} {number}")
        (line,) = untimed(capsys.readouterr().err)
        assert line["reason"] == f"{minute} 0"
        clock.now += 60
        log.info("something else")
        held, _ = untimed(capsys.readouterr().err)
        assert (held["lines"], held["reason"], held["last_seconds_ago"]) == (49, f"{minute} 49", 60.0)

    clock.now += 60  # a quiet minute
    for _ in range(12):
        log.warning("probe fails", probe="cpu", reason="anew")
    assert len(untimed(capsys.readouterr().err)) == 10
    log.close()
    assert untimed(capsys.readouterr().err) == [summary("probe fails", 2, probe="cpu", reason="anew")]


@pytest.mark.parametrize(
    ("fields", "others"),
    [
        ({"sink": "a", "reason": "x"}, {"sink": "b", "reason": "x"}),
        ({"probe": "a"}, {"probe": "b"}),
        ({"reason": "a"}, {"reason": "b"}),
        ({"reason": 1}, {"reason": 2}),
    ],
)
def test_each_subject_has_its_own_lines(
    fields: dict[str, Any], others: dict[str, Any], capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log = Log("info", "json", clock)
    for _ in range(30):
        log.warning("it fails", **fields)
    for _ in range(5):
        log.warning("it fails", **others)
        log.warning("it fails otherwise", **fields)
    told = lines(capsys)
    assert len(told) == 10 + 5 + 5
    log.close()


def test_a_probe_that_comes_and_goes_is_some_lines_a_minute_whatever_it_says(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log = Log("info", "json", clock)
    for second in range(3600):
        clock.now += 1
        if second % 2:
            log.info("probe works again", probe="cpu")
        else:
            log.warning("probe fails", probe="cpu", reason=f"odd {second}")
    log.close()
    told = lines(capsys)
    assert len(told) <= 2 * 10 + 59 * 2 * 2 + 2
    held = sum(line["lines"] for line in told if line["event"] == HELD_BACK)
    assert held + sum(line["event"] != HELD_BACK for line in told) == 3600


def test_debug_is_whole_for_whoever_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log("debug", "json")
    for _ in range(200):
        log.debug("cycle")
    assert len(lines(capsys)) == 200


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "never"
        time.sleep(0.005)


def test_the_count_is_told_when_the_minute_is_over_though_nothing_else_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    log = Log("info", "json", clock)
    monkeypatch.setattr(logs, "_QUIET_SECONDS", 0.0625)
    for _ in range(15):
        log.error("first", sink="a")
    clock.now += 0.03125
    for _ in range(13):
        log.warning("second", sink="a")
    told: list[dict[str, Any]] = []
    for until_seconds, count in ((0.03125, 21), (0.03125, 22)):
        clock.now += until_seconds
        until(lambda count=count: told.extend(lines(capsys)) or len(told) >= count)  # type: ignore[misc]
    assert [(line["level"], line["of"], line["lines"]) for line in told[20:]] == [
        ("error", "first", 5),
        ("warning", "second", 3),
    ]
    until(lambda: log._timer is None)


def test_a_process_that_ends_tells_what_it_held_back() -> None:
    program = (
        "from agent.logs import Log\n"
        "log = Log('info', 'json')\n"
        "for number in range(500): log.error('it fails', sink='main', reason=f'{number}')\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    told = [json.loads(line) for line in run.stderr.splitlines()]
    assert len(told) == 11
    last = told[10]
    assert (last["of"], last["lines"], last["level"], last["reason"]) == ("it fails", 490, "error", "499")


def test_ever_new_causes_take_bounded_room_and_lines(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    log = Log("info", "json", clock)
    for number in range(5000):
        log.warning("it fails", reason=f"number {number}")
    assert len(log._causes) <= 257
    log.close()
    told = lines(capsys)
    assert len(told) == 256 + 10 + 1
    assert (told[-1]["of"], told[-1]["lines"]) == ("many", 5000 - 266)
    for number in range(5000):  # a second apart, they make room for each other
        clock.now += 1
        log.warning("it fails", reason=f"number {number}")
    assert len(lines(capsys)) == 5000
    assert len(log._causes) <= 61


class Dear:
    """A field that must not be rendered."""

    def __str__(self) -> str:
        raise AssertionError("rendered")


def test_what_is_held_back_is_not_rendered_and_leaves_nothing_behind(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    log = Log("info", "json", clock)
    for _ in range(10):
        log.warning("probe fails", probe="cpu", reason="no")
    log.warning("probe fails", probe="cpu", reason="no")
    latest, dear = log.latest, Dear()
    blocks = sys.getallocatedblocks()
    for _ in range(50_000):
        log.warning("probe fails", probe="cpu", reason=dear)
    assert sys.getallocatedblocks() - blocks < 50
    assert log.latest == latest
    log.warning("probe fails", probe="cpu", reason="no")
    log.close()
    assert lines(capsys)[-1]["lines"] == 50_002


def test_threads_lose_no_line_uncounted(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    log = Log("info", "json", clock)

    def shout() -> None:
        for number in range(2000):
            log.warning("it fails", sink=f"{number % 3}")

    threads = [threading.Thread(target=shout) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    log.close()
    told = lines(capsys)
    held = [line["lines"] for line in told if line["event"] == HELD_BACK]
    assert (len(told), sum(held)) == (33, 8000 - 30)


# Kept for the status -------------------------------------------------------------------------


def test_a_flood_pushes_no_other_warning_out(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    log = Log("error", "json", clock)
    for number in range(4):
        log.warning("sink fails", sink=f"s{number}", reason=Path("/x"))
    log.info("sink delivers again", sink="s0")
    log.error("configuration not taken", reason="old")
    for _ in range(20):
        clock.now += 120  # it is let through each time
        log.warning("probe fails", probe="cpu", reason=f"at {clock.now:g}")
    kept = [(told.level, told.event, *told.fields.values()) for told in log.latest]
    assert kept == [
        *(("warning", "sink fails", f"s{number}", "/x") for number in range(4)),
        ("error", "configuration not taken", "old"),
        *(("warning", "probe fails", "cpu", f"at {seconds}") for seconds in (3160, 3280, 3400)),
    ]
    for number in range(30):
        log.error("new", sink=str(number))
    assert [told.fields["sink"] for told in log.latest] == [str(number) for number in range(20, 30)]
    assert [line["event"] for line in lines(capsys)] == ["configuration not taken"] + ["new"] * 30


# Where it is written to ----------------------------------------------------------------------


def test_lines_that_stderr_did_not_take_are_counted_and_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log("info", "json")
    with monkeypatch.context() as broken:
        with open(os.devnull, "w") as gone:
            broken.setattr(sys, "stderr", gone)
        for number in range(3):
            log.error("it fails", sink=str(number))
    assert log.unwritten == 3
    log.change("info", "json")
    log.error("it fails", sink="3")
    told = lines(capsys)
    assert [(line["event"], line.get("lines")) for line in told] == [
        ("it fails", None),
        ("log could not be written", 3),
    ]
    assert log.unwritten == 0


EVERY_LEVEL = """
import sys
from agent.logs import LEVELS, Log
if sys.argv[2]: sys.modules["structlog"] = None
log = Log("debug", sys.argv[1])
for level in LEVELS: getattr(log, level)("something", sink="main", reason="two\\nlines")
"""
PREFIXES = ["<7>", "<6>", "<4>", "<3>"]


COMPLAINT = """
from agent.errors import complain
complain("wrong")
"""


def written(
    format: str, is_socket: bool, without_structlog: bool = False, shift: int = 0, program: str = EVERY_LEVEL
) -> list[str]:
    """What a child writes whose $JOURNAL_STREAM is its stderr, or an inode beside it."""
    if is_socket:
        reader, writer = (end.detach() for end in socket.socketpair())
    else:
        reader, writer = os.pipe()
    try:
        status = os.fstat(writer)
        journal = environment(JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino + shift}")
        command = [sys.executable, "-c", program, format, "x" * without_structlog]
        subprocess.run(command, stderr=writer, env=journal, cwd=HERE, timeout=60, check=True)
        return os.read(reader, 1 << 16).decode().splitlines()
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no journal")
@pytest.mark.parametrize(("shift", "line"), [(0, "<3>hostprobe: wrong"), (1, "hostprobe: wrong")])
def test_what_ends_the_agent_is_an_error_in_the_journal(shift: int, line: str) -> None:
    assert written("auto", is_socket=True, shift=shift, program=COMPLAINT) == [line]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no journal")
@pytest.mark.parametrize("is_socket", [False, True])
@pytest.mark.parametrize("without_structlog", [False, True])
def test_the_journal_gets_priorities_and_no_second_time(is_socket: bool, without_structlog: bool) -> None:
    told = written("auto", is_socket, without_structlog)
    assert [line[:3] for line in told] == PREFIXES
    for level, line in zip(LEVELS, told, strict=True):
        assert json.loads(line[3:]) == {"event": "something", "level": level, "sink": "main", "reason": "two\nlines"}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no journal")
def test_a_format_that_was_asked_for_is_kept_in_the_journal() -> None:
    told = written("json", True)
    assert [line[:3] for line in told] == PREFIXES
    assert all("timestamp" in json.loads(line[3:]) for line in told)
    told = written("console", True)
    assert [line[:3] for line in told] == PREFIXES
    assert all("something" in line and "\x1b" not in line for line in told)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no journal")
@pytest.mark.parametrize("without_structlog", [False, True])
def test_another_stream_than_the_journals_gets_no_priorities(without_structlog: bool) -> None:
    """As in a child of a service, whose stderr leads elsewhere while the variable was inherited."""
    told = [json.loads(line) for line in written("auto", True, without_structlog, shift=1)]
    assert [line["level"] for line in told] == list(LEVELS)
    assert all(("timestamp" in line) is not without_structlog for line in told)


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize("without_structlog", [False, True])
def test_a_secret_is_in_no_line(
    format: str, without_structlog: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if without_structlog:
        monkeypatch.setitem(sys.modules, "structlog", None)
    secret = Secret("hunter2", ["hunter2 is no notice"])
    log = Log("debug", format)
    for _ in range(12):
        log.error("sink fails", sink="main", token=secret, all=[secret], reason=f"refused {secret}")
    log.debug("sink", settings={"token": secret}, pair=(secret, 1))
    log.close()
    text = capsys.readouterr().err
    assert text.count("***") >= 3
    assert "hunter2" not in text + repr(log.latest)


# A run ---------------------------------------------------------------------------------------

PROBES = """
from agent.table import TableSpec, gauge
from probes.probe import ProbeSettings

class Broken:
    Settings = ProbeSettings
    tables = (TableSpec("broken", "Never filled.", gauge("size_bytes", "bytes", "Of nothing.")),)

    def __init__(self, settings, host):
        self._cycles = 0

    def collect(self, frame):
        raise OSError("always")

    def close(self): ...

class Flapping(Broken):
    tables = (TableSpec("flapping", "Never filled.", gauge("size_bytes", "bytes", "Of nothing.")),)

    def collect(self, frame):
        self._cycles += 1
        if self._cycles % 2:
            raise OSError(f"cycle {self._cycles}")
"""
CYCLES = 200
RUN = """
template = "minimal"
[agent]
interval = "5ms"
align = false
shutdown_timeout = "200ms"
[log]
level = "{level}"
[probes.broken]
[probes.flapping]
[sinks.main]
type = "file"
path = "{directory}/out"
[sinks.full]
type = "file"
path = "/dev/full"
[sinks.full.retry]
base = "1ms"
cap = "2ms"
[sinks.away]
type = "tcp"
address = "127.0.0.1:1"
[sinks.away.buffer]
size = "64KiB"
"""


def run_with_all_that_fails(directory: Path, level: str) -> list[dict[str, Any]]:
    """The log of 200 cycles with a probe that fails, one that comes and goes, and two sinks that fail."""
    info = directory / "hostprobe_flapping-1.0.dist-info"
    info.mkdir()
    (directory / "hostprobe_flapping.py").write_text(PROBES)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hostprobe-flapping\nVersion: 1.0\n")
    entries = "[hostprobe.probes]\nbroken = hostprobe_flapping:Broken\nflapping = hostprobe_flapping:Flapping\n"
    (info / "entry_points.txt").write_text(entries)
    config = directory / "hostprobe.toml"
    config.write_text(RUN.format(level=level, directory=directory))
    status, stdout, stderr = hostprobe(
        "run", "--config", config, "--cycles", CYCLES, env=environment(PYTHONPATH=str(directory))
    )
    assert (status, stdout) == (1, ""), "frames were lost"
    frame = frames((directory / "out").read_text())[-1]
    assert frame["sequence"] == CYCLES
    failures = {row["probe"]: row["failures_total"] for row in frame["agent_probe"]}
    assert (failures["broken"], failures["flapping"]) == (CYCLES, CYCLES // 2)
    assert all(row["failures_total"] >= 5 for row in frame["agent_sink"] if row["sink"] == "full")
    return [json.loads(line) for line in stderr.splitlines()]


def test_no_line_a_cycle_whatever_fails(tmp_path: Path) -> None:
    told = run_with_all_that_fails(tmp_path, "info")
    assert all(line["level"] != "debug" for line in told)
    count = {of: [line for line in told if (line["event"], line.get("probe")) == of] for of in OF_PROBES}
    held = {(line["of"], line.get("probe")): line["lines"] for line in told if line["event"] == HELD_BACK}
    assert [len(lines) for lines in count.values()] == [1, 10, 10]
    assert held["probe fails", "flapping"] == held["probe works again", "flapping"] == CYCLES // 2 - 10
    sinks = [line for line in told if "sink" in line]
    assert {line["sink"] for line in sinks} == {"full", "away"}
    assert len(sinks) < CYCLES // 5
    assert len(told) < CYCLES // 3


OF_PROBES = [("probe fails", "broken"), ("probe fails", "flapping"), ("probe works again", "flapping")]


def test_errors_alone_are_none_of_it(tmp_path: Path) -> None:
    assert run_with_all_that_fails(tmp_path, "error") == []
