"""What each format costs: time to write the standard template's frame, its bytes, and what is packed of them.

    python tests/bench/formats.py [ROUNDS]

All formats write the same frame of this host in turns; times are medians, and ratios to the JSON serializer in the
same run. Beside them, the frame as dictionaries built anew each time, written by msgspec and by json.
"""

from __future__ import annotations

import gzip
import json
import statistics
import sys
import time
from typing import Any

import msgspec

from agent.assembly import Agent
from agent.config import load
from agent.frame import Frame
from agent.logs import Log
from agent.pool import Buffer
from agent.serializers.formats import FORMATS
from agent.serializers.rows import counters_of, gauges_of


def fresh(frame: Frame) -> dict[str, Any]:
    """The frame's tables as dictionaries."""
    document: dict[str, Any] = {"sequence": frame.sequence, "time_unix_ns": frame.time_unix_ns}
    for name, table in frame.tables.items():
        spec = table.spec
        pers = [column.per for column in spec.counters]
        names = [column.name for column in (*spec.counters, *spec.gauges)]
        rows = [
            dict(zip(spec.labels, labels, strict=True))
            | dict(
                zip(
                    names,
                    [*(c if per == 1 else c / per for c, per in zip(counters, pers, strict=True)), *gauges],
                    strict=True,
                )
            )
            for labels, counters, gauges in zip(table.labels, counters_of(table), gauges_of(table), strict=True)
        ]
        document[name] = rows if spec.labels else rows[0]
    return document


def main() -> None:
    """Prints the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    agent = Agent(load(None, "standard", {}), Log("warning", "json"), sinks=False)
    for _ in range(3):
        agent.cycle.collect()
        time.sleep(0.2)
    frame = agent.cycle.frame
    serializers = {name: agent.serializer(name) for name in FORMATS}
    buffers = {name: Buffer() for name in FORMATS}
    encode = msgspec.json.Encoder().encode
    others = {"dicts, msgspec": lambda: encode(fresh(frame)), "dicts, json": lambda: json.dumps(fresh(frame)).encode()}
    times_us: dict[str, list[float]] = {name: [] for name in (*FORMATS, *others)}
    for _ in range(rounds):
        for name, serializer in serializers.items():
            buffers[name].clear()
            start = time.perf_counter_ns()
            serializer.write(frame, buffers[name])
            times_us[name].append((time.perf_counter_ns() - start) / 1000)
        for name, write in others.items():
            start = time.perf_counter_ns()
            write()
            times_us[name].append((time.perf_counter_ns() - start) / 1000)
    values = sum(table.count * len(table.spec.columns) for table in frame.tables.values())
    print(f"a frame of {values} values, {rounds} rounds\n")
    print(f"{'format':15}{'bytes':>8}{'gzip':>8}{'of JSON':>9}{'µs':>8}{'of JSON':>9}")
    base = statistics.median(times_us["json"])
    for name, taken in times_us.items():
        data = bytes(buffers[name].data) if name in buffers else others[name]()
        median = statistics.median(taken)
        packed, share = len(gzip.compress(data, 6)), len(data) / len(buffers["json"].data)
        print(f"{name:15}{len(data):8}{packed:8}{share:9.2f}{median:8.1f}{median / base:9.2f}")
    agent.close()


if __name__ == "__main__":
    main()
