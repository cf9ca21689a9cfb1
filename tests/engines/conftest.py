"""Real engines, each started when a test first asks for it, and ended with the module or, where dear, the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.engines.brokers import KafkaBroker, NatsServer
from tests.engines.collector import Collector
from tests.engines.node_exporter import NodeExporter
from tests.engines.stores import Prometheus, VictoriaMetrics


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Prometheus]]:
    """`prometheus(targets, scrape, configuration)`: one that is ready; all may be left out."""
    with ExitStack() as running:

        def start(*arguments: Any, **named: Any) -> Prometheus:
            return running.enter_context(Prometheus(tmp_path_factory.mktemp("prometheus"), *arguments, **named))

        yield start


@pytest.fixture(scope="module")
def victoria_metrics(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VictoriaMetrics]:
    with VictoriaMetrics(tmp_path_factory.mktemp("victoria-metrics")) as store:
        yield store


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaBroker]:
    """One for all: each test has a topic of its own."""
    with KafkaBroker(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture(scope="module")
def collector(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    with Collector(tmp_path_factory.mktemp("collector")) as one:
        yield one


@pytest.fixture(scope="module")
def node_exporter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeExporter]:
    with NodeExporter(tmp_path_factory.mktemp("node_exporter")) as exporter:
        yield exporter
