"""sock_diag replies: lengths that differ, errors, interruptions and damage; and a kernel that answers for real."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ProbeError
from probes.netlink import (
    AF_INET,
    AF_INET6,
    INET,
    BrokenDumpError,
    RefusedError,
    Reply,
    SockDiag,
    messages,
)
from probes.socket_tallies import INET_RECORD, LISTEN, UDP_UNCONNECTED, InetTally, UnixTally

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="netlink is Linux's")

SEQUENCE = 0x5EED1234
TCPDIAG = 18
ERROR, DONE, OVERRUN, NOOP = 2, 3, 4, 1
MULTI, INTERRUPTED = 2, 0x10


def message(kind: int, payload: bytes, sequence: int = SEQUENCE, flags: int = MULTI) -> bytes:
    """A netlink message, padded to 4 bytes as the kernel does."""
    whole = struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 4242) + payload
    return whole + bytes(-len(whole) % 4)


def inet(state: int, port: int = 80, *, queue: int = 0, attributes: bytes = b"", **more: int) -> bytes:
    body = np.zeros(1, dtype=INET)
    body["family"], body["state"], body["local_port"], body["receive_queue"] = AF_INET, state, port, queue
    body["local"] = bytes((127, 0, 0, 1)).ljust(16, b"\0")
    return message(TCPDIAG, body.tobytes() + attributes, **more)


def done(code: int = 0, **more: int) -> bytes:
    return message(DONE, struct.pack("=i", code), **more)


def error(code: int) -> bytes:
    return message(ERROR, struct.pack("=i", -code) + bytes(16), flags=0)


def parse(datagram: bytes) -> tuple[InetTally, bool]:
    """The datagram's TCP sockets, from a buffer that has an older and longer one's bytes behind it."""
    reply = Reply(bytearray(datagram) + bytearray(inet(1) * 3))
    tally = listeners()
    return tally, messages(reply, len(datagram), SEQUENCE, TCPDIAG, INET.itemsize, tally)


def listeners() -> InetTally:
    return InetTally(1 << LISTEN)


def unconnected() -> InetTally:
    return InetTally(1 << UDP_UNCONNECTED)


def listed(tally: InetTally) -> np.ndarray[Any, np.dtype[np.void]]:
    return np.frombuffer(tally.listed, dtype=INET_RECORD)


def states_of(tally: InetTally) -> dict[int, int]:
    return {state: count for state, count in enumerate(tally.states) if count}


def ports_of(tally: InetTally) -> list[int]:
    ports: list[int] = listed(tally)["local_port"].tolist()
    return ports


attribute_bytes = st.integers(0, 16).map(lambda words: bytes(range(words * 4)))
sockets = st.lists(st.tuples(st.integers(0, 255), st.integers(0, 65535), attribute_bytes), max_size=90)


@given(sockets, st.booleans(), st.booleans())
def test_every_message_is_counted_once_whatever_its_length(
    those: list[tuple[int, int, bytes]], is_last: bool, has_stale: bool
) -> None:
    datagram = b"".join(inet(state, port, attributes=extra) for state, port, extra in those)
    if has_stale:
        stale = inet(1, sequence=SEQUENCE - 1) + done(sequence=SEQUENCE - 1)
        datagram = datagram + stale if len(those) % 2 else stale + datagram
    tally, finished = parse(datagram + done() * is_last)
    expected: dict[int, int] = {}
    for state, _, _ in those:
        expected[state] = expected.get(state, 0) + 1
    assert states_of(tally) == expected
    assert ports_of(tally) == [port for state, port, _ in those if state == LISTEN]
    assert finished == is_last


@pytest.mark.parametrize("forged", [b"", struct.pack("=IHHI", 88, TCPDIAG, MULTI, SEQUENCE)])
def test_a_socket_that_contains_the_sequence_number_is_no_message(forged: bytes) -> None:
    word = struct.pack("=I", SEQUENCE)
    tally, _ = parse(inet(10, 1) * 20 + inet(10, 2, attributes=bytes(8) + (forged or word) + bytes(88)) + inet(1) * 20)
    assert states_of(tally) == {10: 21, 1: 20}
    assert ports_of(tally) == [1] * 20 + [2]


def test_short_and_long_messages_together_as_time_wait_has_them() -> None:
    """A TIME_WAIT socket comes without attributes, an established one with them."""
    tally, finished = parse((inet(1, attributes=bytes(8)) + inet(6) + inet(10, 22, queue=7, attributes=bytes(28))) * 50)
    assert states_of(tally) == {1: 50, 6: 50, 10: 50}
    assert len(listed(tally)) == 50
    assert set(listed(tally)["receive_queue"].tolist()) == {7}
    assert not finished


@pytest.mark.parametrize("before", [0, 60])
@pytest.mark.parametrize(
    ("tail", "expected", "says"),
    [
        (error(errno.EPERM), RefusedError, "not permitted"),
        (error(errno.ENOENT), RefusedError, "No such file"),
        (error(errno.EOPNOTSUPP), RefusedError, "not supported"),
        (done(-errno.ENOENT), RefusedError, "No such file"),
        (error(errno.EIO), ProbeError, "Input/output"),
        (done(-(2**31)), ProbeError, "2147483648"),
        (inet(1, flags=MULTI | INTERRUPTED), BrokenDumpError, "changed under"),
        (done(flags=MULTI | INTERRUPTED), BrokenDumpError, "changed under"),
        (message(OVERRUN, b"    "), BrokenDumpError, "lost a part"),
        (inet(1)[:-20], BrokenDumpError, "88 bytes where 68 are left"),
        (inet(1)[:12], BrokenDumpError, "12 bytes behind"),
        (struct.pack("=IHHII", 0, TCPDIAG, MULTI, SEQUENCE, 0), BrokenDumpError, "a message of 0 bytes"),
        (struct.pack("=IHHII", 15, TCPDIAG, MULTI, SEQUENCE, 0), BrokenDumpError, "a message of 15 bytes"),
        (struct.pack("=IHHII", 2**32 - 1, TCPDIAG, MULTI, SEQUENCE, 0), BrokenDumpError, "4294967295"),
        (message(TCPDIAG, bytes(71)), BrokenDumpError, "expected 88"),
    ],
)
def test_what_is_no_whole_reply_is_an_error(before: int, tail: bytes, expected: type[ProbeError], says: str) -> None:
    with pytest.raises(ProbeError, match=says) as raised:
        parse(inet(1) * before + tail)
    assert type(raised.value) is expected


def test_messages_of_other_kinds_and_acknowledgements_are_passed_over() -> None:
    tally, finished = parse(message(NOOP, b"") + inet(1) + error(0) + message(20, bytes(72)) + inet(6) + done())
    assert (states_of(tally), finished) == ({1: 1, 6: 1}, True)


RECORDED = b"".join(inet(state, 1000 + state, attributes=bytes(state % 5 * 4)) for state in range(1, 12)) * 4 + done()


@given(st.data())
def test_damage_ends_in_counts_or_a_probe_error(data: st.DataObject) -> None:
    damaged = bytearray(RECORDED)
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(damaged) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        damaged[start : start + len(patch)] = patch
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    try:
        tally, _ = parse(bytes(damaged))
    except ProbeError:
        return
    assert 0 <= sum(tally.states) <= len(damaged) / 88


@given(st.binary(max_size=5000))
def test_any_bytes_end_in_counts_or_a_probe_error(noise: bytes) -> None:
    try:
        tally, _ = parse(noise)
    except ProbeError:
        return
    assert sum(tally.states) == 0


def test_unix_sockets_by_type_and_state() -> None:
    listing = [(1, 10), (1, 1), (1, 1), (2, 7), (5, 10), (5, 7)] * 30
    datagram = b"".join(
        message(20, struct.pack("=4BIII", 1, kind, state, 0, 77, 1, 0) + bytes(state * 4)) for kind, state in listing
    )
    reply = Reply(bytearray(datagram))
    tally = UnixTally()
    finished = messages(reply, len(datagram), SEQUENCE, 20, 16, tally)
    assert (tally.types[1], tally.types[2], tally.types[5], sum(tally.types)) == (90, 30, 60, 180)
    assert tally.listening == 60
    assert not finished


# A peer that answers as the kernel may, over a socket of the same kind of datagrams.

Answer = Callable[[int], list[bytes]]
"""The datagrams that answer a request with this sequence number."""


class PeerDiag(SockDiag):
    """Asks a peer; the n-th connection is answered by the n-th answer, and not at all by a None."""

    def __init__(self, *answers: Answer | None, buffer_bytes: int = 65536) -> None:
        self.answers = list(answers)
        self.peers: list[socket.socket] = []
        self.threads: list[threading.Thread] = []
        super().__init__(buffer_bytes)

    def _connect(self) -> socket.socket:
        ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.peers.append(peer)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            self.threads.append(threading.Thread(target=self._answer, args=(peer, answer)))
            self.threads[-1].start()
        return ours

    def _answer(self, peer: socket.socket, answer: Answer) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it gives up on a broken dump
            while request := peer.recv(4096):
                (sequence,) = struct.unpack_from("=I", request, 8)
                for datagram in answer(sequence):
                    peer.send(datagram)

    def close(self) -> None:
        super().close()
        for thread in self.threads:
            thread.join()
        for peer in self.peers:
            peer.close()


@pytest.fixture
def ask() -> Iterator[Callable[..., PeerDiag]]:
    diags: list[PeerDiag] = []

    def make(*answers: Answer | None, buffer_bytes: int = 65536) -> PeerDiag:
        diags.append(PeerDiag(*answers, buffer_bytes=buffer_bytes))
        return diags[-1]

    yield make
    for diag in diags:
        diag.close()


def whole(sequence: int) -> list[bytes]:
    return [inet(1, sequence=sequence) * 40, inet(10, 22, sequence=sequence), done(sequence=sequence)]


def large(sequence: int) -> list[bytes]:
    first = inet(1, sequence=sequence) * 300
    second = inet(6, sequence=sequence) * 250 + inet(10, 22, sequence=sequence)
    return [*[first, second] * 12, inet(8, sequence=sequence), done(sequence=sequence)]


def test_large_datagrams_are_counted_together(ask: Callable[..., PeerDiag]) -> None:
    """Some wait to be received when the first one has come, some don't: neither matters."""
    diag = ask(large)
    for _ in range(3):
        tally = diag.tcp(0xFFF, listeners)
        assert states_of(tally) == {1: 3600, 6: 3000, 8: 1, 10: 12}
        assert ports_of(tally) == [22] * 12
    assert len(diag.peers) == 1


def interrupted(sequence: int) -> list[bytes]:
    return [inet(1, sequence=sequence) * 30, done(sequence=sequence, flags=MULTI | INTERRUPTED)]


def damaged(sequence: int) -> list[bytes]:
    return [inet(1, sequence=sequence) * 30, bytes(16)]


def test_datagrams_of_a_dump_are_counted_together(ask: Callable[..., PeerDiag]) -> None:
    assert states_of(ask(whole).tcp(0xFFF, listeners)) == {1: 40, 10: 1}


@pytest.mark.parametrize("first", [interrupted, damaged])
def test_a_broken_dump_is_repeated_once_and_never_counted_half(ask: Callable[..., PeerDiag], first: Answer) -> None:
    diag = ask(first, whole)
    assert states_of(diag.tcp(0xFFF, listeners)) == {1: 40, 10: 1}
    assert len(diag.peers) == 2
    diag = ask(first, first, whole)
    with pytest.raises(BrokenDumpError):
        diag.tcp(0xFFF, listeners)
    assert len(diag.peers) == 3
    assert states_of(diag.tcp(0xFFF, listeners)) == {1: 40, 10: 1}


def test_a_datagram_that_does_not_fit_makes_the_buffer_grow(ask: Callable[..., PeerDiag]) -> None:
    diag = ask(whole, whole, buffer_bytes=100)
    assert states_of(diag.tcp(0xFFF, listeners)) == {1: 40, 10: 1}
    assert len(diag.peers) == 2
    assert states_of(diag.tcp(0xFFF, listeners)) == {1: 40, 10: 1}
    assert len(diag.peers) == 2


def test_an_answer_to_an_older_request_is_passed_over(ask: Callable[..., PeerDiag]) -> None:
    diag = ask(lambda sequence: [*whole(sequence - 1), *whole(sequence)])
    assert states_of(diag.tcp(0xFFF, listeners)) == {1: 40, 10: 1}


def test_no_answer_is_an_error_after_a_second_and_the_next_request_goes_on(ask: Callable[..., PeerDiag]) -> None:
    diag = ask(None, whole)
    with pytest.raises(ProbeError, match="no answer within 1 s"):
        diag.tcp(0xFFF, listeners)
    assert states_of(diag.tcp(0xFFF, listeners)) == {1: 40, 10: 1}


def test_a_refusal_is_not_repeated(ask: Callable[..., PeerDiag]) -> None:
    diag = ask(lambda sequence: [message(ERROR, struct.pack("=i", -errno.EPERM), sequence=sequence, flags=0)])
    for _ in range(2):
        with pytest.raises(RefusedError, match="not permitted"):
            diag.unix(UnixTally)
    assert len(diag.peers) == 1


class ForbiddenDiag(SockDiag):
    def _connect(self) -> socket.socket:
        raise PermissionError(errno.EPERM, "Operation not permitted")


def test_no_netlink_socket_is_a_refusal() -> None:
    with pytest.raises(RefusedError, match="no netlink socket: Operation not permitted"):
        ForbiddenDiag()


# The kernel itself.


@pytest.fixture
def diag() -> Iterator[SockDiag]:
    opened = SockDiag()
    yield opened
    opened.close()


@linux
def test_the_kernel_lists_what_this_test_opened(diag: SockDiag) -> None:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=17) as server,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as server6,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connected,
    ):
        bound.bind(("127.0.0.1", 0))
        connected.connect(bound.getsockname())
        for states in (0xFFF, 1 << LISTEN):
            rows = {int(row["inode"]): row for row in listed(diag.tcp(states, listeners))}
            row, row6 = rows[inode(server)], rows[inode(server6)]
            assert (row["family"], row["state"], row["local_port"]) == (AF_INET, LISTEN, server.getsockname()[1])
            assert row["local"].tobytes() == bytes((127, 0, 0, 1)).ljust(16, b"\0")
            assert row["send_queue"] == 17
            assert (row6["family"], row6["local_port"]) == (AF_INET6, server6.getsockname()[1])
            assert row6["local"].tobytes() == bytes(15) + b"\1"
        udp = listed(diag.udp(AF_INET, 1 << UDP_UNCONNECTED, unconnected))["inode"].tolist()
        assert inode(bound) in udp
        assert inode(connected) not in udp


@linux
def test_what_the_kernel_does_not_have_is_refused(diag: SockDiag) -> None:
    with pytest.raises(RefusedError, match="refused"):
        diag.udp(99, 0xFFF, listeners)
    assert sum(diag.udp(AF_INET, 0xFFF, listeners).states) >= 0  # the next request is answered


@linux
def test_a_small_buffer_and_many_sockets(diag: SockDiag) -> None:
    """The first dump is cut off, the second one comes in datagrams of the buffer's new size."""
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(300)]
    small = SockDiag(buffer_bytes=64)
    try:
        wanted = {inode(server) for server in servers}
        for asked in (small, diag):
            inodes = listed(asked.tcp(1 << LISTEN, listeners))["inode"].tolist()
            assert wanted <= set(inodes)
            assert len(inodes) == len(set(inodes))
    finally:
        small.close()
        for server in servers:
            server.close()


def inode(opened: socket.socket) -> int:
    return os.fstat(opened.fileno()).st_ino
