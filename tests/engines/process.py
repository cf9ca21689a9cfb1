"""A real engine as a process of its own on loopback: started, awaited, ended, and its log shown when that fails."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import pytest

REPOSITORY = Path(__file__).parents[2]
ENGINES = REPOSITORY / "build" / "engines"
LOCALHOST = "127.0.0.1"
PATIENCE_SECONDS = 60.0
LOG_LINES_SHOWN = 40
# Below Linux's ephemeral ports: while an engine is down, a client that is given such a port could connect to itself.
PORTS = range(20000, 32768)

_INSTALLS = "make test-engines installs it"
_OPENER = build_opener(ProxyHandler({}))


def program(name: str) -> str:
    """The path of an engine's program: from build/engines/bin, the PATH, or /usr/sbin. Without one the test fails."""
    places = (str(ENGINES / "bin"), os.environ.get("PATH", os.defpath), "/usr/sbin")
    path = shutil.which(name, path=os.pathsep.join(places))
    if path is None:
        pytest.fail(f"{name} is missing: {_INSTALLS}", pytrace=False)
    return path


def java_classes(name: str) -> str:
    """The class path of the jars in build/engines/NAME. Without them the test fails."""
    if not any((ENGINES / name).glob("*.jar")):
        pytest.fail(f"{name} is missing: {_INSTALLS}", pytrace=False)
    return f"{ENGINES / name}/*"


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that nobody listens on now."""
    with ExitStack() as held:
        ports: list[int] = []
        for port in random.sample(PORTS, len(PORTS)):
            if len(ports) == count:
                break
            listener = held.enter_context(socket.socket())
            try:
                listener.bind((LOCALHOST, port))
            except OSError:
                continue
            ports.append(port)
    assert len(ports) == count, "no free ports"
    return ports


def patiently(condition: Callable[[], Any], what: str, patience_seconds: float = PATIENCE_SECONDS) -> Any:
    """Waits until a condition holds, and gives its value; fails after a minute."""
    deadline = time.monotonic() + patience_seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"never true in {patience_seconds:g} s: {what}", pytrace=False)
        time.sleep(0.02)
    return value


def http(
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    parameters: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """Status and body of a GET, or of a POST where there is a body; no proxy is asked.

    Raises:
        OSError: if there is no answer.
    """
    request = Request(f"{url}?{urlencode(parameters)}" if parameters else url, body, dict(headers or {}))
    try:
        with _OPENER.open(request, timeout=10) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        with error:
            return error.code, error.read()


def answers(url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> bool:
    """Whether it answers with 200."""
    try:
        return http(url, body, headers)[0] == 200
    except OSError:
        return False


def prometheus_query(url: str, expression: str, at_unix_seconds: float | None = None) -> list[dict[str, Any]]:
    """The vector of an instant query of the HTTP API that Prometheus and VictoriaMetrics share.

    Each result has `metric`, the labels, and `value`, the time and the value as text.
    """
    parameters = {"query": expression}
    if at_unix_seconds is not None:
        parameters["time"] = f"{at_unix_seconds:.3f}"
    status, body = http(f"{url}/api/v1/query", parameters=parameters)
    assert status == 200, f"{expression}: {status} {body.decode(errors='replace')}"
    return list(json.loads(body)["data"]["result"])


class Engine:
    """Runs while its `with` lasts, and is ready when that begins.

    It can be stopped, killed and started again meanwhile, on the same ports and with the same data.

    Args:
        folder: for its data and its log; made where it is not there.

    Attributes:
        name: as errors call it; the log is folder/NAME.log.
        stop_seconds: how long it may take to end after SIGTERM, before it is killed.
    """

    name = "engine"
    stop_seconds = 20.0

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log = folder / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str]:
        """What is run: program and arguments."""
        raise NotImplementedError

    def is_ready(self) -> bool:
        """Whether it answers as one does that can be used; asked again and again at the start."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """What its process has for an environment."""
        return dict(os.environ)

    def start(self) -> None:
        """Starts it and waits until it is ready; if it won't be, the test fails and shows its log.

        To be called by the main thread: the engine ends with the thread that has started it, so that none is left
        behind by a test run that is killed.
        """
        assert self.process is None, f"{self.name} runs already"
        # Its group is its own: Ctrl-C is for the tests, which then end it in order.
        command = ["setpriv", "--pdeathsig", "KILL", *self.command()]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment(),
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        try:
            while not self.is_ready():
                if (status := self.process.poll()) is not None:
                    self._fail(f"has ended with status {status} before it was ready")
                if time.monotonic() > deadline:
                    self._fail(f"was not ready after {PATIENCE_SECONDS:g} s")
                time.sleep(0.02)
        except BaseException:  # Ctrl-C too: nobody else will end it
            self.kill()
            raise

    def stop(self) -> None:
        """Ends it by SIGTERM, or after `stop_seconds` by SIGKILL, and waits for that; nothing where it doesn't run."""
        if self.process is not None:
            self.send(signal.SIGTERM)
            self.send(signal.SIGCONT)  # one that a test has stopped would not hear of it
            try:
                self.process.wait(self.stop_seconds)
            except subprocess.TimeoutExpired:
                self.kill()
            self.process = None

    def kill(self) -> None:
        """Ends it at once, as a crash does; nothing where it doesn't run."""
        if self.process is not None:
            self.send(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def send(self, number: signal.Signals) -> None:
        """Sends a signal: SIGSTOP makes of it a peer that stalls, SIGCONT lets it go on."""
        assert self.process is not None, f"{self.name} doesn't run"
        self.process.send_signal(number)

    def log_text(self) -> str:
        """What it has written, of all its runs."""
        return self.log.read_text(errors="replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _fail(self, what: str) -> None:
        lines = self.log_text().splitlines()[-LOG_LINES_SHOWN:]
        pytest.fail("\n".join([f"{self.name} {what}; its log ends:", *lines]), pytrace=False)
