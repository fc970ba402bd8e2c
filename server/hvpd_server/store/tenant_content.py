"""What each tenant has in a store: objectives, names and blobs. The quota on its bytes.

    STORE/owners/SHA256/blobs/DIGEST        JSON, empty: the tenant uploaded this blob
    STORE/owners/SHA256/objectives/DIGEST   JSON: the tenant registered this objective;
                                            when, and whether others may use it
    STORE/owners/SHA256/checks/DIGEST       JSON: the check of the tenant's registration

SHA256 is the digest of the tenant's name.

- Knowing a digest gives no right. A tenant has the blobs that it uploaded.
- A tenant may use the objectives that it registered, those that are shared, and those
  without an owner, which were registered when there were no tokens.
- Without tokens the tenant is empty, and may use everything.
- A damaged record belongs to no tenant, and is shared with none.
- An objective that several tenants registered is stored once. Each tenant sees its own
  registration only.
"""

import collections
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from hvpd._wire import codec
from hvpd_server.errors import Code, ServiceError
from hvpd_server.store.objects import Entry
from hvpd_server.store.store import Store

BLOCK_BYTES = 4096
"""Least bytes that a file counts, because a small file takes no less of a disk."""

MAX_RECORDS = 20_000
"""Most names and registrations of a tenant together, because each is in memory, and is
copied when another is added.
"""

MAX_BLOBS = 250_000
"""Most blobs of a tenant, because the size of each is in memory."""

_RECORDS = 3
"""Records of a registration, beside its derivation: of the tenant, of the check, and of
the store.
"""

_ARRIVING_SECONDS = 1.0
"""Seconds after which the uploads that take a tenant's room may have ended."""


class Registration(NamedTuple):
    """A tenant's registration of an objective."""

    shared: bool
    """Whether others may use the objective."""
    created: int
    """Time of the first registration, in ns since 1970."""
    own: bool = True
    """Whether time and check are the tenant's; False for records of older servers."""


class Owners:
    """The owners of everything in a store. Safe for many threads.


    Args:
        store: The store.
        limit_of: Returns the most bytes that a tenant may store; None for no limit.

    Raises:
        OSError: The records cannot be read.
    """

    def __init__(self, store: Store, limit_of: Callable[[str], int | None] = lambda tenant: None) -> None:
        self._store = store
        self._limit_of = limit_of
        self._objects = store.objects
        self._lock = threading.Lock()
        self._objectives: Mapping[str, Mapping[str, Registration]] = {}
        self._registered: dict[str, dict[str, int]] = {}  # By tenant and objective, the bytes of the records.
        self._read: dict[str, tuple[Entry, Mapping[str, Any]]] = {}  # By key.
        self._sizes: dict[str, dict[str, int]] = {}
        self._versions: dict[str, str] = {}  # By tenant: of its uploads, when the sizes were read.
        self._bytes: collections.Counter[str] = collections.Counter()  # By tenant, the sum of its blobs' sizes.
        self._arriving: dict[str, list[int]] = {}
        store.watch(self._load)
        self._load()

    def _load(self) -> None:
        """Read the registrations that are new or have changed.

        A directory that cannot be read is an error, otherwise its objectives would have
        no owner.
        """
        found: dict[str, tuple[Entry, Mapping[str, Any]]] = {}
        for folder in self._objects.folders("owners"):
            for entry in self._objects.list(f"owners/{folder}/objectives"):
                known = self._read.get(entry.key)
                if known is None or known[0].tag != entry.tag:
                    known = entry, self._store.record(entry.key)
                found[entry.key] = known
        objectives: dict[str, dict[str, Registration]] = {}
        registered: dict[str, dict[str, int]] = {}
        for key, (entry, record) in found.items():
            tenant, shared, created = (record.get(part) for part in ("tenant", "shared", "create_time_ns"))
            owners = objectives.setdefault(entry.name, {})
            if isinstance(tenant, str) and codec.digest(tenant.encode()) == key.split("/")[1]:
                one = Registration(shared is True, round(entry.modified * 1e9), own=False)
                owners[tenant] = one._replace(created=created, own=True) if isinstance(created, int) else one
                size = record.get("bytes")
                size = size if isinstance(size, int) else self._record_bytes(entry.name)
                registered.setdefault(tenant, {})[entry.name] = size
        with self._lock:
            self._read, self._objectives, self._registered = found, objectives, registered

    # Blobs

    def has_blob(self, tenant: str, digest: str) -> bool:
        """Return whether a blob is stored, and the tenant has uploaded it."""
        return not self.missing_blobs(tenant, [digest])

    def missing_blobs(self, tenant: str, digests: Iterable[str]) -> list[str]:
        """Return the digests of blobs that the tenant has not uploaded, or that are not
        stored.

        The tenant's own record comes first, so that the time of the answer does not
        depend on the uploads of others.
        """
        own = f"{_folder(tenant)}/blobs" if tenant else ""

        def has(digest: str) -> bool:
            if not codec.is_digest(digest) or (own and not self._objects.exists(f"{own}/{digest}")):
                return False
            return self._store.has(digest)

        return [digest for digest in digests if not has(digest)]

    def add_blob(self, tenant: str, digest: str) -> None:
        """Record that the tenant has uploaded a blob."""
        if tenant and not self.has_blob(tenant, digest):
            self._store.keep(f"{_folder(tenant)}/blobs/{digest}", {})
            self._uploaded(tenant)

    def _uploaded(self, tenant: str) -> None:
        """Have other servers count the tenant's blobs anew."""
        with self._lock:
            version, alone = self._objects.bump(_uploads(tenant), self._versions.get(tenant, ""))
            self._versions[tenant] = version if alone else ""

    @contextlib.contextmanager
    def adding_blob(self, tenant: str, digest: str, size_bytes: int) -> Iterator[None]:
        """Count an upload for the tenant while it arrives, and the blob after it
        succeeded.

        Each upload counts, also of a blob that the tenant has, because each is a file
        of its own until it is complete.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED: the tenant's limit is reached.
        """
        if not tenant:
            yield
            return
        with self._lock:
            sizes, arriving = self._sizes_of(tenant), self._arriving.setdefault(tenant, [])
            if not self._store.has(digest):  # A corrupt blob that was set aside no longer counts.
                self._count(tenant, digest, None)
            if len(sizes) + len(arriving) >= MAX_BLOBS:
                raise _too_many("TOO_MANY_BLOBS", tenant, "blobs", MAX_BLOBS)
            self._check_room(tenant, _charged([size_bytes]))
            arriving.append(size_bytes)
        complete = False
        try:
            yield
            self.add_blob(tenant, digest)
            complete = True
        finally:
            with self._lock:
                arriving.remove(size_bytes)
                if complete:
                    self._count(tenant, digest, size_bytes)

    def stored_bytes(self, tenant: str) -> int:
        """Return the bytes of a tenant's blobs, records and uploads under way; of all
        blobs if empty.
        """
        if not tenant:
            return _charged(map(self._store.size, self._store.blobs()))
        with self._lock:
            return self._kept_bytes(tenant) + _charged(self._arriving.get(tenant, ()))

    def _kept_bytes(self, tenant: str) -> int:
        """Return the bytes of a tenant's blobs and records."""
        self._sizes_of(tenant)
        records = sum(self._registered.get(tenant, {}).values()) + BLOCK_BYTES * self._store.count_names(tenant)
        return self._bytes[tenant] + records

    def check_uploads(self, tenant: str, sizes: Iterable[int]) -> None:
        """Raise ServiceError if a tenant may not store blobs of these sizes."""
        if tenant:
            with self._lock:
                self._check_room(tenant, _charged(sizes))

    def _check_room(self, tenant: str, more: int) -> None:
        """Raise ServiceError if a tenant may not store so many more bytes."""
        limit = self._limit_of(tenant)
        if limit is None:
            return
        stored, under_way = self._kept_bytes(tenant), _charged(self._arriving.get(tenant, ()))
        if stored + under_way + more > limit:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "TENANT_STORAGE",
                f"Tenant {tenant} has {stored} bytes stored and {under_way} bytes arriving, and {more} more exceed its limit of "
                f"{limit} bytes. Delete objectives, prune blobs that belong to none (`hvpd delete`, `hvpd prune`), or ask the "
                "operator for more.",
                {"tenant": tenant},
                retry_after=_ARRIVING_SECONDS if stored + more <= limit else None,
            )

    def _record_bytes(self, digest: str) -> int:
        """Return the bytes of the records of one registration."""
        return _RECORDS * BLOCK_BYTES + _charged([self._store.derivation_bytes(digest)])

    def _sizes_of(self, tenant: str) -> dict[str, int]:
        """Return the sizes of a tenant's blobs by digest. They are read once, and again
        after an upload or a removal at another server.
        """
        version = self._objects.version(_uploads(tenant))
        if tenant not in self._sizes or version != self._versions.get(tenant):
            self._sizes[tenant] = {digest: self._store.size(digest) for digest in self.blobs(tenant)}
            self._bytes[tenant] = _charged(self._sizes[tenant].values())
            self._versions[tenant] = version
        return self._sizes[tenant]

    def _count(self, tenant: str, digest: str, size: int | None) -> None:
        """Count a blob of a tenant; None: it is gone."""
        sizes = self._sizes_of(tenant)
        before = sizes.pop(digest, None)
        if before is not None:
            self._bytes[tenant] -= _charged([before])
        if size is not None:
            sizes[digest] = size
            self._bytes[tenant] += _charged([size])

    def blobs(self, tenant: str, older_than_seconds: float = 0.0) -> Iterator[str]:
        """Yield a tenant's blobs (all tenants' if empty) that are so old, by digest."""
        if not tenant:
            yield from self._store.blobs(older_than_seconds)
            return
        latest = time.time() - older_than_seconds
        for entry in self._objects.list(f"{_folder(tenant)}/blobs"):
            if entry.modified <= latest:
                yield entry.name

    def remove_blob(self, tenant: str, digest: str, *, stays: bool = False) -> None:
        """Remove a blob from a tenant.

        It leaves the store, unless `stays` is true or another tenant has it.
        """
        if tenant:
            self._objects.delete(f"{_folder(tenant)}/blobs/{digest}")
            with self._lock:
                self._count(tenant, digest, None)
            self._uploaded(tenant)
        others = self._objects.folders("owners")
        if not stays and not any(self._objects.exists(f"owners/{other}/blobs/{digest}") for other in others):
            self._store.remove_blob(digest)

    # Objectives

    def may_use(self, tenant: str, digest: str) -> bool:
        """Return whether an objective is the tenant's, shared, or without an owner."""
        if not tenant:
            return True
        owners = self._objectives.get(digest)
        if owners is None:  # An owner may have left since the objective was found, or its record is lost.
            return not self._store.owned(digest)
        return tenant in owners or any(each.shared for each in owners.values())

    def check_objective(self, tenant: str, digest: str, name: str) -> None:
        """Raise ServiceError if a tenant may not register an objective with a full
        name, or without one if the name is empty.
        """
        if tenant:
            with self._lock:
                self._check_objective(tenant, digest, name)

    def _check_objective(self, tenant: str, digest: str, name: str) -> None:
        registered, names = self._registered.get(tenant, {}), self._store.count_names(tenant)
        new_name = bool(name) and not self._store.has_name(name)
        records = (digest not in registered) + new_name
        if not records:
            return
        if len(registered) + names + records > MAX_RECORDS:
            raise _too_many("TOO_MANY_OBJECTIVES", tenant, "names and objectives", MAX_RECORDS)
        more = self._record_bytes(digest) if digest not in registered else 0
        self._check_room(tenant, more + BLOCK_BYTES * new_name)

    def add_objective(self, tenant: str, digest: str, *, shared: bool, name: str = "") -> None:
        """Record that the tenant registers an objective.

        An objective without an owner stays open to all tenants.

        Args:
            tenant: The tenant.
            digest: Digest of the objective.
            shared: Whether other tenants may use it.
            name: The full name that it gets next, if any.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED: the tenant has as many names and
                objectives, or bytes, as it may. Nothing was recorded.
        """
        if not tenant:
            return
        with self._store.changing(), self._lock:
            self._check_objective(tenant, digest, name)
            owners = self._objectives.get(digest)
            open_to_all = owners is None and self._store.registered(digest) and not self._store.owned(digest)
            shared = shared or open_to_all
            before = owners.get(tenant) if owners else None
            found = Registration(shared, before.created if before else time.time_ns())
            record_bytes = self._record_bytes(digest)
            if found != before:
                self._store.unsaid()
                record = {"tenant": tenant, "shared": shared, "create_time_ns": found.created, "bytes": record_bytes}
                self._store.keep(f"{_folder(tenant)}/objectives/{digest}", record)
                self._objectives = {**self._objectives, digest: {**(owners or {}), tenant: found}}
            self._registered.setdefault(tenant, {})[digest] = record_bytes

    def owners_of(self, digest: str) -> Mapping[str, Registration]:
        """Return the tenants that have registered an objective, with their
        registrations.
        """
        return self._objectives.get(digest, {})

    def told(self, tenant: str, digest: str) -> tuple[str, int | None]:
        """Return the tenant whose registration a caller sees, and the time of it.

        The caller sees its own registration, or the first that is shared with it. An
        empty tenant means the store's record, and a time of None the time on that
        record.
        """
        owners = self._objectives.get(digest)
        if not tenant or not owners:
            return "", None
        shared = sorted((each.created, name) for name, each in owners.items() if each.shared)
        whose = tenant if tenant in owners or not shared else shared[0][1]
        found = owners.get(whose)
        return ("", None) if found is None else (whose if found.own else "", found.created)

    def objectives_of(self, tenant: str) -> list[str]:
        """Return the digests of a tenant's objectives; of all objectives if empty."""
        if not tenant:
            return list(dict.fromkeys(digest for _, digest, _ in self._store.objectives()))
        # A crash may have come between the two records.
        return [digest for digest in list(self._registered.get(tenant, ())) if self._store.registered(digest)]

    def remove_objective(self, tenant: str, digest: str) -> None:
        """Remove an objective from a tenant.

        Remove it from the store before, if this is its last owner: without an owner it
        would be open to all tenants.
        """
        with self._store.changing(), self._lock:
            self._store.unsaid()
            if tenant:
                for part in ("objectives", "checks"):
                    self._objects.delete(f"{_folder(tenant)}/{part}/{digest}")
            self._registered.get(tenant, {}).pop(digest, None)
            rest = {other: each for other, each in self._objectives.get(digest, {}).items() if other != tenant}
            objectives = {other: owners for other, owners in self._objectives.items() if other != digest}
            self._objectives = {**objectives, digest: rest} if rest else objectives

    # Names

    def full_name(self, tenant: str, name: str) -> str:
        """Return the full name of a tenant's objective."""
        return f"{tenant}/{name}" if tenant and name else name

    def check_name(self, tenant: str, name: str) -> None:
        """Raise ServiceError if a new name equals a full name of another tenant that
        this one can see, because it would mistake one for the other.
        """
        owner = name.partition("/")[0]
        digest = self._store.digest_of(name)
        if tenant in ("", owner) or digest is None or owner not in self.owners_of(digest):
            return
        if self._visible(tenant, name, digest):
            raise ServiceError(
                Code.PERMISSION_DENIED,
                "NOT_YOURS",
                f"the name {name!r} belongs to tenant {owner}, and tenant {tenant} cannot change it: choose a name of your own",
            )

    def find(self, tenant: str, name: str) -> tuple[str, str, int]:
        """Find an objective that the tenant may use, as `Store.objective` does.

        The tenant's own names come first, then full names, then digests.
        """
        self._store.sync()
        shown, digest, created = self._store.objective(
            name, own=self.full_name(tenant, name), visible=functools.partial(self._visible, tenant)
        )
        return shown, digest, self.told(tenant, digest)[1] or created

    def listing(self, tenant: str) -> list[tuple[str, str, int]]:
        """List the objectives that the tenant may use, with names that it may know."""
        self._store.sync()
        every = [
            (name, digest, self.told(tenant, digest)[1] or created)
            for name, digest, created in self._store.objectives()
        ]
        named = [entry for entry in every if entry[0] and self._visible(tenant, *entry[:2])]
        seen = {digest for _, digest, _ in named}
        rest = {digest: when for _, digest, when in every if digest not in seen and self.may_use(tenant, digest)}
        return named + [("", digest, when) for digest, when in sorted(rest.items())]

    def _visible(self, tenant: str, name: str, digest: str) -> bool:
        """Return whether the tenant may know a name of an objective.

        That depends on the owner in the name. Without a name: whether it may know of
        the objective.
        """
        owners = self._objectives.get(digest)
        owner = name.partition("/")[0]
        if not tenant or not owners or owner not in owners:
            return self.may_use(tenant, digest)
        return owner == tenant or owners[owner].shared


def _folder(tenant: str) -> str:
    return f"owners/{codec.digest(tenant.encode())}"


def _uploads(tenant: str) -> str:
    """Return the key whose version changes with each blob of a tenant."""
    return f"{_folder(tenant)}/uploads"


def _too_many(reason: str, tenant: str, what: str, most: int) -> ServiceError:
    return ServiceError(
        Code.RESOURCE_EXHAUSTED,
        reason,
        f"Tenant {tenant} has {most} {what}, and may not have more. Delete objectives, or prune blobs that belong to none "
        "(`hvpd delete`, `hvpd prune`).",
        {"tenant": tenant},
    )


def _charged(sizes: Iterable[int]) -> int:
    return sum(max(size, BLOCK_BYTES) for size in sizes)
