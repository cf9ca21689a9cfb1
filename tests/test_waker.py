"""What ends the wait: signals, another thread, the time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.waker import Waker

PATIENCE_SECONDS = 60
HERE = Path(__file__).parents[1]

# Waits for an hour; the signal may come before the wait, in it, or between the two.
PROGRAM = """
import sys
from agent.waker import Waker
waker = Waker()
waker.catch_signals()
print("ready", flush=True)
print(waker.wait(3600), waker.wait(3600), waker.stopped, flush=True)
"""


@pytest.fixture
def waker() -> Iterator[Waker]:
    made = Waker()
    yield made
    os.close(made._reader)
    os.close(made._writer)


def wait_in_a_thread(waker: Waker, seconds: float) -> tuple[threading.Thread, list[bool]]:
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(waker.wait(seconds)), daemon=True)
    thread.start()
    return thread, answers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("pause_seconds", [0.0, 0.002, 0.1])
def test_a_signal_ends_the_wait(number: signal.Signals, pause_seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(pause_seconds)  # whichever moment this meets, the wait must end
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=PATIENCE_SECONDS)
        finally:
            process.kill()
    assert (out, err, process.returncode) == ("True True True\n", "", 0)


def test_stop_from_another_thread_ends_the_wait(waker: Waker) -> None:
    thread, answers = wait_in_a_thread(waker, 3600)
    assert thread.is_alive()
    waker.stop()
    thread.join(PATIENCE_SECONDS)
    assert answers == [True]
    assert waker.stopped


def test_stop_before_the_wait(waker: Waker) -> None:
    waker.stop()
    assert waker.wait(3600)
    assert waker.wait(3600)


def test_the_time_ends_the_wait(waker: Waker) -> None:
    before = time.monotonic()
    assert not waker.wait(0.05)
    assert time.monotonic() - before >= 0.05  # never early
    assert not waker.stopped


@pytest.mark.parametrize("seconds", [0, -1, -1e9])
def test_no_time_is_no_wait(waker: Waker, seconds: float) -> None:
    """poll(2) takes a negative time as for ever."""
    thread, answers = wait_in_a_thread(waker, seconds)
    thread.join(PATIENCE_SECONDS)
    assert answers == [False]


@pytest.mark.parametrize("seconds", [86_400.0 * 30, 1e12])
def test_a_time_that_poll_cannot_count(waker: Waker, seconds: float) -> None:
    """30 days are more milliseconds than poll(2) takes."""
    thread, answers = wait_in_a_thread(waker, seconds)
    waker.stop()
    thread.join(PATIENCE_SECONDS)
    assert answers == [True]


def test_stop_many_times(waker: Waker) -> None:
    """Also when the pipe has no room for another byte."""
    for _ in range(70_000):
        waker.stop()
    assert waker.wait(3600)


def test_another_signal_ends_the_wait_early_without_stopping() -> None:
    """Any signal with a handler writes to the pipe; the caller looks at the time and waits on."""
    program = f"""{PROGRAM}
import signal
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.01)
print(waker.wait(3600), waker.stopped)
""".replace("print(waker.wait(3600), waker.wait(3600), waker.stopped, flush=True)", "")
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_SECONDS, cwd=HERE, check=False
    )
    assert (run.stdout, run.stderr) == ("ready\nFalse False\n", "")


def test_a_second_signal_ends_a_process_that_hangs() -> None:
    hangs = PROGRAM.replace(
        "print(waker.wait(3600), waker.wait(3600)", "print(waker.wait(3600), flush=True)\nwhile True: pass\nprint(0"
    )
    process = subprocess.Popen([sys.executable, "-c", hangs], cwd=HERE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "True\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()
