"""MessagePack against the JSON line of the same frame."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import msgspec
import pytest

from agent.assembly import Agent
from agent.frame import Frame
from agent.table import COUNTER_MAX, NAN
from tests.serializers.writing import BARE, DISK, TIMES, Story, Writer, collected, serializer


@pytest.fixture(scope="module", params=["standard", "full"])
def real(request: pytest.FixtureRequest) -> Iterator[tuple[Agent, Frame]]:
    with collected(request.param) as found:
        yield found


def test_this_hosts_frame_is_that_of_its_json_line(real: tuple[Agent, Frame]) -> None:
    agent, frame = real
    packed, line = Writer("msgpack", ()), Writer("json", ())
    packed.frame = line.frame = frame
    packed.serializer, line.serializer = agent.serializer("msgpack"), agent.serializer("json")
    document, expected = msgspec.msgpack.decode(packed.payload()), json.loads(line.payload())
    assert document == expected
    assert list(document) == list(expected)
    assert list(document["cpu_core"][0]) == list(expected["cpu_core"][0])


@pytest.mark.parametrize("rates", [True, False])
def test_any_frame_is_that_of_its_json_line(rates: bool) -> None:
    story = Story(7)
    packed, line = Writer("msgpack", rates=rates), Writer("json", rates=rates)
    for frame in story.frames(100):
        packed.frame = line.frame = frame
        tables, left_out = story.choice()
        document = msgspec.msgpack.decode(packed.payload(tables, left_out))
        assert document == json.loads(line.payload(tables, left_out))


def test_numbers_are_exact_and_whole_where_the_json_has_no_point() -> None:
    writer = Writer("msgpack")
    writer.begin()
    writer.put(TIMES, ((), (5, COUNTER_MAX), (0.1, 12.0, NAN)))
    found = msgspec.msgpack.decode(writer.payload())["times"]
    assert found == {
        "events_per_second": None,
        "load1": 0.1,
        "busy_seconds_total": 0.05,
        "used_ratio": None,
        "events_total": COUNTER_MAX,
        "threads": 12,
    }
    assert type(found["threads"]) is int


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_what_is_no_number_is_nil(value: float) -> None:
    writer = Writer("msgpack")
    writer.begin()
    writer.put(DISK, (("vda", None), (None, 1), (value, value)))
    (row,) = msgspec.msgpack.decode(writer.payload())["disk"]
    assert (row["kind"], row["reads_total"], row["in_progress"], row["wait_seconds"]) == (None,) * 4


def test_texts_that_are_no_utf_8_have_question_marks_as_in_json() -> None:
    writer = Writer("msgpack")
    writer.begin()
    writer.put(BARE, (("broken \udcff",), (), ()), (("größe\0",), (), ()))
    assert msgspec.msgpack.decode(writer.payload())["bare"] == [{"name": "broken ?"}, {"name": "größe\0"}]


def test_payloads_one_behind_the_other_say_where_they_end() -> None:
    writer = Writer("msgpack")
    stream = b""
    ends = []
    for _ in range(3):
        writer.begin()
        writer.put(DISK, *(((f"{row}" * row, None), (row, 1), (0.5, 0.5)) for row in range(100)))
        stream += writer.payload()
        ends.append(len(stream))
    starts = [0, *ends[:-1]]
    sequences = [msgspec.msgpack.decode(stream[a:b])["sequence"] for a, b in zip(starts, ends, strict=True)]
    assert sequences == [1, 2, 3]
    for end in ends:
        with pytest.raises(msgspec.DecodeError):
            msgspec.msgpack.decode(stream[: end - 1])


def test_what_is_reserved_suffices() -> None:
    writer = Writer("msgpack")
    writer.begin()
    rows = [((f"disk{row}" * 8, "x" * 60), (COUNTER_MAX, COUNTER_MAX - 1), (1e-300, -1e300)) for row in range(500)]
    writer.put(DISK, *rows)
    serializer("msgpack").write(writer.frame, writer.buffer)
    assert writer.buffer.capacity.bit_count() == 1  # a power of two, as it was reserved; what regrows is none
