"""The agent's own figures, in tables like any other."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from agent.delivery import Circuit
from agent.frame import Frame
from agent.sink_worker import SinkWorker
from agent.table import NAN, Labels, Priority, TableSpec, counter, gauge
from probes.probe import ProbeSettings
from probes.procfs import PAGE_BYTES, ProcFile, integer

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

AGENT = TableSpec(
    "agent",
    "What the agent itself did and costs.",
    gauge("cycle_seconds", "seconds", "What the cycle before this one took: collect, serialize, push."),
    counter("missed_cycles_total", "cycles", "Cycles skipped because the one before took longer than the interval."),
    counter("probe_failures_total", "failures", "Collections that failed, of all probes."),
    counter("frames_total", "frames", "Frames completed before this one."),
    counter("payload_bytes_total", "bytes", "Bytes of those frames, in all formats."),
    counter("cpu_seconds_total", "seconds", "CPU time of the agent's process.", per=1_000_000_000),
    gauge("resident_bytes", "bytes", "Resident memory of the agent's process."),
    counter("collector_runs_total", "runs", "Runs of Python's cyclic garbage collector."),
    gauge("allocated_blocks", "blocks", "Memory blocks that Python has allocated now."),
    counter("voluntary_context_switches_total", "switches", "Times the process gave up the CPU to wait."),
    counter("involuntary_context_switches_total", "switches", "Times the process was made to give up the CPU."),
    counter("reloads_total", "reloads", "Times that another configuration was taken, by SIGHUP."),
    counter("reload_failures_total", "reloads", "Times that it wasn't, as something in it was wrong."),
    gauge("throttle_ratio", "ratio", "How far it holds back: intervals are longer by 1/(1 - throttle_ratio)."),
    priority=Priority.HIGH,
)
AGENT_PROBE = TableSpec(
    "agent_probe",
    "How each probe does; those that are not due keep their last figures.",
    gauge("seconds", "seconds", "What its last collection took; for the agent's own probe, the one before."),
    counter("failures_total", "failures", "Its collections that failed."),
    gauge("up", "boolean", "1 if its last collection succeeded, 0 if it failed."),
    labels=("probe",),
    priority=Priority.HIGH,
)
AGENT_SINK = TableSpec(
    "agent_sink",
    "How each sink does.",
    counter("sent_frames_total", "frames", "Frames delivered."),
    counter("sent_bytes_total", "bytes", "Payload bytes delivered."),
    counter("dropped_frames_total", "frames", "Frames given up, for whatever reason."),
    counter("failures_total", "failures", "Deliveries that failed."),
    counter("retries_total", "retries", "Deliveries tried again."),
    gauge("backlog_frames", "frames", "Frames not delivered yet."),
    gauge("backlog_bytes", "bytes", "Payload bytes not delivered yet."),
    gauge("ring_used_ratio", "ratio", "The part of the ring that is occupied."),
    gauge("oldest_seconds", "seconds", "Age of the oldest frame not delivered; null when there is none."),
    gauge("circuit_open", "boolean", "1 after 5 failures in a row, until a delivery succeeds: the peer is left alone."),
    gauge("latency_p50_seconds", "seconds", "From a frame's stamp to its delivery: median of the latest frames."),
    gauge("latency_p99_seconds", "seconds", "The same: 99 of 100 took no longer."),
    gauge("circuit_half_open", "boolean", "1 while the circuit is open and lets up to 3 trials through."),
    counter("recovered_frames_total", "frames", "Frames that the buffer's file held at the start."),
    counter("thinned_frames_total", "frames", "Frames pushed without some of their tables, as the ring filled up."),
    counter("dropped_full_frames_total", "frames", "Given up because the ring was full."),
    counter("dropped_aged_frames_total", "frames", "Given up because they were older than max_age."),
    counter("dropped_rejected_frames_total", "frames", "Given up because the peer refused them for good."),
    counter("dropped_damaged_frames_total", "frames", "Given up because they were damaged in the buffer's file."),
    counter("dropped_sampled_frames_total", "frames", "Given up by when_full = sample."),
    counter("dropped_shutdown_frames_total", "frames", "Given up because the agent ended before they were sent."),
    labels=("sink",),
    priority=Priority.HIGH,
)


@dataclass(slots=True)
class ProbeMeter:
    """What the cycle has seen of one probe; `failing` is the message of the present episode."""

    name: str
    seconds: float = NAN
    failures: int = 0
    up: float = NAN
    failing: str = ""


@dataclass(slots=True)
class CycleMeter:
    """What the cycle has done since the start; `ended_ns` is when the last one did, by the monotonic clock."""

    cycle_seconds: float = NAN
    ended_ns: int = 0
    missed_cycles: int = 0
    probe_failures: int = 0
    frames: int = 0
    payload_bytes: int = 0
    throttle: float = 0.0
    reloads: int = 0
    reload_failures: int = 0


class ProcessMemory:
    """The resident memory of this process."""

    def __init__(self) -> None:
        self._statm = ProcFile("/proc/self/statm")

    def resident_bytes(self, file_bytes: int = 0) -> float:
        """Bytes of memory that are mapped and present.

        Args:
            file_bytes: of files that are mapped and don't count, as far as they are present.
        """
        words = self._statm.read().split(None, 3)  # proc_pid_statm(5): size resident shared …, in pages
        pages = [integer(word) for word in words[1:3]]
        if len(pages) == 2 and pages[0] is not None and pages[1] is not None:
            return pages[0] * PAGE_BYTES - min(file_bytes, pages[1] * PAGE_BYTES)
        try:
            import psutil

            return float(psutil.Process(os.getpid()).memory_info().rss)
        except (ImportError, OSError):  # no file can be opened any more
            return NAN

    def close(self) -> None:
        self._statm.close()


class AgentProbe:
    """The tables agent, agent_probe and agent_sink; collected last, so that it sees the others' cycle."""

    Settings = ProbeSettings
    tables = (AGENT, AGENT_PROBE, AGENT_SINK)

    def __init__(self, cycle: CycleMeter, probes: Sequence[ProbeMeter], sinks: Sequence[SinkWorker]) -> None:
        self._cycle = cycle
        self._probes = probes
        self._sinks = sinks
        self._probe_labels: list[Labels] = [(meter.name,) for meter in probes]
        self._memory = ProcessMemory()

    def collect(self, frame: Frame) -> None:
        self._collect_agent(frame)
        table = frame.open(AGENT_PROBE)
        count = table.claim(self._probe_labels)
        table.counters[:count, 0] = [meter.failures for meter in self._probes]
        table.gauges[:count] = [(meter.seconds, meter.up) for meter in self._probes]
        table = frame.open(AGENT_SINK)
        workers = list(self._sinks)  # a reload exchanges them
        table.claim([(worker.name,) for worker in workers])
        for row, worker in enumerate(workers):
            oldest = worker.ring.oldest_stamp_ns
            sent, dropped, backlog = worker.frames
            circuit, ring = worker.circuit, worker.ring
            table.put_counters(
                row,
                (
                    sent,
                    worker.sent_bytes,
                    dropped,
                    worker.failures,
                    worker.retries,
                    ring.recovered,
                    worker.thinned_frames,
                    *ring.drops,
                ),
            )
            table.put_gauges(
                row,
                (
                    backlog,
                    ring.held_bytes,
                    ring.used_ratio,
                    NAN if oldest is None else max(frame.monotonic_ns - oldest, 0) / 1e9,
                    circuit is not Circuit.CLOSED,
                    *worker.latency.quantiles_seconds(0.5, 0.99),
                    circuit is Circuit.HALF_OPEN,
                ),
            )

    def _collect_agent(self, frame: Frame) -> None:
        meter = self._cycle
        voluntary, involuntary = _context_switches()
        table = frame.open(AGENT)
        table.put_counters(
            0,
            (
                meter.missed_cycles,
                meter.probe_failures,
                meter.frames,
                meter.payload_bytes,
                time.process_time_ns(),
                sum(generation["collections"] for generation in gc.get_stats()),
                voluntary,
                involuntary,
                meter.reloads,
                meter.reload_failures,
            ),
        )
        table.put_gauges(
            0, (meter.cycle_seconds, self._memory.resident_bytes(), sys.getallocatedblocks(), meter.throttle)
        )

    def close(self) -> None:
        self._memory.close()


def _context_switches() -> tuple[int | None, int | None]:
    if resource is None:
        return None, None
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_nvcsw, usage.ru_nivcsw
