"""The kernel's floor: what the probes read, read raw, by someone who looks at nothing of it.

Files are those that a probe keeps open; one that several probes share is the first one's, as in a cycle. Left out is
what a cycle does not read each time: a file that is opened and closed again (of interfaces beyond the first 128), and
file systems that may hang. psutil has no floor: what it reads is its own affair.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from agent.assembly import Agent
from agent.telemetry import AgentProbe

_BUFFER_BYTES = 1 << 20
_NETLINK_SOCK_DIAG = 4
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_DONE_BYTES = 20  # of an NLMSG_DONE: its header, and an error number
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ANSWER_SECONDS = 1


class Sources(NamedTuple):
    """What is read in a cycle.

    Attributes:
        files: paths below proc and sys.
        places: paths that stat and statvfs are asked of.
        dumps: netlink requests: the type, and what is behind the header.
    """

    files: tuple[str, ...] = ()
    places: tuple[bytes, ...] = ()
    dumps: tuple[tuple[int, bytes], ...] = ()


def together(sources: Iterable[Sources]) -> Sources:
    """All of them as one."""
    each = list(sources)
    return Sources(
        tuple(path for one in each for path in one.files),
        tuple(path for one in each for path in one.places),
        tuple(dump for one in each for dump in one.dumps),
    )


def first_cycle(agent: Agent) -> dict[str, Sources]:
    """Collects a first frame, and says what each probe reads, by its name; nothing may have been collected before."""
    agent.cycle.frame.begin(time.time_ns(), time.monotonic_ns())
    for file in agent.host.files:  # what was read to build the agent: the probes open it again
        file.close()
    known: set[str] = set()
    sources = {}
    for scheduled in agent.cycle.probes:
        probe = scheduled.probe
        try:
            probe.collect(agent.cycle.frame)
        except Exception:  # whatever the cycle would catch
            agent.cycle.frame.discard(probe.tables)
        files = [file.path for file in agent.host.files if file.is_open and file.path not in known]
        known.update(files)
        if isinstance(probe, AgentProbe) and not agent.host.uses_psutil:
            files.append("/proc/self/statm")
        sources[scheduled.meter.name] = Sources(
            tuple(files),
            tuple(getattr(probe, "asked_paths", ())),
            tuple(getattr(probe, "dumps", ())) if agent.host.is_local else (),
        )
    agent.cycle.frame.derive()
    return sources


class RawReader:
    """Reads sources into one buffer, on descriptors of its own.

    Attributes:
        sources: those that there are; what can't be read is left out.
    """

    def __init__(self, sources: Sources) -> None:
        self._buffer = bytearray(_BUFFER_BYTES)
        self._views = [self._buffer]
        self._fds: list[int] = []
        self._socket: socket.socket | None = None
        files = tuple(path for path in sources.files if self._open(path))
        places = tuple(path for path in sources.places if _answers(path))
        self._requests: list[bytes] = []
        dumps = tuple(dump for dump in sources.dumps if self._asks(*dump))
        self.sources = Sources(files, places, dumps)
        self._places = places

    def _open(self, path: str) -> bool:
        with suppress(OSError):
            self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            try:
                os.preadv(self._fds[-1], self._views, 0)
                return True
            except OSError:  # as the speed of an interface that is down
                os.close(self._fds.pop())
        return False

    def _asks(self, kind: int, payload: bytes) -> bool:
        """Whether the kernel answers a request with a dump."""
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
                # As the probe has it: settimeout would have Python poll before each recv.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _ANSWER_SECONDS, 0))
            request = _HEADER.pack(_HEADER.size + len(payload), kind, _NLM_F_REQUEST_DUMP, 1, 0) + payload
            answer = self._ask(self._socket, request)
        except OSError:
            return False
        if answer == _NLMSG_DONE:
            self._requests.append(request)
        return answer == _NLMSG_DONE

    def _ask(self, asked: socket.socket, request: bytes) -> int:
        """Receives all of an answer; returns whether it ended or failed."""
        buffer = self._buffer
        asked.send(request)
        while True:
            size = asked.recv_into(buffer)
            # The last message is alone, or behind others in the datagram. Types are below 256: their first byte tells.
            if buffer[4] in (_NLMSG_ERROR, _NLMSG_DONE):
                return buffer[4]
            if buffer[size - 16] == _NLMSG_DONE and buffer[size - 20] == _DONE_BYTES:
                return _NLMSG_DONE

    def read(self) -> None:
        """Reads everything once."""
        views = self._views
        for fd in self._fds:
            os.preadv(fd, views, 0)
        for place in self._places:
            os.stat(place)
            os.statvfs(place)
        for request in self._requests:
            assert self._socket is not None
            self._ask(self._socket, request)

    def close(self) -> None:
        """Closes the descriptors."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        if self._socket is not None:
            self._socket.close()


def _answers(path: bytes) -> bool:
    try:
        os.stat(path)
        os.statvfs(path)
    except OSError:
        return False
    return True
