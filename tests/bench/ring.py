"""What the ring costs: python tests/bench/ring.py [REPEATS]

Prints records a second, and what a million pushes leave behind, as medians of several runs.
"""

from __future__ import annotations

import gc
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from agent.ring import Ring, WhenFull

MILLION = 1_000_000
RING_BYTES = 4 << 20
ROW_BYTES = 88


def pushes(ring: Ring, count: int, payload: bytes) -> None:
    push = ring.push
    for sequence in range(count):
        push(payload, sequence, sequence)


def single(when_full: WhenFull) -> float:
    """Records a second, 256 bytes each, into a ring that is full."""
    ring = Ring(RING_BYTES, when_full)
    payload = bytes(256)
    pushes(ring, 20_000, payload)
    start = time.perf_counter()
    pushes(ring, MILLION, payload)
    return MILLION / (time.perf_counter() - start)


def batches(size: int) -> float:
    """Records a second, pushed `size` at once."""
    ring = Ring(RING_BYTES)
    payload = bytes(ROW_BYTES * size)
    rounds = max(20 * MILLION // size // 10, 1000)
    push = ring.push
    for sequence in range(200):
        push(payload, sequence, sequence, size)
    start = time.perf_counter()
    for sequence in range(rounds):
        push(payload, sequence, sequence, size)
    return rounds * size / (time.perf_counter() - start)


def push_and_take() -> float:
    """Records a second, each taken at once by the same thread."""
    ring = Ring(RING_BYTES)
    payload, buffer = bytes(256), bytearray(256)
    start = time.perf_counter()
    for sequence in range(MILLION):
        ring.push(payload, sequence, sequence)
        ring.take(buffer)
    return MILLION / (time.perf_counter() - start)


def two_threads() -> float:
    """Records a second that a thread takes while another pushes; nothing is dropped."""
    ring = Ring(RING_BYTES, WhenFull.DROP_NEWEST)
    payload = bytes(256)

    def read() -> None:
        buffer = bytearray(256)
        while ring.take(buffer, wait=True) is not None:
            pass

    reader = threading.Thread(target=read)
    count = MILLION // 4
    start = time.perf_counter()
    reader.start()
    for sequence in range(count):
        while not ring.push(payload, sequence, sequence):
            time.sleep(0)
    ring.close()
    reader.join()
    assert ring.taken == count
    return count / (time.perf_counter() - start)


def left_behind() -> tuple[int, int]:
    """Net memory blocks and collector runs of a million pushes."""
    ring = Ring(RING_BYTES)
    payload = bytes(256)
    pushes(ring, 20_000, payload)
    gc.collect()
    runs, blocks = collector_runs(), sys.getallocatedblocks()
    pushes(ring, MILLION, payload)
    return sys.getallocatedblocks() - blocks, collector_runs() - runs


def collector_runs() -> int:
    return sum(generation["collections"] for generation in gc.get_stats())


def show(name: str, measure: Callable[[], float], repeats: int) -> None:
    results = sorted(measure() for _ in range(repeats))
    print(f"{name:44} {statistics.median(results):>15,.0f}/s   ({results[0]:,.0f} to {results[-1]:,.0f})")


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"Python {platform.python_version()}, ring of {RING_BYTES >> 20} MiB, medians of {repeats}")
    for when_full in WhenFull:
        show(f"single pushes of 256 bytes, full, {when_full}", lambda: single(when_full), repeats)  # noqa: B023
    show("push and take of 256 bytes, one thread", push_and_take, repeats)
    show("push and take of 256 bytes, two threads", two_threads, repeats)
    for size in (100, 1000, 10_000):
        show(f"records of {ROW_BYTES} bytes in batches of {size}", lambda: batches(size), repeats)  # noqa: B023
    results = [left_behind() for _ in range(repeats)]
    for name, column in (("net blocks", 0), ("collector runs", 1)):
        print(f"{name + ' of a million pushes':44} {statistics.median(result[column] for result in results):>15,.0f}")


if __name__ == "__main__":
    main()
