"""File systems: the mount table, and statvfs where it can't hold up the cycle."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from agent.frame import Frame
from agent.table import NAN, Labels, TableSpec, gauge
from agent.units import Duration
from probes.mounts import Mount, MountTable
from probes.probe import DeviceSettings, NameFilter, as_text
from probes.procfs import Host
from probes.stall import StallProof

FILESYSTEM = TableSpec(
    "filesystem",
    "Space and inodes of each mounted file system.",
    gauge("size_bytes", "bytes", "Size of the file system."),
    gauge("free_bytes", "bytes", "Space that is not used, root's reserve included."),
    gauge("available_bytes", "bytes", "Space that programs without privileges can use."),
    gauge("used_bytes", "bytes", "Size less free."),
    gauge("used_ratio", "ratio", "Used divided by used and available, as df shows it.", derived=True),
    gauge("inodes", "inodes", "Inodes in all; unknown where the type doesn't count them."),
    gauge("inodes_free", "inodes", "Inodes that are not used."),
    gauge("inodes_used_ratio", "ratio", "Used inodes divided by all.", derived=True),
    gauge("read_only", "boolean", "1 where nothing can be written."),
    gauge("stalled", "boolean", "1 where the file system did not answer in time; its values are unknown then."),
    labels=("mountpoint", "device", "type"),
)

# Types that store nothing, or nothing of their own.
_NO_STORAGE = """
    autofs binfmt_misc bpf cgroup cgroup2 configfs cpuset debugfs devpts devtmpfs efivarfs fuse.gvfsd-fuse fuse.lxcfs
    fuse.portal fusectl hugetlbfs mqueue nfsd nsfs overlay proc pstore ramfs resctrl rootfs rpc_pipefs securityfs
    selinuxfs squashfs sysfs tmpfs tracefs
"""

Values = tuple[float, ...]
"""size, free, available, used, inodes, inodes_free."""
_UNKNOWN: Values = (NAN,) * 6
Answer = tuple[int, os.statvfs_result]
"""The device that a path is on, and its file system's figures."""
Answers = dict[bytes, Answer | None]
"""By path; one that didn't answer in time isn't in it."""


class FilesystemSettings(DeviceSettings, frozen=True, kw_only=True):
    """`include` and `exclude` are patterns of mount points, `exclude_types` of types.

    The root is kept whatever its type: in a container it is an overlay. `timeout` is how
    long a cycle waits at most for all file systems that may hang (network, FUSE) together.
    """

    exclude_types: tuple[str, ...] = tuple(_NO_STORAGE.split())
    timeout: Duration = Duration(0.2)

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise ValueError("timeout: a duration longer than 0s")


class FilesystemProbe:
    """The `filesystem` table from procfs and statvfs.

    A path that is gone or forbidden keeps its row, with nulls; so does one that leads this process to another
    file system than the table says, as in a mount namespace of its own.
    """

    Settings = FilesystemSettings
    tables = (FILESYSTEM,)

    def __init__(self, settings: FilesystemSettings, host: Host) -> None:
        self._settings = settings
        self._table = MountTable(host)
        self._choice = MountChoice(settings)
        self._root = b"" if host.is_local else os.fsencode(host.root)
        # In a saved tree a device may have the number of one of this machine's.
        self._is_saved = not host.is_local and not os.path.ismount(os.path.join(host.root, "proc"))
        self._remote = StallProof(_ask)
        self._mounts: list[Mount] = []  # the table's, all of them
        self._chosen: list[Mount] = []
        self._local: list[bytes] = []
        self._risky: list[bytes] = []
        self._paths: list[bytes] = []
        self._labels: list[Labels] = []
        self._read_only: list[float] = []
        self._flags: list[int] = []

    def collect(self, frame: Frame) -> None:
        mounts = self._table.mounts(frame)
        if mounts is not self._mounts:
            self._take(mounts)
        answers: Answers = dict.fromkeys(self._paths) if self._is_saved else {path: _ask(path) for path in self._local}
        if self._risky and not self._is_saved:
            answers |= self._remote.ask(self._risky, self._settings.timeout)
        flags = [answer[1].f_flag for answer in answers.values() if answer is not None]
        if flags != self._flags:
            self._flags = flags
            self._look_for_read_only(frame)
        table = frame.open(FILESYSTEM)
        count = table.claim(self._labels, self._settings.row_limit)
        if count:
            table.gauges[:count] = [
                _row(answers, path, mount, read_only)
                for path, mount, read_only in zip(self._paths, self._chosen, self._read_only, strict=True)
            ]

    @property
    def asked_paths(self) -> list[bytes]:
        """What a cycle asks with stat and statvfs, but for what may hang."""
        return [] if self._is_saved else self._local

    def _take(self, mounts: list[Mount]) -> None:
        """Learns which of these mounts to ask, and how."""
        chosen = self._choice.of(mounts)
        self._labels = [(as_text(mount.path), as_text(mount.device), as_text(mount.type)) for mount in chosen]
        asked = chosen[: self._settings.row_limit]
        self._paths = [self._root + mount.path for mount in asked]
        self._local = [path for path, mount in zip(self._paths, asked, strict=True) if mount.is_local]
        self._risky = [path for path, mount in zip(self._paths, asked, strict=True) if not mount.is_local]
        self._read_only = [float(mount.read_only) for mount in asked]
        self._mounts, self._chosen = mounts, asked

    def _look_for_read_only(self, frame: Frame) -> None:
        """Reads the table again: a file system that turned read-only by itself shows in its flags first.

        The flags alone won't do: they are this process's, which a service manager may
        have put where everything is read-only.
        """
        state = {mount.path: mount.read_only for mount in self._table.reread(frame)}
        self._read_only = [float(state.get(mount.path, mount.read_only)) for mount in self._chosen]

    def close(self) -> None:
        self._table.close()
        self._remote.close()


class PsutilFilesystemProbe:
    """The `filesystem` table from psutil, without inodes; every file system is asked on a worker thread."""

    Settings = FilesystemSettings
    tables = (FILESYSTEM,)

    def __init__(self, settings: FilesystemSettings, host: Host) -> None:
        import psutil

        self._settings = settings
        self._partitions = psutil.disk_partitions
        self._choice = MountChoice(settings)
        self._usage = StallProof(_usage_from(psutil.disk_usage))

    def collect(self, frame: Frame) -> None:
        partitions = {
            partition.mountpoint: Mount(
                os.fsencode(partition.device),
                os.fsencode(partition.mountpoint),
                os.fsencode(partition.fstype),
                "ro" in partition.opts.split(","),
            )
            for partition in self._partitions(all=False)
        }
        chosen = self._choice.of(list(partitions.values()))
        table = frame.open(FILESYSTEM)
        labels = [(as_text(mount.path), as_text(mount.device), as_text(mount.type)) for mount in chosen]
        chosen = chosen[: table.claim(labels, self._settings.row_limit)]
        answers = self._usage.ask([os.fsdecode(mount.path) for mount in chosen], self._settings.timeout)
        for row, mount in enumerate(chosen):
            path = os.fsdecode(mount.path)
            values = answers.get(path) or _UNKNOWN
            table.gauges[row] = (*values, float(mount.read_only), float(path not in answers), *_ratios(values))

    def close(self) -> None:
        self._usage.close()


class MountChoice:
    """Which mounts get a row: those that the settings keep, and each device once."""

    def __init__(self, settings: FilesystemSettings) -> None:
        self._paths = NameFilter(settings.include, settings.exclude)
        self._types = NameFilter(("*",), settings.exclude_types)

    def of(self, mounts: Sequence[Mount]) -> list[Mount]:
        """Sorted by path; of a device that is mounted at several places, the shortest path."""
        devices: dict[tuple[bytes, bytes], Mount] = {}
        for mount in sorted(mounts, key=lambda mount: (len(mount.path), mount.path)):
            if self._paths.keeps(as_text(mount.path)) and (
                mount.path == b"/" or self._types.keeps(as_text(mount.type))
            ):
                devices.setdefault(_identity(mount), mount)
        return sorted(devices.values(), key=lambda mount: mount.path)


def _identity(mount: Mount) -> tuple[bytes, bytes]:
    """What two mounts of one file system have in common: the device, unless it is only a word ("tmpfs")."""
    if b"/" in mount.device and mount.device != b"/dev/fuse":
        return mount.device, b""
    return mount.device, mount.path


def _ask(path: bytes) -> Answer | None:
    try:
        return os.stat(path).st_dev, os.statvfs(path)
    except OSError:
        return None


def _is_of(answer: Answer, mount: Mount) -> bool:
    """Whether it is the mount's own, not that of another one on its path."""
    number = answer[0]
    # Each subvolume of btrfs has a number of its own, and the table that of them all; anonymous ones, of major 0.
    return number == mount.number or mount.number is None or (mount.type == b"btrfs" and os.major(number) == 0)


def _usage_from(disk_usage: Callable[[str], object]) -> Callable[[str], Values | None]:
    """`disk_usage` as the values of a row; what psutil calls free is what programs can use."""

    def usage(path: str) -> Values | None:
        try:
            found = disk_usage(path)
        except OSError:
            return None
        total, used, available = (float(getattr(found, name)) for name in ("total", "used", "free"))
        return total, total - used, available, used, NAN, NAN

    return usage


def _row(answers: Answers, path: bytes, mount: Mount, read_only: float) -> Values:
    """The gauges of a row in stored order."""
    if path not in answers:
        return (*_UNKNOWN, read_only, 1.0, NAN, NAN)
    answer = answers[path]
    values = _UNKNOWN if answer is None or not _is_of(answer, mount) else values_of(answer[1])
    return (*values, read_only, 0.0, *_ratios(values))


def values_of(answer: os.statvfs_result) -> Values:
    """The values of a row; f_files is 0 where a type (btrfs, vfat) doesn't count inodes."""
    unit, blocks, free, available, inodes, inodes_free = answer[1:7]
    space = (float(blocks * unit), float(free * unit), float(available * unit), float((blocks - free) * unit))
    return (*space, float(inodes), float(inodes_free)) if inodes else (*space, NAN, NAN)


def _ratios(values: Values) -> Values:
    """used_ratio and inodes_used_ratio."""
    _, _, available, used, inodes, inodes_free = values
    space = used / (used + available) if used + available else NAN
    return space, (inodes - inodes_free) / inodes
