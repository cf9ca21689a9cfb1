"""VictoriaMetrics, which speaks most of what hostprobe does; statsd alone it doesn't."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent import __version__
from tests.engines.agent_process import Hostprobe, SteppedAgent, milliseconds
from tests.engines.process import patiently
from tests.engines.stores import VictoriaMetrics
from tests.hosts import saved_host
from tests.workers import until

IMPORT = "/api/v1/import/prometheus?extra_label=job%3Dimported&extra_label=instance%3Dvictoria"
BEYOND_DOUBLE = 2**53 + 1
BEYOND_INT64 = 2**64 - 1

Value = Callable[[Mapping[str, Any]], float]
VALUES: dict[str, Value] = {
    "frame sequence": lambda frame: frame["sequence"],
    "memory total_bytes": lambda frame: frame["memory"]["total_bytes"],
    "memory used_ratio": lambda frame: frame["memory"]["used_ratio"],
    "host boot_time_unix_seconds": lambda frame: frame["host_table"]["boot_time_unix_seconds"],
    "cpu user_seconds_total": lambda frame: frame["cpu"]["user_seconds_total"],
    "cpu context_switches_total": lambda frame: frame["cpu"]["context_switches_total"],
    "agent cpu_seconds_total": lambda frame: frame["agent"]["cpu_seconds_total"],
}
"""By table and column, what a frame's JSON says."""


@pytest.fixture(scope="module")
def frames(victoria_metrics: VictoriaMetrics, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Those of an agent that has written them in four formats."""
    several = {"records": 3, "linger": "1h"}
    sinks = {
        "influx": {
            "type": "http",
            "format": "influx",
            "url": f"{victoria_metrics.url}/write?db=hosts",
            "batch": several,
        },
        "prometheus": {"type": "http", "format": "prometheus", "url": f"{victoria_metrics.url}{IMPORT}"},
        "graphite": {"type": "tcp", "format": "graphite", "address": victoria_metrics.graphite},
        "remote_write": {"type": "remote_write", "url": victoria_metrics.write_url, "batch": several},
    }
    with Hostprobe(tmp_path_factory.mktemp("agent"), sinks, {"hostname": "victoria"}) as agent:
        patiently(lambda: len(agent.frames()) >= 5, "five frames")
    frames = agent.frames()
    assert agent.log_text() == ""
    assert [frame["sequence"] for frame in frames] == list(range(1, len(frames) + 1))
    return frames


def samples(frames: Sequence[Mapping[str, Any]], value: Value) -> list[tuple[int, Any]]:
    return [(milliseconds(frame), kept(value(frame))) for frame in frames]


def kept(value: float) -> Any:
    """Equals what VictoriaMetrics makes of a value: of a long fraction it keeps some twelve digits."""
    return pytest.approx(value, rel=1e-11, abs=0)


@pytest.mark.parametrize("column", VALUES)
def test_influx_lines(victoria_metrics: VictoriaMetrics, frames: list[dict[str, Any]], column: str) -> None:
    """/write takes db, which becomes a label; nanoseconds are what it expects, and milliseconds what it keeps."""
    name = column.replace(" ", "_")
    labels, found = victoria_metrics.series(f'{name}{{host="victoria",db="hosts"}}')
    assert labels == {"__name__": name, "host": "victoria", "db": "hosts", "env": "test"} | run(
        column, frames, "instance"
    )
    assert found == samples(frames, VALUES[column])


@pytest.mark.parametrize("column", VALUES)
def test_remote_write(victoria_metrics: VictoriaMetrics, frames: list[dict[str, Any]], column: str) -> None:
    name = f"hostprobe_{column.replace(' ', '_')}"
    labels, found = victoria_metrics.series(f'{name}{{job="hostprobe"}}')
    expected = {"__name__": name, "job": "hostprobe", "instance": "victoria", "env": "test"}
    assert labels == expected | ({"host": "victoria"} if column.startswith("frame") else {}) | run(
        column, frames, "run"
    )
    assert found == samples(frames, VALUES[column])


@pytest.mark.parametrize("column", VALUES)
def test_prometheus_text(victoria_metrics: VictoriaMetrics, frames: list[dict[str, Any]], column: str) -> None:
    """It has no times: each state has that of its arrival."""
    name = f"hostprobe_{column.replace(' ', '_')}"
    labels, found = victoria_metrics.series(f'{name}{{job="imported"}}')
    assert labels.items() >= {"env": "test", "instance": "victoria"}.items()
    assert [value for _, value in found] == [kept(VALUES[column](frame)) for frame in frames]
    assert all(at_ms >= milliseconds(frame) for (at_ms, _), frame in zip(found, frames, strict=True))


@pytest.mark.parametrize("column", VALUES)
def test_graphite_lines(victoria_metrics: VictoriaMetrics, frames: list[dict[str, Any]], column: str) -> None:
    """Their times are whole seconds."""
    labels, found = victoria_metrics.series(f'{{__name__="hostprobe.victoria.{column.replace(" ", ".")}"}}')
    assert labels.keys() == {"__name__"}
    assert found == [(at_ms // 1000 * 1000, value) for at_ms, value in samples(frames, VALUES[column])]


def run(column: str, frames: Sequence[Mapping[str, Any]], label: str) -> dict[str, str]:
    """The labels that the table `frame` has beside those of all tables."""
    return {label: frames[0]["instance"], "version": __version__} if column.startswith("frame") else {}


def test_whole_numbers_beyond_doubles(victoria_metrics: VictoriaMetrics, tmp_path: Path) -> None:
    """Influx lines hold 63 bits, of which VictoriaMetrics keeps a double's 53; what has more is left out."""
    root = tmp_path / "root"
    shutil.copytree(saved_host("vm"), root, symlinks=True)
    interfaces = root / "proc/1/net/dev"
    counters = f"{BEYOND_DOUBLE} 1 0 0 0 0 0 0 {BEYOND_INT64} 1 0 0 0 0 0 0"
    interfaces.write_text(f"{interfaces.read_text()}  big: {counters}\n")
    sinks = {"influx": {"type": "http", "format": "influx", "url": f"{victoria_metrics.url}/write"}}
    with Hostprobe(tmp_path, sinks, {"hostname": "large", "root": str(root)}) as agent:
        pass
    (row,) = [row for row in agent.frames()[0]["network"] if row["interface"] == "big"]
    assert (row["receive_bytes_total"], row["transmit_bytes_total"]) == (BEYOND_DOUBLE, BEYOND_INT64)
    big = '{host="large",interface="big"}'
    labels, found = victoria_metrics.series(f"network_receive_bytes_total{big}")
    assert {value for _, value in found} == {2**53}
    assert len(found) == len(agent.frames())
    assert "db" not in labels
    assert victoria_metrics.export(f"network_transmit_bytes_total{big}") == []
    assert {value for _, value in victoria_metrics.series(f"network_transmit_packets_total{big}")[1]} == {1}


def test_nothing_is_missing_where_it_was_killed(victoria_metrics: VictoriaMetrics, tmp_path: Path) -> None:
    with SteppedAgent(tmp_path, {"type": "remote_write", "url": victoria_metrics.write_url}, "killed") as agent:
        for _ in range(5):
            agent.step()
        until(lambda: agent.worker.frames == (5, 0, 0), "five are sent")
        victoria_metrics.write_to_disk()
        victoria_metrics.kill()
        for _ in range(5):
            agent.step()
        until(lambda: agent.worker.failures, "it was missed")
        assert agent.worker.frames == (5, 0, 5)
        victoria_metrics.start()
        for _ in range(5):
            agent.step()
        until(lambda: agent.worker.frames == (15, 0, 0), "all are sent")
    labels, found = victoria_metrics.series('hostprobe_frame_sequence{instance="killed"}')
    assert labels.items() >= {"job": "hostprobe", "host": "killed", "env": "test"}.items()
    assert found == agent.frames
    assert [sequence for _, sequence in found] == list(range(1, 16))
