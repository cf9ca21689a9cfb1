"""Takes the receiver away for 600 frames' time, and measures breaker, memory, and what comes afterwards.

    python tests/bench/outage.py [SECONDS=60] [INTERVAL=100ms]

600 frames are 10 minutes' worth at a frame a second; `outage.py 600 1s` is the same in real time.

Two real agents with the standard template run at once, one with its buffers in memory, one with
them in files. Each has a http and a tcp sink to one receiver, a process of its own that is killed
(SIGKILL), and started again; and a sink to a file, whose lines are the agent's own figures meanwhile.

Memory is measured from outside, in /proc/PID/smaps: what is resident, what of that are the rings'
pages, and the rest; before the outage, once the breakers are open, at its end, and after all is delivered. The rings
have `populate = true`: without it their pages are taken when frames first fill them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from receivers import ROOT, agent, begin, free_port, process, reached

from agent.units import Duration

WARM_UP_SECONDS = 15.0
DRAIN_SECONDS = 90.0
RING = "8MiB"
SINKS = ("http", "tcp")

CONFIG = """
template = "standard"
[agent]
interval = "{interval}"
hostname = "{name}"
[log]
format = "json"
[sinks.main]
enabled = false
[sinks.http]
type = "http"
url = "http://127.0.0.1:{http_port}/"
[sinks.http.buffer]
size = "{ring}"
populate = true
{http_buffer}
[sinks.tcp]
type = "tcp"
address = "127.0.0.1:{tcp_port}"
[sinks.tcp.buffer]
size = "{ring}"
populate = true
{tcp_buffer}
[sinks.watch]
type = "file"
path = "{folder}/{name}.watch"
"""


@dataclass
class Watched:
    """An agent at work.

    Attributes:
        memory: at each moment that has a name: resident kB, those of rings, and private ones.
    """

    name: str
    child: subprocess.Popen[Any]
    watch: Path
    log: Path
    memory: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def frames(self) -> list[dict[str, Any]]:
        """What the healthy sink has so far."""
        lines = self.watch.read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]

    def sinks(self) -> dict[str, dict[str, Any]]:
        """The agent's own figures of its sinks, in its latest frame."""
        with self.watch.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 64_000))
            line = file.read().split(b"\n")[-2]
        return {row["sink"]: row for row in json.loads(line)["agent_sink"]}

    def events(self) -> list[dict[str, Any]]:
        """What it logged, with seconds since 1970."""
        events = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [event | {"at": datetime.fromisoformat(event["timestamp"]).timestamp()} for event in events]

    def measure(self, moment: str) -> None:
        """Reads its memory, as a median of some readings."""
        readings = []
        for _ in range(9):
            readings.append(memory(self.child.pid))
            time.sleep(0.1)
        self.memory[moment] = tuple(int(statistics.median(column)) for column in zip(*readings, strict=True))  # type: ignore[assignment]


def memory(pid: int) -> tuple[int, int, int]:
    """Of a process, in kB: what is resident, what of it are rings' pages, and what is private and anonymous."""
    resident = rings = private = 0
    is_ring = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            # Python's anonymous mappings are shared ones, /dev/zero to the kernel.
            is_ring = line.endswith(".ring") or "/dev/zero" in line
        elif line.startswith("Rss:"):
            resident += int(line.split()[1])
            rings += int(line.split()[1]) if is_ring else 0
        elif line.startswith("Anonymous:"):
            private += int(line.split()[1])
    return resident, rings, private


def wait_until(is_done: Callable[[], bool], seconds: float) -> float:
    """How long something took, infinity if longer than it may."""
    start = time.monotonic()
    while not is_done():
        if time.monotonic() - start > seconds:
            return float("inf")
        time.sleep(0.1)
    return time.monotonic() - start


def middle_of_interval(interval: float) -> None:
    """Waits for a moment when no frame is on its way: over TCP one could be in the receiver's socket."""
    time.sleep(interval * (1.5 - time.time() / interval % 1))


def verified(lines: bytes) -> dict[str, int]:
    """The totals of `hostprobe verify`."""
    command = [sys.executable, "-m", "agent", "verify", "-", "--format", "json"]
    report = subprocess.run(command, cwd=ROOT, input=lines, stdout=subprocess.PIPE, check=False).stdout
    totals: dict[str, int] = json.loads(report)["total"]
    return totals


def first_at(events: list[dict[str, Any]], sink: str, circuit: str, after: float) -> float:
    """Seconds until a sink's circuit was so, by the log."""
    times = [
        event["at"] - after
        for event in events
        if event["event"] == "sink's circuit" and event["sink"] == sink and event["circuit"] == circuit
    ]
    return min((at for at in times if at >= 0), default=float("inf"))


def seen_at(frames: list[dict[str, Any]], sink: str, value: int, after: float) -> float:
    """The same by the figures in the frames of the healthy sink."""
    for frame in frames:
        at = frame["time_unix_ns"] / 1e9 - after
        if at >= 0 and any(row["sink"] == sink and row["circuit_open"] == value for row in frame["agent_sink"]):
            return at
    return float("inf")


def report_sink(watched: Watched, sink: str, lines: list[bytes], died: float, back: float) -> list[bool]:
    """Prints what became of one sink; which bounds it met."""
    frames, events = watched.frames(), watched.events()
    mine = [line for line in lines if f'"host":"{watched.name}"'.encode() in line[:200]]
    sequences = [json.loads(line)["sequence"] for line in mine]
    firsts = list(dict.fromkeys(sequences))
    times = {frame["sequence"]: frame["time_unix_ns"] / 1e9 for frame in frames}
    rows = {frame["sequence"]: row for frame in frames for row in frame["agent_sink"] if row["sink"] == sink}
    missing = sorted(times.keys() - set(sequences))
    totals = verified(b"\n".join([*mine, b""]))
    opened, closed = first_at(events, sink, "open", died), first_at(events, sink, "closed", back)
    seen_open, seen_closed = seen_at(frames, sink, 1, died), seen_at(frames, sink, 0, back)
    gone = [at - back for number, at in times.items() if at > back + closed and rows[number]["backlog_frames"] <= 2]
    most, most_used = (max(row[name] for row in rows.values()) for name in ("backlog_frames", "ring_used_ratio"))
    during, later = sum(died <= at <= back for at in times.values()), sum(at > back for at in times.values())
    thinned, repeated = list(rows.values())[-1]["thinned_frames_total"], totals["repeated"]
    print(f"{watched.name}, {sink}")
    print(f"  circuit open     {opened:6.2f} s after the death, by the log; {seen_open:.2f} s in the frames")
    print(f"  circuit closed   {closed:6.2f} s after the return, by the log; {seen_closed:.2f} s in the frames")
    print(f"  backlog          {most:6} frames at most, {most_used:.0%} of the ring")
    print(f"  gone             {min(gone, default=float('inf')):6.2f} s after the return")
    print(f"  frames           {len(set(sequences)):6} came of {len(frames)}; {during} of the outage, {later} later")
    print(f"  missing          {len(missing):6} {missing[:5] or ''}; repeated {repeated}, thinned {thinned}")
    print(f"  verify                  {totals}")
    return [
        reached(f"{watched.name}, {sink}: breaker open within 5 s", opened <= 5 and seen_open <= 5),
        reached(f"{watched.name}, {sink}: closed within 15 s of the return", closed <= 15 and seen_closed <= 15),
        reached(f"{watched.name}, {sink}: every frame came", not missing and totals["missing"] == 0),
        reached(f"{watched.name}, {sink}: in order", firsts == sorted(firsts) and totals["reordered"] == 0),
    ]


def report_memory(watched: Watched) -> list[bool]:
    """Prints an agent's memory; whether it stayed flat."""
    print(f"{watched.name}: memory in MB     resident   of rings   the rest    private")
    before = watched.memory["before"]
    for moment, (resident, rings, private) in watched.memory.items():
        rest, rest_before = resident - rings, before[0] - before[1]
        figures = "".join(f"{kilobytes / 1000:11.2f}" for kilobytes in (resident, rings, rest, private))
        print(f"  {moment:18} {figures}   resident {resident / before[0] - 1:+.1%}, rest {rest / rest_before - 1:+.1%}")
    end = watched.memory["end of the outage"]
    opened = watched.memory["breakers open"]
    rest = (end[0] - end[1]) / (before[0] - before[1]) - 1
    held = (end[0] - end[1]) / (opened[0] - opened[1]) - 1
    print(f"  besides the rings, from the open breakers to the end of the outage: {held:+.1%}")
    return [
        reached(f"{watched.name}: resident memory grew by less than 5 % ({end[0] / before[0] - 1:.1%})",
                end[0] < 1.05 * before[0]),
        reached(f"{watched.name}: memory besides the rings grew by less than 5 % ({rest:.1%})", rest < 0.05),
    ]  # fmt: skip


def run(seconds: float, interval: Duration, folder: Path) -> bool:
    http_port, tcp_port = free_port(), free_port()
    receiving = [str(Path(__file__).parent / "receivers.py"), str(folder), str(http_port), str(tcp_port)]
    with ExitStack() as stack:
        receiver = stack.enter_context(process(receiving, stdout=subprocess.PIPE))
        receiver.stdout.readline()
        agents = []
        for name in ("memory", "file"):
            buffers = {
                f"{sink}_buffer": f'path = "{folder}/{name}-{sink}.ring"' if name == "file" else "" for sink in SINKS
            }
            config = folder / f"{name}.toml"
            config.write_text(
                CONFIG.format(
                    interval=interval,
                    name=name,
                    folder=folder,
                    http_port=http_port,
                    tcp_port=tcp_port,
                    ring=RING,
                    **buffers,
                )
            )
            log = folder / f"{name}.log"
            child = stack.enter_context(agent(config, stack.enter_context(log.open("wb"))))
            agents.append(Watched(name, child, folder / f"{name}.watch", log))
        time.sleep(max(WARM_UP_SECONDS, 5 * interval))
        for watched in agents:
            assert watched.child.poll() is None, watched.log.read_text()
            watched.measure("before")
        middle_of_interval(interval)
        died = time.time()
        receiver.send_signal(signal.SIGKILL)
        receiver.wait()
        time.sleep(max(5.0, 6 * interval))
        for watched in agents:
            watched.measure("breakers open")
        time.sleep(max(0.0, died + seconds - time.time() - 2))
        for watched in agents:
            watched.measure("end of the outage")
        back = time.time()
        receiver = stack.enter_context(process(receiving, stdout=subprocess.PIPE))
        receiver.stdout.readline()

        def is_drained() -> bool:
            return all(watched.sinks()[sink]["backlog_frames"] <= 1 for watched in agents for sink in SINKS)

        wait_until(is_drained, DRAIN_SECONDS)
        time.sleep(max(3.0, 3 * interval))
        for watched in agents:
            watched.measure("all delivered")
        for watched in agents:
            watched.child.send_signal(signal.SIGTERM)
        statuses = [watched.child.wait(30) for watched in agents]
        time.sleep(0.5)
    print(f"away for {back - died:.1f} s at a frame every {interval}: {(back - died) / interval:.0f} frames,"
          f" {(back - died) / interval / 60:.1f} minutes' worth at a frame a second; rings of {RING}")  # fmt: skip
    received = {sink: (folder / f"{sink}.jsonl").read_bytes().split(b"\n")[:-1] for sink in SINKS}
    bounds = []
    for watched in agents:
        for sink in SINKS:
            bounds += report_sink(watched, sink, received[sink], died, back)
        frames = watched.frames()
        missed = frames[-1]["agent"]["missed_cycles_total"]
        print(f"{watched.name}: {len(frames)} frames, {missed} cycles missed, logged {len(watched.events())} lines")
        bounds += report_memory(watched)
        texts = [line for line in watched.log.read_text().splitlines() if not line.startswith("{")]
        if texts:
            print("stderr:", *texts[:20], sep="\n  ")
    bounds.append(reached("the agents ended well", statuses == [0, 0]))
    return all(bounds)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    interval = Duration.parse(sys.argv[2] if len(sys.argv) > 2 else "100ms")
    begin()
    with tempfile.TemporaryDirectory() as folder:
        is_good = run(seconds, interval, Path(folder))
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
