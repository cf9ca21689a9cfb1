"""Payloads, lines mostly, over one kept connection: TCP, with TLS if wanted, and Unix sockets.

Lines have no answer, so the kernel's word is the acknowledgement. On Linux a batch counts as delivered when none of
its bytes is left in the socket's send queue (SIOCOUTQ) and the connection has no error: for TCP the peer's kernel has
acknowledged all of it, for a Unix socket the peer has read all of it. That proves

- that it reached the peer's host (a dead network, a full receiver or a refused connection lose nothing), and
- for a Unix socket, that it reached the peer's process.

It doesn't prove that a process at the other end of TCP has read it: one that dies, or closes, with lines in its
receive buffer loses what its kernel had taken. Nor that TLS decrypted it there, nor what the process did with it.
A sink of type http has a proper answer. Elsewhere than on Linux a batch counts as delivered once it is written.

What isn't known to be delivered is sent again, whole lines on a new connection: at least once. After any failure the
connection is closed, so at most the last line of a connection is torn, and a receiver drops a line without line feed.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from typing import TYPE_CHECKING

from agent.errors import SinkError
from agent.sinks.address import connected, host_and_port, reason
from agent.sinks.link import SEES_QUEUE, Link, PlainLink, TlsLink, is_open, raise_error, unacknowledged_bytes
from agent.sinks.sink import SinkSettings
from agent.sinks.tls import TlsSettings
from agent.units import Duration

if TYPE_CHECKING:
    import ssl

_TIMEOUTS = (Duration(0.001), Duration(3600))
_PATH_BYTES_MAX = 107  # sun_path of unix(7) has 108, and the last one is a NUL
_VECTOR_PARTS_MAX = 512  # half of IOV_MAX
_PAUSES_SECONDS = (0.0001, 0.005)  # the first and the longest one between two looks at the send queue
_VERDICT_SECONDS_MAX = 1.0
_KEEPALIVE = (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))


class TcpSettings(SinkSettings, frozen=True, kw_only=True):
    """A receiver of lines over TCP.

    Attributes:
        timeout: for connecting to each of the host's addresses, and for a delivery that makes no progress.
        keepalive: notice a peer that has vanished while nothing is sent, after a minute.
    """

    type: str = "tcp"
    address: str
    timeout: Duration = Duration(4)
    keepalive: bool = True
    tls: TlsSettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        host_and_port(self.address)
        _check_timeout(self.timeout)


class UnixSettings(SinkSettings, frozen=True, kw_only=True):
    """A receiver of lines at a Unix stream socket; `timeout` is for a delivery that makes no progress."""

    type: str = "unix"
    path: str
    timeout: Duration = Duration(4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(os.fsencode(self.path)) <= _PATH_BYTES_MAX:
            raise ValueError(f"path: a path of 1 to {_PATH_BYTES_MAX} bytes")
        _check_timeout(self.timeout)


class _StalledError(Exception):
    def __init__(self, acknowledged_bytes: int) -> None:
        super().__init__(acknowledged_bytes)
        self.acknowledged_bytes = acknowledged_bytes


class _Transfer:
    """One batch on its way: written, then acknowledged.

    Raises:
        OSError: the connection has broken.
        _StalledError: it hasn't, and nothing was taken for a whole timeout.
    """

    def __init__(self, link: Link, parts: list[bytes | memoryview], timeout: Duration) -> None:
        self._link = link
        self._timeout = timeout
        self._parts = parts
        self._place = 0  # of the first part that isn't sent whole
        self._offset_bytes = 0  # of what isn't sent in it
        self._sent_bytes = 0
        self._queued_bytes = 0
        self._deadline_seconds = time.monotonic() + timeout

    def run(self) -> None:
        self._write()
        if SEES_QUEUE:
            self._await_acknowledgement()

    def _write(self) -> None:
        poll = select.poll()
        poll.register(self._link.socket, select.POLLOUT)
        while self._place < len(self._parts):
            rest = self._parts[self._place : self._place + _VECTOR_PARTS_MAX]
            with memoryview(rest[0])[self._offset_bytes :] as rest[0]:
                taken_bytes = self._link.send(rest)
            if taken_bytes:
                self._skip(taken_bytes)
                self._deadline_seconds = time.monotonic() + self._timeout
            else:
                # A large queue becomes writable late; that it shrinks is progress too.
                poll.poll(_PAUSES_SECONDS[1] * 1000)
                self._look()

    def _skip(self, size_bytes: int) -> None:
        self._sent_bytes += size_bytes
        self._offset_bytes += size_bytes
        while self._place < len(self._parts) and self._offset_bytes >= len(self._parts[self._place]):
            self._offset_bytes -= len(self._parts[self._place])
            self._place += 1

    def _await_acknowledgement(self) -> None:
        pause_seconds, longest_seconds = _PAUSES_SECONDS
        while self._look():
            time.sleep(pause_seconds)  # the kernel wakes nobody for an acknowledgement
            pause_seconds = min(2 * pause_seconds, longest_seconds)

    def _look(self) -> int:
        """How many bytes the peer hasn't acknowledged; raises where that has come to an end."""
        queued_bytes = unacknowledged_bytes(self._link.socket) if SEES_QUEUE else 0
        # In this order: a Unix socket's queue is emptied as well by a peer that closes, but the error comes first.
        raise_error(self._link.socket, queued_bytes)
        now_seconds = time.monotonic()
        if queued_bytes != self._queued_bytes:
            self._queued_bytes = queued_bytes
            self._deadline_seconds = now_seconds + self._timeout
        elif now_seconds > self._deadline_seconds:
            raise _StalledError(self._link.acknowledged_bytes(self._sent_bytes))
        return queued_bytes


class _StreamSink:
    """Lines over a connection that is made at the first delivery, and made anew at the next one if it broke."""

    def __init__(self, place: str, timeout: Duration, terminator: bytes) -> None:
        self._place = place
        self._timeout = timeout
        self._terminator = terminator
        self._link: Link | None = None

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        try:
            if self._link is not None and not is_open(self._link):
                self.close()
            if self._link is None:
                self._link = self._connect()
            _Transfer(self._link, self._parts(payloads), self._timeout).run()
        except _StalledError as stalled:
            # The peer's kernel has these, and closing leaves them there.
            self.close()
            error = f"{self._place}: the peer took nothing for {self._timeout}"
            raise SinkError(error, self._whole(payloads, stalled.acknowledged_bytes)) from None
        except OSError as error:
            # A peer that resets may not have read what its kernel had acknowledged: all is sent again.
            self.close()
            raise SinkError(f"{self._place}: {reason(error, self._timeout)}") from None

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def _parts(self, payloads: Sequence[memoryview]) -> list[bytes | memoryview]:
        if not self._terminator:
            return list(payloads)
        return [part for payload in payloads for part in (payload, self._terminator)]

    def _whole(self, payloads: Sequence[memoryview], size_bytes: int) -> int:
        """How many payloads of a batch are in its first bytes whole."""
        ends_bytes = accumulate(len(payload) + len(self._terminator) for payload in payloads)
        return sum(end_bytes <= size_bytes for end_bytes in ends_bytes)

    def _connect(self) -> Link:
        raise NotImplementedError


class TcpSink(_StreamSink):
    """Lines over TCP; see the module for what a delivery proves."""

    Settings = TcpSettings

    def __init__(self, settings: TcpSettings) -> None:
        super().__init__(f"tcp {settings.address}", settings.timeout, settings.terminator)
        self._settings = settings
        self._host, self._port = host_and_port(settings.address)
        self._context: ssl.SSLContext | None = None
        self.notices: list[str] = []

    def open(self) -> None:
        if self._settings.tls is not None:
            self._context = self._settings.tls.context()
            self.notices = self._settings.tls.notices()

    def _connect(self) -> Link:
        tls = self._settings.tls
        if tls is not None and self._context is None:
            self.open()
        connection = connected(self._host, self._port, socket.SOCK_STREAM, self._timeout)
        try:
            # A batch is waited for: its last, short segment must not wait for an acknowledgement first.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._settings.keepalive:
                _keep_alive(connection, self._timeout)
            if tls is None:
                return PlainLink(connection)
            assert self._context is not None
            link = TlsLink(self._context.wrap_socket(connection, server_hostname=tls.server_name or self._host))
        except BaseException:
            connection.close()
            raise
        try:
            link.await_verdict(min(self._timeout, _VERDICT_SECONDS_MAX))
        except BaseException:
            link.close()
            raise
        return link


class UnixSink(_StreamSink):
    """Lines over a Unix stream socket; see the module for what a delivery proves."""

    Settings = UnixSettings

    def __init__(self, settings: UnixSettings) -> None:
        super().__init__(f"unix {settings.path}", settings.timeout, settings.terminator)
        self._path = settings.path

    def open(self) -> None: ...

    def _connect(self) -> Link:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self._timeout)
            connection.connect(self._path)
            return PlainLink(connection)
        except BaseException:
            connection.close()
            raise


def _keep_alive(connection: socket.socket, timeout: Duration) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # What is left in the queue of a closed connection isn't tried for long. Twice: our own timeout comes first.
    options = (*_KEEPALIVE, ("TCP_USER_TIMEOUT", ceil(2000 * timeout)))
    for name, value in options:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _check_timeout(timeout: Duration) -> None:
    if not _TIMEOUTS[0] <= timeout <= _TIMEOUTS[1]:
        raise ValueError(f"timeout: a duration from {_TIMEOUTS[0]} to {_TIMEOUTS[1]}")
