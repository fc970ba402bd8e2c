"""Whose objectives, names and blobs are whose, where tokens tell tenants apart.

    STORE/owners/SHA256/blobs/DIGEST        JSON, empty: the tenant has uploaded this blob
    STORE/owners/SHA256/objectives/DIGEST   JSON: the tenant has registered this objective, when, and whether others may use it
    STORE/owners/SHA256/checks/DIGEST       JSON: what was found when the objective was checked for the tenant

SHA256 is that of the tenant's name. To know a digest gives no right to anything: a tenant has the blobs that it uploaded itself, and may use
the objectives that it registered, those that are shared, and those that nobody owns, since they were registered when there were
no tokens. Where there are none, the tenant is empty, and may use everything. Whatever cannot be read here is nobody's, and shared
with nobody. What several tenants have registered is stored once, and each is told of its own registration alone.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from hvpd import _codec
from hvpd_server._errors import Code, ServiceError
from hvpd_server._store import Store, read_record

BLOCK_BYTES = 4096
"""As much as a blob counts at least: a small file takes no less of a disk."""

_ARRIVING_SECONDS = 1.0
"""Seconds after which uploads that take a tenant's room may have ended."""


class Registration(NamedTuple):
    """A tenant's registration of an objective."""

    shared: bool
    """Whether others may use the objective."""
    created: int
    """When it was first registered, in ns since 1970."""
    own: bool = True
    """Whether its time and its check are recorded for the tenant; False for records of older servers."""


class Owners:
    """Who has what, of one store. Safe for many threads.

    Args:
        store: Whose.
        limit_of: Most bytes of blobs that a tenant may have; None: as much as there is room for.

    Raises:
        OSError: The records cannot be read.
    """

    def __init__(self, store: Store, limit_of: Callable[[str], int | None] = lambda tenant: None) -> None:
        self._store = store
        self._limit_of = limit_of
        self._root = store.root / "owners"
        self._root.mkdir(exist_ok=True)
        self._lock = threading.Lock()
        self._tenants: set[str] = set()
        self._objectives: dict[str, Mapping[str, Registration]] = {}
        self._sizes: dict[str, dict[str, int]] = {}
        self._arriving: dict[str, list[int]] = {}
        for path in self._records():
            record = read_record(path)
            tenant, shared, created = (record.get(key) for key in ("tenant", "shared", "create_time_ns"))
            owners = dict(self._objectives.get(path.name, {}))
            if isinstance(tenant, str) and _codec.digest(tenant.encode()) == path.parent.parent.name:
                found = Registration(shared is True, path.stat().st_mtime_ns, own=False)
                owners[tenant] = found._replace(created=created, own=True) if isinstance(created, int) else found
            self._objectives[path.name] = owners

    def _records(self) -> Iterator[Path]:
        """All there are of objectives. A directory that cannot be looked into is an error: what is in it would be taken for nobody's."""
        for tenant in sorted(self._root.iterdir()):
            try:
                yield from sorted((tenant / "objectives").iterdir())
            except FileNotFoundError:  # It was about to be made.
                continue

    # Blobs

    def has_blob(self, tenant: str, digest: str) -> bool:
        """Whether a blob is stored, and the tenant has uploaded it.

        The tenant's own record comes first: the time that the answer takes must not depend on what others have uploaded.
        """
        if tenant and not (_codec.is_digest(digest) and (self._path(tenant) / "blobs" / digest).exists()):
            return False
        return self._store.has(digest)

    def add_blob(self, tenant: str, digest: str) -> None:
        """Records that the tenant has uploaded a blob."""
        if tenant and not self.has_blob(tenant, digest):
            self._store.keep(self._of(tenant) / "blobs" / digest, {})

    @contextlib.contextmanager
    def adding_blob(self, tenant: str, digest: str, size_bytes: int) -> Iterator[None]:
        """Counts an upload for the tenant while it arrives, and, unless it fails, the blob from then on.

        Each upload counts, because each is a file of its own until it is complete: also one of a blob that the tenant has
        already, and each of several at once.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED: the tenant may not store so much.
        """
        if not tenant:
            yield
            return
        with self._lock:
            sizes, limit = self._sizes_of(tenant), self._limit_of(tenant)
            if not self._store.has(digest):  # It was corrupt and set aside: its bytes are not the tenant's any more.
                sizes.pop(digest, None)
            arriving = self._arriving.setdefault(tenant, [])
            stored, under_way, more = _charged(sizes.values()), _charged(arriving), _charged([size_bytes])
            if limit is not None and stored + under_way + more > limit:
                raise ServiceError(
                    Code.RESOURCE_EXHAUSTED,
                    "TENANT_STORAGE",
                    f"Tenant {tenant} has {stored} bytes stored and {under_way} bytes arriving, and {more} more exceed its limit of "
                    f"{limit} bytes. Delete objectives, prune blobs that belong to none (`hvpd delete`, `hvpd prune`), or ask the "
                    "operator for more.",
                    {"tenant": tenant},
                    retry_after=_ARRIVING_SECONDS if stored + more <= limit else None,
                )
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
                    sizes[digest] = size_bytes

    def stored_bytes(self, tenant: str) -> int:
        """Of the blobs that the tenant has, and of its uploads under way; empty: of all blobs."""
        if not tenant:
            return _charged(map(self._store.size, self._store.blobs()))
        with self._lock:
            return _charged(self._sizes_of(tenant).values()) + _charged(self._arriving.get(tenant, ()))

    def _sizes_of(self, tenant: str) -> dict[str, int]:
        """The sizes of the blobs that the tenant has, by digest; read once."""
        if tenant not in self._sizes:
            self._sizes[tenant] = {digest: self._store.size(digest) for digest in self.blobs(tenant)}
        return self._sizes[tenant]

    def blobs(self, tenant: str, older_than_seconds: float = 0.0) -> Iterator[str]:
        """The digests of what the tenant has uploaded, so long ago; empty: of all that is stored."""
        if not tenant:
            yield from self._store.blobs(older_than_seconds)
            return
        latest = time.time() - older_than_seconds
        for path in (self._of(tenant) / "blobs").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime <= latest:
                    yield path.name

    def remove_blob(self, tenant: str, digest: str, *, stays: bool = False) -> None:
        """Takes a blob from a tenant, and out of the store unless it stays, or others have it."""
        if tenant:
            (self._of(tenant) / "blobs" / digest).unlink(missing_ok=True)
            with self._lock:
                self._sizes.get(tenant, {}).pop(digest, None)
        if not stays and not any((other / "blobs" / digest).exists() for other in self._root.iterdir()):
            self._store.remove_blob(digest)

    # Objectives

    def may_use(self, tenant: str, digest: str) -> bool:
        """Whether an objective is the tenant's, or shared, or nobody's."""
        owners = self._objectives.get(digest)
        return not tenant or owners is None or tenant in owners or any(each.shared for each in owners.values())

    def add_objective(self, tenant: str, digest: str, *, shared: bool) -> None:
        """Records that the tenant registers an objective. What was nobody's so far stays everybody's."""
        if not tenant:
            return
        with self._lock:
            owners = self._objectives.get(digest)
            shared = shared or (owners is None and self._store.registered(digest))
            before = owners.get(tenant) if owners else None
            found = Registration(shared, before.created if before else time.time_ns())
            if found != before:
                record = {"tenant": tenant, "shared": shared, "create_time_ns": found.created}
                self._store.keep(self._of(tenant) / "objectives" / digest, record)
                self._objectives[digest] = {**(owners or {}), tenant: found}

    def owners_of(self, digest: str) -> Mapping[str, Registration]:
        """The tenants that have registered an objective, with their registrations."""
        return self._objectives.get(digest, {})

    def told(self, tenant: str, digest: str) -> tuple[str, int | None]:
        """Return of whose registration a tenant is told, and its time: of its own, or of the first that is shared with it.

        Empty: of what the store has on record for all. None: at the time on that record.
        """
        owners = self._objectives.get(digest)
        if not tenant or not owners:
            return "", None
        shared = sorted((each.created, name) for name, each in owners.items() if each.shared)
        whose = tenant if tenant in owners or not shared else shared[0][1]
        found = owners.get(whose)
        return ("", None) if found is None else (whose if found.own else "", found.created)

    def objectives_of(self, tenant: str) -> list[str]:
        """The digests of what the tenant has registered; empty: of all that is."""
        if not tenant:
            return list(dict.fromkeys(digest for _, digest, _ in self._store.objectives()))
        mine = [digest for digest, owners in list(self._objectives.items()) if tenant in owners]
        return [digest for digest in mine if self._store.registered(digest)]  # A crash may have come between the two.

    def remove_objective(self, tenant: str, digest: str) -> None:
        """Takes an objective from a tenant. What is nobody's then must be taken out of the store first: it would be everybody's."""
        with self._lock:
            for part in ("objectives", "checks"):
                (self._of(tenant) / part / digest).unlink(missing_ok=True)
            rest = {other: each for other, each in self._objectives.get(digest, {}).items() if other != tenant}
            if rest:
                self._objectives[digest] = rest
            else:
                self._objectives.pop(digest, None)

    # Names

    def full_name(self, tenant: str, name: str) -> str:
        """What the tenant's objective of a name is called among all tenants'."""
        return f"{tenant}/{name}" if tenant and name else name

    def find(self, tenant: str, name: str) -> tuple[str, str, int]:
        """As `Store.objective`, of what the tenant may use: its own names first, then full ones, then digests."""
        shown, digest, created = self._store.objective(
            name, own=self.full_name(tenant, name), visible=functools.partial(self._visible, tenant)
        )
        return shown, digest, self.told(tenant, digest)[1] or created

    def listing(self, tenant: str) -> list[tuple[str, str, int]]:
        """As `Store.objectives`, of what the tenant may use, and as far as it may know the names."""
        every = [
            (name, digest, self.told(tenant, digest)[1] or created)
            for name, digest, created in self._store.objectives()
        ]
        named = [entry for entry in every if entry[0] and self._visible(tenant, *entry[:2])]
        seen = {digest for _, digest, _ in named}
        rest = {digest: when for _, digest, when in every if digest not in seen and self.may_use(tenant, digest)}
        return named + [("", digest, when) for digest, when in sorted(rest.items())]

    def _visible(self, tenant: str, name: str, digest: str) -> bool:
        """Whether the tenant may know that an objective is called so: by its owner of this name; without a name, that it is there."""
        owners = self._objectives.get(digest)
        owner = name.partition("/")[0]
        if not tenant or not owners or owner not in owners:
            return self.may_use(tenant, digest)
        return owner == tenant or owners[owner].shared

    def _path(self, tenant: str) -> Path:
        return self._root / _codec.digest(tenant.encode())

    def _of(self, tenant: str) -> Path:
        """Return a tenant's directory, made if it is not there."""
        found = self._path(tenant)
        if tenant not in self._tenants:
            for part in ("blobs", "objectives", "checks"):
                (found / part).mkdir(parents=True, exist_ok=True)
            self._tenants.add(tenant)
        return found


def _charged(sizes: Iterable[int]) -> int:
    return sum(max(size, BLOCK_BYTES) for size in sizes)
