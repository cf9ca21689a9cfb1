"""The ways to an engine and back that fleet.py takes.

    python tests/bench/fleet_routes.py

is what stands behind the collector, as a process of its own: it prints its URL, takes OTLP until SIGTERM, and then
prints the host, instance and sequence of every frame that came.
"""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import nats as nats_client
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from receivers import process

from agent.serializers import formats
from agent.serializers.remote_write import write_request_class
from agent.sink_worker import SinkConfig
from agent.sinks.kafka import KafkaSettings, KafkaSink
from agent.sinks.nats import NatsSettings, NatsSink
from agent.sinks.otlp import OtlpSettings, OtlpSink
from agent.sinks.remote_write import RemoteWriteSettings, RemoteWriteSink
from agent.sinks.sink import BufferSettings
from agent.units import Size
from agent.verification import Header, Instance, Verification
from tests.engines.brokers import KafkaBroker, NatsServer
from tests.engines.collector import Collector
from tests.engines.process import Engine
from tests.engines.stores import Prometheus, VictoriaMetrics
from tests.sinks.http_peer import HttpPeer

RING = BufferSettings(size=Size(2 << 20), populate=True)  # some 60 of the largest frames
PARTITIONS = 8
STREAM = "fleet"

Received = dict[tuple[str, str], Instance]
"""What came of each agent, by host and instance; the latter is "" where the engine doesn't keep it."""


def headers_counted(headers: Iterable[tuple[str, str, int]]) -> Received:
    """Counts (host, instance, sequence) as `hostprobe verify` counts lines."""
    received: Received = {}
    for host, instance, sequence in headers:
        held = received.setdefault((host, instance), Instance(instance, sequence, sequence - 1))
        held.count(Header("hostprobe/1", host, instance, sequence, 0))
    return received


def lines_counted(payloads: Iterable[bytes]) -> Received:
    """Counts JSON frames."""
    verification = Verification()
    for payload in payloads:
        verification.read(io.BytesIO(payload + b"\n"), "frame")
    assert not verification.not_frames, verification.first_not_frame
    return {
        (host, name): instance for host, instances in verification.hosts.items() for name, instance in instances.items()
    }


class Route:
    """From an agent to an engine, and back by reading what the engine holds.

    Attributes:
        engine: made, not yet started.
        keeps_order: whether what is read back is in the order in which it came.
    """

    format: formats.Name = "json"
    engine: Engine
    keeps_order = True

    def prepare(self) -> None:
        """Makes what agents expect of an engine that has just started."""

    def sink(self, host: str) -> SinkConfig:
        """An agent's own sink."""
        raise NotImplementedError

    def received(self) -> Received:
        """All that has come."""
        raise NotImplementedError

    def samples(self, payload: bytes) -> int:
        """The values in a frame that are known."""
        tables = [table for name, table in json.loads(payload).items() if name not in ("tags", "time")]
        rows = [row for table in tables if isinstance(table, list | dict) for row in _rows(table)]
        return sum(isinstance(value, int | float) for row in rows for value in row.values())

    def away(self) -> None:
        self.engine.kill()

    def kept_bytes(self) -> int | None:
        """What a broker keeps of all frames; None for others."""
        return None


def _rows(table: Any) -> list[dict[str, Any]]:
    return table if isinstance(table, list) else [table]


class StoreRoute(Route):
    """By remote_write into a store that is asked for every sample of each agent's sequence."""

    format: formats.Name = "remote_write"
    keeps_order = False  # a store sorts by time

    def __init__(self, engine: Prometheus | VictoriaMetrics) -> None:
        self.engine: Any = engine
        self._request = write_request_class()

    def sink(self, host: str) -> SinkConfig:
        settings = RemoteWriteSettings(type="remote_write", url=self.engine.write_url, buffer=RING)
        return SinkConfig(host, RemoteWriteSink(settings), settings)

    def received(self) -> Received:
        series = 'hostprobe_frame_sequence{job="hostprobe",instance=~"fleet-.*"}'
        if isinstance(self.engine, VictoriaMetrics):  # raw samples, also those of one time
            found = [(one["metric"], one["values"]) for one in self.engine.export(series)]
        else:
            held = self.engine.query(f"{series}[1h]")
            found = [(one["metric"], [float(value) for _, value in one["values"]]) for one in held]
        return headers_counted((labels["instance"], "", int(value)) for labels, values in found for value in values)

    def samples(self, payload: bytes) -> int:
        return len(self._request.FromString(payload).timeseries)

    def away(self) -> None:
        if isinstance(self.engine, VictoriaMetrics):
            self.engine.stop()
        else:
            self.engine.kill()


class NatsRoute(Route):
    """Into a stream in files, a subject an agent."""

    def __init__(self, folder: Path) -> None:
        self.engine: NatsServer = NatsServer(folder)

    def prepare(self) -> None:
        self._ask(lambda stream: stream.add_stream(name=STREAM, subjects=[f"{STREAM}.>"]))

    def sink(self, host: str) -> SinkConfig:
        subject = f"{STREAM}.{host}"
        settings = NatsSettings(type="nats", servers=(self.engine.url,), subject=subject, stream=STREAM, buffer=RING)
        return SinkConfig(host, NatsSink(settings), settings)

    def received(self) -> Received:
        async def read(stream: Any) -> list[bytes]:
            count = (await stream.stream_info(STREAM)).state.messages
            subscription = await stream.subscribe(f"{STREAM}.>", stream=STREAM, ordered_consumer=True)
            return [(await subscription.next_msg(timeout=30)).data for _ in range(count)]

        return lines_counted(self._ask(read))

    def kept_bytes(self) -> int | None:
        return int(self._ask(lambda stream: stream.stream_info(STREAM)).state.bytes)

    def _ask(self, what: Callable[[Any], Any]) -> Any:
        async def run() -> Any:
            client = await nats_client.connect(self.engine.url)
            try:
                return await what(client.jetstream())
            finally:
                await client.close()

        return asyncio.run(run())


class KafkaRoute(Route):
    """Into a topic of some partitions, by the host's name."""

    def __init__(self, folder: Path) -> None:
        self.engine: KafkaBroker = KafkaBroker(folder)

    def prepare(self) -> None:
        client = AdminClient({"bootstrap.servers": self.engine.bootstrap, "log_level": 0})
        client.create_topics([NewTopic(STREAM, PARTITIONS, 1)])[STREAM].result(60)

    def sink(self, host: str) -> SinkConfig:
        settings = KafkaSettings(
            type="kafka", servers=(self.engine.bootstrap,), topic=STREAM, key=host, compression="zstd", buffer=RING
        )
        return SinkConfig(host, KafkaSink(settings), settings)

    def received(self) -> Received:
        return lines_counted(self._records())

    def _records(self) -> Iterable[bytes]:
        """All partitions, one behind the other."""
        consumer = Consumer({"bootstrap.servers": self.engine.bootstrap, "group.id": "fleet"})
        try:
            for partition in range(PARTITIONS):
                place = TopicPartition(STREAM, partition, 0)
                _, end = consumer.get_watermark_offsets(place, timeout=60)
                consumer.assign([place])
                position = 0
                while position < end:
                    message = consumer.poll(60)
                    assert message is not None, f"partition {partition}: nothing behind offset {position} of {end}"
                    assert message.error() is None, message.error()
                    yield message.value()
                    position = message.offset() + 1
        finally:
            consumer.close()

    def kept_bytes(self) -> int | None:
        return sum(path.stat().st_size for path in (self.engine.folder / "data").glob(f"{STREAM}-*/*.log"))


class CollectorRoute(Route):
    """Through a collector to a process of its own, which notes the sequences."""

    format: formats.Name = "otlp"

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.engine: Collector = Collector(folder)
        self._child = stack.enter_context(process([__file__], stdout=subprocess.PIPE))
        url = self._child.stdout.readline().decode().strip()
        path = folder / "collector.yaml"
        configuration = json.loads(path.read_text())
        configuration["exporters"]["otlp_http"] |= {"metrics_endpoint": url, "encoding": "proto"}
        path.write_text(json.dumps(configuration))

    def sink(self, host: str) -> SinkConfig:
        settings = OtlpSettings(type="otlp", url=self.engine.endpoint, buffer=RING)
        return SinkConfig(host, OtlpSink(settings), settings)

    def received(self) -> Received:
        self._child.send_signal(signal.SIGTERM)
        return headers_counted(map(tuple, json.loads(self._child.stdout.read())))

    def samples(self, payload: bytes) -> int:
        (resource_metrics,) = ExportMetricsServiceRequest.FromString(payload).resource_metrics
        (scope,) = resource_metrics.scope_metrics
        return sum(len(getattr(metric, metric.WhichOneof("data")).data_points) for metric in scope.metrics)


class Noted(list[Any]):
    """Takes the place of an HttpPeer's requests, and keeps of each only whose frames it holds."""

    def append(self, request: Any) -> None:
        for one in ExportMetricsServiceRequest.FromString(request.body).resource_metrics:
            names = {attribute.key: attribute.value.string_value for attribute in one.resource.attributes}
            for metric in (metric for scope in one.scope_metrics for metric in scope.metrics):
                if metric.name == "hostprobe.frame.sequence":
                    (point,) = metric.gauge.data_points
                    sequence = int(point.as_int or point.as_double)
                    super().append((names["host.name"], names["service.instance.id"], sequence))


def behind() -> None:
    """Takes what a collector hands on, until SIGTERM: then prints what it noted."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    peer = HttpPeer()
    peer.requests = Noted()
    with peer:
        print(peer.url("/v1/metrics"), flush=True)
        signal.sigwait({signal.SIGTERM})
    print(json.dumps(peer.requests))


def route_to(name: str, folder: Path, stack: ExitStack) -> Route:
    match name:
        case "victoria-metrics":
            return StoreRoute(VictoriaMetrics(folder))
        case "prometheus":
            return StoreRoute(Prometheus(folder))
        case "nats":
            return NatsRoute(folder)
        case "kafka":
            return KafkaRoute(folder)
        case "otlp":
            return CollectorRoute(folder, stack)
    sys.exit(f"fleet.py: {name}: expected victoria-metrics, prometheus, nats, kafka or otlp")


if __name__ == "__main__":
    behind()
