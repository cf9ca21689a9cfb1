"""Sockets' processes: real sockets of real processes, and trees with what a host seldom shows."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from probes.owners import Owner, Owners

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the links of Linux's proc")

REPOSITORY = Path(__file__).parents[2]
CALLS_MAX = 100_000
ABSENT = 2**40 - 1  # no inode of sockfs: they have 32 bits

HOLDER = """
import os, socket, sys
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
print(*(os.fstat(one.fileno()).st_ino for one in sockets), flush=True)
for line in sys.stdin:
    sockets.pop().close()
    print(flush=True)
"""
"""Holds sockets until its input ends; closes one at each line. Descriptors that it inherits stay open."""


class Holder:
    """A process that holds sockets; `pass_fds` gives it some of ours besides."""

    def __init__(self, count: int, pass_fds: tuple[int, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", HOLDER, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=pass_fds,
        )
        self.inodes = [int(word) for word in self._line().split()]

    @property
    def owner(self) -> Owner:
        pid = self.process.pid
        return pid, Path(f"/proc/{pid}/comm").read_text().removesuffix("\n")

    def close_one(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        self._line()
        return self.inodes.pop()

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the holder has ended"
        return line

    def end(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture
def hold() -> Iterator[Callable[..., Holder]]:
    holders: list[Holder] = []

    def start(count: int, pass_fds: tuple[int, ...] = ()) -> Holder:
        holders.append(Holder(count, pass_fds))
        return holders[-1]

    yield start
    for holder in holders:
        if holder.process.returncode is None:
            holder.end()


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as opened:
        yield opened


def inode_of(opened: socket.socket) -> int:
    return os.fstat(opened.fileno()).st_ino


def whole(root: Path | str = "/proc") -> Owners:
    """An instance that ends its walks in the call that starts them."""
    return Owners(root, math.inf)


def to_the_end(owners: Owners, inodes: list[int]) -> tuple[int, list[Owner | None]]:
    """How many calls it takes until all is searched, and what it has found then."""
    for calls in range(1, CALLS_MAX):
        found = owners.find(inodes)
        if owners.searched:
            return calls, found
    pytest.fail(f"not searched after {CALLS_MAX} calls")


def write_process(root: Path, pid: object, links: list[str], comm: bytes | None = b"name\n") -> Path:
    """A process in a tree, its descriptors numbered from 0; without comm if that is None."""
    directory = root / str(pid)
    (directory / "fd").mkdir(parents=True)
    for number, link in enumerate(links):
        (directory / "fd" / str(number)).symlink_to(link)
    if comm is not None:
        (directory / "comm").write_bytes(comm)
    return directory


def links(*inodes: int) -> list[str]:
    return [f"socket:[{inode}]" for inode in inodes]


def relink(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


# --- This host ---


def test_finds_sockets_of_this_process_and_of_a_child(sock: socket.socket, hold: Callable[..., Holder]) -> None:
    holder = hold(3)
    owners = whole()
    name = Path("/proc/self/comm").read_text().removesuffix("\n")
    inodes = [holder.inodes[1], 0, inode_of(sock), holder.inodes[0], ABSENT, holder.inodes[1]]
    child, own = holder.owner, (os.getpid(), name)
    assert owners.find(inodes) == [child, None, own, child, None, child]
    assert owners.searched
    assert owners.complete == (not owners.denied)  # a sandbox may refuse even root some
    assert owners.find([holder.inodes[1], inode_of(sock)]) == [child, own]
    assert owners.complete, "whom we may not see is no matter where each has its owner"


def test_of_several_holders_the_lowest_pid_is_shown(sock: socket.socket, hold: Callable[..., Holder]) -> None:
    holders = [hold(0, pass_fds=(sock.fileno(),)) for _ in range(3)]
    inode = inode_of(sock)
    owners = whole()
    pids = sorted([os.getpid(), *(holder.process.pid for holder in holders)])
    for _ in range(2):
        [found] = owners.find([inode])
        assert found is not None
        assert found[0] == pids[0]
    sock.close()
    pids.remove(os.getpid())
    [found] = owners.find([inode])
    assert found is not None
    assert found[0] == pids[0]


def test_what_was_closed_has_no_owner_any_longer(hold: Callable[..., Holder]) -> None:
    holder = hold(2)
    owners = whole()
    kept, closed = holder.inodes
    assert owners.find([kept, closed]) == [holder.owner] * 2
    assert holder.close_one() == closed
    assert owners.find([kept, closed]) == [holder.owner, None]
    holder.end()
    assert owners.find([kept, closed]) == [None, None]
    assert owners.searched


def test_a_walk_in_slices_finds_what_a_whole_one_does(sock: socket.socket, hold: Callable[..., Holder]) -> None:
    inodes = [inode_of(sock), ABSENT, *hold(100).inodes]
    owners = Owners(budget_seconds=0)
    owners.find(inodes)
    assert not owners.searched
    assert not owners.complete
    calls, found = to_the_end(owners, inodes)
    assert calls > 5  # the holder alone takes four
    assert found == whole().find(inodes)
    assert found.count(None) == 1


def test_the_budget_holds_within_a_process(hold: Callable[..., Holder]) -> None:
    """Between calls the walk stands in the midst of a process; that one ends, and the walk passes it over."""
    holder = hold(200)
    owners = Owners(budget_seconds=0)
    place = f"/proc/{holder.process.pid}/fd"
    first, last = holder.inodes[0], holder.inodes[-1]
    for _ in range(CALLS_MAX):
        found = owners.find([first, last])
        if found[0] is not None:
            break
    assert found == [holder.owner, None]
    assert not owners.complete
    assert place in own_links()
    holder.end()
    assert to_the_end(owners, [first, last])[1] == [None, None]
    assert place not in own_links()


def own_links() -> list[str]:
    names = os.listdir("/proc/self/fd")
    return [os.readlink(f"/proc/self/fd/{name}") for name in names if Path("/proc/self/fd", name).is_symlink()]


def test_no_descriptor_is_left_open(hold: Callable[..., Holder]) -> None:
    inodes = hold(5).inodes
    before = sorted(os.listdir("/proc/self/fd"))
    whole().find(inodes)
    assert sorted(os.listdir("/proc/self/fd")) == before
    owners = Owners(budget_seconds=0)
    owners.find([ABSENT])
    assert sorted(os.listdir("/proc/self/fd")) != before
    owners.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert to_the_end(owners, [ABSENT, *inodes])[1][0] is None
    owners.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user, which needs root")
def test_what_we_have_no_right_to_see_is_counted(hold: Callable[..., Holder]) -> None:
    program = (
        "import json, math, os, socket, sys\n"
        "from probes.owners import Owners\n"
        "own = socket.socket()\n"
        "inodes = [int(sys.argv[1]), os.fstat(own.fileno()).st_ino]\n"
        "before = Owners(budget_seconds=math.inf)\n"
        "rows = [(before.find(inodes), before.complete, before.denied)]\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for owners in (before, Owners(budget_seconds=math.inf)):\n"
        "    rows.append((owners.find(inodes), owners.complete, owners.denied))\n"
        "walked = owners.walked\n"
        "owners.find(inodes)\n"
        "print(json.dumps([os.getpid(), owners.walked - walked, rows]))\n"
    )
    holder = hold(1)
    run = subprocess.run(
        [sys.executable, "-B", "-c", program, str(holder.inodes[0])],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        check=False,
    )
    assert run.stderr == ""
    pid, walked_again, rows = json.loads(run.stdout)
    assert walked_again == 0
    as_root, *as_nobody = rows
    assert [owner[0] for owner in as_root[0]] == [holder.process.pid, pid]
    for (theirs, own), complete, denied in as_nobody:
        assert theirs is None
        assert own[0] == pid
        assert not complete
        assert denied > as_root[2]  # a sandbox may refuse root some as well


# --- Trees ---


def test_known_and_unowned_sockets_start_no_walk(tmp_path: Path) -> None:
    write_process(tmp_path, 7, links(1, 2))
    owners = whole(tmp_path)
    assert owners.find([0, 0]) == [None, None]
    assert (owners.walked, owners.complete) == (0, True)
    for _ in range(5):
        assert owners.find([1, 99]) == [(7, "name"), None]
        assert (owners.walked, owners.complete) == (1, True)
    write_process(tmp_path, 8, links(99), b"late\n")
    assert owners.find([1, 99]) == [(7, "name"), None]
    assert owners.walked == 1
    assert owners.find([1, 99, 2]) == [(7, "name"), (8, "late"), (7, "name")]  # a new one has them all looked for
    assert owners.walked == 3
    assert owners.find([1, 99, 2]) == [(7, "name"), (8, "late"), (7, "name")]
    assert owners.walked == 3


def test_a_socket_that_came_during_a_walk_waits_for_the_next(tmp_path: Path) -> None:
    """Every process holds it; the first walk has passed one by then, and that may have the lowest pid."""
    for pid in (12, 9, 10):
        write_process(tmp_path, pid, links(5))
    owners = Owners(tmp_path, budget_seconds=0)
    assert owners.find([99]) == [None]
    assert owners.walked == 1
    while owners.walked < 3:
        assert owners.find([99, 5]) == [None, None]
        assert not owners.complete
    assert to_the_end(owners, [99, 5])[1] == [None, (9, "name")]
    assert owners.walked == 6


@pytest.mark.parametrize("pids", [range(9, 60), range(59, 8, -1)], ids=["rising", "falling"])
def test_the_lowest_pid_is_that_of_the_number(tmp_path: Path, pids: range) -> None:
    """A file system lists them in any order."""
    for pid in pids:
        write_process(tmp_path, pid, links(5), b"%d\n" % pid)
    assert whole(tmp_path).find([5]) == [(9, "9")]


def test_a_remembered_link_is_read_again(tmp_path: Path) -> None:
    seven = write_process(tmp_path, 7, links(1, 2))
    owners = whole(tmp_path)
    assert owners.find([1, 2]) == [(7, "name")] * 2
    (seven / "comm").write_bytes(b"renamed\n")
    assert owners.find([1, 2]) == [(7, "name")] * 2  # the name of the time when it was found
    relink(seven / "fd/0", "socket:[11]")
    assert owners.find([1, 2]) == [None, (7, "name")]
    relink(seven / "fd/1", "pipe:[2]")
    write_process(tmp_path, 8, links(2), b"other\n")
    assert owners.find([1, 2]) == [None, (8, "other")]


def test_what_is_lost_during_its_walk_is_looked_for_again(tmp_path: Path) -> None:
    processes = {pid: write_process(tmp_path, pid, links(pid)) for pid in (7, 8, 9)}
    owners = Owners(tmp_path, budget_seconds=0)
    found = owners.find([7, 8, 9])
    [first] = [pid for pid, owner in zip((7, 8, 9), found, strict=True) if owner is not None]
    relink(processes[first] / "fd/0", "/dev/null")
    (processes[first] / "fd/1").symlink_to(f"socket:[{first}]")
    assert to_the_end(owners, [7, 8, 9])[1] == [(7, "name"), (8, "name"), (9, "name")]
    assert owners.walked > 3


def test_a_walk_for_what_nobody_asks_for_any_longer_ends(tmp_path: Path) -> None:
    for pid in (7, 8, 9):
        write_process(tmp_path, pid, links(5))
    owners = Owners(tmp_path, budget_seconds=0)
    owners.find([99])
    owners.find([])
    assert (owners.walked, owners.complete) == (1, True)
    assert to_the_end(owners, [99])[1] == [None]
    assert owners.walked == 4


def test_all_that_is_sought_being_found_is_complete(tmp_path: Path) -> None:
    write_process(tmp_path, 7, ["/dev/null"] * 40 + links(5) + ["/dev/null"] * 40)
    owners = Owners(tmp_path, budget_seconds=0)
    assert to_the_end(owners, [5])[1] == [(7, "name")]
    assert to_the_end(owners, [5])[0] == 1


def test_an_inode_that_comes_back_is_looked_for_again(tmp_path: Path) -> None:
    owners = whole(tmp_path)
    assert owners.find([5]) == [None]
    assert owners.find([]) == []
    write_process(tmp_path, 7, links(5))
    assert owners.find([5]) == [(7, "name")]


def test_links_that_are_refused_are_counted_by_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may not be traced has a descriptor directory that root can list, and links that it can't read."""
    for pid, inode in ((7, 5), (8, 6)):
        write_process(tmp_path, pid, links(inode) * 3)
    readlink = os.readlink

    def refuse(path: str, *, dir_fd: int | None = None) -> str:
        link = readlink(path, dir_fd=dir_fd)
        if link == "socket:[5]":
            raise PermissionError
        return link

    monkeypatch.setattr(os, "readlink", refuse)
    owners = whole(tmp_path)
    for inodes in ([5], [5, 6], [5, 6, 99]):
        assert owners.find(inodes) == [{6: (8, "name")}.get(inode) for inode in inodes]
        assert (owners.denied, owners.searched, owners.complete) == (1, True, False)
    assert owners.find([6]) == [(8, "name")]
    assert owners.complete
    monkeypatch.undo()
    owners.find([5, 98])
    assert (owners.denied, owners.complete) == (0, True)


@pytest.mark.parametrize("call", ["open", "scandir", "readlink"])
@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO])
def test_a_walk_that_cannot_go_on_is_broken_off_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    """That a process has ended is another thing: nobody knows what was not looked into."""
    for pid in (7, 8, 9):
        write_process(tmp_path, pid, links(pid))
    real, calls = getattr(os, call), 0

    def refuse(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(*arguments, **named)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, call, refuse)
    owners = whole(tmp_path)
    for _ in range(2):
        calls = 0
        owners.find([7, 8, 9, 99])
        assert (owners.searched, owners.complete, owners.failure) == (False, False, os.strerror(error))
    monkeypatch.undo()
    assert owners.find([7, 8, 9, 99]) == [(7, "name"), (8, "name"), (9, "name"), None]
    assert (owners.complete, owners.failure) == (True, "")


WITH_FEW_DESCRIPTORS = """
import json, math, os, resource, socket, sys
from probes.owners import Owners
own = socket.socket()
inode = os.fstat(own.fileno()).st_ino
owners = Owners(budget_seconds=math.inf)
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (own.fileno() + 2, limits[1]))  # one is left, a walk takes four
rows = [(owners.find([inode]), owners.complete, owners.failure)]
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
rows.append((owners.find([inode]), owners.complete, owners.failure))
print(json.dumps([os.getpid(), rows]))
"""


def test_without_descriptors_nothing_is_said_to_be_complete() -> None:
    run = subprocess.run(
        [sys.executable, "-B", "-c", WITH_FEW_DESCRIPTORS], capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    )
    assert run.stderr == ""
    pid, (without, again) = json.loads(run.stdout)
    assert without == [[None], False, os.strerror(errno.EMFILE)]
    assert (again[0][0][0], *again[1:]) == (pid, True, "")


def test_what_is_not_asked_for_is_forgotten(tmp_path: Path) -> None:
    write_process(tmp_path, 7, links(*range(1, 401)))
    owners = whole(tmp_path)
    for start in (1, 401):  # owned; unowned
        inodes = list(range(start, start + 400))
        owners.find(inodes[:10])
        before = sys.getallocatedblocks()
        for at in range(10, 400, 10):
            owners.find(inodes[at : at + 10])
        assert sys.getallocatedblocks() - before < 390
        walked = owners.walked
        owners.find(inodes[:10])
        assert owners.walked == walked + 1


def test_a_name_may_have_any_bytes(tmp_path: Path) -> None:
    for pid, comm in ((1, b"\xff:\n\n"), (2, b""), (3, b"\xc3\xa4 b\n"), (4, b"x" * 4096)):
        write_process(tmp_path, pid, links(pid), comm)
    assert whole(tmp_path).find([1, 2, 3, 4]) == [(1, "\\xff:\n"), (2, ""), (3, "ä b"), (4, "x" * 256)]


def test_odd_trees_are_passed_over(tmp_path: Path) -> None:
    for name in ("self", "12x", "-3", "٣", "1.5", "x1"):
        write_process(tmp_path, name, links(5))
    (tmp_path / "1").write_bytes(b"a process that is a file")
    (tmp_path / "2").mkdir()  # no fd: it has ended
    write_process(tmp_path, 3, links(5, 6), comm=None)  # it ended before its name was read
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "fd").write_bytes(b"")
    five = write_process(tmp_path, 5, links(8))
    for number in range(1, 40):
        (five / "fd" / str(number)).write_bytes(b"no link")
    odd = ["/dev/null", "pipe:[5]", "socket:[5", "socket:[05]", "socket:[]", "socket:[x]", b"\xff".decode("latin-1")]
    six = write_process(tmp_path, 6, [*odd, *links(6)])
    os.symlink(b"\xff\xfe", os.fsencode(six / "fd" / "99"))
    owners = whole(tmp_path)
    assert owners.find([5, 6, 8, -1, 2**70]) == [None, (6, "name"), (5, "name"), None, None]
    assert (owners.complete, owners.denied, owners.walked) == (True, 0, 6)


@pytest.mark.parametrize("place", ["absent", "file"])
def test_no_proc_has_no_owners(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    owners = Owners(str(tmp_path / place))
    assert owners.find([1, 0, 2]) == [None, None, None]
    assert (owners.complete, owners.walked) == (True, 0)
