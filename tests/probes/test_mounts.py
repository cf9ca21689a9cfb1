"""The mount table: escapes, hidden and damaged lines, what can be asked directly, and when it is read again."""

from __future__ import annotations

import os
import re
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ProbeError
from agent.frame import Frame
from probes.mounts import Mount, MountTable, parse_mountinfo, parse_mounts, unescape
from probes.procfs import Host
from tests.hosts import saved_host, write_large_host

Tree = Callable[[dict[str, str | bytes]], Path]
needs_proc = pytest.mark.skipif(not os.path.exists("/proc/1/mounts"), reason="reads this machine's /proc")


@pytest.fixture
def table_of() -> Iterator[Callable[[Path | str], MountTable]]:
    opened: list[MountTable | Host] = []

    def make(root: Path | str) -> MountTable:
        host = Host(root=str(root), source="procfs")
        opened.extend((MountTable(host), host))
        return opened[-2]  # type: ignore[return-value]

    yield make
    for thing in opened:
        thing.close()


def frame_at(seconds: float) -> Frame:
    frame = Frame(())
    frame.begin(0, round(seconds * 1e9))
    return frame


def test_a_line() -> None:
    assert parse_mounts(b"/dev/vda / ext4 rw,relatime,discard 0 0\n") == [Mount(b"/dev/vda", b"/", b"ext4", False)]
    assert parse_mounts(b"/dev/sr0 /cd iso9660 ro,nosuid 0 0\n")[0].read_only
    assert not parse_mounts(b"/dev/vda / ext4 rw,errors=remount-ro 0 0\n")[0].read_only


@pytest.mark.parametrize(
    ("field", "name"),
    [
        (rb"/with\040space", b"/with space"),
        (rb"/tab\011lf\012", b"/tab\tlf\n"),
        (rb"/back\134slash", b"/back\\slash"),
        (rb"/back\134040", rb"/back\040"),  # undone once
        (rb"/\043hash", b"/#hash"),
        (b"/\xff\xfe", b"/\xff\xfe"),
        (rb"/bad\04", rb"/bad\04"),
        (rb"/high\777", rb"/high\777"),
    ],
)
def test_escapes(field: bytes, name: bytes) -> None:
    assert unescape(field) == name
    assert parse_mounts(b"/dev/x " + field + b" ext4 rw 0 0\n")[0].path == name


@given(st.binary(min_size=1))
def test_escaping_and_unescaping(name: bytes) -> None:
    escaped = re.sub(rb"[ \t\n\\#]", lambda match: b"\\%03o" % match[0][0], name)  # seq_escape of show_vfsmnt
    assert unescape(escaped) == name


INFO = b"27 1 254:0 /sub /srv/with\\040space rw,relatime shared:1 master:2 - ext4 /dev/v\\040a rw,discard\n"


def test_a_line_of_mountinfo() -> None:
    number = os.makedev(254, 0)
    assert parse_mountinfo(INFO) == [Mount(b"/dev/v a", b"/srv/with space", b"ext4", False, number=number)]
    for read_only in (INFO.replace(b" rw,rel", b" ro,rel"), INFO.replace(b" rw,dis", b" ro,dis")):
        assert parse_mountinfo(read_only)[0].read_only
    (fuse,) = parse_mountinfo(b"27 1 0:5 / /mnt rw - fuse.x  rw\n")
    assert (fuse.device, fuse.type, fuse.is_local) == (b"", b"fuse.x", False)


@pytest.mark.parametrize(
    "line",
    [
        INFO[:-1],
        b"\n",
        INFO.replace(b" - ", b" "),
        INFO.replace(b" - ", b" x "),
        INFO.replace(b"254:0", b"254"),
        INFO.replace(b"254:0", b"x:0"),
        INFO.replace(b"254:0", b"254:99999999999999999999"),
        INFO.replace(b" /srv", b" srv"),
        INFO.replace(b"/srv", b"/s\\000"),
        INFO.replace(b"ext4", b""),
        b"27 1 254:0 / /srv\n",
        b"27 1 254:0 / /srv rw - ext4\n",
    ],
)
def test_damaged_line_of_mountinfo_is_left_out(line: bytes) -> None:
    assert [mount.path for mount in parse_mountinfo(b"2 1 8:1 / / rw - ext4 /dev/a rw\n" + line)] == [b"/"]


def reached(*lines: str) -> dict[str, str]:
    """The mounts that are left, and their devices; a line is number, parent, path."""
    text = "".join(
        f"{number} {parent} 8:1 / {path} rw - ext4 {number} rw\n" for number, parent, path in map(str.split, lines)
    )
    return {mount.path.decode(): mount.device.decode() for mount in parse_mountinfo(text.encode())}


def test_a_mount_that_another_one_hides_is_left_out() -> None:
    assert reached("1 0 /", "2 1 /m/a", "3 1 /m") == {"/": "1", "/m": "3"}
    assert reached("1 0 /", "3 1 /m", "2 1 /m/a") == {"/": "1", "/m": "3"}, "in whatever order"
    assert reached("1 0 /", "3 1 /m", "2 3 /m/a") == {"/": "1", "/m": "3", "/m/a": "2"}
    assert reached("1 0 /", "2 1 /m", "3 2 /m", "4 2 /m/a", "5 3 /m/b") == {"/": "1", "/m": "3", "/m/b": "5"}
    assert reached("1 0 /", "2 1 /m/a/b", "3 1 /m", "4 3 /m/a/b/c") == {"/": "1", "/m": "3", "/m/a/b/c": "4"}
    assert reached("1 1 /", "2 1 /", "3 1 /a", "4 2 /b") == {"/": "2", "/b": "4"}, "a root on another one"
    assert reached("2 1 /a", "3 1 /b", "4 2 /a/c") == {"/a": "2", "/b": "3", "/a/c": "4"}, "in a chroot"
    assert reached("1 2 /", "2 1 /") == {}, "damage"
    assert reached("1 0 /", "1 0 /a") == {"/a": "1"}, "damage"


@given(st.permutations(["1 0 /", "2 1 /m", "3 2 /m", "4 1 /m/a", "5 3 /m/a", "6 5 /m/a/b", "7 1 /x"]))
def test_the_order_of_the_lines_is_no_matter(lines: list[str]) -> None:
    assert reached(*lines) == {"/": "1", "/m": "3", "/m/a": "5", "/m/a/b": "6", "/x": "7"}


def test_a_deep_path() -> None:
    deep = "/a" * 1900
    assert reached("1 0 /", f"2 1 {deep}") == {"/": "1", deep: "2"}


def test_device_may_be_empty() -> None:
    assert parse_mounts(b" /mnt fuse rw 0 0\n") == [Mount(b"", b"/mnt", b"fuse", False, is_local=False)]


def test_the_last_mount_on_a_path_hides_the_others() -> None:
    text = b"rootfs / rootfs rw 0 0\n/dev/sda / ext4 ro 0 0\nautofs /net autofs rw 0 0\nsrv:/a /net nfs rw 0 0\n"
    assert [(mount.path, mount.device, mount.read_only) for mount in parse_mounts(text)] == [
        (b"/", b"/dev/sda", True),
        (b"/net", b"srv:/a", False),
    ]


def test_sorted_by_path() -> None:
    text = b"".join(b"tmpfs %s tmpfs rw 0 0\n" % path for path in (b"/b", b"/", b"/a/x", b"/a"))
    assert [mount.path for mount in parse_mounts(text)] == [b"/", b"/a", b"/a/x", b"/b"]


@pytest.mark.parametrize(
    "line",
    [
        b"/dev/sda / ext4 rw 0 0",  # cut
        b"/dev/sda\n",
        b"/dev/sda /srv\n",
        b"/dev/sda /srv ext4\n",
        b"\n",
        b"   /n ext4 rw 0 0\n",
        b"/dev/sda srv ext4 rw 0 0\n",
        b"/dev/sda /srv  rw 0 0\n",
        b"/dev/sda /srv\0x ext4 rw 0 0\n",
        rb"/dev/sda /srv\000x ext4 rw 0 0" + b"\n",
    ],
)
def test_damaged_line_is_left_out(line: bytes) -> None:
    assert [mount.path for mount in parse_mounts(b"/dev/a /a ext4 rw 0 0\n" + line)] == [b"/a"]


@pytest.mark.parametrize(
    ("lines", "risky"),
    [
        ([b"/ ext4", b"/srv xfs", b"/sys sysfs", b"/sys/fs/cgroup cgroup2", b"/run tmpfs"], []),
        (
            [b"/ ext4", b"/net nfs4", b"/cifs cifs", b"/f fuse.sshfs", b"/p 9p", b"/c ceph", b"/new unheardof"],
            "all but the first",
        ),
        (
            [b"/ ext4", b"/net nfs", b"/net/disk ext4", b"/net/disk/deep xfs", b"/network ext4"],
            [b"/net", b"/net/disk", b"/net/disk/deep"],
        ),
        ([b"/ nfs", b"/local ext4"], [b"/", b"/local"]),
        ([b"/ ext4", b"/auto autofs", b"/auto/usb vfat"], [b"/auto", b"/auto/usb"]),
    ],
)
def test_what_may_hang(lines: list[bytes], risky: list[bytes] | str) -> None:
    mounts = parse_mounts(b"".join(b"dev %s rw 0 0\n" % line for line in lines))
    found = [mount.path for mount in mounts if not mount.is_local]
    assert found == (risky if isinstance(risky, list) else sorted(line.split()[0] for line in lines[1:]))


@needs_proc
def test_the_kernels_own_table(table_of: Callable[[Path | str], MountTable]) -> None:
    # Other tests mount things: the table must have been the same before and after.
    for _ in range(20):
        before = Path("/proc/1/mounts").read_bytes()
        mounts = table_of("/").mounts(frame_at(0))
        if before == Path("/proc/1/mounts").read_bytes():
            break
    expected = {mount.path: mount for mount in parse_mounts(before)}
    assert b"/" in {mount.path for mount in mounts}
    for mount in mounts:
        same = expected[mount.path]
        found = (mount.device, mount.type, mount.read_only, mount.is_local)
        assert found == (same.device, same.type, same.read_only, same.is_local)
        assert mount.number is not None


def test_table_of_process_1_and_where_it_is_hidden_ones_own(
    tree: Tree, table_of: Callable[[Path | str], MountTable]
) -> None:
    root = tree({"proc/mounts": "/dev/a /own ext4 rw 0 0\n"})
    assert [mount.path for mount in table_of(root).mounts(frame_at(0))] == [b"/own"]
    tree({"proc/1/mounts": "/dev/b /first ext4 rw 0 0\n"})
    assert [mount.path for mount in table_of(root).mounts(frame_at(0))] == [b"/first"]
    tree({"proc/1/mountinfo": "1 0 8:1 / /told ro - ext4 /dev/b rw\n"})
    assert table_of(root).mounts(frame_at(0)) == [Mount(b"/dev/b", b"/told", b"ext4", True, number=os.makedev(8, 1))]


def test_no_table_is_an_error(tree: Tree, table_of: Callable[[Path | str], MountTable]) -> None:
    with pytest.raises(ProbeError, match=r"^no mount table: .*/proc/1/mountinfo, .*, .*/proc/mounts can't"):
        table_of(tree({})).mounts(frame_at(0))


def test_long_table_is_read_to_its_end(tmp_path: Path, table_of: Callable[[Path | str], MountTable]) -> None:
    write_large_host(tmp_path, cpus=1, disks=400, interfaces=1, sockets=1)
    assert (tmp_path / "proc/1/mounts").stat().st_size > 3 * 4096
    assert len(table_of(tmp_path).mounts(frame_at(0))) == 2 + 400


def test_same_object_while_the_table_is_the_same(tree: Tree, table_of: Callable[[Path | str], MountTable]) -> None:
    root = tree({"proc/1/mounts": "/dev/a /a ext4 rw 0 0\n"})
    table = table_of(root)
    first = table.mounts(frame_at(0))
    assert table.mounts(frame_at(1)) is first
    tree({"proc/1/mounts": "/dev/a /a ext4 ro 0 0\n"})
    assert table.mounts(frame_at(2)) == [Mount(b"/dev/a", b"/a", b"ext4", True)]


def test_a_watch_that_never_tells_anything_is_not_believed_for_ever(
    tree: Tree, tmp_path: Path, table_of: Callable[[Path | str], MountTable]
) -> None:
    root = tree({"proc/1/mounts": "/dev/a /a ext4 rw 0 0\n"})
    table = table_of(root)
    table.mounts(frame_at(100))
    descriptor = os.open(tmp_path / "proc/stat", os.O_RDONLY)  # a plain file never has POLLPRI
    watch = select.poll()
    watch.register(descriptor, select.POLLPRI | select.POLLERR)
    table._watch = descriptor, watch
    tree({"proc/1/mounts": "/dev/b /b ext4 rw 0 0\n"})
    assert table.mounts(frame_at(159))[0].path == b"/a"
    assert table.mounts(frame_at(160))[0].path == b"/b"


def test_saved_hosts() -> None:
    def parse(name: str) -> dict[bytes, Mount]:
        text = (saved_host(name) / "proc/1/mounts").read_bytes()
        return {mount.path: mount for mount in parse_mounts(text)}

    assert parse("vm")[b"/srv/with space"] == Mount(b"/dev/vda", b"/srv/with space", b"ext4", True)
    assert parse("old")[b"/"].device == b"/dev/mapper/vg-root"
    assert b"/" in parse("damaged")
    assert b"/cut" not in parse("damaged")


_PIECES = st.sampled_from(
    [b"/dev/x", b"/", b"/a", b"/a/b", b" ", b"\n", b"nfs", b"ext4", b"rw", b"\\040", b"\\", b"\0"]
)


_INFO_PIECES = st.sampled_from([b"1", b"2", b"8:1", b"/", b"/a", b"/a/b", b"-", b"\n", b"nfs", b"rw", b"ro", b"\\040"])


@given(
    st.sampled_from([parse_mounts, parse_mountinfo]),
    st.binary(max_size=200)
    | st.lists(_PIECES, max_size=60).map(b" ".join)
    | st.lists(_PIECES).map(b"".join)
    | st.lists(_INFO_PIECES, max_size=60).map(b" ".join),
)
def test_any_bytes(parse: Callable[[bytes], list[Mount]], text: bytes) -> None:
    mounts = parse(text)
    assert len(mounts) <= text.count(b"\n")
    assert [mount.path for mount in mounts] == sorted({mount.path for mount in mounts})
    for mount in mounts:
        assert mount.path.startswith(b"/")
        os.path.exists(mount.path)  # a path that the system takes
