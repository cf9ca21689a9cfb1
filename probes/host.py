"""How long the host has been up: /proc/uptime and /proc/stat."""

from __future__ import annotations

import os

from agent.errors import ProbeError
from agent.frame import Frame
from agent.table import NAN, TableSpec, gauge
from probes.probe import ProbeSettings
from probes.procfs import ONE_RECORD, Host, KeyedText, scheduler_part

HOST = TableSpec(
    "host",
    "The host itself.",
    gauge("uptime_seconds", "seconds", "Time since the host was booted, suspended time included."),
    gauge("boot_time_unix_seconds", "seconds", "When the host was booted, in seconds since 1970-01-01 UTC."),
)


# In the order of uname(2), and the domain; `arch` is there since Linux 6.1.
_UNAME_FILES = ("ostype", "osrelease", "version", "arch", "hostname", "domainname")


class HostProbe:
    """The `host` table from procfs."""

    Settings = ProbeSettings
    tables = (HOST,)

    def __init__(self, settings: ProbeSettings, host: Host) -> None:
        self._uptime = host.proc("uptime")
        self._stat = host.proc("stat", ONE_RECORD)
        self._boot_time = KeyedText(b"btime")

    def collect(self, frame: Frame) -> None:
        uptime_seconds = parse_uptime(self._uptime.read())
        (boot_time,) = self._boot_time.pick(scheduler_part(self._stat.read(frame.sequence)))
        known = boot_time is not None and boot_time < 2**63
        frame.open(HOST).put_gauges(0, (uptime_seconds, boot_time if known else NAN))  # type: ignore[arg-type]

    def close(self) -> None: ...


class PsutilHostProbe:
    """The `host` table where there is no procfs; the uptime is the frame's time less the time of boot."""

    Settings = ProbeSettings
    tables = (HOST,)

    def __init__(self, settings: ProbeSettings, host: Host) -> None:
        import psutil

        self._boot_time = psutil.boot_time

    def collect(self, frame: Frame) -> None:
        boot_time = self._boot_time()
        frame.open(HOST).put_gauges(0, (frame.time_unix_ns / 1e9 - boot_time, boot_time))

    def close(self) -> None: ...


def parse_uptime(text: bytes) -> float:
    """The seconds since boot, of `3916.88 7751.56`; the other figure is the idle time of all CPUs.

    Raises:
        ProbeError: it doesn't look like this.
    """
    word, _, idle = text.partition(b" ")
    if not idle.endswith(b"\n") or not word.replace(b".", b"", 1).isdigit() or len(word) > 30:
        raise ProbeError(f"uptime: {text[:60]!r} is not `3916.88 7751.56`")
    return float(word)


def boot_unix_ns(host: Host) -> int | None:
    """When the host was booted, in whole seconds: where its counters began; None where it doesn't tell."""
    if host.uses_psutil:
        import psutil

        return int(psutil.boot_time()) * 1_000_000_000
    file = host.proc("stat", ONE_RECORD)
    (boot_time,) = KeyedText(b"btime").pick(scheduler_part(file.read()))
    return boot_time * 1_000_000_000 if boot_time is not None and boot_time < 2**32 else None


def uname(host: Host) -> tuple[str, ...]:
    """The kernel's name, release, version, machine, node and domain; "" for each that the host doesn't tell."""
    values = []
    for name in _UNAME_FILES:
        file = host.proc(f"sys/kernel/{name}")
        values.append(file.read().decode(errors="replace").removesuffix("\n"))
        host.forget(file)
    if host.is_local and hasattr(os, "uname"):
        own = os.uname()
        values[:5] = own.sysname, own.release, own.version, own.machine, own.nodename
    return tuple(values)
