"""Finds out why no connection to an address is possible, because gRPC does not say."""

import socket
from typing import NamedTuple

from hvpd._transport.address import is_local, parts

REFUSED = "refuses connections: is `hvpd serve` running there, on this port and this interface (--host)?"
"""The state of a port, then what to do."""


class Unreachable(NamedTuple):
    """Why no connection is possible."""

    reason: str
    """Reason of the error."""
    text: str
    """The cause, then what to do."""


def unreachable(address: str, seconds: float) -> Unreachable | None:
    """Return why an address cannot be reached; None if it can, or if that is not known.

    Args:
        address: "host:port".
        seconds: Seconds to wait for the connection.
    """
    host, port = parts(address)
    if is_proxied(host):  # Only the proxy may know the host.
        return None
    try:
        socket.create_connection((host, port), seconds).close()
    except ConnectionRefusedError:
        return Unreachable(
            reason="CONNECTION_REFUSED",
            text=f"port {port} {REFUSED}",
        )
    except (socket.gaierror, UnicodeError) as error:
        return Unreachable(reason="HOST_NOT_FOUND", text=no_address(host, error))
    except OSError:
        return None
    return None


def no_address(host: str, error: Exception) -> str:
    """Return the text that a host has no address, and what to do."""
    why = getattr(error, "strerror", None) or error
    return f"{host} has no address ({why}): check its spelling, or use an IP address"


def is_proxied(host: str) -> bool:
    """Return whether gRPC goes to the host through a proxy of the environment."""
    from urllib.request import getproxies_environment, proxy_bypass

    named = {"grpc", "https", "http"} & set(getproxies_environment())
    return bool(named) and not is_local(host) and not proxy_bypass(host)
