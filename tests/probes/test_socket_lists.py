"""The text lists of sockets, from written trees; the comparison with netlink is in test_sockets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent.errors import ProbeError
from probes.netlink import ALL_STATES
from probes.procfs import Host
from probes.socket_lists import SocketLists
from probes.socket_tallies import INET_RECORD, LISTEN, InetTally, UnixTally
from probes.socket_text import count_inet

HEADING = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
LINE = b"   %d: %s:%s 00000000:0000 %s 00000000:%s 00:00000000 00000000   100        0 %d 1 0000 100 0 0 10 0\n"


def listeners() -> InetTally:
    return InetTally(1 << LISTEN)


def tree(root: Path, **files: bytes) -> SocketLists:
    (root / "proc/1/net").mkdir(parents=True)
    (root / "proc/stat").write_text("cpu 1\n")
    for name, text in files.items():
        (root / "proc/1/net" / name).write_bytes(text)
    return SocketLists(Host(str(root)))


def test_counts_states_of_both_families_and_keeps_those_that_listen(tmp_path: Path) -> None:
    tcp = HEADING + LINE % (0, b"010200C0", b"0016", b"0A", b"00000003", 7)
    tcp += LINE % (1, b"010200C0", b"0017", b"01", b"00000000", 8)
    tcp6 = HEADING + LINE % (0, b"0" * 32, b"0050", b"0A", b"00000000", 9)
    tally = tree(tmp_path, tcp=tcp, tcp6=tcp6).tcp(ALL_STATES, listeners)
    assert tally is not None
    assert tally.states[LISTEN] == 2
    assert tally.states[1] == 1
    assert sum(tally.states) == 3
    kept = np.frombuffer(tally.listed, dtype=INET_RECORD)
    assert kept["receive_queue"].tolist() == [3, 0]
    assert kept["inode"].tolist() == [7, 9]
    assert bytes(kept["local"][0])[:4] == bytes([192, 0, 2, 1])


def test_what_is_absent_is_not_known(tmp_path: Path) -> None:
    lists = tree(tmp_path)
    assert lists.tcp(ALL_STATES, listeners) is None
    assert lists.unix(UnixTally) is None
    assert lists.udp(ALL_STATES, listeners) == []
    assert not lists.limits_known


def test_a_damaged_line_is_never_left_out_of_the_count() -> None:
    with pytest.raises(ProbeError, match="0 of 1 lines understood"):
        count_inet(HEADING + b"   0: 0100007F:ZZZZ\n", listeners())
    with pytest.raises(ProbeError, match="lines understood"):
        count_inet(HEADING + (LINE % (0, b"010200C0", b"0016", b"0A", b"00000000", 7))[:-9], listeners())
