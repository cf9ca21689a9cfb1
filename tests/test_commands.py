"""The commands as a user runs them: processes with their own stdout, stderr, status and signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

import agent
from agent.config import TEMPLATES, load, template_path
from agent.serializers import formats
from agent.serializers.remote_write import write_request_class
from tests.hosts import saved_host
from tests.processes import (
    PATIENCE_SECONDS,
    REPOSITORY,
    ended,
    environment,
    frames,
    hostprobe,
    output,
    started,
    until,
    usage_error,
)

COMMANDS = [
    "run",
    "once",
    "check",
    "bench",
    "sample-config",
    "metrics",
    "schema",
    "verify",
    "spool",
    "service",
    "import",
]
EVERY_TABLE = (
    "host_table cpu cpu_core memory swap paging load disk_io io filesystem network pressure"
    " tcp udp unix listening agent agent_probe agent_sink"
)
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json.loads(output("schema"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "hostprobe.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def process() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that are killed if the test ends before they do."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for one in processes:
        with one:
            one.kill()


# run


@pytest.mark.parametrize("template", TEMPLATES)
def test_run_prints_a_line_a_cycle(template: str, validator: Draft202012Validator) -> None:
    lines = frames(output("run", "--template", template, "--interval", "50ms", "--cycles", "4"))
    assert [line["sequence"] for line in lines] == [1, 2, 3, 4]
    assert [line["interval_seconds"] is None for line in lines] == [True, False, False, False]
    assert len({line["instance"] for line in lines}) == 1
    assert len({tuple(line) for line in lines}) == 1
    assert sorted(line["time_unix_ns"] for line in lines) == [line["time_unix_ns"] for line in lines]
    for line in lines:
        validator.validate(line)
        assert all(row["up"] == 1 for row in line["agent_probe"] if row["probe"] != "agent")
    assert [line["agent"]["frames_total"] for line in lines] == [0, 1, 2, 3]
    assert lines[-1]["agent"]["probe_failures_total"] == 0


def test_run_fills_every_table_of_the_standard_template() -> None:
    (line,) = frames(output("run", "--interval", "10ms", "--cycles", "1"))
    assert list(line)[8:] == EVERY_TABLE.split()


def test_two_runs_are_two_instances() -> None:
    first, second = (
        frames(output("run", "--template", "minimal", "--interval", "10ms", "--cycles", "1")) for _ in "ab"
    )
    assert first[0]["instance"] != second[0]["instance"]


def test_a_probe_of_a_longer_interval_is_absent_between_its_turns(
    config: Callable[[str], Path], validator: Draft202012Validator
) -> None:
    path = config(
        "template = 'minimal'\n[agent]\ninterval = '50ms'\nalign = false\n"
        "[probes.load]\ninterval = '150ms'\n[probes.cpu]\ninterval = '50ms'\n"
    )
    lines = frames(output("run", "--config", path, "--cycles", "7"))
    turns = set()
    for line in lines:
        validator.validate(line)
        turn = (line["sequence"] - 1 + line["agent"]["missed_cycles_total"]) // 3
        assert ("load" in line) == (turn not in turns)
        assert "cpu" in line
        turns.add(turn)
    assert 2 <= len(turns) < len(lines)


def test_tags_and_hostname_stand_in_every_line(config: Callable[[str], Path]) -> None:
    path = config(
        'template = "minimal"\n[agent]\ninterval = "10ms"\nhostname = "wëb-1"\n'
        '[agent.tags]\nenv = "prod"\n"a b" = "x\\ny"\n'
    )
    for line in frames(output("run", "--config", path, "--cycles", "2")):
        assert line["host"] == "wëb-1"
        assert line["tags"] == {"env": "prod", "a b": "x\ny"}


def test_without_rates_derived_columns_are_absent(
    config: Callable[[str], Path], validator: Draft202012Validator
) -> None:
    path = config("[agent]\ninterval = '20ms'\nrates = false\n")
    lines = frames(output("run", "--config", path, "--cycles", "2"))
    for line in lines:
        validator.validate(line)
        assert "user_seconds_total" in line["cpu"]
        assert not re.search(
            r'_per_second"|usage_ratio|utilization_ratio', json.dumps(line["cpu"] | {"io": line["io"]})
        )
    with_rates = frames(output("run", "--interval", "20ms", "--cycles", "2"))[1]
    assert "usage_ratio" in with_rates["cpu"]
    assert "read_bytes_per_second" in with_rates["io"]


def test_psutil_fills_lines_of_the_same_shape(config: Callable[[str], Path], validator: Draft202012Validator) -> None:
    path = config("[agent]\ninterval = '50ms'\nsource = 'psutil'\n")
    lines = frames(output("run", "--config", path, "--cycles", "2"))
    for line in lines:
        validator.validate(line)
        assert line["memory"]["total_bytes"] > 0
        assert line["cpu"]["idle_seconds_total"] > 0
    assert {row["failures_total"] for row in lines[-1]["agent_probe"]} == {0}


def test_a_closed_pipe_ends_the_program_quietly(process: list[subprocess.Popen[bytes]]) -> None:
    reader, writer = os.pipe()
    running = started("run", "--template", "minimal", "--interval", "10ms", stdout=writer)
    process.append(running)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert json.loads(pipe.readline())["sequence"] == 1
    status, _, stderr = ended(running)
    assert (status, stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_everything_delivered(
    number: signal.Signals,
    tmp_path: Path,
    config: Callable[[str], Path],
    process: list[subprocess.Popen[bytes]],
    validator: Draft202012Validator,
) -> None:
    out = tmp_path / "frames"
    path = config(
        f"template = 'minimal'\n[agent]\ninterval = '5ms'\n[log]\nlevel = 'debug'\n"
        f"[sinks.main]\ntype = 'file'\npath = '{out}'\n"
    )
    running = started("run", "--config", path)
    process.append(running)
    until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 5, running)
    running.send_signal(number)
    status, stdout, stderr = ended(running)
    assert (status, stdout) == (0, "")
    lines = frames(out.read_text())
    assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))
    (end,) = (event for event in map(json.loads, stderr.splitlines()) if event["event"] == "hostprobe ends")
    assert end["frames"] == len(lines)
    for line in lines:
        validator.validate(line)


def test_a_signal_ends_a_long_wait_at_once(tmp_path: Path, process: list[subprocess.Popen[bytes]]) -> None:
    running = started("run", "--template", "minimal", env=environment(HOSTPROBE__AGENT__ALIGN="false"))
    process.append(running)
    assert running.stdout is not None
    assert json.loads(running.stdout.readline())["sequence"] == 1  # the next one is ten seconds away
    running.send_signal(signal.SIGTERM)
    assert ended(running) == (0, "", "")


@needs_full
def test_a_full_stdout_is_counted_while_the_run_goes_on(
    tmp_path: Path, config: Callable[[str], Path], process: list[subprocess.Popen[bytes]]
) -> None:
    out = tmp_path / "frames"
    path = config(
        "template = 'minimal'\n[agent]\ninterval = '10ms'\nshutdown_timeout = '100ms'\n"
        f"[sinks.history]\ntype = 'file'\npath = '{out}'\n"
    )

    def figures() -> dict[str, Any]:
        lines = out.read_bytes().splitlines(keepends=True) if out.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        return {row["sink"]: row for row in json.loads(whole[-1])["agent_sink"]} if whole else {}

    with Path("/dev/full").open("wb") as full:
        running = started("run", "--config", path, stdout=full)
    process.append(running)
    until(lambda: figures().get("main", {}).get("failures_total", 0) >= 2, running)
    assert figures()["main"]["sent_frames_total"] == 0
    assert figures()["main"]["backlog_frames"] > 0
    assert figures()["history"]["failures_total"] == 0
    running.send_signal(signal.SIGTERM)
    status, _, stderr = ended(running)
    assert status == 0
    lines = frames(out.read_text())
    assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))
    failing, *_, dropped = (json.loads(line) for line in stderr.splitlines())
    assert (failing["sink"], failing["reason"]) == ("main", "stdout: No space left on device")
    assert (dropped["sink"], dropped["dropped_frames"]) == ("main", len(lines))


def test_two_runs_to_one_file_tear_no_line(tmp_path: Path, config: Callable[[str], Path]) -> None:
    out = tmp_path / "frames"
    path = config(f"[agent]\ninterval = '5ms'\n[sinks.main]\ntype = 'file'\npath = '{out}'\n")
    pair = [started("run", "--config", path, "--cycles", "60") for _ in range(2)]
    assert [ended(one)[0] for one in pair] == [0, 0]
    sequences: dict[str, list[int]] = {}
    for line in frames(out.read_text()):
        sequences.setdefault(line["instance"], []).append(line["sequence"])
    assert list(sequences.values()) == [list(range(1, 61))] * 2


# once


def test_once_takes_two_samples_for_its_rates(validator: Draft202012Validator) -> None:
    (line,) = frames(output("once", "--wait", "100ms"))
    validator.validate(line)
    assert line["sequence"] == 2
    assert line["interval_seconds"] >= 0.1
    assert 0 <= line["cpu"]["usage_ratio"] <= 1
    assert line["io"]["read_bytes_per_second"] is not None
    assert list(line)[8:] == EVERY_TABLE.split()
    assert line["agent_sink"] == []


@pytest.mark.parametrize("wait", ["0", "0s"])
def test_once_without_wait_has_no_rates(wait: str, validator: Draft202012Validator) -> None:
    (line,) = frames(output("once", "--wait", wait))
    validator.validate(line)
    assert (line["sequence"], line["interval_seconds"]) == (1, None)
    assert line["cpu"]["usage_ratio"] is None
    assert line["io"]["read_bytes_per_second"] is None
    assert line["cpu"]["idle_seconds_total"] > 0


def test_pretty_is_the_same_document_indented(config: Callable[[str], Path], validator: Draft202012Validator) -> None:
    arguments = (
        "once",
        "--root",
        saved_host("vm"),
        "--wait",
        "0",
        "--config",
        config("[probes]\nagent = { enabled = false }\nfilesystem = { enabled = false }\n"),
    )
    plain, pretty = output(*arguments), output(*arguments, "--pretty")
    assert len(plain.splitlines()) == 1
    lines = pretty.splitlines()
    assert len(lines) > 100
    assert lines[1] == '  "schema": "hostprobe/1",'
    document, same = json.loads(plain), json.loads(pretty)
    validator.validate(same)
    for new in ("instance", "time", "time_unix_ns"):
        assert document.pop(new) != same.pop(new)
    assert list(document.items()) == list(same.items())


def bytes_of(*arguments: object) -> bytes:
    """Stdout of a command that must succeed without a word on stderr, in whatever format."""
    with started(*arguments) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, stderr) == (0, b"")
    return bytes(stdout)


def has_loads(format: formats.Name, payload: bytes) -> bool:
    """Whether a payload, read by somebody else's parser where there is one, has the three load averages."""
    if format in ("json", "msgpack"):
        document = json.loads(payload) if format == "json" else msgspec.msgpack.decode(payload)
        return {"load1", "load5", "load15"} <= document["load"].keys()
    if format in ("prometheus", "openmetrics"):
        parse = text_string_to_metric_families if format == "prometheus" else openmetrics_families
        return {f"hostprobe_load_load{minutes}" for minutes in (1, 5, 15)} <= {
            family.name for family in parse(payload.decode())
        }
    if format == "otlp":
        (resource,) = ExportMetricsServiceRequest.FromString(payload).resource_metrics
        names = {metric.name for metric in resource.scope_metrics[0].metrics}
        return {f"hostprobe.load.load{minutes}" for minutes in (1, 5, 15)} <= names
    if format == "remote_write":
        names = {series.labels[0].value for series in write_request_class().FromString(payload).timeseries}
        return {f"hostprobe_load_load{minutes}" for minutes in (1, 5, 15)} <= names
    lines = payload.decode().splitlines()
    if format == "influx":
        return any(re.fullmatch(r"load,host=\S+ load1=\S+,load5=\S+,load15=\S+ \d{19}", line) for line in lines)
    value = r"[ :]\d+\.\d+(\|g|\|g\|#host:\S+| \d{10})"
    return all(
        any(re.fullmatch(rf"hostprobe\.([^.]+\.)?load\.load{minutes}{value}", line) for line in lines)
        for minutes in (1, 5, 15)
    )


@pytest.mark.parametrize("format", formats.FORMATS)
def test_once_prints_a_frame_in_every_format(format: formats.Name) -> None:
    payload = bytes_of("once", "--template", "minimal", "--wait", "0", "--format", format)
    terminator = formats.FORMATS[format].terminator
    assert payload.endswith(terminator)
    assert not payload.endswith(b"\n\n")
    assert has_loads(format, payload)
    assert not has_loads(format, payload.replace(b"load1", b"load2"))


def test_once_has_the_names_of_the_sink_of_its_format(config: Callable[[str], Path]) -> None:
    path = config(
        'template = "minimal"\n[sinks.main]\ntype = "file"\npath = "/dev/null"\nformat = "prometheus"\n'
        'names = "node_exporter"\n'
    )
    arguments = ("once", "--config", path, "--wait", "0", "--format")
    assert b"\nnode_load1 " in bytes_of(*arguments, "prometheus")
    assert b"\nhostprobe_load_load1 " in bytes_of(*arguments, "openmetrics")


def test_sinks_of_a_run_have_each_their_own_format(tmp_path: Path, config: Callable[[str], Path]) -> None:
    text = 'template = "minimal"\n[agent]\ninterval = "10ms"\n[sinks.main]\nenabled = false\n'
    for name in formats.FORMATS:
        text += f'[sinks.{name}]\ntype = "file"\npath = "{tmp_path / name}"\nformat = "{name}"\n'
    text += (
        f'[sinks.node]\ntype = "file"\npath = "{tmp_path / "node"}"\nformat = "prometheus"\nnames = "node_exporter"\n'
    )
    assert output("run", "--config", config(text), "--cycles", "1") == ""
    for name in formats.FORMATS:
        assert has_loads(name, (tmp_path / name).read_bytes()), name
    assert b"\nnode_load1 " in (tmp_path / "node").read_bytes()


@pytest.mark.parametrize("name", ["vm", "old", "damaged"])
def test_once_reads_a_saved_host(name: str, validator: Draft202012Validator) -> None:
    status, stdout, _ = hostprobe("once", "--root", saved_host(name), "--wait", "10ms")
    assert status == 0
    (line,) = frames(stdout)
    validator.validate(line)
    if name == "vm":
        stat = (saved_host(name) / "proc/stat").read_text()
        (forks,) = re.findall(r"^processes (\d+)$", stat, re.MULTILINE)
        assert line["cpu"]["forks_total"] == int(forks)
        assert all(row["up"] == 1 for row in line["agent_probe"] if row["probe"] != "agent")


@pytest.mark.parametrize("command", ["run", "once"])
@pytest.mark.parametrize("root", ["missing", "empty", "file", "x" * 300])
def test_a_root_without_proc_is_wrong_usage(command: str, root: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    message = usage_error(command, "--root", tmp_path / root)
    assert message.startswith(f"--root: agent.root = {tmp_path / root}: ")
    assert message.endswith(": expected a directory that holds proc and sys")


def test_psutil_reads_only_this_host(config: Callable[[str], Path]) -> None:
    path = config("[agent]\nsource = 'psutil'\n")
    message = usage_error("once", "--config", path, "--root", saved_host("vm"))
    assert message.endswith("psutil reads only this host")


def test_a_signal_ends_once_before_it_has_printed(process: list[subprocess.Popen[bytes]]) -> None:
    running = started("once", "--template", "minimal", "--wait", "1h")
    process.append(running)
    caught = Path(f"/proc/{running.pid}/status")
    mask = 1 << (signal.SIGTERM - 1)
    until(lambda: int(re.findall(r"SigCgt:\s*(\w+)", caught.read_text())[0], 16) & mask, running)
    running.send_signal(signal.SIGTERM)
    assert ended(running) == (0, "", "")


# stdout of the commands that end by themselves


@needs_full
@pytest.mark.parametrize("arguments", [["once", "--wait", "0"], ["schema"], ["metrics"], ["--help"], ["--version"]])
def test_a_full_stdout_is_a_failure_of_one_line(arguments: Sequence[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        assert hostprobe(*arguments, stdout=full) == (1, "", "hostprobe: stdout: No space left on device\n")


@pytest.mark.parametrize("arguments", [["once", "--wait", "0"], ["schema"], ["metrics"], ["--help"], ["--version"]])
def test_a_reader_that_has_gone_is_no_failure(arguments: Sequence[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    running = started(*arguments, stdout=writer)
    os.close(writer)
    assert ended(running) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "status"), [(["once", "--wait", "0"], 1), (["run", "--cycles", "1", "--interval", "10ms"], 2)]
)
def test_a_stdout_that_is_closed_is_one_line(arguments: Sequence[str], status: int) -> None:
    command = f'exec "{sys.executable}" -m agent {" ".join(arguments)} >&-'
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=REPOSITORY,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == status
    assert "stdout: it is closed" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_error_does_not_go_to_stdout_where_stderr_is_closed() -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "{sys.executable}" -m agent run --interval soon 2>&-'],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, b"")


# check, configuration files


def test_check_says_what_is_good(config: Callable[[str], Path], tmp_path: Path) -> None:
    path = config(f"template = 'minimal'\n[sinks.history]\ntype = 'file'\npath = '{tmp_path}/frames'\n")
    assert output("check", "--config", path) == (
        f"{path}: good: template minimal, every 10s, probes cpu memory load agent, sinks main history\n"
    )


def test_check_without_a_file(tmp_path: Path) -> None:
    assert output("check", env=environment(HOSTPROBE__AGENT__INTERVAL="250ms")).startswith(
        "no configuration file: good: template standard, every 250ms, probes host cpu "
    )


@pytest.mark.parametrize("command", ["run", "once", "check"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[agent]\ninterval = 0\n", "agent.interval = 0: expected a duration such as"),
        ("[agent]\nintervall = '1s'\n", "agent.intervall = \"1s\": expected 'interval'"),
        ("[agent\n", "Expected ']' at the end of a table declaration (at line 1, column 7): expected valid TOML"),
        ("[probes.sockets]\ntcp_states = 'all'\n", 'probes.sockets.tcp_states = "all": expected '),
        ("[sinks.main]\nenabled = false\n", "sinks: none is enabled: expected at least one"),
        ("[agent]\nroot = '/nowhere'\n", "/nowhere"),
    ],
)
def test_a_bad_configuration_is_one_line_and_status_2(
    command: str, text: str, message: str, config: Callable[[str], Path]
) -> None:
    path = config(text)
    line = usage_error(command, "--config", path)
    assert message in line
    assert line.startswith(f"{path}: ")


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("name", ["no/such/directory/frames", "folder"])
def test_a_file_that_cannot_be_written(command: str, name: str, config: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    path = config(f"[sinks.main]\ntype = 'file'\npath = '{tmp_path / name}'\n")
    line = usage_error(command, "--config", path)
    assert line.startswith(f"{path}: sinks.main: {tmp_path / name}: ")
    assert line.endswith(": expected a file that can be written")


def test_a_buffer_that_no_host_has_memory_for(config: Callable[[str], Path]) -> None:
    path = config("[sinks.main.buffer]\nsize = '1073741824GiB'\n")
    line = usage_error("run", "--config", path)
    assert line.startswith(f"{path}: sinks.main.buffer.size = 1073741824GiB: ")
    assert line.endswith(": expected buffers that this host has memory for")


def test_the_variable_names_the_file(config: Callable[[str], Path], tmp_path: Path) -> None:
    path = config("template = 'minimal'\n[agent]\nhostname = 'by-variable'\n")
    variable = environment(HOSTPROBE_CONFIG=str(path))
    (line,) = frames(output("once", "--wait", "0", env=variable))
    assert line["host"] == "by-variable"
    assert output("check", env=variable).startswith(f"{path}: good: ")
    missing = environment(HOSTPROBE_CONFIG=str(tmp_path / "missing.toml"))
    assert usage_error("check", env=missing).startswith(f"{tmp_path / 'missing.toml'}: No such file or directory")


def test_flags_are_stronger_than_the_file(config: Callable[[str], Path]) -> None:
    path = config("template = 'full'\n[agent]\ninterval = '1h'\nroot = '/nowhere'\n")
    arguments = ("--config", path, "--template", "minimal", "--interval", "10ms", "--root", saved_host("vm"))
    lines = frames(output("run", *arguments, "--cycles", "2"))
    assert len(lines) == 2
    assert "host_table" not in lines[0]


# sample-config, metrics, schema, version, help


@pytest.mark.parametrize("name", TEMPLATES)
def test_sample_config_is_the_template_and_means_the_same(name: str, config: Callable[[str], Path]) -> None:
    text = output("sample-config", name)
    assert text == Path(template_path(name)).read_text()
    assert tomllib.loads(text)["template"] == name
    copy = load(str(config(text)), environment={})
    original = load(template=name, environment={})
    assert (copy.agent, copy.log, copy.probes, copy.sinks) == (
        original.agent,
        original.log,
        original.probes,
        original.sinks,
    )


def test_sample_config_of_an_unknown_template() -> None:
    assert usage_error("sample-config", "ful") == (
        "sample-config: template = \"ful\": expected 'full', or another of minimal standard full"
    )


def test_metrics_in_three_formats_tell_of_the_same_columns(validator: Draft202012Validator) -> None:
    text = output("metrics")
    markdown = output("metrics", "--format", "markdown")
    tables = json.loads(output("metrics", "--format", "json"))
    columns = [f"{table['table']}.{column['name']}" for table in tables for column in table["columns"]]
    assert [line.split()[0] for line in text.splitlines()] == columns
    names = [name.partition(".")[2] for name in columns]
    assert re.findall(r"^\| `(\w+)` \| (?:counter|gauge)", markdown, re.MULTILINE) == names
    assert re.findall(r"^\| `(\w+)` \| (?!counter|gauge)", markdown, re.MULTILINE) == names
    assert re.findall(r"^## (\w+)$", markdown, re.MULTILINE) == [table["table"] for table in tables]
    rows = "listening connections udp_sockets unix_sockets"
    every = EVERY_TABLE.replace("host_table", "host").replace("listening", rows)
    assert [table["table"] for table in tables] == [*every.split(), "frame", "left_out", "uname"]
    assert len(columns) > 150


def test_the_metrics_reference_is_what_the_command_prints() -> None:
    printed = output("metrics", "--format", "markdown")
    assert (REPOSITORY / "docs/metrics.md").read_text() == printed, (
        "run `python -m agent metrics --format markdown > docs/metrics.md`"
    )


def test_version() -> None:
    assert output("--version") == f"hostprobe {agent.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(command: str) -> None:
    text = output(command, "--help")
    assert text.startswith(f"usage: hostprobe {command} ")
    assert re.search(rf"^Example:\n  hostprobe {command}\b", text, re.MULTILINE)


def test_help_lists_every_command() -> None:
    text = output("--help")
    assert re.findall(r"^    ([a-z-]+)(?: |$)", text, re.MULTILINE) == COMMANDS
    assert "Example:\n  hostprobe once --pretty" in text
    assert "$HOSTPROBE_CONFIG" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (see hostprobe --help)"),
        (["runn"], "argument COMMAND: invalid choice: 'runn'"),
        (["run", "--cycle", "1"], "unrecognized arguments: --cycle 1"),
        (["run", "--cycles", "-1"], "argument --cycles: '-1': expected a number of frames, or 0"),
        (["run", "--cycles", "1.5"], "argument --cycles: '1.5': expected a number of frames, or 0"),
        (["run", "--cycles", "9" * 5000], "argument --cycles: "),
        (["run", "--interval", "0s"], '--interval: agent.interval = "0s": expected a duration from 1ms to 1d'),
        (["run", "--interval", "10 parsecs"], '--interval: agent.interval = "10 parsecs": expected a duration'),
        (["run", "--template", "standart"], "--template: template = \"standart\": expected 'standard'"),
        (["run", "--config", ""], '--config: "": expected a configuration file'),
        (["run", "--config", "/"], "/: Is a directory: expected a configuration file that can be read"),
        (["once", "--wait", "5"], "argument --wait: '5': expected a duration such as"),
        (["once", "--wait", "25h"], "argument --wait: '25h': expected a duration up to 1d, or 0"),
        (["once", "--format", "xml"], "argument --format: invalid choice: 'xml'"),
        (["once", "now"], "unrecognized arguments: now"),
        *(
            (["once", "--pretty", "--format", name], f"once: --pretty with --format {name}: expected --format json")
            for name in formats.FORMATS
            if name != "json"
        ),
        (["sample-config"], "the following arguments are required: TEMPLATE"),
        (["metrics", "--format", "yaml"], "argument --format: invalid choice: 'yaml'"),
        (["once", "--root", "/\udcff"], "--root: agent.root = '/\\udcff': expected text in UTF-8 without NUL"),
    ],
    ids=lambda value: " ".join(value)[:30].encode("ascii", "replace").decode() if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    assert message in usage_error(*arguments)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc/PID/maps")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_are_imported_ends_it_quietly(
    number: signal.Signals, process: list[subprocess.Popen[bytes]]
) -> None:
    running = started("run", "--interval", "1h")
    process.append(running)
    until(lambda: b"numpy" in Path(f"/proc/{running.pid}/maps").read_bytes(), running)  # it is inside the import
    running.send_signal(number)
    status, _, stderr = ended(running)
    assert (status, stderr) == (0, "")


@pytest.mark.parametrize("command", ["run", "check"])
def test_a_fifo_that_nobody_reads_is_one_line(command: str, config: Callable[[str], Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    path = config(f"[sinks.main]\ntype = 'file'\npath = '{tmp_path / 'fifo'}'\n")
    line = usage_error(command, "--config", path)
    assert line == (
        f"{path}: sinks.main: {tmp_path / 'fifo'}: No such device or address: expected a file that can be written"
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")
def test_frames_that_were_all_asked_for_and_lost_are_status_1(config: Callable[[str], Path]) -> None:
    path = config("template = 'minimal'\n[agent]\nshutdown_timeout = '50ms'\n")
    with Path("/dev/full").open("wb") as full:
        status, _, stderr = ended(started("run", "--config", path, "--interval", "10ms", "--cycles", "3", stdout=full))
    assert status == 1
    assert json.loads(stderr.splitlines()[-1])["dropped_frames"] == 3


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_the_soft_limit_of_open_files_is_raised(config: Callable[[str], Path], tmp_path: Path) -> None:
    command = f'ulimit -S -n 64; exec "{sys.executable}" -m agent run --interval 1h'
    running = subprocess.Popen(
        ["sh", "-c", command], cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        until(lambda: soft_limit(running.pid) > 64, running)
    finally:
        running.terminate()
        ended(running)


def soft_limit(pid: int) -> int:
    (line,) = (
        line for line in Path(f"/proc/{pid}/limits").read_text().splitlines() if line.startswith("Max open files")
    )
    return int(line.split()[3])
