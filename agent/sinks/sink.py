"""What a sink is: settings, and a place that takes batches of payloads."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Protocol

import msgspec

from agent.delivery import WhenFull
from agent.ring import MIN_BYTES
from agent.ring_file import Sync
from agent.serializers import formats
from agent.units import Duration, Size


class BufferSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The ring in front of a sink: in memory, or in a file, `path`, that outlives the process.

    Attributes:
        populate: whether all of its memory is taken at the start, and not as it fills up.
    """

    size: Size = Size(4 << 20)
    when_full: WhenFull = WhenFull.DROP_OLDEST
    path: str = ""
    sync: Sync = Sync.NEVER
    populate: bool = False

    def __post_init__(self) -> None:
        if self.size < MIN_BYTES:
            raise ValueError(f"size: a size of {MIN_BYTES} bytes or more")
        if self.sync is not Sync.NEVER and not self.path:
            raise ValueError('sync: "never" where the buffer has no path')


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


class RetrySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When a delivery that failed is tried again: after a random part of base, 2 base, 4 base … up to cap.

    Attributes:
        max_age: a payload that is older is given up; 0 waits for ever.
    """

    base: Duration = Duration(0.1)
    cap: Duration = Duration(5)
    max_age: Duration = Duration(0)

    def __post_init__(self) -> None:
        if not 0 < self.base <= self.cap:
            raise ValueError(f"base: a duration above 0, at most cap, {self.cap}")


class SinkSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sink's section of the configuration; a sink with settings of its own adds to it.

    Attributes:
        format: what its payloads are; a sink that takes only some of them narrows the type.
        names: whose names its metrics have, where the format leaves the choice.
        tables: the names of those that its lines have; all without any.
    """

    type: str = "stdout"
    enabled: bool = True
    format: formats.Name = "json"
    names: formats.Names = "hostprobe"
    tables: tuple[str, ...] = ()
    buffer: BufferSettings = BufferSettings()
    batch: BatchSettings = BatchSettings()
    retry: RetrySettings = RetrySettings()

    @property
    def terminator(self) -> bytes:
        """What follows each payload in a stream."""
        return formats.FORMATS[self.format].terminator

    def __post_init__(self) -> None:
        if self.names != "hostprobe" and not formats.FORMATS[self.format].has_names:
            raise ValueError(f'names: "hostprobe" with format {self.format}')


def owned(settings: SinkSettings) -> dict[tuple[str, ...], str]:
    """What a sink must have for itself, by its key: a file that two rotate, or an address that two listen on."""
    files: dict[tuple[str, ...], str] = {}
    if settings.buffer.path:
        files["buffer", "path"] = settings.buffer.path
    if settings.type == "file":
        files[("path",)] = str(getattr(settings, "path", ""))
    if settings.type == "prometheus":
        files[("address",)] = str(getattr(settings, "address", ""))
    return files


class Sink(Protocol):
    """Delivers payloads, called by one thread of the exporter only.

    The constructor takes the sink's settings and does no IO. `open` raises a
    `UsageError` where the sink can't start (a peer that is away is no such reason). `deliver` returns when
    all payloads of the batch are delivered whole, in their order. It raises a `SinkError` where they aren't, and is
    called again later with what is left, at its start the payload that failed; a `RejectedError` says that the peer
    will never take what is left, a `SinkClosedError` that nobody will ever read again. The payloads' memory is used
    again after the call.

    A sink may have a list `notices` of what an operator should know; it is logged after `open` and after deliveries.
    One with a method `check` has that called instead of `open` where it is only asked whether it could start.
    One with an attribute `host` finds the host's name there before it opens, and one with a method `watch` is given the
    agent's `Health`.
    """

    Settings: ClassVar[type[SinkSettings]]

    def open(self) -> None: ...

    def deliver(self, payloads: Sequence[memoryview]) -> None: ...

    def close(self) -> None: ...


class LineWriter:
    """Writes payloads as lines, whole, also to a descriptor that takes them in parts.

    A line that an error has torn is finished before anything else is written, and is not written again
    when it comes again; it may as well have been given up meanwhile.

    Args:
        terminator: what ends a line; payloads of a format that needs none follow each other.
    """

    __slots__ = ("_terminator", "_torn", "_written")

    def __init__(self, terminator: bytes = b"\n") -> None:
        self._terminator = terminator
        self._torn = b""
        self._written = 0  # bytes of it

    def write(self, descriptor: int, payload: memoryview) -> None:
        """Writes a payload and its line feed.

        Raises:
            OSError: as write(2); part of the line may have been written.
        """
        if self._written:
            torn = self._torn
            self._go_on(descriptor, memoryview(torn))
            if payload == torn:
                return
        self._go_on(descriptor, payload)

    def forget(self) -> None:
        """Somebody has taken back what was written of a line."""
        self._written = 0

    def _go_on(self, descriptor: int, payload: memoryview) -> None:
        written, size = self._written, len(payload) + len(self._terminator)
        try:
            while written < size:
                with payload[written:] as rest:
                    try:
                        written += os.writev(descriptor, (rest, self._terminator))
                    except BlockingIOError:  # whoever shares the pipe or terminal made it non-blocking
                        poll = select.poll()
                        poll.register(descriptor, select.POLLOUT)
                        poll.poll()
            self._written = 0
        except OSError:
            if written and not self._written:
                self._torn = bytes(payload)
            self._written = written
            raise
