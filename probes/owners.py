"""Who holds a socket: the process behind an inode, found by reading the links in /proc/PID/fd.

The links' text, `socket:[INODE]`: proc_pid_fd(5); fs/proc/fd.c, net/socket.c sockfs_dname.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from probes.probe import as_text

Owner = tuple[int, str]
"""A process: its pid, and its name (comm) when it was found."""

Walk = Generator[None, None, None]

_LINKS_A_STEP = 32  # some 90 µs
_ENDED = frozenset((errno.ENOENT, errno.ESRCH, errno.ENOTDIR))  # the process; ENOTDIR where a file bears its name
_NO_LINK = _ENDED | {errno.EINVAL}
_NAME_BYTES = 256  # comm has 16, or 64 for a kernel worker: fs/proc/array.c, proc_task_name


@dataclass(frozen=True, slots=True)
class _Held:
    """A socket that a process was seen to hold, and the link that shows whether it still does."""

    path: str
    owner: Owner


class Owners:
    """Finds sockets' processes in walks over all descriptors of the host, a slice of a walk at each call.

    A walk looks for what was asked for without an answer when it began. It stops in the midst of a process too,
    and keeps three descriptors open until it goes on. What it has found is shown at once and for as long as
    its link says the same; sockets that it has not found have no owner, or none that we may see, and alone they start
    no other walk. A socket that was asked for during a walk waits for the next one, as the processes that
    have been passed may hold it.

    A walk that can't go on, as descriptors or memory have run out, is broken off; the next call starts afresh.

    What is remembered is bounded by what the latest call asked for.

    Args:
        root: the proc that is read.
        budget_seconds: how long a call may walk; it gets on by 32 links or one process even where this is 0.
            An answer that is remembered costs one readlink besides.

    Attributes:
        searched: for each socket that the last `find` gave no owner, a walk has gone through all processes.
        complete: the same, and it was allowed to look into all of them; none is wanted where each has its owner.
        denied: the processes whose descriptors we had no right to see, in the last walk that came to its end.
        failure: why the last walk was broken off; "" where it wasn't.
        walked: the processes that all walks have looked into.
    """

    def __init__(self, root: str = "/proc", budget_seconds: float = 0.005) -> None:
        self._root = str(root)
        self._budget_seconds = budget_seconds
        self._found: dict[int, _Held] = {}
        self._unowned: set[int] = set()
        self._sought: dict[str, int] = {}  # inodes by link, of the walk that goes on
        self._walk: Walk | None = None
        self.searched = self.complete = True
        self.denied = 0
        self.failure = ""
        self.walked = 0

    def find(self, inodes: Sequence[int]) -> list[Owner | None]:
        """The owner of each socket, in the order of the inodes; None where there is none, or none is known yet.

        Of several processes that hold a socket it is the one with the lowest pid. An inode of 0 (TIME_WAIT,
        not yet accepted) has no owner. All that a cycle shows is asked for in one call.
        """
        asked = {inode for inode in inodes if inode}
        is_new = self._review(asked)
        deadline = time.monotonic() + self._budget_seconds
        try:
            while self._walk is not None or is_new:
                if self._walk is None:
                    self._walk = self._start(asked)
                    is_new = False
                if not self._go_on(self._walk, deadline):
                    break
        except OSError as error:
            self.failure = error.strerror or str(error)
            self.close()
        unowned = asked - self._found.keys()
        self.searched = unowned <= self._unowned
        self.complete = self.searched and not (unowned and self.denied)
        return [held.owner if (held := self._found.get(inode)) is not None else None for inode in inodes]

    def _start(self, asked: set[int]) -> Walk:
        """A walk for all that has no owner."""
        self._sought = {f"socket:[{inode}]": inode for inode in asked if inode not in self._found}
        self._unowned.clear()
        return self._walk_once()

    def _go_on(self, walk: Walk, deadline: float) -> bool:
        """Goes on with a walk; whether it came to its end before the deadline.

        Raises:
            OSError: it can't go on.
        """
        for _ in walk:
            if time.monotonic() >= deadline:
                return False
        self._unowned = {inode for inode in self._sought.values() if inode not in self._found}
        self.failure = ""
        self.close()
        return True

    def close(self) -> None:
        """Ends the walk that goes on; the next `find` may start another."""
        if self._walk is not None:
            self._walk.close()
            self._walk = None
        self._sought = {}

    def _review(self, asked: set[int]) -> bool:
        """Forgets what is not asked for or has changed; whether there are sockets that no walk has looked for."""
        lost = {inode for inode in asked if (held := self._found.get(inode)) is not None and not _holds(held, inode)}
        kept = asked - lost
        self._found = {inode: held for inode, held in self._found.items() if inode in kept}
        self._unowned &= asked
        self._sought = {link: inode for link, inode in self._sought.items() if inode in kept}
        if not self._sought:
            self.close()
        return not asked <= self._found.keys() | self._unowned | set(self._sought.values())

    def _walk_once(self) -> Walk:
        """Looks into every process once; a step for each, and for every 32 links of one.

        Raises:
            OSError: it can't go on.
        """
        denied = 0
        for pid in self._pids():
            self.walked += 1
            try:
                yield from self._look_into(pid)
            except PermissionError:
                denied += 1
            except OSError as error:
                if error.errno not in _ENDED:
                    raise
            yield
        self.denied = denied

    def _pids(self) -> Iterator[str]:
        """The processes as proc lists them; none where there is no proc."""
        try:
            with os.scandir(self._root) as entries:
                for entry in entries:
                    if entry.name.isascii() and entry.name.isdigit():
                        yield entry.name
        except OSError as error:
            if error.errno not in _ENDED:
                raise

    def _look_into(self, pid: str) -> Iterator[None]:
        """Keeps those of the sought sockets that a process holds, unless one with a lower pid does.

        Raises:
            OSError: the process has ended, we may not see its descriptors, or have none left ourselves.
        """
        name: str | None = None
        # Links below a descriptor are read in 4/5 of the time that whole paths take.
        directory = os.open(f"{self._root}/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.scandir(directory) as entries:
                for count, entry in enumerate(entries, 1):
                    inode = self._sought.get(_link(entry.name, directory))
                    if inode is not None:
                        known = self._found.get(inode)
                        if known is None or int(pid) < known.owner[0]:
                            name = self._name(pid) if name is None else name
                            self._found[inode] = _Held(f"{self._root}/{pid}/fd/{entry.name}", (int(pid), name))
                    if not count % _LINKS_A_STEP:
                        yield
        finally:
            os.close(directory)

    def _name(self, pid: str) -> str:
        with open(f"{self._root}/{pid}/comm", "rb", buffering=0) as file:
            return as_text(file.read(_NAME_BYTES).removesuffix(b"\n"))


def _link(name: str, directory: int | None = None) -> str:
    """What a link says, "" where it has gone or is none.

    Raises:
        PermissionError: we may not see it.
        OSError: it can't be told.
    """
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno in _NO_LINK:
            return ""
        raise


def _holds(held: _Held, inode: int) -> bool:
    try:
        return _link(held.path) == f"socket:[{inode}]"
    except OSError:
        return False
