"""Uptime and boot time: the kernel's and psutil's figures, saved hosts, and damage."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ProbeError
from agent.frame import Frame
from probes.host import HostProbe, PsutilHostProbe, parse_uptime
from tests.figures import only_row
from tests.hosts import saved_host

Collect = Callable[..., Frame]
Tree = Callable[[dict[str, str | bytes]], Path]


def test_every_column(tree: Tree, collect: Collect) -> None:
    root = tree({"proc/uptime": "3916.88 7751.56\n", "proc/stat": "cpu 1\nctxt 5\nbtime 1795232634\nprocesses 1\n"})
    assert only_row(collect(HostProbe, root=root), "host") == {
        "uptime_seconds": 3916.88,
        "boot_time_unix_seconds": 1795232634.0,
    }


def test_uptime_lies_between_two_of_the_kernels(collect: Collect) -> None:
    def uptime() -> float:
        return float(Path("/proc/uptime").read_text().split()[0])

    before = uptime()
    row = only_row(collect(HostProbe), "host")
    assert before <= row["uptime_seconds"] <= uptime()
    # The kernel's clock of the uptime; /proc/uptime is cut to 10 ms.
    assert row["uptime_seconds"] <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_psutil_agrees(collect: Collect) -> None:
    ours = only_row(collect(HostProbe), "host")
    assert ours["boot_time_unix_seconds"] == pytest.approx(psutil.boot_time(), abs=1)
    now_ns = 2_000_000_000 * 10**9
    theirs = only_row(collect(PsutilHostProbe, source="psutil", time_unix_ns=now_ns), "host")
    assert theirs["boot_time_unix_seconds"] == psutil.boot_time()
    assert theirs["uptime_seconds"] == 2_000_000_000 - psutil.boot_time()


@pytest.mark.parametrize("name", ["vm", "old"])
def test_saved_hosts(collect: Collect, name: str) -> None:
    root = saved_host(name)
    row = only_row(collect(HostProbe, root=root), "host")
    assert row["uptime_seconds"] == float((root / "proc/uptime").read_text().split()[0])
    assert f"\nbtime {row['boot_time_unix_seconds']:.0f}\n" in (root / "proc/stat").read_text()


def test_damaged_host_is_an_error(collect: Collect) -> None:
    with pytest.raises(ProbeError, match=r"uptime: .*12345x"):
        collect(HostProbe, root=saved_host("damaged"))


@pytest.mark.parametrize("line", ["", "btime\n", "btime x\n", "btime -5\n", f"btime {2**64}\n", "btime " + "9" * 5000])
def test_boot_time_can_be_unknown(tree: Tree, collect: Collect, line: str) -> None:
    root = tree({"proc/uptime": "1.5 2\n", "proc/stat": "cpu 1\nctxt 5\n" + line})
    assert only_row(collect(HostProbe, root=root), "host") == {"uptime_seconds": 1.5, "boot_time_unix_seconds": None}


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"nan 1", b"inf 1", b"-5.0 1", b"1e9 1", b"1_0 2", b"1.2.3 4", b"9" * 400]
)
def test_damage_is_an_error_that_shows_the_text(text: bytes) -> None:
    with pytest.raises(ProbeError, match=r"^uptime: "):
        parse_uptime(text)


@given(st.binary(max_size=50) | st.text("0123456789. \n", max_size=50).map(str.encode))
def test_any_bytes(text: bytes) -> None:
    try:
        seconds = parse_uptime(text)
    except ProbeError:
        return
    assert 0 <= seconds <= 1e30


@given(st.integers(0, 10**10), st.integers(0, 99))
def test_any_uptime(seconds: int, hundredths: int) -> None:
    assert parse_uptime(b"%d.%02d 1.00\n" % (seconds, hundredths)) == pytest.approx(
        seconds + hundredths / 100, abs=1e-5
    )
