"""Line protocol against a strict parser of its own, which escapes as InfluxDB's does."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from agent.assembly import Agent
from agent.frame import Frame
from agent.serializers.document import Identity
from agent.serializers.influx import escaped
from agent.table import COUNTER_MAX, NAN
from tests.serializers.writing import BARE, DISK, IDENTITY, TIME_NS, TIMES, Writer, collected, known

FLOAT = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")
WHOLE = re.compile(r"-?\d+i")


class Point(NamedTuple):
    """A line: whole numbers are ints, others floats."""

    table: str
    tags: dict[str, str]
    fields: dict[str, float]
    time_ns: int


def cut(text: str, ends: str) -> tuple[str, str, str]:
    """A text up to the first of these that has no backslash directly before it, without escapes; that; the rest."""
    for place, character in enumerate(text):
        if character in ends and (place == 0 or text[place - 1] != "\\"):
            return re.sub(r"\\([,= ])", r"\1", text[:place]), character, text[place + 1 :]
    raise AssertionError(f"none of {ends!r} ends {text!r}")


def point(line: str) -> Point:
    table, end, rest = cut(line, ", ")
    tags: dict[str, str] = {}
    while end == ",":
        name, _, rest = cut(rest, "=")
        value, end, rest = cut(rest, ", =")
        assert name
        assert value
        assert name not in tags
        assert end != "="
        tags[name] = value
    text, _, stamp = rest.partition(" ")
    fields = {}
    for field in text.split(","):
        name, number = field.split("=")
        assert re.fullmatch("[a-z_0-9]+", name)
        assert name not in fields
        assert (WHOLE if number.endswith("i") else FLOAT).fullmatch(number), number
        fields[name] = int(number[:-1]) if number.endswith("i") else float(number)
        assert -(2**63) <= fields[name] < 2**63 or isinstance(fields[name], float)
    assert re.fullmatch(r"-?\d+", stamp), line
    return Point(table, tags, fields, int(stamp))


def points(text: str) -> list[Point]:
    assert not re.search(r"[\0-\x09\x0b-\x1f\x7f]", text)
    return [point(line) for line in text.split("\n")]


@pytest.fixture(scope="module", params=["standard", "full"])
def real(request: pytest.FixtureRequest) -> Iterator[tuple[Agent, Frame]]:
    with collected(request.param) as found:
        yield found


def test_every_known_value_of_this_host_is_there_and_no_other(real: tuple[Agent, Frame]) -> None:
    agent, frame = real
    writer = Writer("influx", ())
    writer.frame, writer.serializer = frame, agent.serializer("influx")
    found = Counter[tuple[object, ...]]()
    for one in points(writer.text()):
        assert one.time_ns == frame.time_unix_ns
        for column, value in one.fields.items():
            found[one.table, tuple(sorted(one.tags.items())), column, type(value), value] += 1
    expected = Counter[tuple[object, ...]]()
    specs = {table.spec.name: table.spec.labels for table in frame.tables.values()}
    specs |= {"frame": ("host", "instance", "version"), "left_out": ("table",)}
    for table, labels, column, value in known(frame, agent.identity):
        row = {name: label for name, label in zip(specs[table], labels, strict=True) if label}
        tags = {"host": agent.identity.host} | row
        expected[table, tuple(sorted(tags.items())), column, type(value), value] += 1
    assert found == expected
    assert expected.total() > 200


def test_a_row_is_a_line_to_the_letter() -> None:
    writer = Writer("influx")
    writer.begin()
    writer.put(TIMES, ((), (81_233, 2**63 - 1), (0.5, 12.0, NAN)))
    writer.put(DISK, (("vda", "ssd"), (2**53 + 1, 1500), (3.0, 1e-05)), (("vdb", None), (None, None), (NAN, NAN)))
    writer.put(BARE, (("nothing",), (), ()))
    tags = "env=prod,rack=42,host=web-1"
    lines = writer.text().split("\n")
    assert lines[0].startswith(f"frame,{tags},instance=6f0c,version=")
    assert lines[0].endswith(f" sequence=1i,time_unix_seconds=1795217867.1234567,degraded_tables=0i {TIME_NS}")
    assert lines[1:] == [
        f"times,{tags} load1=0.5,busy_seconds_total=812.33,events_total=9223372036854775807i,threads=12i {TIME_NS}",
        f"disk,{tags},device=vda,kind=ssd reads_total=9007199254740993i,in_progress=3i,busy_seconds_total=1.5,"
        f"wait_seconds=0.00001 {TIME_NS}",
    ]


def test_a_line_has_only_what_is_known() -> None:
    """Of three rows each has another field that is unknown, and a fourth no line."""
    writer = Writer("influx", identity=Identity("h", "i", {}))
    writer.begin()
    rows = [((1, None), (NAN, NAN)), ((None, None), (2.0, NAN)), ((None, None), (NAN, NAN)), ((3, 4000), (5.0, 6.0))]
    writer.put(DISK, *((("d", str(place)), counters, gauges) for place, (counters, gauges) in enumerate(rows)))
    _, *found = points(writer.text())
    assert [(one.tags["kind"], one.fields) for one in found] == [
        ("0", {"reads_total": 1}),
        ("1", {"in_progress": 2}),
        ("3", {"reads_total": 3, "in_progress": 5, "busy_seconds_total": 4.0, "wait_seconds": 6.0}),
    ]


@pytest.mark.parametrize(
    ("counter", "gauge", "expected"),
    [
        (2**63 - 1, -(2.0**63), {"events_total": 2**63 - 1, "threads": -(2**63)}),
        (2**63, 2.0**63, {}),
        (COUNTER_MAX, -1e19, {}),
        (0, math.inf, {"events_total": 0}),
        (0, -0.0, {"events_total": 0, "threads": 0}),
    ],
)
def test_whole_numbers_that_64_bits_cannot_hold_are_absent(
    counter: int, gauge: float, expected: dict[str, int]
) -> None:
    writer = Writer("influx")
    writer.begin()
    writer.put(TIMES, ((), (100, counter), (0.5, gauge, NAN)))
    _, times = points(writer.text())
    assert times.fields == {"busy_seconds_total": 1.0, "load1": 0.5} | expected


@pytest.mark.parametrize("time_ns", [0, 1, -1, -1_500_000_000, TIME_NS, 2**63 - 1])
def test_times_are_nanoseconds(time_ns: int) -> None:
    writer = Writer("influx")
    writer.begin(time_ns)
    writer.put(TIMES, ((), (1, 1), ()))
    assert [one.time_ns for one in points(writer.text())] == [time_ns] * 2


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("a b,c=d", None),
        (r"back\slash", None),
        (r"a\,b\ c\=d", "a?,b? c?=d"),
        ("ends with \\", "ends with ?"),
        ("two \\\\", "two \\?"),
        ("line\nfeed\ttab\r\0\x1b\x7f", "line?feed?tab????"),
        ('"quoted"', None),
        ("größe 🦀", None),
        ("/mnt/\udcff", r"/mnt/\udcff"),
        (" \0\n", " ??"),
        (" \0", " ?"),
        ("#comment", None),
        ("", ""),
        (None, ""),
    ],
)
def test_labels_come_back_as_they_were(label: str | None, shown: str | None) -> None:
    """Also as the first one of a row, in the middle and as the last."""
    writer = Writer("influx", identity=Identity("h", "i", {}))
    writer.begin()
    writer.put(DISK, ((label, label), (1, 1), (2.0, 3.0)))
    _, disk = points(writer.text())
    expected = label if shown is None else shown
    assert disk.tags == {"host": "h"} | ({"device": expected, "kind": expected} if expected else {})
    assert disk.fields == {"reads_total": 1, "in_progress": 2, "busy_seconds_total": 0.001, "wait_seconds": 3.0}


def test_tags_have_odd_names_and_those_of_the_row_and_the_host_are_stronger() -> None:
    tags = {"a-b": "1", "1x": "2", "a b,c=d": "3", "device": "of a tag", "host": "of a tag", "": "x", "e\\": "4"}
    tags |= {"empty": ""}
    writer = Writer("influx", identity=Identity("web 1", "i", tags))
    writer.begin()
    writer.put(DISK, (("vda", None), (1, 1), ()))
    frame, disk = points(writer.text())
    common = {"a-b": "1", "1x": "2", "a b,c=d": "3", "e?": "4", "host": "web 1"}
    assert disk.tags == common | {"device": "vda"}
    assert frame.tags.items() >= (common | {"device": "of a tag", "instance": "i"}).items()


def test_escaped() -> None:
    assert escaped("a b,c=d\\e") == r"a\ b\,c\=d\e"
    assert IDENTITY.host == escaped(IDENTITY.host)
