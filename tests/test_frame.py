"""Frames: one stamp for all tables, tables that take turns."""

from __future__ import annotations

import math

import numpy as np
import pytest

from agent.frame import Frame
from tests.tables import DISKS, MEMORY, SECOND, cycle, fill


def test_one_stamp_and_one_interval_for_all_tables() -> None:
    frame = Frame([DISKS, MEMORY])
    frame.begin(123, 4 * SECOND)
    assert (frame.sequence, frame.time_unix_ns, frame.monotonic_ns) == (1, 123, 4 * SECOND)
    assert math.isnan(frame.interval_seconds)
    fill(frame, {"a": [1, 2, 3, 4]})
    frame.open(MEMORY).put_gauges(0, [5.0])
    assert {table.monotonic_ns for table in frame.tables.values()} == {4 * SECOND}
    assert list(frame.tables) == ["disks", "memory"]
    frame.begin(456, 4 * SECOND + SECOND // 4)
    assert (frame.sequence, frame.time_unix_ns, frame.interval_seconds) == (2, 456, 0.25)
    assert frame.tables == {}


def test_a_table_without_labels_has_its_row_from_the_start() -> None:
    frame = Frame([MEMORY])
    frame.begin(1, 1)
    table = frame.open(MEMORY)
    assert (table.count, list(table.labels), table.capacity) == (1, [()], 1)
    assert math.isnan(table.gauges[0, 0])
    with pytest.raises(AssertionError, match="opened twice"):
        frame.open(MEMORY)


def test_a_table_is_cleared_when_it_is_given_back() -> None:
    frame = Frame([DISKS])
    for second in range(1, 4):
        cycle(frame, second, {"a": [7, None, 7, 7], "b": [8, 8, 8, 8]})
    tables = [frame.tables["disks"]]
    frame.close()
    for table in tables:
        assert (table.count, table.complete, table.labels) == (0, True, ())
        assert not table.counters.any()
        assert not table.unknown.any()
        assert np.isnan(table.gauges).all()


def test_two_tables_serve_any_number_of_cycles() -> None:
    frame = Frame([DISKS])
    seen = set()
    for second in range(1, 20):
        cycle(frame, second, {"a": [second, 0, 0, 0]})
        seen.add(id(frame.tables["disks"]))
        assert frame.pools["disks"].out_count <= 2
    assert len(seen) == frame.pools["disks"].made == 2
    assert frame.pools["disks"].regrown == 0
    frame.close()
    assert frame.pools["disks"].out_count == 0
