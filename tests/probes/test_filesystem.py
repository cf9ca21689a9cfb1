"""File systems: df's, psutil's and statvfs's figures, which mounts get a row, and mounts that hang."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ProbeError
from agent.frame import Frame
from agent.units import Duration
from probes.filesystem import (
    FILESYSTEM,
    FilesystemProbe,
    FilesystemSettings,
    MountChoice,
    PsutilFilesystemProbe,
    _is_of,
    values_of,
)
from probes.mounts import Mount, parse_mounts
from probes.procfs import Host
from tests.figures import rows, rows_by
from tests.hosts import disk_names, saved_host, write_large_host
from tests.probes import fuse

Collect = Callable[..., Frame]
Tree = Callable[[dict[str, str | bytes]], Path]
VALUES = ["size", "free", "available", "used"]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")


class Cycles:
    """A probe on this host; each call collects one cycle and gives the rows by mount point."""

    def __init__(self, probe_class: Any = FilesystemProbe, **settings: Any) -> None:
        self.host = Host(source="psutil" if probe_class is PsutilFilesystemProbe else "auto")
        self.probe = probe_class(FilesystemSettings(**settings), self.host)
        self.frame = Frame((FILESYSTEM,))

    def __call__(self, monotonic_ns: int = 1) -> dict[str, dict[str, Any]]:
        self.frame.begin(0, monotonic_ns)
        self.probe.collect(self.frame)
        return rows_by(self.frame, "filesystem", "mountpoint")

    def close(self) -> None:
        self.probe.close()
        self.host.close()


@pytest.fixture
def cycles() -> Iterator[Callable[..., Cycles]]:
    made: list[Cycles] = []

    def make(*args: Any, **settings: Any) -> Cycles:
        made.append(Cycles(*args, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """An empty directory on which nothing stays mounted."""
    path = tmp_path / "mount"
    path.mkdir()
    yield path
    fuse.unmount(path)


@pytest.fixture
def silent(mountpoint: Path) -> Iterator[fuse.SilentFuse]:
    mounted = fuse.SilentFuse(mountpoint)
    yield mounted
    mounted.close()


def chosen(text: bytes, **settings: Any) -> list[str]:
    mounts = MountChoice(FilesystemSettings(**settings)).of(parse_mounts(text))
    return [mount.path.decode() for mount in mounts]


def test_columns_in_the_order_of_the_contract() -> None:
    assert [column.name for column in FILESYSTEM.columns] == [
        *("size_bytes", "free_bytes", "available_bytes", "used_bytes", "used_ratio"),
        *("inodes", "inodes_free", "inodes_used_ratio", "read_only", "stalled"),
    ]
    assert FILESYSTEM.labels == ("mountpoint", "device", "type")


def agree(figures: Callable[[], tuple[object, object]]) -> None:
    """Asserts that both are equal at one of many tries: others write to the disk between two readings."""
    for _ in range(200):
        ours, theirs = figures()
        if ours == theirs:
            return
    assert ours == theirs


def test_root_is_statvfs_to_the_digit(cycles: Callable[..., Cycles]) -> None:
    cycle = cycles()

    def figures() -> tuple[object, object]:
        row, answer = cycle()["/"], os.statvfs("/")
        unit, used = answer.f_frsize, (answer.f_blocks - answer.f_bfree) * answer.f_frsize
        counts_inodes = answer.f_files > 0
        return row, {
            **{name: row[name] for name in FILESYSTEM.labels},
            "size_bytes": answer.f_blocks * unit,
            "free_bytes": answer.f_bfree * unit,
            "available_bytes": answer.f_bavail * unit,
            "used_bytes": used,
            "used_ratio": used / (used + answer.f_bavail * unit),
            "inodes": answer.f_files if counts_inodes else None,
            "inodes_free": answer.f_ffree if counts_inodes else None,
            "inodes_used_ratio": (answer.f_files - answer.f_ffree) / answer.f_files if counts_inodes else None,
            "read_only": bool(answer.f_flag & os.ST_RDONLY),
            "stalled": 0,
        }

    agree(figures)


@pytest.mark.skipif(shutil.which("df") is None, reason="there is no df")
def test_df_agrees_on_every_row(cycles: Callable[..., Cycles]) -> None:
    def df() -> dict[str, list[str]]:
        # df ends with 1 where one of the mounts can't be asked; the others are there.
        shown = subprocess.run(
            ["df", "-a", "-B1", "--output=target,source,fstype,size,used,avail,pcent,itotal,iavail"],
            capture_output=True,
            text=True,
            env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
        ).stdout
        return {words[0]: words for words in map(str.split, shown.splitlines()[1:]) if len(words) == 9}

    def number(word: str) -> float:
        return 0.0 if word == "-" else float(word)

    cycle = cycles(exclude_types=("fuse", "fuse.*", "nfs*"), row_limit=500)
    met: set[str] = set()
    for _ in range(50):
        shown, found = df(), cycle()
        for path in found.keys() & shown.keys():
            row = found[path]
            _, device, kind, size, used, available, percent, inodes, inodes_free = shown[path]
            figures = [row["size_bytes"], row["used_bytes"], row["available_bytes"], row["inodes"], row["inodes_free"]]
            if [figure or 0 for figure in figures] == [
                number(word) for word in (size, used, available, inodes, inodes_free)
            ]:
                met.add(path)
                assert (row["device"], row["type"]) == (device, kind)
                if row["used_ratio"] is not None:  # df rounds up
                    assert 0 <= int(percent.rstrip("%")) - row["used_ratio"] * 100 < 1
        if met >= found.keys():
            break
    assert {"/", "/proc", "/dev"} <= met
    assert met >= found.keys() & shown.keys()


def test_psutil_agrees_and_so_does_its_probe(cycles: Callable[..., Cycles]) -> None:
    partitions = {partition.mountpoint: partition for partition in psutil.disk_partitions(all=False)}
    if "/" not in partitions:
        pytest.skip("psutil doesn't count the root file system of a container")
    root = partitions["/"]
    for cycle in (cycles(), cycles(PsutilFilesystemProbe, timeout=Duration(60))):

        def figures(cycle: Cycles = cycle) -> tuple[object, object]:
            row, usage = cycle()["/"], psutil.disk_usage("/")
            ours = [row[f"{name}_bytes"] for name in VALUES] + [round(row["used_ratio"] * 100, 1)]
            return ours, [usage.total, usage.total - usage.used, usage.free, usage.used, usage.percent]

        agree(figures)
        row = cycle()["/"]
        assert (row["device"], row["type"]) == (root.device, root.fstype)
        assert [row["read_only"], row["stalled"]] == ["ro" in root.opts.split(","), 0]
    assert [row["inodes"], row["inodes_free"], row["inodes_used_ratio"]] == [None] * 3  # psutil's


def test_psutils_path_that_is_gone(cycles: Callable[..., Cycles], monkeypatch: pytest.MonkeyPatch) -> None:
    entry = type(psutil.disk_partitions()[0])("/dev/gone", "/is/gone", "ext4", "ro,noatime")
    monkeypatch.setattr(psutil, "disk_partitions", lambda **options: [entry])
    row = cycles(PsutilFilesystemProbe, timeout=Duration(60))()["/is/gone"]
    assert [row["size_bytes"], row["used_ratio"], row["read_only"], row["stalled"]] == [None, None, 1.0, 0.0]


def test_a_device_that_is_mounted_twice_is_the_shortest_path() -> None:
    text = b"/dev/a /a/long/path xfs rw 0 0\n/dev/a /bind xfs rw 0 0\n/dev/a /b xfs rw 0 0\n/dev/b /c xfs rw 0 0\n"
    assert chosen(text) == ["/b", "/c"]
    assert chosen(text, exclude=("/b",)) == ["/bind", "/c"]
    assert chosen(text, include=("/a/*",)) == ["/a/long/path"]


def test_names_that_are_no_device_tell_nothing() -> None:
    text = b"tmpfs /run tmpfs rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/fuse /x fuse rw 0 0\n/dev/fuse /y fuse rw 0 0\n"
    assert chosen(text, exclude_types=()) == ["/run", "/tmp", "/x", "/y"]


def test_what_is_no_storage_is_left_out_but_the_root_is_not() -> None:
    text = b"overlay / overlay rw 0 0\noverlay /var/lib/docker/1 overlay rw 0 0\ntmpfs /run tmpfs rw 0 0\n"
    text += b"proc /proc proc rw 0 0\n/dev/loop1 /snap/x squashfs ro 0 0\nlxcfs /l fuse.lxcfs rw 0 0\n"
    assert chosen(text + b"/dev/sdb /data ext4 rw 0 0\n") == ["/", "/data"]
    assert chosen(text, exclude=("/",)) == []
    assert chosen(text, exclude_types=("proc", "fuse.*", "overlay")) == ["/", "/run", "/snap/x"]


def test_a_mount_that_hides_another(tree: Tree, collect: Collect) -> None:
    root = tree({"proc/1/mounts": "/dev/a /mnt ext4 rw 0 0\ntmpfs /mnt tmpfs rw 0 0\n"})
    assert rows(collect(FilesystemProbe, root=root), "filesystem") == []


def mountinfo(*mounts: tuple[str, int, str]) -> bytes:
    """A table of process 1, given path, device number and type; the first is the root, on which the others are."""
    lines = (
        f"{place + 2} {2 if place else 1} {os.major(number)}:{os.minor(number)} / {path} rw - {kind} /dev/{place} rw\n"
        for place, (path, number, kind) in enumerate(mounts)
    )
    return "".join(lines).encode("latin-1")


def test_paths_below_another_root(tree: Tree, collect: Collect, monkeypatch: pytest.MonkeyPatch) -> None:
    here = os.stat(tree({})).st_dev
    text = mountinfo(
        ("/", here, "ext4"),
        ("/srv/with\\040space", here, "ext4"),
        ("/b\xff", here, "xfs"),
        ("/no", here, "xfs"),
        ("/hidden", os.makedev(8, 77), "ext4"),
        ("/volume", os.makedev(8, 77), "btrfs"),
    )
    root = tree({"proc/1/mountinfo": text.replace(b"space rw", b"space ro")})
    for name in (b"srv/with space", b"b\xff", b"hidden", b"volume"):
        os.makedirs(os.path.join(os.fsencode(root), name))
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(root / "proc"))
    found = rows_by(collect(FilesystemProbe, root=root), "filesystem", "mountpoint")
    size = os.statvfs(root).f_blocks * os.statvfs(root).f_frsize
    assert {path: row["size_bytes"] for path, row in found.items()} == {
        "/": size,
        "/b\\xff": size,  # asked under its own bytes
        "/hidden": None,
        "/no": None,
        "/srv/with space": size,
        "/volume": None if os.major(here) else size,  # btrfs has an anonymous number for each subvolume
    }
    assert [found["/no"]["stalled"], found["/no"]["read_only"], found["/srv/with space"]["read_only"]] == [0, 0, 1]
    assert [found["/hidden"]["stalled"], found["/hidden"]["used_ratio"], found["/hidden"]["inodes"]] == [0, None, None]


def test_a_saved_tree_has_no_figures_of_this_machine(tree: Tree, collect: Collect) -> None:
    """Even where a device of its host had the number of one of ours; and nothing is asked that may hang."""
    here = os.stat(tree({})).st_dev
    root = tree({"proc/1/mountinfo": mountinfo(("/", here, "ext4"), ("/proc", here, "nfs"))})
    for row in rows(collect(FilesystemProbe, root=root), "filesystem"):
        assert [row["size_bytes"], row["used_ratio"], row["read_only"], row["stalled"]] == [None, None, 0, 0]


@pytest.mark.skipif(not os.path.exists("/proc/self/root/proc/1/mountinfo"), reason="reads this machine's /proc")
def test_another_root_that_lives(collect: Collect) -> None:
    """As that of a container: its paths are asked below it."""
    found = rows_by(collect(FilesystemProbe, root="/proc/self/root"), "filesystem", "mountpoint")
    assert found["/"]["size_bytes"] == os.statvfs("/").f_blocks * os.statvfs("/").f_frsize


def test_subvolumes_of_btrfs() -> None:
    """One mount of each; the kernel has a number for the file system and one for each subvolume."""

    def shows(number: int, kind: bytes) -> bool:
        mount = Mount(b"/dev/sda2", b"/home", kind, False, number=os.makedev(0, 35))
        return _is_of((number, os.statvfs_result((0,) * 10)), mount)

    assert shows(os.makedev(0, 35), b"btrfs")
    assert shows(os.makedev(0, 41), b"btrfs")
    assert not shows(os.makedev(8, 1), b"btrfs")
    assert not shows(os.makedev(0, 41), b"ext4")


def test_a_forbidden_path_keeps_its_row(collect: Collect, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(path: bytes) -> os.statvfs_result:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "statvfs", forbid)
    root = tree({"proc/1/mounts": "/dev/a / ext4 rw 0 0\nsrv:/x /net nfs rw 0 0\n"})
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    found = rows(collect(FilesystemProbe, root=root, timeout=Duration(60)), "filesystem")
    assert [row["mountpoint"] for row in found] == ["/", "/net"]
    for row in found:
        assert [row[f"{name}_bytes"] for name in VALUES] + [row["used_ratio"], row["inodes"]] == [None] * 6
        assert row["stalled"] == 0


def test_row_limit_counts_what_it_left_out(tmp_path: Path, collect: Collect) -> None:
    write_large_host(tmp_path, cpus=1, disks=64, interfaces=1, sockets=1)
    frame = collect(FilesystemProbe, root=tmp_path, row_limit=10)
    expected = ["/", *sorted(f"/srv/{name}" for name in disk_names(64) if name != "sda")]
    assert [row["mountpoint"] for row in rows(frame, "filesystem")] == expected[:10]
    assert frame.tables["filesystem"].dropped == 54


def test_without_any_mount_that_is_wanted(tree: Tree, collect: Collect) -> None:
    root = tree({"proc/1/mounts": "proc /proc proc rw 0 0\n"})
    assert rows(collect(FilesystemProbe, root=root, times=(0, 1)), "filesystem") == []


def test_no_mount_table_is_an_error(tree: Tree, collect: Collect) -> None:
    with pytest.raises(ProbeError, match="no mount table"):
        collect(FilesystemProbe, root=tree({}))


@pytest.mark.parametrize("name", ["vm", "old", "damaged"])
def test_saved_hosts(collect: Collect, name: str) -> None:
    found = rows(collect(FilesystemProbe, root=saved_host(name)), "filesystem")
    assert found[0]["mountpoint"] == "/"
    assert {row["size_bytes"] for row in found} == {None}, "this machine's disk isn't theirs"
    assert len({row["device"] for row in found}) == len(found)


@pytest.mark.parametrize("timeout", ['"0s"', '"-1s"', "5"])
def test_settings_refuse_a_timeout_that_is_none(timeout: str) -> None:
    def read(kind: type, value: object) -> object:
        return kind.parse(value)  # type: ignore[attr-defined]

    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"timeout": msgspec.json.decode(timeout)}, FilesystemSettings, dec_hook=read)


def test_types_without_inodes_or_blocks() -> None:
    zeros = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    size, free, available, used, inodes, inodes_free = values_of(zeros)
    assert (size, free, available, used) == (0, 0, 0, 0)
    assert inodes != inodes
    assert inodes_free != inodes_free


@given(st.tuples(*[st.integers(0, 2**64 - 1)] * 10))
def test_any_answer(numbers: tuple[int, ...]) -> None:
    assert len(values_of(os.statvfs_result(numbers))) == 6


@needs_root
def test_mounts_come_and_go(cycles: Callable[..., Cycles], mountpoint: Path) -> None:
    cycle = cycles(include=(str(mountpoint),), exclude_types=())
    for _ in range(2):  # at one moment, so that only the kernel's notice tells of the change
        assert cycle() == {}
        fuse.mount("hostprobe-test", mountpoint, "tmpfs", 0, "size=1M,nr_inodes=50")
        row = cycle()[str(mountpoint)]
        assert [row["size_bytes"], row["inodes"], row["read_only"], row["type"]] == [1 << 20, 50, 0, "tmpfs"]
        fuse.mount("hostprobe-test", mountpoint, "tmpfs", fuse.MS_REMOUNT | fuse.MS_RDONLY)
        assert cycle()[str(mountpoint)]["read_only"] == 1
        fuse.unmount(mountpoint)
    assert cycle() == {}


@needs_root
def test_a_mount_below_one_that_came_later(cycles: Callable[..., Cycles], mountpoint: Path) -> None:
    """The path is there, and it is a directory of the later one."""
    inner = mountpoint / "a"
    inner.mkdir()
    cycle = cycles(include=(f"{mountpoint}*",), exclude_types=())
    try:
        fuse.mount("hostprobe-test", inner, "tmpfs", 0, "size=1M")
        assert list(cycle()) == [str(inner)]
        fuse.mount("hostprobe-test", mountpoint, "tmpfs", 0, "size=2M")
        inner.mkdir()
        assert {path: row["size_bytes"] for path, row in cycle().items()} == {str(mountpoint): 2 << 20}
    finally:
        fuse.unmount(mountpoint)
        fuse.unmount(inner)
    assert cycle() == {}


IN_A_NAMESPACE = """
import json, sys
from tests.probes.test_filesystem import Cycles
print(json.dumps(Cycles(include=(sys.argv[1],), exclude_types=())()))
"""


@needs_root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="util-linux is not installed")
@pytest.mark.parametrize("own", ["umount {}", "mount -t tmpfs -o size=2M hostprobe-test {}"])
def test_a_mount_of_process_1_that_this_process_does_not_see(mountpoint: Path, own: str) -> None:
    """The agent in a mount namespace of its own: what its path leads to is something else."""
    fuse.mount("hostprobe-test", mountpoint, "tmpfs", 0, "size=1M")
    script = own.format(mountpoint) + ' && exec "$@"'
    command = ["unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-c", IN_A_NAMESPACE, str(mountpoint)],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    (row,) = msgspec.json.decode(done.stdout).values()
    assert (row["mountpoint"], row["type"]) == (str(mountpoint), "tmpfs")
    assert [row["size_bytes"], row["free_bytes"], row["inodes"], row["used_ratio"]] == [None] * 4
    assert [row["stalled"], row["read_only"]] == [0, 0]


@needs_root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="util-linux is not installed")
def test_file_system_that_turns_read_only_by_itself(cycles: Callable[..., Cycles], mountpoint: Path) -> None:
    # As after an ext4 error: the file system has changed, our mount of it hasn't, and no notice comes.
    fuse.mount("hostprobe-test", mountpoint, "tmpfs")
    cycle = cycles(include=(str(mountpoint),), exclude_types=())
    assert [cycle()[str(mountpoint)]["read_only"] for _ in range(3)] == [0, 0, 0]
    for option in ("ro", "rw"):
        remount = f"mount -o remount,{option} {mountpoint}"
        subprocess.run(["unshare", "-m", "--propagation", "private", "sh", "-c", remount], check=True)
        assert cycle()[str(mountpoint)]["read_only"] == (option == "ro")


def until_answered(cycle: Cycles, path: str) -> dict[str, Any]:
    for _ in range(1200):
        row = cycle()[path]
        if row["stalled"] == 0:
            return row
        os.sched_yield()
    return pytest.fail("it never answered")


def test_mount_that_hangs_and_recovers(cycles: Callable[..., Cycles], silent: fuse.SilentFuse) -> None:
    path = str(silent.path)
    cycle = cycles(include=("/", path), timeout=Duration(0.05))
    for _ in range(4):
        found = cycle()
        assert list(found) == ["/", path]
        row = found[path]
        assert [row["device"], row["type"]] == ["hostprobe-test", "fuse"]
        assert [row["stalled"], row["read_only"]] == [1, 0]
        assert {row[name] for name in row.keys() - {"mountpoint", "device", "type", "stalled", "read_only"}} == {None}
        assert found["/"]["stalled"] == 0
        assert found["/"]["size_bytes"] > 0
        assert cycle.probe._remote.hanging == 1
    silent.answer()
    row = until_answered(cycle, path)
    used = (fuse.BLOCKS - fuse.FREE) * fuse.UNIT
    assert [row[f"{name}_bytes"] for name in VALUES] == [
        *(fuse.BLOCKS * fuse.UNIT, fuse.FREE * fuse.UNIT, fuse.AVAILABLE * fuse.UNIT, used)
    ]
    assert row["used_ratio"] == used / (used + fuse.AVAILABLE * fuse.UNIT)
    assert row["inodes_used_ratio"] == 0.75
    assert cycle.probe._remote.hanging == 0


def test_mount_that_hangs_and_is_given_up(cycles: Callable[..., Cycles], silent: fuse.SilentFuse) -> None:
    path = str(silent.path)
    cycle = cycles(include=(path,), timeout=Duration(0.05))
    assert cycle()[path]["stalled"] == 1
    fuse.unmount(silent.path)
    assert cycle() == {}


def test_psutils_mount_that_hangs(
    cycles: Callable[..., Cycles], silent: fuse.SilentFuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(silent.path)
    entry = type(psutil.disk_partitions()[0])("x", path, "fuse", "rw")
    monkeypatch.setattr(psutil, "disk_partitions", lambda **options: [entry])
    cycle = cycles(PsutilFilesystemProbe, timeout=Duration(0.05))
    assert [cycle()[path]["stalled"] for _ in range(3)] == [1, 1, 1]
    silent.answer()
    row = until_answered(cycle, path)
    assert [row["size_bytes"], row["available_bytes"]] == [fuse.BLOCKS * fuse.UNIT, fuse.AVAILABLE * fuse.UNIT]
