"""Equal rows, such as sockets that share a port, are series of their own in every format."""

from __future__ import annotations

import re

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from agent.serializers import formats
from agent.serializers.remote_write import write_request_class
from agent.serializers.series import told_apart
from tests.serializers.writing import DISK, SERIES_FORMATS, Writer


def test_equal_rows_are_counted_from_two() -> None:
    rows = [("a", "1"), ("b", "1"), ("a", "1"), ("a", "1"), ("b", "2")]
    assert told_apart(rows) == [{}, {}, {"repeat": "2"}, {"repeat": "3"}, {}]


def names(format: formats.Name, payload: bytes) -> list[str]:
    """What tells the series of `in_progress` from each other."""
    if format == "otlp":
        (resource,) = ExportMetricsServiceRequest.FromString(payload).resource_metrics
        (metric,) = (m for m in resource.scope_metrics[0].metrics if m.name == "hostprobe.disk.in_progress")
        return [str(point.attributes) for point in metric.gauge.data_points]
    if format == "remote_write":
        texts = [str(series.labels) for series in write_request_class().FromString(payload).timeseries]
        return [text for text in texts if "hostprobe_disk_in_progress" in text]
    lines = payload.decode().splitlines()
    if format == "influx":
        return [line.partition(" ")[0] for line in lines if line.startswith("disk,")]
    found = [re.sub(r"(?<=:)1\|g|\b1(?=( \d+)?$)", "", line) for line in lines if re.match("[^#].*in_progress", line)]
    assert found, payload
    return found


@pytest.mark.parametrize("format", SERIES_FORMATS)
def test_equal_rows_are_different_series(format: formats.Name) -> None:
    writer = Writer(format)
    writer.begin()
    writer.put(DISK, *[(("vda", "ssd"), (1, 1), (1.0, 1.0))] * 3)
    assert len(set(names(format, writer.payload()))) == 3
