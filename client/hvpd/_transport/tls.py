"""The client's TLS: its certificates, and the diagnosis of failed handshakes."""

import contextlib
import dataclasses
import datetime
import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from hvpd._errors import InvalidArgumentError
from hvpd._transport.address import parts

PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Tls:
    """The certificates that a client trusts and shows."""

    credentials: grpc.ChannelCredentials = dataclasses.field(repr=False)
    """The certificates for gRPC."""
    context: ssl.SSLContext = dataclasses.field(repr=False)
    """The certificates for Python's own TLS, which explains failures."""
    certified: bool
    """Whether the client has a certificate to show."""
    server_name: str | None = None
    """Name in the server's certificate; None for the host of its address."""


def encryption(
    tls: bool | None,
    ca: PathLike | None,
    cert: PathLike | None,
    key: PathLike | None,
    environment: Mapping[str, str] = os.environ,
) -> Tls | None:
    """Return the certificates to encrypt with; None for plain text.

    Args:
        tls: Whether to encrypt. None: yes if there is a CA or a certificate, here or in
            the environment.
        ca: PEM file of the CAs to trust. None for $HVPD_CA, then gRPC's own.
        cert: PEM file of the certificate to show. None for $HVPD_CERT.
        key: PEM file of its unencrypted key. None for $HVPD_KEY.
        environment: Environment variables.

    Raises:
        InvalidArgumentError: The arguments contradict each other, or a file cannot be
            used.
    """
    if tls not in (None, True, False):
        raise InvalidArgumentError(f"tls must be True, False or None, got {tls!r}", reason="INVALID_OPTION")
    if tls is False:
        if ca is not None or cert is not None or key is not None:
            raise InvalidArgumentError(
                "ca, cert and key are for TLS, and tls=False says that there is to be none: leave out tls, or ca, cert and key",
                reason="CONFLICTING_OPTIONS",
            )
        return None
    ca_file = _path("ca", ca, environment.get("HVPD_CA"))
    cert_file = _path("cert", cert, environment.get("HVPD_CERT"))
    key_file = _path("key", key, environment.get("HVPD_KEY"))
    if (cert_file is None) != (key_file is None):
        raise InvalidArgumentError(
            "cert and key ($HVPD_CERT and $HVPD_KEY) go together: give both, or none", reason="CONFLICTING_OPTIONS"
        )
    if not (tls or ca_file or cert_file):
        return None
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2"])
    if ca_file is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["h2"])
        with _named("ca", ca_file, "has no PEM certificates"):
            context.load_verify_locations(ca_file)
    if cert_file is not None and key_file is not None:
        with _named("cert", cert_file, f"and key={str(key_file)!r} are no PEM certificate and its unencrypted key"):
            context.load_cert_chain(cert_file, key_file, password="")  # So that OpenSSL asks for none.
    credentials = grpc.ssl_channel_credentials(
        *(None if file is None else file.read_bytes() for file in (ca_file, key_file, cert_file))
    )
    return Tls(credentials, context, certified=cert_file is not None)


def _path(name: str, given: object, default: str | None) -> Path | None:
    if given is None:
        return Path(default) if default else None
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise InvalidArgumentError(f"{name} must be the path of a PEM file, got {given!r}", reason="TLS_FILE")
    return Path(given)


@contextlib.contextmanager
def _named(name: str, file: Path, wrong: str) -> Iterator[None]:
    """Name the argument and the file of an error."""
    try:
        yield
    except ssl.SSLError as error:
        raise InvalidArgumentError(f"{name}={str(file)!r} {wrong} ({_reason(error)})", reason="TLS_FILE") from None
    except OSError as error:
        raise InvalidArgumentError(
            f"{name}={str(file)!r} {wrong} (cannot read it: {error.strerror})", reason="TLS_FILE"
        ) from None


def shown(address: str, tls: Tls, seconds: float) -> tuple[list[str], str] | None:
    """Return the names in a server's certificate, and when the certificate ends; None
    if Python's own TLS cannot read the certificate.

    Args:
        address: "host:port".
        tls: Certificates of this client.
        seconds: Seconds to wait for each answer.
    """
    host, port = parts(address)
    try:
        with (
            socket.create_connection((host, port), seconds) as plain,
            tls.context.wrap_socket(plain, server_hostname=tls.server_name or host) as secure,
        ):
            found: dict[str, Any] = secure.getpeercert() or {}
    except OSError:
        return None
    ends = datetime.datetime.fromtimestamp(ssl.cert_time_to_seconds(found["notAfter"]), datetime.UTC)
    return [name for _, name in found.get("subjectAltName", ())], ends.strftime("%Y-%m-%d %H:%M UTC")


def diagnose(address: str, tls: Tls | None, seconds: float) -> str | None:
    """Return why TLS fails with a server, in words; None if it does not.

    Args:
        address: "host:port".
        tls: Certificates of this client; None for plain text.
        seconds: Seconds to wait for each answer.
    """
    # A server that is about to end closes one connection in the same way, but not a
    # second one.
    return _look(address, tls, seconds) and _look(address, tls, seconds)


def _look(address: str, tls: Tls | None, seconds: float) -> str | None:
    host, port = parts(address)
    context = tls.context if tls is not None else _accepting_all()
    try:
        with (
            socket.create_connection((host, port), seconds) as plain,
            context.wrap_socket(plain, server_hostname=(tls and tls.server_name) or host) as secure,
        ):
            return _SPEAKS_TLS if tls is None else _after(secure, tls)
    except ssl.SSLError as error:
        return _explain(error, tls)
    except (OSError, ValueError):  # No server listens, or not yet. Or only a proxy can resolve the name.
        return None


def _after(secure: ssl.SSLSocket, tls: Tls) -> str | None:
    """Return why the connection ends after the handshake; None if it does not.

    A server sends its settings, unless it refuses the client's certificate. gRPC states
    no reason.
    """
    try:
        if secure.recv(1):
            return None
    except ConnectionResetError:
        pass
    return _certificate(tls, "the connection ends after the handshake")


def _certificate(tls: Tls, why: str) -> str:
    if tls.certified:
        return f"the server does not accept this client's certificate ({why}): is cert ($HVPD_CERT) of a CA that it trusts?"
    return f"the server asks for this client's certificate ({why}): connect with cert=FILE and key=FILE ($HVPD_CERT, $HVPD_KEY)"


_SPEAKS_TLS = "the server speaks TLS and this client does not: connect with tls=True, or with ca=FILE ($HVPD_CA), the CA of the server"


def _explain(error: ssl.SSLError, tls: Tls | None) -> str | None:
    alert = "ALERT" in (error.reason or "")
    if tls is None or isinstance(error, ssl.SSLEOFError):
        return _SPEAKS_TLS if tls is None and alert else None
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the server's certificate is not accepted: {error.verify_message.rstrip('.')}. Is it made out for this address, and "
            "is ca ($HVPD_CA) the CA that signed it?"
        )
    if not alert:
        return (
            f"this client speaks TLS and the server does not ({_reason(error)}): connect without tls, ca, cert and key"
        )
    return _certificate(tls, _reason(error))


def _accepting_all() -> ssl.SSLContext:
    """Return a context that accepts any certificate, to send no data."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _reason(error: ssl.SSLError) -> str:
    return error.reason.replace("_", " ").lower() if error.reason else str(error)
