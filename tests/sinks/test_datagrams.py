"""Splitting frames into datagrams: what is put together again is the frame, and no byte is too many."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.serializers.document import HEADER
from agent.sinks.datagrams import header, nanoseconds_of, packed, split
from tests.sinks.peers import Datagram, Frame, assemble

GOLDEN = Path(__file__).parents[1] / "fixtures/golden"

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda name: not name.endswith("_rows_dropped") and name not in (*HEADER, "part", "parts")
)
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8"), max_size=30),
)
one_row = st.dictionaries(names, values, max_size=12)
tables = st.dictionaries(names, one_row | st.lists(one_row, max_size=12), max_size=8)


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    found = draw(tables)
    head = {
        "schema": "hostprobe/1",
        "host": draw(st.text(st.characters(codec="utf-8"), max_size=20)),
        "instance": draw(st.uuids()).hex,
        "sequence": draw(st.integers(1, 2**63)),
        "time_unix_ns": draw(st.integers(0, 2**63 - 1)),
        "interval_seconds": draw(st.none() | st.floats(0, 100)),
        "tags": draw(st.dictionaries(names, st.text(st.characters(codec="utf-8"), max_size=10), max_size=3)),
    }
    if draw(st.booleans()):
        head["degraded"] = draw(st.lists(names, max_size=3))
    for name in found:
        if draw(st.booleans()):
            head[f"{name}_rows_dropped"] = draw(st.integers(1, 1000))
    return head | found


def frame_of(**tables: Any) -> Frame:
    head = {"schema": "hostprobe/1", "host": "a", "instance": "0" * 32, "sequence": 7, "time_unix_ns": 5, "tags": {}}
    return head | tables


def encoded(value: object) -> bytes:
    return msgspec.json.encode(value)


def shuffled(parts: list[bytes], seed: int) -> list[bytes]:
    """In another order, some of them twice."""
    rng = random.Random(seed)
    return rng.sample(parts + parts[::2], len(parts) + len(parts[::2]))


def is_too_large(row: Frame, name: str, frame: Frame, parts: list[bytes], limit_bytes: int) -> bool:
    """Whether no part could have held a row of a table, or a table of one row's largest column."""
    alone = [row] if isinstance(frame[name], list) else dict([max(row.items(), key=lambda item: len(encoded(item)))])
    number = int("9" * len(str(len(parts))))
    common = {name: frame[name] for name in ("instance", "sequence")}
    return len(encoded(common | {"part": number, "parts": number, name: alone})) > limit_bytes


@given(frame=frames(), limit_bytes=st.integers(1200, 3000), seed=st.integers())
def test_put_together_it_is_the_frame(frame: Frame, limit_bytes: int, seed: int) -> None:
    """Rows are small enough here: nothing may be left out."""
    parts = split(encoded(frame), limit_bytes)
    assert max(map(len, parts)) <= limit_bytes
    assert assemble(shuffled(parts, seed)) == frame


@given(frame=frames(), limit_bytes=st.integers(200, 1200), seed=st.integers())
@example(frame=frame_of(cpu={"a": 1, "b": "x" * 300}, net=[{"c": "y" * 300}, {"d": 2}]), limit_bytes=300, seed=1)
def test_only_what_fits_in_no_part_is_left_out_and_counted(frame: Frame, limit_bytes: int, seed: int) -> None:
    text = encoded(frame)
    try:
        parts = split(text, limit_bytes)
    except ValueError:
        top = {name: value for name, value in frame.items() if name in HEADER or name.endswith("_rows_dropped")}
        assert len(encoded(top)) + 60 * len(frame) > limit_bytes - 40
        return
    assert max(map(len, parts)) <= limit_bytes
    found = assemble(shuffled(parts, seed))
    for name, value in frame.items():
        if name.endswith("_rows_dropped"):
            continue
        dropped = found.get(f"{name}_rows_dropped", 0) - frame.get(f"{name}_rows_dropped", 0)
        if isinstance(value, list) and name not in HEADER:
            left_out = [row for row in value if is_too_large(row, name, frame, parts, limit_bytes)]
            assert found[name] == [row for row in value if row not in left_out]
            assert dropped == len(left_out)
        elif dropped:
            assert name not in found
            assert dropped == 1
            assert is_too_large(value, name, frame, parts, limit_bytes)
        else:
            assert found[name] == value


@pytest.mark.parametrize("host", ["vm", "old", "damaged"])
@pytest.mark.parametrize("limit_bytes", [700, 1452, 4000, 65_487])
def test_golden_frames(host: str, limit_bytes: int) -> None:
    frame = json.loads((GOLDEN / f"{host}.json").read_text())
    parts = split(encoded(frame), limit_bytes)
    assert max(map(len, parts)) <= limit_bytes
    assert assemble(shuffled(parts, 1)) == frame


def test_parts_are_full_and_in_the_frames_order() -> None:
    """Greedy: what comes next would not have fitted into the part before."""
    frame = json.loads((GOLDEN / "vm.json").read_text())
    parts = split(encoded(frame), 1452)
    order = [name for name in frame if isinstance(frame[name], dict | list) and name != "tags"]
    places = [order.index(name) for part in parts for name in json.loads(part) if name in order]
    assert places == sorted(places)
    for before, after in pairwise(parts):
        name, value = list(json.loads(after).items())[4]
        first = value[:1] if isinstance(value, list) else value
        goes_on = list(json.loads(before))[-1] == name
        need_bytes = len(encoded(first)) - 1 if goes_on else len(encoded({name: first})) - 1
        assert len(before) + need_bytes > 1452


def test_the_limit_is_exact() -> None:
    text = encoded(frame_of(cpu={"ä": 1}, network=[{"interface": "é"}]))
    assert split(text, len(text)) == [text]
    assert len(split(text, len(text) - 1)) == 2


def test_a_part_is_filled_to_the_last_byte() -> None:
    """A row grows by one byte at a time, until it doesn't fit: the largest that does fills the part."""
    sizes = []
    for size in range(100, 550):
        frame = frame_of(a=[{"x": "y" * size}], b=[{"x": "y" * 500}])
        parts = split(encoded(frame), 700)
        if "a" in json.loads(parts[0]):
            sizes.append(len(parts[0]))
    assert max(sizes) == 700


@pytest.mark.parametrize("count", [8, 9, 10, 11, 98, 99, 100, 101])
def test_numbers_of_parts_get_longer(count: int) -> None:
    """Rows of which each takes a part: with ten parts, numbers have two digits."""
    for size in range(150, 190):
        frame = frame_of(network=[{"i": f"{number:04}", "x": "y" * size} for number in range(count)])
        parts = split(encoded(frame), 300)
        assert max(map(len, parts)) <= 300
        found = assemble(parts)
        if "network_rows_dropped" not in found:
            assert len(parts) in (count, count + 1)
            assert found == frame
        else:
            assert found["network"] == []
            assert found["network_rows_dropped"] == count


def test_no_part_is_a_byte_too_large() -> None:
    """Rows and columns of a few bytes, and many limits: parts end at every distance from the limit, 0 too."""
    frame = frame_of(n=[{"x": number} for number in range(150)], cpu={f"c{number}": number for number in range(150)})
    distances = set()
    for limit_bytes in range(180, 300):
        parts = split(encoded(frame), limit_bytes)
        distances |= {limit_bytes - len(part) for part in parts}
        assert assemble(parts) == frame
    assert min(distances) == 0


def test_a_row_that_just_fits_and_one_that_does_not() -> None:
    room = 300 - len(encoded({"instance": "0" * 32, "sequence": 7, "part": 9, "parts": 9, "n": [{"x": ""}]}))
    frame = frame_of(n=[{"x": "y" * room}, {"x": "y" * (room + 1)}, {"x": "z"}], n_rows_dropped=3)
    found = assemble(split(encoded(frame), 300))
    assert found["n"] == [frame["n"][0], frame["n"][2]]
    assert found["n_rows_dropped"] == 4


def test_a_table_without_a_row_that_fits_is_empty() -> None:
    found = assemble(split(encoded(frame_of(n=[{"x": "y" * 500}])), 300))
    assert (found["n"], found["n_rows_dropped"]) == ([], 1)


def test_a_table_of_one_row_is_split_by_columns_only_where_it_must() -> None:
    columns = {f"c{number}": "y" * 50 for number in range(10)}
    others = {f"other{number}": {f"b{column}": "z" * 20 for column in range(4)} for number in range(5)}
    frame = frame_of(small={"a": 1}, large=columns, **others)
    parts = [json.loads(part) for part in split(encoded(frame), 300)]
    assert sum("large" in part for part in parts) > 1
    for name, row in others.items():
        assert [part[name] for part in parts if name in part] == [row]
    assert assemble(map(encoded, parts)) == frame


def test_a_large_header_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"its header has 2\d{3} bytes, and a datagram room for 13\d\d"):
        split(encoded(frame_of(cpu={"a": 1}) | {"tags": {"a": "x" * 2000}}), 1452)


def test_a_header_that_fills_the_first_part() -> None:
    for size in range(1000, 1300):
        frame = frame_of(cpu={"a": "b" * 300}) | {"tags": {"a": "x" * size}}
        assert assemble(split(encoded(frame), 1452)) == frame


def test_a_table_with_a_monstrous_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="a table's name has 2005 bytes"):
        split(encoded(frame_of(**{"n" * 2000: []})), 1452)


@pytest.mark.parametrize(
    "text",
    [
        b'{"sequence":1,"cpu":{}}',
        b'{"instance":"a","cpu":{}}',
        b'{"instance":"a","sequence":1,"part":{}}',
        b'{"instance":"a","sequence":1,"parts":[]}',
        b"[1,2,3]",
        b"no JSON at all",
        b'{"instance":"a","sequence":1,"cpu":{',
        b"",
    ],
)
def test_no_frame_is_an_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        split(text + b" ", len(text))


def test_a_count_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expected `int`"):
        split(encoded(frame_of(a=["x" * 300], a_rows_dropped="x")), 300)


def test_spaces_between_values_do_no_harm() -> None:
    frame = frame_of(cpu={"a": 1}, memory={"a": 2}, network=[{"a": "é"}, {"a": "b" * 100}], empty=[], none={})
    text = json.dumps(frame, indent=2).encode()
    parts = split(text, 300)
    assert len(parts) > 1
    assert assemble(parts) == frame


def test_a_memoryview_is_let_go() -> None:
    """Also by a frame that goes whole, and by the traceback of an error."""
    memory = bytearray(encoded(frame_of(n=[{"x": "y" * 50}] * 20)))
    with memoryview(memory) as view:
        parts = split(view, 300) + split(view, 10_000)
        assert nanoseconds_of(view) == 5
        with pytest.raises(ValueError, match="its header has") as caught:
            split(view, 100)
    assert parts[-1] == bytes(memory)
    memory.clear()  # BufferError if anything held it
    assert len(parts) > 2
    assert caught.tb


def test_the_header_is_of_20_bytes_and_checked() -> None:
    text = b'{"a":1}'
    start = header(2**64 - 1, 1_795_000_000_000_000_001, text)
    assert start[:16].hex() == "ff" * 8 + f"{1_795_000_000_000_000_001:016x}"
    assert len(start) == 20
    found = Datagram.of(start + text)
    assert (found.sequence, found.nanoseconds, found.text) == (2**64 - 1, 1_795_000_000_000_000_001, text)


@pytest.mark.parametrize("text", [b"{}", b'{"time_unix_ns":-1}', b'{"time_unix_ns":"x"}', b"[]", b"", b"{"])
def test_a_frame_without_a_time(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        nanoseconds_of(text)


# Lines, and payloads that are none

lines = st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), min_size=1, max_size=40)


@given(lines, st.integers(1, 120))
def test_lines_are_packed_whole_and_in_their_order(texts: list[bytes], limit_bytes: int) -> None:
    payload = b"\n".join(texts)
    datagrams, longest_bytes = packed(payload, limit_bytes, is_lines=True)
    assert all(len(datagram) <= limit_bytes for datagram in datagrams)
    if len(payload) <= limit_bytes:
        assert datagrams == [payload]
        return
    assert longest_bytes == max(map(len, texts))
    kept = [line for line in texts if len(line) <= limit_bytes]
    assert [line for datagram in datagrams for line in datagram.split(b"\n")] == kept
    for datagram, following in pairwise(datagrams):
        assert len(datagram) + 1 + len(following.split(b"\n")[0]) > limit_bytes, "there was room"


def test_a_datagram_is_filled_to_the_last_byte() -> None:
    assert packed(b"12345\n789\nx", 9, is_lines=True) == ([b"12345\n789", b"x"], 5)
    assert packed(b"12345\n7890\nx", 9, is_lines=True) == ([b"12345", b"7890\nx"], 5)


def test_a_line_that_is_too_long_is_left_out_and_its_length_told() -> None:
    assert packed(b"ab\n" + b"x" * 20 + b"\ncd", 10, is_lines=True) == ([b"ab\ncd"], 20)
    assert packed(b"x" * 20, 10, is_lines=True) == ([], 20)


def test_a_payload_that_is_no_lines_is_one_datagram() -> None:
    payload = b"a\nb\n" * 5
    assert packed(payload, 20, is_lines=False) == ([payload], 20)
    assert packed(memoryview(payload), 19, is_lines=False) == ([], 20)
