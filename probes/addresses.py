"""Addresses as text, through a cache that is bounded however many peers a host has."""

from __future__ import annotations

import socket
from functools import lru_cache

CACHED_ADDRESSES = 4096
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, an IPv4 address on an IPv6 socket


@lru_cache(maxsize=CACHED_ADDRESSES)
def address_text(packed: bytes) -> str:
    """An address of 4 or 16 bytes in network order as text; an IPv6 one that stands for an IPv4 address as that.

    `address_text.cache_info()` has hits, misses and size; misses less size were evicted, the least recently used first.
    """
    if len(packed) == 4:
        return socket.inet_ntop(socket.AF_INET, packed)
    if packed.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, packed[len(_MAPPED) :])
    return socket.inet_ntop(socket.AF_INET6, packed)
