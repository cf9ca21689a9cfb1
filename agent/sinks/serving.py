"""A server for requests without bodies and answers from memory: cheroot's protocol and threads behind a door of ours.

cheroot hands a connection to a thread as soon as it is there, which then waits for the client; and the thread that
accepts waits for each TLS handshake. A few clients that say nothing, or little, would keep everybody waiting. Here one
thread, the door, holds all connections and waits for none of them:

    accept → asking → [ cheroot: parse, answer ] → answering → resting → asking …
             a whole request comes                 all is sent  kept alive

A thread of cheroot's only sees a connection with a whole request in memory, and its answer goes into memory. Whoever
doesn't get on, asking or answering, is cut off after a time. The memory is bounded: so many connections, each with at
most what one read gives above a request's head, and one answer; when they are all taken, the one that has been asking
for longest makes room for a new one, or else one that is slow to take its answer, or that rests.
"""

from __future__ import annotations

import io
import logging
import os
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cheroot.server import HTTPConnection, HTTPRequest
from cheroot.wsgi import Server as WsgiServer

_THREADS = 2  # they wait for nobody; while one compresses, the other answers
_HEAD_BYTES_MAX = 8 << 10
_RECORD_BYTES = 16 << 10  # of TLS at most: what is read at once leaves nothing behind that only OpenSSL knows of
_HEAD_END = b"\r\n\r\n"
_BACKLOG = 128
_REST_SECONDS = 300  # longer than any sensible interval between two scrapes
_PAUSE_SECONDS = 0.1  # where this host has no descriptor left
_STOP_SECONDS = 1


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on the first of the host's addresses; OSError where it can't."""
    # As bytes: a text would import the codec "idna", 1 MB of memory, and hosts here are ASCII.
    places = socket.getaddrinfo(host.encode(), port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
    family, kind, protocol, _, place = places[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of old connections the kernel still holds some
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(host != "::"))
        listener.bind(place)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


class _Line(dict["_Connection", float]):
    """Connections that wait for the same, by the moment when each is cut off: in order, for all wait equally long."""

    def __init__(self, seconds: float, events: int) -> None:
        super().__init__()
        self.seconds = seconds
        self.events = events


class _Outbox:
    """What cheroot writes an answer into."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.parts.append(data)
        return len(data)


class _Request(HTTPRequest):
    """A request whose body, if it has one, nobody reads."""

    def read_request_headers(self) -> bool:
        try:
            is_good = bool(super().read_request_headers())  # type: ignore[no-untyped-call]
        except UnboundLocalError:  # cheroot's, over a first line that continues none
            self.simple_response("400 Bad Request", "Illegal header line.")
            return False
        if self.inheaders.get(b"Content-Length", b"0") != b"0" or b"Transfer-Encoding" in self.inheaders:
            self.close_connection = True
        return is_good


class _Connection(HTTPConnection):
    """A client. It is held by the door or by a thread of cheroot's, never by both.

    Attributes:
        received: what has come and isn't answered yet.
        unsent: the rest of an answer.
        keeps: whether it is kept when that is sent.
        line: where it waits; None while it is in a thread's hands.
    """

    RequestHandlerClass = _Request

    def __init__(self, server: Server, sock: socket.socket) -> None:
        # cheroot's own constructor makes caches that refer back to the connection: garbage for the collector.
        self.server = server
        self.socket = sock
        self.rfile: io.BytesIO = io.BytesIO()
        self.wfile = _Outbox()
        self.requests_seen = 0
        self.received = bytearray()
        self.unsent = memoryview(b"")
        self.keeps = True
        self.line: _Line | None = None

    @property
    def has_request(self) -> bool:
        """Whether a whole head is there, or one that is too long already."""
        return _HEAD_END in self.received or len(self.received) > _HEAD_BYTES_MAX

    def receive(self) -> bool:
        """Takes what has come; False where the client has gone. OSError as recv(2), that nothing is there included."""
        data = self.socket.recv(_RECORD_BYTES)
        self.received += data
        return bool(data)

    def send(self) -> None:
        """Sends what the kernel takes; OSError as send(2), that it takes nothing included."""
        while self.unsent:
            self.unsent = self.unsent[self.socket.send(self.unsent) :]

    def communicate(self) -> bool:
        """Parses the request and makes its answer; always True, for only the door closes connections."""
        end = self.received.find(_HEAD_END)
        size = end + len(_HEAD_END) if end >= 0 else len(self.received)
        self.rfile = io.BytesIO(self.received[:size])
        del self.received[:size]
        self.keeps = bool(super().communicate())  # type: ignore[no-untyped-call]
        self.unsent = memoryview(b"".join(self.wfile.parts))
        self.wfile.parts.clear()
        return True

    def close(self) -> None:
        self.rfile.close()
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Server(WsgiServer):
    """Serves an application on a socket that listens already, until it is closed.

    Args:
        listener: belongs to the server from now on.
        context: of TLS; None without.
        clients: connections at the most.
        timeout_seconds: for a whole request, the handshake included, and again for taking the answer.
        on_error: is told, by any thread, of a defect: no client causes one.
    """

    def __init__(
        self,
        listener: socket.socket,
        application: Callable[..., Any],
        context: ssl.SSLContext | None,
        clients: int,
        timeout_seconds: float,
        on_error: Callable[[str], None],
    ) -> None:
        super().__init__(
            listener.getsockname()[:2],
            application,
            numthreads=_THREADS,
            max=_THREADS,
            server_name="hostprobe",
            timeout=_REST_SECONDS,
        )
        self.software = "hostprobe"
        self.max_request_header_size = _HEAD_BYTES_MAX
        self._listener = listener
        self._context = context
        self._clients = clients
        self._on_error = on_error
        self._asking = _Line(timeout_seconds, selectors.EVENT_READ)
        self._answering = _Line(timeout_seconds, selectors.EVENT_WRITE)
        self._resting = _Line(_REST_SECONDS, selectors.EVENT_READ)
        self._lines = (self._asking, self._answering, self._resting)  # in the order in which they make room
        self._held: set[_Connection] = set()  # those in cheroot's hands included
        self._answered: deque[_Connection] = deque()
        self._selector = selectors.DefaultSelector()
        self._waker, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_writer, False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._door = threading.Thread(target=self._keep_door, name="door", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether it serves."""
        return self._door.is_alive()

    @property
    def can_add_keepalive_connection(self) -> bool:
        """What cheroot asks before it keeps a connection."""
        return bool(self.ready)

    def open(self) -> None:
        """Begins to serve."""
        self.ready = True
        self._door.start()

    def close(self) -> None:
        """Ends all threads and connections; the port is free afterwards."""
        self.ready = False
        self._wake()
        if self._door.ident is not None:
            self._door.join()
        self.requests.stop(_STOP_SECONDS)
        for connection in self._held:
            connection.close()
        self._held.clear()
        self._selector.close()
        self._listener.close()
        os.close(self._waker)
        os.close(self._wake_writer)
        logging.statistics.pop(f"Cheroot HTTPServer {id(self)}", None)  # type: ignore[attr-defined]  # cheroot's own

    def put_conn(self, conn: _Connection) -> None:
        """Takes a connection back from a thread of cheroot's."""
        self._answered.append(conn)
        self._wake()

    def error_log(self, msg: str = "", level: int = logging.INFO, traceback: bool = False) -> None:
        """What cheroot has to say, of which only defects are of interest."""
        if level >= logging.WARNING and self.ready:
            self._on_error(str(msg))

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # full: it is awake
            os.write(self._wake_writer, b"\0")

    # What follows is the door's.

    def _keep_door(self) -> None:
        try:
            self.requests.start()  # by this thread, whose children are daemons like itself: none holds up the exit
            while self.ready:
                self._look()
        except Exception as error:  # a defect, or no thread to be had: told, and the sink opens again
            self._on_error(f"the server has ended: {type(error).__name__}: {error}")

    def _look(self) -> None:
        """Waits until something happens, and does all that can be done then."""
        for key, _ in self._selector.select(self._seconds_left()):
            if key.fileobj is self._listener:
                self._accept()
            elif key.data is None:
                os.read(self._waker, 4096)
            elif key.data in self._held:
                self._go_on(key.data)
        while self._answered:
            self._go_on(self._answered.popleft())
        now = time.monotonic()
        for line in self._lines:
            while line and next(iter(line.values())) <= now:
                self._drop(next(iter(line)))

    def _seconds_left(self) -> float | None:
        """Until the first one is cut off; None where nobody waits."""
        first = [next(iter(line.values())) for line in self._lines if line]
        return max(min(first) - time.monotonic(), 0) if first else None

    def _accept(self) -> None:
        try:
            accepted = self._listener.accept()[0]
        except (BlockingIOError, ConnectionError):  # it has changed its mind
            return
        except OSError as error:
            self._on_error(f"a client was not accepted: {error.strerror}")
            self._make_room()
            time.sleep(_PAUSE_SECONDS)
            return
        if len(self._held) >= self._clients and not self._make_room():
            accepted.close()
            return
        try:
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                accepted = self._context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
        except OSError:  # it has gone already
            accepted.close()
            return
        connection = _Connection(self, accepted)
        self._held.add(connection)
        self._wait(connection, self._asking)

    def _go_on(self, connection: _Connection) -> None:
        """Does for a connection what needs no waiting: sends, reads, or hands a whole request to cheroot."""
        try:
            connection.send()
            is_over = not connection.keeps
            if connection.line in (self._asking, self._resting) and not connection.receive():
                is_over = True
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            is_over = False
        except OSError:
            is_over = True
        if is_over:
            self._drop(connection)
        elif connection.unsent:
            self._wait(connection, self._answering)
        elif connection.has_request:
            self._leave_line(connection)
            self.requests.put(connection)
        else:
            is_asking = connection.received or connection.line is self._asking
            self._wait(connection, self._asking if is_asking else self._resting)

    def _wait(self, connection: _Connection, line: _Line) -> None:
        if connection.line is line:  # and its time goes on
            return
        self._leave_line(connection)
        connection.line = line
        line[connection] = time.monotonic() + line.seconds
        self._selector.register(connection.socket, line.events, connection)

    def _leave_line(self, connection: _Connection) -> None:
        if connection.line is not None:
            del connection.line[connection]
            connection.line = None
            self._selector.unregister(connection.socket)

    def _make_room(self) -> bool:
        """Drops whoever has waited for longest; False where all are in the hands of cheroot's threads."""
        for line in self._lines:
            if line:
                self._drop(next(iter(line)))
                return True
        return False

    def _drop(self, connection: _Connection) -> None:
        self._leave_line(connection)
        self._held.discard(connection)
        connection.close()
