"""The host's tree as probes read it: descriptors kept open, one `preadv` into a kept buffer.

Reading and parsing are apart: `ProcFile.read` returns bytes, parsers are functions of bytes.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Literal

from agent.errors import ProbeError, UsageError

Source = Literal["auto", "procfs", "psutil"]

# Clock ticks a second and bytes a page: fixed while a kernel runs. Another host's tree
# is taken to have this machine's; Linux has used 100 ticks on every common architecture.
USER_HZ = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

# fs/seq_file.c fills one page a read and stops before the record that does not fit, so a
# read that leaves room for another record has seen the end; else one must ask again.
_SEQ_PAGE_BYTES = 4096
_RECORD_BYTES = 256
# These say nothing of the file: this process or the host is out of descriptors or of memory.
_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))
ONE_RECORD = 0  # a file that its driver writes in one go (single_open): a read gives all that the buffer takes


class ProcFile:
    """One file of proc or sys, its descriptor kept open.

    A file that is not there, or no longer, reads as `b""` and is tried again at the next
    read: modules are loaded and interfaces come back.

    Args:
        path: where it is.
        record_bytes: the longest record (mostly a line) that the kernel may put into it, or `ONE_RECORD`.
        buffer: what to read into, at least a page; files that one thread reads may share it.
    """

    __slots__ = ("_buffer", "_cycle", "_fd", "_record_bytes", "_text", "_views", "path")

    def __init__(self, path: str, record_bytes: int = _RECORD_BYTES, buffer: bytearray | None = None) -> None:
        self.path = path
        self._record_bytes = record_bytes
        self._fd = -1
        self._buffer = bytearray(_SEQ_PAGE_BYTES) if buffer is None else buffer
        self._views = [self._buffer]
        self._cycle = -1
        self._text = b""

    def read(self, cycle: int | None = None) -> bytes:
        """The file's text now, or `b""` where it can't be read.

        Args:
            cycle: probes that share the file pass the frame's sequence, and it is read once.

        Raises:
            ProbeError: there are too few descriptors or too little memory to tell.
        """
        if cycle is not None and cycle == self._cycle:
            return self._text
        text = b""
        try:
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            count = os.preadv(self._fd, self._views, 0)
            whole = len(self._buffer) if self._record_bytes == ONE_RECORD else _SEQ_PAGE_BYTES - self._record_bytes
            text = bytes(self._buffer[:count]) if count < whole else self._read_on(count)
        except OSError as error:
            if error.errno in _EXHAUSTED:
                raise ProbeError(f"{self.path}: {error.strerror}") from error
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # these say "no value"; others, that it has gone
                self.close()
        except ValueError:  # damaged text gave a name with a NUL
            self.close()
        if cycle is not None:
            self._cycle = cycle
            self._text = text
        return text

    @property
    def is_open(self) -> bool:
        """Whether its descriptor is kept: the last read found it."""
        return self._fd >= 0

    def _read_on(self, count: int) -> bytes:
        """Reads behind the first `count` bytes, until a read shows the end."""
        while True:
            room = len(self._buffer) - count
            if room < _SEQ_PAGE_BYTES:
                self._buffer.extend(bytes(len(self._buffer)))
                room = len(self._buffer) - count
            with memoryview(self._buffer) as view:
                got = os.preadv(self._fd, [view[count:]], count)
            count += got
            if not got or got < _SEQ_PAGE_BYTES - self._record_bytes:
                return bytes(self._buffer[:count])

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Host:
    """The tree that is read: DIR/proc and DIR/sys, each file opened once and shared.

    Args:
        root: "/" for this host, or a directory that holds another host's proc and sys.
        source: "procfs" or "psutil" by force; "auto" takes procfs on Linux.

    Raises:
        UsageError: procfs is asked for and there is no proc below `root`.
    """

    def __init__(self, root: str | os.PathLike[str] = "/", source: Source = "auto") -> None:
        self.root = os.fspath(root)
        # By its name alone: /proc/PID/root is a link to "/" that leads to another host's, as containers are.
        self.is_local = not os.path.abspath(root).strip("/")
        linux = sys.platform.startswith("linux")
        if source == "psutil" and not self.is_local:
            raise UsageError(f'agent.source = "psutil" with root {root}', 'root "/": psutil reads only this host')
        self.uses_psutil = source == "psutil" or (source == "auto" and not linux and self.is_local)
        if not self.uses_psutil and not _is_file(os.path.join(root, "proc/stat")):
            raise UsageError(f"agent.root = {root}: there is no proc/stat in it", "a directory that holds proc and sys")
        self._files: dict[str, ProcFile] = {}
        self._buffer = bytearray(_SEQ_PAGE_BYTES)

    def proc(self, name: str, record_bytes: int = _RECORD_BYTES) -> ProcFile:
        """The file `name` below proc, for example "net/dev"."""
        return self._file(os.path.join(self.root, "proc", name), record_bytes)

    def net(self, name: str, record_bytes: int = _RECORD_BYTES) -> ProcFile:
        """A per-network-namespace file: proc/net here, proc/1/net in another root.

        A container that mounts the host's proc would see its own namespace in proc/net,
        which is a link to self/net.
        """
        if self.is_local:
            return self.proc(f"net/{name}", record_bytes)
        # In a proc that is mounted, "net" is this process's own, also where process 1 is hidden (hidepid).
        if os.path.isdir(os.path.join(self.root, "proc/1/net")) or os.path.ismount(os.path.join(self.root, "proc")):
            return self.proc(f"1/net/{name}", record_bytes)
        return self.proc(f"net/{name}", record_bytes)

    def sys(self, name: str) -> ProcFile:
        """The file `name` below sys."""
        return self._file(os.path.join(self.root, "sys", name), _RECORD_BYTES)

    @property
    def files(self) -> Collection[ProcFile]:
        """Every file that was asked for and not forgotten."""
        return self._files.values()

    def forget(self, file: ProcFile) -> None:
        """Closes a file that will not be asked for again: its device has gone."""
        file.close()
        self._files.pop(file.path, None)

    def _file(self, path: str, record_bytes: int) -> ProcFile:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = ProcFile(path, record_bytes, self._buffer)
        return file

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def _is_file(path: str) -> bool:
    """Whether it is there and regular; an `OSError` where that can't be told."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def integer(token: bytes) -> int | None:
    """The number that a token is, or None: kernels write digits only, damage anything."""
    return int(token) if token.isdigit() and len(token) < 1000 else None


def integers(tokens: Sequence[bytes]) -> list[int | None]:
    """The numbers of several tokens, None for each that is none."""
    if b"".join(tokens).isdigit():
        try:
            return list(map(int, tokens))
        except ValueError:  # an empty token, or damage of thousands of digits
            pass
    return [integer(token) for token in tokens]


Picker = Callable[[Sequence[bytes]], tuple[bytes, ...]]


def picker(positions: Sequence[int]) -> Picker:
    """An `itemgetter` over one or more positions that gives a tuple for a single one as well."""
    if len(positions) == 1:
        only = positions[0]
        return lambda sequence: (sequence[only],)
    return itemgetter(*positions)


class KeyedText:
    """Picks values out of text for keys that are known beforehand.

    The layout of such a file (which key is which word) seldom changes: it is learned
    once, checked at each pick by comparing the keys at their places, and learned again
    when they differ. A text that is the one before says the same again.

    Args:
        keys: as they stand in the text, with their punctuation: `b"MemTotal:"`; behind
            the first word of their line where they repeat: `b"TCP: orphan"`.
        paired: the keys stand in one line and the values in the next one that starts
            with the same word (net/snmp, net/netstat), not each behind its key.
    """

    __slots__ = ("_learned", "_paired", "_present", "_split", "_text", "_values", "_wanted", "_word_count")

    def __init__(self, *keys: bytes, paired: bool = False) -> None:
        self._wanted = [tuple(key.split()) for key in keys]
        self._paired = paired
        self._split = -1  # words to split off; -1 all of them
        self._word_count = 0
        self._present: list[bool] = []
        self._learned: tuple[Picker, tuple[bytes, ...], Picker] | None = None
        self._text: bytes | None = None
        self._values: list[int | None] = []

    def pick(self, text: bytes) -> list[int | None]:
        """The values in the order of the keys, None for each that is absent or no number; not to be changed.

        A last line without a line feed has been cut, and with it perhaps its number: it is passed over.
        """
        if text != self._text:
            self._values = self._picked(text)
            self._text = text
        return self._values

    def _picked(self, text: bytes) -> list[int | None]:
        if not text.endswith(b"\n"):
            text = text[: text.rfind(b"\n") + 1]
        words = text.split(None, self._split)
        if self._learned is None or len(words) != self._word_count or self._learned[0](words) != self._learned[1]:
            words = text.split()
            if not self._learn(words):
                return [None] * len(self._wanted)
        assert self._learned is not None
        values = integers(self._learned[2](words))
        if len(values) == len(self._wanted):
            return values
        present = iter(values)
        return [next(present) if there else None for there in self._present]

    def _learn(self, words: list[bytes]) -> bool:
        checked, values = [0], []  # the first word too: another file is another layout
        self._learned = None
        self._split = -1
        self._present = []
        for key in self._wanted:
            places = self._find(words, key)
            self._present.append(places is not None)
            if places is not None:
                checked += places[:-1]
                values.append(places[-1])
        if not values:
            return False
        self._word_count = len(words)
        if all(self._present) and max(values) + 2 < len(words):
            # What follows need not be split. Where a key is absent, count all words: it may come.
            self._split = max(values) + 1
            self._word_count = self._split + 1
        pick_keys = picker(checked)
        self._learned = (pick_keys, pick_keys(words), picker(values))
        return True

    def _find(self, words: list[bytes], key: tuple[bytes, ...]) -> list[int] | None:
        """The places of the key's words, and last the place of its value."""
        places: list[int] = []
        try:
            for word in key:
                places.append(words.index(word, places[-1] + 1 if places else 0))
            value = places[-1] + 1
            if self._paired:
                second = words.index(key[0], places[0] + 1)
                if places[-1] >= second:
                    return None
                value = second + places[-1] - places[0]
                places.append(second)
        except ValueError:
            return None
        return [*places, value] if value < len(words) else None


def scheduler_part(text: bytes) -> bytes:
    """/proc/stat from its `ctxt` line on: what follows the CPUs and the long line of interrupts."""
    start = text.find(b"\nctxt ")
    return text[start + 1 :] if start >= 0 else text
