"""What all formats of series share: layouts that are kept, memory that is used again, labels of any text."""

from __future__ import annotations

import gc
import math
import sys

import pytest

from agent.pool import Buffer
from agent.serializers import formats
from agent.serializers.document import Identity
from agent.serializers.remote_write import write_request_class
from agent.serializers.series import plain
from tests.serializers.writing import (
    BARE,
    DISK,
    SERIES_FORMATS,
    SHARES,
    TIMES,
    Story,
    Writer,
    serializer,
)

ALL_FORMATS = list(formats.FORMATS)


def comparable(format: formats.Name, payload: bytes) -> object:
    """A payload to compare: one frame doesn't tell when sums began (OTLP), nor what has ended (remote write)."""
    if format == "remote_write":
        request = write_request_class().FromString(payload)
        lasting = [series for series in request.timeseries if not math.isnan(series.samples[0].value)]
        return [series.SerializeToString() for series in lasting]
    if format != "otlp":
        return payload
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    request = ExportMetricsServiceRequest.FromString(payload)
    for metric in request.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.sum.data_points:
            assert 0 < point.start_time_unix_nano <= point.time_unix_nano
            point.start_time_unix_nano = 0
    return request


@pytest.mark.parametrize("format", ALL_FORMATS)
@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_kept_of_a_layout_shows_in_no_payload(format: formats.Name, seed: int) -> None:
    """One serializer for a hundred frames writes of each what a new one does, whatever it wrote before."""
    story = Story(seed)
    kept, buffer = serializer(format), Buffer()
    for frame in story.frames(100):
        for tables, left_out in (story.choice() for _ in range(story.random.choice([1, 1, 2]))):
            fresh = Buffer()
            serializer(format).write(frame, fresh, tables, left_out)
            kept.write(frame, buffer, tables, left_out)
            assert comparable(format, bytes(buffer.data)) == comparable(format, bytes(fresh.data))
            buffer.clear()


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_without_rates_what_is_derived_is_absent(format: formats.Name) -> None:
    """Also where nothing else is left of a table."""
    payloads = []
    for rates in (True, False):
        writer = Writer(format, rates=rates)
        for second in range(2):
            writer.begin()
            writer.put(TIMES, ((), (second, second), (0.5, 2.0, 0.75)))
            writer.put(SHARES, ((), (), (0.25,)))
            writer.frame.derive()
        payloads.append(writer.payload())
    derived, plainly = payloads
    for name in (b"events_per_second", b"used_ratio", b"free_ratio"):
        assert (name in derived, name in plainly) == (True, False)
    assert b"threads" in plainly


@pytest.mark.parametrize("format", SERIES_FORMATS)
def test_absent_tables_and_empty_ones_are_absent(format: formats.Name) -> None:
    writer = Writer(format)
    writer.begin()
    only_frame = writer.payload()
    writer.put(DISK)
    writer.put(BARE, (("name",), (), ()))
    assert writer.payload() == only_frame


def steady(writer: Writer, rows: int = 40) -> None:
    """A frame of some rows, some of whose values are unknown."""
    writer.begin()
    writer.put(TIMES, ((), (1, None), (0.5, 2.0)))
    table = writer.frame.open(DISK)
    table.claim([(f"disk{row}", "ssd") for row in range(rows)])
    table.counters[:rows] = 7
    table.gauges[:rows] = 0.5
    table.forget_counters(3)


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_writing_again_and_again_takes_no_memory(format: formats.Name) -> None:
    writer = Writer(format)
    steady(writer)
    frame, buffer, write = writer.frame, writer.buffer, writer.serializer.write
    for _ in range(100):
        write(frame, buffer)
        buffer.clear()
    held, capacity = id(buffer.data), buffer.capacity
    gc.collect()
    gc.disable()
    try:
        blocks = sys.getallocatedblocks()
        for _ in range(2000):
            write(frame, buffer)
            buffer.clear()
        grown = sys.getallocatedblocks() - blocks
    finally:
        gc.enable()
    assert grown < 500  # one block for each write would be 2000
    assert (id(buffer.data), buffer.capacity) == (held, capacity)


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_a_buffer_that_others_used_before_is_used_again(format: formats.Name) -> None:
    writer = Writer(format)
    held = []
    for number in range(20):
        steady(writer, 30 + number % 5)
        writer.payload()
        held.append((id(writer.buffer.data), writer.buffer.capacity))
    assert len(set(held[1:])) == 1


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_no_reference_cycles(format: formats.Name) -> None:
    story = Story(3)
    kept, buffer = serializer(format), Buffer()
    frames = story.frames(103)
    for _ in range(3):
        kept.write(next(frames), buffer)
    gc.collect()
    gc.disable()
    try:
        for frame in frames:
            kept.write(frame, buffer)
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("format", SERIES_FORMATS)
def test_ten_thousand_devices(format: formats.Name) -> None:
    writer = Writer(format)
    writer.begin()
    table = writer.frame.open(DISK)
    table.claim([(f"disk{row}", None) for row in range(10_000)])
    table.gauges[:10_000, 0] = range(10_000)
    payload = writer.payload()
    assert all(name in payload for name in (b"disk0", b"disk9999"))
    assert payload == writer.payload()
    assert writer.buffer.capacity.bit_count() == 1  # a power of two, as it was reserved; what regrows is none


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_a_host_and_tags_of_any_text_are_written(format: formats.Name) -> None:
    names = ["a-b", "1x", "__name__", "device", "", "größe", "a:b", "a b,c=d\\"]
    tags = dict(zip(names, ['q"', "\\", "line\nfeed", "a,b=c", "\t", " \x01", "", "🦀"], strict=True))
    writer = Writer(format, identity=Identity(host="web.1 \n,=", instance="6f0c", tags=tags))
    writer.begin()
    writer.put(DISK, (("vda", "ssd"), (1, 2), (3.0, 4.0)))
    assert b"vda" in writer.payload()


@pytest.mark.parametrize(
    ("label", "text"),
    [(None, ""), ("", ""), ("größe 🦀", "größe 🦀"), ("/mnt/\udcff", "/mnt/\\udcff"), ("ö\udcff", "ö\\udcff")],
)
def test_plain(label: str | None, text: str) -> None:
    assert plain(label) == text
