"""Receivers and agents for the benches of delivery: kills.py, outage.py, burst.py.

    python tests/bench/receivers.py FOLDER HTTP_PORT TCP_PORT

runs a receiver as a process of its own, to be killed: it appends what comes over HTTP to
FOLDER/http.jsonl, and over TCP to FOLDER/tcp.jsonl, until it ends.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LOCALHOST = "127.0.0.1"
READ_BYTES = 256 << 10


class Verdict(StrEnum):
    """What an HTTP receiver does with a request."""

    TAKEN = "taken"
    UNAVAILABLE = "503"
    TOO_MANY = "429"
    RESET = "connection reset"
    WITHHELD = "taken, answer withheld"


STATUS = {Verdict.TAKEN: 204, Verdict.UNAVAILABLE: 503, Verdict.TOO_MANY: 429}


class HttpReceiver(ThreadingHTTPServer):
    """Takes POSTs of JSON lines, or not.

    Args:
        take: called with each body that came whole, in several threads; says what becomes of it.
    """

    daemon_threads = True

    def __init__(self, port: int, take: Callable[[bytes], Verdict]) -> None:
        super().__init__((LOCALHOST, port), _Handler)
        self.take = take
        self.port = self.server_address[1]
        self._open: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def await_end_of_connections(self) -> None:
        """Waits until all that had come from an agent that was killed has been taken, or not."""
        time.sleep(0.05)  # what the kernel has accepted, we accept at once
        while self._open:
            time.sleep(0.01)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # an agent that was killed in a request is no news
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HttpReceiver

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        body = self.rfile.read(size)
        if len(body) < size:  # its sender was killed
            self.close_connection = True
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = zlib.decompress(body, 31)
        verdict = self.server.take(body)
        if verdict in STATUS:
            self.send_response(STATUS[verdict])
            if verdict is Verdict.TOO_MANY:
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.close_connection = True
        if verdict is Verdict.RESET:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())  # a close behind a shutdown would be no reset

    def log_message(self, format: str, *args: Any) -> None: ...


class LineFile:
    """Appends whole lines to a file, in the order in which they come, from any thread."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = threading.Lock()

    def write(self, lines: bytes) -> None:
        with self._lock:
            assert os.write(self._fd, lines) == len(lines)


def whole_lines(connection: socket.socket) -> Iterator[bytes]:
    """What comes over a connection, cut behind line feeds; a last line without one is dropped."""
    rest = b""
    while chunk := connection.recv(READ_BYTES):
        lines, feed, rest = (rest + chunk).rpartition(b"\n")
        if feed:
            yield lines + feed


class _TcpReceiver(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    lines: LineFile


class _TcpHandler(socketserver.BaseRequestHandler):
    server: _TcpReceiver

    def handle(self) -> None:
        with suppress(OSError):
            for lines in whole_lines(self.request):
                self.server.lines.write(lines)


def receive(folder: Path, http_port: int, tcp_port: int) -> None:
    """Takes everything until the process ends."""
    http_lines = LineFile(folder / "http.jsonl")

    def take(body: bytes) -> Verdict:
        http_lines.write(body)
        return Verdict.TAKEN

    tcp = _TcpReceiver((LOCALHOST, tcp_port), _TcpHandler)
    tcp.lines = LineFile(folder / "tcp.jsonl")
    http = HttpReceiver(http_port, take)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    print("ready", flush=True)
    tcp.serve_forever()


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.create_server((LOCALHOST, 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def process(arguments: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A Python process in a session of its own; nothing of it is left afterwards."""
    child = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, start_new_session=True, stdin=subprocess.DEVNULL, **options
    )
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def agent(config: Path, log: Any) -> Any:
    """The real agent as a process; `log` is what its stderr goes to."""
    return process(["-m", "agent", "run", "--config", str(config)], stdout=subprocess.DEVNULL, stderr=log)


def reached(what: str, is_reached: bool) -> bool:
    """Prints whether a bound was met, and returns it."""
    print(f"{'reached' if is_reached else 'NOT reached':12} {what}")
    return is_reached


def begin() -> None:
    """Prints where the figures come from. From now on SIGTERM ends this program as Ctrl-C does: with its processes."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    release = platform.release()
    cores, load = os.cpu_count(), os.getloadavg()[0]
    print(f"Python {platform.python_version()}, Linux {release}, {cores} cores, load {load:.1f}", flush=True)


if __name__ == "__main__":
    receive(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
