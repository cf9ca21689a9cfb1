"""Durations and sizes: text in, text out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.units import Duration, Size

LONGEST_NS = 3650 * 86_400 * 10**9


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("250ms", 250_000_000),
        ("10s", 10 * 10**9),
        ("1m", 60 * 10**9),
        ("2h", 7200 * 10**9),
        ("1d", 86_400 * 10**9),
        ("15us", 15_000),
        ("7ns", 7),
        ("0s", 0),
        ("0.1s", 100_000_000),
        ("1.5 m", 90 * 10**9),
        (" 10s ", 10 * 10**9),
        ("3650d", LONGEST_NS),
    ],
)
def test_duration_is_read(text: str, nanoseconds: int) -> None:
    duration = Duration.parse(text)
    assert duration.ns == nanoseconds
    assert duration == pytest.approx(nanoseconds / 1e9)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "10",
        "s",
        "10 parsecs",
        "-1s",
        "+1s",
        "1e3s",
        "1,5s",
        "10S",
        "1s1s",
        ".5s",
        "5.s",
        "٣s",
        "²s",
        "nan",
        "infs",
        "3651d",
        "9" * 19 + "d",
        "9" * 5000 + "s",
        10,
        1.5,
        True,
        None,
        [],
        float("inf"),
    ],
)
def test_what_is_no_duration_says_what_was_expected(value: Any) -> None:
    with pytest.raises(ValueError, match=r'^a duration such as "250ms", "10s" or "1m", 3650d at most$'):
        Duration.parse(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (10, "10s"),
        (60, "1m"),
        (90, "90s"),
        (3600, "1h"),
        (172800, "2d"),
        (0.25, "250ms"),
        (1.1, "1100ms"),
        (1.5e-05, "15us"),
        (7e-09, "7ns"),
        (1.000000001, "1000000001ns"),
    ],
)
def test_duration_is_written_in_its_largest_whole_unit(seconds: float, text: str) -> None:
    assert str(Duration(seconds)) == text


@given(st.integers(0, LONGEST_NS))
def test_duration_is_read_as_it_was_written(nanoseconds: int) -> None:
    duration = Duration(nanoseconds / 1e9)
    again = Duration.parse(str(duration))
    assert again.ns == duration.ns
    assert str(again) == str(duration)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("4MiB", 4 << 20),
        ("64KiB", 64 << 10),
        ("2GiB", 2 << 30),
        ("1kB", 1000),
        ("1KB", 1000),
        ("3MB", 3_000_000),
        ("1GB", 10**9),
        ("12B", 12),
        ("1.5 KiB", 1536),
        ("9007199254740993B", 9_007_199_254_740_993),  # 2^53 + 1, which no float64 holds
        (0, 0),
        (4096, 4096),
        (2**60, 2**60),
    ],
)
def test_size_is_read(value: Any, size: int) -> None:
    assert Size.parse(value) == size


@pytest.mark.parametrize(
    "value",
    [
        "",
        "4",
        "MiB",
        "4 parsecs",
        "-1B",
        -1,
        1.0,
        True,
        None,
        [],
        "1e3B",
        "4mib",
        "9" * 5000 + "B",
        2**60 + 1,
        "1073741825GiB",
    ],
)
def test_what_is_no_size_says_what_was_expected(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r'^a size such as "64KiB", "4MiB" or a number of bytes, 1073741824GiB at most$'
    ):
        Size.parse(value)


@given(st.integers(0, 2**60))
def test_size_is_read_as_it_was_written(size: int) -> None:
    assert Size.parse(str(Size(size))) == size
    assert Size.parse(size) == size


@given(st.one_of(st.text(), st.from_regex(r"[0-9.]{1,30} ?[a-zA-Z]{1,3}", fullmatch=True), st.integers(), st.floats()))
def test_anything_is_a_unit_or_a_value_error(value: Any) -> None:
    for kind, highest in ((Duration, LONGEST_NS / 1e9), (Size, 2**60)):
        parsed = parsed_or_reason(kind, value)
        assert parsed == kind.expected if isinstance(parsed, str) else 0 <= parsed <= highest


def parsed_or_reason(kind: type[Duration] | type[Size], value: Any) -> Duration | Size | str:
    try:
        return kind.parse(value)
    except ValueError as error:
        return str(error)
