"""Layers and their precedence, the templates, and one clear line for each mistake."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import config as configuration
from agent.config import TEMPLATES, Config, load, template_path
from agent.discovery import SINKS
from agent.errors import UsageError
from agent.layers import merge
from agent.ring import WhenFull
from agent.serializers.formats import FORMATS
from agent.sinks.file import FileSettings
from agent.units import Duration, Size

REPOSITORY = Path(__file__).parent.parent
NOBODY = 65534


@pytest.fixture(autouse=True)
def _no_system_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What this machine has in /etc is not what is tested."""
    monkeypatch.setattr(configuration, "DEFAULT_FILE", str(tmp_path / "etc" / "hostprobe.toml"))


class Files:
    """Configuration files of one test."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "hostprobe.toml"

    def load(self, text: str | bytes, **options: Any) -> Config:
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(str(self.path), environment=options.pop("environment", {}), **options)

    def error(self, text: str | bytes, **options: Any) -> str:
        """The message that this file ends with, less the file's name."""
        with pytest.raises(UsageError) as caught:
            self.load(text, **options)
        return one_line(caught.value).removeprefix(f"{self.path}: ")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def one_line(error: UsageError) -> str:
    line = str(error)
    assert line
    assert line.splitlines() == [line]
    assert "Traceback" not in line
    return line


def environment_error(environment: dict[str, str]) -> str:
    with pytest.raises(UsageError) as caught:
        load(environment=environment)
    return one_line(caught.value)


# Layers


def test_without_anything_it_is_the_standard_template_to_stdout() -> None:
    config = load(environment={})
    assert (config.where, config.template) == ("", "standard")
    assert config.agent.interval == Duration(10)
    assert next(iter(config.probes)) == "host"
    assert list(config.probes)[-1] == "agent"
    assert {name: sink.type for name, sink in config.sinks.items()} == {"main": "stdout"}


def test_a_later_layer_is_stronger(files: Files) -> None:
    text = "[agent]\ninterval = '20s'\nhostname = 'file'\nshutdown_timeout = '7s'\n"
    environment = {"HOSTPROBE__AGENT__INTERVAL": "30s", "HOSTPROBE__AGENT__HOSTNAME": "environment"}
    overrides = {"--interval": {"agent": {"interval": "40s"}}}
    assert load(environment={}).agent.interval == Duration(10)
    assert files.load(text).agent.interval == Duration(20)
    assert files.load(text, environment=environment).agent.interval == Duration(30)
    config = files.load(text, environment=environment, overrides=overrides)
    assert config.agent.interval == Duration(40)
    assert config.agent.hostname == "environment"
    assert config.agent.shutdown_timeout == Duration(7)
    assert config.agent.align is True
    assert config.where == str(files.path)


def test_the_template_itself_can_come_from_each_layer(files: Files) -> None:
    variable = {"HOSTPROBE__TEMPLATE": "full"}
    assert files.load("template = 'minimal'").template == "minimal"
    assert files.load("template = 'minimal'", environment=variable).template == "full"
    assert files.load("template = 'minimal'", environment=variable, template="standard").template == "standard"
    assert "host" not in files.load("template = 'minimal'").probes


def test_which_file_is_read(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {}
    for name in ("flag", "variable", "system"):
        names[name] = str(tmp_path / f"{name}.toml")
        Path(names[name]).write_text(f"[agent]\nhostname = '{name}'\n")
    variable = {"HOSTPROBE_CONFIG": names["variable"]}
    assert load(environment={}).agent.hostname == ""
    monkeypatch.setattr(configuration, "DEFAULT_FILE", names["system"])
    assert load(environment={}).agent.hostname == "system"
    assert load(environment={"HOSTPROBE_CONFIG": ""}).agent.hostname == "system"
    assert load(environment=variable).agent.hostname == "variable"
    assert load(names["flag"], environment=variable).agent.hostname == "flag"


def test_tables_merge_deeply_and_unset_is_not_false(files: Files) -> None:
    config = files.load("[probes.sockets]\nrow_limit = 7\n[agent.tags]\nenv = 'prod'\n[log]\nlevel = 'error'\n")
    sockets: Any = config.probes["sockets"]
    assert (sockets.row_limit, sockets.tcp_states, sockets.listening, sockets.connections) == (7, True, True, False)
    assert config.log.format == "auto"
    assert config.agent.tags == {"env": "prod"}
    assert config.agent.rates is True
    disk_io: Any = config.probes["disk_io"]
    assert disk_io.exclude == ("loop*", "ram*", "zram*")


def test_a_list_is_replaced_and_false_is_false(files: Files) -> None:
    config = files.load("[agent]\nrates = false\n[probes.disk_io]\nexclude = []\n[probes.cpu]\nper_core = false\n")
    disk_io: Any = config.probes["disk_io"]
    cpu: Any = config.probes["cpu"]
    assert disk_io.exclude == ()
    assert disk_io.row_limit == 64
    assert cpu.per_core is False
    assert config.agent.rates is False


def test_a_disabled_probe_is_left_out_and_one_can_be_added_to_a_template(files: Files) -> None:
    config = files.load("template = 'minimal'\n[probes.load]\nenabled = false\n[probes.host]\n")
    assert list(config.probes) == ["host", "cpu", "memory", "agent"]


def test_a_sink_of_the_same_name_replaces_the_templates_whole(files: Files, tmp_path: Path) -> None:
    config = files.load(f"[sinks.main]\ntype = 'file'\npath = '{tmp_path}/a'\n[sinks.main.buffer]\nsize = '1MiB'\n")
    assert list(config.sinks) == ["main"]
    main = config.sinks["main"]
    assert isinstance(main, FileSettings)
    assert main.buffer.size == 1 << 20
    minimal = files.load("[sinks.main]\ntype = 'stdout'\n", environment={})
    assert minimal.sinks["main"].buffer.size == 4 << 20
    with_template_values = {"sinks": {"main": {"buffer": {"size": "64KiB"}}}}
    merged = load(overrides={"--test": with_template_values}, environment={})
    assert merged.sinks["main"].buffer == msgspec_buffer("64KiB")


def msgspec_buffer(size: str) -> Any:
    from agent.sinks.sink import BufferSettings

    return BufferSettings(size=Size.parse(size), when_full=WhenFull.DROP_OLDEST)


def test_the_templates_sink_leaves_nothing_in_one_that_replaces_it(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = {
        "standard": "[probes.load]\n[sinks.main]\ntype = 'file'\npath = '/tmp/x'\n[sinks.other]\ntype = 'stdout'\n"
    }
    folder = files.path.parent
    for name, text in trees.items():
        (folder / f"{name}.template").write_text(text)
    monkeypatch.setattr(configuration, "template_path", lambda name: str(folder / f"{name}.template"))
    config = files.load(
        "[sinks.main]\nformat = 'json'\n"
    )  # with the template's path left in it, stdout would refuse it
    assert {name: sink.type for name, sink in config.sinks.items()} == {"main": "stdout", "other": "stdout"}


def test_a_sink_of_another_name_stands_beside_it(files: Files) -> None:
    config = files.load("[sinks.history]\ntype = 'file'\npath = '/tmp/frames'\nmax_size = '1GB'\nmax_files = 2\n")
    assert list(config.sinks) == ["main", "history"]
    history = config.sinks["history"]
    assert isinstance(history, FileSettings)
    assert (history.path, history.max_size, history.max_files) == ("/tmp/frames", 10**9, 2)


def test_the_environment_changes_a_sink_in_place() -> None:
    config = load(environment={"HOSTPROBE__SINKS__MAIN__BUFFER__WHEN_FULL": "drop_newest"})
    assert config.sinks["main"].buffer.when_full is WhenFull.DROP_NEWEST
    assert config.sinks["main"].buffer.size == 4 << 20


def test_values_of_every_type_come_from_the_environment() -> None:
    config = load(
        environment={
            "HOSTPROBE__AGENT__INTERVAL": "250ms",
            "HOSTPROBE__AGENT__RATES": "false",
            "HOSTPROBE__AGENT__HOSTNAME": "web-1",
            "HOSTPROBE__AGENT__ROOT": '"/"',
            "HOSTPROBE__AGENT__TAGS__ENV": "prod",
            "HOSTPROBE__AGENT__TAGS__RACK": "42",
            "HOSTPROBE__AGENT__TAGS__SPARE": "true",
            "HOSTPROBE__LOG__LEVEL": "error",
            "HOSTPROBE__PROBES__DISK_IO__EXCLUDE": '["sr*", "fd*"]',
            "HOSTPROBE__PROBES__DISK_IO__ROW_LIMIT": "3",
            "HOSTPROBE__PROBES__LOAD__INTERVAL": "1s",
            "HOSTPROBE__PROBES__HOST__ENABLED": "false",
            "HOSTPROBE__SINKS__MAIN__BUFFER__SIZE": "65536",
            "HOSTPROBE_CONFIG": "",
            "OTHER__AGENT__INTERVAL": "1h",
        }
    )
    disk_io: Any = config.probes["disk_io"]
    assert config.agent.interval == Duration(0.25)
    assert config.agent.rates is False
    assert (config.agent.hostname, config.agent.root) == ("web-1", "/")
    assert config.agent.tags == {"env": "prod", "rack": "42", "spare": "true"}
    assert config.log.level == "error"
    assert (disk_io.exclude, disk_io.row_limit) == (("sr*", "fd*"), 3)
    assert config.every("load") == 4
    assert "host" not in config.probes
    assert config.sinks["main"].buffer.size == 65536


def test_tags_can_come_as_one_table() -> None:
    assert load(environment={"HOSTPROBE__AGENT__TAGS": '{env = "prod", a = "b"}'}).agent.tags == {
        "env": "prod",
        "a": "b",
    }


def test_a_variable_with_more_than_one_value_is_text() -> None:
    config = load(environment={"HOSTPROBE__AGENT__HOSTNAME": "'a'\nother = 'b'"})
    assert config.agent.hostname == "'a'\nother = 'b'"


def test_every_counts_the_agents_intervals(files: Files) -> None:
    config = files.load("[agent]\ninterval = '0.1s'\n[probes.load]\ninterval = '0.3s'\n[probes.cpu]\ninterval = '1d'\n")
    assert (config.every("load"), config.every("cpu"), config.every("memory")) == (3, 864_000, 1)


# Templates


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_is_commented_and_says_everything_itself(name: str) -> None:
    text = Path(template_path(name)).read_text()
    assert template_path(name) == str(REPOSITORY / "templates" / f"{name}.toml")
    assert sum("#" in line for line in text.splitlines()) >= 12
    sections = tomllib.loads(text)
    assert set(sections) == {"template", "agent", "log", "probes", "sinks"}
    assert sections["template"] == name
    config = load(template=name, environment={})
    assert config.template == name
    assert set(sections["probes"]) == set(config.probes)
    assert list(config.sinks) == ["main"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_file_copied_from_a_template_means_the_same(name: str, files: Files) -> None:
    original = load(template=name, environment={})
    copy = files.load(Path(template_path(name)).read_bytes())
    assert copy.template == name
    assert (copy.agent, copy.log, copy.probes, copy.sinks) == (
        original.agent,
        original.log,
        original.probes,
        original.sinks,
    )
    assert list(copy.probes) == list(original.probes)


def test_what_the_templates_collect() -> None:
    minimal, standard, full = (load(template=name, environment={}).probes for name in TEMPLATES)
    everything = ["host", "cpu", "memory", "load", "disk_io", "filesystem", "network", "pressure", "sockets", "agent"]
    assert list(minimal) == ["cpu", "memory", "load", "agent"]
    assert list(standard) == list(full) == everything
    cpu: Any = minimal["cpu"]
    assert cpu.per_core is False


# Mistakes in files


def test_a_missing_file() -> None:
    with pytest.raises(UsageError) as caught:
        load("/no/such/file.toml", environment={})
    expected = "/no/such/file.toml: No such file or directory: expected a configuration file that can be read"
    assert one_line(caught.value) == expected


def test_a_missing_file_of_the_environment_is_not_passed_over() -> None:
    assert environment_error({"HOSTPROBE_CONFIG": "/no/such"}).startswith("/no/such: No such file")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Is a directory: expected a configuration file"):
        load(str(tmp_path), environment={})


def test_an_empty_name() -> None:
    with pytest.raises(UsageError, match=r'^--config: "": expected a configuration file$'):
        load("", environment={})


@contextmanager
def no_privileges() -> Iterator[None]:
    """As an ordinary user; root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_without_permission(files: Files) -> None:
    files.path.write_text("")
    files.path.chmod(0)
    with no_privileges(), pytest.raises(UsageError) as caught:
        load(str(files.path), environment={})
    assert one_line(caught.value).startswith(f"{files.path}: Permission denied: expected a configuration file")


def test_a_system_file_behind_a_closed_directory_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "hostprobe.toml").write_text("")
    monkeypatch.setattr(configuration, "DEFAULT_FILE", str(closed / "hostprobe.toml"))
    closed.chmod(0)
    try:
        with no_privileges(), pytest.raises(UsageError, match="Permission denied"):
            load(environment={})
    finally:
        closed.chmod(0o700)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[agent]\nhostname = '\xff'", "byte 20 is not UTF-8: expected a TOML file"),
        ("[agent", "Expected ']' at the end of a table declaration (at end of document): expected valid TOML"),
        (
            "[agent]\ninterval 3",
            "Expected '=' after a key in a key/value pair (at line 2, column 10): expected valid TOML",
        ),
        ("[agent]\nrates = true\nrates = false", "Cannot overwrite a value (at end of document): expected valid TOML"),
        (
            "[sinks.a]\ntype = 'stdout'\n[sinks.a]\ntype = 'stdout'\n",
            "Cannot declare ('sinks', 'a') twice (at line 3, column 9): expected valid TOML",
        ),
    ],
)
def test_what_is_no_toml(files: Files, text: str | bytes, message: str) -> None:
    assert files.error(text) == message


def test_a_number_of_thousands_of_digits(files: Files) -> None:
    assert files.error(f"[agent]\ninterval = {'9' * 5000}").endswith(": expected valid TOML")
    assert files.error(f"[agent]\ninterval = 0x{'f' * 5000}").startswith("agent.interval = ")


@pytest.mark.parametrize(
    "text", ["x = " + "[" * 5000, "x" + ".x" * 5000 + " = 1", "[agent.tags]\nx" + ".x" * 5000 + " = 1"]
)
def test_what_is_nested_too_deeply(files: Files, text: str) -> None:
    assert "expected tables and lists a few levels deep" in files.error(text) or "expected one of" in files.error(text)


MISTAKES = [
    ("probs = {}", "probs = {}: expected 'probes', or another of template agent log probes sinks"),
    ("interval = '1s'", 'interval = "1s": expected one of template agent log probes sinks'),
    ("agent = 3", "agent = 3: expected a table"),
    ("log = []", "log = []: expected a table"),
    ("probes = 3", "probes = 3: expected a table"),
    ("sinks = 'x'", 'sinks = "x": expected a table'),
    ("[[sinks]]", "sinks = [{}]: expected a table"),
    ("[probes]\ncpu = 3", "probes.cpu = 3: expected a table"),
    ("[probes]\ncpu = true", "probes.cpu = true: expected a table"),
    ("[sinks]\nmain = 3", "sinks.main = 3: expected a table"),
    ("[sinks.main]\nbuffer = 3", "sinks.main.buffer = 3: expected a table"),
    ("template = 3", "template = 3: expected one of minimal standard full"),
    ("template = []", "template = []: expected one of minimal standard full"),
    ("template = 'standart'", "template = \"standart\": expected 'standard', or another of minimal standard full"),
    (
        "[agent]\nintervall = '1s'",
        "agent.intervall = \"1s\": expected 'interval', or another of interval align hostname rates root source"
        " shutdown_timeout max_memory control_socket max_cpu_ratio priorities tags",
    ),
    (
        '[agent]\n"a.b\\nc" = 1',
        'agent."a.b\\nc" = 1: expected one of interval align hostname rates root source shutdown_timeout max_memory'
        " control_socket max_cpu_ratio priorities tags",
    ),
    (
        "[agent]\ninterval = 10",
        'agent.interval = 10: expected a duration such as "250ms", "10s" or "1m", 3650d at most',
    ),
    (
        "[agent]\ninterval = '10 parsecs'",
        'agent.interval = "10 parsecs": expected a duration such as "250ms", "10s" or "1m", 3650d at most',
    ),
    (
        "[agent]\ninterval = nan",
        'agent.interval = nan: expected a duration such as "250ms", "10s" or "1m", 3650d at most',
    ),
    (
        "[agent]\ninterval = '-1s'",
        'agent.interval = "-1s": expected a duration such as "250ms", "10s" or "1m", 3650d at most',
    ),
    ("[agent]\ninterval = '0s'", 'agent.interval = "0s": expected a duration from 1ms to 1d'),
    ("[agent]\ninterval = '999us'", 'agent.interval = "999us": expected a duration from 1ms to 1d'),
    ("[agent]\ninterval = '25h'", 'agent.interval = "25h": expected a duration from 1ms to 1d'),
    (
        f"[agent]\ninterval = '{'9' * 400}d'",
        f'agent.interval = "{"9" * 76}...: expected a duration such as "250ms", "10s" or "1m", 3650d at most',
    ),
    ("[agent]\nrates = 1", "agent.rates = 1: expected true or false"),
    ("[agent]\nrates = 'false'", 'agent.rates = "false": expected true or false'),
    ("[agent]\nhostname = 3", "agent.hostname = 3: expected a text in quotes"),
    ("[agent]\nhostname = 2026-11-21", 'agent.hostname = "2026-11-21": expected a text in quotes'),
    ('[agent]\nroot = "a\\u0000"', 'agent.root = "a\\u0000": expected text in UTF-8 without NUL'),
    (
        '[sinks.main]\ntype = "file"\npath = "\\u0000"',
        'sinks.main.path = "\\u0000": expected text in UTF-8 without NUL',
    ),
    ("[agent]\nsource = 'proc'", "agent.source = \"proc\": expected 'procfs', or another of auto procfs psutil"),
    ("[agent]\nsource = 1", "agent.source = 1: expected one of auto procfs psutil"),
    ("[agent]\ntags = 'x'", 'agent.tags = "x": expected a table'),
    ("[agent.tags]\na = 'b'\nrack = 42", "agent.tags.rack = 42: expected a text in quotes"),
    ('[agent.tags]\n"a b" = 42', 'agent.tags."a b" = 42: expected a text in quotes'),
    ("[log]\nlevel = 'warn'", "log.level = \"warn\": expected 'warning', or another of debug info warning error"),
    ("[log]\nformat = 'xml'", 'log.format = "xml": expected one of auto console json'),
    (
        "[probes.disk]",
        "probes.disk: expected 'disk_io', or another of host cpu memory load disk_io filesystem network pressure"
        " sockets agent",
    ),
    ("[probes.disk_io]\nrow_limit = 0", "probes.disk_io.row_limit = 0: expected a whole number >= 1"),
    ("[probes.disk_io]\nrow_limit = 1.5", "probes.disk_io.row_limit = 1.5: expected a whole number"),
    ("[probes.disk_io]\nrow_limit = '9'", 'probes.disk_io.row_limit = "9": expected a whole number'),
    ("[probes.disk_io]\nexclude = 'loop*'", 'probes.disk_io.exclude = "loop*": expected a list'),
    ("[probes.disk_io]\nexclude = ['a', 3]", "probes.disk_io.exclude.1 = 3: expected a text in quotes"),
    (
        "[probes.disk_io]\nexlude = []",
        "probes.disk_io.exlude = []: expected 'exclude', or another of enabled interval include exclude row_limit",
    ),
    ("[probes.load]\nenabled = 0", "probes.load.enabled = 0: expected true or false"),
    (
        "[probes.load]\ninterval = '15s'",
        'probes.load.interval = "15s": expected a multiple of agent.interval, which is 10s',
    ),
    (
        "[probes.load]\ninterval = '1s'",
        'probes.load.interval = "1s": expected a multiple of agent.interval, which is 10s',
    ),
    (
        "[probes.load]\ninterval = '0s'",
        'probes.load.interval = "0s": expected a multiple of agent.interval, which is 10s',
    ),
    (
        "[probes.load]\ninterval = 10",
        'probes.load.interval = 10: expected a duration such as "250ms", "10s" or "1m", 3650d at most',
    ),
    (
        "[probes.sockets]\ntcp_states = 'sumary'",
        "probes.sockets.tcp_states = \"sumary\": expected 'summary', or another of true false summary",
    ),
    ("[probes.sockets]\nprocesses = 'no'", 'probes.sockets.processes = "no": expected true or false'),
    (
        "[sinks.main]\ntype = 'stdoutt'",
        "sinks.main.type = \"stdoutt\": expected 'stdout', or another of " + " ".join(SINKS),
    ),
    ("[sinks.main]\ntype = 3", "sinks.main.type = 3: expected one of " + " ".join(SINKS)),
    (
        "[sinks.main]\nformat = 'jsn'",
        "sinks.main.format = \"jsn\": expected 'json', or another of " + " ".join(FORMATS),
    ),
    (
        "[sinks.main]\npath = '/x'",
        "sinks.main.path = \"/x\": expected 'batch', or another of type enabled format names tables buffer batch retry",
    ),
    (
        "template = 'minimal'\n[sinks.main]\ntables = ['cpu', 'network']",
        'sinks.main.tables = "network": expected one of cpu cpu_core memory swap paging load agent agent_probe'
        " agent_sink",
    ),
    (
        "template = 'minimal'\n[agent.priorities]\nlaod = 'high'",
        "agent.priorities = \"laod\": expected 'load', or another of cpu cpu_core memory swap paging load agent"
        " agent_probe agent_sink",
    ),
    ("[agent.priorities]\nload = 'top'", 'agent.priorities.load = "top": expected one of low normal high'),
    ("[agent]\nmax_cpu_ratio = 0", "agent.max_cpu_ratio = 0: expected a number > 0.0"),
    (
        "[sinks.main.batch]\nrecords = 'many'",
        'sinks.main.batch.records = "many": expected a whole number from 1 to 10000, or one of adaptive',
    ),
    (
        "[sinks.main.batch]\nrecords = 0",
        "sinks.main.batch.records = 0: expected a whole number from 1 to 10000, or one of adaptive",
    ),
    ("[sinks.main.batch]\nmin = 20\nmax = 10", "sinks.main.batch.min = 20: expected at most max, 10"),
    ("[sinks.main.retry]\nbase = '10s'", 'sinks.main.retry.base = "10s": expected a duration above 0, at most cap, 5s'),
    (
        "[sinks.main.buffer]\npath = '/x/ring'\n[sinks.other.buffer]\npath = '/x/ring'",
        'sinks.other.buffer.path = "/x/ring": expected a file that nothing else is written to',
    ),
    (
        "[sinks.a]\ntype = 'prometheus'\n[sinks.b]\ntype = 'prometheus'",
        'sinks.b.address = "127.0.0.1:9101": expected an address of its own',
    ),
    (
        "[sinks.main]\nnames = 'node_exporter'",
        'sinks.main.names = "node_exporter": expected "hostprobe" with format json',
    ),
    (
        "[sinks.a]\ntype = 'file'\npath = '/x/out'\n[sinks.a.buffer]\npath = '/x/./out'",
        'sinks.a.path = "/x/out": expected a file that nothing else is written to',
    ),
    ("[sinks.main]\ntype = 'tcp'\naddress = 'a:1'\ntls = true", "sinks.main.tls = true: expected a table"),
    (
        "[sinks.a]\ntype = 'file'\npath = '/x/out'\n[sinks.b]\ntype = 'file'\npath = '/x/out'",
        'sinks.b.path = "/x/out": expected a file that nothing else is written to',
    ),
    ("[sinks.disk]\ntype = 'file'", "sinks.disk.path: expected a value, it has no default"),
    ("[sinks.disk]\ntype = 'file'\npath = ''", 'sinks.disk.path = "": expected a text in quotes of length >= 1'),
    ("[sinks.main.buffer]\nsize = '1B'", 'sinks.main.buffer.size = "1B": expected a size of 256 bytes or more'),
    (
        "[sinks.main.buffer]\nsize = '4 parsecs'",
        'sinks.main.buffer.size = "4 parsecs": expected a size such as "64KiB", "4MiB" or a number of bytes,'
        " 1073741824GiB at most",
    ),
    (
        "[sinks.main.buffer]\nwhen_full = 'drop_old'",
        "sinks.main.buffer.when_full = \"drop_old\": expected 'drop_oldest', or another of drop_oldest drop_newest"
        " drop_priority sample",
    ),
    (
        "[sinks.main.buffer]\nsync = 'always'",
        'sinks.main.buffer.sync = "always": expected "never" where the buffer has no path',
    ),
    (
        "[sinks.main]\nenabled = false",
        "sinks: none is enabled: expected at least one enabled sink, such as [sinks.main]",
    ),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[message.split(":")[0][:60] for _, message in MISTAKES])
def test_mistake_is_one_line_with_file_key_value_and_what_was_expected(files: Files, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        files.load(text)
    assert one_line(caught.value) == f"{files.path}: {message}"


def test_a_message_names_the_layer_that_is_wrong(files: Files) -> None:
    assert environment_error({"HOSTPROBE__AGENT__INTERVAL": "soon"}).startswith(
        '$HOSTPROBE__AGENT__INTERVAL: agent.interval = "soon": expected a duration'
    )
    flag = {"--interval": {"agent": {"interval": "soon"}}}
    assert files.error("[agent]\ninterval = '1s'", overrides=flag).startswith('--interval: agent.interval = "soon"')
    assert files.error("", template="ful").startswith("--template: template = \"ful\": expected 'full'")
    variable = {"HOSTPROBE__TEMPLATE": "non"}
    assert environment_error(variable).startswith("$HOSTPROBE__TEMPLATE: template = ")
    assert files.error("[probes.load]\ninterval = '1m'", environment={"HOSTPROBE__AGENT__INTERVAL": "7s"}) == (
        'probes.load.interval = "1m": expected a multiple of agent.interval, which is 7s'
    )


def test_a_later_layer_hides_no_mistake(files: Files) -> None:
    per_core = {"HOSTPROBE__PROBES__CPU__PER_CORE": "true"}
    assert files.error("[probes]\ncpu = 3", environment=per_core) == "probes.cpu = 3: expected a table"
    assert files.error("template = 'x'", template="minimal").startswith('template = "x": expected')
    assert files.error("sinks = 3", overrides={"--test": {"sinks": {"main": {"type": "stdout"}}}}) == (
        "sinks = 3: expected a table"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AGENT", "x", 'agent = "x": expected a table'),
        ("AGENT__RATES", "maybe", 'agent.rates = "maybe": expected true or false'),
        ("AGENT__INTERVALL", "1s", "agent.intervall = \"1s\": expected 'interval'"),
        ("AGENT__HOSTNAME", "42", "agent.hostname = 42: expected a text in quotes"),
        ("AGENT__HOSTNAME", "\udcff", r"agent.hostname = '\udcff': expected text in UTF-8 without NUL"),
        ("AGENT__TAGS__\udcff", "a", r"""agent.tags.'\udcff' = "a": expected text in UTF-8 without NUL"""),
        ("INTERVAL", "1s", 'interval = "1s": expected one of template agent log probes sinks'),
        ("", "1s", '"" = "1s": expected one of template agent log probes sinks'),
        ("PROBES__GPU__ENABLED", "true", "probes.gpu: expected 'cpu', or another of host cpu"),
        ("SINKS__MAIN__BUFFER__SIZE", "[" * 5000, "sinks.main.buffer.size = "),
        ("SINKS__MAIN__BUFFER__SIZE", "9" * 5000, "sinks.main.buffer.size = "),
        ("AGENT" + "__A" * 3000, "1", "agent.a = "),
    ],
)
def test_mistakes_in_the_environment(name: str, value: str, message: str) -> None:
    variable = f"HOSTPROBE__{name}"
    error = environment_error({variable: value})
    assert error.startswith((f"${variable}: {message}", "environment: nested too deeply: expected"))
    assert ": expected " in error


# Whatever a file holds


def test_merge_takes_nothing_from_its_source() -> None:
    source: dict[str, Any] = {"a": {"b": {"c": 1}}}
    into: dict[str, Any] = {"a": 3}
    merge(into, source)
    merge(into, {"a": {"b": {"d": 2}}, "e": [1]})
    assert into == {"a": {"b": {"c": 1, "d": 2}}, "e": [1]}
    assert source == {"a": {"b": {"c": 1}}}


KEYS = st.sampled_from(
    [
        "agent",
        "log",
        "probes",
        "sinks",
        "template",
        "interval",
        "align",
        "hostname",
        "rates",
        "root",
        "source",
        "shutdown_timeout",
        "tags",
        "level",
        "format",
        "cpu",
        "memory",
        "load",
        "disk_io",
        "sockets",
        "enabled",
        "include",
        "exclude",
        "row_limit",
        "per_core",
        "paging",
        "tcp_states",
        "connections",
        "main",
        "type",
        "buffer",
        "size",
        "when_full",
        "path",
        "max_size",
        "max_files",
        "env",
    ]
)
LEAVES = st.one_of(
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**64),
    st.floats(),
    st.text(st.characters(codec="utf-8"), max_size=5),
    st.dates(),
    st.times(),
    st.datetimes(),
    st.sampled_from(["1s", "10s", "1m", "0s", "4MiB", "stdout", "file", "json", "/tmp/x", "minimal", "drop_newest"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(KEYS, st.text(max_size=3)), inner, max_size=4)
    ),
    max_leaves=12,
)
SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        "agent": st.dictionaries(KEYS, VALUES, max_size=2),
        "probes": st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=2), max_size=2),
        "sinks": st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=3), max_size=2),
        "log": VALUES,
        "template": VALUES,
    },
)


def outcome(**sources: Any) -> Config | UsageError:
    try:
        return load(**sources)
    except UsageError as error:
        return error


@settings(max_examples=400, deadline=None)
@given(st.one_of(SECTIONS, st.dictionaries(st.one_of(KEYS, st.text(max_size=3)), VALUES, max_size=3)))
def test_any_tree_is_a_configuration_or_one_line(tree: dict[str, Any]) -> None:
    result = outcome(overrides={"--tree": tree}, environment={})
    if isinstance(result, UsageError):
        assert one_line(result).startswith(("--tree: ", "template "))
        assert ": expected " in str(result)
    else:
        assert result.sinks
        assert all(result.every(name) >= 1 for name in result.probes)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text("ABCDEGHIKLMNOPRSTU_", max_size=24).map("HOSTPROBE__{}".format), st.text(max_size=12)))
def test_any_environment_is_a_configuration_or_one_line(environment: dict[str, str]) -> None:
    result = outcome(environment=environment)
    assert isinstance(result, Config) or one_line(result).startswith("$HOSTPROBE__")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bearer = 'geheim'", "sinks.main.bearer: expected a table"),
        ("bearer = ['geheim']", "sinks.main.bearer: expected a table"),
        ("bearer.fil = 'geheim'", "sinks.main.bearer.fil: expected 'file', or another of file env credential"),
        ("bearer.token = 'geheim'", "sinks.main.bearer.token: expected one of file env credential"),
        ("basic = 'u:geheim'", "sinks.main.basic: expected a table"),
        ("basic.user = 'u'\nbasic.password = 'geheim'", "sinks.main.basic.password: expected a table"),
        ("basic.user = 'u'\nbasic.password.is = 'geheim'", "sinks.main.basic.password.is: expected one of file env"),
        ("basic.pass = 'geheim'", "sinks.main.basic.pass: expected 'password', or another of user password"),
        ("token = 'geheim'", "sinks.main.token: expected "),
        ("headers.Authorization = 'geheim'", "sinks.main.bearer: expected the place of a secret"),
        ("headers.Authorization = ['geheim']", "sinks.main.headers.Authorization: expected a text in quotes"),
        ("headers = 'Authorization: geheim'", "sinks.main.headers: expected a table"),
        ("headers = {'X-Key' = 'geheim', 'a b' = 'x'}", "sinks.main.headers: expected names and values"),
    ],
)
def test_no_message_shows_what_may_be_a_secret(files: Files, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        files.load(f"[sinks.main]\ntype = 'http'\nurl = 'https://h/'\n{text}\n")
    assert message in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_no_message_shows_a_secret_from_the_environment(files: Files) -> None:
    environment = {"HOSTPROBE__SINKS__MAIN__BEARER": "geheim"}
    with pytest.raises(UsageError) as caught:
        files.load("[sinks.main]\ntype = 'http'\nurl = 'https://h/'\n", environment=environment)
    assert str(caught.value) == "$HOSTPROBE__SINKS__MAIN__BEARER: sinks.main.bearer: expected a table"


def test_a_wrong_key_inside_an_optional_table_is_named(files: Files) -> None:
    with pytest.raises(UsageError, match=r"sinks\.main\.tls\.verify = false: expected one of ca certificate key"):
        files.load("[sinks.main]\ntype = 'http'\nurl = 'https://h/'\ntls = {verify = false}\n")
