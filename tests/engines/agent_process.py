"""The agent: as it is run, a process of its own with its frames in a file, or in this process, a frame at a time."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from agent.assembly import Agent
from agent.config import load
from agent.logs import Log
from agent.sink_worker import SinkWorker
from tests.engines.process import REPOSITORY, Engine

PATIENT = {"base": "3s", "cap": "3s"}
"""A sink's `retry`: pauses so long that an engine is back before five failures in a row open the circuit."""


class Hostprobe(Engine):
    """Collects while its `with` lasts, and has delivered what it can when that ends: with status 0, or the test fails.

    The tag `env` is "test".

    Args:
        sinks: the configuration's, by name, beside `main`: the file of frames.
        agent: more of its section `agent`, such as interval (one second) and hostname.
        template: what it collects.
        probes: its sections `probes`.
        prefix: the command that it is run by.
    """

    name = "hostprobe"
    stop_seconds = 40.0

    def __init__(
        self,
        folder: Path,
        sinks: Mapping[str, Mapping[str, Any]],
        agent: Mapping[str, Any] | None = None,
        template: str = "standard",
        probes: Mapping[str, Mapping[str, Any]] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        super().__init__(folder)
        self._frames = folder / "frames.jsonl"
        self._prefix = prefix
        self._configuration = configuration_file(
            folder,
            {"main": {"type": "file", "path": str(self._frames)}, **sinks},
            {"interval": "1s", **(agent or {})},
            template,
            probes or {},
        )

    def command(self) -> Sequence[str]:
        return *self._prefix, sys.executable, "-m", "agent", "run", "--config", str(self._configuration)

    def environment(self) -> dict[str, str]:
        """Runs the agent of this repository, whatever folder it runs in."""
        return {**super().environment(), "PYTHONPATH": str(REPOSITORY)}

    def is_ready(self) -> bool:
        """Whether it has collected once."""
        return bool(self.frames())

    def stop(self) -> None:
        process = self.process
        super().stop()
        assert process is None or process.returncode == 0, f"status {process.returncode}: {self.log_text()}"

    def frames(self) -> list[dict[str, Any]]:
        """Those that it has collected so far, as JSON has them."""
        if not self._frames.exists():
            return []
        lines = self._frames.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines[:-1]]  # the last one isn't whole

    def events(self, event: str) -> list[dict[str, Any]]:
        """What it has logged so far of one kind."""
        logged = [json.loads(line) for line in self.log_text().splitlines()]
        return [one for one in logged if one["event"] == event]


class SteppedAgent:
    """Collects by the template minimal, when it is told to, while its `with` lasts.

    Args:
        sink: the only one.

    Attributes:
        frames: the time in milliseconds of each frame so far, and its sequence.
    """

    def __init__(self, folder: Path, sink: Mapping[str, Any], hostname: str) -> None:
        path = configuration_file(folder, {"main": sink}, {"hostname": hostname}, "minimal", {})
        self._agent = Agent(load(str(path)), Log("info", "json"))
        self.frames: list[tuple[int, int]] = []

    @property
    def worker(self) -> SinkWorker:
        """The sink's."""
        (worker,) = self._agent.exporter.workers
        return worker

    def step(self) -> None:
        """One frame, into the sink's ring."""
        self._agent.cycle.run(len(self.frames))
        frame = self._agent.cycle.frame
        self.frames.append((frame.time_unix_ns // 1_000_000, frame.sequence))

    def __enter__(self) -> Self:
        self._threshold = gc.get_threshold()
        self._agent.exporter.open()
        self._agent.exporter.start(lambda: None)
        return self

    def __exit__(self, *_: object) -> None:
        self._agent.exporter.close(10)
        self._agent.close()
        gc.unfreeze()  # an agent has a process for itself
        gc.set_threshold(*self._threshold)


def configuration_file(
    folder: Path,
    sinks: Mapping[str, Mapping[str, Any]],
    agent: Mapping[str, Any],
    template: str,
    probes: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Writes a configuration, whose ways of waiting suit a test, and gives its path."""
    tree = {
        "template": template,
        "agent": {"shutdown_timeout": "30s", "max_cpu_ratio": 100, "tags": {"env": "test"}, **agent},
        "log": {"format": "json"},
        "probes": probes,
        "sinks": {name: {"retry": PATIENT, **sink} for name, sink in sinks.items()},
    }
    path = folder / "hostprobe.toml"
    path.write_text("".join(f"{name} = {_toml(value)}\n" for name, value in tree.items()))
    return path


def milliseconds(frame: Mapping[str, Any]) -> int:
    """A frame's time as Prometheus and VictoriaMetrics keep it."""
    return int(frame["time_unix_ns"]) // 1_000_000


def needs_root() -> None:
    """Fails the test where it can't mount."""
    assert os.geteuid() == 0, "this test mounts file systems of its own, which only root can: run it as root"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml(held)}" for name, held in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
