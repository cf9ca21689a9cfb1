"""What `hostprobe verify` says of lines, compared with a model of sets, and as a user runs it."""

from __future__ import annotations

import gzip
import io
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import verification
from agent.__main__ import main
from agent.serializers.document import SCHEMA
from agent.verification import Gaps, Header, Verification

REPOSITORY = Path(__file__).parent.parent
PATIENCE_SECONDS = 60
EPOCH_NS = 1_800_000_000 * 10**9
SECOND_NS = 10**9


def line(sequence: int, host: str = "web", instance: str = "a", **more: Any) -> bytes:
    """A frame's line, ten seconds after the one before unless told otherwise."""
    frame = {
        "schema": SCHEMA,
        "host": host,
        "instance": instance,
        "sequence": sequence,
        "time": "2027-01-15T08:00:00.000000000Z",
        "time_unix_ns": EPOCH_NS + sequence % 10**6 * 10 * SECOND_NS,
        "interval_seconds": 10.0,
        "tags": {"env": "prod"},
        "cpu": {"usage_ratio": 0.25},
    }
    return msgspec.json.encode(frame | more) + b"\n"


def lines(sequences: Iterable[int], **labels: str) -> bytes:
    return b"".join(line(sequence, **labels) for sequence in sequences)


def report_of(data: bytes) -> dict[str, Any]:
    """The JSON report on one stream named `frames`."""
    verified = Verification()
    verified.read(io.BytesIO(data), "frames")
    report: dict[str, Any] = json.loads(verified.json())
    assert verified.status == int(report["total"]["missing"] > 0)
    return report


def instance_of(data: bytes) -> dict[str, Any]:
    """The figures of the only instance."""
    (host,) = report_of(data)["hosts"]
    (instance,) = host["instances"]
    return dict(instance)


def run(*arguments: object, **options: Any) -> tuple[int, str, str]:
    """Status, stdout and stderr of `hostprobe verify` as a process."""
    done = subprocess.run(
        [sys.executable, "-m", "agent", "verify", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
        check=False,
        **options,
    )
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# sequences


def test_nothing_is_wrong() -> None:
    assert instance_of(lines(range(1, 101))) == {
        "instance": "a",
        "first_sequence": 1,
        "last_sequence": 100,
        "not_seen_before_first": 0,
        "frames": 100,
        "missing": 0,
        "repeated": 0,
        "reordered": 0,
        "degraded": 0,
        "interleaved": 0,
        "clock_steps": 0,
        "missing_ranges": 0,
        "first_missing_ranges": [],
        "largest_clock_step_seconds": None,
        "exact": True,
    }


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [
        ([1, 2, 5, 6, 9], {"missing": 4, "first_missing_ranges": [[3, 4], [7, 8]], "missing_ranges": 2}),
        ([1, 2, 3, 2, 3, 4], {"repeated": 2, "reordered": 0, "missing": 0, "frames": 6}),
        ([1, 3, 2, 4], {"reordered": 1, "missing": 0, "repeated": 0, "first_missing_ranges": []}),
        ([1, 3, 2, 2], {"reordered": 1, "repeated": 1}),
        ([1, 7, 4], {"missing": 4, "first_missing_ranges": [[2, 3], [5, 6]], "reordered": 1}),
        ([1, 7, 2], {"missing": 4, "first_missing_ranges": [[3, 6]]}),
        ([1, 7, 6], {"missing": 4, "first_missing_ranges": [[2, 5]]}),
        ([57, 58], {"missing": 0, "first_sequence": 57, "not_seen_before_first": 56}),
        ([57, 55], {"missing": 1, "first_sequence": 55, "reordered": 1, "first_missing_ranges": [[56, 56]]}),
        ([3, 2, 1], {"missing": 0, "first_sequence": 1, "last_sequence": 3, "reordered": 2}),
        ([1, 2**63 - 1], {"missing": 2**63 - 3, "last_sequence": 2**63 - 1}),
    ],
)
def test_sequences(sequences: list[int], expected: dict[str, Any]) -> None:
    instance = instance_of(lines(sequences))
    assert {name: instance[name] for name in expected} == expected


def test_at_most_ten_ranges_are_told() -> None:
    instance = instance_of(lines(range(1, 100, 2)))
    assert instance["first_missing_ranges"] == [[number, number] for number in range(2, 22, 2)]
    assert (instance["missing"], instance["missing_ranges"]) == (49, 49)


class Model:
    """What an instance's figures must be, by sets and by looking at everything that came before."""

    def __init__(self, sequences: Sequence[int]) -> None:
        seen: set[int] = set()
        self.repeated = self.reordered = 0
        for sequence in sequences:
            if sequence in seen:
                self.repeated += 1
            elif seen and sequence < max(seen):
                self.reordered += 1
            seen.add(sequence)
        self.first, self.last = min(seen), max(seen)
        self.missing = sorted(set(range(self.first, self.last)) - seen)
        self.frames = len(sequences)

    @property
    def ranges(self) -> list[list[int]]:
        ranges: list[list[int]] = []
        for number in self.missing:
            if ranges and ranges[-1][1] == number - 1:
                ranges[-1][1] = number
            else:
                ranges.append([number, number])
        return ranges


arrivals = st.lists(
    st.tuples(st.sampled_from(["web", "db"]), st.sampled_from(["a", "b", "c"]), st.integers(1, 40)),
    min_size=1,
    max_size=120,
)
"""Any order, with repetitions and holes, of any instances."""


@given(arrivals)
def test_it_agrees_with_sets(frames: list[tuple[str, str, int]]) -> None:
    report = report_of(b"".join(line(sequence, host, instance) for host, instance, sequence in frames))
    assert [host["host"] for host in report["hosts"]] == list(dict.fromkeys(host for host, _, _ in frames))
    for host in report["hosts"]:
        of_host = [(instance, sequence) for name, instance, sequence in frames if name == host["host"]]
        order = list(dict.fromkeys(instance for instance, _ in of_host))
        assert [instance["instance"] for instance in host["instances"]] == order
        begun: list[str] = []
        interleaved = dict.fromkeys(order, 0)
        for instance, _ in of_host:
            if instance not in begun:
                begun.append(instance)
            interleaved[instance] += instance != begun[-1]
        for found in host["instances"]:
            name = found["instance"]
            model = Model([sequence for instance, sequence in of_host if instance == name])
            assert (found["first_sequence"], found["last_sequence"]) == (model.first, model.last)
            assert (found["frames"], found["missing"]) == (model.frames, len(model.missing))
            assert (found["repeated"], found["reordered"]) == (model.repeated, model.reordered)
            assert (found["first_missing_ranges"], found["missing_ranges"]) == (model.ranges[:10], len(model.ranges))
            assert found["interleaved"] == interleaved[name]
            assert found["exact"]


@given(st.randoms(use_true_random=False), st.integers(1, 400), st.integers(0, 30), st.integers(0, 30))
def test_a_run_that_was_shuffled_repeated_and_thinned(chance: random.Random, count: int, lost: int, twice: int) -> None:
    sequences = sorted(chance.sample(range(1, count + 1), max(count - lost, 1)))
    sequences += [chance.choice(sequences) for _ in range(twice)]
    for _ in range(chance.randrange(20)):  # swaps of neighbours, as of batches on several ways
        start = chance.randrange(len(sequences))
        part = sequences[start : start + 12]
        chance.shuffle(part)
        sequences[start : start + 12] = part
    found, model = instance_of(lines(sequences)), Model(sequences)
    assert found["missing"] == len(model.missing)
    assert (found["repeated"], found["reordered"]) == (model.repeated, model.reordered)


@given(st.permutations(range(1, 61)), st.integers(0, 20))
def test_beyond_the_bound_nothing_missing_is_hidden(sequences: list[int], lost: int) -> None:
    """With few ranges remembered: missing is never too low, and what is too much is told of as repeated."""
    kept = sequences[lost:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "GAPS_MAX", 4)
        patch.setattr(verification, "RANGES_SHOWN", 2)
        found, model = instance_of(lines(kept)), Model(kept)
    mistaken = found["missing"] - len(model.missing)
    assert mistaken >= 0
    assert found["repeated"] == model.repeated + mistaken
    assert found["reordered"] == model.reordered - mistaken
    if found["exact"]:
        assert mistaken == 0


def test_the_bound_on_ranges_is_kept_and_told_of() -> None:
    gaps = Gaps()
    for number in range(0, 2 * verification.GAPS_MAX + 200, 2):
        gaps.add(number, number)
    assert len(gaps.firsts) == len(gaps.lasts) == verification.GAPS_MAX
    assert (gaps.forgotten, gaps.frames) == (100, verification.GAPS_MAX + 100)
    assert gaps.firsts[:11] == [*range(0, 20, 2), 220]
    verified = Verification()
    verified.read(io.BytesIO(lines(range(1, 2 * verification.GAPS_MAX + 10, 2))), "frames")
    text = verified.text().decode()
    assert "  not exact    of more than 10000 missing ranges, 4 were forgotten;" in text
    assert f"missing {verification.GAPS_MAX + 4}," in text
    assert f", 18, 20 and {verification.GAPS_MAX - 6} more ranges\n" in text


# instances, clocks, degraded


def test_instances_in_their_order_and_interleaved() -> None:
    data = lines([1, 2], instance="b") + lines([1, 2], instance="a") + lines([3, 4], instance="b") + lines([3])
    (host,) = report_of(data + lines([1], host="db", instance="b"))["hosts"][:1]
    assert [(one["instance"], one["interleaved"], one["missing"]) for one in host["instances"]] == [
        ("b", 2, 0),
        ("a", 0, 0),
    ]


def stepped(*steps_ns: int) -> bytes:
    """Frames 1, 2, …, before each of which (after the first) the wall clock was moved by so much."""
    wall_ns = EPOCH_NS
    data = line(1, time_unix_ns=wall_ns, interval_seconds=None)
    for sequence, step_ns in enumerate(steps_ns, 2):
        wall_ns += 10 * SECOND_NS + step_ns
        data += line(sequence, time_unix_ns=wall_ns)
    return data


@pytest.mark.parametrize(
    ("data", "count", "largest"),
    [
        (stepped(0, 0), 0, None),
        (stepped(100_000_000, -100_000_000), 0, None),
        (stepped(100_000_001), 1, 0.100000001),
        (stepped(-3600 * SECOND_NS, SECOND_NS), 2, -3600.0),
        (stepped(SECOND_NS, -SECOND_NS, 2 * SECOND_NS), 3, 2.0),
        (line(1) + line(3, time_unix_ns=0), 0, None),  # the interval is since frame 2
        (line(1) + line(2, interval_seconds=None, time_unix_ns=0), 0, None),
        (lines([1, 2, 3, 2, 3, 4, 5]), 0, None),
        (line(1) + line(3) + line(2, time_unix_ns=0) + line(4), 0, None),
        (line(7, time_unix_ns=0), 0, None),
    ],
)
def test_clock_steps(data: bytes, count: int, largest: float | None) -> None:
    instance = instance_of(data)
    assert (instance["clock_steps"], instance["largest_clock_step_seconds"]) == (count, largest)


@pytest.mark.parametrize(
    ("value", "counted"),
    [(True, 1), (0.5, 1), ("sampled", 1), (["tcp"], 1), (False, 0), (None, 0), (0, 0), ([], 0)],
)
def test_degraded(value: object, counted: int) -> None:
    assert instance_of(line(1, degraded=value) + line(2))["degraded"] == counted


# lines that are no frames


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff\x00\x9f garbage\n",
        b"[1, 2]\n",
        b"{}\n",
        b"null\n",
        line(2)[:-2] + b',"deep":' + b"[" * 100_000 + b"\n",
        line(2)[:-20] + b"\n",
        line(2)[:-1] + line(3),
        line(2).replace(b"hostprobe/1", b"hostprobe/2"),
        line(2).replace(b'"prod"', b'"\xff\xfe"'),
        line(0),
        line(2, instance=None),  # type: ignore[arg-type]
        line(2, host="x" * 1025),
        line(2).replace(b'"sequence":2', b'"sequence":"2"'),
        line(2, interval_seconds=1e300),
        line(2).replace(b"180000002", b"9" * 5000),
    ],
    ids=lambda bad: bad[:20].decode("ascii", "backslashreplace"),
)
def test_a_line_that_is_no_frame_is_counted_and_the_first_is_told(bad: bytes) -> None:
    report = report_of(line(1) + b"\n \r\n" + bad + line(2) + bad)
    assert report["total"] | {"frames": 2, "not_frames": 2, "missing": 0, "repeated": 0} == report["total"]
    assert report["first_not_frame"].startswith(f"frames:4, byte {len(line(1)) + 4}: ")
    assert len(report["first_not_frame"]) < 250
    assert report["first_not_frame"].isprintable()


def test_a_torn_last_line_is_told_and_a_whole_one_counts() -> None:
    whole = lines([1, 2])
    assert report_of(whole[:-1])["total"]["frames"] == 2
    report = report_of(whole[:-30])
    assert (report["total"]["frames"], report["total"]["not_frames"]) == (1, 1)
    assert f"frames:2, byte {len(line(1))}: no line feed at the end: " in report["first_not_frame"]


def test_carriage_returns_and_empty_lines_are_no_matter() -> None:
    report = report_of(lines([1, 2, 3]).replace(b"\n", b"\r\n\r\n\n"))
    assert (report["total"]["frames"], report["total"]["not_frames"]) == (3, 0)


@pytest.mark.parametrize("data", [b"", b"\n", b"\n\n \t\r\n"])
def test_nothing_is_no_frame_and_no_loss(data: bytes) -> None:
    report = report_of(data)
    assert set(report["total"].values()) == {0}
    assert report["hosts"] == []


@given(st.binary(max_size=300), st.booleans())
def test_garbage_never_stops_it(data: bytes, ended: bool) -> None:
    report = report_of(line(1) + data + (b"\n" if ended else b"") + line(2))
    assert report["total"]["frames"] >= 1
    assert ended <= (report["total"]["frames"] == 2)


@given(st.data())
def test_bit_flips_never_stop_it(data: st.DataObject) -> None:
    damaged = bytearray(lines(range(1, 6)))
    for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=8)):
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    report_of(bytes(damaged))


@pytest.mark.parametrize("end", [b"\n" + line(2), b"", b"\n"])
@pytest.mark.parametrize("extra", [0, 1, 300_000])
def test_a_line_beyond_the_bound(end: bytes, extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "LINE_BYTES_MAX", 1000)
    data = line(1) + (b"x" * (1000 + extra)) + end
    report = report_of(data)
    assert report["total"]["frames"] == 1 + (b"schema" in end)
    assert report["total"]["not_frames"] == 1
    expected = "a line of more than 1000 bytes" if extra or end else "no line feed at the end: JSON"
    assert f"frames:2, byte {len(line(1))}: {expected}" in report["first_not_frame"]


def test_a_line_just_within_the_bound_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "LINE_BYTES_MAX", len(line(1)))
    assert report_of(line(1) + line(2))["total"]["frames"] == 2
    monkeypatch.setattr(verification, "LINE_BYTES_MAX", len(line(1)) - 1)
    assert report_of(line(1) + line(2))["total"]["not_frames"] == 2


def test_the_schema_is_the_serializers() -> None:
    assert get_args(get_type_hints(Header)["schema"]) == (SCHEMA,)


# memory


class Endless(io.RawIOBase):
    """Lines made while they are read, of two instances, with holes and late ones; nothing is stored."""

    def __init__(self, size: int) -> None:
        self.left = size
        self._lines = self._made()
        self._rest = b""

    def _made(self) -> Iterator[bytes]:
        padding = "x" * 4000
        sequence = 0
        while True:
            sequence += 5
            for number in (sequence, sequence + 2, sequence + 1):
                yield line(number, instance="a", padding=padding) + line(number, instance="b", padding=padding)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self._lines) if self.left > 0 else b""
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self.left -= count
        return count


def peak_bytes(size: int) -> tuple[int, Verification]:
    verified = Verification()
    tracemalloc.start()
    try:
        verified.read(io.BufferedReader(Endless(size), verification.BUFFER_BYTES), "endless")  # type: ignore[arg-type]
        return tracemalloc.get_traced_memory()[1], verified
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_stream() -> None:
    small, _ = peak_bytes(20 << 20)
    large, verified = peak_bytes(200 << 20)
    totals = verified.totals()
    assert totals["frames"] > 40_000
    assert totals["missing"] > 15_000
    assert large < small * 1.2 + 3_000_000  # the ranges of 180 MB more, at the bound of 10,000 for an instance
    assert large < 8 << 20


def peak_of_instances(count: int, step: int, report: str) -> tuple[float, float]:
    """Bytes for each instance of two frames: what is held, and the most while the report is made, without its size."""
    verified = Verification()
    tracemalloc.start()
    try:
        for number in range(count):
            name = f"{number:016x}"
            verified.read(io.BytesIO(line(7000, instance=name) + line(7000 + step, instance=name)), "frames")
        held = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        size = len(getattr(verified, report)())
        return held / count, (tracemalloc.get_traced_memory()[1] - size) / count
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("report", ["text", "json"])
@pytest.mark.parametrize(("step", "most"), [(1, 400), (5, 700)], ids=["whole", "a gap each"])
def test_memory_of_many_instances(step: int, most: int, report: str) -> None:
    """Agents that start over and over: each is small, and so is what stands beside the report while it is made."""
    held, peak = peak_of_instances(10_000, step, report)
    assert held < most
    assert peak < held + 150  # the report's buffer has some room to grow


def test_the_json_report_is_put_together_as_a_whole_one_would_be() -> None:
    verified = Verification()
    assert verified.json() == msgspec.json.format(verified.json())
    hosts = ("web", 'quoted "instances": []', "\n  é")
    data = b"".join(line(number, host, instance) for host in hosts for instance in ("a", "b\n") for number in (3, 9))
    verified.read(io.BytesIO(data + b'"instances": []'), '"instances": []')
    assert verified.json() == msgspec.json.format(verified.json())
    found = json.loads(verified.json())["hosts"]
    assert [(host["host"], [one["instance"] for one in host["instances"]]) for host in found] == [
        (host, ["a", "b\n"]) for host in hosts
    ]


def test_instances_do_not_share_their_gaps() -> None:
    data = lines([1, 3, 2], instance="a") + lines([1, 2], instance="b") + lines([1, 4], instance="c") + lines([5, 4])
    (host,) = report_of(data)["hosts"]
    assert [one["missing"] for one in host["instances"]] == [0, 0, 2]
    assert (verification.NO_GAPS.firsts, verification.NO_GAPS.frames) == ([], 0)


def test_memory_of_a_line_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "LINE_BYTES_MAX", 4 << 20)
    zeros = Path("/dev/zero").open("rb")  # noqa: SIM115
    with zeros:
        limited = io.BufferedReader(_Limited(zeros, 200 << 20), verification.BUFFER_BYTES)
        verified = Verification()
        tracemalloc.start()
        verified.read(limited, "zeros")  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (verified.lines, verified.not_frames) == (1, 1)
    assert peak < 10 << 20


class _Limited(io.RawIOBase):
    def __init__(self, source: Any, size: int) -> None:
        self._source = source
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)


# the command


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(data: bytes, name: str = "frames.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def test_what_it_prints(written: Callable[..., Path]) -> None:
    old = lines(range(5, 9), instance="old")
    new = stepped(-3 * SECOND_NS).replace(b'"a"', b'"new"') + line(2, instance="new") + line(9, instance="new")
    path = written(old + new + line(6, instance="new") + line(9, instance="old", degraded=True) + b"torn")
    status, stdout, stderr = run(path)
    assert (status, stderr) == (1, "")
    assert stdout == (
        "host web, instance old (1 of 2)\n"
        "  sequence     5 to 9\n"
        "  not seen     4 before the first; they are not called missing\n"
        "  frames       5\n"
        "  missing      0\n"
        "  repeated     0\n"
        "  reordered    0\n"
        "  clock steps  0\n"
        "  interleaved  1 came after a later instance had begun\n"
        "  degraded     1\n"
        "\n"
        "host web, instance new (2 of 2)\n"
        "  sequence     1 to 9\n"
        "  frames       5\n"
        "  missing      5: 3-5, 7-8\n"
        "  repeated     1\n"
        "  reordered    1\n"
        "  clock steps  1, the largest -3.000 s\n"
        "\n"
        f"not frames: 1, the first: {path}:11, byte {path.stat().st_size - 4}:"
        " no line feed at the end: JSON is malformed: invalid character (byte 4)\n"
        "\n"
        "total: hosts 1, instances 2, frames 10, missing 5, repeated 1, reordered 1, degraded 1, interleaved 1,"
        " clock steps 1, not frames 1\n"
    )


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (lines([1, 2, 3]), 0),
        (lines([1, 3]), 1),
        (lines([1, 3, 2, 2]), 0),
        (lines([9, 10]), 0),
        (b"garbage\n", 0),
        (b"", 0),
    ],
)
def test_only_what_is_missing_makes_status_1(data: bytes, status: int, written: Callable[..., Path]) -> None:
    assert run(written(data))[0] == status


def test_stdin_and_json() -> None:
    status, stdout, stderr = run("-", "--format", "json", input=lines([1, 4]) + b"x\n")
    report = json.loads(stdout)
    assert (status, stderr) == (1, "")
    assert report["hosts"][0]["instances"][0]["first_missing_ranges"] == [[2, 3]]
    assert report["first_not_frame"].startswith("stdin:3, byte ")


def test_a_real_run_has_nothing_missing() -> None:
    agent = [sys.executable, "-m", "agent", "run", "--template", "minimal", "--interval", "10ms", "--cycles", "30"]
    frames = subprocess.run(agent, cwd=REPOSITORY, stdout=subprocess.PIPE, timeout=PATIENCE_SECONDS, check=True).stdout
    status, stdout, _ = run("-", input=frames)
    assert status == 0
    assert stdout.endswith("frames 30, missing 0, repeated 0, reordered 0, degraded 0, interleaved 0, "
                           "clock steps 0, not frames 0\n")  # fmt: skip


def test_several_files_are_one_stream(written: Callable[..., Path]) -> None:
    first = written(gzip.compress(lines([1, 2, 4])) + gzip.compress(lines([5])), "frames.jsonl.1.gz")
    second = written(lines([3, 6, 7]), "frames.jsonl")
    status, stdout, _ = run(first, second, "-", input=lines([8]))
    assert (status, "sequence     1 to 8\n" in stdout, "reordered    1\n" in stdout) == (0, True, True)


@pytest.mark.parametrize("damage", ["cut", "checksum", "no block", "not gzip"])
def test_a_damaged_archive_is_told_with_what_stands_before(damage: str, written: Callable[..., Path]) -> None:
    chance = random.Random(1)
    frames = b"".join(line(sequence, noise=chance.randbytes(500).hex()) for sequence in range(1, 2001))
    packed = bytearray(gzip.compress(frames))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "checksum":
        packed[-8] ^= 1
    elif damage == "no block":
        packed[10:20] = b"\xff" * 10
    else:
        packed[:2] = b"no"
    status, stdout, stderr = run(written(packed, "frames.gz"), written(lines([2001, 2002])))
    assert (status, stderr) == (1, "")
    assert re.search(r"^not read to the end: \S+frames\.gz, byte \d+: ", stdout, re.MULTILINE)
    if damage == "cut":
        found = re.search(r"frames +(\d+)\n", stdout)
        assert found is not None
        assert 900 < int(found[1]) < 1100
    first = {"cut": 1, "checksum": 1}.get(damage, 2001)
    assert f"sequence     {first} to 2002\n" in stdout


class Failing(io.BytesIO):
    """A stream that breaks off with an error."""

    def readline(self, size: int | None = -1, /) -> bytes:
        if part := super().readline(size):
            return part
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("data", [b"", line(1), b"\n", b"x" * 1_000_000 + b"\n", b"x" * 1_000_000])
def test_an_error_while_reading_is_a_failure(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "LINE_BYTES_MAX", 1000)
    verified = Verification()
    verified.read(Failing(data), "frames")
    assert (verified.status, verified.totals()["missing"]) == (1, 0)
    if data.endswith(b"\n"):
        assert verified.cut == [f"frames, byte {len(data)}: Input/output error"]
    assert b"not read to the end: frames, byte " in verified.text()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent", "No such file or directory"),
        ("folder", "Is a directory"),
        ("x" * 300, "File name too long"),
        ("", "Is a directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_wrong_usage(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "good").write_bytes(lines([1, 3]))
    status, stdout, stderr = run(tmp_path / "good", tmp_path / name)
    assert (status, stdout) == (2, "")
    assert stderr == f"hostprobe: {tmp_path / name}: {reason}: expected a file that can be read\n"


def test_a_file_that_others_may_not_read(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(lines([1]))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root is never refused
    assert main(["verify", str(path)]) == 2
    assert capsys.readouterr().err == f"hostprobe: {path}: Permission denied: expected a file that can be read\n"


def test_without_a_file_it_is_wrong_usage() -> None:
    status, _, stderr = run()
    assert status == 2
    assert stderr == "hostprobe: the following arguments are required: FILE (see hostprobe verify --help)\n"


def test_a_name_with_a_nul_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "a\0b"]) == 2
    assert "hostprobe: 'a\\x00b': embedded null byte: expected a file" in capsys.readouterr().err


def test_a_file_that_goes_while_others_are_read(written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(lines([1, 2]))
    gone = written(b"", "gone")
    monkeypatch.setattr(Verification, "read", lambda *_: gone.unlink())
    verified = verification.verify([str(path), str(gone)])
    assert (verified.status, verified.cut) == (1, [f"{gone}: No such file or directory"])


def test_stdin_that_is_closed() -> None:
    command = f'exec "{sys.executable}" -m agent verify - <&-'
    done = subprocess.run(
        ["sh", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hostprobe: -: it is closed: expected a file that can be read\n"


def test_stdin_that_someone_made_non_blocking() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    started = subprocess.Popen(
        [sys.executable, "-m", "agent", "verify", "-"], cwd=REPOSITORY, stdin=reader, stdout=subprocess.PIPE
    )
    os.close(reader)
    with started, os.fdopen(writer, "wb", buffering=0) as pipe:
        for sequence in (1, 2, 4):
            time.sleep(0.3)
            pipe.write(line(sequence))
        pipe.close()
        stdout, _ = started.communicate(timeout=PATIENCE_SECONDS)
    assert (started.returncode, b"frames       3\n" in stdout) == (1, True)


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    bad = b'{"schema": "\\u001b]0;x\\u0007"}\n'
    status, stdout, _ = run("-", input=line(1, host="\x1b[2Jevil\n", instance="") + bad)
    assert status == 0
    assert "host '\\x1b[2Jevil\\n', instance '' (1 of 1)\n" in stdout
    assert "\x1b" not in stdout


def test_a_reader_that_has_gone_is_no_failure(written: Callable[..., Path]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, "-m", "agent", "verify", str(written(lines([1])))],
        cwd=REPOSITORY,
        stdout=writer,
        stderr=subprocess.PIPE,
    ) as started:
        os.close(writer)
        assert started.communicate(timeout=PATIENCE_SECONDS)[1] == b""
    assert started.returncode == 0


# a terminal


def on_a_terminal(arguments: Sequence[object], feed: Callable[[subprocess.Popen[bytes]], None]) -> tuple[int, str, str]:
    """Status, stdout and what was drawn of a process whose stderr is a terminal."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "agent", "verify", *map(str, arguments)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=slave,
    ) as started:
        os.close(slave)
        feed(started)
        stdout, _ = started.communicate(timeout=PATIENCE_SECONDS)
    drawn = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux says so at the end
            break
        if not part:
            break
        drawn += part
    os.close(master)
    return started.returncode, stdout.decode(), drawn.decode()


def test_progress_on_a_terminal_is_erased_at_the_end() -> None:
    def feed(started: subprocess.Popen[bytes]) -> None:
        assert started.stdin is not None
        for sequence in range(1, 31):
            started.stdin.write(line(sequence))
            started.stdin.flush()
            time.sleep(0.02)

    status, stdout, drawn = on_a_terminal(["-"], feed)
    assert (status, "frames 30, missing 0" in stdout) == (0, True)
    draws = drawn.split("\r\x1b[K")
    assert (draws[0], draws[-1]) == ("", "")
    assert 2 <= len(draws) - 2 <= 12
    assert all(re.fullmatch(r"\d+ MB, \d+ lines, \d+ MB/s", draw) for draw in draws[1:-1])


def test_interrupting_ends_with_130_and_prints_nothing() -> None:
    def feed(started: subprocess.Popen[bytes]) -> None:
        assert started.stdin is not None
        started.stdin.write(lines([1, 2]))
        started.stdin.flush()
        status = Path(f"/proc/{started.pid}/wchan")
        deadline = time.monotonic() + 20
        while "pipe" not in status.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        started.send_signal(signal.SIGINT)
        started.wait(PATIENCE_SECONDS)

    status, stdout, drawn = on_a_terminal(["-"], feed)
    assert (status, stdout) == (130, "")
    assert drawn.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (None, "50 MB, 3 lines, 50 MB/s"),
        (200_000_000, "25 %, 50 MB, 3 lines, 50 MB/s, 3 s left"),
        (7, "100 %, 50 MB, 3 lines, 50 MB/s, 0 s left"),
    ],
)
def test_progress_says_how_much_how_fast_and_how_long(
    total: int | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    screen = io.StringIO()
    monkeypatch.setattr(verification.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", screen)
    verified = Verification()
    verified.lines = 3
    progress = verification.Progress(verified, total)
    now[0] = 100.09
    progress.advance(20_000_000)
    assert screen.getvalue() == ""
    now[0] = 101.0
    progress.advance(30_000_000)
    progress.advance(1_000_000)
    assert screen.getvalue().startswith(f"\r\x1b[K{expected}")
    assert screen.getvalue().count("\r") == 1
