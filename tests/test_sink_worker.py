"""One sink's worker: batches, retries, rejections, the breaker, the end; with a scripted sink and real rings."""

from __future__ import annotations

import gc
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from agent.delivery import Breaker, Circuit, Drop
from agent.errors import RejectedError, SinkClosedError, SinkError, UsageError
from agent.ring_records import need
from agent.sink_worker import SinkWorker
from agent.sinks.http import HttpSettings, HttpSink
from tests.workers import (
    PATIENCE_SECONDS,
    Clock,
    PickySink,
    ScriptedSink,
    accounted,
    config,
    drain,
    events,
    opened,
    put,
    until,
)


def lines(first: int, last: int, width: int = 0) -> list[bytes]:
    return [b"%0*d" % (width, number) for number in range(first, last + 1)]


def sizes(sink: ScriptedSink) -> list[int]:
    return [len(batch) for batch in sink.batches]


def given_up(worker: SinkWorker) -> dict[str, int]:
    return {reason.word: worker.ring.drops[reason] for reason in Drop if worker.ring.drops[reason]}


def circuits(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line["circuit"] for line in events(capsys) if line["event"] == "sink's circuit"]


# Batches


def test_a_fixed_batch() -> None:
    sink = ScriptedSink()
    worker = opened(sink, records=7)
    put(worker, 1, 30)
    drain(worker)
    assert sizes(sink) == [7, 7, 7, 7, 2]
    assert sink.taken == lines(1, 30)
    assert worker.frames == (30, 0, 0)
    assert worker.sent_bytes == sum(map(len, lines(1, 30)))


def test_a_batch_has_at_most_so_many_bytes() -> None:
    sink = ScriptedSink()
    worker = opened(sink, records=100, bytes=1000)
    put(worker, 1, 25, width=100)
    put(worker, 26, 26, width=5000)  # alone, whatever its size
    put(worker, 27, 28, width=100)
    drain(worker)
    assert sizes(sink) == [10, 10, 5, 1, 2]
    assert sink.taken == lines(1, 25, 100) + lines(26, 26, 5000) + lines(27, 28, 100)


def test_an_adaptive_batch_grows_with_the_rings_fill() -> None:
    """A full ring is emptied in the largest batches, then the middle, kept down to a quarter, then the smallest."""
    sink = ScriptedSink()
    worker = opened(sink, size=need(80) * 400, min=10, max=50)
    seen: list[float] = []
    sink.before = lambda: seen.append(worker.ring.used_ratio)
    put(worker, 1, 400, width=80)
    assert worker.ring.used_ratio == 1
    drain(worker)
    assert sink.taken == lines(1, 400, 80)
    assert sizes(sink) == [50, 50, 30, 30, 30, 30, 30, 30, 30, *[10] * 9]
    for used, size in zip(seen, sizes(sink), strict=True):
        assert size == (50 if used > 0.75 else 30 if used >= 0.25 else 10)


def test_linger_collects_what_comes_meanwhile() -> None:
    """The first waits for others, for longer than any test: the batch goes when it is full, or at the end."""
    sink = ScriptedSink()
    worker = opened(sink, records=5, linger=3600)
    worker.start()
    put(worker, 1, 4)
    put(worker, 5, 7)
    until(lambda: worker.frames[0] == 5)
    put(worker, 8, 8)
    worker.finish(time.monotonic() + PATIENCE_SECONDS)
    worker.join()
    assert sizes(sink) == [5, 3]
    assert worker.frames == (8, 0, 0)


def test_linger_ends_with_the_bytes() -> None:
    sink = ScriptedSink()
    worker = opened(sink, records=100, bytes=300, linger=3600)
    worker.start()
    put(worker, 1, 3, width=100)
    until(lambda: worker.frames[0] == 3)
    worker.finish(time.monotonic() + PATIENCE_SECONDS)
    worker.join()
    assert sizes(sink) == [3]


def test_without_linger_a_single_frame_goes_at_once() -> None:
    sink = ScriptedSink()
    worker = opened(sink, records=100)
    worker.start()
    for number in range(1, 4):
        put(worker, number, number)
        until(lambda: worker.frames[0] == number)  # noqa: B023
    worker.finish(time.monotonic() + PATIENCE_SECONDS)
    worker.join()
    assert sizes(sink) == [1, 1, 1]


# Trying again


def test_only_the_rest_is_sent_again_in_order() -> None:
    clock = Clock()
    sink = ScriptedSink(SinkError("cut", 3), SinkError("cut"), SinkError("cut", 5), SinkError("cut", 2))
    worker = opened(sink, clock, records=10)
    put(worker, 1, 12)
    states: list[tuple[int, int, int]] = []
    sink.before = lambda: states.append(worker.frames)
    drain(worker)
    assert sink.taken == lines(1, 12)
    assert sink.batches == [lines(1, 10), lines(4, 10), lines(4, 10), lines(9, 10), lines(11, 12)]
    assert states == [(0, 0, 12), (3, 0, 9), (3, 0, 9), (8, 0, 4), (10, 0, 2)]
    assert (worker.failures, worker.retries, worker.failures_in_a_row) == (4, 4, 0)
    assert worker.sent_bytes == sum(map(len, lines(1, 12)))


@pytest.mark.parametrize("delivered", [3, 4, 1000])
def test_a_sink_that_says_it_delivered_all_and_more(delivered: int) -> None:
    """Nothing is left to send again, and nothing of the next batch is settled with it."""
    sink = ScriptedSink(SinkError("cut", delivered))
    worker = opened(sink, Clock(), records=3)
    put(worker, 1, 5)
    drain(worker)
    assert sink.batches == [lines(1, 3), lines(4, 5)]
    assert worker.frames == (5, 0, 0)


def test_pauses_grow_up_to_the_cap() -> None:
    clock = Clock()
    worker = opened(ScriptedSink(*[SinkError("busy")] * 4), clock, base=0.2, cap=1)
    put(worker, 1, 1)
    drain(worker)
    for pause, most in zip(clock.waits, (0.2, 0.4, 0.8, 1.0), strict=True):
        assert 0 <= pause <= most


@pytest.mark.parametrize(("asked", "least", "most"), [(7.5, 7.5, 7.5), (0.0, 0, 0.1), (None, 0, 0.1)])
def test_a_peer_that_asks_to_be_left_alone_is(asked: float | None, least: float, most: float) -> None:
    clock = Clock()
    worker = opened(ScriptedSink(SinkError("busy", retry_after_seconds=asked)), clock, base=0.1)
    put(worker, 1, 1)
    drain(worker)
    (pause,) = clock.waits
    assert least <= pause <= most


@pytest.mark.parametrize(("asked", "waited"), [(3.0, 10.0), (60.0, 60.0)])
def test_the_longer_of_breaker_and_peer_counts(asked: float, waited: float) -> None:
    clock = Clock()
    worker = opened(ScriptedSink(*[SinkError("busy")] * 4, SinkError("busy", retry_after_seconds=asked)), clock)
    put(worker, 1, 1)
    drain(worker)
    assert clock.waits[4] == pytest.approx(waited)


def test_a_defect_in_a_sink_does_not_end_its_thread(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ScriptedSink(ZeroDivisionError("oh"), SinkError("busy"), KeyError("x"))
    worker = opened(sink, Clock())
    put(worker, 1, 5)
    drain(worker)
    assert sink.taken == lines(1, 5)
    assert (worker.failures, worker.retries, worker.failures_in_a_row) == (3, 3, 0)
    logged = events(capsys)
    assert [line.get("reason") for line in logged] == ["ZeroDivisionError: oh", None]
    assert logged[1]["failures"] == 3


# Rejections


def test_what_is_refused_is_dropped_and_the_next_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Far more rejections than open a circuit: a peer that answers is there."""
    sink = ScriptedSink(RejectedError("400: no such field", 2), *[RejectedError("still no")] * 9)
    worker = opened(sink, Clock(), records=3)
    put(worker, 1, 33)
    drain(worker)
    assert sink.taken == [*lines(1, 2), *lines(31, 33)]
    assert sizes(sink) == [3] * 11  # nothing was sent a second time
    assert worker.frames == (5, 28, 0)
    assert given_up(worker) == {"rejected": 28}
    assert (worker.failures, worker.retries) == (10, 0)
    assert worker.circuit is Circuit.CLOSED
    logged = events(capsys)
    assert [(line["event"], line["reason"]) for line in logged] == [
        ("sink's peer refuses frames, they are dropped", "400: no such field")
    ]


def test_rejections_that_come_and_go_are_told_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    no = RejectedError("no")
    worker = opened(ScriptedSink(no, no, None, RejectedError("again"), no, None), Clock(), records=1)
    put(worker, 1, 6)
    drain(worker)
    assert [line["reason"] for line in events(capsys)] == ["no"]
    assert worker.frames == (2, 4, 0)


@pytest.mark.parametrize(("seconds", "told"), [(30, 1), (61, 2)])
def test_a_peer_that_comes_and_goes_is_told_once_a_minute(
    seconds: int, told: int, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = SinkError("busy")
    errors = [*[busy, None] * 20, SinkError("busy", retry_after_seconds=seconds), None, *[busy, None] * 20]
    worker = opened(ScriptedSink(*errors), Clock(), records=1)
    put(worker, 1, 41)
    drain(worker)
    events_told = [line["event"] for line in events(capsys)]
    assert events_told == ["sink fails, its ring holds the frames", "sink delivers again"] * told
    assert worker.failures == 41


def test_a_peer_that_refuses_after_an_outage_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    """And not that the sink delivers again."""
    no = RejectedError("no")
    worker = opened(ScriptedSink(no, SinkError("away"), no, no), Clock(), records=1)
    put(worker, 1, 3)
    drain(worker)
    assert [line["reason"] for line in events(capsys)] == ["no", "away", "no"]
    assert worker.frames == (0, 3, 0)


def test_a_batch_that_may_go_one_by_one_loses_only_the_bad_ones(capsys: pytest.CaptureFixture[str]) -> None:
    sink = PickySink(lambda payload: int(payload) % 3 == 0, lambda: RejectedError("bad field", each=True))
    worker = opened(sink, Clock(), records=8)
    put(worker, 1, 19)
    drain(worker)
    assert sink.taken == [line for line in lines(1, 19) if int(line) % 3]
    assert sizes(sink) == [8, *[1] * 8, 8, *[1] * 8, 3, *[1] * 3]
    assert worker.frames == (13, 6, 0)
    assert given_up(worker) == {"rejected": 6}
    assert worker.failures == 6  # each refused payload; not the batch, which went through in parts
    assert [line["reason"] for line in events(capsys)] == ["bad field"]


def test_after_a_refused_batch_the_next_goes_whole(capsys: pytest.CaptureFixture[str]) -> None:
    sink = PickySink(lambda payload: int(payload) in (2, 8), lambda: RejectedError("bad", each=True))
    worker = opened(sink, Clock(), records=3)
    put(worker, 1, 9)
    drain(worker)
    assert sizes(sink) == [3, 1, 1, 1, 3, 3, 1, 1, 1]
    assert len(events(capsys)) == 1


def test_a_batch_of_which_one_is_left_is_not_tried_alone() -> None:
    sink = ScriptedSink(RejectedError("bad", 2, each=True))
    worker = opened(sink, Clock(), records=3)
    put(worker, 1, 3)
    drain(worker)
    assert sink.batches == [lines(1, 3)]
    assert worker.frames == (2, 1, 0)


def test_a_refusal_after_all_were_delivered_refuses_nothing() -> None:
    sink = ScriptedSink(RejectedError("bad", each=True), RejectedError("odd", 1))
    worker = opened(sink, Clock(), records=3)
    put(worker, 1, 3)
    drain(worker)
    assert sink.taken == lines(1, 3)
    assert worker.frames == (3, 0, 0)


def test_a_failure_amid_single_ones_tries_the_same_again() -> None:
    sink = ScriptedSink(RejectedError("bad", each=True), None, SinkError("busy"), RejectedError("bad"))
    worker = opened(sink, Clock(), records=3)
    put(worker, 1, 3)
    drain(worker)
    assert sink.batches == [lines(1, 3), lines(1, 1), lines(2, 2), lines(2, 2), lines(3, 3)]
    assert worker.frames == (2, 1, 0)


def test_a_rejection_ends_an_episode_of_failures() -> None:
    clock = Clock()
    worker = opened(ScriptedSink(*[SinkError("busy")] * 4, RejectedError("no"), *[SinkError("busy")] * 4), clock)
    put(worker, 1, 11)
    drain(worker)
    assert worker.failures_in_a_row == 0
    assert worker.frames == (1, 10, 0)
    assert max(clock.waits) < 0.1  # the circuit never opened


# Age


def test_what_is_too_old_is_dropped_and_the_fresh_goes() -> None:
    clock = Clock()
    sink = ScriptedSink()
    worker = opened(sink, clock, records=4, max_age=60)
    put(worker, 1, 6)
    clock.pass_seconds(30)
    put(worker, 7, 10)
    clock.pass_seconds(30)
    put(worker, 11, 12)  # the first six are exactly 60 s old: not older
    clock.pass_seconds(1e-9)
    drain(worker)
    assert sink.taken == lines(7, 12)
    assert sink.batches == [lines(7, 8), lines(9, 12)]
    assert given_up(worker) == {"aged": 6}
    assert worker.frames == (6, 6, 0)


def test_at_its_age_a_frame_is_not_too_old() -> None:
    clock = Clock()
    worker = opened(ScriptedSink(), clock, max_age=60)
    put(worker, 1, 6)
    clock.pass_seconds(60)
    drain(worker)
    assert worker.frames == (6, 0, 0)


def test_a_batch_grows_too_old_while_it_is_tried_again() -> None:
    clock = Clock()
    sink = ScriptedSink(then=SinkError("away"))
    worker = opened(sink, clock, records=4, max_age=60)
    put(worker, 1, 2)
    clock.pass_seconds(20)
    put(worker, 3, 4)
    drain(worker)
    assert given_up(worker) == {"aged": 4}
    assert sink.batches[0] == lines(1, 4)
    assert sink.batches[-1] == lines(3, 4)
    assert 75 < clock.seconds - 1_000_000 < 100


def test_without_an_age_frames_wait_for_ever() -> None:
    clock = Clock()
    worker = opened(ScriptedSink(*[SinkError("away")] * 2000), clock)
    put(worker, 1, 2)
    drain(worker)
    assert clock.seconds - 1_000_000 > 3600
    assert worker.frames == (2, 0, 0)


def test_a_fresh_frame_before_an_old_one_is_not_dropped_for_it() -> None:
    """Stamps of another process lie on this clock by the wall clock, which may have been set back meanwhile."""
    clock = Clock()
    sink = ScriptedSink()
    worker = opened(sink, clock, records=3, max_age=60)
    worker.ring.push(b"fresh", 1, clock())
    worker.ring.push(b"old", 2, clock() - 3600 * 10**9)
    worker.ring.push(b"old", 3, clock() - 3600 * 10**9)
    drain(worker)
    assert b"fresh" in sink.taken
    assert worker.frames == (3, 0, 0)


# The breaker


def test_a_peer_that_is_away_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    sink = ScriptedSink(*[SinkError("away")] * 13)
    worker = opened(sink, clock, base=0.1)
    put(worker, 1, 3)
    times: list[float] = []
    seen: list[Circuit] = []

    def look() -> None:
        times.append(clock.seconds)
        seen.append(worker.circuit)

    sink.before = look
    drain(worker)
    assert sink.taken == lines(1, 3)
    assert seen == [Circuit.CLOSED] * 5 + [Circuit.HALF_OPEN] * 9
    assert times[4] - times[0] <= 1.5  # it opens within 5 s
    for opened_by in (4, 7, 10):
        assert times[opened_by + 1] - times[opened_by] == pytest.approx(10)
    for first in (5, 8, 11):
        assert times[first + 2] - times[first] <= 0.3
    assert circuits(capsys) == ["open", "half-open", "open", "half-open", "open", "half-open", "closed"]
    assert worker.circuit is Circuit.CLOSED
    assert (worker.failures, worker.retries, worker.failures_in_a_row) == (13, 13, 0)


def test_an_outage_is_told_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    worker = opened(ScriptedSink(*[SinkError("away")] * 5), Clock())
    put(worker, 1, 3)
    drain(worker)
    told = [(line["level"], line["event"], line.get("circuit"), line.get("failures")) for line in events(capsys)]
    assert told == [
        ("warning", "sink fails, its ring holds the frames", None, None),
        ("info", "sink's circuit", "open", 5),
        ("info", "sink's circuit", "half-open", None),
        ("info", "sink delivers again", None, 5),
        ("info", "sink's circuit", "closed", None),
    ]


def test_the_circuit_is_that_of_the_moment() -> None:
    """Also while the thread still waits."""
    clock = Clock()
    worker = opened(ScriptedSink(), clock)
    worker.breaker = Breaker(Circuit.OPEN, open_until_seconds=clock.seconds + 10)
    assert worker.circuit is Circuit.OPEN
    clock.pass_seconds(10)
    assert worker.circuit is Circuit.HALF_OPEN


# The reader leaves


def test_a_reader_that_has_gone(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ScriptedSink(None, SinkClosedError("gone", 1))
    worker = opened(sink, Clock(), records=3)
    told: list[str] = []
    worker._on_closed = lambda: told.append("gone")
    put(worker, 1, 9)
    worker.start()
    worker._thread.join(PATIENCE_SECONDS)
    assert told == ["gone"]
    assert worker.reader_gone
    assert worker.frames == (4, 5, 0)
    put(worker, 10, 11)
    assert worker.frames == (4, 7, 0)
    assert given_up(worker) == {"shutdown": 7}
    assert (worker.failures, worker.retries) == (0, 0)
    worker.finish(0)
    worker.join()
    assert len(sink.batches) == 2
    assert sink.closed == 1
    assert events(capsys) == []


# The end


@pytest.fixture
def clock() -> Clock:
    return Clock()


def finish(worker: SinkWorker, clock: Clock, seconds: float) -> None:
    """Ends a worker whose thread starts only now: all of it happens after the stop."""
    worker.finish(clock.seconds + seconds)
    worker.start()
    worker._thread.join(PATIENCE_SECONDS)
    assert not worker._thread.is_alive()
    worker.join()


def test_the_end_delivers_what_is_held(clock: Clock) -> None:
    sink = ScriptedSink()
    worker = opened(sink, clock)
    put(worker, 1, 3000)
    finish(worker, clock, 5)
    assert sink.taken == lines(1, 3000)
    assert worker.frames == (3000, 0, 0)
    assert sink.closed == 1


def test_at_the_end_a_failing_sink_is_tried_again(clock: Clock) -> None:
    sink = ScriptedSink(SinkError("busy"), SinkError("busy", 1), SinkError("busy"), SinkError("busy"))
    worker = opened(sink, clock)
    put(worker, 1, 3)
    finish(worker, clock, 5)
    assert sink.taken == lines(1, 3)
    assert worker.retries == 4
    assert worker.frames == (3, 0, 0)


@pytest.mark.parametrize(("left", "tries", "frames"), [(5.9, 3, (0, 3, 0)), (6.1, 4, (3, 0, 0))])
def test_at_the_end_nothing_is_tried_after_the_deadline(
    clock: Clock, left: float, tries: int, frames: tuple[int, int, int]
) -> None:
    """A peer that asks for two seconds each time; the fourth try would come after six."""
    sink = ScriptedSink(*[SinkError("busy", retry_after_seconds=2)] * 3)
    worker = opened(sink, clock)
    put(worker, 1, 3)
    finish(worker, clock, left)
    assert len(sink.batches) == tries
    assert worker.frames == frames
    assert accounted(worker)


def test_at_the_end_a_circuit_that_opens_ends_it(clock: Clock) -> None:
    """A shutdown is not kept waiting for a peer that is away, however late its deadline."""
    sink = ScriptedSink(then=SinkError("away"))
    worker = opened(sink, clock)
    put(worker, 1, 3)
    finish(worker, clock, 3600)
    assert len(sink.batches) == 5
    assert given_up(worker) == {"shutdown": 3}


@pytest.mark.parametrize("comes_back", [True, False])
def test_at_the_end_an_open_circuit_gets_one_last_try(
    clock: Clock, comes_back: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = ScriptedSink(*[SinkError("away")] * 5, then=None if comes_back else SinkError("away"))
    worker = opened(sink, clock)
    reached = threading.Event()

    class Stopping(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout == pytest.approx(10):
                reached.set()
                return super().wait(PATIENCE_SECONDS)
            return False

    worker._stopping = Stopping()
    put(worker, 1, 30)
    worker.start()
    assert reached.wait(PATIENCE_SECONDS)
    worker.finish(clock.seconds + 5)  # the ten seconds are not over, and don't pass
    worker.join()
    assert worker.frames == ((30, 0, 0) if comes_back else (0, 30, 0))
    assert len(sink.batches) == (8 if comes_back else 6)  # 10 records each
    assert circuits(capsys) == (["open", "closed"] if comes_back else ["open"])
    assert worker.circuit is (Circuit.CLOSED if comes_back else Circuit.OPEN)


def test_a_worker_that_never_started(clock: Clock) -> None:
    sink = ScriptedSink()
    worker = opened(sink, clock)
    put(worker, 1, 3)
    worker.finish(clock.seconds)
    worker.join()
    assert given_up(worker) == {"shutdown": 3}
    assert sink.closed == 1


# A buffer in a file


def test_a_file_keeps_what_was_not_delivered_for_the_next_one(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    first = opened(ScriptedSink(SinkError("away", 2), then=SinkError("away")), clock, path=tmp_path / "ring", records=5)
    put(first, 1, 9)
    finish(first, clock, 3600)
    assert first.frames == (2, 0, 7)
    assert given_up(first) == {}
    assert len(first.sink.batches) == 1  # type: ignore[attr-defined]  # the file has it: no reason to wait
    events(capsys)
    sink = ScriptedSink()
    second = opened(sink, Clock(), path=tmp_path / "ring", records=5)
    assert second.frames == (0, 0, 7)
    put(second, 10, 12)
    finish(second, clock, 5)
    assert sink.taken == lines(3, 12)
    assert second.frames == (10, 0, 0)
    assert (second.ring.pushed, second.ring.recovered) == (3, 7)
    assert [(line["event"], line["frames"]) for line in events(capsys)] == [("buffer recovered", 7)]
    third = opened(ScriptedSink(), clock, path=tmp_path / "ring")
    assert third.frames == (0, 0, 0)
    finish(third, clock, 5)


def test_an_empty_file_is_flushed_at_the_end_and_tells_nothing(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    sink = ScriptedSink()
    worker = opened(sink, clock, path=tmp_path / "ring")
    put(worker, 1, 200)
    finish(worker, clock, 5)
    assert sink.taken == lines(1, 200)
    assert worker.frames == (200, 0, 0)
    assert events(capsys) == []


def test_a_reader_that_has_gone_leaves_the_file(tmp_path: Path, clock: Clock) -> None:
    worker = opened(ScriptedSink(SinkClosedError("gone", 2)), clock, path=tmp_path / "ring")
    put(worker, 1, 9)
    worker.start()
    worker._thread.join(PATIENCE_SECONDS)
    assert worker.frames == (2, 0, 7)
    worker.finish(0)
    worker.join()
    assert worker.frames == (2, 0, 7)


def test_a_file_that_is_damaged_is_told_and_the_worker_starts(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ring").write_bytes(b"no ring at all")
    worker = opened(ScriptedSink(), clock, path=tmp_path / "ring")
    (line,) = events(capsys)
    assert (line["event"], line["sink"]) == ("buffer repaired", "sink")
    assert "is no ring" in line["reason"] or "size" in line["reason"]
    finish(worker, clock, 5)


def test_a_file_that_another_worker_has_is_refused(tmp_path: Path, clock: Clock) -> None:
    worker = opened(ScriptedSink(), clock, path=tmp_path / "ring")
    with pytest.raises(UsageError, match=r"sinks\.sink\.buffer\.path: .*has it open"):
        opened(ScriptedSink(), clock, path=tmp_path / "ring")
    finish(worker, clock, 5)


def test_a_ring_that_memory_has_no_room_for(clock: Clock) -> None:
    with pytest.raises(UsageError, match=r"sinks\.sink\.buffer\.size = .*: expected buffers"):
        opened(ScriptedSink(), clock, size=1 << 60)


def test_check_leaves_a_buffers_file_alone(tmp_path: Path) -> None:
    sink = ScriptedSink()
    path = tmp_path / "ring"
    worker = opened(sink, Clock(), path=path)
    before = path.stat()
    worker.check()  # as another process's `check` does while this one runs
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    finish(worker, Clock(), 5)
    path.unlink()
    worker.check()
    assert not path.exists()
    absent = SinkWorker(config(ScriptedSink(), path=tmp_path / "absent" / "ring"), worker._log, lambda: None)
    with pytest.raises(UsageError, match="its directory is absent: expected a directory to write in"):
        absent.check()


def test_what_a_sink_notices_is_logged(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    sink = ScriptedSink()
    sink.notices = ["its secret can be read by all"]  # type: ignore[attr-defined]
    opened(sink, clock)
    assert [(line["event"], line["reason"]) for line in events(capsys)] == [
        ("sink says", "its secret can be read by all")
    ]


# Latency


def test_one_frame_in_so_many_is_timed(clock: Clock) -> None:
    sink = ScriptedSink()
    sink.before = lambda: clock.pass_seconds(0.001)
    worker = opened(sink, clock, timed_every=100, records=1)
    put(worker, 1, 350)
    drain(worker)
    assert worker.latency._total == 3  # 100, 200 and 300
    (half, most) = worker.latency.quantiles_seconds(0.5, 1.0)
    assert 0.2 <= half <= 0.2 * 1.13
    assert 0.3 <= most <= 0.3 * 1.13


def test_every_frame_is_timed_that_is_delivered_and_our_own(tmp_path: Path, clock: Clock) -> None:
    """Not what was refused; nor what another run has pushed, whose stamp is no reading of this clock."""
    first = opened(ScriptedSink(then=SinkError("away")), clock, path=tmp_path / "ring")
    put(first, 1, 50)
    finish(first, clock, 5)
    second = opened(ScriptedSink(*[None] * 5, RejectedError("no")), clock, path=tmp_path / "ring", records=10)
    second._instance = second.ring._instance = b"j" * 16
    put(second, 1, 30)
    drain(second)
    assert second.frames == (70, 10, 0)
    assert second.latency._total == 20
    second.finish(0)
    second.join()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sink ")]


def test_a_reason_for_every_drop() -> None:
    """The columns of agent_sink stand in this order."""
    assert [reason.word for reason in Drop] == ["full", "aged", "rejected", "damaged", "sampled", "shutdown"]


# All at once


class MoodySink(ScriptedSink):
    """Takes all, some, or nothing, refuses or breaks, by the dice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.dice = random.Random(seed)

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        taken = self.dice.randrange(len(payloads) + 1)
        errors = (
            None,
            None,
            SinkError("some", taken),
            RejectedError("no", taken),
            RejectedError("no", taken, each=True),
            OSError(5, "broken"),
        )
        self.script = [self.dice.choice(errors)]
        super().deliver(payloads)
        assert len(payloads) == len(self.batches.pop())


@pytest.mark.parametrize("in_file", [False, True])
def test_the_account_is_exact_whatever_the_sink_does(tmp_path: Path, in_file: bool) -> None:
    """Two threads push into a ring that is too small, one delivers, and the account is read all the time."""
    sink = MoodySink(7)
    clock = Clock()
    worker = opened(sink, clock, size=4096, records=4, path=tmp_path / "ring" if in_file else "")
    frames = 3000

    def write(first: int) -> None:
        for sequence in range(first, frames + 1, 2):
            worker.ring.push(b"%d" % sequence, sequence, time.monotonic_ns(), 1, time.time_ns())
            if sequence % 10 == first:
                time.sleep(0.0001)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    writers = [threading.Thread(target=write, args=(first,)) for first in (1, 2)]
    before, wrong = (0, 0), []
    try:
        worker.start()
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            least = worker.ring.pushed
            sent, dropped, held = worker.frames
            if not (least <= sent + dropped + held <= frames and held >= 0 and before <= (sent, dropped + sent)):
                wrong.append((least, sent, dropped, held))
            before = sent, dropped + sent
    finally:
        sys.setswitchinterval(interval)
        for writer in writers:
            writer.join()
    until(lambda: worker.frames[2] == 0)
    worker.finish(clock.seconds + PATIENCE_SECONDS)
    worker.join()
    assert wrong == []
    sent, dropped, held = worker.frames
    assert sent + dropped + held == frames
    assert sent >= len(sink.taken)  # one that made room while it was delivered counts as delivered
    numbers = [int(payload) for payload in sink.taken]
    assert len(set(numbers)) == len(numbers)
    for parity in (0, 1):
        assert [number for number in numbers if number % 2 == parity] == sorted(
            number for number in numbers if number % 2 == parity
        )
    assert {reason for reason in Drop if worker.ring.drops[reason]} >= {Drop.REJECTED}


def test_failures_leave_nothing_for_the_collector() -> None:
    """A library that keeps its own error in a variable makes a cycle of it, and what the call held stays until
    the collector runs, which is seldom here: 300 failures of 800 KB each would be 240 MB."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    http = HttpSettings(type="http", url=f"http://127.0.0.1:{port}/", gzip=False)
    sink = HttpSink(http)
    sink.open()
    worker = opened(sink, Clock())
    put(worker, 1, 3)
    gc.collect()
    gc.disable()
    try:
        claimed = worker.ring.claim(bytearray(), 3)
        for _ in range(50):
            with memoryview(b"x" * 8000) as payload:
                worker._attempt(claimed, [payload] * 3)
        assert worker.failures == 50
        assert gc.collect() < 50
    finally:
        gc.enable()
    worker.ring.release()
    worker.join()
