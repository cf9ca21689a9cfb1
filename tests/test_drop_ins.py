"""Files in conf.d beside a configuration, and keys by their former names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent import layers
from agent.config import load
from agent.errors import UsageError
from agent.units import Duration
from tests.processes import hostprobe, usage_error


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "conf.d").mkdir()
    found = tmp_path / "hostprobe.toml"
    found.write_text('[agent]\ninterval = "1s"\n[agent.tags]\nenv = "prod"\nrack = "1"\n')
    return found


def drop_in(path: Path, name: str, text: str) -> Path:
    found = path.parent / "conf.d" / name
    found.write_text(text)
    return found


def test_they_come_over_the_file_in_the_order_of_their_names(path: Path) -> None:
    drop_in(path, "20-b.toml", '[agent]\ninterval = "3s"\n')
    drop_in(path, "10-a.toml", '[agent]\ninterval = "2s"\nhostname = "a"\n[agent.tags]\nrack = "2"\n')
    drop_in(path, "9.toml.dpkg-old", "[no")
    drop_in(path, ".hidden.toml", "[no")
    config = load(str(path), environment={})
    assert config.agent.interval == Duration(3)
    assert config.agent.hostname == "a"
    assert config.agent.tags == {"env": "prod", "rack": "2"}
    assert config.where == str(path)
    over = load(str(path), environment={"HOSTPROBE__AGENT__INTERVAL": "4s"})
    assert over.agent.interval == Duration(4)


def test_a_sink_of_the_template_is_replaced_whole_and_one_of_the_file_is_added_to(path: Path) -> None:
    drop_in(path, "10.toml", '[sinks.main]\ntype = "file"\npath = "/tmp/frames"\n')
    drop_in(path, "20.toml", '[sinks.main.buffer]\nsize = "2MiB"\n')
    main = load(str(path), environment={}).sinks["main"]
    assert (main.type, main.buffer.size) == ("file", 2 << 20)


def test_a_template_can_come_from_one(path: Path) -> None:
    drop_in(path, "10.toml", 'template = "minimal"\n')
    assert load(str(path), environment={}).template == "minimal"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[agent", "Expected"),
        ('[agent]\ninterval = "soon"', 'agent.interval = "soon": expected a duration'),
        ("[agent]\nintervall = 1", "agent.intervall = 1: expected 'interval'"),
    ],
)
def test_a_mistake_names_its_file(path: Path, text: str, message: str) -> None:
    found = drop_in(path, "10.toml", text)
    assert usage_error("check", "--config", path).startswith(f"{found}: {message}")


def test_one_that_is_no_file_is_a_mistake(path: Path) -> None:
    (path.parent / "conf.d" / "10.toml").mkdir()
    with pytest.raises(UsageError, match=r"conf\.d/10\.toml: is no regular file: expected a configuration file"):
        load(str(path), environment={})


def test_a_directory_that_can_not_be_read_is_a_mistake(path: Path) -> None:
    folder = path.parent / "conf.d"
    folder.rmdir()
    os.symlink("conf.d", folder)
    with pytest.raises(UsageError, match=r"conf\.d: .*: expected a directory that can be read"):
        load(str(path), environment={})


@pytest.mark.parametrize("is_file", [True, False])
def test_without_the_directory(path: Path, is_file: bool) -> None:
    (path.parent / "conf.d").rmdir()
    if is_file:
        (path.parent / "conf.d").write_text("")
    assert load(str(path), environment={}).agent.interval == Duration(1)


# Keys that have been renamed


@pytest.fixture
def _renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layers.RENAMED, ("agent", "period"), (("agent", "interval"), "0.3.0"))


@pytest.mark.usefixtures("_renamed")
def test_a_former_name_is_taken_and_told(path: Path) -> None:
    path.write_text('[agent]\nperiod = "7s"\n')
    config = load(str(path), environment={})
    assert config.agent.interval == Duration(7)
    assert config.notices == (f"{path}: agent.period is agent.interval now; its former name is taken until 0.3.0",)
    other = drop_in(path, "10.toml", '[agent]\nperiod = "8s"\n')
    config = load(str(path), environment={})
    assert config.agent.interval == Duration(8)
    assert [notice.partition(": ")[0] for notice in config.notices] == [str(path), str(other)]


@pytest.mark.usefixtures("_renamed")
def test_both_names_are_a_mistake(path: Path) -> None:
    path.write_text('[agent]\nperiod = "7s"\ninterval = "7s"\n')
    with pytest.raises(UsageError, match=r"agent\.period and agent\.interval: expected agent\.interval alone"):
        load(str(path), environment={})


def test_today_nothing_has_a_former_name(path: Path) -> None:
    assert layers.RENAMED == {}
    assert load(str(path), environment={}).notices == ()
    assert hostprobe("check", "--config", path)[::2] == (0, "")
