"""What lists of sockets are counted into: sockets by state or type, and the records of those that get a row.

A record is fixed in size, and the busiest are kept in a limited number of them, so
that memory stays flat however many sockets there are. Sources: net/ipv4/inet_diag.c,
net/unix/diag.c, linux/tcp.h (tcp_info).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from probes.netlink import (
    HEADER_BYTES,
    INET,
    INET_DIAG_INFO,
    UNIX_BYTES,
    UNIX_DIAG_NAME,
    UNIX_DIAG_RQLEN,
    UNIX_DIAG_UID,
    Offsets,
    Reply,
    Words,
    find_attribute,
    find_attributes,
)
from probes.socket_ports import LowestPorts

Records = npt.NDArray[np.void]
Ranks = npt.NDArray[np.int64]

# include/net/tcp_states.h; UDP and Unix sockets use them too.
ESTABLISHED, LISTEN = 1, 10
UDP_UNCONNECTED = 7  # TCP_CLOSE: what an UDP socket is unless it is connected
UNIX_STREAM, UNIX_DGRAM, UNIX_SEQPACKET = 1, 2, 5

UNKNOWN = 0xFFFFFFFF
TIMER_UNKNOWN = 0xFF  # and with it what `retransmits` counts
INET_RECORD = np.dtype([*INET.descr, ("rtt_us", "u4")])
"""struct inet_diag_msg and, from tcp_info, the smoothed round trip time; `UNKNOWN` where it wasn't told."""
UNIX_NAME_BYTES = 108  # sizeof sockaddr_un.sun_path
UNIX_RECORD = np.dtype(
    [
        ("type", "u1"),
        ("state", "u1"),
        ("name_bytes", "u2"),
        ("inode", "u4"),
        ("receive_queue", "u4"),
        ("send_queue", "u4"),
        ("uid", "u4"),
        ("name", f"V{UNIX_NAME_BYTES}"),
    ]
)
"""A Unix socket; queues and uid are `UNKNOWN` where they weren't told, a name has NUL first where it is abstract."""

_INET_BYTES = INET.itemsize
_HEADER_WORDS = HEADER_BYTES // 4
_INET_PLACES = np.arange(_HEADER_WORDS, _HEADER_WORDS + _INET_BYTES // 4)
_QUEUE_PLACES = tuple(_HEADER_WORDS + word for word in (14, 15))  # receive_queue, send_queue
_NAME_PLACES = np.arange(UNIX_NAME_BYTES // 4)
_RTT_WORD = 17  # tcpi_rtt, in microseconds, is the 18th word of tcp_info
_RTT = slice(4 * _RTT_WORD, 4 * _RTT_WORD + 4)
_UNKNOWN_WORD = struct.pack("=I", UNKNOWN)
_UNIX_HEAD = struct.Struct("=BBHIIII")
_UINT = struct.Struct("=I")
_QUEUES = struct.Struct("=II")
_SPARE_RECORDS = 512


def inet_rank(records: Records) -> Ranks:
    """How busy sockets are: by bytes in both queues, then established before others."""
    received, sent = records["receive_queue"].astype(np.int64), records["send_queue"].astype(np.int64)
    return _rank(received, sent, records["state"])


def unix_rank(records: Records) -> Ranks:
    """The same for Unix sockets; of one that listens, what waits to be accepted counts, not the limit."""
    received, sent = records["receive_queue"].astype(np.int64), records["send_queue"].astype(np.int64)
    received[received == UNKNOWN] = 0
    sent[(sent == UNKNOWN) | (records["state"] == LISTEN)] = 0
    return _rank(received, sent, records["state"])


def _rank(received: Ranks, sent: Ranks, states: npt.NDArray[np.uint8]) -> Ranks:
    ranks: Ranks = (received + sent) * 2 + (states == ESTABLISHED)
    return ranks


class Busiest:
    """Keeps the records of highest rank, the earlier ones of equals, in memory for a limited number.

    Attributes:
        rank: gives the rank of records.
        seen: how many there were.
    """

    __slots__ = ("_dtype", "_limit", "_lowest", "_room", "_rows", "rank", "seen")

    def __init__(self, limit: int, dtype: np.dtype[np.void], rank: Callable[[Records], Ranks]) -> None:
        self._limit = limit
        self._dtype = dtype
        self.rank = rank
        self._room = (limit + _SPARE_RECORDS) * dtype.itemsize
        self._rows = bytearray()
        self._lowest = -1
        self.seen = 0

    def add(self, record: bytes) -> None:
        """Offers one record."""
        self.seen += 1
        self._rows += record
        if len(self._rows) > self._room:
            self._trim()

    def wants(self, ranks: Ranks) -> npt.NDArray[np.bool_]:
        """Which of some sockets' records are to be added, by their ranks, shape (n,); all are counted as seen."""
        self.seen += len(ranks)
        return ranks > self._lowest

    def add_all(self, records: Records) -> None:
        """Takes records that are wanted, shape (n,)."""
        self._rows += records.tobytes()
        if len(self._rows) > self._room:
            self._trim()

    def records(self) -> Records:
        """Those kept, the busiest first; shape (at most the limit,)."""
        self._trim()
        return np.frombuffer(bytes(self._rows), dtype=self._dtype)

    def _trim(self) -> None:
        records = np.frombuffer(bytes(self._rows), dtype=self._dtype)
        rank = self.rank(records)
        order = np.argsort(-rank, kind="stable")[: self._limit]
        if len(records) >= self._limit:
            self._lowest = int(rank[order[-1]])
        self._rows = bytearray(records[order].tobytes())


def merged(parts: Sequence[Busiest], limit: int) -> tuple[Records, int]:
    """The busiest records of several lists, at most `limit`, and how many there were."""
    records = parts[0].records()
    if len(parts) > 1:
        # Not np.concatenate: it would turn the ports into the host's byte order.
        records = np.frombuffer(b"".join(part.records().tobytes() for part in parts), dtype=records.dtype)
        records = records[np.argsort(-parts[0].rank(records), kind="stable")[:limit]]
    return records, sum(part.seen for part in parts)


@cache
def _chosen(states: int) -> npt.NDArray[np.bool_]:
    """Whether a state is in the mask, shape (256,)."""
    return np.array([states >> state & 1 for state in range(256)], dtype=np.bool_)


class InetTally:
    """TCP or UDP sockets by state, with the records of some.

    Args:
        listed: mask of the states whose sockets are all kept.
        shown: mask of the states whose busiest sockets are kept.
        limit: how many of those.
        ports: of the listed sockets, one is kept for each of so many addresses and ports, the lowest; all where None.

    Attributes:
        states: 256 numbers, how many sockets are in each state.
        busiest: None where none are shown.
    """

    __slots__ = ("_kept", "_listed", "_listed_rows", "_ports", "_shown", "busiest", "states")

    def __init__(self, listed: int, shown: int = 0, limit: int = 1, ports: int | None = None) -> None:
        self.states = [0] * 256
        self.busiest = Busiest(limit, INET_RECORD, inet_rank) if shown else None
        self._listed = listed
        self._shown = shown
        self._kept = listed | shown
        self._listed_rows = bytearray()
        self._ports = None if ports is None else LowestPorts(ports, INET_RECORD.itemsize)

    @property
    def listed(self) -> bytes:
        """The records of the listed sockets, one `INET_RECORD` behind the other, in the order of the list."""
        self._settle()
        return bytes(self._listed_rows)

    @property
    def left_out(self) -> int:
        """How many addresses and ports have a listed socket and no record."""
        self._settle()
        return 0 if self._ports is None else self._ports.left_out()

    def _settle(self) -> None:
        """Where some were left out, leaves those out that have come again since."""
        if self._ports is not None and self._ports.has_left_out:
            self._listed_rows = self._ports.lowest(self._listed_rows)

    def keeps(self, state: int) -> bool:
        """Whether it wants the records of sockets in this state."""
        return bool(self._kept >> state & 1)

    def take(self, reply: Reply, at: Offsets) -> None:
        states = reply.octets[(at << 2) + (HEADER_BYTES + 1)]
        for state, count in enumerate(np.bincount(states).tolist()):
            self.states[state] += count
        if self._listed:
            listed = at[_chosen(self._listed)[states]]
            if self._ports is not None:
                listed = self._ports.wanted(reply, listed)
            for start in range(0, len(listed), _SPARE_RECORDS):
                self._list(self._records(reply.words, listed[start : start + _SPARE_RECORDS]).tobytes())
        if self.busiest is not None:
            shown = _chosen(self._shown)[states]
            at, states = at[shown], states[shown]
            received, sent = (reply.words[at + word].astype(np.int64) for word in _QUEUE_PLACES)
            wanted = self.busiest.wants(_rank(received, sent, states))
            if wanted.any():
                self.busiest.add_all(self._records(reply.words, at[wanted]))

    def take_one(self, data: bytearray, start: int, end: int) -> None:
        state = data[start + HEADER_BYTES + 1]
        if not self._kept >> state & 1:
            self.states[state] += 1
            return
        attributes = start + HEADER_BYTES + _INET_BYTES
        record = bytes(data[start + HEADER_BYTES : attributes])
        info = find_attribute(data, attributes, end, INET_DIAG_INFO) if self.busiest is not None else None
        self.add(record + (info[_RTT] if info is not None and len(info) >= _RTT.stop else _UNKNOWN_WORD))

    def add(self, record: bytes) -> None:
        """Counts one socket, given as an `INET_RECORD`."""
        state = record[1]
        self.states[state] += 1
        if self._listed >> state & 1:
            self._list(record)
        if self._shown >> state & 1 and self.busiest is not None:
            self.busiest.add(record)

    def _list(self, records: bytes) -> None:
        self._listed_rows += records
        if self._ports is not None and len(self._listed_rows) > self._ports.room:
            self._listed_rows = self._ports.lowest(self._listed_rows)

    def _records(self, words: Words, at: Offsets) -> Records:
        records = np.empty((len(at), INET_RECORD.itemsize // 4), dtype=np.uint32)
        records[:, :-1] = words[at[:, None] + _INET_PLACES]
        info = find_attributes(words, at, _HEADER_WORDS + _INET_BYTES // 4, INET_DIAG_INFO, _RTT_WORD + 1)
        records[:, -1] = np.where(info > 0, words[info + _RTT_WORD], UNKNOWN)
        return records.view(INET_RECORD)[:, 0]


class UnixTally:
    """Unix sockets by type, and those that listen, with the records of the busiest.

    Args:
        limit: how many records are kept; None for none at all.

    Attributes:
        types: 256 numbers, how many sockets there are of each type (SOCK_STREAM is 1).
    """

    __slots__ = ("busiest", "listening", "types")

    def __init__(self, limit: int | None = None) -> None:
        self.types = [0] * 256
        self.listening = 0
        self.busiest = None if limit is None else Busiest(limit, UNIX_RECORD, unix_rank)

    def take(self, reply: Reply, at: Offsets) -> None:
        first = (at << 2) + HEADER_BYTES
        for kind, count in enumerate(np.bincount(reply.octets[first + 1]).tolist()):
            self.types[kind] += count
        self.listening += int(np.count_nonzero(reply.octets[first + 2] == LISTEN))
        if self.busiest is not None:
            records = _unix_records(reply, at)
            self.busiest.add_all(records[self.busiest.wants(unix_rank(records))])

    def take_one(self, data: bytearray, start: int, end: int) -> None:
        first = start + HEADER_BYTES
        kind, state = data[first + 1], data[first + 2]
        if self.busiest is None:
            self.types[kind] += 1
            self.listening += state == LISTEN
            return
        attributes = first + UNIX_BYTES
        inode = _UINT.unpack_from(data, first + 4)[0]
        name = find_attribute(data, attributes, end, UNIX_DIAG_NAME) or b""
        queues = find_attribute(data, attributes, end, UNIX_DIAG_RQLEN) or b""
        uid = find_attribute(data, attributes, end, UNIX_DIAG_UID) or b""
        self.add(
            unix_record(
                kind,
                state,
                inode,
                name,
                _QUEUES.unpack_from(queues) if len(queues) >= _QUEUES.size else (UNKNOWN, UNKNOWN),
                _UINT.unpack_from(uid)[0] if len(uid) >= _UINT.size else UNKNOWN,
            )
        )

    def add(self, record: bytes) -> None:
        """Counts one socket, given as a `UNIX_RECORD`."""
        self.types[record[0]] += 1
        self.listening += record[1] == LISTEN
        if self.busiest is not None:
            self.busiest.add(record)


def unix_record(
    kind: int,
    state: int,
    inode: int,
    name: bytes,
    queues: tuple[int, int] = (UNKNOWN, UNKNOWN),
    uid: int = UNKNOWN,
) -> bytes:
    """A `UNIX_RECORD`; a name that is longer than a socket's can be is cut."""
    name = name[:UNIX_NAME_BYTES]
    return _UNIX_HEAD.pack(kind, state, len(name), inode, *queues, uid) + name.ljust(UNIX_NAME_BYTES, b"\0")


def _unix_records(reply: Reply, at: Offsets) -> Records:
    words, octets = reply.words, reply.octets
    records = np.zeros(len(at), dtype=UNIX_RECORD)
    records["type"] = octets[(at << 2) + (HEADER_BYTES + 1)]
    records["state"] = octets[(at << 2) + (HEADER_BYTES + 2)]
    records["inode"] = words[at + (_HEADER_WORDS + 1)]
    first = _HEADER_WORDS + UNIX_BYTES // 4
    queues = find_attributes(words, at, first, UNIX_DIAG_RQLEN, 2)
    records["receive_queue"] = np.where(queues > 0, words[queues], UNKNOWN)
    records["send_queue"] = np.where(queues > 0, words[queues + 1], UNKNOWN)
    uid = find_attributes(words, at, first, UNIX_DIAG_UID)
    records["uid"] = np.where(uid > 0, words[uid], UNKNOWN)
    names = find_attributes(words, at, first, UNIX_DIAG_NAME, 0)
    size = np.minimum(words.view(np.uint16)[2 * (names - 1)] - 4, UNIX_NAME_BYTES)
    records["name_bytes"] = np.where(names > 0, size, 0)
    places = np.minimum(names[:, None] + _NAME_PLACES, len(words) - 1)
    text = words[places].view(np.uint8)
    text[np.arange(UNIX_NAME_BYTES) >= records["name_bytes"][:, None]] = 0
    records["name"] = text.view(f"V{UNIX_NAME_BYTES}")[:, 0]
    return records
