"""What every sink over HTTP shares: where it posts to and as whom, over one kept connection."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn
from urllib.parse import SplitResult, urlsplit

import msgspec

from agent import __version__
from agent.errors import RejectedError, SinkError, UsageError
from agent.extras import needed
from agent.sinks.address import is_loopback
from agent.sinks.http_answer import Answer, failure_text, plain, received, with_deadline
from agent.sinks.secret import BasicSettings, Secret, SecretSettings
from agent.sinks.sink import SinkSettings
from agent.sinks.tls import TlsSettings
from agent.units import Duration

if TYPE_CHECKING:
    import urllib3

_TIMEOUTS = (Duration(0.001), Duration(3600))
_TRY_NEW_SECRET = (401, 403)
_OUR_HEADERS = ("content-encoding", "content-length", "content-type", "host", "transfer-encoding")
_SECRET_HEADERS = ("authorization", "cookie", "proxy-authorization")
_HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)


class HttpClientSettings(SinkSettings, frozen=True, kw_only=True):
    """A receiver, and who we are to it.

    Attributes:
        default_path: of a url without one.
        own_headers: in lower case, those that the protocol sets beside those of every request.
        timeout: for connecting, and again for the whole answer.
        headers: sent with each request; they are no place for secrets.
        header_secrets: the headers whose value is a secret, and where each is.
        bearer: where the token of `Authorization: Bearer` is.
    """

    default_path: ClassVar[str] = ""
    own_headers: ClassVar[tuple[str, ...]] = ()

    url: str
    timeout: Duration = Duration(4)
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    header_secrets: dict[str, SecretSettings] = msgspec.field(default_factory=dict)
    bearer: SecretSettings | None = None
    basic: BasicSettings | None = None
    tls: TlsSettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # A message shows its key's value: one about a secret in the wrong place names the key that is the right one.
        if "@" in self.url:
            raise ValueError("basic: user and password outside of url, where an @ of the path is written %40")
        if any(name.lower() in _SECRET_HEADERS for name in self.headers):
            raise ValueError("bearer: the place of a secret, or basic or header_secrets, instead of one in headers")
        _check_url(self.url)
        self._check_headers()
        if not _TIMEOUTS[0] <= self.timeout <= _TIMEOUTS[1]:
            raise ValueError(f"timeout: a duration from {_TIMEOUTS[0]} to {_TIMEOUTS[1]}")
        if self.bearer and self.basic:
            raise ValueError("basic: either bearer or basic")
        if self.secrets and not self.is_private:
            raise ValueError("url: an address with https://, a secret goes over no open connection")
        if self.tls and urlsplit(self.url).scheme != "https":
            raise ValueError("url: an address with https://, which tls is for")

    def _check_headers(self) -> None:
        ours = (*_OUR_HEADERS, *self.own_headers)
        for key, names in (("headers", self.headers.keys()), ("header_secrets", self.header_secrets.keys())):
            if any(name.lower() in ours for name in names):
                raise ValueError(f"{key}: none of {', '.join(ours)}, which hostprobe sets")
        if not all(re.fullmatch("[\t -~]*", value) for value in self.headers.values()) or not all(
            map(_HEADER_NAME.fullmatch, self.headers)
        ):
            raise ValueError("headers: names and values of visible ASCII characters")
        if not all(map(_HEADER_NAME.fullmatch, self.header_secrets)):
            raise ValueError("header_secrets: names of visible ASCII characters")
        others = [*self.headers, *(["Authorization"] if self.bearer or self.basic else [])]
        lower = {name.lower() for name in self.header_secrets}
        if len(lower) < len(self.header_secrets) or lower & {name.lower() for name in others}:
            raise ValueError("header_secrets: headers that are not set elsewhere, each once")

    @property
    def secrets(self) -> dict[str, SecretSettings]:
        """Where the secret is that a header's value is made from, by the header's name."""
        own = self.basic.password if self.basic else self.bearer
        return {**self.header_secrets, **({"Authorization": own} if own else {})}

    @property
    def is_private(self) -> bool:
        """Whether nobody but the peer can read what is sent: it is encrypted, or stays on this host."""
        parts = urlsplit(self.url)
        return parts.scheme == "https" or is_loopback(parts.hostname or "")


class HttpClient:
    """POSTs bodies to one receiver.

    Redirects are not followed and no proxy is asked, so that a secret goes where the configuration says.

    Args:
        kind: of the sink: what errors begin with, and the extra that brings what it needs.
        headers: those of the protocol; the settings' and the secrets are added.

    Attributes:
        notices: what `open` saw that is worth a warning.
        place: the receiver, as errors name it.
    """

    def __init__(self, settings: HttpClientSettings, kind: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(settings.url)
        path = parts.path or settings.default_path
        self.notices: list[str] = []
        self.place = f"{kind} {parts.scheme}://{parts.netloc}{path}"
        self._settings = settings
        self._kind = kind
        self._target = (path or "/") + (f"?{parts.query}" if parts.query else "")
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._secrets: dict[str, Secret] = {}
        self._headers = {**headers, **settings.headers}
        if not any(name.lower() == "user-agent" for name in (*self._headers, *settings.header_secrets)):
            self._headers["User-Agent"] = f"hostprobe/{__version__}"

    def open(self) -> None:
        """Reads what the settings name; connects to nobody yet.

        Raises:
            UsageError: a file or secret is not as it should be, or urllib3 is missing.
        """
        self.close()
        self.notices.clear()
        self._pool = self._new_pool(urlsplit(self._settings.url))
        for name in self._settings.secrets:
            self._read_secret(name)

    def close(self) -> None:
        """Ends the connection; the next `post` opens again."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def post(self, body: bytes) -> Answer:
        """Sends one request, and again where its secret was refused and there is a new one.

        Raises:
            SinkError: there is no answer.
        """
        answer = self._post(body)
        if answer.status in _TRY_NEW_SECRET and self._has_new_secret():
            answer = self._post(body)
        return answer

    def fail(self, answer: Answer, text: str | bytes) -> NoReturn:
        """Raises what an answer means that bids us try again later; `text` is what the peer says of it."""
        raise SinkError(self._line(answer, text), retry_after_seconds=answer.retry_after_seconds)

    def reject(self, answer: Answer, text: str | bytes, each: bool) -> NoReturn:
        """Raises what an answer means that is final; `each` as a RejectedError has it."""
        is_redirect = 300 <= answer.status < 400
        raise RejectedError(self._line(answer, "redirects are not followed" if is_redirect else text), each=each)

    def shown(self, text: str | bytes) -> str:
        """What the peer wrote as a message may show it, without our secrets if it sends them back."""
        hidden = {secret.reveal() for secret in self._secrets.values()}
        for name in self._secrets:
            hidden |= {self._headers[name], self._headers[name].partition(" ")[2]}
        return plain(text, sorted(hidden - {""}, key=len, reverse=True))

    def _line(self, answer: Answer, text: str | bytes) -> str:
        error = f"{self.place}: {answer.status} {self.shown(answer.reason)}".rstrip()
        line = self.shown(text)
        return f"{error}: {line}" if line else error

    def _new_pool(self, parts: SplitResult) -> urllib3.HTTPConnectionPool:
        needed("urllib3", self._kind, f"sinks of type {self._kind} need urllib3")
        import urllib3

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

    def _read_secret(self, header: str) -> None:
        place = self._settings.secrets[header]
        secret = place.read()
        value = secret.reveal()
        if header in self._settings.header_secrets:
            if not re.fullmatch("[!-~]([ -~]*[!-~])?", value):
                raise UsageError(f"{place.place}: it holds what no header can", "visible ASCII characters")
        elif self._settings.basic:
            pair = f"{self._settings.basic.user}:{value}".encode()
            value = f"Basic {base64.b64encode(pair).decode()}"
        elif re.fullmatch("[!-~]+", value):
            value = f"Bearer {value}"
        else:
            raise UsageError(f"{place.place}: it holds what no header can", "a token of visible ASCII characters")
        self._secrets[header] = secret
        self.notices += secret.notices
        self._headers[header] = value

    def _has_new_secret(self) -> bool:
        """Reads the secrets again whose files have changed since: tokens are replaced while agents run."""
        places = self._settings.secrets
        changed = [name for name, secret in self._secrets.items() if places[name].changed_since(secret)]
        try:
            for name in changed:
                self._read_secret(name)
        except UsageError as error:  # half written: what can't be sent now isn't refused for good
            raise SinkError(f"{self.place}: {error}") from None
        return bool(changed)

    def _post(self, body: bytes) -> Answer:
        if self._pool is None:
            self.open()
        assert self._pool is not None
        from urllib3.exceptions import HTTPError

        try:
            answer = self._pool.urlopen(
                "POST", self._target, body, self._headers, redirect=False, preload_content=False, decode_content=False
            )
        except HTTPError as error:
            raise SinkError(f"{self.place}: {failure_text(error, self._settings.timeout)}") from None
        return received(answer)


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


def _is_address(host: str) -> bool:
    try:
        return bool(ip_address(host))
    except ValueError:
        return False
