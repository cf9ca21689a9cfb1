"""A cycle taken apart: what it does, in its order, each as a function that can be called on its own.

The sinks are replaced by such as are never started, and write what the configured ones would: a cycle ends with the
push, as the agent's does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from math import lcm
from typing import NamedTuple, Protocol

import msgspec

from agent.assembly import Agent
from agent.config import Config
from agent.cycle import ScheduledProbe, Serializer
from agent.delivery import Drop
from agent.exporter import Dialect
from agent.frame import Frame
from agent.pool import Buffer
from agent.ring import Ring
from agent.serializers.formats import FORMATS
from agent.sinks.file import FileSettings
from agent.sinks.sink import BufferSettings


def without_peers(config: Config) -> Config:
    """The same with sinks that reach nobody, of the same formats, tables and sizes of buffer, in memory."""
    sinks = {
        name: FileSettings(
            type="file",
            path=os.devnull,
            format=sink.format,
            names=sink.names,
            tables=sink.tables,
            buffer=BufferSettings(size=sink.buffer.size, when_full=sink.buffer.when_full),
        )
        for name, sink in config.sinks.items()
    }
    return msgspec.structs.replace(config, sinks=sinks)


class Reuse(Protocol):
    """What keeps arrays or buffers, and counts those that it made: a pool, an arena."""

    made: int
    regrown: int


class Part(NamedTuple):
    """One part of a cycle.

    Attributes:
        name: "probe cpu", "format json", "ring".
        work: what it does.
        alone: does it in a way that can be repeated; None for what can't be without the others.
        pools: whose arrays and buffers it uses.
        payload: gives the payload that it wrote or pushed; None for a part without one.
    """

    name: str
    work: Callable[[], object]
    alone: Callable[[], object] | None
    pools: Sequence[Reuse] = ()
    payload: Callable[[], bytearray] | None = None


class Cycles:
    """The cycle of an agent, whole and in parts.

    Args:
        agent: whose exporter is open and not started, of a configuration `without_peers`.
        all_formats: whether all formats are parts, or JSON and those of the sinks.

    Attributes:
        parts: in the order of a cycle; the last ones write and push the frame that the first ones have filled.
        failures: of probes that failed, by their name: why, the last time.

    Raises:
        UsageError: a format needs a package that isn't there.
    """

    def __init__(self, agent: Agent, all_formats: bool = False) -> None:
        self.failures: dict[str, str] = {}
        self._agent = agent
        self._cycle = agent.cycle
        self._ticks_apart = lcm(*(scheduled.every for scheduled in agent.cycle.probes))
        self._tick = 0
        frame = agent.cycle.frame
        self._buffers = {dialect: Buffer() for dialect in _dialects(agent, all_formats)}
        self._payload_dialect = next(iter(self._buffers))
        self._ring = Ring(next((sink.buffer.size for sink in agent.config.sinks.values()), BufferSettings().size))
        self.parts = [
            Part("frame.begin", self._begin, None),
            *(self._probe(scheduled) for scheduled in agent.cycle.probes),
            Part("frame.derive", frame.derive, frame.derive),
            *(self._format(dialect, agent.serializer(*dialect)) for dialect in self._buffers),
            Part("publish", agent.cycle.publish, agent.cycle.publish, [agent.cycle.buffers]),
            Part("ring push", self._push, self._push, payload=lambda: self._buffers[self._payload_dialect].data),
        ]

    @property
    def pools(self) -> list[Reuse]:
        """Of a whole cycle."""
        return [self._cycle.buffers, self._cycle.frame.arena]

    def run(self) -> None:
        """A whole cycle, in which every probe is due."""
        self._tick += self._ticks_apart
        self._cycle.run(self._tick)

    def tidy(self) -> None:
        """Empties the rings, as a sink would; part of no cycle."""
        self._ring.drop_held(Drop.FULL)
        for worker in self._agent.exporter.workers:
            worker.ring.drop_held(Drop.FULL)

    def _begin(self) -> None:
        self._cycle.frame.begin(time.time_ns(), time.monotonic_ns())

    def _probe(self, scheduled: ScheduledProbe) -> Part:
        probe, name, failures = scheduled.probe, scheduled.meter.name, self.failures
        own_frame = Frame(probe.tables)

        def collect_into(frame: Frame) -> None:
            try:
                probe.collect(frame)
            except Exception as error:  # the boundary that the cycle is
                frame.discard(probe.tables)
                failures[name] = f"{type(error).__name__}: {error}"

        def alone() -> None:
            own_frame.begin(time.time_ns(), time.monotonic_ns())
            collect_into(own_frame)

        return Part(f"probe {name}", lambda: collect_into(self._cycle.frame), alone, [own_frame.arena])

    def _format(self, dialect: Dialect, serializer: Serializer) -> Part:
        buffer, frame = self._buffers[dialect], self._cycle.frame
        name, names = dialect

        def write() -> None:
            if len(buffer.data) < buffer.capacity:  # as the cycle does
                buffer.clear()
            serializer.write(frame, buffer)

        shown = f"format {name}" if names == "hostprobe" else f"format {name}, {names}"
        return Part(shown, write, write, payload=lambda: buffer.data)

    def _push(self) -> None:
        frame = self._cycle.frame
        payload = self._buffers[self._payload_dialect].data
        self._ring.push(payload, frame.sequence, frame.monotonic_ns, 1, frame.time_unix_ns)


def _dialects(agent: Agent, all_formats: bool) -> list[Dialect]:
    """What is measured: the sinks' first, so that the ring gets a payload such as theirs."""
    more: Iterable[Dialect] = [(name, "hostprobe") for name in FORMATS] if all_formats else [("json", "hostprobe")]
    sinks = [(worker.settings.format, worker.settings.names) for worker in agent.exporter.workers]
    return list(dict.fromkeys([*sinks, *more]))
