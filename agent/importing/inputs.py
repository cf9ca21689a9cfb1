"""What an input of another agent is to hostprobe: the probes that have its figures, and what they lack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from agent.importing.draft import Block, Draft
from agent.importing.options import Options

HOST_ONLY = "hostprobe collects the host only"

Fill = Callable[[Draft, Options], None]


@dataclass(frozen=True, slots=True)
class Input:
    """One input.

    Attributes:
        probes: those that have its figures.
        lacks: which of its figures have no column.
        harmless: its settings that change nothing, as hostprobe tells both ways.
        fill: takes its settings.
    """

    probes: tuple[str, ...]
    lacks: str = ""
    harmless: tuple[str, ...] = ()
    fill: Fill | None = None


def carry_over(draft: Draft, source: Input, options: Options, reasons: Mapping[str, str], interval: str = "") -> None:
    """Turns on the probes of an input, and takes its settings."""
    interval = options.duration("interval") or interval
    blocks = [draft.turn_on(probe, options.place, interval) for probe in source.probes]
    options.drop(*source.harmless)
    if source.fill is not None:
        source.fill(draft, options)
    if source.lacks:
        draft.leave_out(blocks[0], options.place, source.lacks)
    draft.leave_out_rest(blocks[0], options, dict(reasons))


def count_tcp(draft: Draft, origin: str, states: bool) -> Block:
    """The probe of sockets with its counters, and with a walk through the states where they are asked for."""
    block = draft.probes["sockets"]
    if states:
        draft.put(block, "tcp_states", True, origin)
    elif "tcp_states" not in block.settings:
        draft.put(block, "tcp_states", "summary", origin, "counters only, without a walk through all sockets")
    if "listening" not in block.settings:
        draft.put(block, "listening", False, origin)
    return block
