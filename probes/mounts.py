"""The mount table: which file systems are mounted where, and which of them can be asked without risk.

Its lines: proc_pid_mounts(5), fstab(5); written by fs/proc_namespace.c, show_vfsmnt.
"""

from __future__ import annotations

import os
import re
import select
from collections.abc import Iterable
from dataclasses import dataclass

from agent.errors import ProbeError
from agent.frame import Frame
from probes.procfs import Host, ProcFile

_LINE_BYTES = 4096
_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")
# A change of the table wakes `poll`; that of the file system alone (ext4 that turned read-only
# after an error) does not, and gVisor never does.
_REREAD_AFTER_NS = 60 * 10**9

_LOCAL_TYPES = """
    ext2 ext3 ext4 xfs btrfs f2fs zfs jfs reiserfs reiser4 nilfs2 bcachefs vfat msdos exfat ntfs ntfs3 hfs hfsplus
    iso9660 udf ufs minix squashfs erofs cramfs romfs ubifs jffs2 overlay aufs tmpfs ramfs rootfs devtmpfs hugetlbfs
    proc sysfs devpts cgroup cgroup2 cpuset securityfs debugfs tracefs configfs pstore efivarfs bpf mqueue
    binfmt_misc selinuxfs fusectl nsfs resctrl
"""
LOCAL_TYPES = frozenset(_LOCAL_TYPES.encode().split())
"""statvfs on these is answered from memory; any other type may ask a server or a daemon."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the table.

    Attributes:
        device: what is mounted; any text for a type that has no device.
        path: the mount point as the kernel has it, any bytes but NUL.
        type: of the file system.
        read_only: of the mount or of its file system.
        is_local: neither it nor a mount above it can hang.
    """

    device: bytes
    path: bytes
    type: bytes
    read_only: bool
    is_local: bool = True


class MountTable:
    """The host's mounts, read again when they have changed.

    On this host `poll` tells of a change at 1/70 of the cost of reading.
    """

    def __init__(self, host: Host) -> None:
        # Of process 1, as a service of its own mount namespace sees other mounts, or makes them read-only.
        self._files = [host.proc(name, _LINE_BYTES) for name in ("1/mounts", "mounts")]
        self._text = b""
        self._mounts: list[Mount] = []
        self._watch: tuple[int, select.poll] | None = None
        self._read_ns = 0
        self._wants_watch = host.is_local

    def mounts(self, frame: Frame) -> list[Mount]:
        """The mounts that can be reached, by path; the same object while the table is the same.

        Raises:
            ProbeError: no table can be read.
        """
        fresh = self._watch is not None and frame.monotonic_ns - self._read_ns < _REREAD_AFTER_NS
        if not fresh or self._has_changed():
            self.reread(frame)
        return self._mounts

    def reread(self, frame: Frame) -> list[Mount]:
        """The mounts, read now whether `poll` tells of a change or not."""
        for file in self._files:
            text = file.read()
            if text:
                break
        else:
            raise ProbeError(f"no mount table: {' and '.join(file.path for file in self._files)} can't be read")
        self._read_ns = frame.monotonic_ns
        if text != self._text:
            self._mounts = parse_mounts(text)
            self._text = text
        if self._wants_watch and self._watch is None:
            self._start_watch(file)
        return self._mounts

    def _start_watch(self, file: ProcFile) -> None:
        """Opens a descriptor to poll; the table is read once more, as it may have changed before there was one."""
        self._wants_watch = False
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        watch = select.poll()
        watch.register(descriptor, select.POLLPRI | select.POLLERR)
        self._watch = descriptor, watch
        self._read_ns = -_REREAD_AFTER_NS

    def _has_changed(self) -> bool:
        return self._watch is not None and bool(self._watch[1].poll(0))

    def close(self) -> None:
        if self._watch is not None:
            os.close(self._watch[0])
            self._watch = None


def parse_mounts(text: bytes) -> list[Mount]:
    """The mounts of a table, sorted by path; the last of several on one path, which hides the others.

    A line that is damaged or has been cut is left out.
    """
    by_path: dict[bytes, Mount] = {}
    for line in text.split(b"\n")[:-1]:
        fields = line.split(b" ")  # the device may be empty
        if len(fields) >= 4 and fields[1].startswith(b"/") and fields[2]:
            device, path, kind = map(unescape, fields[:3])
            if b"\0" not in path:
                by_path[path] = Mount(device, path, kind, b"ro" in fields[3].split(b","))
    remote = {path for path, mount in by_path.items() if mount.type not in LOCAL_TYPES}
    if not remote:
        return [by_path[path] for path in sorted(by_path)]
    return [
        mount if path not in remote and remote.isdisjoint(_above(path)) else _not_local(mount)
        for path, mount in sorted(by_path.items())
    ]


def _not_local(mount: Mount) -> Mount:
    return Mount(mount.device, mount.path, mount.type, mount.read_only, is_local=False)


def _above(path: bytes) -> Iterable[bytes]:
    """The directories above a path, "/" among them."""
    while len(path) > 1:
        path = path[: path.rfind(b"/")] or b"/"
        yield path


def unescape(field: bytes) -> bytes:
    r"""A field with `\040` and its like (space, tab, line feed, backslash, `#`) undone."""
    if b"\\" not in field:
        return field
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)
