"""What listing sockets costs, by how many there are: against a raw dump, psutil, ss and /proc/net.

    python tests/bench/sockets.py [--counts 100 1000 10000 20000] [--rounds N]

Opens them in a network namespace of its own, which takes root. Both sides of a ratio run in turns in
one process; figures are medians of the turns.
"""

from __future__ import annotations

import argparse
import gc
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from agent.frame import Frame  # noqa: E402
from agent.pool import Buffer  # noqa: E402
from agent.serializers.document import Identity  # noqa: E402
from agent.serializers.json_lines import JsonSerializer  # noqa: E402
from probes import netlink  # noqa: E402
from probes.procfs import Host  # noqa: E402
from probes.socket_lists import SocketLists  # noqa: E402
from probes.socket_tallies import LISTEN, UDP_UNCONNECTED, InetTally, UnixTally  # noqa: E402
from probes.sockets import SocketsProbe, SocketsSettings  # noqa: E402
from tests.socket_zoo import enter_namespace, open_many  # noqa: E402

Work = Callable[[], object]

COUNTS = (100, 1024, 10_000, 20_000)
OTHER_COUNTS = (1000, 5000)
SHOWN = 1024
PEAKS_FROM = 1000
BUFFER_BYTES = 64 * 1024  # as probes/netlink.py starts with
ROUND_SECONDS = 0.05
REQUESTS = {
    "tcp": [(18, netlink.inet_request_v1(netlink.ALL_STATES))],
    "tcp with info": [(18, netlink.inet_request_v1(netlink.ALL_STATES, True))],
    "udp": [
        (20, netlink.inet_request_v2(family, socket.IPPROTO_UDP, 1 << UDP_UNCONNECTED))
        for family in (socket.AF_INET, socket.AF_INET6)
    ],
    "unix": [(20, netlink.unix_request())],
}
TEXTS = {"tcp": ("tcp", "tcp6"), "udp": ("udp", "udp6"), "unix": ("unix",)}
SS = {"tcp": "-tan", "udp": "-uan", "unix": "-xan"}


class RawDump:
    """Takes the datagrams of a dump into one buffer, and looks at nothing but where it ends."""

    def __init__(self, kind: str) -> None:
        self._requests = [
            struct.pack("=IHHII", 16 + len(payload), number, 0x301, 1, 0) + payload
            for number, payload in REQUESTS[kind]
        ]
        self._buffer = bytearray(BUFFER_BYTES)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)

    def read(self) -> None:
        for request in self._requests:
            self._socket.send(request)
            done = False
            while not done:
                size = self._socket.recv_into(self._buffer)
                # NLMSG_DONE (3) is the last message: alone, or behind others in the datagram (20 bytes).
                done = self._buffer[4] == 3 or (self._buffer[size - 16] == 3 and self._buffer[size - 20] == 20)

    def close(self) -> None:
        self._socket.close()


class RawTexts:
    """Reads the text files into one buffer, on descriptors that are kept."""

    def __init__(self, kind: str) -> None:
        self._fds = []
        for name in TEXTS[kind]:
            with suppress(FileNotFoundError):  # a kernel without IPv6
                self._fds.append(os.open(f"/proc/self/net/{name}", os.O_RDONLY))
        self._views = [bytearray(1 << 20)]

    def read(self) -> None:
        for fd in self._fds:
            place = 0
            while size := os.preadv(fd, self._views, place):
                place += size

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


class Collected:
    """The whole probe, into a frame, and the frame into JSON."""

    def __init__(self, host: Host, **settings: Any) -> None:
        made = msgspec.convert({"listening": True} | settings, SocketsSettings)
        self._probe = SocketsProbe(made, host)
        self._frame = Frame(self._probe.tables)
        self._serializer = JsonSerializer(self._probe.tables, Identity("bench", "0", {}))
        self._buffer = Buffer()
        self._ticks = iter(range(1, 1 << 60))

    def collect(self) -> None:
        self._frame.begin(0, next(self._ticks))
        self._probe.collect(self._frame)

    def collect_and_serialize(self) -> None:
        self.collect()
        self._serializer.write(self._frame, self._buffer)

    def rows(self, table_name: str) -> int:
        return self._frame.tables[table_name].count

    @property
    def json_bytes(self) -> int:
        return len(self._buffer.data)

    def close(self) -> None:
        self._probe.close()


def in_turns(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median microseconds a call, elapsed, each work in its turn; quick ones several times in a turn."""
    repeats = {}
    for name, work in works.items():
        work()
        start = time.perf_counter()
        work()
        repeats[name] = max(1, min(100, int(ROUND_SECONDS / (time.perf_counter() - start))))
    elapsed: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                work()
            elapsed[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return {name: statistics.median(times) for name, times in elapsed.items()}


def by_ss(option: str) -> None:
    subprocess.run(["ss", option], check=True, stdout=subprocess.DEVNULL)


def of_agent(lists: SocketLists, kind: str) -> Work:
    """The agent's reading of a list, as the probe asks for it with states and listeners."""
    if kind == "tcp":
        return lambda: lists.tcp(netlink.ALL_STATES, partial(InetTally, 1 << LISTEN))
    if kind == "udp":
        return lambda: lists.udp(1 << UDP_UNCONNECTED, partial(InetTally, 1 << UDP_UNCONNECTED))
    return lambda: lists.unix(UnixTally)


def compare(host: Host, kind: str, count: int, rounds: int) -> None:
    """Prints what a list of so many sockets costs each way."""
    lists = SocketLists(host)
    raw, texts, collected = RawDump(kind), RawTexts(kind), Collected(host)
    figures = in_turns(
        {
            "raw": raw.read,
            "agent": of_agent(lists, kind),
            "collect": collected.collect,
            "psutil": lambda: psutil.net_connections(kind),
            "ss": lambda: by_ss(SS[kind]),
            "/proc": texts.read,
        },
        rounds,
    )
    for closing in (lists, raw, texts, collected):
        closing.close()
    print(f"{kind:5}{count:7,}", *(f"{value:11,.0f}" for value in figures.values()), end="")
    agent = figures["agent"]
    print(
        f"   {agent / figures['raw']:9.2f} {figures['psutil'] / agent:12.1f} {figures['ss'] / agent:8.1f}"
        f" {figures['/proc'] / agent:11.1f} {agent / count * 1000:13.0f} {figures['raw'] / count * 1000:11.0f}"
    )


def rows_of_connections(host: Host, count: int, rounds: int) -> None:
    """Prints what it costs to list connections as rows."""
    try:
        shown = Collected(host, connections=True, row_limit=SHOWN)
    except (msgspec.ValidationError, TypeError) as error:
        print(f"rows for connections: not available: {error}")
        return
    summed, few, raw = Collected(host), Collected(host, connections=True), RawDump("tcp with info")
    try:
        figures = in_turns(
            {
                "raw": raw.read,
                "none": summed.collect_and_serialize,
                "256": few.collect_and_serialize,
                "collect": shown.collect,
                "both": shown.collect_and_serialize,
            },
            rounds,
        )
    except Exception as error:  # a reading that is not there yet
        print(f"rows for connections: not available: {error}")
        return
    print(
        f"{count:,} TCP sockets, collected and serialized: without rows {figures['none']:,.0f} µs, with 256 rows"
        f" {figures['256']:,.0f} µs, with {shown.rows('connections'):,} rows {figures['both']:,.0f} µs"
        f" ({figures['collect']:,.0f} µs of it collect; {shown.json_bytes:,} bytes); raw dump with tcp_info"
        f" {figures['raw']:,.0f} µs"
    )
    for closing in (summed, few, shown, raw):
        closing.close()


def peak(host: Host, **settings: Any) -> str:
    """The most memory that Python and NumPy have for a collect, above what they had before it."""
    try:
        collected = Collected(host, row_limit=256, **settings)
    except (msgspec.ValidationError, TypeError):
        return "not available"
    for _ in range(5):
        collected.collect()
    gc.collect()
    tracemalloc.start()
    collected.collect()  # what it keeps, it has replaced
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    collected.collect()
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    collected.close()
    return f"{most / 1024:.0f} KiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS, help="of TCP sockets")
    parser.add_argument("--other-counts", type=int, nargs="*", default=OTHER_COUNTS, help="of UDP and of Unix sockets")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    enter_namespace()
    host = Host()
    print("µs a call; ns a socket")
    print(
        f"{'':12}{'raw':>12}{'agent':>12}{'collect':>12}{'psutil':>12}{'ss':>12}{'/proc':>12}"
        "   agent/raw psutil/agent ss/agent /proc/agent agent ns each raw ns each"
    )
    todo: Sequence[tuple[str, int]] = [
        *(("tcp", count) for count in arguments.counts),
        *((kind, count) for kind in ("unix", "udp") for count in arguments.other_counts),
    ]
    for kind, count in todo:
        try:
            with open_many(count, kind):
                compare(host, kind, count, arguments.rounds)
        except RuntimeError as error:
            print(f"{kind:5}{count:7,}  {error}")
    print()
    peaks = []
    for kind, count in todo:
        if kind == "unix" or count < PEAKS_FROM:
            continue
        with suppress(RuntimeError), open_many(count, kind):
            if kind == "tcp":
                rows_of_connections(host, count, arguments.rounds)
            peaks.append(
                f"peak of a collect with {count:,} {kind} sockets and row_limit 256: {peak(host)} for states"
                f" and listeners, {peak(host, connections=True)} with rows for connections"
            )
    print(*peaks, sep="\n")


if __name__ == "__main__":
    main()
