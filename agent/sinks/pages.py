"""What a scraper gets to see: the latest frame, whether the agent is well, and links to both. A WSGI application."""

from __future__ import annotations

import base64
import binascii
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from agent.sinks.secret import Secret

HEALTHY_PATH, READY_PATH = "/healthz", "/readyz"

_GZIP_LEVEL = 4  # of a frame of 40.0 kB: level 1 makes 8.0 kB in 0.12 ms, 4 7.2 kB in 0.18 ms, 6 6.9 kB in 0.41 ms
_GZIP_WINDOW_BITS = 31  # zlib's way to say: with gzip's header and checksum
_PLAIN = "text/plain; charset=utf-8"

StartResponse = Callable[[str, list[tuple[str, str]]], object]


class Health(Protocol):
    """Whether the agent does its work; agent.health's, which stands above this room."""

    def problems(self) -> list[str]: ...

    def hindrances(self) -> list[str]: ...

    @property
    def patience_ns(self) -> int: ...


class Account(NamedTuple):
    """Who may see the frame."""

    user: str
    password: Secret


class Exposition:
    """One frame's text, as it is and, once somebody has asked for it, compressed. Whole and unchanged for good."""

    __slots__ = ("_lock", "_zipped", "came_ns", "text")

    def __init__(self, text: bytes, came_ns: int) -> None:
        self.text = text
        self.came_ns = came_ns  # by the monotonic clock
        self._zipped = b""
        self._lock = threading.Lock()

    def zipped(self) -> bytes:
        """The text by gzip, made at the first call."""
        with self._lock:
            if not self._zipped:
                packer = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW_BITS)
                self._zipped = packer.compress(self.text) + packer.flush()
            return self._zipped


class _Answer(NamedTuple):
    status: str
    body: bytes
    content_type: str = _PLAIN
    more: tuple[tuple[str, str], ...] = ()


class Pages:
    """The application: GET and HEAD of a few paths, from memory; any thread may call it.

    The pages about health ask for no password, so that a probe of liveness needs none.

    Args:
        path: of the frame.
        content_type: of the frame.
        gzip: whether those who accept it get the frame compressed.
        clock_ns: the monotonic clock.

    Attributes:
        exposition: the latest frame; None before the first. Whoever has begun to answer goes on with the one he took.
        health: None where nobody says how the agent is.
        account: None where everybody may see the frame.
    """

    def __init__(
        self, path: str, content_type: str, gzip: bool, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.exposition: Exposition | None = None
        self.health: Health | None = None
        self.account: Account | None = None
        self._path = path
        self._content_type = content_type
        self._gzip = gzip
        self._clock_ns = clock_ns
        self._pages: dict[str, Callable[[Mapping[str, Any]], _Answer]] = {
            "/": self._links,
            path: self._frame,
            HEALTHY_PATH: lambda _: _verdict(self.health.problems() if self.health else []),
            READY_PATH: lambda _: _verdict(self.health.hindrances() if self.health else []),
        }

    def __call__(self, environ: Mapping[str, Any], start_response: StartResponse) -> list[bytes]:
        """One request: its answer, whose body is left out for HEAD."""
        method = environ["REQUEST_METHOD"]
        status, body, content_type, more = self._answer(environ["PATH_INFO"], method, environ)
        headers = [("Content-Type", content_type), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
        start_response(status, [*headers, *more])
        return [] if method == "HEAD" else [body]

    def _answer(self, path: str, method: str, environ: Mapping[str, Any]) -> _Answer:
        page = self._pages.get(path)
        if page is None:
            return _Answer("404 Not Found", b"no such page\n")
        if method not in ("GET", "HEAD"):
            return _Answer("405 Method Not Allowed", b"GET or HEAD, please\n", more=(("Allow", "GET, HEAD"),))
        if path not in (HEALTHY_PATH, READY_PATH) and not self._is_welcome(environ.get("HTTP_AUTHORIZATION", "")):
            challenge = ("WWW-Authenticate", 'Basic realm="hostprobe", charset="UTF-8"')
            return _Answer("401 Unauthorized", b"user and password, please\n", more=(challenge,))
        return page(environ)

    def _is_welcome(self, authorization: str) -> bool:
        if self.account is None:
            return True
        import hmac  # takes 0.7 MB of memory, for OpenSSL's hashes, which a sink without passwords doesn't pay

        scheme, _, token = authorization.partition(" ")
        try:
            given = base64.b64decode(token.strip(), validate=True)
        except (binascii.Error, ValueError):
            given = b""
        expected = f"{self.account.user}:{self.account.password.reveal()}".encode()
        return hmac.compare_digest(given, expected) and scheme.lower() == "basic"

    def _frame(self, environ: Mapping[str, Any]) -> _Answer:
        exposition = self.exposition
        if exposition is None:
            return _Answer("503 Service Unavailable", b"no frame yet\n")
        age_ns = self._clock_ns() - exposition.came_ns
        if self.health is not None and age_ns > self.health.patience_ns:
            return _Answer("503 Service Unavailable", b"no frame for %d s\n" % (age_ns // 1_000_000_000))
        if not self._gzip:
            return _Answer("200 OK", exposition.text, self._content_type)
        by_encoding = ("Vary", "Accept-Encoding")
        if accepts_gzip(environ.get("HTTP_ACCEPT_ENCODING", "")):
            more = (by_encoding, ("Content-Encoding", "gzip"))
            return _Answer("200 OK", exposition.zipped(), self._content_type, more)
        return _Answer("200 OK", exposition.text, self._content_type, (by_encoding,))

    def _links(self, _: Mapping[str, Any]) -> _Answer:
        paths = (self._path, HEALTHY_PATH, READY_PATH)
        links = "".join(f'<li><a href="{path}">{path}</a></li>\n' for path in paths)
        page = f"<!doctype html>\n<title>hostprobe</title>\n<h1>hostprobe</h1>\n<ul>\n{links}</ul>\n"
        return _Answer("200 OK", page.encode(), "text/html; charset=utf-8")


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether a header Accept-Encoding allows gzip (RFC 9110, 12.5.3)."""
    weights: dict[str, bool] = {}
    for coding in accept_encoding.lower().split(","):
        name, *parameters = coding.split(";")
        values = [parameter.strip().removeprefix("q=") for parameter in parameters]
        weights[name.strip()] = not any(value.strip("0.") == "" for value in values)
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", False)))


def _verdict(faults: list[str]) -> _Answer:
    if not faults:
        return _Answer("200 OK", b"ok\n")
    return _Answer("503 Service Unavailable", "".join(f"{fault}\n" for fault in faults).encode())
