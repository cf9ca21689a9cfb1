"""How long frames take to their sink, in a histogram of fixed size."""

from __future__ import annotations

import numpy as np


class LatencyHistogram:
    """Latencies in 512 buckets, eight for each power of two nanoseconds (12 % wide).

    Older ones lose weight: all counts are halved whenever there are 1,024.
    """

    __slots__ = ("_buckets", "_total")

    def __init__(self) -> None:
        self._buckets = np.zeros(512, dtype=np.int64)
        self._total = 0

    def add(self, nanoseconds: int) -> None:
        power = max(nanoseconds, 8).bit_length() - 1
        self._buckets[power * 8 + (max(nanoseconds, 8) >> (power - 3)) - 8] += 1
        self._total += 1
        if self._total >= 1024:
            self._buckets //= 2
            self._total = int(self._buckets.sum())

    def quantiles_seconds(self, *quantiles: float) -> list[float]:
        """The upper bound of the bucket that holds each quantile; NaN without any latency."""
        # The sum comes from the same reading: the sink's thread may be just between halving and summing up.
        cumulative = self._buckets.cumsum()
        total = int(cumulative[-1])
        if not total:
            return [float("nan")] * len(quantiles)
        places = [int(cumulative.searchsorted(quantile * total)) for quantile in quantiles]
        return [(place % 8 + 9) * 2.0 ** (place // 8 - 3) / 1e9 for place in places]
