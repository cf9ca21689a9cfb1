"""Pressure stall information: the kernel's figures, kernels with less of it, and damage."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.frame import Frame
from agent.table import COUNTER_MAX
from probes.pressure import PRESSURE, PressureProbe, PsutilPressureProbe, parse_pressure
from probes.probe import ProbeSettings
from probes.procfs import Host
from tests.figures import rows, rows_by
from tests.hosts import saved_host

Collect = Callable[..., Frame]
Tree = Callable[[dict[str, str | bytes]], Path]
SOME = "some avg10=1.50 avg60=2.25 avg300=100.00 total=5373338\n"
FULL = "full avg10=0.00 avg60=0.01 avg300=3.00 total=18446744073709551615\n"
needs_psi = pytest.mark.skipif(not os.path.exists("/proc/pressure/cpu"), reason="this kernel has no PSI")


def test_every_column(tree: Tree, collect: Collect) -> None:
    root = tree({f"proc/pressure/{name}": SOME + FULL for name in ("cpu", "memory", "io")})
    frame = collect(PressureProbe, root=root)
    found = rows(frame, "pressure")
    assert [row.pop("resource") for row in found] == ["cpu", "memory", "io"]
    for row in found:
        assert row == {
            "some_avg10_ratio": 0.015,
            "some_avg60_ratio": 0.0225,
            "some_avg300_ratio": 1.0,
            "some_seconds_total": 5.373338,
            "full_avg10_ratio": 0.0,
            "full_avg60_ratio": 0.0001,
            "full_avg300_ratio": 0.03,
            "full_seconds_total": COUNTER_MAX / 1e6,
        }
    assert frame.tables["pressure"].counters[:3].tolist() == [[5373338, COUNTER_MAX]] * 3


def kernel() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for path in Path("/proc/pressure").iterdir():
        values = found[path.name] = {}
        for kind, *words in (line.split() for line in path.read_text().splitlines()):
            for word in words:
                name, value = word.split("=")
                values[f"{kind} {name}"] = float(value)
    return found


@needs_psi
def test_totals_lie_between_two_of_the_kernels(collect: Collect) -> None:
    before = kernel()
    by_resource = rows_by(collect(PressureProbe), "pressure", "resource")
    after = kernel()
    assert by_resource.keys() == before.keys()
    for resource, row in by_resource.items():
        for kind in ("some", "full"):
            if f"{kind} total" in before[resource]:
                low, high = before[resource][f"{kind} total"], after[resource][f"{kind} total"]
                assert low <= round(row[f"{kind}_seconds_total"] * 1e6) <= high
            else:
                assert row[f"{kind}_seconds_total"] is None


@needs_psi
def test_averages_are_the_kernels(collect: Collect) -> None:
    # They are computed every two seconds: one of a few tries meets a moment without a change.
    for _ in range(20):
        before = kernel()
        by_resource = rows_by(collect(PressureProbe), "pressure", "resource")
        after = kernel()
        averages = {
            (resource, name): value
            for resource, values in before.items()
            for name, value in values.items()
            if "avg" in name and after[resource][name] == value
        }
        if len(averages) == sum("avg" in name for values in before.values() for name in values):
            break
    assert averages
    for (resource, name), percent in averages.items():
        kind, span = name.split()
        assert by_resource[resource][f"{kind}_{span}_ratio"] == round(percent * 100) / 10_000


def test_cpu_without_full_and_irq_without_some(tree: Tree, collect: Collect) -> None:
    root = tree({"proc/pressure/cpu": SOME, "proc/pressure/irq": FULL})
    by_resource = rows_by(collect(PressureProbe, root=root), "pressure", "resource")
    assert list(by_resource) == ["cpu", "irq"]
    for resource, absent, there in (("cpu", "full", "some"), ("irq", "some", "full")):
        row = by_resource[resource]
        names = [f"avg{seconds}_ratio" for seconds in (10, 60, 300)] + ["seconds_total"]
        assert [row[f"{absent}_{name}"] for name in names] == [None] * 4
        assert None not in [row[f"{there}_{name}"] for name in names]


@pytest.mark.parametrize("name", ["old"])
def test_kernel_without_psi_has_no_rows(collect: Collect, name: str) -> None:
    frame = collect(PressureProbe, root=saved_host(name), times=(0, 1))
    assert rows(frame, "pressure") == []


def test_file_that_reads_empty_is_a_row_less(tree: Tree, collect: Collect) -> None:
    def write(cycle: int) -> None:
        tree({"proc/pressure/cpu": SOME, "proc/pressure/io": "" if cycle == 1 else SOME})

    for cycles, resources in ((1, ["cpu", "io"]), (2, ["cpu"]), (3, ["cpu", "io"])):
        write(0)
        frame = collect(PressureProbe, root=tree({}), times=range(cycles), before_cycle=write)
        assert [row["resource"] for row in rows(frame, "pressure")] == resources


def test_labels_are_one_object_while_the_resources_are_the_same(tree: Tree) -> None:
    probe = PressureProbe(ProbeSettings(), Host(str(tree({"proc/pressure/cpu": SOME})), "procfs"))
    frame = Frame((PRESSURE,))
    seen = []
    for cycle in range(3):
        frame.begin(0, cycle)
        probe.collect(frame)
        seen.append(frame.tables["pressure"].labels)
    assert seen[0] == [("cpu",)]
    assert seen[0] is seen[1] is seen[2]


def test_the_probe_for_psutil_opens_nothing(collect: Collect) -> None:
    assert collect(PsutilPressureProbe, source="psutil").tables == {}


def test_saved_host(collect: Collect) -> None:
    root = saved_host("vm")
    row = rows_by(collect(PressureProbe, root=root), "pressure", "resource")["io"]
    words = dict(word.split("=") for word in (root / "proc/pressure/io").read_text().splitlines()[0].split()[1:])
    assert row["some_avg300_ratio"] == round(float(words["avg300"]) * 100) / 10_000
    assert row["some_seconds_total"] == int(words["total"]) / 1e6


def test_damaged_host_has_unknown_values(collect: Collect) -> None:
    found = rows(collect(PressureProbe, root=saved_host("damaged")), "pressure")
    assert found
    for row in found:
        row.pop("resource")
        assert set(row.values()) == {None}


@pytest.mark.parametrize(
    "line",
    [
        "some avg10=1.50 avg60=2.25 avg300=100.00 total=53733",  # cut
        "some avg10=nan avg60=2.25 avg300=100.00 total=5\n",
        "some avg10=1.5.0 avg60=2.25 avg300=100.00 total=5\n",
        "some avg10=-1.50 avg60=2.25 avg300=100.00 total=5\n",
        "some avg10=1.50 avg60=2.25 avg300=100.00 total=-5\n",
        "some avg60=1.50 avg10=2.25 avg300=100.00 total=5\n",
        "some avg10=1.50 avg60=2.25 avg300=100.00\n",
        f"some avg10=1.50 avg60=2.25 avg300=100.00 total={'9' * 21}\n",
        "awesome avg10=1.50 avg60=2.25 avg300=100.00 total=5\n",
    ],
)
def test_damaged_line_is_unknown_and_the_other_is_not(line: str) -> None:
    some, full = parse_pressure((FULL + line).encode())
    assert all(math.isnan(value) for value in some[:3])
    assert some[3] is None
    assert full == (0.0, 0.0001, 0.03, COUNTER_MAX)


def test_a_total_that_no_kernel_can_have_is_unknown(tree: Tree, collect: Collect) -> None:
    root = tree({"proc/pressure/cpu": SOME.replace("5373338", str(2**64)) + FULL})
    (row,) = rows(collect(PressureProbe, root=root), "pressure")
    assert (row["some_seconds_total"], row["some_avg10_ratio"]) == (None, 0.015)
    assert row["full_seconds_total"] == COUNTER_MAX / 1e6


def test_a_later_kernels_further_fields_are_passed_over() -> None:
    assert parse_pressure(SOME.replace("\n", " extra=7 \n").encode())[0] == (0.015, 0.0225, 1.0, 5373338)


_PIECES = st.sampled_from([*(SOME + FULL).encode().split(), b"\n", b"\nsome", b"\nfull", b"\0", b"total=-1", b"avg10="])


@given(st.binary(max_size=100) | st.lists(_PIECES, max_size=30).map(b" ".join))
def test_any_bytes(text: bytes) -> None:
    for *averages, total in parse_pressure(text):
        assert all(math.isnan(value) or value >= 0 for value in averages)
        assert total is None or total >= 0
