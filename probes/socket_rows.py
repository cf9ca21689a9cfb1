"""Rows for single sockets, from their records: labels as text, queues, users, owners.

Text is made only for rows that are shown, and kept from cycle to cycle for those that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from agent.table import NAN, Labels, Table
from probes.addresses import address_text
from probes.netlink import AF_INET
from probes.owners import Owner
from probes.probe import as_text
from probes.socket_ports import LISTENING_BYTES, listening_keys
from probes.socket_tables import NEW_SYN_RECV, SYN_RECV, TCP_STATES
from probes.socket_tallies import (
    INET_RECORD,
    LISTEN,
    TIMER_UNKNOWN,
    UNIX_DGRAM,
    UNIX_SEQPACKET,
    UNIX_STREAM,
    UNKNOWN,
    Records,
)

Owners = Sequence[Owner | None]
"""The owner of each row; in the settings that don't ask for them, None instead."""

_FAMILIES = {AF_INET: "ipv4"}
_STATES = dict(enumerate(TCP_STATES, 1)) | {NEW_SYN_RECV: list(TCP_STATES)[SYN_RECV - 1]}
_UNIX_TYPES = {UNIX_STREAM: "stream", UNIX_DGRAM: "dgram", UNIX_SEQPACKET: "seqpacket"}


class RowLabels:
    """The labels of rows by their keys; the same object for the same keys, and none made again for a row that stays."""

    def __init__(self, make: Callable[[bytes], Labels]) -> None:
        self._make = make
        self._keys: bytes = b""
        self._known: dict[bytes, Labels] = {}
        self._labels: list[Labels] = []
        self._owners: Owners | None = None

    def of(self, keys: npt.NDArray[np.uint8], owners: Owners | None) -> list[Labels]:
        """The labels of rows with these keys, shape (n, bytes of a key); with each one's process where asked."""
        octets = keys.tobytes()
        if octets != self._keys or owners != self._owners:
            width = keys.shape[1]
            each = [octets[start : start + width] for start in range(0, len(octets), width)]
            self._known = {key: self._known.get(key) or self._make(key) for key in each}
            self._labels = [self._known[key] for key in each]
            if owners is not None:
                self._labels = [
                    (*labels, None if owner is None else owner[1])
                    for labels, owner in zip(self._labels, owners, strict=True)
                ]
            self._keys, self._owners = octets, owners
        return self._labels


class ListeningRows:
    """The rows of `listening`: sockets that share protocol, address and port (SO_REUSEPORT) are one.

    More than the limit: those with the longest accept queues stay. The others count as dropped.
    """

    def __init__(self) -> None:
        self._labels = RowLabels(_listening_labels)
        self._sockets: tuple[bytes, bytes, bool] | None = None
        self._left_out = 0
        self._all_keys = b""
        self._row_keys: npt.NDArray[np.uint8] = np.zeros((0, LISTENING_BYTES), dtype=np.uint8)
        self._first: npt.NDArray[np.intp] = np.zeros(0, dtype=np.intp)
        self._places: npt.NDArray[np.intp] = np.zeros(0, dtype=np.intp)
        self._keys = self._row_keys
        self._inodes: npt.NDArray[np.uint32] = np.zeros(0, dtype=np.uint32)
        self._queues: npt.NDArray[np.float64] = np.zeros((0, 2))

    def select(self, tcp: bytes, udp: bytes, row_limit: int, limits_known: bool, left_out: int = 0) -> None:
        """Chooses the rows, given the `INET_RECORD`s of sockets that listen, or are bound and not connected.

        Args:
            left_out: rows of UDP besides, behind those that are given.
        """
        self._left_out = left_out
        sockets = tcp, udp, limits_known
        if sockets == self._sockets:
            return
        self._sockets = sockets
        octets = np.frombuffer(tcp + udp, dtype=np.uint8).reshape(-1, INET_RECORD.itemsize)
        tcp_count = len(tcp) // INET_RECORD.itemsize
        self._group(octets, tcp_count)
        words = octets.view(np.uint32)
        count = len(self._first)
        places = self._places[:tcp_count]
        waiting, limits = (
            np.bincount(places, weights=words[:tcp_count, column], minlength=count)
            for column in (_RECEIVE_QUEUE, _SEND_QUEUE)
        )
        shown: slice | npt.NDArray[np.intp] = slice(count)
        if count > row_limit:
            shown = np.sort(np.argsort(-waiting, kind="stable")[:row_limit])
        self._keys = self._row_keys[shown]
        self._inodes = words[self._first[shown], _INODE]
        # In the order of their keys, those of TCP come first.
        tcp_rows = int(np.count_nonzero(self._keys[:, 0] == _TCP))
        self._queues = np.stack((waiting, limits if limits_known else np.full(count, NAN)), axis=1)[shown][:tcp_rows]

    def _group(self, octets: npt.NDArray[np.uint8], tcp_count: int) -> None:
        """Finds which sockets share a row, where they aren't those of the cycle before."""
        keys = listening_keys(octets, _TCP)
        keys[tcp_count:, 0] = _UDP
        all_keys = keys.tobytes()
        if all_keys != self._all_keys:
            rows = keys.view(f"V{LISTENING_BYTES}")[:, 0]
            _, self._first, self._places = np.unique(rows, return_index=True, return_inverse=True)
            self._row_keys = keys[self._first]
            self._all_keys = all_keys

    def inodes(self) -> list[int]:
        """The inode of each row chosen, of the first socket where several share it."""
        found: list[int] = self._inodes.tolist()
        return found

    def fill(self, table: Table, owners: Owners | None = None) -> None:
        """Fills the table with the rows chosen, given the owner of each."""
        left_out = self._left_out + len(self._row_keys) - len(self._keys)
        rows = table.claim(self._labels.of(self._keys, owners), left_out=left_out)
        table.gauges[: len(self._queues), :2] = self._queues
        if owners is not None:
            table.gauges[:rows, -1] = _pids(owners)


_TCP, _UDP = 0, 1
# Words of a record; of a TCP socket that listens, the queues are how many wait to be accepted, and how many may.
_RECEIVE_QUEUE, _SEND_QUEUE, _INODE = 14, 15, 17


def _listening_labels(key: bytes) -> Labels:
    return "udp" if key[0] else "tcp", _family(key[3]), _address(key[3], key[4:]), str(int.from_bytes(key[1:3], "big"))


class InetRows:
    """The rows of `connections` or `udp_sockets`; their labels have a state or not."""

    def __init__(self, with_state: bool) -> None:
        self._labels = RowLabels(_connection_labels if with_state else _udp_labels)
        self._with_state = with_state

    def fill(self, table: Table, records: Records, seen: int, owners: Owners | None = None) -> None:
        """Fills the table from `INET_RECORD`s, the busiest of `seen` sockets."""
        octets = records.view(np.uint8).reshape(len(records), records.dtype.itemsize)
        keys = octets[:, _INET_KEY].copy()
        keys[:, 2:4] = 0  # timer, retransmits
        rows = table.claim(self._labels.of(keys, owners), left_out=seen - len(records))
        gauges = table.gauges[:rows]
        gauges[:, 0] = records["receive_queue"]
        gauges[:, 1] = records["send_queue"]
        # Without a process nobody knows who made it: the kernel says 0 for both (TIME_WAIT), and in its text
        # the listener's user for what is no whole socket yet (get_openreq4).
        orphaned = records["inode"] == 0
        states = records["state"]
        unmade = orphaned & ((records["uid"] == 0) | (states == SYN_RECV) | (states == NEW_SYN_RECV))
        gauges[:, 2] = np.where(unmade, NAN, records["uid"])
        gauges[:, 3] = np.where(orphaned, NAN, records["inode"])
        if self._with_state:
            known = (records["rtt_us"] != UNKNOWN) & (records["rtt_us"] != 0)
            gauges[:, 4] = np.where(known, records["rtt_us"] / 1e6, NAN)
            # Under these timers netlink counts probes there (inet_diag_msg_attrs_fill, icsk_probes_out), the text
            # what was sent again: nothing, as nothing is on its way.
            timers = records["timer"]
            probes = (timers == _KEEPALIVE_TIMER) | (timers == _ZERO_WINDOW_TIMER)
            retransmits = np.where(probes, 0, records["retransmits"])
            gauges[:, 5] = np.where(timers == TIMER_UNKNOWN, NAN, retransmits)
        if owners is not None:
            gauges[:, -1] = _pids(owners)


# idiag_timer; "tr" of the text: net/ipv4/inet_diag.c, tcp_ipv4.c
_KEEPALIVE_TIMER, _ZERO_WINDOW_TIMER = 2, 4
_INET_KEY = slice(0, 40)  # family, state, timer, retransmits; ports; addresses


def _udp_labels(key: bytes) -> Labels:
    family = key[0]
    local_port, remote_port = int.from_bytes(key[4:6], "big"), int.from_bytes(key[6:8], "big")
    local, remote = _address(family, key[8:24]), _address(family, key[24:40])
    return _family(family), local, str(local_port), remote, str(remote_port)


def _connection_labels(key: bytes) -> Labels:
    return *_udp_labels(key), _STATES.get(key[1], str(key[1]))


class UnixRows:
    """The rows of `unix_sockets`."""

    def __init__(self) -> None:
        self._labels = RowLabels(_unix_labels)

    def fill(self, table: Table, records: Records, seen: int, owners: Owners | None = None) -> None:
        """Fills the table from `UNIX_RECORD`s, the busiest of `seen` sockets."""
        octets = records.view(np.uint8).reshape(len(records), records.dtype.itemsize)
        keys = np.concatenate([octets[:, :8], octets[:, 20:]], axis=1)
        rows = table.claim(self._labels.of(keys, owners), left_out=seen - len(records))
        gauges = table.gauges[:rows]
        listens = records["state"] == LISTEN
        for column, field in enumerate(("receive_queue", "send_queue")):
            queue = np.where(records[field] == UNKNOWN, NAN, records[field])
            gauges[:, column] = np.where(listens, NAN, queue)
            gauges[:, column + 2] = np.where(listens, queue, NAN)
        gauges[:, 4] = np.where(records["uid"] == UNKNOWN, NAN, records["uid"])
        if owners is not None:
            gauges[:, -1] = _pids(owners)


def _unix_labels(key: bytes) -> Labels:
    kind, state, size, inode = key[0], key[1], int(np.frombuffer(key[2:4], np.uint16)[0]), key[4:8]
    return (
        str(np.frombuffer(inode, np.uint32)[0]),
        _UNIX_TYPES.get(kind, str(kind)),
        _STATES.get(state, str(state)),
        unix_path(key[8 : 8 + size]),
    )


def unix_path(name: bytes) -> str:
    """A Unix socket's name as text: an abstract one with `@` for each NUL, as the kernel's own list has it."""
    if name.startswith(b"\0"):
        return as_text(name.replace(b"\0", b"@"))
    return as_text(name.split(b"\0", 1)[0])


def _family(family: int) -> str:
    return _FAMILIES.get(family, "ipv6")


def _address(family: int, sixteen: bytes) -> str:
    return address_text(sixteen[:4] if family == AF_INET else sixteen)


def _pids(owners: Owners) -> list[float]:
    return [NAN if owner is None else owner[0] for owner in owners]
