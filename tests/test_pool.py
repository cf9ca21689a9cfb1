"""Pools: capacities, what is kept and what is let go, misuse, threads, and the buffer that msgspec writes into."""

from __future__ import annotations

import threading
import weakref

import msgspec
import pytest

from agent.pool import BUFFER_KEEP_BYTES, BUFFER_START_BYTES, Buffer, Pool, buffer_pool
from agent.table import TableSpec, counter, gauge

DISKS = TableSpec(
    "disks", "For tests.", counter("reads_total", "reads", "."), gauge("busy", "ratio", "."), labels=("device",),
    rows=4, keep_rows=16,
)  # fmt: skip


class Item:
    """Something with a capacity that its holder can enlarge."""

    def __init__(self) -> None:
        self.capacity = 4
        self.content = 0
        self.holder = -1

    def clear(self) -> None:
        self.content = 0


def item_pool(keep: int = 8) -> Pool[Item]:
    return Pool(Item, keep)


def test_what_is_given_back_is_handed_out_again_cleared() -> None:
    pool = item_pool()
    item = pool.acquire()
    item.content = 7
    pool.release(item)
    assert pool.acquire() is item
    assert item.content == 0
    assert (pool.made, pool.regrown, pool.let_go, pool.idle_count, pool.out_count) == (1, 0, 0, 0, 1)


def test_one_more_is_made_when_none_is_idle() -> None:
    pool = item_pool()
    first, second = pool.acquire(), pool.acquire()
    assert first is not second
    assert (pool.made, pool.out_count) == (2, 2)
    pool.release(first)
    pool.release(second)
    assert {pool.acquire(), pool.acquire()} == {first, second}
    assert pool.made == 2


@pytest.mark.parametrize(("size", "kept"), [(4, True), (8, True), (9, False)])
def test_what_grew_above_the_limit_is_let_go(size: int, kept: bool) -> None:
    pool = item_pool(keep=8)
    item = pool.acquire()
    item.capacity = size
    pool.release(item)
    assert (pool.acquire() is item) == kept
    assert pool.let_go == (0 if kept else 1)
    assert pool.regrown == (0 if size == 4 else 1)


def test_giving_back_twice_or_to_another_pool_is_refused() -> None:
    pool = item_pool()
    item = pool.acquire()
    pool.release(item)
    with pytest.raises(ValueError, match="not handed it out"):
        pool.release(item)
    with pytest.raises(ValueError, match="not handed it out"):
        item_pool().release(item)
    assert (pool.idle_count, pool.out_count) == (1, 0)


def test_ten_threads_never_hold_the_same_item() -> None:
    pool = item_pool()
    start = threading.Barrier(10)
    clashes: list[str] = []

    def work(number: int) -> None:
        start.wait()
        for round_number in range(100):
            item = pool.acquire()
            if item.holder != -1 or item.content != 0:
                clashes.append(f"{number} got what {item.holder} holds, with {item.content} in it")
            item.holder, item.content = number, round_number + 1
            if any(item.holder != number or item.content != round_number + 1 for _ in range(20)):
                clashes.append(f"{item.holder} wrote into what {number} holds")
            item.holder = -1
            pool.release(item)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert pool.out_count == 0
    assert pool.idle_count == pool.made <= 10


def test_what_is_let_go_is_really_gone() -> None:
    pool = item_pool()
    item = pool.acquire()
    item.capacity = 100
    seen = weakref.ref(item)
    pool.release(item)
    del item
    assert seen() is None


def test_a_buffer_keeps_its_allocation_when_less_is_written() -> None:
    pool, encoder = buffer_pool(), msgspec.json.Encoder()
    for size in (10_000, 10, 5000, 0, BUFFER_START_BYTES - 2):
        buffer = pool.acquire()
        assert len(buffer.data) == buffer.capacity == BUFFER_START_BYTES
        encoder.encode_into("x" * size, buffer.data)
        assert len(buffer.data) == size + 2
        pool.release(buffer)
    assert (pool.made, pool.regrown, pool.let_go) == (1, 0, 0)


def test_a_buffer_that_grew_is_kept_up_to_one_mebibyte() -> None:
    pool, encoder = buffer_pool(), msgspec.json.Encoder()
    buffer = pool.acquire()
    encoder.encode_into("x" * 100_000, buffer.data)
    pool.release(buffer)
    assert pool.acquire() is buffer
    assert pool.regrown == 1
    assert len(buffer.data) == buffer.capacity >= 100_002
    encoder.encode_into("x" * 100_000, buffer.data)
    pool.release(buffer)
    assert pool.regrown == 1
    assert pool.acquire() is buffer
    encoder.encode_into("x" * (BUFFER_KEEP_BYTES + 1), buffer.data)
    pool.release(buffer)
    assert pool.let_go == 1
    assert pool.acquire().capacity == BUFFER_START_BYTES


def test_room_can_be_made_beforehand() -> None:
    buffer = Buffer(64)
    buffer.reserve(32)
    assert buffer.capacity == 64
    buffer.reserve(4096)
    assert len(buffer.data) == buffer.capacity == 4096
    buffer.clear()
    assert buffer.capacity == 4096
