"""What each command does; the command line itself is in `__main__`."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import closing, suppress
from functools import partial

import msgspec

from agent import config as configuration
from agent.assembly import Agent, catalogue
from agent.config import Config
from agent.control import check_place
from agent.daemon import Daemon, control_path
from agent.errors import HostprobeError, UsageError, complain
from agent.layers import Tree
from agent.logs import Log
from agent.notify import Notifier
from agent.pool import Buffer
from agent.serializers.formats import FORMATS, Names
from agent.sinks.sink import LineWriter
from agent.sinks.stdout import STDOUT
from agent.waker import Waker

_OPEN_FILES = 65_536
_STOPPING_SECONDS = 5.0  # besides what is delivered


def run(arguments: Namespace) -> int:
    """Collects until a signal comes, `--cycles` are done, or stdout's reader has gone."""
    config = _load(arguments)
    log = Log(config.log.level, config.log.format)
    _raise_file_limit()
    agent = Agent(config, log)
    waker = Waker()
    waker.catch_signals()
    waker.catch_reload()
    agent.exporter.open()
    if any(sink.buffer.populate for sink in config.sinks.values()):
        log.load()
    agent.exporter.start(waker.stop)
    for notice in config.notices:
        log.warning("configuration says", reason=notice)
    log.debug(
        "hostprobe runs",
        config=config.where or f"template {config.template}",
        interval_seconds=float(config.agent.interval),
        probes=list(config.probes),
        sinks=list(config.sinks),
    )
    lost = 0
    notifier = Notifier()
    try:
        all_done = Daemon(agent, waker, notifier, log, partial(_load, arguments), arguments.cycles).run()
    finally:
        waker.ignore_reload()
        notifier.stopping()
        notifier.extend(agent.config.agent.shutdown_timeout + _STOPPING_SECONDS)
        lost = agent.exporter.close(agent.config.agent.shutdown_timeout)
        agent.close()
        notifier.close()
    if not agent.exporter.reader_gone.is_set():
        log.debug("hostprobe ends", frames=agent.meter.frames, missed_cycles=agent.meter.missed_cycles)
    return int(all_done and lost > 0)


def _raise_file_limit() -> None:
    """A host with hundreds of interfaces has more files to keep open than the usual soft limit allows."""
    with suppress(ImportError, ValueError, OSError):  # not on Windows; or not allowed
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def once(arguments: Namespace) -> int:
    """Prints one frame; two samples are taken for its rates unless `--wait 0`."""
    if arguments.pretty and arguments.format != "json":
        raise UsageError(f"once: --pretty with --format {arguments.format}", "--format json")
    config = _load(arguments)
    log = Log("warning", config.log.format)
    _raise_file_limit()
    agent = Agent(config, log, sinks=False)
    waker = Waker()
    waker.catch_signals()
    agent.cycle.collect()
    if arguments.wait > 0:
        if waker.wait(arguments.wait):
            return 0
        agent.cycle.collect()
    buffer = Buffer()
    names: Names = next((sink.names for sink in config.sinks.values() if sink.format == arguments.format), "hostprobe")
    agent.serializer(arguments.format, names).write(agent.cycle.frame, buffer)
    payload = bytes(buffer.data)
    agent.close()
    print_line(
        msgspec.json.format(payload, indent=2) if arguments.pretty else payload, FORMATS[arguments.format].terminator
    )
    return 0


def check(arguments: Namespace) -> int:
    """Says whether a configuration is good: its text, and that its host and its sinks can be used."""
    config = _load(arguments)
    for notice in config.notices:
        complain(notice)
    with closing(Agent(config, Log(config.log.level, config.log.format))) as agent:
        agent.exporter.check()
        check_place(control_path(config.agent.control_socket))
    print_line(
        f"{config.where or 'no configuration file'}: good: template {config.template},"
        f" every {config.agent.interval}, probes {' '.join(config.probes)}, sinks {' '.join(config.sinks)}".encode()
    )
    return 0


def sample_config(arguments: Namespace) -> int:
    """Prints a template as it is loaded, comments included."""
    configuration.check_template(arguments.name, "sample-config: ")
    with open(configuration.template_path(arguments.name), "rb") as file:
        print_line(file.read().rstrip(b"\n"))
    return 0


def metrics(arguments: Namespace) -> int:
    """Prints the catalogue of every column."""
    from agent.serializers import catalogue as rendering
    from agent.serializers.frame_tables import FRAME_TABLES

    print_line(getattr(rendering, arguments.format)([*catalogue(), *FRAME_TABLES]).encode())
    return 0


def schema(arguments: Namespace) -> int:
    """Prints the JSON Schema of one line."""
    from agent.serializers.schema import line_schema

    print_line(msgspec.json.format(msgspec.json.encode(line_schema(catalogue())), indent=2))
    return 0


def bench(arguments: Namespace) -> int:
    """Measures what the agent costs on this host, and prints it."""
    from agent.bench import measuring, report

    before = None if arguments.compare is None else report.read(arguments.compare)
    config = _load(arguments)
    _raise_file_limit()
    found = measuring.measure(
        config,
        arguments.cycles,
        all_formats=arguments.all_formats,
        profile=arguments.profile,
        complain=complain,
    )
    print_line(found.json(before) if arguments.format == "json" else found.text(before))
    return 0


def verify(arguments: Namespace) -> int:
    """Says of JSON lines which frames are missing, repeated or out of order."""
    from agent import verification

    verified = verification.verify(arguments.files)
    print_line(verified.json() if arguments.format == "json" else verified.text())
    return verified.status


def spool(arguments: Namespace) -> int:
    """Says what a ring's file holds, or prints its payloads."""
    from agent.spool import Spool

    with closing(Spool(arguments.file)) as held:
        for _, payload in held.records():
            if arguments.dump and not print_line(payload):
                return 0
        if not arguments.dump:
            report = held.report
            print_line(
                report.text() if arguments.format == "text" else msgspec.json.format(msgspec.json.encode(report))
            )
        elif held.report.damage:
            raise HostprobeError(held.report.damage[0])
    return 0


def service(arguments: Namespace) -> int:
    """Installs the service, removes it, or says how the running agent does: status 1 where it isn't healthy."""
    if arguments.action == "status":
        from agent import control
        from agent.service.status import text

        state = control.ask(arguments.socket)
        print_line(
            msgspec.json.format(msgspec.json.encode(state), indent=2)
            if arguments.format == "json"
            else text(state).encode(errors="replace")
        )
        return int(bool(state.problems))
    from agent.service.installation import Installation

    installation = Installation()
    try:
        if arguments.action == "install":
            installation.install()
        else:
            installation.uninstall(arguments.purge)
    finally:
        for line in installation.done:
            print_line(line.encode())
    if not installation.done:
        print_line(b"nothing to do")
    return 0


def import_configuration(arguments: Namespace) -> int:
    """Prints another agent's configuration as one of hostprobe's, and on stderr what could not be carried over."""
    from agent.importing.conversion import convert

    imported = convert(arguments.file, arguments.kind)
    for line in imported.left_out:
        complain(line)
    print_line(imported.text.rstrip("\n").encode())
    return 0


def _load(arguments: Namespace) -> Config:
    overrides: dict[str, Tree] = {}
    for flag in ("interval", "root"):
        value = getattr(arguments, flag, None)
        if value is not None:
            overrides[f"--{flag}"] = {"agent": {flag: value}}
    return configuration.load(arguments.config, getattr(arguments, "template", None), overrides)


def print_line(payload: bytes, terminator: bytes = b"\n") -> bool:
    """Writes to stdout, past Python's own buffers; False when its reader has gone, which ends the program quietly.

    Raises:
        HostprobeError: stdout can't be written.
    """
    if sys.stdout is None:  # descriptor 1 was closed at the start, and may be another file by now
        raise HostprobeError("stdout: it is closed")
    try:
        with memoryview(payload) as view:
            LineWriter(terminator).write(STDOUT, view)
    except BrokenPipeError:
        return False
    except OSError as error:
        raise HostprobeError(f"stdout: {error.strerror}") from None
    return True
