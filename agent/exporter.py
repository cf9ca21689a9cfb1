"""The exporter: one ring and one thread for each sink, and what of a frame goes into which ring.

A slow or failing sink delays neither the cycle nor another sink: the cycle only copies a payload
into a ring, and what the ring can't hold is thinned, or dropped by the sink's own policy, and
counted. For each sink, always: pushed + recovered = sent + dropped + backlog.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from agent.delivery import THIN_FROM_RATIO, Drop, WhenFull, least_priority
from agent.errors import HostprobeError, UsageError
from agent.frame import Frame
from agent.logs import Log
from agent.ring import NO_INSTANCE
from agent.ring_records import Payload
from agent.serializers import formats
from agent.sink_worker import SinkConfig, SinkWorker
from agent.sinks.sink import owned
from agent.table import Priority

_SLICE_SECONDS = 0.25

Dialect = tuple[formats.Name, formats.Names]
"""A format, and whose names it uses."""

Writer = tuple[formats.Name, formats.Names, tuple[str, ...]]
"""A dialect, and the tables that are written in it: a serializer for each."""


class Output(NamedTuple):
    """One way of writing a frame: sinks that want the same share one payload.

    Attributes:
        format: of the payload.
        names: whose names the metrics have, where the format leaves the choice.
        tables: the names of those that are wanted; all without any.
        least: tables of a lower priority are left out.
    """

    format: formats.Name
    names: formats.Names
    tables: tuple[str, ...]
    least: Priority

    @property
    def writer(self) -> Writer:
        """Which serializer writes it: one for each choice of tables, since it keeps what it wrote before."""
        return self.format, self.names, self.tables


class Exporter:
    """All sinks.

    Args:
        instance: the run, 16 bytes.
        priorities: of the tables, by name; one that isn't named is of normal priority.
        timed_every: one frame in so many is timed from its stamp to its delivery.

    Attributes:
        workers: one a sink, in the order of the configuration; the same list after a reload.
        reader_gone: set when a sink's reader has left for good (a closed stdout pipe).
    """

    def __init__(
        self,
        sinks: Sequence[SinkConfig],
        log: Log,
        instance: bytes = NO_INSTANCE,
        priorities: Mapping[str, Priority] | None = None,
        timed_every: int = 1,
    ) -> None:
        self.reader_gone = threading.Event()
        self._log = log
        self._priorities = priorities or {}
        self._wake: Callable[[], None] = lambda: None
        self._instance = instance
        self.workers = [self._worker(config, timed_every) for config in sinks]
        self._group()

    def _worker(self, config: SinkConfig, timed_every: int) -> SinkWorker:
        return SinkWorker(config, self._log, self._on_closed, self._instance, timed_every)

    def _group(self) -> None:
        self._unthinned: dict[Output, list[SinkWorker]] = {}
        for worker in self.workers:
            self._unthinned.setdefault(_output(worker, Priority.LOW), []).append(worker)

    def open(self) -> None:
        """Opens the rings and the sinks.

        Raises:
            UsageError: one of them can't start.
        """
        for worker in self.workers:
            worker.open()

    def check(self, workers: Iterable[SinkWorker] | None = None) -> None:
        """Finds out whether the sinks could start, without touching a buffer that a running agent may have.

        Args:
            workers: those that are asked; all unless given.

        Raises:
            UsageError: one of them couldn't.
        """
        for worker in self.workers if workers is None else workers:
            worker.check()

    def start(self, on_reader_gone: Callable[[], None]) -> None:
        """Starts the sinks' threads.

        Args:
            on_reader_gone: called, from a sink's thread, when a sink's reader has left.
        """
        self._wake = on_reader_gone
        for worker in self.workers:
            worker.start()

    def with_sinks(
        self, sinks: Iterable[SinkConfig], timed_every: int, keeps: Callable[[SinkWorker], bool]
    ) -> list[SinkWorker]:
        """The workers of other sinks: those that run already, where their settings are the same, else new ones.

        Args:
            keeps: whether one that runs can go on, its settings aside.
        """
        running = {worker.name: worker for worker in self.workers if not worker.has_crashed}
        workers = []
        for config in sinks:
            old = running.get(config.name)
            if old is not None and old.settings == config.settings and keeps(old):
                workers.append(old)
            else:
                workers.append(self._worker(config, timed_every))
        return workers

    def exchange(
        self,
        workers: Sequence[SinkWorker],
        priorities: Mapping[str, Priority],
        timeout_seconds: float,
        again: Callable[[str], SinkConfig],
        meanwhile: Callable[[], bool] = lambda: False,
    ) -> None:
        """Goes on with other workers, those of `with_sinks`; whoever is in both lists notices nothing.

        What the others hold is delivered for at most `timeout_seconds`; the rest waits in a buffer's file, or is
        dropped, counted and logged.

        Args:
            again: makes a sink as it was, by its name: if a new one can't open, the old ones open once more.
            meanwhile: called now and then while it waits; whether to wait no longer.

        Raises:
            UsageError: a new one can't open; all is as it was.
            HostprobeError: nor can an old one any more.
        """
        old = list(self.workers)
        going = [worker for worker in old if worker not in workers]
        places = {place for worker in going for place in owned(worker.settings).values()}
        coming = [worker for worker in workers if worker not in old]
        # What needs the place of none that goes opens before anything has ended.
        heirs = [worker for worker in coming if not places.isdisjoint(owned(worker.settings).values())]
        others = [worker for worker in coming if worker not in heirs]
        _open(others)
        self._end(going, timeout_seconds, meanwhile)
        try:
            _open(heirs)
        except UsageError:
            _give_up(others)
            restored = [
                worker if worker in workers else self._worker(again(worker.name), worker.timed_every) for worker in old
            ]
            self.workers[:] = [worker for worker in restored if worker in old]
            anew = [worker for worker in restored if worker not in old]
            try:
                _open(anew)
                _start(anew, going)
            except UsageError as error:
                raise HostprobeError(f"a sink that was exchanged can't be opened again: {error}") from None
            self.workers[:] = restored
            self._group()
            raise
        _start(coming, going)
        self.workers[:] = workers
        self._priorities = priorities
        self._group()

    def publish(self, frame: Frame, serialize: Callable[[Output, Sequence[str]], Payload]) -> None:
        """Hands a frame to every sink's ring, written once for all sinks that want the same of it.

        Args:
            serialize: writes the frame without the tables that are named; its payload is used before
                it is called again.
        """
        if all(worker.ring.used_ratio < THIN_FROM_RATIO for worker in self.workers):
            waiting = self._unthinned
        else:
            waiting = {}
            for worker in self.workers:
                least = least_priority(worker.ring.used_ratio, frame.sequence)
                waiting.setdefault(_output(worker, least), []).append(worker)
        while waiting:
            waiting = self._hand_out(waiting, frame, serialize)

    def _hand_out(
        self,
        outputs: Mapping[Output, Sequence[SinkWorker]],
        frame: Frame,
        serialize: Callable[[Output, Sequence[str]], Payload],
    ) -> dict[Output, list[SinkWorker]]:
        """Pushes each output to its sinks; returns those that want a smaller one."""
        smaller: dict[Output, list[SinkWorker]] = {}
        for output, workers in outputs.items():
            left_out = self._left_out(output, frame.tables) if output.least else ()
            payload = serialize(output, left_out)
            for worker in workers:
                if _should_be_smaller(worker, output, payload):
                    lesser = output._replace(least=Priority(output.least + 1))
                    smaller.setdefault(lesser, []).append(worker)
                else:
                    worker.push(payload, frame, bool(left_out))
        return smaller

    def _left_out(self, output: Output, tables: Iterable[str]) -> list[str]:
        """The wanted tables of a frame whose priority is too low."""
        wanted = [name for name in tables if not output.tables or name in output.tables]
        return [name for name in wanted if self._priorities.get(name, Priority.NORMAL) < output.least]

    def close(self, timeout_seconds: float) -> int:
        """Delivers what is held for at most `timeout_seconds` in all.

        The rest waits in the buffers' files, or is dropped, counted and logged.

        Returns:
            How many frames were dropped, of sinks whose reader is still there.
        """
        return self._end(self.workers, timeout_seconds)

    def _end(
        self, workers: Sequence[SinkWorker], timeout_seconds: float, meanwhile: Callable[[], bool] = lambda: False
    ) -> int:
        all_lost = 0
        before = [worker.ring.drops[Drop.SHUTDOWN] for worker in workers]
        deadline = time.monotonic() + timeout_seconds
        for worker in workers:
            worker.finish(deadline)
        for worker in workers:
            while (left := deadline - time.monotonic()) > 0 and not worker.has_ended_within(min(left, _SLICE_SECONDS)):
                if meanwhile():
                    deadline = time.monotonic()
        for worker, lost_before in zip(workers, before, strict=True):
            worker.finish(deadline)
            worker.join()
            lost = worker.ring.drops[Drop.SHUTDOWN] - lost_before
            if lost and not worker.reader_gone:
                all_lost += lost
                self._log.warning("frames not delivered in time", sink=worker.name, dropped_frames=lost)
        return all_lost

    def _on_closed(self) -> None:
        self.reader_gone.set()
        self._wake()


def _open(workers: Sequence[SinkWorker]) -> None:
    """Opens all, or none."""
    opened: list[SinkWorker] = []
    try:
        for worker in workers:
            worker.open()
            opened.append(worker)
    except UsageError:
        _give_up(opened)
        raise


def _give_up(opened: Sequence[SinkWorker]) -> None:
    for worker in opened:
        worker.finish(time.monotonic())
        worker.join()


def _start(workers: Sequence[SinkWorker], former: Sequence[SinkWorker]) -> None:
    """Starts those that are open; one that takes the place of a former one of its name counts on from there."""
    totals = {worker.name: worker for worker in former}
    for worker in workers:
        if worker.name in totals:
            worker.go_on_from(totals[worker.name])
        worker.start()


def _output(worker: SinkWorker, least: Priority) -> Output:
    settings = worker.settings
    return Output(settings.format, settings.names, settings.tables, least)


def _should_be_smaller(worker: SinkWorker, output: Output, payload: Payload) -> bool:
    return (
        worker.settings.buffer.when_full is WhenFull.DROP_PRIORITY
        and output.least < Priority.HIGH
        and not worker.ring.has_room(len(payload))
    )
