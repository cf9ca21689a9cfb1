"""The rules of delivery, as tables."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.delivery import (
    OPEN_SECONDS,
    TRIALS,
    Breaker,
    Circuit,
    Strain,
    batch_records,
    least_priority,
    pause_seconds,
    throttle,
    ticks_apart,
)
from agent.table import Priority

NEARLY_ONE = 1 - 2**-53

# Trying again


@pytest.mark.parametrize(
    ("failures", "draw", "expected"),
    [
        (1, 0.0, 0.0),
        (1, 0.5, 0.05),
        (1, NEARLY_ONE, 0.1),
        (2, 0.5, 0.1),
        (3, 0.5, 0.2),
        (3, NEARLY_ONE, 0.4),
        (6, NEARLY_ONE, 3.2),
        (7, NEARLY_ONE, 5.0),  # 6.4 is above the cap
        (7, 0.5, 2.5),
        (63, 0.5, 2.5),
        (10**9, 0.5, 2.5),
        (10**400, 0.0, 0.0),
    ],
)
def test_pauses_double_up_to_the_cap_and_lie_anywhere_below(failures: int, draw: float, expected: float) -> None:
    assert pause_seconds(failures, 0.1, 5, lambda: draw) == pytest.approx(expected)


def test_pauses_of_a_fleet_differ() -> None:
    """Full jitter: over the whole range, not around its end."""
    random.seed(4)
    pauses = [pause_seconds(5, 0.1, 5) for _ in range(4000)]
    assert 0 <= min(pauses) < 0.01
    assert 1.59 < max(pauses) < 1.6
    assert sum(pauses) / 4000 == pytest.approx(0.8, rel=0.05)


def after(breaker: Breaker, results: list[bool]) -> Breaker:
    """A breaker after sends, all of them at one moment, that went through or failed."""
    for result in results:
        breaker = breaker.after_success() if result else breaker.after_failure(0.5, 100.0)
    return breaker


HALF_OPEN = Breaker(Circuit.HALF_OPEN)
OPEN = Breaker(Circuit.OPEN, open_until_seconds=110.0)


@pytest.mark.parametrize(
    ("breaker", "results", "expected"),
    [
        (Breaker(), [], Breaker()),
        (Breaker(), [False] * 4, Breaker(Circuit.CLOSED, 4, 2.0)),
        (Breaker(), [False] * 4 + [True], Breaker()),
        (Breaker(), [False] * 4 + [True] + [False] * 4, Breaker(Circuit.CLOSED, 4, 2.0)),  # in a row
        (Breaker(), [False] * 5, OPEN),
        (HALF_OPEN, [False], Breaker(Circuit.HALF_OPEN, 1, 0.5)),
        (HALF_OPEN, [False] * 2, Breaker(Circuit.HALF_OPEN, 2, 1.0)),
        (HALF_OPEN, [False] * 3, OPEN),
        (HALF_OPEN, [True], Breaker()),
        (HALF_OPEN, [False] * 2 + [True], Breaker()),
        (OPEN, [False] * 4, OPEN),  # last tries at the end of the agent
        (OPEN, [True], Breaker()),
    ],
)
def test_sends_move_the_breaker(breaker: Breaker, results: list[bool], expected: Breaker) -> None:
    assert after(breaker, results) == expected


@pytest.mark.parametrize(
    ("breaker", "now", "expected"),
    [
        (OPEN, 100.0, OPEN),
        (OPEN, math.nextafter(110.0, 0), OPEN),
        (OPEN, 110.0, HALF_OPEN),
        (OPEN, 1e9, HALF_OPEN),
        (Breaker(failures=4), 1e9, Breaker(failures=4)),
        (Breaker(Circuit.HALF_OPEN, 2), 1e9, Breaker(Circuit.HALF_OPEN, 2)),
    ],
)
def test_time_lets_trials_through(breaker: Breaker, now: float, expected: Breaker) -> None:
    assert breaker.at(now) == expected


@pytest.mark.parametrize(
    ("tries", "circuit"),
    [
        ([3.99], Circuit.CLOSED),
        ([4.0], Circuit.OPEN),  # a peer that has frozen: one try that lasts until its timeout
        ([1.5, 1.5, 0.9], Circuit.CLOSED),
        ([1.5, 1.5, 1.0], Circuit.OPEN),
    ],
)
def test_four_seconds_of_failing_tries_open_it(tries: list[float], circuit: Circuit) -> None:
    breaker = Breaker().after_failure(3.0, 0.0).after_success()  # whose time doesn't count any more
    for number, took_seconds in enumerate(tries):
        breaker = breaker.after_failure(took_seconds, 1000.0 * number)
    assert breaker.circuit is circuit


@given(st.lists(st.tuples(st.floats(0, 15), st.booleans()), max_size=200))
def test_a_breaker_asked_before_each_send_spares_its_peer(sends: list[tuple[float, bool]]) -> None:
    """However they come: 5 failures in a row, then 10 s of peace, then 3 failed trials at most for each 10 s."""
    breaker, now, in_a_row = Breaker(), 0.0, 0
    opened: list[float] = []
    trials = 0
    for pause, succeeds in sends:
        now += pause
        breaker = breaker.at(now)
        if breaker.circuit is Circuit.OPEN:
            assert now < opened[-1] + OPEN_SECONDS
            continue
        if breaker.circuit is Circuit.HALF_OPEN:
            assert now >= opened[-1] + OPEN_SECONDS
            trials += 1
            assert trials <= TRIALS
        if succeeds:
            breaker, in_a_row = breaker.after_success(), 0
            assert breaker.circuit is Circuit.CLOSED
            trials = 0
        else:
            breaker, in_a_row = breaker.after_failure(0.0, now), in_a_row + 1
            is_due = in_a_row >= 5 and (in_a_row - 5) % 3 == 0
            assert (breaker.circuit is Circuit.OPEN) == is_due
            if is_due:
                opened.append(now)
                trials = 0


# How much at once


@pytest.mark.parametrize("before", [10, 37, 55, 100])
@pytest.mark.parametrize(
    ("used", "expected"),
    [
        (0.0, 10),
        (0.2499, 10),
        (0.25, None),  # as it was
        (0.4, None),
        (0.50, None),
        (0.5001, 55),
        (0.75, 55),
        (0.7501, 100),
        (1.0, 100),
    ],
)
def test_batches_grow_with_the_ring(used: float, expected: int | None, before: int) -> None:
    assert batch_records(used, 10, 100, before) == (before if expected is None else expected)


def test_batches_do_not_swing() -> None:
    sizes, size = [], 10
    for used in (0.1, 0.3, 0.6, 0.45, 0.3, 0.8, 0.45, 0.26, 0.2, 0.3):
        size = batch_records(used, 10, 100, size)
        sizes.append(size)
    assert sizes == [10, 10, 55, 55, 55, 100, 100, 100, 10, 10]


@pytest.mark.parametrize(("smallest", "largest", "middle"), [(1, 1, 1), (1, 2, 1), (5, 10, 7), (1, 10_000, 5000)])
def test_the_middle_lies_between(smallest: int, largest: int, middle: int) -> None:
    assert batch_records(0.6, smallest, largest, 1) == middle


# What to leave out


@pytest.mark.parametrize(
    ("used", "even", "odd"),
    [
        (0.0, Priority.LOW, Priority.LOW),
        (0.7499, Priority.LOW, Priority.LOW),
        (0.75, Priority.LOW, Priority.NORMAL),
        (0.8999, Priority.LOW, Priority.NORMAL),
        (0.90, Priority.HIGH, Priority.HIGH),
        (1.0, Priority.HIGH, Priority.HIGH),
    ],
)
@pytest.mark.parametrize("sequence", [0, 2, 2**40])
def test_tables_go_by_priority_as_the_ring_fills_up(used: float, even: Priority, odd: Priority, sequence: int) -> None:
    assert (least_priority(used, sequence), least_priority(used, sequence + 1)) == (even, odd)


# When to hold back

MEMORY, CPU = 100e6, 0.25


@pytest.mark.parametrize(
    ("strain", "expected"),
    [
        (Strain(), (0.0, "")),
        (Strain(0.90, 0.05, MEMORY, CPU), (0.0, "")),  # at each limit
        (Strain(ring_used_ratio=0.9001), (0.5, "ring")),
        (Strain(drop_ratio=0.0501), (0.7, "drops")),
        (Strain(drop_ratio=40.0), (0.7, "drops")),
        (Strain(resident_bytes=MEMORY + 1), (0.8, "memory")),
        (Strain(resident_bytes=math.nan), (0.0, "")),
        (Strain(resident_bytes=-1e9), (0.0, "")),
        (Strain(cpu_ratio=0.5), (0.5, "cpu")),
        (Strain(cpu_ratio=1.0), (0.75, "cpu")),
        (Strain(cpu_ratio=2.5), (0.9, "cpu")),
        (Strain(cpu_ratio=1e9), (0.9, "cpu")),
        (Strain(cpu_ratio=math.inf), (0.9, "cpu")),
        (Strain(cpu_ratio=math.nan), (0.0, "")),
        (Strain(0.95, 0.1), (0.7, "drops")),
        (Strain(0.95, 0.1, 2e8), (0.8, "memory")),
        (Strain(0.95, 0.1, 2e8, 1.0), (0.8, "memory")),
        (Strain(0.95, 0.1, 2e8, 2.0), (0.875, "cpu")),
        (Strain(0.95, 0.0, math.nan, 0.3), (0.5, "ring")),
        (Strain(0.95, 0.1, math.nan, 0.3), (0.7, "drops")),
    ],
)
def test_the_strongest_cause_holds_back(strain: Strain, expected: tuple[float, str]) -> None:
    ratio, cause = throttle(strain, MEMORY, CPU)
    assert (ratio, cause) == (pytest.approx(expected[0]), expected[1])


@pytest.mark.parametrize(
    ("held_back", "ticks"),
    [(0, 1), (1e-12, 1), (0.01, 2), (0.5, 2), (0.51, 3), (0.7, 4), (0.75, 4), (0.8, 5), (0.875, 8), (0.9, 10)],
)
def test_intervals_get_longer_by_whole_ticks(held_back: float, ticks: int) -> None:
    assert ticks_apart(held_back) == ticks


@given(st.floats(0.2501, 2.5))
def test_held_back_for_its_cpu_the_agent_stays_at_its_limit(cpu_ratio: float) -> None:
    ratio, _ = throttle(Strain(cpu_ratio=cpu_ratio), MEMORY, CPU)
    assert cpu_ratio / ticks_apart(ratio) <= CPU * (1 + 1e-6)
    assert cpu_ratio * (1 - ratio) == pytest.approx(CPU)
