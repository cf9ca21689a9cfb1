"""Text lists of sockets: by hand, cut, damaged; the comparison with netlink is in test_sockets."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ProbeError
from probes.addresses import address_text
from probes.socket_tallies import INET_RECORD, LISTEN, InetTally, Records, UnixTally
from probes.socket_text import count_inet, count_unix


def listing(state: int) -> InetTally:
    return InetTally(1 << state)


def records(tally: InetTally) -> Records:
    return np.frombuffer(tally.listed, dtype=INET_RECORD)


def counted(text: bytes, state: int) -> InetTally:
    tally = listing(state)
    count_inet(text, tally)
    return tally


def unix_counted(text: bytes) -> UnixTally:
    tally = UnixTally()
    count_unix(text, tally)
    return tally


HEADING = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
LINE = b"   0: 0100007F:1F90 00000000:0000 0A 00000000:00000005 00:00000000 00000000  1000        0 4242 1 0\n"
LINE6 = (
    b"   1: B80D0120000000000000000001000000:0050 0000000000000000FFFF00000100007F:0051 01 00000001:00000002"
    b" 02:00000000 00000000     0        0 4243 1 0\n"
)


def test_a_text_by_hand() -> None:
    tally = counted(HEADING + LINE + LINE6 + LINE.replace(b" 0A ", b" 0C "), LISTEN)
    assert {state: count for state, count in enumerate(tally.states) if count} == {1: 1, 10: 1, 12: 1}
    (row,) = records(tally)
    assert [int(row[name]) for name in ("family", "state", "local_port", "remote_port")] == [2, 10, 8080, 0]
    assert [int(row[name]) for name in ("receive_queue", "send_queue", "uid", "inode")] == [5, 0, 1000, 4242]
    if sys.byteorder == "little":
        assert row["local"].tobytes() == bytes((127, 0, 0, 1)).ljust(16, b"\0")
        (row,) = records(counted(HEADING + LINE6, 1))
        assert address_text(row["local"].tobytes()) == "2001:db8::1"
        assert address_text(row["remote"].tobytes()) == "127.0.0.1"
        assert (int(row["remote_port"]), int(row["send_queue"]), int(row["receive_queue"])) == (81, 1, 2)


@pytest.mark.parametrize(
    "bad", [HEADING + LINE[:-1], HEADING + LINE[:40], HEADING + b"\n", LINE, b"\n" + LINE + b"0:\n"]
)
def test_a_text_that_is_cut_or_has_no_heading_is_an_error(bad: bytes) -> None:
    with pytest.raises(ProbeError, match="lines understood"):
        counted(bad, LISTEN)


@given(st.data())
def test_damaged_text_ends_in_counts_or_a_probe_error(data: st.DataObject) -> None:
    damaged = bytearray(HEADING + (LINE + LINE6) * 3)
    for _ in range(data.draw(st.integers(0, 5))):
        start = data.draw(st.integers(0, len(damaged) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=6) | st.sampled_from([b"\n", b"0A", b" ", b":", b"F"]))
        damaged[start : start + len(patch)] = patch
    del damaged[data.draw(st.integers(0, len(damaged))) :]
    text = bytes(damaged)
    for state in (LISTEN, 1):
        try:
            tally = counted(text, state)
        except ProbeError:
            continue
        assert sum(tally.states) == max(text.count(b"\n") - 1, 0)
        assert len(records(tally)) == tally.states[state]


UNIX_TEXT = (
    b"Num       RefCount Protocol Flags    Type St Inode Path\n"
    b"00000000804d3f38: 00000002 00000000 00010000 0001 01  1210 /run/with\na line feed\n"
    b"00000000804d3f38: 00000003 00000000 00000000 0005 03  1211\n"
    b"00000000804d3f38: 00000003 00000000 00000000 0002 01  1212 @\xff\n"
)


def test_unix_text() -> None:
    tally = unix_counted(UNIX_TEXT)
    assert {kind: count for kind, count in enumerate(tally.types) if count} == {1: 1, 2: 1, 5: 1}
    assert tally.listening == 1


@given(st.integers(0, len(UNIX_TEXT)), st.binary(max_size=40))
def test_damaged_unix_text_ends_in_counts(start: int, patch: bytes) -> None:
    text = UNIX_TEXT[:start] + patch + UNIX_TEXT[start + len(patch) :]
    tally = unix_counted(text)
    assert tally.listening <= sum(tally.types) <= text.count(b"\n") + 1


@given(st.binary(max_size=200))
def test_noise_is_no_text(noise: bytes) -> None:
    unix_counted(noise)
    if b"\n" in noise.rstrip(b"\n") or (noise and not noise.endswith(b"\n")):
        with pytest.raises(ProbeError):
            counted(noise, LISTEN)
