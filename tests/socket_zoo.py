"""Real sockets in every state, and a network namespace in which there are no others.

    python -m tests.socket_zoo ss -tan      a command, in a namespace of its own with the zoo open

Unsharing takes root, or CAP_SYS_ADMIN; tests that need it skip without.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pickle
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.kernel_lists import InetRow, UnixRow

ROOT = Path(__file__).parents[1]
ADDRESSES = (
    (socket.AF_INET, "127.0.0.1"),
    (socket.AF_INET6, "::1"),
    (socket.AF_INET6, "::ffff:127.0.0.1"),  # IPv4 on an IPv6 socket
)
UNREAD = b"unread\n"
LIMIT = 9
NAMES = ("plain", "with space", "two\nlines")
"""What Unix sockets are called, as a path and abstract."""

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_TCP_INFO_STATE = 0  # the first byte of tcp_info
_SPARE_FDS = 64
_SETTLE_SECONDS = 5


class NamespaceError(OSError):
    """No network namespace can be made here."""


def enter_namespace() -> None:
    """Moves this thread, which should be the only one, into a fresh network namespace with loopback up.

    Raises:
        NamespaceError: the right to do so is missing, or the kernel has none.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise NamespaceError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        request = struct.pack("16sH22x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(asked, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(asked, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def in_namespace(function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 120) -> Any:
    """What a function of a module returns when it is called in another process, in a namespace of its own.

    Skips the test where none can be made.
    """
    import pytest

    paths = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "tests.socket_zoo", "--pickled"],
        input=pickle.dumps((function, arguments)),
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
        timeout=timeout_seconds,
    )
    if done.returncode == os.EX_NOPERM:
        pytest.skip(f"needs the right to make a network namespace: {done.stderr.decode().strip()}")
    assert done.returncode == 0, done.stderr.decode()
    return pickle.loads(done.stdout)


class Zoo:
    """The sockets that are open, as the kernel's lists have them; None for a queue whose length it decides.

    Attributes:
        tcp, udp: those that are in its lists.
        unix: those that have an inode, without what they wait for; connections that nobody has accepted have none.
        unix_waiting: how many such connections there are, which net/unix lists with inode 0 and netlink not at all.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.tcp: list[InetRow] = []
        self.udp: list[InetRow] = []
        self.unix: list[UnixRow] = []
        self.unix_waiting = 0

    def new(self, family: int, kind: int) -> socket.socket:
        """A socket that is open as long as the zoo."""
        return self.keep(socket.socket(family, kind))

    def keep(self, opened: socket.socket) -> socket.socket:
        """Closes the socket with the zoo."""
        return self._stack.enter_context(opened)

    def add_tcp(self, opened: socket.socket, state: str, received: int | None = 0, sent: int | None = 0) -> None:
        """Says that it is listed so."""
        self.tcp.append(_row(opened, state, received, sent))

    def add_udp(self, opened: socket.socket, state: str, received: int | None = 0) -> None:
        """Says that it is listed so."""
        self.udp.append(_row(opened, state, received, 0))

    def add_unix(self, opened: socket.socket, state: str, received: int | None = 0, sent: int | None = 0) -> None:
        """Says that it is listed so."""
        name = opened.getsockname()
        path = name.decode().replace("\0", "@") if isinstance(name, bytes) else name
        kind = opened.type.name.removeprefix("SOCK_").lower()
        self.unix.append(UnixRow(os.fstat(opened.fileno()).st_ino, kind, state, path, received, sent))


def _row(opened: socket.socket, state: str, received: int | None, sent: int | None) -> InetRow:
    family = "ipv4" if opened.family == socket.AF_INET else "ipv6"
    local = _end(opened.getsockname())
    try:
        remote = _end(opened.getpeername())
    except OSError:
        remote = ("0.0.0.0" if family == "ipv4" else "::", 0)
    return InetRow(family, *local, *remote, state, received, sent)


def _end(address: tuple[Any, ...]) -> tuple[str, int]:
    return address[0].removeprefix("::ffff:"), address[1]


@contextmanager
def open_zoo(folder: Path) -> Iterator[Zoo]:
    """Opens sockets of every sort, on loopback and below a folder; they are in the states that they are said to be in.

    It is all that there is only in a namespace of its own. TIME_WAIT ends after a minute, SYN_SENT after two;
    queues that the kernel decides on may still change a little at first.
    """
    with ExitStack() as stack:
        zoo = Zoo(stack)
        for family, address in ADDRESSES:
            _open_connections(zoo, family, address)
            _open_crowded(zoo, family, address)
            _open_hidden(zoo, family, address)
            _open_udp(zoo, family, address)
        _open_any(zoo)
        for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
            for name in NAMES:
                for address in (str(folder / f"{kind.name} {name}"), f"\0{kind.name} {name}"):
                    _open_unix(zoo, kind, address)
        for name in NAMES:
            for address in (str(folder / f"dgram {name}"), f"\0dgram {name}"):
                _open_unix_dgram(zoo, address)
        for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
            _open_unix_pair(zoo, kind)
        yield zoo


def _listener(zoo: Zoo, family: int, address: str, backlog: int = LIMIT) -> socket.socket:
    opened = zoo.new(family, socket.SOCK_STREAM)
    opened.bind((address, 0))
    opened.listen(backlog)
    return opened


def _pair(zoo: Zoo, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A client and the server's end of a connection."""
    client = _connected(zoo, listener)
    return client, zoo.keep(listener.accept()[0])


def _connected(zoo: Zoo, listener: socket.socket) -> socket.socket:
    client = zoo.new(listener.family, listener.type)
    client.connect(listener.getsockname())
    return client


def _fill(opened: socket.socket) -> None:
    """Writes until neither the peer nor this end takes any more."""
    opened.setblocking(False)
    quiet = 0
    while quiet < 3:
        try:
            opened.send(bytes(1 << 16))
            quiet = 0
        except BlockingIOError:
            quiet += 1
            time.sleep(0.02)


def _await(opened: socket.socket, state: int) -> None:
    """Waits for a TCP socket to be in a state of include/net/tcp_states.h."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (found := opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[_TCP_INFO_STATE]) != state:
        assert time.monotonic() < deadline, f"a socket is in state {found}, not in {state}"
        time.sleep(0.001)


def _open_connections(zoo: Zoo, family: int, address: str) -> None:
    """Connections in every state that one can be brought into and stays in."""
    listener = _listener(zoo, family, address)
    zoo.add_tcp(listener, "listen", 0, LIMIT)

    client, server = _pair(zoo, listener)
    client.send(UNREAD)
    zoo.add_tcp(client, "established")
    zoo.add_tcp(server, "established", len(UNREAD))

    client, server = _pair(zoo, listener)
    client.shutdown(socket.SHUT_WR)
    _await(client, 5)
    zoo.add_tcp(client, "fin_wait2")
    zoo.add_tcp(server, "close_wait", 1)  # the FIN counts as a byte that nobody has read

    client, server = _pair(zoo, listener)
    zoo.add_tcp(client, "time_wait")
    client.shutdown(socket.SHUT_WR)
    _await(client, 5)
    server.close()
    client.close()

    client, server = _pair(zoo, listener)
    _fill(client)
    client.shutdown(socket.SHUT_WR)  # its FIN waits behind data that nobody reads
    zoo.add_tcp(client, "fin_wait1", 0, None)
    zoo.add_tcp(server, "established", None)

    client, server = _pair(zoo, listener)
    server.shutdown(socket.SHUT_WR)
    _await(client, 8)
    _fill(client)
    client.shutdown(socket.SHUT_WR)
    zoo.add_tcp(client, "last_ack", 1, None)
    zoo.add_tcp(server, "fin_wait2", None)

    client, server = _pair(zoo, listener)
    _fill(client)
    client.shutdown(socket.SHUT_WR)
    server.shutdown(socket.SHUT_WR)
    _await(client, 11)
    zoo.add_tcp(client, "closing", 1, None)
    zoo.add_tcp(server, "fin_wait2", None)


def _open_crowded(zoo: Zoo, family: int, address: str) -> None:
    """Listeners whose accept queue is in use, or full, or that wait for data before they take a connection."""
    crowded = _listener(zoo, family, address)
    for _ in range(3):
        _open_unaccepted(zoo, crowded)
    zoo.add_tcp(crowded, "listen", 3, LIMIT)

    full = _listener(zoo, family, address, 0)  # one fits in all the same: sk_acceptq_is_full
    _open_unaccepted(zoo, full)
    zoo.add_tcp(full, "listen", 1, 0)
    for _ in range(2):
        trying = zoo.new(family, socket.SOCK_STREAM)
        trying.setblocking(False)
        with suppress(BlockingIOError):
            trying.connect(full.getsockname())
        remote_address, remote_port = _end(full.getsockname())
        row = _row(trying, "syn_sent", 0, 1)
        zoo.tcp.append(row._replace(remote_address=remote_address, remote_port=remote_port))

    waiting = _listener(zoo, family, address)
    waiting.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 600)
    zoo.add_tcp(waiting, "listen", 0, LIMIT)
    client = _connected(zoo, waiting)
    zoo.add_tcp(client, "established")
    zoo.tcp.append(_turned(_row(client, "syn_recv", 0, 0)))

    port = 0
    for _ in range(2):
        shared = zoo.new(family, socket.SOCK_STREAM)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind((address, port))
        shared.listen(LIMIT)
        zoo.add_tcp(shared, "listen", None, LIMIT)  # the kernel chooses for each connection
        port = shared.getsockname()[1]
    for _ in range(4):
        _open_unaccepted(zoo, shared)


def _open_unaccepted(zoo: Zoo, listener: socket.socket) -> None:
    row = _row(_connected(zoo, listener), "established", 0, 0)
    zoo.tcp += (row, _turned(row))


def _turned(row: InetRow) -> InetRow:
    """The other end of a connection."""
    return row._replace(
        local_address=row.remote_address,
        local_port=row.remote_port,
        remote_address=row.local_address,
        remote_port=row.local_port,
    )


def _open_hidden(zoo: Zoo, family: int, address: str) -> None:
    """Those that no list has: not bound at all, and of TCP, bound and no more."""
    zoo.new(family, socket.SOCK_STREAM)
    zoo.new(family, socket.SOCK_DGRAM)
    zoo.new(family, socket.SOCK_STREAM).bind((address, 0))


def _open_udp(zoo: Zoo, family: int, address: str) -> None:
    bound, connected, unread = (zoo.new(family, socket.SOCK_DGRAM) for _ in range(3))
    for opened in (bound, unread):
        opened.bind((address, 0))
    connected.sendto(UNREAD, unread.getsockname())
    connected.connect(bound.getsockname())
    zoo.add_udp(bound, "close")
    zoo.add_udp(connected, "established")
    zoo.add_udp(unread, "close", None)  # counted with what the kernel needs to hold it


def _open_any(zoo: Zoo) -> None:
    """Bound to all addresses: IPv4, IPv6 alone, and both at once."""
    for family, address, v6_only in (
        (socket.AF_INET, "0.0.0.0", None),
        (socket.AF_INET6, "::", 1),
        (socket.AF_INET6, "::", 0),
    ):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            opened = zoo.new(family, kind)
            if v6_only is not None:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6_only)
            opened.bind((address, 0))
            if kind == socket.SOCK_DGRAM:
                zoo.add_udp(opened, "close")
            else:
                opened.listen(LIMIT)
                zoo.add_tcp(opened, "listen", 0, LIMIT)


def _open_unix(zoo: Zoo, kind: int, address: str) -> None:
    """One that listens, a connection with unread data, and one that is not accepted."""
    listener = zoo.new(socket.AF_UNIX, kind)
    listener.bind(address)
    listener.listen(LIMIT)
    client, server = _pair(zoo, listener)
    client.send(UNREAD)
    zoo.add_unix(client, "established", 0, None)
    zoo.add_unix(server, "established", len(UNREAD), 0)
    zoo.add_unix(_connected(zoo, listener), "established")
    zoo.add_unix(listener, "listen", 1, LIMIT)
    zoo.unix_waiting += 1


def _open_unix_dgram(zoo: Zoo, address: str) -> None:
    bound, client = zoo.new(socket.AF_UNIX, socket.SOCK_DGRAM), zoo.new(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound.bind(address)
    client.connect(address)
    client.send(UNREAD)
    zoo.add_unix(bound, "established", len(UNREAD))  # the kernel says so of both ends
    zoo.add_unix(client, "established", 0, None)


def _open_unix_pair(zoo: Zoo, kind: int) -> None:
    """A pair without names, and one that is neither named nor connected."""
    first, second = (zoo.keep(opened) for opened in socket.socketpair(socket.AF_UNIX, kind))
    first.send(UNREAD)
    zoo.add_unix(first, "established", 0, None)
    zoo.add_unix(second, "established", len(UNREAD))
    zoo.add_unix(zoo.new(socket.AF_UNIX, kind), "close")


class Held:
    """Many sockets of one kind, in processes that hold nothing else; closing it resets what is connected."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count
        capacity = (resource.getrlimit(resource.RLIMIT_NOFILE)[1] - _SPARE_FDS) // 2 * 2
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for first in range(0, count, capacity):
                command = [sys.executable, "-m", "tests.socket_zoo", "--hold", kind, str(min(count - first, capacity))]
                self._processes.append(
                    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
                )
            for process in self._processes:
                assert process.stdout is not None
                if not process.stdout.readline():
                    raise RuntimeError(f"{count} {kind} sockets can't be opened here")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for process in self._processes:
            process.communicate()


@contextmanager
def open_many(count: int, kind: str = "tcp") -> Iterator[Held]:
    """Opens `count` sockets in processes of their own: "tcp" pairs, established; "udp", bound; "unix" pairs, stream.

    A process takes as many as the hard limit of open files lets it. TCP has a listener in addition, one a process.

    Raises:
        RuntimeError: there are limits that they don't fit in.
    """
    held = Held(kind, count)
    try:
        yield held
    finally:
        held.close()


def _hold(kind: str, count: int) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    opened: list[socket.socket] = []
    if kind == "udp":
        for _ in range(count):
            opened.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            opened[-1].bind(("127.0.0.1", 0))
    elif kind == "unix":
        for _ in range(count // 2):
            opened += socket.socketpair(socket.AF_UNIX)
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for _ in range(count // 2):
                client = socket.create_connection(listener.getsockname())
                # Closing resets, so that nothing is left in TIME_WAIT.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                opened += (client, listener.accept()[0])
            _say_ready()
            sys.stdin.buffer.read()
            for client in opened[::2]:
                client.close()
        return
    _say_ready()
    sys.stdin.buffer.read()


def _say_ready() -> None:
    os.write(sys.stdout.fileno(), b"ready\n")


def main() -> int:
    match sys.argv[1:]:
        case ["--hold", kind, count]:
            _hold(kind, int(count))
            return 0
    try:
        enter_namespace()
    except NamespaceError as error:
        print(error.strerror, file=sys.stderr)
        return os.EX_NOPERM
    if sys.argv[1:] == ["--pickled"]:
        function, arguments = pickle.load(sys.stdin.buffer)
        answers = os.dup(1)
        os.dup2(2, 1)  # what the function prints is no answer
        with open(answers, "wb") as file:
            file.write(pickle.dumps(function(*arguments)))
        return 0
    with tempfile.TemporaryDirectory() as folder, open_zoo(Path(folder)):
        return subprocess.run(sys.argv[1:]).returncode


if __name__ == "__main__":
    sys.exit(main())
