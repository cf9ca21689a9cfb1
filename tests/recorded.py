"""Netlink replies that a kernel gave, kept under fixtures/netlink/: each dump's datagrams, their lengths in front.

    python -m tests.recorded

records them anew from the sockets of the zoo, in a network namespace of its own. The expected rows
are not recorded: tests read them from the same bytes by a parser of their own, message by message.
"""

from __future__ import annotations

import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from probes.netlink import inet_request_v1, inet_request_v2, unix_request
from tests.socket_zoo import in_namespace, open_zoo

FOLDER = Path(__file__).parent / "fixtures/netlink"
SEQUENCE = 0x5EED1234
REQUESTS = {
    "tcp": (18, inet_request_v1(0xFFF, info=True)),
    "udp": (20, inet_request_v2(socket.AF_INET, socket.IPPROTO_UDP, 0xFFF)),
    "udp6": (20, inet_request_v2(socket.AF_INET6, socket.IPPROTO_UDP, 0xFFF)),
    "unix": (20, unix_request(details=True)),
}


class Message(NamedTuple):
    """One message of a reply: its type, and what is behind its header."""

    kind: int
    payload: bytes


def record() -> dict[str, bytes]:
    """Every dump of the zoo's sockets, as it is kept."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, open_zoo(Path(folder)):
        for name, (kind, payload) in REQUESTS.items():
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as asked:
                asked.send(struct.pack("=IHHII", 16 + len(payload), kind, 0x301, SEQUENCE, 0) + payload)
                datagrams = []
                while not datagrams or not any(message.kind == 3 for message in messages_of(datagrams[-1])):
                    datagrams.append(asked.recv(1 << 16))
            found[name] = b"".join(struct.pack("<I", len(datagram)) + datagram for datagram in datagrams)
    return found


def datagrams(name: str) -> Iterator[bytes]:
    """The datagrams of a recorded dump."""
    kept = (FOLDER / f"{name}.bin").read_bytes()
    while kept:
        (size,) = struct.unpack_from("<I", kept)
        yield kept[4 : 4 + size]
        kept = kept[4 + size :]


def messages_of(datagram: bytes) -> Iterator[Message]:
    """Its messages, cut by their lengths."""
    while datagram:
        size, kind = struct.unpack_from("=IH", datagram)
        yield Message(kind, datagram[16:size])
        datagram = datagram[(size + 3) & ~3 :]


def attributes_of(attributes: bytes) -> dict[int, bytes]:
    """Attributes by their types."""
    found = {}
    while attributes:
        size, kind = struct.unpack_from("=HH", attributes)
        found[kind & 0x3FFF] = attributes[4:size]
        attributes = attributes[(size + 3) & ~3 :]
    return found


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    from tests import recorded

    for name, kept in in_namespace(recorded.record).items():
        (FOLDER / f"{name}.bin").write_bytes(kept)
