"""What each input and output of Telegraf's becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.importing.telegraf import INPUTS
from agent.importing.telegraf_outputs import OUTPUTS
from tests.importing.imported import FIXTURES, Result


def sink(tmp_path: Path, text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The only sink that an output becomes, and what it lost."""
    result = Result(tmp_path, text)
    assert list(result.config.sinks) == ["main"]
    return msgspec.to_builtins(result.config.sinks["main"], enc_hook=str), result.left_out


@pytest.mark.parametrize(
    ("name", "probes"),
    [
        ("cpu", {"cpu"}),
        ("mem", {"memory"}),
        ("swap", {"memory"}),
        ("system", {"host", "load"}),
        ("kernel", {"cpu", "host"}),
        ("kernel_vmstat", {"memory"}),
        ("disk", {"filesystem"}),
        ("diskio", {"disk_io"}),
        ("net", {"network", "sockets"}),
        ("netstat", {"sockets"}),
        ("nstat", {"sockets"}),
        ("processes", {"load"}),
        ("interrupts", {"cpu"}),
        ("internal", set()),
    ],
)
def test_an_input_turns_on_its_probes_and_no_others(name: str, probes: set[str], tmp_path: Path) -> None:
    result = Result(tmp_path, f"[[inputs.{name}]]\n")
    assert set(result.config.probes) == {*probes, "agent"}
    assert name in INPUTS


def test_the_fixture_has_every_output() -> None:
    text = FIXTURES["telegraf"].read_text()
    assert all(f"[[outputs.{name}]]" in text for name in OUTPUTS)


def test_the_agent_s_settings(tmp_path: Path) -> None:
    text = '[agent]\ninterval = "1m30s"\nround_interval = false\nhostname = "a"\nquiet = true\n'
    loaded = Result(
        tmp_path, f"{text}logformat = 'structured'\n[global_tags]\nEnv = 'x'\nenv = 'y'\nn = 5\n'a b' = 'c'\n"
    ).config
    assert (str(loaded.agent.interval), loaded.agent.align, loaded.agent.hostname) == ("90s", False, "a")
    assert (loaded.log.level, loaded.log.format) == ("error", "json")
    assert loaded.agent.tags == {"Env": "x", "env": "y", "n": "5", "a b": "c"}


@pytest.mark.parametrize("interval", ['"0s"', '"2d"', '"ten"', "true", "-1", "[]"])
def test_an_interval_that_hostprobe_does_not_take_is_told(interval: str, tmp_path: Path) -> None:
    result = Result(tmp_path, f"[agent]\ninterval = {interval}\n")
    assert str(result.config.agent.interval) == "10s"
    assert "agent.interval" in result.left_out


def test_variables_are_named_and_not_carried(tmp_path: Path) -> None:
    text = "[agent]\nhostname = '$HOSTNAME'\nmetric_batch_size = ${SIZE}\n"
    result = Result(tmp_path, f"{text}[[inputs.net]]\ninterfaces = ['eth0', '${{NIC}}']\n")
    assert "${NIC}" in result.left_out["inputs.net.interfaces"]
    assert "$HOSTNAME" in result.left_out["agent.hostname"]
    assert result.config.probes["network"].include == ("eth0",)  # type: ignore[attr-defined]


def test_devices_keep_what_telegraf_shows(tmp_path: Path) -> None:
    text = "[[inputs.disk]]\n[[inputs.diskio]]\n[[inputs.net]]\nignore_protocol_stats = true\n[[inputs.netstat]]\n"
    probes: dict[str, Any] = dict(Result(tmp_path, text).config.probes)
    assert not {"tmpfs", "overlay", "squashfs", "devtmpfs"} & set(probes["filesystem"].exclude_types)
    assert {"proc", "sysfs", "cgroup2"} <= set(probes["filesystem"].exclude_types)
    assert (probes["disk_io"].include, probes["disk_io"].exclude) == (("*",), ())
    assert probes["network"].exclude == ("lo",)
    assert (probes["sockets"].tcp_states, probes["sockets"].listening) == (True, False)


@pytest.mark.parametrize("order", [("net", "netstat"), ("netstat", "net")])
def test_states_are_walked_whichever_input_comes_first(order: tuple[str, str], tmp_path: Path) -> None:
    text = "".join(f"[[inputs.{name}]]\n" for name in order)
    probes: dict[str, Any] = dict(Result(tmp_path, text).config.probes)
    assert probes["sockets"].tcp_states is True


def test_protocol_counters_need_no_walk(tmp_path: Path) -> None:
    probes: dict[str, Any] = dict(Result(tmp_path, "[[inputs.net]]\n").config.probes)
    assert probes["sockets"].tcp_states == "summary"


def test_filters_by_tag_choose_devices(tmp_path: Path) -> None:
    text = """
        [[inputs.net]]
          [inputs.net.tagdrop]
            interface = ["veth*"]
            other = ["x"]
        [[inputs.diskio]]
          [inputs.diskio.tagpass]
            name = ["sd*"]
        [[inputs.disk]]
          ignore_fs = ["tmpfs"]
          fielddrop = ["inodes*"]
          [inputs.disk.tagdrop]
            path = ["/snap/*"]
            fstype = ["nfs"]
    """
    result = Result(tmp_path, text)
    probes: dict[str, Any] = dict(result.config.probes)
    assert probes["network"].exclude == ("lo", "veth*")
    assert probes["disk_io"].include == ("sd*",)
    assert probes["filesystem"].exclude == ("/snap/*",)
    assert {"tmpfs", "nfs"} <= set(probes["filesystem"].exclude_types)
    assert "tables" in result.left_out["inputs.net.tagdrop"]
    assert "tables" in result.left_out["inputs.disk.fielddrop"]


def test_a_probe_has_the_shortest_interval_of_its_inputs(tmp_path: Path) -> None:
    text = "[[inputs.mem]]\ninterval = '30s'\n[[inputs.swap]]\ninterval = '1m'\n[[inputs.disk]]\ninterval = '1m'\n"
    result = Result(tmp_path, text + "[[inputs.cpu]]\ninterval = '15s'\n[[inputs.system]]\ninterval = '5s'\n")
    assert [result.config.every(name) for name in ("memory", "filesystem", "cpu", "host")] == [3, 6, 1, 1]
    assert result.left_out["inputs.swap.interval"] == "the probe memory has one interval, 30s"
    assert "a multiple of agent.interval, which is 10s" in result.left_out["inputs.cpu.interval"]


def test_a_second_section_of_an_input_is_told(tmp_path: Path) -> None:
    result = Result(tmp_path, "[[inputs.cpu]]\npercpu = false\n[[inputs.cpu]]\n")
    assert "inputs.cpu (2)" in result.left_out
    assert result.config.probes["cpu"].per_core is False  # type: ignore[attr-defined]


def test_what_hostprobe_tells_both_ways_is_no_loss(tmp_path: Path) -> None:
    assert Result(tmp_path, "[[inputs.cpu]]\ntotalcpu = true\nreport_active = true\nalias = 'a'\n").left_out == {}


@pytest.mark.parametrize("value", ["0x" + "f" * 5000, "inf", "nan", "{}", "1979-05-27"])
def test_values_that_are_no_text_are_told(value: str, tmp_path: Path) -> None:
    result = Result(tmp_path, f"[agent]\nhostname = {value}\n")
    assert result.left_out["agent.hostname"] == "expected a text"


def test_sections_of_one_table_count_too(tmp_path: Path) -> None:
    assert set(Result(tmp_path, "[inputs.mem]\n[outputs.discard]\n").config.probes) == {"memory", "agent"}


def test_influxdb(tmp_path: Path) -> None:
    found, lost = sink(
        tmp_path,
        '[[outputs.influxdb]]\nurls = ["http://localhost:8086", "http://b:8086"]\ndatabase = "a&b"\n'
        'retention_policy = "week"\nuser_agent = "x"\ncontent_encoding = "identity"\n',
    )
    assert found["url"] == "http://localhost:8086/write?db=a%26b&rp=week"
    assert (found["type"], found["format"], found["gzip"]) == ("http", "influx", False)
    assert list(lost) == ["outputs.influxdb.urls but the first", "outputs.influxdb.user_agent"]


def test_influxdb_by_udp(tmp_path: Path) -> None:
    found, _ = sink(tmp_path, '[[outputs.influxdb]]\nurls = ["udp://127.0.0.1:8089"]\n')
    assert (found["type"], found["address"], found["format"]) == ("udp", "127.0.0.1:8089", "influx")


def test_influxdb_v2(tmp_path: Path) -> None:
    found, _ = sink(
        tmp_path, '[[outputs.influxdb_v2]]\nurls = ["https://h"]\ntoken = "t"\norganization = "o"\nbucket = "b/c"\n'
    )
    assert found["url"] == "https://h/api/v2/write?org=o&bucket=b%2Fc"
    assert found["header_secrets"]["Authorization"]["file"] == "/etc/hostprobe/influxdb-v2-token"


def test_a_secret_over_an_open_connection_is_refused_as_hostprobe_does(tmp_path: Path) -> None:
    result = Result(tmp_path, '[[outputs.influxdb]]\nurls = ["http://far:8086"]\nusername = "a"\npassword = "b"\n')
    assert "a secret goes over no open connection" in result.left_out["outputs.influxdb"]
    assert result.config.sinks["main"].type == "stdout"


def test_prometheus_client(tmp_path: Path) -> None:
    text = '[[outputs.prometheus_client]]\nlisten = ":9273"\npath = "/m"\ntls_cert = "c"\ntls_key = "k"\n'
    found, _ = sink(tmp_path, text)
    assert (found["type"], found["address"], found["path"]) == ("prometheus", "[::]:9273", "/m")
    assert found["tls"] == {"certificate": "c", "key": "k", "client_ca": ""}


@pytest.mark.parametrize(
    ("size", "archives", "max_bytes", "files"),
    [("10MB", 3, 10_000_000, 3), ("64KiB", 0, 65_536, 0), ("2g", -1, 2 * 10**9, 5), ("0MB", 5, 100 << 20, 5)],
)
def test_file(size: str, archives: int, max_bytes: int, files: int, tmp_path: Path) -> None:
    text = f'[[outputs.file]]\nfiles = ["/a/b"]\nrotation_max_size = "{size}"\nrotation_max_archives = {archives}\n'
    found, lost = sink(tmp_path, text)
    assert (found["path"], found["format"], found["max_files"]) == ("/a/b", "influx", files)
    assert Result(tmp_path, text).config.sinks["main"].max_size == max_bytes  # type: ignore[attr-defined]
    assert ("outputs.file.rotation_max_archives" in lost) == (archives < 0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", {"compression": "none", "acks": "all", "format": "influx", "tls": None}),
        ("compression_codec = 3\nrequired_acks = 1\nenable_tls = true", {"compression": "lz4", "acks": "1"}),
        ('data_format = "json"\nrouting_key = "k"', {"format": "json", "key": "k"}),
        (
            'tls_ca = "a"\ntls_cert = "b"\ntls_key = "c"',
            {"tls": {"ca": "a", "certificate": "b", "key": "c", "server_name": ""}},
        ),
    ],
)
def test_kafka(given: str, expected: dict[str, Any], tmp_path: Path) -> None:
    found, _ = sink(tmp_path, f'[[outputs.kafka]]\nbrokers = ["k:9092"]\ntopic = "t"\n{given}\n')
    assert (found["type"], found["servers"], found["topic"]) == ("kafka", ("k:9092",), "t")
    assert {key: found[key] for key in expected} == expected


def test_nats(tmp_path: Path) -> None:
    text = '[[outputs.nats]]\nservers = ["nats://u:p@n:4222"]\nsubject = "s"\nsecure = true\njetstream = {name = "S"}\n'
    found, lost = sink(tmp_path, text)
    assert (found["servers"], found["subject"], found["stream"]) == (("tls://n:4222",), "s", "S")
    assert list(lost) == ["outputs.nats, user and password of its address"]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://127.0.0.1:8094", {"type": "tcp", "address": "127.0.0.1:8094"}),
        ("udp6://[::1]:8094", {"type": "udp", "address": "[::1]:8094"}),
        ("unix:///run/a.sock", {"type": "unix", "path": "/run/a.sock"}),
        ("unixgram:///run/a.sock", {"type": "stdout"}),
    ],
)
def test_socket_writer(address: str, expected: dict[str, str], tmp_path: Path) -> None:
    found, _ = sink(tmp_path, f'[[outputs.socket_writer]]\naddress = "{address}"\ndata_format = "graphite"\n')
    assert {key: found[key] for key in expected} == expected
    assert found["type"] == "stdout" or found["format"] == "graphite"


def test_http(tmp_path: Path) -> None:
    found, lost = sink(
        tmp_path,
        '[[outputs.http]]\nurl = "https://h/p?a=b%20c"\n'
        'headers = {X-A = "1", Authorization = "x", Content-Type = "y"}\n'
        'data_format = "prometheus"\ntimeout = "7s"\n',
    )
    assert (found["url"], found["format"]) == ("https://h/p?a=b%20c", "prometheus")
    assert (found["gzip"], found["timeout"]) == (False, "7s")
    assert found["headers"] == {"X-A": "1"}
    assert list(found["header_secrets"]) == ["Authorization"]
    assert list(lost) == ["outputs.http, the header Content-Type"]


def test_http_of_remote_write(tmp_path: Path) -> None:
    found, _ = sink(tmp_path, '[[outputs.http]]\nurl = "https://h/w"\ndata_format = "prometheusremotewrite"\n')
    assert (found["type"], found["url"]) == ("remote_write", "https://h/w")


@pytest.mark.parametrize(("address", "url"), [("localhost:4317", "http://localhost:4318"), ("far:9999", None)])
def test_opentelemetry(address: str, url: str | None, tmp_path: Path) -> None:
    found, _ = sink(tmp_path, f'[[outputs.opentelemetry]]\nservice_address = "{address}"\n')
    assert (found.get("url"), found["type"]) == (url, "otlp" if url else "stdout")


@pytest.mark.parametrize("format", ["splunkmetric", "carbon2", "nowmetric"])
def test_formats_that_hostprobe_does_not_have(format: str, tmp_path: Path) -> None:
    found, lost = sink(tmp_path, f'[[outputs.file]]\nfiles = ["/a"]\ndata_format = "{format}"\n')
    assert found["type"] == "stdout"
    assert format in lost["outputs.file"]


def test_what_is_not_of_the_host_is_told(tmp_path: Path) -> None:
    text = "[[inputs.docker]]\n[[inputs.statsd]]\n[[outputs.datadog]]\n[[processors.a]]\n[[aggregators.b]]\n[x]\n"
    lost = Result(tmp_path, text).left_out
    assert lost["inputs.docker"] == "hostprobe collects the host only"
    assert {"inputs.statsd", "outputs.datadog", "processors.a", "aggregators.b", "x"} <= set(lost)
