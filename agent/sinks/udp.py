"""Frames as UDP datagrams: JSON with sequence, time and checksum, all other formats as their receivers know them.

Lines go as many to a datagram as it holds; what isn't lines is a datagram a payload.

UDP promises nothing: a payload counts as delivered when the kernel has all of its datagrams. A receiver proves what
was lost by the sequence of JSON's datagrams. A peer's host that says that nobody listens is noticed with the delivery
after.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Annotated

import msgspec

from agent.errors import RejectedError, SinkError
from agent.sinks.address import connected, host_and_port, reason
from agent.sinks.datagrams import HEADER_BYTES, header, nanoseconds_of, packed, split
from agent.sinks.sink import SinkSettings
from agent.units import Duration

_REFUSAL_MILLISECONDS = 50
_WHOLE_FRAME_BYTES = 32 << 10  # more than frames of most hosts
_TIMEOUT = Duration(5)  # for a network device that takes nothing


class UdpSettings(SinkSettings, frozen=True, kw_only=True):
    """A receiver of datagrams.

    Attributes:
        max_bytes: of a datagram, with its header of 20 bytes where it has one. 1,472 and the headers of UDP and IPv4
            are the 1,500 bytes that Ethernet carries; IPv6 has 20 bytes less. What is larger travels in fragments.
    """

    type: str = "udp"
    address: str
    max_bytes: Annotated[int, msgspec.Meta(ge=512, le=65_507)] = 1472

    def __post_init__(self) -> None:
        super().__post_init__()
        host_and_port(self.address)


class UdpSink:
    """Sends each payload as one or more datagrams; those of JSON are numbered by one.

    Datagrams of a payload that is sent again have new numbers: a gap is always a loss on the way.

    Attributes:
        notices: what `open` saw that is worth a warning.
    """

    Settings = UdpSettings

    def __init__(self, settings: UdpSettings) -> None:
        self._place = f"udp {settings.address}"
        self._host, self._port = host_and_port(settings.address)
        self._has_header = settings.format == "json"
        self._is_lines = bool(settings.terminator)
        self._limit_bytes = settings.max_bytes - (HEADER_BYTES if self._has_header else 0)
        self._sequence = 0
        self.notices: list[str] = []
        self._socket: socket.socket | None = None
        self._was_refused = False

    def open(self) -> None:
        self.notices = []
        if not self._has_header and not self._is_lines and self._limit_bytes < _WHOLE_FRAME_BYTES:
            what = f"a frame in this format is one datagram, and max_bytes is {self._limit_bytes}"
            self.notices.append(f"{what}: a larger frame is dropped")

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        for delivered, payload in enumerate(payloads):
            try:
                self._send(payload)
                if self._was_refused:
                    self._listen_for_refusal()
            except ValueError as error:
                raise self._rejected(str(error), delivered, payloads) from None
            except OSError as error:
                self.close()
                self._was_refused |= error.errno == errno.ECONNREFUSED
                if error.errno == errno.EMSGSIZE:
                    raise self._rejected(os.strerror(errno.EMSGSIZE), delivered, payloads) from None
                raise SinkError(f"{self._place}: {self._reason(error)}", delivered) from None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, payload: memoryview) -> None:
        """Sends all that fits.

        Raises:
            ValueError: some of it doesn't, or it is no frame.
            OSError: as send(2).
        """
        if self._has_header:
            nanoseconds = nanoseconds_of(payload)
            for text in split(payload, self._limit_bytes):
                self._send_datagram(header(self._sequence + 1, nanoseconds, text), text)
                self._sequence += 1  # an error means that nothing was sent
            return
        datagrams, largest_bytes = packed(payload, self._limit_bytes, self._is_lines)
        for text in datagrams:
            self._send_datagram(text)
        if largest_bytes > self._limit_bytes:
            what = "line" if self._is_lines else "payload"
            raise ValueError(f"a {what} of {largest_bytes} bytes: expected at most {self._limit_bytes}, its max_bytes")

    def _send_datagram(self, *parts: bytes) -> None:
        if self._socket is None:
            self._socket = self._connect()
        self._socket.sendmsg(parts)

    def _listen_for_refusal(self) -> None:
        """After a refusal, success is believed once no other comes: a refusal shows at the next send only."""
        assert self._socket is not None
        poll = select.poll()
        poll.register(self._socket, 0)  # errors are told unasked
        if poll.poll(_REFUSAL_MILLISECONDS):
            error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            raise OSError(error, os.strerror(error))
        self._was_refused = False

    def _connect(self) -> socket.socket:
        connection = connected(self._host, self._port, socket.SOCK_DGRAM, _TIMEOUT)
        # The kernel's own timeout: Python's would ask before each datagram whether there is room.
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_TIMEOUT), 0))
        return connection

    def _reason(self, error: OSError) -> str:
        return f"no room for {_TIMEOUT}" if isinstance(error, BlockingIOError) else reason(error, _TIMEOUT)

    def _rejected(self, what: str, delivered: int, payloads: Sequence[memoryview]) -> RejectedError:
        return RejectedError(f"{self._place}: {what}", delivered, each=len(payloads) - delivered > 1)
