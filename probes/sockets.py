"""Sockets: TCP by state, UDP and Unix counts, and who listens with how long a queue.

States and listeners come from netlink where the kernel offers it, else from the text
files, which say the same but for the limit of an accept queue; the counters come from
/proc/net/sockstat, sockstat6, snmp, snmp6 and netstat.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import IPv6Address
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.errors import ProbeError
from agent.frame import Frame
from agent.table import NAN, Labels, Table, TableSpec, counter, gauge
from probes.netlink import (
    AF_INET,
    ALL_STATES,
    INET,
    TCP_LISTEN,
    UNIX_DGRAM,
    UNIX_SEQPACKET,
    UNIX_STREAM,
    InetTally,
    Words,
)
from probes.probe import ProbeSettings, RowLimit
from probes.procfs import ONE_RECORD, PAGE_BYTES, Host, KeyedText
from probes.socket_lists import SocketLists

# include/net/tcp_states.h, from 1 on; 12 is a SYN_RECV that has no full socket yet.
_STATES = {
    "established": "whose connection is open",
    "syn_sent": "that try to connect",
    "syn_recv": "whose peer tries to connect",
    "fin_wait1": "closed here, not yet acknowledged",
    "fin_wait2": "closed here, waiting for the peer to close",
    "time_wait": "closed, waiting for late packets",
    "close": "not in use",
    "close_wait": "closed by the peer, waiting for the application to close",
    "last_ack": "closed by both, waiting for the last acknowledgement",
    "listen": "that listen",
    "closing": "closed by both at the same time",
}
_NEW_SYN_RECV, _SYN_RECV = 12, 3
_UNKNOWN_STATES = (NAN,) * (len(_STATES) + 1)

TCP = TableSpec(
    "tcp",
    "TCP, IPv4 and IPv6 together.",
    *(gauge(name, "sockets", f"Sockets {what}.") for name, what in _STATES.items()),
    gauge("sockets", "sockets", "Sockets in all these states."),
    gauge("orphans", "sockets", "Sockets that no process holds any more."),
    gauge("memory_bytes", "bytes", "Memory that buffers of TCP take."),
    counter("active_opens_total", "connections", "Connections asked for by this host."),
    counter("passive_opens_total", "connections", "Connections asked for by peers."),
    counter("attempt_fails_total", "connections", "Attempts to connect that failed, in either direction."),
    counter("established_resets_total", "connections", "Open connections that were reset."),
    counter("in_segments_total", "segments", "Segments received, faulty ones included."),
    counter("out_segments_total", "segments", "Segments sent, without retransmitted ones."),
    counter("retransmitted_segments_total", "segments", "Segments sent again."),
    counter("in_errors_total", "segments", "Segments received that were faulty."),
    counter("listen_overflows_total", "connections", "Connections refused because an accept queue was full."),
    counter("listen_drops_total", "connections", "Connections that a listening socket dropped for any reason."),
)
UDP = TableSpec(
    "udp",
    "UDP, IPv4 and IPv6 together.",
    gauge("sockets", "sockets", "Sockets that are bound."),
    gauge("memory_bytes", "bytes", "Memory that buffers of UDP take."),
    counter("in_datagrams_total", "datagrams", "Datagrams delivered to applications."),
    counter("out_datagrams_total", "datagrams", "Datagrams sent."),
    counter("no_ports_total", "datagrams", "Datagrams to a port that nobody had bound."),
    counter("in_errors_total", "datagrams", "Datagrams received that could not be delivered for another reason."),
    counter("receive_buffer_errors_total", "datagrams", "Datagrams lost because a receive buffer was full."),
    counter("send_buffer_errors_total", "datagrams", "Datagrams not sent because a send buffer was full."),
)
UNIX = TableSpec(
    "unix",
    "Unix domain sockets.",
    gauge("sockets", "sockets", "Sockets of all types."),
    gauge("stream", "sockets", "Stream sockets."),
    gauge("dgram", "sockets", "Datagram sockets."),
    gauge("seqpacket", "sockets", "Sockets that keep the bounds of records."),
    gauge("listening", "sockets", "Sockets that listen."),
)
LISTENING = TableSpec(
    "listening",
    "TCP sockets that listen, and UDP sockets that are bound and not connected.",
    gauge("accept_queue", "connections", "Open connections that wait to be accepted; sockets that share it summed."),
    gauge("accept_queue_limit", "connections", "How many can wait; sockets that share the address and port summed."),
    labels=("protocol", "family", "address", "port"),
    rows=64,
    keep_rows=1024,
)

_TCP_COUNTERS = b"ActiveOpens PassiveOpens AttemptFails EstabResets InSegs OutSegs RetransSegs InErrs".split()
_UDP_COUNTERS = b"InDatagrams OutDatagrams NoPorts InErrors RcvbufErrors SndbufErrors".split()
# Words of inet_diag_msg: family and state, ports, local address; receive queue, send queue.
# Of a TCP socket that listens, those are how many wait to be accepted, and how many may.
_KEY = slice(0, 6)
_RECEIVE_QUEUE, _SEND_QUEUE = 14, 15

_LATER = ("connections", "udp_sockets", "unix_sockets", "processes")


class SocketsSettings(ProbeSettings, frozen=True, kw_only=True):
    """`tcp_states = false` and `listening = false` spare the dumps that these need."""

    tcp_states: bool = True
    listening: bool = True
    connections: bool = False
    udp_sockets: bool = False
    unix_sockets: bool = False
    processes: bool = False
    row_limit: RowLimit = 256

    def __post_init__(self) -> None:
        for key in _LATER:
            if getattr(self, key):
                raise ValueError(
                    f"{key} = true: expected false: rows for single sockets are not available in this version"
                )


class SocketsProbe:
    """The `tcp`, `udp`, `unix` and `listening` tables from netlink and procfs."""

    Settings = SocketsSettings
    tables = (TCP, UDP, UNIX, LISTENING)

    def __init__(self, settings: SocketsSettings, host: Host) -> None:
        self._settings = settings
        self._lists = SocketLists(host)
        self._sockstat, self._sockstat6 = host.net("sockstat", ONE_RECORD), host.net("sockstat6", ONE_RECORD)
        self._snmp, self._snmp6, self._netstat = (
            host.net("snmp", ONE_RECORD),
            host.net("snmp6", ONE_RECORD),
            host.net("netstat", ONE_RECORD),
        )
        self._use = KeyedText(b"TCP: orphan", b"TCP: mem", b"UDP: inuse", b"UDP: mem")
        self._use6 = KeyedText(b"UDP6: inuse")
        self._counters = KeyedText(
            *(b"Tcp: " + key for key in _TCP_COUNTERS), *(b"Udp: " + key for key in _UDP_COUNTERS), paired=True
        )
        self._counters6 = KeyedText(*(b"Udp6" + key for key in _UDP_COUNTERS))
        self._listen_counters = KeyedText(b"TcpExt: ListenOverflows", b"TcpExt: ListenDrops", paired=True)
        self._rows = ListeningRows()

    def collect(self, frame: Frame) -> None:
        settings = self._settings
        tcp = None
        if settings.tcp_states or settings.listening:
            tcp = self._lists.tcp(ALL_STATES if settings.tcp_states else 1 << TCP_LISTEN)
        udp: Sequence[Words] = self._lists.udp() if settings.listening else ()
        unix = self._lists.unix()
        orphans, tcp_pages, udp_sockets, udp_pages = self._use.pick(self._sockstat.read())
        (udp6_sockets,) = self._use6.pick(self._sockstat6.read())
        counters = self._counters.pick(self._snmp.read())
        counters += self._listen_counters.pick(self._netstat.read())
        tcp_counters = counters[:8] + counters[14:]
        udp_counters = counters[8:14]
        text6 = self._snmp6.read()
        if text6:  # it is absent when IPv6 is off
            udp_counters = list(map(_sum, udp_counters, self._counters6.pick(text6)))

        table = frame.open(TCP)
        table.put_gauges(0, (*_state_gauges(tcp, settings), _known(orphans), _known(tcp_pages) * PAGE_BYTES))
        table.put_counters(0, tcp_counters)
        table = frame.open(UDP)
        table.put_gauges(0, (_known(udp_sockets) + (udp6_sockets or 0), _known(udp_pages) * PAGE_BYTES))
        table.put_counters(0, udp_counters)
        if unix is None:
            frame.open(UNIX)
        else:
            types = unix.types
            frame.open(UNIX).put_gauges(
                0, (types.sum(), types[UNIX_STREAM], types[UNIX_DGRAM], types[UNIX_SEQPACKET], unix.listening)
            )
        if settings.listening:
            listeners = () if tcp is None else (tcp.kept,)
            self._rows.fill(frame.open(LISTENING), listeners, udp, settings.row_limit, self._lists.limits_known)

    def close(self) -> None:
        self._lists.close()


class ListeningRows:
    """The rows of `listening`; their labels are the same object while the listeners are the same."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._labels: list[Labels] = []
        self._places: npt.NDArray[np.intp] = np.zeros(0, dtype=np.intp)

    def fill(
        self, table: Table, tcp: Sequence[Words], udp: Sequence[Words], row_limit: int, limits_known: bool
    ) -> None:
        """Fills the table from `inet_diag_msg` rows, uint32, shape (n, 18) each; at most one array of TCP."""
        keys = [rows[:, _KEY].tobytes() for rows in (*tcp, *udp)]
        if keys != self._keys:
            self._learn(tcp, udp)
            self._keys = keys
        count = table.claim(self._labels, row_limit)
        for rows in tcp:
            shown = min(count, int(self._places.max(initial=-1)) + 1)
            for column, word in enumerate((_RECEIVE_QUEUE, _SEND_QUEUE) if limits_known else (_RECEIVE_QUEUE,)):
                sums = np.bincount(self._places, weights=rows[:, word])
                table.gauges[:shown, column] = sums[:shown]

    def _learn(self, tcp: Sequence[Words], udp: Sequence[Words]) -> None:
        """Labels in order, TCP first; and which row each TCP socket is in: SO_REUSEPORT lets several share one."""
        listeners = [_labels("tcp", row) for rows in tcp for row in rows.view(INET)[:, 0]]
        labels = {*listeners, *(_labels("udp", row) for rows in udp for row in rows.view(INET)[:, 0])}
        self._labels = sorted(labels, key=_order)
        place = {label: row for row, label in enumerate(self._labels)}
        self._places = np.array([place[label] for label in listeners], dtype=np.intp)


def _order(labels: Labels) -> tuple[str, int, str, str]:
    protocol, family, address, port = labels
    return protocol, int(port), family, address


def _labels(protocol: str, row: np.void) -> Labels:
    address = row["local"].tobytes()
    if row["family"] == AF_INET:
        return protocol, "ipv4", socket.inet_ntop(socket.AF_INET, address[:4]), str(row["local_port"])
    return protocol, "ipv6", ipv6_text(address), str(row["local_port"])


def ipv6_text(address: bytes) -> str:
    """An IPv6 address as text; one that stands for an IPv4 address (::ffff:0:0/96) as that."""
    mapped = IPv6Address(address).ipv4_mapped
    return socket.inet_ntop(socket.AF_INET6, address) if mapped is None else str(mapped)


def _state_gauges(tcp: InetTally | None, settings: SocketsSettings) -> Sequence[float]:
    if tcp is None:
        return _UNKNOWN_STATES
    counts = tcp.states[: _NEW_SYN_RECV + 1].tolist()
    if not settings.tcp_states:
        return [counts[TCP_LISTEN] if state == TCP_LISTEN else NAN for state in range(1, len(_STATES) + 2)]
    counts[_SYN_RECV] += counts[_NEW_SYN_RECV]
    states: list[float] = counts[1:_NEW_SYN_RECV]
    return [*states, sum(states)]


def _known(value: int | None) -> float:
    return NAN if value is None else value


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first + second


class PsutilSocketsProbe:
    """The same tables from psutil: states, listeners and how many sockets; what the kernel counts stays unknown."""

    Settings = SocketsSettings
    tables = (TCP, UDP, UNIX, LISTENING)

    def __init__(self, settings: SocketsSettings, host: Host) -> None:
        import psutil

        self._psutil = psutil
        self._settings = settings
        self._states = {getattr(psutil, f"CONN_{name.upper()}"): place for place, name in enumerate(_STATES)}

    def collect(self, frame: Frame) -> None:
        # One that processes share is there once for each of them: a set of all but fd and pid has it once.
        inet = {tuple(connection[1:6]) for connection in self._connections("inet")}
        states = [0] * len(_STATES)
        datagram_sockets = 0
        labels: set[Labels] = set()
        for family, kind, local, remote, status in inet:
            if kind == socket.SOCK_DGRAM:
                datagram_sockets += 1
            elif status in self._states:
                states[self._states[status]] += 1
            if local and not remote and (kind == socket.SOCK_DGRAM or status == self._psutil.CONN_LISTEN):
                labels.add(_psutil_labels(kind == socket.SOCK_DGRAM, family, local))

        settings = self._settings
        table = frame.open(TCP)
        if settings.tcp_states:
            table.put_gauges(0, (*states, sum(states)))
        elif settings.listening:
            table.gauges[0, TCP_LISTEN - 1] = states[TCP_LISTEN - 1]
        table.forget_counters(0)
        table = frame.open(UDP)
        table.put_gauges(0, (datagram_sockets,))
        table.forget_counters(0)
        table = frame.open(UNIX)
        if hasattr(socket, "AF_UNIX"):
            kinds = [connection.type for connection in self._connections("unix")]
            named = (kinds.count(kind) for kind in (UNIX_STREAM, UNIX_DGRAM, UNIX_SEQPACKET))
            table.put_gauges(0, (len(kinds), *named))
        if settings.listening:
            frame.open(LISTENING).claim(sorted(labels, key=_order), settings.row_limit)

    def close(self) -> None: ...

    def _connections(self, kind: str) -> Sequence[Any]:
        try:
            found: Sequence[Any] = self._psutil.net_connections(kind)
        except self._psutil.AccessDenied as error:
            raise ProbeError(f"sockets: psutil may not list them: {error}") from error
        except RuntimeError as error:  # a Unix socket whose path has a line feed
            raise ProbeError(f"sockets: {error}") from error
        return found


def _psutil_labels(is_udp: bool, family: int, local: tuple[str, int]) -> Labels:
    protocol = "udp" if is_udp else "tcp"
    address, port = local[0], str(local[1])
    if family == socket.AF_INET:
        return protocol, "ipv4", address, port
    return protocol, "ipv6", ipv6_text(IPv6Address(address.partition("%")[0]).packed), port
