"""Packages that only one sink or format needs, and what is said where they are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agent.__main__ import main
from agent.errors import UsageError
from agent.extras import needed


def test_a_module_that_is_there() -> None:
    assert needed("json.decoder", "x", "it needs json").JSONDecoder


def test_a_missing_package_names_the_command() -> None:
    with pytest.raises(UsageError) as raised:
        needed("no_such_package.part", "otlp", "the format otlp needs no-such-package")
    assert str(raised.value) == 'the format otlp needs no-such-package: expected pip install "hostprobe[otlp]"'


def test_what_a_package_itself_misses_is_no_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        needed("half_there", "otlp", "it needs half-there")


SINKS = {
    "http": ("urllib3", 'url = "http://127.0.0.1:1/"'),
    "prometheus": ("cheroot", 'address = "127.0.0.1:1"'),
    "remote_write": ("cramjam", 'url = "http://127.0.0.1:1/"'),
    "otlp": ("opentelemetry", 'url = "http://127.0.0.1:1/"'),
    "kafka": ("confluent_kafka", 'servers = ["127.0.0.1:1"]\ntopic = "t"'),
    "nats": ("nats", 'servers = ["nats://127.0.0.1:1"]\nsubject = "s"'),
}


@pytest.mark.parametrize("kind", SINKS)
def test_check_names_the_sink_and_the_command(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package, settings = SINKS[kind]
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / "hostprobe.toml"
    path.write_text(f'template = "minimal"\n[sinks.main]\ntype = "{kind}"\n{settings}\n')
    assert main(["check", "--config", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hostprobe: {path}: sinks.main: ")
    assert line.endswith(f'expected pip install "hostprobe[{kind}]"')


def test_a_format_without_its_package_says_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.proto.metrics.v1.metrics_pb2", None)
    path = tmp_path / "hostprobe.toml"
    path.write_text('[sinks.main]\nformat = "otlp"\n')
    assert main(["check", "--config", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    needs = 'the format otlp needs opentelemetry-proto: expected pip install "hostprobe[otlp]"'
    assert line == f"hostprobe: {path}: sinks.main: {needs}"
