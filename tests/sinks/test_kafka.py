"""The kafka sink against the mock cluster that is built into librdkafka (its property test.mock.num.brokers).

That is no Kafka: brokers of librdkafka's own making, inside this process, which speak enough of the protocol over real
connections on loopback. They make every topic that they are asked for, take records of any size, and store nothing
on disk. What a real broker does is in tests/engines/test_kafka.py.
"""

from __future__ import annotations

import gc
import logging
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import confluent_kafka
import msgspec
import pytest
import trustme

from agent.errors import RejectedError, SinkError, UsageError
from agent.mistakes import decode
from agent.sinks.kafka import KafkaSettings, KafkaSink
from tests.sinks.peers import StreamPeer, chatter, refused_port, stall
from tests.workers import drain, opened, put

PATIENCE_SECONDS = 20
HERE = ("127.0.0.1:9092",)
PASSWORD = "s3cret-of-nobody"


class Cluster:
    """A mock cluster of one broker; it lasts as long as the handle that has made it."""

    def __init__(self) -> None:
        silent = logging.Logger("mock cluster")
        silent.addHandler(logging.NullHandler())
        self._handle: Any = confluent_kafka.Producer({"test.mock.num.brokers": 1}, logger=silent)
        (broker,) = self._handle.list_topics(timeout=PATIENCE_SECONDS).brokers.values()
        self.address = f"{broker.host}:{broker.port}"

    def records(self, topic: str, count: int) -> list[Any]:
        """So many records of a topic, partition by partition, in their order."""
        consumer = confluent_kafka.Consumer({"bootstrap.servers": self.address, "group.id": "test"})
        try:
            partitions = consumer.list_topics(topic, timeout=PATIENCE_SECONDS).topics[topic].partitions
            consumer.assign([confluent_kafka.TopicPartition(topic, number, 0) for number in partitions])
            found = consumer.consume(count, PATIENCE_SECONDS)
            assert [record.error() for record in found] == [None] * count
            assert consumer.consume(1, 0.05) == []
        finally:
            consumer.close()
        return sorted(found, key=lambda record: (record.partition(), record.offset()))

    def close(self) -> None:
        self._handle = None


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with closing(Cluster()) as cluster:
        yield cluster


def settings(servers: tuple[str, ...] = HERE, topic: str = "frames", **more: Any) -> KafkaSettings:
    plain = {"type": "kafka", "servers": list(servers), "topic": topic, **more}
    return msgspec.convert(plain, KafkaSettings, dec_hook=decode)


@pytest.fixture
def kafka_sink() -> Iterator[Any]:
    """`kafka_sink(address, **settings)`: an open sink, closed after the test."""
    sinks: list[KafkaSink] = []

    def make(address: str, **more: Any) -> KafkaSink:
        sink = KafkaSink(settings((address,), **more))
        sinks.append(sink)
        sink.open()
        return sink

    yield make
    for sink in sinks:
        sink.close()


def deliver(sink: KafkaSink, *payloads: bytes) -> None:
    """As the worker does: views of one buffer, which holds something else afterwards."""
    buffer = bytearray(b"".join(payloads))
    views, start = [], 0
    for payload in payloads:
        views.append(memoryview(buffer)[start : start + len(payload)])
        start += len(payload)
    try:
        sink.deliver(views)
    finally:
        buffer[:] = b"?" * len(buffer)


def failure(sink: KafkaSink, *payloads: bytes, kind: type[SinkError] = SinkError) -> Any:
    with pytest.raises(SinkError) as caught:
        deliver(sink, *payloads)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return caught.value


def threads() -> set[str]:
    return {path.name for path in Path("/proc/self/task").iterdir()}


# What is sent


@pytest.mark.parametrize(("acks", "compression"), [("1", "none"), *(("all", name) for name in ("gzip", "zstd"))])
def test_each_payload_is_a_record_in_order(cluster: Cluster, kafka_sink: Any, acks: str, compression: str) -> None:
    sent = [b'{"sequence":%d}' % number for number in range(300)] + [b"", b"\0\xff" * 100]
    sink = kafka_sink(cluster.address, acks=acks, compression=compression)
    deliver(sink, *sent[:200])
    deliver(sink, *sent[200:])
    records = cluster.records("frames", len(sent))
    assert [record.value() or b"" for record in records] == sent
    assert len({record.partition() for record in records}) == 1


def test_the_key_is_the_host_or_what_is_set(cluster: Cluster) -> None:
    ways: dict[str, tuple[dict[str, str], str]] = {
        socket.gethostname(): ({}, ""),
        "rack 7": ({"key": "rack 7"}, "web-1"),
    }
    for number, (key, (more, host)) in enumerate(ways.items()):
        sink = KafkaSink(settings((cluster.address,), f"frames-{number}", **more))
        sink.host = host or sink.host
        sink.open()
        deliver(sink, b"x")
        sink.close()
        assert [record.key() for record in cluster.records(f"frames-{number}", 1)] == [key.encode()]


def test_a_dead_server_beside_a_living_one(cluster: Cluster) -> None:
    with refused_port() as port:
        sink = KafkaSink(settings((f"127.0.0.1:{port}", cluster.address)))
        sink.open()
        deliver(sink, b"one", b"two")
        sink.close()
    assert [record.value() for record in cluster.records("frames", 2)] == [b"one", b"two"]


def test_properties_go_to_librdkafka(cluster: Cluster, kafka_sink: Any) -> None:
    sink = kafka_sink(cluster.address, properties={"message.max.bytes": "2000", "client.id": "of a test"})
    deliver(sink, b"x" * 1000)
    error = failure(sink, b"x" * 3000, kind=RejectedError)
    assert "size too large" in str(error)


# Rejections


def test_what_is_too_large_is_refused_and_what_stands_before_it_delivered(cluster: Cluster, kafka_sink: Any) -> None:
    sink = kafka_sink(cluster.address)
    error = failure(sink, b"1", b"2", b"x" * 1_100_000, b"4", kind=RejectedError)
    assert (error.delivered, error.each) == (2, True)
    assert str(error).startswith(f"kafka {cluster.address} frames: ")
    assert "size too large" in str(error)
    deliver(sink, b"4")
    assert [record.value() for record in cluster.records("frames", 3)] == [b"1", b"2", b"4"]


def test_a_worker_drops_what_is_refused_and_delivers_the_others(cluster: Cluster) -> None:
    worker = opened(KafkaSink(settings((cluster.address,))), size=8 << 20, records=40, bytes=4 << 20)
    put(worker, 1, 50)
    put(worker, 51, 51, width=1_100_000)
    put(worker, 52, 100)
    drain(worker)
    worker.join()
    assert worker.frames == (99, 1, 0)
    values = [int(record.value()) for record in cluster.records("frames", 99)]
    assert values == [*range(1, 51), *range(52, 101)]


def test_what_stands_before_a_failure_is_delivered(cluster: Cluster, kafka_sink: Any) -> None:
    """A payload that is larger than the ring can't come; librdkafka's queue has room for all that can."""
    small = {"buffer": {"size": "64KiB"}, "batch": {"bytes": "64KiB"}}
    sink = kafka_sink(cluster.address, properties={"message.max.bytes": "20000000"}, **small)
    error = failure(sink, b"1", b"2", b"x" * 12_000_000, b"4")
    assert error.delivered == 2
    assert str(error).endswith("Local: Queue full")
    deliver(sink, b"4")
    assert [record.value() for record in cluster.records("frames", 3)] == [b"1", b"2", b"4"]


# Peers that don't answer


def test_nobody_is_there(kafka_sink: Any) -> None:
    with refused_port() as port:
        sink = kafka_sink(f"127.0.0.1:{port}", timeout="1s")
        error = failure(sink, b"1", b"2")
        assert error.delivered == 0
        assert str(error).startswith(f"kafka 127.0.0.1:{port} frames: not acknowledged within 1s: ")
        assert "Connection refused" in str(error)


def test_a_name_without_an_address(kafka_sink: Any) -> None:
    error = failure(kafka_sink("nowhere.invalid:9092", timeout="1s"), b"1")
    assert "not acknowledged within 1s" in str(error)
    assert "nowhere.invalid" in str(error)


def test_a_peer_that_says_nothing_gets_nothing_later(kafka_sink: Any) -> None:
    with StreamPeer(stall, stall) as peer:
        sink = kafka_sink(f"127.0.0.1:{peer.port}", timeout="1s")
        assert "not acknowledged within 1s" in str(failure(sink, b"of-the-first"))
        peer.go_on.set()
        peer.wait(lambda: peer.accepted[0].ended)  # the sink itself is still open
        assert all(b"of-the-first" not in accepted.data for accepted in peer.accepted)


def test_a_peer_that_is_no_broker(kafka_sink: Any) -> None:
    with StreamPeer(*[chatter(b"HTTP/1.1 400 Bad Request\r\n\r\n")] * 100) as peer:
        error = failure(kafka_sink(f"127.0.0.1:{peer.port}", timeout="1s"), b"1")
    assert "Invalid response size" in str(error)


def test_a_cluster_that_goes_away(cluster: Cluster, kafka_sink: Any) -> None:
    sink = kafka_sink(cluster.address, timeout="1s", acks="1")
    deliver(sink, b"1")
    cluster.close()
    assert "Connection refused" in str(failure(sink, b"2", b"3"))


def test_nothing_is_said_on_stderr() -> None:
    """librdkafka logs there unless it is told better, on its own and in its own way."""
    program = (
        "import sys\n"
        "from agent.errors import SinkError\n"
        "from agent.sinks.kafka import KafkaSettings, KafkaSink\n"
        "from agent.units import Duration\n"
        "sink = KafkaSink(KafkaSettings(servers=(sys.argv[1],), topic='t', timeout=Duration(1),\n"
        "                               properties={'queue.buffering.backpressure.threshold': '1'}))\n"
        "sink.open()\n"
        "try:\n    sink.deliver([memoryview(b'x')])\n"
        "except SinkError as error:\n    print(error)\n"
        "sink.close()\n"
    )
    with refused_port() as port:
        run = run_python(program, f"127.0.0.1:{port}")
    assert run.stderr == ""
    assert "Connection refused" in run.stdout


# TLS and secrets


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return authority


def server(authority: trustme.CA, name: str = "127.0.0.1") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def test_a_trusted_peer_is_spoken_to(kafka_sink: Any, authority: trustme.CA, tmp_path: Path) -> None:
    tls = {"ca": str(tmp_path / "ca.pem")}
    with StreamPeer(tls=server(authority)) as peer:
        failure(kafka_sink(f"127.0.0.1:{peer.port}", timeout="1s", tls=tls), b"1")
        peer.wait(lambda: b"hostprobe" in peer.accepted[0].data)  # the first request's client.id


@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_an_untrusted_peer_gets_no_request(kafka_sink: Any, authority: trustme.CA, tmp_path: Path, wrong: str) -> None:
    tls = {"ca": str(tmp_path / "ca.pem")}
    shown = server(trustme.CA()) if wrong == "authority" else server(authority, "127.0.0.2")
    with StreamPeer(tls=shown) as peer:
        error = failure(kafka_sink(f"127.0.0.1:{peer.port}", timeout="1s", tls=tls), b"1")
        assert all(accepted.data == b"" for accepted in peer.accepted)
        assert len(peer.accepted) > 0
    assert "certificate" in str(error)


def test_a_tls_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    sink = KafkaSink(settings(tls={"ca": str(tmp_path / "ca.pem")}))
    with pytest.raises(UsageError, match=r'ca ".*": no certificate in it'):
        sink.open()


def test_the_password_is_shown_nowhere_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(PASSWORD)
    path.chmod(0o644)
    sasl = {"mechanism": "PLAIN", "user": "agent", "password": {"file": str(path)}}
    with refused_port() as port:
        sink = KafkaSink(settings((f"127.0.0.1:{port}",), sasl=sasl, timeout="1s"))
        sink.open()
        assert [notice for notice in sink.notices if "world-readable" in notice] == sink.notices != []
        assert PASSWORD not in str(failure(sink, b"1")) + repr(vars(sink))
        path.unlink()
        assert str(failure(sink, b"1")).endswith(
            f'file "{path}": No such file or directory: expected a file with a secret that can be read'
        )
        path.write_text("a new one")
        assert "Connection refused" in str(failure(sink, b"1"))
        sink.close()


# Steady state


def test_no_garbage_and_no_threads_are_left(cluster: Cluster) -> None:
    before = threads()
    sink = KafkaSink(settings((cluster.address,)))
    sink.open()
    deliver(sink, b"warm")
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            deliver(sink, *[b"x" * 100] * 10)
        assert gc.collect() == 0
    finally:
        gc.enable()
    assert threads() - before
    sink.close()
    assert threads() - before == set()


def test_closing_twice_and_opening_again(cluster: Cluster) -> None:
    sink = KafkaSink(settings((cluster.address,)))
    sink.close()
    for text in (b"1", b"2"):
        sink.open()
        deliver(sink, text)
        sink.close()
        sink.close()
    assert {record.value() for record in cluster.records("frames", 2)} == {b"1", b"2"}


# Settings


@pytest.mark.parametrize("topic", ["", ".", "..", "a b", "ä", "x" * 250, "a/b", "a\n"])
def test_a_topic_that_is_none(topic: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="topic: 1 to 249 of"):
        settings(topic=topic)


@pytest.mark.parametrize("topic", ["a", "x" * 249, "A.b_c-9", "..."])
def test_a_topic(topic: str) -> None:
    assert settings(topic=topic).topic == topic


@pytest.mark.parametrize("servers", [(), ("",), ("host",), ("host:0",), (*HERE, "host:x"), ("a:1,b:2",)])
def test_servers_that_are_none(servers: tuple[str, ...]) -> None:
    with pytest.raises(msgspec.ValidationError, match=r'servers: .*"host:port"'):
        settings(servers)


@pytest.mark.parametrize("timeout", ["999ms", "3601s", "0s"])
def test_a_timeout_without_sense(timeout: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="timeout: a duration from 1s to 1h"):
        settings(timeout=timeout)


@pytest.mark.parametrize(
    "name",
    ["bootstrap.servers", "acks", "request.required.acks", "enable.idempotence", "error_cb", "stats_cb", "logger",
     "max.in.flight.requests.per.connection", "message.timeout.ms", "enable.ssl.certificate.verification",
     "security.protocol", "transactional.id", "queue.buffering.max.messages"],
)  # fmt: skip
def test_a_property_of_ours(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="properties: none of those that hostprobe sets"):
        settings(properties={name: "1"})


@pytest.mark.parametrize(
    "name", ["sasl.password", "ssl.key.password", "SASL.password", "ssl.key.pem", "sasl.oauthbearer.client.secret"]
)  # fmt: skip
def test_a_secret_in_properties(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="sasl: the place of a user and a secret") as caught:
        settings(properties={"acks": "1", name: PASSWORD})
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("properties", "text"),
    [
        ({"nope": "1"}, 'librdkafka: No such configuration property: "nope"'),
        ({"linger.ms": "soon"}, 'librdkafka: Invalid value for configuration property "queue.buffering.max.ms"'),
    ],
)
def test_a_property_that_librdkafka_refuses(properties: dict[str, str], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        KafkaSink(settings(properties=properties)).open()
    assert str(caught.value) == text


SASL = {"mechanism": "SCRAM-SHA-512", "user": "agent", "password": {"env": "PASSWORD"}}


def test_a_secret_over_an_open_connection() -> None:
    with pytest.raises(msgspec.ValidationError, match="tls: a section tls, a secret goes over no open connection"):
        settings(("127.0.0.1:9092", "kafka.example:9092"), sasl=SASL)
    settings(("kafka.example:9092",), sasl=SASL, tls={})
    settings(("127.0.0.1:9092", "localhost:9092", "[::1]:9092"), sasl=SASL)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"acks": "0"}, "acks"),
        ({"compression": "best"}, "compression"),
        ({"sasl": {**SASL, "mechanism": "GSSAPI"}}, "mechanism"),
        ({"sasl": {**SASL, "user": ""}}, "user: a name"),
        ({"tls": {"server_name": "kafka"}}, "tls: no server_name"),
        ({"partition": 1}, "partition"),
    ],
)
def test_settings_that_are_wrong(more: dict[str, Any], text: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=text):
        settings(**more)


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=True,
    )


def test_without_the_client_it_says_what_is_needed() -> None:
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'confluent_kafka':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from agent.errors import UsageError\n"
        "from agent.sinks.kafka import KafkaSettings, KafkaSink\n"
        "sink = KafkaSink(KafkaSettings(servers=('localhost:9092',), topic='frames'))\n"
        "try:\n    sink.open()\n"
        "except UsageError as error:\n    print(error)\n"
    )
    run = run_python(program)
    assert run.stdout == 'sinks of type kafka need confluent-kafka: expected pip install "hostprobe[kafka]"\n'
