"""The formats as a whole: what each is declared to be is what it is."""

from __future__ import annotations

import sys
from typing import get_args

import pytest

from agent.errors import UsageError
from agent.serializers import formats
from agent.serializers.formats import FORMATS
from agent.serializers.names import naming
from tests.serializers.writing import DISK, TIMES, Writer, serializer


def test_every_format_that_a_configuration_may_name_is_there() -> None:
    assert tuple(FORMATS) == get_args(formats.Name)
    assert {formats.load(name).__name__ for name in FORMATS} == {
        "JsonSerializer",
        "MsgpackSerializer",
        "PrometheusSerializer",
        "OpenMetricsSerializer",
        "InfluxSerializer",
        "StatsdSerializer",
        "DogStatsdSerializer",
        "GraphiteSerializer",
        "OtlpSerializer",
        "RemoteWriteSerializer",
    }


@pytest.mark.parametrize("names", get_args(formats.Names))
def test_every_naming_is_there_and_the_formats_take_it(names: formats.Names) -> None:
    assert naming(names)(DISK, True)
    for name, form in FORMATS.items():
        if form.has_names:
            assert serializer(name, names=names) is not None


@pytest.mark.parametrize("name", FORMATS)
def test_a_payload_ends_without_its_terminator_and_is_text_where_it_has_one(name: formats.Name) -> None:
    terminator = FORMATS[name].terminator
    writer = Writer(name)
    writer.begin()
    writer.put(TIMES, ((), (1, 2), (0.5, 2.0)))
    payload = writer.payload()
    assert terminator in (b"\n", b"")
    assert not payload.endswith(b"\n")
    assert payload.isascii() == bool(terminator)
    if terminator:
        assert b"\0" not in payload
        assert b"\n\n" not in payload


@pytest.mark.parametrize(
    ("name", "content_type"),
    [
        ("prometheus", "text/plain; version=0.0.4; charset=utf-8"),
        ("openmetrics", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        ("otlp", "application/x-protobuf"),
        ("remote_write", "application/x-protobuf"),
        ("msgpack", "application/vnd.msgpack"),
        ("json", "application/x-ndjson"),
        ("influx", "text/plain; charset=utf-8"),
    ],
)
def test_content_types(name: formats.Name, content_type: str) -> None:
    assert FORMATS[name].content_type == content_type


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        (
            "otlp",
            "opentelemetry.proto.metrics.v1.metrics_pb2",
            r'opentelemetry-proto: expected pip install "hostprobe\[otlp\]"',
        ),
        ("remote_write", "google.protobuf", r'protobuf: expected pip install "hostprobe\[remote_write\]"'),
    ],
)
def test_a_format_whose_package_is_missing_says_what_to_install(
    name: formats.Name, module: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(module)]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=message):
        serializer(name)
