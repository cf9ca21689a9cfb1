"""Batches of JSON lines as POST requests over one kept connection; a 2xx status is the acknowledgement."""

from __future__ import annotations

import base64
import re
import time
import zlib
from collections.abc import Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from agent import __version__
from agent.errors import RejectedError, SinkError, UsageError
from agent.sinks.http_answer import failure_text, plain, read_start, with_deadline
from agent.sinks.secret import Secret, SecretSettings
from agent.sinks.sink import SinkSettings
from agent.sinks.tls import TlsSettings
from agent.units import Duration

if TYPE_CHECKING:
    import urllib3

_TIMEOUTS = (Duration(0.001), Duration(3600))
_RETRY_AFTER_SECONDS_MAX = 3600.0
_GZIP_LEVEL = 6  # of 100 frames (777 kB): level 1 makes 59 kB in 1.6 ms, 4 38 kB in 2.3 ms, 6 28 kB in 3.1 ms
_GZIP_WINDOW_BITS = 31  # zlib's way to say: with gzip's header and checksum
_TRY_AGAIN = (408, 429)
_TRY_EACH = (400, 413, 422)  # it may be a single payload, or their number, that the peer doesn't take
_TRY_NEW_SECRET = (401, 403)
_OUR_HEADERS = ("content-encoding", "content-length", "content-type", "host", "transfer-encoding")
_SECRET_HEADERS = ("authorization", "cookie", "proxy-authorization")


class BasicSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A user's name and where the password is."""

    user: str
    password: SecretSettings

    def __post_init__(self) -> None:
        if not self.user or re.search(r"[:\0-\x1f\x7f]", self.user):
            raise ValueError('user: a name without ":" and control characters')


class HttpSettings(SinkSettings, frozen=True, kw_only=True):
    """A receiver of JSON lines.

    Attributes:
        timeout: for connecting, and again for the whole answer.
        headers: sent with each request; they are no place for secrets.
        bearer: where the token of `Authorization: Bearer` is.
    """

    url: str
    timeout: Duration = Duration(4)
    gzip: bool = True
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    bearer: SecretSettings | None = None
    basic: BasicSettings | None = None
    tls: TlsSettings | None = None

    def __post_init__(self) -> None:
        # A message shows its key's value: one about a secret in the wrong place names the key that is the right one.
        if "@" in self.url:
            raise ValueError("basic: user and password outside of url, where an @ of the path is written %40")
        if any(name.lower() in _SECRET_HEADERS for name in self.headers):
            raise ValueError("bearer: the place of a secret, or basic, instead of one in headers")
        _check_url(self.url)
        _check_headers(self.headers)
        if not _TIMEOUTS[0] <= self.timeout <= _TIMEOUTS[1]:
            raise ValueError(f"timeout: a duration from {_TIMEOUTS[0]} to {_TIMEOUTS[1]}")
        if self.bearer and self.basic:
            raise ValueError("basic: either bearer or basic")
        if self.secret and not self.is_private:
            raise ValueError("url: an address with https://, a secret goes over no open connection")
        if self.tls and urlsplit(self.url).scheme != "https":
            raise ValueError("url: an address with https://, which tls is for")

    @property
    def secret(self) -> SecretSettings | None:
        return self.basic.password if self.basic else self.bearer

    @property
    def is_private(self) -> bool:
        """Whether nobody but the peer can read what is sent: it is encrypted, or stays on this host."""
        parts = urlsplit(self.url)
        return parts.scheme == "https" or parts.hostname == "localhost" or _is_loopback(parts.hostname or "")


class HttpSink:
    """POSTs a batch as one body of JSON lines.

    What the peer may take later (408, 429, 5xx, no answer) is a SinkError; any other status is a rejection.
    Redirects are not followed and no proxy is asked, so that a secret goes where the configuration says.

    Attributes:
        notices: what `open` saw that is worth a warning.
    """

    Settings = HttpSettings

    def __init__(self, settings: HttpSettings) -> None:
        parts = urlsplit(settings.url)
        self.notices: list[str] = []
        self._settings = settings
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._place = f"http {parts.scheme}://{parts.netloc}{parts.path}"
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._secret: Secret | None = None
        self._headers = _request_headers(settings)

    def open(self) -> None:
        self.close()
        self.notices = []
        self._pool = self._new_pool(urlsplit(self._settings.url))
        self._read_secret()

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        body = _gzipped(payloads) if self._settings.gzip else b"\n".join([*payloads, b""])
        status, reason, text, retry_after = self._post(body)
        if status in _TRY_NEW_SECRET and self._has_new_secret():
            status, reason, text, retry_after = self._post(body)
        if 200 <= status < 300:
            return
        error = f"{self._place}: {status} {self._shown(reason)}".rstrip()
        if status in _TRY_AGAIN or not 300 <= status < 500:  # RFC 9110 has an unknown class be taken as 5xx
            raise SinkError(error, retry_after_seconds=retry_after_seconds(retry_after, time.time()))
        line = "redirects are not followed" if status < 400 else self._shown(text)
        error = f"{error}: {line}" if line else error
        raise RejectedError(error, each=status in _TRY_EACH and len(payloads) > 1)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _new_pool(self, parts: SplitResult) -> urllib3.HTTPConnectionPool:
        try:
            import urllib3
        except ModuleNotFoundError as error:
            if error.name != "urllib3":
                raise
            raise UsageError("sinks of type http need urllib3", 'pip install "hostprobe[http]"') from None
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        timeout = urllib3.Timeout(connect=self._settings.timeout, read=self._settings.timeout)
        pool: urllib3.HTTPConnectionPool
        if parts.scheme == "http":
            pool = urllib3.HTTPConnectionPool(host, port, timeout=timeout, maxsize=1, retries=False)
        else:
            tls = self._settings.tls or TlsSettings()
            arguments: dict[str, Any] = {"ssl_context": tls.context(), "server_hostname": tls.server_name or host}
            pool = urllib3.HTTPSConnectionPool(
                host, port, timeout=timeout, maxsize=1, retries=False, cert_reqs="CERT_REQUIRED", **arguments
            )
            self.notices += tls.notices()
        pool.ConnectionCls = with_deadline(pool.ConnectionCls)
        return pool

    def _read_secret(self) -> None:
        place = self._settings.secret
        if place is None:
            return
        secret = place.read()
        text = secret.reveal()
        if self._settings.basic:
            pair = f"{self._settings.basic.user}:{text}".encode()
            authorization = f"Basic {base64.b64encode(pair).decode()}"
        elif re.fullmatch("[!-~]+", text):
            authorization = f"Bearer {text}"
        else:
            raise UsageError(f"{place.place}: it holds what no header can", "a token of visible ASCII characters")
        self._secret = secret
        self.notices += secret.notices
        self._headers["Authorization"] = authorization

    def _has_new_secret(self) -> bool:
        """Reads the secret again if its file has changed since: tokens are replaced while agents run."""
        place = self._settings.secret
        if place is None or self._secret is None or not place.changed_since(self._secret):
            return False
        try:
            self._read_secret()
        except UsageError as error:  # half written: what can't be sent now isn't refused for good
            raise SinkError(f"{self._place}: {error}") from None
        return True

    def _post(self, body: bytes) -> tuple[int, str, bytes, str]:
        """One request; its answer's status, reason, start of the body and Retry-After."""
        if self._pool is None:
            self.open()
        assert self._pool is not None
        from urllib3.exceptions import HTTPError

        try:
            answer = self._pool.urlopen(
                "POST", self._target, body, self._headers, redirect=False, preload_content=False, decode_content=False
            )
        except HTTPError as error:
            raise SinkError(f"{self._place}: {failure_text(error, self._settings.timeout)}") from None
        return answer.status, answer.reason or "", read_start(answer), answer.headers.get("Retry-After", "")

    def _shown(self, text: str | bytes) -> str:
        """What the peer wrote as an error may show it, without our secret if it sends that back."""
        secrets = []
        if self._secret is not None:
            secrets = [self._headers["Authorization"].partition(" ")[2], self._secret.reveal()]
        return plain(text, secrets)


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


def _gzipped(payloads: Sequence[memoryview]) -> bytes:
    """The lines compressed one after the other: no second copy of the batch is needed."""
    compressor = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_WINDOW_BITS)
    parts = []
    for payload in payloads:
        parts.append(compressor.compress(payload))
        parts.append(compressor.compress(b"\n"))
    parts.append(compressor.flush())
    return b"".join(parts)


def _request_headers(settings: HttpSettings) -> dict[str, str]:
    headers = {"Content-Type": "application/x-ndjson", **settings.headers}
    if settings.gzip:
        headers["Content-Encoding"] = "gzip"
    if not any(name.lower() == "user-agent" for name in headers):
        headers["User-Agent"] = f"hostprobe/{__version__}"
    return headers


def _check_url(url: str) -> None:
    expected = 'an address such as "https://host:8080/path"'
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError(f"url: {expected}") from None
    if not re.fullmatch("[!-~]+", url) or not re.match("https?://", url, re.IGNORECASE):
        raise ValueError(f"url: {expected}")
    if port == 0 or not (re.fullmatch(r"[\w.-]*\w\.?", host) or _is_address(host)):
        raise ValueError(f"url: {expected}")
    if "#" in url:
        raise ValueError("url: an address without a fragment")


def _check_headers(headers: dict[str, str]) -> None:
    for name, value in headers.items():
        if name.lower() in _OUR_HEADERS:
            raise ValueError(f"headers: none of {', '.join(_OUR_HEADERS)}, which hostprobe sets")
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) or not re.fullmatch("[\t -~]*", value):
            raise ValueError("headers: names and values of visible ASCII characters")


def _is_address(host: str) -> bool:
    try:
        return bool(ip_address(host))
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    return _is_address(host) and ip_address(host).is_loopback
