"""Prometheus' own judgement of the expositions: promtool's of the names, a scrape's of OpenMetrics."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from agent.serializers.formats import FORMATS
from tests.engines.node_exporter import NodeExporter
from tests.engines.process import LOCALHOST, REPOSITORY, patiently
from tests.engines.stores import Prometheus, promtool_check

TEMPLATES = ("minimal", "standard", "full")
NODE_EXPORTER = 'template = "full"\n[sinks.main]\nformat = "{format}"\nnames = "node_exporter"\n'


def once(format: str, *arguments: str) -> str:
    """A frame, after two samples, so that its rates are known."""
    command = [sys.executable, "-m", "agent", "once", "--wait", "0.1s", "--format", format, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@cache
def exposition(format: str, template: str) -> str:
    return once(format, "--template", template)


@pytest.fixture(scope="module")
def as_node_exporter(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`as_node_exporter(format)`: an exposition of all that there is, with node_exporter's names."""
    folder = tmp_path_factory.mktemp("configuration")

    @cache
    def text(format: str) -> str:
        path = folder / f"{format}.toml"
        path.write_text(NODE_EXPORTER.format(format=format))
        return once(format, "--config", str(path))

    return text


@pytest.mark.parametrize("template", TEMPLATES)
def test_promtool_finds_nothing(template: str) -> None:
    text = exposition("prometheus", template)
    assert text.count("\nhostprobe_") > 50
    assert promtool_check(text) == []


@pytest.fixture(scope="module", params=["prometheus-node-exporter", "node_exporter"])
def real_findings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What promtool finds in node_exporter's own exposition, Debian's and today's."""
    with NodeExporter(tmp_path_factory.mktemp("real"), request.param) as exporter:
        return promtool_check(exporter.scrape())


def test_promtool_finds_no_more_than_in_node_exporter_itself(
    as_node_exporter: Callable[[str], str], real_findings: list[str]
) -> None:
    """Its names are its own: those of memory and netstat are the kernel's words, which are no snake_case."""
    findings = promtool_check(as_node_exporter("prometheus"))
    assert "\nnode_cpu_seconds_total{" in as_node_exporter("prometheus")
    assert set(findings) <= set(real_findings)
    assert {finding.split("_")[1] for finding in findings} <= {"memory", "netstat"}


class Pages(ThreadingHTTPServer):
    """Serves texts as OpenMetrics, by their paths, while its `with` lasts."""

    daemon_threads = False

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        super().__init__((LOCALHOST, 0), _Page)
        self._thread = Thread(target=self.serve_forever, args=(0.01,))

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def __enter__(self) -> Pages:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Page(BaseHTTPRequestHandler):
    server: Pages

    def do_GET(self) -> None:
        body = self.server.texts[self.path].encode()
        self.send_response(200)
        self.send_header("Content-Type", FORMATS["openmetrics"].content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def pages(as_node_exporter: Callable[[str], str]) -> Iterator[Pages]:
    texts = {f"/{template}": exposition("openmetrics", template) for template in TEMPLATES}
    texts["/node_exporter"] = as_node_exporter("openmetrics")
    texts["/without_end"] = texts["/minimal"].replace("# EOF\n", "")
    with Pages(texts) as server:
        yield server


def samples(text: str) -> int:
    return sum(1 for line in text.splitlines() if not line.startswith("#"))


def test_a_scrape_takes_openmetrics_whole(prometheus: Callable[..., Prometheus], pages: Pages) -> None:
    def job(path: str) -> dict[str, Any]:
        targets = [{"targets": [f"{LOCALHOST}:{pages.port}"]}]
        return {"job_name": path, "metrics_path": path, "scrape_interval": "1s", "static_configs": targets}

    store = prometheus(configuration={"scrape_configs": [job(path) for path in pages.texts]})
    patiently(lambda: len(store.query("up")) == len(pages.texts), "each is scraped")
    errors = {one["labels"]["job"]: one["lastError"] for one in store.targets()}
    assert "data does not end with # EOF" in errors.pop("/without_end")
    assert set(errors.values()) == {""}
    stored = {result["metric"]["job"]: int(result["value"][1]) for result in store.query("scrape_samples_scraped")}
    assert {path: stored[path] for path in errors} == {path: samples(pages.texts[path]) for path in errors}
    (sequence,) = store.query('hostprobe_frame_sequence{job="/full"}')
    assert sequence["value"][1] == "2"


def test_promtool_can_tell() -> None:
    """A name that isn't as it should be is found among all others."""
    text = exposition("prometheus", "minimal").replace("hostprobe_memory_free_bytes", "hostprobe_memory_freeBytes")
    assert promtool_check(text) == [
        "hostprobe_memory_freeBytes metric names should be written in 'snake_case' not 'camelCase'"
    ]
