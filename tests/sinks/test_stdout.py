"""The stdout sink in a process of its own, with descriptor 1 as pipe, file, closed pipe, full pipe, full disk."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from agent.sinks.sink import LineWriter

PATIENCE_SECONDS = 60
HERE = Path(__file__).parents[2]

# Delivers lines of many lengths, tries failed ones again as the exporter does, and tells its story on stderr.
PROGRAM = """
import sys, time
from agent.errors import SinkClosedError, SinkError, UsageError
from agent.sinks.sink import SinkSettings
from agent.sinks.stdout import StdoutSink

first, last, width = map(int, sys.argv[1:])
sink = StdoutSink(SinkSettings())
try:
    sink.open()
except UsageError as error:
    sys.exit(f"usage: {error}")
for number in range(first, last + 1):
    payload = memoryview(b"%d:" % number + b"x" * (number * 7919 % width))
    while True:
        try:
            sink.deliver([payload])
            break
        except SinkClosedError as error:
            sys.exit(f"closed at {number}: {error}")
        except SinkError as error:
            print(f"failed: {error}", file=sys.stderr, flush=True)
            time.sleep(0.01)
sink.close()
print("done", file=sys.stderr)
"""


def line(number: int, width: int) -> bytes:
    return b"%d:" % number + b"x" * (number * 7919 % width)


def command(first: int, last: int, width: int) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(first), str(last), str(width)]


@contextmanager
def start(stdout: Any, first: int, last: int, width: int) -> Iterator[subprocess.Popen[bytes]]:
    """The program; killed after a minute, so that a test that waits for it fails and does not hang."""
    with subprocess.Popen(command(first, last, width), stdout=stdout, stderr=subprocess.PIPE, cwd=HERE) as process:
        timer = threading.Timer(PATIENCE_SECONDS, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def test_a_pipe_gets_whole_lines() -> None:
    with start(subprocess.PIPE, 1, 500, 5000) as process:
        out, err = process.communicate()
    assert err == b"done\n"
    assert out == b"".join(line(number, 5000) + b"\n" for number in range(1, 501))


def test_lines_longer_than_the_pipe() -> None:
    with start(subprocess.PIPE, 1, 20, 300_000) as process:
        out, err = process.communicate()
    assert err == b"done\n"
    assert out.splitlines() == [line(number, 300_000) for number in range(1, 21)]


def test_a_file_gets_whole_lines(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file, start(file, 1, 500, 500) as process:
        assert process.communicate()[1] == b"done\n"
    assert (tmp_path / "out").read_bytes().splitlines() == [line(number, 500) for number in range(1, 501)]


def test_a_closed_pipe_says_that_the_reader_has_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as file, start(file, 1, 5, 10) as process:
        err = process.communicate()[1]
        assert process.returncode == 1
    assert err == b"closed at 1: stdout: its reader has gone\n"


def test_a_reader_that_leaves_in_the_middle_of_a_line() -> None:
    with start(subprocess.PIPE, 1, 100, 1_000_000) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10)
        process.stdout.close()
        err = process.stderr.read()
    assert err.startswith(b"closed at ")
    assert err.endswith(b"stdout: its reader has gone\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    """Whoever shares the pipe may have set O_NONBLOCK; filled to its last byte, every write is partial or refused."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    filled = 0
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while True:
                filled += os.write(writer, b"-" * size)
    with os.fdopen(writer, "wb", buffering=0) as file, start(file, 1, 200, 20_000) as process:
        file.close()  # the process alone holds the writing end now
        with os.fdopen(reader, "rb") as source:
            got = source.read()
        assert process.stderr is not None
        assert process.stderr.read() == b"done\n"
    assert got[:filled] == b"-" * filled
    assert got[filled:].splitlines() == [line(number, 20_000) for number in range(1, 201)]


def test_a_closed_descriptor_is_refused() -> None:
    """It would be reused by the next file that is opened, and lines would go there."""
    run = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *command(1, 5, 10)],
        stderr=subprocess.PIPE,
        cwd=HERE,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert run.stderr == b"usage: stdout: it is closed: expected an open descriptor 1\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")
def test_a_full_device_is_a_failure_that_can_be_retried() -> None:
    with open("/dev/full", "wb", buffering=0) as file, start(file, 1, 1, 10) as process:
        assert process.stderr is not None
        told = [process.stderr.readline() for _ in range(3)]
    assert told == [b"failed: stdout: No space left on device\n"] * 3


def test_a_full_disk_tears_no_line(small_disk: Path) -> None:
    """The half of a line that the disk took stays; when there is space again, the other half comes."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(56 << 10))
    out = small_disk / "out"
    with out.open("wb") as file, start(file, 1, 12, 5000) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"failed: stdout: No space left on device\n"
        assert process.stderr.readline() == b"failed: stdout: No space left on device\n"
        assert not out.read_bytes().endswith(b"\n")  # there is a torn line: this test tests something
        ballast.unlink()
        assert process.stderr.read().splitlines()[-1] == b"done"
    assert out.read_bytes().splitlines() == [line(number, 5000) for number in range(1, 13)]


@pytest.mark.parametrize("comes_again", [True, False])
def test_a_torn_line_is_finished_before_another_begins(small_disk: Path, comes_again: bool) -> None:
    """Also where its payload doesn't come again: it was given up, because it had grown too old."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(56 << 10))
    torn, new = b"t" * 20_000, b"n" * 100
    line = LineWriter()
    with (small_disk / "out").open("wb", buffering=0) as file:
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"), memoryview(torn) as view:
                line.write(file.fileno(), view)
        assert 0 < (small_disk / "out").stat().st_size < 20_000  # there is a torn line: this test tests something
        with pytest.raises(OSError, match="No space left"), memoryview(new) as view:
            line.write(file.fileno(), view)
        ballast.unlink()
        for payload in (torn, new) if comes_again else (new,):
            with memoryview(payload) as view:
                line.write(file.fileno(), view)
    assert (small_disk / "out").read_bytes().splitlines() == [torn, new]


@pytest.mark.parametrize("format", ["msgpack", "otlp", "remote_write"])
def test_payloads_that_say_where_they_end_have_nothing_between_them(format: str) -> None:
    program = (
        "from agent.sinks.sink import SinkSettings\n"
        "from agent.sinks.stdout import StdoutSink\n"
        f"sink = StdoutSink(SinkSettings(format={format!r}))\n"
        "sink.open()\n"
        "sink.deliver([memoryview(b'one'), memoryview(b''), memoryview(b't\\nwo')])\n"
        "sink.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, capture_output=True, timeout=PATIENCE_SECONDS, check=True
    )
    assert (done.stdout, done.stderr) == (b"onet\nwo", b"")
