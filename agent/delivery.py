"""The rules of delivery: when to try again, how much at once, what to leave out, when to hold back.

Pure functions of what is measured; whoever asks keeps what they return. Times are seconds on the
monotonic clock, ratios run from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from agent.table import Priority


class WhenFull(StrEnum):
    """What a full ring does with a record that doesn't fit.

    `DROP_PRIORITY` leaves out tables of the new frame first, by their priority; then the oldest
    frames make room. `SAMPLE` takes every second new one, for which the oldest make room.
    """

    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"
    DROP_PRIORITY = "drop_priority"
    SAMPLE = "sample"


class Drop(IntEnum):
    """Why a record was given up; an index into a list of counts."""

    FULL = 0
    AGED = 1
    REJECTED = 2
    DAMAGED = 3
    SAMPLED = 4
    SHUTDOWN = 5

    @property
    def word(self) -> str:
        """As messages name it."""
        return self.name.lower()


# Trying again ---------------------------------------------------------------------------------


def _random() -> float:
    from random import random  # 200 KB that an agent does without as long as nothing fails

    return random()


def pause_seconds(failures: int, base_seconds: float, cap_seconds: float, draw: Callable[[], float] = _random) -> float:
    """How long to wait after so many failures in a row: exponential, with full jitter.

    A fleet whose receiver comes back must not come back all at once. The pause lies anywhere
    between 0 and base * 2^(failures - 1), at most the cap.

    Args:
        draw: gives a number from 0 up to 1.
    """
    return draw() * min(cap_seconds, base_seconds * 2.0 ** min(failures - 1, 62))


OPEN_AFTER_FAILURES = 5
OPEN_AFTER_SECONDS = 4.0  # of tries: a peer that has frozen makes each last until its timeout
OPEN_SECONDS = 10.0
TRIALS = 3


class Circuit(StrEnum):
    """What a breaker is: sends go through, none does, or a few try whether the peer is back."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Breaker:
    """A circuit breaker's state; each event gives the next one.

    Attributes:
        failures: in a row, while it is closed; of the trials, while it is half-open.
        tried_seconds: how long those took.
        open_until_seconds: when the trials begin, while it is open.
    """

    circuit: Circuit = Circuit.CLOSED
    failures: int = 0
    tried_seconds: float = 0.0
    open_until_seconds: float = 0.0

    def after_success(self) -> Breaker:
        """A send went through: closed, whatever it was."""
        return Breaker()

    def after_failure(self, took_seconds: float, now_seconds: float) -> Breaker:
        """A send failed: 5 in a row open it, or such that took 4 seconds; so do 3 trials in a row that failed."""
        if self.circuit is Circuit.OPEN:  # a last try, at the end of the agent
            return self
        failures = self.failures + 1
        tried_seconds = self.tried_seconds + took_seconds
        most = OPEN_AFTER_FAILURES if self.circuit is Circuit.CLOSED else TRIALS
        if failures >= most or tried_seconds >= OPEN_AFTER_SECONDS:
            return Breaker(Circuit.OPEN, open_until_seconds=now_seconds + OPEN_SECONDS)
        return Breaker(self.circuit, failures, tried_seconds)

    def at(self, now_seconds: float) -> Breaker:
        """As it is now: an open one whose time is up lets trials through."""
        if self.circuit is Circuit.OPEN and now_seconds >= self.open_until_seconds:
            return Breaker(Circuit.HALF_OPEN)
        return self


# How much at once -----------------------------------------------------------------------------


def batch_records(used_ratio: float, smallest: int, largest: int, before: int) -> int:
    """How many payloads to deliver at once, by how full the ring is.

    Above 0.75 the largest, above 0.50 the middle, below 0.25 the smallest; between 0.25 and 0.50
    as it was `before`, so that it does not swing.
    """
    if used_ratio > 0.75:
        return largest
    if used_ratio > 0.50:
        return (smallest + largest) // 2
    return smallest if used_ratio < 0.25 else before


# What to leave out ----------------------------------------------------------------------------


THIN_FROM_RATIO = 0.75


def least_priority(used_ratio: float, sequence: int) -> Priority:
    """The least priority of the tables that go into a ring.

    Below 0.75 every table; from 0.75 those of low priority in every second frame; from 0.90 only
    those of high priority.
    """
    if used_ratio >= 0.90:
        return Priority.HIGH
    return Priority.NORMAL if used_ratio >= THIN_FROM_RATIO and sequence % 2 else Priority.LOW


# When to hold back ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Strain:
    """What the agent costs and loses.

    Attributes:
        ring_used_ratio: of the fullest ring.
        drop_ratio: of the latest frames, those given up.
        resident_bytes: memory of the process; NaN where unknown.
        cpu_ratio: CPU seconds of a cycle, as a part of the configured interval.
    """

    ring_used_ratio: float = 0.0
    drop_ratio: float = 0.0
    resident_bytes: float = 0.0
    cpu_ratio: float = 0.0


MOST_THROTTLE = 0.9


def throttle(strain: Strain, max_memory_bytes: float, max_cpu_ratio: float) -> tuple[float, str]:
    """How far to hold back, from 0 to 0.9, and why: the strongest of all causes; "" without any.

    CPU above its limit asks for just the interval that keeps it there.
    """
    causes = [(0.0, "")]
    if strain.ring_used_ratio > 0.90:
        causes.append((0.5, "ring"))
    if strain.drop_ratio > 0.05:
        causes.append((0.7, "drops"))
    if strain.resident_bytes > max_memory_bytes:
        causes.append((0.8, "memory"))
    if strain.cpu_ratio > max_cpu_ratio:
        causes.append((min(1 - max_cpu_ratio / strain.cpu_ratio, MOST_THROTTLE), "cpu"))
    return max(causes)


def ticks_apart(throttle: float) -> int:
    """How many intervals lie between two frames: 1 / (1 - throttle), in whole ticks, so that hosts stay aligned."""
    return math.ceil(1 / (1 - throttle) - 1e-9)
