"""What packing metrics into datagrams saves: python tests/bench/datagrams.py [REPEATS]

Takes this host's own frame, and counts bytes with each datagram's header of 20 bytes, and once more with the 28 bytes
of UDP and IPv4. One metric a packet is the least JSON that says which one it is: instance, sequence, table, labels,
column, value.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import msgspec

from agent.serializers.document import HEADER as FRAME_HEADER
from agent.sinks.datagrams import HEADER_BYTES, header, nanoseconds_of, split

REPOSITORY = Path(__file__).parents[2]
LIMIT_BYTES = 1472 - HEADER_BYTES
UDP_AND_IP_BYTES = 28
METRICS = 100

Frame = dict[str, Any]


def own_frame() -> Frame:
    """What hostprobe says of this host now."""
    command = [sys.executable, "-m", "agent", "once", "--template", "full"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, timeout=60)
    frame: Frame = json.loads(run.stdout)
    return frame


def is_label(value: object) -> bool:
    """Labels are the texts of a row; metrics are numbers, or null."""
    return isinstance(value, str)


def metrics(frame: Frame) -> Iterator[tuple[str, int, Frame, str, object]]:
    """Each metric: table, row, labels, column, value."""
    for table, rows in frame.items():
        if table in FRAME_HEADER or not isinstance(rows, dict | list):
            continue
        for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
            labels = {name: value for name, value in row.items() if is_label(value)}
            for column, value in row.items():
                if column not in labels:
                    yield table, number, labels, column, value


def one_a_packet(frame: Frame) -> list[bytes]:
    """A datagram's JSON for each metric."""
    who = {name: frame[name] for name in ("instance", "sequence")}
    return [
        msgspec.json.encode(who | {"table": table} | ({"labels": labels} if labels else {}) | {column: value})
        for table, _, labels, column, value in metrics(frame)
    ]


def first_metrics(frame: Frame, count: int) -> Frame:
    """The frame with so many of its metrics, and the labels of their rows."""
    found: Frame = {name: frame[name] for name in FRAME_HEADER if name in frame}
    rows: dict[tuple[str, int], Frame] = {}
    for table, number, labels, column, value in list(metrics(frame))[:count]:
        if (table, number) not in rows:
            row = rows[table, number] = dict(labels)
            if isinstance(frame[table], list):
                found.setdefault(table, []).append(row)
            else:
                found[table] = row
        rows[table, number][column] = value
    return found


def show(title: str, frame: Frame) -> None:
    """One frame, packed and not."""
    packed, single = split(msgspec.json.encode(frame), LIMIT_BYTES), one_a_packet(frame)
    print(f"{title}: {len(single)} metrics")
    for name, texts in (("one metric a packet", single), ("packed", packed)):
        size_bytes = sum(map(len, texts)) + HEADER_BYTES * len(texts)
        wire_bytes = size_bytes + UDP_AND_IP_BYTES * len(texts)
        print(f"  {name:22} {len(texts):>6,} datagrams {size_bytes:>9,} bytes {wire_bytes:>9,} with UDP and IP")
    for name, overhead in (("saved", HEADER_BYTES), ("saved with UDP and IP", HEADER_BYTES + UDP_AND_IP_BYTES)):
        sizes = [sum(map(len, texts)) + overhead * len(texts) for texts in (packed, single)]
        print(f"  {name:22} {1 - sizes[0] / sizes[1]:.1%} (1 : {sizes[1] / sizes[0]:.1f})")


def microseconds_per_frame(text: bytes, repeats: int) -> list[float]:
    """Splitting it, checksums and headers too, without sending."""
    rounds = 300
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(rounds):
            nanoseconds = nanoseconds_of(text)
            for sequence, part in enumerate(split(text, LIMIT_BYTES)):
                header(sequence, nanoseconds, part)
        found.append((time.perf_counter() - start) / rounds * 1e6)
    return found


def main() -> None:
    """Prints sizes of this host's frame and of a hundred of its metrics, and what splitting takes."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    frame = own_frame()
    show("this host's frame", frame)
    show("a part of it", first_metrics(frame, METRICS))
    text = msgspec.json.encode(frame)
    times = microseconds_per_frame(text, repeats)
    middle = statistics.median(times)
    print(f"splitting {len(text):,} bytes: {middle:.0f} µs, {min(times):.0f} to {max(times):.0f}")
    print(f"  of a core at a frame a second: {middle / 1e6:.4%}")


if __name__ == "__main__":
    main()
