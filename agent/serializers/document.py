"""What the documents of a frame have in common: JSON lines and MessagePack."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from agent.table import TableSpec

SCHEMA = "hostprobe/1"
HEADER = ("schema", "host", "instance", "sequence", "time", "time_unix_ns", "interval_seconds", "tags")
DEGRADED = "degraded"  # a key of the header that is there only in a frame that was thinned
RESERVED = (*HEADER, DEGRADED, "part", "parts")  # the last two are those of a frame that was split into datagrams


class Identity(msgspec.Struct, frozen=True):
    """Who speaks: the same in every frame of one run.

    Attributes:
        started_unix_ns: when the run began; where the counters of its own tables began.
        boot_unix_ns: when the host began, and with it the kernel's counters; None where unknown.
        uname: the labels of the table `uname`; none where unknown.
    """

    host: str
    instance: str
    tags: Mapping[str, str]
    started_unix_ns: int = 0
    boot_unix_ns: int | None = None
    uname: tuple[str, ...] = ()


def head(identity: Identity) -> dict[str, Any]:
    """What a document begins with, the same in every frame of one run; `tags` come later."""
    return {"schema": SCHEMA, "host": identity.host, "instance": identity.instance}


def timestamp(time_unix_ns: int) -> str:
    """A moment by RFC 3339, in UTC with nanoseconds."""
    seconds, nanoseconds = divmod(time_unix_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09}Z"


def key_of(spec: TableSpec) -> str:
    """A table's key in a line: its name, but `host` is the header's already and becomes `host_table`."""
    return f"{spec.name}_table" if spec.name in RESERVED else spec.name


def in_unicode(value: Any) -> Any:
    """A document whose texts had bytes that are no UTF-8, as Python's own file names have them, without those."""
    value = msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, Mapping):
        return {key: in_unicode(item) for key, item in value.items()}
    return [in_unicode(item) for item in value] if isinstance(value, list) else value
