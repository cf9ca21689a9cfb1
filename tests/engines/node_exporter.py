"""Prometheus' own exporter of a host's metrics, beside which hostprobe is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.engines.process import LOCALHOST, Engine, answers, free_ports, http, program


class NodeExporter(Engine):
    """With the collectors that it has by default.

    Args:
        binary: Debian's, or "node_exporter": the one that was built from today's source.
        arguments: of its command line, beside the address.
    """

    name = "node_exporter"

    def __init__(self, folder: Path, binary: str = "prometheus-node-exporter", arguments: Sequence[str] = ()) -> None:
        super().__init__(folder)
        (self.port,) = free_ports(1)
        self.url = f"http://{LOCALHOST}:{self.port}"
        self._binary = binary
        self._arguments = arguments

    def command(self) -> Sequence[str]:
        return program(self._binary), f"--web.listen-address={LOCALHOST}:{self.port}", *self._arguments

    def is_ready(self) -> bool:
        return answers(f"{self.url}/")

    def scrape(self) -> str:
        """One exposition, as text."""
        status, body = http(f"{self.url}/metrics")
        assert status == 200, body
        return body.decode()
