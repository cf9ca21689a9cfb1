"""Remote write against the message's own class."""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Iterator

import pytest

from agent.assembly import Agent
from agent.frame import Frame
from agent.serializers import formats
from agent.serializers.document import Identity
from agent.serializers.names import naming
from agent.serializers.remote_write import write_request_class
from agent.table import COUNTER_MAX, NAN
from tests.serializers.writing import (
    DISK,
    TIME_NS,
    TIMES,
    Known,
    Series,
    Writer,
    collected,
    known,
    series,
)

WRITE_REQUEST = write_request_class()
NAMES: list[formats.Names] = ["hostprobe", "node_exporter"]


def read(payload: bytes) -> list[tuple[Series, int]]:
    """Every series with its sample's time in ms."""
    found = []
    for one in WRITE_REQUEST.FromString(payload).timeseries:
        labels = [(label.name, label.value) for label in one.labels]
        names = [name for name, _ in labels]
        assert names == sorted(set(names))
        assert all(value for _, value in labels)
        assert all(re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name) for name in names)
        (sample,) = one.samples
        named = dict(labels)
        found.append((Series(named.pop("__name__"), tuple(sorted(named.items())), sample.value), sample.timestamp))
    return found


def of(payload: bytes, name: str) -> list[Series]:
    return [one for one, _ in read(payload) if one.name == name]


@pytest.fixture(scope="module", params=["standard", "full"])
def real(request: pytest.FixtureRequest) -> Iterator[tuple[Agent, Frame]]:
    with collected(request.param) as found:
        yield found


@pytest.mark.parametrize("names", NAMES)
def test_every_known_value_of_this_host_is_there_and_no_other(real: tuple[Agent, Frame], names: formats.Names) -> None:
    agent, frame = real
    writer = Writer("remote_write", ())
    writer.frame, writer.serializer = frame, agent.serializer("remote_write", names)
    found = read(writer.payload())
    assert {time for _, time in found} == {frame.time_unix_ns // 10**6}
    values = known(frame, agent.identity)
    if names == "node_exporter":
        values.append(Known("uname", agent.identity.uname, "info", 1))
    specs = [table.spec for table in frame.tables.values()]
    expected = series(values, specs, naming(names), job="hostprobe", instance=agent.identity.host)
    assert Counter(one for one, _ in found) == Counter(
        one._replace(value=float(one.value), labels=tuple(pair for pair in one.labels if pair[1])) for one in expected
    )
    assert len(expected) > 200


@pytest.mark.parametrize(
    ("time_ns", "milliseconds"),
    [
        (TIME_NS, TIME_NS // 10**6),
        (0, 1),  # a 0 has no place in the message
        (999_999, 1),
        (10**6, 1),
        (127 * 10**6, 127),
        (128 * 10**6, 128),
        (2**14 * 10**6 - 1, 2**14 - 1),
        (1_000_000_000 * 10**9 + 999_999, 10**12),  # 2001, a byte less than today
        (2**42 * 10**6, 2**42),  # 2109, a byte more
        (2**63 - 1, (2**63 - 1) // 10**6),
        (-1, -1),
        (-1_500_000, -2),
        (-(2**62), -(2**62) // 10**6),
    ],
)
def test_times_are_milliseconds(time_ns: int, milliseconds: int) -> None:
    writer = Writer("remote_write")
    for time in (TIME_NS, time_ns, TIME_NS, time_ns):
        writer.begin(time)
        writer.put(DISK, (("vda", "ssd"), (5, 2000), (1.0, NAN)))
        found = read(writer.payload())
        assert {stamp for _, stamp in found} == {milliseconds if time == time_ns else TIME_NS // 10**6}
        assert [one.value for one, _ in found if one.name == "hostprobe_disk_reads_total"] == [5.0]


def test_payloads_one_behind_the_other_are_one_message() -> None:
    writer = Writer("remote_write")
    payloads = []
    for reads in range(3):
        writer.begin()
        writer.put(DISK, (("vda", "ssd"), (reads, 2000), (1.0, NAN)))
        payloads.append(writer.payload())
    assert read(b"".join(payloads)) == [one for payload in payloads for one in read(payload)]


@pytest.mark.parametrize("count", [0, 1, 2**53 + 1, 2**63, COUNTER_MAX])
def test_counters_are_the_nearest_doubles(count: int) -> None:
    writer = Writer("remote_write")
    writer.begin()
    writer.put(TIMES, ((), (5, count), (0.5, -0.0, NAN)))
    payload = writer.payload()
    assert [one.value for one in of(payload, "hostprobe_times_events_total")] == [float(count)]
    assert [one.value for one in of(payload, "hostprobe_times_busy_seconds_total")] == [0.05]
    assert of(payload, "hostprobe_times_used_ratio") == []


@pytest.mark.parametrize("label", ["", None, "\udcff", " \0\n", 'q"\\', "🦀", "AAAAAAAA", "x" * 5000])
def test_labels_come_back_as_they_were(label: str | None) -> None:
    writer = Writer("remote_write", identity=Identity("web-1", "i", {"env": "prod", "empty": ""}))
    writer.begin()
    writer.put(DISK, ((label, "ssd"), (5, None), (NAN, NAN)))
    shown = "\\udcff" if label == "\udcff" else label
    labels = {"env": "prod", "instance": "web-1", "job": "hostprobe", "kind": "ssd"} | (
        {"device": shown} if shown else {}
    )
    expected = Series("hostprobe_disk_reads_total", tuple(sorted(labels.items())), 5.0)
    assert of(writer.payload(), "hostprobe_disk_reads_total") == [expected]


def test_tags_have_odd_names_and_all_other_labels_are_stronger() -> None:
    tags = {"a-b": "1", "1x": "2", "device": "t", "__name__": "3", "job": "t", "instance": "t", "ä": "ö", "Z": "4"}
    writer = Writer("remote_write", identity=Identity("web-1", "i", tags))
    writer.begin()
    writer.put(DISK, (("vda", None), (5, None), (NAN, NAN)))
    common = {"a_b": "1", "_1x": "2", "_name__": "3", "_": "ö", "Z": "4", "job": "hostprobe", "instance": "web-1"}
    payload = writer.payload()
    (disk,) = of(payload, "hostprobe_disk_reads_total")
    assert dict(disk.labels) == common | {"device": "vda"}
    (frame,) = of(payload, "hostprobe_frame_sequence")
    assert dict(frame.labels).items() >= (common | {"device": "t", "run": "i", "host": "web-1"}).items()


def test_only_what_is_due_is_told() -> None:
    writer = Writer("remote_write")
    writer.begin()
    writer.put(DISK, (("vda", None), (5, None), (NAN, NAN)))
    assert len(of(writer.payload(), "hostprobe_disk_reads_total")) == 1
    writer.begin()
    assert of(writer.payload(), "hostprobe_disk_reads_total") == []


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_what_is_no_number_is_absent(value: float) -> None:
    writer = Writer("remote_write")
    writer.begin()
    writer.put(DISK, (("vda", "ssd"), (None, None), (value, value)))
    assert not any("disk" in one.name for one, _ in read(writer.payload()))


def ended(payload: bytes) -> list[tuple[str, str]]:
    """The staleness markers of a payload: name and device; every one has the frame's time and Prometheus' own NaN."""
    found = []
    for one in WRITE_REQUEST.FromString(payload).timeseries:
        (sample,) = one.samples
        if math.isnan(sample.value):
            assert struct.pack("<Q", 0x7FF0000000000002) in one.SerializeToString()
            named = {label.name: label.value for label in one.labels}
            found.append((named["__name__"], named.get("device", "")))
    return found


def test_a_series_that_ends_is_marked_once() -> None:
    writer = Writer("remote_write")
    seen = []
    for devices in (["a", "b"], ["a"], ["a"], ["a", "b"], ["b"]):
        writer.begin()
        writer.put(DISK, *[((device, "ssd"), (1, 1), (1.0, 1.0)) for device in devices])
        payload = writer.payload()
        seen.append(ended(payload))
        assert {timestamp for _, timestamp in read(payload)} == {writer.frame.time_unix_ns // 1_000_000}
    names = ["busy_seconds_total", "in_progress", "reads_total", "wait_seconds"]
    of_b, of_a = ([(f"hostprobe_disk_{name}", device) for name in names] for device in "ba")
    assert seen == [[], of_b, [], [], of_a]


def test_a_value_that_becomes_unknown_ends_its_series_and_an_absent_table_none() -> None:
    writer = Writer("remote_write")
    writer.begin()
    writer.put(DISK, (("a", "ssd"), (1, 1), (1.0, 1.0)))
    writer.payload()
    writer.begin()
    assert ended(writer.payload()) == []  # its probe isn't due
    writer.begin()
    writer.put(DISK, (("a", "ssd"), (1, None), (1.0, 1.0)))
    assert ended(writer.payload()) == [("hostprobe_disk_busy_seconds_total", "a")]
