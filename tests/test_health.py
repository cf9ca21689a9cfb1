"""Health, of a real cycle, a real exporter and its threads; only the clock that is asked stands still."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from agent import config as configuration
from agent.assembly import Agent
from agent.cycle import Cycle, ScheduledProbe
from agent.delivery import OPEN_AFTER_FAILURES, OPEN_SECONDS, Circuit
from agent.errors import SinkClosedError, SinkError
from agent.exporter import Exporter
from agent.frame import Frame
from agent.health import Health
from agent.logs import Log
from agent.pool import Buffer
from agent.table import TableSpec, gauge
from agent.telemetry import CycleMeter, ProbeMeter
from agent.units import Duration
from tests.sinks.test_prometheus import free_port
from tests.workers import PATIENCE_SECONDS, Clock, ScriptedSink, config, events, until

SPEC = TableSpec("some", "Something.", gauge("value", "things", "A value."))


class Probe:
    """Fills its table; while it is told to, it hangs in there, as on a file system that is away."""

    Settings = None
    tables = (SPEC,)

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_in = threading.Event()

    def collect(self, frame: Frame) -> None:
        self.is_in.set()
        assert self.may_go_on.wait(PATIENCE_SECONDS)
        frame.open(SPEC).claim([()])

    def close(self) -> None: ...


class Lines:
    """Writes a frame as its number."""

    def write(self, frame: Frame, buffer: Buffer, *_: Any) -> None:
        buffer.data += b"%d" % frame.sequence


class Running:
    """A cycle, an exporter with its threads, and their health by a clock that starts now and stands still."""

    def __init__(self, *sinks: ScriptedSink, interval: float = 10) -> None:
        log = Log("error", "json")
        self.probe = Probe()
        self.meter = CycleMeter()
        self.exporter = Exporter([config(sink, f"sink{n}", base=0.0001) for n, sink in enumerate(sinks)], log)
        serializers = {("json", "hostprobe", ()): Lines()}
        self.exporter.open()
        self.exporter.start(lambda: None)
        self.cycle = Cycle(
            [ScheduledProbe(self.probe, ProbeMeter("probe"))], self.meter, serializers, self.exporter, log
        )
        self.clock = Clock()
        self.clock.now_ns = time.monotonic_ns()
        self.health = Health(self.meter, Duration(interval), self.exporter.workers, self.clock)

    def run(self) -> None:
        """One cycle, at the end of which the clock is."""
        self.cycle.run(self.meter.frames)
        self.clock.now_ns = self.meter.ended_ns

    def close(self) -> None:
        self.probe.may_go_on.set()
        self.exporter.close(0.1)
        self.cycle.close()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    """`running(*sinks, interval=…)`, closed after the test."""
    made: list[Running] = []

    def make(*sinks: ScriptedSink, interval: float = 10) -> Running:
        made.append(Running(*sinks, interval=interval))
        return made[-1]

    yield make
    for agent in made:
        agent.close()


def test_it_is_well_and_ready_after_the_first_frame(running: Any) -> None:
    agent = running(ScriptedSink())
    assert agent.health.problems() == []
    assert agent.health.hindrances() == ["no frame yet"]
    agent.run()
    assert agent.health.problems() == agent.health.hindrances() == []


def test_it_waits_for_the_first_cycle_as_for_any_other(running: Any) -> None:
    agent = running(ScriptedSink())
    agent.clock.pass_seconds(30)
    assert agent.health.problems() == []
    agent.clock.pass_seconds(0.001)
    problem = "no cycle has ended for 30s: expected one every 10s"
    assert agent.health.problems() == [problem]
    assert agent.health.hindrances() == [problem, "no frame yet"]


@pytest.mark.parametrize(("interval", "seconds"), [(0.25, 10), (1, 10), (3.4, 10.2), (10, 30), (60, 180)])
def test_a_stuck_cycle_is_seen_after_3_intervals_and_10_seconds(running: Any, interval: float, seconds: float) -> None:
    agent = running(ScriptedSink(), interval=interval)
    agent.run()
    agent.probe.may_go_on.clear()
    agent.probe.is_in.clear()
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(agent.run)
        try:
            assert agent.probe.is_in.wait(PATIENCE_SECONDS)
            agent.clock.pass_seconds(seconds)
            assert agent.health.problems() == []
            agent.clock.pass_seconds(0.001)
            (problem,) = agent.health.problems()
            assert problem == f"no cycle has ended for {int(seconds)}s: expected one every {Duration(interval)}"
            assert agent.health.hindrances() == [problem]
        finally:
            agent.probe.may_go_on.set()
        stuck.result(PATIENCE_SECONDS)
    assert agent.health.problems() == agent.health.hindrances() == []


def test_holding_back_is_no_problem(running: Any) -> None:
    agent = running(ScriptedSink())
    agent.run()
    agent.meter.throttle = 0.8  # 50 seconds between two frames
    agent.clock.pass_seconds(30 + 40)
    assert agent.health.problems() == []
    agent.clock.pass_seconds(0.001)
    assert agent.health.problems() == ["no cycle has ended for 70s: expected one every 50s"]


def test_a_thread_that_died(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a defect that no boundary catches: one in the worker itself."""
    agent = running(ScriptedSink(), ScriptedSink())
    agent.run()
    worker = agent.exporter.workers[1]
    seen: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: seen.append(arguments.exc_type))

    def defect(*_: Any) -> None:
        raise ZeroDivisionError

    until(lambda: worker.frames == (1, 0, 0))
    worker._settle = defect
    agent.run()
    until(lambda: not worker._thread.is_alive())
    assert seen == [ZeroDivisionError]
    assert agent.health.problems() == agent.health.hindrances() == ["sink sink1: its thread has ended"]


@pytest.mark.parametrize("failures", [0, OPEN_AFTER_FAILURES])
def test_a_reader_that_has_gone_is_no_problem(running: Any, failures: int) -> None:
    """Not even where its circuit was open then."""
    agent = running(ScriptedSink(*[SinkError("away")] * failures, then=SinkClosedError("gone")))
    worker = agent.exporter.workers[0]
    worker._stopping.wait = lambda _: None  # no pause between two tries
    agent.run()
    until(lambda: not worker._thread.is_alive())
    assert worker.reader_gone
    assert (worker.circuit is Circuit.CLOSED) is (failures == 0)
    assert agent.health.problems() == agent.health.hindrances() == []


def test_the_end_of_the_agent_is_no_problem(running: Any) -> None:
    agent = running(ScriptedSink())
    agent.run()
    agent.exporter.close(PATIENCE_SECONDS)
    assert not agent.exporter.workers[0]._thread.is_alive()
    assert agent.health.problems() == []


def test_a_thread_that_has_not_started_is_no_problem() -> None:
    exporter = Exporter([config(ScriptedSink())], Log("error", "json"))
    assert Health(CycleMeter(), Duration(10), exporter.workers).problems() == []


def test_frames_that_are_too_large_hinder_until_one_fits(running: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A host that has grown: said once an episode, with both sizes."""
    agent = running(ScriptedSink())
    worker = agent.exporter.workers[0]
    worker._log = Log("info", "json")
    size = worker.ring.size
    agent.run()
    for payload in (bytes(size), bytes(size + 1), b"fits", bytes(size)):
        worker.push(payload, agent.cycle.frame, False)
        fault = f"sink sink0: a frame of {len(payload)} bytes doesn't fit into its buffer"
        assert agent.health.hindrances() == ([fault] if len(payload) >= size else [])
        assert agent.health.problems() == []
    told = [(line["event"], line["reason"]) for line in events(capsys)]
    event = "sink's buffer.size is too small for a frame"
    assert told == [(event, f"a frame of {size} bytes, and a ring of {size}")] * 2


def test_an_open_circuit_hinders_until_a_delivery_succeeds(running: Any) -> None:
    clock = Clock()
    sink = ScriptedSink(*[SinkError("away")] * OPEN_AFTER_FAILURES)
    agent = running(ScriptedSink(), sink)
    worker = agent.exporter.workers[1]
    until(lambda: worker._thread.is_alive())
    worker._clock_ns = clock
    may_try = threading.Event()

    def wait(_: float) -> None:
        """The worker's pause: none between the first tries, and then until the test lets it try."""
        if worker.circuit is Circuit.OPEN:
            may_try.wait(PATIENCE_SECONDS)

    worker._stopping.wait = wait
    try:
        agent.run()
        until(lambda: worker.circuit is Circuit.OPEN)
        assert agent.health.problems() == []
        assert agent.health.hindrances() == ["sink sink1: its circuit is open, its peer fails"]
        clock.pass_seconds(OPEN_SECONDS)
        assert agent.health.hindrances() == ["sink sink1: its circuit is half-open, its peer fails"]
    finally:
        may_try.set()
    until(lambda: worker.circuit is Circuit.CLOSED)
    assert agent.health.hindrances() == []


def test_the_assembly_shows_it_to_the_sinks_that_watch(tmp_path: Path) -> None:
    """The pages of a real agent, from the first moment to a cycle that is stuck and a thread that is dead."""
    port = free_port()
    path = tmp_path / "hostprobe.toml"
    path.write_text(
        'template = "minimal"\n[sinks.main]\nenabled = false\n'
        f'[sinks.scraped]\ntype = "prometheus"\naddress = "127.0.0.1:{port}"\n'
    )
    agent = Agent(configuration.load(str(path), None, {}), Log("error", "json"))
    clock = Clock()
    clock.now_ns = time.monotonic_ns()
    agent.health._clock_ns = clock

    def get(page: str) -> tuple[int, bytes]:
        with closing(HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)) as connection:
            connection.request("GET", page)
            answer = connection.getresponse()
            return answer.status, answer.read()

    agent.exporter.open()
    agent.exporter.start(lambda: None)
    try:
        assert get("/healthz") == (200, b"ok\n")
        assert get("/readyz") == (503, b"no frame yet\n")
        assert get("/metrics") == (503, b"no frame yet\n")
        agent.cycle.run(0)
        until(lambda: get("/metrics")[0] == 200)
        assert b"hostprobe_memory_total_bytes" in get("/metrics")[1]
        assert get("/readyz") == (200, b"ok\n")
        clock.now_ns = agent.meter.ended_ns
        clock.pass_seconds(30.5)
        assert get("/healthz") == (503, b"no cycle has ended for 30s: expected one every 10s\n")
    finally:
        agent.exporter.close(PATIENCE_SECONDS)
        agent.close()
