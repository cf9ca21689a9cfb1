"""Sockets: netlink, text, ss and psutil agree; saved hosts; damage; listeners and their queues."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil
import pytest

from agent.errors import ProbeError
from agent.frame import Frame
from agent.table import Table
from probes.netlink import SockDiag
from probes.procfs import PAGE_BYTES, Host
from probes.socket_lists import SocketLists
from probes.socket_tallies import LISTEN, UDP_UNCONNECTED, InetTally, UnixTally
from probes.socket_text import count_unix
from probes.sockets import PsutilSocketsProbe, SocketsProbe, SocketsSettings
from tests.hosts import saved_host, write_large_host
from tests.probes.test_socket_text import HEADING, LINE, counted, listing, records

NAMES = (
    *("established", "syn_sent", "syn_recv", "fin_wait1", "fin_wait2", "time_wait"),
    *("close", "close_wait", "last_ack", "listen", "closing"),
)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads this machine's sockets")

T = TypeVar("T")


def collect(probe: SocketsProbe | PsutilSocketsProbe, frame: Frame | None = None) -> dict[str, Table]:
    frame = frame or Frame(probe.tables)
    frame.begin(1, frame.monotonic_ns + 1)
    probe.collect(frame)
    return frame.tables


def values(table: Table, row: int = 0) -> dict[str, Any]:
    """A row's columns by name; None where unknown."""
    found: dict[str, Any] = {}
    for column in table.spec.columns:
        if column.name in table.spec.counter_index:
            place = table.spec.counter_index[column.name]
            found[column.name] = None if table.unknown[row, place] else int(table.counters[row, place])
        else:
            value = float(table.gauges[row, table.spec.gauge_index[column.name]])
            found[column.name] = None if math.isnan(value) else value
    return found


def listening(tables: dict[str, Table]) -> dict[tuple[str, ...], tuple[float | None, ...]]:
    table = tables["listening"]
    rows = {labels: tuple(values(table, row).values()) for row, labels in enumerate(table.labels)}
    assert len(rows) == table.count, "two rows with the same labels"
    return rows


def steady(read: Callable[[], T], compare: Callable[[], T]) -> tuple[T, T]:
    """Both figures from a moment in which the first one did not change: others use this host too."""
    for _ in range(200):
        before, other, after = read(), compare(), read()
        if before == after:
            return before, other
    pytest.skip("sockets of this host change faster than they can be compared")


@pytest.fixture
def probe() -> Iterator[Callable[..., SocketsProbe]]:
    with ExitStack() as stack:

        def make(root: str | Path = "/", **settings: Any) -> SocketsProbe:
            host = Host(str(root), "procfs")
            stack.callback(host.close)
            made = SocketsProbe(SocketsSettings(**settings), host)
            stack.callback(made.close)
            return made

        yield make


class Opened:
    """Sockets of every sort that the tables tell apart."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        def new(family: int, kind: int) -> socket.socket:
            return stack.enter_context(socket.socket(family, kind))

        self.server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=9))
        self.server6 = stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6))
        self.client = stack.enter_context(socket.create_connection(self.server.getsockname()))
        self.client6 = stack.enter_context(socket.create_connection(self.server6.getsockname()[:2]))
        self.mapped = new(socket.AF_INET6, socket.SOCK_STREAM)
        self.mapped.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.mapped.bind(("::ffff:127.0.0.1", 0))
        self.mapped.listen()
        self.udp, self.udp6 = new(socket.AF_INET, socket.SOCK_DGRAM), new(socket.AF_INET6, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.udp6.bind(("::", 0))
        self.connected = new(socket.AF_INET, socket.SOCK_DGRAM)
        self.connected.connect(self.udp.getsockname())
        self.pair = [stack.enter_context(one) for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)]
        for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
            unix = new(socket.AF_UNIX, kind)
            unix.bind(str(folder / kind.name))
            unix.listen()

    def port(self, name: str) -> str:
        return str(getattr(self, name).getsockname()[1])


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


@pytest.fixture
def opened(stack: ExitStack, tmp_path: Path) -> Opened:
    return Opened(stack, tmp_path)


@linux
def test_rows_of_what_this_test_opened(probe: Callable[..., SocketsProbe], opened: Opened) -> None:
    rows = listening(collect(probe(row_limit=5000)))
    assert rows["tcp", "ipv4", "127.0.0.1", opened.port("server")] == (1, 9)  # connected, not accepted
    assert rows["tcp", "ipv6", "::1", opened.port("server6")][0] == 1
    assert rows["tcp", "ipv6", "127.0.0.1", opened.port("mapped")] == (0, 128)
    assert rows["udp", "ipv4", "127.0.0.1", opened.port("udp")] == (None, None)
    assert rows["udp", "ipv6", "::", opened.port("udp6")] == (None, None)
    assert not [labels for labels in rows if labels[0] == "udp" and labels[3] == opened.port("connected")]


@linux
def test_text_equals_netlink_row_by_row(opened: Opened) -> None:
    """Of the sockets in this process, all that both have; the text has no accept queue limit."""
    ours = {os.fstat(one.fileno()).st_ino for one in vars(opened).values() if isinstance(one, socket.socket)}
    diag = SockDiag()
    try:
        pairs = [
            (diag.tcp(0xFFF, partial(listing, LISTEN)), *(_listed(name, LISTEN) for name in ("tcp", "tcp6"))),
            (diag.udp(socket.AF_INET, 0xFFF, partial(listing, UDP_UNCONNECTED)), _listed("udp", UDP_UNCONNECTED)),
            (diag.udp(socket.AF_INET6, 0xFFF, partial(listing, UDP_UNCONNECTED)), _listed("udp6", UDP_UNCONNECTED)),
        ]
    finally:
        diag.close()
    counts = []
    for netlink, *texts in pairs:
        expected = _comparable([netlink], ours)
        assert _comparable(texts, ours) == expected
        counts.append(len(expected))
    assert counts == [3, 1, 1]


def _listed(name: str, state: int) -> InetTally:
    return counted(Path("/proc/net", name).read_bytes(), state)


def _comparable(tallies: Sequence[InetTally], inodes: set[int]) -> list[tuple[Any, ...]]:
    fields = ["family", "state", "local_port", "remote_port", "local", "remote", "receive_queue", "uid", "inode"]
    return sorted(
        tuple(row[field].tobytes() for field in fields)
        for tally in tallies
        for row in records(tally)
        if int(row["inode"]) in inodes
    )


@linux
def test_text_has_the_same_states_listeners_and_unix_sockets(
    probe: Callable[..., SocketsProbe], opened: Opened, stack: ExitStack, tmp_path: Path
) -> None:
    """A second root, so that the same kernel is read as text."""
    (tmp_path / "here/proc").mkdir(parents=True)
    (tmp_path / "here/proc/stat").symlink_to("/proc/stat")
    (tmp_path / "here/proc/net").symlink_to("/proc/self/net")
    local, text = probe(row_limit=5000), probe(tmp_path / "here", row_limit=5000)
    odd = stack.enter_context(socket.socket(socket.AF_UNIX))
    odd.bind(str(tmp_path / "two\nlines"))
    odd.listen()

    def figures(of: SocketsProbe) -> tuple[Any, ...]:
        tables = collect(of)
        tcp = values(tables["tcp"])
        queues = {labels: queue for labels, (queue, _) in listening(tables).items()}
        return [tcp[name] for name in [*NAMES, "sockets"]], queues, values(tables["unix"])

    netlink, same = steady(lambda: figures(local), lambda: figures(text))
    assert netlink == same
    states, queues, unix = netlink
    assert states[0] >= 4
    assert len(queues) >= 5
    assert unix["listening"] >= 3
    assert unix["seqpacket"] >= 1
    assert unix["dgram"] >= 2
    assert all(limit is None for _, limit in listening(collect(text)).values())


def ss(*options: str) -> list[list[str]]:
    if shutil.which("ss") is None:
        pytest.skip("ss (iproute2) is not installed")
    return [
        line.split()
        for line in subprocess.run(
            ["ss", "-H", *options], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    ]


@linux
def test_states_are_those_of_ss(probe: Callable[..., SocketsProbe], opened: Opened) -> None:
    names = {"ESTAB": "established"}
    made = probe()

    def ours() -> dict[str, float]:
        tcp = values(collect(made)["tcp"])
        return {name: tcp[name] for name in NAMES if tcp[name]}

    def theirs() -> dict[str, float]:
        return dict(Counter(names.get(line[0], line[0].lower().replace("-", "_")) for line in ss("-tan")))

    netlink, same = steady(ours, theirs)
    assert netlink == same
    assert netlink["established"] >= 4


@linux
def test_listeners_and_their_queues_are_those_of_ss(probe: Callable[..., SocketsProbe], opened: Opened) -> None:
    made = probe(row_limit=5000)

    def ours() -> dict[tuple[str, str], tuple[float | None, ...]]:
        return {(labels[0], labels[3]): queues for labels, queues in listening(collect(made)).items()}

    def theirs() -> dict[tuple[str, str], tuple[float | None, ...]]:
        found: dict[tuple[str, str], tuple[float | None, ...]] = {}
        for line in ss("-ltn"):
            found["tcp", line[3].rpartition(":")[2]] = (float(line[1]), float(line[2]))
        for line in ss("-uan", "state", "unconnected"):
            found["udp", line[2].rpartition(":")[2]] = (None, None)
        return found

    netlink, same = steady(ours, theirs)
    assert netlink.keys() == same.keys()
    for name in ("server", "server6", "mapped"):
        assert netlink["tcp", opened.port(name)] == same["tcp", opened.port(name)]


@linux
def test_states_and_listeners_are_those_of_psutil(probe: Callable[..., SocketsProbe], opened: Opened) -> None:
    host = Host("/", "psutil")
    made, by_psutil = probe(row_limit=5000), PsutilSocketsProbe(SocketsSettings(row_limit=5000), host)

    def figures(of: SocketsProbe | PsutilSocketsProbe) -> tuple[Any, ...]:
        tables = collect(of)
        return [values(tables["tcp"])[name] for name in NAMES], sorted(tables["listening"].labels)

    netlink, same = steady(lambda: figures(made), lambda: figures(by_psutil))
    if same[0][9] is None:  # there are some whose process can't be seen; test_sockets_psutil has none of those
        same[0][9] = netlink[0][9]
    assert netlink == same
    tables = collect(by_psutil)
    assert all(value is None for name, value in values(tables["tcp"]).items() if name.endswith("_total"))
    assert all(value is None for name, value in values(tables["udp"]).items() if name.endswith("_total"))
    assert values(tables["unix"])["dgram"] >= 2
    assert values(tables["unix"])["listening"] is None


def test_psutil_that_may_not_list_sockets_is_a_probe_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: str) -> None:
        raise psutil.AccessDenied

    made = PsutilSocketsProbe(SocketsSettings(), Host("/", "psutil"))
    monkeypatch.setattr(psutil, "net_connections", refuse)
    with pytest.raises(ProbeError, match="may not list"):
        collect(made)


@linux
def test_sockets_that_share_a_port_are_one_row(probe: Callable[..., SocketsProbe]) -> None:
    made = probe(row_limit=5000)
    with ExitStack() as stack:
        first = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=5, reuse_port=True))
        others = [
            stack.enter_context(socket.create_server(first.getsockname(), backlog=5, reuse_port=True)) for _ in range(3)
        ]
        for _ in range(6):
            stack.enter_context(socket.create_connection(first.getsockname()))
        key = ("tcp", "ipv4", "127.0.0.1", str(first.getsockname()[1]))
        assert listening(collect(made))[key] == (6, 20)
        others[0].close()  # its connections are reset, or move on to another: net.ipv4.tcp_migrate_req
        assert listening(collect(made))[key][1] == 15


@linux
def test_the_accept_queue_follows_connections_and_labels_are_kept(probe: Callable[..., SocketsProbe]) -> None:
    made = probe(row_limit=5000)
    frame = Frame(made.tables)
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=30))
        key = ("tcp", "ipv4", "127.0.0.1", str(server.getsockname()[1]))
        for waiting in range(4):
            assert listening(collect(made, frame))[key] == (waiting, 30)
            stack.enter_context(socket.create_connection(server.getsockname()))
        for waiting in range(4, 0, -1):
            assert listening(collect(made, frame))[key] == (waiting, 30)
            stack.enter_context(server.accept()[0])
        before, after = steady(
            lambda: list(collect(made, frame)["listening"].labels),
            lambda: list(collect(made, frame)["listening"].labels),
        )
        assert before == after
    assert key not in listening(collect(made, frame))


def test_labels_are_the_same_object_while_the_listeners_are(probe: Callable[..., SocketsProbe]) -> None:
    made = probe(saved_host("vm"))
    frame = Frame(made.tables)
    labels = collect(made, frame)["listening"].labels
    assert collect(made, frame)["listening"].labels is labels


@linux
def test_counters_are_those_of_the_kernel(probe: Callable[..., SocketsProbe], opened: Opened) -> None:
    made = probe()
    opened.connected.send(b"x")
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", ("::1", opened.udp6.getsockname()[1]))

    def ours() -> tuple[Any, ...]:
        tables = collect(made)
        return values(tables["tcp"]), values(tables["udp"])

    def theirs() -> tuple[Any, ...]:
        snmp, netstat = _paired("snmp"), _paired("netstat")
        snmp6 = dict(line.split() for line in Path("/proc/net/snmp6").read_text().splitlines())
        stat = {line.split(":")[0]: line.split()[1:] for line in Path("/proc/net/sockstat").read_text().splitlines()}
        return snmp, netstat, snmp6, stat

    # Either side is steady, or it says nothing.
    for _ in range(200):
        mine, (snmp, netstat, snmp6, stat), again = ours(), theirs(), ours()
        if mine == again:
            break
    else:
        pytest.skip("counters of this host change faster than they can be compared")
    tcp, udp = mine
    for name, key in {
        "active_opens_total": "ActiveOpens",
        "passive_opens_total": "PassiveOpens",
        "attempt_fails_total": "AttemptFails",
        "established_resets_total": "EstabResets",
        "in_segments_total": "InSegs",
        "out_segments_total": "OutSegs",
        "retransmitted_segments_total": "RetransSegs",
        "in_errors_total": "InErrs",
    }.items():
        assert tcp[name] == snmp["Tcp"][key], name
    assert tcp["listen_overflows_total"] == netstat["TcpExt"]["ListenOverflows"]
    assert tcp["listen_drops_total"] == netstat["TcpExt"]["ListenDrops"]
    for name, key in {
        "in_datagrams_total": "InDatagrams",
        "out_datagrams_total": "OutDatagrams",
        "no_ports_total": "NoPorts",
        "in_errors_total": "InErrors",
        "receive_buffer_errors_total": "RcvbufErrors",
        "send_buffer_errors_total": "SndbufErrors",
    }.items():
        assert udp[name] == snmp["Udp"][key] + int(snmp6[f"Udp6{key}"]), name
    assert udp["out_datagrams_total"] > snmp["Udp"]["OutDatagrams"], "no IPv6 in it"
    assert tcp["orphans"] == int(stat["TCP"][stat["TCP"].index("orphan") + 1])
    assert tcp["memory_bytes"] == int(stat["TCP"][stat["TCP"].index("mem") + 1]) * PAGE_BYTES
    assert udp["sockets"] >= 3


def _paired(name: str) -> dict[str, dict[str, int]]:
    lines = [line.split() for line in Path("/proc/net", name).read_text().splitlines()]
    return {
        keys[0].rstrip(":"): dict(zip(keys[1:], map(int, numbers[1:]), strict=True))
        for keys, numbers in zip(lines[::2], lines[1::2], strict=True)
    }


@linux
def test_switches_leave_out_what_they_name(probe: Callable[..., SocketsProbe], opened: Opened) -> None:
    tables = collect(probe(tcp_states=False))
    tcp = values(tables["tcp"])
    assert tcp.pop("listen") >= 3
    assert {name for name, value in tcp.items() if value is None} == {*NAMES, "sockets"} - {"listen"}
    assert tables["listening"].count >= 5
    assert "listening" not in collect(probe(listening=False))
    assert values(collect(probe(listening=False))["tcp"])["established"] >= 4
    neither = collect(probe(listening=False, tcp_states=False))
    assert values(neither["tcp"])["listen"] is None
    assert values(neither["tcp"])["in_segments_total"] is not None


@linux
def test_the_summary_walks_no_table_and_says_what_the_kernel_sums_up(
    probe: Callable[..., SocketsProbe], opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = SockDiag.tcp

    def tcp(diag: SockDiag, states: int, *more: Any) -> InetTally:
        asked.append(states)
        return original(diag, states, *more)

    monkeypatch.setattr(SockDiag, "tcp", tcp)
    made = probe(tcp_states="summary")

    def summed() -> tuple[float | None, ...]:
        tcp = values(collect(made)["tcp"])
        return tcp["current_established"], tcp["in_use"], tcp["time_wait_buckets"]

    def in_text() -> tuple[float | None, ...]:
        snmp, sockstat, sockstat6 = (Path("/proc/net", name).read_text() for name in ("snmp", "sockstat", "sockstat6"))
        names, figures = (line.split() for line in snmp.splitlines() if line.startswith("Tcp:"))
        words = sockstat.split("TCP:")[1].split()
        in_use = int(words[1]) + int(sockstat6.split("TCP6: inuse ")[1].split()[0])
        return int(figures[names.index("CurrEstab")]), in_use, int(words[words.index("tw") + 1])

    ours, expected = steady(summed, in_text)
    assert ours == expected
    assert ours[0] is not None
    assert ours[0] >= 4
    tcp_values = values(collect(made)["tcp"])
    assert {name for name in (*NAMES, "sockets") if tcp_values[name] is not None} == {"listen"}
    assert set(asked) == {1 << LISTEN}
    probe(tcp_states="summary", listening=False).collect(frame_of(made))
    assert set(asked) == {1 << LISTEN}
    asked.clear()
    assert values(collect(probe(tcp_states="summary", connections=True))["tcp"])["established"] >= 4
    assert asked == [0xFFF], "where a dump lists all of them anyway, the states are told"


def frame_of(probe: SocketsProbe) -> Frame:
    frame = Frame(probe.tables)
    frame.begin(1, 1)
    return frame


@linux
def test_rows_are_there_only_where_asked_for(probe: Callable[..., SocketsProbe], opened: Opened) -> None:
    names = ("connections", "udp_sockets", "unix_sockets")
    assert not set(names) & set(collect(probe()))
    for name in names:
        tables = collect(probe(**{name: True}, row_limit=2))
        assert set(names) & set(tables) == {name}
        table = tables[name]
        assert table.count == 2
        assert table.dropped >= 1
        assert "process" not in table.spec.labels
        assert "pid" not in table.spec.gauge_index


@linux
def test_processes_hold_sockets(probe: Callable[..., SocketsProbe], opened: Opened) -> None:
    made = probe(connections=True, processes=True, row_limit=5000)
    tables = collect(made)
    assert made._owners is not None
    while not made._owners.searched:
        tables = collect(made)
    if not made._owners.denied:  # a sandbox may refuse even root some
        assert values(tables["tcp"])["owners_complete"] == 1
    rows = {labels[3]: labels for labels in tables["listening"].labels}
    comm = Path("/proc/self/comm").read_text().strip()
    assert rows[opened.port("server")][-1] == comm
    table = tables["connections"]
    pids = {labels[2]: table.gauges[row, -1] for row, labels in enumerate(table.labels)}
    assert pids[opened.port("client")] == os.getpid()


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become a user without rights")
def test_without_rights_owners_are_unknown_and_it_is_said_once(opened: Opened) -> None:
    """In a process of another user: it may not see what this one holds."""
    code = """if True:
        import json, os
        from agent.frame import Frame
        from probes.procfs import Host
        from probes.sockets import SocketsProbe, SocketsSettings
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        probe = SocketsProbe(SocketsSettings(processes=True, row_limit=5000), Host())
        frame = Frame(probe.tables)
        for cycle in range(20):
            frame.begin(1, 1 + cycle)
            probe.collect(frame)
        table = frame.tables["listening"]
        print(json.dumps([[*labels, table.gauges[row, -1]] for row, labels in enumerate(table.labels)]))
        print(json.dumps(probe.notices))
        print(json.dumps(float(frame.tables["tcp"].gauges[0, frame.tables["tcp"].spec.gauge_index["owners_complete"]])))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    rows, notices, complete = map(json.loads, done.stdout.splitlines())
    assert complete == 0
    (row,) = [row for row in rows if row[3] == opened.port("server")]
    assert row[4] is None
    assert math.isnan(row[5])
    assert len(notices) == 1
    assert "no right to see the descriptors of" in notices[0]


@linux
def test_rows_above_the_limit_are_counted(probe: Callable[..., SocketsProbe], opened: Opened) -> None:
    for limit in (1, 4):
        table = collect(probe(row_limit=limit))["listening"]
        assert table.count == limit
        assert table.dropped >= 5 - limit
        assert not math.isnan(table.gauges[0, 0]), "TCP comes first"


def test_settings_that_nobody_can_mean_are_refused() -> None:
    assert msgspec.convert({"tcp_states": "summary"}, SocketsSettings).tcp_states == "summary"
    for bad in ({"row_limit": 0}, {"tcp_states": "all"}, {"tcp_states": 1}, {"connections": "yes"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(bad, SocketsSettings)


@linux
def test_a_refused_list_comes_from_text_and_the_others_do_not() -> None:
    """A kernel without unix_diag or tcp_diag; one protocol that no kernel has stands for them."""
    lists = SocketLists(Host("/", "procfs"))
    asked = []

    def refuse(diag: SockDiag) -> UnixTally:
        asked.append(1)
        return diag.udp(99, 0xFFF, UnixTally)

    try:
        for _ in range(3):
            assert lists._ask("unix", UnixTally, refuse, count_unix, "unix") is not None
        assert len(asked) == 1
        assert lists.limits_known
        assert lists._ask("tcp", UnixTally, refuse, count_unix, "unix") is not None
        assert not lists.limits_known
    finally:
        lists.close()


# Saved hosts and written ones.


def test_the_saved_host(probe: Callable[..., SocketsProbe]) -> None:
    root = saved_host("vm")
    tables = collect(probe(root))
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in (root / f"proc/1/net/{name}").read_text().splitlines()[1:]
    ]
    states = Counter(int(line[3], 16) for line in lines)
    tcp = values(tables["tcp"])
    assert [tcp[name] for name in NAMES] == [states[place] for place in range(1, 12)]
    assert tcp["sockets"] == len(lines)
    assert {labels[3] for labels in tables["listening"].labels if labels[0] == "tcp"} == {
        str(int(line[1].rpartition(":")[2], 16)) for line in lines if line[3] == "0A"
    }


def test_a_host_without_ipv6(probe: Callable[..., SocketsProbe]) -> None:
    tables = collect(probe(saved_host("old")))
    assert values(tables["tcp"])["established"] == 1
    assert listening(tables) == {
        ("tcp", "ipv4", "0.0.0.0", "22"): (0, None),
        ("udp", "ipv4", "0.0.0.0", "68"): (None, None),
    }
    assert values(tables["unix"]) == {"sockets": 2, "stream": 1, "dgram": 1, "seqpacket": 0, "listening": 1}
    assert values(tables["udp"])["in_datagrams_total"] is not None


def test_a_damaged_host_is_a_probe_error(probe: Callable[..., SocketsProbe]) -> None:
    with pytest.raises(ProbeError, match="lines understood"):
        collect(probe(saved_host("damaged")))


def test_a_host_without_any_of_the_files_has_nothing_known(probe: Callable[..., SocketsProbe], tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu 1\n")
    tables = collect(probe(tmp_path))
    for name in ("tcp", "udp", "unix"):
        assert set(values(tables[name]).values()) == {None}
    assert tables["listening"].count == 0


def test_a_large_host(probe: Callable[..., SocketsProbe], tmp_path: Path) -> None:
    write_large_host(tmp_path, sockets=2000, cycle=3)
    tables = collect(probe(tmp_path))
    tcp = values(tables["tcp"])
    assert (tcp["listen_overflows_total"], tcp["listen_drops_total"]) == (3, 6)
    assert tcp["memory_bytes"] == 812 * PAGE_BYTES
    assert (values(tables["udp"])["sockets"], values(tables["udp"])["memory_bytes"]) == (30, 9 * PAGE_BYTES)
    assert (tcp["sockets"], tcp["time_wait"], tcp["listen"]) == (2002, 200, 2)
    assert listening(tables) == {
        ("tcp", "ipv4", "0.0.0.0", "22"): (0, None),
        ("tcp", "ipv6", "::", "80"): (0, None),
        ("udp", "ipv4", "0.0.0.0", "53"): (None, None),
        ("udp", "ipv6", "::", "53"): (None, None),
    }
    assert values(tables["unix"]) == {"sockets": 40, "stream": 20, "dgram": 20, "seqpacket": 0, "listening": 20}


def test_a_socket_without_one_of_its_own_yet_is_in_syn_recv(probe: Callable[..., SocketsProbe], tmp_path: Path) -> None:
    write_large_host(tmp_path)
    lines = [LINE, LINE.replace(b" 0A ", b" 0C "), LINE.replace(b" 0A ", b" 03 "), LINE.replace(b" 0A ", b" 0B ")]
    (tmp_path / "proc/1/net/tcp").write_bytes(HEADING + b"".join(lines))
    (tmp_path / "proc/1/net/tcp6").unlink()
    tcp = values(collect(probe(tmp_path))["tcp"])
    assert {name: tcp[name] for name in NAMES if tcp[name]} == {"listen": 1, "syn_recv": 2, "closing": 1}
    assert tcp["sockets"] == 4
