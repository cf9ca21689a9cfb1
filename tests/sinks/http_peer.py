"""A real HTTP receiver for tests: it answers each request as told, and keeps what it was sent; and its certificates."""

from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import cramjam
import trustme

Way = Literal[
    "whole",
    "byte by byte",  # with a pause after each
    "half a head",  # and then the connection is closed
    "half a body",
    "close after",  # without saying so
    "close",  # without an answer
    "reset",
    "stall",  # until `go_on`, and then the connection is closed
    "stall in the body",
]


@dataclass
class Answer:
    """How one request is answered; `raw` is sent instead of all the rest."""

    status: int = 200
    reason: str = "Said"
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    way: Way = "whole"
    pause_seconds: float = 0.0
    raw: bytes = b""

    def encoded(self) -> bytes:
        if self.raw:
            return self.raw
        headers = {"Content-Length": str(len(self.body)), **self.headers}
        lines = [f"HTTP/1.1 {self.status} {self.reason}", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + self.body


@dataclass
class Request:
    """What was received, on which of the connections."""

    connection: int
    line: str
    headers: dict[str, str]
    raw: bytes
    client_certificate: dict[str, Any] | None

    @property
    def body(self) -> bytes:
        match self.headers.get("Content-Encoding"):
            case None:
                return self.raw
            case "gzip":
                return gzip.decompress(self.raw)
            case "snappy":  # a block without frames
                return bytes(cramjam.snappy.decompress_raw(self.raw))
            case other:
                raise AssertionError(f"encoded as {other}")


class HttpPeer:
    """Listens while its `with` lasts; what isn't scripted is answered as `judge` says, or by 200.

    Attributes:
        requests: as received, in order.
        connections: accepted so far.
        refused_handshakes: reasons why TLS connections came to nothing.
        defects: of this peer itself.
        go_on: set, it stalls no longer.
    """

    def __init__(self, *answers: Answer, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0):
        self.answers = deque(answers)
        self.tls = tls
        self.requests: list[Request] = []
        self.connections = 0
        self.refused_handshakes: list[str] = []
        self.defects: list[str] = []
        self.closed_a_connection = threading.Event()
        self.judge: Callable[[Request], Answer] = lambda request: Answer()
        self.leaving = threading.Event()
        self.go_on = threading.Event()
        self._server = _Server(self, host, port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def url(self, path: str = "/in", host: str = "127.0.0.1") -> str:
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{path}"

    @property
    def bodies(self) -> list[bytes]:
        return [request.body for request in self.requests]

    def __enter__(self) -> HttpPeer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.leaving.set()
        self.go_on.set()
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()  # waits for the connections' threads
        self._thread.join()
        assert self.defects == []


class _Server(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, peer: HttpPeer, host: str, port: int) -> None:
        self.peer = peer
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sockets: set[socket.socket] = set()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        super(ThreadingHTTPServer, self).server_bind()

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.peer.connections += 1
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets.add(request)
        if self.peer.tls is None:
            _Handler(request, client_address, self)
            return
        with self.peer.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False) as encrypted:
            self._sockets.add(encrypted)
            try:
                encrypted.do_handshake()
            except OSError as error:
                self.peer.refused_handshakes.append(str(getattr(error, "reason", error)))
                with contextlib.suppress(OSError):
                    # Closing with unread bytes resets the connection, and the alert might not be read.
                    socket.socket.shutdown(encrypted, socket.SHUT_WR)
                    while socket.socket.recv(encrypted, 4096):
                        pass
                return
            _Handler(encrypted, client_address, self)

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(OSError):
            super().shutdown_request(request)
        self._sockets.discard(request)
        self.peer.closed_a_connection.set()

    def hang_up(self) -> None:
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        error = sys.exception()
        if not isinstance(error, OSError):  # clients come and go
            self.peer.defects.append(repr(error))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.number = self.server.peer.connections

    def do_POST(self) -> None:
        peer = self.server.peer
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        certificate = self.connection.getpeercert() if isinstance(self.connection, ssl.SSLSocket) else None
        headers = dict(self.headers.items())
        assert len(headers) == len(self.headers), "a header came twice"
        request = Request(self.number, self.requestline, headers, raw, certificate)
        peer.requests.append(request)
        self._answer(peer.answers.popleft() if peer.answers else peer.judge(request))

    def _answer(self, answer: Answer) -> None:
        encoded = answer.encoded()
        head = encoded.index(b"\r\n\r\n") + 4 if b"\r\n\r\n" in encoded else len(encoded)
        match answer.way:
            case "byte by byte":
                for byte in encoded:
                    self.wfile.write(bytes((byte,)))
                    if self.server.peer.leaving.wait(answer.pause_seconds):
                        return
            case "half a head":
                self.wfile.write(encoded[: head // 2])
            case "half a body":
                self.wfile.write(encoded[: head + (len(encoded) - head) // 2])
            case "stall":
                self.server.peer.go_on.wait()
            case "stall in the body":
                self.wfile.write(encoded[: head + (len(encoded) - head) // 2])
                self.server.peer.leaving.wait()
            case "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                socket.socket.close(self.connection)
            case "whole" | "close after":
                self.wfile.write(encoded)
        if answer.way not in ("whole", "byte by byte"):
            self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def refused_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else gets meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


class Pki:
    """An authority, a server that it vouches for, and files of both."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.authority = trustme.CA()
        self.ca = self._write("ca.pem", self.authority.cert_pem.bytes())

    def _write(self, name: str, content: bytes) -> str:
        path = self.place / name
        path.write_bytes(content)
        path.chmod(0o600)
        return str(path)

    def server(self, *names: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(*names).configure_cert(context)
        return context

    def client(self) -> dict[str, str]:
        leaf = self.authority.issue_cert("agent@hosts.example", common_name="agent")
        chain = b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
        return {
            "certificate": self._write("client.pem", chain),
            "key": self._write("client.key", leaf.private_key_pem.bytes()),
        }
