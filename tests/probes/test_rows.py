"""Reading at once gives what reading line by line gives, also when devices come, go, or text is damaged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.rows import RowForm, RowReader, Rows, parse_rows


def split(line: bytes) -> tuple[bytes, int] | None:
    name, colon, _ = line.partition(b":")
    return (name.strip(), len(name) + 1) if colon else None


FORM = RowForm(split=split, fields=2, knows=lambda count: count >= 2)


def shown(rows: Rows) -> dict[bytes, list[int | None]]:
    unknown = np.zeros(rows.cells.shape, dtype=np.bool_) if rows.unknown is None else rows.unknown
    return {
        name: [None if missing else int(cell) for cell, missing in zip(cells, row, strict=True)]
        for name, cells, row in zip(rows.names, rows.cells, unknown, strict=True)
    }


def test_names_numbers_and_what_is_not_known() -> None:
    text = b"heading\n a1: 1 18446744073709551615 9\n b2:3 x 9\n c: 5\n"
    assert shown(parse_rows(text, FORM)) == {b"a1": [1, 2**64 - 1], b"b2": [3, None], b"c": [None, None]}


def test_the_names_are_the_same_object_while_they_are_the_same() -> None:
    reader = RowReader(FORM)
    names = reader.parse(b"a: 1 2\nb: 3 4\n").names
    assert reader.parse(b"a: 10 20\nb: 30 40\n").names is names
    assert reader.parse(b"b: 30 40\na: 10 20\n").names == [b"b", b"a"]


TEXTS = [
    b"a: 1 2\nb: 3 4\n",
    b"a: 100 2\nb: 3 400\n",
    b"a: 1 2 9\nb: 3 4 9\n",
    b"a: 1\nb: 3 4 5\n",
    b"c: 1 2\nb: 3 4\n",
    b"a: 1 2\n",
    b"h\na: 1 2\nb: 3 4\n",
    b"a: 1 2\nb: 3 4",
    b"a: 1 18446744073709551616\nb: 3 4\n",
]


@pytest.mark.parametrize("first", TEXTS)
@pytest.mark.parametrize("second", TEXTS)
def test_what_was_learned_never_changes_the_answer(first: bytes, second: bytes) -> None:
    reader = RowReader(FORM)
    assert shown(reader.parse(first)) == shown(parse_rows(first, FORM))
    assert shown(reader.parse(second)) == shown(parse_rows(second, FORM))


@given(st.sampled_from(TEXTS), st.integers(0, 30), st.binary(max_size=4))
def test_damage_never_changes_the_answer(text: bytes, place: int, damage: bytes) -> None:
    reader = RowReader(FORM)
    reader.parse(text)
    damaged = text[:place] + damage + text[place + 1 :]
    assert shown(reader.parse(damaged)) == shown(parse_rows(damaged, FORM))
