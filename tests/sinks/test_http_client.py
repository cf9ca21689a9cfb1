"""What holds for every sink over HTTP: its secrets, whom it trusts, and what it makes of a peer without an answer."""

from __future__ import annotations

import gc
import ssl
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent import discovery
from agent.errors import RejectedError, SinkError, UsageError
from agent.mistakes import decode
from agent.sinks.http_client import HttpClientSettings
from tests.sinks.http_peer import Answer, HttpPeer, Pki, refused_port

KINDS = ["http", "remote_write", "otlp"]
KEY = "k3y/of+Nobody=="
PAYLOAD = b"\x12\x00"  # an unknown or empty field: a whole message for each of the protobuf formats
BODIES = {"http": PAYLOAD + b"\n", "remote_write": PAYLOAD, "otlp": PAYLOAD}
SHORT = "200ms"


def settings(kind: str, url: str, **more: Any) -> HttpClientSettings:
    tree = {"type": kind, "url": url, **more}
    made: HttpClientSettings = msgspec.convert(tree, discovery.load("sinks", kind).Settings, dec_hook=decode)
    return made


def deliver(sink: Any, *payloads: bytes) -> None:
    sink.deliver([memoryview(payload) for payload in payloads or [PAYLOAD]])


def failure(sink: Any, kind: type[SinkError] = SinkError) -> Any:
    with pytest.raises(SinkError) as caught:
        deliver(sink)
    assert type(caught.value) is kind
    return caught.value


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def opened(kind: str) -> Iterator[Any]:
    """`opened(url, **settings)`: an open sink of each kind, closed after the test."""
    sinks: list[Any] = []

    def make(url: str, **more: Any) -> Any:
        sinks.append(discovery.load("sinks", kind)(settings(kind, url, **more)))
        sinks[-1].open()
        return sinks[-1]

    yield make
    for sink in sinks:
        sink.close()


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    write(path, KEY)
    return path


def write(path: Path, text: str) -> None:
    """Replaces a secret as a tool that rotates it would."""
    new = path.with_name("new")
    new.write_text(text + "\n")
    new.chmod(0o600)
    new.rename(path)


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


# Connections


def test_one_connection_and_a_new_one_after_close(opened: Any, kind: str) -> None:
    with HttpPeer() as peer:
        sink = opened(peer.url())
        deliver(sink)
        deliver(sink)
        sink.close()
        sink.close()
        deliver(sink)
    assert peer.bodies == [BODIES[kind]] * 3
    assert peer.connections == 2


def test_delivery_opens_what_nobody_has_opened(kind: str) -> None:
    with HttpPeer() as peer:
        sink = discovery.load("sinks", kind)(settings(kind, peer.url()))
        deliver(sink)
        sink.close()
    assert peer.bodies == [BODIES[kind]]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(way="reset"), "Connection reset by peer"),
        (Answer(way="stall"), "timed out after 200ms"),
        (Answer(way="close"), "connection closed without an answer"),
        (Answer(headers={"X": "y" * 1000}, way="byte by byte", pause_seconds=0.02), "timed out after 200ms"),
        (Answer(status=103), "103 Said"),
    ],
)
def test_no_answer_is_a_failure_and_the_next_try_works(opened: Any, kind: str, answer: Answer, reason: str) -> None:
    with HttpPeer(answer) as peer:
        sink = opened(peer.url(), timeout=SHORT)
        assert str(failure(sink)) == f"{kind} {peer.url()}: {reason}"
        deliver(sink)
    assert peer.bodies == [BODIES[kind]] * 2


def test_a_peer_that_goes_and_comes_back(opened: Any, kind: str) -> None:
    with HttpPeer() as peer:
        sink = opened(peer.url())
        deliver(sink)
    assert str(failure(sink)) == f"{kind} {peer.url()}: Connection refused"
    with HttpPeer(port=peer.port) as again:
        deliver(sink)
    assert again.bodies == [BODIES[kind]]


def test_a_redirect_is_not_followed(opened: Any, kind: str, key_file: Path) -> None:
    with HttpPeer() as other, HttpPeer(Answer(307, headers={"Location": other.url()})) as peer:
        sink = opened(peer.url(), header_secrets={"X-Api-Key": {"file": str(key_file)}})
        error = failure(sink, RejectedError)
    assert str(error) == f"{kind} {peer.url()}: 307 Said: redirects are not followed"
    assert other.requests == []


# TLS


def test_a_client_certificate(opened: Any, pki: Pki, key_file: Path) -> None:
    context = pki.server("127.0.0.1")
    pki.authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    with HttpPeer(tls=context) as peer:
        failure(opened(peer.url(), tls={"ca": pki.ca}))
        assert peer.requests == []
        sink = opened(
            peer.url(), tls={"ca": pki.ca, **pki.client()}, header_secrets={"X-Api-Key": {"file": str(key_file)}}
        )
        deliver(sink)
    (request,) = peer.requests
    assert request.client_certificate is not None
    assert ("commonName", "agent") in [pair for pairs in request.client_certificate["subject"] for pair in pairs]
    assert request.headers["X-Api-Key"] == KEY
    assert peer.refused_handshakes == ["PEER_DID_NOT_RETURN_A_CERTIFICATE"]


def test_an_unverified_peer_never_sees_the_secret(opened: Any, kind: str, pki: Pki, key_file: Path) -> None:
    with HttpPeer(tls=pki.server("other.example")) as peer:
        sink = opened(peer.url(), tls={"ca": pki.ca}, header_secrets={"X-Api-Key": {"file": str(key_file)}})
        assert str(failure(sink)).startswith(f"{kind} {peer.url()}: certificate verify failed: IP address mismatch")
    assert peer.requests == []


# Secrets


def test_secrets_in_headers_of_their_own(opened: Any, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCOPE", "ApiKey of two words")
    places = {"X-Api-Key": {"file": str(key_file)}, "Authorization": {"env": "SCOPE"}}
    with HttpPeer() as peer:
        deliver(opened(peer.url(), header_secrets=places, headers={"X-Scope": "all"}))
    headers = peer.requests[0].headers
    assert headers["X-Api-Key"] == KEY
    assert headers["Authorization"] == "ApiKey of two words"
    assert headers["X-Scope"] == "all"


def test_a_secret_in_a_header_that_we_would_set(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", KEY)
    with HttpPeer() as peer:
        deliver(opened(peer.url(), header_secrets={"user-agent": {"env": "KEY"}}))
    assert peer.requests[0].headers["user-agent"] == KEY
    assert "User-Agent" not in peer.requests[0].headers


def test_a_secret_in_a_header_beside_a_bearer_token(opened: Any, key_file: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    write(token, "t0ken")
    more = {"bearer": {"file": str(token)}, "header_secrets": {"X-Api-Key": {"file": str(key_file)}}}
    with HttpPeer(Answer(), Answer(401, body=f"{KEY} t0ken".encode())) as peer:
        sink = opened(peer.url(), **more)
        deliver(sink)
        assert str(failure(sink, RejectedError)).endswith(": 401 Said: *** ***")
    assert peer.requests[0].headers["Authorization"] == "Bearer t0ken"
    assert peer.requests[0].headers["X-Api-Key"] == KEY


@pytest.mark.parametrize("status", [401, 403])
def test_a_new_secret_is_taken_without_a_restart(opened: Any, key_file: Path, tmp_path: Path, status: int) -> None:
    """Only the one whose file has changed is another; a file that is the same is not tried again."""
    other = tmp_path / "other"
    write(other, "other")
    places = {"X-Other": {"file": str(other)}, "X-Api-Key": {"file": str(key_file)}}
    with HttpPeer(Answer(), Answer(status), Answer(), Answer(status)) as peer:
        sink = opened(peer.url(), header_secrets=places)
        deliver(sink)
        write(key_file, "another")
        deliver(sink)
        failure(sink, RejectedError)
    sent = [(request.headers["X-Other"], request.headers["X-Api-Key"]) for request in peer.requests]
    assert sent == [("other", KEY), ("other", KEY), ("other", "another"), ("other", "another")]


def test_while_a_secret_is_being_replaced_nothing_is_rejected(opened: Any, kind: str, key_file: Path) -> None:
    with HttpPeer(Answer(401), Answer(401)) as peer:
        sink = opened(peer.url(), header_secrets={"X-Api-Key": {"file": str(key_file)}})
        write(key_file, "")
        assert str(failure(sink)).startswith(f'{kind} {peer.url()}: file "{key_file}": it is ')
        write(key_file, "another")
        deliver(sink)
    assert [request.headers["X-Api-Key"] for request in peer.requests] == [KEY, KEY, "another"]


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_a_secret_that_the_peer_sends_back_is_blanked(
    opened: Any, key_file: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("SCOPE", f"ApiKey {KEY}and-more")
    places = {"X-Api-Key": {"file": str(key_file)}, "Authorization": {"env": "SCOPE"}}
    echo = f"who is {KEY}and-more, {KEY}? {KEY[:5]}\x01{KEY[5:]} " + "x" * 150 + KEY
    with HttpPeer(Answer(status, f"No {KEY}", body=echo.encode())) as peer:
        sink = opened(peer.url(), header_secrets=places)
        with pytest.raises(SinkError) as caught:
            deliver(sink)
    assert f"{status} No ***" in str(caught.value)
    assert KEY[:5] not in str(caught.value)
    assert "and-more" not in str(caught.value)


def test_settings_and_errors_hold_no_secret(opened: Any, key_file: Path) -> None:
    key_file.chmod(0o644)
    with refused_port() as port:
        sink = opened(f"http://127.0.0.1:{port}/", header_secrets={"X-Api-Key": {"file": str(key_file)}})
        texts = [repr(sink._client._settings), str(failure(sink)), repr(sink), *sink.notices]
    assert sink.notices == [f'"{key_file}" holds a secret and is world-readable, mode 0644: expected 0600']
    assert not [text for text in texts if KEY in text]


@pytest.mark.parametrize("content", [" before", "after ", "grün"])
def test_a_secret_that_no_header_can_hold_stops_the_start(opened: Any, key_file: Path, content: str) -> None:
    write(key_file, content)
    with pytest.raises(UsageError) as caught:
        opened("https://127.0.0.1/", header_secrets={"X-Api-Key": {"file": str(key_file)}})
    reason = "it holds what no header can: expected visible ASCII characters"
    assert str(caught.value) == f'file "{key_file}": {reason}'


PLACE = {"env": "KEY"}


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"url": "http://h.example", "header_secrets": {"X": PLACE}}, "url: an address with https://, a secret goes"),
        ({"header_secrets": {"X Y": PLACE}}, "header_secrets: names of visible ASCII"),
        ({"header_secrets": {"": PLACE}}, "header_secrets: names of visible ASCII"),
        ({"header_secrets": {"Host": PLACE}}, "header_secrets: none of content-encoding, content-length"),
        ({"header_secrets": {"X": PLACE, "x": PLACE}}, "header_secrets: headers that are not set elsewhere, each once"),
        ({"header_secrets": {"X": PLACE}, "headers": {"x": "a"}}, "header_secrets: headers that are not set elsewhere"),
        ({"header_secrets": {"authorization": PLACE}, "bearer": PLACE}, "header_secrets: headers that are not set"),
        (
            {"header_secrets": {"authorization": PLACE}, "basic": {"user": "u", "password": PLACE}},
            "header_secrets: headers that are not set elsewhere",
        ),
        ({"header_secrets": {"X": {}}}, "file: exactly one of"),
        ({"header_secrets": {"X": "k3y"}}, "Expected `object`, got `str`"),
        ({"headers": {"X-Y": "a", "content-encoding": "br"}}, "headers: none of content-encoding, content-length"),
    ],
)
def test_settings_that_are_wrong(kind: str, tree: dict[str, Any], reason: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=reason):
        settings(kind, **{"url": "https://h", **tree})


# Memory


def test_deliveries_leave_nothing_for_the_collector(opened: Any) -> None:
    """It runs seldom here: what each delivery left, a body say, would stay for long. The worker frees an error's."""
    answers = [Answer(status, body=b"why") for status in (200, 202, 400, 503)]
    with HttpPeer(*answers * 6) as peer:
        sink = opened(peer.url())
        for _ in range(4):
            with suppress(SinkError):
                deliver(sink)
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                with suppress(SinkError):
                    deliver(sink)
            assert gc.collect() < 20
        finally:
            gc.enable()
    assert len(peer.requests) == 24


# What is not installed


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [
        ("http", "urllib3", "urllib3"),
        ("remote_write", "urllib3", "urllib3"),
        ("remote_write", "cramjam", "cramjam"),
        ("otlp", "urllib3", "urllib3"),
        ("otlp", "google", "protobuf"),
        ("otlp", "google.protobuf", "protobuf"),
        ("otlp", "opentelemetry", "opentelemetry-proto"),
        ("otlp", "opentelemetry.proto.collector", "opentelemetry-proto"),
    ],
)
def test_a_missing_extra_is_named(kind: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    sink = discovery.load("sinks", kind)(settings(kind, "http://127.0.0.1/"))
    with pytest.raises(UsageError) as caught:
        sink.open()
    assert str(caught.value) == f'sinks of type {kind} need {package}: expected pip install "hostprobe[{kind}]"'


def test_a_module_that_an_installed_package_lacks_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "urllib3"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "http.client", None)
    sink = discovery.load("sinks", "http")(settings("http", "http://127.0.0.1/"))
    with pytest.raises(ModuleNotFoundError, match=r"http\.client"):
        sink.open()
