"""nats-server with JetStream, and a Kafka of one broker."""

from __future__ import annotations

import os
import subprocess
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from tests.engines.process import LOCALHOST, Engine, answers, free_ports, java_classes, program


class NatsServer(Engine):
    """Has no streams at first: a test adds its own.

    Args:
        options: more of its command line, such as ("--auth", TOKEN).
    """

    name = "nats-server"

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self.port, self._health_port = free_ports(2)
        self.url = f"nats://{LOCALHOST}:{self.port}"
        self._options = options

    def command(self) -> Sequence[str]:
        return (
            program("nats-server"),
            f"--addr={LOCALHOST}",
            f"--port={self.port}",
            f"--http_port={self._health_port}",
            "--jetstream",
            f"--store_dir={self.folder}/data",
            *self._options,
        )

    def is_ready(self) -> bool:
        return answers(f"http://{LOCALHOST}:{self._health_port}/healthz")


class KafkaBroker(Engine):
    """Broker and controller in one process; topics have one partition, and are made when they are first asked for.

    Args:
        properties: more of server.properties, or other values than those here.
    """

    name = "kafka"

    def __init__(self, folder: Path, properties: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self.port, controller_port = free_ports(2)
        self.bootstrap = f"{LOCALHOST}:{self.port}"
        self._properties = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{LOCALHOST}:{controller_port}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://{LOCALHOST}:{controller_port}",
            "log.dirs": f"{folder}/data",
            "num.partitions": "1",
            "offsets.topic.num.partitions": "1",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            **(properties or {}),
        }

    def command(self) -> Sequence[str]:
        return self._java("kafka.Kafka", str(self._configuration))

    def environment(self) -> dict[str, str]:
        """Without what would give its JVM options of another program's."""
        return {name: value for name, value in os.environ.items() if name not in ("JAVA_TOOL_OPTIONS", "CLASSPATH")}

    def start(self) -> None:
        """Formats its storage at the first time."""
        if not self._configuration.exists():
            lines = "".join(f"{name}={value}\n" for name, value in self._properties.items())
            self._configuration.write_text(lines)
            cluster = urlsafe_b64encode(uuid4().bytes).decode().rstrip("=")
            command = self._java(
                "kafka.tools.StorageTool", "format", f"--cluster-id={cluster}", f"--config={self._configuration}"
            )
            done = subprocess.run(
                command, env=self.environment(), capture_output=True, text=True, check=False, timeout=60
            )
            if done.returncode:
                pytest.fail(f"kafka: its storage could not be formatted: {done.stdout}{done.stderr}", pytrace=False)
        super().start()

    def is_ready(self) -> bool:
        """Whether it names itself as a broker: until then it listens, but its controller keeps it fenced."""
        client = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0, "socket.timeout.ms": 2000})
        try:
            return len(client.list_topics(timeout=2).brokers) == 1
        except KafkaException:
            return False

    @property
    def _configuration(self) -> Path:
        return self.folder / "server.properties"

    def _java(self, *arguments: str) -> Sequence[str]:
        # One small machine runs this beside all else: a bounded heap, one thread of collection, the quick compiler.
        small = ("-Xms64m", "-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
        return (program("java"), *small, "-cp", java_classes("kafka"), *arguments)
