"""The histogram of latencies against exact quantiles, at both ends, and while another thread adds."""

from __future__ import annotations

import sys
import threading
import time

import numpy as np
import pytest

from agent.latency import LatencyHistogram

PATIENCE_SECONDS = 60


def test_no_latency_is_nan() -> None:
    assert np.isnan(LatencyHistogram().quantiles_seconds(0.5, 0.99)).all()


@pytest.mark.parametrize("scale", [50, 1e4, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("shape", ["lognormal", "uniform", "same"])
def test_latency_quantiles_are_within_a_bucket(scale: float, shape: str) -> None:
    """An eighth above the exact quantile at most, and never below it."""
    random = np.random.default_rng(7)
    values = {
        "lognormal": random.lognormal(0, 1, 1000) * scale,
        "uniform": (1 + random.random(1000)) * scale,
        "same": np.full(1000, scale),
    }[shape].astype(np.int64)
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(int(value))
    for quantile in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = max(float(np.percentile(values, 100 * quantile, method="inverted_cdf")), 8.0)
        (seconds,) = histogram.quantiles_seconds(quantile)
        # To the nanosecond: a bucket holds whole ones, and its bound is the next one's beginning.
        assert exact <= seconds * 1e9 * (1 + 1e-9)
        assert seconds * 1e9 <= exact * 1.125 + 1


def test_latencies_at_both_ends() -> None:
    histogram = LatencyHistogram()
    for nanoseconds in (-5, 0, 1, 2**62, 2**63 - 1):
        histogram.add(nanoseconds)
    low, high = histogram.quantiles_seconds(0.5, 1.0)
    assert low == 9e-9
    assert high == 2**63 / 1e9


def test_latencies_are_bounded_and_the_latest_count() -> None:
    """A million latencies in 512 buckets; what was slow long ago has no weight left."""
    histogram = LatencyHistogram()
    for _ in range(1000):
        histogram.add(10**9)
    for _ in range(100_000):
        histogram.add(1000)
        assert histogram._total < 1024
    assert histogram._buckets.size == 512
    assert histogram._total == histogram._buckets.sum()
    assert max(histogram.quantiles_seconds(0.5, 0.99)) < 2e-6


def test_latencies_read_while_another_thread_adds_and_halves() -> None:
    """A quantile from between halving the buckets and summing them up would be centuries."""
    histogram = LatencyHistogram()
    done = threading.Event()

    def add() -> None:
        while not done.is_set():
            histogram.add(1000)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    writer = threading.Thread(target=add, daemon=True)
    writer.start()
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not histogram._total:
            assert time.monotonic() < deadline
        seen = [histogram.quantiles_seconds(0.5, 0.99) for _ in range(30_000)]
    finally:
        sys.setswitchinterval(interval)
        done.set()
        writer.join(PATIENCE_SECONDS)
    assert max(map(max, seen)) < 2e-6
