"""The examples of packaging/fleet with the engines that they are for; only addresses and paths of files are others."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from hashlib import md5
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import nats as nats_client
import pytest
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from agent.assembly import Agent
from agent.config import load
from agent.errors import RejectedError, SinkError
from agent.logs import Log
from agent.pool import Buffer
from agent.serializers.formats import Name
from agent.serializers.remote_write import write_request_class
from agent.sinks.kafka import KafkaSink
from agent.sinks.nats import NatsSink
from agent.sinks.otlp import OtlpSink
from agent.sinks.prometheus import PrometheusSink
from agent.sinks.remote_write import RemoteWriteSettings, RemoteWriteSink
from agent.sinks.tls import TlsSettings
from tests.engines.brokers import KafkaBroker, NatsServer
from tests.engines.process import LOCALHOST, REPOSITORY, Engine, free_ports, patiently, program
from tests.engines.stores import Prometheus
from tests.sinks.http_peer import Answer, HttpPeer, Pki

FLEET = REPOSITORY / "packaging" / "fleet"
GATEWAYS = ("gateway.yaml", "gateway-remote-write.yaml")
HOST = "web-001"
OLD_SECONDS = 9000.0  # within the window of receiver.yml


def settings(path: str, **changes: Any) -> Any:
    """Those of an example's sink, with what differs here."""
    (sink,) = load(str(FLEET / path / "hostprobe.toml"), environment={}).sinks.values()
    return msgspec.structs.replace(sink, **changes)


def put_in(text: str, *replacements: tuple[str, str]) -> str:
    """An example's text with other addresses, each of which was in it."""
    for old, new in replacements:
        assert old in text, old
        text = text.replace(old, new)
    return text


def frame(format: Name) -> bytes:
    """One of this host."""
    overrides = {"test": {"agent": {"hostname": HOST}}}
    agent = Agent(load(template="standard", overrides=overrides, environment={}), Log("error"), sinks=False)
    agent.cycle.collect()
    buffer = Buffer()
    agent.serializer(format).write(agent.cycle.frame, buffer)
    agent.close()
    return bytes(buffer.data)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    folder = tmp_path / "tls"
    folder.mkdir()
    return Pki(folder)


def server_files(pki: Pki, name: str) -> tuple[str, str]:
    """Certificate and key of a server on loopback."""
    leaf = pki.authority.issue_cert(LOCALHOST)
    certificate, key = pki.place / f"{name}.pem", pki.place / f"{name}.key"
    certificate.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    leaf.private_key_pem.write_to_path(str(key))
    key.chmod(0o600)
    return str(certificate), str(key)


# A collector as gateway ----------------------------------------------------------------------


@pytest.mark.parametrize("name", GATEWAYS)
def test_the_collector_takes_a_gateway_s_configuration(name: str) -> None:
    """What the collector at hand doesn't have it names; then there is no other complaint."""
    path = FLEET / "collector" / name
    command = [program("otelcol"), "validate", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    complaints = [line for line in done.stderr.splitlines() if line]
    unknown = [line for line in complaints if "' unknown type: \"" in line]
    if name == "gateway.yaml":  # only of the core distribution
        assert not unknown
    assert bool(complaints) == bool(done.returncode)
    heads = [line for line in complaints if line.startswith("Error: failed to get config: cannot unmarshal")]
    assert [line for line in complaints if line not in (*unknown, *heads)] == []


class Gateway(Engine):
    """gateway.yaml before a store, and with less patience."""

    name = "gateway"

    def __init__(self, folder: Path, pki: Pki, store: HttpPeer) -> None:
        super().__init__(folder)
        (port,) = free_ports(1)
        self.url = f"https://{LOCALHOST}:{port}"
        server_files(pki, "gateway")
        text = put_in(
            (FLEET / "collector" / "gateway.yaml").read_text(),
            ("0.0.0.0:4318", f"{LOCALHOST}:{port}"),
            ("/etc/otelcol/tls/", f"{pki.place}/"),
            ("http://victoria-metrics.example.com:8428/", store.url("/")),
            ("max_interval: 2s", "max_interval: 500ms"),
            ("max_elapsed_time: 8s", "max_elapsed_time: 1s"),
            ("service:\n", "service:\n  telemetry:\n    metrics:\n      level: none\n"),
        )
        (folder / "gateway.yaml").write_text(text)

    def command(self) -> tuple[str, ...]:
        return program("otelcol"), f"--config={self.folder}/gateway.yaml"

    def is_ready(self) -> bool:
        return "Everything is ready" in self.log_text()


def test_the_gateway_answers_when_the_store_has_it(tmp_path: Path, pki: Pki) -> None:
    payload = memoryview(frame("otlp"))
    with HttpPeer() as store, Gateway(tmp_path / "gateway", pki, store) as gateway:
        sink = OtlpSink(settings("collector", url=gateway.url, tls=TlsSettings(ca=pki.ca, **pki.client())))
        sink.open()
        store.judge = lambda request: Answer(503)
        with pytest.raises(SinkError, match="503") as failed:
            sink.deliver([payload])
        assert not isinstance(failed.value, RejectedError)
        store.requests.clear()
        store.judge = lambda request: Answer(200)
        sink.deliver([payload])
        sink.close()
        (request,) = store.requests
        assert request.line.startswith("POST /opentelemetry/v1/metrics ")
        ours, come = (ExportMetricsServiceRequest.FromString(data) for data in (bytes(payload), request.body))
        assert come.resource_metrics == ours.resource_metrics


def test_the_gateway_takes_nothing_from_a_stranger(tmp_path: Path, pki: Pki) -> None:
    with HttpPeer() as store, Gateway(tmp_path / "gateway", pki, store) as gateway:
        sink = OtlpSink(settings("collector", url=gateway.url, tls=TlsSettings(ca=pki.ca)))
        sink.open()
        with pytest.raises(SinkError, match="TLS: "):
            sink.deliver([memoryview(frame("otlp"))])
        sink.close()
        assert store.requests == []


# Prometheus ----------------------------------------------------------------------------------


@pytest.fixture
def scrapers(tmp_path: Path, pki: Pki) -> Path:
    """The folder of the two scrapers, with the files that they name."""
    folder = tmp_path / "scrapers"
    shutil.copytree(FLEET / "prometheus", folder)
    (folder / "tls").mkdir()
    shutil.copy(pki.ca, folder / "tls" / "ca.pem")
    (folder / "tls" / "scrape-password").write_text("p4ssword-of-nobody")
    return folder


def promtool(*arguments: object) -> str:
    command = [program("promtool"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["scraper-0.yml", "scraper-1.yml"])
def test_promtool_takes_a_scraper_s_configuration(scrapers: Path, name: str) -> None:
    assert "SUCCESS" in promtool("check", "config", scrapers / name)


def test_promtool_takes_the_receiver_s_configuration() -> None:
    assert "SUCCESS" in promtool("check", "config", FLEET / "remote_write" / "receiver.yml")


def kept_by(scrapers: Path, number: int) -> set[str]:
    """The targets that one of the scrapers keeps."""
    command = ("check", "service-discovery", "--timeout=2s", scrapers / f"scraper-{number}.yml", "hostprobe")
    return {found["labels"]["__address__"] for found in json.loads(promtool(*command)) if found["labels"]}


def test_each_target_is_one_scraper_s(scrapers: Path) -> None:
    groups = json.loads((scrapers / "targets" / "hosts.json").read_text())
    kept = [kept_by(scrapers, number) for number in (0, 1)]
    assert all(kept)
    assert kept[0] & kept[1] == set()
    assert kept[0] | kept[1] == {target for group in groups for target in group["targets"]}


class Scraper(Prometheus):
    """One of the two."""

    def __init__(self, folder: Path, number: int) -> None:
        super().__init__(folder)
        text = (folder / f"scraper-{number}.yml").read_text()
        text = put_in(text, ("scrape_interval: 15s", "scrape_interval: 1s"), ("scrape_timeout: 10s", ""))
        (folder / "prometheus.yml").write_text(text)


def test_a_scraper_scrapes_the_example_s_sink(scrapers: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(scrapers / "tls"))
    (scrapers / "tls" / "scrape-password").chmod(0o600)
    (port,) = free_ports(1)
    address = f"{LOCALHOST}:{port}"
    (scrapers / "targets" / "hosts.json").write_text(json.dumps([{"targets": [address]}]))
    mine = int.from_bytes(md5(address.encode()).digest()[8:]) % 2  # hashmod
    certificate, key = server_files(pki, "host")
    example = settings("prometheus", address=address)
    sink = PrometheusSink(
        msgspec.structs.replace(example, tls=msgspec.structs.replace(example.tls, certificate=certificate, key=key))
    )
    sink.open()
    try:
        sink.deliver([memoryview(frame("prometheus"))])
        with Scraper(scrapers, mine) as scraper:
            query = f'hostprobe_frame_sequence{{job="hostprobe",instance="{address}"}}'
            (series,) = patiently(lambda: scraper.query(query), "scraped")
            assert series["value"][1] == "1"
    finally:
        sink.close()


class Receiver(Prometheus):
    """With a configuration of its own."""

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__(folder)
        (folder / "prometheus.yml").write_text(text)


def sample(instance: str, age_seconds: float) -> memoryview:
    request = write_request_class()()
    series = request.timeseries.add()
    for name, value in (("__name__", "up_to_now"), ("instance", instance)):
        series.labels.add(name=name, value=value)
    series.samples.add(value=1.0, timestamp=int((time.time() - age_seconds) * 1000))
    return memoryview(request.SerializeToString())


@pytest.mark.parametrize("has_window", [True, False], ids=["as it is", "without its window"])
def test_a_receiver_takes_what_was_held_for_hours(tmp_path: Path, has_window: bool) -> None:
    text = (FLEET / "remote_write" / "receiver.yml").read_text()
    with Receiver(tmp_path, text if has_window else text.partition("storage:")[0]) as store:
        sink = RemoteWriteSink(RemoteWriteSettings(url=store.write_url))
        sink.open()
        sink.deliver([sample("others", 0)])
        if has_window:
            sink.deliver([sample("back", OLD_SECONDS)])
            query = f'count_over_time(up_to_now{{instance="back"}}[{OLD_SECONDS + 600:.0f}s])'
            assert [series["value"][1] for series in store.query(query)] == ["1"]
        else:
            with pytest.raises(RejectedError, match="400"):
                sink.deliver([sample("back", OLD_SECONDS)])
        sink.close()


# Brokers -------------------------------------------------------------------------------------


def test_a_topic_with_the_example_s_properties_takes_frames(kafka: KafkaBroker) -> None:
    lines = (FLEET / "kafka" / "topic.properties").read_text().splitlines()
    properties = dict(line.split("=") for line in lines if not line.startswith("#"))
    topic = f"fleet-{uuid4().hex}"
    client = AdminClient({"bootstrap.servers": kafka.bootstrap})
    one_broker = {**properties, "min.insync.replicas": "1"}
    client.create_topics([NewTopic(topic, 24, 1, config=one_broker)])[topic].result(60)
    resource = ConfigResource(ResourceType.TOPIC, topic)
    (described,) = client.describe_configs([resource]).values()
    held = {name: entry.value for name, entry in described.result(60).items()}
    assert {name: held[name] for name in one_broker} == one_broker
    sink = KafkaSink(settings("kafka", servers=(kafka.bootstrap,), topic=topic, tls=None, sasl=None))
    sink.open()
    sink.deliver([memoryview(frame("json"))])
    sink.close()


def test_a_stream_with_the_example_s_settings_takes_frames(nats: NatsServer) -> None:
    stream = json.loads((FLEET / "nats" / "stream.json").read_text())
    one_server = {**stream, "num_replicas": 1, "max_bytes": 1 << 30}

    async def create(client: nats_client.NATS) -> Any:
        request = json.dumps(one_server).encode()
        answer = await client.request(f"$JS.API.STREAM.CREATE.{stream['name']}", request, timeout=10)
        return json.loads(answer.data)

    created = ask(nats, create)
    assert "error" not in created, created
    assert {name: created["config"].get(name) for name in one_server} == one_server
    sink = NatsSink(settings("nats", servers=(nats.url,), tls=None, token=None))
    sink.open()
    payload = frame("json")
    sink.deliver([memoryview(payload)])
    sink.deliver([memoryview(payload)])  # stored once
    sink.close()
    assert ask(nats, lambda client: client.jetstream().stream_info(stream["name"])).state.messages == 1


def ask(server: NatsServer, what: Callable[[nats_client.NATS], Awaitable[Any]]) -> Any:
    """What a plain client learns of a server."""

    async def run() -> Any:
        client = await nats_client.connect(server.url)
        try:
            return await what(client)
        finally:
            await client.close()

    return asyncio.run(run())
