"""The whole way, from a file to a configuration that loads: nothing secret in it, and each loss told twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.errors import UsageError
from agent.importing.conversion import Imported, convert
from agent.importing.telegraf_outputs import OUTPUTS
from tests.importing.imported import FIXTURES, Result, loaded

REPOSITORY = Path(__file__).parents[2]
ERROR_CHARACTERS_MAX = 400


@pytest.mark.parametrize("kind", FIXTURES)
def test_what_is_printed_loads_and_is_found_good(kind: str, tmp_path: Path) -> None:
    imported = convert(str(FIXTURES[kind]))
    assert imported.kind == kind
    assert loaded(tmp_path, imported.text).agent.hostname == "web-1"
    assert len(imported.left_out) >= 15


@pytest.mark.parametrize("kind", FIXTURES)
def test_no_secret_is_printed(kind: str) -> None:
    assert FIXTURES[kind].read_text().count("hunter2") >= 2
    imported = convert(str(FIXTURES[kind]))
    assert "hunter2" not in imported.text + "".join(imported.left_out)


@pytest.mark.parametrize("kind", FIXTURES)
def test_each_loss_stands_in_the_file_too(kind: str) -> None:
    imported = convert(str(FIXTURES[kind]))
    for line in imported.left_out:
        what, _, why = line.removeprefix("not carried over: ").partition(": ")
        stands = [f"# {line}", f"# a comment, as it can't be carried over: {why}"]
        assert any(each in imported.text.splitlines() for each in stands), what


@pytest.mark.parametrize("kind", FIXTURES)
def test_lines_of_the_file_fit_a_screen_or_hold_one_value(kind: str) -> None:
    assert all(line.isprintable() for line in convert(str(FIXTURES[kind])).text.split("\n"))


def test_a_configuration_without_outputs_goes_to_stdout(tmp_path: Path) -> None:
    result = Result(tmp_path, "[[inputs.cpu]]\n")
    assert [sink.type for sink in result.config.sinks.values()] == ["stdout"]
    assert list(result.config.probes) == ["cpu", "agent"]
    assert "No output could be carried over" in result.text


def test_the_first_good_output_takes_the_place_of_the_template_s(tmp_path: Path) -> None:
    result = Result(tmp_path, '[[outputs.http]]\nurl = "nowhere"\n[[outputs.graphite]]\n[[outputs.graphite]]\n')
    assert {name: sink.type for name, sink in result.config.sinks.items()} == {"main": "tcp", "tcp": "tcp"}
    assert '# url = "nowhere"' in result.text
    assert "https://host:8080/path" in result.left_out["outputs.http"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("# a comment\n\n[agent]\n", "telegraf"),
        ("  [[inputs.cpu]]\n", "telegraf"),
        ("loadplugin cpu\n", "collectd"),
        ('Hostname "a"\nLoadPlugin cpu\n', "collectd"),
        ("<LoadPlugin cpu>\n</LoadPlugin>\n", "collectd"),
        ("\ufeff[agent]\r\ninterval = '5s'\r\n", "telegraf"),
        ("LoadPlugin cpu\r\n<Plugin cpu>\r\n ReportByCpu false\r\n</Plugin>\r\n", "collectd"),
    ],
)
def test_the_format_is_guessed(text: str, kind: str, tmp_path: Path) -> None:
    assert Result(tmp_path, text).imported.kind == kind


@pytest.mark.parametrize(
    ("content", "kind", "expected"),
    [
        (b"hello\n", None, "neither Telegraf's nor collectd's: expected [agent] or [[inputs.NAME]], or LoadPlugin"),
        (b"", None, "neither Telegraf's nor collectd's"),
        (b"[agent]\n\xff\n", None, "byte 8 is not UTF-8"),
        (b"[agent]\ninterval = \n", None, "(at line 2, column 12): expected valid TOML"),
        (b"[agent]\nx = " + b"[" * 100_000, None, "nested too deeply"),
        (b"x = 1\n", "telegraf", "no section of Telegraf's in it: expected [agent]"),
        (b"Nonsense 1\n", "collectd", "no statement of collectd's in it: expected LoadPlugin"),
        (b"[agent]\n", "collectd", 'line 1: "[agent]": expected a key'),
        (b"LoadPlugin cpu\n<Plugin cpu>\n", None, "line 2: <Plugin> has no end: expected </Plugin>"),
        (b"LoadPlugin cpu\n" + b"<a>\n" * 100_000, None, "line 34: nested too deeply"),
        (b"\0" * 50, None, "neither Telegraf's nor collectd's"),
        (b"#" * (9 << 20), None, "longer than 4 MiB"),
    ],
)
def test_damaged_files_have_one_line(content: bytes, kind: str | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "a.conf"
    path.write_bytes(content)
    assert expected in error(str(path), kind)


def test_files_that_cannot_be_read_have_one_line(tmp_path: Path) -> None:
    assert "No such file" in error(str(tmp_path / "none"))
    assert "Is a directory" in error(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "it is no file" in error(str(tmp_path / "pipe"))
    assert "null" in error("a\0b")


def error(path: str, kind: str | None = None) -> str:
    """The one line that the import ends with."""
    with pytest.raises(UsageError) as caught:
        convert(path, kind)  # type: ignore[arg-type]
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < ERROR_CHARACTERS_MAX
    return line


@pytest.mark.parametrize(
    "text",
    [
        "[agent]\n" + "\n" * 1_000_000,
        "[global_tags]\n" + "".join(f"t{number} = 'x'\n" for number in range(20_000)),
        "[[outputs.graphite]]\n" * 5_000,
        "[[inputs.x]]\n" * 20_000,
        "[[inputs.diskio]]\ndevices = [" + ", ".join(f'"d{number}"' for number in range(20_000)) + "]\n",
        "LoadPlugin cpu\n" * 50_000,
        "LoadPlugin disk\n<Plugin disk>\n"
        + "".join(f'Disk "/d{number}+/"\n' for number in range(20_000))
        + "</Plugin>\n",
        'LoadPlugin csv\nHostname "' + "x\\\n" * 100_000 + '"\n',
        "LoadPlugin write_graphite\n<Plugin write_graphite>\n" + "<Node a>\n</Node>\n" * 5_000 + "</Plugin>\n",
    ],
    ids=range(9),
)
def test_long_files_come_to_an_end(text: str, tmp_path: Path) -> None:
    assert Result(tmp_path, text).config.sinks


def test_a_process_of_its_own_prints_it_and_no_more() -> None:
    program = "import sys; from agent.importing.conversion import convert; print(convert(sys.argv[1]).text)"
    command = [sys.executable, "-c", program, str(FIXTURES["collectd"])]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("# Written by `hostprobe import` from collectd.conf")
    assert done.stderr == ""


def words(text: str) -> list[str]:
    """What blanks part."""
    return text.split()


VALUES = st.recursive(
    st.one_of(
        st.sampled_from(["hunter2", "10s", "${A}", "$A", "@{s:k}", "a\nb", "\0", "http://u:hunter2@h/?token=hunter2"]),
        st.text(max_size=8),
        st.integers(),
        st.booleans(),
        st.floats(),
        st.none(),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
KEYS = st.sampled_from(
    words(
        "interval hostname urls url password username token listen servers brokers topic subject address files"
        " mount_points ignore_fs devices interfaces tagdrop tagpass percpu headers http_headers timeout tls_ca"
        " jetstream data_format collect rotation_max_size database service_address compression_codec"
        " basic_password basic_username"
    )
)
INPUTS = st.sampled_from(words("cpu mem swap disk diskio net netstat system kernel processes docker nstat"))
NAMES = st.sampled_from(
    words("influxdb influxdb_v2 http file kafka nats graphite prometheus_client opentelemetry socket_writer x")
)
TREES = st.fixed_dictionaries(
    {},
    optional={
        "agent": st.one_of(st.dictionaries(KEYS, VALUES, max_size=4), VALUES),
        "global_tags": st.one_of(st.dictionaries(st.text(max_size=6), VALUES, max_size=4), VALUES),
        "inputs": st.dictionaries(INPUTS, st.one_of(st.dictionaries(KEYS, VALUES, max_size=4), VALUES), max_size=4),
        "outputs": st.dictionaries(NAMES, st.one_of(st.dictionaries(KEYS, VALUES, max_size=5), VALUES), max_size=3),
    },
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TREES)
def test_any_settings_of_telegraf_s_become_what_loads(tmp_path: Path, tree: dict[str, object]) -> None:
    from agent.importing import telegraf
    from agent.importing.draft import Draft

    draft = Draft("Telegraf", "a.conf")
    telegraf.fill(draft, tree)
    text = draft.text()
    loaded(tmp_path, text)
    assert all("\n" not in line for line in draft.left_out)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FIXTURES)), st.data())
def test_a_damaged_fixture_is_read_or_refused(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    content = bytearray(FIXTURES[kind].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=3))
    path = tmp_path / "a.conf"
    path.write_bytes(content)
    result = convert_or_refuse(path)
    assert "\n" not in result if isinstance(result, str) else loaded(tmp_path, result.text)


def convert_or_refuse(path: Path) -> Imported | str:
    """What becomes of a file, or the line that says why nothing does."""
    try:
        return convert(str(path))
    except UsageError as error:
        return str(error)


SECRET_KEYS = {
    "outputs.influxdb": ("username", "password"),
    "outputs.influxdb_v2": ("", "token"),
    "outputs.http": ("username", "password"),
    "outputs.prometheus_client": ("basic_username", "basic_password"),
    "outputs.kafka": ("sasl_username", "sasl_password"),
    "outputs.nats": ("username", "password"),
}


@pytest.mark.parametrize("output", SECRET_KEYS)
@pytest.mark.parametrize("value", ["hunter2", "${SECRET}", "@{store:secret}", 42, ["hunter2"], {"a": "hunter2"}])
def test_secrets_become_places(output: str, value: object, tmp_path: Path) -> None:
    user, key = SECRET_KEYS[output]
    table = {user: "me", key: value} if user else {key: value}
    lines = [f"[[{output}]]", 'url = "https://h/"', 'urls = ["https://h"]', 'brokers = ["localhost:9092"]']
    lines += ['listen = "localhost:9273"', *(f"{name} = {toml(item)}" for name, item in table.items())]
    text = Result(tmp_path, "\n".join(lines)).text
    assert "hunter2" not in text
    assert "must hold" in text
    place = 'env = "SECRET"' if value == "${SECRET}" and "v2" not in output else 'file = "/etc/hostprobe/'
    assert f"{{ {place}" in text


ADDRESS = "me:hunter2@localhost:1/?token=hunter2&a=b"
ADDRESSES = [f"{scheme}{ADDRESS}" for scheme in ("http://", "", "tcp://", "udp://", "nats://")] + ["a:hunter2@b"]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_lose_their_secrets(output: str, address: str, tmp_path: Path) -> None:
    lines = [f"{key} = {toml([address])}" for key in ("urls", "servers", "brokers")]
    lines += [f"{key} = {toml(address)}" for key in ("url", "address", "listen", "service_address")]
    result = Result(tmp_path, "\n".join([f"[[outputs.{output}]]", *lines]))
    assert "hunter2" not in result.text
    assert not any("hunter2" in line for line in result.imported.left_out)


def toml(value: object) -> str:
    """A value as TOML has it."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {toml(item)}' for key, item in value.items())}}}"
    return msgspec.json.encode(value).decode()
