"""What tests of several modules share: trees of proc and sys, and frames that a probe filled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.frame import Frame
from probes.procfs import Host, Source


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[dict[str, str | bytes]], Path]:
    """Writes files below tmp_path, by their path there, and gives the root; there is always a proc/stat."""

    def write(files: dict[str, str | bytes]) -> Path:
        for name, text in {"proc/stat": "cpu 1 2 3 4\n", **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return write


@pytest.fixture
def collect() -> Iterator[Callable[..., Frame]]:
    """`collect(probe class, **settings)`: the frame after as many cycles as `times` has monotonic seconds.

    `before_cycle`, if given, is called with each cycle's number, from 0.
    """
    closing: list[Any] = []

    def run(
        probe_class: Any,
        *,
        root: Path | str = "/",
        source: Source = "auto",
        times: Sequence[float] = (0.0,),
        before_cycle: Callable[[int], object] | None = None,
        time_unix_ns: int = 0,
        **settings: Any,
    ) -> Frame:
        host = Host(root=str(root), source=source)
        probe = probe_class(probe_class.Settings(**settings), host)
        frame = Frame(probe_class.tables)
        closing.extend((probe, host))
        for cycle, seconds in enumerate(times):
            if before_cycle is not None:
                before_cycle(cycle)
            frame.begin(time_unix_ns, round(seconds * 1e9))
            probe.collect(frame)
            frame.derive()
        return frame

    yield run
    for thing in closing:
        thing.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)
