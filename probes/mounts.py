"""The mount table: which file systems are mounted where, and which of them can be asked without risk.

Its lines: proc_pid_mountinfo(5), and proc_pid_mounts(5) where that is absent; written by
fs/proc_namespace.c, show_mountinfo and show_vfsmnt.
"""

from __future__ import annotations

import os
import re
import select
from collections.abc import Iterable
from dataclasses import dataclass, replace

from agent.errors import ProbeError
from agent.frame import Frame
from probes.procfs import Host, ProcFile

_TABLES = ("1/mountinfo", "1/mounts", "self/mountinfo", "mounts")
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
        number: of its device, as stat(2) has it; None where the table doesn't tell.
    """

    device: bytes
    path: bytes
    type: bytes
    read_only: bool
    is_local: bool = True
    number: int | None = None


class MountTable:
    """The host's mounts, read again when they have changed.

    On this host `poll` tells of a change at 1/70 of the cost of reading.
    """

    def __init__(self, host: Host) -> None:
        # Of process 1, as a service of its own mount namespace sees other mounts, or makes them read-only.
        # In another host's proc that is mounted "self" is this process still, and its mounts are not that host's.
        knows_own = host.is_local or not os.path.ismount(os.path.join(host.root, "proc"))
        self._files = [host.proc(name, _LINE_BYTES) for name in (_TABLES if knows_own else _TABLES[:2])]
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
            raise ProbeError(f"no mount table: {', '.join(file.path for file in self._files)} can't be read")
        self._read_ns = frame.monotonic_ns
        if text != self._text:
            parse = parse_mountinfo if file.path.endswith("mountinfo") else parse_mounts
            self._mounts = parse(text)
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
    return _told_apart(by_path)


@dataclass(frozen=True, slots=True)
class _Place:
    """A mount, and the number of the one on which it is."""

    parent: bytes
    mount: Mount


def parse_mountinfo(text: bytes) -> list[Mount]:
    """The mounts that a path leads to, sorted by path; those that another one hides are left out.

    A line that is damaged or has been cut is left out.
    """
    places: dict[bytes, _Place] = {}
    for line in text.split(b"\n")[:-1]:
        fields = line.split(b" ")
        try:
            tail = fields.index(b"-", 6)
            number, parent, device, _, path, options = fields[:6]
            kind, source, whole_options = fields[tail + 1 : tail + 4]
            major, minor = map(int, device.split(b":"))
            device_number = os.makedev(major, minor)
        except (ValueError, OverflowError):
            continue
        path = unescape(path)
        if path.startswith(b"/") and b"\0" not in path and kind:
            read_only = b"ro" in options.split(b",") or b"ro" in whole_options.split(b",")
            places[number] = _Place(
                parent, Mount(unescape(source), path, unescape(kind), read_only, number=device_number)
            )
    return _told_apart(_reached(places))


def _reached(places: dict[bytes, _Place]) -> dict[bytes, Mount]:
    """Of mounts by their numbers those that one gets to from "/", by path."""
    below: dict[tuple[bytes, bytes], bytes] = {}
    for number, place in places.items():
        # What is mounted on the root, or on a mount that can't be seen from here, has a parent that isn't listed.
        is_first = place.parent == number or place.parent not in places
        below[b"" if is_first else place.parent, place.mount.path] = number

    def at(path: bytes) -> bytes:
        """The mount that a path ends in: as it passes each directory, the last of those stacked on it there."""
        found = b""
        for directory in (*reversed(list(_above(path))), path):
            while (found, directory) in below:
                found = below[found, directory]
        return found

    return {place.mount.path: place.mount for number, place in places.items() if at(place.mount.path) == number}


def _told_apart(by_path: dict[bytes, Mount]) -> list[Mount]:
    """The mounts sorted by path, with whether they can hang."""
    remote = {path for path, mount in by_path.items() if mount.type not in LOCAL_TYPES}
    if not remote:
        return [by_path[path] for path in sorted(by_path)]
    return [
        mount if path not in remote and remote.isdisjoint(_above(path)) else replace(mount, is_local=False)
        for path, mount in sorted(by_path.items())
    ]


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
