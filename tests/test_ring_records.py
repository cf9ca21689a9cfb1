"""How records lie in a block, and how the whole ones are found again."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import ring_records
from agent.ring_records import (
    ALIGN,
    CHECKSUM,
    FIELDS,
    HEADER,
    MARK,
    NO_HEADER,
    Header,
    State,
    checksum,
    header_at,
    need,
    survivors,
    walk,
    whole_at,
)

INSTANCE = bytes(range(16))


def packed(number: int, payload: bytes, records: int = 1) -> bytes:
    """A record as it lies in a block, its padding included."""
    fields = FIELDS.pack(len(payload), records, number, number, 10 * number, 20 * number, INSTANCE)
    record = MARK + CHECKSUM.pack(checksum(fields, payload)) + fields + payload
    return record.ljust(need(len(payload)), b"\xaa")


def numbers(block: bytes, state: State | None = None) -> list[int]:
    return [header.number for _, header in survivors(memoryview(block), state)]


@pytest.mark.parametrize("length", range(30))
def test_a_record_takes_its_header_and_its_payload_in_eights(length: int) -> None:
    assert need(length) % ALIGN == 0
    assert 0 <= need(length) - HEADER.size - length < ALIGN


def test_a_record_and_its_header() -> None:
    block = memoryview(bytes(16) + packed(7, b"payload", 3))
    header = Header(header_at(block, 16).checksum, 7, 3, 7, 7, 70, 140, INSTANCE)
    assert whole_at(block, 16) == header_at(block, 16) == header
    assert whole_at(block, 0) is None
    assert NO_HEADER.length == 0


def test_a_record_is_whole_with_each_of_its_bits_or_not_at_all() -> None:
    record = packed(7, b"payload")
    length = HEADER.size + 7
    for bit in range(8 * length):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        assert whole_at(memoryview(damaged), 0) is None
    for stop in range(length):
        assert whole_at(memoryview(record[:stop]), 0) is None
    assert whole_at(memoryview(record[:length]), 0) is not None


def test_a_mark_occurs_in_no_text() -> None:
    with pytest.raises(UnicodeDecodeError):
        MARK.decode()
    assert len(MARK) + CHECKSUM.size + FIELDS.size == HEADER.size


def test_walk_goes_round_and_ends_at_the_first_that_is_not_whole() -> None:
    first, second, third = packed(5, b"a" * 30), packed(6, b"b" * 20), packed(7, b"c" * 9)
    block = bytearray(third + bytes(40) + first + second + b"rest")
    tail = len(third) + 40
    end = tail + len(first) + len(second)
    state = State(len(third), tail, end, 0, 3, 3, 8)
    assert [(place, header.number) for place, header in walk(memoryview(block), state)] == [
        (tail, 5),
        (tail + len(first), 6),
        (0, 7),
    ]
    block[tail + len(first) + 70] ^= 1
    assert [header.number for _, header in walk(memoryview(block), state)] == [5]
    assert list(walk(memoryview(block), state._replace(headers=0))) == []


def test_walk_does_not_take_what_an_earlier_round_left() -> None:
    block = packed(5, b"a") + packed(3, b"b") + packed(7, b"c")
    assert [header.number for _, header in walk(memoryview(block), State(headers=3, number=8, end=999))] == [5]


@pytest.mark.parametrize("start", [0, 5, (1 << 32) - 2])
def test_numbers_go_round(start: int) -> None:
    order = [(start + step) & 0xFFFF_FFFF for step in range(4)]
    block = b"".join(packed(number, b"x") for number in order[2:] + order[:2])
    one = need(1)
    state = State(2 * one, 2 * one, 4 * one, 4 * one, 4, 4, start + 4)
    assert [header.number for _, header in walk(memoryview(block), state)] == order
    assert numbers(block, state) == order


def test_survivors_are_those_that_the_state_holds_in_their_order_each_once() -> None:
    block = b"".join(packed(number, b"x" * number) for number in (8, 9, 4, 5, 9, 3, 12))
    assert numbers(block) == [3, 4, 5, 8, 9, 12]
    assert numbers(block, State(headers=5, number=10)) == [5, 8, 9]
    assert numbers(block, State(headers=0, number=10)) == []


@pytest.mark.parametrize("length", [0, 1, 7, 8, 59, 60, 61])
def test_a_block_that_is_too_short(length: int) -> None:
    assert numbers(packed(1, b"xyz")[:length]) == []


@pytest.mark.parametrize("step", [8, 64, 1 << 16])
@pytest.mark.parametrize("rest", range(9))
def test_survivors_anywhere(step: int, rest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the search goes on, and in a block that does not end with eight bytes."""
    monkeypatch.setattr(ring_records, "_SEARCHED_BYTES", step)
    noise = random.Random(step).randbytes(1 << 10)
    block = (
        noise[:80] + packed(2, b"two") + noise[:200] + packed(1, b"one") + noise + packed(3, b"three") + noise[:rest]
    )
    assert numbers(block) == [1, 2, 3]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_never_makes_a_record(data: st.DataObject) -> None:
    payloads = [bytes([number]) * length for number, length in enumerate(data.draw(st.lists(st.integers(0, 90))))]
    block = bytearray(b"".join(packed(number, payload) for number, payload in enumerate(payloads)))
    for start, content in data.draw(
        st.lists(st.tuples(st.integers(0, len(block)), st.binary(max_size=40)), max_size=4)
    ):
        block[start : start + len(content)] = content[: len(block) - start]
    found = [
        (header.number, bytes(block[place + HEADER.size : place + HEADER.size + header.length]))
        for place, header in survivors(memoryview(block), None)
    ]
    assert all(payload == payloads[number] for number, payload in found)
    assert [number for number, _ in found] == sorted({number for number, _ in found})


@pytest.mark.parametrize("kind", ["zeros", "noise", "text", "small numbers"])
def test_a_search_computes_checksums_only_where_a_record_can_be(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would take hours in a large file: what looks like a length is anywhere."""
    size = 4 << 20
    content = {
        "zeros": bytes(size),
        "noise": random.Random(1).randbytes(size),
        "text": (b'{"table":"cpu","user":0.25}\n' * size)[:size],
        "small numbers": b"".join(number.to_bytes(4, "little") for number in range(1000)) * 1000,
    }[kind]
    block = content + packed(1, b"one") + content
    looked: list[int] = []
    real = ring_records.checksum

    def counting(fields: bytes, payload: bytes) -> int:
        looked.append(len(payload))
        return real(fields, payload)

    monkeypatch.setattr(ring_records, "checksum", counting)
    assert numbers(block) == [1]
    assert len(looked) == 1
