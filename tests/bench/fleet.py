"""A fleet in small: frames of 200 agents from one process to a real engine, which ends in the middle and comes back.

    python tests/bench/fleet.py ENGINE [SECONDS=30] [INTERVAL=1s]

ENGINE is victoria-metrics, prometheus (both by remote_write), nats (JetStream), kafka or otlp (a collector). They
are those of `make test-engines`, which installs them.

Each agent has its own name and instance, serializer, ring and sink with its thread. What they tell is this host,
collected for real once a tick with the standard template, so an agent's sequence counts from 1 to the last tick. After
two fifths of the ticks the engine is killed (victoria-metrics, which keeps its latest seconds in memory, is ended in
order), is away for 4 seconds, and starts again with the same data. When the rings are empty, or after two minutes, all
that the engine holds is read back, and the sequences of each agent are counted.

Printed: agents, frames, bytes of a frame and its samples (points; values in JSON), samples a second; what is missing,
came twice or out of order, and what the agents dropped; failed deliveries and the longest backlog of a ring; the CPU
time of this process per frame, one collection a tick in it; the growth of its memory from the third tick to the end,
beside the rings, whose memory is taken at the start; what a broker keeps per frame, until the outage, while each frame
goes alone, and in all. The status is 1 where a frame is missing or a ring's account doesn't close.
"""

from __future__ import annotations

import asyncio
import io
import json
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import nats as nats_client
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from receivers import begin, process, reached

from agent.assembly import Agent
from agent.config import load
from agent.cycle import Serializer
from agent.logs import Log
from agent.pool import Buffer
from agent.serializers import formats
from agent.serializers.document import Identity
from agent.serializers.remote_write import write_request_class
from agent.sink_worker import SinkConfig, SinkWorker
from agent.sinks.kafka import KafkaSettings, KafkaSink
from agent.sinks.nats import NatsSettings, NatsSink
from agent.sinks.otlp import OtlpSettings, OtlpSink
from agent.sinks.remote_write import RemoteWriteSettings, RemoteWriteSink
from agent.sinks.sink import BufferSettings
from agent.units import Duration, Size
from agent.verification import Header, Instance, Verification
from tests.engines.brokers import KafkaBroker, NatsServer
from tests.engines.collector import Collector
from tests.engines.process import Engine
from tests.engines.stores import Prometheus, VictoriaMetrics
from tests.sinks.http_peer import HttpPeer

AGENTS = 200
RING = BufferSettings(size=Size(2 << 20), populate=True)  # some 40 of the largest frames
OUTAGE_AT = 0.4  # of the ticks
OUTAGE_SECONDS = 4.0
WARM_TICKS = 3
DRAIN_SECONDS = 120.0
CLOSE_SECONDS = 10.0
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
        found = self.engine.query('hostprobe_frame_sequence{job="hostprobe",instance=~"fleet-.*"}[1h]')
        return headers_counted(
            (series["metric"]["instance"], "", int(float(value))) for series in found for _, value in series["values"]
        )

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
        client = AdminClient({"bootstrap.servers": self.engine.bootstrap})
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
        self._child = stack.enter_context(process([__file__, "--behind"], stdout=subprocess.PIPE))
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


@dataclass
class Fleet:
    """What the agents share, and what is measured.

    Attributes:
        serializers: of each agent, beside its worker.
        payload: the latest frame of the latest agent.
        longest_backlog: of any ring, in frames.
        resident_bytes: after the third tick.
    """

    host: Agent
    serializers: list[Serializer]
    workers: list[SinkWorker]
    payload: bytes = b""
    payload_bytes: int = 0
    ticks: int = 0
    late: int = 0
    offered_seconds: float = 0.0
    longest_backlog: int = 0
    resident_bytes: int = 0

    def run(self, ticks: int, interval: float) -> None:
        """So many frames of each agent."""
        buffer = Buffer()
        start = time.monotonic()
        for tick in range(ticks):
            pause = start + tick * interval - time.monotonic()
            self.late += pause < -interval
            time.sleep(max(pause, 0))
            self.host.cycle.collect()
            frame = self.host.cycle.frame
            for serializer, worker in zip(self.serializers, self.workers, strict=True):
                buffer.clear()
                serializer.write(frame, buffer)
                self.payload_bytes += len(buffer.data)
                worker.push(buffer.data, frame, is_thinned=False)
            self.payload = bytes(buffer.data)
            self.longest_backlog = max(self.longest_backlog, self.backlog())
            self.ticks = frame.sequence
            if self.ticks == WARM_TICKS:
                self.resident_bytes = resident_bytes()
        self.offered_seconds = max(time.monotonic() - start, ticks * interval)

    def backlog(self) -> int:
        """The longest, in frames."""
        return max(worker.frames[2] for worker in self.workers)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def fleet_of(route: Route, stack: ExitStack) -> Fleet:
    """200 agents with open rings and sinks, whose threads run."""
    log = Log("error", "console")
    host = Agent(load(template="standard", environment={}), log, sinks=False)
    stack.callback(host.close)
    specs = [spec for scheduled in host.cycle.probes for spec in scheduled.probe.tables]
    serializers, workers = [], []
    for number in range(AGENTS):
        name, instance = f"fleet-{number:03}", uuid.uuid4()
        identity = Identity(name, instance.hex, {}, started_unix_ns=time.time_ns())
        serializers.append(formats.load(route.format)(specs, identity, True))
        worker = SinkWorker(route.sink(name), log, lambda: None, instance.bytes)
        worker.open()
        workers.append(worker)
    for worker in workers:
        worker.start()
    return Fleet(host, serializers, workers)


def wait_until(is_done: Callable[[], bool], seconds: float) -> None:
    """Waits, but not for longer than so many seconds."""
    start = time.monotonic()
    while not is_done() and time.monotonic() - start < seconds:
        time.sleep(0.02)


def kept_a_frame(route: Route, frames: int) -> str:
    """What a broker keeps of each, in bytes."""
    kept_bytes = route.kept_bytes()
    return "-" if kept_bytes is None or not frames else f"{kept_bytes / frames:,.0f}"


def run(name: str, seconds: float, interval: Duration, folder: Path) -> bool:
    ticks = max(round(seconds / interval), 2 * WARM_TICKS)
    with ExitStack() as stack:
        route = route_to(name, folder / name, stack)
        stack.enter_context(route.engine)
        route.prepare()
        fleet = fleet_of(route, stack)
        cpu_before = time.process_time()
        feeding = threading.Thread(target=fleet.run, args=(ticks, float(interval)))
        feeding.start()
        wait_until(lambda: fleet.ticks >= OUTAGE_AT * ticks, float("inf"))
        wait_until(lambda: not fleet.backlog(), float(interval))
        kept_alone = kept_a_frame(route, sum(worker.frames[0] for worker in fleet.workers))
        route.away()
        away = time.monotonic()
        time.sleep(OUTAGE_SECONDS)
        route.engine.start()
        back = time.monotonic()
        feeding.join()
        wait_until(lambda: not fleet.backlog(), DRAIN_SECONDS)
        drained = time.monotonic()
        cpu = time.process_time() - cpu_before
        growth = resident_bytes() - fleet.resident_bytes
        accounts = [worker.frames for worker in fleet.workers]
        pushed = sum(worker.ring.pushed for worker in fleet.workers)
        dropped = sum(account[1] for account in accounts)
        rejected = sum(worker.ring.drops[2] for worker in fleet.workers)
        failures = sum(worker.failures for worker in fleet.workers)
        for worker in fleet.workers:
            worker.finish(time.monotonic() + CLOSE_SECONDS)
        for worker in fleet.workers:
            worker.join()
        kept = kept_a_frame(route, sum(worker.ring.taken for worker in fleet.workers))
        received = route.received()
    frames = AGENTS * ticks
    unique = sum(instance.frames - instance.repeated for instance in received.values())
    samples = route.samples(fleet.payload)
    rows = {
        "engine": name,
        "agents": AGENTS,
        "frames": f"{frames:,}, {ticks} an agent, every {interval}",
        "bytes a frame": f"{fleet.payload_bytes / frames:,.0f}",
        "samples a frame": samples,
        "samples/s": f"{samples * frames / fleet.offered_seconds:,.0f}",
        "away": f"{back - away:.1f} s",
        "rings empty": f"{drained - back:.1f} s after the return, {fleet.longest_backlog} frames at most in one",
        "missing": frames - unique,
        "repeated": sum(instance.repeated for instance in received.values()),
        "reordered": sum(instance.reordered for instance in received.values()) if route.keeps_order else "-",
        "dropped by agents": f"{dropped}, {rejected} of them refused by the engine",
        "failed deliveries": failures,
        "CPU a frame": f"{cpu / frames * 1e3:.2f} ms",
        "memory": f"{growth / 1e6:+.1f} MB of {fleet.resident_bytes / 1e6:.0f} MB",
        "kept a frame": f"{kept_alone} until the outage, {kept} in all",
        "ticks begun late": fleet.late,
    }
    print("\n".join(f"{what:18} {value}" for what, value in rows.items()), flush=True)
    return all(
        [
            reached("every agent's every frame came", unique == frames and len(received) == AGENTS),
            reached("sequences from 1 to the last", all((i.first, i.last) == (1, ticks) for i in received.values())),
            reached("every ring's account closes", pushed == frames == sum(map(sum, accounts))),
            reached("the engine was missed, the rings held", failures > 0 and fleet.longest_backlog > 1),
        ]
    )


def main() -> None:
    arguments = sys.argv[1:]
    if arguments == ["--behind"]:
        behind()
        return
    if not 1 <= len(arguments) <= 3 or arguments[0].startswith("-"):
        sys.exit(__doc__)
    seconds = float(arguments[1]) if len(arguments) > 1 else 30.0
    interval = Duration.parse(arguments[2] if len(arguments) > 2 else "1s")
    begin()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        is_good = run(arguments[0], seconds, interval, Path(folder))
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
