"""What is sent over HTTP: the payloads of a batch as the body of one request."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

_GZIP_LEVEL = 6  # of 100 frames (777 kB): level 1 makes 59 kB in 1.6 ms, 4 38 kB in 2.3 ms, 6 28 kB in 3.1 ms
_GZIP_WINDOW_BITS = 31  # zlib's way to say: with gzip's header and checksum


def joined(payloads: Sequence[memoryview], terminator: bytes = b"") -> bytes:
    """The payloads, each with the terminator behind it."""
    return terminator.join([*payloads, b""])


def gzipped(payloads: Sequence[memoryview], terminator: bytes = b"") -> bytes:
    """The same compressed, one payload after the other: no second copy of the batch is needed."""
    compressor = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_WINDOW_BITS)
    parts = []
    for payload in payloads:
        parts.append(compressor.compress(payload))
        parts.append(compressor.compress(terminator))
    parts.append(compressor.flush())
    return b"".join(parts)
