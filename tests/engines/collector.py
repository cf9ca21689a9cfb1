"""An OpenTelemetry collector that takes OTLP by HTTP and hands on, as JSON, what it has understood."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.engines.process import LOCALHOST, Engine, answers, free_ports, program
from tests.sinks.http_peer import HttpPeer

_PROTOBUF = {"Content-Type": "application/x-protobuf"}


class Collector(Engine):
    """Acknowledges a request once `behind` has taken it: there is no queue in it, and nothing is tried again.

    Attributes:
        endpoint: without the path; requests go to `url`, ENDPOINT/v1/metrics.
        behind: what it hands on to; its answers can be scripted, for a collector that is out of luck itself.
    """

    name = "otelcol"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self.port,) = free_ports(1)
        self.endpoint = f"http://{LOCALHOST}:{self.port}"
        self.url = f"{self.endpoint}/v1/metrics"
        self.behind = HttpPeer()
        exporter = {
            "metrics_endpoint": self.behind.url("/v1/metrics"),
            "encoding": "json",
            "compression": "none",
            "sending_queue": {"enabled": False},
            "retry_on_failure": {"enabled": False},
        }
        configuration = {
            "receivers": {"otlp": {"protocols": {"http": {"endpoint": f"{LOCALHOST}:{self.port}"}}}},
            "exporters": {"otlp_http": exporter},
            "service": {
                "pipelines": {"metrics": {"receivers": ["otlp"], "exporters": ["otlp_http"]}},
                "telemetry": {"metrics": {"level": "none"}},  # by itself it would listen on port 8888
            },
        }
        (folder / "collector.yaml").write_text(json.dumps(configuration))  # JSON is YAML

    def command(self) -> Sequence[str]:
        return program("otelcol"), f"--config={self.folder}/collector.yaml"

    def is_ready(self) -> bool:
        """Whether it takes an empty request, which it doesn't hand on."""
        return answers(self.url, b"", _PROTOBUF)

    def received(self) -> list[dict[str, Any]]:
        """Every request with data that it has taken, in order: the JSON of an ExportMetricsServiceRequest."""
        return [json.loads(body) for body in self.behind.bodies]

    def __enter__(self) -> Collector:
        self.behind.__enter__()
        try:
            self.start()
        except BaseException:
            self.behind.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.behind.__exit__()
