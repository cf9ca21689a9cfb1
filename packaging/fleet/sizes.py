"""What a fleet of hosts like this one sends: measured here, then multiplied out.

    python packaging/fleet/sizes.py [HOSTS=10000]

Collects 100 frames of this host with the standard template, a tenth of a second apart, and writes them in every
format. The sinks over HTTP then send them to a receiver on loopback that counts every byte of the requests, heads
included: each frame alone, as at an interval, and in the largest batches, as after an outage. The prometheus sink is
scraped as Prometheus does it, with gzip. TLS, TCP and IP come on top. Prints the tables of README.md, but for the
brokers' bytes, which tests/bench/fleet.py reads in the brokers.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).parents[2]))

from agent.assembly import Agent
from agent.config import load
from agent.logs import Log
from agent.pool import Buffer
from agent.serializers import formats
from agent.sinks.http import HttpSettings, HttpSink
from agent.sinks.otlp import OtlpSettings, OtlpSink
from agent.sinks.prometheus import PrometheusSettings, PrometheusSink
from agent.sinks.remote_write import RemoteWriteSettings, RemoteWriteSink
from agent.sinks.sink import BatchSettings

HOSTS = 10_000
FRAMES = 100
LOCALHOST = "127.0.0.1"
RECORD_BYTES = 60  # what a frame takes in a ring on top of its own
RING_USED_MOST = 0.75  # above, frames are thinned
OUTAGE_SECONDS = 3600
DAY_SECONDS = 86_400
SCRAPE = (
    "GET /metrics HTTP/1.1\r\nHost: {host}\r\nUser-Agent: Prometheus/3.0.0\r\nAccept: text/plain;version=0.0.4\r\n"
    "Accept-Encoding: gzip\r\nConnection: close\r\n\r\n"
)


class Receiver:
    """Takes requests on loopback, one connection after the other, and counts their bytes.

    Attributes:
        bytes: of all requests so far, their heads included.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server((LOCALHOST, 0))
        self.url = f"http://{LOCALHOST}:{self._listener.getsockname()[1]}"
        self.bytes = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection, connection.makefile("rb") as stream:
                while head := stream.readline():
                    size = 0
                    while (line := stream.readline()) != b"\r\n":
                        head += line
                        name, _, value = line.partition(b":")
                        size = int(value) if name.lower() == b"content-length" else size
                    self.bytes += len(head) + 2 + len(stream.read(size))
                    connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")


def frames_of_this_host() -> tuple[dict[str, list[bytes]], int]:
    """The frames in every format, and the series of the last one."""
    agent = Agent(load(template="standard", environment={}), Log("error", "console"))
    agent.exporter.open()  # so that there is a row for the sink
    names: Sequence[formats.Name] = get_args(formats.Name)
    serializers = {name: agent.serializer(name) for name in names}
    payloads: dict[str, list[bytes]] = {name: [] for name in names}
    buffer = Buffer()
    for number in range(FRAMES + 2):
        time.sleep(0.1)
        agent.cycle.collect()
        for name, serializer in serializers.items():
            buffer.clear()
            serializer.write(agent.cycle.frame, buffer)
            if number >= 2:  # the first ones know no rates yet
                payloads[name].append(bytes(buffer.data))
    agent.exporter.close(1)
    agent.close()
    text = payloads["prometheus"][-1]
    return payloads, sum(not line.startswith(b"#") for line in text.splitlines())


def sent(sink: Any, receiver: Receiver, payloads: Sequence[bytes]) -> tuple[float, float]:
    """Bytes per frame of the sink's requests: of each frame alone, and in the largest batches."""
    views = [memoryview(payload) for payload in payloads]
    batch = BatchSettings()
    largest = min(batch.max, batch.bytes // max(map(len, views)))
    figures = []
    sink.open()
    for size in (1, largest):
        before = receiver.bytes
        starts = range(0, len(views) - size + 1, size)
        for start in starts:
            sink.deliver(views[start : start + size])
        figures.append((receiver.bytes - before) / (size * len(starts)))
    sink.close()
    return figures[0], figures[1]


def scraped(payloads: Sequence[bytes]) -> float:
    """Bytes per frame of a scrape's answer."""
    with socket.create_server((LOCALHOST, 0)) as held:
        address = f"{LOCALHOST}:{held.getsockname()[1]}"
    sink = PrometheusSink(PrometheusSettings(type="prometheus", address=address))
    sink.open()
    total = 0
    for payload in payloads:
        sink.deliver([memoryview(payload)])
        with socket.create_connection((LOCALHOST, int(address.rpartition(":")[2]))) as connection:
            connection.sendall(SCRAPE.format(host=address).encode())
            while chunk := connection.recv(1 << 16):
                total += len(chunk)
    sink.close()
    return total / len(payloads)


def fleet_row(path: str, hosts: int, interval: int, raw: float, wire: float, series: int) -> str:
    """What so many hosts make together; a ring for those that push."""
    frames = hosts / interval
    rate = frames * wire / 1e6
    ring = OUTAGE_SECONDS / interval * (raw + RECORD_BYTES) / RING_USED_MOST / 2**20
    held = f"{ring:.1f} MiB" if raw else "-"
    return (
        f"| {path} | {interval} s | {frames:,.0f} | {rate:.2f} | {rate * DAY_SECONDS / 1000:,.0f}"
        f" | {hosts * series:,} | {hosts * series / interval:,.0f} | {held} |"
    )


def main() -> None:
    hosts = int(sys.argv[1]) if len(sys.argv) > 1 else HOSTS
    payloads, series = frames_of_this_host()
    raw = {name: round(sum(map(len, frames)) / FRAMES) for name, frames in payloads.items()}
    receiver = Receiver()
    wire = {
        "http, json, gzip": ("json", sent(HttpSink(HttpSettings(url=receiver.url)), receiver, payloads["json"])),
        "otlp, gzip": ("otlp", sent(OtlpSink(OtlpSettings(url=receiver.url)), receiver, payloads["otlp"])),
        "remote_write, snappy": (
            "remote_write",
            sent(RemoteWriteSink(RemoteWriteSettings(url=receiver.url)), receiver, payloads["remote_write"]),
        ),
    }
    scrape = round(scraped(payloads["prometheus"]))
    print(f"{series} series a host\n\n| format | bytes of a frame |\n|---|---|")
    print("\n".join(f"| `{name}` | {size:,} |" for name, size in raw.items()))
    print("\n| path | bytes of a frame | on the wire, alone | on the wire, in large batches |\n|---|---|---|---|")
    for path, (name, (alone, together)) in wire.items():
        print(f"| {path} | {raw[name]:,} | {alone:,.0f} | {together:,.0f} |")
    print(f"| a scrape, gzip | {raw['prometheus']:,} | {scrape:,} | - |")
    print("\n| path | interval | frames/s | MB/s | GB/day | series | samples/s | ring for an hour |")
    print("|---|---|---|---|---|---|---|---|")
    for path, (name, (alone, _)) in wire.items():
        print(fleet_row(path, hosts, 10, raw[name], round(alone), series))
    print(fleet_row("a scrape, gzip", hosts, 15, 0, scrape, series))


if __name__ == "__main__":
    main()
