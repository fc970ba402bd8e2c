"""The objectives that are loaded: each with its programs, on its lane.

An objective of the store is loaded when a request first needs it. Its bundle is vetted,
and its programs are compiled or come from the cache.
"""

import collections
import concurrent.futures
import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Collection, Sequence
from typing import Any

from hvpd.v1 import objective_pb2
from hvpd_server import bundle as _admission
from hvpd_server.admission.vetting import Vetter, Vetting, key_of
from hvpd_server.device.data_sources import Pending
from hvpd_server.device.executables import Built, Executables
from hvpd_server.device.memory_budget import program_bytes
from hvpd_server.device.programs import Programs
from hvpd_server.engine.lane import Lane
from hvpd_server.engine.objective import Objective
from hvpd_server.engine.program_memory import ProgramMemory
from hvpd_server.errors import Code, ServiceError
from hvpd_server.liveness import Liveness
from hvpd_server.scheduling.compile_queue import CompileQueue
from hvpd_server.scheduling.probation import OnWait
from hvpd_server.scheduling.threads import Threads
from hvpd_server.store.program_cache import ProgramCache
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.store.store import Store
from hvpd_server.store.tenant_content import Owners
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.tenancy.limits import Limits

_log = logging.getLogger(__name__)

_WARMING = 64
"""Most programs that wait to be loaded at the start. Each that was loaded stays in
memory until it is waited for.
"""


class Objectives:
    """Loads objectives, and chooses the lane of each.

    Args:
        store: The store.
        owners: The owners of the store's content.
        lanes: The lanes. If there are several devices, the last lane has them all.
        vetter: Reads and compiles programs.
        quarantine: The strikes of objectives.
        metrics: Counters.
        liveness: Shows the supervisor which programs are loaded.
        limits: Limits of compiled programs.
    """

    def __init__(
        self,
        store: Store,
        owners: Owners,
        lanes: Sequence[Lane],
        vetter: Vetter,
        quarantine: Quarantine,
        metrics: Metrics,
        liveness: Liveness,
        limits: Limits,
    ) -> None:
        self._store = store
        self._owners = owners
        self._lanes = lanes
        self._vetter = vetter
        self._vetting = Vetting(store, vetter, lanes[0].device.platform)
        self._quarantine = quarantine
        self._metrics = metrics
        self._liveness = liveness
        self._compiles = CompileQueue()
        self._objectives: dict[str, Objective] = {}
        self._lane_of: dict[str, Lane] = {}
        self._preparing: set[str] = set()
        self._preparer = Threads(1, "hvpd-prepare")
        self._alive: weakref.WeakSet[Objective] = weakref.WeakSet()  # Also unloaded ones that a product still uses.
        self._lock = threading.Lock()

        def limit_of(tenant: str) -> int | None:
            return limits.tenants(tenant).program_bytes

        self.cache = ProgramCache(store.cache, limits.cache_bytes, owners.owners_of, limit_of)
        self.memory = ProgramMemory(
            limits.program_bytes, self._every, self._pinned, self._unload, owners.owners_of, limit_of
        )

    def close(self) -> None:
        """Stop compiling."""
        self._preparer.shutdown(wait=False, cancel_futures=True)
        self._compiles.close()

    def load(
        self,
        digest: str,
        tenant: str = "",
        bundle: objective_pb2.Bundle | None = None,
        on_wait: OnWait = lambda cancel: None,
    ) -> Objective:
        """Return the objective of a stored bundle.

        Args:
            digest: Digest of the bundle.
            tenant: The tenant that reading and compiling count for; an owner if empty.
            bundle: The bundle, if the caller has read it.
            on_wait: Called with a function that cancels the reading of the bundle while
                it waits.

        Raises:
            ServiceError: The objective is in quarantine, or its bundle is lost or
                invalid.
        """
        self._quarantine.check(digest)
        with self._lock:
            found = self._objectives.get(digest)
        if found is not None:
            return found
        if bundle is None:
            bundle = self.bundle(digest)
        read = functools.partial(self._part, digest)
        compiles = self._compiles.of(tenant or next(iter(self._owners.owners_of(digest)), ""), digest)
        described = self._vetting.known(digest)
        if described is None:
            reading = compiles.submit(self._vetting.admit, digest, bundle, read)
            on_wait(functools.partial(_cancel, reading))
            described = _unless_cancelled(reading)
        with self._lock:
            lane = self._lane_of.get(digest)
            if lane is None:
                lane = self._lane_of[digest] = self._choose_lane(bundle)
                lane.expect(digest, bundle)

        def tenants() -> Collection[str]:
            """Return the owners; before the first one has registered, that one."""
            return self._owners.owners_of(digest) or ((tenant,) if tenant else ())

        loading = functools.partial(self._liveness.working, digest, compiling=True)
        forgotten = threading.Event()
        check_wanted = functools.partial(_check_wanted, digest, forgotten)
        build = Executables(
            digest,
            bundle,
            described,
            lane.device.parts,
            read,
            self._vetter,
            self.cache,
            loading,
            program_bytes(lane.device),
            check_wanted,
            lane.device.load,
            lane.device.spans_processes,
            tenants,
        )

        def build_with_room(rows: int, name: str, width: int) -> Built:
            check_wanted()
            self.memory.make_room(digest, tenants())
            return build(rows, name, width)

        def on_load(size_bytes: int) -> None:
            self.memory.added(tenants(), size_bytes)

        programs = Programs(described, lane.device, build_with_room, compiles, self._metrics.compiled, on_load)
        objective = lane.objective(digest, bundle, programs)
        objective.forgotten = forgotten
        with self._lock:
            found = self._objectives.setdefault(digest, objective)
            self._alive.add(found)
        if found is objective:
            self.memory.added(tenants(), objective.description_bytes)
        return found

    def _every(self) -> list[Objective]:
        with self._lock:
            return list(self._alive)

    def _pinned(self) -> set[str]:
        return {digest for lane in self._lanes for digest in lane.pinned()}

    def _unload(self, objective: Objective) -> None:
        """Free the memory of an objective. The next request loads it again."""
        with self._lock:
            if self._objectives.get(objective.digest) is objective:
                del self._objectives[objective.digest]
                self._metrics.unloaded()
            lane = self._lane_of.get(objective.digest)
        if lane is not None:
            lane.drop_points(objective)

    def derivation(self, digest: str) -> objective_pb2.Derivation | None:
        """Return the derivation of a stored bundle; None if this version of the server
        has not read it yet.
        """
        with self._lock:
            found = self._objectives.get(digest)
        return self._vetting.known(digest) if found is None else found.described

    def lane(self, objective: Objective) -> Lane:
        """Return the lane that serves an objective.

        Raises:
            ServiceError: The objective was deleted.
        """
        lane = self._lane_of.get(objective.digest)
        if lane is None:
            raise _deleted(objective.digest)
        return lane

    def _choose_lane(self, bundle: objective_pb2.Bundle) -> Lane:
        """Return the lane for an objective: all devices together if it is sharded, else
        the device with the least load.
        """
        if bundle.sharded:
            lane = self._lanes[-1]
            if bundle.sharded_parameters and lane.device.spans_processes:
                raise ServiceError(
                    Code.FAILED_PRECONDITION,
                    "NO_GROUP",
                    "x cannot be split over the processes of a group: register the objective with sharded=True, or at one server with "
                    "several devices",
                )
            return lane
        singles = self._lanes[:-1] or self._lanes
        return min(singles, key=lambda lane: lane.load_with(bundle))

    def bundle(self, digest: str) -> objective_pb2.Bundle:
        """Return the bundle of an objective."""
        return _admission.parse(self._part(digest, digest))

    def _part(self, objective_digest: str, digest: str) -> bytes:
        """Return a blob of an objective. If it is lost, the error tells the client to
        register the objective again.
        """
        try:
            return self._store.read(digest)
        except ServiceError as error:
            if not self._store.registered(objective_digest):
                raise
            raise ServiceError(
                Code.DATA_LOSS,
                "BLOB_CORRUPT",
                f"objective {objective_digest[:12]} has lost a part on the server's disk: register it again ({error})",
                error.metadata,
            ) from error

    def warm_all(self) -> None:
        """Compile all registered objectives, or load them from the cache, until the
        memory of programs is full. Log those that fail.
        """
        futures: collections.deque[Pending] = collections.deque()
        unloaded = 0
        known = self._store.objectives()
        for name, digest, _ in known:
            self._metrics.named(digest, name)
        for digest in dict.fromkeys(digest for _, digest, _ in known):
            if not self.memory.has_room(self._owners.owners_of(digest)):
                unloaded += 1
                continue
            try:
                objective = self.load(digest)
                futures += self.lane(objective).warm(objective)
            except Exception as error:  # noqa: BLE001 - a broken objective must not keep others from being served
                _log.error("objective %s cannot be served: %s", digest, error)
            while len(futures) > _WARMING:
                _wait_for(futures.popleft())
        for future in futures:
            _wait_for(future)
        if unloaded:
            _log.warning(
                "compiled programs fill their memory: %d objectives are loaded when they are first used", unloaded
            )

    def prepare(self, digest: str) -> None:
        """Load an objective in the background, and start to compile its programs, if it
        is not loaded and there is room. Another server may have registered it.
        """
        with self._lock:
            if digest in self._objectives or digest in self._preparing:
                return
            self._preparing.add(digest)
        with contextlib.suppress(RuntimeError):  # The server is closing.
            self._preparer.submit(self._prepare, digest)

    def _prepare(self, digest: str) -> None:
        try:
            if self.memory.has_room(self._owners.owners_of(digest)):
                objective = self.load(digest)
                self.lane(objective).warm(objective)
        except Exception as error:  # noqa: BLE001 - the client's next call gets the error
            _log.warning("objective %s cannot be loaded yet: %s", digest, error)
        finally:
            with self._lock:
                self._preparing.discard(digest)

    def loaded(self) -> list[str]:
        """Return the digests of the objectives that are loaded."""
        with self._lock:
            return list(self._objectives)

    def forget(self, digest: str) -> None:
        """Forget an objective and its lane. Drop its points, and end its compiles."""
        with self._lock:
            self._objectives.pop(digest, None)
            lane = self._lane_of.pop(digest, None)
            forgotten = [each for each in self._alive if each.digest == digest]
        if lane is not None:
            lane.forget(digest)
        for objective in forgotten:
            objective.forgotten.set()
            self.abandon(objective.bundle)

    def abandon(self, bundle: objective_pb2.Bundle) -> None:
        """End the reading and the compiles of a bundle, also those that have begun."""
        self._vetter.abandon(key_of(bundle.SerializeToString()))

    def blobs_in_use(self) -> set[str]:
        """Return the digests of the data of all resident points."""
        return {digest for lane in self._lanes for digest in lane.blobs()}


def _wait_for(future: Pending) -> None:
    try:
        future.result()
    except Exception as error:  # noqa: BLE001 - a broken program must not keep others from being served
        _log.error("a program cannot be served: %s", error)


def _cancel(future: "concurrent.futures.Future[Any]") -> None:
    future.cancel()


def _unless_cancelled(reading: "concurrent.futures.Future[objective_pb2.Derivation]") -> objective_pb2.Derivation:
    try:
        return reading.result()
    except concurrent.futures.CancelledError:
        raise registration_given_up() from None


def _check_wanted(digest: str, forgotten: threading.Event) -> None:
    if forgotten.is_set():
        raise _deleted(digest)


def _deleted(digest: str) -> ServiceError:
    return ServiceError(
        Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", f"objective {digest[:12]} was deleted meanwhile: register it again"
    )


def registration_given_up() -> ServiceError:
    """Return the error for a caller that cancelled while its registration waited."""
    return ServiceError(
        Code.CANCELLED, "CANCELLED", "the caller gave up the registration before the turn of its programs came"
    )
