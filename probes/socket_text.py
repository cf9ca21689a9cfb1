"""The text lists of sockets, net/tcp, tcp6, udp, udp6 and unix, counted into the tallies of netlink's replies.

They have all that those have but the limit of an accept queue, the round trip time, what half a connection
sent again, and a Unix socket's queues and user. Sources: get_tcp4_sock, get_openreq4, get_tcp6_sock,
udp4_format_sock and unix_seq_show in the kernel's net/.
"""

from __future__ import annotations

import re
import struct
import sys

import numpy as np

from agent.errors import ProbeError
from probes.netlink import AF_INET, AF_INET6
from probes.socket_tables import NEW_SYN_RECV, SYN_RECV
from probes.socket_tallies import ESTABLISHED, LISTEN, TIMER_UNKNOWN, UNKNOWN, InetTally, UnixTally, unix_record

_ADDRESS = rb"(?:[0-9A-F]{32}|[0-9A-F]{8})"
_LINE = re.compile(
    rb"^ *\d+: %b:[0-9A-F]{4} %b:[0-9A-F]{4} ([0-9A-F]{2}) [0-9A-F]{8}:[0-9A-F]{8} .*$" % (_ADDRESS, _ADDRESS),
    re.MULTILINE,
)
_FIELDS = (
    rb"^ *\d+: (%b):([0-9A-F]{4}) (%b):([0-9A-F]{4}) (%%b) ([0-9A-F]{8}):([0-9A-F]{8})"
    rb" ([0-9A-F]{2}):[0-9A-F]{8} ([0-9A-F]{8}) +(\d{1,10}) +\d+ +(\d{1,10})(?: .*)?$" % (_ADDRESS, _ADDRESS)
)
# Path is anything, line ends included, so a line that doesn't fit is no error; and a name can hold a line that fits.
_UNIX = re.compile(
    rb"^(?:[0-9a-f]{8}|[0-9a-f]{16}): [0-9A-F]{8} [0-9A-F]{8} ([0-9A-F]{8}) ([0-9A-F]{4}) ([0-9A-F]{2})"
    rb" +(\d{1,10})(?: (.*))?$",
    re.MULTILINE,
)
_ACCEPTS = 0x10000  # __SO_ACCEPTCON, linux/net.h
# enum socket_state of the text is another one than sock_diag's: SS_CONNECTED is 3.
_UNIX_CONNECTED, _UNIX_CLOSE = 3, 7
_RECORD = struct.Struct("=4B2s2s16s16s7I2I")
_UINT_MAX = 0xFFFFFFFF


def count_inet(text: bytes, tally: InetTally) -> None:
    """Counts the sockets of net/tcp, tcp6, udp or udp6.

    An empty text is a host without that family: no sockets.

    Raises:
        ProbeError: a line isn't `0: 0100007F:0277 00000000:0000 0A 00000000:00000000 …`.
    """
    found = _LINE.findall(text)
    lines = text.count(b"\n") - 1 if text else 0
    if len(found) != lines or not (text or b"\n").endswith(b"\n"):
        name = text[:40].split(b"\n")[0]
        raise ProbeError(f"sockets: {len(found)} of {lines} lines understood in the text that starts with {name!r}")
    if not found:
        return
    counts = np.bincount(np.frombuffer(bytes.fromhex(b"".join(found).decode()), dtype=np.uint8)).tolist()
    kept = [state for state, count in enumerate(counts) if count and tally.keeps(state)]
    for state, count in enumerate(counts):
        if state not in kept:
            tally.states[state] += count
    if kept:
        pattern = re.compile(_FIELDS % b"|".join(b"%02X" % state for state in kept), re.MULTILINE)
        known = 0
        for match in pattern.finditer(text):
            tally.add(_inet_record(*match.groups()))
            known += 1
        if known != sum(counts[state] for state in kept):
            raise ProbeError(f"sockets: damaged lines in the text that starts with {text[:20]!r}")


def _inet_record(*fields: bytes) -> bytes:
    local, local_port, remote, remote_port, state, send, receive, timer, retransmits, uid, inode = fields
    number = int(state, 16)
    return _RECORD.pack(
        AF_INET if len(local) == 8 else AF_INET6,
        number,
        # Of what is no whole socket yet the text has the timeouts, whether anything was sent again or not.
        TIMER_UNKNOWN if number in (SYN_RECV, NEW_SYN_RECV) else int(timer, 16),
        min(int(retransmits, 16), 255),
        bytes.fromhex(local_port.decode()),
        bytes.fromhex(remote_port.decode()),
        _address(local),
        _address(remote),
        *(0, 0, 0, 0),  # interface, cookie, expires
        int(receive, 16),
        int(send, 16),
        min(int(uid), _UINT_MAX),
        min(int(inode), _UINT_MAX),
        UNKNOWN,
    )


def _address(digits: bytes) -> bytes:
    """The 16 bytes of an address in network order: the text has words in the host's order."""
    words = bytes.fromhex(digits.decode())
    if sys.byteorder == "little":
        words = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
    return words.ljust(16, b"\0")[:16]


def count_unix(text: bytes, tally: UnixTally) -> None:
    """Counts the sockets of net/unix."""
    for match in _UNIX.finditer(text):
        flags, kind, connection, inode, path = match.groups()
        number = int(kind, 16)
        if number >= len(tally.types) or not int(inode):
            continue  # inode 0 is a connection that waits to be accepted: netlink doesn't list it
        if int(flags, 16) & _ACCEPTS:
            state = LISTEN
        else:
            state = ESTABLISHED if int(connection, 16) == _UNIX_CONNECTED else _UNIX_CLOSE
        name = path or b""
        if name.startswith(b"@"):  # abstract; its NULs are written so as well
            name = b"\0" + name[1:]
        tally.add(unix_record(number, state, min(int(inode), _UINT_MAX), name))
