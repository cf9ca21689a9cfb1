"""Connections that never block, plain or with TLS, and what the kernel knows of their send queues."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import ssl

SEES_QUEUE = sys.platform == "linux"
"""Whether it can be asked what a peer hasn't acknowledged."""
if SEES_QUEUE:
    from fcntl import ioctl

_RECORD_BYTES = 16 << 10  # what TLS takes at once
_READ_BYTES = 64 << 10
_READS_MAX = 16  # of what a peer sends for no reason
_SIOCOUTQ = 0x5411  # linux/sockios.h; the number of TIOCOUTQ


class Link(Protocol):
    """A connection that never blocks."""

    @property
    def socket(self) -> socket.socket: ...

    def send(self, parts: list[bytes | memoryview]) -> int:
        """Sends the beginning of these; returns how many bytes, 0 where none can be sent now."""

    def receive(self) -> bytes | None:
        """What the peer has sent, b"" for its end, None for nothing so far."""

    def acknowledged_bytes(self, sent_bytes: int) -> int:
        """How many of the bytes that were sent the peer has for certain, at least."""

    def close(self) -> None: ...


class PlainLink:
    """A TCP or Unix socket as it is."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(0)
        self.socket = connection

    def send(self, parts: list[bytes | memoryview]) -> int:
        try:
            return self.socket.sendmsg(parts)
        except BlockingIOError:
            return 0

    def receive(self) -> bytes | None:
        try:
            return self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return None

    def acknowledged_bytes(self, sent_bytes: int) -> int:
        if self.socket.family == socket.AF_UNIX:  # its queue is counted in the kernel's memory, not in bytes
            return 0
        return sent_bytes - unacknowledged_bytes(self.socket) if SEES_QUEUE else 0

    def close(self) -> None:
        with suppress(OSError):
            # What nobody has read would turn the end into a reset, which may take from the peer what it hasn't read.
            self.socket.shutdown(socket.SHUT_WR)
            is_open(self)
        self.socket.close()


class TlsLink:
    """A TLS connection over a TCP socket, after the handshake."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        from ssl import SSLWantReadError, SSLWantWriteError

        connection.settimeout(0)
        self.socket = connection
        self._wants_write = SSLWantWriteError
        self._wants_any = (SSLWantReadError, SSLWantWriteError)

    def await_verdict(self, timeout_seconds: float) -> None:
        """With TLS 1.3 our side is done before the peer has seen our certificate: waits for what it says then.

        A peer that refuses sends an alert, most others a session ticket; one that sends neither costs the wait.
        """
        if self.socket.version() != "TLSv1.3":
            return
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        if poll.poll(timeout_seconds * 1000) and self.receive() == b"":
            raise ConnectionResetError(errno.ECONNRESET, "closed by the peer after the handshake")

    def send(self, parts: list[bytes | memoryview]) -> int:
        # One record at a time. Where it would block, the next call has the same bytes, as OpenSSL demands.
        record = bytearray()
        for part in parts:
            record += part[: _RECORD_BYTES - len(record)]
            if len(record) == _RECORD_BYTES:
                break
        try:
            return self.socket.send(record)
        except self._wants_write:
            return 0

    def receive(self) -> bytes | None:
        try:
            return self.socket.recv(_READ_BYTES)
        except self._wants_any:
            return None

    def acknowledged_bytes(self, sent_bytes: int) -> int:
        return 0  # the queue holds encrypted bytes, more of them than were sent

    def close(self) -> None:
        is_open(self)  # reads what has come, as above
        with suppress(OSError, ValueError):
            self.socket.unwrap()  # says that this is the end, and doesn't wait for an answer
        self.socket.close()


def is_open(link: Link) -> bool:
    """Whether a peer hasn't closed or reset the connection meanwhile. What it sends is of no interest, and bounded."""
    try:
        for _ in range(_READS_MAX):
            received = link.receive()
            if not received:
                return received is None
    except OSError:
        return False
    return True


def unacknowledged_bytes(connection: socket.socket) -> int:
    """Bytes in the send queue: for TCP those that the peer's kernel hasn't acknowledged."""
    return int(struct.unpack("i", ioctl(connection, _SIOCOUTQ, bytes(4)))[0])


def raise_error(connection: socket.socket, queued_bytes: int) -> None:
    """Raises the OSError that a connection has, or if it is over with bytes in its queue."""
    poll = select.poll()
    poll.register(connection, 0)
    events = poll.poll(0)
    if events and (events[0][1] & select.POLLERR or queued_bytes):
        number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.EPIPE
        raise OSError(number, os.strerror(number))
