"""The schedule with clocks of its own, and the cycle with small real probes and a real sink."""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cycle import WARM_UP_CYCLES, Cycle, Schedule, ScheduledProbe
from agent.errors import ProbeError
from agent.exporter import Exporter
from agent.frame import Frame
from agent.logs import Log
from agent.serializers.document import Identity
from agent.serializers.json_lines import JsonSerializer
from agent.sink_worker import SinkConfig
from agent.sinks.file import FileSettings, FileSink
from agent.table import TableSpec, counter, gauge, rate
from agent.telemetry import CycleMeter, ProbeMeter
from probes.probe import ProbeSettings

SECOND = 1_000_000_000
PATIENCE_SECONDS = 60


class Clocks:
    """A monotonic and a wall clock that stand still unless they are moved."""

    def __init__(self, monotonic_ns: int = 5_000 * SECOND + 123, wall_ns: int = 1_795_217_867 * SECOND + 456) -> None:
        self.now_ns = monotonic_ns
        self.wall_ns = wall_ns

    def pass_ns(self, nanoseconds: int) -> None:
        self.now_ns += nanoseconds
        self.wall_ns += nanoseconds

    def schedule(self, interval_ns: int, align: bool) -> Schedule:
        return Schedule(interval_ns, align, lambda: self.now_ns, lambda: self.wall_ns)

    def sleep_until_due(self, schedule: Schedule, most_late_ns: int = 0) -> None:
        """Sleeps as `run` does, and is woken late by up to `most_late_ns`."""
        while (left := schedule.seconds_left()) > 0:
            self.pass_ns(max(1, round(left * 1e9)) + (random.randrange(most_late_ns) if most_late_ns else 0))


@pytest.mark.parametrize("align", [False, True])
def test_a_million_ticks_do_not_drift(align: bool) -> None:
    """Cycles of any length below the interval, and a sleep that is always a bit late."""
    random.seed(1)
    clocks = Clocks()
    interval = 250_000_007
    schedule = clocks.schedule(interval, align)
    clocks.sleep_until_due(schedule)
    first_ns, first_tick = clocks.now_ns, schedule.tick
    worst = 0
    for number in range(1_000_000):
        late_ns = clocks.now_ns - (first_ns + number * interval)
        worst = max(worst, late_ns)
        assert late_ns >= 0
        assert schedule.tick == first_tick + number
        clocks.pass_ns(random.randrange(interval // 2))
        assert schedule.advance() == 0
        clocks.sleep_until_due(schedule, 60_000)
    assert worst < 120_000  # the one sleep's lateness, not the sum of a million


def test_without_alignment_the_first_tick_is_now() -> None:
    clocks = Clocks()
    schedule = clocks.schedule(10 * SECOND, align=False)
    assert (schedule.seconds_left(), schedule.tick) == (0.0, 0)


@pytest.mark.parametrize("interval_ns", [250_000_000, SECOND, 10 * SECOND, 60 * SECOND])
def test_aligned_ticks_fall_on_multiples(interval_ns: int) -> None:
    clocks = Clocks()
    schedule = clocks.schedule(interval_ns, align=True)
    for _ in range(20):
        clocks.sleep_until_due(schedule)
        assert clocks.wall_ns % interval_ns < 1000  # the float of seconds
        assert schedule.tick == clocks.wall_ns // interval_ns
        clocks.pass_ns(interval_ns // 7)
        assert schedule.advance() == 0


def test_aligned_at_a_multiple_the_first_tick_is_now() -> None:
    clocks = Clocks(wall_ns=170 * SECOND)
    schedule = clocks.schedule(10 * SECOND, align=True)
    assert (schedule.seconds_left(), schedule.tick) == (0.0, 17)


@pytest.mark.parametrize(
    ("intervals", "missed"),
    [
        (0.0, 0),
        (0.5, 0),
        (0.999, 0),
        (1.0, 0),
        (1.001, 1),
        (1.5, 1),
        (2.0, 1),
        (2.001, 2),
        (10.5, 10),
        (8640.0, 8639),
    ],
)
@pytest.mark.parametrize("align", [False, True])
def test_an_overrun_is_skipped_and_counted(intervals: float, missed: int, align: bool) -> None:
    clocks = Clocks(wall_ns=170 * SECOND)
    schedule = clocks.schedule(10 * SECOND, align)
    first = schedule.tick
    clocks.pass_ns(round(intervals * 10 * SECOND))
    assert schedule.advance() == missed
    assert schedule.tick == first + missed + 1
    left = (missed + 1) * 10 - intervals * 10  # the tick that comes is one of the old grid, in the future
    assert schedule.seconds_left() == pytest.approx(left, abs=1e-6)
    assert 0 <= schedule.seconds_left() <= 10


@pytest.mark.parametrize(
    ("ticks", "intervals", "steps", "missed"),
    [
        (2, 0.1, 2, 0),
        (2, 1.9, 2, 0),  # longer than an interval, but there was none to be missed
        (2, 2.0, 2, 0),
        (2, 2.1, 3, 1),
        (4, 0.0, 4, 0),
        (10, 9.5, 10, 0),
        (10, 12.5, 13, 3),
    ],
)
@pytest.mark.parametrize("align", [False, True])
def test_held_back_the_next_tick_is_some_intervals_later(
    ticks: int, intervals: float, steps: int, missed: int, align: bool
) -> None:
    clocks = Clocks(wall_ns=170 * SECOND)
    schedule = clocks.schedule(10 * SECOND, align)
    first = schedule.tick
    clocks.pass_ns(round(intervals * 10 * SECOND))
    assert schedule.advance(ticks) == missed
    assert schedule.tick == first + steps
    assert schedule.seconds_left() == pytest.approx((steps - intervals) * 10, abs=1e-6)


def test_held_back_hosts_still_sample_together() -> None:
    """Every deadline lies on the grid, whatever the ticks between, and the clock's small steps meanwhile."""
    random.seed(3)
    clocks = Clocks()
    schedule = clocks.schedule(10 * SECOND, align=True)
    for _ in range(500):
        clocks.sleep_until_due(schedule)
        assert clocks.wall_ns % (10 * SECOND) < 1000
        assert schedule.tick == clocks.wall_ns // (10 * SECOND)
        clocks.pass_ns(SECOND)
        clocks.wall_ns += random.choice((0, 0, 500_000_000, -500_000_000))
        before = schedule.tick
        ticks = random.choice((1, 2, 5, 10))
        assert schedule.advance(ticks) == 0
        assert schedule.tick == before + ticks


def test_missed_and_run_ticks_are_all_ticks() -> None:
    random.seed(2)
    clocks = Clocks()
    schedule = clocks.schedule(SECOND, align=False)
    start_ns = clocks.now_ns
    run = missed = 0
    while clocks.now_ns - start_ns < 20_000 * SECOND:
        clocks.sleep_until_due(schedule)
        assert schedule.tick == run + missed
        assert clocks.now_ns - start_ns - schedule.tick * SECOND < 1000
        run += 1
        clocks.pass_ns(random.choice((SECOND // 10, SECOND // 2, SECOND * 3 // 2, 4 * SECOND + 1)))
        missed += schedule.advance()
    assert missed > 0
    assert run + missed == schedule.tick


@pytest.mark.parametrize("step_seconds", [3600, 86_400 * 365, -3600, -86_400 * 365, 7, -7])
def test_a_wall_clock_that_is_set_is_followed(step_seconds: int) -> None:
    clocks = Clocks(wall_ns=1_000_000_000 * SECOND)
    schedule = clocks.schedule(10 * SECOND, align=True)
    for _ in range(3):
        clocks.sleep_until_due(schedule)
        clocks.pass_ns(SECOND)
        schedule.advance()
    clocks.wall_ns += step_seconds * SECOND
    assert 0 < schedule.seconds_left() <= 10  # never an hour's sleep, nor an hour of ticks in a burst
    for _ in range(3):
        clocks.sleep_until_due(schedule)
        assert clocks.wall_ns % (10 * SECOND) < 1000
        assert schedule.tick == clocks.wall_ns // (10 * SECOND)
        clocks.pass_ns(SECOND)
        assert schedule.advance() == 0


@pytest.mark.parametrize("step_seconds", [3600, -3600])
def test_without_alignment_the_wall_clock_does_not_matter(step_seconds: int) -> None:
    clocks = Clocks()
    schedule = clocks.schedule(10 * SECOND, align=False)
    schedule.advance()
    clocks.wall_ns += step_seconds * SECOND
    assert schedule.seconds_left() == 10
    assert schedule.tick == 1


def test_a_slewed_wall_clock_changes_nothing() -> None:
    """A correction far below the interval must not give a tick twice or skip one."""
    clocks = Clocks(wall_ns=1_000_000_000 * SECOND)
    schedule = clocks.schedule(10 * SECOND, align=True)
    ticks = []
    for _ in range(100):
        clocks.sleep_until_due(schedule)
        ticks.append(schedule.tick)
        clocks.pass_ns(SECOND)
        clocks.wall_ns += 500_000
        schedule.advance()
    assert ticks == list(range(ticks[0], ticks[0] + 100))


# --- which probe is due -----------------------------------------------------------------

NUMBERS = TableSpec(
    "numbers",
    "Counted up by every collection.",
    counter("events_total", "events", "."),
    gauge("level", "events", "."),
    rate("events_per_second", "events/second", ".", "events_total"),
)
ROWS = TableSpec("rows", "A row for each name.", counter("events_total", "events", "."), labels=("name",), rows=4)
OTHER = TableSpec("other", "Another probe's.", gauge("level", "events", "."))


class NumbersProbe:
    """Two tables; fails, the first one half filled, as long as `error` is set."""

    Settings = ProbeSettings
    tables = (NUMBERS, ROWS)

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.events = 0
        self.closed = 0
        self.labels = [("a",), ("b",), ("c",)]
        self.notices: list[str] = []

    def collect(self, frame: Frame) -> None:
        self.events += 100
        table = frame.open(NUMBERS)
        table.put_counters(0, (self.events,))
        if self.error is not None:
            raise self.error
        table.put_gauges(0, (1.5,))
        rows = frame.open(ROWS)
        rows.claim(self.labels)
        for row in range(len(self.labels)):
            rows.put_counters(row, (self.events + row,))

    def close(self) -> None:
        self.closed += 1


class OtherProbe:
    Settings = ProbeSettings
    tables = (OTHER,)

    def collect(self, frame: Frame) -> None:
        frame.open(OTHER).put_gauges(0, (frame.sequence,))

    def close(self) -> None: ...


def due_ticks(every: int, ticks: list[int]) -> list[int]:
    scheduled = ScheduledProbe(OtherProbe(), ProbeMeter("other"), every)
    return [tick for tick in ticks if scheduled.is_due(tick)]


def test_every_tick() -> None:
    assert due_ticks(1, [0, 1, 2, 3]) == [0, 1, 2, 3]
    assert due_ticks(1, [1_795_217_867, 1_795_217_868]) == [1_795_217_867, 1_795_217_868]


@pytest.mark.parametrize(
    ("ticks", "due"),
    [
        (range(10), [0, 3, 6, 9]),
        (range(100, 110), [100, 102, 105, 108]),  # at once, then at multiples
        ([0, 1, 2, 4, 5, 6, 7], [0, 4, 6]),  # 3 was skipped: at the next one
        ([0, 1, 11, 12, 13, 15], [0, 11, 12, 15]),  # more than one multiple was skipped: once
        ([100, 101, 102, 50, 51, 52, 53, 54], [100, 102, 50, 51, 54]),  # the clock was set back
        ([100, 101, 102, 103, 102, 103, 104, 105], [100, 102, 102, 105]),  # set back by little
        ([6, 7, 1_000_000, 1_000_001, 1_000_002], [6, 1_000_000, 1_000_002]),  # set forwards
    ],
)
def test_every_third_tick(ticks: Any, due: list[int]) -> None:
    assert due_ticks(3, list(ticks)) == due


@pytest.mark.parametrize("every", [1, 2, 5, 60])
def test_a_probe_is_never_late_by_more_than_a_skip(every: int) -> None:
    """With ticks skipped at random, a due tick always lies in each period in which there was a tick."""
    random.seed(every)
    ticks, tick = [], 0
    for _ in range(5000):
        tick += random.choice((1, 1, 1, 2, 7))
        ticks.append(tick)
    due = due_ticks(every, ticks)
    assert {tick // every for tick in due} == {tick // every for tick in ticks}


# --- the cycle --------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[None]:
    """The warm-up freezes the collector for the process: back to what it was."""
    threshold = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*threshold)


class Run:
    """A cycle over the two probes, into a file."""

    def __init__(self, path: Path, every: int = 1) -> None:
        self.path = path
        self.numbers = NumbersProbe()
        self.meters = [ProbeMeter("numbers"), ProbeMeter("other")]
        self.meter = CycleMeter()
        settings = FileSettings(type="file", path=str(path))
        log = Log("info", "json")
        self.exporter = Exporter([SinkConfig("file", FileSink(settings), settings)], log)
        self.exporter.open()
        self.exporter.start(lambda: None)
        serializer = JsonSerializer([NUMBERS, ROWS, OTHER], Identity("h", "i", {}))
        self.cycle = Cycle(
            [
                ScheduledProbe(self.numbers, self.meters[0], every),
                ScheduledProbe(OtherProbe(), self.meters[1]),
            ],
            self.meter,
            {("json", "hostprobe", tables): serializer for tables in ((), ("rows",), ("numbers",), ("other",))},
            self.exporter,
            log,
        )
        self.tick = 0

    def __call__(self, cycles: int = 1) -> None:
        for _ in range(cycles):
            self.cycle.run(self.tick)
            self.tick += 1

    def flush(self) -> None:
        """Waits until the sink has everything."""
        (worker,) = self.exporter.workers
        deadline = time.monotonic() + PATIENCE_SECONDS
        while worker.frames[2]:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def lines(self) -> list[dict[str, Any]]:
        self.flush()
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]


@pytest.fixture
def run(tmp_path: Path, collector: None) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def make(every: int = 1) -> Run:
        runs.append(Run(tmp_path / "out", every))
        return runs[-1]

    yield make
    for made in runs:
        made.exporter.close(PATIENCE_SECONDS)
        made.cycle.close()


def logged(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str | None]]:
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [(line["event"], line.get("reason")) for line in lines]


def test_every_cycle_is_a_line(run: Callable[..., Run]) -> None:
    this = run()
    before_ns = time.time_ns()
    this(5)
    after_ns = time.time_ns()
    lines = this.lines()
    assert [line["sequence"] for line in lines] == [1, 2, 3, 4, 5]
    stamps = [line["time_unix_ns"] for line in lines]
    assert before_ns <= stamps[0]
    assert stamps == sorted(stamps)
    assert stamps[-1] <= after_ns
    assert [line["numbers"]["events_total"] for line in lines] == [100, 200, 300, 400, 500]
    assert lines[0]["interval_seconds"] is None
    assert all(line["interval_seconds"] > 0 for line in lines[1:])
    assert this.meter.frames == 5
    assert this.meter.payload_bytes == this.exporter.workers[0].sent_bytes
    assert this.meter.payload_bytes + 5 == this.path.stat().st_size  # and five line feeds
    assert this.meter.cycle_seconds > 0
    assert all(meter.seconds > 0 and meter.up == 1.0 for meter in this.meters)


def test_each_sink_has_its_tables_from_one_frame(run: Callable[..., Run], tmp_path: Path) -> None:
    """Written once for those that want the same; the next sink's line is longer, or shorter, than the one before."""
    this = run()
    log = Log("info", "json")
    configs = []
    for name, tables in (("rows", ("rows",)), ("all", ()), ("other", ("other",)), ("again", ())):
        settings = FileSettings(type="file", path=str(tmp_path / name), tables=tables)
        configs.append(SinkConfig(name, FileSink(settings), settings))
    exporter = Exporter(configs, log)
    exporter.open()
    this.cycle._exporter = exporter
    this(3)
    assert this.meter.payload_bytes == sum(worker.ring.held_bytes for worker in exporter.workers[:3])
    exporter.start(lambda: None)
    exporter.close(PATIENCE_SECONDS)
    lines = {
        worker.name: [json.loads(line) for line in (tmp_path / worker.name).read_bytes().splitlines()]
        for worker in exporter.workers
    }
    assert lines["again"] == lines["all"]
    for number, line in enumerate(lines["all"]):
        assert line.keys() > {"numbers", "rows", "other"}
        for name in ("rows", "other"):
            alone = lines[name][number]
            assert alone == {key: value for key, value in line.items() if key in alone}
            assert alone.keys() & {"numbers", "rows", "other"} == {name}
    buffers = this.cycle.buffers
    assert (buffers.made, buffers.regrown, buffers.out_count) == (1, 0, 0)


def test_a_frame_that_cannot_be_written_loses_no_buffer(run: Callable[..., Run]) -> None:
    this = run()
    this.cycle.serializers = {}
    with pytest.raises(KeyError):
        this()
    assert this.cycle.buffers.out_count == 0


def test_all_tables_of_a_frame_have_one_stamp(run: Callable[..., Run]) -> None:
    this = run()
    this.cycle.collect(0)
    frame = this.cycle.frame
    assert list(frame.tables) == ["numbers", "rows", "other"]
    assert {table.monotonic_ns for table in frame.tables.values()} == {frame.monotonic_ns}


def test_rates_count_from_the_frame_before(run: Callable[..., Run]) -> None:
    this = run()
    this(3)
    first, *others = this.lines()
    assert first["numbers"]["events_per_second"] is None
    for line in others:
        assert line["numbers"]["events_per_second"] == pytest.approx(100 / line["interval_seconds"])


def test_what_a_probe_says_is_logged_once(run: Callable[..., Run], capsys: pytest.CaptureFixture[str]) -> None:
    this = run()
    this()
    this.numbers.notices += ["no rights", "no time"]
    this(3)
    assert logged(capsys) == [("probe says", "no rights"), ("probe says", "no time")]


@pytest.mark.parametrize("error", [ProbeError("no stat"), ZeroDivisionError("oh"), AssertionError()])
def test_a_failing_probe_is_isolated_counted_and_logged_once_an_episode(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    this = run()
    this(2)
    assert logged(capsys) == []
    for episode in (1, 2):
        this.numbers.error = error
        this(4)
        assert (this.meters[0].failures, this.meters[0].up) == (4 * episode, 0.0)
        assert this.meters[0].seconds > 0
        assert logged(capsys) == [("probe fails", f"{type(error).__name__}: {error}")]
        this.numbers.error = None
        this(3)
        assert (this.meters[0].failures, this.meters[0].up) == (4 * episode, 1.0)
        assert logged(capsys) == [("probe works again", None)]
    assert (this.meters[1].failures, this.meters[1].up) == (0, 1.0)
    assert this.meter.probe_failures == 8
    lines = this.lines()
    assert [line["sequence"] for line in lines] == list(range(1, 17))
    failed = [False] * 2 + ([True] * 4 + [False] * 3) * 2
    for line, absent in zip(lines, failed, strict=True):
        assert ("numbers" not in line, "rows" not in line) == (absent, absent)
        assert line["other"]["level"] == line["sequence"]
    # The first good one has a rate again: over the time since the last good one, five collections of 100 ago.
    rate_again = lines[6]["numbers"]["events_per_second"]
    assert rate_again == pytest.approx(500 / sum(line["interval_seconds"] for line in lines[2:7]))
    assert all(line["numbers"]["events_per_second"] > 0 for line in (lines[7], lines[8], lines[14]))


def test_failures_make_no_array(run: Callable[..., Run]) -> None:
    this = run()
    for _ in range(50):
        this.numbers.error = ValueError("no")
        this(1)
        this.numbers.error = None
        this(1)
    arena = this.cycle.frame.arena
    assert (arena.made, arena.regrown) == (1, 0)


def test_a_probe_that_is_not_due_is_absent(run: Callable[..., Run]) -> None:
    this = run(every=3)
    this(8)
    lines = this.lines()
    assert [line["sequence"] for line in lines if "numbers" in line] == [1, 4, 7]
    assert [line["sequence"] for line in lines if "rows" in line] == [1, 4, 7]
    assert all("other" in line for line in lines)
    assert lines[3]["numbers"]["events_per_second"] is not None
    seconds = sum(line["interval_seconds"] for line in lines[1:4])
    assert lines[3]["numbers"]["events_per_second"] == pytest.approx(100 / seconds)


def test_collect_without_a_tick_takes_all(run: Callable[..., Run]) -> None:
    this = run(every=3)
    for _ in range(4):
        this.cycle.collect()
        assert list(this.cycle.frame.tables) == ["numbers", "rows", "other"]


def test_close_closes_the_probes(run: Callable[..., Run]) -> None:
    this = run()
    this(2)
    this.cycle.close()
    assert this.numbers.closed == 1


def test_the_warm_up_takes_the_start_out_of_the_collectors_sight(run: Callable[..., Run]) -> None:
    this = run()
    frozen = gc.get_freeze_count()
    this(WARM_UP_CYCLES - 1)
    assert gc.get_freeze_count() == frozen
    this(1)
    assert gc.get_freeze_count() > frozen
    assert gc.isenabled()


def test_the_steady_state_makes_nothing_that_stays(run: Callable[..., Run]) -> None:
    """2,000 cycles: no collector run, no buffer or array made or grown, no net memory."""
    this = run(every=2)
    gc.collect()  # it empties CPython's free lists, which count as allocated: they fill up again here
    this(3000)
    this.flush()
    buffers, arena = this.cycle.buffers, this.cycle.frame.arena
    made = buffers.made, buffers.regrown, buffers.let_go, arena.made, arena.regrown
    runs = collector_runs()
    blocks = sys.getallocatedblocks()
    this(2000)
    this.flush()
    assert sys.getallocatedblocks() - blocks < 50
    assert collector_runs() == runs
    assert (buffers.made, buffers.regrown, buffers.let_go, arena.made, arena.regrown) == made
    assert this.cycle.buffers.made == 1
    assert this.exporter.workers[0].frames == (5000, 0, 0)


def test_many_rows_do_not_wake_the_collector(run: Callable[..., Run]) -> None:
    """While it is serialized, a frame of 1,000 rows is thousands of container objects."""
    this = run()
    this.numbers.labels = [(f"row{number}",) for number in range(1000)]
    this(WARM_UP_CYCLES + 2)
    runs = collector_runs()
    this(50)
    assert collector_runs() == runs


def collector_runs() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())
