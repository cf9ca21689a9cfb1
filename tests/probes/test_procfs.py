"""The tree's files and the learned layouts, on real files and on this host's proc."""

from __future__ import annotations

import errno
import os
import resource
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ProbeError, UsageError
from probes.procfs import ONE_RECORD, Host, KeyedText, ProcFile, integer, integers


@pytest.mark.parametrize("record_bytes", [ONE_RECORD, 64, 256, 4096])
@pytest.mark.parametrize("size", [0, 1, 3839, 3840, 4095, 4096, 4097, 8192, 20_000])
def test_reads_files_of_any_size_whole(tmp_path: Path, size: int, record_bytes: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(ord("a") + place % 26 for place in range(size)))
    file = ProcFile(str(path), record_bytes)
    assert file.read() == path.read_bytes()
    assert file.read() == path.read_bytes()


@pytest.mark.parametrize("name", ["cpuinfo", "self/smaps", "kallsyms", "self/mountinfo"])
def test_reads_what_the_kernel_gives_page_by_page(name: str) -> None:
    path = Path("/proc", name)
    if not path.exists():
        pytest.skip(f"this kernel has no {path}")
    text = ProcFile(str(path), record_bytes=4096).read()
    assert text.endswith(b"\n")
    # smaps moves while it is read: its lines are compared by their number of mappings at least.
    assert abs(text.count(b"\n") - path.read_bytes().count(b"\n")) <= 200


def test_a_file_that_comes_goes_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    file = ProcFile(str(path))
    assert file.read() == b""
    path.write_bytes(b"1\n")
    assert file.read() == b"1\n"
    file.close()
    path.unlink()
    assert file.read() == b""


def test_a_file_that_probes_share_is_read_once_a_cycle(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    file = ProcFile(str(path))
    assert file.read(7) == b"1"
    path.write_bytes(b"2")
    assert file.read(7) == b"1"
    assert file.read(8) == b"2"


def test_a_name_with_a_nul_is_absent() -> None:
    assert ProcFile("/proc/\0").read() == b""


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_what_this_process_lacks_is_no_absent_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(error, os.strerror(error))

    path = tmp_path / "file"
    path.write_bytes(b"1\n")
    file = ProcFile(str(path))
    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        for _ in range(2):
            with pytest.raises(ProbeError, match=f"^{path}: {os.strerror(error)}$"):
                file.read(7)
    assert file.read(7) == b"1\n", "another probe may ask in the same cycle"
    file.close()


def test_at_the_limit_of_open_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1\n")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    there, absent = ProcFile(str(path)), ProcFile(str(tmp_path / "absent"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(ProbeError, match="Too many open files"):
            there.read()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (there.read(), absent.read()) == (b"1\n", b"")
    there.close()


def test_another_root_needs_a_proc(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no proc/stat in it"):
        Host(str(tmp_path))
    with pytest.raises(UsageError, match="psutil reads only this host"):
        Host(str(tmp_path), "psutil")


def test_another_roots_network_is_that_of_its_first_process(tmp_path: Path) -> None:
    (tmp_path / "proc/1/net").mkdir(parents=True)
    (tmp_path / "proc/stat").write_text("cpu 1\n")
    host = Host(str(tmp_path))
    assert host.net("dev").path == str(tmp_path / "proc/1/net/dev")
    assert host.net("dev") is host.net("dev")
    assert Host().net("dev").path == "/proc/net/dev"


@pytest.mark.parametrize("root", ["/", "//", "/.", "/proc/..", "///"])
def test_this_host_by_other_names(root: str) -> None:
    assert Host(root).is_local


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's links")
def test_a_link_that_says_the_root_may_lead_elsewhere(tmp_path: Path) -> None:
    """/proc/PID/root of a container says "/" and is the container's; whatever is a link is read as another's."""
    (tmp_path / "here").symlink_to("/")
    for root in ("/proc/self/root", str(tmp_path / "here")):
        host = Host(root)
        assert not host.is_local
        assert host.net("dev").path == f"{root}/proc/1/net/dev"
        assert host.net("dev").read().startswith(b"Inter-|")
        host.close()


def test_host_closes_its_files() -> None:
    host = Host()
    before = set(os.listdir("/proc/self/fd"))
    assert host.proc("stat").read().startswith(b"cpu")
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    host.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_numbers_are_digits_only() -> None:
    assert integers([b"1", b"18446744073709551616"]) == [1, 2**64]
    assert integers([b"1", b"-1", b"1_0", b"+1", b"", b"x"]) == [1, None, None, None, None, None]
    assert integer("٣".encode()) is None


def test_picks_by_key_in_the_order_of_the_keys() -> None:
    text = b"a 1 kB\nb: 2\nc 3\nd 4\n"
    keys = KeyedText(b"c", b"a", b"b:")
    assert keys.pick(text) == [3, 1, 2]
    assert keys.pick(b"a 10 kB\nb: 20\nc 30\nd 4\n") == [30, 10, 20]
    assert keys.pick(b"new 9\n" + text) == [3, 1, 2], "a line more is another layout"
    assert keys.pick(b"a 1 kB\nc 3\nd 4\n") == [3, 1, None]
    assert keys.pick(text) == [3, 1, 2], "what was absent is noticed when it comes"
    assert keys.pick(b"") == [None, None, None]


def test_picks_a_single_key_and_the_last_word() -> None:
    assert KeyedText(b"b").pick(b"a 1\nb 2\n") == [2]
    assert KeyedText(b"b").pick(b"a 1\nb\n") == [None]
    assert KeyedText(b"b").pick(b"a 1\nb 2") == [None], "2 may be the start of another number"


def test_picks_behind_the_first_word_of_a_line() -> None:
    text = b"sockets: used 9\nTCP: inuse 1 mem 143\nUDP: inuse 5 mem 7\n"
    assert KeyedText(b"UDP: inuse", b"TCP: mem", b"RAW: inuse").pick(text) == [5, 143, None]


def test_picks_from_pairs_of_lines() -> None:
    text = b"Ip: A B\nIp: 1 2\nTcp: X Y B\nTcp: 10 -1 30\n"
    keys = KeyedText(b"Tcp: B", b"Tcp: X", b"Tcp: Y", b"Ip: B", b"Udp: A", paired=True)
    assert keys.pick(text) == [30, 10, None, 2, None]
    assert keys.pick(text.replace(b"X Y B", b"Y X B")) == [30, None, 10, 2, None]
    assert KeyedText(b"Ip: Y", paired=True).pick(text) == [None], "a key of another pair of lines"


@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([b"a 1 b 2", b"a: x 5\na: 1 2", b"b"])), max_size=6))
def test_no_text_makes_it_fail(texts: list[bytes]) -> None:
    plain, paired = KeyedText(b"a", b"b"), KeyedText(b"a: x", b"b: y", paired=True)
    for text in texts:
        for value in (*plain.pick(text), *paired.pick(text)):
            assert value is None or value >= 0
