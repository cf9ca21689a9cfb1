"""Arrays and buffers kept for reuse.

A pool hands out an item that is as good as new and takes it back cleared. What
grew beyond the pool's limit while it was out is let go, so that one busy moment
does not stay in resident memory for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

BUFFER_START_BYTES = 16 * 1024
BUFFER_KEEP_BYTES = 1024 * 1024


class Reusable(Protocol):
    """What a pool can keep: it knows its capacity, and how to be as good as new."""

    @property
    def capacity(self) -> int: ...

    def clear(self) -> None: ...


T = TypeVar("T", bound=Reusable)


class Pool(Generic[T]):
    """Items of one sort for reuse, safe for any number of threads.

    Args:
        make: makes an item of the starting capacity.
        keep: items above this capacity are not kept.

    Attributes:
        made: items made since the start.
        regrown: items that came back with another capacity than they left with.
        let_go: items that were not kept.
    """

    __slots__ = ("_idle", "_keep", "_lock", "_make", "_out", "let_go", "made", "regrown")

    def __init__(self, make: Callable[[], T], keep: int) -> None:
        self._make = make
        self._keep = keep
        self._idle: list[T] = []
        self._out: dict[int, int] = {}  # identity of an item that is out -> its capacity when it left
        self._lock = threading.Lock()
        self.made = 0
        self.regrown = 0
        self.let_go = 0

    def acquire(self) -> T:
        """An item for the caller alone; a new one where none is idle."""
        with self._lock:
            if self._idle:
                item = self._idle.pop()
            else:
                item = self._make()
                self.made += 1
            self._out[id(item)] = item.capacity
        return item

    def release(self, item: T) -> None:
        """Takes an item back, cleared; the caller must drop every reference to it.

        Raises:
            ValueError: the item is not out: given back twice, or from elsewhere.
        """
        capacity = item.capacity
        with self._lock:
            left_with = self._out.pop(id(item), None)
            if left_with is None:
                raise ValueError("given back to a pool that has not handed it out")
            if capacity != left_with:
                self.regrown += 1
            if capacity > self._keep:
                self.let_go += 1
                return
            item.clear()
            self._idle.append(item)

    @property
    def idle_count(self) -> int:
        return len(self._idle)

    @property
    def out_count(self) -> int:
        return len(self._out)


class Buffer:
    """A bytearray whose allocation stays when its content gets shorter.

    `data` is as long as the capacity while nothing is written. msgspec's
    `encode_into` shortens it to what it wrote without touching the allocation;
    `clear` makes it long again. (A bytearray that Python itself shortens below half
    of its allocation is reallocated, so `data.clear()` would throw the memory away.)
    """

    __slots__ = ("_zeros", "data")

    def __init__(self, capacity: int = BUFFER_START_BYTES) -> None:
        self.data = bytearray(capacity)
        self._zeros = bytes(capacity)

    @property
    def capacity(self) -> int:
        """Bytes that fit without a reallocation."""
        return max(self.data.__alloc__() - 1, 0)

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` bytes; what was written is lost."""
        if capacity > self.capacity:
            self.data = bytearray(capacity)
            self._zeros = bytes(capacity)

    def make_room(self, need_bytes: int) -> None:
        """Makes room for so many bytes, and for as many again where it has to grow; what was written is lost."""
        if need_bytes > self.capacity:
            self.reserve(1 << need_bytes.bit_length())

    def clear(self) -> None:
        """Makes `data` as long as the capacity again; what was written stays at its start."""
        capacity = self.capacity
        if len(self._zeros) != capacity:
            self._zeros = bytes(capacity)
        with memoryview(self._zeros) as zeros:
            self.data += zeros[len(self.data) :]


def buffer_pool() -> Pool[Buffer]:
    """The pool of the serializers' buffers."""
    return Pool(Buffer, keep=BUFFER_KEEP_BYTES)
