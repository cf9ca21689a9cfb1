"""The control socket: a running agent says how it does to whoever may connect, one JSON document a connection."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from agent.errors import HostprobeError, UsageError

_MODE = 0o660
_PATIENCE_SECONDS = 5.0
_PAUSE_SECONDS = 1.0
_BACKLOG = 64
_PATH_BYTES_MAX = 107  # sockaddr_un.sun_path less the final NUL
_ANSWER_BYTES_MAX = 16 << 20


class SinkState(msgspec.Struct, frozen=True):
    """One sink: its circuit, and frames since the agent's start; `latency_seconds` is the median, None before any."""

    name: str
    type: str
    circuit: str
    sent_frames: int
    dropped_frames: int
    backlog_frames: int
    backlog_bytes: int
    failures: int
    latency_seconds: float | None


class ProbeState(msgspec.Struct, frozen=True):
    """One probe: whether its last collection succeeded (None before the first), and what it took."""

    name: str
    up: bool | None
    failures: int
    seconds: float | None


class LogLine(msgspec.Struct, frozen=True):
    """One of the last warnings and errors."""

    time_unix_ns: int
    level: str
    event: str
    fields: dict[str, str]


class State(msgspec.Struct, frozen=True):
    """How an agent does.

    Attributes:
        config: the file that its configuration comes from, or the template.
        uptime_seconds, cpu_seconds: since its start.
        interval_seconds: between two frames, as it is now.
        problems: what only a restart may mend; none while it is healthy.
        reload_error: why the last reload changed nothing; empty where it did.
    """

    version: str
    pid: int
    host: str
    instance: str
    config: str
    uptime_seconds: float
    cpu_seconds: float
    resident_bytes: float | None
    interval_seconds: float
    frames: int
    missed_cycles: int
    problems: list[str]
    reloads: int
    reload_failures: int
    reload_error: str
    sinks: list[SinkState]
    probes: list[ProbeState]
    latest: list[LogLine]


class ControlSocket:
    """Answers on a Unix socket that root and the agent's group may connect to.

    Args:
        path: where it is; one that a dead process left is replaced.
        state: how the agent does; called on the socket's own thread.

    Raises:
        UsageError: it can't be had, or another agent answers there.
    """

    def __init__(self, path: str, state: Callable[[], State]) -> None:
        self._path = path
        self._state = state
        self._socket = self._listen()
        self._identity = self._found()
        self._closed = False
        threading.Thread(target=self._run, name="control", daemon=True).start()

    def close(self) -> None:
        """Takes the socket away, unless another process has put its own there meanwhile."""
        self._closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._found() == self._identity:
            with suppress(OSError):
                os.unlink(self._path)

    def _listen(self) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if _is_dead(self._path):
                os.unlink(self._path)
            listening.bind(self._path)
            os.chmod(self._path, _MODE)
            listening.listen(_BACKLOG)
        except OSError as error:
            listening.close()
            raise UsageError(f"{self._path}: {error.strerror or error}", "a control socket of its own") from None
        return listening

    def _found(self) -> tuple[int, int] | None:
        try:
            status = os.lstat(self._path)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_PAUSE_SECONDS)  # out of descriptors
                continue
            # Whoever hangs up, or a defect: the next one is answered all the same.
            with connection, suppress(Exception):
                connection.settimeout(_PATIENCE_SECONDS)
                connection.sendall(msgspec.json.encode(self._state()))


def check_place(path: str) -> None:
    """Finds out whether a control socket could be at a path, "" for none, without touching it.

    Raises:
        UsageError: it couldn't.
    """
    expected = "a place for a control socket"
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise UsageError(f"{path}: longer than {_PATH_BYTES_MAX} bytes", expected)
    if path and not os.path.isdir(os.path.dirname(path) or "."):
        raise UsageError(f"{path}: its directory is absent", expected)
    if path and os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
        raise UsageError(f"{path}: something else is there", expected)


def _is_dead(path: str) -> bool:
    """Whether it is a socket that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_PATIENCE_SECONDS)
        try:
            asking.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def ask(path: str) -> State:
    """How the agent behind a control socket does.

    Raises:
        HostprobeError: nobody answers, or it may not be asked.
    """
    answer = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_PATIENCE_SECONDS)
        try:
            asking.connect(path)
            while (part := asking.recv(1 << 16)) and len(answer) < _ANSWER_BYTES_MAX:
                answer += part
        except (FileNotFoundError, ConnectionRefusedError):
            raise HostprobeError(f"{path}: no agent runs with this control socket") from None
        except OSError as error:
            raise HostprobeError(f"{path}: {error.strerror or error}") from None
    try:
        return msgspec.json.decode(bytes(answer), type=State)
    except msgspec.MsgspecError as error:
        raise HostprobeError(f"{path}: what answers is no agent of this version: {error}") from None
