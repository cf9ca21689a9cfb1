"""The unit: what systemd says of it, and that the agent collects everything under what it restricts.

The restrictions are read from the unit, and put on with what systemd itself uses: libseccomp, prctl, mounts. tests/deb
has the same under a systemd that runs.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).parent.parent
SYSTEMD = REPOSITORY / "packaging/systemd"
UNIT = SYSTEMD / "hostprobe.service"
EXPOSURE_MAX = 13  # tenths
EVERY_TABLE = """
    host_table cpu cpu_core memory swap paging load disk_io io filesystem network pressure
    tcp udp unix listening agent agent_probe agent_sink
"""
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16}
NOBODY = 65534
PACKAGES = str(Path(np.__file__).parents[1])

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
needs_seccomp = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None or ctypes.util.find_library("seccomp") is None,
    reason="needs systemd-analyze and libseccomp",
)
needs_root = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0,
    reason="another user and mounts of one's own need root on Linux",
)


def settings(path: Path) -> dict[str, list[str]]:
    """The values of each key of a unit."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


DROP_INS = sorted(SYSTEMD.glob("drop-ins/*.conf"))


@pytest.fixture(params=[None, *DROP_INS], ids=lambda path: path.stem if path else "alone")
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The unit with a program that is there, and a drop-in or none."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/bin/hostprobe", sys.executable))
    if request.param is not None:
        (tmp_path / "hostprobe.service.d").mkdir()
        shutil.copy(request.param, tmp_path / "hostprobe.service.d")
    return unit


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_unit(installed: Path) -> None:
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", installed], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


@needs_systemd
def test_exposure_is_low() -> None:
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", UNIT]
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Overall exposure level for hostprobe.service" in judged.stdout
    assert judged.returncode == 0, judged.stdout


def test_a_wrong_configuration_is_no_loop_and_the_watchdog_is_wound() -> None:
    unit = settings(UNIT)
    assert unit["Type"] == ["notify"]
    assert unit["NotifyAccess"] == ["main"]
    assert unit["RestartPreventExitStatus"] == ["2"]
    assert int(unit["WatchdogSec"][0].removesuffix("s")) > 0
    tries = int(unit["StartLimitBurst"][0])
    assert tries * int(unit["RestartSec"][0].removesuffix("s")) < 60 * int(
        unit["StartLimitIntervalSec"][0].removesuffix("min")
    ), "the limit is never reached"


def test_user_is_made_by_sysusers_and_owns_the_state() -> None:
    (line,) = (line for line in (SYSTEMD / "hostprobe.sysusers").read_text().splitlines() if not line.startswith("#"))
    unit = settings(UNIT)
    assert line.split()[:3] == ["u", *unit["User"], "-"]
    assert line.split()[-1] == f"/var/lib/{unit['StateDirectory'][0]}"


def names_of(group: str) -> set[str]:
    """The system calls of a group as systemd-analyze lists them, those of groups in it too."""
    if not group.startswith("@"):
        return {group}
    listed = subprocess.run(["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True)
    lines = [line.strip() for line in listed.stdout.splitlines()[1:]]
    return {name for line in lines if line and not line.startswith("#") for name in names_of(line)}


@pytest.fixture(scope="module")
def allowed() -> list[str]:
    """The system calls that the unit leaves."""
    found: set[str] = set()
    for line in settings(UNIT)["SystemCallFilter"]:
        names = {name for group in line.removeprefix("~").split() for name in names_of(group)}
        found = found - names if line.startswith("~") else found | names
    return sorted(found | names_of("@default"))  # systemd always leaves these


# Runs before the agent, in its process. Two filters, as systemd has them: what is allowed, and of that what isn't.
RESTRICTED = """
import ctypes, errno, os, sys

ALLOW, ERRNO = 0x7FFF0000, 0x00050000
EQUAL, GREATER, MASKED = 4, 6, 7
PROT_WRITE, PROT_EXEC = 2, 4
NAMESPACES = 0x7E020080
allowed, families, arguments = eval(sys.argv[1]), eval(sys.argv[2]), sys.argv[3:]

class Comparison(ctypes.Structure):
    _fields_ = [("argument", ctypes.c_uint), ("how", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]

seccomp = ctypes.CDLL("libseccomp.so.2", use_errno=True)
seccomp.seccomp_init.restype = ctypes.c_void_p
libc = ctypes.CDLL(None, use_errno=True)

def rule(context, action, name, *comparisons):
    number = seccomp.seccomp_syscall_resolve_name(name.encode())
    if number < 0:  # not of this machine's kind, or unknown here
        return
    array = (Comparison * len(comparisons))(*comparisons)
    status = seccomp.seccomp_rule_add_array(ctypes.c_void_p(context), action, number, len(comparisons), array)
    assert status in (0, -errno.EACCES, -errno.EDOM), (name, status)

PR_SET_NO_NEW_PRIVS, PR_SET_MDWE = 38, 65
assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
libc.prctl(PR_SET_MDWE, 1, 0, 0, 0)  # where there is Linux 6.3

denied = seccomp.seccomp_init(ALLOW)
refuse, no_family = ERRNO | errno.EPERM, ERRNO | errno.EAFNOSUPPORT
rule(denied, refuse, "mmap", Comparison(2, MASKED, PROT_WRITE | PROT_EXEC, PROT_WRITE | PROT_EXEC))
for name in ("mprotect", "pkey_mprotect"):
    rule(denied, refuse, name, Comparison(2, MASKED, PROT_EXEC, PROT_EXEC))
for name in ("unshare", "setns"):
    rule(denied, refuse, name)
for bit in range(32):
    if NAMESPACES >> bit & 1:
        rule(denied, refuse, "clone", Comparison(0, MASKED, 1 << bit, 1 << bit))
for family in range(max(families) + 1):
    if family not in families:
        rule(denied, no_family, "socket", Comparison(0, EQUAL, family))
rule(denied, no_family, "socket", Comparison(0, GREATER, max(families)))

permitted = seccomp.seccomp_init(refuse)
for name in (*allowed, "seccomp"):
    rule(permitted, ALLOW, name)
for context in (denied, permitted):
    assert seccomp.seccomp_load(ctypes.c_void_p(context)) == 0
os.execv(sys.executable, [sys.executable, *arguments])
"""

PROBE = """
import ctypes, json, os, mmap, socket
libc = ctypes.CDLL(None, use_errno=True)
def refusal(attempt, *arguments):
    try:
        attempt(*arguments)
    except OSError as error:
        return error.errno
    return 0
print(json.dumps({
    "uid": os.getuid(), "status": dict(line.split(":\\t") for line in open("/proc/self/status") if ":\\t" in line),
    "executable": refusal(mmap.mmap, -1, 4096, mmap.MAP_PRIVATE, mmap.PROT_WRITE | mmap.PROT_EXEC),
    "packets": refusal(socket.socket, 17, socket.SOCK_RAW), "bluetooth": refusal(socket.socket, 31, socket.SOCK_RAW),
    "priority": refusal(os.nice, 1), "owner": refusal(os.chown, ".", -1, -1),
    "namespace": -libc.unshare(1 << 28) and ctypes.get_errno(), "root": os.statvfs("/").f_flag & os.ST_RDONLY,
}))
"""


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("HOSTPROBE")} | more


@pytest.fixture
def restricted(allowed: list[str]) -> Callable[..., str]:
    """`restricted(*arguments, before=…)`: what Python prints with these arguments, under the unit's filters."""
    families = [FAMILIES[name] for name in settings(UNIT)["RestrictAddressFamilies"][0].split()]

    def run(*arguments: object, python: str = sys.executable, before: Sequence[str] = ()) -> str:
        command = [*before, python, "-c", RESTRICTED, repr(allowed), repr(families), *map(str, arguments)]
        # For an interpreter that isn't the environment's own.
        path = os.pathsep.join((str(REPOSITORY), PACKAGES))
        ended = subprocess.run(
            command,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=environment(PYTHONPATH=path),
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run


@pytest.fixture
def mounted() -> Iterator[Path]:
    """A file system in the host's table of mounts: 64 MiB, as /home may be one, in a directory open to everybody."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        place = Path(directory) / "home"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
        yield place
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="module")
def python() -> str:
    """An interpreter that another user can run with the packages of this one."""
    release = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for path in (sys.executable, f"/usr/bin/{release}", f"/usr/local/bin/{release}"):
        command = [*confined(), "env", path, "-c", "import agent, numpy"]  # setpriv itself starts any program
        variables = environment(PYTHONPATH=PACKAGES)
        if (
            Path(path).exists()
            and not subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, check=False).returncode
        ):
            return path
    pytest.skip(f"another user can run no {release} here")


# Every mount read-only, then as another user without rights; $1 is what is hidden, or nothing.
CONFINE = f"""
mount --make-rprivate /
while read -r _ place _; do mount -o remount,bind,ro "$place" 2>/dev/null || true; done </proc/self/mounts
test -z "$1" || mount -t tmpfs -o ro tmpfs "$1"
shift
exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""


def confined(hidden: Path | str = "") -> list[str]:
    """The start of a command that runs confined, with a directory hidden."""
    return ["unshare", "--mount", "sh", "-euc", CONFINE, "sh", str(hidden)]


def every_table(line: str) -> dict[str, Any]:
    """The frame of a line, in which no table and no probe is missing."""
    frame: dict[str, Any] = json.loads(line)
    assert list(frame)[8:] == EVERY_TABLE.split()
    # The agent's own row is of the cycle before.
    assert {row["probe"] for row in frame["agent_probe"] if row["up"] != 1} <= {"agent"}
    return frame


def nulls(frame: dict[str, Any]) -> set[tuple[str, str]]:
    """The columns that are unknown in some row."""
    return {
        (table, column)
        for table, rows in frame.items()
        if isinstance(rows, dict | list)
        for row in (rows if isinstance(rows, list) else [rows])
        for column, value in row.items()
        if value is None
    }


# One sample: what is unknown of a rate depends on what happened between two.
ONCE = ("-m", "agent", "once", "--template", "standard", "--wait", "0")


@needs_seccomp
def test_the_filters_filter(restricted: Callable[..., str]) -> None:
    seen = json.loads(restricted("-c", PROBE))
    assert (seen["status"]["NoNewPrivs"], seen["status"]["Seccomp"]) == ("1\n", "2\n")
    assert {seen[name] for name in ("executable", "priority", "owner", "namespace")} == {1}
    assert (seen["packets"], seen["bluetooth"]) == (97, 97)


@needs_seccomp
def test_every_table_under_the_system_calls_that_are_left(restricted: Callable[..., str]) -> None:
    free = subprocess.run([sys.executable, *ONCE], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    frame = every_table(restricted(*ONCE))
    assert nulls(frame) <= nulls(every_table(free.stdout))


@needs_seccomp
def test_clients_of_sinks_work_under_the_system_calls_that_are_left(restricted: Callable[..., str]) -> None:
    program = """
import cheroot.wsgi, cramjam, google.protobuf.descriptor_pb2, nats, ssl, urllib3
from confluent_kafka import Producer
producer = Producer({"bootstrap.servers": "127.0.0.1:9", "logger": __import__("logging").getLogger("none")})
producer.produce("topic", b"frame")
print(producer.flush(0.1), len(cramjam.gzip.compress(bytes(99))) < 99, ssl.create_default_context().check_hostname)
"""
    assert restricted("-c", program).split() == ["1", "True", "True"]


@needs_seccomp
@needs_root
def test_every_table_as_another_user_without_rights_and_read_only(restricted: Callable[..., str], python: str) -> None:
    seen = json.loads(restricted("-c", PROBE, before=confined(), python=python))
    assert (seen["uid"], seen["root"]) == (NOBODY, os.ST_RDONLY)
    assert {value.strip("0\n") for name, value in seen["status"].items() if name.startswith("Cap")} == {""}
    frame = every_table(restricted(*ONCE, before=confined(), python=python))
    free = subprocess.run([sys.executable, *ONCE], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert nulls(frame) <= nulls(every_table(free.stdout))


@needs_seccomp
@needs_root
@pytest.mark.parametrize("is_hidden", [False, True], ids=["read-only", "hidden"])
def test_a_file_system_is_measured_where_it_is_read_only_and_unknown_where_hidden(
    restricted: Callable[..., str], mounted: Path, python: str, is_hidden: bool
) -> None:
    configuration = mounted.parent / "hostprobe.toml"
    configuration.write_text(f'[probes.filesystem]\nexclude_types = []\ninclude = ["{mounted}"]\n')
    once = ("-m", "agent", "once", "--config", configuration, "--wait", "0")
    output = restricted(*once, before=confined(mounted if is_hidden else ""), python=python)
    (row,) = json.loads(output)["filesystem"]
    assert row["size_bytes"] == (None if is_hidden else 64 * 2**20)
    assert row["read_only"] == 0
