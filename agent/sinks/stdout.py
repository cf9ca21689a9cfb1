"""Payloads to standard output, lines mostly."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from agent.errors import SinkClosedError, SinkError, UsageError
from agent.sinks.sink import LineWriter, SinkSettings

STDOUT = 1


class StdoutSink:
    """One line a payload to descriptor 1, or what else the format makes of it, past Python's own buffers."""

    Settings = SinkSettings

    def __init__(self, settings: SinkSettings) -> None:
        # A full disk may take half of a line, and nobody can take it back: the next try goes on behind it.
        self._line = LineWriter(settings.terminator)
        self._is_terminal = False

    def open(self) -> None:
        if sys.stdout is None:  # descriptor 1 was closed at the start, and is some other file by now
            raise UsageError("stdout: it is closed", "an open descriptor 1")
        self._is_terminal = os.isatty(STDOUT)

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        for delivered, payload in enumerate(payloads):
            try:
                self._line.write(STDOUT, payload)
            except BrokenPipeError:
                raise SinkClosedError("stdout: its reader has gone", delivered) from None
            except OSError as error:
                if error.errno == errno.EIO and self._is_terminal:
                    raise SinkClosedError("stdout: its terminal has gone", delivered) from None
                raise SinkError(f"stdout: {error.strerror}", delivered) from None

    def close(self) -> None: ...
