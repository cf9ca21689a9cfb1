"""Peers by "host:port": checking the text, connecting, and saying why that failed."""

from __future__ import annotations

import re
import socket
from ipaddress import ip_address

from agent.units import Duration


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of "host:port" or "[::1]:port"; ValueError, as settings raise it, for anything else."""
    match = re.fullmatch(r"(?:\[([^][]+)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})", address)
    if match and 1 <= int(match[3]) <= 65535 and (_is_ipv6(match[1]) if match[1] else _is_host(match[2])):
        return match[1] or match[2], int(match[3])
    raise ValueError('address: "host:port", with a port from 1 to 65535')


def connected(host: str, port: int, kind: socket.SocketKind, timeout_seconds: float) -> socket.socket:
    """A socket that is connected to the first of the host's addresses that takes it.

    Raises:
        OSError: that of the last address, or that the host has none.
    """
    # As bytes: a text would import the codec "idna", 1 MB of memory, and hosts here are ASCII.
    last: OSError | None = None
    for family, _, protocol, _, place in socket.getaddrinfo(host.encode(), port, 0, kind):
        try:
            connection = socket.socket(family, kind, protocol)
        except OSError as error:  # an address of a family that this kernel doesn't have
            last = error
            continue
        try:
            connection.settimeout(timeout_seconds)
            connection.connect(place)
            return connection
        except OSError as error:
            last = error
            connection.close()
    assert last is not None, "getaddrinfo raises where there is no address"
    raise last


def is_loopback(host: str) -> bool:
    """Whether what is sent to it stays on this host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def reason(error: OSError, timeout: Duration) -> str:
    """Why a connection failed, in a few words."""
    certificate_fault = getattr(error, "verify_message", "")
    if certificate_fault:
        return f"certificate verify failed: {certificate_fault.rstrip('.')}"
    if hasattr(error, "library"):  # an SSLError, whose module isn't imported for its name
        return f"TLS: {(getattr(error, 'reason', None) or 'connection closed').lower().replace('_', ' ')}"
    if isinstance(error, TimeoutError):
        return f"timed out after {timeout}"
    return error.strerror or str(error)


def _is_ipv6(text: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
    except OSError:
        return False
    return True


def _is_host(text: str) -> bool:
    """Whether it is a name, or an IPv4 address if it looks like one."""
    if re.fullmatch("[0-9.]+", text):
        try:
            socket.inet_pton(socket.AF_INET, text)
        except OSError:
            return False
    return len(text) <= 253 and all(1 <= len(label) <= 63 for label in text.removesuffix(".").split("."))
