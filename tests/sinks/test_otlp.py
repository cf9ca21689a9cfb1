"""The otlp sink against a real receiver that decodes every request whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsPartialSuccess,
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import Gauge, Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics

from agent import __version__
from agent.delivery import Drop
from agent.errors import RejectedError, SinkError
from agent.mistakes import decode
from agent.sinks.otlp import OtlpSettings, OtlpSink
from tests.sinks.http_peer import Answer, HttpPeer, Request
from tests.workers import Clock, drain, events
from tests.workers import opened as worker_of

PROTOBUF = {"Content-Type": "application/x-protobuf"}


def payload(number: int) -> bytes:
    """A request with one gauge of two points."""
    points = [NumberDataPoint(time_unix_nano=number, as_int=number + offset) for offset in (0, 1)]
    metric = Metric(name="system.memory.usage", gauge=Gauge(data_points=points))
    request = ExportMetricsServiceRequest(
        resource_metrics=[ResourceMetrics(scope_metrics=[ScopeMetrics(metrics=[metric])])]
    )
    return bytes(request.SerializeToString())


def points(body: bytes) -> list[tuple[int, int]]:
    """Time and value of what a request's body holds, in order."""
    return [
        (point.time_unix_nano, point.as_int)
        for resource in ExportMetricsServiceRequest.FromString(body).resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.gauge.data_points
    ]


def expected(*numbers: int) -> list[tuple[int, int]]:
    return [(number, number + offset) for number in numbers for offset in (0, 1)]


def status(message: str, code: int = 3, details: bytes = b"") -> bytes:
    """A google.rpc.Status, its short fields written by hand: the sink is not to be asked what it thinks they are."""
    text = message.encode()
    assert len(text) < 128 > len(details)
    return bytes([0x08, code, 0x12, len(text)]) + text + (bytes([0x1A, len(details)]) + details if details else b"")


def partial(rejected: int, message: str = "") -> Answer:
    success = ExportMetricsPartialSuccess(rejected_data_points=rejected, error_message=message)
    body = ExportMetricsServiceResponse(partial_success=success).SerializeToString()
    return Answer(200, headers=PROTOBUF, body=body)


def settings(url: str, **more: Any) -> OtlpSettings:
    return msgspec.convert({"type": "otlp", "url": url, **more}, OtlpSettings, dec_hook=decode)


def deliver(sink: OtlpSink, *numbers: int) -> None:
    sink.deliver([memoryview(payload(number)) for number in numbers])


def failure(sink: OtlpSink, *numbers: int, kind: type[SinkError] = SinkError) -> Any:
    with pytest.raises(SinkError) as caught:
        deliver(sink, *numbers)
    assert type(caught.value) is kind
    assert caught.value.delivered == 0
    return caught.value


class Seconds:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


@pytest.fixture
def opened(seconds: Seconds) -> Iterator[Any]:
    """`opened(url, **settings)`: an open sink, closed after the test."""
    sinks: list[OtlpSink] = []

    def make(url: str, **more: Any) -> OtlpSink:
        sinks.append(OtlpSink(settings(url, **more), seconds))
        sinks[-1].open()
        return sinks[-1]

    yield make
    for sink in sinks:
        sink.close()


# What is sent


@pytest.mark.parametrize("more", [{}, {"gzip": True}, {"gzip": False}])
def test_a_batch_is_one_request(opened: Any, more: dict[str, bool]) -> None:
    with HttpPeer() as peer:
        deliver(opened(peer.url("/otlp/v1/metrics"), **more), 1, 5, 9)
    (request,) = peer.requests
    assert request.line == "POST /otlp/v1/metrics HTTP/1.1"
    assert request.headers == {
        "Host": f"127.0.0.1:{peer.port}",
        "Accept-Encoding": "identity",
        "Content-Length": str(len(request.raw)),
        "Content-Type": "application/x-protobuf",
        "User-Agent": f"hostprobe/{__version__}",
        **({"Content-Encoding": "gzip"} if more.get("gzip", True) else {}),
    }
    assert points(request.body) == expected(1, 5, 9)


def test_the_path_is_the_specifications_unless_the_url_has_one(opened: Any) -> None:
    with HttpPeer() as peer:
        for path in ("", "?a=b", "/", "/in"):
            deliver(opened(peer.url(path)), 1)
    paths = [request.line.split()[1] for request in peer.requests]
    assert paths == ["/v1/metrics", "/v1/metrics?a=b", "/", "/in"]


def test_an_error_names_the_whole_place(opened: Any) -> None:
    with HttpPeer(Answer(503)) as peer:
        assert str(failure(opened(peer.url("?key=value")), 1)) == f"otlp {peer.url('/v1/metrics')}: 503 Said"


@pytest.mark.parametrize(
    ("tree", "reason"),
    [({"format": "json"}, "Invalid enum value 'json'"), ({"names": "node_exporter"}, 'names: "hostprobe" with')],
)
def test_settings_that_are_wrong(tree: dict[str, Any], reason: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=reason):
        settings("https://h", **tree)


# Statuses


@pytest.mark.parametrize("code", [429, 502, 503, 504])
@pytest.mark.parametrize(("header", "pause"), [({}, None), ({"Retry-After": "7"}, 7)])
def test_tried_again(opened: Any, code: int, header: dict[str, str], pause: float | None) -> None:
    with HttpPeer(Answer(code, "Not Now", {**PROTOBUF, **header}, status("slow down", 14))) as peer:
        sink = opened(peer.url())
        error = failure(sink, 1, 2)
        assert str(error) == f"otlp {peer.url()}: {code} Not Now: slow down"
        assert error.retry_after_seconds == pause
        deliver(sink, 1, 2)
    assert [points(body) for body in peer.bodies] == [expected(1, 2)] * 2


@pytest.mark.parametrize("code", [400, 401, 403, 404, 405, 408, 413, 415, 422, 500, 501, 505, 507, 599, 600])
def test_rejected(opened: Any, code: int) -> None:
    answers = [Answer(code, "No", {**PROTOBUF, "Retry-After": "7"}, status("metric 1: no name"))] * 2
    with HttpPeer(*answers) as peer:
        sink = opened(peer.url())
        error = failure(sink, 1, 2, kind=RejectedError)
        assert str(error) == f"otlp {peer.url()}: {code} No: metric 1: no name"
        assert error.each == (code in (400, 413))
        assert not failure(sink, 1, kind=RejectedError).each
    assert len(peer.requests) == 2


@pytest.mark.parametrize(
    ("headers", "body", "shown"),
    [
        (PROTOBUF, status("bad metric"), ": bad metric"),
        (PROTOBUF, status("bad\x1b[1m metric\nmore", details=b"\x0a\x03abc"), ": bad[1m metric"),
        ({"Content-Type": "Application/X-Protobuf; charset=none"}, status("bad metric"), ": bad metric"),
        (PROTOBUF, status("größer"), ": größer"),
        (PROTOBUF, b"\x12\x03\xffno", ": \ufffdno"),  # no UTF-8
        (PROTOBUF, b"\x08\x03", ""),
        (PROTOBUF, b"", ""),
        (PROTOBUF, b"404 page not found\n", ": 404 page not found"),  # which it says it isn't
        (PROTOBUF, status("a bad metric")[:-3], ": a bad met"),  # cut; what can be read of it
        ({"Content-Type": "text/plain"}, b"upstream is away\nmore", ": upstream is away"),
        ({}, b"upstream is away", ": upstream is away"),
        ({"Content-Type": "text/plain"}, b"xAxB", ": xAxB"),  # as a message it would be one, of unknown fields
    ],
)
def test_the_line_that_says_why(opened: Any, headers: dict[str, str], body: bytes, shown: str) -> None:
    with HttpPeer(Answer(400, "No", headers, body)) as peer:
        error = failure(opened(peer.url()), 1, kind=RejectedError)
    assert str(error) == f"otlp {peer.url()}: 400 No{shown}"


def test_a_secret_in_a_message_is_blanked(opened: Any, monkeypatch: pytest.MonkeyPatch, seconds: Seconds) -> None:
    monkeypatch.setenv("KEY", "k3y-of-nobody")
    answers = [Answer(401, "No", PROTOBUF, status("who is k3y-of-nobody?")), partial(1, "from k3y-of-nobody")]
    with HttpPeer(*answers) as peer:
        sink = opened(peer.url(), header_secrets={"X-Api-Key": {"env": "KEY"}})
        assert str(failure(sink, 1, kind=RejectedError)).endswith(": 401 No: who is ***?")
        deliver(sink, 1)
    assert sink.notices == [f"otlp {peer.url()}: 1 data points refused: from ***"]


# Partial success


def test_refused_points_are_told_and_not_sent_again(opened: Any) -> None:
    with HttpPeer(partial(2, "duplicate\nand more"), Answer(200, headers=PROTOBUF)) as peer:
        sink = opened(peer.url())
        deliver(sink, 1, 2)
        deliver(sink, 3)
    assert [points(body) for body in peer.bodies] == [expected(1, 2), expected(3)]
    assert sink.rejected_points == 2
    assert sink.notices == [f"otlp {peer.url()}: 2 data points refused: duplicate"]


def test_a_flood_of_refused_points_is_told_once_a_minute_with_their_number(opened: Any, seconds: Seconds) -> None:
    with HttpPeer(*[partial(3, f"duplicate {number}") for number in range(100)]) as peer:
        sink = opened(peer.url())
        for _ in range(99):
            deliver(sink, 1)
        first = f"otlp {peer.url()}: 3 data points refused: duplicate 0"
        assert sink.notices == [first]
        seconds.now += 59.9
        deliver(sink, 1)
        assert sink.notices == [first]
        seconds.now += 0.1
        deliver(sink, 1)  # is taken whole, and tells of those before
        assert sink.notices == [first, f"otlp {peer.url()}: 297 data points refused: duplicate 99"]
        seconds.now += 3600
        deliver(sink, 1)
    assert len(sink.notices) == 2
    assert sink.rejected_points == 300
    assert len(peer.requests) == 102


def test_a_warning_without_refused_points(opened: Any, seconds: Seconds) -> None:
    with HttpPeer(partial(0, "use another name"), partial(0, "still")) as peer:
        sink = opened(peer.url())
        deliver(sink, 1)
        deliver(sink, 1)
    assert sink.notices == [f"otlp {peer.url()}: taken, with a warning: use another name"]
    assert sink.rejected_points == 0


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, headers=PROTOBUF),
        Answer(200, headers=PROTOBUF, body=b"\x0a\x00"),
        partial(0),
        partial(-5),
        Answer(200, body=b"OK"),
        Answer(202, headers={"Content-Type": "application/json"}, body=b'{"partialSuccess":{}}'),
        Answer(200, headers=PROTOBUF, body=partial(7, "cut").body[:-1]),
        Answer(200, headers=PROTOBUF, body=b"\x0a" * (1 << 20)),
    ],
)
def test_an_answer_that_tells_of_nothing(opened: Any, answer: Answer) -> None:
    with HttpPeer(answer) as peer:
        sink = opened(peer.url())
        deliver(sink, 1)
    assert points(peer.bodies[0]) == expected(1)
    assert sink.notices == []
    assert sink.rejected_points == 0


def test_refused_points_without_a_word(opened: Any) -> None:
    with HttpPeer(partial(4)) as peer:
        sink = opened(peer.url())
        deliver(sink, 1)
    assert sink.notices == [f"otlp {peer.url()}: 4 data points refused"]


ODD = st.builds(
    lambda body, at, byte: body[:at] + bytes([byte]) + body[at:],
    st.sampled_from([status("no"), partial(3, "no").body]),
    st.integers(0, 12),
    st.integers(0, 255),
)


@pytest.fixture(scope="module")
def odd_peer() -> Iterator[HttpPeer]:
    with HttpPeer() as peer:
        yield peer


@given(st.sampled_from([200, 400, 503]), st.binary(max_size=40) | ODD)
def test_no_answer_is_too_odd(odd_peer: HttpPeer, code: int, body: bytes) -> None:
    odd_peer.answers.append(Answer(code, headers=PROTOBUF, body=body))
    with closing(OtlpSink(settings(odd_peer.url()))) as sink:
        if code == 200:
            deliver(sink, 1)
            assert sink.rejected_points >= 0
        else:
            error = failure(sink, 1, kind=RejectedError if code == 400 else SinkError)
            assert "\n" not in str(error)


# Behind a worker


def nameless(number: int) -> Any:
    """A receiver that refuses requests with points of this time."""

    def judge(request: Request) -> Answer:
        is_bad = any(time == number for time, _ in points(request.body))
        return Answer(400, "Bad Request", PROTOBUF, status(f"point {number}")) if is_bad else Answer()

    return judge


def test_of_a_batch_only_the_refused_payload_is_dropped(opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with HttpPeer() as peer:
        peer.judge = nameless(3)
        worker = worker_of(opened(peer.url()), Clock(), records=5)
        for number in range(1, 11):
            worker.ring.push(payload(number), number, worker._clock_ns(), 1, 1)
        drain(worker)
        worker.join()
    assert worker.frames == (9, 1, 0)
    assert worker.ring.drops[Drop.REJECTED] == 1
    sent = [points(body) for body in peer.bodies]
    assert sent == [expected(1, 2, 3, 4, 5), *(expected(number) for number in range(1, 6)), expected(6, 7, 8, 9, 10)]
    reasons = [line["reason"] for line in events(capsys) if "refuses" in line["event"]]
    assert reasons == [f"otlp {peer.url()}: 400 Bad Request: point 3"]


def test_a_worker_logs_refused_points_and_counts_the_frames_as_sent(
    opened: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with HttpPeer(*[partial(2, "duplicate")] * 20) as peer:
        sink = opened(peer.url())
        worker = worker_of(sink, Clock(), records=1)
        for number in range(20):
            worker.ring.push(payload(number), number, worker._clock_ns(), 1, 1)
        drain(worker)
        worker.join()
    assert worker.frames == (20, 0, 0)
    assert len(peer.requests) == 20
    reasons = [line["reason"] for line in events(capsys) if line["event"] == "sink says"]
    assert reasons == [f"otlp {peer.url()}: 2 data points refused: duplicate"]
    assert sink.rejected_points == 40
    assert sink.notices == []


def test_a_worker_waits_as_long_as_the_receiver_asks(opened: Any) -> None:
    clock = Clock()
    with HttpPeer(Answer(503, headers={"Retry-After": "40"}), Answer(429, headers={"Retry-After": "50"})) as peer:
        worker = worker_of(opened(peer.url()), clock)
        worker.ring.push(payload(1), 1, clock(), 1, 1)
        drain(worker)
        worker.join()
    assert worker.frames == (1, 0, 0)
    assert clock.waits == [40, 50]
    assert [points(body) for body in peer.bodies] == [expected(1)] * 3


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
    assert [points(body) for body in peer.bodies] == [expected(1, 2)] * 3
