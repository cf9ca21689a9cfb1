"""What probes share: names as text, and which of them shell patterns select."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from probes.probe import CACHED_NAMES, NameFilter, as_text


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Each test starts without names, and leaves none behind."""
    as_text.cache_clear()
    yield
    as_text.cache_clear()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"", ""),
        (b"eth0", "eth0"),
        ("größe".encode(), "größe"),
        (b"e\xff\xfe2", "e\\xff\\xfe2"),
        (b"\xc3", "\\xc3"),
        (b"a\0\nb", "a\0\nb"),
    ],
)
def test_a_name_as_text(name: bytes, text: str) -> None:
    assert as_text(name) == text


def test_a_name_is_the_same_object_each_time() -> None:
    first = as_text(b"\xc3\xa4 name")
    assert as_text(b"\xc3\xa4 " + b"name") is first
    assert (as_text.cache_info().hits, as_text.cache_info().misses) == (1, 1)


def test_no_more_names_are_kept_than_it_says() -> None:
    assert as_text.cache_info().maxsize == CACHED_NAMES
    for number in range(2 * CACHED_NAMES):
        as_text(b"%d" % number)
        assert as_text.cache_info().currsize <= CACHED_NAMES
    assert as_text.cache_info().misses == 2 * CACHED_NAMES


def test_the_name_that_was_not_used_longest_is_forgotten_first() -> None:
    for number in range(CACHED_NAMES):
        as_text(b"%d" % number)
    as_text(b"0")
    assert as_text.cache_info().hits == 1
    as_text(b"one more")
    as_text(b"0")
    assert as_text.cache_info().hits == 2, "it was used a moment ago"
    misses = as_text.cache_info().misses
    as_text(b"1")
    assert as_text.cache_info().misses == misses + 1, "it had made room"


def test_patterns_select_names() -> None:
    chosen = NameFilter(("eth*", "lo"), ("eth1",))
    assert [name for name in ("lo", "eth0", "eth1", "wlan0", "xlo") if chosen.keeps(name)] == ["lo", "eth0"]
    assert not NameFilter(()).keeps("eth0")
