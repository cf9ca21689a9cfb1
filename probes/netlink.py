"""NETLINK_SOCK_DIAG: every socket of the network namespace, counted without an object for each.

The kernel answers a dump request with datagrams of some 32 KB, each a chain of messages:
`struct nlmsghdr`, a fixed structure (`inet_diag_msg`, `unix_diag_msg`), attributes. Their
lengths differ, so the start of each message is found for a whole datagram at once, and
what is wanted of them is gathered from there. Sources: linux/netlink.h, sock_diag.h,
inet_diag.h, unix_diag.h; net/ipv4/inet_diag.c.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from agent.errors import ProbeError

Words = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.intp]

TCP_LISTEN = 10
UDP_UNCONNECTED = 7  # TCP_CLOSE: what an UDP socket is unless it is connected
ALL_STATES = 0xFFF
AF_INET = 2
AF_INET6 = 10
UNIX_STREAM, UNIX_DGRAM, UNIX_SEQPACKET = 1, 2, 5

INET = np.dtype(
    [
        ("family", "u1"),
        ("state", "u1"),
        ("timer", "u1"),
        ("retransmits", "u1"),
        ("local_port", ">u2"),
        ("remote_port", ">u2"),
        ("local", "V16"),
        ("remote", "V16"),
        ("interface", "u4"),
        ("cookie", "u4", (2,)),
        ("expires", "u4"),
        ("receive_queue", "u4"),
        ("send_queue", "u4"),
        ("uid", "u4"),
        ("inode", "u4"),
    ]
)
"""struct inet_diag_msg; an IPv4 address is the first 4 of the 16 bytes, the others are 0."""
INET_WORDS = INET.itemsize // 4

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_INT = struct.Struct("=i")
_HEADER_WORDS = _HEADER.size // 4
_UNIX_BYTES = 16  # family, type, state, padding; inode; cookie

_NETLINK_SOCK_DIAG = 4
_NLMSG_ERROR, _NLMSG_DONE, _NLMSG_OVERRUN = 2, 3, 4
_NLM_F_REQUEST_DUMP = 0x301
_NLM_F_MULTI = 2
_NLM_F_DUMP_INTR = 0x10
_TCPDIAG_GETSOCK = 18
_SOCK_DIAG_BY_FAMILY = 20

# EPERM ENOENT EACCES EINVAL EPROTONOSUPPORT EOPNOTSUPP EAFNOSUPPORT: no right, no such module, no such kernel.
_REFUSALS = frozenset((1, 2, 13, 22, 93, 95, 97))
_EAGAIN, _ENOBUFS = 11, 105
_ANSWER_SECONDS = 1
_RECEIVE_BYTES = 256 * 1024
_DATAGRAM_BYTES = 64 * 1024  # the kernel makes none above 32 KB (netlink_dump)
_MAX_DATAGRAM_BYTES = 16 * 1024 * 1024
_WALKED_BYTES = 2048  # below, a walk from message to message costs less than NumPy's calls


class RefusedError(ProbeError):
    """The kernel does not offer this dump, or not to us; text files may say the same."""


class BrokenDumpError(ProbeError):
    """A dump is incomplete or inconsistent; another try may do."""


class Reply:
    """One datagram's memory, as bytes and as words.

    Attributes:
        data: what `recv_into` fills.
        octets, words: uint8 and uint32 views of it.
    """

    __slots__ = ("data", "octets", "words")

    def __init__(self, data: bytearray) -> None:
        data.extend(bytes(-len(data) % 4))
        self.data = data
        self.octets = np.frombuffer(data, dtype=np.uint8)
        self.words = np.frombuffer(data, dtype=np.uint32)


class Tally(Protocol):
    """What a dump is counted into; made anew for each try, so that nothing is counted twice."""

    def take(self, reply: Reply, at: Offsets) -> None:
        """Counts messages, given the word at which each one's header starts; shape (n,)."""


TallyT = TypeVar("TallyT", bound=Tally)


class InetTally:
    """Sockets by state, and those in one state kept.

    Attributes:
        states: int64, shape (256,): how many sockets are in each state.
        kept: uint32, shape (n, 18): an `inet_diag_msg` a row, in words; `.view(INET)` names its parts.
    """

    __slots__ = ("_kept", "_state", "states")

    def __init__(self, state: int) -> None:
        self._state = state
        self._kept: list[Words] = []
        self.states = np.zeros(256, dtype=np.int64)

    def take(self, reply: Reply, at: Offsets) -> None:
        states = reply.octets[(at << 2) + (_HEADER.size + 1)]
        self.states += np.bincount(states, minlength=256)
        starts = at[states == self._state]
        if len(starts):
            self.keep(reply.words[starts[:, None] + _INET_PLACES])

    def keep(self, rows: Words) -> None:
        """Adds sockets to those kept; uint32, shape (n, 18)."""
        self._kept.append(rows)

    def add(self, other: InetTally) -> None:
        """Adds another tally's sockets."""
        self.states += other.states
        self._kept += other._kept

    @property
    def kept(self) -> Words:
        if len(self._kept) != 1:
            self._kept = [np.concatenate(self._kept) if self._kept else _NONE_KEPT]
        return self._kept[0]


class UnixTally:
    """Unix sockets by type, and those that listen.

    Attributes:
        types: int64, shape (256,): how many sockets there are of each type (SOCK_STREAM is 1).
    """

    __slots__ = ("listening", "types")

    def __init__(self) -> None:
        self.types = np.zeros(256, dtype=np.int64)
        self.listening = 0

    def take(self, reply: Reply, at: Offsets) -> None:
        starts = at << 2
        self.types += np.bincount(reply.octets[starts + (_HEADER.size + 1)], minlength=256)
        self.listening += int(np.count_nonzero(reply.octets[starts + (_HEADER.size + 2)] == TCP_LISTEN))


_INET_PLACES = np.arange(_HEADER_WORDS, _HEADER_WORDS + INET_WORDS)
_NONE_KEPT: Words = np.zeros((0, INET_WORDS), dtype=np.uint32)


class SockDiag:
    """Asks the kernel for its sockets; the netlink socket and the buffer are kept.

    A dump that was cut short, or that the kernel calls inconsistent, is repeated once on a
    new netlink socket: on the old one the rest of the broken dump would be in the way.

    Args:
        datagram_bytes: the buffer's first size; it grows when a datagram does not fit.

    Raises:
        RefusedError: there is no such netlink socket for us.
    """

    def __init__(self, datagram_bytes: int = _DATAGRAM_BYTES) -> None:
        self._reply = Reply(bytearray(datagram_bytes))
        self._sequence = int.from_bytes(os.urandom(4), "little")
        self._socket = self._open()

    def tcp(self, states: int = ALL_STATES) -> InetTally:
        """TCP sockets of both families in the states of the mask; those in LISTEN are kept.

        The first version of the request has no family, and walks the kernel's table once
        where the second one would walk it for IPv4 and again for IPv6.

        Raises:
            RefusedError: the kernel does not offer it, or not to us.
            ProbeError: it failed, twice where a repetition could help.
        """
        return self._dump(_TCPDIAG_GETSOCK, _inet_request_v1(states), INET.itemsize, _keep_listening)

    def udp(self, family: int) -> InetTally:
        """UDP sockets of a family that are bound and not connected, all kept. Raises as `tcp`."""
        payload = _inet_request_v2(family, socket.IPPROTO_UDP, 1 << UDP_UNCONNECTED)
        return self._dump(_SOCK_DIAG_BY_FAMILY, payload, INET.itemsize, _keep_unconnected)

    def unix(self) -> UnixTally:
        """All Unix sockets. Raises as `tcp`."""
        return self._dump(_SOCK_DIAG_BY_FAMILY, _UNIX_REQUEST, _UNIX_BYTES, UnixTally)

    def close(self) -> None:
        self._socket.close()

    def _open(self) -> socket.socket:
        try:
            opened = self._connect()
        except OSError as error:
            raise RefusedError(f"sock_diag: no netlink socket: {error.strerror}") from error
        # settimeout would have Python poll before each recv.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _ANSWER_SECONDS, 0))
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        return opened

    def _connect(self) -> socket.socket:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)

    def _dump(self, kind: int, payload: bytes, payload_bytes: int, make: Callable[[], TallyT]) -> TallyT:
        tally = make()
        try:
            self._run(kind, payload, payload_bytes, tally)
        except RefusedError:
            raise
        except ProbeError as error:
            self._reopen()
            if not isinstance(error, BrokenDumpError):
                raise
            tally = make()
            try:
                self._run(kind, payload, payload_bytes, tally)
            except ProbeError:
                self._reopen()
                raise
        return tally

    def _reopen(self) -> None:
        self._socket.close()
        self._socket = self._open()

    def _run(self, kind: int, payload: bytes, payload_bytes: int, tally: Tally) -> None:
        self._sequence = sequence = (self._sequence + 1) & 0xFFFFFFFF
        request = _HEADER.pack(_HEADER.size + len(payload), kind, _NLM_F_REQUEST_DUMP, sequence, 0) + payload
        try:
            self._socket.send(request)
            done = False
            while not done:
                # With MSG_TRUNC, the length is that of the datagram, not of what fitted.
                size = self._socket.recv_into(self._reply.data, 0, socket.MSG_TRUNC)
                if size > len(self._reply.data):
                    raise self._outgrown(size)
                at, done = messages(self._reply, size, sequence, kind, payload_bytes)
                if len(at):
                    tally.take(self._reply, at)
        except OSError as error:
            raise _failure(error.errno or 0, "sock_diag") from error

    def _outgrown(self, size: int) -> ProbeError:
        if size > _MAX_DATAGRAM_BYTES:
            return ProbeError(f"sock_diag: a datagram of {size} bytes")
        self._reply = Reply(bytearray(max(size, _DATAGRAM_BYTES)))
        return BrokenDumpError(f"sock_diag: a datagram of {size} bytes was cut off")


def messages(reply: Reply, size: int, sequence: int, kind: int, payload_bytes: int) -> tuple[Offsets, bool]:
    """Where the messages of a dump start in a datagram, and whether it is the dump's last one.

    Args:
        size: the datagram's bytes; what is behind them is old.
        sequence: the request's; messages that answer another one are passed over.
        kind: the type of the messages wanted.
        payload_bytes: what each of them has at least behind its header.

    Returns:
        The words at which their headers start, shape (n,), and whether NLMSG_DONE was there.

    Raises:
        BrokenDumpError: cut short, damaged, or called inconsistent by the kernel.
        RefusedError, ProbeError: the kernel answers with an error.
    """
    minimum = _HEADER.size + payload_bytes
    leading, start = _NO_OFFSETS, 0
    if size >= _WALKED_BYTES:
        leading, start = _leading(reply.words[: size // 4], sequence, kind | _NLM_F_MULTI << 16, minimum)
        if start == size:
            return leading, False
    walked, done = _walk(reply.data, start, size, sequence, kind, minimum)
    if not walked:
        return leading, done
    at = np.array(walked, dtype=np.intp)
    return np.concatenate((leading, at)) if len(leading) else at, done


def _leading(words: Words, sequence: int, kind_and_flags: int, minimum: int) -> tuple[Offsets, int]:
    """The messages wanted that a datagram begins with, found at once, and the byte behind them.

    A word that equals the sequence number is taken for a header's third one. Whether it
    is one, the lengths prove: each message has to start where the one before it ends.
    """
    at = np.flatnonzero(words[2:] == sequence)
    lengths = words[at].astype(np.intp)
    ends = at + ((lengths + 3) >> 2)
    good = (words[at + 1] == kind_and_flags) & (lengths >= minimum) & (ends <= len(words))
    good[1:] &= ends[:-1] == at[1:]
    good[:1] &= at[:1] == 0
    count = len(at) if good.all() else int(good.argmin())
    return at[:count], int(ends[count - 1]) * 4 if count else 0


def _walk(data: bytearray, start: int, size: int, sequence: int, kind: int, minimum: int) -> tuple[list[int], bool]:
    """The same as `messages`, from byte `start` on, message by message: for what is short or odd."""
    at: list[int] = []
    while start < size:
        if size - start < _HEADER.size:
            raise BrokenDumpError(f"sock_diag: {size - start} bytes behind the last message")
        length, found, flags, answers, _ = _HEADER.unpack_from(data, start)
        if length < _HEADER.size or length > size - start:
            raise BrokenDumpError(f"sock_diag: a message of {length} bytes where {size - start} are left")
        if answers == sequence:
            if flags & _NLM_F_DUMP_INTR:
                raise BrokenDumpError("sock_diag: the sockets changed under the dump")
            if found == kind:
                if length < minimum:
                    raise BrokenDumpError(f"sock_diag: a message of {length} bytes, expected {minimum}")
                at.append(start >> 2)
            elif found in (_NLMSG_DONE, _NLMSG_ERROR):
                # A dump that fails on its way says so in NLMSG_DONE, for example where tcp_diag is missing.
                code = _INT.unpack_from(data, start + _HEADER.size)[0] if length >= _HEADER.size + 4 else 0
                if code:
                    raise _failure(-code, "sock_diag")
                if found == _NLMSG_DONE:
                    return at, True
            elif found == _NLMSG_OVERRUN:
                raise BrokenDumpError("sock_diag: the kernel lost a part of the dump")
        start += (length + 3) & ~3
    return at, False


def _failure(errno: int, what: str) -> ProbeError:
    if errno in _REFUSALS:
        return RefusedError(f"{what}: refused: {os.strerror(errno)}")
    if errno == _EAGAIN:
        return ProbeError(f"{what}: no answer within {_ANSWER_SECONDS} s")
    if errno == _ENOBUFS:
        return BrokenDumpError(f"{what}: {os.strerror(errno)}")
    return ProbeError(f"{what}: {os.strerror(errno) if 0 < errno < 4096 else f'error {errno}'}")


def _inet_request_v1(states: int) -> bytes:
    """struct inet_diag_req: family, lengths, extensions; 48 bytes of socket id; states; dbs."""
    return struct.pack("=4B48xII", 0, 0, 0, 0, states, 0)


def _inet_request_v2(family: int, protocol: int, states: int) -> bytes:
    """struct inet_diag_req_v2: family, protocol, extensions, padding; states; 48 bytes of socket id."""
    return struct.pack("=4BI48x", family, protocol, 0, 0, states)


def _keep_listening() -> InetTally:
    return InetTally(TCP_LISTEN)


def _keep_unconnected() -> InetTally:
    return InetTally(UDP_UNCONNECTED)


_NO_OFFSETS: Offsets = np.zeros(0, dtype=np.intp)
# struct unix_diag_req: family, protocol, padding; states; inode; show; cookie, whose all ones mean "any".
_UNIX_REQUEST = struct.pack("=BBHIIIII", 1, 0, 0, 0xFFFFFFFF, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF)
