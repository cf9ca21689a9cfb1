"""A FUSE file system in this process, whose daemon answers only when it is told to.

Its messages: include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from pathlib import Path

import pytest

_LIBC = ctypes.CDLL(None, use_errno=True)
MNT_FORCE, MNT_DETACH = 1, 2
MS_RDONLY, MS_REMOUNT = 1, 32
_INIT, _STATFS, _GETATTR = 26, 17, 3
_ENOSYS = 38
BLOCKS, FREE, AVAILABLE, INODES, INODES_FREE, UNIT = 1000, 400, 300, 80, 20, 512


def mount(device: str, path: Path, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2); skips the test where it isn't allowed."""
    if _LIBC.mount(device.encode(), os.fsencode(path), kind.encode(), ctypes.c_ulong(flags), options.encode()) != 0:
        pytest.skip(f"cannot mount {kind}: {os.strerror(ctypes.get_errno())}")
    if f" {path} " not in Path("/proc/1/mounts").read_text():
        unmount(path)
        pytest.skip("process 1 is in another mount namespace")


def unmount(path: Path) -> None:
    """umount2(2), by force; no error where nothing is mounted."""
    _LIBC.umount2(os.fsencode(path), MNT_FORCE | MNT_DETACH)


class SilentFuse:
    """Mounted at `path`; statvfs on it hangs until `answer` is called or it is closed."""

    def __init__(self, path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("mounting takes root")
        try:
            self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            pytest.skip(f"/dev/fuse: {error.strerror}")
        self.path = path
        self._thread: threading.Thread | None = None
        try:
            mount("hostprobe-test", path, "fuse", 0, f"fd={self._fd},rootmode=40000,user_id=0,group_id=0")
        except BaseException:
            os.close(self._fd)
            raise

    def answer(self) -> None:
        """From now on the daemon serves."""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fd, 1 << 17)
            except OSError:  # ENODEV: unmounted
                return
            _, opcode, unique = struct.unpack_from("=IIQ", request)
            body, error = b"", 0
            if opcode == _INIT:
                body = struct.pack("=IIIIHHIIHH8I", 7, 31, 0, 0, 0, 0, 4096, 1, 0, 0, *[0] * 8)
            elif opcode == _STATFS:
                body = struct.pack(
                    "=5Q4I6I", BLOCKS, FREE, AVAILABLE, INODES, INODES_FREE, UNIT, 255, UNIT, 0, *[0] * 6
                )
            elif opcode == _GETATTR:
                # Valid for no time; inode 1, a directory (mode 040755) with 2 links.
                body = struct.pack("=QII6Q3I7I", 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o40755, 2, 0, 0, 0, 512, 0)
            else:
                error = -_ENOSYS
            try:
                os.write(self._fd, struct.pack("=IiQ", 16 + len(body), error, unique) + body)
            except OSError:  # the one who asked has gone
                continue

    def close(self) -> None:
        """Unmounts it; who hangs in it gets an error."""
        unmount(self.path)  # by force: aborts the connection, so the reader ends as well
        if self._thread is not None:
            self._thread.join(60)
        os.close(self._fd)
        unmount(self.path)
