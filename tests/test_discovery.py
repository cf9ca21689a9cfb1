"""The built-in probes and sinks, and those that another distribution adds by entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

from agent import discovery
from agent.errors import UsageError
from agent.sinks.sink import SinkSettings
from agent.table import TableSpec
from agent.telemetry import AgentProbe
from probes.probe import ProbeSettings

REPOSITORY = Path(__file__).parent.parent
TABLES = {
    "host": "host",
    "cpu": "cpu cpu_core",
    "memory": "memory swap paging",
    "load": "load",
    "disk_io": "disk_io io",
    "filesystem": "filesystem",
    "network": "network",
    "pressure": "pressure",
    "sockets": "tcp udp unix listening connections udp_sockets unix_sockets",
    "agent": "agent agent_probe agent_sink",
}

GPU = '''
import msgspec

from agent.errors import SinkError
from agent.table import TableSpec, counter, gauge, rate
from agent.sinks.sink import SinkSettings
from probes.probe import ProbeSettings

TABLE = TableSpec(
    "gpu",
    "What the GPUs do.",
    counter("frames_total", "frames", "Frames drawn."),
    rate("frames_per_second", "frames/second", "Frames drawn a second.", "frames_total"),
    gauge("temperature_celsius", "celsius", "How hot it is."),
    labels=("card",),
)


class GpuSettings(ProbeSettings, frozen=True, kw_only=True):
    cards: tuple[str, ...] = ("a",)


class GpuProbe:
    Settings = GpuSettings
    tables = (TABLE,)

    def __init__(self, settings, host):
        self._labels = [(card,) for card in settings.cards]
        self._frames = 0

    def collect(self, frame):
        self._frames += 60
        table = frame.open(TABLE)
        for row in range(table.claim(self._labels)):
            table.put_counters(row, (self._frames + row,))
            table.put_gauges(row, (40.0 + row,))

    def close(self): ...


class TwiceSettings(SinkSettings, frozen=True, kw_only=True):
    path: str


class TwiceSink:
    """Every line twice."""

    Settings = TwiceSettings

    def __init__(self, settings):
        self._path = settings.path

    def open(self):
        self._file = open(self._path, "ab")

    def deliver(self, payloads):
        for payload in payloads:
            self._file.write(bytes(payload) + b"\\n" + bytes(payload) + b"\\n")

    def close(self):
        self._file.close()


class Tired(GpuProbe):
    def __init__(self, settings, host):
        raise OSError("no card")


class Second(GpuProbe):
    pass
'''
ENTRIES = """
[hostprobe.probes]
gpu = hostprobe_gpu:GpuProbe
tired = hostprobe_gpu:Tired
second = hostprobe_gpu:Second
gone = hostprobe_nowhere:Probe
cpu = hostprobe_gpu:GpuProbe

[hostprobe.sinks]
twice = hostprobe_gpu:TwiceSink
"""


def install(folder: Path, entries: str = ENTRIES) -> Path:
    """A distribution as pip leaves it, in a directory for PYTHONPATH."""
    info = folder / "hostprobe_gpu-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "hostprobe_gpu.py").write_text(GPU)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hostprobe-gpu\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)
    return folder


def hostprobe(*arguments: str | Path, path: Path, status: int = 0) -> str:
    """Runs a command with another directory to import from; its stdout, or its stderr if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "agent", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if status else done.stdout


@pytest.mark.parametrize("name", discovery.PROBES)
def test_probe_has_settings_and_its_tables(name: str) -> None:
    probe: Any = discovery.load("probes", name)
    assert issubclass(probe.Settings, ProbeSettings)
    assert probe.Settings().enabled is True
    assert all(isinstance(spec, TableSpec) for spec in probe.tables)
    assert [spec.name for spec in probe.tables] == TABLES[name].split()


@pytest.mark.parametrize("name", discovery.PROBES)
def test_psutil_variant_fills_the_same_tables(name: str) -> None:
    probe: Any = discovery.load("probes", name)
    variant = discovery.psutil_variant(probe)
    assert variant.tables == probe.tables
    assert variant.Settings is probe.Settings
    if probe is AgentProbe:
        assert variant is probe
    else:
        assert variant.__name__ == f"Psutil{probe.__name__}"


@pytest.mark.parametrize("name", discovery.SINKS)
def test_sink_has_settings(name: str) -> None:
    sink: Any = discovery.load("sinks", name)
    assert issubclass(sink.Settings, SinkSettings)
    assert msgspec.structs.fields(sink.Settings)
    assert all(callable(getattr(sink, method)) for method in ("open", "deliver", "close"))


def test_names_that_nobody_has() -> None:
    assert discovery.load("probes", "gpu") is None
    assert discovery.load("sinks", "carrier_pigeon") is None
    assert discovery.names("probes")[: len(discovery.PROBES)] == list(discovery.PROBES)
    assert discovery.names("sinks")[: len(discovery.SINKS)] == list(discovery.SINKS)


def test_added_names_come_behind_ours_and_do_not_replace_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path))
    assert {"gpu", "tired", "gone"} <= set(discovery.names("probes")[len(discovery.PROBES) :])
    assert "twice" in discovery.names("sinks")
    assert discovery.names("probes").count("cpu") == 1
    cpu: Any = discovery.load("probes", "cpu")
    assert cpu.__module__ == "probes.cpu"


def test_an_entry_point_that_cannot_be_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path))
    expected = r"^probes\.gone: hostprobe_nowhere:Probe: ModuleNotFoundError: No module named 'hostprobe_nowhere'$"
    with pytest.raises(UsageError, match=expected):
        discovery.load("probes", "gone")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return install(tmp_path / "site", "[hostprobe.probes]\ngpu = hostprobe_gpu:GpuProbe\n")


def test_an_added_probe_is_configured_collected_and_described(path: Path, tmp_path: Path) -> None:
    config = tmp_path / "hostprobe.toml"
    config.write_text("template = 'minimal'\n[probes.gpu]\ncards = ['x', 'y']\n")
    line = json.loads(hostprobe("once", "--config", config, "--wait", "10ms", path=path))
    assert [(row["card"], row["frames_total"], row["temperature_celsius"]) for row in line["gpu"]] == [
        ("x", 120, 40),
        ("y", 121, 41),
    ]
    assert all(row["frames_per_second"] > 0 for row in line["gpu"])
    assert list(line)[-3:] == ["agent", "agent_probe", "agent_sink"]
    assert {"probe": "gpu", "failures_total": 0, "up": 1}.items() <= line["agent_probe"][-2].items()
    schema = json.loads(hostprobe("schema", path=path))
    assert Draft202012Validator(schema).is_valid(line)
    assert list(schema["properties"]["gpu"]["items"]["properties"]) == list(line["gpu"][0])
    assert "## gpu\n\nWhat the GPUs do." in hostprobe("metrics", "--format", "markdown", path=path)


def test_an_added_probe_keeps_its_settings_checked(path: Path, tmp_path: Path) -> None:
    config = tmp_path / "hostprobe.toml"
    config.write_text("[probes.gpu]\ncrads = ['x']\n")
    assert hostprobe("check", "--config", config, path=path, status=2) == (
        f"hostprobe: {config}: probes.gpu.crads = [\"x\"]: expected 'cards', or another of enabled interval cards\n"
    )


def test_a_probe_is_not_collected_unless_it_has_a_section(path: Path) -> None:
    line = json.loads(hostprobe("once", "--template", "minimal", "--wait", "0", path=path))
    assert "gpu" not in line


def test_an_added_sink_delivers(tmp_path: Path) -> None:
    path = install(tmp_path / "site", "[hostprobe.sinks]\ntwice = hostprobe_gpu:TwiceSink\n")
    config = tmp_path / "hostprobe.toml"
    out = tmp_path / "out"
    config.write_text(
        f"template = 'minimal'\n[agent]\ninterval = '10ms'\n[sinks.main]\ntype = 'twice'\npath = '{out}'\n"
    )
    assert hostprobe("run", "--config", config, "--cycles", "3", path=path) == ""
    assert [json.loads(line)["sequence"] for line in out.read_text().splitlines()] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("[probes.tired]", "probes.tired: it does not start: OSError: no card"),
        ("[probes.gone]", "probes.gone: hostprobe_nowhere:Probe: ModuleNotFoundError: No module named"),
        ("[probes.gpu]\n[probes.second]", "probes.second: its table gpu: expected another name, probes.gpu has this"),
        ("[probes.gpus]", "probes.gpus: expected 'gpu', or another of host cpu memory load"),
        ("[sinks.main]\ntype = 'thrice'", "sinks.main.type = \"thrice\": expected 'twice', or another of stdout file"),
        ("[sinks.main]\ntype = 'twice'", "sinks.main.path: expected a value, it has no default"),
    ],
)
def test_what_can_be_wrong_with_added_ones_is_one_line(tmp_path: Path, section: str, message: str) -> None:
    path = install(tmp_path / "site")
    config = tmp_path / "hostprobe.toml"
    config.write_text(f"template = 'minimal'\n{section}\n")
    error = hostprobe("check", "--config", config, path=path, status=2)
    assert message in error
    assert len(error.splitlines()) == 1
