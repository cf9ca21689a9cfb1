"""Kills the agent at random moments, and counts what a receiver that refuses a third misses and gets twice.

    python tests/bench/kills.py [KILLS=50] [SEED]

The real agent makes a frame every 10 ms for one http sink with its buffer in a file; it is killed
(SIGKILL) 50 to 1500 ms after each start, and started again on the same file. The receiver takes two
requests of three; the others it answers with 503 or 429, resets, or takes without an answer. It
takes up to 20 ms for an answer, so that a kill often comes between the two. A last run of the agent
finds a receiver that takes everything, and is ended by SIGTERM.

After each kill the buffer's file is read, so that what must come is known from the agent's side too:
the killed process's newest frame in the ring. A repeated frame is the receiver's own doing where
it withheld its answer the last time; any other was repeated because of a kill. The exit status is 1
if a bound is missed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import msgspec

sys.path.insert(0, str(Path(__file__).parents[2]))

from receivers import ROOT, HttpReceiver, LineFile, Verdict, agent, begin, reached

from agent.errors import UsageError
from agent.spool import Spool
from agent.verification import Header

REFUSED_RATIO = 1 / 3
REFUSALS = (Verdict.UNAVAILABLE, Verdict.TOO_MANY, Verdict.RESET, Verdict.WITHHELD)
ANSWER_SECONDS_MAX = 0.02
LIFE_SECONDS = (0.05, 1.5)
DRAIN_SECONDS = 60.0

CONFIG = """
template = "minimal"
[agent]
interval = "10ms"
max_cpu_ratio = 10.0
shutdown_timeout = "30s"
[log]
format = "json"
[sinks.main]
type = "http"
url = "http://127.0.0.1:{port}/"
[sinks.main.buffer]
path = "{folder}/main.ring"
size = "64MiB"
sync = "never"
[sinks.main.retry]
base = "10ms"
cap = "100ms"
"""


class Account:
    """What the receiver took, in its order.

    Attributes:
        verdicts: how many requests each became.
        refuses: whether it refuses a third.
        kills: how many there were so far.
        last: by instance, in the order in which they came first: the highest sequence that came.
        latest: of each frame's latest arrival: whether the answer was withheld, and the kills before.
        gaps: frames that came for the first time, but not right behind the one before of their instance.
        late: frames that came for the first time after one of a later instance.
        repeats: frames that came again, by the number of kills before; apart from these, those because of withheld
            answers, and those whose answer was given, to an agent that wasn't killed.
        batch: frames of the latest batch that was taken.
        bounds: by number of kills, frames of the last batch that was taken before.
    """

    def __init__(self, path: Path, draw: random.Random) -> None:
        self._lines = LineFile(path)
        self._draw = draw
        self._lock = threading.Lock()
        self._decode = msgspec.json.Decoder(Header).decode
        self.latest: dict[tuple[str, int], tuple[bool, int]] = {}
        self._newest = ""
        self.verdicts: Counter[Verdict] = Counter()
        self.refuses = True
        self.kills = 0
        self.last: dict[str, int] = {}
        self.gaps = self.late = self.repeats_withheld = self.repeats_for_nothing = 0
        self.repeats: Counter[int] = Counter()
        self.batch = 0
        self.batches: Counter[int] = Counter()
        self.bounds: dict[int, int] = {}

    def take(self, body: bytes) -> Verdict:
        with self._lock:
            refused = self.refuses and self._draw.random() < REFUSED_RATIO
            verdict = self._draw.choice(REFUSALS) if refused else Verdict.TAKEN
            self.verdicts[verdict] += 1
            if verdict in (Verdict.TAKEN, Verdict.WITHHELD):
                self._lines.write(body)
                lines = body.splitlines()
                self.batch = len(lines)
                self.batches[self.batch] += 1
                for line in lines:
                    self._count(self._decode(line), verdict is Verdict.WITHHELD)
            pause_seconds = self._draw.uniform(0, ANSWER_SECONDS_MAX)
        time.sleep(pause_seconds)
        return verdict

    def _count(self, header: Header, withheld: bool) -> None:
        instance, sequence = header.instance, header.sequence
        before = self.latest.get((instance, sequence))
        self.latest[instance, sequence] = withheld, self.kills
        if before is not None:
            was_withheld, kills = before
            if was_withheld:
                self.repeats_withheld += 1
            elif kills == self.kills:
                self.repeats_for_nothing += 1
            else:
                self.repeats[self.kills] += 1
            return
        if instance not in self.last:
            self._newest = instance
        self.late += instance != self._newest
        self.gaps += sequence != self.last.get(instance, 0) + 1
        self.last[instance] = max(self.last.get(instance, 0), sequence)

    def count_kill(self) -> None:
        with self._lock:
            self.kills += 1
            self.bounds[self.kills] = self.batch

    def missing(self, pushed: dict[str, int]) -> int:
        """Frames that were in the ring, or are older than one that came, and did not come."""
        last = {name: max(pushed.get(name, 0), self.last.get(name, 0)) for name in {*pushed, *self.last}}
        return sum(
            (name, sequence) not in self.latest for name, newest in last.items() for sequence in range(1, newest + 1)
        )


@dataclass
class Ring:
    """What was seen in the ring's file after the kills.

    Attributes:
        newest: by instance, the highest sequence that it held.
        backlog: the most frames that it held.
        damage: what was wrong with it.
    """

    path: Path
    newest: dict[str, int] = field(default_factory=dict)
    backlog: int = 0
    damage: list[str] = field(default_factory=list)

    def look(self) -> int:
        """Reads it; how many frames it holds, or -1 while it isn't a ring yet."""
        try:
            with closing(Spool(str(self.path))) as spool:
                for _ in spool.records():
                    pass
        except UsageError:
            return -1
        report = spool.report
        self.newest |= {name: held.last for name, held in report.runs.items()}
        self.damage += report.damage
        self.backlog = max(self.backlog, report.frames)
        return report.frames


def live_and_die(config: Path, log: BinaryIO, seconds: float) -> None:
    """Starts an agent and kills it after some time."""
    with agent(config, log) as killed:
        time.sleep(seconds)
        assert killed.poll() is None, "the agent has ended by itself"
        killed.send_signal(signal.SIGKILL)
        killed.wait()


def live_to_the_end(config: Path, log: BinaryIO, ring: Ring) -> int:
    """Starts an agent and ends it when it has delivered what was left; its exit status."""
    with agent(config, log) as last:
        until = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < until and not 0 <= Ring(ring.path).look() <= 10:
            time.sleep(0.1)
        time.sleep(0.5)
        last.send_signal(signal.SIGTERM)
        return int(last.wait(60))


def run(kills: int, seed: int, folder: Path) -> bool:
    """Kills the agent often; whether all bounds are met."""
    draw = random.Random(seed)
    account = Account(folder / "taken.jsonl", draw)
    receiver = HttpReceiver(0, account.take)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    config, log_path, ring = folder / "hostprobe.toml", folder / "log", Ring(folder / "main.ring")
    config.write_text(CONFIG.format(port=receiver.port, folder=folder))
    start = time.monotonic()
    with log_path.open("wb") as log:
        for _ in range(kills):
            live_and_die(config, log, draw.uniform(*LIFE_SECONDS))
            receiver.await_end_of_connections()
            account.count_kill()
            ring.look()
        print(f"{kills} kills in {time.monotonic() - start:.0f} s, seed {seed}, a frame of minimal every 10 ms")
        print(f"frames before the last run {len(account.latest)}, at most {ring.backlog} in the ring after a kill")
        account.refuses = False
        status = live_to_the_end(config, log, ring)
    receiver.shutdown()
    report_log(log_path, ring)
    return report(account, ring, status, folder / "taken.jsonl")


def report_log(path: Path, ring: Ring) -> None:
    """Prints what the agents logged, and what was wrong with their ring."""
    lines = path.read_text().splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    opened = sum(event["event"] == "sink's circuit" and event["circuit"] == "open" for event in events)
    damage = ring.damage + [event["reason"] for event in events if event["event"] == "buffer repaired"]
    print(f"circuit opened    {opened:>8}   times")
    print(f"ring's damage     {len(damage):>8}   {'; '.join(damage[:3])}")
    for line in [line for line in lines if not line.startswith("{")][:20]:
        print(f"stderr: {line}")


def report(account: Account, ring: Ring, status: int, taken: Path) -> bool:
    """Prints what became of the frames; whether all bounds are met."""
    verified = subprocess.run(
        [sys.executable, "-m", "agent", "verify", str(taken), "--format", "json"],
        cwd=ROOT, capture_output=True, check=False,
    )  # fmt: skip
    totals = json.loads(verified.stdout)["total"]
    missing, held, repeats = account.missing(ring.newest), ring.look(), account.repeats
    refusals = ", ".join(f"{verdict} {account.verdicts[verdict]}" for verdict in Verdict)
    worst = max(repeats.values(), default=0)
    print(f"requests          {account.verdicts.total():>8}   {refusals}")
    print(f"frames a batch    {max(account.batches):>8}   at most, {account.batches.most_common(1)[0][0]} mostly")
    print(f"frames            {len(account.latest):>8}   of {len(account.last)} instances")
    print(f"  missing         {missing:>8}   of those that the ring was seen to hold, or older")
    print(f"  out of order    {account.gaps:>8}   not behind the one before; {account.late} after a later instance")
    print(f"  repeated        {repeats.total():>8}   by {len(repeats)} of the kills, {worst} at most by one")
    print(f"                  {account.repeats_withheld:>8}   because of withheld answers")
    print(f"                  {account.repeats_for_nothing:>8}   without a reason")
    print(f"verify            {verified.returncode:>8}   {totals}")
    print(f"held at the end   {held:>8}   status {status}")
    over = [(kill, count, account.bounds[kill]) for kill, count in repeats.items() if count > account.bounds[kill]]
    if over:
        print(f"kill, repeats, batch: {over}")
    bounds = [
        reached("0 frames missing", not missing and not totals["missing"] and not verified.returncode),
        reached("instances and their frames in order", not account.gaps and not account.late),
        reached("at most one batch repeated per kill", not over and not account.repeats_for_nothing),
        reached("a clean end leaves nothing behind", held == 0 and status == 0),
    ]
    return all(bounds)


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else int.from_bytes(os.urandom(3))
    begin()
    with tempfile.TemporaryDirectory() as folder:
        is_good = run(kills, seed, Path(folder))
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
