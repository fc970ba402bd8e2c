"""The certificates that the server shows and asks for. They are read again when their
files change.
"""

import contextlib
import dataclasses
import datetime
import logging
import ssl
import threading
import time
from pathlib import Path

import grpc

from hvpd_server.files import Version, version

_log = logging.getLogger(__name__)

_WARNING_DAYS = 30
"""Days before a certificate's end from which the server warns."""

_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which the module ssl does not name."""

_Versions = tuple[Version | None, ...]


@dataclasses.dataclass(frozen=True)
class Files:
    """PEM files."""

    cert: Path
    """The server's certificate, then the certificates between it and its CA."""
    key: Path
    """Its private key, unencrypted."""
    client_ca: Path | None = None
    """CAs of clients' certificates. If there is such a file, clients must show a
    certificate.
    """

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.cert, self.key, *([self.client_ca] if self.client_ca is not None else []))


class Certificates:
    """The certificates in their files.

    Args:
        files: The files.

    Raises:
        ValueError: The files cannot be used, or the certificate has expired. If later
            ones cannot be used, that is logged, and the ones before stay in force.

    Attributes:
        expires: When the certificate ends, in seconds since 1970; None if it cannot be
            read.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen, self._found, self._context, self.expires = self._read()

    def context(self) -> ssl.SSLContext:
        """Return the TLS context for a connection that is not gRPC's.

        An object has one user, `context` or `credentials`: only the first to look sees
        a change.
        """
        self.changed()
        return self._context

    def warning(self) -> str:
        """Return the warning of a certificate that ends soon; empty if none is
        needed.
        """
        if self.expires is None or self.expires - time.time() > _WARNING_DAYS * 86400:
            return ""
        return f"the certificate of {self._files.cert} is valid until {_date(self.expires)}: renew it before"

    def warn(self) -> None:
        """Log the warning, if there is one."""
        if warning := self.warning():
            _log.warning("%s", warning)

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials of the server's port. Each connection gets what the
        files hold when it begins.
        """
        return grpc.dynamic_ssl_server_credentials(
            self._found,
            self.changed,  # type: ignore[arg-type]  # It may return None, say its docstring and its code.
            require_client_authentication=self._files.client_ca is not None,
        )

    def changed(self) -> "grpc.ServerCertificateConfiguration | None":
        """Return the files' content, if it is new and usable. gRPC calls this
        before each handshake, and it must not raise.

        With a CA of clients, return it before each handshake. gRPC then makes new keys
        for TLS sessions. With the old keys a client could resume a session, in which
        its certificate is not checked again, after the certificate has expired.
        """
        with self._lock:
            now = self._versions()
            if now == self._seen:
                return self._found if self._files.client_ca is not None else None
            try:
                self._seen, self._found, self._context, self.expires = self._read()
            except ValueError as error:
                self._seen = now
                _log.error("%s; connections are shown the certificate that was read before", error)
                return None
            except Exception as error:  # noqa: BLE001 - raised into gRPC it would end all later connections
                _log.error("certificates cannot be read again", exc_info=error)
                return None
            found = self._found
        _log.info("the certificate of %s was read again", self._files.cert)
        return found

    def _versions(self) -> _Versions:
        return tuple(map(version, self._files.all))

    def _read(self) -> "tuple[_Versions, grpc.ServerCertificateConfiguration, ssl.SSLContext, float | None]":
        """Return the files' versions, their content for gRPC and for Python's own TLS,
        and when the certificate ends.
        """
        # A file that changes meanwhile has another version: the next connection reads
        # it.
        before = self._versions()
        try:
            content = [path.read_bytes() for path in self._files.all]
        except OSError as error:
            raise ValueError(f"cannot read {error.filename}: {error.strerror}") from None
        cert, key, *ca = content
        try:
            # Python's own TLS names the key's problem, and says whether it belongs
            # to the certificate.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # The empty password keeps OpenSSL from a prompt.
            context.load_cert_chain(self._files.cert, self._files.key, password="")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._files.cert} and {self._files.key} are no PEM certificate and its unencrypted key: {_why(error)}"
            ) from None
        expires = _not_after(context, self._files.cert)
        if expires is not None and expires <= time.time():
            raise ValueError(f"the certificate of {self._files.cert} expired on {_date(expires)}: renew it")
        if ca:
            try:
                context.load_verify_locations(cadata=ca[0].decode("ascii", "replace"))
            except (OSError, ValueError) as error:
                raise ValueError(f"{self._files.client_ca} has no PEM certificates: {_why(error)}") from None
            context.verify_mode = ssl.CERT_REQUIRED
            # In TLS 1.2 a client could resume a session after its certificate expired.
            context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0  # Clients do not resume sessions, and expect nothing but answers.
        found = grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca[0] if ca else None)
        return before, found, context, expires


def _not_after(serving: ssl.SSLContext, cert: Path) -> float | None:
    """Return when a context's certificate ends, in seconds since 1970; None if it
    cannot be read.

    Only a client's side tells, after a handshake in which it trusts the certificate.
    """
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        trusting.load_verify_locations(cert)
        client = trusting.wrap_bio(back, there)
        server = serving.wrap_bio(there, back, server_side=True)
        for side in (client, server, client):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
        found = client.getpeercert()
        return float(ssl.cert_time_to_seconds(str(found["notAfter"]))) if found else None
    except (OSError, ValueError):
        return None


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return reason.replace("_", " ").lower() if isinstance(reason, str) and reason else str(error)
