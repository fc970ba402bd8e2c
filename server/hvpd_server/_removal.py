"""What is taken out of the store again: objectives, and blobs to which nothing refers any more.

A blob may belong to several objectives, and to several tenants: it goes with the last of both.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable

from hvpd.v1 import objective_pb2
from hvpd_server import _admission
from hvpd_server._errors import Code, ServiceError
from hvpd_server._owners import Owners
from hvpd_server._store import Store

PRUNE_AGE_SECONDS = 3600.0
"""Since when blobs must have been there to be pruned: an objective whose blobs are on their way is not registered yet."""


@dataclasses.dataclass(frozen=True)
class Deleted:
    """What came of a deletion."""

    digest: str
    """The objective's."""
    gone: bool
    """Whether it is out of the store."""
    freed_bytes: int


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What came of pruning."""

    count: int
    """Blobs that the tenant has not any more."""
    size_bytes: int
    """Their bytes."""
    freed_bytes: int
    """Bytes of those that nobody has any more."""


class Removal:
    """Takes out of a store. Its methods must not run while something is registered.

    Args:
        store: What is on disk.
        owners: Who has what.
        bundle: The bundle of an objective; may raise ServiceError.
    """

    def __init__(self, store: Store, owners: Owners, bundle: Callable[[str], objective_pb2.Bundle]) -> None:
        self._store = store
        self._owners = owners
        self._bundle = bundle

    def delete(self, name: str, tenant: str, *, anybodys: bool) -> Deleted:
        """Takes a name off an objective, and with the last of them the objective out of the store.

        Args:
            name: As for `Owners.find`; of a digest, all names are meant that are the tenant's.
            tenant: Who asks; empty where nobody is told apart.
            anybodys: Whether what is others' may be deleted, too, all their names with it.

        Raises:
            ServiceError: There is none, or it is not the tenant's.
        """
        shown, digest, _ = self._find(name, tenant, anybodys=anybodys)
        by_name = name in (shown, shown.removeprefix(f"{tenant}/"))
        whose = set(self._owners.owners_of(digest))
        every = names = [each for each, to, _ in self._store.objectives() if to == digest and each]
        if not anybodys:
            names = [each for each in every if each.partition("/")[0] == tenant]
            whose &= {tenant}
            if not whose or (by_name and shown not in names):
                raise ServiceError(
                    Code.PERMISSION_DENIED,
                    "NOT_YOURS",
                    f"objective {name!r} is not tenant {tenant}'s own: who registered it can delete it, and who operates the server",
                )
        if by_name and len(names) > 1:
            self._store.remove_name(shown)
            return Deleted(digest, gone=False, freed_bytes=0)
        rest = {*every} - {*names} or set(self._owners.owners_of(digest)) - whose
        return self._delete(digest, names, whose, gone=not rest)

    def _find(self, name: str, tenant: str, *, anybodys: bool) -> tuple[str, str, int]:
        """As `Owners.find`: what is the tenant's, then what is anybody's."""
        try:
            return self._owners.find(tenant, name)
        except ServiceError:
            if not anybodys:
                raise
            return self._owners.find("", name)

    def _delete(self, digest: str, names: Iterable[str], whose: Collection[str], *, gone: bool) -> Deleted:
        """Takes an objective from tenants, with these names of it; out of the store where nobody else has it."""
        parts = self._parts(digest)
        for name in names:
            self._store.remove_name(name)
        if gone:
            self._store.remove_objective(digest)
        for tenant in whose:
            self._owners.remove_objective(tenant, digest)
        freed = sum(self._give_up(tenant, parts)[1] for tenant in whose or [""])
        return Deleted(digest, gone=gone, freed_bytes=freed)

    def prune(self, tenant: str) -> Pruned:
        """Takes from a tenant what none of its objectives refers to; empty: from the store what nothing does."""
        old = list(self._owners.blobs(tenant, PRUNE_AGE_SECONDS))
        sizes = {digest: self._store.size(digest) for digest in old}
        given_up, freed = self._give_up(tenant, old)
        return Pruned(len(given_up), sum(sizes[digest] for digest in given_up), freed)

    def _give_up(self, tenant: str, digests: Iterable[str]) -> tuple[list[str], int]:
        """Takes blobs from a tenant unless its objectives refer to them. Returns them, and the bytes that this frees."""
        kept = {part for objective in self._owners.objectives_of(tenant) for part in self._parts(objective)}
        given_up = [digest for digest in digests if digest not in kept]
        unowned = [each for each in self._owners.objectives_of("") if tenant and not self._owners.owners_of(each)]
        staying = {part for objective in unowned for part in self._parts(objective)}  # They have no owner to keep them.
        freed = [self._owners.remove_blob(tenant, digest, stays=digest in staying) for digest in given_up]
        return given_up, sum(freed)

    def _parts(self, digest: str) -> set[str]:
        """The blobs of an objective, as far as its bundle can be read."""
        with contextlib.suppress(ServiceError):
            return {digest, *_admission.references(self._bundle(digest))}
        return {digest}
