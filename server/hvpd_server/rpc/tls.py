"""The certificates that the server shows and asks for. They are read again when their
files change.
"""

import dataclasses
import logging
import ssl
import threading
from pathlib import Path

import grpc

from hvpd_server.files import Version, version

_log = logging.getLogger(__name__)

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
        ValueError: The files cannot be used. If later ones cannot be used, that is
            logged, and the ones before stay in force.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen, self._found, self._context = self._read()

    def context(self) -> ssl.SSLContext:
        """Return the TLS context for a connection that is not gRPC's.

        An object has one user, `context` or `credentials`: only the first to look sees
        a change.
        """
        self.changed()
        return self._context

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
                self._seen, self._found, self._context = self._read()
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

    def _read(self) -> "tuple[_Versions, grpc.ServerCertificateConfiguration, ssl.SSLContext]":
        """Return the files' versions, and their content for gRPC and for Python's own
        TLS.
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
        return before, found, context


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return reason.replace("_", " ").lower() if isinstance(reason, str) and reason else str(error)
