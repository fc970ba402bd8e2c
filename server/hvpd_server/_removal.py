"""What is taken out of the store again: objectives, and blobs to which nothing refers any more.

A blob may belong to several objectives, and to several tenants: it goes with the last of both. Where it cannot be told what an
objective needs, since its bundle cannot be read, nothing goes.
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
    """Whether the caller has it no more: a tenant is not told whether others have it."""
    removed: bool
    """Whether it is out of the store."""


@dataclasses.dataclass(frozen=True)
class Pruned:
    """What came of pruning."""

    count: int
    """Blobs that the tenant has not any more."""
    size_bytes: int
    """Their bytes."""


class Removal:
    """Takes out of a store. Its methods must not run while something is registered.

    Args:
        store: What is on disk.
        owners: Who has what.
        bundle: The bundle of an objective; may raise ServiceError.
        in_use: The digests of blobs that are read while products run.
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

    def delete(self, name: str, tenant: str, *, expected: str = "", anybodys: bool) -> Deleted:
        """Takes a name off an objective, and with the last of them the objective out of the store.

        Args:
            name: As for `Owners.find`; of a digest, all names are meant that are the tenant's.
            tenant: Who asks; empty where nobody is told apart.
            expected: The digest of the objective that is meant, or empty; what a name points at now may be another.
            anybodys: Whether what is others' may be deleted, too, all their names with it.

        Raises:
            ServiceError: There is none, or it is not the tenant's, or the bundle of another objective cannot be read.
        """
        shown, digest, _ = self._find(name, tenant, anybodys=anybodys)
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
        if own or not anybodys:
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
            return Deleted(digest, gone=False, removed=False)
        rest = {*every} - {*names} or set(self._owners.owners_of(digest)) - whose
        self._delete(digest, names, whose or {""}, gone=not rest)
        return Deleted(digest, gone=not (rest and anybodys), removed=not rest)

    def _find(self, name: str, tenant: str, *, anybodys: bool) -> tuple[str, str, int]:
        """As `Owners.find`: what is the tenant's, then what is anybody's."""
        try:
            return self._owners.find(tenant, name)
        except ServiceError:
            if not anybodys:
                raise
            return self._owners.find("", name)

    def _delete(self, digest: str, names: Iterable[str], whose: Collection[str], *, gone: bool) -> None:
        """Takes an objective from tenants, with these names of it; out of the store where nobody else has it."""
        parts = {digest}
        with contextlib.suppress(ServiceError):  # Its bundle is lost: what belongs to it can be pruned later.
            parts = self._parts(digest)
        kept = {tenant: self._kept(tenant, but=digest) for tenant in whose}
        staying = self._kept_for_nobody(but=digest)
        if not gone and not set(self._owners.owners_of(digest)) - set(whose):  # It has a name that is nobody's.
            staying |= parts
        for name in names:
            self._store.remove_name(name)
        if gone:
            self._store.remove_objective(digest)
        for tenant in whose:
            self._owners.remove_objective(tenant, digest)
            self._give_up(tenant, parts - kept[tenant], staying)

    def prune(self, tenant: str) -> Pruned:
        """Takes from a tenant what none of its objectives refers to, and no product needs; empty: from the store what nothing does.

        Raises:
            ServiceError: The bundle of an objective cannot be read.
        """
        kept = self._kept(tenant) | set(self._in_use())
        given_up = [each for each in self._owners.blobs(tenant, PRUNE_AGE_SECONDS) if each not in kept]
        size_bytes = sum(map(self._store.size, given_up))
        self._give_up(tenant, given_up, self._kept_for_nobody())
        return Pruned(len(given_up), size_bytes)

    def _give_up(self, tenant: str, digests: Iterable[str], staying: Collection[str]) -> None:
        for digest in digests:
            self._owners.remove_blob(tenant, digest, stays=digest in staying)

    def _kept(self, tenant: str, but: str = "") -> set[str]:
        """What the objectives of a tenant refer to; empty: those of all."""
        return {part for each in self._owners.objectives_of(tenant) if each != but for part in self._parts(each)}

    def _kept_for_nobody(self, but: str = "") -> set[str]:
        """What objectives refer to that no tenant owns: they have no owner to keep it."""
        unowned = [each for each in self._owners.objectives_of("") if each != but and not self._owners.owners_of(each)]
        return {part for each in unowned for part in self._parts(each)}

    def _parts(self, digest: str) -> set[str]:
        """The blobs of an objective."""
        return {digest, *_admission.references(self._bundle(digest))}
