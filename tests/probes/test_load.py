"""Load averages: the kernel's and psutil's figures, saved hosts, and damage."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ProbeError
from agent.frame import Frame
from probes.load import LoadProbe, PsutilLoadProbe, parse_loadavg
from probes.procfs import scheduler_part
from tests.figures import only_row
from tests.hosts import saved_host

Collect = Callable[..., Frame]
Tree = Callable[[dict[str, str | bytes]], Path]
GOOD = b"0.20 0.18 0.12 2/180 11206\n"


def test_every_column(tree: Tree, collect: Collect) -> None:
    root = tree({"proc/loadavg": GOOD, "proc/stat": "cpu 1\nctxt 5\nprocs_running 2\nprocs_blocked 7\n"})
    assert only_row(collect(LoadProbe, root=root), "load") == {
        "load1": 0.20,
        "load5": 0.18,
        "load15": 0.12,
        "runnable": 2.0,
        "blocked": 7.0,
        "threads": 180.0,
    }


def test_kernel_and_psutil_agree(collect: Collect) -> None:
    # The averages move every five seconds: one of a few tries meets a moment without a change.
    for _ in range(5):
        before = psutil.getloadavg()
        ours = only_row(collect(LoadProbe), "load")
        theirs = only_row(collect(PsutilLoadProbe, source="psutil"), "load")
        if before == psutil.getloadavg():
            break
    # loadavg prints two digits; getloadavg(3) reads the same or sysinfo(2), which has more.
    assert [ours["load1"], ours["load5"], ours["load15"]] == pytest.approx(list(before), abs=0.0051)
    assert [theirs["load1"], theirs["load5"], theirs["load15"]] == pytest.approx(list(before), abs=0.0051)
    assert [theirs["runnable"], theirs["blocked"], theirs["threads"]] == [None] * 3


def test_threads_are_those_of_all_processes(collect: Collect) -> None:
    def processes() -> int:
        return sum(name.isdigit() for name in os.listdir("/proc"))

    row = only_row(collect(LoadProbe), "load")
    assert row["threads"] >= row["runnable"] >= 1  # this test runs
    assert row["threads"] >= processes() * 0.5
    assert row["blocked"] is not None


@pytest.mark.parametrize(("name", "blocked"), [("old", True), ("vm", True)])
def test_saved_hosts(collect: Collect, name: str, blocked: bool) -> None:
    root = saved_host(name)
    words = re.split("[ /]", (root / "proc/loadavg").read_text())
    row = only_row(collect(LoadProbe, root=root), "load")
    assert [row["load1"], row["load5"], row["load15"], row["runnable"], row["threads"]] == [
        float(word) for word in words[:5]
    ]
    assert (row["blocked"] is not None) is blocked


def test_damaged_host_is_an_error(collect: Collect) -> None:
    with pytest.raises(ProbeError, match=r"loadavg: .*0\.1x"):
        collect(LoadProbe, root=saved_host("damaged"))


@pytest.mark.parametrize("text", [b"", b"\n", b"0.1 0.2", b"0.1 0.2 0.3", b"a b c 1/2 3", b"\xff\xfe 1 2 3/4 5"])
def test_damage_is_an_error_that_shows_the_text(text: bytes) -> None:
    with pytest.raises(ProbeError, match=r"^loadavg: "):
        parse_loadavg(text)


@pytest.mark.parametrize("tasks", [b"2", b"/", b"x/y", b"-1/-2"])
def test_damaged_tasks_are_an_error(tasks: bytes) -> None:
    with pytest.raises(ProbeError, match=r"^loadavg: "):
        parse_loadavg(b"0.20 0.18 0.12 " + tasks + b" 11206\n")


@pytest.mark.parametrize("text", [b"0.20 0.18 0.12 2/1", b"0.20 0.18 0.12 2/180 112", b"1_0.5 0.18 0.12 2/180 1\n"])
def test_what_was_cut_or_is_no_load_is_an_error(text: bytes) -> None:
    with pytest.raises(ProbeError, match=r"^loadavg: "):
        parse_loadavg(text)


def test_no_blocked_tasks_in_stat(tree: Tree, collect: Collect) -> None:
    root = tree({"proc/loadavg": GOOD, "proc/stat": "cpu 1\nctxt 5\n"})
    assert only_row(collect(LoadProbe, root=root), "load")["blocked"] is None


def test_scheduler_part_starts_at_ctxt() -> None:
    assert scheduler_part(b"cpu 1\nintr 5 6\nctxt 7\nbtime 8\n") == b"ctxt 7\nbtime 8\n"
    assert scheduler_part(b"cpu 1\nprocs_blocked 3\n") == b"cpu 1\nprocs_blocked 3\n"


@given(st.binary(max_size=200) | st.lists(st.sampled_from([*GOOD.split(), b"\n", b"/", b"\0"])).map(b" ".join))
def test_any_bytes(text: bytes) -> None:
    try:
        values = parse_loadavg(text)
    except ProbeError:
        return
    assert len(values) == 5
    assert all(isinstance(value, float | int) for value in values)
