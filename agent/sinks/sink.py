"""What a sink is: settings, and a place that takes batches of payloads."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Protocol

import msgspec

from agent.ring import MIN_BYTES, WhenFull
from agent.units import Duration, Size


class BufferSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ring in front of a sink."""

    size: Size = Size(4 << 20)
    when_full: WhenFull = WhenFull.DROP_OLDEST
    path: str = ""

    def __post_init__(self) -> None:
        if self.size < MIN_BYTES:
            raise ValueError(f"size: a size of {MIN_BYTES} bytes or more")
        if self.path:
            raise ValueError('path: "": a buffer in a file is not available in this version')


class BatchSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many payloads are delivered at once: whichever is reached first sends what there is.

    Attributes:
        records: a fixed number, or "adaptive": between `min` and `max` by how full the ring is.
        bytes: the payloads of a batch have at most so many in all; a single larger one goes alone.
        linger: how long the first payload of a batch waits for others; 0 sends what is there.
    """

    records: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | Literal["adaptive"] = "adaptive"
    min: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 10
    max: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    bytes: Size = Size(1 << 20)
    linger: Duration = Duration(0)

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"min: at most max, {self.max}")


class SinkSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sink's section of the configuration; a sink with settings of its own adds to it."""

    type: str = "stdout"
    enabled: bool = True
    format: Literal["json"] = "json"
    buffer: BufferSettings = BufferSettings()
    batch: BatchSettings = BatchSettings()


class Sink(Protocol):
    """Delivers payloads, called by one thread of the exporter only.

    The constructor takes the sink's settings and does no IO. `open` raises a
    `UsageError` where the sink can't start (a peer that is away is no such reason). `deliver` returns when
    all payloads of the batch are delivered whole, in their order. It raises a `SinkError` where they aren't, and is
    called again later with what is left, at its start the payload that failed; a `RejectedError` says that the peer
    will never take what is left, a `SinkClosedError` that nobody will ever read again. The payloads' memory is used
    again after the call.
    """

    Settings: ClassVar[type[SinkSettings]]

    def open(self) -> None: ...

    def deliver(self, payloads: Sequence[memoryview]) -> None: ...

    def close(self) -> None: ...


class LineWriter:
    """Writes payloads as lines, whole, also to a descriptor that takes them in parts.

    Attributes:
        sent: bytes of the present line that are written. After an error the same line goes
            on behind them, unless whoever took them back sets 0.
    """

    __slots__ = ("sent",)

    def __init__(self) -> None:
        self.sent = 0

    def write(self, descriptor: int, payload: memoryview) -> None:
        """Writes what is missing of a payload and its line feed.

        Raises:
            OSError: as write(2); part of the line may have been written.
        """
        size = len(payload) + 1
        while self.sent < size:
            with payload[self.sent :] as rest:
                try:
                    self.sent += os.writev(descriptor, (rest, b"\n"))
                except BlockingIOError:  # whoever shares the pipe or terminal made it non-blocking
                    select.select((), (descriptor,), ())
        self.sent = 0
