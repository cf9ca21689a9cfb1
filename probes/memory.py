"""Memory, swap and paging: /proc/meminfo and /proc/vmstat.

The fields: proc_meminfo(5), Documentation/filesystems/proc.rst; vmstat's names: mm/vmstat.c.
"""

from __future__ import annotations

from agent.errors import ProbeError
from agent.frame import Frame
from agent.table import COUNTER_MAX, NAN, Priority, TableSpec, counter, gauge
from probes.probe import ProbeSettings
from probes.procfs import ONE_RECORD, PAGE_BYTES, Host, KeyedText

_KIB = 1024
_VMSTAT_LINE_BYTES = 64

MEMORY = TableSpec(
    "memory",
    "Physical memory.",
    gauge("total_bytes", "bytes", "Memory that the kernel manages."),
    gauge("available_bytes", "bytes", "Memory that programs can get without swapping (Linux 3.14)."),
    gauge("free_bytes", "bytes", "Memory that nothing uses."),
    gauge("used_bytes", "bytes", "Total less available."),
    gauge("cached_bytes", "bytes", "Page cache, tmpfs and shared memory included."),
    gauge("buffers_bytes", "bytes", "Cache of block devices."),
    gauge("shared_bytes", "bytes", "tmpfs and shared memory."),
    gauge("dirty_bytes", "bytes", "Page cache that waits to be written back."),
    gauge("writeback_bytes", "bytes", "Page cache that is being written back."),
    gauge("slab_reclaimable_bytes", "bytes", "Kernel caches that can be given up."),
    gauge("anonymous_bytes", "bytes", "Memory of programs that no file stands behind."),
    gauge("committed_bytes", "bytes", "Memory that programs have been promised."),
    gauge("commit_limit_bytes", "bytes", "What can be promised where overcommitting is forbidden."),
    gauge("used_ratio", "ratio", "Used memory divided by all memory.", derived=True),
    gauge("hugepages_total_bytes", "bytes", "The pool of huge pages of the default size."),
    gauge("hugepages_free_bytes", "bytes", "Huge pages of the pool that are not in use."),
    priority=Priority.HIGH,
)
SWAP = TableSpec(
    "swap",
    "Swap space.",
    gauge("total_bytes", "bytes", "Swap space in all."),
    gauge("free_bytes", "bytes", "Swap space that is not in use."),
    gauge("used_bytes", "bytes", "Total less free."),
    gauge("used_ratio", "ratio", "Used swap divided by all swap; unknown where there is none.", derived=True),
    counter("in_bytes_total", "bytes", "Memory read back from swap."),
    counter("out_bytes_total", "bytes", "Memory written to swap."),
    priority=Priority.HIGH,
)
PAGING = TableSpec(
    "paging",
    "Page faults, and the page traffic to and from block devices.",
    counter("in_bytes_total", "bytes", "Bytes read from block devices."),
    counter("out_bytes_total", "bytes", "Bytes written to block devices."),
    counter("faults_total", "faults", "Page faults, minor ones included."),
    counter("major_faults_total", "faults", "Page faults that had to wait for IO."),
    counter("oom_kills_total", "processes", "Processes killed for lack of memory (Linux 4.13)."),
    priority=Priority.HIGH,
)

# In the order of the columns, `used` and `used_ratio` left out.
_MEMORY_KEYS = (
    *(b"MemTotal:", b"MemAvailable:", b"MemFree:", b"Cached:", b"Buffers:", b"Shmem:", b"Dirty:", b"Writeback:"),
    *(b"SReclaimable:", b"AnonPages:", b"Committed_AS:", b"CommitLimit:"),
)
_SWAP_KEYS = (b"SwapTotal:", b"SwapFree:")
_HUGE_PAGE_KEYS = (b"HugePages_Total:", b"HugePages_Free:", b"Hugepagesize:")
_VMSTAT_KEYS = (b"pgpgin", b"pgpgout", b"pswpin", b"pswpout", b"pgfault", b"pgmajfault", b"oom_kill")


class MemorySettings(ProbeSettings, frozen=True, kw_only=True):
    """`paging = false` leaves out the `paging` table."""

    paging: bool = True


class MemoryProbe:
    """The `memory`, `swap` and `paging` tables from procfs."""

    Settings = MemorySettings
    tables = (MEMORY, SWAP, PAGING)

    def __init__(self, settings: MemorySettings, host: Host) -> None:
        self._paging = settings.paging
        self._meminfo = host.proc("meminfo", ONE_RECORD)
        self._vmstat = host.proc("vmstat", _VMSTAT_LINE_BYTES)
        self._sizes = MeminfoParser()
        self._events = KeyedText(*_VMSTAT_KEYS)

    def collect(self, frame: Frame) -> None:
        memory, swap = self._sizes.parse(self._meminfo.read())
        pages = self._events.pick(paging_part(self._vmstat.read()))
        read_kib, written_kib, swapped_in, swapped_out, faults, major_faults, oom_kills = pages
        frame.open(MEMORY).put_gauges(0, memory)
        table = frame.open(SWAP)
        table.put_gauges(0, swap)
        table.put_counters(0, [_times(swapped_in, PAGE_BYTES), _times(swapped_out, PAGE_BYTES)])
        if self._paging:
            table = frame.open(PAGING)
            table.put_counters(0, [_times(read_kib, _KIB), _times(written_kib, _KIB), faults, major_faults, oom_kills])

    def close(self) -> None: ...


class PsutilMemoryProbe:
    """The `memory` and `swap` tables from psutil, with what this system tells; `paging` it doesn't know.

    On Linux its cached memory includes the reclaimable slab, as in free(1).
    """

    Settings = MemorySettings
    tables = (MEMORY, SWAP, PAGING)

    def __init__(self, settings: MemorySettings, host: Host) -> None:
        import psutil

        self._psutil = psutil

    def collect(self, frame: Frame) -> None:
        memory = self._psutil.virtual_memory()
        swap = self._psutil.swap_memory()
        total, available = memory.total, memory.available
        told = [float(getattr(memory, name, NAN)) for name in ("free", "cached", "buffers", "shared")]
        row = [total, available, told[0], total - available, *told[1:], *[NAN] * 9]
        row[MEMORY.gauge_index["used_ratio"]] = (total - available) / total if total else NAN
        frame.open(MEMORY).put_gauges(0, row)
        table = frame.open(SWAP)
        used_ratio = swap.used / swap.total if swap.total else NAN
        table.put_gauges(0, (swap.total, swap.free, swap.used, used_ratio))
        # Windows has no such counts, and psutil says 0 for them.
        table.put_counters(0, [None, None] if self._psutil.WINDOWS else [swap.sin, swap.sout])

    def close(self) -> None: ...


class MeminfoParser:
    """The gauges of `memory` and `swap` from the text of /proc/meminfo."""

    def __init__(self) -> None:
        self._text = KeyedText(*_MEMORY_KEYS, *_SWAP_KEYS, *_HUGE_PAGE_KEYS)

    def parse(self, text: bytes) -> tuple[list[float], list[float]]:
        """Both tables' gauges in stored order, NaN for each that the text doesn't tell.

        Raises:
            ProbeError: it tells none of them.
        """
        picked = self._text.pick(text)
        if picked.count(None) == len(picked):
            raise ProbeError(f"meminfo: {text[:60]!r} has no figure that is known")
        sizes = [NAN if kib is None or kib > COUNTER_MAX else float(kib * _KIB) for kib in picked]
        total, available, *others, swap_total, swap_free, pages, free_pages, page_bytes = sizes
        pages, free_pages = pages / _KIB, free_pages / _KIB  # counts, not kB
        used = _less(total, available)
        swap_used = _less(swap_total, swap_free)
        memory = [total, available, others[0], used, *others[1:], pages * page_bytes, free_pages * page_bytes]
        memory.append(used / total if total else NAN)
        return memory, [swap_total, swap_free, swap_used, swap_used / swap_total if swap_total else NAN]


def paging_part(text: bytes) -> bytes:
    """/proc/vmstat from its `pgpgin` line on: what follows the many lines that count pages by their state."""
    start = text.find(b"\npgpgin ")
    return text[start + 1 :] if start >= 0 else text


def _less(total: float, rest: float) -> float:
    """NaN where the rest is more than there is: kernels compute both apart, and damage anything."""
    return NAN if rest > total else total - rest


def _times(count: int | None, unit: int) -> int | None:
    return None if count is None else count * unit
