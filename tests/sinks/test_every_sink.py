"""Every sink behind a real worker and its ring, with a peer that accepts, refuses, resets, stalls, is slow, or lies.

What a peer can't do is not in its list: nobody stalls or resets a datagram, there is no certificate without TLS, a file
system refuses and comes back but neither stalls nor resets, and a closed pipe is closed for good (test_stdout.py).
A peer of HTTP that answers with other statuses is test_http.py's. A Kafka that stands in this process only accepts:
librdkafka's mock cluster chooses its own ports and names them to its clients, so that nothing can be put between; one
that goes away, stalls and comes back is in tests/engines/test_kafka.py. What prometheus serves it doesn't send.

The workers' clock stands still: short pauses take no time, and the ten seconds of an open circuit last until the test
lets them pass.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import ssl
import struct
import termios
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from socket import SOCK_DGRAM, SOCK_STREAM
from typing import Any

import confluent_kafka
import pytest
import trustme
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Gauge, Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics

from agent.delivery import Circuit, Drop
from agent.sink_worker import SinkWorker
from agent.sinks.file import FileSettings, FileSink
from agent.sinks.http import HttpSink
from agent.sinks.kafka import KafkaSettings, KafkaSink
from agent.sinks.nats import NatsSettings, NatsSink
from agent.sinks.otlp import OtlpSink
from agent.sinks.remote_write import RemoteWriteSink
from agent.sinks.secret import SecretSettings
from agent.sinks.sink import Sink, SinkSettings
from agent.sinks.stdout import STDOUT, StdoutSink
from agent.sinks.stream import TcpSettings, TcpSink, UnixSettings, UnixSink
from agent.sinks.tls import TlsSettings
from agent.sinks.udp import UdpSettings, UdpSink
from agent.units import Duration
from tests.sinks import peers
from tests.sinks.http_peer import Answer, HttpPeer, Request
from tests.sinks.nats_peer import STORED, Stream
from tests.sinks.peers import Datagram, StreamPeer, UdpPeer, refused_port
from tests.sinks.test_kafka import Cluster
from tests.sinks.test_remote_write import WriteRequest
from tests.workers import PATIENCE_SECONDS, Clock, accounted, events, opened, until

BATCH = 50
WHOLE_BATCHES = {"records": BATCH, "linger": 3600}  # so that where a batch begins doesn't hang on who is faster
FOR_EVER = 10_000  # times: a behaviour that lasts until somebody changes it
LONG, SHORT = Duration(PATIENCE_SECONDS), Duration(0.2)
RECEIVE_BUFFER_BYTES = 16 << 10  # a small part of a batch: most of it is not acknowledged before it is read
MESSAGE_BYTES_MAX = 1 << 20
TOKEN = "t0ken-of-nobody"

FILES = ["file"]
PIPES = ["stdout"]
DATAGRAMS = ["udp"]
STREAMS = ["unix", "tcp", "tls"]
REQUESTS = ["http", "https", "remote_write", "remote_write+tls", "otlp", "otlp+tls"]
MESSAGES = ["nats", "nats+tls"]
RECORDS = ["kafka"]
ENCRYPTED = ["tls", "https", "remote_write+tls", "otlp+tls", "nats+tls"]
CONNECTED = STREAMS + REQUESTS + MESSAGES  # what can be stalled, slowed down and reset
EVERY = PIPES + FILES + CONNECTED + DATAGRAMS + RECORDS


# Payloads


@dataclass(frozen=True)
class Form:
    """What a kind's payloads are.

    Attributes:
        payload: one, of its sequence and some padding.
        apart: the payloads of a body that is several, one behind the other.
        terminator: what follows each in a body.
    """

    payload: Callable[[int, str], bytes]
    apart: Callable[[bytes], list[bytes]]
    terminator: bytes = b""


def json_line(sequence: int, pad: str) -> bytes:
    header = {"instance": "a", "sequence": sequence, "time_unix_ns": sequence, "pad": pad}
    return json.dumps(header, separators=(",", ":")).encode()


def write_request(sequence: int, pad: str) -> bytes:
    """Two series of the same time, later than those of the sequence before: else a batch is several requests."""
    request = WriteRequest()
    for name, text in (("hostprobe_load_load1", pad), ("hostprobe_load_load5", "")):
        series = request.timeseries.add()
        series.labels.add(name="__name__", value=name)
        series.labels.add(name="pad", value=text)
        series.samples.add(value=sequence, timestamp=sequence)
    return bytes(request.SerializeToString())


def write_requests(body: bytes) -> list[bytes]:
    series = WriteRequest.FromString(body).timeseries
    by_time = groupby(series, key=lambda one: one.samples[0].timestamp)
    return [bytes(WriteRequest(timeseries=list(group)).SerializeToString()) for _, group in by_time]


def metrics_request(sequence: int, pad: str) -> bytes:
    gauge = Gauge(data_points=[NumberDataPoint(time_unix_nano=sequence, as_int=sequence)])
    metric = Metric(name="system.memory.usage", description=pad, gauge=gauge)
    return metrics_request_of(ResourceMetrics(scope_metrics=[ScopeMetrics(metrics=[metric])]))


def metrics_request_of(metrics: ResourceMetrics) -> bytes:
    return bytes(ExportMetricsServiceRequest(resource_metrics=[metrics]).SerializeToString())


def metrics_requests(body: bytes) -> list[bytes]:
    return [metrics_request_of(metrics) for metrics in ExportMetricsServiceRequest.FromString(body).resource_metrics]


LINES = Form(json_line, bytes.splitlines, b"\n")
FORMS = {
    "remote_write": Form(write_request, write_requests),
    "otlp": Form(metrics_request, metrics_requests),
}
POSTING: dict[str, Any] = {"http": HttpSink, "https": HttpSink, "remote_write": RemoteWriteSink, "otlp": OtlpSink}


def form_of(kind: str) -> Form:
    """Its own, or lines where a sink takes whatever there is."""
    return FORMS.get(kind.removesuffix("+tls"), LINES)


# Peers


class Peer:
    """What stands at a sink's other end; it accepts until it is told something else.

    A connection, or request, is treated as the peer was told before it began.
    """

    has_timeout = True  # whether its sink gives up on it when it stalls

    def sink(self, timeout: Duration) -> Sink:
        """A sink that delivers to it."""
        raise NotImplementedError

    def payloads(self) -> list[bytes]:
        """What has come whole, in order, connection by connection."""
        raise NotImplementedError

    def refuse(self) -> None:
        """Goes away: nobody is there."""
        raise NotImplementedError

    def reset(self, *places: tuple[int, int], of: Sequence[bytes]) -> None:
        """For each place, resets a connection that begins with one frame as soon as another one is read."""
        raise NotImplementedError

    def stall(self) -> None:
        """Takes connections, and then does nothing."""
        raise NotImplementedError

    def be_slow(self) -> None:
        """Reads byte by byte, or answers so."""
        raise NotImplementedError

    def show_certificate(self, name: str) -> None:
        """Shows a certificate that its sink must not trust."""
        raise NotImplementedError

    def has_refused_handshakes(self, count: int) -> bool:
        """Whether so many connections have come, and all ended before any byte could be read."""
        raise NotImplementedError

    def is_touched(self) -> bool:
        """Whether something of a delivery has reached it since it was told how to behave."""
        raise NotImplementedError

    def come_back(self) -> None:
        """Accepts again; what stalls goes on or ends."""
        raise NotImplementedError

    def close(self) -> None:
        """Goes for good."""
        raise NotImplementedError


class FilePeer(Peer):
    """A file in a directory that is renamed to be away."""

    def __init__(self, place: Path) -> None:
        self._here, self._away = place / "logs", place / "away"
        self._here.mkdir(parents=True)

    def sink(self, timeout: Duration) -> Sink:
        return FileSink(FileSettings(path=str(self._here / "out")))

    def payloads(self) -> list[bytes]:
        return (self._here / "out").read_bytes().split(b"\n")[:-1]

    def refuse(self) -> None:
        self._here.rename(self._away)

    def come_back(self) -> None:
        if self._away.exists():
            self._away.rename(self._here)

    def close(self) -> None: ...


class PipePeer(Peer):
    """The reader of a pipe that is descriptor 1 meanwhile."""

    has_timeout = False

    def __init__(self) -> None:
        self._data = bytearray()
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._read_bytes = 65536
        self._reader, writer = os.pipe()
        self._stdout = os.dup(STDOUT)
        os.dup2(writer, STDOUT)
        os.close(writer)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while self._goes_on.wait() and (data := os.read(self._reader, self._read_bytes)):
            self._data += data

    def sink(self, timeout: Duration) -> Sink:
        return StdoutSink(SinkSettings())

    def payloads(self) -> list[bytes]:
        return bytes(self._data).split(b"\n")[:-1]

    def stall(self) -> None:
        self._goes_on.clear()

    def be_slow(self) -> None:
        self._read_bytes = 1

    def is_touched(self) -> bool:
        (waiting_bytes,) = struct.unpack("i", fcntl.ioctl(self._reader, termios.FIONREAD, bytes(4)))
        return bool(waiting_bytes)

    def come_back(self) -> None:
        self._read_bytes = 65536
        self._goes_on.set()

    def close(self) -> None:
        os.dup2(self._stdout, STDOUT)  # which was the only writer
        self._thread.join()
        os.close(self._stdout)
        os.close(self._reader)


class LinesPeer(Peer):
    """A StreamPeer at a Unix path, or at a port of which nobody else takes hold while it is away."""

    def __init__(self, at: Path | int, certificates: Certificates | None = None) -> None:
        self._at = at
        self._certificates = certificates
        self._gone: list[bytes] = []
        self._peer: StreamPeer | None = None
        self._is_stalled = False
        self._begin()

    def _begin(self, *behaviours: peers.Behaviour, certificate: str = "right") -> None:
        self.refuse()
        tls = self._certificates and self._certificates.contexts[certificate]
        if isinstance(self._at, Path):
            self._at.unlink(missing_ok=True)
            self._peer = StreamPeer(*behaviours, at=self._at)
        else:
            self._peer = StreamPeer(*behaviours, port=self._at, tls=tls, buffer_bytes=RECEIVE_BUFFER_BYTES)
        self._peer.__enter__()

    def sink(self, timeout: Duration) -> Sink:
        if isinstance(self._at, Path):
            return UnixSink(UnixSettings(path=str(self._at), timeout=timeout))
        tls = self._certificates and self._certificates.trusted
        return TcpSink(TcpSettings(address=f"127.0.0.1:{self._at}", timeout=timeout, tls=tls))

    def payloads(self) -> list[bytes]:
        return self._gone + (self._peer.lines if self._peer else [])

    def refuse(self) -> None:
        if self._peer is not None:
            self._peer.__exit__()
            self._gone += self._peer.lines
        self._peer = None
        self._is_stalled = False

    def reset(self, *places: tuple[int, int], of: Sequence[bytes]) -> None:
        sizes = [sum(len(frame) + 1 for frame in of[begin:end]) for begin, end in places]
        self._begin(*map(peers.reset_after, sizes))

    def stall(self) -> None:
        self._begin(*[peers.stall] * FOR_EVER)
        self._is_stalled = True

    def be_slow(self) -> None:
        self._begin(*[peers.byte_by_byte] * FOR_EVER)

    def show_certificate(self, name: str) -> None:
        self._begin(certificate=name)

    def has_refused_handshakes(self, count: int) -> bool:
        assert self._peer is not None
        return _has_refused_handshakes(self._peer, count)

    def is_touched(self) -> bool:
        return self._peer is not None and bool(self._peer.accepted)

    def come_back(self) -> None:
        if self._peer is not None and self._is_stalled:
            self._peer.go_on.set()  # its kernel has acknowledged lines, which a new peer wouldn't get
        else:
            self._begin()

    def close(self) -> None:
        self.refuse()


def _has_refused_handshakes(peer: StreamPeer, count: int) -> bool:
    assert all(one.data == b"" for one in peer.accepted)
    return len(peer.accepted) == count and all(one.fault and one.ended for one in peer.accepted)


class RequestsPeer(Peer):
    """An HttpPeer, which expects a secret, and takes apart by message what it is sent, whatever it answers."""

    def __init__(self, kind: str, port: int, token: Path, certificates: Certificates | None = None) -> None:
        self._sink = POSTING[kind.removesuffix("+tls")]
        self._form = form_of(kind)
        self._port = port
        self._certificates = certificates
        self._token = token
        self._payloads: list[bytes] = []
        self._answers: deque[Answer] = deque()
        self._peer: HttpPeer | None = None
        self._is_stalled = False
        self._begin()

    def _begin(self, *answers: Answer, certificate: str = "right") -> None:
        self.refuse()
        tls = self._certificates and self._certificates.contexts[certificate]
        self._answers = deque(answers)
        self._peer = HttpPeer(port=self._port, tls=tls)
        self._peer.judge = self._judge
        self._peer.__enter__()

    def _judge(self, request: Request) -> Answer:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        payloads = self._form.apart(request.body)
        assert b"".join(payload + self._form.terminator for payload in payloads) == request.body
        self._payloads += payloads
        return self._answers.popleft() if self._answers else Answer()

    def sink(self, timeout: Duration) -> Sink:
        sink: Sink = self._sink(
            self._sink.Settings(
                url=f"http{'s' if self._certificates else ''}://127.0.0.1:{self._port}/in",
                timeout=timeout,
                bearer=SecretSettings(file=str(self._token)),
                tls=self._certificates and self._certificates.trusted,
            )
        )
        return sink

    def payloads(self) -> list[bytes]:
        assert self._peer is None or self._peer.defects == []
        return list(self._payloads)

    def refuse(self) -> None:
        if self._peer is not None:
            self._peer.__exit__()
        self._peer = None
        self._is_stalled = False

    def reset(self, *places: tuple[int, int], of: Sequence[bytes]) -> None:
        answers = []
        for begin, end in places:
            answers += [Answer()] * ((end - begin) // BATCH) + [Answer(way="reset")]
        self._begin(*answers)

    def stall(self) -> None:
        self._begin(*[Answer(way="stall")] * FOR_EVER)
        self._is_stalled = True

    def be_slow(self) -> None:
        self._begin(*[Answer(body=b"taken", way="byte by byte")] * FOR_EVER)

    def show_certificate(self, name: str) -> None:
        self._begin(certificate=name)

    def has_refused_handshakes(self, count: int) -> bool:
        assert self._peer is not None
        assert self._peer.requests == []
        return self._peer.connections == len(self._peer.refused_handshakes) == count

    def is_touched(self) -> bool:
        return self._peer is not None and bool(self._peer.requests)

    def come_back(self) -> None:
        if self._peer is not None and self._is_stalled:
            # A listener that closes resets who has just connected, and Python's ssl leaks a socket then (a warning).
            self._answers.clear()
            self._peer.go_on.set()
        else:
            self._begin()

    def close(self) -> None:
        self.refuse()


class MessagesPeer(Peer):
    """A StreamPeer that speaks as a NATS server with a stream does, and expects a secret."""

    def __init__(self, port: int, token: Path, certificates: Certificates | None = None) -> None:
        self._port = port
        self._certificates = certificates
        self._token = token
        info = {"max_payload": MESSAGE_BYTES_MAX, "auth_required": True, "tls_required": certificates is not None}
        self._stream = Stream(info=info)
        self._go_on = threading.Event()
        self._peer: StreamPeer | None = None
        self.come_back()

    def sink(self, timeout: Duration) -> Sink:
        return NatsSink(
            NatsSettings(
                servers=(f"{'tls' if self._certificates else 'nats'}://127.0.0.1:{self._port}",),
                subject="frames",
                timeout=timeout,
                token=SecretSettings(file=str(self._token)),
                tls=self._certificates and self._certificates.trusted,
            )
        )

    def payloads(self) -> list[bytes]:
        payloads = self._stream.payloads
        assert not payloads or self._stream.login["auth_token"] == TOKEN
        return payloads

    def refuse(self) -> None:
        self._go_on.set()
        if self._peer is not None:
            self._peer.__exit__()
        self._peer = None

    def reset(self, *places: tuple[int, int], of: Sequence[bytes]) -> None:
        """What is read of the batch that is cut is not answered: else it hangs on luck which answers come through."""
        said: list[Any] = []
        for begin, end in places:
            cut = (end - begin) % BATCH
            said += [STORED] * (end - begin - cut) + [None] * (cut - 1) + [ConnectionResetError]
        script = iter(said)

        def says(_payload: bytes) -> Any:
            answer = next(script, STORED)
            if answer is ConnectionResetError:
                raise ConnectionResetError
            return answer

        self._stream.says = says

    def stall(self) -> None:
        self._go_on.clear()

        def says(_payload: bytes) -> Any:
            self._go_on.wait()
            raise ConnectionResetError

        self._stream.says = says

    def be_slow(self) -> None:
        self._stream.read_bytes = 1

    def show_certificate(self, name: str) -> None:
        assert self._certificates is not None
        self._stream.tls = self._certificates.contexts[name]

    def has_refused_handshakes(self, count: int) -> bool:
        assert self._peer is not None
        return _has_refused_handshakes(self._peer, count)

    def is_touched(self) -> bool:
        return bool(self._stream.messages)

    def come_back(self) -> None:
        self._stream.says = lambda _payload: STORED
        self._stream.read_bytes = 65536
        self._stream.tls = self._certificates and self._certificates.contexts["right"]
        self._go_on.set()
        if self._peer is None:
            self._peer = StreamPeer(*[self._stream] * FOR_EVER, port=self._port, buffer_bytes=RECEIVE_BUFFER_BYTES)
            self._peer.__enter__()

    def close(self) -> None:
        self.refuse()


class RecordsPeer(Peer):
    """A mock cluster of librdkafka's, and a consumer of all that it has."""

    def __init__(self) -> None:
        self._cluster = Cluster()
        self._consumer: Any = confluent_kafka.Consumer({"bootstrap.servers": self._cluster.address, "group.id": "test"})
        self._payloads: list[bytes] = []

    def sink(self, timeout: Duration) -> Sink:
        return KafkaSink(KafkaSettings(servers=(self._cluster.address,), topic="frames", timeout=timeout))

    def payloads(self) -> list[bytes]:
        if not self._consumer.assignment():  # the topic is made by the first who sends to it
            topic = self._consumer.list_topics("frames", timeout=PATIENCE_SECONDS).topics["frames"]
            self._consumer.assign([confluent_kafka.TopicPartition("frames", number, 0) for number in topic.partitions])
        records = self._consumer.consume(1000, 0.05)
        assert [record.error() for record in records] == [None] * len(records)
        self._payloads += [record.value() for record in records]
        return list(self._payloads)

    def come_back(self) -> None: ...

    def close(self) -> None:
        self._consumer.close()
        self._cluster.close()


class DatagramPeer(Peer):
    """A UdpPeer at a port that is refused while it is away."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._datagrams: list[Datagram] = []
        self._peer: UdpPeer | None = None
        self.come_back()

    def sink(self, timeout: Duration) -> Sink:
        return UdpSink(UdpSettings(address=f"127.0.0.1:{self._port}"))

    def payloads(self) -> list[bytes]:
        if self._peer is not None:
            self._datagrams += self._peer.receive()
        return [datagram.text for datagram in self._datagrams]

    @property
    def missing(self) -> int:
        """How many datagrams have not come, by the numbers of those that have."""
        return self._datagrams[-1].sequence - len(self._datagrams)

    def refuse(self) -> None:
        self.close()

    def come_back(self) -> None:
        self.close()
        self._peer = UdpPeer(port=self._port)

    def close(self) -> None:
        if self._peer is not None:
            self.payloads()
            self._peer.__exit__()
        self._peer = None


class Certificates:
    """What an encrypting peer may show: one that is right, and two that are not."""

    def __init__(self, place: Path) -> None:
        authority, other = trustme.CA(), trustme.CA()
        authority.cert_pem.write_to_path(str(place / "ca.pem"))
        self.trusted = TlsSettings(ca=str(place / "ca.pem"))
        self.contexts = {
            "right": _context(authority.issue_cert("127.0.0.1")),
            "of another authority": _context(other.issue_cert("127.0.0.1")),
            "of another name": _context(authority.issue_cert("metrics.example", "127.0.0.2")),
        }


def _context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


# The stage


class GatedClock(Clock):
    """A clock that stands still, whose long waits last until they are let through; short ones take no time."""

    def __init__(self) -> None:
        super().__init__()
        self._is_open = threading.Event()

    def let_pass(self) -> None:
        self._is_open.set()

    def event(self) -> threading.Event:
        clock, short = self, super().event()

        class Event(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                assert timeout is not None
                if timeout > 1:
                    until(lambda: self.is_set() or clock._is_open.is_set(), "a long wait was let through")
                return self.is_set() or short.wait(timeout)

        return Event()


@dataclass
class Stage:
    """A peer, and the workers of sinks that deliver to it."""

    peer: Any
    clock: GatedClock = field(default_factory=GatedClock)
    _workers: list[SinkWorker] = field(default_factory=list)

    def worker(self, timeout: Duration = LONG, peer: Peer | None = None, **kinds: Any) -> SinkWorker:
        """One whose thread has not started."""
        worker = opened((peer or self.peer).sink(timeout), self.clock, **{"size": 4 << 20, **kinds})
        self._workers.append(worker)
        return worker

    def end(self, worker: SinkWorker, seconds: float) -> None:
        """The agent's end, which leaves it so long."""
        worker.finish(self.clock.seconds + seconds)
        worker.join()

    def end_process(self, worker: SinkWorker) -> None:
        """What the kernel does behind an agent's end: its thread is no more, and its buffer's file is free."""
        self._workers.remove(worker)
        if worker._thread.ident is not None:
            worker._thread.join(PATIENCE_SECONDS)
            assert not worker._thread.is_alive()
        worker.join()

    def close(self) -> None:
        self.peer.come_back()
        self.clock.let_pass()
        for worker in list(self._workers):
            worker.finish(self.clock.seconds + PATIENCE_SECONDS)
            worker.join()
            self.end_process(worker)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


Staged = Callable[[str], Any]


@pytest.fixture
def staged(tmp_path: Path, certificates: Certificates) -> Staged:
    """`with staged(kind) as stage:`, inside a test: between its phases pytest sets descriptor 1 as it likes it."""

    def peer_of(kind: str, stack: ExitStack) -> Peer:
        if kind == "stdout":
            return PipePeer()
        if kind == "file":
            return FilePeer(tmp_path / "peer")
        if kind == "unix":
            return LinesPeer(tmp_path / "socket")
        if kind == "kafka":
            return RecordsPeer()
        port = stack.enter_context(refused_port(SOCK_DGRAM if kind == "udp" else SOCK_STREAM))
        if kind == "udp":
            return DatagramPeer(port)
        shown = certificates if kind in ENCRYPTED else None
        if kind in STREAMS:
            return LinesPeer(port, shown)
        token = tmp_path / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        return MessagesPeer(port, token, shown) if kind in MESSAGES else RequestsPeer(kind, port, token, shown)

    @contextmanager
    def stage(kind: str) -> Iterator[Stage]:
        with ExitStack() as stack:
            peer = peer_of(kind, stack)
            stack.callback(peer.close)
            stage = Stage(peer)
            stack.callback(stage.close)
            yield stage

    return stage


def numbered(kind: str, count: int, largest_bytes: int = 8000) -> list[bytes]:
    """Frames of random sizes; for a datagram peer such that its kernel holds them all."""
    rng = random.Random(count)
    largest_bytes = min(largest_bytes, 300) if kind in DATAGRAMS else largest_bytes
    form = form_of(kind)
    return [form.payload(number, "x" * rng.randrange(largest_bytes)) for number in range(count)]


def push(worker: SinkWorker, frames: Sequence[bytes]) -> None:
    for frame in frames:
        worker.ring.push(frame, worker.ring.pushed, worker._clock_ns(), 1, 1)


def once(payloads: Sequence[bytes]) -> list[bytes]:
    """Without repeats."""
    return list(dict.fromkeys(payloads))


def check_all_came(peer: Peer, worker: SinkWorker, frames: list[bytes], may_repeat: bool = False) -> None:
    """All frames were sent, none dropped, and have come in order; each once, unless some may be repeated."""
    until(lambda: worker.frames == (len(frames), 0, 0), "all frames are sent")
    until(lambda: set(peer.payloads()) >= set(frames), "all frames have come")
    payloads = peer.payloads()
    assert (once(payloads) if may_repeat else payloads) == frames
    assert accounted(worker)
    assert worker.sent_bytes == sum(map(len, frames))


def circuits(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line["circuit"] for line in events(capsys) if line["event"] == "sink's circuit"]


# What must hold


@pytest.mark.parametrize("kind", EVERY)
def test_a_peer_that_accepts_gets_each_frame_once_in_order(staged: Staged, kind: str) -> None:
    frames = numbered(kind, 300)
    with staged(kind) as stage:
        worker = stage.worker()
        worker.start()
        push(worker, frames)
        check_all_came(stage.peer, worker, frames)
        assert (worker.failures, worker.retries) == (0, 0)


@pytest.mark.parametrize("kind", FILES + CONNECTED + DATAGRAMS)
def test_a_peer_that_refuses_and_comes_back(staged: Staged, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    frames = numbered(kind, 300)
    with staged(kind) as stage:
        worker = stage.worker(**WHOLE_BATCHES)
        worker.start()
        push(worker, frames[:100])
        check_all_came(stage.peer, worker, frames[:100])

        stage.peer.refuse()
        push(worker, frames[100:200])
        until(lambda: worker.breaker.circuit is Circuit.OPEN, "the circuit is open")
        push(worker, frames[200:])
        sent, dropped, backlog = worker.frames
        assert dropped == 0
        assert backlog >= 150
        assert accounted(worker)
        assert (worker.failures, worker.retries) == (5, 4)

        stage.peer.come_back()
        stage.clock.let_pass()
        if kind in DATAGRAMS:  # it promises nothing, but that a receiver can see what is missing
            until(lambda: worker.frames == (300, 0, 0), "all datagrams are sent")
            until(lambda: stage.peer.payloads()[-1] == frames[-1], "the last datagram has come")
            assert stage.peer.payloads() == frames[:100] + frames[sent:]
            assert stage.peer.missing >= sent - 100 > 0  # what is sent again has new numbers
            assert accounted(worker)
        else:
            assert sent == 100
            check_all_came(stage.peer, worker, frames)
        assert (worker.failures, worker.retries) == (5, 5)
        assert worker.breaker.circuit is Circuit.CLOSED
    assert circuits(capsys) == ["open", "half-open", "closed"]


@pytest.mark.parametrize("kind", CONNECTED)
def test_a_peer_that_resets_in_the_middle(staged: Staged, kind: str) -> None:
    """Each time in the middle of a batch, most of which hasn't been acknowledged: it comes again, and nothing else."""
    frames = numbered(kind, 300)
    with staged(kind) as stage:
        stage.peer.reset((0, 125), (100, 125), (100, 175), (150, 275), of=frames)
        worker = stage.worker(**WHOLE_BATCHES)
        push(worker, frames)
        worker.start()
        check_all_came(stage.peer, worker, frames, may_repeat=True)
        # A kept connection that ends before any answer may have been dead before: nats makes another at once, unseen.
        assert worker.failures == worker.retries == (1 if kind in MESSAGES else 4)
        assert worker.breaker.circuit is Circuit.CLOSED
        repeated = len(stage.peer.payloads()) - 300
        if kind in REQUESTS:  # which hold a batch, whole or not at all
            assert repeated == 4 * BATCH
        elif kind in MESSAGES:  # half a batch each time
            assert repeated == 4 * BATCH // 2
        else:
            assert repeated <= 4 * BATCH


@pytest.mark.parametrize("kind", PIPES + CONNECTED)
def test_a_peer_that_stalls_holds_up_nobody_else(staged: Staged, kind: str, tmp_path: Path) -> None:
    """Its sink gives up after its timeout and tries again; stdout's waits, for there is no other."""
    frames = numbered(kind, 300)
    with staged(kind) as stage:
        stage.peer.stall()
        beside, lines = FilePeer(tmp_path / "beside"), numbered("file", 300)
        stalled = stage.worker(SHORT, **WHOLE_BATCHES)
        healthy = stage.worker(peer=beside)
        for worker, payloads in ((stalled, frames), (healthy, lines)):
            worker.start()
            push(worker, payloads[:200])
        check_all_came(beside, healthy, lines[:200])
        until(lambda: stalled.failures if stage.peer.has_timeout else stage.peer.is_touched(), "it stalls")
        for worker, payloads in ((stalled, frames), (healthy, lines)):
            push(worker, payloads[200:])
        check_all_came(beside, healthy, lines)
        _, dropped, backlog = stalled.frames
        assert dropped == 0
        assert backlog >= 100
        assert accounted(stalled)

        stage.peer.come_back()
        stage.clock.let_pass()
        check_all_came(stage.peer, stalled, frames, may_repeat=stage.peer.has_timeout)
        assert healthy.failures == 0


@pytest.mark.parametrize("kind", PIPES + CONNECTED)
def test_a_peer_that_goes_byte_by_byte(staged: Staged, kind: str) -> None:
    frames = numbered(kind, 60, largest_bytes=1500)
    with staged(kind) as stage:
        stage.peer.be_slow()
        worker = stage.worker()
        worker.start()
        push(worker, frames)
        check_all_came(stage.peer, worker, frames)
        assert worker.failures == 0


@pytest.mark.parametrize("certificate", ["of another authority", "of another name"])
@pytest.mark.parametrize("kind", ENCRYPTED)
def test_a_peer_with_a_wrong_certificate_gets_nothing(
    staged: Staged, kind: str, certificate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No byte of a frame, no secret; and all when it shows the right one."""
    frames = numbered(kind, 200)
    with staged(kind) as stage:
        stage.peer.show_certificate(certificate)
        worker = stage.worker(**WHOLE_BATCHES)
        worker.start()
        push(worker, frames)
        until(lambda: worker.breaker.circuit is Circuit.OPEN, "the circuit is open")
        until(lambda: stage.peer.has_refused_handshakes(5), "each connection has failed")
        assert stage.peer.payloads() == []
        assert worker.frames == (0, 0, 200)
        assert (worker.failures, worker.retries) == (5, 4)

        stage.peer.come_back()
        stage.clock.let_pass()
        check_all_came(stage.peer, worker, frames)
    assert circuits(capsys) == ["open", "half-open", "closed"]


# The end, in each state


def accepts(stage: Stage, frames: Sequence[bytes]) -> None: ...


def refuses(stage: Stage, frames: Sequence[bytes]) -> None:
    stage.peer.refuse()


def resets(stage: Stage, frames: Sequence[bytes]) -> None:
    stage.peer.reset(*[(0, BATCH // 2)] * 100, of=frames)


def stalls(stage: Stage, frames: Sequence[bytes]) -> None:
    stage.peer.stall()


def is_slow(stage: Stage, frames: Sequence[bytes]) -> None:
    stage.peer.be_slow()


def lies(stage: Stage, frames: Sequence[bytes]) -> None:
    stage.peer.show_certificate("of another authority")


def product(**kinds: list[str]) -> list[tuple[str, str]]:
    return [(state, kind) for state, names in kinds.items() for kind in names]


@pytest.mark.parametrize("buffer", ["memory", "a file"])
@pytest.mark.parametrize(("state", "kind"), product(accepts=EVERY, is_slow=PIPES + CONNECTED))
def test_the_end_with_a_peer_that_takes_frames(
    staged: Staged, kind: str, state: str, buffer: str, tmp_path: Path
) -> None:
    """It gets all of them, though none was sent when the end was announced."""
    frames = numbered(kind, 100, largest_bytes=300)
    with staged(kind) as stage:
        worker = stage.worker(path=tmp_path / "ring" if buffer == "a file" else "", records=200, linger=3600)
        globals()[state](stage, frames)
        worker.start()
        push(worker, frames)
        assert worker.frames == (0, 0, 100)
        stage.end(worker, PATIENCE_SECONDS)
        assert not worker._thread.is_alive()
        check_all_came(stage.peer, worker, frames)


@pytest.mark.parametrize("buffer", ["memory", "a file"])
@pytest.mark.parametrize(
    ("state", "kind"),
    product(
        refuses=FILES + CONNECTED + DATAGRAMS,
        resets=CONNECTED,
        stalls=PIPES + CONNECTED,
        lies=ENCRYPTED,
    ),
)
def test_the_end_with_a_peer_that_takes_none(
    staged: Staged, kind: str, state: str, buffer: str, tmp_path: Path
) -> None:
    """It comes in time; what a buffer in a file still holds, the next process delivers, in order."""
    frames = numbered(kind, 100)
    path = tmp_path / "ring" if buffer == "a file" else ""
    with staged(kind) as stage:
        worker = stage.worker(path=path, **WHOLE_BATCHES)
        globals()[state](stage, frames)
        push(worker, frames)
        worker.start()
        until(lambda: stage.peer.is_touched() if state == "stalls" else worker.failures, state)
        # A sink that stalls doesn't notice the end before its timeout, a minute; one that fails needs no deadline.
        stage.end(worker, 0.02 if state == "stalls" else PATIENCE_SECONDS)
        assert worker._thread.is_alive() is (state == "stalls")
        sent, dropped, backlog = worker.frames
        assert sent == 0 or kind in DATAGRAMS + PIPES
        assert worker.ring.drops[Drop.SHUTDOWN] == dropped
        assert (backlog if path else dropped) == 100 - sent > 0
        assert (dropped if path else backlog) == 0

        stage.peer.come_back()
        stage.end_process(worker)
        assert worker.frames == (sent, dropped, backlog)
        if path:
            after = stage.worker(path=path)
            after.start()
            until(lambda: after.frames == (backlog, 0, 0), "the next one has sent what was left")
            assert after.ring.recovered == backlog
            assert accounted(after)
            came = frames[sent:] if kind in DATAGRAMS else frames
            until(lambda: set(stage.peer.payloads()) >= set(came), "all have come")
            assert once(stage.peer.payloads()) == came
