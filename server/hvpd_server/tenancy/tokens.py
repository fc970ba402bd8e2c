"""The tokens that a server accepts, with their tenants, rights, weights and limits.
`rpc.gate` checks the rights of calls.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hvpd_server.errors import Code, ServiceError
from hvpd_server.files import version
from hvpd_server.tenancy.limits import ALL_TENANTS, TenantLimits, combined
from hvpd_server.tenancy.token_file import File, Grant, digest_of, read, timestamp

_log = logging.getLogger(__name__)


class Tokens:
    """The tokens of a file.

    They are read again when the file changes. Safe for many threads.

    Args:
        path: The file.
        clock: Returns seconds since 1970.

    Raises:
        ValueError: The file cannot be used. If a later version of the file cannot be
            used, the error is logged, and the earlier tokens stay in force.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._seen = version(path)
        self._take(read(path))

    def _take(self, file: File) -> None:
        weights: dict[str, float] = {}
        for grant in file.grants:
            weights[grant.tenant] = max(grant.weight, weights.get(grant.tenant, 0.0))
        self._weights: Mapping[str, float] = weights
        general = file.limits.get(ALL_TENANTS, {})
        self._limits = {tenant: combined(own, general) for tenant, own in file.limits.items()}
        self._others = combined({}, general)
        self._grants: Mapping[str, Grant] = {grant.sha256: grant for grant in file.grants}
        _log.info("%d tokens of %d tenants are in %s", len(file.grants), len(weights), self._path)

    def refresh(self) -> None:
        """Read the file again if it changed."""
        with self._lock:
            now = version(self._path)
            if now == self._seen:
                return
            self._seen = now  # Before reading, so that a change meanwhile is seen next time.
            try:
                self._take(read(self._path))
            except ValueError as error:
                _log.error("%s; the tokens that were read before stay in force", error)

    def weight(self, tenant: str) -> float:
        """Return a tenant's weight in the queue: the largest of its tokens."""
        return self._weights.get(tenant, 1.0)

    def tenants(self) -> list[str]:
        """Return the tenants that have a token."""
        return sorted(self._weights)

    def limits(self, tenant: str) -> TenantLimits:
        """Return a tenant's limits."""
        return self._limits.get(tenant, self._others)

    def find(self, authorization: Sequence[str | bytes]) -> Grant:
        """Return the grant of the one token in a call's `authorization`.

        Raises:
            ServiceError: UNAUTHENTICATED.
        """
        if not authorization:
            raise _unauthenticated(
                "TOKEN_MISSING",
                "this server requires a token: pass connect(token=...) or set $HVPD_TOKEN; "
                "the server's operator creates tokens with `hvpd token new`",
            )
        said = authorization[0] if len(authorization) == 1 else ""
        text = said if isinstance(said, str) else said.decode("latin-1")
        scheme, _, token = text.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _unauthenticated(
                "TOKEN_MALFORMED", "expected one `authorization: Bearer TOKEN` in the call's metadata"
            )
        sha256 = digest_of(token.strip())
        if sha256 not in self._grants:
            self.refresh()  # So that a new token works at once.
        return self.current(sha256)

    def current(self, sha256: str) -> Grant:
        """Return the grant of a token, by its hash.

        Raises:
            ServiceError: UNAUTHENTICATED: the token is unknown, revoked or expired.
        """
        grant = self._grants.get(sha256)
        if grant is None:
            raise _unauthenticated(
                "TOKEN_UNKNOWN",
                "the token is not one of this server's, or was revoked: "
                "ask the server's operator for another (`hvpd token new`)",
            )
        if grant.expires is not None and grant.expires.timestamp() <= self._clock():
            raise _unauthenticated(
                "TOKEN_EXPIRED",
                f"the token of tenant {grant.tenant} was good until {timestamp(grant.expires)}: "
                "ask the server's operator for another",
            )
        return grant


def _unauthenticated(reason: str, message: str) -> ServiceError:
    return ServiceError(Code.UNAUTHENTICATED, reason, message)
