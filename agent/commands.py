"""What each command does; the command line itself is in `__main__`."""

from __future__ import annotations

import sys
from argparse import Namespace

import msgspec

from agent import config as configuration
from agent.assembly import Agent, catalogue
from agent.config import Config
from agent.cycle import Schedule
from agent.errors import HostprobeError
from agent.layers import Tree
from agent.logs import Log
from agent.pool import Buffer
from agent.sinks.sink import LineWriter
from agent.sinks.stdout import STDOUT
from agent.units import Duration
from agent.waker import Waker


def run(arguments: Namespace) -> int:
    """Collects until a signal comes, `--cycles` are done, or stdout's reader has gone."""
    config = _load(arguments)
    log = Log(config.log.level, config.log.format)
    agent = Agent(config, log)
    waker = Waker()
    waker.catch_signals()
    agent.exporter.open()
    agent.exporter.start(waker.stop)
    log.debug(
        "hostprobe runs",
        config=config.where or f"template {config.template}",
        interval_seconds=float(config.agent.interval),
        probes=list(config.probes),
        sinks=list(config.sinks),
    )
    try:
        _run_cycles(agent, waker, arguments.cycles)
    finally:
        agent.exporter.close(config.agent.shutdown_timeout)
        agent.close()
    if not agent.exporter.reader_gone.is_set():
        log.debug("hostprobe ends", frames=agent.meter.frames, missed_cycles=agent.meter.missed_cycles)
    return 0


def _run_cycles(agent: Agent, waker: Waker, cycles: int) -> None:
    schedule = Schedule(agent.config.agent.interval.ns, agent.config.agent.align)
    while True:
        while (left := schedule.seconds_left()) > 0:
            if waker.wait(left):
                return
        if waker.stopped:
            return
        agent.cycle.run(schedule.tick)
        if agent.meter.frames == cycles:
            return
        agent.meter.missed_cycles += schedule.advance()


def once(arguments: Namespace) -> int:
    """Prints one frame; two samples are taken for its rates unless `--wait 0`."""
    config = _load(arguments)
    log = Log("warning", config.log.format)
    agent = Agent(config, log, sinks=False)
    waker = Waker()
    waker.catch_signals()
    agent.cycle.collect()
    if arguments.wait > 0:
        if waker.wait(arguments.wait):
            return 0
        agent.cycle.collect()
    buffer = Buffer()
    agent.serializer.write(agent.cycle.frame, buffer)
    payload = bytes(buffer.data)
    agent.close()
    print_line(msgspec.json.format(payload, indent=2) if arguments.pretty else payload)
    return 0


def check(arguments: Namespace) -> int:
    """Says whether a configuration is good: its text, and that its host and its sinks can be used."""
    config = _load(arguments)
    agent = Agent(config, Log(config.log.level, config.log.format))
    agent.exporter.open()
    agent.close()
    print_line(
        f"{config.where or 'no configuration file'}: good: template {config.template},"
        f" every {config.agent.interval}, probes {' '.join(config.probes)}, sinks {' '.join(config.sinks)}".encode()
    )
    return 0


def sample_config(arguments: Namespace) -> int:
    """Prints a template as it is loaded, comments included."""
    configuration.check_template(arguments.name, "sample-config: ")
    print_line(configuration.template_path(arguments.name).read_bytes().rstrip(b"\n"))
    return 0


def metrics(arguments: Namespace) -> int:
    """Prints the catalogue of every column."""
    from agent.serializers import catalogue as rendering

    print_line(getattr(rendering, arguments.format)(list(catalogue())).encode())
    return 0


def schema(arguments: Namespace) -> int:
    """Prints the JSON Schema of one line."""
    from agent.serializers.schema import line_schema

    print_line(msgspec.json.format(msgspec.json.encode(line_schema(catalogue())), indent=2))
    return 0


def _load(arguments: Namespace) -> Config:
    overrides: dict[str, Tree] = {}
    for flag in ("interval", "root"):
        value = getattr(arguments, flag, None)
        if value is not None:
            overrides[f"--{flag}"] = {"agent": {flag: value}}
    return configuration.load(arguments.config, getattr(arguments, "template", None), overrides)


def print_line(payload: bytes) -> None:
    """Writes to stdout, past Python's own buffers; a reader that has gone ends the program quietly.

    Raises:
        HostprobeError: stdout can't be written.
    """
    if sys.stdout is None:  # descriptor 1 was closed at the start, and may be another file by now
        raise HostprobeError("stdout: it is closed")
    try:
        with memoryview(payload) as view:
            LineWriter().write(STDOUT, view)
    except BrokenPipeError:
        pass
    except OSError as error:
        raise HostprobeError(f"stdout: {error.strerror}") from None


def duration(text: str) -> Duration:
    """A duration argument; "0" needs no unit."""
    return Duration(0) if text == "0" else Duration.parse(text)
