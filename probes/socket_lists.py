"""Where the lists of sockets come from: netlink, or the text files net/tcp, tcp6, udp, udp6, unix.

The text is counted into the same tallies as netlink's replies. It has all that they have
but the limit of an accept queue. Sources: get_tcp4_sock, get_tcp6_sock,
udp4_format_sock and unix_seq_show in the kernel's net/.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from agent.errors import ProbeError
from probes.netlink import (
    AF_INET,
    AF_INET6,
    INET,
    TCP_LISTEN,
    UDP_UNCONNECTED,
    InetTally,
    RefusedError,
    SockDiag,
    UnixTally,
    Words,
)
from probes.procfs import Host

T = TypeVar("T")

_STATES = re.compile(
    rb"^ *\d+: [0-9A-F]{8,32}:[0-9A-F]{4} [0-9A-F]{8,32}:[0-9A-F]{4} ([0-9A-F]{2}) [0-9A-F]{8}:[0-9A-F]{8} .*$",
    re.MULTILINE,
)
# Path is anything, line ends included, so a line that doesn't fit is no error.
_UNIX = re.compile(
    rb"^[0-9a-fA-F]+: [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) ([0-9A-F]{4}) [0-9A-F]{2} +\d+(?: .*)?$", re.MULTILINE
)
_ACCEPTS = 0x10000  # __SO_ACCEPTCON, linux/net.h


class SocketLists:
    """The host's sockets, from netlink where it can be had, else from text: decided for each list once.

    Modules are apart: a kernel may have tcp_diag and not unix_diag.
    """

    def __init__(self, host: Host) -> None:
        self._texts = {name: host.net(name) for name in ("tcp", "tcp6", "udp", "udp6", "unix")}
        self._diag: SockDiag | None = None
        self._refused: set[str] = set()
        if host.is_local:
            try:
                self._diag = SockDiag()
            except RefusedError:
                self._diag = None

    @property
    def limits_known(self) -> bool:
        """Whether TCP came from netlink, which alone has the limits of accept queues."""
        return self._diag is not None and "tcp" not in self._refused

    def tcp(self, states: int) -> InetTally | None:
        """TCP sockets by state, those that listen kept; None where nothing tells them."""
        return self._ask("tcp", lambda diag: diag.tcp(states), lambda: self._count(TCP_LISTEN, "tcp", "tcp6"))

    def udp(self) -> list[Words]:
        """UDP sockets that are bound and not connected, by family; uint32, shape (n, 18) each."""
        tallies = self._udp("udp", AF_INET), self._udp("udp6", AF_INET6)
        return [tally.kept for tally in tallies if tally is not None]

    def unix(self) -> UnixTally | None:
        """Unix sockets by type; None where nothing tells them."""
        return self._ask("unix", lambda diag: diag.unix(), self._count_unix)

    def close(self) -> None:
        if self._diag is not None:
            self._diag.close()

    def _udp(self, name: str, family: int) -> InetTally | None:
        return self._ask(name, lambda diag: diag.udp(family), lambda: self._count(UDP_UNCONNECTED, name))

    def _count(self, keep: int, *names: str) -> InetTally | None:
        """What is in text files of the same form; None where none is there, as with IPv6 off."""
        texts = [text for name in names if (text := self._texts[name].read())]
        if not texts:
            return None
        tally = count_inet(texts[0], keep)
        for text in texts[1:]:
            tally.add(count_inet(text, keep))
        return tally

    def _count_unix(self) -> UnixTally | None:
        text = self._texts["unix"].read()
        return count_unix(text) if text else None

    def _ask(self, name: str, ask: Callable[[SockDiag], T], read: Callable[[], T]) -> T:
        if self._diag is not None and name not in self._refused:
            try:
                return ask(self._diag)
            except RefusedError:
                self._refused.add(name)
        return read()


def count_inet(text: bytes, keep: int) -> InetTally:
    """The sockets of net/tcp, tcp6, udp or udp6 by state, and those in the state `keep`.

    An empty text is a host without that family: no sockets.

    Raises:
        ProbeError: a line isn't `0: 0100007F:0277 00000000:0000 0A 00000000:00000000 …`.
    """
    tally = InetTally(keep)
    found = _STATES.findall(text)
    lines = text.count(b"\n") - 1 if text else 0
    if len(found) != lines or not (text or b"\n").endswith(b"\n"):
        name = text[:40].split(b"\n")[0]
        raise ProbeError(f"sockets: {len(found)} of {lines} lines understood in the text that starts with {name!r}")
    if found:
        tally.states += np.bincount(
            np.frombuffer(bytes.fromhex(b"".join(found).decode()), dtype=np.uint8), minlength=256
        )
    if tally.states[keep]:
        tally.keep(_inet_rows(text, keep))
    return tally


def _inet_rows(text: bytes, state: int) -> Words:
    pattern = (
        rb"^ *\d+: ([0-9A-F]+):(....) ([0-9A-F]+):(....) %02X (.{8}):(.{8}) ..:.{8} .{8} +(\d+) +\d+ +(\d+)" % state
    )
    matches = re.findall(pattern, text, re.MULTILINE)
    rows = np.zeros(len(matches), dtype=INET)
    for row, (local, local_port, remote, remote_port, send, receive, uid, inode) in zip(rows, matches, strict=True):
        row["family"] = AF_INET if len(local) == 8 else AF_INET6
        row["state"] = state
        row["local"], row["local_port"] = _address(local), int(local_port, 16)
        row["remote"], row["remote_port"] = _address(remote), int(remote_port, 16)
        row["receive_queue"], row["send_queue"] = int(receive, 16), int(send, 16)
        row["uid"], row["inode"] = int(uid) & 0xFFFFFFFF, int(inode) & 0xFFFFFFFF
    return rows.view(np.uint32).reshape(len(rows), -1)


def _address(digits: bytes) -> bytes:
    """The 16 bytes of an address in network order: the text has words in the host's order."""
    words = bytes.fromhex(digits.decode())
    if sys.byteorder == "little":
        words = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
    return words.ljust(16, b"\0")[:16]


def count_unix(text: bytes) -> UnixTally:
    """The sockets of net/unix by type, and those that listen."""
    tally = UnixTally()
    for flags, kind in _UNIX.findall(text):
        number = int(kind, 16)
        if number < len(tally.types):
            tally.types[number] += 1
            tally.listening += int(flags, 16) & _ACCEPTS != 0
    return tally
