"""StatsD and DogStatsD against a strict parser of its own: gauges, and the growth of counters."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import NamedTuple

import pytest

from agent.serializers import formats
from agent.serializers.document import Identity
from agent.table import COUNTER_MAX, NAN, Labels
from tests.serializers.writing import DISK, IDENTITY, SPECS, TIMES, Row, Writer, collected, known

BOTH: list[formats.Name] = ["statsd", "dogstatsd"]
NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
LINES = {
    "statsd": re.compile(rf"([\w.-]+):({NUMBER})\|([cg])", re.ASCII),
    "dogstatsd": re.compile(rf"([a-z0-9_.]+):({NUMBER})\|([cg])\|#(.*)"),
}


class Metric(NamedTuple):
    name: str
    text: str
    kind: str
    tags: dict[str, str]


def metrics(format: formats.Name, text: str) -> list[Metric]:
    found = []
    for line in text.split("\n"):
        match = LINES[format].fullmatch(line)
        assert match, line
        tags = {}
        for tag in match[4].split(",") if format == "dogstatsd" else ():
            name, colon, value = tag.partition(":")
            assert name
            assert colon
            assert name not in tags
            assert not re.search(r"[|#\s\0-\x1f]", tag)
            tags[name] = value
        if match[3] == "g":
            assert not match[2].startswith("-"), f"a change of a gauge: {line}"
        found.append(Metric(match[1], match[2], match[3], tags))
    return found


def grown(writer: Writer, column: str = "reads_total") -> dict[str, str]:
    """The growth of a counter of each disk, by its device."""
    found = metrics("statsd", writer.text())
    return {
        one.name.split(".")[3]: one.text
        for one in found
        if one.kind == "c" and one.name.split(".")[2] == "disk" and one.name.endswith(column)
    }


def disks(writer: Writer, **reads: int | None) -> None:
    """The next frame, with these disks in this order."""
    writer.begin()
    writer.put(DISK, *(((device, "ssd"), (count, None), (1.0, NAN)) for device, count in reads.items()))


@pytest.mark.parametrize("format", BOTH)
@pytest.mark.parametrize("template", ["standard", "full"])
def test_gauges_of_this_host_and_the_growth_of_its_counters(format: formats.Name, template: str) -> None:
    """Both frames are known to the test: each counter's growth is the second's less the first's."""
    with collected(template) as (agent, frame):
        before = {one[:3]: one.value for one in known(frame, agent.identity)}
        agent.cycle.collect()
        writer = Writer(format, ())
        writer.frame, writer.serializer = frame, agent.serializer(format)
        found = metrics(format, writer.text())
        now = known(frame, agent.identity)
        kinds = {(table.spec.name, c.name): c for table in frame.tables.values() for c in table.spec.counters}
        scale = {key: column.per for key, column in kinds.items()}
        gauges = sorted(float(one.value) for one in now if (one.table, one.column) not in kinds and one.value >= 0)
        growth = sorted(
            round((one.value - before[one[:3]]) * scale[one.table, one.column]) / scale[one.table, one.column]
            for one in now
            if (one.table, one.column) in kinds and one[:3] in before and one.value >= before[one[:3]]
        )
    assert sorted(float(one.text) for one in found if one.kind == "g") == gauges
    assert sorted(float(one.text) for one in found if one.kind == "c") == pytest.approx(growth)
    assert len(growth) > 100


def test_statsd_to_the_letter() -> None:
    writer = Writer("statsd")
    for events in (5, COUNTER_MAX):
        writer.begin()
        writer.put(TIMES, ((), (100 + events % 10, events), (0.5, 12.0, NAN)))
        writer.put(DISK, (("sd a", None), (events, 1), (3.0, 1e-05)))
    assert writer.text().split("\n") == [
        "hostprobe.web-1.frame.sequence:2|g",
        "hostprobe.web-1.frame.time_unix_seconds:1795217868.1234567|g",
        "hostprobe.web-1.frame.interval_seconds:1.0|g",
        "hostprobe.web-1.frame.degraded_tables:0|g",
        "hostprobe.web-1.times.load1:0.5|g",
        "hostprobe.web-1.times.busy_seconds_total:0.0|c",
        "hostprobe.web-1.times.events_total:18446744073709551610|c",
        "hostprobe.web-1.times.threads:12|g",
        "hostprobe.web-1.disk.sd_a._.reads_total:18446744073709551610|c",
        "hostprobe.web-1.disk.sd_a._.in_progress:3|g",
        "hostprobe.web-1.disk.sd_a._.busy_seconds_total:0.0|c",
        "hostprobe.web-1.disk.sd_a._.wait_seconds:0.00001|g",
    ]


def test_dogstatsd_has_tags() -> None:
    writer = Writer("dogstatsd")
    for _ in range(2):
        writer.begin()
        writer.put(DISK, (("sd a", None), (7, None), (3.0, NAN)))
    tags = "env:prod,rack:42,host:web-1"
    assert writer.text().split("\n")[-2:] == [
        f"hostprobe.disk.reads_total:0|c|#{tags},device:sd_a",
        f"hostprobe.disk.in_progress:3|g|#{tags},device:sd_a",
    ]
    assert writer.text().startswith(f"hostprobe.frame.sequence:2|g|#{tags}\n")


def test_counters_of_the_first_frame_and_of_new_rows_have_not_grown() -> None:
    writer = Writer("statsd")
    disks(writer, a=5, b=7)
    assert grown(writer) == {}
    disks(writer, a=6, b=7, c=100)
    assert grown(writer) == {"a": "1", "b": "0"}
    disks(writer, a=8, c=103)
    assert grown(writer) == {"a": "2", "c": "3"}
    disks(writer, a=9, b=9, c=104)
    assert grown(writer) == {"a": "1", "c": "1"}


def test_counters_that_fell_or_are_unknown_have_not_grown() -> None:
    writer = Writer("statsd")
    disks(writer, a=5, b=None, c=7)
    disks(writer, a=4, b=9, c=None)
    assert grown(writer) == {}
    disks(writer, a=6, b=10, c=8)
    assert grown(writer) == {"a": "2", "b": "1"}


def test_rows_that_swap_places_keep_their_growth() -> None:
    writer = Writer("statsd")
    disks(writer, a=5, b=100, c=1000)
    disks(writer, c=1004, a=6, b=102)
    assert grown(writer) == {"a": "1", "b": "2", "c": "4"}
    disks(writer, a=16, b=122, c=1034)
    assert grown(writer) == {"a": "10", "b": "20", "c": "30"}


def test_a_table_that_was_not_due_has_grown_since_it_was_collected() -> None:
    writer = Writer("statsd")
    disks(writer, a=5)
    writer.begin()
    assert grown(writer) == {}
    writer.begin()
    writer.put(DISK, (("a", "ssd"), (99, None), (1.0, NAN)))
    writer.frame.discard([DISK])
    assert grown(writer) == {}
    disks(writer, a=9)
    assert grown(writer) == {"a": "4"}


def test_counters_that_count_something_else_from_now_on_have_not_grown() -> None:
    writer = Writer("statsd")
    disks(writer, a=5)
    disks(writer, a=9)
    writer.frame.tables["disk"].continues = False
    assert grown(writer) == {}
    disks(writer, a=10)
    assert grown(writer) == {"a": "1"}


@pytest.mark.parametrize("format", BOTH)
@pytest.mark.parametrize("value", [-1.0, -1e23, -5e-324, NAN, float("inf")])
def test_a_gauge_below_0_would_be_a_change_and_is_absent(format: formats.Name, value: float) -> None:
    writer = Writer(format)
    writer.begin()
    writer.put(DISK, (("a", None), (None, None), (value, value)))
    assert all(one.name.split(".")[-2] == "frame" for one in metrics(format, writer.text()))


@pytest.mark.parametrize("format", BOTH)
def test_a_zero_with_a_sign_is_no_change_of_a_gauge(format: formats.Name) -> None:
    writer = Writer(format)
    writer.begin()
    writer.put(DISK, (("a", None), (None, None), (-0.0, -0.0)))
    assert [one.text for one in metrics(format, writer.text())[-2:]] == ["0", "0.0"]


def test_the_growths_of_many_frames_add_up_to_what_the_counters_say() -> None:
    """Rows come, go and swap, tables aren't due: what is missing is only what a row grew by while it was away."""
    rng = random.Random(5)
    writer = Writer("statsd")
    reads = {f"d{number}": rng.randrange(2**60) for number in range(8)}
    milliseconds = dict.fromkeys(reads, 10**15)
    held: dict[str, tuple[int, int]] = {}
    expected, expected_seconds = Counter[str](), Counter[str]()
    summed, summed_seconds = Counter[str](), Counter[str]()
    for _ in range(300):
        writer.begin()
        for device in reads:
            reads[device] += rng.choice([0, 1, 2**53 + 1, rng.randrange(10**6)])
            milliseconds[device] += rng.randrange(1000)
        if rng.random() < 0.2:
            continue
        there = rng.sample(list(reads), rng.randrange(1, 9)) if rng.random() < 0.4 else list(held) or list(reads)
        rows: list[Row] = [((device, None), (reads[device], milliseconds[device]), ()) for device in there]
        writer.put(DISK, *rows)
        for device in there:
            if device in held:
                expected[device] += reads[device] - held[device][0]
                expected_seconds[device] += milliseconds[device] - held[device][1]
        held = {device: (reads[device], milliseconds[device]) for device in there}
        summed.update({device: int(text) for device, text in grown(writer).items()})
        growth = grown(writer, "busy_seconds_total")
        summed_seconds.update({device: round(float(text) * 1000) for device, text in growth.items()})
    assert summed == expected
    assert summed_seconds == expected_seconds
    assert expected.total() > 2**55


@pytest.mark.parametrize("format", BOTH)
def test_labels_of_any_text_tear_no_line(format: formats.Name) -> None:
    texts = ["a|b", "a:b", "a,b#c", "x y", "line\nfeed\t\0", 'q"\\', "\udcff", "🦀", "", None, " \0\n", "sd a", "sd_a"]
    rows: list[Row] = [((text, str(place)), (None, None), (1.0, 2.0)) for place, text in enumerate(texts)]
    writer = Writer(format)
    writer.begin()
    writer.put(DISK, *rows)
    found = [one for one in metrics(format, writer.text()) if ".disk." in one.name]
    assert len(found) == 2 * len(texts)
    if format == "dogstatsd":
        shown = ["a_b", "a:b", "a_b_c", "x_y", "line_feed__", 'q"\\', "\\udcff", "🦀", "", None, "___", "sd_a", "sd_a"]
        assert [one.tags.get("device") for one in found[::2]] == shown
    else:
        assert len({one.name for one in found}) == len(found)


def test_rows_that_would_have_the_same_path_are_numbered() -> None:
    writer = Writer("statsd")
    labels: list[Labels] = [("sd a", None), ("sd_a", ""), ("sd.a", "_")]
    for reads in (1, 5):
        writer.begin()
        writer.put(DISK, *((row, (reads * place, None), (NAN, NAN)) for place, row in enumerate(labels, 1)))
    found = [(one.name.split(".")[4], one.text) for one in metrics("statsd", writer.text()) if ".disk." in one.name]
    assert found == [("_", "4"), ("_-2", "8"), ("_-3", "12")]


def test_tags_have_odd_names_and_those_of_the_row_and_the_host_are_stronger() -> None:
    tags = {"a b": "1", "x|y": "2", "a:b": "3", "device": "of a tag", "host": "of a tag", "": "x", "größe": "ü,ö"}
    writer = Writer("dogstatsd", identity=Identity("web.1", "i", tags))
    writer.begin()
    writer.put(DISK, (("vda", None), (None, None), (1.0, NAN)))
    *frame, disk = metrics("dogstatsd", writer.text())
    common = {"a_b": "3", "x_y": "2", "größe": "ü_ö", "host": "web.1"}
    assert disk.tags == common | {"device": "vda"}
    assert frame[0].tags == common | {"device": "of_a_tag"}


def test_hosts_with_dots_are_one_node() -> None:
    writer = Writer("statsd", SPECS, identity=Identity("web.1.example", "i", dict(IDENTITY.tags)))
    writer.begin()
    assert writer.text().startswith("hostprobe.web_1_example.frame.sequence:1|g\n")
