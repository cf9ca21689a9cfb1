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


# What was collected before


def test_previous_is_the_table_of_the_last_collection() -> None:
    frame = Frame([DISKS, MEMORY])
    frame.begin(1, 1)
    assert frame.previous("disks") is None
    first = fill(frame, {"a": [1, 2, 3, 4]})
    assert frame.previous("disks") is None
    for _ in range(3):  # it isn't due for a while
        frame.begin(2, 2)
        assert frame.previous("disks") is first
        assert first.counters[0].tolist() == [1, 2, 3, 4]
    second = fill(frame, {"a": [5, 6, 7, 8]})
    assert frame.previous("disks") is first
    frame.begin(3, 3)
    assert frame.previous("disks") is second
    frame.close()
    assert frame.previous("disks") is None


def test_a_table_that_was_discarded_is_nobodys_previous() -> None:
    frame = Frame([DISKS])
    frame.begin(1, 1)
    first = fill(frame, {"a": [1, 2, 3, 4]})
    frame.begin(2, 2)
    fill(frame, {"a": [5, 6, 7, 8]})
    frame.discard([DISKS])
    assert frame.tables == {}
    assert frame.previous("disks") is first
    frame.begin(3, 3)
    assert frame.previous("disks") is first
    assert frame.pools["disks"].out_count == 1


def test_latest_is_this_cycles_tables_and_the_last_of_those_that_were_not_due() -> None:
    frame = Frame([DISKS, MEMORY])
    frame.begin(1, 1)
    disks, memory = fill(frame, {"a": [1, 2, 3, 4]}), frame.open(MEMORY)
    assert frame.latest() == {"disks": disks, "memory": memory}
    for _ in range(2):
        frame.begin(2, 2)
        assert frame.latest() == {"disks": disks, "memory": memory}
        assert disks.counters[0].tolist() == [1, 2, 3, 4]
    now = frame.open(MEMORY)
    assert frame.latest() == {"disks": disks, "memory": now}
    assert frame.tables == {"memory": now}
    then = fill(frame, {"b": [1, 2, 3, 4]})
    assert frame.latest() == {"disks": then, "memory": now}
    frame.begin(3, 3)
    assert frame.latest() == {"disks": then, "memory": now}


@pytest.mark.parametrize("opened", [True, False])
def test_a_probe_that_failed_has_no_latest_tables_until_it_is_collected_again(opened: bool) -> None:
    """Whether it failed half-way or before it had a table, and although it was well before."""
    frame = Frame([DISKS, MEMORY])
    for _ in range(2):
        frame.begin(1, 1)
        memory = frame.open(MEMORY)
        fill(frame, {"a": [1, 2, 3, 4]})
    frame.begin(2, 2)
    if opened:
        fill(frame, {"a": [5, 6, 7, 8]})
    frame.discard([DISKS])
    assert frame.latest() == {"memory": memory}
    frame.begin(3, 3)  # none is due
    assert frame.latest() == {"memory": memory}
    again = fill(frame, {"a": [6, 6, 7, 8]})
    assert frame.latest() == {"disks": again, "memory": memory}
    frame.begin(4, 4)
    assert frame.latest() == {"disks": again, "memory": memory}


def test_a_probe_that_fails_again_in_the_cycle_in_which_it_was_to_recover() -> None:
    frame = Frame([DISKS])
    frame.begin(1, 1)
    fill(frame, {"a": [1, 2, 3, 4]})
    for second in range(2, 5):
        frame.begin(second, second)
        fill(frame, {"a": [5, 6, 7, 8]})
        frame.discard([DISKS])
        assert frame.latest() == {}
    frame.begin(9, 9)
    assert frame.latest() == {}
