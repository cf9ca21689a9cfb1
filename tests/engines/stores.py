"""Prometheus, promtool and VictoriaMetrics: what scrapes hostprobe, and what takes its lines and its remote writes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.engines.process import LOCALHOST, Engine, answers, free_ports, http, program, prometheus_query


class Prometheus(Engine):
    """Scrapes, from some five seconds after its start, and takes remote writes at `write_url`.

    Args:
        targets: "host:port" of what is scraped, as job "hostprobe".
        scrape: more of the job's configuration, such as scrape_interval (one second), scheme, tls_config.
        configuration: more of the whole file, such as storage.
    """

    name = "prometheus"

    def __init__(
        self,
        folder: Path,
        targets: Sequence[str] = (),
        scrape: dict[str, Any] | None = None,
        configuration: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(folder)
        (self.port,) = free_ports(1)
        self.url = f"http://{LOCALHOST}:{self.port}"
        self.write_url = f"{self.url}/api/v1/write"
        job = {
            "job_name": "hostprobe",
            "scrape_interval": "1s",
            "scrape_timeout": "1s",
            "static_configs": [{"targets": list(targets)}],
            **(scrape or {}),
        }
        # JSON is YAML.
        (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": [job], **(configuration or {})}))

    def command(self) -> Sequence[str]:
        return (
            program("prometheus"),
            f"--config.file={self.folder}/prometheus.yml",
            f"--storage.tsdb.path={self.folder}/data",
            f"--web.listen-address={LOCALHOST}:{self.port}",
            "--web.enable-remote-write-receiver",
        )

    def is_ready(self) -> bool:
        return answers(f"{self.url}/-/ready")

    def query(self, expression: str, at_unix_seconds: float | None = None) -> list[dict[str, Any]]:
        """The results of an instant query, now where no time is given: see prometheus_query."""
        return prometheus_query(self.url, expression, at_unix_seconds)

    def targets(self) -> list[dict[str, Any]]:
        """What it scrapes: `health` "unknown", "up" or "down", `lastError`, `scrapeUrl`, `labels`."""
        status, body = http(f"{self.url}/api/v1/targets")
        assert status == 200, body
        return list(json.loads(body)["data"]["activeTargets"])


class VictoriaMetrics(Engine):
    """Takes Influx lines at URL/write, remote writes at `write_url` and Graphite's lines at `graphite`, host:port.

    It keeps what is up to 100 years old.
    """

    name = "victoria-metrics"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (self.port,) = free_ports(1)
        self.url = f"http://{LOCALHOST}:{self.port}"
        self.write_url = f"{self.url}/api/v1/write"
        (port,) = free_ports(1)
        self.graphite = f"{LOCALHOST}:{port}"

    def command(self) -> Sequence[str]:
        return (
            program("victoria-metrics"),
            f"-httpListenAddr={LOCALHOST}:{self.port}",
            f"-graphiteListenAddr={self.graphite}",
            f"-storageDataPath={self.folder}/data",
            "-memory.allowedBytes=64MiB",
            "-retentionPeriod=100y",
            "-search.latencyOffset=0s",
        )

    def is_ready(self) -> bool:
        return answers(f"{self.url}/health")

    def query(self, expression: str, at_unix_seconds: float | None = None) -> list[dict[str, Any]]:
        """The results of an instant query over all that it has taken so far: see prometheus_query."""
        self._flush()
        return prometheus_query(self.url, expression, at_unix_seconds)

    def export(self, selector: str) -> list[dict[str, Any]]:
        """Every series that a selector matches: `metric`, `values`, and `timestamps` in Unix milliseconds."""
        self._flush()
        # By itself an export ends before the current second.
        parameters = {"match[]": selector, "end": f"{time.time() + 60:.3f}"}
        status, body = http(f"{self.url}/api/v1/export", parameters=parameters)
        assert status == 200, body
        return [json.loads(line) for line in body.splitlines()]

    def series(self, selector: str) -> tuple[dict[str, str], list[tuple[int, float]]]:
        """The labels of the one series that a selector matches, and its samples by time: milliseconds, value."""
        (one,) = self.export(selector)
        return one["metric"], sorted(zip(one["timestamps"], one["values"], strict=True))

    def write_to_disk(self) -> None:
        """By itself it does so every five seconds: a crash takes with it what it has acknowledged since."""
        status, body = http(f"{self.url}/snapshot/create")
        assert (status, json.loads(body)["status"]) == (200, "ok")

    def _flush(self) -> None:
        """Makes visible what it has taken; by itself it does so once a second."""
        status, body = http(f"{self.url}/internal/force_flush")
        assert status == 200, body


def promtool_check(text: str) -> list[str]:
    """What `promtool check metrics` finds in an exposition: a line each, none where it is good.

    What is no exposition at all is a finding too.
    """
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False, timeout=60
    )
    findings = [line for line in (done.stdout + done.stderr).splitlines() if line]
    assert bool(findings) == bool(done.returncode), f"promtool: status {done.returncode}: {findings}"
    return findings
