"""Sockets: TCP by state, UDP and Unix counts, who listens with how long a queue, and rows for the busiest.

States, listeners and rows come from netlink where the kernel offers it, else from the text
files, which say the same but for limits of accept queues, round trip times and Unix queues; the
counters come from /proc/net/sockstat, sockstat6, snmp, snmp6 and netstat.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from agent.errors import ProbeError
from agent.frame import Frame
from agent.table import NAN, Labels, Table, TableSpec
from probes.addresses import address_text
from probes.netlink import (
    AF_INET,
    AF_INET6,
    ALL_STATES,
    SOCK_DIAG_BY_FAMILY,
    TCPDIAG_GETSOCK,
    inet_request_v1,
    inet_request_v2,
    unix_request,
)
from probes.owners import Owners
from probes.probe import ProbeSettings, RowLimit
from probes.procfs import ONE_RECORD, PAGE_BYTES, Host, KeyedText
from probes.socket_lists import SocketLists
from probes.socket_rows import InetRows, ListeningRows, UnixRows
from probes.socket_rows import Owners as Owned
from probes.socket_tables import (
    CONNECTIONS,
    LISTENING,
    NEW_SYN_RECV,
    SYN_RECV,
    TCP,
    TCP_STATES,
    UDP,
    UDP_SOCKETS,
    UNIX,
    UNIX_SOCKETS,
)
from probes.socket_tallies import (
    LISTEN,
    UDP_UNCONNECTED,
    UNIX_DGRAM,
    UNIX_SEQPACKET,
    UNIX_STREAM,
    Busiest,
    InetTally,
    UnixTally,
    merged,
)

_TCP_COUNTERS = b"ActiveOpens PassiveOpens AttemptFails EstabResets InSegs OutSegs RetransSegs InErrs".split()
_UDP_COUNTERS = b"InDatagrams OutDatagrams NoPorts InErrors RcvbufErrors SndbufErrors".split()
_STATE_COUNT = len(TCP_STATES)
_UNKNOWN_STATES = (NAN,) * (_STATE_COUNT + 1)
_LISTEN_ONLY = 1 << LISTEN


class SocketsSettings(ProbeSettings, frozen=True, kw_only=True):
    """What is listed: each switch that is off spares what only it needs. docs/sockets.md has what each costs.

    `tcp_states = "summary"` spares the walk through all TCP sockets: of the states, only `listen` is known then.
    """

    tcp_states: bool | Literal["summary"] = True
    listening: bool = True
    connections: bool = False
    udp_sockets: bool = False
    unix_sockets: bool = False
    processes: bool = False
    row_limit: RowLimit = 256


class SocketsProbe:
    """The tables of sockets from netlink and procfs."""

    Settings = SocketsSettings
    tables: tuple[TableSpec, ...] = (TCP, UDP, UNIX, LISTENING, CONNECTIONS, UDP_SOCKETS, UNIX_SOCKETS)

    def __init__(self, settings: SocketsSettings, host: Host) -> None:
        self._settings = settings
        if not settings.processes:
            self.tables = tuple(spec.without_optional() if spec.optional else spec for spec in self.tables)
        self._tcp, self._udp, self._unix, self._listening, *rows = self.tables
        self._connections, self._udp_sockets, self._unix_sockets = rows
        self._lists = SocketLists(host)
        self._owners = Owners(os.path.join(host.root, "proc")) if settings.processes else None
        self._noticed: set[str] = set()
        self.notices: list[str] = []
        self._sockstat, self._sockstat6 = host.net("sockstat", ONE_RECORD), host.net("sockstat6", ONE_RECORD)
        self._snmp, self._snmp6, self._netstat = (
            host.net("snmp", ONE_RECORD),
            host.net("snmp6", ONE_RECORD),
            host.net("netstat", ONE_RECORD),
        )
        self._use = KeyedText(b"TCP: orphan", b"TCP: mem", b"TCP: inuse", b"TCP: tw", b"UDP: inuse", b"UDP: mem")
        self._use6 = KeyedText(b"TCP6: inuse", b"UDP6: inuse")
        self._counters = KeyedText(
            *(b"Tcp: " + key for key in _TCP_COUNTERS),
            b"Tcp: CurrEstab",
            *(b"Udp: " + key for key in _UDP_COUNTERS),
            paired=True,
        )
        self._counters6 = KeyedText(*(b"Udp6" + key for key in _UDP_COUNTERS))
        self._listen_counters = KeyedText(b"TcpExt: ListenOverflows", b"TcpExt: ListenDrops", paired=True)
        self._listening_rows = ListeningRows()
        self._connection_rows, self._udp_rows, self._unix_rows = InetRows(True), InetRows(False), UnixRows()
        self._plan_dumps()

    def _plan_dumps(self) -> None:
        """What each dump has to list, and what it is counted into; 0 states: it isn't needed."""
        settings = self._settings
        limit = settings.row_limit
        listed = _LISTEN_ONLY if settings.listening else 0
        shown = ALL_STATES & ~_LISTEN_ONLY if settings.connections else 0
        if settings.connections or settings.tcp_states is True:
            self._tcp_states = ALL_STATES
        else:
            self._tcp_states = _LISTEN_ONLY if settings.listening or settings.tcp_states else 0
        self._make_tcp = partial(InetTally, listed, shown, limit)
        unconnected = 1 << UDP_UNCONNECTED if settings.listening else 0
        self._udp_states = ALL_STATES if settings.udp_sockets else unconnected
        self._make_udp = partial(InetTally, unconnected, ALL_STATES if settings.udp_sockets else 0, limit, limit)
        self._make_unix = partial(UnixTally, limit if settings.unix_sockets else None)

    @property
    def dumps(self) -> list[tuple[int, bytes]]:
        """What a cycle asks of netlink, where it can be had: each request's type, and what is behind its header."""
        tcp = inet_request_v1(self._tcp_states, self._settings.connections)
        asked = [(TCPDIAG_GETSOCK, tcp)] if self._tcp_states else []
        families = (AF_INET, AF_INET6) if self._udp_states else ()
        udp = [inet_request_v2(family, socket.IPPROTO_UDP, self._udp_states) for family in families]
        lists = [*udp, unix_request(self._settings.unix_sockets)]
        return asked + [(SOCK_DIAG_BY_FAMILY, payload) for payload in lists]

    def collect(self, frame: Frame) -> None:
        settings = self._settings
        tcp = self._lists.tcp(self._tcp_states, self._make_tcp, settings.connections) if self._tcp_states else None
        udp = self._lists.udp(self._udp_states, self._make_udp) if self._udp_states else ()
        unix = self._lists.unix(self._make_unix, settings.unix_sockets)
        self._fill_summaries(frame, tcp, unix)
        self._fill_rows(frame, tcp, udp, unix)

    def _fill_summaries(self, frame: Frame, tcp: InetTally | None, unix: UnixTally | None) -> None:
        orphans, tcp_pages, tcp_sockets, time_wait, udp_sockets, udp_pages = self._use.pick(self._sockstat.read())
        tcp6_sockets, udp6_sockets = self._use6.pick(self._sockstat6.read())
        counters = self._counters.pick(self._snmp.read())
        established = counters[len(_TCP_COUNTERS)]
        tcp_counters = counters[: len(_TCP_COUNTERS)] + self._listen_counters.pick(self._netstat.read())
        udp_counters = counters[len(_TCP_COUNTERS) + 1 :]
        text6 = self._snmp6.read()
        if text6:  # it is absent when IPv6 is off
            udp_counters = list(map(_sum, udp_counters, self._counters6.pick(text6)))
        table = frame.open(self._tcp)
        table.put_gauges(
            0,
            (
                *self._states(tcp),
                _known(orphans),
                _known(tcp_pages) * PAGE_BYTES,
                _known(established),
                _known(tcp_sockets) + (tcp6_sockets or 0),
                _known(time_wait),
            ),
        )
        table.put_counters(0, tcp_counters)
        table = frame.open(self._udp)
        table.put_gauges(0, (_known(udp_sockets) + (udp6_sockets or 0), _known(udp_pages) * PAGE_BYTES))
        table.put_counters(0, udp_counters)
        table = frame.open(self._unix)
        if unix is not None:
            types = unix.types
            table.put_gauges(
                0, (sum(types), types[UNIX_STREAM], types[UNIX_DGRAM], types[UNIX_SEQPACKET], unix.listening)
            )

    def _states(self, tcp: InetTally | None) -> Sequence[float]:
        if tcp is None:
            return _UNKNOWN_STATES
        tcp_states = self._settings.tcp_states
        if not tcp_states or self._tcp_states == _LISTEN_ONLY:
            return [tcp.states[state] if state == LISTEN else NAN for state in range(1, _STATE_COUNT + 2)]
        states = tcp.states[1 : _STATE_COUNT + 1]
        states[SYN_RECV - 1] += tcp.states[NEW_SYN_RECV]
        return [*states, sum(states)]

    def _fill_rows(self, frame: Frame, tcp: InetTally | None, udp: Sequence[InetTally], unix: UnixTally | None) -> None:
        """The tables with a row for a socket. Owners are asked for all of them at once."""
        limit = self._settings.row_limit
        fills: list[tuple[Callable[[Owned | None], None], Callable[[], list[int]]]] = []

        def add(rows: InetRows | UnixRows, spec: TableSpec, busiest: Sequence[Busiest | None]) -> None:
            kept = [each for each in busiest if each is not None]
            if kept:
                records, seen = merged(kept, limit)
                fills.append((partial(rows.fill, frame.open(spec), records, seen), records["inode"].tolist))

        if self._settings.listening:
            udp_listed = b"".join(each.listed for each in udp)
            tcp_listed = tcp.listed if tcp is not None else b""
            left_out = sum(each.left_out for each in udp)
            self._listening_rows.select(tcp_listed, udp_listed, limit, self._lists.limits_known, left_out)
            rows = self._listening_rows
            fills.append((partial(rows.fill, frame.open(self._listening)), rows.inodes))
        add(self._connection_rows, self._connections, [tcp.busiest if tcp is not None else None])
        add(self._udp_rows, self._udp_sockets, [each.busiest for each in udp])
        add(self._unix_rows, self._unix_sockets, [unix.busiest if unix is not None else None])
        if self._owners is None:
            for fill, _ in fills:
                fill(None)
            return
        inodes = [inodes_of() for _, inodes_of in fills]
        owners = self._owners.find([inode for each in inodes for inode in each])
        start = 0
        for (fill, _), each in zip(fills, inodes, strict=True):
            fill(owners[start : start + len(each)])
            start += len(each)
        table = frame.tables[self._tcp.name]
        table.gauges[0, self._tcp.gauge_index["owners_complete"]] = self._owners.complete
        if self._owners.denied:
            denied = f"no right to see the descriptors of {self._owners.denied} processes: their sockets have no owner"
            self._notice("denied", denied)
        if self._owners.failure:
            self._notice("failure", f"the search for owners of sockets was broken off: {self._owners.failure}")

    def _notice(self, kind: str, text: str) -> None:
        """Says something once."""
        if kind not in self._noticed:
            self._noticed.add(kind)
            self.notices.append(text)

    def close(self) -> None:
        self._lists.close()
        if self._owners is not None:
            self._owners.close()


def _known(value: int | None) -> float:
    return NAN if value is None else value


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


class PsutilSocketsProbe:
    """The same tables from psutil: states, listeners, connections and their owners; what kernels count is unknown.

    `unix_sockets` it doesn't fill: psutil has no inode to tell one from another. Sockets that share an address
    are counted where psutil tells them apart, else their number is unknown.
    """

    Settings = SocketsSettings
    tables: tuple[TableSpec, ...] = SocketsProbe.tables

    def __init__(self, settings: SocketsSettings, host: Host) -> None:
        import psutil

        self._psutil = psutil
        self._settings = settings
        if not settings.processes:
            self.tables = tuple(spec.without_optional() if spec.optional else spec for spec in self.tables)
        self._states = {getattr(psutil, f"CONN_{name.upper()}"): name for name in TCP_STATES}

    def collect(self, frame: Frame) -> None:
        # By all but the descriptor: family, type, both ends, state.
        inet: dict[tuple[Any, ...], list[int | None]] = {}
        for connection in self._connections("inet"):
            inet.setdefault(tuple(connection[1:6]), []).append(connection.pid)
        states = dict.fromkeys(TCP_STATES, 0.0)
        udp_sockets = 0.0
        rows: dict[str, dict[Labels, int | None]] = {"listening": {}, "connections": {}, "udp_sockets": {}}
        for (family, kind, local, remote, status), pids in inet.items():
            pid = min((each for each in pids if each is not None), default=None)
            state = self._states.get(status)
            ends = _psutil_labels(family, local), _psutil_labels(family, remote)
            is_udp = kind == socket.SOCK_DGRAM
            if is_udp:
                udp_sockets += _socket_count(pids)
            elif state is not None:
                states[state] += 1 if remote else _socket_count(pids)
            if local and not remote and (is_udp or state == "listen"):
                rows["listening"].setdefault(("udp" if is_udp else "tcp", *ends[0]), pid)
            if is_udp:
                rows["udp_sockets"].setdefault((*ends[0], *ends[1][1:]), pid)
            elif state is not None and state != "listen":
                rows["connections"].setdefault((*ends[0], *ends[1][1:], state), pid)

        settings = self._settings
        tcp, udp, unix, *row_tables, _ = self.tables
        table = frame.open(tcp)
        if settings.tcp_states:
            table.put_gauges(0, (*states.values(), sum(states.values())))
        elif settings.listening:
            table.gauges[0, tcp.gauge_index["listen"]] = states["listen"]
        table.forget_counters(0)
        table = frame.open(udp)
        table.put_gauges(0, (udp_sockets,))
        table.forget_counters(0)
        table = frame.open(unix)
        kinds = self._unix_types()
        if kinds is not None:
            named = (kinds.count(kind) for kind in (UNIX_STREAM, UNIX_DGRAM, UNIX_SEQPACKET))
            table.put_gauges(0, (len(kinds), *named))
        for spec in row_tables:
            if getattr(settings, spec.name):
                self._fill_rows(frame.open(spec), rows[spec.name])

    def _fill_rows(self, table: Table, found: dict[Labels, int | None]) -> None:
        labels = sorted(found, key=_order)
        limit = self._settings.row_limit
        pids = [found[each] for each in labels[:limit]]
        if self._settings.processes:
            labels = [(*each, self._name(found[each])) for each in labels]
        count = table.claim(labels, limit)
        if self._settings.processes:
            table.gauges[:count, -1] = [NAN if pid is None else pid for pid in pids]

    def _name(self, pid: int | None) -> str | None:
        try:
            return None if pid is None else str(self._psutil.Process(pid).name())
        except self._psutil.Error:
            return None

    def close(self) -> None: ...

    def _connections(self, kind: str) -> Sequence[Any]:
        try:
            found: Sequence[Any] = self._psutil.net_connections(kind)
        except self._psutil.AccessDenied as error:
            raise ProbeError(f"sockets: psutil may not list them: {error}") from error
        return found

    def _unix_types(self) -> list[int] | None:
        """The type of each Unix socket; None where psutil can't tell."""
        if not hasattr(socket, "AF_UNIX"):
            return None
        try:
            return [connection.type for connection in self._connections("unix")]
        except RuntimeError:  # "malformed line": anybody may give a socket a path with a line feed
            return None


def _socket_count(pids: Sequence[int | None]) -> float:
    """How many sockets are bound to an address and no peer, given the process of each entry; NaN if it can't be told.

    On Linux psutil has an entry for each of them, but makes one of those whose process it may not see; elsewhere
    one for each descriptor, be it of another socket (SO_REUSEPORT) or, after a fork, of the same.
    """
    if sys.platform.startswith("linux"):
        return NAN if None in pids else len(pids)
    return 1 if len(pids) == 1 else NAN


def _psutil_labels(family: int, end: tuple[str, int] | tuple[()]) -> tuple[str, str, str]:
    """Family, address and port; of an end that isn't connected as netlink has them: all zeros."""
    is_v4 = family == socket.AF_INET
    address, port = end or ("0.0.0.0" if is_v4 else "::", 0)
    packed = socket.inet_pton(family, address.partition("%")[0])
    return "ipv4" if is_v4 else "ipv6", address_text(packed), str(port)


def _order(labels: Labels) -> tuple[str | int, ...]:
    """By protocol, then numbers as numbers."""
    return tuple(int(label) if label and label.isdecimal() else label or "" for label in labels)
