"""CPU times: the kernel's and psutil's figures, saved hosts, many and missing CPUs, other kernels, damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ProbeError
from agent.frame import Frame
from probes.cpu import CoreLabels, CpuProbe, PsutilCpuProbe, _parse_cores, parse_interrupts, parse_times
from probes.procfs import USER_HZ
from tests.figures import only_row, rows, rows_by
from tests.hosts import saved_host, write_large_host

Collect = Callable[..., Frame]
Tree = Callable[[dict[str, str | bytes]], Path]
TIMES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
TICKS = [f"{name}_seconds_total" for name in TIMES]
RATIOS = ["usage_ratio", "user_ratio", "system_ratio", "iowait_ratio", "steal_ratio"]
REST = "intr 900 1 2 3\nctxt 5000\nbtime 1\nprocesses 70\nprocs_running 1\nprocs_blocked 0\n"


def stat(*cpus: tuple[str, list[int]], rest: str = REST) -> str:
    return "".join(f"{name} {' '.join(map(str, times))}\n" for name, times in cpus) + rest


def test_every_column(tree: Tree, collect: Collect) -> None:
    root = tree({"proc/stat": stat(("cpu ", list(range(100, 1100, 100))), ("cpu0", list(range(1, 11))))})
    frame = collect(CpuProbe, root=root)
    assert only_row(frame, "cpu") == {
        **dict.fromkeys(RATIOS),
        **{name: value / USER_HZ for name, value in zip(TICKS, range(100, 1100, 100), strict=True)},
        "logical_count": 1,
        "context_switches_total": 5000,
        "interrupts_total": 900,
        "forks_total": 70,
    }
    assert only_row(frame, "cpu_core") == {
        "core": "0",
        "usage_ratio": None,
        **{name: value / USER_HZ for name, value in zip(TICKS, range(1, 11), strict=True)},
    }


def test_ratios_are_shares_of_all_time(tree: Tree, collect: Collect) -> None:
    before = [1000, 100, 500, 9000, 50, 10, 20, 30, 400, 40]
    grown = [10, 5, 7, 60, 4, 2, 3, 9, 8, 1]  # 100 without the guests, which are part of user and nice
    after = [first + more for first, more in zip(before, grown, strict=True)]

    def write(cycle: int) -> None:
        tree({"proc/stat": stat(("cpu ", (before, after)[cycle]), ("cpu3", (before, after)[cycle]))})

    frame = collect(CpuProbe, root=tree({}), times=(0, 1), before_cycle=write)
    row = only_row(frame, "cpu")
    assert [row[name] for name in RATIOS] == pytest.approx([0.36, 0.15, 0.12, 0.04, 0.09], rel=1e-12)
    assert only_row(frame, "cpu_core")["usage_ratio"] == pytest.approx(0.36, rel=1e-12)


@pytest.mark.parametrize("column", [3, 4])
def test_time_that_ran_backwards_makes_the_ratios_unknown(tree: Tree, collect: Collect, column: int) -> None:
    # Documentation/filesystems/proc.rst: iowait can decrease; idle has done so on a CPU that came back.
    def write(cycle: int) -> None:
        times = [100 + cycle * 10] * 10
        times[column] = 90 if cycle else 100
        tree({"proc/stat": stat(("cpu ", times), ("cpu0", [1 + cycle] * 10))})

    frame = collect(CpuProbe, root=tree({}), times=(0, 1), before_cycle=write)
    row = only_row(frame, "cpu")
    assert [row[name] for name in RATIOS] == [None] * 5
    assert row[TICKS[column]] == 90 / USER_HZ
    assert only_row(frame, "cpu_core")["usage_ratio"] == pytest.approx(6 / 8)


def sandwich(take: Callable[[], Any], collect: Callable[[], Frame]) -> tuple[Any, Frame, Any]:
    before = take()
    frame = collect()
    return before, frame, take()


def test_times_lie_between_two_of_psutils(collect: Collect) -> None:
    before, frame, after = sandwich(psutil.cpu_times, lambda: collect(CpuProbe))
    row = only_row(frame, "cpu")
    for name, column in zip(TIMES, TICKS, strict=True):
        low, high = sorted((getattr(before, name), getattr(after, name)))
        assert low - 1e-6 <= row[column] <= high + 1e-6, name


def test_times_by_core_lie_between_two_of_psutils(collect: Collect) -> None:
    before, frame, after = sandwich(lambda: psutil.cpu_times(percpu=True), lambda: collect(CpuProbe))
    found = rows(frame, "cpu_core")
    assert len(found) == len(before) == only_row(frame, "cpu")["logical_count"]
    for row, old, new in zip(found, before, after, strict=True):
        for name, column in zip(TIMES, TICKS, strict=True):
            low, high = sorted((getattr(old, name), getattr(new, name)))
            assert low - 1e-6 <= row[column] <= high + 1e-6, name


def test_counts_lie_between_two_of_the_kernels(collect: Collect) -> None:
    def kernel() -> dict[str, int]:
        lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
        return {words[0]: int(words[1]) for words in lines if words[0] in ("ctxt", "intr", "processes")}

    before, frame, after = sandwich(kernel, lambda: collect(CpuProbe))
    row = only_row(frame, "cpu")
    names = {"ctxt": "context_switches_total", "intr": "interrupts_total", "processes": "forks_total"}
    for key, column in names.items():
        assert before[key] <= row[column] <= after[key]
    assert before["ctxt"] > 0


def test_psutil_gives_the_same_table(collect: Collect) -> None:
    before = collect(CpuProbe)
    theirs = collect(PsutilCpuProbe, source="psutil")
    after = collect(CpuProbe)
    old, row, new = (only_row(frame, "cpu") for frame in (before, theirs, after))
    assert row["forks_total"] is None
    assert row["logical_count"] == new["logical_count"]
    for column in (*TICKS, "context_switches_total", "interrupts_total"):
        low, high = sorted((old[column], new[column]))
        assert low <= row[column] <= high, column
    assert [core["core"] for core in rows(theirs, "cpu_core")] == [core["core"] for core in rows(after, "cpu_core")]


@pytest.mark.parametrize("probe", [CpuProbe, PsutilCpuProbe])
def test_without_cores(collect: Collect, probe: Any) -> None:
    frame = collect(probe, source="psutil" if probe is PsutilCpuProbe else "auto", per_core=False)
    assert list(frame.tables) == ["cpu"]


def test_offline_cpus_leave_a_gap(tree: Tree, collect: Collect) -> None:
    online = (0, 2, 3, 17)

    def write(cycle: int) -> None:
        cores = online if cycle < 2 else (0, 1, 2, 3, 17)  # CPU 1 comes up at the third cycle
        lines = [(f"cpu{core}", [core * 1000 + cycle * 10] * 10) for core in cores]
        tree({"proc/stat": stat(("cpu ", [cycle * 100] * 10), *lines)})

    frame = collect(CpuProbe, root=tree({}), times=(0, 1), before_cycle=write)
    assert [row["core"] for row in rows(frame, "cpu_core")] == ["0", "2", "3", "17"]
    assert only_row(frame, "cpu")["logical_count"] == 4
    assert [row["usage_ratio"] for row in rows(frame, "cpu_core")] == pytest.approx([0.75] * 4)

    frame = collect(CpuProbe, root=tree({}), times=(0, 1, 2), before_cycle=write)
    by_core = rows_by(frame, "cpu_core", "core")
    assert list(by_core) == ["0", "1", "2", "3", "17"]
    assert by_core["1"]["usage_ratio"] is None  # it wasn't there
    assert by_core["17"]["usage_ratio"] == pytest.approx(0.75)


def test_256_cpus(tmp_path: Path, collect: Collect) -> None:
    write_large_host(tmp_path)
    frame = collect(
        CpuProbe,
        root=tmp_path,
        times=(0, 10),
        before_cycle=lambda cycle: write_large_host(tmp_path, cycle=cycle),
    )
    lines = (tmp_path / "proc/stat").read_text().splitlines()
    found = rows(frame, "cpu_core")
    assert [row["core"] for row in found] == [str(number) for number in range(256)]
    for row, line in zip(found, lines[1:257], strict=True):
        assert [row[name] for name in TICKS] == [int(word) / USER_HZ for word in line.split()[1:]]
        assert 0 < row["usage_ratio"] < 1
    assert only_row(frame, "cpu")["forks_total"] == 700_040


@pytest.mark.parametrize("width", [4, 8, 9])
def test_old_kernels_know_fewer_times(tree: Tree, collect: Collect, width: int) -> None:
    times = list(range(11, 11 + width))
    frame = collect(CpuProbe, root=tree({"proc/stat": stat(("cpu ", times), ("cpu0", times), ("cpu1", times))}))
    expected = [value / USER_HZ for value in times] + [None] * (10 - width)
    assert [only_row(frame, "cpu")[name] for name in TICKS] == expected
    for row in rows(frame, "cpu_core"):
        assert [row[name] for name in TICKS] == expected


def test_ratios_of_a_kernel_without_guest_nice(tree: Tree, collect: Collect) -> None:
    def write(cycle: int) -> None:
        times = [100 + cycle, 0, 0, 100 + cycle * 3, 0, 0, 0, 0, 0]
        tree({"proc/stat": stat(("cpu ", times), ("cpu0", times))})

    frame = collect(CpuProbe, root=tree({}), times=(0, 1), before_cycle=write)
    assert only_row(frame, "cpu")["usage_ratio"] == 0.25
    assert only_row(frame, "cpu_core")["usage_ratio"] == 0.25


def test_later_kernels_may_know_more_times(tree: Tree, collect: Collect) -> None:
    times = list(range(1, 14))
    frame = collect(CpuProbe, root=tree({"proc/stat": stat(("cpu ", times), ("cpu0", times), ("cpu1", times))}))
    expected = [value / USER_HZ for value in range(1, 11)]
    assert [only_row(frame, "cpu")[name] for name in TICKS] == expected
    assert [[row[name] for name in TICKS] for row in rows(frame, "cpu_core")] == [expected] * 2


def test_the_largest_count_is_exact_and_a_larger_one_unknown(tree: Tree, collect: Collect) -> None:
    largest = 2**64 - 1
    times = [largest, largest + 1, 1, 2, 3, 4, 5, 6, 7, 8]
    frame = collect(CpuProbe, root=tree({"proc/stat": stat(("cpu ", times), ("cpu0", times))}))
    for name in ("cpu", "cpu_core"):
        table = frame.tables[name]
        assert int(table.counters[0, 0]) == largest
        assert table.unknown[0].tolist()[:10] == [False, True] + [False] * 8
        assert rows(frame, name)[0]["nice_seconds_total"] is None


def test_saved_old_host(collect: Collect) -> None:
    root = saved_host("old")
    lines = [line.split() for line in (root / "proc/stat").read_text().splitlines() if line.startswith("cpu")]
    frame = collect(CpuProbe, root=root)
    cells = [[int(word) / USER_HZ for word in words[1:]] + [None] * (11 - len(words)) for words in lines]
    assert [only_row(frame, "cpu")[name] for name in TICKS] == cells[0]
    assert [[row[name] for name in TICKS] for row in rows(frame, "cpu_core")] == cells[1:]


def test_damaged_host(collect: Collect) -> None:
    frame = collect(CpuProbe, root=saved_host("damaged"))
    row = only_row(frame, "cpu")
    assert row["system_seconds_total"] is None
    assert row["user_seconds_total"] == 301854 / USER_HZ
    assert (row["interrupts_total"], row["context_switches_total"], row["forks_total"]) == (None, None, None)
    cores = rows_by(frame, "cpu_core", "core")
    assert list(cores) == ["0", "1", "3"]
    assert cores["0"]["system_seconds_total"] is None
    assert cores["1"]["idle_seconds_total"] is None
    assert cores["3"]["user_seconds_total"] is None
    assert cores["3"]["nice_seconds_total"] == 1 / USER_HZ


@pytest.mark.parametrize("text", [b"", b"\n", b"intr 1\n", b"cpu0 1 2 3 4 5 6 7 8 9 10\n", b"\xff"])
def test_another_file_is_an_error(text: bytes) -> None:
    with pytest.raises(ProbeError, match=r"^stat: "):
        parse_times(text)


def test_a_cpu_twice_is_one_row(tree: Tree, collect: Collect) -> None:
    root = tree({"proc/stat": "cpu  1 2 3 4 5 6 7 8 9\n" + "cpu0 1 1 1 1 1 1 1 1 1\n" * 2 + REST})
    assert len(rows(collect(CpuProbe, root=root), "cpu_core")) == 1


def test_labels_are_one_object_while_the_cpus_are_the_same() -> None:
    labels = CoreLabels()
    first = labels.of(np.array([0, 2], dtype=np.uint64))
    assert first == [("0",), ("2",)]
    assert labels.of(np.array([0, 2], dtype=np.uint64)) is first
    assert labels.of(np.array([0, 3], dtype=np.uint64)) == [("0",), ("3",)]


@pytest.mark.parametrize(
    ("text", "count"),
    [(b"cpu 1\nintr 123 4 5\n", 123), (b"cpu 1\nintr\n", None), (b"cpu 1\n", None), (b"cpu 1\nintr x1 2\n", None)],
)
def test_interrupts(text: bytes, count: int | None) -> None:
    assert parse_interrupts(text) == count


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=6, unique=True),
    st.integers(4, 13),
    st.integers(0, 2**64 - 1),
)
def test_fast_and_careful_parsing_agree(cores: list[int], width: int, top: int) -> None:
    lines = b"".join(
        b"cpu%d %s\n" % (core, b" ".join(b"%d" % ((top + core * index) % 2**64) for index in range(width)))
        for core in sorted(cores)
    )
    text = b"cpu  " + b" ".join([b"1"] * width) + b"\n" + lines + b"intr 1 2\nctxt 3\n"
    _, cells, unknown = parse_times(text)
    careful, careful_unknown = _parse_cores(lines)
    assert np.array_equal(cells, careful)
    assert np.array_equal(careful_unknown if unknown is None else unknown, careful_unknown)
    assert cells[:, 0].tolist() == sorted(cores)
    assert int(cells[0, 1]) == top


_PIECES = st.sampled_from(
    [
        b"cpu",
        b"cpu0",
        b"cpu1",
        b" ",
        b"  ",
        b"\n",
        b"intr",
        b"ctxt 5",
        b"17",
        b"-1",
        b"x",
        b"\0",
        b"9" * 25,
        b"1 2 3 4 5",
    ]
)


@given(st.binary(max_size=200) | st.lists(_PIECES, max_size=60).map(lambda pieces: b"cpu  1 2\n" + b"".join(pieces)))
def test_any_bytes(text: bytes) -> None:
    parse_interrupts(text)
    try:
        total, cells, unknown = parse_times(text)
    except ProbeError:
        return
    assert len(total) == 10
    assert cells.shape[1] == 11
    assert unknown is None or unknown.shape == cells.shape
