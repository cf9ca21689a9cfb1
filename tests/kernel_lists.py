"""Sockets as `ss` and the text files of /proc/net list them, as sorted rows that can be compared with ours.

Addresses and states are written as in our tables: an IPv4 address on an IPv6 socket as
IPv4, an end without a peer as all zeros and port 0.

Neither list has a TCP or UDP socket that isn't bound, for they hold what the kernel finds
by port. A TCP socket that is bound and nothing else they leave out as well: sock_diag tells it
since Linux 6.8, and then only if asked for state 13 (inet_diag.c, TCPF_BOUND_INACTIVE). A later ss
may ask for it, and calls it UNCONN: `tcp_rows` leaves it out.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
from ipaddress import ip_address
from typing import NamedTuple

# misc/ss.c, sstate_name; include/net/tcp_states.h, from 1 on.
STATES = {
    "ESTAB": "established",
    "SYN-SENT": "syn_sent",
    "SYN-RECV": "syn_recv",
    "FIN-WAIT-1": "fin_wait1",
    "FIN-WAIT-2": "fin_wait2",
    "TIME-WAIT": "time_wait",
    "UNCONN": "close",
    "CLOSE-WAIT": "close_wait",
    "LAST-ACK": "last_ack",
    "LISTEN": "listen",
    "CLOSING": "closing",
}
UNIX_TYPES = {"u_str": "stream", "u_dgr": "dgram", "u_seq": "seqpacket"}

_NUMBERED_STATES = dict(enumerate(STATES.values(), 1))
_NUMBERED_TYPES = {1: "stream", 2: "dgram", 5: "seqpacket"}
# A path may hold anything, so it ends where " INODE * PEER" ends the line.
_SS_UNIX = re.compile(r"^(u_\w+) +(\S+) +(\d+) +(\d+) +(\S.*?) (\d+) +\* (\d+) *$", re.MULTILINE | re.DOTALL)
_TEXT_UNIX = re.compile(
    r"^[0-9a-f]+: [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) ([0-9A-F]{4}) ([0-9A-F]{2}) +(\d+)"
    r"(?: (.*?))?$(?=\n[0-9a-f]+: |\n?\Z)",
    re.MULTILINE | re.DOTALL,
)
_ACCEPTS, _CONNECTED = 0x10000, 3  # linux/net.h: __SO_ACCEPTCON, SS_CONNECTED


class InetRow(NamedTuple):
    """A TCP or UDP socket; the queues of one that listens are connections, None is not known."""

    family: str
    local_address: str
    local_port: int
    remote_address: str
    remote_port: int
    state: str
    receive_queue: int | None
    send_queue: int | None


class UnixRow(NamedTuple):
    """A Unix socket; "@" stands for each NUL in an abstract name, None for what is not known."""

    inode: int
    type: str
    state: str
    path: str
    receive_queue: int | None
    send_queue: int | None


def why_no_ss() -> str | None:
    """Why `ss` can't be compared with; None where it can."""
    if not sys.platform.startswith("linux"):
        return "reads this machine's sockets"
    return None if shutil.which("ss") else "ss (iproute2) is not installed"


def ss(*options: str) -> str:
    """What `ss -H` prints, for example with "-tan"."""
    return subprocess.run(["ss", "-H", *options], capture_output=True, text=True, check=True).stdout


def tcp_rows(text: str) -> list[InetRow]:
    """The rows of `ss -tanH` or `ss -ltnH`."""
    return [row for row in _inet_rows(text) if row.state != "close"]


def udp_rows(text: str) -> list[InetRow]:
    """The rows of `ss -uanH`."""
    return _inet_rows(text)


def _inet_rows(text: str) -> list[InetRow]:
    rows = []
    for line in text.splitlines():
        state, received, sent, local, remote = line.split()[:5]
        (family, local_end), (_, remote_end) = _ss_end(local), _ss_end(remote)
        rows.append(InetRow(family, *local_end, *remote_end, STATES[state], int(received), int(sent)))
    return sorted(rows)


def _ss_end(text: str) -> tuple[str, tuple[str, int]]:
    """Family, address and port of `127.0.0.1:22`, `[::1%lo]:22`, `0.0.0.0:*`, and of `*:22`, which is IPv6 too."""
    host, _, port = text.rpartition(":")
    family = "ipv4" if "." in host and not host.startswith("[") else "ipv6"
    host = "::" if host == "*" else host.partition("%")[0].strip("[]")
    return family, (host.removeprefix("::ffff:"), 0 if port == "*" else int(port))


def unix_rows(text: str) -> list[UnixRow]:
    """The rows of `ss -xaH`."""
    return sorted(
        UnixRow(int(inode), UNIX_TYPES[kind], STATES[state], "" if path == "*" else path, int(received), int(sent))
        for kind, state, received, sent, path, inode, _ in _SS_UNIX.findall(text)
    )


def inet_text_rows(text: str) -> list[InetRow]:
    """The rows of net/tcp, tcp6, udp or udp6; of a TCP socket that listens, the limit of the queue isn't there."""
    rows = []
    for line in text.splitlines()[1:]:
        _, local, remote, number, queues = line.split()[:5]
        (family, local_end), (_, remote_end) = _text_end(local), _text_end(remote)
        state = _NUMBERED_STATES[int(number, 16)]
        sent, received = (int(each, 16) for each in queues.split(":"))
        limit_or_sent = None if state == "listen" else sent
        rows.append(InetRow(family, *local_end, *remote_end, state, received, limit_or_sent))
    return sorted(rows, key=str)


def _text_end(text: str) -> tuple[str, tuple[str, int]]:
    """Family, address and port of `0100007F:0016`: words in the host's order."""
    digits, port = text.split(":")
    words = bytes.fromhex(digits)
    packed = b"".join(
        int.from_bytes(words[at : at + 4], "big").to_bytes(4, sys.byteorder) for at in range(0, len(words), 4)
    )
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    address = ip_address(socket.inet_ntop(family, packed))
    mapped = getattr(address, "ipv4_mapped", None)
    return "ipv4" if len(packed) == 4 else "ipv6", (str(mapped or address), int(port, 16))


def unix_text_rows(text: str) -> list[UnixRow]:
    """The rows of net/unix, without queues; one with inode 0 is a connection that nobody has accepted."""
    rows = []
    for flags, kind, connection, inode, path in _TEXT_UNIX.findall(text.partition("\n")[2]):
        state = "established" if int(connection, 16) == _CONNECTED else "close"
        state = "listen" if int(flags, 16) & _ACCEPTS else state
        rows.append(UnixRow(int(inode), _NUMBERED_TYPES[int(kind, 16)], state, path, None, None))
    return sorted(rows)
