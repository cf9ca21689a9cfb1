"""The Debian package: what lintian says of it, and its life on a clean Debian, in a chroot and under its own systemd.

The tests of the booted host are one story, in the order of the file: installed, upgraded, removed, purged.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deb.booted import REPOSITORY, BootedDebian, Debian, until

EVERY_TABLE = """
    host_table cpu cpu_core memory swap paging load disk_io io filesystem network pressure
    tcp udp unix listening agent agent_probe agent_sink
"""
MOUNTED = {"/home": 64, "/home/alice/disk": 32, "/srv": 16}
"""File systems in the booted host, with their sizes in MiB."""
INTERPRETER = f"python{sys.version_info[0]}.{sys.version_info[1]}"
RING = "/var/lib/hostprobe/central.ring"
CONFIGURATION = "etc/hostprobe/hostprobe.toml"


def built(directory: Path, **environment: str) -> Path:
    build = subprocess.run(
        [REPOSITORY / "packaging/deb/build", directory],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert build.returncode == 0, build.stderr
    return Path(build.stdout.strip())


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("newer"), DEB_VERSION="99.0-1")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedDebian]:
    place = tmp_path_factory.mktemp("booted")
    booted = BootedDebian(place / "root")
    try:
        booted.files_before, booted.users_before = booted.files(), booted.users()  # type: ignore[attr-defined]
        yield booted
    finally:
        booted.close()
        shutil.rmtree(place)


def test_lintian_finds_nothing(package: Path) -> None:
    options = ["--allow-root", "--fail-on=error,warning", "--tag-display-limit=0"]
    found = subprocess.run(["lintian", *options, package], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout + found.stderr


def test_in_a_chroot_it_installs_runs_and_leaves_nothing(package: Path, tmp_path: Path) -> None:
    debian = Debian(tmp_path / "root")
    try:
        before, users = debian.files(), debian.users()
        debian.install(package)
        assert re.search(
            r"^hostprobe:x:\d+:\d+:.*:/var/lib/hostprobe:\S*nologin$", "\n".join(debian.users()), re.MULTILINE
        )
        subprocess.run(["mount", "-t", "proc", "proc", debian.root / "proc"], check=True)
        try:
            frame = json.loads(debian.out("hostprobe", "once", "--template", "minimal", "--wait", "10ms"))
        finally:
            subprocess.run(["umount", debian.root / "proc"], check=True)
        assert frame["sequence"] == 2
        shared = [
            str(Path("/") / path.relative_to(debian.root)) for path in debian.root.glob("usr/lib/hostprobe/**/*.so*")
        ]
        assert len(shared) > 20
        assert "not found" not in debian.out("ldd", *shared)
        debian.run("dpkg", "--purge", "hostprobe")
        assert debian.files() == before
        assert debian.users() == users
    finally:
        shutil.rmtree(debian.root)


# The booted host.


def test_it_installs_without_a_network_and_runs(host: BootedDebian, package: Path) -> None:
    host.install(package)
    assert host.service("ActiveState") == "active"
    assert host.service("UnitFileState") == "enabled"
    status = host.out("cat", f"/proc/{host.service('MainPID')}/status")
    fields = dict(re.findall(r"^(\w+):\t(.*)$", status, re.MULTILINE))
    assert {fields[name].strip("0") for name in fields if name.startswith("Cap")} == {""}
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    assert "0" not in fields["Uid"].split()
    assert oct(os.stat(host.root / "var/lib/hostprobe").st_mode) == "0o40750"
    once = host.out("setpriv", "--reuid=nobody", "--clear-groups", "hostprobe", "once", "--wait", "10ms")
    assert json.loads(once).keys() >= set(EVERY_TABLE.split())


def test_the_service_collects_every_table_and_the_host_s_file_systems(host: BootedDebian) -> None:
    for path, size in MOUNTED.items():  # after the start of the service, whose namespace they get into
        host.run("mkdir", "-p", path)
        host.run("mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", path)
    text = (host.root / CONFIGURATION).read_text()
    text = text.replace('interval = "10s"', 'interval = "200ms"', 1)
    text = text.replace("[probes.filesystem]\n", '[probes.filesystem]\nexclude_types = ["proc"]\n')
    host.write(CONFIGURATION, text)
    host.run("systemctl", "restart", "hostprobe")
    instances = {frame["instance"] for frame in host.frames()}
    frame = until(lambda: [one for one in host.frames() if one["instance"] not in instances and one["sequence"] > 2])[0]
    by_root = json.loads(host.out("hostprobe", "once"))
    assert frame.keys() == by_root.keys() >= set(EVERY_TABLE.split())
    assert all(row["up"] == 1 for row in frame["agent_probe"] if row["probe"] != "agent")
    sizes = {row["mountpoint"]: row["size_bytes"] for row in by_root["filesystem"]}
    rows = {row["mountpoint"]: row for row in frame["filesystem"]}
    assert rows.keys() == sizes.keys() > MOUNTED.keys()
    for path, size in {**MOUNTED, "/": sizes["/"] / 2**20}.items():
        assert (rows[path]["size_bytes"], rows[path]["read_only"]) == (size * 2**20, 0), path


def test_what_is_mounted_later_is_measured(host: BootedDebian) -> None:
    host.run("mkdir", "/srv/late")
    host.run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "/srv/late")
    row = until(lambda: [row for row in host.frames()[-1]["filesystem"] if row["mountpoint"] == "/srv/late"])[0]
    assert row["size_bytes"] == 8 * 2**20
    host.run("umount", "/srv/late")


def test_a_reload_takes_conf_d_and_loses_no_frame(host: BootedDebian) -> None:
    process, last = host.service("MainPID"), host.frames()[-1]
    host.write("etc/hostprobe/conf.d/10-tags.toml", '[agent.tags]\nenv = "test"\n')
    host.run("systemctl", "reload", "hostprobe")
    frame = until(lambda: [one for one in host.frames() if one["tags"] == {"env": "test"}])[0]
    assert (frame["instance"], host.service("MainPID")) == (last["instance"], process)
    sequences = [one["sequence"] for one in host.frames() if one["instance"] == last["instance"]]
    assert sequences == list(range(1, len(sequences) + 1))
    host.write("etc/hostprobe/conf.d/10-tags.toml", "[agent.tags\n")
    host.run("systemctl", "reload", "hostprobe", check=False)
    until(lambda: "reload failed: /etc/hostprobe/conf.d/10-tags.toml" in host.service("StatusText"))
    assert (host.service("ActiveState"), host.frames()[-1]["tags"]) == ("active", {"env": "test"})
    (host.root / "etc/hostprobe/conf.d/10-tags.toml").unlink()
    host.run("systemctl", "reload", "hostprobe")
    until(lambda: host.frames()[-1]["tags"] == {})


def test_root_and_the_group_can_ask_how_it_does_and_nobody_else(host: BootedDebian) -> None:
    assert ": healthy\n" in host.out("hostprobe", "service", "status")
    member = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--groups=hostprobe")
    assert ": healthy\n" in host.out(*member, "hostprobe", "service", "status")
    stranger = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
    refused = host.run(*stranger, "hostprobe", "service", "status", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "hostprobe: /run/hostprobe/control.sock: Permission denied\n"


def test_an_agent_that_hangs_is_started_anew_by_the_watchdog(host: BootedDebian) -> None:
    host.write("etc/systemd/system/hostprobe.service.d/10-watchdog.conf", "[Service]\nWatchdogSec=2\nRestartSec=0\n")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "restart", "hostprobe")
    process, restarts = host.service("MainPID"), int(host.service("NRestarts"))
    host.run("kill", "-STOP", process)
    until(lambda: int(host.service("NRestarts")) > restarts and host.service("ActiveState") == "active")
    assert host.service("MainPID") != process
    assert "Watchdog timeout" in host.log()
    (host.root / "etc/systemd/system/hostprobe.service.d/10-watchdog.conf").unlink()
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "restart", "hostprobe")


def test_secrets_come_as_credentials_and_a_ring_lies_in_the_state_directory(host: BootedDebian) -> None:
    host.write("etc/hostprobe/token", "xyzzy\n", 0o600)
    host.write(
        CONFIGURATION,
        (host.root / CONFIGURATION).read_text()
        + '\n[sinks.central]\ntype = "http"\nurl = "http://127.0.0.1:9/in"\nbearer.credential = "token"\n'
        + f'[sinks.central.buffer]\npath = "{RING}"\n',
    )
    host.write(
        "etc/systemd/system/hostprobe.service.d/token.conf",
        "[Service]\nLoadCredential=token:/etc/hostprobe/token\n",
    )
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "restart", "hostprobe")
    row = until(
        lambda: [row for row in host.frames()[-1]["agent_sink"] if row["sink"] == "central" and row["failures_total"]]
    )[0]
    assert row["backlog_frames"] > 0
    assert "xyzzy" not in host.log()


def test_sockets_have_owners_with_the_drop_in(host: BootedDebian) -> None:
    drop_in = "/etc/systemd/system/hostprobe.service.d/socket-owners.conf"
    host.run("cp", "/usr/share/doc/hostprobe/examples/drop-ins/socket-owners.conf", drop_in)
    text = (host.root / CONFIGURATION).read_text()
    host.write(CONFIGURATION, text.replace("[probes.sockets]\n", "[probes.sockets]\nprocesses = true\n"))
    host.run("systemctl", "daemon-reload")
    host.run("systemd-run", "--quiet", "--unit=listener", INTERPRETER, "-m", "http.server", "8123")
    try:
        host.run("systemctl", "restart", "hostprobe")
        row = until(
            lambda: [row for row in host.frames()[-1]["listening"] if row["port"] == "8123" and row.get("process")]
        )[0]
        assert row["process"] == INTERPRETER
    finally:
        host.run("systemctl", "stop", "listener")
        host.run("rm", drop_in)
        host.write(CONFIGURATION, text)
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "restart", "hostprobe")


def test_a_bad_configuration_is_one_line_and_no_loop(host: BootedDebian) -> None:
    text = (host.root / CONFIGURATION).read_text()
    host.write(CONFIGURATION, text + "\n[agnet]\n")
    host.run("systemctl", "restart", "hostprobe", check=False)
    until(lambda: host.service("ActiveState") == "failed")
    assert (host.service("ExecMainStatus"), host.service("NRestarts")) == ("2", "0")
    assert [line for line in host.log().splitlines() if "agnet" in line] == [
        next(line for line in host.log().splitlines() if line.startswith(f"hostprobe: /{CONFIGURATION}: agnet"))
    ]
    host.write(CONFIGURATION, text)
    host.run("systemctl", "restart", "hostprobe")


def test_an_upgrade_keeps_the_ring_and_the_configuration(host: BootedDebian, newer: Path) -> None:
    configuration = (host.root / CONFIGURATION).read_text()
    process = host.service("MainPID")
    kept = int(re.search(r"frames +(\d+)", host.out("hostprobe", "spool", RING))[1])  # type: ignore[index]
    assert kept > 0
    instances = {frame["instance"] for frame in host.frames()}
    host.install(newer)
    assert (
        host.out("dpkg-query", "--show", "--showformat=${Version} ${Status}", "hostprobe")
        == "99.0-1 install ok installed"
    )
    assert (host.root / CONFIGURATION).read_text() == configuration
    assert host.service("ActiveState") == "active"
    assert host.service("MainPID") != process
    row = until(
        lambda: [
            row
            for frame in host.frames()
            if frame["instance"] not in instances
            for row in frame["agent_sink"]
            if row["sink"] == "central"
        ]
    )[0]
    assert row["recovered_frames_total"] >= kept


def test_who_has_disabled_it_is_left_alone_by_an_upgrade(host: BootedDebian, newer: Path) -> None:
    host.run("systemctl", "disable", "--now", "hostprobe")
    host.install(newer)
    assert (host.service("ActiveState"), host.service("UnitFileState")) == ("inactive", "disabled")
    host.run("systemctl", "enable", "--now", "hostprobe")


def test_installed_again_after_a_removal_it_runs(host: BootedDebian, newer: Path) -> None:
    host.run("systemctl", "enable", "hostprobe")
    host.run("dpkg", "--remove", "hostprobe")
    host.install(newer)
    assert host.service("ActiveState") == "active"


def test_removed_it_stops_and_keeps_what_is_the_administrator_s(host: BootedDebian) -> None:
    host.run("dpkg", "--remove", "hostprobe")
    assert host.service("ActiveState") in ("inactive", "failed")
    assert host.service("LoadState") == "not-found"
    assert not (host.root / "usr/lib/hostprobe").exists()
    assert (host.root / RING.lstrip("/")).stat().st_size > 0
    assert (host.root / CONFIGURATION).exists()


def test_purged_it_leaves_nothing(host: BootedDebian) -> None:
    host.run("umount", "/home/alice/disk", "/home", "/srv")
    host.run("dpkg", "--purge", "hostprobe")
    assert host.files() == host.files_before  # type: ignore[attr-defined]
    assert host.users() == host.users_before  # type: ignore[attr-defined]
