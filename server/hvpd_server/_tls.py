"""The certificates that the server shows and asks for, read again when their files change. No other part of TLS is ours."""

import dataclasses
import logging
import ssl
import threading
from pathlib import Path

import grpc

from hvpd_server._auth import version

_log = logging.getLogger(__name__)

_Version = tuple[tuple[int, int, int] | None, ...]


@dataclasses.dataclass(frozen=True)
class Files:
    """PEM files."""

    cert: Path
    """The server's certificate, then those between it and its CA."""
    key: Path
    """Its private key, unencrypted."""
    client_ca: Path | None = None
    """CAs of clients' certificates, which are asked for then."""

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.cert, self.key, *([self.client_ca] if self.client_ca is not None else []))


class Certificates:
    """What the files hold, as it is now.

    Args:
        files: Where they are.

    Raises:
        ValueError: They cannot be used. Later ones that cannot be used are logged, and those before stay in force.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen, self._first, self._context = self._read()

    def context(self) -> ssl.SSLContext:
        """For a connection that is not gRPC's, likewise. Not to be mixed with `credentials`: who looks first is told of a change."""
        self.changed()
        return self._context

    def credentials(self) -> grpc.ServerCredentials:
        """For the server's port. Each connection is shown what the files hold when it begins."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self.changed,  # type: ignore[arg-type]  # It may return None, say its docstring and its code.
            require_client_authentication=self._files.client_ca is not None,
        )

    def changed(self) -> "grpc.ServerCertificateConfiguration | None":
        """What the files hold, if that is new and can be used. gRPC calls this before each handshake; it must not raise."""
        with self._lock:
            now = self._versions()
            if now == self._seen:
                return None
            try:
                self._seen, found, self._context = self._read()
            except ValueError as error:
                self._seen = now
                _log.error("%s; connections are shown the certificate that was read before", error)
                return None
            except Exception as error:  # noqa: BLE001 - in gRPC's hands it would end all connections to come
                _log.error("certificates cannot be read again", exc_info=error)
                return None
        _log.info("the certificate of %s was read again", self._files.cert)
        return found

    def _versions(self) -> _Version:
        return tuple(map(version, self._files.all))

    def _read(self) -> "tuple[_Version, grpc.ServerCertificateConfiguration, ssl.SSLContext]":
        """Of which version the files are, and what is in them: for gRPC, and for Python's own TLS."""
        before = self._versions()  # What changes meanwhile is another version, and read with the next connection.
        try:
            content = [path.read_bytes() for path in self._files.all]
        except OSError as error:
            raise ValueError(f"cannot read {error.filename}: {error.strerror}") from None
        cert, key, *ca = content
        try:
            # Python's own TLS says what is wrong: with the key, or whether they belong together.
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._files.cert, self._files.key, password="")  # Asks nobody for one.
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
        context.num_tickets = 0  # Nobody resumes, and nothing is to come that is no answer.
        found = grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca[0] if ca else None)
        return before, found, context


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return reason.replace("_", " ").lower() if isinstance(reason, str) and reason else str(error)
