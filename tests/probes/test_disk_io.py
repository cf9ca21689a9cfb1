"""Block devices: the kernel's and psutil's figures, saved hosts, damage, rates, and which devices are disks."""

from __future__ import annotations

import math
import os
import sys
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
from agent.table import Table
from probes.disk_io import DISK_IO, DISKSTATS, IO, DiskIoProbe, DiskIoSettings, PsutilDiskIoProbe, whole_disks
from probes.procfs import Host
from probes.rows import RowReader, parse_rows
from tests.hosts import disk_names, saved_host, write_large_host

SECOND = 1_000_000_000
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads this machine's /proc")


class Cycles:
    """A probe and its frame; each call collects one cycle, `seconds` after the one before."""

    def __init__(self, probe: DiskIoProbe | PsutilDiskIoProbe) -> None:
        self.probe = probe
        self.frame = Frame((DISK_IO, IO))
        self.now_ns = SECOND

    def __call__(self, seconds: float = 10.0) -> dict[str, dict[str, Any]]:
        self.now_ns += int(seconds * SECOND)
        self.frame.begin(self.now_ns, self.now_ns)
        self.probe.collect(self.frame)
        self.frame.derive()
        return {"io": shown(self.frame.tables["io"])[0]} | {
            row.pop("device"): row for row in shown(self.frame.tables["disk_io"])
        }


def shown(table: Table) -> list[dict[str, Any]]:
    """The rows of a table as a reader of the output sees them; None is unknown."""
    rows = []
    for row in range(table.count):
        values: dict[str, Any] = {}
        if table.spec.labels:
            values = dict(zip(table.spec.labels, table.labels[row], strict=True))
        for column in table.spec.columns:
            if column.name in table.spec.counter_index:
                index = table.spec.counter_index[column.name]
                count = int(table.counters[row, index])
                known = not table.unknown[row, index]
                values[column.name] = (count if column.per == 1 else count / column.per) if known else None
            else:
                value = float(table.gauges[row, table.spec.gauge_index[column.name]])
                values[column.name] = None if math.isnan(value) else value
        rows.append(values)
    return rows


def line(name: str, *numbers: int, minor: int = 0) -> str:
    return f"   8 {minor:7d} {name} {' '.join(map(str, numbers))}\n"


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., DiskIoProbe]:
    """Writes diskstats (and at the first call what a Host needs) below tmp_path; gives a probe on it."""

    def write(text: str, **settings: Any) -> DiskIoProbe:
        (tmp_path / "proc").mkdir(exist_ok=True)
        (tmp_path / "proc/stat").write_text("cpu 1\n")
        (tmp_path / "proc/diskstats").write_text(text)
        return DiskIoProbe(DiskIoSettings(**settings), Host(root=str(tmp_path)))

    return write


def numbers(start: int) -> list[int]:
    return list(range(start, start + 17))


def test_every_column_of_a_line(tree: Callable[..., DiskIoProbe]) -> None:
    row = Cycles(tree(line("sda", *range(101, 118))))()["sda"]
    assert list(row.values())[:14] == [
        *(101, 103 * 512, 102, 0.104),
        *(105, 107 * 512, 106, 0.108),
        *(109.0, 0.110, 0.111),
        *(112, 114 * 512, 116),
    ]
    assert list(row.values())[14:] == [None] * 7


def test_rates_are_exact_for_two_cycles(tree: Callable[..., DiskIoProbe], tmp_path: Path) -> None:
    cycles = Cycles(tree(line("sda", 100, 0, 1000, 500, 200, 0, 2000, 900, 0, 3000, 0)))
    assert cycles()["sda"]["reads_per_second"] is None
    tree(line("sda", 150, 0, 1200, 700, 200, 0, 2400, 950, 0, 8000, 0))
    after = cycles(10)
    assert {name: value for name, value in after["sda"].items() if name in list(after["sda"])[14:]} == {
        "read_bytes_per_second": 200 * 512 / 10,
        "write_bytes_per_second": 400 * 512 / 10,
        "reads_per_second": 5.0,
        "writes_per_second": 0.0,
        "utilization_ratio": 0.5,
        "read_latency_seconds": pytest.approx(0.2 / 50, rel=1e-12),
        "write_latency_seconds": None,  # no write was completed
    }
    assert after["io"]["read_bytes_per_second"] == 200 * 512 / 10
    assert after["io"]["reads_per_second"] == 5.0


def test_utilization_never_exceeds_one(tree: Callable[..., DiskIoProbe]) -> None:
    cycles = Cycles(tree(line("sda", *[0] * 17)))
    cycles()
    tree(line("sda", *[0] * 9, 10_007, *[0] * 7))
    assert cycles(10)["sda"]["utilization_ratio"] == 1.0


def test_a_counter_that_fell_gives_null_once(tree: Callable[..., DiskIoProbe]) -> None:
    seen = []
    cycles = Cycles(tree(line("sda", *numbers(1000))))
    for start in (1000, 500, 510):
        tree(line("sda", *numbers(start)))
        seen.append(cycles()["sda"])
    assert seen[1]["reads_total"] == 500
    assert all(value is None for value in list(seen[1].values())[14:])
    assert seen[2]["reads_per_second"] == 1.0


def test_devices_appear_vanish_and_change_places(tree: Callable[..., DiskIoProbe]) -> None:
    def text(**starts: int) -> str:
        return "".join(line(name, *numbers(start)) for name, start in starts.items())

    cycles = Cycles(tree(text(sda=100, sdb=2000)))
    cycles()
    tree(text(sdb=2010, sda=120))
    swapped = cycles()
    assert (swapped["sda"]["reads_per_second"], swapped["sdb"]["reads_per_second"]) == (2.0, 1.0)
    tree(text(sdb=2020, sda=140, sdc=7_000_000))
    added = cycles()
    assert added["sdc"]["reads_total"] == 7_000_000
    assert added["sdc"]["reads_per_second"] is None
    assert added["sda"]["reads_per_second"] == 2.0
    assert added["io"]["reads_total"] == 2020 + 140 + 7_000_000
    assert added["io"]["reads_per_second"] is None  # what a new disk had counted is no burst
    tree(text(sdb=2030, sdc=7_000_010))
    gone = cycles()
    assert set(gone) == {"io", "sdb", "sdc"}
    assert gone["io"]["reads_per_second"] is None
    tree(text(sdb=2040, sdc=7_000_020))
    assert cycles()["io"]["reads_per_second"] == 2.0


def test_settings_choose_rows_but_not_the_sum(tree: Callable[..., DiskIoProbe]) -> None:
    text = "".join(
        line(name, *numbers(start)) for name, start in zip(("sda", "sdb", "sdc", "loop0"), (1, 2, 4, 8), strict=True)
    )
    rows = Cycles(tree(text, include=("sd*",), exclude=("sdb",)))()
    assert set(rows) == {"io", "sda", "sdc"}
    assert [rows[name]["reads_total"] for name in ("sda", "sdc", "io")] == [1, 4, 1 + 2 + 4]
    assert set(Cycles(tree(text))()) == {"io", "sda", "sdb", "sdc"}
    limited = Cycles(tree(text, exclude=(), row_limit=3))
    assert set(limited()) == {"io", "sda", "sdb", "sdc"}
    assert limited.frame.tables["disk_io"].dropped == 1


@pytest.mark.parametrize(("width", "unknown"), [(11, 3), (15, 1), (17, 0), (20, 0), (4, 13), (12, 13), (16, 13)])
def test_kernels_of_all_ages(width: int, unknown: int) -> None:
    reader = RowReader(DISKSTATS)
    text = "".join(line(name, *range(1, width + 1)) for name in ("sda", "sda1")).encode()
    for _ in range(2):  # learned line by line, then parsed at once
        rows = reader.parse(text)
        counters = [0, 2, 1, 3, 4, 6, 5, 7, 9, 10, 11, 13, 15]
        known = np.ones((2, 13), dtype=bool) if rows.unknown is None else ~rows.unknown[:, counters]
        assert (~known).sum(axis=1).tolist() == [unknown, unknown]
        assert rows.cells[:, counters][known].tolist() == [place + 1 for place in counters][: 13 - unknown] * 2


def test_the_old_host() -> None:
    rows = Cycles(DiskIoProbe(DiskIoSettings(), Host(root=str(saved_host("old")))))()
    assert set(rows) == {"io", "sda", "sda1", "sda2", "sr0", "dm-0", "dm-1"}
    assert rows["sda"]["read_bytes_total"] == 5718692 * 512
    assert rows["sda"]["discards_total"] is None
    assert rows["sda"]["in_progress"] == 1
    # Only sda and sr0: neither the partitions nor the dm devices on them.
    assert (rows["io"]["reads_total"], rows["io"]["write_bytes_total"]) == (116378, 28652680 * 512)


def test_the_damaged_host() -> None:
    rows = Cycles(DiskIoProbe(DiskIoSettings(), Host(root=str(saved_host("damaged")))))()
    assert set(rows) == {"io", "sda", "sdb", "sdc", "sdd", "sd\\xff\\xe9", "sdh"}
    assert rows["sda"]["reads_total"] == 116378
    assert rows["sdb"]["reads_total"] is None
    assert rows["sdb"]["read_bytes_total"] is None
    assert rows["sdb"]["reads_merged_total"] == 20386
    assert set(rows["sdc"].values()) == {None}  # a line cut short: its last number may be cut too
    assert rows["sdd"]["read_bytes_total"] is None  # would be above 2^64
    assert rows["sdd"]["writes_total"] is None
    assert rows["sdd"]["reads_total"] == 116378
    assert set(rows["sdh"].values()) == {None}
    assert rows["io"]["reads_total"] is None  # sdb's are not known
    assert rows["io"]["writes_total"] == 2 * 459391


def test_the_large_host(tmp_path: Path) -> None:
    write_large_host(tmp_path, cpus=2, interfaces=1)
    cycles = Cycles(DiskIoProbe(DiskIoSettings(row_limit=100), Host(root=str(tmp_path))))
    first = cycles()
    assert set(first) == {"io", "dm-0", *disk_names(64)}
    assert first["io"]["reads_total"] == sum(first[name]["reads_total"] for name in disk_names(64))
    write_large_host(tmp_path, cpus=2, interfaces=1, cycle=3)
    second = cycles(10)
    for index, name in enumerate(disk_names(64)):
        assert second[name]["read_bytes_per_second"] == 3 * (index % 5 + 1) * 6400 * 512 / 10
        assert second[name]["write_latency_seconds"] == pytest.approx(0.002)
    assert second["io"]["writes_per_second"] == pytest.approx(
        sum(second[name]["writes_per_second"] for name in disk_names(64))
    )


def test_no_file_is_an_error_and_no_disk_is_none(tree: Callable[..., DiskIoProbe], tmp_path: Path) -> None:
    probe = tree("")
    assert set(Cycles(probe)()) == {"io"}
    (tmp_path / "proc/diskstats").unlink()
    with pytest.raises(ProbeError, match="diskstats"):
        Cycles(DiskIoProbe(DiskIoSettings(), Host(root=str(tmp_path))))()


def test_whole_disks_by_sys(tmp_path: Path) -> None:
    names = ["sda", "sda1", "dm-0", "md127", "nvme0n1", "nvme0n1p1", "loop0", "cciss/c0d0", "cciss/c0d0p1", "zram0"]
    for name in ("sda", "nvme0n1", "cciss!c0d0"):
        (tmp_path / name / "device").mkdir(parents=True)
    (tmp_path / "sda/sda1").mkdir()
    for name in ("dm-0", "md127", "loop0", "zram0"):
        (tmp_path / name).mkdir()
    assert [names[place] for place in whole_disks(names, str(tmp_path))] == ["sda", "nvme0n1", "cciss/c0d0"]
    # The paths of a multipath disk and the disk above them: each byte once.
    paths = ["nvme1n1", "nvme1c0n1", "nvme1c1n1"]
    for name in paths:
        (tmp_path / name / "device").mkdir(parents=True)
    assert [paths[place] for place in whole_disks(paths, str(tmp_path))] == ["nvme1c0n1", "nvme1c1n1"]


def test_whole_disks_by_name(tmp_path: Path) -> None:
    whole = ["sda", "nvme0n1", "mmcblk0", "mmcblk0boot0", "sr0", "xvdf1", "cciss/c0d0", "PhysicalDrive1", "disk0"]
    others = ["sda1", "nvme0n1p2", "mmcblk0p1", "cciss/c0d0p3", "dm-0", "md127", "md_d0", "md127p1", "loop0", "loop0p1"]
    others += ["ram0", "zram0", "nbd0", "bcache0"]
    names = [name for pair in zip(whole, others[: len(whole)], strict=True) for name in pair] + others[len(whole) :]
    assert [names[place] for place in whole_disks(names, str(tmp_path / "block"))] == whole


TEXT = "".join(line(name, *numbers(start)) for name, start in (("sda", 8), ("sda1", 95), ("nvme0n1", 10**12))).encode()


@given(st.binary(max_size=300))
def test_any_bytes_are_parsed(text: bytes) -> None:
    rows = parse_rows(text, DISKSTATS)
    assert rows.cells.shape == (len(rows.names), 17)


@given(
    st.integers(0, len(TEXT) - 1),
    st.integers(0, 5),
    st.one_of(st.binary(max_size=6), st.sampled_from([b"\n", b" ", b"7", b"-", b"18446744073709551615", b"\0"])),
)
def test_the_fast_way_finds_what_the_slow_one_finds(start: int, length: int, put: bytes) -> None:
    damaged = TEXT[:start] + put + TEXT[start + length :]
    reader = RowReader(DISKSTATS)
    names = reader.parse(TEXT).names
    assert reader.parse(TEXT).names is names
    fast, slow = reader.parse(damaged), parse_rows(damaged, DISKSTATS)
    assert fast.names == slow.names
    assert (fast.names is names) == (slow.names == names)
    assert np.array_equal(fast.cells, slow.cells)
    assert (fast.unknown is None) == (slow.unknown is None)
    if fast.unknown is not None and slow.unknown is not None:
        assert np.array_equal(fast.unknown, slow.unknown)


NO_DIGITS = [byte for byte in range(256) if not bytes([byte]).isspace() and not bytes([byte]).isdigit()]


@given(st.integers(0, len(TEXT) - 1), st.sampled_from(NO_DIGITS))
def test_a_damaged_byte_gives_no_wrong_number(place: int, byte: int) -> None:
    damaged = TEXT[:place] + bytes([byte]) + TEXT[place + 1 :]
    whole, rows = parse_rows(TEXT, DISKSTATS), parse_rows(damaged, DISKSTATS)
    for row, name in enumerate(rows.names):
        if name in whole.names:
            known = np.ones(17, dtype=bool) if rows.unknown is None else ~rows.unknown[row]
            assert np.array_equal(rows.cells[row][known], whole.cells[whole.names.index(name)][known])


def test_a_line_too_long_and_one_too_short_do_not_make_up_for_each_other() -> None:
    reader = RowReader(DISKSTATS)
    reader.parse(TEXT)
    first, second, third = TEXT.splitlines(keepends=True)
    moved = first.rsplit(b" ", 1)[0] + b"\n" + second[:-1] + b" 5\n" + third
    rows = reader.parse(moved)
    assert rows.unknown is not None
    assert rows.unknown.all(axis=1).tolist() == [True, False, False]


@linux
@pytest.mark.parametrize("probe", [DiskIoProbe, PsutilDiskIoProbe])
def test_this_host_as_psutil_and_the_kernel_see_it(probe: type[DiskIoProbe] | type[PsutilDiskIoProbe]) -> None:
    if not os.path.exists("/proc/diskstats") or not psutil.disk_io_counters(perdisk=True):
        pytest.skip("this machine has no block devices")
    cycles = Cycles(probe(DiskIoSettings(exclude=(), row_limit=1000), Host()))
    before, kernel_before = psutil.disk_io_counters(perdisk=True, nowrap=False), kernel_figures()
    rows = cycles()
    after, kernel_after = psutil.disk_io_counters(perdisk=True, nowrap=False), kernel_figures()
    rows.pop("io")
    assert list(rows) == list(before) == list(kernel_before)
    pairs = {
        "reads_total": "read_count", "read_bytes_total": "read_bytes", "reads_merged_total": "read_merged_count",
        "writes_total": "write_count", "write_bytes_total": "write_bytes", "writes_merged_total": "write_merged_count",
    }  # fmt: skip
    milliseconds = {
        "read_seconds_total": "read_time", "write_seconds_total": "write_time", "io_seconds_total": "busy_time",
    }  # fmt: skip
    for name, row in rows.items():
        for ours, theirs in pairs.items():
            assert getattr(before[name], theirs) <= row[ours] <= getattr(after[name], theirs)
        for ours, theirs in milliseconds.items():
            assert getattr(before[name], theirs) <= round(row[ours] * 1000) <= getattr(after[name], theirs)
        if probe is DiskIoProbe and len(kernel_before[name]) >= 17:
            low, high = kernel_before[name], kernel_after[name]
            values = (round(row["weighted_io_seconds_total"] * 1000), row["discards_total"], row["flushes_total"])
            for value, place in zip(values, (10, 11, 15), strict=True):
                assert low[place] <= value <= high[place]
            assert low[13] * 512 <= row["discard_bytes_total"] <= high[13] * 512
        if probe is PsutilDiskIoProbe:
            assert [row["weighted_io_seconds_total"], row["discards_total"], row["in_progress"]] == [None] * 3


@linux
def test_the_sum_of_this_host_is_that_of_its_disks() -> None:
    if not os.path.isdir("/sys/block"):
        pytest.skip("this machine has no /sys/block")
    disks = [name for name in os.listdir("/sys/block") if os.path.exists(f"/sys/block/{name}/device")]
    before = kernel_figures()
    row = Cycles(DiskIoProbe(DiskIoSettings(include=("nothing",)), Host()))()["io"]
    after = kernel_figures()
    for name, place, scale in (
        ("reads_total", 0, 1), ("read_bytes_total", 2, 512), ("writes_total", 4, 1), ("write_bytes_total", 6, 512),
    ):  # fmt: skip
        low, high = (sum(figures[disk][place] * scale for disk in disks) for figures in (before, after))
        assert low <= row[name] <= high


def kernel_figures() -> dict[str, list[int]]:
    lines = Path("/proc/diskstats").read_text().splitlines()
    return {line.split()[2]: list(map(int, line.split()[3:])) for line in lines}
