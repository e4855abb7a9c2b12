"""Listening addresses: whether other machines can reach them, and the URL for requests from this machine."""

import ipaddress
import socket
from contextlib import suppress


def is_loopback(host: str) -> bool:
    address = _parsed(host)
    return host == "localhost" if address is None else address.is_loopback


def is_all_interfaces(host: str) -> bool:
    """Whether the host means all interfaces: valid for listening, but not as the address of a request."""
    address = _parsed(host)
    return address is not None and address.is_unspecified


def url_here(host: str, port: int) -> str:
    """The URL for requests from this machine to a program that listens on `host`."""
    address = _parsed(host)
    if address is not None and address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    with suppress(OSError):  # for 0 and 127.1, which getaddrinfo also accepts
        return ipaddress.IPv4Address(socket.inet_aton(host))
    return None  # a name
