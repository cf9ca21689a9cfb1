"""The file sink on real files: appending, rotation, what others do to the file, full disks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from agent.errors import SinkError, UsageError
from agent.serializers import formats
from agent.sinks.file import FileSettings, FileSink
from agent.units import Size

root_on_linux = sys.platform.startswith("linux") and os.geteuid() == 0


def opened(path: Path, max_size: int = 1 << 20, max_files: int = 5, format: formats.Name = "json") -> FileSink:
    settings = FileSettings(type="file", path=str(path), max_size=Size(max_size), max_files=max_files, format=format)
    sink = FileSink(settings)
    sink.open()
    return sink


def deliver(sink: FileSink, *payloads: bytes) -> None:
    for payload in payloads:
        with memoryview(payload) as view:
            sink.deliver([view])


def lines(path: Path) -> list[bytes]:
    text = path.read_bytes()
    assert text == b"" or text.endswith(b"\n")
    return text.splitlines()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_appends_lines(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"from before\n")
    sink = opened(path)
    deliver(sink, b"one", b"", b"three")
    sink.close()
    assert lines(path) == [b"from before", b"one", b"", b"three"]


def test_a_new_file_is_not_readable_for_everybody(tmp_path: Path) -> None:
    opened(tmp_path / "out").close()
    assert (tmp_path / "out").stat().st_mode & 0o027 == 0


def test_the_constructor_does_nothing(tmp_path: Path) -> None:
    FileSink(FileSettings(type="file", path=str(tmp_path / "out"))).close()
    assert names(tmp_path) == []


def test_close_can_be_called_twice_and_delivery_opens_again(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out")
    deliver(sink, b"one")
    sink.close()
    sink.close()
    deliver(sink, b"two")
    sink.close()
    assert lines(tmp_path / "out") == [b"one", b"two"]


def test_rotates_by_size_and_keeps_so_many(tmp_path: Path) -> None:
    """Lines of 10 bytes, three to a file; what is older than the third kept file goes."""
    sink = opened(tmp_path / "out", max_size=30, max_files=3)
    payloads = [b"line %04d" % number for number in range(1, 20)]
    deliver(sink, *payloads)
    sink.close()
    assert names(tmp_path) == ["out", "out.1", "out.2", "out.3"]
    kept = [lines(tmp_path / name) for name in ("out.3", "out.2", "out.1", "out")]
    assert kept == [payloads[9:12], payloads[12:15], payloads[15:18], payloads[18:]]


def test_the_limit_is_exact(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out", max_size=30)
    deliver(sink, b"x" * 19, b"y" * 9)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out").stat().st_size == 30
    deliver(sink, b"")
    sink.close()
    assert names(tmp_path) == ["out", "out.1"]
    assert lines(tmp_path / "out") == [b""]


def test_a_line_above_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out", max_size=30)
    deliver(sink, b"a" * 100, b"b" * 100, b"c")
    sink.close()
    assert [lines(tmp_path / name) for name in ("out.2", "out.1", "out")] == [[b"a" * 100], [b"b" * 100], [b"c"]]


def test_max_files_0_keeps_only_the_present_file(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out", max_size=30, max_files=0)
    deliver(sink, *(b"line %04d" % number for number in range(1, 9)))
    sink.close()
    assert names(tmp_path) == ["out"]
    assert lines(tmp_path / "out") == [b"line 0007", b"line 0008"]


def test_max_files_1(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out", max_size=30, max_files=1)
    deliver(sink, *(b"line %04d" % number for number in range(1, 9)))
    sink.close()
    assert names(tmp_path) == ["out", "out.1"]
    assert lines(tmp_path / "out.1") == [b"line 0004", b"line 0005", b"line 0006"]


def test_a_gap_among_the_kept_files_does_not_matter(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out", max_size=10, max_files=4)
    deliver(sink, b"line 0001", b"line 0002", b"line 0003")
    (tmp_path / "out.1").unlink()
    deliver(sink, b"line 0004")
    sink.close()
    assert names(tmp_path) == ["out", "out.1", "out.3"]
    assert lines(tmp_path / "out.1") == [b"line 0003"]
    assert lines(tmp_path / "out.3") == [b"line 0001"]


def test_the_size_of_an_older_file_counts(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"x" * 24 + b"\n")
    sink = opened(tmp_path / "out", max_size=30)
    deliver(sink, b"too much")
    sink.close()
    assert lines(tmp_path / "out.1") == [b"x" * 24]
    assert lines(tmp_path / "out") == [b"too much"]


def test_an_outside_rename_makes_a_new_file(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out")
    deliver(sink, b"one")
    (tmp_path / "out").rename(tmp_path / "out-20261121")
    deliver(sink, b"two")
    sink.close()
    assert lines(tmp_path / "out-20261121") == [b"one"]
    assert lines(tmp_path / "out") == [b"two"]


def test_an_outside_rename_with_a_new_file_in_its_place(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out")
    deliver(sink, b"one")
    (tmp_path / "out").rename(tmp_path / "old")
    (tmp_path / "out").write_bytes(b"made by logrotate\n")
    deliver(sink, b"two")
    sink.close()
    assert lines(tmp_path / "old") == [b"one"]
    assert lines(tmp_path / "out") == [b"made by logrotate", b"two"]


def test_an_unlinked_file_is_made_anew(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out")
    deliver(sink, b"one")
    (tmp_path / "out").unlink()
    deliver(sink, b"two")
    sink.close()
    assert lines(tmp_path / "out") == [b"two"]


def test_an_outside_truncation_starts_at_the_beginning(tmp_path: Path) -> None:
    """logrotate's copytruncate: no hole of zeros, and the size counts from 0."""
    sink = opened(tmp_path / "out", max_size=30)
    deliver(sink, b"line 0001", b"line 0002", b"line 0003")
    os.truncate(tmp_path / "out", 0)
    deliver(sink, b"line 0004")
    sink.close()
    assert names(tmp_path) == ["out"]
    assert lines(tmp_path / "out") == [b"line 0004"]


def test_no_descriptor_leaks(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("counts /proc/self/fd")
    before = len(os.listdir("/proc/self/fd"))
    sink = opened(tmp_path / "out", max_size=30, max_files=2)
    for number in range(50):
        deliver(sink, b"line %04d" % number)
        if number % 10 == 0:
            (tmp_path / "out").unlink()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    sink.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_goes_and_comes_back(tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    sink = opened(directory / "out")
    deliver(sink, b"one")
    (directory / "out").unlink()
    directory.rmdir()
    for _ in range(2):
        with pytest.raises(SinkError) as caught:
            deliver(sink, b"two")
        assert str(caught.value) == f"{directory}/out: No such file or directory"
    directory.mkdir()
    deliver(sink, b"two")
    sink.close()
    assert lines(directory / "out") == [b"two"]


def test_a_directory_in_the_way_of_rotation_loses_nothing(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out", max_size=10, max_files=1)
    (tmp_path / "out.1").mkdir()
    deliver(sink, b"line 0001")
    for _ in range(2):
        with pytest.raises(SinkError, match="Is a directory"):
            deliver(sink, b"line 0002")
    (tmp_path / "out.1").rmdir()
    deliver(sink, b"line 0002")
    sink.close()
    assert lines(tmp_path / "out.1") == [b"line 0001"]
    assert lines(tmp_path / "out") == [b"line 0002"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [("absent/out", "No such file or directory"), ("directory", "Is a directory"), ("file/out", "Not a directory")],
)
def test_what_cannot_be_opened_is_one_line(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        opened(tmp_path / place)
    assert str(caught.value) == f"{tmp_path}/{place}: {reason}: expected a file that can be written"


@pytest.mark.skipif(not hasattr(os, "fork") or os.geteuid() != 0, reason="becomes another user, which needs root")
def test_a_file_of_somebody_else() -> None:
    """Root may write anything, so a process that is nobody tries."""
    program = (
        "import os; os.setgid(65534); os.setuid(65534)\n"
        "from agent.errors import UsageError\n"
        "from agent.sinks.file import FileSettings, FileSink\n"
        "try:\n    FileSink(FileSettings(type='file', path='/etc/hostprobe-test-out')).open()\n"
        "except UsageError as error:\n    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-B", "-c", f"import agent.sinks.file\n{program}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert run.stderr == ""
    assert run.stdout == "/etc/hostprobe-test-out: Permission denied: expected a file that can be written\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")
def test_a_full_device_is_a_failure() -> None:
    sink = opened(Path("/dev/full"))
    for _ in range(3):
        with pytest.raises(SinkError, match=r"^/dev/full: No space left on device$"):
            deliver(sink, b"one")
    sink.close()


def test_a_device_is_not_rotated() -> None:
    sink = opened(Path("/dev/null"), max_size=1)
    deliver(sink, b"one", b"two", b"three")
    sink.close()
    assert not Path("/dev/null.1").exists()
    assert Path("/dev/null").is_char_device()


def test_a_full_disk_tears_no_line(small_disk: Path) -> None:
    """What does not fit leaves no half behind, and comes whole when there is space again."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40 << 10))
    sink = opened(small_disk / "out")
    payloads = [b"%02d" % number * 1500 for number in range(20)]
    deliver(sink, *payloads[:6])
    delivered = 6
    filler = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(bytes((filler.f_bavail - 1) * filler.f_bsize))
    payloads[6] *= 3  # the page that is left, and what is left of the last one, take less than this
    for _ in range(3):
        with pytest.raises(SinkError, match="No space left on device"):
            deliver(sink, payloads[delivered])
        assert lines(small_disk / "out") == payloads[:delivered]
    ballast.unlink()
    deliver(sink, *payloads[delivered:15])
    sink.close()
    assert lines(small_disk / "out") == payloads[:15]


def test_a_full_disk_at_rotation(small_disk: Path) -> None:
    """The renames need no space; the first line of the new file does."""
    ballast = small_disk / "ballast"
    sink = opened(small_disk / "out", max_size=8000, max_files=3)
    deliver(sink, b"a" * 7999)
    room = os.statvfs(small_disk)
    ballast.write_bytes(bytes(room.f_bavail * room.f_bsize))
    for _ in range(3):
        with pytest.raises(SinkError, match="No space left on device"):
            deliver(sink, b"b" * 5000)
    ballast.unlink()
    deliver(sink, b"b" * 5000)
    sink.close()
    assert names(small_disk) == ["out", "out.1"]
    assert lines(small_disk / "out.1") == [b"a" * 7999]
    assert lines(small_disk / "out") == [b"b" * 5000]


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"type": "file"}, "required field `path`"),
        ({"type": "file", "path": ""}, "length >= 1"),
        ({"type": "file", "path": "x", "max_files": -1}, ">= 0"),
        ({"type": "file", "path": "x", "max_sise": 1}, "unknown field `max_sise`"),
    ],
)
def test_settings_that_are_wrong(tree: dict[str, object], reason: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(tree, FileSettings)


def test_a_size_of_nothing_is_wrong() -> None:
    with pytest.raises(ValueError, match="max_size: a size of 1 byte or more"):
        FileSettings(type="file", path="x", max_size=Size(0))


def test_what_a_killed_process_left_of_a_line_gets_its_end(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"whole\ntorn")
    sink = opened(tmp_path / "out")
    deliver(sink, b"next")
    sink.close()
    assert lines(tmp_path / "out") == [b"whole", b"torn", b"next"]
    sink = opened(tmp_path / "out")
    deliver(sink, b"after")
    sink.close()
    assert lines(tmp_path / "out") == [b"whole", b"torn", b"next", b"after"]


# Formats whose payloads say themselves where they end


@pytest.mark.parametrize("format", ["msgpack", "otlp", "remote_write"])
def test_payloads_without_line_feeds_follow_each_other(tmp_path: Path, format: formats.Name) -> None:
    path = tmp_path / "out"
    sink = opened(path, format=format)
    deliver(sink, b"one", b"", b"t\nwo")
    sink.close()
    deliver(sink, b"three")
    sink.close()
    assert path.read_bytes() == b"onet\nwothree"


def test_nothing_is_put_behind_what_somebody_else_left_of_a_payload(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"\x81\xa1")
    sink = opened(path, format="msgpack")
    deliver(sink, b"a")
    sink.close()
    assert path.read_bytes() == b"\x81\xa1a"


def test_the_limit_is_exact_without_line_feeds(tmp_path: Path) -> None:
    sink = opened(tmp_path / "out", max_size=10, format="msgpack")
    deliver(sink, b"12345", b"67890", b"1")
    sink.close()
    assert ((tmp_path / "out").read_bytes(), (tmp_path / "out.1").read_bytes()) == (b"1", b"1234567890")
