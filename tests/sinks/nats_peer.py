"""A NATS server with a stream, as far as a publisher meets it, for tests: it answers each message as told."""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.sinks.peers import Accepted, StreamPeer, reset_after

ROOM_BYTES = 4000
STORED = {"stream": "FRAMES", "seq": 7}

Says = Callable[[bytes], Any]


@dataclass
class Message:
    """One as a server gets it."""

    subject: str
    headers: dict[str, str]
    payload: bytes


@dataclass
class Stream:
    """A behaviour of a StreamPeer: a NATS server with a stream that says to each payload what `says` makes of it.

    That is an answer's JSON, a status line, or None for no answer at all; a ConnectionResetError resets the connection.

    Attributes:
        info: more of what it says first, or other than the test's own.
        tls: follows what it says first.
        read_bytes: how much it reads at once.
        login: of the last connection.
        messages: all that came.
    """

    says: Says = lambda _payload: STORED
    info: dict[str, Any] = field(default_factory=dict)
    tls: ssl.SSLContext | None = None
    read_bytes: int = 65536
    login: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def __call__(self, peer: StreamPeer, accepted: Accepted) -> None:
        info = {"server_id": "test", "version": "2.9.10", "headers": True, "max_payload": ROOM_BYTES, **self.info}
        start = 0
        accepted.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as a real server has it
        try:
            accepted.socket.sendall(b"INFO " + json.dumps(info).encode() + b"\r\n")
            if self.tls is not None and not peer._shake_hands(accepted, self.tls):
                return
            while peer.read(accepted, self.read_bytes):
                start = self._take(accepted, start)
        except OSError:  # it is told to, or the client has gone
            reset_after(0)(peer, accepted)

    def _take(self, accepted: Accepted, start: int) -> int:
        """Answers what has come whole; how much that is."""
        data = accepted.data
        while (end := data.find(b"\r\n", start)) >= 0:
            words = bytes(data[start:end]).split()
            start_of_next = end + 2
            if words[0] == b"CONNECT":
                self.login = json.loads(data[start + 8 : end])
            elif words[0] == b"PING":
                accepted.socket.sendall(b"PONG\r\n")
            elif words[0] == b"HPUB":
                start_of_next += int(words[4]) + 2
                if len(data) < start_of_next:
                    break
                head, body = int(words[3]), bytes(data[end + 2 : start_of_next - 2])
                headers = dict(re.findall(r"([\w-]+): (.*)\r\n", body[:head].decode()))
                self.messages.append(Message(words[1].decode(), headers, body[head:]))
                self._answer(accepted, words[2], self.says(body[head:]))
            start = start_of_next
        return start

    def _answer(self, accepted: Accepted, subject: bytes, said: Any) -> None:
        if isinstance(said, dict):
            text = json.dumps(said).encode()
            accepted.socket.sendall(b"MSG %b 1 %d\r\n%b\r\n" % (subject, len(text), text))
        elif said is not None and said.startswith(b"NATS/1.0"):
            accepted.socket.sendall(b"HMSG %b 1 %d %d\r\n%b\r\n" % (subject, len(said), len(said), said))
        elif said is not None:
            accepted.socket.sendall(said)

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.messages]
