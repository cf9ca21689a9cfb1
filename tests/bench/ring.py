"""What the ring costs: python tests/bench/ring.py [REPEATS] [DIRECTORY]

Prints records a second, and what a million pushes leave behind, as medians of several runs; what
a mapped file in DIRECTORY (/var/tmp) costs more than memory, as a ratio; and how long large files
take to open, whole and damaged in the middle.
"""

from __future__ import annotations

import gc
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from agent.delivery import WhenFull
from agent.ring import Ring
from agent.ring_file import Sync
from agent.ring_recovery import open_ring

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
    """Records a second, each claimed and settled at once by the same thread."""
    ring = Ring(RING_BYTES)
    payload, buffer = bytes(256), bytearray(256)
    start = time.perf_counter()
    for sequence in range(MILLION):
        ring.push(payload, sequence, sequence)
        ring.claim(buffer)
        ring.settle(1)
    return MILLION / (time.perf_counter() - start)


def two_threads(payloads: int) -> float:
    """Records a second that a thread takes while another pushes; nothing is dropped."""
    ring = Ring(RING_BYTES, WhenFull.DROP_NEWEST)
    payload = bytes(256)

    def read() -> None:
        buffer = bytearray(256)
        while claimed := ring.claim(buffer, payloads, wait=True):
            ring.settle(len(claimed))

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


ROUNDS = 40


def seconds_of_pushes(ring: Ring, payload: bytes, is_full: bool) -> float:
    """CPU seconds of a push; into a ring that is emptied before each round, or stays full."""
    count = int(0.9 * RING_BYTES // (len(payload) + 64))
    if is_full:
        pushes(ring, 2 * count, payload)
    spent = 0.0
    for _ in range(max(20_000 // count, 2)):
        if not is_full:
            ring.drop_held()
        start = time.thread_time()
        pushes(ring, count, payload)
        spent += time.thread_time() - start
    return spent / count / max(20_000 // count, 2)


def file_against_memory(directory: str, size: int, is_full: bool) -> tuple[float, float, float]:
    """Seconds of a push into a file that is never synced, and into memory, in turn; and their ratio's median."""
    payload = bytes(range(256)) * (size // 256)
    memory, mapped = Ring(RING_BYTES), open_ring(f"{directory}/ring", RING_BYTES).ring
    pairs = [
        (seconds_of_pushes(mapped, payload, is_full), seconds_of_pushes(memory, payload, is_full))
        for _ in range(ROUNDS)
    ]
    mapped.unmap()
    ratio = statistics.median(file / plain for file, plain in pairs)
    return statistics.median(file for file, _ in pairs), statistics.median(plain for _, plain in pairs), ratio


def synced(directory: str, size: int, sync: Sync) -> float:
    """Pushes a second, of wall time."""
    ring = open_ring(f"{directory}/ring", RING_BYTES, sync=sync).ring
    count = 300 if sync is Sync.ALWAYS else 300_000
    payload = bytes(size)
    start = time.perf_counter()
    pushes(ring, count, payload)
    rate = count / (time.perf_counter() - start)
    ring.unmap()
    return rate


def seconds_to_open(directory: str, size: int) -> tuple[float, float]:
    """Of a full ring of 8 KB records: whole, and with damage in the middle."""
    path = f"{directory}/large"
    ring = open_ring(path, size).ring
    pushes(ring, size // 8192, bytes(range(256)) * 32)
    ring.unmap()
    start = time.perf_counter()
    open_ring(path, size).ring.unmap()
    whole = time.perf_counter() - start
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(b"damage")
    start = time.perf_counter()
    open_ring(path, size).ring.unmap()
    damaged = time.perf_counter() - start
    for path_of_ring in Path(directory).glob("large*"):
        path_of_ring.unlink()
    return whole, damaged


def show_files(directory: str, repeats: int) -> None:
    for is_full in (False, True):
        for size in (256, 8192):
            file, memory, ratio = file_against_memory(directory, size, is_full)
            name = f"{size} bytes into a file, {'full' if is_full else 'with room'}, sync never"
            print(f"{name:44} {1e6 * file:>12.2f} µs, in memory {1e6 * memory:.2f} µs, ratio {ratio:.2f}")
    for sync in Sync:
        for size in (256, 8192):
            show(f"{size} bytes into a file, sync {sync}", lambda: synced(directory, size, sync), repeats)  # noqa: B023
    for mib in (64, 1024):
        whole, damaged = seconds_to_open(directory, mib << 20)
        print(f"{f'opening a full file of {mib} MiB':44} {whole:>12.2f} s whole, {damaged:.2f} s damaged in the middle")


def show(name: str, measure: Callable[[], float], repeats: int) -> None:
    results = sorted(measure() for _ in range(repeats))
    print(f"{name:44} {statistics.median(results):>15,.0f}/s   ({results[0]:,.0f} to {results[-1]:,.0f})")


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"Python {platform.python_version()}, ring of {RING_BYTES >> 20} MiB, medians of {repeats}")
    for when_full in WhenFull:
        show(f"single pushes of 256 bytes, full, {when_full}", lambda: single(when_full), repeats)  # noqa: B023
    show("push, claim, settle of 256 bytes, one thread", push_and_take, repeats)
    for payloads in (1, 100):
        show(f"the same, two threads, {payloads} a claim", lambda: two_threads(payloads), repeats)  # noqa: B023
    for size in (100, 1000, 10_000):
        show(f"records of {ROW_BYTES} bytes in batches of {size}", lambda: batches(size), repeats)  # noqa: B023
    results = [left_behind() for _ in range(repeats)]
    for name, column in (("net blocks", 0), ("collector runs", 1)):
        print(f"{name + ' of a million pushes':44} {statistics.median(result[column] for result in results):>15,.0f}")
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else "/var/tmp") as directory:
        show_files(directory, repeats)


if __name__ == "__main__":
    main()
