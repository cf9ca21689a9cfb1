"""OTLP against the message's own class: values, times, and when sums began."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from agent import __version__
from agent.assembly import Agent
from agent.frame import Frame
from agent.serializers.document import Identity
from agent.serializers.names import opentelemetry
from agent.table import COUNTER_MAX, NAN, Kind
from tests.serializers.writing import (
    BARE,
    DISK,
    IDENTITY,
    OWN,
    SECOND_NS,
    TIME_NS,
    TIMES,
    Series,
    Writer,
    collected,
    known,
    series,
)

BOOT_NS, STARTED_NS = IDENTITY.boot_unix_ns, IDENTITY.started_unix_ns
CUMULATIVE = 2


def request(payload: bytes) -> Any:
    return ExportMetricsServiceRequest.FromString(payload)


def metrics(payload: bytes) -> dict[str, Any]:
    """The metrics of a payload of one frame, by name; each is there once."""
    (resource,) = request(payload).resource_metrics
    (scope,) = resource.scope_metrics
    assert (scope.scope.name, scope.scope.version) == ("hostprobe", __version__)
    assert (
        resource.schema_url == scope.schema_url == opentelemetry.SCHEMA_URL == "https://opentelemetry.io/schemas/1.44.0"
    )
    found = {metric.name: metric for metric in scope.metrics}
    assert len(found) == len(scope.metrics)
    return found


def points(metric: Any) -> Any:
    return getattr(metric, metric.WhichOneof("data")).data_points


def value_of(point: Any) -> float:
    value: float = getattr(point, point.WhichOneof("value"))
    return value


def attributes(point: Any) -> dict[str, str]:
    found = {one.key: str(getattr(one.value, one.value.WhichOneof("value"))) for one in point.attributes}
    assert len(found) == len(point.attributes)
    return found


def starts(writer: Writer, name: str = "hostprobe.disk.reads") -> dict[str, int]:
    """When the sum of each row began, by its first label, in seconds since TIME_NS; absolute where it is earlier."""
    found = {}
    for point in points(metrics(writer.payload())[name]):
        assert point.time_unix_nano == writer.frame.time_unix_ns
        assert point.start_time_unix_nano <= point.time_unix_nano
        found[next(iter(attributes(point).values()), "")] = point.start_time_unix_nano
    return found


def at(seconds: int) -> int:
    """The stamp of the frame so many seconds after the first."""
    return TIME_NS + seconds * SECOND_NS


def disks(writer: Writer, **reads: int | None) -> None:
    writer.put(DISK, *(((device, "ssd"), (count, 2000), (1.0, NAN)) for device, count in reads.items()))


@pytest.fixture(scope="module", params=["standard", "full"])
def real(request: pytest.FixtureRequest) -> Iterator[tuple[Agent, Frame]]:
    with collected(request.param) as found:
        yield found


def test_every_known_value_of_this_host_is_there_and_no_other(real: tuple[Agent, Frame]) -> None:
    agent, frame = real
    writer = Writer("otlp", ())
    writer.frame, writer.serializer = frame, agent.serializer("otlp")
    found = [
        Series(name, tuple(sorted(attributes(point).items())), value_of(point))
        for name, metric in metrics(writer.payload()).items()
        for point in points(metric)
    ]
    values = [one._replace(labels=(None,) * 3) if one.table == "frame" else one for one in known(frame, agent.identity)]
    specs = [table.spec for table in frame.tables.values()]
    expected = series(values, specs, opentelemetry.families)
    nameless = [one._replace(labels=()) if one.name.startswith("hostprobe.frame.") else one for one in expected]
    assert Counter(found) == Counter(nameless)
    assert {type(one.value) for one in found} == {int, float}
    assert len(expected) > 200


def test_kinds_units_and_helps_are_those_of_the_declarations(real: tuple[Agent, Frame]) -> None:
    agent, frame = real
    writer = Writer("otlp", ())
    writer.frame, writer.serializer = frame, agent.serializer("otlp")
    found = metrics(writer.payload())
    declared = {
        family.name: family for table in frame.tables.values() for family in opentelemetry.families(table.spec, True)
    }
    kinds = Counter[str]()
    for name, metric in found.items():
        if name.startswith(("hostprobe.frame.", "hostprobe.left_out.")):
            continue
        family = declared[name]
        assert (metric.unit, metric.description) == (family.unit, family.help)
        is_sum = family.kind is Kind.COUNTER or family.additive
        assert metric.WhichOneof("data") == ("sum" if is_sum else "gauge")
        if is_sum:
            assert metric.sum.aggregation_temporality == CUMULATIVE
            assert metric.sum.is_monotonic == (family.kind is Kind.COUNTER)
            kinds["counter" if metric.sum.is_monotonic else "amount"] += 1
        for point in points(metric):
            assert point.time_unix_nano == frame.time_unix_ns
            assert bool(point.start_time_unix_nano) == is_sum
            if is_sum:
                is_own = name.startswith("hostprobe.agent")
                identity = agent.identity
                assert point.start_time_unix_nano == (identity.started_unix_ns if is_own else identity.boot_unix_ns)
    assert set(kinds) == {"counter", "amount"}


def test_the_resource_is_the_host_and_the_run() -> None:
    tags = {"env": "prod", "host.name": "of a tag", "größe": 'q"\n\t🦀', "empty": ""}
    writer = Writer("otlp", identity=Identity("web.1", "6f0c", tags))
    writer.begin()
    (resource,) = request(writer.payload()).resource_metrics
    assert {one.key: one.value.string_value for one in resource.resource.attributes} == {
        "env": "prod",
        "größe": 'q"\n\t🦀',
        "empty": "",
        "host.name": "web.1",
        "os.type": platform.system().lower(),
        "service.name": "hostprobe",
        "service.instance.id": "6f0c",
        "service.version": __version__,
    }
    assert len(resource.resource.attributes) == 8
    found = metrics(writer.payload())
    assert [attributes(point) for point in points(found["hostprobe.frame.sequence"])] == [{}]


@pytest.mark.parametrize("time_ns", [1, TIME_NS, 2**63 - 1])
def test_times_are_exact(time_ns: int) -> None:
    writer = Writer("otlp")
    writer.begin(time_ns)
    disks(writer, vda=5)
    for metric in metrics(writer.payload()).values():
        assert [point.time_unix_nano for point in points(metric)] == [time_ns]


def test_payloads_one_behind_the_other_are_one_message() -> None:
    writer = Writer("otlp")
    payloads = []
    for reads in range(3):
        writer.begin()
        disks(writer, vda=reads)
        payloads.append(writer.payload())
    whole = request(b"".join(payloads))
    assert [resource.SerializeToString() for resource in whole.resource_metrics] == [
        request(payload).resource_metrics[0].SerializeToString() for payload in payloads
    ]
    assert [request(payload).SerializeToString() for payload in payloads] == payloads


@pytest.mark.parametrize(
    ("count", "threads", "expected"),
    [
        (2**63 - 1, -(2.0**63), (2**63 - 1, -(2**63))),
        (2**63, 2.0**63, (None, None)),
        (COUNTER_MAX, -1e19, (None, None)),
        (0, -0.0, (0, 0)),
        (None, NAN, (None, None)),
    ],
)
def test_whole_numbers_that_64_bits_cannot_hold_are_absent(
    count: int | None, threads: float, expected: tuple[int | None, int | None]
) -> None:
    writer = Writer("otlp")
    writer.begin()
    writer.put(TIMES, ((), (100, count), (0.5, threads, NAN)))
    found = metrics(writer.payload())
    for name, value in zip(("hostprobe.times.events", "hostprobe.times.threads"), expected, strict=True):
        assert (name in found) == (value is not None)
        if value is not None:
            (point,) = points(found[name])
            assert (point.WhichOneof("value"), point.as_int) == ("as_int", value)
    (point,) = points(found["hostprobe.times.busy_seconds"])
    assert (point.WhichOneof("value"), point.as_double) == ("as_double", 1.0)


@pytest.mark.parametrize("label", ["", None, "\udcff", " \0\n", 'q"\\', "🦀", "MMMMMMMM", "A" * 8, "x" * 5000])
def test_labels_come_back_as_they_were(label: str | None) -> None:
    writer = Writer("otlp")
    writer.begin()
    writer.put(DISK, ((label, "ssd"), (5, 2000), (1.0, NAN)))
    (point,) = points(metrics(writer.payload())["hostprobe.disk.reads"])
    shown = "\\udcff" if label == "\udcff" else label or ""
    assert (attributes(point), point.as_int) == ({"device": shown, "kind": "ssd"}, 5)


# When sums began


def test_sums_began_with_the_host_or_the_agent() -> None:
    writer = Writer("otlp")
    writer.begin()
    disks(writer, vda=5, vdb=6)
    writer.put(OWN, (("cpu",), (0,), (1.0,)))
    assert starts(writer) == {"vda": BOOT_NS, "vdb": BOOT_NS}
    assert starts(writer, "hostprobe.agent_probe.failures") == {"cpu": STARTED_NS}
    writer.begin()
    writer.begin()
    disks(writer, vda=5, vdb=7)
    writer.put(TIMES, ((), (1, 1), ()))  # for the first time, but its row isn't new
    assert starts(writer) == {"vda": BOOT_NS, "vdb": BOOT_NS}
    assert starts(writer, "hostprobe.times.events") == {"": BOOT_NS}


def test_a_host_whose_boot_is_unknown() -> None:
    writer = Writer("otlp", identity=Identity("h", "i", {}, started_unix_ns=STARTED_NS))
    writer.begin()
    disks(writer, vda=5)
    assert starts(writer) == {"vda": 0}


def test_rows_that_came_later_began_with_the_frame_before_and_keep_that() -> None:
    writer = Writer("otlp")
    writer.begin()
    disks(writer, vda=5)
    starts(writer)
    writer.begin()
    disks(writer, vda=5, vdb=1)
    assert starts(writer) == {"vda": BOOT_NS, "vdb": at(0)}
    writer.begin()
    disks(writer, vdb=2, vda=6)
    assert starts(writer) == {"vda": BOOT_NS, "vdb": at(0)}
    writer.begin()
    disks(writer, vdb=3)
    assert starts(writer) == {"vdb": at(0)}
    writer.begin()
    disks(writer, vda=9, vdb=3)
    assert starts(writer) == {"vda": at(3), "vdb": at(0)}


def test_a_sum_that_fell_began_with_the_frame_before_and_keeps_that() -> None:
    writer = Writer("otlp")
    expected = [BOOT_NS, BOOT_NS, at(1), at(1), at(3), at(3)]
    for number, reads in enumerate([5, 9, 3, 8, 2, 2]):
        writer.begin()
        disks(writer, vda=reads, vdb=number)
        assert starts(writer) == {"vda": expected[number], "vdb": BOOT_NS}
        assert starts(writer, "hostprobe.disk.busy_seconds") == {"vda": BOOT_NS, "vdb": BOOT_NS}


@pytest.mark.parametrize("change", ["row", "order", "unknown", "table"])
def test_a_sum_that_fell_while_something_else_changed(change: str) -> None:
    """Nothing is forgotten when the message is laid out anew, and no other sum of the row begins anew."""
    writer = Writer("otlp")
    writer.begin()
    disks(writer, vda=9, vdb=1)
    starts(writer)
    writer.begin()
    if change == "row":
        disks(writer, vda=3, vdb=1, vdc=1)
    elif change == "order":
        disks(writer, vdb=1, vda=3)
    elif change == "unknown":
        disks(writer, vda=3, vdb=None)
    else:
        disks(writer, vda=3, vdb=1)
        writer.put(TIMES, ((), (1, 1), ()))
    assert starts(writer)["vda"] == at(0)
    writer.begin()
    disks(writer, vda=4, vdb=1)
    assert starts(writer) == {"vda": at(0), "vdb": BOOT_NS}
    assert starts(writer, "hostprobe.disk.busy_seconds") == {"vda": BOOT_NS, "vdb": BOOT_NS}


def test_a_sum_that_fell_while_it_was_unknown() -> None:
    writer = Writer("otlp")
    for reads in (9, None, None):
        writer.begin()
        disks(writer, vda=reads, vdb=1)
        writer.payload()
    writer.begin()
    disks(writer, vda=3, vdb=1)
    assert starts(writer) == {"vda": at(2), "vdb": BOOT_NS}


def test_sinks_that_want_different_tables_see_the_same_starts() -> None:
    """One serializer writes a frame for each of them, in turns."""
    writer = Writer("otlp")
    for number, reads in enumerate([9, 9, 3, 4]):
        writer.begin()
        disks(writer, vda=reads)
        writer.put(TIMES, ((), (1, 9 - number), ()))
        for tables in (("times",), ("disk",), (), ("disk", "times")):
            found = metrics(writer.payload(tables))
            if "times" in tables or not tables:
                (point,) = points(found["hostprobe.times.events"])
                assert point.start_time_unix_nano == (at(number - 1) if number else BOOT_NS)
            if "disk" in tables or not tables:
                (point,) = points(found["hostprobe.disk.reads"])
                assert point.start_time_unix_nano == (BOOT_NS if number < 2 else at(1))


def test_a_clock_that_is_set_back_leaves_no_start_in_the_future() -> None:
    writer = Writer("otlp")
    writer.begin()
    disks(writer, vda=9)
    writer.payload()
    for reads, time_ns, start_ns in [
        (3, at(10), at(0)),  # it fell
        (4, at(-500), at(-500)),
        (5, at(-490), at(-500)),  # a start that moved with each frame would be a reset with each frame
        (6, at(-2000), at(-2000)),  # before the boot
        (7, at(20), at(-2000)),
    ]:
        writer.begin(time_ns)
        disks(writer, vda=reads)
        assert starts(writer) == {"vda": start_ns}


def test_amounts_are_sums_that_may_fall() -> None:
    with collected("minimal") as (agent, frame):
        writer = Writer("otlp", ())
        writer.frame, writer.serializer = frame, agent.serializer("otlp")
        writer.payload()
        frame.begin(frame.time_unix_ns + 1, frame.monotonic_ns + 1)
        for scheduled in agent.cycle.probes:
            scheduled.probe.collect(frame)
        table = frame.tables["memory"]
        table.gauges[0, table.spec.gauge_index["used_bytes"]] = 1.0
        metric = metrics(writer.payload())["system.memory.usage"]
        assert not metric.sum.is_monotonic
        assert {point.start_time_unix_nano for point in points(metric)} == {agent.identity.boot_unix_ns}
        assert {attributes(point)["system.memory.state"]: point.as_int for point in points(metric)}["used"] == 1


def test_a_table_without_columns_has_no_metrics() -> None:
    writer = Writer("otlp")
    writer.begin()
    writer.put(BARE, (("x",), (), ()))
    assert set(metrics(writer.payload())) == {
        "hostprobe.frame.sequence",
        "hostprobe.frame.time_unix_seconds",
        "hostprobe.frame.degraded_tables",
    }


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_what_is_no_number_is_absent(value: float) -> None:
    writer = Writer("otlp")
    writer.begin()
    writer.put(DISK, (("vda", "ssd"), (None, None), (value, value)))
    assert not any("disk" in name for name in metrics(writer.payload()))


def test_nothing_is_kept_of_rows_that_have_gone() -> None:
    writer = Writer("otlp")
    for number in range(200):
        writer.begin()
        disks(writer, **{f"disk{number}": 1, f"disk{number + 1}": 1})
        writer.payload()
    assert len(writer.serializer._starts["disk"]) == 2
    assert len(writer.serializer._held["disk"]) <= 2 * len(DISK.counters)
