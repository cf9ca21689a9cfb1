"""Interfaces: the kernel's, psutil's and ip's figures, saved hosts, damage, rates, and names that change."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ProbeError
from agent.frame import Frame
from probes import network
from probes.network import (
    NET_DEV,
    NETWORK,
    NetworkProbe,
    NetworkSettings,
    PsutilNetworkProbe,
    parse_attribute,
    parse_operstate,
    split_net_dev,
)
from probes.procfs import Host, ProcFile
from probes.rows import RowReader, parse_rows
from tests.hosts import interface_names, saved_host, write_large_host

SECOND = 1_000_000_000
COUNTERS = [column.name for column in NETWORK.counters]
HEADING = (
    "Inter-|   Receive                                                |  Transmit\n"
    " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier"
    " compressed\n"
)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads this machine's /proc")

Row = dict[str, float | None]


class Cycles:
    """A probe and its frame; each call collects one cycle, `seconds` after the one before."""

    def __init__(self, probe: NetworkProbe | PsutilNetworkProbe) -> None:
        self.probe = probe
        self.frame = Frame((NETWORK,))
        self.now_ns = SECOND

    def __call__(self, seconds: float = 10.0) -> dict[str, Row]:
        self.now_ns += int(seconds * SECOND)
        self.frame.begin(self.now_ns, self.now_ns)
        self.probe.collect(self.frame)
        self.frame.derive()
        table = self.frame.tables["network"]
        rows: dict[str, Row] = {}
        for row in range(table.count):
            values: Row = {name: int(table.counters[row, index]) for index, name in enumerate(COUNTERS)}
            values |= {name: None for index, name in enumerate(COUNTERS) if table.unknown[row, index]}
            for name, index in NETWORK.gauge_index.items():
                value = float(table.gauges[row, index])
                values[name] = None if math.isnan(value) else value
            rows[table.labels[row][0]] = values
        return rows


class Tree:
    """Another host's tree with interfaces, and a probe on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "proc/1/net").mkdir(parents=True)
        (root / "proc/stat").write_text("cpu 1\n")

    def write(self, **starts: int) -> None:
        """Interfaces whose 16 numbers count up from a start."""
        lines = [
            f"{name:>6}: {' '.join(str(start + index) for index in range(16))}\n" for name, start in starts.items()
        ]
        (self.root / "proc/1/net/dev").write_text(HEADING + "".join(lines))

    def state(self, name: str, **files: str) -> None:
        path = self.root / "sys/class/net" / name
        path.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (path / file).write_text(text + "\n")

    def probe(self, **settings: Any) -> NetworkProbe:
        return NetworkProbe(NetworkSettings(**settings), Host(root=str(self.root)))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_every_column_of_a_line(tree: Tree) -> None:
    tree.write(eth0=101)
    tree.state("eth0", operstate="up", mtu="9000", speed="10000")
    row = Cycles(tree.probe())()["eth0"]
    assert [row[name] for name in COUNTERS] == [101, 102, 103, 104, 109, 110, 111, 112, 108]
    assert (row["up"], row["mtu_bytes"], row["speed_bytes_per_second"]) == (1, 9000, 1.25e9)
    assert (row["receive_bytes_per_second"], row["transmit_bytes_per_second"]) == (None, None)


def test_rates_are_exact_and_a_fall_gives_null_once(tree: Tree) -> None:
    tree.write(eth0=1000)
    cycles = Cycles(tree.probe())
    seen = []
    for start in (1000, 1250, 300, 301):
        tree.write(eth0=start)
        seen.append(cycles(10)["eth0"]["receive_bytes_per_second"])
    assert seen == [None, 25.0, None, 0.1]


def test_interfaces_appear_vanish_change_places_and_names(tree: Tree) -> None:
    tree.write(lo=10, eth0=100)
    tree.state("eth0", operstate="up", mtu="1500")
    tree.state("lo", operstate="unknown", mtu="65536")
    cycles = Cycles(tree.probe())
    cycles()
    tree.write(eth0=120, lo=30)
    assert [row["transmit_bytes_per_second"] for row in cycles().values()] == [2.0, 2.0]
    tree.write(eth0=140, lo=30, veth1=5_000_000)
    added = cycles()
    assert [row["receive_bytes_per_second"] for row in added.values()] == [2.0, 0.0, None]
    assert added["veth1"]["up"] is None  # it has no state in this tree
    (tree.root / "sys/class/net/eth0").rename(tree.root / "sys/class/net/wan0")
    tree.write(wan0=160, lo=30)
    renamed = cycles()
    assert list(renamed) == ["wan0", "lo"]
    assert renamed["wan0"]["receive_bytes_per_second"] is None
    assert renamed["wan0"]["mtu_bytes"] == 1500
    tree.write(wan0=180, lo=30, veth1=5_000_000)
    assert [row["receive_bytes_per_second"] for row in cycles().values()] == [2.0, 0.0, None]


def test_two_interfaces_that_swap_names_swap_states(tree: Tree) -> None:
    tree.write(eth0=10, eth1=20)
    tree.state("eth0", operstate="up", mtu="1500")
    tree.state("eth1", operstate="down", mtu="9000")
    cycles = Cycles(tree.probe())
    cycles()
    sys_net = tree.root / "sys/class/net"
    for source, target in (("eth0", "rename2"), ("eth1", "eth0"), ("rename2", "eth1")):
        (sys_net / source).rename(sys_net / target)
    tree.write(eth1=12, eth0=22)  # the kernel lists them by their index
    rows = cycles()
    assert (rows["eth0"]["mtu_bytes"], rows["eth0"]["up"]) == (9000, 0)
    assert (rows["eth1"]["mtu_bytes"], rows["eth1"]["up"]) == (1500, 1)


def test_no_rate_is_made_of_two_interfaces(tree: Tree) -> None:
    """Names swapped between two cycles: each row goes on with the figures of the other one."""
    tree.write(lo=5, d1=1_000, d2=3_000_000_000)
    for name, index in (("lo", "1"), ("d1", "2"), ("d2", "3")):
        tree.state(name, operstate="up", ifindex=index)
    cycles = Cycles(tree.probe())
    cycles()
    tree.write(lo=15, d1=1_010, d2=3_000_000_010)
    assert [row["receive_bytes_per_second"] for row in cycles().values()] == [1, 1, 1]
    tree.state("d1", ifindex="3")
    tree.state("d2", ifindex="2")
    tree.write(lo=25, d2=1_020, d1=3_000_000_020)  # the kernel lists them by their index
    rows = cycles()
    assert {name: row["receive_bytes_total"] for name, row in rows.items()} == {
        "lo": 25,
        "d2": 1020,
        "d1": 3_000_000_020,
    }
    assert {name: row["receive_bytes_per_second"] for name, row in rows.items()} == {"lo": 1, "d2": None, "d1": None}
    tree.write(lo=35, d2=1_030, d1=3_000_000_030)
    assert [row["transmit_bytes_per_second"] for row in cycles().values()] == [1, 1, 1]


@pytest.mark.parametrize("links_kept_open", [128, 0])
def test_an_interface_that_was_made_anew_in_its_place(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, links_kept_open: int
) -> None:
    """The list of names stays the same; sysfs says ENODEV to who has the old one's file open."""
    monkeypatch.setattr(network, "_LINKS_KEPT_OPEN", links_kept_open)
    tree.write(lo=5, veth0=1_000)
    tree.state("veth0", operstate="up", ifindex="2", mtu="1500")
    cycles = Cycles(tree.probe())
    cycles()
    tree.state("veth0", operstate="up", ifindex="7", mtu="9000")
    for file in (file for path, file in cycles.probe._host._files.items() if "veth0" in path):  # type: ignore[union-attr]
        if file._fd >= 0:
            write_end = os.open(
                "/proc/self/fd", os.O_RDONLY
            )  # a read says EISDIR, as one of a file that is gone ENODEV
            os.dup2(write_end, file._fd)
            os.close(write_end)
    tree.write(lo=15, veth0=50_000_000)
    rows = cycles()
    assert (rows["veth0"]["receive_bytes_per_second"], rows["veth0"]["mtu_bytes"]) == (None, 9000)
    assert rows["lo"]["receive_bytes_per_second"] == 1
    tree.write(lo=25, veth0=50_000_010)
    assert [row["receive_bytes_per_second"] for row in cycles().values()] == [1, 1]


def test_descriptors_are_bounded_however_many_interfaces_there_are(tmp_path: Path) -> None:
    write_large_host(tmp_path, cpus=1, disks=1, interfaces=601, sockets=1)
    probe = NetworkProbe(NetworkSettings(row_limit=1000), Host(root=str(tmp_path)))
    cycles = Cycles(probe)
    for _ in range(3):
        rows = cycles()
        assert list(rows) == interface_names(601)
        assert {row["mtu_bytes"] for row in rows.values()} == {65536, 1500}
        assert 128 <= open_files(tmp_path) <= 3 * 128 + 1
    (tmp_path / "sys/class/net" / interface_names(601)[600] / "mtu").write_text("1400\n")
    assert cycles()[interface_names(601)[600]]["mtu_bytes"] == 1400
    probe.close()
    assert [path for path in open_paths(tmp_path) if "sys/" in path] == []


@pytest.mark.parametrize("file", ["ifindex", "mtu"])
@pytest.mark.parametrize("known", [True, False])
def test_at_the_limit_of_open_files_nothing_is_null_silently(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, file: str, known: bool
) -> None:
    cycles = Cycles(tree.probe())
    if known:
        tree.write(lo=1)
        cycles()
    tree.write(eth0=1)
    tree.state("eth0", operstate="up", mtu="1500", ifindex="2")
    real = os.open

    def refuse(path: str, *flags: int) -> int:
        if path.endswith(f"/{file}"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return real(path, *flags)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        for _ in range(2):
            with pytest.raises(ProbeError, match=f"class/net/eth0/{file}: Too many open files"):
                cycles()
    assert cycles()["eth0"]["mtu_bytes"] == 1500


def test_state_follows_its_files_and_closes_them(tree: Tree) -> None:
    tree.write(eth0=1)
    tree.state("eth0", operstate="up", mtu="1500", speed="1000")
    probe = tree.probe()
    cycles = Cycles(probe)
    files = open_files(tree.root)
    assert cycles()["eth0"]["speed_bytes_per_second"] == 125e6
    tree.state("eth0", operstate="down", mtu="1400", speed="-1")
    row = cycles()["eth0"]
    assert (row["up"], row["mtu_bytes"], row["speed_bytes_per_second"]) == (0, 1400, None)
    tree.state("eth0", speed="100")
    assert cycles()["eth0"]["speed_bytes_per_second"] == 12.5e6
    assert open_files(tree.root) > files
    tree.write(lo=1)
    cycles()
    probe.close()
    assert [path for path in open_paths(tree.root) if "sys/" in path] == []


def test_a_refused_speed_is_asked_for_again_when_the_operstate_changes(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.write(eth0=1)
    tree.state("eth0", operstate="down", mtu="1500")
    asked = []
    read = ProcFile.read

    def counted(file: ProcFile, cycle: int | None = None) -> bytes:
        if file.path.endswith("speed"):
            asked.append(file.path)
        return read(file, cycle)

    monkeypatch.setattr(ProcFile, "read", counted)
    cycles = Cycles(tree.probe())
    for _ in range(5):
        assert cycles()["eth0"]["speed_bytes_per_second"] is None
    assert len(asked) == 1
    tree.state("eth0", operstate="up", speed="1000")
    assert cycles()["eth0"]["speed_bytes_per_second"] == 125e6
    cycles()
    assert len(asked) == 3


def test_settings_choose_and_limit_rows(tree: Tree) -> None:
    tree.write(lo=1, eth0=2, eth1=3, veth0=4)
    assert list(Cycles(tree.probe(include=("eth*", "lo"), exclude=("eth1",)))()) == ["lo", "eth0"]
    limited = Cycles(tree.probe(row_limit=3))
    assert list(limited()) == ["lo", "eth0", "eth1"]
    assert limited.frame.tables["network"].dropped == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"  eth0: 1 2", (b"eth0", 7)),
        (b"eth0:12345 2", (b"eth0", 5)),
        (b"eth0:1: 5 6", (b"eth0:1", 7)),
        (b"a.b-c@d#123: 5", (b"a.b-c@d#123", 12)),
        (b" \xff\xfe: 5", (b"\xff\xfe", 4)),
        (b"fifteen-bytes-x: 5", (b"fifteen-bytes-x", 16)),
        (b"sixteen-bytes-xx: 5", None),
        (b" face |bytes", None),
        (b"  : 1", None),
        (b"  ..: 1", None),
        (b"a/b: 1", None),
        (b"a\0b: 1", None),
        (b"eth0: 1 2 eth1: 3", None),
    ],
)
def test_names(line: bytes, expected: tuple[bytes, int] | None) -> None:
    assert split_net_dev(line) == expected


def test_states() -> None:
    texts = [b"up\n", b"unknown\n", b"down\n", b"dormant\n", b"lowerlayerdown\n"]
    assert [parse_operstate(text) for text in texts] == [1, 1, 0, 0, 0]
    assert math.isnan(parse_operstate(b""))
    assert parse_attribute(b"1500\n") == 1500
    assert all(math.isnan(parse_attribute(text)) for text in (b"", b"-1\n", b"six\n", b"1\x005\n"))


def test_the_old_host() -> None:
    rows = Cycles(NetworkProbe(NetworkSettings(), Host(root=str(saved_host("old")))))()
    assert list(rows) == ["lo", "eth0", "eth0:1"]
    assert rows["eth0"]["receive_bytes_total"] == 4294901760
    assert (rows["eth0"]["receive_errors_total"], rows["eth0"]["receive_drops_total"]) == (2, 7)
    assert (rows["eth0"]["transmit_drops_total"], rows["eth0"]["receive_multicast_total"]) == (1, 51290)
    assert rows["eth0"]["speed_bytes_per_second"] == 125e6
    assert rows["lo"]["up"] == 1


def test_the_damaged_host() -> None:
    rows = Cycles(NetworkProbe(NetworkSettings(), Host(root=str(saved_host("damaged")))))()
    assert list(rows) == ["lo", "eth0", "eth1", "e\\xff\\xe92", "eth4"]
    assert rows["lo"]["receive_bytes_total"] == 735036
    assert (rows["lo"]["up"], rows["lo"]["mtu_bytes"], rows["lo"]["speed_bytes_per_second"]) == (None, None, None)
    assert (rows["eth0"]["receive_bytes_total"], rows["eth0"]["receive_packets_total"]) == (None, None)
    assert (rows["eth0"]["transmit_packets_total"], rows["eth0"]["mtu_bytes"]) == (5120034, None)
    assert set(rows["eth1"].values()) == {None}
    assert (rows["eth4"]["receive_bytes_total"], rows["eth4"]["receive_packets_total"]) == (None, 2**64 - 1)


def test_the_large_host(tmp_path: Path) -> None:
    write_large_host(tmp_path, cpus=2, disks=1)
    cycles = Cycles(NetworkProbe(NetworkSettings(row_limit=300), Host(root=str(tmp_path))))
    assert list(cycles()) == interface_names(300)
    write_large_host(tmp_path, cpus=2, disks=1, cycle=2)
    for index, row in enumerate(cycles(5).values()):
        assert row["receive_bytes_per_second"] == 2 * (index % 6 + 1) * 125_000 / 5
        assert row["transmit_bytes_per_second"] == 2 * (index % 6 + 1) * 250_000 / 5
        assert row["up"] == (0 if index % 9 == 8 else 1)


def test_a_text_without_heading_is_an_error(tree: Tree) -> None:
    for text in ("", "garbage\n"):
        (tree.root / "proc/1/net/dev").write_text(text)
        with pytest.raises(ProbeError, match="net/dev"):
            Cycles(tree.probe())()


TEXT = (
    HEADING
    + "    lo:    3193      29    0    0    0     0          0         0     3193      29    0    0    0    0   0  0\n"
    + "  eth0: 98295178    2664    0    0    0     0          0         0   160353    1674    0    0    0    0  0  0\n"
    + " eth10: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n"
).encode()


@given(st.binary(max_size=300))
def test_any_bytes_are_parsed(text: bytes) -> None:
    rows = parse_rows(text, NET_DEV)
    assert rows.cells.shape == (len(rows.names), 16)


@given(
    st.integers(0, len(TEXT) - 1),
    st.integers(0, 5),
    st.one_of(st.binary(max_size=6), st.sampled_from([b"\n", b" ", b"7", b"-", b":", b"18446744073709551614", b"\0"])),
)
def test_the_fast_way_finds_what_the_slow_one_finds(start: int, length: int, put: bytes) -> None:
    damaged = TEXT[:start] + put + TEXT[start + length :]
    reader = RowReader(NET_DEV)
    reader.parse(TEXT)
    for text in (damaged, damaged, TEXT):
        fast, slow = reader.parse(text), parse_rows(text, NET_DEV)
        assert fast.names == slow.names
        assert np.array_equal(fast.cells, slow.cells)
        assert (fast.unknown is None) == (slow.unknown is None)
        if fast.unknown is not None and slow.unknown is not None:
            assert np.array_equal(fast.unknown, slow.unknown)


@pytest.mark.parametrize("other", [b" eth01:", b"eth010:", b" eth11:", b"eth1:0:", b" eth10 ", b"       "])
def test_a_new_name_of_the_same_shape_is_noticed(other: bytes) -> None:
    reader = RowReader(NET_DEV)
    reader.parse(TEXT)
    renamed = TEXT.replace(b" eth10:", other)
    names = reader.parse(renamed).names
    assert names == parse_rows(renamed, NET_DEV).names
    assert b"eth10" not in names


@linux
@pytest.mark.parametrize("probe", [NetworkProbe, PsutilNetworkProbe])
def test_this_host_as_psutil_and_the_kernel_see_it(probe: type[NetworkProbe] | type[PsutilNetworkProbe]) -> None:
    cycles = Cycles(probe(NetworkSettings(row_limit=1000), Host()))
    before = psutil.net_io_counters(pernic=True, nowrap=False)
    rows = cycles()
    after = psutil.net_io_counters(pernic=True, nowrap=False)
    assert list(rows) == list(before)
    names = ["bytes_recv", "packets_recv", "errin", "dropin", "bytes_sent", "packets_sent", "errout", "dropout"]
    states = psutil.net_if_stats()
    for interface, row in rows.items():
        for ours, theirs in zip(COUNTERS[:8], names, strict=True):
            value = row[ours]
            assert value is not None
            assert getattr(before[interface], theirs) <= value <= getattr(after[interface], theirs)
        assert row["up"] == states[interface].isup
        assert row["mtu_bytes"] == states[interface].mtu
        assert row["speed_bytes_per_second"] == (states[interface].speed * 125_000 or None)
        assert (row["receive_multicast_total"] is None) == (probe is PsutilNetworkProbe)


@linux
@pytest.mark.skipif(not shutil.which("ip"), reason="iproute2 is not installed")
def test_this_host_as_ip_sees_it() -> None:
    before = ip_links()
    rows = Cycles(NetworkProbe(NetworkSettings(row_limit=1000), Host()))()
    after = ip_links()
    assert set(rows) == set(before)
    for name, row in rows.items():
        assert row["mtu_bytes"] == before[name]["mtu"]
        assert row["up"] == (before[name]["operstate"] in ("UP", "UNKNOWN"))
        for way, prefix in (("rx", "receive"), ("tx", "transmit")):
            low, high = (links[name]["stats64"][way] for links in (before, after))
            for key in ("bytes", "packets", "errors"):
                value = row[f"{prefix}_{key}_total"]
                assert value is not None
                assert low[key] <= value <= high[key]
        low, high = (links[name]["stats64"]["rx"]["multicast"] for links in (before, after))
        multicast = row["receive_multicast_total"]
        assert multicast is not None
        assert low <= multicast <= high


def ip_links() -> dict[str, Any]:
    links = json.loads(subprocess.run(["ip", "-s", "-j", "link"], check=True, capture_output=True).stdout)
    return {link["ifname"]: link for link in links}


IN_A_NAMESPACE = """
import json, subprocess, sys
from tests.probes.test_network import Cycles
from probes.network import NetworkProbe, NetworkSettings
from probes.procfs import Host

def ip(*words): subprocess.run(["ip", "link", *words], check=True)

kind = sys.argv[1]

cycles, seen = Cycles(NetworkProbe(NetworkSettings(), Host())), []
seen.append(cycles())
ip("add", "probe0", "type", kind); ip("set", "probe0", "mtu", "1234")
seen.append(cycles())
ip("set", "probe0", "up")
seen.append(cycles())
ip("set", "probe0", "down"); ip("set", "probe0", "name", "probe1"); ip("add", "probe0", "type", kind)
seen.append(cycles())
ip("del", "probe1")
seen.append(cycles())
ip("add", "probe1", "type", kind); cycles()
ip("set", "probe0", "name", "swap"); ip("set", "probe1", "name", "probe0"); ip("set", "swap", "name", "probe1")
seen.append(cycles())
seen.append(cycles())
ip("del", "probe0"); ip("add", "probe0", "type", kind)
seen.append(cycles())
seen.append(cycles())
json.dump(seen, sys.stdout)
"""


@linux
def test_live_interfaces_in_a_namespace() -> None:
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("unshare or ip is not installed")
    command = ["unshare", "--net", "--mount", "sh", "-c", 'mount -t sysfs sysfs /sys && exec "$@"', "sh"]
    refusals = ""
    for kind in ("dummy", "ifb"):  # not every kernel has them all
        allowed = subprocess.run(
            [*command, "ip", "link", "add", "probe0", "type", kind], capture_output=True, text=True
        )
        if not allowed.returncode:
            break
        refusals += f"{kind}: {allowed.stderr.strip()} "
    else:
        pytest.skip(f"no interface can be made in a network namespace of its own: {refusals}")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, sys.executable, "-c", IN_A_NAMESPACE, kind],
        check=True, capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    empty, added, up, renamed, deleted, swapped, after_swap, made_anew, after_all = json.loads(done.stdout)
    others = set(empty)
    assert "probe0" not in others
    assert set(added) == others | {"probe0"}
    assert (added["probe0"]["up"], added["probe0"]["mtu_bytes"], added["probe0"]["receive_bytes_total"]) == (0, 1234, 0)
    assert added["probe0"]["receive_bytes_per_second"] is None
    assert up["probe0"]["up"] == 1
    assert up["probe0"]["receive_bytes_per_second"] == 0
    assert (renamed["probe1"]["mtu_bytes"], renamed["probe0"]["mtu_bytes"]) == (1234, 1500)
    assert set(deleted) == others | {"probe0"}
    assert deleted["probe0"]["mtu_bytes"] == 1500
    for rows, unknown in (
        (swapped, {"probe0", "probe1"}),
        (after_swap, set()),
        (made_anew, {"probe0"}),
        (after_all, set()),
    ):
        assert {name for name, row in rows.items() if row["receive_bytes_per_second"] is None} == unknown


def open_paths(root: Path) -> list[str]:
    """Files below `root` that this process has open; /dev/fd is not there everywhere."""
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            continue
    return [path for path in paths if path.startswith(str(root))]


def open_files(root: Path) -> int:
    return len(open_paths(root))
