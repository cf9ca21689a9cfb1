"""Self-restraint over real rings and a clock that is moved by hand; this process's own memory and CPU."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.config import AgentSettings
from agent.cycle import Cycle, Schedule, ScheduledProbe
from agent.delivery import Drop, WhenFull
from agent.errors import RejectedError, SinkError
from agent.exporter import Exporter
from agent.logs import Log
from agent.restraint import Restraint
from agent.serializers.document import Identity
from agent.serializers.json_lines import JsonSerializer
from agent.sink_worker import SinkWorker
from agent.telemetry import AgentProbe, CycleMeter, ProbeMeter
from agent.units import Duration, Size
from tests.workers import ScriptedSink, config, events, file_config

PLENTY = Size(1 << 50)


class Looks:
    """A restraint over some rings, asked by `frames(n)` once a second of its clock after n cycles."""

    def __init__(self, *sinks: SinkWorker, **settings: Any) -> None:
        self.now_ns = 10**12
        self.cpu_ns = 0
        self.meter = CycleMeter()
        self.sinks = sinks
        kinds = {"max_memory": PLENTY, "max_cpu_ratio": 0.25, "interval": Duration(1), **settings}
        log = Log("info", "json")
        self.restraint = Restraint(
            AgentSettings(**kinds), self.meter, sinks, log, lambda: self.now_ns, lambda: self.cpu_ns
        )

    def __call__(self, frames: int = 1, seconds: float = 1.0, cpu_seconds: float = 0.0) -> int:
        self.meter.frames += frames
        self.now_ns += round(seconds * 1e9)
        self.cpu_ns += round(cpu_seconds * 1e9)
        return self.restraint.ticks()


@pytest.fixture
def looks() -> Iterator[Callable[..., Looks]]:
    made: list[Looks] = []

    def make(*sinks: SinkWorker, **settings: Any) -> Looks:
        made.append(Looks(*sinks, **settings))
        return made[-1]

    yield make
    for each in made:
        each.restraint.close()


def sink(name: str = "sink", size: int = 1024, **kinds: Any) -> SinkWorker:
    """A worker whose thread never starts."""
    worker = SinkWorker(config(ScriptedSink(), name, size=size, **kinds), Log(), lambda: None)
    worker.open()
    return worker


def told(capsys: pytest.CaptureFixture[str]) -> list[tuple[Any, ...]]:
    return [(line["event"], line.get("cause"), line.get("throttle_ratio")) for line in events(capsys)]


def test_without_strain_each_interval_has_its_frame(
    looks: Callable[..., Looks], capsys: pytest.CaptureFixture[str]
) -> None:
    this = looks(sink())
    assert [this(cpu_seconds=0.2) for _ in range(50)] == [1] * 50
    assert this.meter.throttle == 0
    assert told(capsys) == []


def test_without_sinks_and_frames(looks: Callable[..., Looks]) -> None:
    assert looks()(0, cpu_seconds=100) == 1


def test_a_full_ring_doubles_the_interval_until_it_is_empty(
    looks: Callable[..., Looks], capsys: pytest.CaptureFixture[str]
) -> None:
    full, other = sink("full"), sink("other")
    this = looks(other, full)
    full.ring.push(bytes(870), 1, 0)
    assert full.ring.used_ratio > 0.90
    assert [this() for _ in range(30)] == [2] * 30
    assert this.meter.throttle == 0.5
    assert told(capsys) == [("agent holds back", "ring", 0.5)]
    full.ring.claim(bytearray())
    full.ring.settle(1)
    assert [this() for _ in range(30)] == [1] * 30
    assert this.meter.throttle == 0
    assert told(capsys) == [("agent keeps its interval again", None, None)]


def test_it_looks_once_a_second(looks: Callable[..., Looks]) -> None:
    full = sink()
    this = looks(full)
    assert this() == 1
    full.ring.push(bytes(870), 1, 0)
    assert [this(seconds=0.125) for _ in range(7)] == [1] * 7
    assert this(seconds=0.125) == 2


def test_drops_hold_back_until_twenty_looks_later(
    looks: Callable[..., Looks], capsys: pytest.CaptureFixture[str]
) -> None:
    lossy, fine = sink("lossy", when_full=WhenFull.DROP_NEWEST), sink("fine")
    this = looks(fine, lossy)
    for number in range(95):
        lossy.ring.push(b"", number, 0)
        lossy.ring.claim(bytearray())
        lossy.ring.settle(1)
    for number in range(5):
        lossy.ring.push(bytes(2000), number, 0)
    assert this() == 1  # 5 of 100 are not above 5 %
    lossy.ring.push(bytes(2000), 101, 0)
    assert this() == 4
    assert this.meter.throttle == 0.7
    logged = events(capsys)
    assert [line["event"] for line in logged] == ["sink loses frames", "agent holds back"]
    assert (logged[0]["sink"], logged[0]["dropped_frames"]) == ("lossy", {"full": 5})
    assert (logged[1]["cause"], logged[1]["throttle_ratio"]) == ("drops", 0.7)
    ticks = [this() for _ in range(20)]
    assert ticks[-1] == 1
    assert 17 <= ticks.count(4) <= 19
    assert told(capsys) == [("agent keeps its interval again", None, None)]


def test_drops_are_those_of_the_latest_frames(looks: Callable[..., Looks]) -> None:
    """However many went through before."""
    worker = sink()
    worker.ring.pushed = worker.ring.taken = 1_000_000
    this = looks(worker)
    assert [this() for _ in range(25)] == [1] * 25
    worker.ring.push(bytes(2000), 1, 0)
    assert this() == 4


def test_a_sinks_losses_are_told_once_an_episode_with_their_reasons(
    looks: Callable[..., Looks], capsys: pytest.CaptureFixture[str]
) -> None:
    lossy = sink(size=1024)
    this = looks(lossy)
    for episode in (1, 2):
        for _ in range(60):
            for number in range(10):
                lossy.ring.push(bytes(300), number, 0)
            this()
        lossy.ring.drop_held(Drop.AGED)
        for _ in range(25):
            this()
        lines = [line for line in events(capsys) if line["event"] == "sink loses frames"]
        assert [line["dropped_frames"] for line in lines] == [{"full": 8}], episode


def test_losses_of_a_refusing_peer_hold_back_too(
    looks: Callable[..., Looks], capsys: pytest.CaptureFixture[str]
) -> None:
    worker = SinkWorker(config(ScriptedSink(then=RejectedError("no"))), Log("error"), lambda: None)
    worker.open()
    this = looks(worker)
    worker.ring.push(b"1", 1, 0)
    worker.ring.close()
    worker.start()
    worker._thread.join(60)
    assert this() == 4
    assert events(capsys)[0]["dropped_frames"] == {"rejected": 1}


def test_memory_above_its_limit(looks: Callable[..., Looks], capsys: pytest.CaptureFixture[str]) -> None:
    this = looks(max_memory=Size(1 << 20))  # no Python is as small
    assert [this(), this()] == [5, 5]
    assert this.meter.throttle == 0.8
    assert told(capsys) == [("agent holds back", "memory", 0.8)]


def test_memory_that_grows_and_shrinks(looks: Callable[..., Looks]) -> None:
    this = looks()
    resident = this.restraint._memory.resident_bytes()
    this.restraint._settings = AgentSettings(max_memory=Size(int(resident) + (32 << 20)))
    assert this() == 1
    ballast = bytearray(b"x") * (64 << 20)
    assert this() == 5
    assert ballast
    del ballast
    assert this() == 1


def test_cpu_asks_for_the_interval_that_keeps_it_at_its_limit(
    looks: Callable[..., Looks], capsys: pytest.CaptureFixture[str]
) -> None:
    """And a figure that is another one at each look is no line at each look."""
    this = looks(max_cpu_ratio=0.1)
    assert this(cpu_seconds=0.1) == 1
    ticks = [this(cpu_seconds=0.4 + number / 1000) for number in range(40)]
    assert ticks[-1] == 5
    assert this.meter.throttle == pytest.approx(1 - 0.1 / 0.43, abs=0.01)
    assert ticks == sorted(ticks)
    assert [line[:2] for line in told(capsys)] == [("agent holds back", "cpu")]
    ticks = [this(cpu_seconds=0.05) for _ in range(30)]
    assert ticks[-1] == 1
    assert told(capsys) == [("agent keeps its interval again", None, None)]


def test_cpu_is_a_part_of_the_configured_interval(looks: Callable[..., Looks]) -> None:
    """What a frame costs, not what a second does: else it would swing."""
    this = looks(max_cpu_ratio=0.1, interval=Duration(0.1))
    assert this(10, cpu_seconds=0.1) == 1  # 10 frames of 10 ms
    assert [this(5, cpu_seconds=0.1) for _ in range(30)][-1] == 2  # 20 ms
    assert [this(5, cpu_seconds=0.1) for _ in range(30)] == [2] * 30


def test_the_cpu_of_this_process_is_measured() -> None:
    meter = CycleMeter()
    settings = AgentSettings(max_memory=PLENTY, max_cpu_ratio=1e-9)
    restraint = Restraint(settings, meter, [], Log("error"), lambda: time.monotonic_ns() * 10**6)
    meter.frames = 1
    sum(range(100_000))
    assert restraint.ticks() == 10
    assert meter.throttle == 0.9
    restraint.close()


def test_a_change_of_the_cause_is_told(looks: Callable[..., Looks], capsys: pytest.CaptureFixture[str]) -> None:
    full = sink()
    this = looks(full)
    full.ring.push(bytes(870), 1, 0)
    this()
    this.restraint._settings = AgentSettings(max_memory=Size(1 << 20))
    this()
    this.restraint._settings = AgentSettings(max_memory=PLENTY)
    this()
    assert told(capsys) == [
        ("agent holds back", "ring", 0.5),
        ("agent holds back", "memory", 0.8),
        ("agent holds back", "ring", 0.5),
    ]


def test_a_file_is_no_memory_of_the_agents(looks: Callable[..., Looks], tmp_path: Path) -> None:
    worker = sink(size=16 << 20, path=tmp_path / "ring")
    worker.ring.push(bytes(12 << 20), 1, 0)
    this = looks(worker)
    assert this.restraint._strain().resident_bytes <= this.restraint._memory.resident_bytes() - (12 << 20)
    worker.ring.unmap()


def test_a_ring_in_memory_counts_beside_one_in_a_file(looks: Callable[..., Looks], tmp_path: Path) -> None:
    in_memory, in_file = sink(size=64 << 20), sink(size=128 << 20, path=tmp_path / "ring")
    this = looks(in_memory, in_file)
    before = this.restraint._strain().resident_bytes
    in_memory.ring.populate()
    in_file.ring.populate()
    assert 0.95 * (64 << 20) < this.restraint._strain().resident_bytes - before < 1.9 * (64 << 20)
    in_file.ring.unmap()


def test_a_large_file_hides_no_memory(looks: Callable[..., Looks], tmp_path: Path) -> None:
    """Of a ring's file only what is present counts, and next to nothing of this one is."""
    worker = sink(size=1 << 30, path=tmp_path / "ring")
    this = looks(worker)
    strain = this.restraint._strain()
    assert 0 < strain.resident_bytes < this.restraint._memory.resident_bytes()
    worker.ring.unmap()


def test_held_back_the_agent_says_so_and_its_ticks_stay_on_the_grid(
    looks: Callable[..., Looks], tmp_path: Path
) -> None:
    """As `run` does it, with a ring that is full from the fourth frame to the eighth."""
    exporter = Exporter([file_config(tmp_path / "out")], Log("error"))
    exporter.open()
    exporter.start(lambda: None)
    full = sink()
    this = looks(full)
    meters = [ProbeMeter("agent")]
    probe = AgentProbe(this.meter, meters, exporter.workers)
    serializer = JsonSerializer(probe.tables, Identity("h", "i", {}))
    log = Log("error")
    serializers = {("json", "hostprobe", ()): serializer}
    cycle = Cycle([ScheduledProbe(probe, meters[0])], this.meter, serializers, exporter, log)
    wall_ns = 1_795_217_860 * 10**9
    schedule = Schedule(10**10, True, lambda: this.now_ns, lambda: wall_ns + this.now_ns)
    ticks = []
    for number in range(1, 13):
        this.now_ns += round(schedule.seconds_left() * 1e9)
        ticks.append(schedule.tick)
        cycle.run(schedule.tick)
        if number == 4:
            full.ring.push(bytes(870), 1, 0)
        if number == 8:
            full.ring.drop_held(Drop.FULL)
            full.ring.drops[Drop.FULL] = 0
        this.now_ns += 10**9
        assert schedule.advance(this.restraint.ticks()) == 0
    exporter.close(60)
    cycle.close()
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert steps == [1, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1]
    lines = [json.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()]
    assert [line["agent"]["throttle_ratio"] for line in lines] == [0] * 4 + [0.5] * 4 + [0] * 4


def test_a_sink_error_alone_is_no_strain(looks: Callable[..., Looks]) -> None:
    worker = SinkWorker(config(ScriptedSink(SinkError("busy"))), Log("error"), lambda: None)
    worker.open()
    this = looks(worker)
    worker.ring.push(b"1", 1, 0)
    worker.ring.close()
    worker.start()
    worker._thread.join(60)
    assert this() == 1
