"""The otlp sink and a real OpenTelemetry collector, which hands on what it has understood."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent import __version__
from tests.engines.agent_process import Hostprobe
from tests.engines.collector import Collector
from tests.engines.process import patiently
from tests.sinks.http_peer import Answer

CPU_MODES = {
    "user": "user_seconds_total",
    "nice": "nice_seconds_total",
    "system": "system_seconds_total",
    "idle": "idle_seconds_total",
    "iowait": "iowait_seconds_total",
    "interrupt": "irq_seconds_total",
    "softirq": "softirq_seconds_total",
    "steal": "steal_seconds_total",
}
UNITS = {
    "system.cpu.time": "s",
    "system.cpu.logical.count": "{cpu}",
    "system.memory.usage": "By",
    "system.memory.utilization": "1",
    "system.network.packet.count": "{packet}",
    "system.uptime": "s",
    "hostprobe.memory.dirty_bytes": "By",
    "hostprobe.cpu.context_switches": "{switch}",
    "hostprobe.disk_io.reads_per_second": "{read}/s",
    "hostprobe.frame.sequence": "{frame}",
}


def sinks(collector: Collector, gzip: bool = True) -> dict[str, dict[str, Any]]:
    return {"collector": {"type": "otlp", "url": collector.endpoint, "gzip": gzip}}


def plain(attributes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Attributes by name: texts, and numbers where they are integers."""
    found = {}
    for attribute in attributes:
        ((kind, value),) = attribute["value"].items()
        found[attribute["key"]] = int(value) if kind == "intValue" else value
    assert len(found) == len(attributes)
    return found


def resources(collector: Collector, instance: str) -> Iterator[dict[str, Any]]:
    """What came of one run, in its order."""
    for request in collector.received():
        for resource in request["resourceMetrics"]:
            if plain(resource["resource"]["attributes"])["service.instance.id"] == instance:
                yield resource


def metrics(collector: Collector, instance: str, name: str) -> Iterator[dict[str, Any]]:
    """Each time that a metric came, with the points of one frame."""
    for resource in resources(collector, instance):
        for scope in resource["scopeMetrics"]:
            assert scope["scope"] == {"name": "hostprobe", "version": __version__}
            yield from (metric for metric in scope["metrics"] if metric["name"] == name)


def number(point: Mapping[str, Any]) -> float:
    return int(point["asInt"]) if "asInt" in point else float(point["asDouble"])


def sequences(collector: Collector, instance: str) -> list[tuple[int, float]]:
    """The time in ns and the sequence of each frame that came."""
    points = [
        point
        for one in metrics(collector, instance, "hostprobe.frame.sequence")
        for point in one["gauge"]["dataPoints"]
    ]
    return [(int(point["timeUnixNano"]), number(point)) for point in points]


def numbered(frames: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """What `sequences` is where each frame came once; none is missing among them."""
    assert [frame["sequence"] for frame in frames] == list(range(1, len(frames) + 1))
    return [(frame["time_unix_ns"], frame["sequence"]) for frame in frames]


@pytest.fixture(scope="module", params=[True, False], ids=["gzip", "plain"])
def frames(
    request: pytest.FixtureRequest, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Those of an agent that has sent them, compressed or not."""
    folder = tmp_path_factory.mktemp("agent")
    with Hostprobe(folder, sinks(collector, request.param), {"interval": "200ms", "hostname": "web-1"}) as agent:
        patiently(lambda: len(agent.frames()) >= 5, "five frames")
    assert agent.log_text() == ""
    return agent.frames()


def test_every_frame_came_once(collector: Collector, frames: list[dict[str, Any]]) -> None:
    assert sequences(collector, frames[0]["instance"]) == numbered(frames)


def test_the_resource_is_the_host_and_the_run(collector: Collector, frames: list[dict[str, Any]]) -> None:
    found = list(resources(collector, frames[0]["instance"]))
    assert len(found) == len(frames)
    for resource in found:
        assert plain(resource["resource"]["attributes"]) == {
            "env": "test",
            "host.name": "web-1",
            "os.type": platform.system().lower(),
            "service.name": "hostprobe",
            "service.instance.id": frames[0]["instance"],
            "service.version": __version__,
        }
        assert resource["schemaUrl"].startswith("https://opentelemetry.io/schemas/1.")


def test_cpu_time(collector: Collector, frames: list[dict[str, Any]]) -> None:
    """A cumulative sum for each mode, which began when the host was booted."""
    found = list(metrics(collector, frames[0]["instance"], "system.cpu.time"))
    assert len(found) == len(frames)
    for metric, frame in zip(found, frames, strict=True):
        assert metric["sum"]["aggregationTemporality"] == 2
        assert metric["sum"]["isMonotonic"] is True
        points = metric["sum"]["dataPoints"]
        values = {plain(point["attributes"])["cpu.mode"]: number(point) for point in points}
        assert values == {mode: frame["cpu"][column] for mode, column in CPU_MODES.items()}
        assert len(points) == len(CPU_MODES)
        boot_unix_ns = int(frame["host_table"]["boot_time_unix_seconds"]) * 1_000_000_000
        assert {int(point["startTimeUnixNano"]) for point in points} == {boot_unix_ns}
        assert {int(point["timeUnixNano"]) for point in points} == {frame["time_unix_ns"]}


def test_memory_and_cores(collector: Collector, frames: list[dict[str, Any]]) -> None:
    """What can fall is a sum that isn't monotonic; a core's number is an integer."""
    instance = frames[0]["instance"]
    for metric, frame in zip(metrics(collector, instance, "system.memory.usage"), frames, strict=True):
        assert "isMonotonic" not in metric["sum"]
        values = {
            plain(point["attributes"])["system.memory.state"]: number(point) for point in metric["sum"]["dataPoints"]
        }
        assert values == {state: frame["memory"][f"{state}_bytes"] for state in ("used", "free", "cached", "buffers")}
    cores = metrics(collector, instance, "hostprobe.cpu_core.idle_seconds")
    for metric, frame in zip(cores, frames, strict=True):
        points = metric["sum"]["dataPoints"]
        values = {plain(point["attributes"])["cpu.logical_number"]: number(point) for point in points}
        assert values == {int(row["core"]): row["idle_seconds_total"] for row in frame["cpu_core"]}


def test_units(collector: Collector, frames: list[dict[str, Any]]) -> None:
    instance = frames[0]["instance"]
    assert {
        name: unit for name in UNITS for unit in {one["unit"] for one in metrics(collector, instance, name)}
    } == UNITS


def test_nothing_is_missing_where_it_was_away(collector: Collector, tmp_path: Path) -> None:
    with Hostprobe(tmp_path, sinks(collector), {"interval": "200ms"}) as agent:
        patiently(lambda: len(agent.frames()) >= 5, "five frames before")
        collector.stop()
        patiently(lambda: agent.events("sink fails, its ring holds the frames"), "it was missed")
        meanwhile = len(agent.frames())
        patiently(lambda: len(agent.frames()) >= meanwhile + 3, "three frames meanwhile")
        collector.start()
        patiently(lambda: agent.events("sink delivers again"), "it is back")
        later = len(agent.frames())
        patiently(lambda: len(agent.frames()) >= later + 3, "three frames after")
    frames = agent.frames()
    found = sequences(collector, frames[0]["instance"])
    assert list(dict.fromkeys(found)) == numbered(frames)  # what was on its way when it ended may have come twice
    assert agent.events("sink's peer refuses frames, they are dropped") == []


def test_nothing_is_missing_where_it_was_out_of_luck(collector: Collector, tmp_path: Path) -> None:
    """What is behind it says 503, and so does it, with a reason: it is tried again."""
    before = len(collector.behind.requests)
    collector.behind.answers.extend([Answer(503)] * 2)
    with Hostprobe(tmp_path, sinks(collector), {"interval": "200ms"}) as agent:
        patiently(lambda: agent.events("sink delivers again"), "it is in luck again")
    (told,) = agent.events("sink fails, its ring holds the frames")
    assert f"otlp {collector.url}: 503 Service Unavailable: " in told["reason"]
    frames = agent.frames()
    del collector.behind.requests[before : before + 2]  # those were not taken
    assert list(dict.fromkeys(sequences(collector, frames[0]["instance"]))) == numbered(frames)
