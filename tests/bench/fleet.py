"""A fleet in small: frames of 200 agents from one process to a real engine, which ends in the middle and comes back.

    python tests/bench/fleet.py ENGINE [SECONDS=30] [INTERVAL=1s]

ENGINE is victoria-metrics, prometheus (both by remote_write), nats (JetStream), kafka or otlp (a collector). They
are those of `make test-engines`, which installs them.

Each agent has its own name and instance, serializer, ring and sink with its thread. What they tell is this host,
collected for real once a tick with the standard template, so an agent's sequence counts from 1 to the last tick. After
two fifths of the ticks the engine is killed (victoria-metrics, which keeps its latest seconds in memory, is ended in
order), is away for 4 seconds, and starts again with the same data. When the rings are empty, or after two minutes, all
that the engine holds is read back, and the sequences of each agent are counted.

Printed: agents, frames, bytes of a frame and its samples (points; values in JSON), samples a second; what is missing,
came twice or out of order, and what the agents dropped; failed deliveries and the longest backlog of a ring; the CPU
time of this process per frame, one collection a tick in it; the growth of its memory from the third tick to the end,
beside the rings, whose memory is taken at the start; what a broker keeps per frame, until the outage, while each frame
goes alone, and in all. The status is 1 where a frame is missing or a ring's account doesn't close.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fleet_routes import Route, route_to
from receivers import begin, reached

from agent.assembly import Agent
from agent.config import load
from agent.cycle import Serializer
from agent.delivery import Drop
from agent.logs import Log
from agent.pool import Buffer
from agent.serializers import formats
from agent.serializers.document import Identity
from agent.sink_worker import SinkWorker
from agent.units import Duration

AGENTS = 200
OUTAGE_AT = 0.4  # of the ticks
OUTAGE_SECONDS = 4.0
WARM_TICKS = 3
DRAIN_SECONDS = 120.0
CLOSE_SECONDS = 10.0


@dataclass
class Fleet:
    """What the agents share, and what is measured.

    Attributes:
        serializers: of each agent, beside its worker.
        payload: the latest frame of the latest agent.
        longest_backlog: of any ring, in frames.
        resident_bytes: after the third tick.
    """

    host: Agent
    serializers: list[Serializer]
    workers: list[SinkWorker]
    payload: bytes = b""
    payload_bytes: int = 0
    ticks: int = 0
    late: int = 0
    offered_seconds: float = 0.0
    longest_backlog: int = 0
    resident_bytes: int = 0

    def run(self, ticks: int, interval: float) -> None:
        """So many frames of each agent."""
        buffer = Buffer()
        start = time.monotonic()
        for tick in range(ticks):
            pause = start + tick * interval - time.monotonic()
            self.late += pause < -interval
            time.sleep(max(pause, 0))
            self.host.cycle.collect()
            frame = self.host.cycle.frame
            for serializer, worker in zip(self.serializers, self.workers, strict=True):
                buffer.clear()
                serializer.write(frame, buffer)
                self.payload_bytes += len(buffer.data)
                worker.push(buffer.data, frame, is_thinned=False)
            self.payload = bytes(buffer.data)
            self.longest_backlog = max(self.longest_backlog, self.backlog())
            self.ticks = frame.sequence
            if self.ticks == WARM_TICKS:
                self.resident_bytes = resident_bytes()
        self.offered_seconds = max(time.monotonic() - start, ticks * interval)

    def backlog(self) -> int:
        """The longest, in frames."""
        return max(worker.frames[2] for worker in self.workers)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def fleet_of(route: Route, stack: ExitStack) -> Fleet:
    """200 agents with open rings and sinks, whose threads run."""
    log = Log("error", "console")
    host = Agent(load(template="standard", environment={}), log, sinks=False)
    stack.callback(host.close)
    specs = [spec for scheduled in host.cycle.probes for spec in scheduled.probe.tables]
    serializers, workers = [], []
    for number in range(AGENTS):
        name, instance = f"fleet-{number:03}", uuid.uuid4()
        identity = Identity(name, instance.hex, {}, started_unix_ns=time.time_ns())
        serializers.append(formats.load(route.format)(specs, identity, True))
        worker = SinkWorker(route.sink(name), log, lambda: None, instance.bytes)
        worker.open()
        workers.append(worker)
    for worker in workers:
        worker.start()
    return Fleet(host, serializers, workers)


def wait_until(is_done: Callable[[], bool], seconds: float) -> None:
    """Waits, but not for longer than so many seconds."""
    start = time.monotonic()
    while not is_done() and time.monotonic() - start < seconds:
        time.sleep(0.02)


def kept_a_frame(route: Route, frames: int) -> str:
    """What a broker keeps of each, in bytes."""
    kept_bytes = route.kept_bytes()
    return "-" if kept_bytes is None or not frames else f"{kept_bytes / frames:,.0f}"


def run(name: str, seconds: float, interval: Duration, folder: Path) -> bool:
    ticks = max(round(seconds / interval), 2 * WARM_TICKS)
    with ExitStack() as stack:
        route = route_to(name, folder / name, stack)
        stack.enter_context(route.engine)
        route.prepare()
        fleet = fleet_of(route, stack)
        cpu_before = time.process_time()
        feeding = threading.Thread(target=fleet.run, args=(ticks, float(interval)))
        feeding.start()
        wait_until(lambda: fleet.ticks >= OUTAGE_AT * ticks or not feeding.is_alive(), float("inf"))
        wait_until(lambda: not fleet.backlog(), float(interval))
        kept_alone = kept_a_frame(route, sum(worker.frames[0] for worker in fleet.workers))
        route.away()
        away = time.monotonic()
        time.sleep(OUTAGE_SECONDS)
        route.engine.start()
        back = time.monotonic()
        feeding.join()
        wait_until(lambda: not fleet.backlog(), DRAIN_SECONDS)
        drained = time.monotonic()
        cpu = time.process_time() - cpu_before
        growth = resident_bytes() - fleet.resident_bytes
        accounts = [worker.frames for worker in fleet.workers]
        pushed = sum(worker.ring.pushed for worker in fleet.workers)
        dropped = sum(account[1] for account in accounts)
        rejected = sum(worker.ring.drops[Drop.REJECTED] for worker in fleet.workers)
        failures = sum(worker.failures for worker in fleet.workers)
        for worker in fleet.workers:
            worker.finish(time.monotonic() + CLOSE_SECONDS)
        for worker in fleet.workers:
            worker.join()
        kept = kept_a_frame(route, sum(worker.ring.taken for worker in fleet.workers))
        received = route.received()
    frames = AGENTS * ticks
    unique = sum(instance.frames - instance.repeated for instance in received.values())
    samples = route.samples(fleet.payload)
    spans = sorted({(instance.first, instance.last) for instance in received.values()})
    rows = {
        "engine": name,
        "agents": AGENTS,
        "frames": f"{frames:,}, {ticks} an agent, every {interval}",
        "bytes a frame": f"{fleet.payload_bytes / frames:,.0f}",
        "samples a frame": samples,
        "samples/s": f"{samples * frames / fleet.offered_seconds:,.0f}",
        "away": f"{back - away:.1f} s",
        "rings empty": f"{drained - back:.1f} s after the return, {fleet.longest_backlog} frames at most in one",
        "missing": frames - unique,
        "repeated": sum(instance.repeated for instance in received.values()),
        "reordered": sum(instance.reordered for instance in received.values()) if route.keeps_order else "-",
        "dropped by agents": f"{dropped}, {rejected} of them refused by the engine",
        "failed deliveries": failures,
        "CPU a frame": f"{cpu / frames * 1e3:.2f} ms",
        "memory": f"{growth / 1e6:+.1f} MB of {fleet.resident_bytes / 1e6:.0f} MB",
        "kept a frame": f"{kept_alone} until the outage, {kept} in all",
        "ticks begun late": fleet.late,
    }
    print("\n".join(f"{what:18} {value}" for what, value in rows.items()), flush=True)
    return all(
        [
            reached("every agent's every frame came", unique == frames and len(received) == AGENTS),
            reached(f"sequences from 1 to {ticks}, found {spans}", spans == [(1, ticks)]),
            reached("every ring's account closes", pushed == frames == sum(map(sum, accounts))),
            reached("the engine was missed, the rings held", failures > 0 and fleet.longest_backlog > 1),
        ]
    )


def main() -> None:
    arguments = sys.argv[1:]
    if not 1 <= len(arguments) <= 3 or arguments[0].startswith("-"):
        sys.exit(__doc__)
    seconds = float(arguments[1]) if len(arguments) > 1 else 30.0
    interval = Duration.parse(arguments[2] if len(arguments) > 2 else "1s")
    begin()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as folder:
        is_good = run(arguments[0], seconds, interval, Path(folder))
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
