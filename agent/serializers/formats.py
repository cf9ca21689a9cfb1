"""The formats that a frame can be written in: which serializer, and how its payloads travel."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal, NamedTuple

Name = Literal[
    "json", "msgpack", "prometheus", "openmetrics", "influx", "statsd", "dogstatsd", "graphite", "otlp", "remote_write"
]
"""What `format` of a sink may be."""

Names = Literal["hostprobe", "node_exporter"]
"""Whose names the metrics have, where a format leaves the choice."""


class Format(NamedTuple):
    """One format.

    Attributes:
        serializer: its class, "module:Class".
        content_type: of a body that holds payloads.
        terminator: what follows each payload in a stream; none where payloads say themselves where they end.
        has_names: whether its series may have another exporter's names.
    """

    serializer: str
    content_type: str
    terminator: bytes = b"\n"
    has_names: bool = False


_TEXT = "text/plain; charset=utf-8"
_PROTOBUF = "application/x-protobuf"

FORMATS: dict[Name, Format] = {
    "json": Format("agent.serializers.json_lines:JsonSerializer", "application/x-ndjson"),
    "msgpack": Format("agent.serializers.msgpack:MsgpackSerializer", "application/vnd.msgpack", b""),
    "prometheus": Format(
        "agent.serializers.prometheus:PrometheusSerializer",
        "text/plain; version=0.0.4; charset=utf-8",
        has_names=True,
    ),
    "openmetrics": Format(
        "agent.serializers.prometheus:OpenMetricsSerializer",
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
        has_names=True,
    ),
    "influx": Format("agent.serializers.influx:InfluxSerializer", _TEXT),
    "statsd": Format("agent.serializers.statsd:StatsdSerializer", _TEXT),
    "dogstatsd": Format("agent.serializers.statsd:DogStatsdSerializer", _TEXT),
    "graphite": Format("agent.serializers.graphite:GraphiteSerializer", _TEXT),
    "otlp": Format("agent.serializers.otlp:OtlpSerializer", _PROTOBUF, b""),
    "remote_write": Format("agent.serializers.remote_write:RemoteWriteSerializer", _PROTOBUF, b"", has_names=True),
}
"""By name. Payloads of protobuf formats one after the other are one message with the contents of all."""


def load(name: Name) -> Any:
    """The class of a format's serializer, imported now."""
    module, _, attribute = FORMATS[name].serializer.partition(":")
    return getattr(import_module(module), attribute)
