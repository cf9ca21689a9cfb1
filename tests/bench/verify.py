"""What `hostprobe verify` costs: python tests/bench/verify.py [MEGABYTES]

Writes real frames, numbered on, to a file of 500 MB unless told otherwise (removed at the end), and prints the
median speed of several runs beside that of `wc -l` and of the decoder alone, and the peak memory of a whole
process at 100 MB and at the full size.
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import msgspec

from agent import verification
from agent.verification import Header

REPOSITORY = Path(__file__).parents[2]
RUNS = 5
SMALL_BYTES = 100_000_000
PACKED_BYTES = 50_000_000
HOSTPROBE = [sys.executable, "-m", "agent"]


def real_frames(template: str) -> list[bytes]:
    """A hundred lines that the agent has just written."""
    run = [*HOSTPROBE, "run", "--template", template, "--interval", "10ms", "--cycles", "100"]
    return subprocess.run(run, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True).stdout.splitlines(keepends=True)


def write(path: Path, frames: Sequence[bytes], size: int) -> int:
    """Writes a run of one instance of some size, and returns its frames."""
    sequence = written = 0
    with path.open("wb") as file:
        while written < size:
            sequence += 1
            line = frames[sequence % len(frames)]
            written += file.write(re.sub(rb'"sequence":\d+', b'"sequence":%d' % sequence, line, count=1))
    return sequence


def seconds(work: Callable[[], object]) -> float:
    """The median of several runs."""
    work()  # the page cache takes the file
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_megabytes(arguments: Sequence[str]) -> float:
    """Peak resident memory of a process."""
    pid = os.posix_spawn(
        arguments[0], arguments, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    )
    _, status, usage = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, 1), "verify failed"
    return usage.ru_maxrss * 1024 / 1e6


def measure(template: str, size: int, folder: Path) -> None:
    """Prints the figures for one template."""
    frames = real_frames(template)
    path = folder / f"{template}.jsonl"
    count = write(path, frames, size)
    size = path.stat().st_size
    alone = seconds(lambda: verification.verify([str(path)]))
    counting = seconds(lambda: subprocess.run(["wc", "-l", str(path)], stdout=subprocess.DEVNULL, check=True))
    decode, line = msgspec.json.Decoder(Header).decode, frames[50]
    decoding = seconds(lambda: [decode(line) for _ in range(20_000)]) / 20_000
    verified = verification.verify([str(path)])
    assert verified.totals()["frames"] == count
    assert verified.status == verified.not_frames == 0
    print(f"{template}: {count} frames of {size / count:.0f} bytes, {size / 1e6:.0f} MB")
    print(
        f"  verify        {size / alone / 1e6:7.0f} MB/s  {count / alone:9.0f} frames/s  {alone / count * 1e6:5.2f} µs"
    )
    print(f"  decoder alone {len(line) / decoding / 1e6:7.0f} MB/s  {1 / decoding:9.0f} frames/s")
    print(f"  wc -l         {size / counting / 1e6:7.0f} MB/s")
    full = peak_megabytes([*HOSTPROBE, "verify", str(path)])
    write(path, frames, SMALL_BYTES)
    print(f"  peak memory {peak_megabytes([*HOSTPROBE, 'verify', str(path)]):.1f} MB at 100 MB, {full:.1f} MB at all")
    path.unlink()


def measure_packed(folder: Path) -> None:
    """Prints the figures for a gzip file."""
    path, packed = folder / "plain.jsonl", folder / "packed.jsonl.gz"
    write(path, real_frames("standard"), PACKED_BYTES)
    packed.write_bytes(gzip.compress(path.read_bytes(), 6))
    verifying = seconds(lambda: verification.verify([str(packed)]))
    unpacking = seconds(lambda: subprocess.run(["gzip", "-dc", packed], stdout=subprocess.DEVNULL, check=True))
    verified, unpacked = PACKED_BYTES / verifying / 1e6, PACKED_BYTES / unpacking / 1e6
    print(f"gzip: {verified:.0f} MB/s of what is unpacked; gzip -dc {unpacked:.0f} MB/s")


def main() -> None:
    """Runs it all."""
    size = int(sys.argv[1]) * 1_000_000 if len(sys.argv) > 1 else 500_000_000
    os.chdir(REPOSITORY)
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, median of {RUNS} runs")
    with tempfile.TemporaryDirectory() as folder:
        for template in ("standard", "minimal"):
            measure(template, size, Path(folder))
        measure_packed(Path(folder))


if __name__ == "__main__":
    main()
