"""`hostprobe service`: installing below another root, undoing it, and what status says."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent.config import load
from agent.control import SinkState
from agent.errors import HostprobeError, UsageError
from agent.service.installation import Installation
from agent.service.status import text
from tests.processes import ended, environment, hostprobe, started, until, usage_error
from tests.test_control import STATE

UNIT = "etc/systemd/system/hostprobe.service"
CONFIGURATION = "etc/hostprobe/hostprobe.toml"
needs_sysusers = pytest.mark.skipif(
    shutil.which("systemd-sysusers") is None or shutil.which("userdel") is None or os.geteuid() != 0,
    reason="needs root, systemd-sysusers and userdel",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host that doesn't run."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (tmp_path / "etc/group").write_text("root:x:0:\n")
    return tmp_path


Change = Callable[..., list[str]]


@pytest.fixture
def install(root: Path) -> Change:
    def change() -> list[str]:
        installation = Installation(str(root), "/opt/hostprobe/bin/hostprobe")
        installation.install()
        return installation.done

    return change


@pytest.fixture
def uninstall(root: Path) -> Change:
    def change(purge: bool = False) -> list[str]:
        installation = Installation(str(root))
        installation.uninstall(purge)
        return installation.done

    return change


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.is_symlink()}


@needs_sysusers
def test_install_once_and_undo_all(root: Path, install: Change, uninstall: Change) -> None:
    before = files(root)
    done = install()
    assert done == [
        "wrote /etc/hostprobe/hostprobe.toml",
        "wrote /etc/sysusers.d/hostprobe.conf",
        "made the user hostprobe",
        "wrote /etc/systemd/system/hostprobe.service",
        "enabled hostprobe.service",
        "systemd doesn't run here: the service starts with the host",
    ]
    unit = (root / UNIT).read_text()
    assert "\nExecStart=/opt/hostprobe/bin/hostprobe run\n" in unit
    assert "/usr/bin/hostprobe" not in unit
    assert "man:" not in unit
    assert os.readlink(root / "etc/systemd/system/multi-user.target.wants/hostprobe.service") == f"/{UNIT}"
    assert "\nhostprobe:" in (root / "etc/passwd").read_text()
    config = load(str(root / CONFIGURATION), environment={})
    assert (config.template, config.sinks["main"].type) == ("standard", "file")
    assert install() == []
    assert uninstall()[-2:] == ["removed the user hostprobe", "removed /etc/sysusers.d/hostprobe.conf"]
    shadows = {f"etc/{name}{end}" for name in ("passwd", "group", "shadow", "gshadow") for end in ("", "-")}
    assert files(root) - before <= {*shadows, "etc/.pwd.lock"}
    assert "hostprobe" not in (root / "etc/passwd").read_text()
    assert uninstall() == []


@needs_sysusers
def test_what_somebody_edited_stays_unless_purged(root: Path, install: Change, uninstall: Change) -> None:
    install()
    (root / CONFIGURATION).write_text('template = "minimal"\n')
    (root / "var/lib/hostprobe").mkdir(parents=True)
    (root / "var/lib/hostprobe/main.ring").write_text("frames")
    assert install() == []
    done = uninstall()
    assert done[-1] == "left /etc/hostprobe, /var/lib/hostprobe: --purge removes them"
    assert (root / CONFIGURATION).read_text() == 'template = "minimal"\n'
    assert "\nhostprobe:" in (root / "etc/passwd").read_text()  # whose the ring is
    assert uninstall(purge=True)[-2] == "removed the user hostprobe"
    assert not (root / "etc/hostprobe").exists()
    assert not (root / "var/lib/hostprobe").exists()


@needs_sysusers
def test_another_program_is_another_unit(root: Path, install: Change) -> None:
    install()
    installation = Installation(str(root), "/opt/other/bin/hostprobe")
    installation.install()
    assert installation.done[0] == "wrote /etc/systemd/system/hostprobe.service"
    assert "ExecStart=/opt/other/bin/hostprobe run" in (root / UNIT).read_text()


def test_the_unit_of_somebody_else_is_left_alone(root: Path, install: Change, uninstall: Change) -> None:
    (root / UNIT).parent.mkdir(parents=True)
    (root / UNIT).write_text("[Service]\n")
    for change in (install, uninstall):
        with pytest.raises(UsageError, match=r"hostprobe\.service: somebody else has written it"):
            change()
    packaged = root / "usr/lib/systemd/system"
    packaged.mkdir(parents=True)
    (packaged / "hostprobe.service").write_text("[Service]\n")
    for change in (install, lambda: uninstall(purge=True)):
        with pytest.raises(UsageError, match="it is a package's: expected a host without the package"):
            change()
    assert (root / UNIT).read_text() == "[Service]\n"
    assert not (root / "etc/hostprobe").exists()


@needs_sysusers
@pytest.mark.parametrize("own", ["user", "sysusers"])
def test_a_user_that_was_there_before_stays(root: Path, install: Change, uninstall: Change, own: str) -> None:
    sysusers = root / "etc/sysusers.d/hostprobe.conf"
    if own == "user":
        with (root / "etc/passwd").open("a") as file:
            file.write("hostprobe:x:1500:1500::/home/hostprobe:/bin/bash\n")
    else:
        sysusers.parent.mkdir()
        sysusers.write_text("u hostprobe 1500\n")
    install()
    uninstall(purge=True)
    assert "\nhostprobe:" in (root / "etc/passwd").read_text()
    assert sysusers.exists() == (own == "sysusers")


@pytest.mark.parametrize("place", ["etc/hostprobe", "etc/systemd"])
def test_a_place_that_can_not_be_written_is_one_line(root: Path, install: Change, place: str) -> None:
    (root / place).write_text("")
    with pytest.raises(HostprobeError, match=rf"/{place}[^ ]*: "):
        install()


@pytest.mark.parametrize("action", ["install", "uninstall"])
def test_whoever_is_not_root_is_refused(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with pytest.raises(UsageError, match="service: it writes to /etc and makes a user: expected to be run by root"):
        getattr(Installation(), action)()


# Status


def test_status_of_an_agent_that_runs(tmp_path: Path) -> None:
    told = environment(RUNTIME_DIRECTORY=str(tmp_path))
    agent = started("run", "--interval", "20ms", env=told, stdout=subprocess.DEVNULL)
    path = tmp_path / "control.sock"
    try:
        until(lambda: path.exists() and b" healthy" in _asked(path), agent)
        status, stdout, stderr = hostprobe("service", "status", "--socket", path)
        assert (status, stderr) == (0, "")
        assert f"pid {agent.pid}: healthy" in stdout
        assert "\nmain            stdout" in stdout
        status, stdout, _ = hostprobe("service", "status", "--socket", path, "--format", "json")
        assert msgspec.json.decode(stdout)["pid"] == agent.pid
    finally:
        agent.terminate()
        ended(agent)


def _asked(path: Path) -> bytes:
    return hostprobe("service", "status", "--socket", path)[1].encode()


def test_status_without_an_agent_is_one_line_and_status_1(tmp_path: Path) -> None:
    status, stdout, stderr = hostprobe("service", "status", "--socket", tmp_path / "none.sock")
    assert (status, stdout) == (1, "")
    assert stderr == f"hostprobe: {tmp_path}/none.sock: no agent runs with this control socket\n"


def test_what_status_says_to_the_letter() -> None:
    failing = SinkState("central", "http", "open", 1200, 3, 40, 320_000, 12, None)
    state = msgspec.structs.replace(
        STATE, sinks=[*STATE.sinks, failing], resident_bytes=33.6e6, latest=STATE.latest[:1], uptime_seconds=600.0
    )
    assert text(state).splitlines() == [
        "hostprobe 0.1.0 on web-1, pid 7: healthy",
        "configuration   /etc/hostprobe/hostprobe.toml, taken again 1 times, refused 0 times",
        "running for     10m: 2 frames, one every 10s, 0 missed; 0.08% of a CPU, 33.6 MB resident",
        "",
        "sink            type          circuit         sent  a second  dropped  backlog   latency",
        "main            stdout        closed             1      0.00        0        1   1.00 ms",
        "central         http          open            1200      2.00        3       40         -",
        "",
        "probes          2, 0 of them fail",
        "",
        "last warnings",
        "  1970-01-01 00:00:00Z warning: probe fails (probe load)",
    ]


def test_wrong_actions_are_wrong_usage() -> None:
    assert "invalid choice: 'restart'" in usage_error("service", "restart")
