"""A configuration in the making: every key is tried with the loader before it is kept, and what is not kept is told."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from agent import config
from agent.discovery import PROBES
from agent.errors import UsageError
from agent.importing.options import Options, Tree
from agent.importing.toml_text import comment_text, key_text, setting_lines
from agent.units import Duration

TEMPLATE = "standard"
NO_SETTING = "hostprobe has no such setting"
_NAME_CHARACTERS_MAX = 80
_SINKS_MAX = 64


@dataclass(slots=True)
class Block:
    """A table of the file that is printed.

    Attributes:
        settings: those that have been tried.
        why: comments behind them, by key.
        remarks: comments above the table.
        left_out: what has no place in it, a line each.
        refused: why the whole table is a comment; "" where it isn't.
    """

    path: tuple[str, ...]
    settings: Tree = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    refused: str = ""

    def lines(self) -> Iterator[str]:
        """The table as it is printed; nothing where it is empty."""
        yield from (f"# {comment_text(text)}" for text in (*self.remarks, *self.left_out))
        mark = "# " if self.refused else ""
        if self.refused:
            yield f"# a comment, as it can't be carried over: {comment_text(self.refused)}"
        if self.settings:
            yield f"{mark}[{key_text(*self.path)}]"
        for key, value in self.settings.items():
            yield from (mark + line for line in setting_lines(key, value, self.why.get(key, "")))


@dataclass(slots=True)
class SinkDraft:
    """A sink as another agent's output describes it.

    Attributes:
        origin: how messages name the output.
        settings: its table; `type` is the first of them.
        left_out: what it doesn't have, and why.
        refused: why it can only be a comment.
    """

    origin: str
    settings: Tree
    remarks: list[str] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    refused: str = ""


class Draft:
    """What is printed in the end.

    Args:
        product: whose configuration it comes from, "Telegraf" or "collectd".
        file: the name of that.

    Attributes:
        agent, tags, log: tables.
        inputs: a place for inputs that have no table.
        outputs: likewise.
        probes: tables by the probe's name, in the order of collection.
        left_out: a line for each thing that was not carried over, in the order of the file that is read.
    """

    def __init__(self, product: str, file: str) -> None:
        self.agent = Block(("agent",))
        self.tags = Block(("agent", "tags"))
        self.log = Block(("log",))
        self.inputs = Block(())
        self.outputs = Block(())
        self.probes = {name: Block(("probes", name), {"enabled": name == "agent"}) for name in PROBES}
        self.left_out: list[str] = []
        self._title = f"Written by `hostprobe import` from {os.path.basename(file)}, a configuration of {product}."
        self._sinks: list[Block] = []
        self._told: set[str] = set()
        self._intervals: dict[str, list[tuple[str, str]]] = {}

    def leave_out(self, block: Block, what: str, why: str) -> None:
        """Notes that something was not carried over, at a place in the file and in the list."""
        line = f"not carried over: {_named(what)}: {comment_text(why)}"
        if line not in self._told:
            self._told.add(line)
            block.left_out.append(line)
            self.left_out.append(line)

    def put(self, block: Block, key: str, value: Any, origin: str, why: str = "") -> bool:
        """Keeps a setting if the loader takes it, and else leaves out what it comes from."""
        before = dict(block.settings)
        block.settings[key] = value
        fault = self._fault()
        if fault:
            block.settings = before
            self.leave_out(block, origin, fault)
            return False
        block.why.pop(key, None)
        if why:
            block.why[key] = why
        return True

    def turn_on(self, probe: str, origin: str, interval: str = "") -> Block:
        """Enables a probe; `interval` is the origin's own, "" where it has the agent's."""
        self._intervals.setdefault(probe, []).append((interval, origin))
        block = self.probes[probe]
        block.settings["enabled"] = True
        return block

    def add_sink(self, sink: SinkDraft) -> None:
        """Keeps a sink if the loader takes it, and prints it as a comment else."""
        if len(self._sinks) >= _SINKS_MAX:
            self.leave_out(self.outputs, sink.origin, f"more than {_SINKS_MAX} outputs")
            return
        is_first = all(block.refused for block in self._sinks)
        block = Block(("sinks", "main"), sink.settings, remarks=[f"{sink.origin}:", *sink.remarks])
        block.refused = sink.refused
        if not (is_first and not sink.refused):
            block.path = self._sink_path(sink.settings["type"])
        self._sinks.append(block)
        if not block.refused and (fault := self._fault()):
            block.refused = fault
            if block.path == ("sinks", "main"):
                block.path = self._sink_path(sink.settings["type"])
        if block.refused:
            self.leave_out(block, sink.origin, block.refused)
            block.left_out.clear()  # it stands above the table anyway
        for what, why in sink.left_out:
            self.leave_out(block, what, why)

    def leave_out_rest(self, block: Block, options: Options, reasons: dict[str, str]) -> None:
        """Tells what nobody has taken of a section, and what could not be taken."""
        for what, why in rest(options, reasons):
            self.leave_out(block, what, why)

    def text(self) -> str:
        """The whole file, commented; it loads."""
        self._settle_intervals()
        if not any(not block.refused for block in self._sinks):
            self._sinks.append(
                Block(("sinks", "main"), {"type": "stdout"}, remarks=["No output could be carried over: to stdout."])
            )
        lines = [
            f"# {comment_text(self._title)}",
            "# `hostprobe check --config FILE` says whether this host has what it needs.",
            "",
            f'template = "{TEMPLATE}"',
        ]
        for block in (self.agent, self.tags, self.log, *self._probe_blocks(), self.inputs, *self._sinks, self.outputs):
            found = list(block.lines())
            lines += ["", *found] if found else []
        return "\n".join(lines) + "\n"

    def _probe_blocks(self) -> Iterable[Block]:
        for block in self.probes.values():
            if not block.settings["enabled"]:
                block.why["enabled"] = "nothing asks for it"
            elif block.path == ("probes", "agent"):
                block.why.setdefault("enabled", "what hostprobe itself does and costs")
            yield block

    def _settle_intervals(self) -> None:
        """A probe fills all its tables at once: the shortest interval of those that ask for it holds."""
        for probe, asked in self._intervals.items():
            block = self.probes[probe]
            own = [interval for interval, _ in asked if interval]
            if not own:
                continue
            shortest = min(own, key=Duration.parse) if len(own) == len(asked) else ""
            origin = next(origin for interval, origin in asked if interval == shortest or not shortest)
            if shortest and not self.put(block, "interval", shortest, f"{origin}.interval"):
                continue
            for interval, origin in asked:
                if interval and interval != shortest:
                    what = f"the probe {probe} has one interval, {shortest or 'that of the agent'}"
                    self.leave_out(block, f"{origin}.interval", what)
        self._intervals.clear()

    def _sink_path(self, name: str) -> tuple[str, ...]:
        taken = {block.path[-1] for block in self._sinks}
        names = (name, *(f"{name}_{number}" for number in range(2, len(taken) + 3)))
        return ("sinks", next(each for each in names if each not in taken))

    def _fault(self) -> str:
        """What the loader says against the draft as it stands, "" where it takes it."""
        blocks = (self.agent, self.tags, self.log, *self.probes.values(), *self._sinks)
        lines = [f'template = "{TEMPLATE}"']
        for block in blocks:
            if block.settings and not block.refused:
                lines.append(f"[{key_text(*block.path)}]")
                for key, value in block.settings.items():
                    lines += setting_lines(key, value)
        with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
            file.write("\n".join(lines))
            file.flush()
            try:
                config.load(file.name, environment={})
            except UsageError as error:
                return str(error).removeprefix(f"{file.name}: ")
        return ""


def rest(options: Options, reasons: dict[str, str]) -> list[tuple[str, str]]:
    """What could not be taken of a section, and what nobody has taken, with the reasons."""
    faults = [(f"{options.place}.{key}", why) for key, why in options.faults]
    return faults + [(f"{options.place}.{name}", reasons.get(name.lower(), NO_SETTING)) for name in options.rest()]


def _named(what: str) -> str:
    """A name that somebody has written, in one line of a bearable length."""
    text = comment_text(what)
    return text if len(text) <= _NAME_CHARACTERS_MAX else f"{text[: _NAME_CHARACTERS_MAX - 1]}…"
