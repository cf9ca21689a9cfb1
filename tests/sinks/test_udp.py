"""The UDP sink against real sockets on loopback, where what was sent has come when `deliver` returns."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.errors import RejectedError, SinkError
from agent.sinks.udp import UdpSettings, UdpSink
from tests.serializers.writing import DISK, TIMES, Writer
from tests.sinks.peers import Frame, UdpPeer, assemble, refused_port
from tests.workers import Clock, events
from tests.workers import opened as worker_of

GOLDEN = Path(__file__).parents[1] / "fixtures/golden/vm.json"


@pytest.fixture
def opened() -> Iterator[Callable[..., UdpSink]]:
    sinks = []

    def make(port: int, host: str = "127.0.0.1", **settings: Any) -> UdpSink:
        sink = UdpSink(UdpSettings(address=f"{host}:{port}", **settings))
        sink.open()
        sinks.append(sink)
        return sink

    yield make
    for sink in sinks:
        sink.close()


def deliver(sink: UdpSink, *payloads: bytes) -> None:
    views = [memoryview(bytearray(payload)) for payload in payloads]
    try:
        sink.deliver(views)
    finally:
        for view in views:
            view.release()


def golden(sequence: int, **more: object) -> Frame:
    frame: Frame = json.loads(GOLDEN.read_text())
    return frame | {"sequence": sequence, "time_unix_ns": 10**18 + sequence} | more


def small(sequence: int, size_bytes: int = 0) -> bytes:
    """A frame that fits."""
    frame = {"instance": "a", "sequence": sequence, "time_unix_ns": sequence, "pad": "x" * size_bytes}
    return msgspec.json.encode(frame)


def test_frames_come_whole_and_datagrams_are_numbered_by_one(opened: Callable[..., UdpSink]) -> None:
    frames = [golden(number) for number in range(1, 31)]
    with UdpPeer() as peer:
        sink = opened(peer.port)
        for start in range(0, 30, 7):
            deliver(sink, *map(msgspec.json.encode, frames[start : start + 7]))
        datagrams = peer.receive()
    assert [datagram.sequence for datagram in datagrams] == list(range(1, len(datagrams) + 1))
    assert max(datagram.size_bytes for datagram in datagrams) <= 1472
    found = [
        (nanoseconds, assemble(datagram.text for datagram in group))
        for nanoseconds, group in groupby(datagrams, key=lambda datagram: datagram.nanoseconds)
    ]
    assert found == [(frame["time_unix_ns"], frame) for frame in frames]


def test_a_lost_datagram_is_a_gap(opened: Callable[..., UdpSink]) -> None:
    rng = random.Random(4)
    with UdpPeer() as peer:
        sink = opened(peer.port)
        deliver(sink, *(msgspec.json.encode(golden(number)) for number in range(1, 11)))
        datagrams = peer.receive()
    lost = rng.sample(range(1, len(datagrams)), 3)
    came = {datagram.sequence for datagram in datagrams if datagram.sequence not in lost}
    assert set(range(1, max(came) + 1)) - came == set(lost)


def test_what_fits_goes_as_it_is(opened: Callable[..., UdpSink]) -> None:
    overhead = len(small(1))
    with UdpPeer() as peer:
        sink = opened(peer.port)
        whole = small(1, 1452 - overhead)
        deliver(sink, whole, small(2))
        datagrams = peer.receive()
    assert [datagram.text for datagram in datagrams] == [whole, small(2)]
    assert [datagram.size_bytes for datagram in datagrams] == [1472, 20 + overhead]


def test_max_bytes_is_of_the_whole_datagram(opened: Callable[..., UdpSink]) -> None:
    with UdpPeer() as peer:
        deliver(opened(peer.port, max_bytes=700), msgspec.json.encode(golden(1)))
        datagrams = peer.receive()
    assert 680 < max(datagram.size_bytes for datagram in datagrams) <= 700


def test_the_largest_datagram_that_there_is(opened: Callable[..., UdpSink]) -> None:
    with UdpPeer() as peer:
        sink = opened(peer.port, max_bytes=65_507)
        deliver(sink, small(1, 65_487 - len(small(1))))
        assert [datagram.size_bytes for datagram in peer.receive()] == [65_507]


def test_ipv6(opened: Callable[..., UdpSink]) -> None:
    with UdpPeer("::1") as peer:
        deliver(opened(peer.port, "[::1]"), small(1))
        assert [datagram.text for datagram in peer.receive()] == [small(1)]


def test_a_name_is_resolved(opened: Callable[..., UdpSink]) -> None:
    with UdpPeer() as peer:
        deliver(opened(peer.port, "localhost"), small(1))
        assert len(peer.receive()) <= 1  # localhost may be ::1, and UDP doesn't say that nobody listens there


def test_nobody_listens(opened: Callable[..., UdpSink]) -> None:
    """The host's answer to the first datagram is the second one's error, and that one wasn't sent."""
    with refused_port(socket.SOCK_DGRAM) as port:
        sink = opened(port)
        with pytest.raises(SinkError) as caught:
            deliver(sink, small(1), small(2), small(3))
        assert str(caught.value) == f"udp 127.0.0.1:{port}: Connection refused"
        assert not isinstance(caught.value, RejectedError)
        assert caught.value.delivered == 1
        with UdpPeer(port=port) as peer:
            deliver(sink, small(2), small(3))
            datagrams = peer.receive()
    assert [(datagram.sequence, datagram.text) for datagram in datagrams] == [(2, small(2)), (3, small(3))]


def test_a_payload_counts_when_all_of_its_datagrams_are_sent(opened: Callable[..., UdpSink]) -> None:
    """The second of its datagrams is refused: it is sent again whole, under new numbers."""
    frame = golden(1)
    with refused_port(socket.SOCK_DGRAM) as port:
        sink = opened(port)
        with pytest.raises(SinkError) as caught:
            deliver(sink, msgspec.json.encode(frame), small(2))
        assert caught.value.delivered == 0
        with UdpPeer(port=port) as peer:
            deliver(sink, msgspec.json.encode(frame), small(2))
            *parts, last = peer.receive()
    assert parts[0].sequence == 2
    assert assemble(part.text for part in parts) == frame
    assert last.text == small(2)


def test_a_peer_that_goes_and_comes_back(opened: Callable[..., UdpSink]) -> None:
    with refused_port(socket.SOCK_DGRAM) as port:
        sink = opened(port)
        with UdpPeer(port=port) as peer:
            deliver(sink, small(1))
            assert len(peer.receive()) == 1
        deliver(sink, small(2))  # nobody is there, and nobody has said so yet
        with pytest.raises(SinkError, match="Connection refused"):
            deliver(sink, small(3))
        with UdpPeer(port=port) as peer:
            deliver(sink, small(3))
            assert [(datagram.sequence, datagram.text) for datagram in peer.receive()] == [(3, small(3))]


def test_a_large_header_is_rejected_and_the_others_may_go(opened: Callable[..., UdpSink]) -> None:
    huge = msgspec.json.encode(golden(2, tags={"a": "x" * 2000}))
    with UdpPeer() as peer:
        sink = opened(peer.port)
        with pytest.raises(RejectedError, match=r"^udp 127\.0\.0\.1:\d+: its header has \d+ bytes") as caught:
            deliver(sink, small(1), huge, small(3))
        assert (caught.value.delivered, caught.value.each) == (1, True)
        with pytest.raises(RejectedError) as caught:
            deliver(sink, huge)
        assert (caught.value.delivered, caught.value.each) == (0, False)
        deliver(sink, small(3))
        assert [datagram.sequence for datagram in peer.receive()] == [1, 2]


def test_what_is_no_frame_is_rejected(opened: Callable[..., UdpSink]) -> None:
    with UdpPeer() as peer:
        sink = opened(peer.port)
        for payload in (b"", b"{}", b"no JSON", b'{"time_unix_ns":"now"}'):
            with pytest.raises(RejectedError):
                deliver(sink, payload)
        assert peer.receive() == []


def test_a_datagram_that_the_kernel_finds_too_large_is_rejected(opened: Callable[..., UdpSink]) -> None:
    with UdpPeer() as peer:
        sink = opened(peer.port, max_bytes=70_000)  # more than settings allow that are read from a file
        with pytest.raises(RejectedError, match="Message too long") as caught:
            deliver(sink, small(1), small(2, 66_000), small(3))
        assert (caught.value.delivered, caught.value.each) == (1, True)
        deliver(sink, small(3))
        assert [datagram.sequence for datagram in peer.receive()] == [1, 2]


def test_a_host_without_address(opened: Callable[..., UdpSink]) -> None:
    sink = opened(9000, "no-such-host.invalid")
    with pytest.raises(SinkError, match=r"^udp no-such-host\.invalid:9000: .+"):
        deliver(sink, small(1))


def test_close_twice_and_go_on(opened: Callable[..., UdpSink]) -> None:
    with UdpPeer() as peer:
        sink = opened(peer.port)
        deliver(sink, small(1))
        sink.close()
        sink.close()
        deliver(sink, small(2))
        assert [datagram.sequence for datagram in peer.receive()] == [1, 2]


def test_the_constructor_opens_nothing() -> None:
    sink = UdpSink(UdpSettings(address="127.0.0.1:9"))
    sink.open()
    assert sink._socket is None
    sink.close()


@pytest.mark.parametrize("size", [127, 65_508, "1KiB", -1])
def test_sizes_that_are_wrong(size: object) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"at `\$\.max_bytes`"):
        msgspec.convert({"type": "udp", "address": "a:1", "max_bytes": size}, UdpSettings)


@pytest.mark.parametrize("address", ["", "a", "a:0", "[::1]", ":9000"])
def test_addresses_that_are_wrong(address: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=r'^address: "host:port", with a port from 1 to 65535'):
        msgspec.convert({"type": "udp", "address": address}, UdpSettings)


def test_a_socket_does_not_wait_for_ever() -> None:
    """The kernel has a timeout for each send, without a question before it."""
    with UdpPeer() as peer:
        sink = UdpSink(UdpSettings(address=f"127.0.0.1:{peer.port}"))
        deliver(sink, small(1))
        assert sink._socket is not None
        assert sink._socket.gettimeout() is None
        assert any(sink._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16))
        sink.close()


def test_a_peer_that_is_away_fails_each_delivery_of_one_datagram() -> None:
    """The refusal of a datagram shows at the next one, and the first on a new socket always gets through."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        port = peer.getsockname()[1]
    sink = UdpSink(UdpSettings(type="udp", address=f"127.0.0.1:{port}"))
    failures = 0
    for number in range(12):
        with memoryview(b'{"instance":"i","sequence":%d,"time_unix_ns":1}' % number) as payload:
            try:
                sink.deliver([payload])
            except SinkError:
                failures += 1
    assert failures >= 10  # all but the first ones, whose refusal nobody has heard of yet
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", port))
        peer.settimeout(60)
        for number in range(3):
            with memoryview(b'{"instance":"i","sequence":%d,"time_unix_ns":1}' % number) as payload:
                sink.deliver([payload])
            assert b'"sequence":%d' % number in peer.recv(2000)
    sink.close()


def test_a_peer_that_is_away_opens_the_circuit(capsys: pytest.CaptureFixture[str]) -> None:
    """A frame in one datagram, delivered alone, again and again: told once, and then left in peace."""
    clock = Clock()
    with refused_port(socket.SOCK_DGRAM) as port:
        worker = worker_of(UdpSink(UdpSettings(address=f"127.0.0.1:{port}")), clock, records=1)
        for sequence in range(1, 21):
            worker.ring.push(small(sequence), sequence, clock())
        worker.finish(clock.seconds + 3600)  # an open circuit ends it
        worker.start()
        worker.join()
    told = [(line["event"], line.get("circuit")) for line in events(capsys)]
    assert told == [("sink fails, its ring holds the frames", None), ("sink's circuit", "open")]
    assert (worker.failures, worker.failures_in_a_row) == (5, 5)
    assert worker.frames == (1, 19, 0)  # the first one is lost: nobody had been refused before


def test_a_healthy_peer_is_not_waited_for(opened: Callable[..., UdpSink], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refusal one delivery waits to hear of another; none does before it, or after a success."""
    waits: list[UdpSink] = []
    listen = UdpSink._listen_for_refusal
    monkeypatch.setattr(UdpSink, "_listen_for_refusal", lambda sink: (waits.append(sink), listen(sink)))
    with refused_port(socket.SOCK_DGRAM) as port:
        sink = opened(port)
        with UdpPeer(port=port) as peer:
            for sequence in range(1, 11):
                deliver(sink, small(sequence))
            assert (len(peer.receive()), waits) == (10, [])
        with pytest.raises(SinkError, match="Connection refused"):
            deliver(sink, small(11), small(12))
        with UdpPeer(port=port) as peer:
            for sequence in range(12, 22):
                deliver(sink, small(sequence))
            assert (len(peer.receive()), len(waits)) == (10, 1)


# Other formats


def series_payload(format: Any, rows: int = 60, **labels: str) -> bytes:
    """A frame's second payload of such a format, of so many rows, one of them with these labels."""
    writer = Writer(format)
    for reads in range(2):
        writer.begin()
        disks = [((f"disk{row}", "ssd"), (reads * row, 1000), (1.0, 0.5)) for row in range(rows)]
        if labels:
            disks.insert(rows // 2, ((labels["device"], "ssd"), (reads, 1000), (1.0, 0.5)))
        writer.put(DISK, *disks)
        writer.put(TIMES, ((), (1, 2), (0.5, 2.0)))
    return writer.payload()


@pytest.mark.parametrize("format", ["influx", "graphite", "statsd", "dogstatsd"])
@pytest.mark.parametrize("max_bytes", [512, 1472, 65_507])
def test_lines_are_as_many_to_a_datagram_as_it_holds(
    opened: Callable[..., UdpSink], format: Any, max_bytes: int
) -> None:
    payload = series_payload(format)
    with UdpPeer() as peer:
        deliver(opened(peer.port, format=format, max_bytes=max_bytes), payload, payload)
        datagrams = peer.receive_bytes()
    assert max(map(len, datagrams)) <= max_bytes
    assert b"\n".join(datagrams) == payload + b"\n" + payload
    assert len(datagrams) <= 2 * (len(payload) // (max_bytes - 200) + 1)
    if max_bytes > len(payload):
        assert datagrams == [payload] * 2


@pytest.mark.parametrize("format", ["influx", "graphite", "statsd", "dogstatsd"])
def test_a_line_that_is_too_long_is_rejected_and_all_others_are_sent(
    opened: Callable[..., UdpSink], format: Any
) -> None:
    payload = series_payload(format, device="x" * 600)
    others = [line for line in payload.split(b"\n") if b"x" * 600 not in line]
    assert len(others) < len(payload.split(b"\n"))
    with UdpPeer() as peer:
        sink = opened(peer.port, format=format, max_bytes=512)
        expected = r"^udp 127\.0\.0\.1:\d+: a line of \d+ bytes: expected at most 512, its max_bytes$"
        with pytest.raises(RejectedError, match=expected) as caught:
            deliver(sink, b"a 1", payload, b"b 2")
        assert (caught.value.delivered, caught.value.each) == (1, True)
        assert b"\n".join(peer.receive_bytes()).split(b"\n") == [b"a 1", *others]
        deliver(sink, b"b 2")
        assert peer.receive_bytes() == [b"b 2"]


def test_messagepack_is_one_datagram(opened: Callable[..., UdpSink]) -> None:
    payload = series_payload("msgpack")
    assert b"\n" in payload
    with UdpPeer() as peer:
        deliver(opened(peer.port, format="msgpack", max_bytes=len(payload)), payload, payload)
        assert peer.receive_bytes() == [payload] * 2
        sink = opened(peer.port, format="msgpack", max_bytes=len(payload) - 1)
        with pytest.raises(RejectedError, match=rf"a payload of {len(payload)} bytes: expected at most") as caught:
            deliver(sink, payload)
        assert (caught.value.delivered, caught.value.each) == (0, False)
        assert peer.receive_bytes() == []
