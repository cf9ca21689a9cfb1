"""The nats sink against peers of the tests' own: some that are no NATS servers, and one that speaks as a stream does.

The latter answers as it is told, which a real server can't be; what a real one does is in tests/engines/test_nats.py.
"""

from __future__ import annotations

import gc
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme

from agent.errors import RejectedError, SinkError, UsageError
from agent.mistakes import decode
from agent.sinks.nats import NatsSettings, NatsSink
from tests.sinks.nats_peer import ROOM_BYTES, STORED, Stream
from tests.sinks.peers import Accepted, StreamPeer, chatter, leave_when_told, refused_port, stall
from tests.workers import drain, opened, put

HERE = ("nats://127.0.0.1:4222",)
SECRET = "S3cret-of-Nobody"
SHORT = "300ms"
TOO_LARGE = {"error": {"code": 400, "err_code": 10054, "description": "message size exceeds maximum allowed"}}
FULL = {"error": {"code": 503, "err_code": 10077, "description": "maximum messages exceeded"}}
NO_STREAM = b"NATS/1.0 503\r\n\r\n"


def settings(servers: tuple[str, ...] = HERE, subject: str = "frames.web", **more: Any) -> NatsSettings:
    plain = {"type": "nats", "servers": list(servers), "subject": subject, **more}
    return msgspec.convert(plain, NatsSettings, dec_hook=decode)


@pytest.fixture
def nats_sink() -> Iterator[Any]:
    """`nats_sink(port, **settings)`: an open sink, closed after the test."""
    sinks: list[NatsSink] = []

    def make(port: int, scheme: str = "nats", **more: Any) -> NatsSink:
        sink = NatsSink(settings((f"{scheme}://127.0.0.1:{port}",), **more))
        sinks.append(sink)
        sink.open()
        return sink

    yield make
    for sink in sinks:
        sink.close()


def deliver(sink: NatsSink, *payloads: bytes) -> None:
    """As the worker does: views of one buffer, which holds something else afterwards."""
    buffer = bytearray(b"".join(payloads))
    views, start = [], 0
    for payload in payloads:
        views.append(memoryview(buffer)[start : start + len(payload)])
        start += len(payload)
    try:
        sink.deliver(views)
    finally:
        buffer[:] = b"?" * len(buffer)


def failure(sink: NatsSink, *payloads: bytes, kind: type[SinkError] = SinkError) -> Any:
    with pytest.raises(SinkError) as caught:
        deliver(sink, *(payloads or (b"1", b"2")))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return caught.value


def ids(stream: Stream) -> list[str]:
    return [message.headers["Nats-Msg-Id"] for message in stream.messages]


# What is sent


def test_each_payload_is_a_message_with_its_digest(nats_sink: Any) -> None:
    stream = Stream()
    with StreamPeer(stream) as peer:
        sink = nats_sink(peer.port)
        deliver(sink, b"one", b"", b"\0\xff")
        deliver(sink, b"one")
        assert len(peer.accepted) == 1
    assert stream.payloads == [b"one", b"", b"\0\xff", b"one"]
    assert ids(stream) == [blake2b(payload, digest_size=16).hexdigest() for payload in stream.payloads]
    assert {message.subject for message in stream.messages} == {"frames.web"}
    assert set().union(*(message.headers for message in stream.messages)) == {"Nats-Msg-Id"}


def test_an_expected_stream(nats_sink: Any) -> None:
    stream = Stream()
    with StreamPeer(stream) as peer:
        deliver(nats_sink(peer.port, stream="FRAMES"), b"one")
    assert stream.messages[0].headers["Nats-Expected-Stream"] == "FRAMES"


def test_equal_payloads_of_a_format_without_time_are_told_apart(nats_sink: Any) -> None:
    """But not those that come again after a failure, which are the same."""
    fails = iter([False, False, True, False, False])
    stream = Stream(lambda _payload: FULL if next(fails) else STORED)
    with StreamPeer(stream, stream) as peer:
        sink = nats_sink(peer.port, format="statsd")
        assert failure(sink, b"a:1|c", b"a:1|c", b"a:1|c").delivered == 2
        deliver(sink, b"a:1|c")
        deliver(sink, b"a:1|c")
    first, second, third, again, fourth = ids(stream)
    assert third == again
    assert len({first, second, third, fourth}) == 4


def test_a_large_batch_is_under_way_in_windows(nats_sink: Any) -> None:
    """The 129th message waits for the answers to the first 128."""
    held: list[bytes] = []
    stream = Stream(lambda payload: held.append(payload))
    with StreamPeer(stream, stream) as peer:
        assert failure(nats_sink(peer.port, timeout=SHORT), *[b"%d" % number for number in range(300)]).delivered == 0
        assert held == [b"%d" % number for number in range(128)]
        stream.says = lambda _payload: STORED
        del stream.messages[:]
        deliver(nats_sink(peer.port), *[b"%d" % number for number in range(300)])
    assert stream.payloads == [b"%d" % number for number in range(300)]


# Answers


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (FULL, "maximum messages exceeded"),
        (NO_STREAM, "no stream has this subject"),
        ({"no": "answer"}, "an answer that is not JetStream's"),
        ({"error": "much"}, "an answer that is not JetStream's"),
        ({"stream": "", "seq": 0}, "an answer that is not JetStream's"),
        (b"-ERR 'Permissions Violation for Publish to \"frames.web\"'\r\n", "permissions violation for publish"),
        (b"-ERR 'Stale Connection'\r\n", "stale connection"),
        (b"nonsense\r\n", "protocol error"),
    ],
)
def test_an_answer_that_is_no_acknowledgement(nats_sink: Any, said: Any, text: str) -> None:
    """The first payload is delivered, and the rest comes again."""
    stream = Stream(lambda payload: STORED if payload == b"1" else said)
    with StreamPeer(stream, stream) as peer:
        sink = nats_sink(peer.port)
        error = failure(sink, b"1", b"2", b"3")
        assert error.delivered == 1
        assert str(error).startswith(f"nats nats://127.0.0.1:{peer.port} frames.web: ")
        assert text in str(error)
        assert "timed out" not in str(error)
        stream.says = lambda _payload: STORED
        deliver(sink, b"2", b"3")
    assert stream.payloads[-2:] == [b"2", b"3"]


def test_no_answer_in_time(nats_sink: Any) -> None:
    stream = Stream(lambda payload: STORED if payload != b"3" else None)
    with StreamPeer(stream) as peer:
        error = failure(nats_sink(peer.port, timeout=SHORT), b"1", b"2", b"3", b"4")
        assert error.delivered == 2
        assert str(error).endswith(f"frames.web: timed out after {SHORT}")
        peer.wait(lambda: peer.accepted[0].ended)  # the sink itself is still open


def test_what_is_too_large_for_the_stream_is_refused(nats_sink: Any) -> None:
    stream = Stream(lambda payload: TOO_LARGE if len(payload) > 100 else STORED)
    with StreamPeer(stream) as peer:
        sink = nats_sink(peer.port)
        error = failure(sink, b"1", b"x" * 101, b"3", kind=RejectedError)
        assert (error.delivered, error.each) == (1, True)
        assert str(error).endswith("message size exceeds maximum allowed")
        deliver(sink, b"3")
        assert len(peer.accepted) == 1


def test_what_is_too_large_for_the_server_is_not_sent(nats_sink: Any) -> None:
    """Headers count: they take 59 bytes of the server's max_payload, 84 with the name of a stream."""
    stream = Stream()
    for number, (more, room_bytes) in enumerate([({}, ROOM_BYTES - 59), ({"stream": "F"}, ROOM_BYTES - 84)]):
        with StreamPeer(stream) as peer:
            sink = nats_sink(peer.port, **more)
            error = failure(sink, b"1", b"x" * (room_bytes + 1), b"3", kind=RejectedError)
            assert (error.delivered, error.each) == (1, True)
            assert str(error).endswith(f"a message of {room_bytes + 1} bytes, {room_bytes} at most")
            deliver(sink, b"x" * room_bytes)
        assert [len(payload) for payload in stream.payloads[2 * number :]] == [1, room_bytes]


def test_a_worker_drops_what_is_refused_and_delivers_the_others() -> None:
    stream = Stream()
    with StreamPeer(stream) as peer:
        worker = opened(NatsSink(settings((f"nats://127.0.0.1:{peer.port}",))), records=40)
        put(worker, 1, 50)
        put(worker, 51, 51, width=ROOM_BYTES)
        put(worker, 52, 100)
        drain(worker)
        worker.join()
    assert worker.frames == (99, 1, 0)
    assert [int(payload) for payload in stream.payloads] == [*range(1, 51), *range(52, 101)]


# Connections


def test_a_connection_that_has_ended_meanwhile_is_made_anew(nats_sink: Any) -> None:
    stream = Stream()
    with StreamPeer(stream) as peer:
        sink = nats_sink(peer.port)
        deliver(sink, b"1")
        port = peer.port
    with StreamPeer(stream, port=port):
        deliver(sink, b"2", b"3")
    assert stream.payloads == [b"1", b"2", b"3"]


def test_nobody_is_there(nats_sink: Any) -> None:
    with refused_port() as port:
        sink = nats_sink(port)
        for _ in range(2):
            assert str(failure(sink)) == f"nats nats://127.0.0.1:{port} frames.web: Connection refused"


def test_a_dead_server_beside_a_living_one() -> None:
    stream = Stream()
    with refused_port() as port, StreamPeer(stream) as peer:
        sink = NatsSink(settings((f"nats://127.0.0.1:{port}", f"nats://localhost:{peer.port}")))
        sink.open()
        deliver(sink, b"1")
        deliver(sink, b"2")
        sink.close()
        assert len(peer.accepted) == 1
    assert stream.payloads == [b"1", b"2"]


def test_another_server_is_asked_after_a_failure() -> None:
    full, stream = Stream(lambda _payload: FULL), Stream()
    with StreamPeer(full, full, full) as first, StreamPeer(stream) as second:
        sink = NatsSink(settings(tuple(f"nats://127.0.0.1:{peer.port}" for peer in (first, second))))
        sink.open()
        failure(sink, b"1")
        deliver(sink, b"1")
        deliver(sink, b"2")
        sink.close()
    assert stream.payloads == [b"1", b"2"]


def test_a_name_without_an_address() -> None:
    sink = NatsSink(settings(("nats://nowhere.invalid:4222",)))
    sink.open()
    assert str(failure(sink)).startswith("nats nats://nowhere.invalid:4222 frames.web: ")


def test_a_peer_that_says_nothing(nats_sink: Any) -> None:
    with StreamPeer(stall, stall) as peer:
        sink = nats_sink(peer.port, timeout=SHORT)
        for _ in range(2):
            assert str(failure(sink)).endswith(f"frames.web: timed out after {SHORT}")
        peer.go_on.set()
        peer.wait(lambda: len(peer.accepted) == 2 and all(one.ended for one in peer.accepted))
        assert all(one.data == b"" for one in peer.accepted)


@pytest.mark.parametrize(
    "text",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"x" * 200_000, b"INFO []\r\n", b"INFO {\r\n", b"INFO\r\n", b"\xff INFO \r\n",
     b'INFO {"max_payload": "much"}\r\nPONG\r\n', b'INFO {"connect_urls": 1}\r\nPONG\r\n'],
)  # fmt: skip
def test_a_peer_that_is_no_nats_server(nats_sink: Any, text: bytes) -> None:
    with StreamPeer(*[chatter(text)] * 2) as peer:
        sink = nats_sink(peer.port)
        for _ in range(2):
            assert failure(sink).delivered == 0


def test_a_peer_that_leaves_at_once(nats_sink: Any) -> None:
    with StreamPeer(leave_when_told(reset=False)) as peer:
        peer.go_on.set()
        sink = nats_sink(peer.port, timeout=SHORT)
        assert failure(sink).delivered == 0


# TLS and secrets


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return authority


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


def test_nothing_goes_to_a_server_without_tls_where_tls_is_wanted(
    nats_sink: Any, authority: trustme.CA, tmp_path: Path, password: Path
) -> None:
    """nats-py itself would go on without: it asks only what the server offers."""
    stream = Stream(info={"auth_required": True})
    tls, token = {"ca": str(tmp_path / "ca.pem")}, {"file": str(password)}
    with StreamPeer(stream, stream) as peer:
        error = failure(nats_sink(peer.port, "tls", tls=tls, token=token))
        assert str(error).endswith("secure connection not available")
        failure(nats_sink(peer.port, "tls", tls=tls))
        peer.wait(lambda: len(peer.accepted) == 2 and all(one.ended for one in peer.accepted))
        assert [one.data for one in peer.accepted] == [b"", b""]


@pytest.mark.parametrize("way", ["password", "token"])
@pytest.mark.parametrize("auth_required", [True, False])
def test_a_login(nats_sink: Any, password: Path, way: str, auth_required: bool) -> None:
    stream = Stream(info={"auth_required": auth_required})
    place = {"file": str(password)}
    more = {"user": "agent", "password": place} if way == "password" else {"token": place}
    with StreamPeer(stream, stream) as peer:
        sink = nats_sink(peer.port, **more)
        deliver(sink, b"1")
        told = {name: stream.login.get(name) for name in ("user", "pass", "auth_token")}
        assert told == (
            {"user": "agent", "pass": SECRET, "auth_token": None}
            if way == "password"
            else {"user": None, "pass": None, "auth_token": SECRET}
        )
        sink.close()
        password.write_text("a new one")
        deliver(sink, b"2")
        assert "a new one" in stream.login.values()


def test_the_secret_is_shown_nowhere(nats_sink: Any, password: Path) -> None:
    stream = Stream(lambda _payload: f"-ERR 'I was told {SECRET}'\r\n".encode())
    with StreamPeer(stream, stream) as peer:
        sink = nats_sink(peer.port, token={"file": str(password)})
        error = failure(sink)
        assert str(error).endswith("frames.web: i was told ***")
        assert SECRET not in repr(vars(sink))
        password.unlink()
        assert str(failure(sink)).endswith("No such file or directory: expected a file with a secret that can be read")


def test_a_readable_secret_is_a_notice(password: Path) -> None:
    password.chmod(0o644)
    sink = NatsSink(settings(token={"file": str(password)}))
    sink.open()
    assert [notice for notice in sink.notices if "world-readable" in notice] == sink.notices != []


def test_a_tls_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    sink = NatsSink(settings(("tls://localhost:4222",), tls={"ca": str(tmp_path / "ca.pem")}))
    with pytest.raises(UsageError, match=r'ca ".*": no certificate in it'):
        sink.open()


def test_an_untrusted_certificate(nats_sink: Any, tmp_path: Path, authority: trustme.CA) -> None:
    """The server's INFO comes in the open, and then TLS."""

    def then_tls(peer: StreamPeer, accepted: Accepted) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
        accepted.socket.sendall(b'INFO {"server_id": "test", "tls_required": true, "max_payload": 4000}\r\n')
        assert not peer._shake_hands(accepted, context)

    with StreamPeer(then_tls) as peer:
        error = failure(nats_sink(peer.port, "tls", tls={"ca": str(tmp_path / "ca.pem")}))
        peer.wait(lambda: peer.accepted[0].fault)
    assert "certificate verify failed" in str(error)


# Steady state


def test_no_garbage_and_no_descriptors_are_left() -> None:
    before = set(os.listdir("/proc/self/fd"))
    stream = Stream()
    with StreamPeer(stream, stream) as peer:
        sink = NatsSink(settings((f"nats://127.0.0.1:{peer.port}",)))
        sink.open()
        deliver(sink, b"warm")
        gc.collect()
        gc.disable()
        try:
            for number in range(20):
                deliver(sink, *[b"%d.%d" % (number, place) for place in range(10)])
            assert gc.collect() == 0
        finally:
            gc.enable()
        sink.close()
        sink.close()
        sink.open()
        deliver(sink, b"again")
        sink.close()
    assert len(stream.messages) == 202
    assert set(os.listdir("/proc/self/fd")) == before


# Settings


@pytest.mark.parametrize(
    "subject", ["", ".", "a.", ".a", "a..b", "a b", "a.*", "a.>", "a*", "ä", "a\n", "x" * 1025, "a\tb"]
)
def test_a_subject_that_is_none(subject: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="subject: visible ASCII characters"):
        settings(subject=subject)


@pytest.mark.parametrize("subject", ["a", "a.b.c", "frames.web-1.eu_west", "x" * 1024])
def test_a_subject(subject: str) -> None:
    assert settings(subject=subject).subject == subject


@pytest.mark.parametrize("stream", ["a b", "a.b", "*", ">", "a/b", "a\\b", "ä", "x" * 256])
def test_a_stream_that_is_none(stream: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="stream: a name of visible ASCII characters"):
        settings(stream=stream)


@pytest.mark.parametrize(
    "servers", [(), ("",), ("host:4222",), ("nats://host",), ("http://host:1",), (*HERE, "nats://"), ("nats://a:0",)]
)
def test_servers_that_are_none(servers: tuple[str, ...]) -> None:
    with pytest.raises(msgspec.ValidationError, match=r'servers: .*"nats://host:port"'):
        settings(servers)


def test_a_password_among_the_servers() -> None:
    with pytest.raises(msgspec.ValidationError, match="password: user and password, or token, outside") as caught:
        settings((f"nats://agent:{SECRET}@127.0.0.1:4222",))
    assert SECRET not in str(caught.value)


ENV = {"env": "PASSWORD"}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"timeout": "9ms"}, "timeout: a duration from 10ms to 1h"),
        ({"timeout": "3601s"}, "timeout: a duration from 10ms to 1h"),
        ({"user": "agent"}, "password: with user, and only with it"),
        ({"password": ENV}, "password: with user, and only with it"),
        ({"user": "agent", "password": ENV, "token": ENV}, "user: one of user, token and credentials"),
        ({"token": ENV, "credentials": "x.creds"}, "user: one of user, token and credentials"),
        ({"tls": {}}, "servers: addresses with tls://, which tls is for"),
        ({"servers": ["nats://nats.example:4222"], "token": ENV}, "servers: addresses with tls://, a secret goes over"),
        ({"queue": "x"}, "queue"),
    ],
)
def test_settings_that_are_wrong(more: dict[str, Any], text: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=re.escape(text)):
        settings(**{"servers": HERE, **more})


def test_where_a_secret_may_go() -> None:
    for server in ("nats://localhost:4222", "nats://[::1]:4222", "tls://nats.example:4222"):
        settings((server,), token=ENV)


# What may be missing


def without(module: str, more: str) -> str:
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {module!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from agent.errors import UsageError\n"
        "from agent.sinks.nats import NatsSettings, NatsSink\n"
        f"sink = NatsSink(NatsSettings(servers=('nats://localhost:4222',), subject='frames'{more}))\n"
        "try:\n    sink.open()\n"
        "except UsageError as error:\n    print(error)\n"
    )
    return run_python(program).stdout


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-X", "dev", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=True,
    )


@pytest.mark.parametrize("said", [b"INFO {\r\n", None, FULL])
def test_nothing_is_said_on_stderr(said: Any) -> None:
    """Neither by the client's logger nor by asyncio of tasks that were given up."""
    program = (
        "import gc, sys\n"
        "from agent.errors import SinkError\n"
        "from agent.sinks.nats import NatsSettings, NatsSink\n"
        "from agent.units import Duration\n"
        "sink = NatsSink(NatsSettings(servers=(sys.argv[1],), subject='frames', timeout=Duration(0.3)))\n"
        "sink.open()\n"
        "try:\n    sink.deliver([memoryview(b'x')])\n"
        "except SinkError as error:\n    print(error)\n"
        "sink.close()\n"
        "gc.collect()\n"
    )
    with StreamPeer(Stream(lambda _payload: said)) as peer:
        run = run_python(program, f"nats://127.0.0.1:{peer.port}")
    assert run.stderr == ""
    assert run.stdout.startswith("nats nats://127.0.0.1:")


def test_without_the_client_it_says_what_is_needed() -> None:
    assert without("nats", "") == 'sinks of type nats need nats-py: expected pip install "hostprobe[nats]"\n'


def test_credentials_without_nkeys_say_what_is_needed() -> None:
    text = without("nkeys", ", credentials='agent.creds'")
    assert text == 'credentials of sinks of type nats need nkeys: expected pip install "nats-py[nkeys]"\n'
