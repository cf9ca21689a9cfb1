"""How long the host has been up: /proc/uptime and /proc/stat."""

from __future__ import annotations

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
