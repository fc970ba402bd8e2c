"""Removal of objectives, and of blobs that no objective needs.

A blob can belong to several objectives and tenants. It goes with the last of them. If
the bundle of an objective cannot be read, its blobs are unknown, and nothing goes.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable

from hvpd.v1 import objective_pb2
from hvpd_server import bundle as _admission
from hvpd_server.errors import Code, ServiceError
from hvpd_server.store.store import Store
from hvpd_server.store.tenant_content import Owners

PRUNE_AGE_SECONDS = 3600.0
"""Least age in seconds of blobs to prune: those of a registration under way are
younger.
"""


@dataclasses.dataclass(frozen=True)
class Deleted:
    """The outcome of a deletion."""

    digest: str
    """Digest of the objective."""
    gone: bool
    """Whether the caller no longer has it. A tenant is not told whether others have it.
    """
    removed: bool
    """Whether it has left the store."""


@dataclasses.dataclass(frozen=True)
class Pruned:
    """The outcome of pruning."""

    count: int
    """Number of blobs that the tenant no longer has."""
    size_bytes: int
    """Their bytes."""


class Removal:
    """Removes from a store. Its methods must not run beside a registration.


    Args:
        store: The store.
        owners: The owners of its content.
        bundle: Returns the bundle of an objective; may raise ServiceError.
        in_use: Returns the digests of blobs that products read while they run.
    """

    def __init__(
        self,
        store: Store,
        owners: Owners,
        bundle: Callable[[str], objective_pb2.Bundle],
        in_use: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._store = store
        self._owners = owners
        self._bundle = bundle
        self._in_use = in_use

    def delete(self, name: str, tenant: str, *, expected: str = "", every_tenant: bool) -> Deleted:
        """Remove a name, and with the last name the objective.


        Args:
            name: As for `Owners.find`; a digest stands for all names that are the
                tenant's.
            tenant: The caller; empty without tokens.
            expected: Digest of the objective that the caller means, or empty: the name
                may point at another one by now.
            every_tenant: Whether objectives of others may be deleted, with all their
                names.

        Raises:
            ServiceError: There is no such objective, or it is not the tenant's, or the
                bundle of another objective cannot be read.
        """
        shown, digest, _ = self._find(name, tenant, every_tenant=every_tenant)
        if expected not in ("", digest):
            raise ServiceError(
                Code.NOT_FOUND,
                "OBJECTIVE_NOT_FOUND",
                f"{name!r} is the objective {digest[:12]} now, not {expected[:12]}",
            )
        by_name = name in (shown, shown.removeprefix(f"{tenant}/"))
        own = by_name and tenant and shown.startswith(f"{tenant}/")
        whose = set(self._owners.owners_of(digest))
        every = names = sorted(self._store.names_of(digest))
        if own or not every_tenant:
            names = [each for each in every if each.partition("/")[0] == tenant]
            whose &= {tenant}
            if not whose or (by_name and shown not in names):
                raise ServiceError(
                    Code.PERMISSION_DENIED,
                    "NOT_YOURS",
                    f"objective {name!r} is not tenant {tenant}'s own: its owner or the server's operator can delete it",
                )
        if by_name and len(names) > 1:
            self._store.remove_name(shown)
            return Deleted(digest, gone=False, removed=False)
        rest = {*every} - {*names} or set(self._owners.owners_of(digest)) - whose
        self._delete(digest, names, whose or {""}, gone=not rest)
        return Deleted(digest, gone=not (rest and every_tenant), removed=not rest)

    def _find(self, name: str, tenant: str, *, every_tenant: bool) -> tuple[str, str, int]:
        """Find the tenant's objective; else, if `every_tenant`, that of any tenant."""
        try:
            return self._owners.find(tenant, name)
        except ServiceError:
            if not every_tenant:
                raise
            return self._owners.find("", name)

    def _delete(self, digest: str, names: Iterable[str], whose: Collection[str], *, gone: bool) -> None:
        """Remove an objective with `names` from tenants; if `gone`, from the store."""
        parts = {digest}
        with contextlib.suppress(ServiceError):  # Its bundle is lost: its blobs can be pruned later.
            parts = self._parts(digest)
        kept = {tenant: self._kept(tenant, but=digest) for tenant in whose}
        staying = self._kept_without_owner(but=digest)
        if not gone and not set(self._owners.owners_of(digest)) - set(whose):  # It has a name without an owner.
            staying |= parts
        for name in names:
            self._store.remove_name(name)
        if gone:
            self._store.remove_objective(digest)
        for tenant in whose:
            self._owners.remove_objective(tenant, digest)
            self._give_up(tenant, parts - kept[tenant], staying)

    def prune(self, tenant: str) -> Pruned:
        """Remove a tenant's blobs that none of its objectives needs, and no product
        reads.

        An empty tenant stands for all blobs of the store.


        Raises:
            ServiceError: The bundle of an objective cannot be read.
        """
        kept = self._kept(tenant) | set(self._in_use())
        given_up = [each for each in self._owners.blobs(tenant, PRUNE_AGE_SECONDS) if each not in kept]
        size_bytes = sum(map(self._store.size, given_up))
        self._give_up(tenant, given_up, self._kept_without_owner())
        return Pruned(len(given_up), size_bytes)

    def _give_up(self, tenant: str, digests: Iterable[str], staying: Collection[str]) -> None:
        for digest in digests:
            self._owners.remove_blob(tenant, digest, stays=digest in staying)

    def _kept(self, tenant: str, but: str = "") -> set[str]:
        """Return the blobs that a tenant's objectives need; those of all if empty."""
        return {part for each in self._owners.objectives_of(tenant) if each != but for part in self._parts(each)}

    def _kept_without_owner(self, but: str = "") -> set[str]:
        """Return blobs of objectives without an owner, which no tenant would keep."""
        unowned = [each for each in self._owners.objectives_of("") if each != but and not self._owners.owners_of(each)]
        return {part for each in unowned for part in self._parts(each)}

    def _parts(self, digest: str) -> set[str]:
        """Return the blobs of an objective."""
        return {digest, *_admission.references(self._bundle(digest))}
