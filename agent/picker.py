"""Several positions of a sequence in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

Picker = Callable[[Sequence[Any]], tuple[Any, ...]]


def picker(positions: Sequence[int]) -> Picker:
    """An `itemgetter` over positions that gives a tuple for one position and for none as well."""
    if not positions:
        return lambda sequence: ()
    if len(positions) == 1:
        only = positions[0]
        return lambda sequence: (sequence[only],)
    return itemgetter(*positions)
