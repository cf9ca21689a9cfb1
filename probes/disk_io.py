"""What block devices do: /proc/diskstats, and /sys/block for which of them are disks.

The file's fields: Documentation/admin-guide/iostats.rst. Its milliseconds have 32 bits and
start again at 0 after 50 days of IO time, which costs the rates of one cycle.
"""

from __future__ import annotations

import os
import re

import numpy as np
import numpy.typing as npt

from agent.errors import ProbeError
from agent.frame import Frame
from agent.table import NAN, Labels, Table, TableSpec, counter, gauge, rate, ratio
from probes.probe import DeviceSettings, NameFilter, as_text
from probes.procfs import Host
from probes.rows import Cells, Mask, RowForm, RowReader, Rows

SECTOR_BYTES = 512  # in this file, whatever the device's own sectors are

DISK_IO = TableSpec(
    "disk_io",
    "IO of each block device.",
    counter("reads_total", "reads", "Reads completed."),
    counter("read_bytes_total", "bytes", "Bytes read."),
    counter("reads_merged_total", "reads", "Reads merged with an adjacent one before they were issued."),
    counter("read_seconds_total", "seconds", "Time that reads took, summed over the reads.", per=1000),
    counter("writes_total", "writes", "Writes completed."),
    counter("write_bytes_total", "bytes", "Bytes written."),
    counter("writes_merged_total", "writes", "Writes merged with an adjacent one before they were issued."),
    counter("write_seconds_total", "seconds", "Time that writes took, summed over the writes.", per=1000),
    gauge("in_progress", "requests", "Requests that are being served now."),
    counter("io_seconds_total", "seconds", "Time in which at least one request was being served.", per=1000),
    counter("weighted_io_seconds_total", "seconds", "Time in progress, summed over all requests.", per=1000),
    counter("discards_total", "discards", "Discards completed (Linux 4.18)."),
    counter("discard_bytes_total", "bytes", "Bytes discarded (Linux 4.18)."),
    counter("flushes_total", "flushes", "Flushes completed; not counted for partitions (Linux 5.5)."),
    rate("read_bytes_per_second", "bytes/second", "Bytes read a second.", "read_bytes_total"),
    rate("write_bytes_per_second", "bytes/second", "Bytes written a second.", "write_bytes_total"),
    rate("reads_per_second", "reads/second", "Reads completed a second.", "reads_total"),
    rate("writes_per_second", "writes/second", "Writes completed a second.", "writes_total"),
    rate("utilization_ratio", "ratio", "Share of time with a request being served.", "io_seconds_total"),
    ratio("read_latency_seconds", "seconds", "Mean time of a read.", ["read_seconds_total"], ["reads_total"]),
    ratio("write_latency_seconds", "seconds", "Mean time of a write.", ["write_seconds_total"], ["writes_total"]),
    labels=("device",),
)
IO = TableSpec(
    "io",
    "IO of all whole physical disks together.",
    counter("reads_total", "reads", "Reads completed."),
    counter("read_bytes_total", "bytes", "Bytes read."),
    counter("writes_total", "writes", "Writes completed."),
    counter("write_bytes_total", "bytes", "Bytes written."),
    gauge("in_progress", "requests", "Requests that are being served now."),
    rate("read_bytes_per_second", "bytes/second", "Bytes read a second.", "read_bytes_total"),
    rate("write_bytes_per_second", "bytes/second", "Bytes written a second.", "write_bytes_total"),
    rate("reads_per_second", "reads/second", "Reads completed a second.", "reads_total"),
    rate("writes_per_second", "writes/second", "Writes completed a second.", "writes_total"),
)

# The file's fields: reads, merged, sectors, ms; writes, the same; in progress, ms, weighted ms;
# discards, merged, sectors, ms; flushes, ms. The counters' places among them:
_PLACES = np.array([0, 2, 1, 3, 4, 6, 5, 7, 9, 10, 11, 13, 15])
_SCALES = np.array([1, SECTOR_BYTES, 1, 1, 1, SECTOR_BYTES, 1, 1, 1, 1, 1, SECTOR_BYTES, 1], dtype=np.uint64)
_LARGEST = np.uint64(2**64 - 1) // _SCALES
_LARGEST_SECTORS = int(_LARGEST.min())
_IN_PROGRESS = 8
# Those of the counters that the table `io` has.
_SUMMED = tuple(DISK_IO.counter_index[column.name] for column in IO.counters)


class DiskIoSettings(DeviceSettings, frozen=True, kw_only=True):
    """The devices of the table `disk_io`; `io` sums the host's disks whatever is left out here."""

    exclude: tuple[str, ...] = ("loop*", "ram*", "zram*")


class DiskIoProbe:
    """The `disk_io` and `io` tables from procfs."""

    Settings = DiskIoSettings
    tables = (DISK_IO, IO)

    def __init__(self, settings: DiskIoSettings, host: Host) -> None:
        self._diskstats = host.proc("diskstats", record_bytes=512)  # 17 numbers of up to 20 digits
        self._reader = RowReader(DISKSTATS)
        self._devices = Devices(settings, host)
        self._names: list[bytes] | None = None
        self._rows: Rows | None = None
        self._figures: _Figures

    def collect(self, frame: Frame) -> None:
        text = self._diskstats.read()
        if not text and not os.path.exists(self._diskstats.path):
            raise ProbeError("diskstats: there is no such file")
        rows = self._reader.parse(text)
        if rows.names is not self._names:
            self._names = rows.names
            self._devices.learn([os.fsdecode(name) for name in rows.names], [as_text(name) for name in rows.names])
        if rows is not self._rows:
            self._rows = rows
            self._figures = _figures(rows)
        _fill(frame, self._figures, self._devices)

    def close(self) -> None: ...


class PsutilDiskIoProbe:
    """The same tables from psutil; the system decides which of the figures there are."""

    Settings = DiskIoSettings
    tables = (DISK_IO, IO)

    def __init__(self, settings: DiskIoSettings, host: Host) -> None:
        import psutil

        self._counters = psutil.disk_io_counters
        self._devices = Devices(settings, host)
        self._names: list[str] = []

    def collect(self, frame: Frame) -> None:
        # nowrap=False: psutil would hide that a counter fell by adding up what it had been.
        disks = self._counters(perdisk=True, nowrap=False) or {}
        names = list(disks)
        if names != self._names:
            self._names = names
            self._devices.learn(names, names)
        counters = [_psutil_counters(disk) for disk in disks.values()]
        table = frame.open(DISK_IO)
        count = table.claim(self._devices.labels, self._devices.row_limit)
        for row, place in enumerate(self._devices.kept[:count].tolist()):
            table.put_counters(row, counters[place])
        _put_sums(frame.open(IO), [counters[place] for place in self._devices.whole.tolist()], self._devices)

    def close(self) -> None: ...


class Devices:
    """Which devices of the list have a row, and which are whole physical disks."""

    def __init__(self, settings: DeviceSettings, host: Host) -> None:
        self._filter = NameFilter(settings.include, settings.exclude)
        self._sys_block = os.path.join(host.root, "sys/block")
        self.row_limit = settings.row_limit
        self.labels: list[Labels] = []
        self.kept = np.empty(0, dtype=np.intp)
        self.whole = np.empty(0, dtype=np.intp)
        self.whole_names: list[str] = []
        self.summed: list[str] = []  # the disks of the sum of the last cycle

    def learn(self, names: list[str], shown: list[str]) -> None:
        """Takes another list of devices, by their names in paths and as shown; positions are those in it."""
        kept = [place for place, name in enumerate(shown) if self._filter.keeps(name)]
        whole = whole_disks(names, self._sys_block)
        self.labels = [(shown[place],) for place in kept]
        self.kept = np.array(kept, dtype=np.intp)
        self.whole = np.array(whole, dtype=np.intp)
        self.whole_names = [names[place] for place in whole]


_Figures = tuple[Cells, Mask | None, npt.NDArray[np.float64]]
"""Of all devices: the counters in their stored units, where they are unknown, the requests in progress."""


def _figures(rows: Rows) -> _Figures:
    in_progress = rows.cells[:, _IN_PROGRESS].astype(np.float64)
    if rows.unknown is not None:
        in_progress[rows.unknown[:, _IN_PROGRESS]] = NAN
    return *_counters(rows), in_progress


def _fill(frame: Frame, figures: _Figures, devices: Devices) -> None:
    counters, unknown, in_progress = figures
    table = frame.open(DISK_IO)
    count = table.claim(devices.labels, devices.row_limit)
    kept = devices.kept[:count]
    counters.take(kept, axis=0, out=table.counters[:count])
    table.gauges[:count, 0] = in_progress[kept]
    if unknown is not None:
        table.unknown[:count] = unknown[kept]
        table.complete = not table.unknown[:count].any()

    disks: list[list[int | None]] = counters[devices.whole].tolist()
    if unknown is not None:
        for disk, row in zip(disks, unknown[devices.whole], strict=True):
            for index in np.flatnonzero(row).tolist():
                disk[index] = None
    table = frame.open(IO)
    _put_sums(table, disks, devices)
    table.put_gauges(0, (sum(in_progress[devices.whole].tolist()),))


def _counters(rows: Rows) -> tuple[Cells, Mask | None]:
    """The counters of all devices in their stored units, and where they are unknown."""
    fields = rows.cells.take(_PLACES, axis=1)
    unknown = None if rows.unknown is None else rows.unknown.take(_PLACES, axis=1)
    if fields.max(initial=0) > _LARGEST_SECTORS:
        unknown = (fields > _LARGEST) if unknown is None else unknown | (fields > _LARGEST)
    fields *= _SCALES
    if unknown is not None:
        fields[unknown] = 0
    return fields, unknown


def _put_sums(table: Table, disks: list[list[int | None]], devices: Devices) -> None:
    """The counters summed over the whole disks; a sum with an unknown part is unknown."""
    sums: list[int | None] = []
    for index in _SUMMED:
        values = [disk[index] for disk in disks]
        sums.append(None if None in values else sum(value for value in values if value is not None))
    table.put_counters(0, sums)
    # A disk that comes or goes would look like a burst of IO.
    table.continues = devices.summed == devices.whole_names
    devices.summed = devices.whole_names


def split_diskstats(line: bytes) -> tuple[bytes, int] | None:
    """The name in `   8       0 sda 1 2 3…` and where its numbers start."""
    words = line.split(None, 3)
    if len(words) < 3 or not words[0].isdigit() or not words[1].isdigit() or b"\0" in words[2]:
        return None
    return words[2], len(line) - len(words[3]) if len(words) > 3 else len(line)


# Linux 2.6 has 11 fields, 4.18 has 15, 5.5 has 17; partitions before 2.6.25 have 4 others.
DISKSTATS = RowForm(split_diskstats, fields=17, knows=lambda count: count in (11, 15) or count >= 17)

_VIRTUAL = re.compile(r"(?:loop|z?ram|dm-|md_?|bcache|drbd|nbd|zd|ublkb)\d+(?:p\d+)?|md_.*")
_PARTITION = re.compile(r"(.*\d)p\d+|(.*\D)\d+", re.DOTALL)
_NVME_PATH = re.compile(r"(nvme\d+)c\d+(n\d+)")


def whole_disks(names: list[str], sys_block: str) -> list[int]:
    """Positions of the whole physical disks, none of which is stacked on others in the list.

    sys/block has an entry for each whole device, and in it `device` where a driver
    serves hardware: dm, md, loop, ram and zram have none.
    """
    known = set(names)
    # A multipath NVMe disk is there twice: nvme0n1, which counts nothing before Linux 6.4,
    # and each of its paths, nvme0c1n1.
    heads = {path.expand(r"\1\2") for path in map(_NVME_PATH.fullmatch, names) if path}
    if os.path.isdir(sys_block):
        whole = [os.path.exists(os.path.join(sys_block, name.replace("/", "!"), "device")) for name in names]
    else:
        whole = [not _VIRTUAL.fullmatch(name) and not _is_partition(name, known) for name in names]
    return [place for place, name in enumerate(names) if whole[place] and name not in heads]


def _is_partition(name: str, known: set[str]) -> bool:
    """Whether the disk that the name would be a partition of is there: sda of sda1, nvme0n1 of nvme0n1p1."""
    match = _PARTITION.fullmatch(name)
    return match is not None and (match[1] or match[2]) in known


def _psutil_counters(disk: object) -> list[int | None]:
    """psutil's figures in the order of the counters; milliseconds, as the kernel's."""
    reads = ("read_count", "read_bytes", "read_merged_count", "read_time")
    writes = ("write_count", "write_bytes", "write_merged_count", "write_time")
    return [getattr(disk, name, None) for name in (*reads, *writes, "busy_time")] + [None] * 4
