"""Looking into a ring's file: what the command says of one that is whole, torn, damaged, in use, or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.delivery import Drop, WhenFull
from agent.errors import UsageError
from agent.ring import Ring
from agent.ring_recovery import open_ring
from agent.spool import Spool

HERE = Path(__file__).parents[1]
FIRST, SECOND = bytes(range(16)), bytes(range(100, 116))
TIME_NS = 1_795_217_867_123_456_789


def filled(path: Path, count: int, size: int = 64 << 10, instance: bytes = FIRST, width: int = 100) -> Ring:
    ring = open_ring(str(path), size, WhenFull.DROP_NEWEST, instance=instance).ring
    for sequence in range(1, count + 1):
        payload = b"%d:" % sequence + b"x" * (width * (sequence % 7))
        ring.push(payload, sequence, sequence, time_unix_ns=TIME_NS + sequence)
    return ring


def settle(ring: Ring, count: int) -> None:
    ring.claim(bytearray(), count)
    ring.settle(count)


def held(path: Path) -> tuple[list[int], Spool]:
    spool = Spool(str(path))
    sequences = []
    for header, payload in spool.records():
        assert payload == b"%d:" % header.sequence + b"x" * (len(payload) - len(b"%d:" % header.sequence))
        sequences.append(header.sequence)
    spool.close()
    return sequences, spool


def command(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    line = [sys.executable, "-m", "agent", "spool", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, cwd=HERE, timeout=60, check=False)


def test_what_waits_is_told_and_stays(tmp_path: Path) -> None:
    ring = filled(tmp_path / "ring", 50)
    settle(ring, 20)
    ring.unmap()
    before = (tmp_path / "ring").read_bytes()
    sequences, spool = held(tmp_path / "ring")
    assert sequences == list(range(21, 51))
    report = spool.report
    assert (report.frames, report.block_bytes, report.damage, report.process) == (30, 64 << 10, [], None)
    assert (report.oldest_unix_ns, report.newest_unix_ns) == (TIME_NS + 21, TIME_NS + 50)
    assert {name: (run.first, run.last, run.frames) for name, run in report.runs.items()} == {FIRST.hex(): (21, 50, 30)}
    assert report.used_bytes is not None
    assert report.payload_bytes < report.used_bytes < 64 << 10
    assert (tmp_path / "ring").read_bytes() == before


def test_an_empty_ring(tmp_path: Path) -> None:
    open_ring(str(tmp_path / "ring"), 4096).ring.unmap()
    sequences, spool = held(tmp_path / "ring")
    assert (sequences, spool.report.used_bytes, spool.report.oldest_unix_ns) == ([], 0, None)


def test_runs_are_told_apart_in_their_order(tmp_path: Path) -> None:
    filled(tmp_path / "ring", 5).unmap()
    ring = filled(tmp_path / "ring", 3, instance=SECOND)
    ring.push(b"9:", 4, 4, records=10)
    ring.unmap()
    _, spool = held_batches(tmp_path / "ring")
    assert [(name, run.first, run.last, run.frames) for name, run in spool.report.runs.items()] == [
        (FIRST.hex(), 1, 5, 5),
        (SECOND.hex(), 1, 13, 13),
    ]


def held_batches(path: Path) -> tuple[list[int], Spool]:
    spool = Spool(str(path))
    sequences = [header.sequence for header, _ in spool.records()]
    spool.close()
    return sequences, spool


def test_behind_a_wrap(tmp_path: Path) -> None:
    ring = filled(tmp_path / "ring", 12, size=4096)
    for first in range(13, 200, 6):
        settle(ring, 6)
        for sequence in range(first, first + 6):
            ring.push(b"%d:" % sequence + b"x" * (sequence % 300), sequence, 0, time_unix_ns=1)
    expected = len(ring)
    ring.unmap()
    sequences, spool = held(tmp_path / "ring")
    assert sequences == list(range(sequences[0], sequences[0] + expected))
    assert spool.report.damage == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/locks")
def test_a_live_ring_is_told_by_its_process_and_not_disturbed(tmp_path: Path) -> None:
    ring = filled(tmp_path / "ring", 5)
    sequences, spool = held(tmp_path / "ring")
    assert sequences == [1, 2, 3, 4, 5]
    assert spool.report.process == os.getpid()
    ring.push(b"6:", 6, 6)
    settle(ring, 6)
    assert (ring.taken, len(ring)) == (6, 0)
    ring.unmap()
    assert held(tmp_path / "ring")[1].report.process is None


@pytest.mark.parametrize("gone", [1, 7, 20, 39, 40])
def test_frames_that_leave_while_it_is_read_are_no_damage(tmp_path: Path, gone: int) -> None:
    """After the first frame is read an agent delivers some, and writes newer ones over them."""
    ring = filled(tmp_path / "ring", 40, size=16 << 10)
    spool = Spool(str(tmp_path / "ring"))
    records = spool.records()
    sequences = [next(records)[0].sequence]
    settle(ring, gone)
    for sequence in range(41, 41 + 2 * gone):
        ring.push(b"%d:" % sequence + b"y" * 290, sequence, 0)
    sequences += [header.sequence for header, _ in records]
    spool.close()
    ring.unmap()
    assert sequences == sorted(set(sequences))
    assert sequences[-1] <= 40
    assert set(range(gone + 1, 41)) <= set(sequences), "what stayed is read"
    assert spool.report.damage == []


def damaged(path: Path, change: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def test_damage_is_told_and_what_is_whole_is_read(tmp_path: Path) -> None:
    filled(tmp_path / "ring", 20).unmap()

    def flip(content: bytearray) -> None:
        content[content.index(b"9:xx")] ^= 1

    damaged(tmp_path / "ring", flip)
    sequences, spool = held(tmp_path / "ring")
    assert sequences == [*range(1, 9), *range(10, 21)]
    (line,) = spool.report.damage
    assert "1 of the newest 12 records are not whole" in line


def test_a_damaged_head_still_gives_its_frames(tmp_path: Path) -> None:
    filled(tmp_path / "ring", 20).unmap()
    damaged(tmp_path / "ring", lambda content: content.__setitem__(slice(1024, 3072), bytes(2048)))
    sequences, spool = held(tmp_path / "ring")
    assert sequences == list(range(1, 21))
    assert spool.report.used_bytes is None
    assert "neither of its two states is whole" in spool.report.damage[0]


def cut(content: bytearray) -> None:
    del content[-8:]


def grown(content: bytearray) -> None:
    content += bytes(8)


def with_a_flipped_head(content: bytearray) -> None:
    content[20] ^= 1


@pytest.mark.parametrize("change", [cut, grown, with_a_flipped_head])
@pytest.mark.parametrize("delivered", [0, 70, 100])
def test_what_was_delivered_stays_so_where_only_the_head_or_the_size_is_wrong(
    tmp_path: Path, change: Callable[[bytearray], None], delivered: int
) -> None:
    """It is what an agent that opens the file will keep."""
    ring = filled(tmp_path / "ring", 100)
    settle(ring, delivered)
    ring.unmap()
    damaged(tmp_path / "ring", change)
    sequences, spool = held(tmp_path / "ring")
    assert sequences == list(range(delivered + 1, 101))
    assert (spool.report.used_bytes, len(spool.report.damage)) == (None, 1)
    opened = open_ring(str(tmp_path / "ring"), 64 << 10)
    assert len(opened.ring) == len(sequences)
    opened.ring.unmap()


def test_a_torn_state_hides_no_record(tmp_path: Path) -> None:
    """Neither with a whole head nor without; an agent that opens it keeps that one too."""
    ring = filled(tmp_path / "ring", 20)
    file = ring._file
    assert file is not None
    slot = 1024 if file._generation % 2 == 0 else 2048
    ring.unmap()
    for place in (slot + 9, 20):
        damaged(tmp_path / "ring", lambda content, place=place: content.__setitem__(place, content[place] ^ 1))  # type: ignore[misc]
        assert held(tmp_path / "ring")[0] == list(range(1, 21))


def test_a_file_that_was_cut(tmp_path: Path) -> None:
    filled(tmp_path / "ring", 20).unmap()
    os.truncate(tmp_path / "ring", 4096 + 3001)
    sequences, spool = held(tmp_path / "ring")
    assert sequences == list(range(1, len(sequences) + 1))
    assert 3 < len(sequences) < 20
    assert spool.report.damage


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory: expected a ring's file that can be read"),
        (b"", "is no ring: expected a file that hostprobe keeps a sink's buffer in"),
        (b"text\n" * 2000, "is no ring: expected a file that hostprobe keeps a sink's buffer in"),
    ],
)
def test_what_is_no_ring_is_one_line(tmp_path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "ring").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Spool(str(tmp_path / "ring"))
    assert str(caught.value) == f"{tmp_path}/ring: {reason}"
    run = command(tmp_path / "ring")
    assert (run.returncode, run.stdout) == (2, b"")
    assert run.stderr.decode() == f"hostprobe: {tmp_path}/ring: {reason}\n"


def test_a_directory_is_one_line(tmp_path: Path) -> None:
    run = command(tmp_path)
    assert run.returncode == 2
    assert run.stderr.decode() == f"hostprobe: {tmp_path}: Is a directory: expected a ring's file that can be read\n"


def test_the_command_for_reading_and_for_programs(tmp_path: Path) -> None:
    ring = filled(tmp_path / "ring", 50)
    ring.claim(bytearray(), 10)
    ring.settle(10, Drop.AGED)
    ring.unmap()
    run = command(tmp_path / "ring")
    assert (run.returncode, run.stderr) == (0, b"")
    lines = run.stdout.decode().splitlines()
    assert lines[0] == f"{tmp_path}/ring: ring of 64KiB, open in no process"
    assert lines[2].startswith("  frames    40, ")
    assert lines[3:5] == ["  oldest    2026-11-20T23:37:47.123456800Z", "  newest    2026-11-20T23:37:47.123456839Z"]
    assert lines[5:] == [f"  instance  {FIRST.hex()}: sequences 11 to 50, 40 frames", "  damage    none"]
    report: dict[str, Any] = json.loads(command(tmp_path / "ring", "--format", "json").stdout)
    assert report["frames"] == 40
    assert report["runs"] == {FIRST.hex(): {"first": 11, "last": 50, "frames": 40}}


def test_the_command_dumps_payloads_as_lines(tmp_path: Path) -> None:
    ring = filled(tmp_path / "ring", 50)
    settle(ring, 47)
    ring.unmap()
    run = command(tmp_path / "ring", "--dump")
    assert run.returncode == 0
    assert [line.split(b":")[0] for line in run.stdout.splitlines()] == [b"48", b"49", b"50"]


def test_a_dump_of_a_damaged_ring_says_so_with_status_1(tmp_path: Path) -> None:
    filled(tmp_path / "ring", 20).unmap()
    damaged(tmp_path / "ring", lambda content: content.__setitem__(content.index(b"9:xx"), 0))
    run = command(tmp_path / "ring", "--dump")
    assert run.returncode == 1
    assert len(run.stdout.splitlines()) == 19
    assert run.stderr.startswith(f"hostprobe: {tmp_path}/ring: 1 of the newest ".encode())


def test_a_dump_whose_reader_leaves_ends_quietly(tmp_path: Path) -> None:
    filled(tmp_path / "ring", 2000, size=4 << 20, width=300).unmap()
    line = f"{sys.executable} -m agent spool {tmp_path}/ring --dump | head -c 10; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", line], capture_output=True, cwd=HERE, timeout=60, check=False)
    assert run.stdout.endswith(b"0\n")
    assert run.stderr == b""
