"""The errors that end in one clear line instead of a traceback."""

from __future__ import annotations

import os
import sys

_ERROR = "<3>"  # a line's priority in the journal, sd-daemon(3)


def complain(why: object) -> None:
    """One line on stderr."""
    if sys.stderr is not None:  # where descriptor 2 is closed, print() would take stdout
        print(f"{_ERROR if is_journal() else ''}hostprobe: {why}", file=sys.stderr)


def is_journal() -> bool:
    """Whether stderr is journald's stream: systemd names its device and inode, systemd.exec(5)."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class HostprobeError(Exception):
    """Anything that hostprobe itself reports; its text is the whole line."""


class UsageError(HostprobeError):
    """Wrong usage or configuration: exit status 2.

    Args:
        what: what is wrong and where: a file, a flag, a key and its value.
        expected: what would have been right, or "" where `what` says it.
    """

    def __init__(self, what: str, expected: str = "") -> None:
        line = f"{what}: expected {expected}" if expected else what
        super().__init__(" ".join(line.split()))


class ProbeError(HostprobeError):
    """A probe could not read or understand its part of the host this cycle."""


class SinkError(HostprobeError):
    """A sink could not deliver; the exporter keeps what is not delivered and tries again.

    Args:
        delivered: how many payloads of the batch, from its start, were delivered all the same.
        retry_after_seconds: how long the peer asked to be left alone; None where it didn't.
    """

    def __init__(self, what: str, delivered: int = 0, retry_after_seconds: float | None = None) -> None:
        super().__init__(what)
        self.delivered = delivered
        self.retry_after_seconds = retry_after_seconds


class RejectedError(SinkError):
    """The peer has refused what follows the `delivered` payloads of the batch for good; it is dropped and counted.

    Args:
        each: whether some of the refused payloads may be taken when each comes alone.
    """

    def __init__(self, what: str, delivered: int = 0, each: bool = False) -> None:
        super().__init__(what, delivered)
        self.each = each


class SinkClosedError(SinkError):
    """The reader at a sink's other end has left for good; it is no failure of ours."""


def free_frames(error: Exception) -> None:
    """Frees what the calls that failed held, such as a request's body.

    Libraries keep an error in a variable of the call that raises it. That is a cycle, and the collector, which
    is seldom woken here, would come for it after a thousand failures.
    """
    import traceback  # which the log needs as well, and a healthy agent doesn't

    chained: BaseException | None = error
    while chained is not None:
        traceback.clear_frames(chained.__traceback__)
        chained = chained.__context__
