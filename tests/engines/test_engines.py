"""Each engine does what it is for, as a plain client sees it: what other tests find wrong is then hostprobe's."""

from __future__ import annotations

import asyncio
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import cramjam
import nats as nats_client
import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer
from confluent_kafka.admin import AdminClient
from nats.js.api import StorageType
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE
from prometheus_client.parser import text_string_to_metric_families

from tests.engines import process
from tests.engines.brokers import KafkaBroker, NatsServer
from tests.engines.collector import Collector
from tests.engines.node_exporter import NodeExporter
from tests.engines.process import Engine, answers, free_ports, http, patiently, program
from tests.engines.stores import Prometheus, VictoriaMetrics, promtool_check
from tests.sinks.http_peer import Answer

NOW_SECONDS = int(time.time())
REMOTE_WRITE = {
    "Content-Type": "application/x-protobuf",
    "Content-Encoding": "snappy",
    "X-Prometheus-Remote-Write-Version": "0.1.0",
}


# A process -----------------------------------------------------------------------------------


class Shell(Engine):
    """A script that is ready once it has written so."""

    name = "shell"
    stop_seconds = 0.5

    def __init__(self, folder: Path, script: str) -> None:
        super().__init__(folder)
        self.script = script

    def command(self) -> Sequence[str]:
        return "sh", "-c", self.script

    def is_ready(self) -> bool:
        return "ready" in self.log_text()


def test_a_missing_program_fails_the_test_and_says_what_to_do() -> None:
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception)) as ended:
        program("no-such-engine")
    assert ended.type is pytest.fail.Exception
    assert str(ended.value) == "no-such-engine is missing: make test-engines installs it"


def test_an_engine_that_ends_too_early_shows_its_log(tmp_path: Path) -> None:
    shell = Shell(tmp_path, "echo the port is taken; exit 3")
    with pytest.raises(pytest.fail.Exception, match="shell has ended with status 3 before it was ready") as failed:
        shell.start()
    assert str(failed.value).endswith("the port is taken")
    assert shell.process is None


def test_an_engine_that_is_never_ready_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PATIENCE_SECONDS", 0.2)
    shell = Shell(tmp_path, "echo $$; exec sleep 1000")
    with pytest.raises(pytest.fail.Exception, match=r"shell was not ready after 0\.2 s"):
        shell.start()
    assert state(int(shell.log_text())) == ""


@pytest.mark.parametrize(
    "script", ["echo ready; exec sleep 1000", "trap '' TERM; echo ready; while :; do sleep 0.1; done"], ids=str.split
)
def test_no_engine_outlives_its_with(tmp_path: Path, script: str) -> None:
    with Shell(tmp_path, script) as shell:
        assert shell.process is not None
        identity = shell.process.pid
        assert state(identity) in "SR"
    assert state(identity) == ""


def test_an_engine_that_was_stopped_by_a_signal_is_ended_too(tmp_path: Path) -> None:
    with Shell(tmp_path, "trap 'echo ended in order; exit' TERM; echo ready; while :; do sleep 0.1; done") as shell:
        shell.stop_seconds = 20
        shell.send(signal.SIGSTOP)
    assert shell.log_text().endswith("ended in order\n")


def test_no_engine_outlives_tests_that_were_killed(tmp_path: Path) -> None:
    script = """
import os, pathlib, signal, sys
from tests.engines.test_engines import Shell

Shell(pathlib.Path(sys.argv[1]), "echo $$ ready; exec sleep 1000").start()
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, cwd=process.REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    identity = int((tmp_path / "shell.log").read_text().split()[0])
    patiently(lambda: state(identity) in ("Z", ""), "the engine has ended")


def state(identity: int) -> str:
    """A process's: "Z" where it has ended and nobody has waited for it, "" where there is none."""
    try:
        return Path(f"/proc/{identity}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_free_ports_are_different_and_not_ephemeral() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert max(ports) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


# Prometheus, promtool, VictoriaMetrics -------------------------------------------------------


def remote_write(name: str, value: float, unix_milliseconds: int) -> bytes:
    """A WriteRequest of one sample, written by hand: no encoder of ours is asked."""

    def part(number: int, content: bytes) -> bytes:
        return bytes((number << 3 | 2, len(content))) + content

    def varint(number: int) -> bytes:
        low = bytes((number & 0x7F | (0x80 if number > 0x7F else 0),))
        return low + varint(number >> 7) if number > 0x7F else low

    label = part(1, part(1, b"__name__") + part(2, name.encode()))
    sample = part(2, b"\x09" + struct.pack("<d", value) + b"\x10" + varint(unix_milliseconds))
    return bytes(cramjam.snappy.compress_raw(part(1, label + sample)))


def value_of(results: list[dict[str, object]]) -> list[object]:
    return [result["value"][1] for result in results]  # type: ignore[index]


def test_prometheus_takes_a_remote_write(prometheus: Callable[..., Prometheus]) -> None:
    store = prometheus()
    status, body = http(store.write_url, remote_write("engine_answer", 42.5, NOW_SECONDS * 1000), REMOTE_WRITE)
    assert (status, body) == (204, b"")
    (result,) = store.query("engine_answer", NOW_SECONDS)
    assert result == {"metric": {"__name__": "engine_answer"}, "value": [NOW_SECONDS, "42.5"]}
    assert http(store.write_url, b"no snappy", REMOTE_WRITE)[0] == 400


def test_prometheus_is_configured_as_told(prometheus: Callable[..., Prometheus]) -> None:
    late = prometheus(configuration={"storage": {"tsdb": {"out_of_order_time_window": "1h"}}})
    strict = prometheus()
    for store, expected in ((late, 204), (strict, 400)):
        for seconds in (NOW_SECONDS, NOW_SECONDS - 60):
            status, _ = http(store.write_url, remote_write("late", seconds, seconds * 1000), REMOTE_WRITE)
        assert status == expected


def test_prometheus_scrapes_what_it_is_told(prometheus: Callable[..., Prometheus], node_exporter: NodeExporter) -> None:
    alive, dead = urlsplit(node_exporter.url).netloc, f"127.0.0.1:{free_ports(1)[0]}"
    store = prometheus([alive, dead], {"scrape_interval": "200ms", "scrape_timeout": "200ms"})
    patiently(lambda: sorted(one["health"] for one in store.targets()) == ["down", "up"], "one up and one down")
    errors = {one["labels"]["instance"]: one["lastError"] for one in store.targets()}
    assert errors[alive] == ""
    assert "connection refused" in errors[dead]
    assert {result["metric"]["job"] for result in store.query("up")} == {"hostprobe"}
    series = store.query('node_cpu_seconds_total{mode="idle"}')
    assert {result["metric"]["instance"] for result in series} == {alive}


def test_promtool_tells_good_from_bad() -> None:
    good = "# HELP a_bytes_total Bytes.\n# TYPE a_bytes_total counter\na_bytes_total 1\n"
    assert promtool_check(good) == []
    assert promtool_check(good.replace("a_bytes_total", "a_bytes")) == [
        'a_bytes counter metrics should have "_total" suffix'
    ]
    (finding,) = promtool_check("a_total one\n")
    assert "expected float as value" in finding


def test_victoria_metrics_takes_influx_lines(victoria_metrics: VictoriaMetrics) -> None:
    body = f"engine,host=a answer=42.5,count=7i {NOW_SECONDS}000000000\n".encode()
    assert http(f"{victoria_metrics.url}/write", body) == (204, b"")
    labels = {"__name__": "engine_answer", "host": "a"}
    assert victoria_metrics.export("engine_answer") == [
        {"metric": labels, "values": [42.5], "timestamps": [NOW_SECONDS * 1000]}
    ]
    assert value_of(victoria_metrics.query("engine_count", NOW_SECONDS)) == ["7"]


def test_victoria_metrics_takes_a_remote_write(victoria_metrics: VictoriaMetrics) -> None:
    body = remote_write("engine_written", 1.5, NOW_SECONDS * 1000)
    assert http(victoria_metrics.write_url, body, REMOTE_WRITE) == (204, b"")
    (series,) = victoria_metrics.export("engine_written")
    assert (series["values"], series["timestamps"]) == ([1.5], [NOW_SECONDS * 1000])
    assert http(victoria_metrics.write_url, b"no snappy", REMOTE_WRITE)[0] >= 400


def test_victoria_metrics_has_nothing_that_nobody_sent(victoria_metrics: VictoriaMetrics) -> None:
    assert victoria_metrics.export('{__name__!~"engine.*"}') == []


def test_node_exporter_exposes_the_cpus(node_exporter: NodeExporter) -> None:
    families = {family.name: family for family in text_string_to_metric_families(node_exporter.scrape())}
    cpus = {sample.labels["cpu"] for sample in families["node_cpu_seconds"].samples}
    assert {sample.name for sample in families["node_cpu_seconds"].samples} == {"node_cpu_seconds_total"}
    assert "0" in cpus


def test_the_node_exporter_of_today_exposes_the_cpus(tmp_path: Path) -> None:
    with NodeExporter(tmp_path, "node_exporter") as exporter:
        assert "\nnode_cpu_seconds_total{" in exporter.scrape()


# The OpenTelemetry collector -----------------------------------------------------------------


def otlp_request(value: float) -> bytes:
    request = ExportMetricsServiceRequest()
    metric = request.resource_metrics.add().scope_metrics.add().metrics.add(name="engine.answer", unit="1")
    metric.sum.aggregation_temporality = AGGREGATION_TEMPORALITY_CUMULATIVE
    metric.sum.is_monotonic = True
    metric.sum.data_points.add(as_double=value, time_unix_nano=NOW_SECONDS * 10**9)
    return bytes(request.SerializeToString())


def send_otlp(collector: Collector, body: bytes) -> tuple[int, bytes]:
    return http(collector.url, body, {"Content-Type": "application/x-protobuf"})


def test_the_collector_shows_what_it_took(collector: Collector) -> None:
    before = len(collector.received())
    status, body = send_otlp(collector, otlp_request(42.5))
    assert status == 200
    # It says so even where all was taken: `partial_success` is there, and empty.
    assert ExportMetricsServiceResponse.FromString(body).partial_success.rejected_data_points == 0
    (request,) = collector.received()[before:]
    (metric,) = request["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]
    (point,) = metric["sum"]["dataPoints"]
    assert (metric["name"], metric["unit"], metric["sum"]["isMonotonic"]) == ("engine.answer", "1", True)
    assert (point["asDouble"], point["timeUnixNano"]) == (42.5, f"{NOW_SECONDS}000000000")


def test_the_collector_refuses_what_is_no_request(collector: Collector) -> None:
    before = collector.received()
    assert send_otlp(collector, b"\xff\xff")[0] == 400
    assert collector.received() == before


def test_the_collector_says_when_it_could_not_hand_on(collector: Collector) -> None:
    collector.behind.answers.append(Answer(503))
    assert send_otlp(collector, otlp_request(1))[0] == 503
    assert send_otlp(collector, otlp_request(2))[0] == 200


# Brokers -------------------------------------------------------------------------------------


def test_nats_keeps_what_it_acknowledged(nats: NatsServer) -> None:
    async def publish() -> list[int]:
        client = await nats_client.connect(nats.url)
        stream = client.jetstream()
        await stream.add_stream(name="ENGINE", subjects=["engine.>"], storage=StorageType.FILE)
        numbers = [(await stream.publish("engine.a", b"%d" % number)).seq for number in range(3)]
        await client.close()
        return numbers

    async def read() -> list[bytes]:
        client = await nats_client.connect(nats.url)
        subscription = await client.jetstream().pull_subscribe("engine.a", stream="ENGINE")
        messages = await subscription.fetch(3, timeout=process.PATIENCE_SECONDS)
        await client.close()
        return [message.data for message in messages]

    assert asyncio.run(publish()) == [1, 2, 3]
    nats.kill()
    assert not answers(nats.url.replace("nats", "http"))
    nats.start()
    assert asyncio.run(read()) == [b"0", b"1", b"2"]


def produce(broker: KafkaBroker, topic: str, values: Sequence[bytes]) -> list[int]:
    """The offsets at which the values were acknowledged by all replicas."""
    offsets: list[int] = []
    errors: list[KafkaError] = []

    def acknowledged(error: KafkaError | None, message: Message) -> None:
        if error is not None:
            errors.append(error)
        elif (offset := message.offset()) is not None:
            offsets.append(offset)

    producer = Producer({"bootstrap.servers": broker.bootstrap, "acks": "all", "log_level": 0})
    for value in values:
        producer.produce(topic, value, on_delivery=acknowledged)
    assert producer.flush(process.PATIENCE_SECONDS) == 0
    assert errors == []
    return offsets


def partitions(broker: KafkaBroker, topic: str) -> list[int]:
    client = AdminClient({"bootstrap.servers": broker.bootstrap, "log_level": 0})
    return sorted(client.list_topics(timeout=process.PATIENCE_SECONDS).topics[topic].partitions)


def consume(broker: KafkaBroker, topic: str, count: int) -> list[bytes | None]:
    """The first messages of a topic."""
    consumer = Consumer(
        {"bootstrap.servers": broker.bootstrap, "group.id": topic, "auto.offset.reset": "earliest", "log_level": 0}
    )
    consumer.subscribe([topic])
    values: list[bytes | None] = []
    try:
        while len(values) < count and (message := consumer.poll(process.PATIENCE_SECONDS)) is not None:
            assert message.error() is None, message.error()
            values.append(message.value())
    finally:
        consumer.close()
    return values


def test_kafka_keeps_what_it_acknowledged(kafka: KafkaBroker) -> None:
    values = [b"a", b"b", b"c"]
    assert produce(kafka, "engine", values) == [0, 1, 2]
    kafka.stop()
    kafka.start()
    assert consume(kafka, "engine", len(values)) == values
    assert partitions(kafka, "engine") == [0]


def test_kafka_is_configured_as_told(tmp_path: Path) -> None:
    with KafkaBroker(tmp_path, {"num.partitions": "2"}) as broker:
        produce(broker, "engine", [b"a"])
        assert partitions(broker, "engine") == [0, 1]
