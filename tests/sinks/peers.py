"""Real peers for tests of tcp, unix and udp: each connection is treated as told, and what came is kept.

Nothing waits for a time to pass: `wait` returns as soon as a condition holds, and fails after 20 s.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 20

Frame = dict[str, Any]


@dataclass
class Accepted:
    """A connection as its peer sees it.

    Attributes:
        ended: by the other side, or by an error of the connection.
        fault: why its handshake failed.
    """

    socket: socket.socket
    data: bytearray = field(default_factory=bytearray)
    ended: bool = False
    fault: str = ""
    may_leave: threading.Event = field(default_factory=threading.Event)

    @property
    def lines(self) -> list[bytes]:
        """Those that are whole."""
        return bytes(self.data).split(b"\n")[:-1]

    @property
    def torn(self) -> bytes:
        """What stands behind the last line feed."""
        return bytes(self.data).rpartition(b"\n")[2]


Behaviour = Callable[["StreamPeer", Accepted], None]


def read_all(peer: StreamPeer, accepted: Accepted) -> None:
    """Reads until the end."""
    read_until(peer, accepted, None)


def byte_by_byte(peer: StreamPeer, accepted: Accepted) -> None:
    while peer.read(accepted, 1):
        pass


def stall(peer: StreamPeer, accepted: Accepted) -> None:
    """Reads nothing until it is told to, and then all."""
    peer.go_on.wait()
    read_all(peer, accepted)


def read_until(peer: StreamPeer, accepted: Accepted, size_bytes: int | None) -> None:
    while size_bytes is None or len(accepted.data) < size_bytes:
        room = 65536 if size_bytes is None else size_bytes - len(accepted.data)
        if not peer.read(accepted, min(room, 65536)):
            return


def close_after(size_bytes: int) -> Behaviour:
    """Reads so much and closes: a FIN if nothing else has come, a reset if there is more."""
    return lambda peer, accepted: read_until(peer, accepted, size_bytes)


def reset_after(size_bytes: int) -> Behaviour:
    """Reads so much and resets the connection."""

    def behave(peer: StreamPeer, accepted: Accepted) -> None:
        read_until(peer, accepted, size_bytes)
        accepted.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return behave


def leave_when_told(reset: bool) -> Behaviour:
    """Reads a line of three bytes, and closes or resets the connection when told, by `may_leave`."""

    def behave(peer: StreamPeer, accepted: Accepted) -> None:
        read_until(peer, accepted, 4)
        accepted.may_leave.wait()
        if reset:
            reset_after(0)(peer, accepted)

    return behave


def steadily(size_bytes: int, pause_seconds: float) -> Behaviour:
    """Reads so much at a time, with a pause after each."""

    def behave(peer: StreamPeer, accepted: Accepted) -> None:
        while peer.read(accepted, size_bytes) and not peer.go_on.wait(pause_seconds):
            pass
        read_all(peer, accepted)

    return behave


def chatter(text: bytes) -> Behaviour:
    """Sends something that nobody asked for, then reads all."""

    def behave(peer: StreamPeer, accepted: Accepted) -> None:
        accepted.socket.sendall(text)
        peer.said.set()
        read_all(peer, accepted)

    return behave


class StreamPeer:
    """Accepts while its `with` lasts; connections are treated by `behaviours` in turn, then read whole.

    Args:
        at: "host" for TCP at a port of the kernel's, or a Path for a Unix socket.
        port: one that an earlier peer had, for TCP.
        buffer_bytes: of the receive buffer, so that little is acknowledged that isn't read.
    """

    def __init__(
        self,
        *behaviours: Behaviour,
        at: str | Path = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        buffer_bytes: int = 0,
    ) -> None:
        self.accepted: list[Accepted] = []
        self.go_on = threading.Event()
        self.said = threading.Event()
        self._behaviours = behaviours
        self._tls = tls
        self._defects: list[str] = []
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._listener = _listener(at, port)
        if buffer_bytes:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        self._listener.listen(16)
        self._end, self._end_signal = socket.socketpair()
        self._accepting = threading.Thread(target=self._accept)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def lines(self) -> list[bytes]:
        """The whole lines of all connections, in the order of these."""
        return [line for accepted in list(self.accepted) for line in accepted.lines]

    def __enter__(self) -> StreamPeer:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_signal.close()
        self._accepting.join()
        self._listener.close()
        self._end.close()
        self.go_on.set()
        for accepted in self.accepted:
            accepted.may_leave.set()
            with contextlib.suppress(OSError):
                socket.socket.shutdown(accepted.socket, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        assert self._defects == []

    def wait(self, condition: Callable[[], object]) -> None:
        """Until it holds; a connection that it asks for may not be accepted yet."""

        def holds() -> object:
            try:
                return condition()
            except IndexError:
                return False

        with self._changed:
            assert self._changed.wait_for(holds, PATIENCE_SECONDS), "the peer waited in vain"

    def wait_for_end(self, last: bytes) -> None:
        """Until all connections have ended, the newest one with this line."""
        self.wait(lambda: self.accepted[-1].data.endswith(last + b"\n") and all(one.ended for one in self.accepted))

    def read(self, accepted: Accepted, size_bytes: int) -> bool:
        """Reads once; whether there may be more."""
        try:
            data = accepted.socket.recv(size_bytes)
        except OSError:
            data = b""
        with self._changed:
            accepted.data += data
            accepted.ended = not data
            self._changed.notify_all()
        return bool(data)

    def _accept(self) -> None:
        while self._end not in select.select([self._listener, self._end], [], [])[0]:
            connection, _ = self._listener.accept()
            number = len(self.accepted)
            accepted = Accepted(connection)
            thread = threading.Thread(target=self._serve, args=(accepted, number))
            with self._changed:
                self.accepted.append(accepted)
                self._threads.append(thread)
                self._changed.notify_all()
            thread.start()

    def _serve(self, accepted: Accepted, number: int) -> None:
        try:
            if self._tls is None or self._shake_hands(accepted, self._tls):
                behaviour = self._behaviours[number] if number < len(self._behaviours) else read_all
                behaviour(self, accepted)
        except Exception as error:  # a thread's exception fails no test by itself
            self._defects.append(repr(error))
        finally:
            accepted.socket.close()
            with self._changed:
                accepted.ended = True
                self._changed.notify_all()

    def _shake_hands(self, accepted: Accepted, tls: ssl.SSLContext) -> bool:
        plain = accepted.socket
        encrypted = tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        accepted.socket = encrypted
        try:
            encrypted.do_handshake()
        except OSError as error:
            accepted.fault = str(getattr(error, "reason", None) or error)
            with contextlib.suppress(OSError):  # its alert must be read: bytes left unread would make a reset of it
                socket.socket.shutdown(encrypted, socket.SHUT_WR)
                while socket.socket.recv(encrypted, 4096):
                    pass
            return False
        return True


def _listener(at: str | Path, port: int) -> socket.socket:
    if isinstance(at, Path):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(at))
        return listener
    listener = socket.socket(socket.AF_INET6 if ":" in at else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((at, port))
    return listener


@contextlib.contextmanager
def refused_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[int]:
    """A port of 127.0.0.1 that refuses until a peer of ours is there, and that nobody else gets meanwhile."""
    with socket.socket(socket.AF_INET, kind) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_DGRAM:
            held.connect(("127.0.0.1", 9))  # whoever else sends is refused
        yield int(held.getsockname()[1])


@dataclass(frozen=True)
class Datagram:
    """One as it was received, its checksum checked."""

    sequence: int
    nanoseconds: int
    text: bytes
    size_bytes: int

    @classmethod
    def of(cls, data: bytes) -> Datagram:
        sequence, nanoseconds, checksum = struct.unpack("!QQI", data[:20])
        assert checksum == zlib.crc32(data[:16] + data[20:])
        return cls(sequence, nanoseconds, data[20:], len(data))


class UdpPeer:
    """A bound datagram socket; the kernel keeps what comes until `receive`."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        if port:  # it is that of a `refused_port`
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, port))
        self._socket.settimeout(PATIENCE_SECONDS)
        self.port = int(self._socket.getsockname()[1])

    def __enter__(self) -> UdpPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def receive(self) -> list[Datagram]:
        """All that has come; on loopback that is all that was sent."""
        return [Datagram.of(data) for data in self.receive_bytes()]

    def receive_bytes(self) -> list[bytes]:
        """The same of other formats than JSON, which have no header."""
        found = []
        while select.select([self._socket], [], [], 0)[0]:
            found.append(self._socket.recv(65536))
        return found


def assemble(parts: Iterable[bytes]) -> Frame:
    """One frame of the JSON of its datagrams, in any order, some of them maybe twice."""
    by_number = {part.get("part", 1): part for part in map(json.loads, parts)}
    count = by_number[1].get("parts", 1)
    assert sorted(by_number) == list(range(1, count + 1)), "a part is missing"
    frame: Frame = {}
    for number in range(1, count + 1):
        part = by_number[number]
        assert part.get("parts", 1) == count
        for name, value in part.items():
            if name in ("part", "parts"):
                continue
            if isinstance(value, list):
                frame[name] = frame.get(name, []) + value
            elif isinstance(value, dict):
                frame[name] = frame.get(name, {}) | value
            else:
                assert frame.setdefault(name, value) == value
    return frame
