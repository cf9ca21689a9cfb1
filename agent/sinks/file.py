"""Payloads appended to a file, lines mostly, with rotation."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from agent.errors import SinkError, UsageError
from agent.sinks.sink import LineWriter, SinkSettings
from agent.units import Size


class FileSettings(SinkSettings, frozen=True, kw_only=True):
    """A file that grows to `max_size` and is then kept as `path.1`, … `path.N`, N = `max_files`."""

    path: Annotated[str, msgspec.Meta(min_length=1)]
    max_size: Size = Size(100 << 20)
    max_files: Annotated[int, msgspec.Meta(ge=0)] = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_size < 1:
            raise ValueError("max_size: a size of 1 byte or more")


class FileSink:
    """Appends a line a payload, or what else the format makes of it; it is whole or not there.

    The file is opened again when something else renamed or removed it (logrotate).
    """

    Settings = FileSettings

    def __init__(self, settings: FileSettings) -> None:
        self._path = Path(settings.path)
        self._max_size = settings.max_size
        self._max_files = settings.max_files
        self._terminator = settings.terminator
        self._line = LineWriter(self._terminator)
        self._fd = -1
        self._identity = (0, 0)  # device and inode of the open file
        self._size = 0

    def open(self) -> None:
        try:
            self._open()
        except OSError as error:
            raise UsageError(f"{self._path}: {error.strerror}", "a file that can be written") from None

    def deliver(self, payloads: Sequence[memoryview]) -> None:
        for delivered, payload in enumerate(payloads):
            try:
                if self._fd < 0 or self._was_moved():
                    self._open()
                if self._size and self._size + len(payload) + len(self._terminator) > self._max_size:
                    self._rotate()
                self._append(payload)
            except OSError as error:
                raise SinkError(f"{self._path}: {error.strerror}", delivered) from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        self.close()
        self._line.forget()
        # Without O_NONBLOCK the open of a FIFO waits until somebody reads it, for ever if need be.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
        self._fd = os.open(self._path, flags, 0o640)
        os.set_blocking(self._fd, True)
        status = os.fstat(self._fd)
        self._identity = (status.st_dev, status.st_ino)
        self._size = status.st_size
        if self._size and self._terminator and stat.S_ISREG(status.st_mode):
            self._end_torn_line()

    def _end_torn_line(self) -> None:
        """What a killed process has left of a line gets its end, so that the next line is whole."""
        with suppress(OSError):  # not everybody who may write a file may read it
            reader = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.pread(reader, 1, self._size - 1) not in (b"", b"\n"):
                    self._size += os.write(self._fd, b"\n")
            finally:
                os.close(reader)

    def _was_moved(self) -> bool:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return True
        self._size = status.st_size
        return (status.st_dev, status.st_ino) != self._identity

    def _append(self, payload: memoryview) -> None:
        try:
            self._line.write(self._fd, payload)
        except OSError:
            # A full disk may have taken half of the line: take it back, it is written again whole.
            with suppress(OSError):  # not every file can be cut: a pipe, /dev/full
                os.ftruncate(self._fd, self._size)
                self._line.forget()
            raise
        self._size += len(payload) + len(self._terminator)

    def _rotate(self) -> None:
        """path.1 becomes path.2 and so on, path becomes path.1; what exceeds `max_files` goes."""
        self.close()
        if self._max_files == 0:
            os.unlink(self._path)
        for number in range(self._max_files - 1, -1, -1):
            source = Path(f"{self._path}.{number}") if number else self._path
            if source.exists():
                source.replace(f"{self._path}.{number + 1}")
        self._open()
