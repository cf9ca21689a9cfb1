"""Memory, swap and paging: the kernel's, psutil's and free's figures, saved hosts, old kernels, damage."""

from __future__ import annotations

import math
import mmap
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ProbeError
from agent.frame import Frame
from probes.memory import MeminfoParser, MemoryProbe, PsutilMemoryProbe, paging_part
from probes.procfs import PAGE_BYTES, KeyedText
from tests.figures import only_row
from tests.hosts import saved_host

Collect = Callable[..., Frame]
Tree = Callable[[dict[str, str | bytes]], Path]

MEMINFO = {
    "total_bytes": "MemTotal",
    "available_bytes": "MemAvailable",
    "free_bytes": "MemFree",
    "cached_bytes": "Cached",
    "buffers_bytes": "Buffers",
    "shared_bytes": "Shmem",
    "dirty_bytes": "Dirty",
    "writeback_bytes": "Writeback",
    "slab_reclaimable_bytes": "SReclaimable",
    "anonymous_bytes": "AnonPages",
    "committed_bytes": "Committed_AS",
    "commit_limit_bytes": "CommitLimit",
}
TEXT = """\
MemTotal:       1000 kB
MemFree:        300 kB
MemAvailable:   600 kB
Buffers:        11 kB
Cached:         212 kB
SwapCached:     999 kB
SwapTotal:      800 kB
SwapFree:       200 kB
Dirty:          13 kB
Writeback:      14 kB
AnonPages:      15 kB
Mapped:         16 kB
Shmem:          17 kB
SReclaimable:   18 kB
WritebackTmp:   77 kB
CommitLimit:    1900 kB
Committed_AS:   20 kB
HugePages_Total:       5
HugePages_Free:        3
Hugepagesize:       2048 kB
"""
VMSTAT = "nr_free_pages 75\npgpgin 21\npgpgout 22\npswpin 23\npswpout 24\npgalloc_dma 3\npgfault 25\npgmajfault 26\n"


def kernel(root: Path = Path("/")) -> dict[str, int]:
    lines = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * (1024 if words[2:] else 1) for words in lines}


def vmstat(root: Path = Path("/")) -> dict[str, int]:
    return {key: int(value) for key, value in (x.split() for x in (root / "proc/vmstat").read_text().splitlines())}


def test_every_column(tree: Tree, collect: Collect) -> None:
    frame = collect(MemoryProbe, root=tree({"proc/meminfo": TEXT, "proc/vmstat": VMSTAT + "oom_kill 27\nlast 1\n"}))
    assert only_row(frame, "memory") == {
        "total_bytes": 1000 * 1024,
        "available_bytes": 600 * 1024,
        "free_bytes": 300 * 1024,
        "used_bytes": 400 * 1024,
        "cached_bytes": 212 * 1024,
        "buffers_bytes": 11 * 1024,
        "shared_bytes": 17 * 1024,
        "dirty_bytes": 13 * 1024,
        "writeback_bytes": 14 * 1024,
        "slab_reclaimable_bytes": 18 * 1024,
        "anonymous_bytes": 15 * 1024,
        "committed_bytes": 20 * 1024,
        "commit_limit_bytes": 1900 * 1024,
        "used_ratio": 0.4,
        "hugepages_total_bytes": 5 * 2048 * 1024,
        "hugepages_free_bytes": 3 * 2048 * 1024,
    }
    assert only_row(frame, "swap") == {
        "total_bytes": 800 * 1024,
        "free_bytes": 200 * 1024,
        "used_bytes": 600 * 1024,
        "used_ratio": 0.75,
        "in_bytes_total": 23 * PAGE_BYTES,
        "out_bytes_total": 24 * PAGE_BYTES,
    }
    assert only_row(frame, "paging") == {
        "in_bytes_total": 21 * 1024,
        "out_bytes_total": 22 * 1024,
        "faults_total": 25,
        "major_faults_total": 26,
        "oom_kills_total": 27,
    }


def test_memory_is_the_kernels_to_the_digit(collect: Collect) -> None:
    # Most figures move: each must be met exactly in one of some tries whose readings before and after agree on it.
    unseen = set(MEMINFO)
    for _ in range(200):
        before = kernel()
        row = only_row(collect(MemoryProbe), "memory")
        after = kernel()
        steady = {column for column in unseen if before[MEMINFO[column]] == after[MEMINFO[column]]}
        unseen -= {column for column in steady if row[column] == after[MEMINFO[column]]}
        assert row["used_bytes"] == row["total_bytes"] - row["available_bytes"]
        assert row["used_ratio"] == row["used_bytes"] / row["total_bytes"]
        assert row["hugepages_total_bytes"] == after["HugePages_Total"] * after["Hugepagesize"]
        if not unseen:
            break
    assert not unseen


def test_counters_lie_between_two_of_the_kernels(collect: Collect) -> None:
    before = vmstat()
    with mmap.mmap(-1, 8 << 20) as fresh:  # pages that nobody has touched: faults are sure to come
        fresh.write(b"x" * len(fresh))
    frame = collect(MemoryProbe)
    after = vmstat()
    swap, paging = only_row(frame, "swap"), only_row(frame, "paging")
    for value, key, unit in (
        (swap["in_bytes_total"], "pswpin", PAGE_BYTES),
        (swap["out_bytes_total"], "pswpout", PAGE_BYTES),
        (paging["in_bytes_total"], "pgpgin", 1024),
        (paging["out_bytes_total"], "pgpgout", 1024),
        (paging["faults_total"], "pgfault", 1),
        (paging["major_faults_total"], "pgmajfault", 1),
        (paging["oom_kills_total"], "oom_kill", 1),
    ):
        assert before[key] * unit <= value <= after[key] * unit, key
    assert before["pgfault"] < after["pgfault"]


def test_psutil_agrees(collect: Collect) -> None:
    row = only_row(collect(MemoryProbe), "memory")
    swap = only_row(collect(MemoryProbe), "swap")
    theirs, their_swap = psutil.virtual_memory(), psutil.swap_memory()
    assert row["total_bytes"] == theirs.total
    near = pytest.approx  # the host goes on living between two readings
    tolerance = theirs.total * 0.02
    for column in ("available", "free", "buffers", "shared"):
        assert row[f"{column}_bytes"] == near(getattr(theirs, column), abs=tolerance), column
    assert row["cached_bytes"] + row["slab_reclaimable_bytes"] == near(theirs.cached, abs=tolerance)
    assert (swap["total_bytes"], swap["in_bytes_total"]) == (their_swap.total, their_swap.sin)
    assert swap["used_bytes"] == near(their_swap.used, abs=tolerance)


@pytest.mark.skipif(shutil.which("free") is None, reason="procps is not installed")
def test_free_agrees(collect: Collect) -> None:
    lines = subprocess.run(
        ["free", "-b", "-w"], capture_output=True, text=True, check=True, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"}
    ).stdout.splitlines()
    names, memory, swap = lines[0].split(), lines[1].split()[1:], lines[2].split()[1:]
    free = dict(zip(names, map(int, memory), strict=True))
    frame = collect(MemoryProbe)
    row = only_row(frame, "memory")
    tolerance = free["total"] * 0.02
    assert row["total_bytes"] == free["total"]
    for column in ("free", "shared", "buffers", "available"):
        assert row[f"{column}_bytes"] == pytest.approx(free[column], abs=tolerance), column
    assert row["cached_bytes"] + row["slab_reclaimable_bytes"] == pytest.approx(free["cache"], abs=tolerance)
    assert only_row(frame, "swap")["total_bytes"] == int(swap[0])


def test_the_probe_for_psutil(collect: Collect) -> None:
    frame = collect(PsutilMemoryProbe, source="psutil")
    assert list(frame.tables) == ["memory", "swap"]
    row, swap = only_row(frame, "memory"), only_row(frame, "swap")
    theirs, their_swap = psutil.virtual_memory(), psutil.swap_memory()
    assert row["total_bytes"] == theirs.total
    tolerance = theirs.total * 0.02
    for column in ("available", "free", "cached", "buffers", "shared"):
        assert row[f"{column}_bytes"] == pytest.approx(getattr(theirs, column), abs=tolerance), column
    assert row["used_bytes"] == row["total_bytes"] - row["available_bytes"]
    assert row["used_ratio"] == row["used_bytes"] / row["total_bytes"]
    unknown = {name for name, value in row.items() if value is None}
    assert unknown == {
        *("dirty_bytes", "writeback_bytes", "slab_reclaimable_bytes", "anonymous_bytes", "committed_bytes"),
        *("commit_limit_bytes", "hugepages_total_bytes", "hugepages_free_bytes"),
    }
    assert (swap["total_bytes"], swap["in_bytes_total"]) == (their_swap.total, their_swap.sin)
    assert (swap["used_ratio"] is None) == (their_swap.total == 0)


def test_kernel_without_available_memory(collect: Collect) -> None:
    root = saved_host("old")
    frame = collect(MemoryProbe, root=root)
    row, swap, saved = only_row(frame, "memory"), only_row(frame, "swap"), kernel(root)
    assert (row["available_bytes"], row["used_bytes"], row["used_ratio"]) == (None, None, None)
    for column in MEMINFO.keys() - {"available_bytes"}:
        assert row[column] == saved[MEMINFO[column]], column
    assert swap["used_bytes"] == saved["SwapTotal"] - saved["SwapFree"]
    assert swap["used_ratio"] == (saved["SwapTotal"] - saved["SwapFree"]) / saved["SwapTotal"]
    events, paging = vmstat(root), only_row(frame, "paging")
    assert paging["faults_total"] == events["pgfault"]
    assert paging["oom_kills_total"] == events.get("oom_kill")


def test_without_swap_the_ratio_is_unknown(tree: Tree, collect: Collect) -> None:
    text = TEXT.replace("800 kB", "0 kB").replace("SwapFree:       200", "SwapFree:       0")
    swap = only_row(collect(MemoryProbe, root=tree({"proc/meminfo": text, "proc/vmstat": VMSTAT})), "swap")
    assert [swap["total_bytes"], swap["used_bytes"], swap["used_ratio"]] == [0, 0, None]


def test_without_memory_the_ratio_is_unknown(tree: Tree, collect: Collect) -> None:
    root = tree({"proc/meminfo": "MemTotal: 0 kB\nMemAvailable: 0 kB\n"})
    row = only_row(collect(MemoryProbe, root=root), "memory")
    assert [row["used_bytes"], row["used_ratio"]] == [0, None]


def test_more_available_than_there_is(tree: Tree, collect: Collect) -> None:
    root = tree({"proc/meminfo": "MemTotal: 5 kB\nMemAvailable: 6 kB\n"})
    row = only_row(collect(MemoryProbe, root=root), "memory")
    assert [row["available_bytes"], row["used_bytes"], row["used_ratio"]] == [6 * 1024, None, None]


@pytest.mark.parametrize("text", ["", "nr_free_pages 7\n", "pgpgin\n", "\xff\0"])
def test_vmstat_without_figures(tree: Tree, collect: Collect, text: str) -> None:
    frame = collect(MemoryProbe, root=tree({"proc/meminfo": TEXT, "proc/vmstat": text}))
    assert set(only_row(frame, "paging").values()) == {None}
    assert only_row(frame, "swap")["in_bytes_total"] is None
    assert only_row(frame, "swap")["total_bytes"] == 800 * 1024


def test_key_that_comes_later(tree: Tree, collect: Collect) -> None:
    def write(cycle: int) -> None:
        tree({"proc/meminfo": TEXT, "proc/vmstat": VMSTAT + ("oom_kill 9\n" if cycle else "")})

    frame = collect(MemoryProbe, root=tree({}), times=(0, 1), before_cycle=write)
    assert only_row(frame, "paging")["oom_kills_total"] == 9


def test_counters_too_large_are_unknown_not_wrong(tree: Tree, collect: Collect) -> None:
    text = VMSTAT.replace("pswpin 23", f"pswpin {2**64 - 1}").replace("pgfault 25", f"pgfault {2**64 - 1}")
    frame = collect(MemoryProbe, root=tree({"proc/meminfo": TEXT, "proc/vmstat": text}))
    assert only_row(frame, "swap")["in_bytes_total"] is None
    assert only_row(frame, "swap")["out_bytes_total"] == 24 * PAGE_BYTES
    assert only_row(frame, "paging")["faults_total"] == 2**64 - 1


def test_damaged_host(collect: Collect) -> None:
    frame = collect(MemoryProbe, root=saved_host("damaged"))
    row, swap, paging = only_row(frame, "memory"), only_row(frame, "swap"), only_row(frame, "paging")
    assert row["total_bytes"] == 3848656 * 1024
    assert [row["free_bytes"], row["available_bytes"], row["buffers_bytes"]] == [None] * 3
    assert row["cached_bytes"] == 2310192 * 1024
    assert [swap["total_bytes"], swap["free_bytes"], swap["used_bytes"], swap["used_ratio"]] == [None] * 4
    assert [swap["in_bytes_total"], swap["out_bytes_total"]] == [None] * 2
    assert [paging["in_bytes_total"], paging["faults_total"]] == [None, 190424613]


@pytest.mark.parametrize("text", [b"", b"\n", b"Active: 5 kB\n", b"\xff\xfe"])
def test_meminfo_without_figures_is_an_error(text: bytes) -> None:
    with pytest.raises(ProbeError, match=r"^meminfo: "):
        MeminfoParser().parse(text)


def test_paging_part_starts_at_pgpgin() -> None:
    assert paging_part(VMSTAT.encode()).startswith(b"pgpgin 21\n")
    assert paging_part(b"pgfault 1\n") == b"pgfault 1\n"


_PIECES = st.sampled_from(
    [*TEXT.encode().split(), b"\n", b" ", b"\0", b"-1", b"9" * 20, b"9" * 400, b"9" * 5000, b"\xff", b"MemTotal: "]
)
_DAMAGED = st.lists(_PIECES, max_size=80).map(b" ".join) | st.binary(max_size=100)


@given(st.lists(_DAMAGED, min_size=1, max_size=4))
def test_any_bytes(texts: list[bytes]) -> None:
    parser = MeminfoParser()  # it learns from each text what it expects of the next one
    for text in texts:
        try:
            memory, swap = parser.parse(text)
        except ProbeError:
            continue
        assert (len(memory), len(swap)) == (16, 4)
        assert all(math.isnan(value) or 0 <= value < 1e45 for value in memory + swap)
        ratios = [value for value in (memory[-1], swap[-1]) if not math.isnan(value)]
        assert all(ratio <= 1 for ratio in ratios)


@given(st.integers(0, len(TEXT)), st.integers(0, len(TEXT)), st.binary(max_size=5))
def test_a_damaged_spot_harms_no_figure_before_it(start: int, length: int, damage: bytes) -> None:
    text = TEXT.encode()
    damaged = text[:start] + damage + text[start + length :]
    picked = KeyedText(b"MemTotal:", b"Cached:").pick(damaged)
    assert picked[0] == 1000 or start <= text.index(b"\n")  # cut before its end
    assert picked[1] == 212 or start <= text.index(b"SwapCached")
