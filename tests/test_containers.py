"""packaging/docker and packaging/kubernetes: what can be said of them without an engine and without a cluster.

The image's surroundings are imitated where root runs the tests: PID, network, IPC and UTS namespaces of its own, a root
file system that is read-only, the host's tree below /host, a user without a name and without capabilities.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import agent
from agent import config
from agent.sinks.prometheus import PrometheusSettings
from tests.test_packaging import EXTRAS, lock

REPOSITORY = Path(__file__).parent.parent
DOCKER = REPOSITORY / "packaging/docker"
KUBERNETES = REPOSITORY / "packaging/kubernetes"
CHART = KUBERNETES / "helm/hostprobe"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
DAEMON_SETS = [KUBERNETES / "agent/daemonset.yaml", CHART / "templates/daemonset.yaml"]
RINGS = KUBERNETES / "rings/daemonset.yaml"
USER = 65532
PORT = 9101
PATIENCE_SECONDS = 60


def instructions(name: str) -> list[str]:
    """The arguments of every such instruction of the Dockerfile, in order, continued lines joined."""
    lines = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")).replace("\\\n", "")
    return [" ".join(each.split()) for each in re.findall(rf"^{name} (.+)$", lines, re.MULTILINE)]


def copied() -> set[str]:
    """What the Dockerfile takes from the repository."""
    return {source for each in instructions("COPY") if "--from" not in each for source in each.split()[:-1]}


def block(text: str, start: str) -> str:
    """The lines that are indented further than the one that is `start`, which stands before them; dedented."""
    lines = text.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.strip() == start)
    depth = len(lines[begin]) - len(lines[begin].lstrip())
    rest = lines[begin + 1 :]
    ends = (i for i, line in enumerate(rest) if line.strip() and len(line) - len(line.lstrip()) <= depth)
    return textwrap.dedent("\n".join(rest[: next(ends, len(rest))])).rstrip() + "\n"


# The image -----------------------------------------------------------------------------------


def test_every_stage_has_the_python_of_the_locks() -> None:
    (version,) = set(re.findall(r"^# .* with Python (\S+)$", (DOCKER.parent / "requirements.lock").read_text(), re.M))
    bases = [each.split()[0] for each in instructions("FROM")]
    assert len(bases) == 2
    assert set(bases) == {f"python:{version}-slim-bookworm"}


def test_the_image_needs_no_shell_and_no_root() -> None:
    assert json.loads(*instructions("ENTRYPOINT")) == ["hostprobe"]
    assert json.loads(*instructions("CMD")) == ["run", "--root", "/host"]
    (check,) = instructions("HEALTHCHECK")
    assert json.loads(check.partition(" CMD ")[2])[-1] == "/opt/hostprobe/healthcheck.py"
    assert instructions("USER") == [f"{USER}:{USER}"]
    assert DOCKERFILE.index(f"\nUSER {USER}") > DOCKERFILE.rindex("\nRUN ")


def test_what_is_copied_is_there_and_alone_reaches_the_builder() -> None:
    assert all((REPOSITORY / source).exists() for source in copied())
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == copied()
    assert {"agent", "probes", "templates"} < copied()


def pins(*wanted: str) -> subprocess.CompletedProcess[str]:
    command = ["awk", "-v", f"wanted={' '.join(wanted)}", "-f", DOCKER / "pins.awk"]
    return subprocess.run(
        [*command, DOCKER.parent / "requirements-dev.lock"], capture_output=True, text=True, check=False
    )


def with_needs(*requirements: str) -> set[str]:
    """Those distributions and all that they need, by the metadata of what is installed here."""
    found: set[str] = set()
    waiting = [Requirement(each) for each in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (requirement.marker is None or requirement.marker.evaluate({"extra": ""})) and name not in found:
            found.add(name)
            waiting += map(Requirement, requires(name) or ())
    return found


def test_the_image_has_what_the_sinks_need_as_the_tests_ran_with_it(tmp_path: Path) -> None:
    (wanted,) = (each for each in instructions("ARG") if each.startswith("SINKS="))
    names = wanted.partition("=")[2].strip('"').split()
    assert set(names) == with_needs(*(each for extra, needs in EXTRAS.items() if extra != "bench" for each in needs))
    done = pins(*names, "setuptools")
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "sinks.lock").write_text(done.stdout)
    known = lock("requirements-dev.lock")
    assert lock(str(tmp_path / "sinks.lock")) == {name: known[name] for name in (*names, "setuptools")}


def test_a_distribution_that_is_not_pinned_ends_the_build() -> None:
    done = pins("urllib3", "urllib4")
    assert (done.returncode, done.stderr) == (1, "pins.awk: no pin of urllib4\n")


def test_versions_are_the_agent_s() -> None:
    told = [
        re.findall(r"^ARG VERSION=(.+)$", DOCKERFILE, re.M),
        re.findall(r"--tag hostprobe:(\S+)", DOCKERFILE),
        re.findall(r"image: hostprobe:(.+)$", (DOCKER / "compose.yaml").read_text(), re.M),
        re.findall(r"^(?:version|appVersion): (.+)$", (CHART / "Chart.yaml").read_text(), re.M),
        *(re.findall(r"newTag: (.+)$", path.read_text(), re.M) for path in KUBERNETES.glob("*/kustomization.yaml")),
    ]
    assert [set(each) for each in told] == [{agent.__version__}] * 6


# The configuration ---------------------------------------------------------------------------


def test_all_have_the_same_configuration() -> None:
    image = (DOCKER / "hostprobe.toml").read_text()
    assert (KUBERNETES / "agent/hostprobe.toml").read_text() == image
    assert (KUBERNETES / "rings/hostprobe.toml").read_text().startswith(image)
    chart = block((CHART / "values.yaml").read_text(), "configuration: |")
    assert tomllib.loads(chart) == tomllib.loads(image)
    loaded = config.load(str(DOCKER / "hostprobe.toml"), environment={})
    assert loaded.agent.root == "/host"
    (scrape,) = loaded.sinks.values()
    assert isinstance(scrape, PrometheusSettings)
    assert scrape.address == f"[::]:{PORT}"


def test_the_ring_is_in_the_directory_that_is_given_away() -> None:
    gateway = config.load(str(KUBERNETES / "rings/hostprobe.toml"), environment={}).sinks["gateway"]
    mounts = RINGS.read_text()
    assert os.path.dirname(gateway.buffer.path) == "/var/lib/hostprobe"
    assert mounts.count("mountPath: /var/lib/hostprobe\n") == 2
    assert "path: /var/lib/hostprobe\n            type: DirectoryOrCreate" in mounts


def test_everybody_means_the_same_port_and_user() -> None:
    plain, chart = (path.read_text() for path in DAEMON_SETS)
    rings = RINGS.read_text()
    assert instructions("EXPOSE") == [str(PORT)]
    assert f"else {PORT}\n" in (DOCKER / "healthcheck.py").read_text()
    assert f"containerPort: {PORT}\n" in plain
    assert f'prometheus.io/port: "{PORT}"' in plain
    assert f"\nport: {PORT}\n" in (CHART / "values.yaml").read_text()
    assert f"runAsUser: {USER}\n        runAsGroup: {USER}\n" in plain
    assert chart.count(f"{{{{ ternary 0 {USER} .Values.processes }}}}") == 2
    assert f'own.py, /var/lib/hostprobe, "{USER}"]' in rings


# Kubernetes ----------------------------------------------------------------------------------

GUARDS = """
    automountServiceAccountToken: false|enableServiceLinks: false|hostNetwork: false|hostPID: false|hostIPC: false
    type: RuntimeDefault|path: /healthz|path: /readyz|fieldPath: spec.nodeName|args: [run, --root, /host]
"""
GUARDS_OF_A_CONTAINER = ("allowPrivilegeEscalation: false", "readOnlyRootFilesystem: true", "drop: [ALL]")


@pytest.mark.parametrize("path", [*DAEMON_SETS, RINGS], ids=["plain", "chart", "rings"])
def test_a_daemon_set_gives_no_right_that_is_not_needed(path: Path) -> None:
    text = path.read_text()
    lines = [line.partition(" # ")[0].strip() for line in text.splitlines()]
    if path != RINGS:  # which is a patch of the first
        assert {guard.strip() for line in GUARDS.strip().splitlines() for guard in line.split("|")} <= set(lines)
    containers = sum(line.startswith("image: ") for line in lines)
    assert {guard: lines.count(guard) for guard in GUARDS_OF_A_CONTAINER} == dict.fromkeys(
        GUARDS_OF_A_CONTAINER, containers
    )
    assert set(re.findall(r"add: \[(.+)\]", text)) <= {"CHOWN", "DAC_READ_SEARCH, SYS_PTRACE"}
    assert not re.search("privileged: *true|Bidirectional|allowPrivilegeEscalation: true", text)


@pytest.mark.parametrize("path", DAEMON_SETS, ids=["plain", "chart"])
def test_the_node_s_tree_is_mounted_read_only(path: Path) -> None:
    text = path.read_text()
    found = {}
    for name in ("root", "proc", "sys"):
        mount = next(each for each in re.findall(rf"- name: {name}\n((?: +\w+: .+\n)+)", text) if "mountPath" in each)
        found[name] = {line.strip() for line in mount.splitlines()}
    rules = {"readOnly: true", "mountPropagation: HostToContainer"}
    assert found == {
        "root": {"mountPath: /host", *rules},
        "proc": {"mountPath: /host/proc", *rules},
        "sys": {"mountPath: /host/sys", *rules},
    }


def test_the_chart_s_values_are_those_that_its_templates_use_and_its_schema_knows() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    Draft7Validator.check_schema(schema)
    templates = "".join(path.read_text() for path in (CHART / "templates").iterdir())
    used = set(re.findall(r"\.Values\.(\w+)", templates))
    keys = set(re.findall(r"^(\w+):", (CHART / "values.yaml").read_text(), re.M))
    assert used == keys == set(schema["properties"]) - {"global"}
    for name in ("rings", "podMonitor"):
        inner = set(re.findall(r"^  (\w+):", block_of_values(name), re.M))
        assert set(re.findall(rf"\.Values\.{name}\.(\w+)", templates)) == inner
        assert inner == set(schema["properties"][name]["properties"])


def block_of_values(name: str) -> str:
    text = (CHART / "values.yaml").read_text()
    (found,) = re.findall(rf"^{name}:.*\n((?:  .+\n)+)", text, re.M)
    return str(found)


# The programs of the image -------------------------------------------------------------------


def program(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A program of the image, as it is started there."""
    command = [sys.executable, "-I", "-S", str(DOCKER / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_an_agent_that_runs_is_healthy_and_one_that_has_ended_is_not() -> None:
    port = free_port()
    settings = {
        "HOSTPROBE__SINKS__SCRAPE__TYPE": "prometheus",
        "HOSTPROBE__SINKS__SCRAPE__ADDRESS": f"127.0.0.1:{port}",
        "HOSTPROBE__SINKS__MAIN__ENABLED": "false",
    }
    own = {name: value for name, value in os.environ.items() if not name.startswith("HOSTPROBE")}
    command = [sys.executable, "-m", "agent", "run", "--template", "minimal", "--interval", "100ms"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=own | settings, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while (done := program("healthcheck.py", port)).returncode and time.monotonic() < deadline:
                time.sleep(0.05)
            assert (done.returncode, done.stdout) == (0, "ok\n")
        finally:
            process.terminate()
    done = program("healthcheck.py", port)
    assert (done.returncode, done.stdout) == (1, f"127.0.0.1:{port}: Connection refused\n")


class Unwell(BaseHTTPRequestHandler):
    """Says what /healthz of an agent with a dead sink says."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b"sink scrape: its thread has ended\n")

    def log_message(self, *arguments: object) -> None: ...


def test_an_agent_that_is_unwell_is_not_healthy() -> None:
    with HTTPServer(("127.0.0.1", 0), Unwell) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        done = program("healthcheck.py", server.server_port)
        thread.join()
    assert (done.returncode, done.stdout) == (1, "sink scrape: its thread has ended\n")


def test_a_directory_that_can_not_be_given_away_is_said(tmp_path: Path) -> None:
    done = program("own.py", tmp_path / "none", USER)
    expected = f"No such file or directory: expected a directory that can be given to user {USER}"
    assert (done.returncode, done.stderr) == (1, f"{tmp_path / 'none'}: {expected}\n")


# As in a container ---------------------------------------------------------------------------

BOX = """
    set -eu
    image=$1 program=$2 state=$3; shift 3
    mount -t tmpfs -o mode=755,size=64m none "$image"
    mkdir -p "$image/host" "$image/proc" "$image/sys" "$image/dev" "$image/var/lib/hostprobe"
    # --volume /:/host:ro,rslave, and proc and sys likewise: what is mounted below is read-only by itself alone
    for name in "" proc sys; do
        mount --rbind "/$name" "$image/host/$name"
        mount --make-rslave "$image/host/$name"
        mount -o remount,bind,ro "$image/host/$name"
    done
    # what an engine gives: proc and sys of its own namespaces, and a volume
    mount -t proc proc "$image/proc"
    mount -t sysfs -o ro sysfs "$image/sys"
    mount --bind /dev "$image/dev"
    mount --bind "$state" "$image/var/lib/hostprobe"
    # the image: its Python, its libraries, and the program
    for path in /usr /bin /lib /lib64 $PYTHONS; do
        if [ -L "$path" ]; then cp -P "$path" "$image$path"
        elif [ -d "$path" ]; then mkdir -p "$image$path"; mount --bind -o ro "$path" "$image$path"
        fi
    done
    cp -r "$program" "$image/program"
    chmod -R a+rX "$image/program"
    mount -o remount,ro "$image"
    exec chroot "$image" setpriv --no-new-privs --clear-groups --inh-caps=-all "$@"
"""
NOBODY = [f"--reuid={USER}", f"--regid={USER}"]
ROOT = ["--reuid=0", "--regid=0"]
Box = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """What is mounted at /var/lib/hostprobe, as the kubelet makes it."""
    path = tmp_path / "state"
    path.mkdir(mode=0o755)
    return path


@pytest.fixture
def box(tmp_path: Path, state: Path) -> Box:
    """`box(rights, command)` runs it as in a container: `rights` are a user, and names of capabilities."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("namespaces and mounts of a container's kind need root on Linux")
    if missing := [each for each in ("unshare", "setpriv", "chroot") if shutil.which(each) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--uts", "--ipc"]
    isolated += ["--propagation", "private"]
    refused = subprocess.run([*isolated, "true"], capture_output=True, text=True, check=False)
    if refused.returncode:
        pytest.skip(f"no namespaces can be made here: {refused.stderr.strip()}")
    program = tmp_path / "program"
    for name in ("agent", "probes", "templates", "packaging/docker", "packaging/kubernetes/rings"):
        shutil.copytree(REPOSITORY / name, program / name, ignore=shutil.ignore_patterns("__pycache__"))
    image = tmp_path / "image"
    image.mkdir()
    prefixes = sorted({sys.base_prefix, sys.prefix} - {"/usr"})

    def run(rights: Sequence[str], *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        user, granted = rights[:2], [f"+{each}" for each in rights[2:]]
        limited = [*user, f"--bounding-set={','.join(['-all', *granted])}"]
        surroundings = {"PATH": os.environ["PATH"], "PYTHONPATH": "/program", "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [*isolated, "sh", "-c", BOX, "sh", image, program, state, *limited, *command],
            env={**surroundings, "PYTHONS": " ".join(prefixes), **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )

    return run


def last_frame(box: Box, rights: Sequence[str], cycles: int, **environment: str) -> dict[str, Any]:
    """The last frame of an agent in the box."""
    run = ["run", "--root", "/host", "--interval", "50ms", "--cycles", str(cycles)]
    done = box(rights, sys.executable, "-m", "agent", *run, **environment)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["sequence"] == cycles
    assert isinstance(document, dict)
    return document


def known(document: dict[str, Any]) -> set[tuple[str, str]]:
    """The columns, by table, that have a value in at least one row."""
    found = set()
    for table, content in document.items():
        rows = [content] if isinstance(content, dict) else content if isinstance(content, list) else []
        found |= {(table, column) for row in rows for column, value in row.items() if value is not None}
    return found


@pytest.fixture
def listener() -> Iterator[int]:
    """The port of a TCP socket of this process that listens."""
    with socket.create_server(("127.0.0.1", 0)) as open_socket:
        yield open_socket.getsockname()[1]


def test_every_table_of_the_standard_template_is_filled(box: Box, listener: int) -> None:
    inside = last_frame(box, NOBODY, 1, HOSTPROBE__AGENT__HOSTNAME="node-7")
    command = [sys.executable, "-m", "agent", "run", "--interval", "50ms", "--cycles", "1"]
    native = json.loads(subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout)
    assert inside["host"] == "node-7"
    tables = {table for table, content in native.items() if isinstance(content, dict | list)}
    assert {"host_table", "disk_io", "filesystem", "network", "pressure", "tcp", "unix", "listening"} < tables
    assert known(native) - known(inside) <= {("listening", "accept_queue_limit")}  # which netlink alone has
    assert known(inside) <= known(native)
    root = next(row for row in inside["filesystem"] if row["mountpoint"] == "/")
    figures = os.statvfs("/")
    assert root["size_bytes"] == figures.f_blocks * figures.f_frsize
    assert root["read_only"] == float(bool(figures.f_flag & os.ST_RDONLY))
    interfaces = {row["interface"] for row in inside["network"]}
    assert interfaces == {row["interface"] for row in native["network"]}
    assert str(listener) in {row["port"] for row in inside["listening"]}


def test_nothing_can_be_written(box: Box) -> None:
    names = ["/here", "/host/here", "/host/etc/here", "/host/proc/sys/vm/swappiness", "/etc/hostprobe/here"]
    for rights in (NOBODY, ROOT):
        done = box(rights, "sh", "-c", 'for name; do if (: >>"$name") 2>&-; then echo "$name"; fi; done', "sh", *names)
        assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("rights", "seen"),
    [
        (NOBODY, set()),
        # Of a user that isn't root nothing is left of what `capabilities.add` gives.
        ([*NOBODY, "sys_ptrace", "dac_read_search"], set()),
        ([*ROOT, "dac_read_search"], set()),
        ([*ROOT, "sys_ptrace"], {"root's"}),
        ([*ROOT, "sys_ptrace", "dac_read_search"], {"root's", "another's"}),
    ],
    ids=["nobody", "nobody with both", "dac_read_search", "sys_ptrace", "both"],
)
def test_who_owns_a_socket_is_seen_with_two_capabilities(
    box: Box, listener: int, rights: list[str], seen: set[str]
) -> None:
    other = socket.create_server(("127.0.0.1", 0))
    port = other.getsockname()[1]
    holding = ["setpriv", "--reuid=33", "--regid=33", "--clear-groups", "cat"]
    with subprocess.Popen(holding, stdin=subprocess.PIPE, pass_fds=[other.fileno()]) as cat:
        other.close()
        pids = {"root's": (str(listener), os.getpid()), "another's": (str(port), cat.pid)}
        expected = {at: pid if name in seen else None for name, (at, pid) in pids.items()}
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:  # a cycle searches for no more than 5 ms
            frame = last_frame(box, rights, 10, HOSTPROBE__PROBES__SOCKETS__PROCESSES="true")
            found = {row["port"]: row["pid"] for row in frame["listening"] if row["port"] in expected}
            if found == expected or time.monotonic() > deadline:
                break
        cat.communicate()
    assert found == expected


def test_rings_are_given_away_and_used(box: Box, state: Path) -> None:
    chown = [*ROOT, "chown"]
    own = [sys.executable, "-I", "-S", "/program/packaging/docker/own.py", "/var/lib/hostprobe"]
    run = [sys.executable, "-m", "agent", "run", "--config", "/program/packaging/kubernetes/rings/hostprobe.toml"]
    run += ["--interval", "100ms", "--cycles", "2"]
    timeout = {"HOSTPROBE__AGENT__SHUTDOWN_TIMEOUT": "10ms"}
    refused = box(NOBODY, *run, **timeout)
    assert refused.returncode == 2
    assert "/var/lib/hostprobe/gateway.ring: Permission denied" in refused.stderr
    for _ in range(2):  # the second time nothing is left to do
        done = box(chown, *own, str(USER))
        assert (done.returncode, done.stderr) == (0, "")
        done = box(NOBODY, *run, **timeout)
        assert done.returncode == 0, done.stderr
    assert (state.stat().st_uid, state.stat().st_gid, state.stat().st_mode & 0o777) == (USER, USER, 0o750)
    ring = state / "gateway.ring"
    told = subprocess.run(
        [sys.executable, "-m", "agent", "spool", ring], cwd=REPOSITORY, capture_output=True, check=True
    )
    assert b"  frames    4," in told.stdout, told.stdout
    assert box(chown, *own, "0").returncode == 0
    assert (state.stat().st_uid, ring.stat().st_uid) == (0, 0)
