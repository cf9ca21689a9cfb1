"""Where the lists of sockets come from: netlink, or the text files where netlink is refused or another root named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from probes.netlink import AF_INET, AF_INET6, RefusedError, SockDiag
from probes.procfs import Host
from probes.socket_tallies import InetTally, UnixTally
from probes.socket_text import count_inet, count_unix

T = TypeVar("T", InetTally, UnixTally)


class SocketLists:
    """The host's sockets, from netlink where it can be had, else from text: decided for each list once.

    Modules are apart: a kernel may have tcp_diag and not unix_diag.
    """

    def __init__(self, host: Host) -> None:
        self._texts = {name: host.net(name) for name in ("tcp", "tcp6", "udp", "udp6", "unix")}
        self._diag: SockDiag | None = None
        self._refused: set[str] = set()
        if host.is_local:
            try:
                self._diag = SockDiag()
            except RefusedError:
                self._diag = None

    @property
    def limits_known(self) -> bool:
        """Whether TCP came from netlink, which alone has the limits of accept queues."""
        return self._diag is not None and "tcp" not in self._refused

    def tcp(self, states: int, make: Callable[[], InetTally], info: bool = False) -> InetTally | None:
        """Counts TCP sockets in the states of the mask (text: in all) into what `make` makes; None if nothing tells."""
        return self._ask("tcp", make, lambda diag: diag.tcp(states, make, info), count_inet, "tcp", "tcp6")

    def udp(self, states: int, make: Callable[[], InetTally]) -> Sequence[InetTally]:
        """Counts UDP sockets in the states of the mask (text: in all), by family."""
        families = self._udp("udp", AF_INET, states, make), self._udp("udp6", AF_INET6, states, make)
        return [tally for tally in families if tally is not None]

    def _udp(self, name: str, family: int, states: int, make: Callable[[], InetTally]) -> InetTally | None:
        return self._ask(name, make, lambda diag: diag.udp(family, states, make), count_inet, name)

    def unix(self, make: Callable[[], UnixTally], details: bool = False) -> UnixTally | None:
        """Counts Unix sockets; None where nothing tells them."""
        return self._ask("unix", make, lambda diag: diag.unix(make, details), count_unix, "unix")

    def close(self) -> None:
        if self._diag is not None:
            self._diag.close()

    def _ask(
        self,
        list_name: str,
        make: Callable[[], T],
        ask: Callable[[SockDiag], T],
        count: Callable[[bytes, T], None],
        *names: str,
    ) -> T | None:
        if self._diag is not None and list_name not in self._refused:
            try:
                return ask(self._diag)
            except RefusedError:
                self._refused.add(list_name)
        texts = [text for name in names if (text := self._texts[name].read())]
        if not texts:
            return None  # as with IPv6 off
        tally = make()
        for text in texts:
            count(text, tally)
        return tally
