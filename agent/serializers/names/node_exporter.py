"""The names of Prometheus' node_exporter, and hostprobe's own for what it doesn't measure.

A column has such a name only where it is exactly what node_exporter says under it, with its collectors and flags as
they are by default; docs/node_exporter.md says which of its series have no column, and why. A column may be told
under several names of node_exporter, in several units; under hostprobe's own it is told only where it has none.
"""

from __future__ import annotations

from mmap import PAGESIZE

from agent.serializers.families import Family, Label, Source
from agent.serializers.names import hostprobe
from agent.table import Kind, TableSpec

_SECTOR_BYTES = 512

_LABELS: dict[str, tuple[Label, ...]] = {
    "cpu_core": (("cpu", "core"),),
    "disk_io": (("device", "device"),),
    "filesystem": (("device", "device"), ("fstype", "type"), ("mountpoint", "mountpoint")),
    "network": (("device", "interface"),),
    "uname": tuple((name, name) for name in ("domainname", "machine", "nodename", "release", "sysname", "version")),
}
"""By table, node_exporter's labels and the key labels that they are taken from; none for the other tables."""


def families(spec: TableSpec, rates: bool) -> list[Family]:
    """The families that node_exporter knows, then hostprobe's own of the columns that are in none of them."""
    columns = {column.name for column in spec.columns}
    found = []
    for family in _CLAIMED.get(spec.name, ()):
        sources = tuple(source for source in family.sources if source.column in columns)
        if sources:
            found.append(family._replace(sources=sources, labels=_LABELS.get(spec.name, ())))
    taken = {source.column for family in found for source in family.sources}
    return found + [family for family in hostprobe.families(spec, rates) if family.sources[0].column not in taken]


def _counter(name: str, unit: str, help: str, *sources: Source) -> Family:
    return Family(f"node_{name}", Kind.COUNTER, unit, help, sources)


def _gauge(name: str, unit: str, help: str, column: str) -> Family:
    return Family(f"node_{name}", Kind.GAUGE, unit, help, (Source(column),))


def _modes(**columns: str) -> list[Source]:
    return [Source(column, (("mode", mode),)) for mode, column in columns.items()]


def _meminfo(field: str, column: str) -> Family:
    return _gauge(f"memory_{field}_bytes", "bytes", f"Memory information field {field}_bytes.", column)


def _vmstat(field: str, unit: str, column: str, per: int = 1) -> Family:
    what = f"/proc/vmstat information field {field}."
    return Family(f"node_vmstat_{field}", Kind.COUNTER, unit, what, (Source(column, per=per),), untyped=True)


def _netstat(protocol: str, field: str, unit: str, column: str, kind: Kind = Kind.COUNTER) -> Family:
    what = f"Statistic {protocol}{field}."
    return Family(f"node_netstat_{protocol}_{field}", kind, unit, what, (Source(column),), untyped=True)


def _sockstat(protocol: str, field: str, unit: str, column: str, per: int = 1) -> Family:
    what = f"Number of {protocol} sockets in state {field}."
    return Family(f"node_sockstat_{protocol}_{field}", Kind.GAUGE, unit, what, (Source(column, per=per),))


def _disk(name: str, unit: str, help: str, column: str, per: int = 1) -> Family:
    return _counter(f"disk_{name}_total", unit, help, Source(column, per=per))


def _netdev(statistic: str, unit: str, column: str) -> Family:
    return _counter(f"network_{statistic}_total", unit, f"Network device statistic {statistic}.", Source(column))


def _pressure(resource: str, state: str, help: str, column: str) -> Family:
    name = f"pressure_{resource}_{state}_seconds_total"
    return _counter(name, "seconds", f"Total time in seconds {help}", Source(column, only=("resource", resource)))


def _netclass(property: str, unit: str, column: str) -> Family:
    return _gauge(f"network_{property}", unit, f"Network device property: {property}", column)


_CLAIMED = {
    "frame": (_gauge("time_seconds", "seconds", "System time in seconds since epoch (1970).", "time_unix_seconds"),),
    "uname": (
        _gauge("uname_info", "boolean", "Labeled system information as provided by the uname system call.", "info"),
    ),
    "host": (_gauge("boot_time_seconds", "seconds", "Node boot time, in unixtime.", "boot_time_unix_seconds"),),
    "cpu": (
        _counter(
            "context_switches_total", "switches", "Total number of context switches.", Source("context_switches_total")
        ),
        _counter("intr_total", "interrupts", "Total number of interrupts serviced.", Source("interrupts_total")),
        _counter("forks_total", "forks", "Total number of forks.", Source("forks_total")),
    ),
    "cpu_core": (
        _counter(
            "cpu_seconds_total",
            "seconds",
            "Seconds the CPUs spent in each mode.",
            *_modes(
                user="user_seconds_total",
                nice="nice_seconds_total",
                system="system_seconds_total",
                idle="idle_seconds_total",
                iowait="iowait_seconds_total",
                irq="irq_seconds_total",
                softirq="softirq_seconds_total",
                steal="steal_seconds_total",
            ),
        ),
        _counter(
            "cpu_guest_seconds_total",
            "seconds",
            "Seconds the CPUs spent in guests (VMs) for each mode.",
            *_modes(user="guest_seconds_total", nice="guest_nice_seconds_total"),
        ),
    ),
    "memory": (
        _meminfo("MemTotal", "total_bytes"),
        _meminfo("MemAvailable", "available_bytes"),
        _meminfo("MemFree", "free_bytes"),
        _meminfo("Cached", "cached_bytes"),
        _meminfo("Buffers", "buffers_bytes"),
        _meminfo("Shmem", "shared_bytes"),
        _meminfo("Dirty", "dirty_bytes"),
        _meminfo("Writeback", "writeback_bytes"),
        _meminfo("SReclaimable", "slab_reclaimable_bytes"),
        _meminfo("AnonPages", "anonymous_bytes"),
        _meminfo("Committed_AS", "committed_bytes"),
        _meminfo("CommitLimit", "commit_limit_bytes"),
    ),
    "swap": (
        _meminfo("SwapTotal", "total_bytes"),
        _meminfo("SwapFree", "free_bytes"),
        _vmstat("pswpin", "pages", "in_bytes_total", PAGESIZE),
        _vmstat("pswpout", "pages", "out_bytes_total", PAGESIZE),
    ),
    "paging": (
        _vmstat("pgpgin", "kilobytes", "in_bytes_total", 1024),
        _vmstat("pgpgout", "kilobytes", "out_bytes_total", 1024),
        _vmstat("pgfault", "faults", "faults_total"),
        _vmstat("pgmajfault", "faults", "major_faults_total"),
        _vmstat("oom_kill", "processes", "oom_kills_total"),
    ),
    "load": (
        _gauge("load1", "load", "1m load average.", "load1"),
        _gauge("load5", "load", "5m load average.", "load5"),
        _gauge("load15", "load", "15m load average.", "load15"),
        _gauge("procs_running", "tasks", "Number of processes in runnable state.", "runnable"),
        _gauge("procs_blocked", "tasks", "Number of processes blocked waiting for I/O to complete.", "blocked"),
    ),
    "disk_io": (
        _disk("reads_completed", "reads", "The total number of reads completed successfully.", "reads_total"),
        _disk("read_bytes", "bytes", "The total number of bytes read successfully.", "read_bytes_total"),
        _disk("reads_merged", "reads", "The total number of reads merged.", "reads_merged_total"),
        _disk("read_time_seconds", "seconds", "The total number of seconds spent by all reads.", "read_seconds_total"),
        _disk("writes_completed", "writes", "The total number of writes completed successfully.", "writes_total"),
        _disk("written_bytes", "bytes", "The total number of bytes written successfully.", "write_bytes_total"),
        _disk("writes_merged", "writes", "The number of writes merged.", "writes_merged_total"),
        _disk(
            "write_time_seconds",
            "seconds",
            "This is the total number of seconds spent by all writes.",
            "write_seconds_total",
        ),
        _gauge("disk_io_now", "requests", "The number of I/Os currently in progress.", "in_progress"),
        _disk("io_time_seconds", "seconds", "Total seconds spent doing I/Os.", "io_seconds_total"),
        _disk(
            "io_time_weighted_seconds",
            "seconds",
            "The weighted # of seconds spent doing I/Os.",
            "weighted_io_seconds_total",
        ),
        _disk(
            "discards_completed",
            "discards",
            "The total number of discards completed successfully.",
            "discards_total",
        ),
        _disk(
            "discarded_sectors",
            "sectors",
            "The total number of sectors discarded successfully.",
            "discard_bytes_total",
            _SECTOR_BYTES,
        ),
        _disk(
            "flush_requests",
            "flushes",
            "The total number of flush requests completed successfully",
            "flushes_total",
        ),
    ),
    "filesystem": (
        _gauge("filesystem_size_bytes", "bytes", "Filesystem size in bytes.", "size_bytes"),
        _gauge("filesystem_free_bytes", "bytes", "Filesystem free space in bytes.", "free_bytes"),
        _gauge(
            "filesystem_avail_bytes",
            "bytes",
            "Filesystem space available to non-root users in bytes.",
            "available_bytes",
        ),
        _gauge("filesystem_files", "inodes", "Filesystem total file nodes.", "inodes"),
        _gauge("filesystem_files_free", "inodes", "Filesystem total free file nodes.", "inodes_free"),
        _gauge("filesystem_readonly", "boolean", "Filesystem read-only status.", "read_only"),
    ),
    "network": (
        _netdev("receive_bytes", "bytes", "receive_bytes_total"),
        _netdev("receive_packets", "packets", "receive_packets_total"),
        _netdev("receive_errs", "packets", "receive_errors_total"),
        _netdev("receive_drop", "packets", "receive_drops_total"),
        _netdev("receive_multicast", "packets", "receive_multicast_total"),
        _netdev("transmit_bytes", "bytes", "transmit_bytes_total"),
        _netdev("transmit_packets", "packets", "transmit_packets_total"),
        _netdev("transmit_errs", "packets", "transmit_errors_total"),
        _netdev("transmit_drop", "packets", "transmit_drops_total"),
        _netclass("mtu_bytes", "bytes", "mtu_bytes"),
        _netclass("speed_bytes", "bytes/second", "speed_bytes_per_second"),
    ),
    # `full` of the CPU is always 0, and IRQs have only that: no figure goes without a name.
    "pressure": (
        _pressure("cpu", "waiting", "that processes have waited for CPU time", "some_seconds_total"),
        _pressure("io", "waiting", "that processes have waited due to IO congestion", "some_seconds_total"),
        _pressure("io", "stalled", "no process could make progress due to IO congestion", "full_seconds_total"),
        _pressure("memory", "waiting", "that processes have waited for memory", "some_seconds_total"),
        _pressure("memory", "stalled", "no process could make progress due to memory congestion", "full_seconds_total"),
        _pressure("irq", "stalled", "no process could make progress due to IRQ congestion", "full_seconds_total"),
    ),
    "tcp": (
        _sockstat("TCP", "orphan", "sockets", "orphans"),
        _sockstat("TCP", "tw", "sockets", "time_wait_buckets"),
        _sockstat("TCP", "mem", "pages", "memory_bytes", PAGESIZE),
        _sockstat("TCP", "mem_bytes", "bytes", "memory_bytes"),
        _netstat("Tcp", "ActiveOpens", "connections", "active_opens_total"),
        _netstat("Tcp", "PassiveOpens", "connections", "passive_opens_total"),
        _netstat("Tcp", "CurrEstab", "sockets", "current_established", Kind.GAUGE),
        _netstat("Tcp", "InSegs", "segments", "in_segments_total"),
        _netstat("Tcp", "OutSegs", "segments", "out_segments_total"),
        _netstat("Tcp", "RetransSegs", "segments", "retransmitted_segments_total"),
        _netstat("Tcp", "InErrs", "segments", "in_errors_total"),
        _netstat("TcpExt", "ListenOverflows", "connections", "listen_overflows_total"),
        _netstat("TcpExt", "ListenDrops", "connections", "listen_drops_total"),
    ),
    "udp": (
        _sockstat("UDP", "mem", "pages", "memory_bytes", PAGESIZE),
        _sockstat("UDP", "mem_bytes", "bytes", "memory_bytes"),
    ),
}
"""By table, node_exporter's families; their labels are those of `_LABELS`."""
