"""How a running agent does, as lines for a person."""

from __future__ import annotations

import time

from agent.control import State
from agent.units import Duration


def text(state: State) -> str:
    """The state of an agent, its sinks, probes that fail, and its last warnings."""
    health = "healthy" if not state.problems else "; ".join(state.problems)
    lines = [
        f"hostprobe {state.version} on {state.host}, pid {state.pid}: {health}",
        f"configuration   {state.config}, taken again {state.reloads} times, refused {state.reload_failures} times",
    ]
    if state.reload_error:
        lines.append(f"not taken       {state.reload_error}")
    resident = "" if state.resident_bytes is None else f", {state.resident_bytes / 1e6:.1f} MB resident"
    share = state.cpu_seconds / state.uptime_seconds if state.uptime_seconds else 0.0
    lines += [
        f"running for     {Duration(round(state.uptime_seconds))}: {state.frames} frames, one every"
        f" {Duration(state.interval_seconds)}, {state.missed_cycles} missed; {share:.2%} of a CPU{resident}",
        "",
        f"{'sink':16}{'type':14}{'circuit':10}{'sent':>10}{'a second':>10}{'dropped':>9}{'backlog':>9}{'latency':>10}",
    ]
    for sink in state.sinks:
        rate = sink.sent_frames / state.uptime_seconds if state.uptime_seconds else 0.0
        latency = "-" if sink.latency_seconds is None else f"{sink.latency_seconds * 1000:.2f} ms"
        lines.append(
            f"{sink.name:16}{sink.type:14}{sink.circuit:10}{sink.sent_frames:10}{rate:10.2f}{sink.dropped_frames:9}"
            f"{sink.backlog_frames:9}{latency:>10}"
        )
    failing = [probe for probe in state.probes if probe.up is False]
    lines += ["", f"probes          {len(state.probes)}, {len(failing)} of them fail"]
    lines += [f"  {probe.name} fails, {probe.failures} times so far" for probe in failing]
    if state.latest:
        lines += ["", "last warnings"]
    for line in state.latest:
        moment = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(line.time_unix_ns // 1_000_000_000))
        fields = ", ".join(f"{name} {value}" for name, value in line.fields.items())
        lines.append(f"  {moment} {line.level}: {line.event}{f' ({fields})' if fields else ''}")
    return "\n".join(lines)
