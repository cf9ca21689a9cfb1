"""Installs the agent as a systemd service, and takes it away again: the unit, its user, a first configuration.

Everything is done once: what is there already stays as it is, and what somebody has edited is not removed.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from agent.errors import HostprobeError, UsageError

USER = "hostprobe"
UNIT = "hostprobe.service"
_MARK = "# Written by `hostprobe service install`, and removed by `hostprobe service uninstall`.\n"
_PACKAGED_UNITS = ("/usr/lib/systemd/system", "/lib/systemd/system")
# What the unit hides or the user can't enter.
_HIDDEN = ("/root", "/run/user", "/tmp", "/var/tmp")
_MANUAL = "Documentation=man:hostprobe(1)\n"  # which only the package brings
_SYSUSERS = "/etc/sysusers.d/hostprobe.conf"
_WANTS = "/etc/systemd/system/multi-user.target.wants"
_DATA = ("/var/lib/hostprobe", "/var/log/hostprobe")
_CONFIGURATION = """\
# What hostprobe collects on this host and where it sends it. `hostprobe check` says whether it is good,
# `systemctl reload hostprobe` takes it over. Files in /etc/hostprobe/conf.d come over it, in the order of their names.
# `hostprobe sample-config standard` prints all settings and what they mean.

template = "standard"

# To a file that is rotated: on stdout it would be the journal's.
[sinks.main]
type = "file"
path = "/var/log/hostprobe/frames.jsonl"
max_size = "50MiB"
max_files = 5
"""


class Installation:
    """The service's files below a root directory.

    Args:
        root: "/"; another one is changed as if it were that of a host that doesn't run.
        program: the command that the unit starts; the one beside this Python unless given.

    Attributes:
        done: what was done, a line each.
    """

    def __init__(self, root: str = "/", program: str | None = None) -> None:
        self._root = root
        self._program = program
        self._runs_here = root == "/" and os.path.isdir("/run/systemd/system")
        self.done: list[str] = []

    def install(self) -> None:
        """Writes what is not there yet, and starts the service.

        Raises:
            UsageError: it can't be installed here, or by whoever asks.
            HostprobeError: a program that it takes has failed.
        """
        self._demand_root()
        self._demand_no_package()
        program = self._program or _own_program()
        unit = _MARK + _shipped(UNIT).replace("/usr/bin/hostprobe", program).replace(_MANUAL, "")
        place = f"/etc/systemd/system/{UNIT}"
        before = self._read(place)
        if before is not None and not before.startswith(_MARK):
            raise UsageError(f"{place}: somebody else has written it", "no such file, or that of an earlier install")
        if self._read("/etc/hostprobe/hostprobe.toml") is None:
            self._write("/etc/hostprobe/hostprobe.toml", _CONFIGURATION)
        self._make_folder("/etc/hostprobe/conf.d")
        self._add_user()
        is_new = self._write(place, unit)
        self._enable(place)
        if self._runs_here:
            if is_new:
                _run("systemctl", "daemon-reload")
            if is_new or not _is_active():
                _run("systemctl", "restart", UNIT)
                self.done.append(f"started {UNIT}")
        elif self.done:
            self.done.append("systemd doesn't run here: the service starts with the host")

    def uninstall(self, purge: bool = False) -> None:
        """Stops the service and removes what `install` has written.

        Args:
            purge: an edited configuration, rings and frames are removed too.

        Raises:
            UsageError: whoever asks is not root, or the unit is not of `install`.
            HostprobeError: a program that it takes has failed.
        """
        self._demand_root()
        self._demand_no_package()
        place = f"/etc/systemd/system/{UNIT}"
        unit = self._read(place)
        if unit is not None and not unit.startswith(_MARK):
            raise UsageError(f"{place}: somebody else has written it", "a service of `hostprobe service install`")
        if unit is not None and self._runs_here and _is_active():
            _run("systemctl", "stop", UNIT)
            self.done.append(f"stopped {UNIT}")
        if unit is not None:
            self._remove(f"{_WANTS}/{UNIT}", told=False)
        self._remove(place)
        if unit is not None and self._runs_here:
            _run("systemctl", "daemon-reload")
        if purge or self._read("/etc/hostprobe/hostprobe.toml") == _CONFIGURATION:
            self._remove("/etc/hostprobe/hostprobe.toml")
        for folder in ("/etc/hostprobe/conf.d", "/etc/hostprobe", *_DATA):
            self._remove_folder(folder, purge)
        left = [folder for folder in ("/etc/hostprobe", *_DATA) if os.path.exists(self._path(folder))]
        if left and self.done:
            self.done.append(f"left {', '.join(left)}: --purge removes them")
        if (self._read(_SYSUSERS) or "").startswith(_MARK) and not any(folder in left for folder in _DATA):
            self._remove_user()
            self._remove(_SYSUSERS)

    def _demand_root(self) -> None:
        if self._root == "/" and os.geteuid() != 0:
            raise UsageError("service: it writes to /etc and makes a user", "to be run by root")

    def _demand_no_package(self) -> None:
        for folder in _PACKAGED_UNITS:
            if os.path.exists(self._path(f"{folder}/{UNIT}")):
                raise UsageError(f"{folder}/{UNIT}: it is a package's", "a host without the package")

    def _enable(self, place: str) -> None:
        link = self._path(f"{_WANTS}/{UNIT}")
        if os.path.islink(link):
            return
        self._make_folder(_WANTS)
        try:
            os.symlink(place, link)
        except OSError as error:
            raise HostprobeError(f"{_WANTS}/{UNIT}: {error.strerror}") from None
        self.done.append(f"enabled {UNIT}")

    def _path(self, place: str) -> str:
        return os.path.join(self._root, place.lstrip("/"))

    def _read(self, place: str) -> str | None:
        try:
            with open(self._path(place), encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageError(f"{place}: {error.strerror}", "a file that can be read") from None

    def _write(self, place: str, text: str) -> bool:
        """Writes a file unless it says so already; whether it was written."""
        if self._read(place) == text:
            return False
        self._make_folder(os.path.dirname(place))
        path = self._path(place)
        try:
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(text)
            os.replace(f"{path}.new", path)
        except OSError as error:
            raise HostprobeError(f"{place}: {error.strerror}") from None
        self.done.append(f"wrote {place}")
        return True

    def _make_folder(self, place: str) -> None:
        try:
            os.makedirs(self._path(place), mode=0o755, exist_ok=True)
        except OSError as error:
            raise HostprobeError(f"{place}: {error.strerror}") from None

    def _remove(self, place: str, told: bool = True) -> None:
        try:
            os.unlink(self._path(place))
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostprobeError(f"{place}: {error.strerror}") from None
        if told:
            self.done.append(f"removed {place}")

    def _remove_folder(self, place: str, whole: bool) -> None:
        """Removes a directory that is empty, or whatever is in it."""
        path = self._path(place)
        try:
            if os.path.islink(path):  # where it leads to is somebody else's
                if not whole:
                    return
                os.unlink(path)
            elif whole and os.path.isdir(path) and os.listdir(path):
                shutil.rmtree(path)
            else:
                with suppress(OSError):  # not there, or not empty
                    os.rmdir(path)
                return
        except OSError as error:
            raise HostprobeError(f"{place}: {error.strerror}") from None
        self.done.append(f"removed {place}")

    def _add_user(self) -> None:
        """Makes the user, unless somebody has; only then there is a file of ours that says who it is."""
        if self._has_user():
            return
        if self._read(_SYSUSERS) is None:
            self._write(_SYSUSERS, _MARK + _shipped("hostprobe.sysusers"))
        _run("systemd-sysusers", *(() if self._root == "/" else (f"--root={self._root}",)), os.path.basename(_SYSUSERS))
        self.done.append(f"made the user {USER}")

    def _remove_user(self) -> None:
        if not self._has_user():
            return
        root = () if self._root == "/" else ("--prefix", self._root)
        _run("userdel", *root, USER)
        self.done.append(f"removed the user {USER}")

    def _has_user(self) -> bool:
        return any(line.startswith(f"{USER}:") for line in (self._read("/etc/passwd") or "").splitlines())


class _Program(NamedTuple):
    status: int
    output: str


def _run(*command: str) -> None:
    ended = _ended(command)
    if ended.status:
        raise HostprobeError(f"{' '.join(command)}: {ended.output or f'status {ended.status}'}")


def _is_active() -> bool:
    return _ended(("systemctl", "is-active", "--quiet", UNIT)).status == 0


def _ended(command: Sequence[str]) -> _Program:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return _Program(127, error.strerror or str(error))
    return _Program(done.returncode, " ".join((done.stderr or done.stdout).split()))


def _shipped(name: str) -> str:
    """A file of packaging/systemd, which the program brings along."""
    with open(os.path.join(os.path.dirname(__file__), "systemd", name), encoding="utf-8") as file:
        return file.read()


def _own_program() -> str:
    """The command beside this Python, where the service's user gets to."""
    program = os.path.join(os.path.dirname(sys.executable), "hostprobe")
    if not os.path.isfile(program):
        raise UsageError(f"{program}: there is no such command", "an installed hostprobe, by pip or pipx")
    for path in (program, os.path.realpath(program), os.path.realpath(sys.executable)):
        if path.startswith(tuple(f"{folder}/" for folder in _HIDDEN)) or not _is_open_to_all(path):
            raise UsageError(f"{path}: the user {USER} can't get there", "an environment such as /opt/hostprobe")
    return program


def _is_open_to_all(path: str) -> bool:
    while True:
        mode = os.stat(path).st_mode
        if not mode & (stat.S_IXOTH if stat.S_ISDIR(mode) else stat.S_IROTH):
            return False
        if path == "/":
            return True
        path = os.path.dirname(path)
