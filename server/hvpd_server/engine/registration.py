"""Registration of objectives, and their deletion.

A registration reads the bundle, compiles its first programs, and only then adds the
objective to the store, with its owner. Deletion and pruning exclude this last step.
"""

import concurrent.futures
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from hvpd.v1 import objective_pb2
from hvpd_server import bundle as _admission
from hvpd_server.device.data_sources import Pending
from hvpd_server.engine.objective import Objective
from hvpd_server.engine.objectives import Objectives, registration_given_up
from hvpd_server.engine.registration_checks import Checks
from hvpd_server.errors import Code, ServiceError
from hvpd_server.scheduling.probation import OnWait
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.store.removal import Deleted, Pruned, Removal
from hvpd_server.store.store import Store
from hvpd_server.store.tenant_content import Owners

_GRACE = 30.0
"""Seconds for which a registration goes on without a caller. A client repeats a call
whose connection broke, and then finds the registration under way.
"""


class _UnderWay:
    """One call that registers a bundle."""

    def __init__(self, bundle: objective_pb2.Bundle) -> None:
        self.bundle = bundle
        self.left: float | None = None
        """When the caller gave up, on time.monotonic's clock."""

    def leave(self) -> None:
        """Note that the caller gave up."""
        if self.left is None:
            self.left = time.monotonic()


class Registration:
    """Registers objectives and deletes them.

    Args:
        store: The store.
        owners: The owners of the store's content.
        objectives: The objectives that are loaded.
        quarantine: The strikes of objectives.
        checks: Checks objectives after their registration.
        named: Called with the digest and the name of each registered objective.
    """

    def __init__(
        self,
        store: Store,
        owners: Owners,
        objectives: Objectives,
        quarantine: Quarantine,
        checks: Checks,
        named: Callable[[str, str], None],
    ) -> None:
        self._store = store
        self._owners = owners
        self._objectives = objectives
        self._quarantine = quarantine
        self._checks = checks
        self._named = named
        self._removal = Removal(store, owners, objectives.bundle, objectives.blobs_in_use)
        self._registering = threading.Lock()
        self._registrations: dict[str, list[_UnderWay]] = {}

    def validate(self, name: str, upload_bytes: Sequence[int], tenant: str) -> None:
        """Raise ServiceError if a tenant may not register a name, or store blobs of
        these sizes in bytes.
        """
        self._check_name(name, tenant)
        self._store.check_room(upload_bytes)
        self._owners.check_uploads(tenant, upload_bytes)

    def _check_name(self, name: str, tenant: str) -> None:
        if name:
            _admission.check_name(name)
            self._owners.check_name(tenant, name)

    def register(
        self,
        digest: str,
        name: str,
        x_digest: str = "",
        *,
        tenant: str = "",
        shared: bool = False,
        accept: Callable[[Objective], None] = lambda objective: None,
        on_wait: OnWait = lambda cancel: None,
    ) -> Objective:
        """Register the objective of an uploaded bundle. Start its compiles, and its
        check if there is an x.

        Args:
            digest: Digest of the bundle.
            name: Name without the tenant; or empty.
            x_digest: Digest of x; or empty.
            tenant: The tenant that registers it, and has uploaded all its parts; empty
                without tokens.
            shared: Whether other tenants may use it.
            accept: Called before anything is registered; may raise.
            on_wait: Called with a function that says that the caller gave up. It
                cancels the reading and the compiles that have not begun. `sweep` ends
                those that have.

        Raises:
            ServiceError: The bundle is not stored, is incomplete or invalid. Nothing
                was registered.
        """
        self._store.sync()
        self._check_name(name, tenant)
        if tenant and not self._owners.has_blob(tenant, digest):
            raise not_stored([digest])
        _admission.check_size(self._store.size(digest))
        bundle = _admission.parse(self._store.read(digest))
        references = {*_admission.references(bundle), *([x_digest] if tenant and x_digest else [])}
        self._check_stored(tenant, references)
        name = self._owners.full_name(tenant, name)
        self._owners.check_objective(tenant, digest, name)
        before = self._store.digest_of(name)
        with self._under_way(digest, bundle) as call:

            def on_wait_here(cancel: Callable[[], None]) -> None:
                def leave() -> None:
                    call.leave()
                    cancel()

                on_wait(leave)

            objective = self._objectives.load(digest, tenant, bundle, on_wait_here)
            accept(objective)
            self._compile_first(objective, on_wait_here)
            with self._registering, self._store.changing():
                # A blob may have been deleted meanwhile.
                self._check_stored(tenant, {digest, *references})
                if self._store.digest_of(name) not in (before, digest):
                    raise _lost_race(name, self._store.digest_of(name))
                # The owner comes first, because an objective without an owner belongs
                # to all tenants.
                self._owners.add_objective(tenant, digest, shared=shared, name=name)
                self._store.add_objective(digest, name, owned=bool(tenant))
        self._named(digest, name)
        if x_digest:
            points = functools.partial(self._objectives.lane(objective).loose_points, objective)
            self._checks.start(digest, objective.bundle, x_digest, points, name, tenant=tenant)
        return objective

    def _compile_first(self, objective: Objective, on_wait: OnWait) -> None:
        """Start the first compiles of an objective, and wait for one of them."""
        given_up = threading.Event()
        while True:
            compiles = self._objectives.lane(objective).warm(objective)

            def cancel(compiles: Sequence[Pending] = compiles) -> None:
                given_up.set()
                if not self._store.registered(objective.digest):  # Otherwise a product may wait for them.
                    for each in compiles:
                        each.cancel()

            on_wait(cancel)
            try:
                compiles[0].result()
            except concurrent.futures.CancelledError:
                if given_up.is_set():
                    raise registration_given_up() from None
                continue  # Another caller that registers the same bundle gave up.
            except ServiceError as error:
                if error.code is Code.CANCELLED and not given_up.is_set():
                    continue
                raise
            return

    def sweep(self, grace: float = _GRACE) -> None:
        """End the reading and the compiles for registrations whose callers have all
        given up, `grace` seconds ago or earlier.

        An objective of the store keeps its compiles: the next caller needs them.
        """
        latest = time.monotonic() - grace
        with self._registering:
            for digest, calls in self._registrations.items():
                if self._store.registered(digest):
                    continue
                if all(call.left is not None and call.left <= latest for call in calls):
                    self._objectives.abandon(calls[0].bundle)

    @contextlib.contextmanager
    def _under_way(self, digest: str, bundle: objective_pb2.Bundle) -> Iterator[_UnderWay]:
        """Note that an objective is being registered. Afterwards forget it, and its
        derivation, if it was not registered and no other call registers it.
        """
        call = _UnderWay(bundle)
        with self._registering:
            self._registrations.setdefault(digest, []).append(call)
        try:
            yield call
        finally:
            with self._registering:
                self._registrations[digest].remove(call)
                if not self._registrations[digest]:
                    del self._registrations[digest]
                    if not self._store.registered(digest):
                        self._objectives.forget(digest)
                        self._store.forget_derivation(digest)

    def _check_stored(self, tenant: str, digests: Iterable[str]) -> None:
        missing = sorted(each for each in digests if not self._owners.has_blob(tenant, each))
        if missing:
            raise not_stored(missing)

    def follow(self) -> None:
        """Take in the changes of other servers, and forget objectives that they have
        deleted.
        """
        self._store.sync()
        gone = [digest for digest in self._objectives.loaded() if not self._store.registered(digest)]
        if not gone:
            return
        with self._registering:
            gone = [each for each in gone if not (each in self._registrations or self._store.registered(each))]
            for digest in gone:
                self._objectives.forget(digest)
        for digest in gone:
            self._objectives.cache.forget(digest)

    def delete(self, name: str, tenant: str = "", *, expected: str = "", every_tenant: bool = False) -> Deleted:
        """Delete a name of an objective. With its last name, delete the objective and
        its points.

        Args:
            name: A name; or a digest, for all names.
            tenant: The tenant that asks.
            expected: Digest that the name must have; or empty.
            every_tenant: Whether objectives of other tenants may be deleted.

        Raises:
            ServiceError: There is no such objective, or it is not the tenant's.
        """
        with self._registering, self._store.changing():
            found = self._removal.delete(name, tenant, expected=expected, every_tenant=every_tenant or not tenant)
            if found.removed:
                self._objectives.forget(found.digest)
        if found.removed:  # Without the lock, because it lists all files.
            self._objectives.cache.forget(found.digest)
        return found

    def prune(self, tenant: str = "") -> Pruned:
        """Delete the blobs of a tenant that none of its objectives refers to."""
        with self._registering, self._store.changing():
            return self._removal.prune(tenant)

    def release(self, name: str) -> int:
        """Release an objective from quarantine. Return its number of strikes."""
        _, digest, _ = self._owners.find("", name)
        return self._quarantine.release(digest)


def _lost_race(name: str, digest: str | None) -> ServiceError:
    where = f"points at objective {digest[:12]}" if digest else "is deleted"
    return ServiceError(
        Code.ABORTED,
        "NAME_CHANGED",
        f"another call has changed the name {name!r} while this one was under way: it {where} now, and nothing was registered. "
        "Register again if the name should point at your objective.",
    )


def not_stored(digests: Sequence[str]) -> ServiceError:
    """Return the error for blobs that are missing. Blobs of other tenants give the
    same error, so that it does not reveal them.
    """
    return ServiceError(
        Code.FAILED_PRECONDITION,
        "BLOBS_MISSING",
        f"{len(digests)} blobs of the bundle are not stored: upload them first",
        {"digests": ",".join(digests)},
    )
