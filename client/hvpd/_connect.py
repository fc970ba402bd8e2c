"""Connect to a server; connect again after a pickle."""

import functools
import os
from collections.abc import Callable
from typing import Any

from hvpd import _environment, _profiles
from hvpd._client import Client
from hvpd._objective import Objective
from hvpd._progress import Progress, reporter
from hvpd._transport.credentials import Token
from hvpd._transport.fleet_transport import connected
from hvpd._transport.tls import PathLike, encryption
from hvpd._transport.transport import Transport
from hvpd._warnings import warn

DEFAULT_ADDRESS = "localhost:7070"


def connect(
    address: str | None = None,
    *,
    token: str | None = None,
    connect_timeout: float | None = None,
    retry_timeout: float = 60.0,
    timeout: float | None = None,
    priority: int = 0,
    tls: bool | None = None,
    ca: PathLike | None = None,
    cert: PathLike | None = None,
    key: PathLike | None = None,
    insecure: bool = False,
    progress: "Callable[[Progress], object] | bool | None" = None,
    profile: str | None = None,
) -> Client:
    """Connect to a server, or to several that share one store.

    Args:
        address: "host:port". None for $HVPD_ADDRESS, then localhost:7070. Several
            servers: "a:7070,b:7070,c:7070", or "dns:///name:7070" for all addresses of
            a name; see docs/how-to/several-servers.md.
        token: Token of the caller, for servers that ask for one. None for $HVPD_TOKEN.
            A call without a sufficient right raises `AccessError`.
        connect_timeout: Seconds to wait for a server at the address, for example one
            that starts. None: 10 seconds, but only one second if the port refuses
            connections or the host has no address. Of several servers, one must answer
            within this time.
        retry_timeout: Seconds for which calls are repeated while the server is away or
            overloaded.
        timeout: Seconds that one call may take; None for no limit.
        priority: Priority of this client's products, from -100 to 100. Among the
            waiting products of one tenant, higher priorities go first, and lower ones
            can wait for ever. Between tenants, which share the device fairly, it has no
            effect. A token belongs to a tenant; without tokens each connection is a
            tenant.
        tls: Whether to encrypt, and to check the server's certificate. None: yes if
            there is a ca or cert, here or in the environment.
        ca: PEM file of the CAs that may sign the server's certificate. None for
            $HVPD_CA, then gRPC's own.
        cert: PEM file of this client's certificate, for servers that ask for one. None
            for $HVPD_CERT.
        key: PEM file of its unencrypted key. None for $HVPD_KEY.
        insecure: Whether the token may go to another machine as plain text, because
            something else encrypts the connection.
        progress: Shows work that takes longer than a second: tracing, uploads,
            compiles, points, retries, checks, and results of many products. A function
            gets a `Progress` up to four times a second, in a thread of its own. True
            shows bars (`pip install 'hvpd[progress]'`), and False nothing. None shows
            bars in a terminal and in a notebook, if tqdm is installed.
        profile: Name of a profile in `~/.config/hvpd/config.toml`, which has arguments
            for this function; see docs/how-to/profiles.md. None for $HVPD_PROFILE, then
            for the profile "default" if there is one. Arguments win over environment
            variables, and these over the profile.

    Raises:
        InvalidArgumentError: An argument is not valid, or the token would go to another
            machine as plain text.
        UnavailableError: No server answers within the connect timeout. If some of
            several do not answer, there is a warning instead. With reason
            `TLS`, one answers, and client and server disagree on TLS.
        IncompatibleError: It is no hvpd server, or one of another version.
        AccessError: The server does not know the token.

    Example:
        >>> client = hvpd.connect("gpu-box:7070", token="hvpd_...", ca="ca.pem")
    """
    for line in _environment.unknown(os.environ):
        warn(line)
    chosen = _profiles.load(profile)
    address = address or os.environ.get("HVPD_ADDRESS") or chosen.address or DEFAULT_ADDRESS
    if address != chosen.address:  # The credentials of a profile are for its own server.
        chosen = _profiles.Profile()
    files = {"HVPD_CA": chosen.ca, "HVPD_CERT": chosen.cert, "HVPD_KEY": chosen.key}
    environment = {name: file for name, file in files.items() if file} | os.environ
    shown = reporter(progress)
    make = functools.partial(
        Transport,
        token=_token(token or os.environ.get("HVPD_TOKEN"), chosen),
        connect_timeout=connect_timeout,
        retry_timeout=retry_timeout,
        timeout=timeout,
        priority=priority,
        tls=encryption(chosen.tls if tls is None else tls, ca, cert, key, environment),
        insecure=insecure or chosen.insecure,
        reporter=shown,
    )
    return client_of(connected(address, make, shown))


def _token(given: str | None, chosen: _profiles.Profile) -> Token | None:
    """Return the token; that of a profile can be read again from its file."""
    if given:
        return Token(given)
    return Token(chosen.token, chosen.read_token) if chosen.token is not None else None


def client_of(transport: Transport, on_close: Callable[[], None] = lambda: None) -> Client:
    """Return the client of a transport, which pickles can connect again."""
    transport.client_again, transport.objective_again = _client_again, _objective_again
    return Client(transport, on_close)


_CLIENTS: dict[tuple[Any, ...], Client] = {}
"""Clients that pickles made, by process and settings."""


def _client_again(settings: dict[str, Any]) -> Client:
    """Return the client of a pickle. Credentials come from the environment."""
    key = (os.getpid(), *settings.items())
    found = _CLIENTS.get(key)
    if found is None or found._transport.closed:  # noqa: SLF001 - its own
        found = _CLIENTS[key] = connect(**settings)
    return found


def _objective_again(settings: dict[str, Any], digest: str) -> Objective:
    """Return the objective of a pickle."""
    return _client_again(settings).objective(digest)
