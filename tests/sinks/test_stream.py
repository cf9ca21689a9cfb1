"""The sinks tcp and unix against real peers: whole lines in order, and none lost whatever the peer does."""

from __future__ import annotations

import os
import random
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme

from agent.errors import RejectedError, SinkError, UsageError
from agent.sinks.address import host_and_port
from agent.sinks.stream import TcpSettings, TcpSink, UnixSettings, UnixSink
from agent.sinks.tls import TlsSettings
from agent.units import Duration
from tests.sinks import peers
from tests.sinks.peers import StreamPeer

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="acknowledgements are Linux's")
SHORT = Duration(0.2)

Sink = TcpSink | UnixSink
Place = str | Path


@pytest.fixture
def tcp() -> Iterator[Callable[..., TcpSink]]:
    """`tcp(peer or port, …)`: an opened sink, closed after the test."""
    sinks = []

    def make(peer: StreamPeer | int, host: str = "127.0.0.1", **settings: Any) -> TcpSink:
        port = peer if isinstance(peer, int) else peer.port
        sink = TcpSink(TcpSettings(address=f"{host}:{port}", **settings))
        sinks.append(sink)
        sink.open()
        return sink

    yield make
    for sink in sinks:
        sink.close()


@pytest.fixture
def unix() -> Iterator[Callable[..., UnixSink]]:
    sinks = []

    def make(path: Path, **settings: Any) -> UnixSink:
        sink = UnixSink(UnixSettings(path=str(path), **settings))
        sinks.append(sink)
        sink.open()
        return sink

    yield make
    for sink in sinks:
        sink.close()


@pytest.fixture(params=["tcp", "unix"])
def both(
    request: pytest.FixtureRequest, tcp: Callable[..., TcpSink], unix: Callable[..., UnixSink], tmp_path: Path
) -> tuple[Place, Callable[..., Sink]]:
    """Where a peer is to be, and what makes a sink for it: for each of the two."""
    if request.param == "tcp":
        return "127.0.0.1", tcp
    return tmp_path / "socket", lambda peer, **settings: unix(tmp_path / "socket", **settings)


def deliver(sink: Sink, *payloads: bytes) -> None:
    views = [memoryview(bytearray(payload)) for payload in payloads]
    try:
        sink.deliver(views)
    finally:
        for view in views:
            view.release()


def deliver_all(sink: Sink, payloads: list[bytes], batch: int = 10) -> list[SinkError]:
    """As the exporter does it, without its pauses: what isn't delivered comes again. What failed meanwhile."""
    errors = []
    delivered = 0
    while delivered < len(payloads):
        size = min(batch, len(payloads) - delivered)
        try:
            deliver(sink, *payloads[delivered : delivered + size])
        except SinkError as error:
            errors.append(error)
            assert len(errors) < 100
            size = error.delivered
        delivered += size
    return errors


def numbered(count: int, largest_bytes: int, seed: int = 1) -> list[bytes]:
    """Payloads that begin with their number, of random sizes."""
    rng = random.Random(seed)
    return [b"%06d " % number + b"x" * rng.randrange(largest_bytes) for number in range(count)]


def numbers(lines: list[bytes]) -> list[int]:
    return [int(line[:6]) for line in lines]


def check_at_least_once(peer: StreamPeer, payloads: list[bytes]) -> None:
    """Every payload has come, whole; a connection's lines are in order, and each goes on where it is known to."""
    seen = 0
    for accepted in peer.accepted:
        lines = accepted.lines
        assert all(line == payloads[number] for line, number in zip(lines, numbers(lines), strict=True))
        if lines:
            first = numbers(lines)[0]
            assert first <= seen, "lines are missing"
            assert numbers(lines) == list(range(first, first + len(lines)))
            seen = max(seen, first + len(lines))
    assert seen == len(payloads)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# What comes


@pytest.mark.parametrize("largest_bytes", [10, 3000, 300_000])
def test_lines_come_whole_and_in_order(both: Any, largest_bytes: int) -> None:
    at, sink_for = both
    payloads = numbered(120, largest_bytes)
    with StreamPeer(at=at) as peer:
        sink = sink_for(peer)
        rng = random.Random(largest_bytes)
        start = 0
        while start < len(payloads):
            size = rng.randrange(1, 20)
            deliver(sink, *payloads[start : start + size])
            start += size
        sink.close()
        peer.wait(lambda: peer.accepted[0].ended)
        assert peer.accepted[0].lines == payloads
        assert peer.accepted[0].torn == b""
        assert len(peer.accepted) == 1


def test_more_lines_than_one_call_takes(both: Any) -> None:
    at, sink_for = both
    payloads = [b"%06d" % number for number in range(3000)]
    payloads[7] = payloads[1000] = b""
    with StreamPeer(at=at) as peer:
        deliver(sink_for(peer), *payloads)
        peer.wait(lambda: len(peer.lines) == 3000)
        assert peer.lines == payloads


@pytest.mark.parametrize("largest_bytes", [10, 30_000])
def test_payloads_that_say_where_they_end_have_nothing_between_them(both: Any, largest_bytes: int) -> None:
    at, sink_for = both
    payloads = numbered(600, largest_bytes)
    whole = b"".join(payloads)
    with StreamPeer(at=at) as peer:
        sink = sink_for(peer, format="msgpack")
        for start in range(0, 600, 200):
            deliver(sink, *payloads[start : start + 200])
        peer.wait(lambda: len(peer.accepted[0].data) >= len(whole))
        assert bytes(peer.accepted[0].data) == whole


@pytest.mark.parametrize(("format", "size_bytes", "whole"), [("json", 33, 3), ("json", 32, 2), ("msgpack", 30, 3)])
def test_how_many_payloads_a_stalled_peer_has_whole(format: Any, size_bytes: int, whole: int) -> None:
    sink = UnixSink(UnixSettings(path="/never", format=format))
    assert sink._whole([memoryview(b"0123456789")] * 6, size_bytes) == whole


def test_a_reader_of_single_bytes(both: Any) -> None:
    at, sink_for = both
    payloads = numbered(20, 10_000)
    with StreamPeer(peers.byte_by_byte, at=at, buffer_bytes=4096) as peer:
        deliver(sink_for(peer), *payloads)
        peer.wait(lambda: len(peer.lines) == 20)
        assert peer.lines == payloads
        assert len(peer.accepted) == 1


@on_linux
def test_a_slow_reader_that_goes_on(both: Any) -> None:
    """No timeout, though the whole takes twice as long as one: all is written at once, and acknowledged bit by bit."""
    at, sink_for = both
    payloads = [b"%06d" % number * 1000 for number in range(20)]
    with StreamPeer(peers.steadily(6000, 0.1), at=at, buffer_bytes=8192) as peer:
        deliver(sink_for(peer, timeout=Duration(1)), *payloads)
        peer.wait(lambda: len(peer.lines) == 20)
        assert peer.lines == payloads
        assert len(peer.accepted) == 1


def test_the_connection_is_made_at_the_first_delivery(both: Any) -> None:
    at, sink_for = both
    with StreamPeer(at=at) as peer:
        sink = sink_for(peer)
        assert peer.accepted == []
        deliver(sink, b"one")
        deliver(sink, b"two")
        peer.wait(lambda: len(peer.lines) == 2)
        assert len(peer.accepted) == 1


def test_close_twice_and_go_on(both: Any) -> None:
    at, sink_for = both
    with StreamPeer(at=at) as peer:
        sink = sink_for(peer)
        deliver(sink, b"one")
        sink.close()
        sink.close()
        deliver(sink, b"two")
        peer.wait(lambda: len(peer.lines) == 2)
        assert [accepted.lines for accepted in peer.accepted] == [[b"one"], [b"two"]]


@on_linux
def test_no_descriptor_leaks(both: Any) -> None:
    at, sink_for = both
    payloads = numbered(100, 30_000)
    with StreamPeer(*[peers.reset_after(1000)] * 5, at=at, buffer_bytes=4096) as peer:
        before = descriptors()
        sink = sink_for(peer)
        deliver_all(sink, payloads)
        peer.wait(lambda: peer.accepted[-1].data.endswith(payloads[-1] + b"\n"))
        peer.wait(lambda: all(accepted.socket.fileno() < 0 for accepted in peer.accepted[:-1]))
        assert descriptors() == before + 2  # one at each end
        sink.close()
        peer.wait(lambda: peer.accepted[-1].ended)


# Acknowledgements


@on_linux
def test_a_delivery_returns_when_a_unix_peer_has_read_all(unix: Callable[..., UnixSink], tmp_path: Path) -> None:
    with StreamPeer(peers.byte_by_byte, at=tmp_path / "socket") as peer:
        sink = unix(tmp_path / "socket")
        for number in range(20):
            deliver(sink, b"x" * 500)
            # Its last byte was read before `deliver` returned; the peer's thread may not have noted it yet.
            peer.wait(lambda: len(peer.accepted[0].data) >= 501 * (number + 1) - 1)  # noqa: B023


@on_linux
@pytest.mark.parametrize("size_bytes", [100, 5000, 70_000])
def test_a_stalled_tcp_peer(tcp: Callable[..., TcpSink], size_bytes: int) -> None:
    """What its kernel has acknowledged is delivered, and not one line more."""
    payloads = [b"%06d" % number + b"x" * size_bytes for number in range(6_000_000 // size_bytes)]
    with StreamPeer(peers.stall, buffer_bytes=200_000) as peer:
        # The kernel fills the rest of a small window only after 200 ms (its shortest persist timer).
        sink = tcp(peer, timeout=Duration(0.5))
        with pytest.raises(SinkError) as caught:
            deliver(sink, *payloads)
        assert str(caught.value) == f"tcp 127.0.0.1:{peer.port}: the peer took nothing for 500ms"
        delivered = caught.value.delivered
        held_bytes = _readable_bytes(peer.accepted[0].socket)
        assert delivered == held_bytes // (size_bytes + 7) > 0
        peer.go_on.set()
        rest = payloads[delivered : delivered + 5]
        deliver(sink, *rest)
        peer.wait(lambda: len(peer.accepted[1].lines) == len(rest) and peer.accepted[0].ended)
        assert peer.accepted[0].lines[:delivered] == payloads[:delivered]
        assert peer.accepted[1].lines == rest


@on_linux
@pytest.mark.parametrize("count", [1, 500])
def test_a_stalled_unix_peer(unix: Callable[..., UnixSink], tmp_path: Path, count: int) -> None:
    """One line fits into the socket's buffers, 500 don't: none of them is delivered before it is read."""
    payloads = [b"%06d" % number + b"x" * 5000 for number in range(count)]
    with StreamPeer(peers.stall, at=tmp_path / "socket") as peer:
        sink = unix(tmp_path / "socket", timeout=SHORT)
        with pytest.raises(SinkError, match="the peer took nothing for 200ms") as caught:
            deliver(sink, *payloads)
        assert caught.value.delivered == 0
        peer.go_on.set()
        deliver(sink, *payloads)
        peer.wait(lambda: len(peer.accepted[1].lines) == count)
        assert peer.accepted[1].lines == payloads


def _readable_bytes(connection: socket.socket) -> int:
    """What the kernel holds for a reader: FIONREAD."""
    import array
    import fcntl
    import termios

    size = array.array("i", [0])
    fcntl.ioctl(connection, termios.FIONREAD, size)
    return size[0]


# Connections that break


@pytest.mark.parametrize("behaviour", [peers.close_after, peers.reset_after])
@pytest.mark.parametrize("largest_bytes", [2000, 100_000])
def test_a_peer_that_dies_in_the_middle_and_comes_back(
    both: Any, behaviour: Callable[[int], peers.Behaviour], largest_bytes: int
) -> None:
    """Batches larger than what the peer's buffer holds, so that what it hasn't read isn't acknowledged."""
    at, sink_for = both
    payloads = numbered(300, largest_bytes)
    rng = random.Random(3)
    deaths = [behaviour(rng.randrange(1, 40 * largest_bytes)) for _ in range(8)]
    with StreamPeer(*deaths, at=at, buffer_bytes=2048) as peer:
        sink = sink_for(peer)
        errors = deliver_all(sink, payloads, batch=100)
        sink.close()
        peer.wait_for_end(payloads[-1])
        check_at_least_once(peer, payloads)
    assert errors
    assert {error.delivered for error in errors} == {0}
    assert any(accepted.torn for accepted in peer.accepted[:-1])
    assert peer.accepted[-1].torn == b""


def test_a_reset_is_said(both: Any) -> None:
    at, sink_for = both
    with StreamPeer(peers.reset_after(1000), at=at, buffer_bytes=4096) as peer:
        sink = sink_for(peer)
        with pytest.raises(SinkError, match=r"^(tcp|unix) \S+: (Connection reset by peer|Broken pipe)$") as caught:
            deliver(sink, b"x" * 8_000_000)
        assert not isinstance(caught.value, RejectedError)
        assert caught.value.delivered == 0


@on_linux
def test_a_reset_while_waiting_for_the_acknowledgement(unix: Callable[..., UnixSink], tmp_path: Path) -> None:
    """All is written, the peer closes with it unread: the kernel empties the queue, which isn't reading it."""

    def leave(peer: StreamPeer, accepted: peers.Accepted) -> None:
        assert accepted.socket.recv(100, socket.MSG_PEEK)

    with StreamPeer(leave, at=tmp_path / "socket") as peer:
        sink = unix(tmp_path / "socket")
        with pytest.raises(SinkError, match="Connection reset by peer"):
            deliver(sink, b"one")
        deliver(sink, b"one")
        peer.wait(lambda: peer.lines == [b"one"])


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("said", [b"", b"an answer that nobody asked for"])
def test_an_idle_connection_that_the_peer_closed_takes_no_batch(both: Any, reset: bool, said: bytes) -> None:
    at, sink_for = both
    with StreamPeer(*[peers.leave_when_told(reset)] * 3, at=at) as peer:
        sink = sink_for(peer)
        for number in range(4):
            deliver(sink, b"%03d" % number)
            peer.wait(lambda: peer.accepted[number].data)  # noqa: B023
            if number < 3:
                peer.accepted[number].socket.sendall(said)
                peer.accepted[number].may_leave.set()
                peer.wait(lambda: peer.accepted[number].ended)  # noqa: B023
        peer.wait(lambda: len(peer.lines) == 4)
        assert [accepted.lines for accepted in peer.accepted] == [[b"%03d" % number] for number in range(4)]


@on_linux
def test_a_peer_that_only_ends_its_own_side(tcp: Callable[..., TcpSink]) -> None:
    """Whoever says nothing may say so; what is under way is delivered, and a new connection is made for the next."""

    def half_close(peer: StreamPeer, accepted: peers.Accepted) -> None:
        peers.read_until(peer, accepted, 10)
        accepted.socket.shutdown(socket.SHUT_WR)
        peers.read_all(peer, accepted)

    with StreamPeer(half_close, buffer_bytes=4096) as peer:
        sink = tcp(peer)
        deliver(sink, b"x" * 3_000_000)
        deliver(sink, b"two")
        peer.wait(lambda: len(peer.lines) == 2)
        assert [list(map(len, accepted.lines)) for accepted in peer.accepted] == [[3_000_000], [3]]


def test_what_the_peer_says_is_ignored(both: Any) -> None:
    at, sink_for = both
    with StreamPeer(peers.chatter(b"hello\n" * 20_000), at=at) as peer:
        sink = sink_for(peer)
        for number in range(10):
            deliver(sink, b"%06d" % number)
        assert peer.said.wait(peers.PATIENCE_SECONDS)
        deliver(sink, b"%06d" % 10)
        peer.wait(lambda: len(peer.lines) == 11)
        assert len(peer.accepted) == 1


def test_refused(tcp: Callable[..., TcpSink]) -> None:
    with peers.refused_port() as port:
        sink = tcp(port)
        for _ in range(2):
            with pytest.raises(SinkError) as caught:
                deliver(sink, b"one")
            assert str(caught.value) == f"tcp 127.0.0.1:{port}: Connection refused"
            assert caught.value.delivered == 0
        with StreamPeer(port=port) as peer:
            deliver(sink, b"one")
            peer.wait(lambda: peer.lines == [b"one"])


def test_a_host_without_address(tcp: Callable[..., TcpSink]) -> None:
    with pytest.raises(SinkError, match=r"^tcp no-such-host\.invalid:9000: .+"):
        deliver(tcp(9000, "no-such-host.invalid"), b"one")


def test_a_peer_that_accepts_no_connection(tcp: Callable[..., TcpSink]) -> None:
    """Its queue of connections is full: the kernel answers nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            sink = tcp(port, timeout=SHORT)
            with pytest.raises(SinkError) as caught:
                deliver(sink, b"one")
    assert str(caught.value) == f"tcp 127.0.0.1:{port}: timed out after 200ms"


def test_ipv6(tcp: Callable[..., TcpSink]) -> None:
    with StreamPeer(at="::1") as peer:
        deliver(tcp(peer, "[::1]"), b"one")
        peer.wait(lambda: peer.lines == [b"one"])


def test_the_next_address_of_a_name(tcp: Callable[..., TcpSink]) -> None:
    """localhost may be ::1 first, where nobody listens."""
    with StreamPeer() as peer:
        deliver(tcp(peer, "localhost"), b"one")
        peer.wait(lambda: peer.lines == [b"one"])


@on_linux
@pytest.mark.parametrize("keepalive", [True, False])
def test_keepalive(tcp: Callable[..., TcpSink], keepalive: bool) -> None:
    with StreamPeer() as peer:
        sink = tcp(peer, keepalive=keepalive, timeout=Duration(1.5))
        deliver(sink, b"one")
        assert sink._link is not None
        connection = sink._link.socket
        options = [
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        ]
        assert bool(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) is keepalive
        assert (options == [30, 10, 3, 3000]) is keepalive
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# Unix paths


def test_an_absent_unix_path(unix: Callable[..., UnixSink], tmp_path: Path) -> None:
    path = tmp_path / "socket"
    sink = unix(path)
    with pytest.raises(SinkError) as caught:
        deliver(sink, b"one")
    assert str(caught.value) == f"unix {path}: No such file or directory"
    with StreamPeer(at=path) as peer:
        deliver(sink, b"one")
        peer.wait(lambda: peer.lines == [b"one"])


def test_a_stale_unix_path(unix: Callable[..., UnixSink], tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with StreamPeer(at=path):
        pass
    sink = unix(path)
    with pytest.raises(SinkError, match="Connection refused"):
        deliver(sink, b"one")
    path.unlink()
    with StreamPeer(at=path) as peer:
        deliver(sink, b"one")
        peer.wait(lambda: peer.lines == [b"one"])


def test_a_regular_file_at_a_unix_path(unix: Callable[..., UnixSink], tmp_path: Path) -> None:
    path = tmp_path / "socket"
    path.write_bytes(b"mine")
    with pytest.raises(SinkError, match="Connection refused"):
        deliver(unix(path), b"one")
    assert path.read_bytes() == b"mine"


def test_a_datagram_socket_at_a_unix_path(unix: Callable[..., UnixSink], tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(SinkError, match="Protocol wrong type for socket"):
            deliver(unix(path), b"one")


@pytest.mark.parametrize("path", ["", "/" + "x" * 107, "/" + "é" * 54])
def test_unix_paths_that_are_wrong(path: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"^path: a path of 1 to 107 bytes"):
        msgspec.convert({"type": "unix", "path": path}, UnixSettings)


def test_the_longest_unix_path(unix: Callable[..., UnixSink], tmp_path: Path) -> None:
    place = tmp_path / "d"
    path = place / ("x" * (107 - len(str(place)) - 1))
    place.mkdir()
    assert len(str(path)) == 107
    with StreamPeer(at=path) as peer:
        deliver(unix(path), b"one")
        peer.wait(lambda: peer.lines == [b"one"])


# Addresses and other settings


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("localhost:9000", "localhost", 9000),
        ("a-b.example.com.:1", "a-b.example.com.", 1),
        ("127.0.0.1:65535", "127.0.0.1", 65535),
        ("[::1]:9000", "::1", 9000),
        ("[fe80::1%eth0]:9000", "fe80::1%eth0", 9000),
        ("under_score:09000", "under_score", 9000),
    ],
)
def test_addresses(address: str, host: str, port: int) -> None:
    assert host_and_port(address) == (host, port)


@pytest.mark.parametrize(
    "address",
    [
        *("", ":", "a", "a:", ":9000", "a:0", "a:65536", "a:99999", "a:-1", "a:+1", "a:1 ", " a:1", "a b:1", "a:1\n"),
        *("::1:9000", "[::1]", "[::1]:", "[::1:9000", "[]:9000", "[a]:9000", "[127.0.0.1]:9000", "[::g]:9000"),
        *("http://a:1", "a:1/x", "a@b:1", "256.0.0.1:9000", "1.2.3:9000", "a..b:1", ".a:1", f"{'a' * 64}:1"),
        *(f"{'a.' * 127}:1", "bücher.example:9000", "a:٣"),
    ],
)
def test_addresses_that_are_wrong(address: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert({"type": "tcp", "address": address}, TcpSettings)
    assert str(caught.value) == 'address: "host:port", with a port from 1 to 65535'


@pytest.mark.parametrize("timeout", [0, 0.0009, 3601])
def test_timeouts_that_are_wrong(timeout: float) -> None:
    for make in (
        lambda: TcpSettings(address="a:1", timeout=Duration(timeout)),
        lambda: UnixSettings(path="/a", timeout=Duration(timeout)),
    ):
        with pytest.raises(ValueError, match=r"^timeout: a duration from 1ms to 1h$"):
            make()


def test_types() -> None:
    assert TcpSettings(address="a:1").type == "tcp"
    assert UnixSettings(path="/a").type == "unix"


def test_without_tls_no_tls_is_imported() -> None:
    """It takes a megabyte of memory; neither does the codec for names, which is no small thing either."""
    program = (
        "import socket, sys, threading\n"
        "from agent.sinks.stream import TcpSettings, TcpSink\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "sink = TcpSink(TcpSettings(address=f'127.0.0.1:{listener.getsockname()[1]}'))\n"
        "sink.open(); sink.deliver([memoryview(b'one')]); sink.close()\n"
        "print([name for name in ('ssl', 'encodings.idna', 'urllib3') if name in sys.modules])\n"
    )
    run = subprocess.run(
        [sys.executable, "-B", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (run.stdout, run.stderr) == ("[]\n", "")


# TLS


class Pki:
    """Two authorities, one of them ours; contexts of servers, and settings of clients."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.authority, self.other = trustme.CA(), trustme.CA()
        self.authority.cert_pem.write_to_path(str(place / "ca.pem"))
        self.other.cert_pem.write_to_path(str(place / "other.pem"))

    def server(self, *names: str, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.maximum_version = version
        self.authority.issue_cert(*names).configure_cert(context)
        return context

    def picky_server(self, version: ssl.TLSVersion) -> ssl.SSLContext:
        """One that wants a certificate of its clients."""
        context = self.server("127.0.0.1", version=version)
        context.verify_mode = ssl.CERT_REQUIRED
        self.authority.configure_trust(context)
        return context

    def trusting(self, name: str = "ca", **settings: str) -> TlsSettings:
        return TlsSettings(ca=str(self._place / f"{name}.pem"), **settings)

    def with_certificate(self, authority: trustme.CA) -> TlsSettings:
        path = self._place / "client.pem"
        path.write_bytes(authority.issue_cert("agent@example.com").private_key_and_cert_chain_pem.bytes())
        path.chmod(0o600)
        return self.trusting(certificate=str(path))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])


@VERSIONS
@pytest.mark.parametrize("largest_bytes", [10, 300_000])
def test_lines_over_tls(tcp: Callable[..., TcpSink], pki: Pki, version: ssl.TLSVersion, largest_bytes: int) -> None:
    payloads = numbered(60, largest_bytes)
    payloads[3] = b"000003"
    with StreamPeer(tls=pki.server("127.0.0.1", version=version)) as peer:
        sink = tcp(peer, tls=pki.trusting())
        deliver_all(sink, payloads, batch=7)
        sink.close()
        peer.wait(lambda: peer.accepted[0].ended)
        assert peer.lines == payloads
        assert len(peer.accepted) == 1
        assert peer.accepted[0].fault == ""


def test_a_reader_of_single_bytes_over_tls(tcp: Callable[..., TcpSink], pki: Pki) -> None:
    payloads = numbered(20, 10_000)
    with StreamPeer(peers.byte_by_byte, tls=pki.server("127.0.0.1"), buffer_bytes=4096) as peer:
        deliver(tcp(peer, tls=pki.trusting()), *payloads)
        peer.wait(lambda: len(peer.lines) == 20)
        assert peer.lines == payloads


def test_a_server_name_other_than_the_address(tcp: Callable[..., TcpSink], pki: Pki) -> None:
    with StreamPeer(tls=pki.server("metrics.example")) as peer:
        deliver(tcp(peer, tls=pki.trusting(server_name="metrics.example")), b"one")
        peer.wait(lambda: peer.lines == [b"one"])


def assert_nothing_was_said(peer: StreamPeer, count: int = 1) -> None:
    peer.wait(lambda: len(peer.accepted) == count and all(accepted.ended for accepted in peer.accepted))
    assert [bytes(accepted.data) for accepted in peer.accepted] == [b""] * count


@pytest.mark.parametrize(
    ("names", "authority", "reason"),
    [
        (["127.0.0.1"], "other", "certificate verify failed: unable to get local issuer certificate"),
        (["metrics.example"], "ca", "certificate verify failed: IP address mismatch, certificate is not valid for"),
    ],
)
def test_a_peer_that_fails_verification_gets_nothing(
    tcp: Callable[..., TcpSink], pki: Pki, names: list[str], authority: str, reason: str
) -> None:
    with StreamPeer(tls=pki.server(*names)) as peer:
        sink = tcp(peer, tls=pki.trusting(authority))
        for count in (1, 2):
            with pytest.raises(SinkError) as caught:
                deliver(sink, b"secret")
            assert str(caught.value).startswith(f"tcp 127.0.0.1:{peer.port}: {reason}")
            assert caught.value.delivered == 0
            assert_nothing_was_said(peer, count)


def test_the_wrong_server_name(tcp: Callable[..., TcpSink], pki: Pki) -> None:
    with StreamPeer(tls=pki.server("127.0.0.1")) as peer:
        with pytest.raises(SinkError, match=r"Hostname mismatch, certificate is not valid for 'other.example'$"):
            deliver(tcp(peer, tls=pki.trusting(server_name="other.example")), b"secret")
        assert_nothing_was_said(peer)


@pytest.mark.parametrize(
    "behaviour", [peers.chatter(b"220 hello, who are you?\r\n"), peers.stall, peers.close_after(1)]
)
def test_a_plain_peer_where_tls_is_expected(tcp: Callable[..., TcpSink], pki: Pki, behaviour: peers.Behaviour) -> None:
    with StreamPeer(behaviour) as peer:
        with pytest.raises(SinkError) as caught:
            deliver(tcp(peer, tls=pki.trusting(), timeout=SHORT), b"secret")
        assert caught.value.delivered == 0
        peer.go_on.set()
        peer.wait(lambda: peer.accepted[0].ended)
        assert b"secret" not in peer.accepted[0].data


@VERSIONS
def test_a_client_certificate(tcp: Callable[..., TcpSink], pki: Pki, version: ssl.TLSVersion) -> None:
    with StreamPeer(tls=pki.picky_server(version)) as peer:
        deliver(tcp(peer, tls=pki.with_certificate(pki.authority)), b"one")
        peer.wait(lambda: peer.lines == [b"one"])


@VERSIONS
@pytest.mark.parametrize("shown", ["none", "other"])
def test_a_client_that_is_refused_delivers_nothing(
    tcp: Callable[..., TcpSink], pki: Pki, version: ssl.TLSVersion, shown: str
) -> None:
    """With TLS 1.3 the refusal comes when our side of the handshake is long done."""
    with StreamPeer(tls=pki.picky_server(version)) as peer:
        tls = pki.trusting() if shown == "none" else pki.with_certificate(pki.other)
        with pytest.raises(SinkError, match=r": TLS: .*(alert|certificate|ca)") as caught:
            deliver(tcp(peer, tls=tls), b"one")
        assert caught.value.delivered == 0
        assert_nothing_was_said(peer)


def test_more_than_one_look_takes_is_ignored_over_tls(tcp: Callable[..., TcpSink], pki: Pki) -> None:
    with StreamPeer(peers.chatter(b"hello\n" * 100_000), tls=pki.server("127.0.0.1")) as peer:
        sink = tcp(peer, tls=pki.trusting())
        for number in range(10):
            deliver(sink, b"%06d" % number)
        peer.wait(lambda: len(peer.lines) == 10)
        assert len(peer.accepted) == 1


def test_delivery_opens_what_was_not_opened(pki: Pki) -> None:
    with StreamPeer(tls=pki.server("127.0.0.1")) as peer:
        sink = TcpSink(TcpSettings(address=f"127.0.0.1:{peer.port}", tls=pki.trusting()))
        deliver(sink, b"one")
        sink.close()
        peer.wait_for_end(b"one")


def test_a_tls_peer_that_sends_no_ticket(tcp: Callable[..., TcpSink], pki: Pki) -> None:
    """It costs the wait for a refusal that doesn't come, and goes on."""
    server = pki.server("127.0.0.1")
    server.num_tickets = 0
    with StreamPeer(peers.read_all, peers.close_after(0), tls=server) as peer:
        sink = tcp(peer, tls=pki.trusting(), timeout=SHORT)
        deliver(sink, b"one")
        sink.close()
        with pytest.raises(SinkError, match="closed by the peer after the handshake"):
            deliver(sink, b"two")
        deliver(sink, b"two")
        peer.wait(lambda: [accepted.lines for accepted in peer.accepted] == [[b"one"], [], [b"two"]])


def test_a_tls_peer_that_dies_in_the_middle_and_comes_back(tcp: Callable[..., TcpSink], pki: Pki) -> None:
    payloads = numbered(300, 30_000)
    deaths = [peers.reset_after(100_000), peers.close_after(700_000), peers.reset_after(1)]
    with StreamPeer(*deaths, tls=pki.server("127.0.0.1"), buffer_bytes=2048) as peer:
        sink = tcp(peer, tls=pki.trusting())
        errors = deliver_all(sink, payloads, batch=100)
        sink.close()
        peer.wait_for_end(payloads[-1])
        check_at_least_once(peer, payloads)
    assert len(errors) == 3


@on_linux
def test_a_stalled_tls_peer(tcp: Callable[..., TcpSink], pki: Pki) -> None:
    payloads = [b"x" * 20_000] * 300
    with StreamPeer(peers.stall, tls=pki.server("127.0.0.1"), buffer_bytes=4096) as peer:
        sink = tcp(peer, tls=pki.trusting(), timeout=SHORT)
        with pytest.raises(SinkError, match="the peer took nothing for 200ms") as caught:
            deliver(sink, *payloads)
        assert caught.value.delivered == 0
        peer.go_on.set()
        deliver(sink, *payloads)
        sink.close()
        peer.wait_for_end(payloads[-1])
        assert peer.accepted[1].lines == payloads


@VERSIONS
def test_an_idle_tls_connection_that_the_peer_closed(
    tcp: Callable[..., TcpSink], pki: Pki, version: ssl.TLSVersion
) -> None:
    with StreamPeer(*[peers.close_after(4)] * 3, tls=pki.server("127.0.0.1", version=version)) as peer:
        sink = tcp(peer, tls=pki.trusting())
        for number in range(4):
            deliver(sink, b"%03d" % number)
            if number < 3:
                peer.wait(lambda: peer.accepted[number].ended)  # noqa: B023
        peer.wait(lambda: len(peer.lines) == 4)
        assert [accepted.lines for accepted in peer.accepted] == [[b"%03d" % number] for number in range(4)]


def test_a_bad_file_is_an_error_at_the_start(tcp: Callable[..., TcpSink], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.pem"):
        tcp(1, tls=TlsSettings(ca=str(tmp_path / "absent.pem")))
