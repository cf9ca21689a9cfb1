"""The command line."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from agent import __version__
from agent.errors import HostprobeError, UsageError, complain
from agent.serializers.formats import FORMATS
from agent.units import LONGEST_INTERVAL, Duration
from templates import TEMPLATES

_DESCRIPTION = """\
Host metrics agent: CPU, memory, load, IO, file systems, network and sockets of this
host as one JSON line a cycle. Lines go to stdout, everything else to stderr.

Without --config, the configuration is $HOSTPROBE_CONFIG, else /etc/hostprobe/hostprobe.toml,
else the standard template with one stdout sink.
"""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Knows its width by itself: argparse would import shutil for it, and with that 0.6 MB, whatever the command."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


def _columns() -> int:
    """The width of the terminal."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and help texts kept as written."""

    def __init__(self, **options: object) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        from agent import commands

        commands.print_line(message.rstrip().encode())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hostprobe",
        description=_DESCRIPTION,
        epilog="Example:\n  hostprobe once --pretty        look at this host now\n"
        "  hostprobe run --interval 1s    a line a second until Ctrl-C",
    )
    parser.add_argument("--version", action="version", version=f"hostprobe {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    def command(name: str, function: str, help: str, example: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=f"Example:\n  {example}"
        )
        sub.set_defaults(function=function)
        return sub

    run = command("run", "run", "run the agent", "hostprobe run --template minimal --interval 1s | head -3")
    once = command("once", "once", "print one frame and end", "hostprobe once --wait 0 --pretty")
    check = command("check", "check", "check a configuration", "hostprobe check --config hostprobe.toml")
    bench = command(
        "bench",
        "bench",
        "measure what the agent costs on this host",
        "hostprobe bench --format json > before.json; hostprobe bench --compare before.json",
    )
    for sub in (run, once, check, bench):
        sub.add_argument("--config", metavar="FILE", help="the configuration file")
    for sub in (run, once, bench):
        sub.add_argument("--template", metavar="NAME", help=f"start from this template: {', '.join(TEMPLATES)}")
    run.add_argument("--interval", metavar="D", help='between two frames: "250ms", "10s", "1m"')
    run.add_argument("--cycles", metavar="N", type=_cycles, default=0, help="end after N frames; 0, the default: never")
    once.add_argument(
        "--format", choices=FORMATS, default="json", help=f"the output's format: {', '.join(FORMATS)}", metavar="F"
    )
    once.add_argument(
        "--wait",
        metavar="D",
        type=_duration,
        default=1.0,
        help="between its two samples, 1s unless given; 0 takes one sample, without rates",
    )
    once.add_argument("--pretty", action="store_true", help="indented, for reading")
    for sub in (run, once, bench):
        sub.add_argument("--root", metavar="DIR", help="read DIR/proc and DIR/sys, another host's")
    bench.add_argument("--cycles", metavar="N", type=_count, default=300, help="how many of each; 300 unless given")
    bench.add_argument("--all-formats", action="store_true", help="measure all formats, not only JSON and the sinks'")
    bench.add_argument("--format", choices=("text", "json"), default="text", help="the report's, text unless given")
    bench.add_argument("--compare", metavar="FILE", help="show what has changed since this report in JSON")
    bench.add_argument("--profile", action="store_true", help="list the lines with more than 5 %% of the allocations")
    sample = command(
        "sample-config",
        "sample_config",
        "print a template, a commented configuration file",
        "hostprobe sample-config standard > hostprobe.toml",
    )
    sample.add_argument("name", metavar="TEMPLATE", help=" or ".join(TEMPLATES))
    metrics = command("metrics", "metrics", "list every column", "hostprobe metrics | grep tcp")
    metrics.add_argument("--format", choices=("text", "markdown", "json"), default="text", help="text unless given")
    command("schema", "schema", "print the JSON Schema of one line", "hostprobe schema > hostprobe.schema.json")
    verify = command(
        "verify",
        "verify",
        "say which frames are missing, repeated or out of order; status 1 where one is missing",
        "hostprobe verify frames.jsonl.1.gz frames.jsonl",
    )
    verify.add_argument("files", metavar="FILE", nargs="+", help="JSON lines, in .gz packed ones; - is stdin")
    verify.add_argument("--format", choices=("text", "json"), default="text", help="the report's, text unless given")
    spool = command(
        "spool",
        "spool",
        "say what a sink's buffer in a file holds, also while an agent uses it",
        "hostprobe spool /var/lib/hostprobe/main.ring --dump | hostprobe verify -",
    )
    spool.add_argument("file", metavar="FILE", help="as buffer.path names it, or one that was set aside")
    spool.add_argument("--dump", action="store_true", help="print its payloads, a line each, oldest first")
    spool.add_argument("--format", choices=("text", "json"), default="text", help="the report's, text unless given")
    service = command(
        "service",
        "service",
        "install the agent as a systemd service, remove it, or say how the running one does",
        "hostprobe service install && hostprobe service status",
    )
    actions = ("install", "uninstall", "status")
    service.add_argument("action", metavar="ACTION", choices=actions, help=", ".join(actions))
    service.add_argument("--purge", action="store_true", help="uninstall: configuration, rings and frames as well")
    service.add_argument("--socket", metavar="FILE", default="/run/hostprobe/control.sock", help="status: whom to ask")
    service.add_argument("--format", choices=("text", "json"), default="text", help="status: text unless given")
    importing = command(
        "import",
        "import_configuration",
        "print a configuration of Telegraf or collectd as one of hostprobe's; what is lost goes to stderr",
        "hostprobe import /etc/telegraf/telegraf.conf > hostprobe.toml",
    )
    importing.add_argument("file", metavar="FILE", help="telegraf.conf, collectd.conf")
    importing.add_argument(
        "--from", dest="kind", choices=("telegraf", "collectd"), help="whose it is; by what stands in it unless given"
    )
    return parser


def _cycles(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of frames, or 0")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of cycles from 1 up")
    return int(text)


def _duration(text: str) -> float:
    try:
        wait = Duration(0) if text == "0" else Duration.parse(text)
        if wait > LONGEST_INTERVAL:
            raise ValueError(f"a duration up to {LONGEST_INTERVAL}")
        return wait
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {error}, or 0") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0 done, 1 failed while running, 2 wrong usage or configuration."""
    try:
        parsed = _parser().parse_args(arguments)
        if parsed.command == "run":
            _end_quietly_until_it_runs()
        from agent import commands  # it takes a moment: NumPy comes with it

        return int(getattr(commands, parsed.function)(parsed))
    except UsageError as error:
        complain(error)
        return 2
    except HostprobeError as error:
        complain(error)
        return 1
    except KeyboardInterrupt:
        return 130


def _end_quietly_until_it_runs() -> None:
    """A signal before there is anything to flush ends the process at once, also while modules are imported."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    if hasattr(signal, "SIGHUP"):  # the configuration is just being read
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
