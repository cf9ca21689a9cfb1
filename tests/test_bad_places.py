"""Rings, sinks' files and secrets in places that can't be used: absent, read-only, full, somebody else's, taken.

At the start that is one line and status 2; later the agent goes on, counts, and delivers all once it can. Each agent is
a process; bad places are made in a mount namespace of its own, so that nothing of this host changes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import REPOSITORY, ended, environment, hostprobe, until, usage_error

ROOT_ON_LINUX = sys.platform.startswith("linux") and os.geteuid() == 0
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
AGENT = (sys.executable, "-B", "-m", "agent")
STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that other users may enter, as those of pytest are not."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)
        while STARTED:  # by a test that has failed
            with STARTED.pop() as process:
                process.kill()


@pytest.fixture
def another_user() -> None:
    """Skips where an agent can't be run as another user."""
    if not ROOT_ON_LINUX:
        pytest.skip("becomes another user, which needs root on Linux")
    tried = [*NOBODY, sys.executable, "-B", "-c", "import agent.commands"]
    done = subprocess.run(tried, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if done.returncode:
        pytest.skip(f"another user can't run this Python here: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture
def namespace() -> None:
    """Skips where no mount namespace can be had."""
    if not ROOT_ON_LINUX:
        pytest.skip("mounts in a namespace of its own, which needs root on Linux")
    tried = ["unshare", "--mount", "--propagation=private", "mount", "-t", "tmpfs", "none", "/mnt"]
    made = subprocess.run(tried, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no mount namespace can be had here: {made.stderr.strip()}")


def configured(folder: Path, buffer: str = "", sink: str = "", more: str = "") -> Path:
    """A configuration of one sink, a file `out/frames` unless given, with a buffer that may lie in a file."""
    path = folder / "hostprobe.toml"
    sink = sink or f'type = "file"\npath = "{folder}/out/frames"'
    (folder / "out").mkdir(exist_ok=True)
    size = "256KiB" if buffer else "16MiB"  # in memory it takes what comes while a sink is away
    path.write_text(
        f'template = "minimal"\n[agent]\ninterval = "10ms"\nalign = false\nshutdown_timeout = "1s"\n'
        f'[log]\nformat = "json"\n[sinks.main]\n{sink}\n[sinks.main.buffer]\nsize = "{size}"\n{buffer}\n'
        f'[sinks.main.retry]\nbase = "1s"\ncap = "2s"\n{more}'
    )
    return path


def run(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()} | options
    STARTED.append(subprocess.Popen(command, cwd=REPOSITORY, **options))
    return STARTED[-1]


def mounted(script: str, config: Path, *arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """`run` in a mount namespace in which a script has run before."""
    command = ["unshare", "--mount", "--propagation=private", "sh", "-ec", f'{script}\nexec "$@"', "sh", *AGENT]
    return run([*command, "run", "--config", str(config), *map(str, arguments)], **options)


def inside(process: subprocess.Popen[bytes], script: str) -> None:
    """Runs a script in the mount namespace of a process."""
    subprocess.run(["nsenter", f"--mount=/proc/{process.pid}/ns/mnt", "sh", "-ec", script], check=True, timeout=60)


def as_nobody(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    return run([*NOBODY, *AGENT, *map(str, arguments)], **options)


def the_line(process: subprocess.Popen[bytes]) -> str:
    """What an agent that doesn't start says, with status 2 and in one line."""
    status, stdout, stderr = ended(process)
    assert (status, stdout, stderr.count("\n")) == (2, "", 1), stderr
    return stderr.removeprefix("hostprobe: ").removesuffix("\n")


def sequences(frames: Path) -> list[int]:
    whole = frames.read_bytes() if frames.exists() else b""
    return [json.loads(line)["sequence"] for line in whole[: whole.rfind(b"\n") + 1].splitlines()]


def events(told: Path) -> list[str]:
    """What was told of sinks and of the configuration; a busy host may have the agent hold back, and tell that."""
    lines = [json.loads(line) for line in told.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [line["event"] for line in lines if not line["event"].startswith("agent ")]


def reason_of_failure(told: Path) -> str:
    """Of the first line that tells it."""
    lines = [json.loads(line) for line in told.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return str(next(line["reason"] for line in lines if line["event"].startswith("sink fails")))


# A ring at the start -------------------------------------------------------------------------


def test_a_ring_in_a_directory_that_is_absent(folder: Path) -> None:
    path = folder / "absent" / "ring"
    config = configured(folder, f'path = "{path}"')
    place = f"{config}: sinks.main.buffer.path: {path}: "
    assert usage_error("run", "--config", config) == (
        f"{place}No such file or directory: expected a file for a ring that can be written"
    )
    assert (
        usage_error("check", "--config", config) == f"{place}its directory is absent: expected a directory to write in"
    )
    assert not path.parent.exists()


@pytest.mark.parametrize("is_there", [False, True])
def test_a_ring_that_another_user_may_not_write(folder: Path, another_user: None, is_there: bool) -> None:
    path = folder / "state" / "ring"
    path.parent.mkdir()
    config = configured(folder, f'path = "{path}"', 'type = "stdout"')
    if is_there:
        assert hostprobe("run", "--config", config, "--cycles", 1)[0] == 0
    before = sorted(os.listdir(path.parent))
    assert the_line(as_nobody("run", "--config", config, "--cycles", 1)) == (
        f"{config}: sinks.main.buffer.path: {path}: Permission denied: expected a file for a ring that can be written"
    )
    assert sorted(os.listdir(path.parent)) == before


@pytest.mark.parametrize("is_there", [False, True])
def test_a_ring_on_a_read_only_file_system(folder: Path, namespace: None, is_there: bool) -> None:
    state = folder / "state"
    state.mkdir()
    config = configured(folder, f'path = "{state}/ring"', 'type = "stdout"')
    if is_there:
        assert hostprobe("run", "--config", config, "--cycles", 1)[0] == 0
    script = f"mount --bind {state} {state}\nmount -o remount,bind,ro {state}"
    assert the_line(mounted(script, config, "--cycles", 1)) == (
        f"{config}: sinks.main.buffer.path: {state}/ring: Read-only file system:"
        " expected a file for a ring that can be written"
    )


def test_a_ring_on_a_full_file_system(folder: Path, namespace: None) -> None:
    state = folder / "state"
    state.mkdir()
    config = configured(folder, f'path = "{state}/ring"')
    assert the_line(mounted(f"mount -t tmpfs -o size=128k none {state}", config, "--cycles", 1)) == (
        f"{config}: sinks.main.buffer.path: {state}/ring: No space left on device:"
        f" expected a disk with {4096 + (256 << 10)} bytes of space"
    )


def test_a_ring_whose_salvage_has_no_space_stays_as_it_is(folder: Path, namespace: None) -> None:
    """A ring of another version, and room for one only."""
    state = folder / "state"
    state.mkdir()
    config = configured(folder, f'path = "{state}/ring"', 'type = "tcp"\naddress = "127.0.0.1:1"')
    assert hostprobe("run", "--config", config, "--cycles", 5)[0] in (0, 1)
    content = bytearray((state / "ring").read_bytes())
    content[16] = 2
    (folder / "kept").write_bytes(content)
    script = f"mount -t tmpfs -o size=300k none {state}\ncp {folder}/kept {state}/ring"
    line = the_line(mounted(f'{script}\n"$@" || cmp {state}/ring {folder}/kept\nexit 2', config))
    assert line.startswith(f"{config}: sinks.main.buffer.path: {state}/ring.new: No space left on device: expected ")


def test_two_agents_on_one_ring(folder: Path) -> None:
    path = folder / "ring"
    config = configured(folder, f'path = "{path}"')
    first = run([*AGENT, "run", "--config", str(config)])
    until(lambda: sequences(folder / "out" / "frames"), first)
    assert the_line(run([*AGENT, "run", "--config", str(config), "--cycles", "1"])) == (
        f"{config}: sinks.main.buffer.path: {path}: process {first.pid} has it open:"
        " expected a ring's file for each agent and sink"
    )
    reached = sequences(folder / "out" / "frames")[-1]
    until(lambda: sequences(folder / "out" / "frames")[-1] > reached, first)
    first.terminate()
    assert ended(first)[:2] == (0, "")
    assert (seen := sequences(folder / "out" / "frames")) == list(range(1, len(seen) + 1))


# A ring while it is used ---------------------------------------------------------------------


def test_a_ring_whose_file_system_fills_up_later(folder: Path, namespace: None) -> None:
    """Its space was taken whole at the start: nothing fails, and nothing is lost."""
    state, frames = folder / "state", folder / "out" / "frames"
    state.mkdir()
    config = configured(folder, f'path = "{state}/ring"')
    with (folder / "told").open("wb") as told:
        running = mounted(f"mount -t tmpfs -o size=400k none {state}", config, stderr=told)
        until(lambda: len(sequences(frames)) > 5, running)
        inside(running, f"dd if=/dev/zero of={state}/filler bs=1k 2>/dev/null || df {state} | grep -q 100%")
        reached = sequences(frames)[-1]
        until(lambda: sequences(frames)[-1] > reached + 20, running)
        running.terminate()
        assert ended(running)[0] == 0
    assert (seen := sequences(frames)) == list(range(1, len(seen) + 1))
    assert events(folder / "told") == []


def test_a_ring_in_a_bad_place_after_a_reload_changes_nothing(folder: Path) -> None:
    frames, told = folder / "out" / "frames", folder / "told"
    path = folder / "absent" / "ring"
    with told.open("wb") as log:
        running = run([*AGENT, "run", "--config", str(configured(folder, f'path = "{folder}/ring"'))], stderr=log)
        until(lambda: sequences(frames), running)
        config = configured(folder, f'path = "{path}"')
        running.send_signal(signal.SIGHUP)
        until(lambda: events(told), running)
        reached = sequences(frames)[-1]
        until(lambda: sequences(frames)[-1] > reached + 5, running)
        running.terminate()
        assert ended(running)[0] == 0
    (line,) = (line for line in map(json.loads, told.read_text().splitlines()) if line["level"] == "error")
    assert (line["level"], line["event"]) == ("error", "configuration not taken, the old one stays in force")
    assert line["reason"].startswith(f"{config}: sinks.main.buffer.path: {path}: ")
    assert (seen := sequences(frames)) == list(range(1, len(seen) + 1))


# A file sink while it runs -------------------------------------------------------------------


def check_that_it_recovers(folder: Path, running: subprocess.Popen[bytes], heal: Any, reason: str) -> None:
    """A sink fails, is told to once and with the reason, and delivers all after it was healed."""
    told, frames = folder / "told", Path(f"/proc/{running.pid}/root{folder}/out/frames")
    until(lambda: "sink fails, its ring holds the frames" in events(told), running)
    assert reason_of_failure(told) == reason
    heal()
    until(lambda: "sink delivers again" in events(told), running)
    reached = sequences(frames)[-1]
    until(lambda: sequences(frames)[-1] > reached, running)
    seen = sequences(frames)  # before the namespace ends with the process
    running.terminate()
    assert ended(running)[0] == 0
    assert seen == list(range(seen[0], seen[0] + len(seen)))
    assert events(told) == ["sink fails, its ring holds the frames", "sink delivers again"]


def test_a_file_sink_whose_disk_is_full_for_a_while(folder: Path, namespace: None) -> None:
    config, out = configured(folder), folder / "out"
    with (folder / "told").open("wb") as told:
        running = mounted(f"mount -t tmpfs -o size=4m none {out}", config, stderr=told)
        until(lambda: sequences(Path(f"/proc/{running.pid}/root{out}/frames")), running)
        inside(running, f"dd if=/dev/zero of={out}/filler bs=4k 2>/dev/null || df {out} | grep -q 100%")
        check_that_it_recovers(
            folder, running, lambda: inside(running, f"rm {out}/filler"), f"{out}/frames: No space left on device"
        )


def test_a_file_sink_whose_directory_is_read_only_for_a_while(folder: Path, namespace: None) -> None:
    """Another file system comes over it, as when a disk came back read-only."""
    config, out = configured(folder), folder / "out"
    with (folder / "told").open("wb") as told:
        running = mounted("true", config, stderr=told)
        until(lambda: sequences(out / "frames"), running)
        inside(running, f"mount -t tmpfs -o ro none {out}")
        check_that_it_recovers(
            folder, running, lambda: inside(running, f"umount -l {out}"), f"{out}/frames: Read-only file system"
        )
    assert (seen := sequences(out / "frames")) == list(range(1, len(seen) + 1))


def test_a_file_sink_that_may_not_rotate_for_a_while(folder: Path, another_user: None) -> None:
    """The directory's mode is changed under another user's agent; the frames are then in several files."""
    sink = f'type = "file"\npath = "{folder}/out/frames"\nmax_size = "20KiB"\nmax_files = 1000'
    config, out = configured(folder, sink=sink), folder / "out"
    out.chmod(0o777)
    with (folder / "told").open("wb") as told:
        running = as_nobody("run", "--config", config, stderr=told)
        until(lambda: sequences(out / "frames"), running)
        out.chmod(0o555)
        until(lambda: "sink fails, its ring holds the frames" in events(folder / "told"), running)
        assert reason_of_failure(folder / "told") == f"{out}/frames: Permission denied"
        out.chmod(0o777)
        until(lambda: "sink delivers again" in events(folder / "told"), running)
        running.terminate()
        assert ended(running)[0] == 0
    seen = sorted(sequence for file in out.iterdir() for sequence in sequences(file))
    assert seen == list(range(1, len(seen) + 1))


def test_a_file_sink_in_a_directory_that_is_absent_or_read_only_at_the_start(folder: Path, namespace: None) -> None:
    config, out = configured(folder), folder / "out"
    assert the_line(mounted(f"mount -t tmpfs -o ro none {out}", config, "--cycles", 1)) == (
        f"{config}: sinks.main: {out}/frames: Read-only file system: expected a file that can be written"
    )
    out.rmdir()
    assert usage_error("run", "--config", config) == (
        f"{config}: sinks.main: {out}/frames: No such file or directory: expected a file that can be written"
    )


# A secret, and the log -----------------------------------------------------------------------


def test_a_secret_that_root_can_read_and_the_agents_user_not(folder: Path, another_user: None) -> None:
    pytest.importorskip("urllib3", reason="sinks of type http need it")
    token = folder / "token"
    token.write_text("hunter2\n")
    token.chmod(0o600)
    sink = f'type = "http"\nurl = "http://127.0.0.1:1/"\nbearer.file = "{token}"'
    config = configured(folder, sink=sink)
    for command in ("run", "check"):
        assert the_line(as_nobody(command, "--config", config)) == (
            f'{config}: sinks.main: file "{token}": Permission denied: expected a file with a secret that can be read'
        )
    assert hostprobe("check", "--config", config)[0] == 0, "root can"
    status, _, stderr = hostprobe("run", "--config", config, "--cycles", 20)
    assert status == 1, "nobody listens"
    assert "sink fails" in stderr
    assert "hunter2" not in stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_log_that_can_not_be_written_ends_nothing(folder: Path) -> None:
    """Also where no descriptor 2 is open."""
    sink = 'type = "tcp"\naddress = "127.0.0.1:1"'
    main = f'[sinks.file]\ntype = "file"\npath = "{folder}/out/frames"\n'
    config = configured(folder, sink=sink, more=main)
    with open("/dev/full", "wb") as full:
        process = run([*AGENT, "run", "--config", str(config), "--cycles", "30"], stderr=full)
        assert ended(process)[:2] == (1, "")
    assert sequences(folder / "out" / "frames") == list(range(1, 31))
    closed = [sys.executable, "-m", "agent", "run", "--config", str(config), "--cycles", "30"]
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *closed], cwd=REPOSITORY, env=environment(), check=False)
    assert done.returncode == 1
    assert len(sequences(folder / "out" / "frames")) == 60
