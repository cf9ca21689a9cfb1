"""The http sink against a real receiver that accepts, refuses, stalls, resets and lies about who it is."""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from urllib3.exceptions import HTTPError

from agent import __version__
from agent.errors import RejectedError, SinkError, UsageError
from agent.mistakes import decode
from agent.serializers.formats import FORMATS
from agent.sinks.http import HttpSettings, HttpSink
from agent.sinks.http_answer import failure_text, retry_after_seconds
from agent.sinks.secret import SecretSettings
from agent.sinks.tls import TlsSettings
from agent.units import Duration
from tests.sinks.http_peer import Answer, HttpPeer, Pki, refused_port

TOKEN = "t0ken/of+Nobody=="
LINES = [b'{"sequence":1}', b'{"sequence":2}', b'{"sequence":3}']
BODY = b'{"sequence":1}\n{"sequence":2}\n{"sequence":3}\n'
SHORT = "200ms"


def settings(url: str, **more: Any) -> HttpSettings:
    return msgspec.convert({"type": "http", "url": url, **more}, HttpSettings, dec_hook=decode)


def deliver(sink: HttpSink, *payloads: bytes) -> None:
    sink.deliver([memoryview(payload) for payload in payloads])


def failure(sink: HttpSink, *payloads: bytes, kind: type[SinkError] = SinkError) -> Any:
    with pytest.raises(SinkError) as caught:
        deliver(sink, *(payloads or LINES))
    assert type(caught.value) is kind
    assert caught.value.delivered == 0
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def opened() -> Iterator[Any]:
    """`opened(url, **settings)`: an open sink, closed after the test."""
    sinks: list[HttpSink] = []

    def make(url: str, **more: Any) -> HttpSink:
        sink = HttpSink(settings(url, **more))
        sinks.append(sink)
        sink.open()
        return sink

    yield make
    for sink in sinks:
        sink.close()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


# What is sent


@pytest.mark.parametrize("gzip", [True, False])
def test_a_batch_is_a_body_of_lines(opened: Any, gzip: bool) -> None:
    with HttpPeer() as peer:
        deliver(opened(peer.url("/in?source=a%20b"), gzip=gzip), *LINES)
    (request,) = peer.requests
    assert request.line == "POST /in?source=a%20b HTTP/1.1"
    assert request.body == BODY
    assert request.headers == {
        "Host": f"127.0.0.1:{peer.port}",
        "Accept-Encoding": "identity",
        "Content-Length": str(len(request.raw)),
        "Content-Type": "application/x-ndjson",
        "User-Agent": f"hostprobe/{__version__}",
        **({"Content-Encoding": "gzip"} if gzip else {}),
    }


@pytest.mark.parametrize("gzip", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_brings_its_content_type_and_terminator(opened: Any, name: str, gzip: bool) -> None:
    with HttpPeer() as peer:
        deliver(opened(peer.url(), format=name, gzip=gzip), b"one", b"two")
    is_stream = name in ("msgpack", "otlp", "remote_write")  # whose payloads are not lines
    assert peer.bodies == [b"onetwo" if is_stream else b"one\ntwo\n"]
    assert peer.requests[0].headers["Content-Type"] == FORMATS[name].content_type  # type: ignore[index]


def test_gzip_is_the_default_and_makes_it_smaller(opened: Any) -> None:
    with HttpPeer() as peer:
        deliver(opened(peer.url()), *(LINES * 100))
    assert peer.bodies == [BODY * 100]
    assert len(peer.requests[0].raw) < len(BODY * 100) / 10


def test_an_empty_payload_is_a_line(opened: Any) -> None:
    with HttpPeer() as peer:
        for gzip in (True, False):
            deliver(opened(peer.url(), gzip=gzip), b"one", b"", b"three")
    assert peer.bodies == [b"one\n\nthree\n"] * 2


def test_a_large_batch_arrives_whole(opened: Any) -> None:
    noise = [base64.b64encode(os.urandom(3 << 18)) for _ in range(4)]
    with HttpPeer() as peer:
        for gzip in (True, False):
            deliver(opened(peer.url(), gzip=gzip), *noise)
    assert peer.bodies == [b"".join(line + b"\n" for line in noise)] * 2


def test_own_headers(opened: Any) -> None:
    with HttpPeer() as peer:
        deliver(opened(peer.url(), headers={"X-Scope": "one two", "user-agent": "else"}), b"x")
    headers = peer.requests[0].headers
    assert (headers["X-Scope"], headers["user-agent"]) == ("one two", "else")
    assert "User-Agent" not in headers


def test_an_address_without_a_path(opened: Any) -> None:
    with HttpPeer() as peer:
        deliver(opened(peer.url("")), b"x")
        deliver(opened(peer.url("?a=b")), b"x")
    assert [request.line for request in peer.requests] == ["POST / HTTP/1.1", "POST /?a=b HTTP/1.1"]


def test_an_ipv6_address(opened: Any) -> None:
    try:
        peer = HttpPeer(host="::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with peer:
        deliver(opened(peer.url(host="[::1]")), b"x")
    assert peer.requests[0].headers["Host"] == f"[::1]:{peer.port}"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_schemes_own_port(opened: Any, pki: Pki, scheme: str) -> None:
    secure = scheme == "https"
    try:
        peer = HttpPeer(host="::1", port=443 if secure else 80, tls=pki.server("::1") if secure else None)
    except OSError as error:
        pytest.skip(f"the port or IPv6 is not ours here: {error}")
    with peer:
        deliver(opened(f"{scheme}://[::1]/", **({"tls": {"ca": pki.ca}} if secure else {})), b"x")
    assert peer.bodies == [b"x\n"]
    assert peer.requests[0].headers["Host"] == "[::1]"


def test_no_proxy_is_asked(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused_port() as port, HttpPeer() as peer:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        deliver(opened(peer.url()), b"x")
    assert peer.bodies == [b"x\n"]


# Connections


def test_one_connection_for_all_batches(opened: Any) -> None:
    answers = [Answer(status=status, body=b"why" * 100) for status in (200, 202, 503, 400, 429, 302)]
    answers += [Answer(204, headers={"Content-Length": "0"}), Answer(way="byte by byte", body=b"ok")]
    with HttpPeer(*answers) as peer:
        sink = opened(peer.url())
        for number in range(20):
            try:
                deliver(sink, b"%d" % number)
            except SinkError:
                assert number in (2, 3, 4, 5)
    assert peer.bodies == [b"%d\n" % number for number in range(20)]
    assert peer.connections == 1


def test_the_constructor_does_nothing_and_open_needs_no_peer(opened: Any) -> None:
    with refused_port() as port:
        HttpSink(settings(f"http://127.0.0.1:{port}/")).close()
        opened(f"http://127.0.0.1:{port}/")


def test_close_can_be_called_twice_and_delivery_opens_again(opened: Any) -> None:
    with HttpPeer() as peer:
        sink = opened(peer.url())
        deliver(sink, b"one")
        sink.close()
        sink.close()
        deliver(sink, b"two")
    assert peer.bodies == [b"one\n", b"two\n"]
    assert peer.connections == 2


def test_a_connection_that_was_closed_while_idle_is_replaced(opened: Any) -> None:
    with HttpPeer(Answer(way="close after")) as peer:
        sink = opened(peer.url())
        deliver(sink, b"one")
        assert peer.closed_a_connection.wait(10)
        deliver(sink, b"two")
    assert peer.bodies == [b"one\n", b"two\n"]
    assert peer.connections == 2


def test_a_kept_connection_that_dies_under_a_request(opened: Any) -> None:
    with HttpPeer(Answer(), Answer(way="close")) as peer:
        sink = opened(peer.url())
        deliver(sink, b"one")
        error = failure(sink, b"two")
        assert str(error) == f"http {peer.url()}: connection closed without an answer"
        assert error.retry_after_seconds is None
        deliver(sink, b"two")
    assert peer.bodies == [b"one\n", b"two\n", b"two\n"]
    assert peer.connections == 2


def test_a_peer_that_goes_and_comes_back(opened: Any) -> None:
    with HttpPeer() as peer:
        sink = opened(peer.url())
        deliver(sink, b"one")
    for _ in range(3):
        assert str(failure(sink, b"two")) == f"http {peer.url()}: Connection refused"
    with HttpPeer(port=peer.port) as again:
        deliver(sink, b"two")
    assert again.bodies == [b"two\n"]


def test_refused(opened: Any) -> None:
    with refused_port() as port:
        sink = opened(f"http://127.0.0.1:{port}/in?key=value")
        assert str(failure(sink)) == f"http http://127.0.0.1:{port}/in: Connection refused"


def test_a_host_that_does_not_exist(opened: Any) -> None:
    reason = str(failure(opened("http://nowhere.invalid/in")))
    assert reason.startswith("http http://nowhere.invalid/in: ")
    assert "name" in reason.lower()
    assert len(reason) < 100


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(way="reset"), "Connection reset by peer"),
        (Answer(way="stall"), "timed out after 200ms"),
        (Answer(way="close"), "connection closed without an answer"),
        (Answer(headers={"X": "y" * 100}, way="half a head"), "connection closed in the middle of an answer"),
        (Answer(raw=b"HTTP/1.1 200 OK", way="close after"), "connection closed in the middle of an answer"),
        (Answer(raw=b"220 mail.example ESMTP\r\n", way="close after"), "no HTTP answer: BadStatusLine"),
        (Answer(raw=b"HTTP/1.1 200 " + b"x" * 70_000, way="close after"), "no HTTP answer: LineTooLong"),
        (Answer(raw=b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200, way="close after"), "no HTTP answer: HTTPException"),
        # A trickle that no single read's timeout would end: 200 ms is for the whole answer.
        (Answer(headers={"X": "y" * 1000}, way="byte by byte", pause_seconds=0.02), "timed out after 200ms"),
        (Answer(headers={f"X{n}": "y" * 60_000 for n in range(5)}, way="byte by byte"), "timed out after 200ms"),
    ],
)
def test_no_answer_is_a_failure_and_the_next_try_works(opened: Any, answer: Answer, reason: str) -> None:
    with HttpPeer(answer) as peer:
        sink = opened(peer.url(), timeout=SHORT)
        assert str(failure(sink)) == f"http {peer.url()}: {reason}"
        deliver(sink, *LINES)
    assert peer.bodies == [BODY, BODY]


def test_an_unknown_failure_is_named_by_its_kind() -> None:
    assert failure_text(HTTPError("at 0x7f"), Duration(1)) == "HTTPError"


def test_a_peer_that_takes_no_connection(opened: Any) -> None:
    """Its queue is full: the kernel leaves the next handshake unanswered."""
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        held = []
        for _ in range(4):
            held.append(socket.socket())
            held[-1].setblocking(False)
            held[-1].connect_ex(server.getsockname())
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert str(failure(opened(url, timeout=SHORT))) == f"http {url}: timed out after 200ms"
        for client in held:
            client.close()


def test_a_peer_that_does_not_read(opened: Any) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        error = failure(opened(url, timeout=SHORT, gzip=False), bytes(32 << 20))
        assert str(error) == f"http {url}: timed out after 200ms"


def test_a_slow_answer_is_an_answer(opened: Any) -> None:
    with HttpPeer(Answer(body=b"taken", way="byte by byte")) as peer:
        deliver(opened(peer.url()), *LINES)
    assert peer.bodies == [BODY]


@pytest.mark.parametrize("way", ["half a body", "stall in the body"])
def test_the_status_is_the_acknowledgement(opened: Any, way: Any) -> None:
    """What follows it costs the connection at most: sending the batch again would repeat it."""
    with HttpPeer(Answer(body=b"x" * 1000, way=way), Answer(503, body=b"x" * 1000, way=way)) as peer:
        sink = opened(peer.url(), timeout=SHORT)
        deliver(sink, b"one")
        assert str(failure(sink, b"two")).endswith("503 Said")
        deliver(sink, b"two")
    assert peer.bodies == [b"one\n", b"two\n", b"two\n"]
    assert peer.connections == 3


def test_an_endless_body_is_not_read(opened: Any) -> None:
    with HttpPeer(Answer(body=bytes(8 << 20)), Answer(400, body=b"no" * (4 << 20))) as peer:
        sink = opened(peer.url())
        deliver(sink, b"one")
        assert len(str(failure(sink, b"two", kind=RejectedError))) < 300
        deliver(sink, b"three")
    assert peer.connections == 3


def test_an_interim_answer_is_not_taken_for_the_next_ones(opened: Any) -> None:
    """103 and then 200: were the connection kept, the second batch would be acknowledged by the first's 200."""
    early = Answer(raw=b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    proceed = Answer(raw=b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    with HttpPeer(early, Answer(503), proceed) as peer:
        sink = opened(peer.url())
        assert str(failure(sink, b"one")).endswith(": 103 Early Hints")
        assert str(failure(sink, b"one")).endswith(": 503 Said")
        deliver(sink, b"one")
    assert peer.connections == 2


# Statuses


@pytest.mark.parametrize("status", [200, 201, 202, 204, 206, 299])
def test_taken(opened: Any, status: int) -> None:
    with HttpPeer(Answer(status)) as peer:
        deliver(opened(peer.url()), *LINES)
    assert peer.bodies == [BODY]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 507, 599, 600, 999])
def test_tried_again(opened: Any, status: int) -> None:
    with HttpPeer(Answer(status, "Not Now", body=b"a line")) as peer:
        sink = opened(peer.url("/in?key=value"))
        error = failure(sink)
        assert str(error) == f"http {peer.url()}: {status} Not Now"
        assert error.retry_after_seconds is None
        deliver(sink, *LINES)
    assert peer.bodies == [BODY, BODY]


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 409, 410, 413, 415, 422, 431, 451])
def test_rejected(opened: Any, status: int) -> None:
    with HttpPeer(*[Answer(status, "No", body=b"field cpu: unknown\nmore")] * 2) as peer:
        sink = opened(peer.url())
        error = failure(sink, kind=RejectedError)
        assert str(error) == f"http {peer.url()}: {status} No: field cpu: unknown"
        assert error.each == (status in (400, 413, 422))
        assert not failure(sink, b"one alone", kind=RejectedError).each
    assert len(peer.requests) == 2


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 307, 308])
def test_a_redirect_is_not_followed(opened: Any, status: int, token_file: Path) -> None:
    with HttpPeer() as other, HttpPeer(Answer(status, headers={"Location": other.url()})) as peer:
        error = failure(opened(peer.url(), bearer={"file": str(token_file)}), kind=RejectedError)
        assert str(error) == f"http {peer.url()}: {status} Said: redirects are not followed"
        assert not error.each
    assert other.requests == []
    assert len(peer.requests) == 1


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b"", ""),
        (b"\n\n", ""),
        (b"\r\n  first \r\nsecond", ": first"),
        (b"\xff\xfe broken", ": \ufffd\ufffd broken"),
        ("größer".encode(), ": größer"),
        (b"a\x1b[31mb\x07\x00\x85c\tde", ": a[31mb\ufffdcde"),
        ("\u202eevil\u2028".encode(), ": evil"),
        (b"x" * 300, ": " + "x" * 200),
    ],
)
def test_the_line_that_says_why(opened: Any, body: bytes, shown: str) -> None:
    with HttpPeer(Answer(400, "No", body=body)) as peer:
        assert str(failure(opened(peer.url()), kind=RejectedError)) == f"http {peer.url()}: 400 No{shown}"


def test_a_reason_is_cleaned_too_and_may_be_absent(opened: Any) -> None:
    with HttpPeer(Answer(503, "Not\x1b[1m Now"), Answer(503, "")) as peer:
        sink = opened(peer.url())
        assert str(failure(sink)) == f"http {peer.url()}: 503 Not[1m Now"
        assert str(failure(sink)) == f"http {peer.url()}: 503"


@pytest.mark.parametrize("status", [408, 429, 503])
@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("7", 7), (" 7 ", 7), ("86400", 3600), ("soon", None), ("-7", None)]
)
def test_retry_after(opened: Any, status: int, text: str, seconds: float | None) -> None:
    with HttpPeer(Answer(status, headers={"Retry-After": text})) as peer:
        assert failure(opened(peer.url())).retry_after_seconds == seconds


NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (format_datetime(NOW.replace(minute=2), usegmt=True), 120),
        ("Sat, 21 Nov 2026 12:00:30 GMT", 30),
        ("Saturday, 21-Nov-26 12:00:30 GMT", 30),
        ("Sat Nov 21 12:00:30 2026", 30),
        ("Sat, 21 Nov 2026 11:59:30 GMT", 0),
        ("Sun, 22 Nov 2026 12:00:00 GMT", 3600),
        ("9" * 400, 3600),
        ("", None),
        ("٣", None),
        ("1.5", None),
        ("1e3", None),
        ("inf", None),
        ("Sat, 31 Feb 2026 12:00:00 GMT", None),
    ],
)
def test_retry_after_as_a_date(text: str, seconds: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Pacific/Kiritimati")  # no date is of this zone
    time.tzset()
    try:
        assert retry_after_seconds(text, NOW.timestamp()) == seconds
    finally:
        monkeypatch.undo()
        time.tzset()


def test_retry_after_as_a_date_by_the_clock(opened: Any) -> None:
    with HttpPeer(Answer(429, headers={"Retry-After": "Fri, 21 Nov 1980 12:00:00 GMT"})) as peer:
        assert failure(opened(peer.url())).retry_after_seconds == 0


@given(st.text(st.characters(codec="ascii")) | st.from_regex(r"\w{3}, \d+ \w{3} \d+ \d+:\d+:\d+ [+-]?\w+"))
def test_no_retry_after_is_too_odd(text: str) -> None:
    seconds = retry_after_seconds(text, NOW.timestamp())
    assert seconds is None or 0 <= seconds <= 3600


# TLS


def test_verified(opened: Any, pki: Pki) -> None:
    with HttpPeer(tls=pki.server("127.0.0.1")) as peer:
        sink = opened(peer.url(), tls={"ca": pki.ca})
        deliver(sink, *LINES)
        deliver(sink, *LINES)
    assert peer.bodies == [BODY, BODY]
    assert peer.connections == 1


def test_the_systems_authorities_are_the_default(opened: Any, pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", pki.ca)
    with HttpPeer(tls=pki.server("127.0.0.1")) as peer:
        deliver(opened(peer.url()), *LINES)
    assert peer.bodies == [BODY]


def test_a_server_name_in_place_of_the_addresses(opened: Any, pki: Pki) -> None:
    with HttpPeer(tls=pki.server("receiver.example")) as peer:
        deliver(opened(peer.url(), tls={"ca": pki.ca, "server_name": "receiver.example"}), *LINES)
    assert peer.bodies == [BODY]


@pytest.mark.parametrize(
    ("names", "tls", "reason"),
    [
        (["127.0.0.1"], {}, "certificate verify failed: "),
        (
            ["other.example"],
            {"ca": "ca.pem"},
            "certificate verify failed: IP address mismatch, certificate is not valid for '127.0.0.1'",
        ),
        (
            ["127.0.0.1"],
            {"ca": "ca.pem", "server_name": "other.example"},
            "certificate verify failed: Hostname mismatch, certificate is not valid for 'other.example'",
        ),
    ],
)
def test_an_unverified_peer_never_sees_the_secret(
    opened: Any, pki: Pki, token_file: Path, names: list[str], tls: dict[str, str], reason: str
) -> None:
    if "ca" in tls:
        tls = {**tls, "ca": pki.ca}
    with HttpPeer(tls=pki.server(*names)) as peer:
        sink = opened(peer.url(), tls=tls, bearer={"file": str(token_file)})
        for _ in range(2):
            assert str(failure(sink)).startswith(f"http {peer.url()}: {reason}")
    assert peer.requests == []
    assert len(peer.refused_handshakes) == peer.connections == 2


def test_a_self_signed_certificate(opened: Any, pki: Pki) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with trustme.Blob(pki.authority.private_key_pem.bytes() + pki.authority.cert_pem.bytes()).tempfile() as path:
        context.load_cert_chain(path)
    with HttpPeer(tls=context) as peer:
        reason = f"http {peer.url()}: certificate verify failed: self-signed certificate"
        assert str(failure(opened(peer.url()))).startswith(reason)
    assert peer.requests == []


def test_a_peer_without_tls_never_sees_the_secret(opened: Any, token_file: Path) -> None:
    with HttpPeer() as peer:
        url = f"https://127.0.0.1:{peer.port}/"
        error = failure(opened(url, bearer={"file": str(token_file)}))
    assert str(error).startswith(f"http {url}: TLS: ")
    assert peer.requests == []


def test_an_old_version_of_tls(opened: Any, pki: Pki) -> None:
    context = pki.server("127.0.0.1")
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="deprecated"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with HttpPeer(tls=context) as peer:
        assert ": TLS: " in str(failure(opened(peer.url(), tls={"ca": pki.ca})))
    assert peer.requests == []


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_certificate(opened: Any, pki: Pki, version: ssl.TLSVersion) -> None:
    context = pki.server("127.0.0.1")
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = version
    pki.authority.configure_trust(context)
    with HttpPeer(tls=context) as peer:
        assert str(failure(opened(peer.url(), tls={"ca": pki.ca}))).startswith(f"http {peer.url()}: ")
        assert peer.requests == []
        deliver(opened(peer.url(), tls={"ca": pki.ca, **pki.client()}), *LINES)
    (request,) = peer.requests
    assert request.client_certificate is not None
    assert ("commonName", "agent") in [pair for pairs in request.client_certificate["subject"] for pair in pairs]
    assert peer.refused_handshakes == ["PEER_DID_NOT_RETURN_A_CERTIFICATE"]


def test_files_that_are_wrong_stop_the_start(pki: Pki, tmp_path: Path) -> None:
    for tls, reason in (
        ({"ca": str(tmp_path / "absent")}, f'ca "{tmp_path}/absent": No such file or directory'),
        ({"ca": pki.client()["key"]}, "no certificate in it"),
    ):
        with pytest.raises(UsageError, match=reason):
            HttpSink(settings("https://127.0.0.1/", tls=tls)).open()


# Secrets


def test_a_bearer_token(opened: Any, token_file: Path) -> None:
    with HttpPeer() as peer:
        deliver(opened(peer.url(), bearer={"file": str(token_file)}), *LINES)
    assert peer.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


def test_basic_authentication(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", "pass:wörd")
    with HttpPeer() as peer:
        deliver(opened(peer.url(), basic={"user": "añent", "password": {"env": "PASSWORD"}}), *LINES)
    expected = base64.b64encode("añent:pass:wörd".encode()).decode()
    assert peer.requests[0].headers["Authorization"] == f"Basic {expected}"


def test_over_tls(opened: Any, pki: Pki, token_file: Path) -> None:
    with HttpPeer(tls=pki.server("127.0.0.1")) as peer:
        deliver(opened(peer.url(), tls={"ca": pki.ca}, bearer={"file": str(token_file)}), *LINES)
    assert peer.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_a_secret_that_the_peer_sends_back_is_blanked(opened: Any, token_file: Path, status: int) -> None:
    encoded = base64.b64encode(f"u:{TOKEN}".encode()).decode()
    echo = f"who is Bearer {TOKEN}, Basic {encoded}? " + "x" * 170 + TOKEN
    inserted = f"{TOKEN[:4]}\x01{TOKEN[4:]}"
    for section in (
        {"bearer": {"file": str(token_file)}},
        {"basic": {"user": "u", "password": {"file": str(token_file)}}},
    ):
        answers = [Answer(status, f"No {TOKEN}", body=echo.encode()), Answer(status, "No", body=inserted.encode())]
        with HttpPeer(*answers) as peer:
            sink = opened(peer.url(), **section)
            for _ in range(2):
                with pytest.raises(SinkError) as caught:
                    deliver(sink, *LINES)
                assert "***" in str(caught.value) or status == 500
                assert TOKEN[:5] not in str(caught.value)
                if "basic" in section:
                    assert encoded not in str(caught.value)


def test_settings_and_errors_hold_no_secret(opened: Any, token_file: Path) -> None:
    token_file.chmod(0o644)
    with refused_port() as port:
        sink = opened(f"http://127.0.0.1:{port}/", bearer={"file": str(token_file)})
        made = settings(f"http://127.0.0.1:{port}/", bearer={"file": str(token_file)})
        texts = [
            repr(made),
            str(failure(sink)),
            repr(sink),
            *sink.notices,
            msgspec.json.encode(made, enc_hook=str).decode(),
        ]
    assert sink.notices == [f'"{token_file}" holds a secret and is world-readable, mode 0644: expected 0600']
    assert not [text for text in texts if TOKEN in text]
    assert json.loads(texts[-1])["bearer"] == {"file": str(token_file), "env": "", "credential": ""}


def test_notices_are_those_of_the_last_opening(opened: Any, token_file: Path, pki: Pki) -> None:
    client = pki.client()
    Path(client["key"]).chmod(0o644)
    token_file.chmod(0o644)
    sink = opened("https://127.0.0.1/", bearer={"file": str(token_file)}, tls=client)
    assert len(sink.notices) == 2
    token_file.chmod(0o600)
    sink.open()
    assert len(sink.notices) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "it is empty: expected a secret"),
        ("two words", "it holds what no header can: expected a token of visible ASCII characters"),
        ("grün", "it holds what no header can: expected a token of visible ASCII characters"),
    ],
)
def test_a_token_that_is_none_stops_the_start(token_file: Path, content: str, reason: str) -> None:
    token_file.write_text(content)
    with pytest.raises(UsageError) as caught:
        HttpSink(settings("https://127.0.0.1/", bearer={"file": str(token_file)})).open()
    assert str(caught.value) == f'file "{token_file}": {reason}'


def replace(path: Path, text: str) -> None:
    new = path.with_name("new")
    new.write_text(text)
    new.chmod(0o600)
    new.rename(path)


@pytest.mark.parametrize("status", [401, 403])
def test_a_new_token_is_taken_without_a_restart(opened: Any, token_file: Path, status: int) -> None:
    with HttpPeer(Answer(), Answer(), Answer(status), Answer(), Answer(status)) as peer:
        sink = opened(peer.url(), bearer={"file": str(token_file)})
        deliver(sink, b"1")
        replace(token_file, "another")
        deliver(sink, b"2")  # the old one still does, nobody reads the file
        deliver(sink, b"3")
        failure(sink, b"4", kind=RejectedError)  # the file is the same: once is enough
    sent = [(request.headers["Authorization"], request.body) for request in peer.requests]
    old, new = f"Bearer {TOKEN}", "Bearer another"
    assert sent == [(old, b"1\n"), (old, b"2\n"), (old, b"3\n"), (new, b"3\n"), (new, b"4\n")]


def test_a_new_token_that_is_refused_as_well(opened: Any, token_file: Path) -> None:
    with HttpPeer(Answer(401), Answer(401, body=b"who is another?")) as peer:
        sink = opened(peer.url(), bearer={"file": str(token_file)})
        replace(token_file, "another")
        assert str(failure(sink, kind=RejectedError)).endswith(": 401 Said: who is ***?")
    assert len(peer.requests) == 2


def test_while_a_token_is_being_replaced_nothing_is_rejected(opened: Any, token_file: Path) -> None:
    with HttpPeer(Answer(401), Answer(401), Answer(401)) as peer:
        sink = opened(peer.url(), bearer={"file": str(token_file)})
        token_file.unlink()
        reason = f'http {peer.url()}: file "{token_file}": No such file or directory'
        assert str(failure(sink)).startswith(reason)
        token_file.write_text("")
        assert str(failure(sink)) == f'http {peer.url()}: file "{token_file}": it is empty: expected a secret'
        token_file.write_text("another")
        deliver(sink, *LINES)
    assert peer.requests[-1].headers["Authorization"] == "Bearer another"


def test_a_token_of_the_environment_is_read_once(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "one")
    with HttpPeer(Answer(401)) as peer:
        sink = opened(peer.url(), bearer={"env": "TOKEN"})
        failure(sink, kind=RejectedError)
    assert len(peer.requests) == 1


# Settings


def test_defaults() -> None:
    made = settings("https://host.example")
    assert (made.timeout, made.gzip, made.headers) == (4, True, {})
    assert (made.bearer, made.basic, made.tls) == (None, None, None)


PLACE = {"env": "TOKEN"}


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({}, "required field `url`"),
        ({"url": "https://h", "bearer": PLACE, "basic": {"user": "u", "password": PLACE}}, "basic: either bearer or"),
        ({"url": "http://h.example", "bearer": PLACE}, "url: an address with https://, a secret goes over no open"),
        ({"url": "http://h", "basic": {"user": "u", "password": PLACE}}, "url: an address with https://, a secret"),
        ({"url": "http://10.0.0.1", "bearer": PLACE}, "url: an address with https://, a secret"),
        ({"url": "http://localhost.example", "bearer": PLACE}, "url: an address with https://, a secret"),
        ({"url": "http://[2001:db8::1]", "bearer": PLACE}, "url: an address with https://, a secret"),
        ({"url": "http://127.0.0.1", "tls": {}}, "url: an address with https://, which tls is for"),
        ({"url": "https://h#part"}, "url: an address without a fragment"),
        ({"url": "https://h/#"}, "url: an address without a fragment"),
        ({"url": "https://u:p@h"}, "basic: user and password outside of url"),
        ({"url": "u:p@h"}, "basic: user and password outside of url"),
        ({"url": "https://h", "timeout": "0s"}, "timeout: a duration from 1ms to 1h"),
        ({"url": "https://h", "timeout": "2h"}, "timeout: a duration from 1ms to 1h"),
        ({"url": "https://h", "headers": {"authorization": "x"}}, "bearer: the place of a secret"),
        ({"url": "https://h", "headers": {"Cookie": "x"}}, "bearer: the place of a secret"),
        ({"url": "https://h", "headers": {"Content-type": "x"}}, "headers: none of content-encoding, content-length"),
        ({"url": "https://h", "headers": {"Host": "x"}}, "headers: none of content-encoding"),
        ({"url": "https://h", "headers": {"Transfer-Encoding": "x"}}, "headers: none of content-encoding"),
        ({"url": "https://h", "headers": {"X": "a\nY: b"}}, "headers: names and values of visible ASCII"),
        ({"url": "https://h", "headers": {"X": "ü"}}, "headers: names and values of visible ASCII"),
        ({"url": "https://h", "headers": {"X Y": "a"}}, "headers: names and values of visible ASCII"),
        ({"url": "https://h", "headers": {"": "a"}}, "headers: names and values of visible ASCII"),
        ({"url": "https://h", "headers": {"X:": "a"}}, "headers: names and values of visible ASCII"),
        ({"url": "https://h", "basic": {"user": "a:b", "password": PLACE}}, 'user: a name without ":"'),
        ({"url": "https://h", "basic": {"user": "", "password": PLACE}}, 'user: a name without ":"'),
        ({"url": "https://h", "bearer": {}}, "file: exactly one of"),
        ({"url": "https://h", "tls": {"key": "/x"}}, "certificate: the certificate that key belongs to"),
        ({"url": "https://h", "verify": False}, "unknown field `verify`"),
    ],
)
def test_settings_that_are_wrong(tree: dict[str, object], reason: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert({"type": "http", **tree}, HttpSettings, dec_hook=decode)


@pytest.mark.parametrize(
    "url",
    [
        *("", "host", "host:80/in", "ftp://h/", "https:/h", "https:///in", "https://:80/", "https://h:0/"),
        *("https://h:65536/", "https://h:x/", "https://[::1/", "https://[::g]/", "https://h h/", "https://h/\n"),
        *("https://h/ü", "https://ü/", "https://h%20/", "https://h\\x/", "https://-./", "https:// "),
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match=r'^url: an address such as "https://host:8080/path"$'):
        HttpSettings(url=url)


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "HTTPS://h",
        "https://h.example./in",
        "https://a-b_c.d:8080/in?x=y",
        "http://10.0.0.1",
        "https://[::1]:8",
    ],
)
def test_addresses(url: str) -> None:
    assert HttpSettings(url=url).url == url


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.1.2.3:8080", "[::1]:80"])
def test_a_secret_may_go_to_this_host_in_the_open(host: str) -> None:
    HttpSettings(url=f"http://{host}/in", bearer=SecretSettings(env="TOKEN"))


def test_tls_settings_are_for_https() -> None:
    assert HttpSettings(url="https://h", tls=TlsSettings()).tls == TlsSettings()


def test_without_urllib3() -> None:
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'urllib3':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from agent.errors import UsageError\n"
        "from agent.sinks.http import HttpSettings, HttpSink\n"
        "sink = HttpSink(HttpSettings(type='http', url='http://127.0.0.1/'))\n"
        "try:\n    sink.open()\n"
        "except UsageError as error:\n    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-B", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert run.stderr == ""
    assert run.stdout == 'sinks of type http need urllib3: expected pip install "hostprobe[http]"\n'


def test_no_descriptor_is_kept(opened: Any) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("counts /proc/self/fd")
    before = len(os.listdir("/proc/self/fd"))
    with HttpPeer(*[Answer(way="close after"), Answer(way="reset"), Answer(status=103), Answer(503)] * 10) as peer:
        sink = opened(peer.url())
        for _ in range(40):
            with suppress(SinkError):
                deliver(sink, *LINES)
        sink.close()
    assert len(peer.requests) > 20
    assert len(os.listdir("/proc/self/fd")) == before
