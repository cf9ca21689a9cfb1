"""The kafka sink behind a real worker, and a real broker that is killed, stopped, and refuses what is too large."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import (
    AdminClient,
    NewTopic,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from agent.errors import RejectedError, SinkError
from agent.mistakes import decode
from agent.sink_worker import SinkWorker
from agent.sinks.kafka import KafkaSettings, KafkaSink
from tests.engines.brokers import KafkaBroker
from tests.engines.process import LOCALHOST, free_ports
from tests.workers import opened, until

PATIENCE_SECONDS = 60
PASSWORD = "p4ssword-of-nobody"


def settings(broker: KafkaBroker, topic: str, **more: Any) -> KafkaSettings:
    plain = {"type": "kafka", "servers": [broker.bootstrap], "topic": topic, "timeout": "10s", **more}
    return msgspec.convert(plain, KafkaSettings, dec_hook=decode)


def make_topic(broker: KafkaBroker, topic: str, partitions: int = 1, **configuration: str) -> None:
    client = AdminClient({"bootstrap.servers": broker.bootstrap})
    new = NewTopic(topic, partitions, 1, config={name.replace("_", "."): text for name, text in configuration.items()})
    client.create_topics([new])[topic].result(PATIENCE_SECONDS)


def stored(broker: KafkaBroker, topic: str, partition: int = 0) -> list[Any]:
    """Every record of a partition, in its order."""
    consumer = Consumer({"bootstrap.servers": broker.bootstrap, "group.id": "test"})
    try:
        place = TopicPartition(topic, partition, 0)
        _, end = consumer.get_watermark_offsets(place, timeout=PATIENCE_SECONDS)
        consumer.assign([place])
        found: list[Any] = []
        while len(found) < end:
            records = consumer.consume(end - len(found), PATIENCE_SECONDS)
            assert records, f"{len(found)} of {end} records came"
            found += records
    finally:
        consumer.close()
    assert all(record.error() is None for record in found)
    return found


def sequences(broker: KafkaBroker, topic: str) -> list[int]:
    return [json.loads(record.value())["sequence"] for record in stored(broker, topic)]


def once(found: list[int]) -> list[int]:
    """Without what came again, where it came first."""
    return list(dict.fromkeys(found))


def frame(sequence: int) -> bytes:
    return json.dumps({"sequence": sequence, "text": "x" * 200}).encode()


def push(worker: SinkWorker, first: int, last: int) -> None:
    for sequence in range(first, last + 1):
        worker.ring.push(frame(sequence), sequence, worker._clock_ns(), 1)


def worker_of(broker: KafkaBroker, topic: str, **more: Any) -> SinkWorker:
    # Pauses long enough that five failures in a row don't open the circuit while the broker starts.
    worker = opened(KafkaSink(settings(broker, topic, **more)), size=8 << 20, base=1, cap=1)
    worker.start()
    return worker


def end(worker: SinkWorker) -> None:
    worker.finish(worker._now_seconds() + 30)
    worker.join()
    assert not worker._thread.is_alive()


@pytest.mark.parametrize("acks", ["all", "1"])
def test_frames_are_stored_once_and_in_order(kafka: KafkaBroker, acks: str) -> None:
    topic = f"plain-{acks}"
    worker = worker_of(kafka, topic, acks=acks, compression="zstd")
    push(worker, 1, 2000)
    until(lambda: worker.frames == (2000, 0, 0), "all are sent")
    end(worker)
    assert worker.failures == 0
    assert sequences(kafka, topic) == list(range(1, 2001))
    logs = Path(kafka.folder, "data", f"{topic}-0").glob("*.log")
    assert sum(log.stat().st_size for log in logs) < 2000 * len(frame(2000)) / 5


def test_a_hosts_frames_are_in_one_partition(kafka: KafkaBroker) -> None:
    make_topic(kafka, "spread", partitions=4)
    for host in ("web-1", "web-2", "db-1"):
        sink = KafkaSink(settings(kafka, "spread"))
        sink.host = host
        sink.open()
        sink.deliver([memoryview(frame(sequence)) for sequence in range(20)])
        sink.close()
    places: dict[bytes, list[int]] = {}
    for partition in range(4):
        for record in stored(kafka, "spread", partition):
            places.setdefault(record.key(), []).append(partition)
    assert sorted(places) == [b"db-1", b"web-1", b"web-2"]
    assert all(len(found) == 20 and len(set(found)) == 1 for found in places.values())


@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_a_broker_that_is_away_for_a_while(kafka: KafkaBroker, way: str) -> None:
    """Nothing is missing, and all is in order; what was under way may be there twice."""
    worker = worker_of(kafka, way, timeout="1500ms")
    push(worker, 1, 300)
    until(lambda: worker.frames[0] >= 100, "some are sent")
    if way == "killed":
        kafka.kill()
    else:
        kafka.send(signal.SIGSTOP)
    push(worker, 301, 600)
    until(lambda: worker.failures, "it was missed")
    sent = worker.frames[0]
    assert worker.frames == (sent, 0, 600 - sent)
    if way == "killed":
        kafka.start()
    else:
        kafka.send(signal.SIGCONT)
    push(worker, 601, 900)
    until(lambda: worker.frames == (900, 0, 0), "all are sent")
    end(worker)
    assert once(sequences(kafka, way)) == list(range(1, 901))


def test_what_is_too_large_for_the_topic_is_dropped_alone(kafka: KafkaBroker) -> None:
    make_topic(kafka, "small", max_message_bytes="5000")
    worker = worker_of(kafka, "small")
    for sequence in range(1, 101):
        worker.ring.push(frame(sequence) + b" " * (6000 if sequence == 50 else 0), sequence, worker._clock_ns())
    until(lambda: sum(worker.frames[:2]) == 100, "all are settled")
    assert worker.frames == (99, 1, 0)
    end(worker)
    assert once(sequences(kafka, "small")) == [*range(1, 50), *range(51, 101)]


def test_a_topic_that_is_not_made(kafka: KafkaBroker) -> None:
    sink = KafkaSink(settings(kafka, "later", timeout="3s", properties={"allow.auto.create.topics": "false"}))
    sink.open()
    with pytest.raises(SinkError) as caught:
        sink.deliver([memoryview(b"1")])
    assert type(caught.value) is SinkError
    assert "topic" in str(caught.value)
    make_topic(kafka, "later")
    sink.deliver([memoryview(b"1"), memoryview(b"2")])
    sink.close()
    assert [record.value() for record in stored(kafka, "later")] == [b"1", b"2"]


def test_a_large_record_goes_through_where_both_sides_take_it(kafka: KafkaBroker) -> None:
    make_topic(kafka, "large", max_message_bytes="4000000")
    payload = memoryview(b"x" * 2_000_000)
    sink = KafkaSink(settings(kafka, "large"))
    sink.open()
    with pytest.raises(RejectedError, match="size too large"):
        sink.deliver([payload])
    sink.close()
    sink = KafkaSink(settings(kafka, "large", properties={"message.max.bytes": "3000000"}))
    sink.open()
    sink.deliver([payload])
    sink.close()
    assert [len(record.value()) for record in stored(kafka, "large")] == [2_000_000]


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
def test_a_password_over_tls(locked: tuple[KafkaBroker, int, Path], mechanism: str, tmp_path: Path) -> None:
    """The right one is taken, a wrong one and an untrusted certificate are reasons, and none shows the password."""
    broker, port, authority = locked
    place = tmp_path / "password"
    topic = f"locked-{mechanism}"
    more: dict[str, Any] = {
        "servers": [f"{LOCALHOST}:{port}"],
        "timeout": "3s",
        "tls": {"ca": str(authority)},
        "sasl": {"mechanism": mechanism, "user": "agent", "password": {"file": str(place)}},
    }
    make_topic(broker, topic)
    place.write_text("wr0ng")
    place.chmod(0o600)
    sink = KafkaSink(settings(broker, topic, **more))
    sink.open()
    reason = failure(sink)
    assert "uthentication failed" in reason
    assert "wr0ng" not in reason
    place.write_text(PASSWORD)  # while the sink is open, as passwords are changed
    sink.deliver([memoryview(b"frame")])
    sink.close()

    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    sink = KafkaSink(settings(broker, topic, **{**more, "tls": {"ca": str(tmp_path / "other.pem")}}))
    sink.open()
    assert "certificate verify failed" in failure(sink)
    sink.close()
    assert [record.value() for record in stored(broker, topic)] == [b"frame"]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[KafkaBroker, int, Path]]:
    """A broker with a listener for TLS and passwords beside the open one, its port, and the file of whom to trust."""
    folder = tmp_path_factory.mktemp("kafka-locked")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    leaf = authority.issue_cert(LOCALHOST)
    # Java reads keys in PKCS #8 only.
    key = load_pem_private_key(leaf.private_key_pem.bytes(), None)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "server.pem").write_bytes(pem + b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    (port,) = free_ports(1)
    module = "org.apache.kafka.common.security"
    broker = KafkaBroker(
        folder / "broker",
        {
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": f"{folder}/server.pem",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256",
            "listener.name.sasl_ssl.plain.sasl.jaas.config": (
                f'{module}.plain.PlainLoginModule required user_agent="{PASSWORD}";'
            ),
            "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": f"{module}.scram.ScramLoginModule required;",
        },
    )
    broker._properties["listeners"] += f",SASL_SSL://{LOCALHOST}:{port}"
    with broker:
        client = AdminClient({"bootstrap.servers": broker.bootstrap})
        credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
        change = UserScramCredentialUpsertion("agent", credential, PASSWORD.encode())
        client.alter_user_scram_credentials([change])["agent"].result(PATIENCE_SECONDS)
        yield broker, port, folder / "ca.pem"


def failure(sink: KafkaSink) -> str:
    with pytest.raises(SinkError) as caught:
        sink.deliver([memoryview(b"frame")])
    assert type(caught.value) is SinkError
    return str(caught.value)
