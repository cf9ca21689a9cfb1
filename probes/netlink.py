"""NETLINK_SOCK_DIAG: every socket of the network namespace, without an object for each.

The kernel answers a dump request with datagrams of some 32 KB, each a chain of messages:
`struct nlmsghdr`, a fixed structure (`inet_diag_msg`, `unix_diag_msg`), attributes. Their
lengths differ, so the start of each message is found for a whole datagram at once, and
the tallies of probes/socket_tallies.py gather what they want from there. Sources: linux/netlink.h, sock_diag.h,
inet_diag.h, unix_diag.h; net/ipv4/inet_diag.c.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from functools import cache
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from agent.errors import ProbeError

Words = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.intp]

ALL_STATES = 0xFFF
AF_INET = 2
AF_INET6 = 10

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

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_INT = struct.Struct("=i")
_ATTRIBUTE = struct.Struct("=HH")  # length with these 4 bytes, type
HEADER_BYTES = _HEADER.size
UNIX_BYTES = 16  # struct unix_diag_msg: family, type, state, padding; inode; cookie

INET_DIAG_INFO = 2  # attribute: struct tcp_info
UNIX_DIAG_NAME, UNIX_DIAG_RQLEN, UNIX_DIAG_UID = 0, 4, 7  # attributes
_UNIX_DETAILS = 1 << 0 | 1 << 4 | 1 << 6  # UDIAG_SHOW_NAME, _RQLEN, _UID (5.3; older kernels overlook it)

_NETLINK_SOCK_DIAG = 4
_NLMSG_ERROR, _NLMSG_DONE, _NLMSG_OVERRUN = 2, 3, 4
_NLM_F_REQUEST_DUMP = 0x301
_NLM_F_MULTI = 2
_NLM_F_DUMP_INTR = 0x10
_NLA_TYPE_MASK = 0x3FFF
TCPDIAG_GETSOCK = 18
SOCK_DIAG_BY_FAMILY = 20

# EPERM ENOENT EACCES EINVAL EPROTONOSUPPORT EOPNOTSUPP EAFNOSUPPORT: no right, no such module, no such kernel.
_REFUSALS = frozenset((1, 2, 13, 22, 93, 95, 97))
_EAGAIN, _ENOBUFS = 11, 105
_ANSWER_SECONDS = 1
_RECEIVE_BYTES = 256 * 1024
_BUFFER_BYTES = 256 * 1024
_LARGEST_BYTES = 32 * 1024  # the kernel makes no larger datagrams (netlink_dump)
_FULL_BYTES = 16 * 1024
_MAX_DATAGRAM_BYTES = 16 * 1024 * 1024
_WALKED_BYTES = 2048  # below, a walk from message to message costs less than NumPy's calls


class RefusedError(ProbeError):
    """The kernel does not offer this dump, or not to us; text files may say the same."""


class BrokenDumpError(ProbeError):
    """A dump is incomplete or inconsistent; another try may do."""


class Reply:
    """Memory of datagrams, as bytes and as words.

    Attributes:
        data: what `recv_into` fills.
        view: the same as a memoryview.
        octets, words: uint8 and uint32 views of it.
    """

    __slots__ = ("data", "octets", "view", "words")

    def __init__(self, data: bytearray) -> None:
        data.extend(bytes(-len(data) % 4))
        self.data = data
        self.view = memoryview(data)
        self.octets = np.frombuffer(data, dtype=np.uint8)
        self.words = np.frombuffer(data, dtype=np.uint32)


class Tally(Protocol):
    """What a dump is counted into; made anew for each try, so that nothing is counted twice."""

    def take(self, reply: Reply, at: Offsets) -> None:
        """Counts messages, given the word at which each one's header starts; shape (n,)."""

    def take_one(self, data: bytearray, start: int, end: int) -> None:
        """Counts the message from byte `start` up to `end`."""


TallyT = TypeVar("TallyT", bound=Tally)


def find_attributes(words: Words, at: Offsets, first: int, kind: int, need: int = 1) -> Offsets:
    """Where the content of an attribute begins in each of some messages, as a word; 0 where there is none.

    Most messages have the same attributes of the same lengths. So the first one is walked, all that have its
    headers in its places are done with it, and the others follow in the same way.

    Args:
        at: the words at which the messages' headers start, shape (n,).
        first: words from there to the first attribute.
        need: words of content that it has at least.
    """
    found = np.zeros(len(at), dtype=np.intp)
    left = np.arange(len(at))
    while len(left):
        start = int(at[left[0]])
        checked, place = [], 0
        end = start + ((int(words[start]) + 3) >> 2)
        word = start + first
        while word < end:
            header = _ATTRIBUTE.unpack(words[word].tobytes())
            after = word + ((header[0] + 3) >> 2)
            if header[0] < _ATTRIBUTE.size or after > end:
                break
            checked.append(word - start)
            if header[1] & _NLA_TYPE_MASK == kind and header[0] >= _ATTRIBUTE.size + 4 * need:
                place = word - start + 1
                break
            word = after
        if word < end and not place:
            checked.append(word - start)  # damage: whoever has the same there has it in vain as well
        is_alike = words[at[left]] == words[start]
        alike = at[left[is_alike]]
        if checked:
            places = np.array(checked)
            same = (words[alike[:, None] + places] == words[start + places]).all(axis=1)
            alike = alike[same]
            is_alike[is_alike] = same
        if place:
            found[left[is_alike]] = alike + place
        left = left[~is_alike]
    return found


def find_attribute(data: bytearray, start: int, end: int, kind: int) -> bytes | None:
    """The content of an attribute among those from byte `start` up to `end`; None where there is none."""
    while start + _ATTRIBUTE.size <= end:
        size, found = _ATTRIBUTE.unpack_from(data, start)
        if size < _ATTRIBUTE.size or start + size > end:
            return None
        if found & _NLA_TYPE_MASK == kind:
            return bytes(data[start + _ATTRIBUTE.size : start + size])
        start += (size + 3) & ~3
    return None


class SockDiag:
    """Asks the kernel for its sockets; the netlink socket and the buffer are kept.

    A dump that was cut short, or that the kernel calls inconsistent, is repeated once on a
    new netlink socket: on the old one the rest of the broken dump would be in the way.

    Args:
        buffer_bytes: the buffer's first size; it grows when a datagram does not fit.

    Raises:
        RefusedError: there is no such netlink socket for us.
    """

    def __init__(self, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._reply = Reply(bytearray(buffer_bytes))
        self._sequence = int.from_bytes(os.urandom(4), "little")
        self._socket = self._open()

    def tcp(self, states: int, make: Callable[[], TallyT], info: bool = False) -> TallyT:
        """Counts TCP sockets of both families in the states of the mask.

        The first version of the request has no family, and walks the kernel's table once
        where the second one would walk it for IPv4 and again for IPv6.

        Args:
            make: makes what they are counted into.
            info: ask for each socket's tcp_info as well.

        Raises:
            RefusedError: the kernel does not offer it, or not to us.
            ProbeError: it failed, twice where a repetition could help.
        """
        return self._dump(TCPDIAG_GETSOCK, inet_request_v1(states, info), INET.itemsize, make)

    def udp(self, family: int, states: int, make: Callable[[], TallyT]) -> TallyT:
        """Counts UDP sockets of a family in the states of the mask. Raises as `tcp`."""
        payload = inet_request_v2(family, socket.IPPROTO_UDP, states)
        return self._dump(SOCK_DIAG_BY_FAMILY, payload, INET.itemsize, make)

    def unix(self, make: Callable[[], TallyT], details: bool = False) -> TallyT:
        """Counts all Unix sockets, with name, queues and user where `details` are wanted. Raises as `tcp`."""
        return self._dump(SOCK_DIAG_BY_FAMILY, unix_request(details), UNIX_BYTES, make)

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
                size = self._receive(0, 0)
                # A datagram that is full means that others follow: together they cost less to look through.
                while size >= _FULL_BYTES and size % 4 == 0 and size + _LARGEST_BYTES <= len(self._reply.data):
                    try:
                        size += self._receive(size, socket.MSG_DONTWAIT)
                    except BlockingIOError:
                        break
                done = messages(self._reply, size, sequence, kind, payload_bytes, tally)
        except OSError as error:
            raise _failure(error.errno or 0, "sock_diag") from error

    def _receive(self, start: int, flags: int) -> int:
        """Receives a datagram behind the first `start` bytes, and returns its size."""
        reply = self._reply
        # With MSG_TRUNC, the size is that of the datagram, not of what fitted.
        size = self._socket.recv_into(reply.view[start:] if start else reply.data, 0, flags | socket.MSG_TRUNC)
        if size > len(reply.data) - start:
            raise self._outgrown(size)
        return size

    def _outgrown(self, size: int) -> ProbeError:
        if size > _MAX_DATAGRAM_BYTES:
            return ProbeError(f"sock_diag: a datagram of {size} bytes")
        self._reply = Reply(bytearray(max(size, _BUFFER_BYTES)))
        return BrokenDumpError(f"sock_diag: a datagram of {size} bytes was cut off")


def messages(reply: Reply, size: int, sequence: int, kind: int, payload_bytes: int, tally: Tally) -> bool:
    """Counts the messages of a dump that are in a datagram; returns whether it is the dump's last one.

    Args:
        size: the datagram's bytes; what is behind them is old.
        sequence: the request's; messages that answer another one are passed over.
        kind: the type of the messages wanted.
        payload_bytes: what each of them has at least behind its header.

    Raises:
        BrokenDumpError: cut short, damaged, or called inconsistent by the kernel.
        RefusedError, ProbeError: the kernel answers with an error.
    """
    minimum = _HEADER.size + payload_bytes
    start = 0
    if size >= _WALKED_BYTES:
        leading, start = _leading(reply.words[: size // 4], sequence, kind | _NLM_F_MULTI << 16, minimum)
        if len(leading):
            tally.take(reply, leading)
    return start < size and _walk(reply.data, start, size, sequence, kind, minimum, tally)


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


def _walk(data: bytearray, start: int, size: int, sequence: int, kind: int, minimum: int, tally: Tally) -> bool:
    """The same as `messages`, from byte `start` on, message by message: for what is short or odd."""
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
                tally.take_one(data, start, start + length)
            elif found in (_NLMSG_DONE, _NLMSG_ERROR):
                # A dump that fails on its way says so in NLMSG_DONE, for example where tcp_diag is missing.
                code = _INT.unpack_from(data, start + _HEADER.size)[0] if length >= _HEADER.size + 4 else 0
                if code:
                    raise _failure(-code, "sock_diag")
                if found == _NLMSG_DONE:
                    return True
            elif found == _NLMSG_OVERRUN:
                raise BrokenDumpError("sock_diag: the kernel lost a part of the dump")
        start += (length + 3) & ~3
    return False


def _failure(errno: int, what: str) -> ProbeError:
    if errno in _REFUSALS:
        return RefusedError(f"{what}: refused: {os.strerror(errno)}")
    if errno == _EAGAIN:
        return ProbeError(f"{what}: no answer within {_ANSWER_SECONDS} s")
    if errno == _ENOBUFS:
        return BrokenDumpError(f"{what}: {os.strerror(errno)}")
    return ProbeError(f"{what}: {os.strerror(errno) if 0 < errno < 4096 else f'error {errno}'}")


@cache
def inet_request_v1(states: int, info: bool = False) -> bytes:
    """struct inet_diag_req: family, lengths, extensions; 48 bytes of socket id; states; dbs."""
    return struct.pack("=4B48xII", 0, 0, 0, 1 << INET_DIAG_INFO - 1 if info else 0, states, 0)


@cache
def inet_request_v2(family: int, protocol: int, states: int) -> bytes:
    """struct inet_diag_req_v2: family, protocol, extensions, padding; states; 48 bytes of socket id."""
    return struct.pack("=4BI48x", family, protocol, 0, 0, states)


@cache
def unix_request(details: bool = False) -> bytes:
    """struct unix_diag_req: family, protocol, padding; states; inode; show; cookie, whose all ones mean "any"."""
    return struct.pack("=BBHIIIII", 1, 0, 0, 0xFFFFFFFF, 0, _UNIX_DETAILS if details else 0, 0xFFFFFFFF, 0xFFFFFFFF)
