"""CPU time, in all and by core, and what the scheduler counts: /proc/stat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from agent.errors import ProbeError
from agent.frame import Frame
from agent.table import COUNTER_MAX, Column, Labels, Priority, TableSpec, counter, gauge, ratio
from probes.probe import ProbeSettings
from probes.procfs import ONE_RECORD, USER_HZ, Host, KeyedText, integers, scheduler_part

# proc_stat(5); guest time is part of user, and guest_nice of nice.
_TIMES = {
    "user": "in user mode, guests included",
    "nice": "in user mode at low priority",
    "system": "in the kernel",
    "idle": "idle",
    "iowait": "idle while IO was pending",
    "irq": "serving interrupts",
    "softirq": "serving soft interrupts",
    "steal": "taken by the hypervisor for others",
    "guest": "running guests",
    "guest_nice": "running guests at low priority",
}
_ALL = tuple(f"{name}_seconds_total" for name in list(_TIMES)[:8])


def _times_total(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_seconds_total" for name in names)


_RATIOS: tuple[Column, ...] = (
    ratio(
        "usage_ratio",
        "ratio",
        "Share of CPU time that was not idle or waiting for IO.",
        over=_times_total("user", "nice", "system", "irq", "softirq", "steal"),
        by=_ALL,
    ),
    ratio("user_ratio", "ratio", "Share in user mode, niced included.", _times_total("user", "nice"), _ALL),
    ratio(
        "system_ratio",
        "ratio",
        "Share in the kernel, interrupts included.",
        _times_total("system", "irq", "softirq"),
        _ALL,
    ),
    ratio("iowait_ratio", "ratio", "Share idle while IO was pending.", _times_total("iowait"), _ALL),
    ratio("steal_ratio", "ratio", "Share taken by the hypervisor for others.", _times_total("steal"), _ALL),
)
_SECONDS: tuple[Column, ...] = tuple(
    counter(f"{name}_seconds_total", "seconds", f"CPU time {what}.", per=USER_HZ) for name, what in _TIMES.items()
)

CPU = TableSpec(
    "cpu",
    "CPU time of the whole host.",
    *_RATIOS,
    *_SECONDS,
    gauge("logical_count", "cpus", "CPUs that are online."),
    counter("context_switches_total", "switches", "Context switches."),
    counter("interrupts_total", "interrupts", "Interrupts served, of all kinds."),
    counter("forks_total", "forks", "Processes and threads created."),
    priority=Priority.HIGH,
)
CPU_CORE = TableSpec("cpu_core", "CPU time by logical CPU that is online.", *_RATIOS[:1], *_SECONDS, labels=("core",))


_NUMBERS_ONLY = bytes(byte if chr(byte).isdigit() else ord(" ") for byte in range(256))


class CpuSettings(ProbeSettings, frozen=True, kw_only=True):
    """`per_core = false` leaves out the `cpu_core` table."""

    per_core: bool = True


class CpuProbe:
    """The `cpu` and `cpu_core` tables from procfs."""

    Settings = CpuSettings
    tables = (CPU, CPU_CORE)

    def __init__(self, settings: CpuSettings, host: Host) -> None:
        self._per_core = settings.per_core
        self._stat = host.proc("stat", ONE_RECORD)
        self._rest = KeyedText(b"ctxt", b"processes")
        self._labels = CoreLabels()

    def collect(self, frame: Frame) -> None:
        text = self._stat.read(frame.sequence)
        total, cores, unknown = parse_times(text)
        switches, forks = self._rest.pick(scheduler_part(text))
        table = frame.open(CPU)
        table.put_counters(0, [*total, switches, parse_interrupts(text), forks])
        table.put_gauges(0, (len(cores),))
        if self._per_core:
            table = frame.open(CPU_CORE)
            count = table.claim(self._labels.of(cores[:, 0]))
            table.counters[:count] = cores[:, 1:]
            if unknown is not None:
                table.unknown[:count] = unknown[:, 1:]
                table.complete = False

    def close(self) -> None: ...


class PsutilCpuProbe:
    """The same tables from psutil, with the times that the system tells apart."""

    Settings = CpuSettings
    tables = (CPU, CPU_CORE)

    def __init__(self, settings: CpuSettings, host: Host) -> None:
        import psutil

        self._psutil = psutil
        self._per_core = settings.per_core
        self._labels = CoreLabels()

    def collect(self, frame: Frame) -> None:
        stats = self._psutil.cpu_stats()
        cores = self._psutil.cpu_times(percpu=True)
        table = frame.open(CPU)
        ticks = _ticks(self._psutil.cpu_times())
        table.put_counters(0, [*ticks, stats.ctx_switches, stats.interrupts, None])  # it counts no forks
        table.put_gauges(0, (len(cores),))
        if self._per_core:
            table = frame.open(CPU_CORE)
            table.claim(self._labels.of(np.arange(len(cores), dtype=np.uint64)))
            for row, times in enumerate(cores):
                table.put_counters(row, _ticks(times))

    def close(self) -> None: ...


class CoreLabels:
    """The key labels of the online CPUs, the same object as long as they are the same."""

    def __init__(self) -> None:
        self._numbers: npt.NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
        self._labels: list[Labels] = []

    def of(self, numbers: npt.NDArray[np.uint64]) -> list[Labels]:
        """A label for each CPU number; shape (n,)."""
        if not np.array_equal(numbers, self._numbers):
            self._numbers = numbers.copy()
            self._labels = [(str(number),) for number in numbers.tolist()]
        return self._labels


def parse_times(
    text: bytes,
) -> tuple[list[int | None], npt.NDArray[np.uint64], npt.NDArray[np.bool_] | None]:
    """The CPU lines of /proc/stat, in ticks of 1/USER_HZ second.

    Returns:
        The ten times of all CPUs; the same by CPU, shape (cpus, 11), with the CPU's
        number in front; and where of those cells are unknown, None where none is. Old
        kernels know fewer times, later ones may know more, which are passed over.

    Raises:
        ProbeError: the text doesn't begin with the line of all CPUs.
    """
    first, _, rest = text.partition(b"\n")
    words = first.split()
    if not words or words[0] != b"cpu":
        raise ProbeError(f"stat: starts with {first[:40]!r}, not with the line `cpu`")
    end = rest.find(b"intr")
    lines = rest[:end] if end >= 0 else rest
    width = len(words)
    total: list[int | None] = integers(words[1 : 1 + len(_TIMES)])
    total += [None] * (len(_TIMES) - len(total))
    if width > len(_TIMES) and not lines.translate(None, b"cpu0123456789 \n"):
        cells = np.fromstring(lines.translate(_NUMBERS_ONLY), dtype=np.uint64, sep=" ")
        if len(cells) == width * lines.count(b"cpu") and (not len(cells) or cells.max() < COUNTER_MAX):
            return total, cells.reshape(-1, width)[:, : 1 + len(_TIMES)], None
    return total, *_parse_cores(lines)


def _parse_cores(text: bytes) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Line by line, for text that is old, future or damaged; a line without a CPU's number is left out."""
    rows = {}
    for line in text.splitlines():
        name, *words = line.split() or [b""]
        if name.startswith(b"cpu") and name[3:].isdigit() and int(name[3:]) < 2**32:
            rows[int(name[3:])] = integers(words[: len(_TIMES)])
    cells = np.zeros((len(rows), 1 + len(_TIMES)), dtype=np.uint64)
    unknown = np.ones(cells.shape, dtype=np.bool_)
    for row, (number, times) in enumerate(rows.items()):
        cells[row, 0] = number
        for index, time in enumerate(times, 1):
            if time is not None and time <= COUNTER_MAX:
                cells[row, index] = time
                unknown[row, index] = False
    return cells, unknown


def parse_interrupts(text: bytes) -> int | None:
    """The sum that leads the long `intr` line of /proc/stat."""
    start = text.find(b"\nintr ")
    words = text[start + 6 : start + 30].split(None, 1) if start >= 0 else []
    # A word that nothing follows has been cut, and with it perhaps its number.
    return integers(words[:1])[0] if len(words) > 1 else None


def _ticks(times: object) -> list[int | None]:
    """psutil's seconds as ticks, None for each time that this system doesn't tell apart."""
    seconds = [getattr(times, name, None) for name in _TIMES]
    return [None if value is None else round(value * USER_HZ) for value in seconds]
