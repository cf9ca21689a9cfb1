"""hostprobe's commands as processes, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
PATIENCE_SECONDS = 60


def environment(**more: str) -> dict[str, str]:
    """This process's, without what configures hostprobe."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HOSTPROBE")} | more


def started(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment()} | options
    return subprocess.Popen([sys.executable, "-m", "agent", *map(str, arguments)], cwd=REPOSITORY, **options)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Status, stdout and stderr of a process that ends by itself."""
    with process:
        try:
            stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert b"Traceback" not in (stderr or b"")
    assert b"Exception" not in (stderr or b"")
    return process.returncode, (stdout or b"").decode(), (stderr or b"").decode()


def hostprobe(*arguments: object, **options: Any) -> tuple[int, str, str]:
    return ended(started(*arguments, **options))


def output(*arguments: object, **options: Any) -> str:
    """Stdout of a command that must succeed without a word on stderr."""
    status, stdout, stderr = hostprobe(*arguments, **options)
    assert (status, stderr) == (0, "")
    return stdout


def usage_error(*arguments: object, **options: Any) -> str:
    """The one line of a command that must end with status 2 and print nothing."""
    status, stdout, stderr = hostprobe(*arguments, **options)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("hostprobe: ")
    assert stderr.endswith("\n")
    assert len(stderr.splitlines()) == 1
    return stderr.removeprefix("hostprobe: ").removesuffix("\n")


def frames(text: str) -> list[dict[str, Any]]:
    assert not text or text.endswith("\n"), f"cut: {text[-80:]!r}"
    return [json.loads(line) for line in text.splitlines()]


def until(condition: Callable[[], Any], process: subprocess.Popen[bytes]) -> None:
    """Waits until something is so, as long as the process runs."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}: {process.stderr and process.stderr.read()!r}"
        assert time.monotonic() < deadline, "never"
        time.sleep(0.005)
