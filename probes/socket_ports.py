"""Of many bound sockets those that make the first rows of `listening`, in memory for a limited number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from probes.netlink import HEADER_BYTES, Offsets, Reply

LISTENING_BYTES = 20
_SPARE_RECORDS = 1024
_HEAD_BYTES = 24  # of a record: family, state, timer, retransmits; both ports; local address
_HEAD_PLACES = np.arange(HEADER_BYTES // 4, (HEADER_BYTES + _HEAD_BYTES) // 4)
_ANY_PORT = 1 << 16


def listening_keys(octets: npt.NDArray[np.uint8], protocol: int) -> npt.NDArray[np.uint8]:
    """What makes a row of `listening`: protocol, port, family, address, so that they sort by protocol and port.

    Args:
        octets: `INET_RECORD`s, shape (n, their bytes).
    """
    keys = np.empty((len(octets), LISTENING_BYTES), dtype=np.uint8)
    keys[:, 0] = protocol
    keys[:, 1:3] = octets[:, 4:6]
    keys[:, 3] = octets[:, 0]
    keys[:, 4:] = octets[:, 8:24]
    return keys


class LowestPorts:
    """Chooses records for the lowest so many addresses and ports, and counts the others.

    Which ones were left out it remembers by 8 bytes each.

    Args:
        limit: how many addresses and ports.
        record_bytes: of an `INET_RECORD`.

    Attributes:
        room: bytes of records that may come together before they are looked through.
    """

    __slots__ = ("_fresh", "_fresh_count", "_gone", "_highest", "_limit", "_record_bytes", "_splits", "room")

    def __init__(self, limit: int, record_bytes: int) -> None:
        self._limit = limit
        self._record_bytes = record_bytes
        self.room = (limit + _SPARE_RECORDS) * record_bytes
        self._highest = _ANY_PORT  # no port above it is wanted any more
        self._splits = False  # of a port's addresses some were left out, and some not
        self._gone: npt.NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self._fresh: list[npt.NDArray[np.uint64]] = []  # may be among those already
        self._fresh_count = 0

    @property
    def has_left_out(self) -> bool:
        """Whether any were left out."""
        return self._highest < _ANY_PORT

    def wanted(self, reply: Reply, at: Offsets) -> Offsets:
        """Those of some messages whose records may stay; the others are left out."""
        if not self.has_left_out or not len(at):
            return at
        above = _ports(reply.octets[((at << 2) + HEADER_BYTES)[:, None] + np.arange(6)]) > self._highest
        self._leave_out(reply.words[at[above][:, None] + _HEAD_PLACES])
        return at[~above]

    def lowest(self, records: bytearray) -> bytearray:
        """The records that stay; an address and port that was left out once never comes back."""
        octets = np.frombuffer(bytes(records), dtype=np.uint8).reshape(-1, self._record_bytes)
        ports = _ports(octets)
        distinct = np.unique(ports)
        if len(distinct) >= self._limit:
            self._highest = min(self._highest, int(distinct[self._limit - 1]))
        above = ports > self._highest
        if above.any():
            self._leave_out(_heads(octets[above]))
            octets = octets[~above]
        if self._splits or octets.size > self.room:
            octets = self._lowest_addresses(octets)
        return bytearray(octets.tobytes())

    def _lowest_addresses(self, octets: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """One record for each of the lowest addresses and ports, in their order."""
        keys = listening_keys(octets, 0)
        _, first = np.unique(keys.view(f"V{LISTENING_BYTES}")[:, 0], return_index=True)
        if len(first) > self._limit:
            last = keys[first[self._limit - 1]]
            self._highest = int(last[1]) << 8 | int(last[2])
            self._splits = True
            self._leave_out(_heads(octets[first[self._limit :]]))
        return octets[first[: self._limit]]

    def left_out(self) -> int:
        """How many addresses and ports were left out."""
        if self._fresh:
            self._gone = np.unique(np.concatenate((self._gone, *self._fresh)))
            self._fresh, self._fresh_count = [], 0
        return len(self._gone)

    def _leave_out(self, heads: npt.NDArray[np.uint32]) -> None:
        """Remembers what records begin with, shape (n, 6 words)."""
        keys = heads.astype(np.uint64)
        octets = heads.view(np.uint8).reshape(len(heads), _HEAD_BYTES)
        keys[:, 0], keys[:, 1] = octets[:, 0], _ports(octets)
        self._fresh.append(_mixed(keys))
        self._fresh_count += len(keys)
        if self._fresh_count > max(len(self._gone), 8 * _SPARE_RECORDS):
            self.left_out()


def _heads(octets: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(octets[:, :_HEAD_BYTES]).view(np.uint32)


def _ports(octets: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """The local port of each record."""
    ports: npt.NDArray[np.uint16] = octets[:, 4] * np.uint16(256) + octets[:, 5]
    return ports


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A number for each row of words; that two rows have the same one happens once in 2^64."""
    mixed = np.zeros(len(words), dtype=np.uint64)
    for column in words.T:  # the last steps of splitmix64
        mixed = (mixed ^ column) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed
