"""What each plugin of collectd's becomes, and which files an `Include` brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.errors import UsageError
from agent.importing.collectd import INPUTS
from agent.importing.collectd_outputs import WRITERS
from tests.importing.imported import Result


@pytest.mark.parametrize(
    ("name", "probes"),
    [
        ("cpu", {"cpu"}),
        ("contextswitch", {"cpu"}),
        ("df", {"filesystem"}),
        ("disk", {"disk_io"}),
        ("hugepages", {"memory"}),
        ("interface", {"network"}),
        ("irq", {"cpu"}),
        ("load", {"load"}),
        ("memory", {"memory"}),
        ("processes", {"load", "cpu"}),
        ("protocols", {"sockets"}),
        ("swap", {"memory"}),
        ("tcpconns", {"sockets"}),
        ("uptime", {"host"}),
        ("vmem", {"memory"}),
    ],
)
def test_a_plugin_turns_on_its_probes_and_no_others(name: str, probes: set[str], tmp_path: Path) -> None:
    result = Result(tmp_path, f"LoadPlugin {name}\n")
    assert set(result.config.probes) == {*probes, "agent"}
    assert name in INPUTS


def plugin(name: str, *lines: str) -> str:
    body = "\n".join(lines)
    return f"LoadPlugin {name}\n<Plugin {name}>\n{body}\n</Plugin>\n"


def test_the_daemon_s_settings(tmp_path: Path) -> None:
    text = 'hostname "a"\nINTERVAL 2.5\nTimeout 2\nLoadPlugin load\n' + plugin("logfile", "LogLevel err", "File STDOUT")
    result = Result(tmp_path, text)
    assert (result.config.agent.hostname, str(result.config.agent.interval)) == ("a", "2500ms")
    assert result.config.log.level == "error"
    assert result.left_out == {"Timeout": "collectd's own"}


@pytest.mark.parametrize(
    ("ignore", "include", "exclude"),
    [("true", ("*",), ("lo", "veth*")), ("false", ("lo", "veth*"), ()), ('"true"', ("*",), ("lo", "veth*"))],
)
def test_selections_are_inverted(
    ignore: str, include: tuple[str, ...], exclude: tuple[str, ...], tmp_path: Path
) -> None:
    text = plugin("interface", "Interface lo", 'Interface "/^veth/"', f"IgnoreSelected {ignore}")
    settings: Any = Result(tmp_path, text).config.probes["network"]
    assert (settings.include, settings.exclude) == (include, exclude)


def test_mounts_and_types(tmp_path: Path) -> None:
    text = plugin("df", 'MountPoint "/boot"', "FSType tmpfs", "FSType nfs", "IgnoreSelected true")
    settings: Any = Result(tmp_path, text).config.probes["filesystem"]
    assert settings.exclude == ("/boot",)
    assert {"tmpfs", "nfs"} <= set(settings.exclude_types)
    assert "overlay" not in settings.exclude_types


def test_types_cannot_be_chosen(tmp_path: Path) -> None:
    result = Result(tmp_path, plugin("df", 'MountPoint "/"', "FSType ext4", "Device sda"))
    settings: Any = result.config.probes["filesystem"]
    assert settings.include == ("/",)
    assert {"df.FSType", "df.Device 'sda'"} <= set(result.left_out)


def test_a_pattern_that_selects_more_says_so(tmp_path: Path) -> None:
    text = Result(tmp_path, plugin("disk", 'Disk "/^sd[a-z]$/"', 'Disk "/^nvme[0-9]+$/"')).text
    assert 'include = ["sd[a-z]", "nvme[0-9]*"]  # a little wider than /^nvme[0-9]+$/\n' in text


def test_disks_without_a_selection_are_all_shown(tmp_path: Path) -> None:
    settings: Any = Result(tmp_path, "LoadPlugin disk\n").config.probes["disk_io"]
    assert (settings.include, settings.exclude) == (("*",), ())


def test_intervals_of_plugins(tmp_path: Path) -> None:
    text = "Interval 10\n<LoadPlugin df>\nInterval 60\n</LoadPlugin>\n<LoadPlugin swap>\nInterval 30\n</LoadPlugin>\n"
    result = Result(tmp_path, text + "LoadPlugin memory\nLoadPlugin df\n")
    assert (result.config.every("filesystem"), result.config.every("memory")) == (6, 1)
    assert "swap.interval" in result.left_out


def test_plugins_must_be_loaded(tmp_path: Path) -> None:
    text = "<Plugin cpu>\nReportByCpu false\n</Plugin>\n"
    assert list(Result(tmp_path, text).config.probes) == ["agent"]
    loaded = Result(tmp_path, f"AutoLoadPlugin true\n{text}").config
    assert loaded.probes["cpu"].per_core is False  # type: ignore[attr-defined]


def test_blocks_of_a_plugin_add_up(tmp_path: Path) -> None:
    text = plugin("disk", "Disk sda") + "<Plugin disk>\nDisk sdb\n</Plugin>\n"
    settings: Any = Result(tmp_path, text).config.probes["disk_io"]
    assert settings.include == ("sda", "sdb")


WRITTEN = {
    "write_graphite": (
        ['<Node "a">', "Host 10.0.0.1", 'Port "2004"', "Protocol udp", "</Node>"],
        {"type": "udp", "address": "10.0.0.1:2004", "format": "graphite"},
    ),
    "write_http": (
        ['<Node "a">', 'URL "https://h/p"', "Format JSON", "Timeout 1500", 'CACert "/ca"', 'Header "A: b"', "</Node>"],
        {"type": "http", "url": "https://h/p", "format": "json", "timeout": "1500ms", "headers": {"A": "b"}},
    ),
    "write_prometheus": (['Host "127.0.0.1"', "Port 9200"], {"type": "prometheus", "address": "127.0.0.1:9200"}),
    "write_influxdb_udp": (["Server localhost 8090"], {"type": "udp", "address": "localhost:8090", "format": "influx"}),
    "csv": (['DataDir "/var/csv/"'], {"type": "file", "path": "/var/csv/hostprobe.jsonl", "format": "json"}),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_writers(name: str, tmp_path: Path) -> None:
    lines, expected = WRITTEN[name]
    result = Result(tmp_path, plugin(name, *lines))
    found = msgspec.to_builtins(result.config.sinks["main"], enc_hook=str)
    assert {key: found[key] for key in expected} == expected
    assert result.left_out == {}


def test_every_writer_is_tested() -> None:
    assert {*WRITTEN, "network"} == set(WRITERS)


def test_defaults_of_writers(tmp_path: Path) -> None:
    text = plugin("write_graphite", "<Carbon>", "Prefix x", "</Carbon>") + plugin("write_prometheus", "Port 9103")
    result = Result(tmp_path, text + plugin("csv", "DataDir stdout"))
    found = {name: getattr(each, "address", each.type) for name, each in result.config.sinks.items()}
    assert found == {"main": "localhost:2003", "prometheus": "[::]:9103", "stdout": "stdout"}
    assert list(result.left_out) == ["write_graphite.Carbon .Prefix"]


def test_what_only_collectd_reads_is_a_comment(tmp_path: Path) -> None:
    text = plugin(
        "network", 'Server "ff18::efc0:4a42"', '<Server "h" 1>', 'Password "hunter2"', "</Server>", "Listen h"
    )
    result = Result(tmp_path, text)
    assert [each.type for each in result.config.sinks.values()] == ["stdout"]
    assert '# address = "[ff18::efc0:4a42]:25826"' in result.text
    assert '# address = "h:1"' in result.text
    assert "hunter2" not in result.text
    assert result.left_out["network.Listen"] == "hostprobe takes in no metrics"


def test_peers_that_are_not_verified_are_told(tmp_path: Path) -> None:
    node = ["<Node a>", 'URL "https://h/"', "Format JSON", "VerifyPeer false", 'ClientKeyPass "hunter2"', "</Node>"]
    result = Result(tmp_path, plugin("write_http", *node))
    assert {"write_http.Node a.VerifyPeer", "write_http.Node a.ClientKeyPass"} == set(result.left_out)
    assert "hunter2" not in result.text


def test_what_is_not_of_the_host_is_told(tmp_path: Path) -> None:
    text = "".join(f"LoadPlugin {name}\n" for name in ("mysql", "users", "rrdtool", "exec", "threshold"))
    lost = Result(tmp_path, text).left_out
    assert lost["mysql"] == "hostprobe collects the host only"
    assert {"users", "rrdtool", "exec", "threshold"} <= set(lost)


def test_included_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "conf.d" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.conf").write_text("LoadPlugin load\n")
    (folder / "b.txt").write_text("<damaged")
    (tmp_path / "conf.d" / "c.conf").write_text(plugin("cpu", "ReportByCpu false"))
    monkeypatch.chdir(tmp_path)
    text = '<Include "conf.d">\n Filter "*.conf"\n</Include>\nInclude "no*"\n'
    result = Result(tmp_path, text)
    assert list(result.config.probes) == ["cpu", "load", "agent"]
    assert result.left_out == {"Include 'no*'": "there is no such file that can be read here"}


def test_a_mistake_in_an_included_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.conf").write_text("\nLoadPlugin\n")
    with pytest.raises(UsageError, match=r"a\.conf: line 2: LoadPlugin has no value: expected a value"):
        Result(tmp_path, f'Include "{tmp_path}/a.conf"\n')


def test_files_include_each_other_eight_levels_deep(tmp_path: Path) -> None:
    for level in range(1, 10):
        (tmp_path / f"{level}").write_text(f'LoadPlugin "p{level}"\nInclude "{tmp_path}/{level + 1}"\n')
    lost = Result(tmp_path, f'LoadPlugin p0\nInclude "{tmp_path}/1"\n').left_out
    assert "p7" in lost
    assert "p8" not in lost


def test_files_that_include_themselves_end(tmp_path: Path) -> None:
    text = f'LoadPlugin cpu\nInclude "{tmp_path}/source.conf"\nInclude "{tmp_path}/source.conf"\n'
    result = Result(tmp_path, text)
    assert list(result.config.probes) == ["cpu", "agent"]
    assert any("more than 8 levels" in why for why in result.left_out.values())
