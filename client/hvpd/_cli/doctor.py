"""`hvpd doctor`: finds problems between this client and a server.

Each look prints one line. A look that fails says what to do, and looks that need it are
left out.
"""

import argparse
import datetime
import os
import socket
import sys
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hvpd import _environment, _profiles
from hvpd._cli.common import connect, connection, show
from hvpd._errors import AccessError, HvpdError, InvalidArgumentError
from hvpd._transport import reach, tls
from hvpd._transport.address import DNS, is_fleet, listed, parts, resolved
from hvpd._version import __version__

if TYPE_CHECKING:
    from hvpd._client import Client

_SECONDS = 5.0
"""Seconds to wait for each answer of the network."""

_SKEW = 60.0
"""Seconds by which the clocks of two machines may differ. Tokens and certificates
expire by the server's clock.
"""

_MARKS = {True: "ok  ", False: "FAIL", None: "    "}


class Finding(NamedTuple):
    """The result of one look."""

    good: bool | None
    """None for a fact that is neither good nor bad."""
    subject: str
    text: str


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    doctor = commands.add_parser(
        "doctor",
        help="find problems between this client and a server",
        description="Look at the address, DNS, proxies, the port, TLS, versions, clocks, the token and the vector port. Exit code 0: "
        "nothing is wrong; 1: something is.",
    )
    connection(doctor)
    doctor.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    wrong = 0
    for finding in _look(arguments):
        show(f"{_MARKS[finding.good]}  {finding.subject:<12} {finding.text}", sys.stdout)
        wrong += finding.good is False
    print("nothing is wrong" if not wrong else f"{wrong} thing{'s' * (wrong > 1)} to mend")
    return 1 if wrong else 0


def _look(arguments: argparse.Namespace) -> Iterator[Finding]:
    for line in _environment.unknown(os.environ):
        yield Finding(False, "environment", line)
    try:
        address, source = _address(arguments)
    except InvalidArgumentError as error:
        yield Finding(False, "profile", str(error))
        return
    yield Finding(None, "address", f"{address}, from {source}")
    if is_fleet(address):
        yield from _look_at_fleet(arguments, address)
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        yield Finding(False, "address", f"it must be host:port, such as gpu-box:7070, got {address!r}")
        return
    if (yield from _way(*parts(address))):
        yield from _served(arguments)


def _look_at_fleet(arguments: argparse.Namespace, address: str) -> Iterator[Finding]:
    """Look at each server that an address names."""
    try:
        each = resolved(address) if address.startswith(DNS) else listed(address)
    except InvalidArgumentError as error:
        yield Finding(False, "address", str(error))
        return
    except OSError as error:
        yield Finding(False, "DNS", reach.no_address(address.removeprefix(DNS).rpartition(":")[0], error))
        return
    there = []
    for one in each:
        yield Finding(None, "server", one)
        if (yield from _way(*parts(one))):
            there.append(one)
    if there:
        yield from _served(arguments, there)


def _address(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return the address, and its origin in words."""
    from hvpd._connect import DEFAULT_ADDRESS

    chosen = _profiles.load(arguments.profile).address
    for value, source in (
        (arguments.address, "--address"),
        (os.environ.get("HVPD_ADDRESS"), "$HVPD_ADDRESS"),
        (chosen, f"the profile in {_profiles.path()}"),
    ):
        if value:
            return value, source
    return DEFAULT_ADDRESS, "no setting: the default"


def _way(host: str, port: int) -> Generator[Finding, None, bool]:
    """Look at the way to a server, and return whether gRPC may find it."""
    if reach.is_proxied(host):  # Only the proxy may know the host, and reach it.
        why = f"gRPC goes through the proxy of the environment; to avoid it, add {host} to $no_proxy"
        yield Finding(None, "proxy", why)
        return True
    yield (found := _resolved(host, port))
    if found.good is False:
        return False
    yield (reached := _reached(host, port, "port"))
    return reached.good is True


def _resolved(host: str, port: int) -> Finding:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return Finding(False, "DNS", reach.no_address(host, error))
    return Finding(True, "DNS", f"{host} is {', '.join(dict.fromkeys(str(entry[4][0]) for entry in found))}")


def _reached(host: str, port: int, subject: str) -> Finding:
    try:
        socket.create_connection((host, port), timeout=_SECONDS).close()
    except ConnectionRefusedError:
        return Finding(False, subject, f"{port} {reach.REFUSED}")
    except OSError as error:
        why = f"{port} cannot be reached within {_SECONDS:g} s ({error}): is a firewall between, or the machine down?"
        return Finding(False, subject, why)
    return Finding(True, subject, f"{port} accepts connections")


def _served(arguments: argparse.Namespace, there: Sequence[str] = ()) -> Iterator[Finding]:
    """Look at the server, or at those of several that accept connections."""
    try:
        with warnings.catch_warnings():
            if there:  # The looks say the same of each server.
                warnings.filterwarnings("ignore", ".* servers cannot be used")
            client = connect(arguments)
    except AccessError as error:
        yield Finding(False, "token", str(error))
        return
    except HvpdError as error:
        subject = {"TLS": "TLS", "PROTOCOL_MISMATCH": "versions"}.get(error.reason, "server")
        yield Finding(False, subject, str(error))
        return
    with client:
        for address, one in _each(client).items():
            if there and address in there:
                yield Finding(None, "server", address)
            if one is not None:
                for look in (_server, _tls, _clock, _token, _vectors):
                    if finding := look(one):
                        yield finding
            elif address in there:
                yield Finding(False, "server", f"{address} accepts connections, and does not answer as an hvpd server")


def _each(client: "Client") -> "dict[str, Client | None]":
    """Return a client for each server."""
    if not is_fleet(client.address):
        return {client.address: client}
    links = client._transport.each()  # noqa: SLF001 - our own
    return {address: None if link is None else type(client)(link) for address, link in links.items()}


def _server(client: "Client") -> Finding:
    server = client.server
    facts = f"hvpd {server.version} on {server.platform} ({server.device_kind}); this client is hvpd {__version__}"
    return Finding(True, "server", facts)


def _tls(client: "Client") -> Finding | None:
    """Look at the certificate, unless the connection is plain text."""
    encryption = client._transport.channel.tls  # noqa: SLF001 - our own
    if encryption is None:
        return None
    found = tls.shown(client.address, encryption, _SECONDS)
    if found is None:
        return Finding(None, "TLS", "gRPC accepts the certificate, but Python's own TLS cannot read it")
    names, ends = found
    return Finding(True, "TLS", f"certificate for {', '.join(names)}, until {ends}")


def _clock(client: "Client") -> Finding:
    if not client.server.HasField("time"):
        return Finding(None, "clock", "the server is older, and does not tell its time")
    now = datetime.datetime.now(datetime.UTC)
    skew = (client.server.time.ToDatetime(datetime.UTC) - now).total_seconds()
    if abs(skew) > _SKEW:
        direction = "ahead of" if skew > 0 else "behind"
        return Finding(False, "clock", f"the server's clock is {abs(skew):.0f} s {direction} this one: set both by NTP")
    return Finding(True, "clock", f"the clocks differ by less than {_SKEW:g} s")


def _token(client: "Client") -> Finding:
    try:
        tenant = client.usage().tenant
    except AccessError as error:
        return Finding(False, "token", str(error))
    except HvpdError as error:
        return Finding(False, "server", str(error))
    return Finding(True, "token", f"it belongs to tenant {tenant}" if tenant else "the server asks for none")


def _vectors(client: "Client") -> Finding:
    port = client.server.vector_port
    if not port:
        return Finding(None, "vector port", "the server has none, so products go over gRPC")
    if not client.address.endswith(f":{client.server.port}"):
        return Finding(None, "vector port", "not used, because the address is that of a tunnel or a proxy")
    if client._transport.by_unix_socket():  # noqa: SLF001 - our own
        return Finding(True, "vector port", "not needed on this machine: products go over the server's Unix socket")
    found = _reached(parts(client.address)[0], port, "vector port")
    if found.good:
        return found
    return Finding(None, "vector port", f"{found.text} Products go over gRPC, which takes longer.")
