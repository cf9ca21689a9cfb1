"""The remote_write sink against a real receiver that decodes every request whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from agent import __version__
from agent.delivery import Drop
from agent.errors import RejectedError, SinkError
from agent.mistakes import decode
from agent.sinks.remote_write import RemoteWriteSettings, RemoteWriteSink
from tests.sinks.http_peer import Answer, HttpPeer, Request
from tests.workers import Clock, drain, events
from tests.workers import opened as worker_of

FIELDS: dict[str, list[tuple[str, int, str]]] = {
    "WriteRequest": [("timeseries", 1, "TimeSeries")],
    "TimeSeries": [("labels", 1, "Label"), ("samples", 2, "Sample")],
    "Label": [("name", 1, "string"), ("value", 2, "string")],
    "Sample": [("value", 1, "double"), ("timestamp", 2, "int64")],
}
"""Of the messages of prometheus/prompb, what the tests need: each field's name, number and type."""


def messages() -> dict[str, Any]:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="remote.proto", package="test", syntax="proto3")
    for name, fields in FIELDS.items():
        message = file.message_type.add(name=name)
        for of, number, kind in fields:
            if kind in FIELDS:
                message.field.add(
                    name=of,
                    number=number,
                    label=field.LABEL_REPEATED,
                    type=field.TYPE_MESSAGE,
                    type_name=f".test.{kind}",
                )
            else:
                message.field.add(
                    name=of, number=number, label=field.LABEL_OPTIONAL, type=getattr(field, f"TYPE_{kind.upper()}")
                )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"test.{name}")) for name in FIELDS}


WriteRequest = messages()["WriteRequest"]


def payload(number: int) -> bytes:
    """A request with two series, of one sample each."""
    request = WriteRequest()
    for name in ("hostprobe_load_load1", "hostprobe_load_load5"):
        series = request.timeseries.add()
        series.labels.add(name="__name__", value=name)
        series.samples.add(value=number / 4, timestamp=1000 * number)
    return bytes(request.SerializeToString())


def samples(body: bytes) -> list[tuple[str, float, int]]:
    """What a request's body holds, in order."""
    return [
        (series.labels[0].value, sample.value, sample.timestamp)
        for series in WriteRequest.FromString(body).timeseries
        for sample in series.samples
    ]


def expected(*numbers: int) -> list[tuple[str, float, int]]:
    return [
        (name, number / 4, 1000 * number)
        for number in numbers
        for name in ("hostprobe_load_load1", "hostprobe_load_load5")
    ]


def settings(url: str, **more: Any) -> RemoteWriteSettings:
    return msgspec.convert({"type": "remote_write", "url": url, **more}, RemoteWriteSettings, dec_hook=decode)


def deliver(sink: RemoteWriteSink, *numbers: int) -> None:
    sink.deliver([memoryview(payload(number)) for number in numbers])


def failure(sink: RemoteWriteSink, *numbers: int, kind: type[SinkError] = SinkError) -> Any:
    with pytest.raises(SinkError) as caught:
        deliver(sink, *numbers)
    assert type(caught.value) is kind
    assert caught.value.delivered == 0
    return caught.value


@pytest.fixture
def opened() -> Iterator[Any]:
    """`opened(url, **settings)`: an open sink, closed after the test."""
    sinks: list[RemoteWriteSink] = []

    def make(url: str, **more: Any) -> RemoteWriteSink:
        sinks.append(RemoteWriteSink(settings(url, **more)))
        sinks[-1].open()
        return sinks[-1]

    yield make
    for sink in sinks:
        sink.close()


def test_a_batch_is_one_write_request(opened: Any) -> None:
    with HttpPeer() as peer:
        deliver(opened(peer.url("/api/v1/push?tenant=a")), 1, 2, 3)
    (request,) = peer.requests
    assert request.line == "POST /api/v1/push?tenant=a HTTP/1.1"
    assert request.headers == {
        "Host": f"127.0.0.1:{peer.port}",
        "Accept-Encoding": "identity",
        "Content-Length": str(len(request.raw)),
        "Content-Type": "application/x-protobuf",
        "Content-Encoding": "snappy",
        "X-Prometheus-Remote-Write-Version": "0.1.0",
        "User-Agent": f"hostprobe/{__version__}",
    }
    assert samples(request.body) == expected(1, 2, 3)


def test_it_is_compressed(opened: Any) -> None:
    with HttpPeer() as peer:
        deliver(opened(peer.url()), *range(1, 101))
    (request,) = peer.requests
    assert samples(request.body) == expected(*range(1, 101))
    assert len(request.raw) < len(request.body) / 3


def test_the_path_is_prometheus_own_unless_the_url_has_one(opened: Any) -> None:
    with HttpPeer() as peer:
        for path in ("", "?a=b", "/", "/in"):
            deliver(opened(peer.url(path)), 1)
    paths = [request.line.split()[1] for request in peer.requests]
    assert paths == ["/api/v1/write", "/api/v1/write?a=b", "/", "/in"]


@pytest.mark.parametrize("status", [200, 202, 204])
def test_taken(opened: Any, status: int) -> None:
    with HttpPeer(Answer(status)) as peer:
        deliver(opened(peer.url()), 1)
    assert samples(peer.bodies[0]) == expected(1)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize(("header", "seconds"), [({}, None), ({"Retry-After": "7"}, 7)])
def test_tried_again(opened: Any, status: int, header: dict[str, str], seconds: float | None) -> None:
    with HttpPeer(Answer(status, "Not Now", header, b"ingestion rate limit\nmore")) as peer:
        sink = opened(peer.url())
        error = failure(sink, 1, 2)
        assert str(error) == f"remote_write {peer.url()}: {status} Not Now: ingestion rate limit"
        assert error.retry_after_seconds == seconds
        deliver(sink, 1, 2)
    assert [samples(body) for body in peer.bodies] == [expected(1, 2)] * 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 415, 422])
def test_rejected(opened: Any, status: int) -> None:
    answers = [Answer(status, "No", {"Retry-After": "7"}, b"out of order sample")] * 2
    with HttpPeer(*answers) as peer:
        sink = opened(peer.url())
        error = failure(sink, 1, 2, kind=RejectedError)
        assert str(error) == f"remote_write {peer.url()}: {status} No: out of order sample"
        assert error.each == (status in (400, 413, 422))
        assert not failure(sink, 1, kind=RejectedError).each
    assert len(peer.requests) == 2


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"gzip": True}, "unknown field `gzip`"),
        ({"format": "json"}, "Invalid enum value 'json'"),
        ({"headers": {"x-prometheus-Remote-Write-Version": "2.0.0"}}, "headers: none of .*, x-prometheus-remote-write"),
        ({"names": "another"}, "Invalid enum value 'another'"),
    ],
)
def test_settings_that_are_wrong(tree: dict[str, Any], reason: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=reason):
        settings("https://h", **tree)


def test_the_names_of_another_exporter() -> None:
    assert settings("https://h", names="node_exporter").names == "node_exporter"
    assert settings("https://h").format == "remote_write"


# Behind a worker


def too_old(numbers: Sequence[int]) -> Any:
    """A receiver that refuses requests with one of these samples, as Prometheus says it."""

    def judge(request: Request) -> Answer:
        bad = [stamp for _, _, stamp in samples(request.body) if stamp // 1000 in numbers]
        return Answer(400, "Bad Request", body=b"out of bounds: timestamp %d" % bad[0]) if bad else Answer(204)

    return judge


def test_of_a_batch_only_the_refused_payload_is_dropped(opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with HttpPeer() as peer:
        peer.judge = too_old([3])
        worker = worker_of(opened(peer.url()), Clock(), records=5)
        for number in range(1, 11):
            worker.ring.push(payload(number), number, worker._clock_ns(), 1, 1)
        drain(worker)
        worker.join()
    assert worker.frames == (9, 1, 0)
    assert worker.ring.drops[Drop.REJECTED] == 1
    sent = [samples(body) for body in peer.bodies]
    assert sent == [expected(1, 2, 3, 4, 5), *(expected(number) for number in range(1, 6)), expected(6, 7, 8, 9, 10)]
    reasons = [line["reason"] for line in events(capsys) if "refuses" in line["event"]]
    assert reasons == [f"remote_write {peer.url()}: 400 Bad Request: out of bounds: timestamp 3000"]


def test_a_worker_waits_as_long_as_the_receiver_asks(opened: Any) -> None:
    clock = Clock()
    with HttpPeer(Answer(503, headers={"Retry-After": "40"}), Answer(429, headers={"Retry-After": "50"})) as peer:
        worker = worker_of(opened(peer.url()), clock)
        worker.ring.push(payload(1), 1, clock(), 1, 1)
        drain(worker)
        worker.join()
    assert worker.frames == (1, 0, 0)
    assert clock.waits == [40, 50]
    assert [samples(body) for body in peer.bodies] == [expected(1)] * 3


@pytest.mark.parametrize("way", ["reset", "stall", "close", "half a head"])
def test_a_worker_repeats_what_had_no_answer(opened: Any, way: Any) -> None:
    with HttpPeer(*[Answer(headers={"X": "y" * 100}, way=way)] * 2) as peer:
        worker = worker_of(opened(peer.url(), timeout="200ms"), Clock(), records=2)
        for number in (1, 2):
            worker.ring.push(payload(number), number, worker._clock_ns(), 1, 1)
        drain(worker)
        worker.join()
    assert worker.frames == (2, 0, 0)
    assert worker.failures == worker.retries == 2
    assert [samples(body) for body in peer.bodies] == [expected(1, 2)] * 3
