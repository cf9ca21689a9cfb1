"""The examples of packaging/fleet: each loads, those that belong together agree, sizes follow from measurements."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from agent import config
from agent.sinks.kafka import KafkaSettings
from agent.sinks.nats import NatsSettings
from agent.sinks.otlp import OtlpSettings
from agent.sinks.prometheus import PrometheusSettings
from agent.sinks.remote_write import RemoteWriteSettings
from agent.sinks.sink import SinkSettings
from agent.units import Size

FLEET = Path(__file__).parents[1] / "packaging" / "fleet"
PAGE = (FLEET / "README.md").read_text()
SETTINGS: dict[str, type[SinkSettings]] = {
    "collector": OtlpSettings,
    "kafka": KafkaSettings,
    "nats": NatsSettings,
    "prometheus": PrometheusSettings,
    "remote_write": RemoteWriteSettings,
}
HOSTS = 10_000
DAY_SECONDS = 86_400
OUTAGE_SECONDS = 3600
RECORD_BYTES = 60
RING_USED_MOST = 0.75


def sink_of(path: str) -> SinkSettings:
    """The settings of an example's only sink."""
    loaded = config.load(str(FLEET / path / "hostprobe.toml"), environment={})
    (sink,) = loaded.sinks.values()
    return sink


def table(header: str) -> dict[str, list[str]]:
    """The rows of the page's table with this header, by their first cell; units and separators are taken off."""
    lines = PAGE[PAGE.index(f"{header}\n") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): [re.sub("[ ,]|s$|MiB$", "", cell) for cell in row[1:]] for row in rows}


WIRE = table("| path | bytes of a frame | on the wire, alone | on the wire, in large batches |")
SIZES = table("| path | interval | frames/s | MB/s | GB/day | series | samples/s | ring for an hour |")
BYTES = table("| format | bytes of a frame |")


def test_every_example_is_looked_at() -> None:
    assert {path.parent.name for path in FLEET.glob("*/hostprobe.toml")} == set(SETTINGS)


@pytest.mark.parametrize("path", SETTINGS)
def test_a_configuration_loads(path: str) -> None:
    settings = sink_of(path)
    assert isinstance(settings, SETTINGS[path])
    assert settings.tls is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sorted(FLEET.rglob("*.json")), ids=lambda path: path.name)
def test_json_parses(path: Path) -> None:
    assert json.loads(path.read_text())


def test_every_file_is_named_on_the_page() -> None:
    links = set(re.findall(r"\]\(([^)]+)\)", PAGE))
    files = {str(path.relative_to(FLEET)) for path in FLEET.glob("*/**/*") if path.is_file()}
    assert files - links == set()
    assert [link for link in links if not (FLEET / link).exists()] == []


def test_agents_find_the_gateway() -> None:
    settings = sink_of("collector")
    assert isinstance(settings, OtlpSettings)
    for name in ("gateway.yaml", "gateway-remote-write.yaml"):
        assert f"endpoint: 0.0.0.0:{settings.url.rpartition(':')[2]}\n" in (FLEET / "collector" / name).read_text()


def test_the_gateway_gives_up_before_its_agents_do() -> None:
    settings = sink_of("collector")
    assert isinstance(settings, OtlpSettings)
    (elapsed,) = re.findall("max_elapsed_time: ([0-9]+)s", (FLEET / "collector" / "gateway.yaml").read_text())
    assert int(elapsed) < settings.timeout


def test_the_kafka_topic_is_the_agents() -> None:
    settings = sink_of("kafka")
    assert isinstance(settings, KafkaSettings)
    text = (FLEET / "kafka" / "topic.properties").read_text()
    assert f"--topic {settings.topic} --partitions 24 " in text
    lines = [line.partition("=") for line in text.splitlines() if not line.startswith("#")]
    properties = {name: value for name, _, value in lines}
    assert int(properties["retention.ms"]) == 2 * DAY_SECONDS * 1000
    assert settings.acks == "all"
    assert properties["min.insync.replicas"] == "2"
    assert settings.batch.bytes <= int(properties["max.message.bytes"])


def test_the_stream_has_the_agents_subject() -> None:
    settings = sink_of("nats")
    assert isinstance(settings, NatsSettings)
    stream = json.loads((FLEET / "nats" / "stream.json").read_text())
    assert stream["name"] == settings.stream
    (subjects,) = stream["subjects"]
    assert settings.subject.startswith(subjects.removesuffix(">"))
    half_a_day_bytes = stream["max_age"] / 1e9 * float(SIZES["nats, json"][2]) * 1e6
    assert half_a_day_bytes < stream["max_bytes"]


def test_scrapers_differ_by_their_number_alone() -> None:
    texts = [(FLEET / "prometheus" / f"scraper-{number}.yml").read_text() for number in (0, 1)]
    ours = [re.sub(r'Scraper 0|(scraper|regex): "0"', "NUMBER", texts[0])]
    ours.append(re.sub(r'Scraper 1|(scraper|regex): "1"', "NUMBER", texts[1]))
    assert ours[0] == ours[1]
    assert ours[0].count("NUMBER") == 3


def test_a_scraped_agent_has_the_interval_of_the_scrape() -> None:
    loaded = config.load(str(FLEET / "prometheus" / "hostprobe.toml"), environment={})
    assert f"scrape_interval: {loaded.agent.interval}\n" in (FLEET / "prometheus" / "scraper-0.yml").read_text()
    assert SIZES["a scrape, gzip"][0] == f"{loaded.agent.interval:g}"


@pytest.mark.parametrize("path", SIZES)
def test_sizes_follow_from_what_was_measured(path: str) -> None:
    raw, alone = (int(cell) for cell in WIRE[path][:2])
    (series_of_a_host,) = re.findall(r"standard template: ([0-9]+) series", PAGE)
    interval, *shown, ring = SIZES[path]
    frames = HOSTS / int(interval)
    megabytes = frames * alone / 1e6
    series = HOSTS * int(series_of_a_host)
    assert shown == [
        f"{frames:.0f}",
        f"{megabytes:.2f}",
        f"{megabytes * DAY_SECONDS / 1000:.0f}",
        f"{series}",
        f"{series / int(interval):.0f}",
    ]
    held = OUTAGE_SECONDS / int(interval) * (raw + RECORD_BYTES) / RING_USED_MOST / 2**20
    assert ring == ("-" if path == "a scrape, gzip" else f"{held:.1f}")


@pytest.mark.parametrize(
    ("path", "format"),
    [("http, json, gzip", "json"), ("otlp, gzip", "otlp"), ("remote_write, snappy", "remote_write"),
     ("a scrape, gzip", "prometheus")],
)  # fmt: skip
def test_a_frame_has_one_size_on_the_page(path: str, format: str) -> None:
    assert WIRE[path][0] == BYTES[format][0]


@pytest.mark.parametrize(
    ("path", "row"),
    [("collector", "otlp, gzip"), ("kafka", "kafka, json, zstd"), ("nats", "nats, json"),
     ("remote_write", "remote_write, snappy")],
)  # fmt: skip
def test_rings_hold_an_hour(path: str, row: str) -> None:
    buffer = sink_of(path).buffer
    assert buffer.size >= Size(int(float(SIZES[row][-1]) * 2**20))
    assert buffer.path


def test_the_formulas_have_the_figures_of_the_table() -> None:
    alone, raw = int(WIRE["otlp, gzip"][1]), int(WIRE["otlp, gzip"][0])
    block = PAGE[PAGE.index("    frames/s  ") : PAGE.index("60 bytes are a record's own")]
    results = [line.rpartition("= ")[2].replace(",", "").removesuffix(" MiB") for line in block.strip().splitlines()]
    assert results == SIZES["otlp, gzip"][1:]
    assert f"1,000 × {alone:,} / 10^6" in block
    assert f"360 × {raw + RECORD_BYTES:,} / 0.75" in block
    assert f"{alone / 1000} × 86.4" in block


def test_the_bench_s_table_and_the_sizes_agree() -> None:
    bench = table("| | VictoriaMetrics | Prometheus | NATS JetStream | Kafka | collector |")
    assert set(bench["missing"]) == {"0"}
    columns = [[int(cell) for cell in bench[row]] for row in ("agents", "samples of a frame", "samples/s", "frames")]
    for agents, samples, rate, frames in zip(*columns, strict=True):
        assert rate == agents * samples
        assert frames == agents * 30
    assert bench["bytes of a frame"][2:4] == [WIRE["nats, json"][0], WIRE["kafka, json, zstd"][0]]
