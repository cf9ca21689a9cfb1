"""Addresses as text: both families, mapped ones, and a cache that stays within its bound."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.addresses import CACHED_ADDRESSES, address_text


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("::1", "::1"),
        ("::", "::"),
        ("2001:db8::1:0:0:1", "2001:db8::1:0:0:1"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("::192.0.2.7", "::192.0.2.7"),
    ],
)
def test_addresses_by_hand(address: str, text: str) -> None:
    assert address_text(socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)) == text


@given(st.binary(min_size=16, max_size=16) | st.binary(min_size=4, max_size=4))
def test_text_is_that_of_the_library(packed: bytes) -> None:
    address = ipaddress.ip_address(packed)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    assert ipaddress.ip_address(address_text(packed)) == (mapped or address)


def test_the_cache_has_a_bound_and_evicts_the_least_recently_used() -> None:
    address_text.cache_clear()
    packed = [number.to_bytes(4, "big") for number in range(CACHED_ADDRESSES + 100)]
    for address in packed[:CACHED_ADDRESSES]:
        address_text(address)
    address_text(packed[0])
    assert address_text.cache_info()[:2] == (1, CACHED_ADDRESSES)  # hits, misses
    for address in packed[CACHED_ADDRESSES:]:
        address_text(address)
    info = address_text.cache_info()
    assert (info.currsize, info.misses - info.currsize) == (CACHED_ADDRESSES, 100)
    address_text(packed[0])  # was used again, so it stayed
    address_text(packed[1])  # the longest unused, so it went
    assert address_text.cache_info()[:2] == (2, info.misses + 1)
    address_text.cache_clear()


def test_families_do_not_share_entries() -> None:
    assert address_text(bytes(4)) == "0.0.0.0"
    assert address_text(bytes(16)) == "::"
