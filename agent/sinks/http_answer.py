"""What comes back over HTTP, bounded: an answer's time, its size, what it means and what an error shows of it."""

from __future__ import annotations

import errno
import http.client
import io
import re
import socket
import ssl
import time
from collections.abc import Iterable
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from agent.units import Duration

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

_BODY_BYTES_MAX = 64 << 10
_LINE_CHARACTERS_MAX = 200
_RETRY_AFTER_SECONDS_MAX = 3600.0
_TRY_AGAIN = (408, 429)
_TRY_EACH = (400, 413, 422)  # it may be a single payload, or their number, that the peer doesn't take

C = TypeVar("C", bound=type)


class Answer(NamedTuple):
    """What a receiver has answered.

    Attributes:
        start: of the body, 64 KiB at most.
        content_type: of the body, in lower case and without parameters.
        retry_after_seconds: how long it asks to be left alone; None where it doesn't.
    """

    status: int
    reason: str
    start: bytes
    content_type: str
    retry_after_seconds: float | None

    @property
    def is_taken(self) -> bool:
        """Whether it acknowledges the request."""
        return 200 <= self.status < 300

    @property
    def is_for_later(self) -> bool:
        """Whether the same request may be taken later; RFC 9110 has an unknown class be taken as 5xx."""
        return self.status in _TRY_AGAIN or not 200 <= self.status < 500

    @property
    def may_be_for_one(self) -> bool:
        """Whether parts of the request may be taken when each comes alone."""
        return self.status in _TRY_EACH


class _DeadlineReader(io.RawIOBase):
    """A socket's bytes until a moment: a socket's own timeout begins again with each byte that trickles in.

    Attributes:
        head_is_whole: until then an end cuts the head, which http.client would take for all of it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._raw = connection.makefile("rb", buffering=0)
        self.head_is_whole = False
        self._begun = False
        self._deadline = time.monotonic() + (connection.gettimeout() or 0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left_seconds = self._deadline - time.monotonic()
        if left_seconds <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left_seconds)
        size = self._raw.readinto(buffer)
        if size == 0 and self._begun and not self.head_is_whole:
            raise ConnectionAbortedError(errno.ECONNABORTED, "connection closed in the middle of an answer")
        self._begun = True
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer whose status, headers and body must all be there within the connection's timeout."""

    def __init__(self, sock: socket.socket, *args: Any, **named: Any) -> None:
        super().__init__(sock, *args, **named)
        self.fp.close()
        self._reader = _DeadlineReader(sock)
        self.fp = io.BufferedReader(self._reader)

    def begin(self) -> None:
        super().begin()
        self._reader.head_is_whole = True


def with_deadline(connection: C) -> C:
    """A class of connections like the given one, whose answers have a deadline."""
    bounded: C = type(connection.__name__, (connection,), {"response_class": _Answer})  # type: ignore[assignment]
    return bounded


def received(answer: BaseHTTPResponse) -> Answer:
    """An answer, read as far as it is looked at; its connection is free again, or dropped, where more would come."""
    headers = answer.headers
    return Answer(
        answer.status,
        answer.reason or "",
        _read_start(answer),
        headers.get("Content-Type", "").partition(";")[0].strip().lower(),
        retry_after_seconds(headers.get("Retry-After", ""), time.time()),
    )


def retry_after_seconds(text: str, now_unix_seconds: float) -> float | None:
    """A Retry-After header's seconds or date as seconds from now, an hour at most; None where it is neither."""
    text = text.strip()
    if re.fullmatch("[0-9]+", text):
        seconds = float(text[:20])
    else:
        try:
            date = parsedate_to_datetime(text)
            seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - now_unix_seconds
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), _RETRY_AFTER_SECONDS_MAX)


def _read_start(answer: BaseHTTPResponse) -> bytes:
    """The start of an answer's body. The connection is kept if that is all of it, and dropped if not.

    A body that ends early takes nothing back: the status was the answer.
    """
    from urllib3.exceptions import HTTPError

    start = b""
    if answer.status < 200:  # the answer proper comes later, and must not be taken for that of the next request
        answer.close()
        return start
    try:
        start = answer.read(_BODY_BYTES_MAX)
        ended = not answer.read(1)
    except (HTTPError, OSError):
        ended = False
    if not ended:
        answer.close()
    return start


def plain(text: str | bytes, secrets: Iterable[str]) -> str:
    """The first line of what a peer wrote, short, without control characters and these secrets."""
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    line = "".join(character for character in text.lstrip().partition("\n")[0] if character.isprintable())
    for secret in secrets:
        line = line.replace(secret, "***")
    return line.strip()[:_LINE_CHARACTERS_MAX]


def failure_text(error: BaseException, timeout: Duration) -> str:
    """Why there is no answer, in a few words: what urllib3 wrapped, without addresses of objects and the url."""
    inner: Any = error
    while isinstance(nested := _nested(inner), BaseException):
        inner = nested
    if isinstance(inner, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {inner.verify_message.rstrip('.')}"
    if isinstance(inner, ssl.SSLError):
        return f"TLS: {(inner.reason or 'failed').lower().replace('_', ' ')}"
    if isinstance(inner, TimeoutError):
        return f"timed out after {timeout}"
    if isinstance(inner, http.client.RemoteDisconnected):
        return "connection closed without an answer"
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    if isinstance(inner, http.client.HTTPException):
        return f"no HTTP answer: {type(inner).__name__}"
    return type(inner).__name__


def _nested(error: BaseException) -> BaseException | None:
    """The error that another one carries: urllib3 puts it among the arguments, or raises from it."""
    for argument in error.args:
        if isinstance(argument, BaseException):
            return argument
    return error.__cause__
