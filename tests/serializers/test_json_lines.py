"""The JSON line against the frame's own arrays, and its buffer in the steady state."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from agent.frame import Frame
from agent.pool import Buffer, buffer_pool
from agent.serializers.document import HEADER, Identity
from agent.serializers.json_lines import JsonSerializer
from agent.serializers.schema import line_schema
from agent.table import COUNTER_MAX, NAN, Labels, TableSpec, counter, gauge, rate, ratio

IDENTITY = Identity(host="web-1", instance="6f0c", tags={"env": "prod", "rack": "42"})
TIME_NS = 1_795_217_867_123_456_789

TIMES = TableSpec(
    "times",
    "Every kind of column, in an order that is not the order of the arrays.",
    ratio(
        "busy_ratio", "ratio", "Share.", over=("busy_seconds_total",), by=("busy_seconds_total", "idle_seconds_total")
    ),
    gauge("load1", "load", "Load."),
    counter("busy_seconds_total", "seconds", "Busy.", per=100),
    gauge("used_ratio", "ratio", "Share, computed by the probe.", derived=True),
    counter("events_total", "events", "Events."),
    gauge("threads", "tasks", "Threads."),
    counter("idle_seconds_total", "seconds", "Idle.", per=100),
    rate("events_per_second", "events/second", "Events a second.", "events_total"),
    gauge("wait_seconds", "seconds", "Waiting."),
)
COLUMNS = [column.name for column in TIMES.columns]
DISK = TableSpec(
    "disk",
    "A row each.",
    counter("reads_total", "reads", "Reads."),
    gauge("in_progress", "requests", "Now."),
    labels=("device", "kind"),
    rows=4,
)
EMPTY = TableSpec("bare", "Labels and nothing else.", labels=("name",))
HOST = TableSpec("host", "A table with the name of a header's field.", gauge("uptime_seconds", "seconds", "Up."))
SPECS = (TIMES, DISK, EMPTY, HOST)
VALIDATOR = Draft202012Validator(line_schema(SPECS))


class Writer:
    """Frames in, documents out, with one serializer and one buffer."""

    def __init__(self, specs: Sequence[TableSpec] = SPECS, rates: bool = True) -> None:
        self.frame = Frame(specs)
        self.buffer = Buffer()
        self.serializer = JsonSerializer(specs, IDENTITY, rates)

    def begin(self, monotonic_ns: int | None = None) -> Frame:
        """The next frame, a second after the one before unless given."""
        self.frame.begin(TIME_NS, self.frame.monotonic_ns + 10**9 if monotonic_ns is None else monotonic_ns)
        return self.frame

    def text(self) -> str:
        self.serializer.write(self.frame, self.buffer)
        return bytes(self.buffer.data).decode("utf-8", "strict")

    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.text())
        VALIDATOR.validate(document)
        return document


@pytest.fixture
def writer() -> Writer:
    return Writer()


def put_times(frame: Frame, counters: Sequence[int | None], gauges: Sequence[float]) -> None:
    table = frame.open(TIMES)
    table.put_counters(0, counters)
    table.put_gauges(0, gauges)
    frame.derive()


def test_header_of_the_first_frame(writer: Writer) -> None:
    writer.begin()
    assert writer.text() == (
        '{"schema":"hostprobe/1","host":"web-1","instance":"6f0c","sequence":1,'
        '"time":"2026-11-20T23:37:47.123456789Z","time_unix_ns":1795217867123456789,'
        '"interval_seconds":null,"tags":{"env":"prod","rack":"42"}}'
    )
    assert tuple(writer.document()) == HEADER


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000000Z"),
        (999_999_999, "1970-01-01T00:00:00.999999999Z"),
        (1_000_000_001, "1970-01-01T00:00:01.000000001Z"),
        (4_102_444_800_000_000_000, "2100-01-01T00:00:00.000000000Z"),
    ],
)
def test_time_is_rfc_3339_with_nanoseconds(writer: Writer, time_ns: int, text: str) -> None:
    writer.frame.begin(time_ns, 0)
    document = writer.document()
    assert (document["time"], document["time_unix_ns"]) == (text, time_ns)


def test_sequence_and_interval_of_later_frames(writer: Writer) -> None:
    writer.begin(0)
    writer.begin(250_000_000)
    document = writer.document()
    assert (document["sequence"], document["interval_seconds"]) == (2, 0.25)


def test_columns_stand_in_declared_order_with_their_own_values(writer: Writer) -> None:
    put_times(writer.begin(0), (81_233, 7, 1_000), (0.5, 12.0, 0.001, 0.75))
    assert list(writer.document()["times"].items()) == [
        ("busy_ratio", None),
        ("load1", 0.5),
        ("busy_seconds_total", 812.33),
        ("used_ratio", 0.75),
        ("events_total", 7),
        ("threads", 12),
        ("idle_seconds_total", 10.0),
        ("events_per_second", None),
        ("wait_seconds", 0.001),
    ]
    put_times(writer.begin(2 * 10**9), (81_243, 27, 1_030), (0.5, 12.0, 0.001, 0.75))
    document = writer.document()["times"]
    assert (document["busy_ratio"], document["events_per_second"]) == (0.25, 10.0)


def test_counters_are_exact_to_the_last_bit(writer: Writer) -> None:
    for value in (0, 2**53 + 1, 2**63, COUNTER_MAX - 1, COUNTER_MAX):
        put_times(writer.begin(), (0, value, 0), ())
        assert f'"events_total":{value},' in writer.text()
        assert writer.document()["times"]["events_total"] == value


def test_unknown_is_null(writer: Writer) -> None:
    put_times(writer.begin(), (None, None, 250), (NAN, NAN, NAN, NAN))
    assert writer.document()["times"] == dict.fromkeys(COLUMNS) | {"idle_seconds_total": 2.5}


def test_unknown_counters_of_one_row_are_not_those_of_another(writer: Writer) -> None:
    table = writer.begin().open(DISK)
    table.claim([("a", ""), ("b", ""), ("c", "")])
    for row, values in enumerate([(1,), (None,), (3,)]):
        table.put_counters(row, values)
        table.put_gauges(row, (row,))
    assert [row["reads_total"] for row in writer.document()["disk"]] == [1, None, 3]
    writer.begin()
    writer.begin()
    table = writer.frame.open(DISK)
    table.claim([("a", ""), ("b", "")])
    table.put_counters(1, (9,))
    assert [row["reads_total"] for row in writer.document()["disk"]] == [0, 9]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (-3.0, "-3"),
        (16_777_216.0, "16777216"),
        (2.0**53, "9007199254740992"),
        (1e23, "1e23"),
        (-1e300, "-1e300"),
        (math.inf, "null"),
        (-math.inf, "null"),
        (NAN, "null"),
    ],
)
def test_whole_gauges_have_no_point_and_no_value_breaks_the_line(writer: Writer, value: float, text: str) -> None:
    put_times(writer.begin(), (0, 0, 0), (0.0, value, 0.0))
    assert f'"threads":{text},' in writer.text()
    assert '"load1":0.0,' in writer.text()
    writer.document()


def test_a_table_without_labels_is_an_object_and_one_with_labels_an_array(writer: Writer) -> None:
    frame = writer.begin()
    put_times(frame, (1, 2, 3), ())
    table = frame.open(DISK)
    table.claim([("vda", "ssd"), ("vdb", "hdd")])
    frame.open(EMPTY).claim([("only",)])
    document = writer.document()
    assert isinstance(document["times"], dict)
    assert document["disk"] == [
        {"device": "vda", "kind": "ssd", "reads_total": 0, "in_progress": None},
        {"device": "vdb", "kind": "hdd", "reads_total": 0, "in_progress": None},
    ]
    assert list(document["disk"][0]) == ["device", "kind", "reads_total", "in_progress"]
    assert document["bare"] == [{"name": "only"}]
    assert list(document)[len(HEADER) :] == ["times", "disk", "bare"]


def test_tables_stand_in_the_order_in_which_they_were_filled_and_absent_ones_are_absent(writer: Writer) -> None:
    frame = writer.begin()
    frame.open(DISK)
    frame.open(TIMES)
    document = writer.document()
    assert list(document)[len(HEADER) :] == ["disk", "times"]
    assert document["disk"] == []


def test_rows_dropped_is_there_only_when_rows_were_dropped(writer: Writer) -> None:
    writer.begin().open(DISK).claim([(str(row), "") for row in range(9)], row_limit=9)
    assert "disk_rows_dropped" not in writer.document()
    writer.begin().open(DISK).claim([(str(row), "") for row in range(9)], row_limit=2)
    document = writer.document()
    assert document["disk_rows_dropped"] == 7
    assert [row["device"] for row in document["disk"]] == ["0", "1"]
    assert list(document)[-2:] == ["disk", "disk_rows_dropped"]


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ('quote " and \\ backslash', None),
        ("line\nfeed\ttab\r\0\x1b\x7f", None),
        ("\u2028\u2029", None),
        ("größe 磁盘 🦀", None),
        ("", None),
        ("</script>", None),
        ("broken \udcff", "broken ?"),
        ("x" * 5000, None),
    ],
)
def test_labels_come_back_as_they_were_and_the_line_is_one(writer: Writer, label: str, shown: str | None) -> None:
    frame = writer.begin()
    frame.open(DISK).claim([(label, "kind")])
    put_times(frame, (1, COUNTER_MAX, None), (0.5, NAN))
    text = writer.text()
    assert "\n" not in text
    document = writer.document()
    assert document["disk"][0]["device"] == (label if shown is None else shown)
    assert document["times"]["events_total"] == COUNTER_MAX


def test_a_table_with_the_name_of_a_header_field_leaves_that_alone(writer: Writer) -> None:
    writer.begin().open(HOST).put_gauges(0, (5.5,))
    document = writer.document()
    assert document["host"] == "web-1"
    assert document["host_table"] == {"uptime_seconds": 5.5}


def test_without_rates_derived_columns_are_absent() -> None:
    writer = Writer(rates=False)
    for second in (0, 1):
        put_times(writer.begin(second * 10**9), (second, second, second), (0.5, 2.0, 0.1, 0.9))
    assert list(writer.document()["times"]) == [
        "load1",
        "busy_seconds_total",
        "events_total",
        "threads",
        "idle_seconds_total",
        "wait_seconds",
    ]


# Some of the tables


def some(writer: Writer, tables: Sequence[str] = (), left_out: Sequence[str] = ()) -> dict[str, Any]:
    """The document of a frame with four tables, of which one has rows that were dropped."""
    frame = writer.begin()
    put_times(frame, (1, 2, 3), (0.5, 2.0))
    frame.open(DISK).claim([("vda", "ssd"), ("vdb", "ssd")], row_limit=1)
    frame.open(EMPTY).claim([("only",)])
    frame.open(HOST)
    writer.serializer.write(frame, writer.buffer, tables, left_out)
    document: dict[str, Any] = json.loads(bytes(writer.buffer.data))
    VALIDATOR.validate(document)
    return document


@pytest.mark.parametrize(
    ("tables", "left_out", "keys"),
    [
        ((), (), ["times", "disk", "disk_rows_dropped", "bare", "host_table"]),
        (("disk",), (), ["disk", "disk_rows_dropped"]),
        (("bare", "times"), (), ["times", "bare"]),  # in the frame's order
        (("host",), (), ["host_table"]),
        (("absent",), (), []),
        ((), ("disk",), ["degraded", "times", "bare", "host_table"]),
        ((), ("times", "host"), ["degraded", "disk", "disk_rows_dropped", "bare"]),
        (("times", "disk"), ("disk",), ["degraded", "times"]),
        (("disk",), ("disk",), ["degraded"]),
    ],
)
def test_only_what_is_wanted_is_written(
    writer: Writer, tables: Sequence[str], left_out: Sequence[str], keys: list[str]
) -> None:
    document = some(writer, tables, left_out)
    assert list(document) == [*HEADER, *keys]
    if left_out:
        assert document["degraded"] == ["host_table" if name == "host" else name for name in left_out]


def test_a_table_alone_is_what_it_is_among_all(writer: Writer) -> None:
    whole, alone = some(writer), some(writer, ("disk",))
    assert alone["disk"] == whole["disk"]
    assert alone["disk_rows_dropped"] == whole["disk_rows_dropped"] == 1


@pytest.mark.parametrize("names", [[], [1], "disk", {}, None])
def test_the_schema_wants_names_of_what_was_left_out(writer: Writer, names: Any) -> None:
    document = some(writer, (), ("disk",))
    document["degraded"] = names
    assert not VALIDATOR.is_valid(document)


def test_a_table_named_degraded_leaves_the_header_alone() -> None:
    spec = TableSpec("degraded", "A table with the name of a header's field.", gauge("level", "units", "."))
    writer = Writer([spec])
    writer.begin().open(spec).put_gauges(0, (3.0,))
    assert json.loads(writer.text())["degraded_table"] == {"level": 3}
    assert "degraded_table" in line_schema([spec])["properties"]


@pytest.mark.parametrize("count", [300, 400, 490])
def test_the_names_of_what_was_left_out_fit_into_what_was_reserved(count: int) -> None:
    specs = [TableSpec(f"{number:03}" + "x" * 58, "Long.", gauge("level", "units", ".")) for number in range(count)]
    frame = Frame(specs)
    frame.begin(TIME_NS, 0)
    buffer = Buffer()
    JsonSerializer(specs, IDENTITY).write(frame, buffer, (), [spec.name for spec in specs])
    assert len(json.loads(bytes(buffer.data))["degraded"]) == count
    assert buffer.capacity.bit_count() == 1


# The buffer


def fill_disks(frame: Frame, labels: list[Labels], value: int) -> None:
    table = frame.open(DISK)
    count = table.claim(labels)
    table.counters[:count] = value
    table.gauges[:count, 0] = value


def test_growing_numbers_reallocate_nothing() -> None:
    frame = Frame(SPECS)
    serializer = JsonSerializer(SPECS, IDENTITY)
    pool = buffer_pool()
    labels = [(f"disk{row}", "ssd") for row in range(400)]
    lengths, allocations = set(), set()
    for cycle in range(64):
        frame.begin(TIME_NS + cycle * 10**18, cycle * 10**9)
        fill_disks(frame, labels, 2**cycle - 1)
        put_times(
            frame, (2**cycle, 2**cycle, 3**cycle % COUNTER_MAX), (cycle / 7, 2.0**cycle, cycle / 3, 1 / (cycle + 1))
        )
        buffer = pool.acquire()
        serializer.write(frame, buffer)
        lengths.add(len(buffer.data))
        allocations.add((id(buffer), id(buffer.data), buffer.capacity))
        pool.release(buffer)
    assert max(lengths) > min(lengths) + 10_000
    assert len(allocations) == 1
    assert (pool.made, pool.regrown, pool.let_go) == (1, 1, 0)  # from the starting size to this frame's


@pytest.mark.parametrize("count", [1, 40, 41, 79, 80, 81, 160, 320, 640, 1000])
def test_the_widest_values_fit_into_what_was_reserved(count: int) -> None:
    wide = TableSpec(
        "w", "Short names, wide values.", *(gauge(f"c{i}", "seconds", "Wide.") for i in range(9)), labels=("l",)
    )
    frame = Frame([wide])
    frame.begin(TIME_NS, 0)
    table = frame.open(wide)
    table.claim([("x" * 64,)] * count)
    for row in range(count):
        table.put_gauges(row, [-2.2250738585072014e-308] * 9)
    buffer = Buffer()
    JsonSerializer([wide], IDENTITY).write(frame, buffer)
    assert len(buffer.data) > count * 9 * 24
    assert buffer.capacity.bit_count() == 1  # a power of two, as it was reserved; what regrows is none


@pytest.mark.parametrize("count", [200, 220, 400, 440, 880])
def test_labels_of_a_paths_length_fit_into_what_was_reserved(count: int) -> None:
    frame = Frame([EMPTY])
    frame.begin(TIME_NS, 0)
    frame.open(EMPTY).claim([("x" * 64,)] * count)
    buffer = Buffer()
    JsonSerializer([EMPTY], IDENTITY).write(frame, buffer)
    assert len(buffer.data) > count * 64
    assert buffer.capacity.bit_count() == 1


def test_long_labels_make_the_buffer_grow_once() -> None:
    frame = Frame(SPECS)
    serializer = JsonSerializer(SPECS, IDENTITY)
    pool = buffer_pool()
    labels = [(f"{row}" * 300, "x" * 300) for row in range(100)]
    capacities = []
    for cycle in range(20):
        frame.begin(TIME_NS, cycle * 10**9)
        fill_disks(frame, labels, cycle)
        buffer = pool.acquire()
        serializer.write(frame, buffer)
        capacities.append(buffer.capacity)
        pool.release(buffer)
    assert len(buffer.data) > 60_000
    assert len(set(capacities)) == 1
    assert pool.regrown == 1


def test_a_small_frame_needs_no_more_than_the_starting_buffer() -> None:
    pool = buffer_pool()
    frame = Frame(SPECS)
    serializer = JsonSerializer(SPECS, IDENTITY)
    for cycle in range(10):
        frame.begin(TIME_NS, cycle)
        fill_disks(frame, [(f"disk{row}", "ssd") for row in range(30)], cycle)
        buffer = pool.acquire()
        serializer.write(frame, buffer)
        pool.release(buffer)
    assert (pool.made, pool.regrown) == (1, 0)


# Whatever a frame holds

COUNTERS = st.one_of(st.none(), st.integers(0, COUNTER_MAX), st.integers())
RATIOS = st.one_of(st.just(NAN), st.floats(0, 1))
GAUGES = st.floats(width=64)
LABELS = st.text(st.characters(codec=None), max_size=8)


def same(shown: Any, value: float) -> bool:
    return shown is None if not math.isfinite(value) else bool(shown == value)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(COUNTERS, COUNTERS, COUNTERS, GAUGES, GAUGES, GAUGES, RATIOS), min_size=1, max_size=4),
    st.lists(st.tuples(LABELS, LABELS, COUNTERS, GAUGES), max_size=6),
    st.integers(1, 8),
    st.booleans(),
)
def test_any_frame_is_the_arrays_it_was_made_of_and_validates(
    cycles: list[tuple[Any, ...]], disks: list[tuple[Any, ...]], limit: int, rates: bool
) -> None:
    writer = Writer(rates=rates)
    for second, values in enumerate(cycles):
        frame = writer.begin(second * 10**9)
        put_times(frame, values[:3], values[3:])
    table = frame.open(DISK)
    count = table.claim([(device, kind) for device, kind, _, _ in disks], limit)
    for row, (_, _, reads, in_progress) in enumerate(disks[:count]):
        table.put_counters(row, (reads,))
        table.put_gauges(row, (in_progress,))
    document = writer.document()
    times = frame.tables["times"]
    for index, column in enumerate(TIMES.counters):
        stored = math.nan if times.unknown[0, index] else int(times.counters[0, index])
        shown = document["times"][column.name]
        assert same(shown, stored) if column.per == 1 else same(shown, stored / column.per)
    for index, column in enumerate(TIMES.gauges):
        if rates or not column.derived:
            assert same(document["times"][column.name], whole(times.gauges[0, index], column.integral))
    assert document.get("disk_rows_dropped", 0) == len(disks) - count
    for shown, (device, kind, _, in_progress) in zip(document["disk"], disks, strict=False):
        assert shown["device"] == device.encode(errors="replace").decode()
        assert shown["kind"] == kind.encode(errors="replace").decode()
        assert same(shown["in_progress"], whole(in_progress, True))


def whole(value: float, integral: bool) -> float:
    """A gauge as it is shown: a column of whole numbers has no fractions."""
    return float(np.trunc(value)) if integral else value
