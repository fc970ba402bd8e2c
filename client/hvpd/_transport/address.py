"""The address of a server, or of several: how it is written, and DNS."""

import ipaddress
import re
import socket

from hvpd._errors import InvalidArgumentError

DNS = "dns:///"
"""Prefix of a name whose addresses are several servers, as in gRPC's own names."""


_ENTRY = re.compile(r"(?:[\w.-]+|\[[\w.:%]+\]):[0-9]{1,5}", re.ASCII)
"""An address in a list."""


_MOST = 256
"""Most servers of one address. Each takes a connection and, at first, a thread."""


def host_of(address: object) -> str:
    """Return the host of an address.

    Raises:
        InvalidArgumentError: It is not "host:port".
    """
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    if not host or not port.isdecimal() or int(port) > 65535 or set(host) & set(" /\t\n"):
        bare = isinstance(address, str) and re.fullmatch(r"[\w.-]+:?", address)
        example = f"{str(address).rstrip(':')}:7070" if bare else "gpu-box:7070"
        range_of_ports = ", with a port from 1 to 65535" if host and port.isdecimal() and int(port) > 65535 else ""
        raise InvalidArgumentError(
            f"an address must be host:port, such as {example}{range_of_ports}, got {address!r}", reason="ADDRESS"
        )
    return host


def parts(address: str) -> tuple[str, int]:
    """Return host, without brackets, and port of a valid address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_local(host: str) -> bool:
    """Return whether a host is this machine's loopback."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_fleet(address: object) -> bool:
    """Return whether an address names several servers."""
    return isinstance(address, str) and ("," in address or address.startswith(DNS))


def listed(address: str) -> list[str]:
    """Return the addresses of a list such as "a:7070,b:7070".

    Raises:
        InvalidArgumentError: The list is malformed, or names a server twice.
    """
    found: list[str] = []
    if address.count(",") >= _MOST:
        raise InvalidArgumentError(
            f"an address can name {_MOST} servers, and this one has {address.count(',') + 1}", reason="ADDRESS"
        )
    for number, entry in enumerate(map(str.strip, address.split(",")), 1):
        wrong = ""
        if entry.startswith(DNS):
            wrong = f"is {entry!r}, and {DNS} cannot be in a list"
        elif not _ENTRY.fullmatch(entry) or int(entry.rpartition(":")[2]) > 65535:
            wrong = f"is {entry!r}" if entry else "is empty"
        elif entry in found:
            wrong = f"names {entry!r} again"
        if wrong:
            raise InvalidArgumentError(
                "addresses of several servers must be host:port, joined by commas, such as "
                f"gpu-1:7070,gpu-2:7070; number {number} of {address!r} {wrong}",
                reason="ADDRESS",
            )
        found.append(entry)
    return found


def named(address: str) -> tuple[str, str]:
    """Return host and port of "dns:///host:port".

    Raises:
        InvalidArgumentError: It is malformed.
    """
    rest = address.removeprefix(DNS)
    try:
        host = host_of(rest)
    except InvalidArgumentError:
        raise InvalidArgumentError(
            f"a name of several servers must be {DNS}host:port, such as {DNS}hvpd:7070, got {address!r}",
            reason="ADDRESS",
        ) from None
    return host, rest.rpartition(":")[2]


def resolved(address: str) -> list[str]:
    """Return the first addresses that DNS has for "dns:///host:port", sorted.

    Raises:
        InvalidArgumentError: It is malformed.
        OSError: DNS has none.
    """
    host, port = named(address)
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(str(error)) from None
    hosts = {str(entry[4][0]) for entry in found}
    return sorted(f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts)[:_MOST]
