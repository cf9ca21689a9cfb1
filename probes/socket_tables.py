"""The tables of sockets: summaries of TCP, UDP and Unix sockets, listeners, and a row for each of the busiest."""

from __future__ import annotations

from agent.table import Column, Priority, TableSpec, counter, gauge

# include/net/tcp_states.h, from 1 on; 12 is a SYN_RECV that has no full socket yet.
TCP_STATES = {
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
SYN_RECV, NEW_SYN_RECV = 3, 12

TCP = TableSpec(
    "tcp",
    "TCP, IPv4 and IPv6 together.",
    *(gauge(name, "sockets", f"Sockets {what}.") for name, what in TCP_STATES.items()),
    gauge("sockets", "sockets", "Sockets in all these states."),
    gauge("orphans", "sockets", "Sockets that no process holds any more."),
    gauge("memory_bytes", "bytes", "Memory that buffers of TCP take."),
    gauge("current_established", "sockets", "Sockets in ESTABLISHED or CLOSE_WAIT (the kernel's CurrEstab)."),
    gauge("in_use", "sockets", "Sockets with an address, those in TIME_WAIT left out (sockstat's inuse)."),
    gauge("time_wait_buckets", "sockets", "Sockets in TIME_WAIT, and in FIN_WAIT2 without an owner (sockstat's tw)."),
    gauge(
        "owners_complete",
        "boolean",
        "1 if each socket has its owner, or all processes could be searched for it; with `processes = true`.",
    ),
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
    optional=("owners_complete",),
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

_OWNER = ("pid", "process")
"""There with `processes = true`; null where no process holds the socket, or its descriptors may not be seen."""


def _with_owner(name: str, help: str, *columns: Column, labels: tuple[str, ...]) -> TableSpec:
    pid = gauge("pid", "id", "The process that holds it, the lowest of several; with `processes = true`.")
    labels = (*labels, "process")
    return TableSpec(
        name,
        help,
        *columns,
        pid,
        labels=labels,
        optional=_OWNER,
        priority=Priority.LOW,
    )


LISTENING = _with_owner(
    "listening",
    "TCP sockets that listen, and UDP sockets that are bound and not connected.",
    gauge("accept_queue", "connections", "Open connections that wait to be accepted; sockets that share it summed."),
    gauge("accept_queue_limit", "connections", "How many can wait; sockets that share the address and port summed."),
    labels=("protocol", "family", "address", "port"),
)
_INET = (
    gauge("receive_queue_bytes", "bytes", "Received and not yet read by the application."),
    gauge("send_queue_bytes", "bytes", "Sent by the application and not yet acknowledged."),
    gauge("uid", "id", "The user who made the socket."),
    gauge("inode", "id", "The socket's inode; unknown where no process holds it any more."),
)
CONNECTIONS = _with_owner(
    "connections",
    "TCP sockets but those that listen, the busiest first: by bytes in their queues, then established ones.",
    *_INET,
    gauge("rtt_seconds", "seconds", "Round trip time, smoothed by the kernel."),
    gauge("retransmits", "segments", "Times that the oldest segment has been sent again without an answer."),
    labels=("family", "local_address", "local_port", "remote_address", "remote_port", "state"),
)
UDP_SOCKETS = _with_owner(
    "udp_sockets",
    "UDP sockets that are bound, the busiest first: by bytes in their queues, then connected ones.",
    *_INET,
    labels=("family", "local_address", "local_port", "remote_address", "remote_port"),
)
UNIX_SOCKETS = _with_owner(
    "unix_sockets",
    "Unix domain sockets, the busiest first: by what is in their queues, then connected ones.",
    gauge("receive_queue_bytes", "bytes", "Received and not yet read; unknown for one that listens."),
    gauge("send_queue_bytes", "bytes", "Sent and not yet read by the peer; unknown for one that listens."),
    gauge("accept_queue", "connections", "Connections that wait to be accepted; only of one that listens."),
    gauge("accept_queue_limit", "connections", "How many can wait; only of one that listens."),
    gauge("uid", "id", "The user who made the socket."),
    labels=("inode", "type", "state", "path"),
)
