"""Hosts to test and measure on: the saved trees, and a large one that is written on demand."""

from __future__ import annotations

from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"

_MEMORY_KIB = {
    "MemTotal": 528_280_000,
    "MemFree": 101_000_000,
    "MemAvailable": 402_000_000,
    "Buffers": 2_100_000,
    "Cached": 298_000_000,
    "SwapCached": 120,
    "Active": 180_000_000,
    "Inactive": 205_000_000,
    "SwapTotal": 8_388_604,
    "SwapFree": 8_380_000,
    "Dirty": 41_000,
    "Writeback": 64,
    "AnonPages": 88_000_000,
    "Mapped": 3_100_000,
    "Shmem": 1_200_000,
    "KReclaimable": 9_500_000,
    "Slab": 14_000_000,
    "SReclaimable": 9_500_000,
    "SUnreclaim": 4_500_000,
    "KernelStack": 90_000,
    "PageTables": 410_000,
    "CommitLimit": 272_528_604,
    "Committed_AS": 141_000_000,
}
_NET_DEV_WIDTHS = (7, 7, 4, 4, 4, 5, 10, 9, 8, 7, 4, 4, 4, 5, 7, 10)  # net/core/net-procfs.c
_SNMP = {
    "Tcp": "RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens PassiveOpens AttemptFails EstabResets CurrEstab InSegs"
    " OutSegs RetransSegs InErrs OutRsts InCsumErrors",
    "Udp": "InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors IgnoredMulti MemErrors",
}


def saved_host(name: str) -> Path:
    """The root of a saved tree: "vm", "old" or "damaged"."""
    path = FIXTURES / name
    assert (path / "proc/stat").is_file(), f"no saved host {name}"
    return path


def write_large_host(
    root: Path, *, cpus: int = 256, disks: int = 64, interfaces: int = 300, cycle: int = 0, sockets: int = 500
) -> None:
    """Writes the proc and sys of a large server below `root`.

    The counters depend on `cycle` and nothing else, and each grows with it: written
    again with a later cycle, it is the same host some seconds later.
    """
    proc = {
        "stat": _stat(cpus, cycle),
        "loadavg": f"{cpus * 0.7:.2f} 141.20 120.05 {cpus // 2}/9120 {30_000 + cycle}\n",
        "uptime": f"{864_000 + cycle * 10}.25 {cpus * 600_000 + cycle}.50\n",
        "meminfo": "".join(f"{key + ':':<15} {value:>9} kB\n" for key, value in _MEMORY_KIB.items())
        + "HugePages_Total:     512\nHugePages_Free:      500\nHugepagesize:       2048 kB\n",
        "vmstat": _vmstat(cycle),
        "diskstats": "".join(_diskstats_lines(disks, cycle)),
        "pressure/cpu": _pressure(cycle, 3),
        "pressure/memory": _pressure(cycle, 1),
        "pressure/io": _pressure(cycle, 2),
        "1/mounts": _mounts(disks),
        "1/net/dev": _net_dev(interfaces, cycle),
        "1/net/snmp": _snmp(cycle),
        "1/net/netstat": f"TcpExt: SyncookiesSent ListenOverflows ListenDrops\nTcpExt: 0 {cycle} {cycle * 2}\n",
        "1/net/sockstat": f"sockets: used {sockets}\nTCP: inuse {sockets} orphan 2 tw 40 alloc {sockets + 60} mem 812\n"
        "UDP: inuse 24 mem 9\nUDPLITE: inuse 0\nRAW: inuse 0\nFRAG: inuse 0 memory 0\n",
        "1/net/sockstat6": "TCP6: inuse 12\nUDP6: inuse 6\nUDPLITE6: inuse 0\nRAW6: inuse 0\nFRAG6: inuse 0 memory 0\n",
        "1/net/snmp6": "".join(
            f"{key:<32}\t{value + cycle}\n"
            for key, value in {
                "Udp6InDatagrams": 700,
                "Udp6NoPorts": 3,
                "Udp6InErrors": 1,
                "Udp6OutDatagrams": 690,
            }.items()
        ),
    } | _sockets(sockets)
    for name, text in proc.items():
        _write(root / "proc" / name, text)
    for index, name in enumerate(interface_names(interfaces)):
        state = root / "sys/class/net" / name
        _write(state / "operstate", "unknown\n" if name == "lo" else "down\n" if index % 9 == 8 else "up\n")
        _write(state / "mtu", "65536\n" if name == "lo" else "1500\n")
        if not name.startswith(("lo", "veth")):
            _write(state / "speed", "25000\n" if index % 9 != 8 else "-1\n")
    for name in disk_names(disks):
        (root / "sys/block" / name / "device").mkdir(parents=True, exist_ok=True)
    for name in ("loop0", "dm-0"):
        (root / "sys/block" / name).mkdir(parents=True, exist_ok=True)


def disk_names(disks: int) -> list[str]:
    """Of the whole disks: a quarter of them nvme0n1…, the others sda…"""
    nvme = disks // 4
    letters = [chr(ord("a") + index) for index in range(26)]
    names = letters + [first + second for first in letters for second in letters]
    return [f"nvme{index}n1" for index in range(nvme)] + [f"sd{name}" for name in names[: disks - nvme]]


def interface_names(interfaces: int) -> list[str]:
    """lo, eight eth0…, and veth interfaces with a hexadecimal name, as containers have them."""
    names = ["lo"] + [f"eth{index}" for index in range(8)]
    return [*names, *(f"veth{index * 2654435761 % 2**28:07x}" for index in range(interfaces))][:interfaces]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _stat(cpus: int, cycle: int) -> str:
    steady = [80_000_000 + cycle * 300, 41_000 + cycle * 5, 0, 90_000 + cycle * 3, cycle, 0, 0]
    rows = [
        [9_000_000 + cpu * 1000 + cycle * (cpu % 7 * 100 + 1), 1200 + cycle, 2_500_000 + cycle * 60, *steady]
        for cpu in range(cpus)
    ]
    total = [sum(column) for column in zip(*rows, strict=True)]
    lines = [f"cpu  {' '.join(map(str, total))}", *(f"cpu{i} {' '.join(map(str, row))}" for i, row in enumerate(rows))]
    interrupts = 900_000_000 + cycle * 5000
    lines.append(f"intr {interrupts} {' '.join(str(number % 977) for number in range(cpus * 8))}")
    lines += [f"ctxt {2_000_000_000 + cycle * 90_000}", "btime 1795000000", f"processes {700_000 + cycle * 40}"]
    lines += [f"procs_running {cpus // 2}", "procs_blocked 3", f"softirq {400_000_000 + cycle} 1 2 3 4 5 6 7 8 9 10"]
    return "\n".join(lines) + "\n"


def _vmstat(cycle: int) -> str:
    fillers = {f"nr_zone_figure_{index}": 1000 + index for index in range(120)}
    counters = {"pgpgin": 90_000_000, "pgpgout": 80_000_000, "pswpin": 100, "pswpout": 2000, "pgfault": 9_000_000_000}
    counters |= {"pgmajfault": 71_000, "oom_kill": 1}
    steps = {"pgpgin": 4000, "pgpgout": 9000, "pgfault": 70_000, "pgmajfault": 3}
    grown = {key: value + cycle * steps.get(key, 0) for key, value in counters.items()}
    return "".join(f"{key} {value}\n" for key, value in (fillers | grown).items())


def _diskstats_lines(disks: int, cycle: int) -> list[str]:
    """Each disk with 17 fields, then a loop device and a dm device, which must not be summed."""
    lines = []
    for index, name in enumerate([*disk_names(disks), "loop0", "dm-0"]):
        major, minor = (259, index) if name.startswith("nvme") else (8, index * 16 % 256)
        step = cycle * (index % 5 + 1)
        reads = [1_000_000 + index + step * 100, 2000 + step, 80_000_000 + step * 6400, 500_000 + step * 50]
        writes = [3_000_000 + index + step * 200, 9000 + step, 90_000_000 + step * 12_800, 900_000 + step * 400]
        rest = [index % 4, 700_000 + step * 300, 1_400_000 + step * 450, 50 + step, 1, 4000 + step * 8, 2, 60 + step, 7]
        lines.append(f"{major:4d} {minor:7d} {name} {' '.join(map(str, reads + writes + rest))}\n")
    return lines


def _pressure(cycle: int, share: int) -> str:
    averages = f"avg10={share}.25 avg60={share}.10 avg300=0.50"
    return f"some {averages} total={cycle * share * 100_000}\nfull {averages} total={cycle * share * 50_000}\n"


def _mounts(disks: int) -> str:
    lines = ["proc /proc proc rw,relatime 0 0", "tmpfs /run tmpfs rw,nosuid 0 0", "/dev/sda / ext4 rw,relatime 0 0"]
    lines += [f"/dev/{name} /srv/{name} xfs rw,relatime 0 0" for name in disk_names(disks) if name != "sda"]
    return "\n".join(lines) + "\n"


def _net_dev(interfaces: int, cycle: int) -> str:
    text = (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls"
        " carrier compressed\n"
    )
    for index, name in enumerate(interface_names(interfaces)):
        step = cycle * (index % 6 + 1)
        received = (
            index * 9_000_000_001 + step * 125_000,
            index * 700 + step * 100,
            index % 3,
            step,
            0,
            0,
            0,
            step * 2,
        )
        sent = (index * 4_000_000_001 + step * 250_000, index * 400 + step * 200, 0, index % 2 + step, 0, 0, 0, 0)
        fields = [f"{value:{width}d}" for value, width in zip(received + sent, _NET_DEV_WIDTHS, strict=True)]
        text += f"{name:>6}: {' '.join(fields)}\n"
    return text


def _snmp(cycle: int) -> str:
    text = ""
    for index, (protocol, names) in enumerate(_SNMP.items()):
        values = [1000 * place + cycle * (place + index) for place in range(len(names.split()))]
        text += f"{protocol}: {names}\n{protocol}: {' '.join(map(str, values))}\n"
    return text


def _sockets(count: int) -> dict[str, str]:
    """The tables of sockets, with documentation addresses: a listener each, the others established."""
    tail = "00000000:00000000 00:00000000 00000000"
    tcp = ["  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"]
    tcp += [f"   0: 00000000:0016 00000000:0000 0A {tail}     0        0 900 1 0 100 0 0 10 0"]
    for index in range(1, count):
        remote = f"{index % 254 + 1:02X}0200C0:{1024 + index:04X}"  # 192.0.2.x
        state = "06" if index % 10 == 9 else "01"
        tcp.append(f"{index:4d}: 010200C0:01BB {remote} {state} {tail}    33        0 {1000 + index} 1 0 20 4 30 10 -1")
    any6, documentation = "0" * 32, "B80D0120000000000000000001000000"  # ::, 2001:db8::1
    tcp6 = [tcp[0], f"   0: {any6}:0050 {any6}:0000 0A {tail}     0        0 901 1 0 100 0 0 10 0"]
    tcp6.append(f"   1: {documentation}:0050 {documentation}:C350 01 {tail}    33        0 902 1 0 20 4 30 10 -1")
    udp = [tcp[0] + " ref pointer drops", f"  10: 00000000:0035 00000000:0000 07 {tail}     0        0 903 2 0 4"]
    udp6 = [udp[0], f"  11: {any6}:0035 {any6}:0000 07 {tail}     0        0 904 2 0 0"]
    unix = ["Num       RefCount Protocol Flags    Type St Inode Path"]
    unix += [f"0000000000000000: 00000002 00000000 00010000 0001 01 {2000 + index} /run/{index}" for index in range(20)]
    unix += [f"0000000000000000: 00000003 00000000 00000000 0002 03 {3000 + index}" for index in range(20)]
    tables = {"tcp": tcp, "tcp6": tcp6, "udp": udp, "udp6": udp6, "unix": unix}
    return {f"1/net/{name}": "\n".join(lines) + "\n" for name, lines in tables.items()}
