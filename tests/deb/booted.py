"""A clean Debian in a directory, and its systemd where it is booted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
CLEAN = REPOSITORY / "build/deb/root"
PATIENCE_SECONDS = 60
# What any package leaves behind, or any boot: logs, dpkg's own books, caches, what other services wrote.
_NOT_COMPARED = (
    "proc",
    "sys",
    "dev",
    "run",
    "tmp",
    "root",
    "var/log/journal",
    "var/cache",
    "var/lib/systemd",
    "var/lib/dpkg",
)
_BOOKS = {"var/log/dpkg.log", "var/log/alternatives.log", "etc/machine-id", "etc/.pwd.lock"}
_SYSUSERS_BACKUPS = {f"etc/{name}-" for name in ("passwd", "group", "shadow", "gshadow")}


class Debian:
    """A copy of the clean root.

    Attributes:
        root: where it is.
        inside: what brings a command into it.
    """

    def __init__(self, root: Path) -> None:
        subprocess.run(["cp", "-a", CLEAN, root], check=True)
        self.root = root
        self.inside = ["chroot", str(root)]

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command in there; its output is shown where it fails.

        Raises:
            AssertionError: it failed, and `check` was not put off.
        """
        ended = subprocess.run(
            [*self.inside, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * PATIENCE_SECONDS,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )
        if check:
            assert ended.returncode == 0, f"{command}: {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended

    def out(self, *command: str) -> str:
        """What a command prints, without the last line's end."""
        return self.run(*command).stdout.rstrip("\n")

    def install(self, package: Path) -> None:
        shutil.copy(package, self.root / "root/package.deb")
        self.run("dpkg", "-i", "/root/package.deb")

    def write(self, name: str, text: str, mode: int = 0o644) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def files(self) -> set[str]:
        """All that is in there, but for what isn't any package's."""
        found = set()
        for directory, directories, files in os.walk(self.root):
            place = Path(directory).relative_to(self.root)
            directories[:] = [name for name in directories if str(place / name) not in _NOT_COMPARED]
            found |= {str(place / name) for name in (*directories, *files)}
        return found - _BOOKS - _SYSUSERS_BACKUPS

    def users(self) -> list[str]:
        """The lines that make the users and groups."""
        names = ("passwd", "group", "shadow", "gshadow")
        return [line for name in names for line in (self.root / "etc" / name).read_text().splitlines()]


class BootedDebian(Debian):
    """The same with its systemd running, cut off from any network."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        # Where cgroups of both versions are mounted, the second has a place of its own.
        unified = Path("/sys/fs/cgroup/unified")
        self._cgroup = (unified if unified.is_dir() else Path("/sys/fs/cgroup")) / f"hostprobe-test-{os.getpid()}"
        self._log = (root.parent / "boot.log").open("wb")
        boot = [str(Path(__file__).with_name("boot")), str(root), str(self._cgroup)]
        self._process = subprocess.Popen(boot, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log)
        try:
            self.inside = ["nsenter", "--all", f"--target={until(self._systemd)}"]
            until(self._has_booted)
        except BaseException:
            self.close()
            raise

    def _systemd(self) -> str:
        """The process that became systemd; before it there are others, of the script."""
        assert self._process.poll() is None, Path(self._log.name).read_text()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return next((child for child in children if _name(child) == "systemd"), "")

    def _has_booted(self) -> bool:
        return self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded")

    def service(self, name: str) -> str:
        """A property of hostprobe's unit."""
        return self.out("systemctl", "show", "hostprobe", "-P", name)

    def log(self) -> str:
        return self.out("journalctl", "--no-pager", "--output=cat", "--unit=hostprobe")

    def frames(self) -> list[dict[str, Any]]:
        """What the file sink of the package's configuration has written."""
        path = self.root / "var/log/hostprobe/frames.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def close(self) -> None:
        """Ends all that runs in there."""
        self._process.kill()
        self._process.wait()
        self._log.close()
        places = sorted((place for place in self._cgroup.rglob("*") if place.is_dir()), reverse=True)
        for place in (*places, self._cgroup):
            until(lambda place=place: _is_removed(place))


def until(condition: Callable[[], Any]) -> Any:
    """What a condition gives once it gives something.

    Raises:
        AssertionError: it never did.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "never"
        time.sleep(0.05)
    return found


def _name(process: str) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:  # it has ended
        return ""


def _is_removed(cgroup: Path) -> bool:
    try:
        cgroup.rmdir()
    except OSError:  # a process in it is just about to end
        return False
    return True
