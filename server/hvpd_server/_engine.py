"""The server without its transport: objectives, points and products, from the store to the device and back.

A product's way: `multiply` -> `_launches` (one for each device) -> `_batcher` (queue, coalesce) -> `_kernels` (compiled programs).
A point's way: `create_point` -> `_lane` -> `_store` (data by digest) -> `_residency` (what is on the device) -> `_kernels`.
"""

import collections
import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from hvpd import _codec, _protocol
from hvpd.v1 import curvature_pb2, objective_pb2, server_pb2, tensor_pb2
from hvpd_server import _admission, _batcher, _kernels, _lane
from hvpd_server._board import Board
from hvpd_server._checks import Checks
from hvpd_server._compile_queue import CompileQueue
from hvpd_server._errors import Code, ServiceError
from hvpd_server._executables import Executables
from hvpd_server._lane import Lane
from hvpd_server._limits import Limits, Meters, no_limits
from hvpd_server._memory_budget import program_bytes
from hvpd_server._metrics import Live, Memory, Metrics
from hvpd_server._objective import OPERATORS, PRODUCT_MODES, PRODUCT_PRECISIONS, Objective, program_of
from hvpd_server._owners import Owners
from hvpd_server._point import Point, point_id
from hvpd_server._quarantine import Quarantine
from hvpd_server._removal import Deleted, Pruned, Removal
from hvpd_server._store import Store
from hvpd_server._vetting import Vetter, Vetting

_log = logging.getLogger(__name__)


class Engine:
    """Everything between the transport and the device.

    Args:
        store: What is on disk.
        devices: Where programs run.
        limits: What may be used.
        metrics: Counts.
        board: Where others see what runs.
        quarantine_after: How many times an objective may end the server before it is not served any more.
        vetter: Reads programs before they are used; one of its own where none is given.
    """

    def __init__(
        self,
        store: Store,
        devices: Sequence[_kernels.Device],
        limits: Limits,
        metrics: Metrics,
        *,
        board: Board | None = None,
        quarantine_after: int = 3,
        vetter: Vetter | None = None,
    ) -> None:
        self.store = store
        self.owners = Owners(store, lambda tenant: limits.tenants(tenant).stored_bytes)
        self._removal = Removal(store, self.owners, self.bundle, self._blobs_in_use)
        self._registering = threading.Lock()
        self._quarantine = Quarantine(store.root, quarantine_after)
        self._stack = contextlib.ExitStack()
        if vetter is None:
            vetter = self._stack.enter_context(contextlib.closing(Vetter()))
        self.vetter = vetter
        self._vetting = Vetting(store, vetter, devices[0].platform)
        self.devices = devices
        self.limits = limits
        self.metrics = metrics
        self._board = board or Board()
        self.lanes = _lane.lanes(devices, store, limits, metrics, self._board)
        self._meters = Meters(limits.tenants)
        self._compiles = CompileQueue()
        self._objectives: dict[str, Objective] = {}
        self._lane_of: dict[str, Lane] = {}
        self._objectives_lock = threading.Lock()
        self.checks = Checks(store, self._pending, metrics.checked)
        metrics.observe(self._live)

    def close(self) -> None:
        """Stops compiling, checking and reading."""
        self.checks.close()
        self._stack.close()
        for lane in self.lanes:
            lane.close()
        self._compiles.close()

    # Objectives

    def register(
        self,
        digest: str,
        name: str,
        x_digest: str = "",
        *,
        tenant: str = "",
        shared: bool = False,
        accept: Callable[[Objective], None] = lambda objective: None,
    ) -> Objective:
        """Makes an objective of an uploaded bundle and starts to compile it, and to check it at x where one came.

        Args:
            digest: Of the bundle.
            name: Without the tenant; or empty.
            x_digest: Of x; or empty.
            tenant: Who registers it, and has uploaded all of it; empty where nobody is told apart.
            shared: Whether other tenants may use it.
            accept: Called before anything is registered; may raise.

        Raises:
            ServiceError: The bundle is not stored, incomplete, or not what it must be; nothing was registered.
        """
        if name:
            _admission.check_name(name)
        if tenant and not self.owners.has_blob(tenant, digest):
            raise _not_stored([digest])
        _admission.check_size(self.store.size(digest))
        bundle = _admission.parse(self.store.read(digest))
        references = {*_admission.references(bundle), *([x_digest] if tenant and x_digest else [])}
        self._check_stored(tenant, references)
        name = self.owners.full_name(tenant, name)
        objective = self.objective(digest, tenant)
        try:
            accept(objective)
            first, *_ = self.lane(objective).warm(objective)
            first.result()
        except Exception:
            self._forget_unregistered(digest)
            raise
        with self._registering:
            self._check_stored(tenant, {digest, *references})  # Something may have been deleted meanwhile.
            self.owners.add_objective(tenant, digest, shared=shared)  # First: without an owner it would be everybody's.
            self.store.add_objective(digest, name)
        self.metrics.named(digest, name)
        if x_digest:
            points = functools.partial(self.lane(objective).loose_points, objective)
            self.checks.start(digest, objective.bundle, x_digest, points, name, tenant=tenant)
        return objective

    def _forget_unregistered(self, digest: str) -> None:
        """Forget an objective that could not be registered, and what was derived from it; unless it is registered already."""
        with self._registering:
            if not self.store.registered(digest):
                self._forget(digest)
                self.store.remove_objective(digest)

    def _forget(self, digest: str) -> None:
        with self._objectives_lock:
            objective, lane = self._objectives.pop(digest, None), self._lane_of.pop(digest, None)
        if objective is not None and lane is not None:
            lane.forget(objective)

    def _check_stored(self, tenant: str, digests: Iterable[str]) -> None:
        missing = sorted(each for each in digests if not self.owners.has_blob(tenant, each))
        if missing:
            raise _not_stored(missing)

    def _blobs_in_use(self) -> set[str]:
        return {digest for lane in self.lanes for digest in lane.blobs()}

    def delete(self, name: str, tenant: str = "", *, expected: str = "", anybodys: bool = False) -> Deleted:
        """Takes a name off an objective, and with the last of them the objective out of the store, and its points off the device.

        Args:
            name: Or a digest, for all names.
            tenant: Who asks.
            expected: The digest that is meant, or empty.
            anybodys: Whether what is others' may be deleted.

        Raises:
            ServiceError: There is none, or it is not the tenant's.
        """
        with self._registering:
            found = self._removal.delete(name, tenant, expected=expected, anybodys=anybodys or not tenant)
            if found.removed:
                self._forget(found.digest)
        return found

    def prune(self, tenant: str = "") -> Pruned:
        """Takes from a tenant the blobs that none of its objectives refers to."""
        with self._registering:
            return self._removal.prune(tenant)

    def release(self, name: str) -> int:
        """Serves an objective again that is quarantined; returns how many times it had ended the server."""
        _, digest, _ = self.owners.find("", name)
        return self._quarantine.release(digest)

    def usage(self, tenant: str = "") -> server_pb2.Usage:
        """What a tenant may use, and uses; empty: of all together, where nobody is told apart."""
        limits = self.limits.tenants(tenant)
        meter = self._meters.of(tenant)
        return server_pb2.Usage(
            tenant=tenant,
            weight=self.limits.weights(tenant),
            vectors_per_second_limit=limits.vectors_per_second,
            vectors_in_flight_limit=limits.vectors_in_flight,
            vectors_in_flight=meter.in_flight if meter is not None else 0,
            device_share_limit=limits.device_share,
            resident_bytes_limit=limits.resident_bytes,
            resident_bytes=max(lane.residency.had_bytes(tenant) for lane in self.lanes),
            stored_bytes_limit=limits.stored_bytes,
            stored_bytes=self.owners.stored_bytes(tenant),
        )

    def objective(self, digest: str, tenant: str = "") -> Objective:
        """Return the objective of a stored bundle. Reading and compiling it takes a turn of this tenant, or of its owner."""
        self._quarantine.check(digest)
        with self._objectives_lock:
            found = self._objectives.get(digest)
        if found is not None:
            return found
        bundle = self.bundle(digest)
        read = functools.partial(self._part, digest)
        compiles = self._compiles.of(tenant or next(iter(self.owners.owners_of(digest)), ""))
        described = self._vetting.known(digest)
        if described is None:
            described = compiles.submit(self._vetting.admit, digest, bundle, read).result()
        with self._objectives_lock:
            lane = self._lane_of.get(digest)
            if lane is None:
                lane = self._lane_of[digest] = self._choose_lane(bundle)
                lane.expect(bundle)
        loading = functools.partial(self._board.working, digest, compiling=True)
        build = Executables(
            digest,
            bundle,
            described,
            lane.device.parts,
            read,
            self.vetter,
            self.store.cache,
            loading,
            program_bytes(lane.device),
        )
        programs = _kernels.Programs(described, lane.device, build, compiles, self.metrics.compiled)
        with self._objectives_lock:
            return self._objectives.setdefault(digest, lane.objective(digest, bundle, programs))

    def derivation(self, digest: str) -> objective_pb2.Derivation | None:
        """Return what was derived from a stored bundle; None if this version of the server has not read it yet."""
        with self._objectives_lock:
            found = self._objectives.get(digest)
        return self._vetting.known(digest) if found is None else found.described

    def lane(self, objective: Objective) -> Lane:
        """Where an objective is served.

        Raises:
            ServiceError: It was deleted.
        """
        lane = self._lane_of.get(objective.digest)
        if lane is None:
            raise ServiceError(
                Code.NOT_FOUND, "OBJECTIVE_NOT_FOUND", f"objective {objective.digest[:12]} was deleted meanwhile"
            )
        return lane

    def _choose_lane(self, bundle: objective_pb2.Bundle) -> Lane:
        """All devices together for data that is to be split over them; else the one with least data, or where its own is already."""
        if bundle.sharded:
            return self.lanes[-1]
        singles = self.lanes[: len(self.devices)]
        return min(singles, key=lambda lane: lane.load_with(bundle))

    def _used_bytes(self) -> Mapping[str, int]:
        return sum((collections.Counter(lane.residency.used_bytes()) for lane in self.lanes), collections.Counter())

    @property
    def busy(self) -> bool:
        """Whether products are computed, or wait for that."""
        return any(lane.in_flight or lane.pending for lane in self.lanes)

    def _pending(self) -> int:
        return sum(lane.pending for lane in self.lanes)

    def _live(self) -> Live:
        """What the metrics tell of this moment."""
        asked = [lane.residency.asked() for lane in self.lanes]
        told = {f"{device.platform}:{index}": device.memory_use() for index, device in enumerate(self.devices)}
        return Live(
            resident_bytes=self._used_bytes(),
            budget_bytes=sum(lane.residency.budget_bytes for lane in self.lanes),
            hits=sum((collections.Counter(hits) for hits, _ in asked), collections.Counter()),
            misses=sum((collections.Counter(misses) for _, misses in asked), collections.Counter()),
            pending=self._pending(),
            pending_limit=self.limits.max_pending * len(self.lanes),
            in_flight=sum(lane.in_flight for lane in self.lanes),
            memory=[Memory(name, *use) for name, use in told.items() if use is not None],
        )

    def bundle(self, digest: str) -> objective_pb2.Bundle:
        """The bundle of an objective."""
        return _admission.parse(self._part(digest, digest))

    def _part(self, objective_digest: str, digest: str) -> bytes:
        """A blob of an objective. Where it is lost, who asks for the objective is told what would bring it back."""
        try:
            return self.store.read(digest)
        except ServiceError as error:
            if not self.store.registered(objective_digest):
                raise
            raise ServiceError(
                Code.DATA_LOSS,
                "BLOB_CORRUPT",
                f"objective {objective_digest[:12]} has lost a part on the server's disk: register it again ({error})",
                error.metadata,
            ) from error

    def warm_all(self) -> None:
        """Compiles all registered objectives, from the cache where they are in it; logs those that cannot be."""
        futures = []
        known = self.store.objectives()
        for name, digest, _ in known:
            self.metrics.named(digest, name)
        for digest in dict.fromkeys(digest for _, digest, _ in known):
            try:
                objective = self.objective(digest)
                futures += self.lane(objective).warm(objective)
            except Exception as error:  # noqa: BLE001 - one broken objective keeps nobody else's from being served
                _log.error("objective %s cannot be served: %s", digest, error)
        for future in futures:
            try:
                future.result()
            except Exception as error:  # noqa: BLE001 - likewise
                _log.error("a program cannot be served: %s", error)

    # Points

    def locate(
        self, spec: curvature_pb2.PointSpec, tenant: str = ""
    ) -> tuple[Objective, Sequence[tensor_pb2.Tensor], str]:
        """Objective, data and id of the point that a spec names.

        Raises:
            ServiceError: The objective is not registered, or not for this tenant; or the data does not fit it, or is not the tenant's.
        """
        digest = spec.objective_digest
        if not (self.store.registered(digest) and self.owners.may_use(tenant, digest)):
            _, digest, _ = self.owners.find(tenant, digest)  # Says why not.
        objective = self.objective(digest)
        data = objective.bundle.data if spec.default_data else spec.data
        _admission.check_data(objective.bundle, data)
        if tenant and not spec.default_data:
            registered = {tensor.digest for tensor in objective.bundle.data}
            given = {tensor.digest for tensor in data} - registered
            if missing := sorted(each for each in given if not self.owners.has_blob(tenant, each)):
                raise _not_stored(missing)
        return objective, data, point_id(objective.digest, data, spec.x_digest)

    def find_point(self, spec: curvature_pb2.PointSpec, tenant: str = "") -> Point | None:
        """The point, where it is resident, and the tenant has shown that it has its x."""
        objective, _, identity = self.locate(spec, tenant)
        found: Point | None = self.lane(objective).residency.get(identity, tenant)
        if found is not None:
            self.metrics.found()
        return found

    def moved(
        self,
        spec: curvature_pb2.PointSpec,
        move: curvature_pb2.Move,
        direction: _codec.Array | None = None,
        tenant: str = "",
    ) -> _codec.Array | None:
        """The x of a point that is a step from another, in the host's memory; None where that is not resident.

        Args:
            spec: Of the new point.
            move: How it comes about.
            direction: Where it just came; else it must be here.
            tenant: Whose the other point and the direction are.

        Raises:
            ServiceError: NOT_FOUND with reason DIRECTION_NOT_RESIDENT: the direction is wanted.
        """
        objective, _, _ = self.locate(spec, tenant)
        residency = self.lane(objective).residency
        base: Point | None = residency.get(move.base_id, tenant)
        if base is None or base.objective is not objective:
            return None
        if direction is None:
            direction = residency.get(("direction", tenant, move.direction_digest))
        if direction is None or direction.dtype != objective.dtype or direction.size != objective.n:
            raise ServiceError(Code.NOT_FOUND, "DIRECTION_NOT_RESIDENT", "the direction is not here: send it")
        with np.errstate(all="ignore"):  # What is not finite is counted, and told.
            x: _codec.Array = direction * objective.dtype.type(move.alpha)
            x += _kernels.host(base.x)
        return x

    def keep_direction(
        self, spec: curvature_pb2.PointSpec, digest: str, direction: _codec.Array, tenant: str = ""
    ) -> None:
        """Keeps the direction of a move, for the steps along it that follow."""
        if _codec.digest(_codec.payload(direction)) != digest:
            raise ServiceError(
                Code.INVALID_ARGUMENT, "DIGEST_MISMATCH", "the direction does not have its digest: send it again"
            )
        residency = self.lane(self.locate(spec, tenant)[0]).residency
        key = "direction", tenant, digest
        with contextlib.suppress(ServiceError):  # Where there is no room, it serves this one step.
            residency.check_user(tenant, direction.nbytes, "a direction")
            residency.put(key, "direction", direction, direction.nbytes)
            residency.join(key, tenant)

    def pin(self, point: Point, seconds: int, tenant: str = "") -> None:
        """Keeps a point on the device until it has not been used for so long; for a week at most."""
        self.lane(point.objective).residency.pin(point.id, min(seconds, _protocol.MAX_PIN_SECONDS), tenant)

    def create_point(self, spec: curvature_pb2.PointSpec, x: _codec.Array, tenant: str = "") -> Point:
        """Makes a point resident: x and its data on the device, value and gradient computed."""
        objective, data, identity = self.locate(spec, tenant)
        if _codec.digest(_codec.payload(x)) != spec.x_digest:
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "DIGEST_MISMATCH",
                "x does not have the digest that the spec gives: send it again",
            )
        with self._metered(tenant, 1) as charge:
            point = self.lane(objective).create_point(objective, data, identity, x, tenant)
            charge(point.seconds)
        return point

    # Products

    def resident(self, spec: curvature_pb2.ProductSpec, tenant: str = "") -> Point:
        """The point of a product, whose request is checked as far as it can be without its vectors.

        Raises:
            ServiceError: NOT_FOUND with reason POINT_NOT_RESIDENT, or the request is malformed.
        """
        if spec.operator not in OPERATORS:
            raise ServiceError(
                Code.INVALID_ARGUMENT, "UNKNOWN_OPERATOR", f"this server has no operator {spec.operator}: upgrade it"
            )
        point = self.point(spec.point_id, tenant)
        objective = point.objective
        if not 0 <= spec.block <= len(objective.bundle.blocks) or (spec.block and spec.leaves):
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "UNKNOWN_BLOCK",
                f"objective {objective.digest[:12]} has {len(objective.bundle.blocks)} blocks, got {spec.block}",
            )
        if spec.mode or spec.precision:
            _check_choices(spec, objective)
        program = program_of(spec, objective.bundle)
        objective.columns(program)
        if OPERATORS[spec.operator] not in objective.described.programs:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "NO_SUCH_OPERATOR",
                f"objective {objective.digest[:12]} has no {OPERATORS[spec.operator]}: "
                "register hvpd.composite(model, loss), for Fisher with a distribution",
            )
        if not 1 <= spec.k <= self.limits.max_block_width:
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "BLOCK_WIDTH",
                f"a product has 1 to {self.limits.max_block_width} vectors, got {spec.k}: send wider blocks as several",
            )
        if abs(spec.priority) > _protocol.MAX_PRIORITY:
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "PRIORITY",
                f"a priority is from -{_protocol.MAX_PRIORITY} to {_protocol.MAX_PRIORITY}, got {spec.priority}",
            )
        return point

    def point(self, identity: str, tenant: str = "") -> Point:
        """A point that is resident, and the tenant's.

        Raises:
            ServiceError: NOT_FOUND with reason POINT_NOT_RESIDENT.
        """
        for lane in self.lanes:
            found: Point | None = lane.residency.get(identity, tenant)
            if found is not None and self.owners.may_use(tenant, found.objective.digest):
                return found
        raise ServiceError(
            Code.NOT_FOUND,
            "POINT_NOT_RESIDENT",
            f"point {identity[:12]} is not on the device (evicted, or the server restarted): create it again and repeat",
        )

    def factors(self, identity: str, seed: int | None, tenant: str = "") -> list[_codec.Array]:
        """The Kronecker factors A_0, G_0, A_1, ... of the dense layers at a point, in the host's memory.

        Args:
            identity: The point's.
            seed: Of targets that are drawn; None: from the loss's Hessian.

        Raises:
            ServiceError: As for `resident`.
        """
        point = self.point(identity, tenant)
        program = "kfac" if seed is None else "sampled_kfac"
        if program not in point.objective.described.programs:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "NO_SUCH_OPERATOR",
                f"objective {point.objective.digest[:12]} has no {program}: register "
                "hvpd.composite(model, loss) with a model of dense layers, with a distribution where targets are to be drawn",
            )
        with self._metered(tenant, 1) as charge:
            found, seconds = self.lane(point.objective).factors(point, program, seed)
            charge(seconds)
        return found

    def multiply(
        self,
        point: Point,
        program: str,
        vectors: _codec.Array,
        *,
        seed: int = 0,
        tenant: str = "",
        priority: int = 0,
        deadline: float = float("inf"),
        on_queue: Callable[[Callable[[], None]], object] = lambda cancel: None,
    ) -> tuple[_codec.Array, curvature_pb2.ProductInfo]:
        """V[k,n] -> HV[k,n], coalesced with whatever else waits for the same point.

        Args:
            program: Of `program_of`.
            seed: Of operators that are drawn.
            tenant: Who asks: the device is shared fairly between tenants.
            priority: Among what this tenant has waiting, the higher goes first.
            deadline: On time.monotonic's clock.
            on_queue: Given a function that cancels the product while it waits.
        """
        job = _batcher.Job((point, program, seed), vectors, tenant, deadline, priority)
        launches = self.lane(point.objective).launches
        if self.limits.tenants is no_limits or not self.limits.tenants(tenant):  # As mostly: nothing is to be counted.
            return launches.multiply(job, on_queue)
        with self._metered(tenant, len(vectors)) as charge:
            answer = launches.multiply(job, on_queue)
            charge(job.device_seconds)
        return answer

    def settle(self) -> None:
        """For whoever has answered a product, and has time now: notes what was left of it."""
        for lane in self.lanes:
            lane.launches.settle()

    @contextlib.contextmanager
    def _metered(self, tenant: str, columns: int) -> Iterator[Callable[[float], None]]:
        """Counts vectors against the limits of a tenant, and the seconds of device time that the function is given.

        Raises:
            ServiceError: The tenant has used up what it may.
        """
        meter = self._meters.of(tenant)
        if meter is None:
            yield lambda seconds: None
            return
        meter.begin(columns)
        used: list[float] = []
        try:
            yield used.append
        finally:
            meter.end(columns, sum(used), answered=bool(used))

    def choices(self, digest: str, tenant: str = "") -> objective_pb2.GetPlanResponse:
        """What multiplies blocks of which width."""
        _, digest, _ = self.owners.find(tenant, digest)
        objective = self.objective(digest)
        kernels = objective.kernels
        widths = sorted({width for name in ("hvp", "apply") for width in kernels.widths(name)})
        return objective_pb2.GetPlanResponse(
            choices=[objective.plan.choose(width) for width in widths],
            residual_bytes=objective.residual_bytes,
            compiles=kernels.compiles(),
        )


def _check_choices(spec: curvature_pb2.ProductSpec, objective: Objective) -> None:
    """Raise ServiceError unless the mode and the precision that a product asks for can be had."""
    if spec.precision not in ("", *PRODUCT_PRECISIONS):
        raise ServiceError(
            Code.INVALID_ARGUMENT,
            "UNKNOWN_PRECISION",
            f"a product's precision is one of {', '.join(PRODUCT_PRECISIONS)}, got {spec.precision[:40]!r}",
        )
    if not spec.mode or spec.mode == objective.bundle.mode:
        return
    if spec.mode not in PRODUCT_MODES:
        raise ServiceError(
            Code.INVALID_ARGUMENT,
            "UNKNOWN_MODE",
            f"a product's mode is one of {', '.join(PRODUCT_MODES)}, got {spec.mode[:40]!r}",
        )
    if spec.operator != curvature_pb2.OPERATOR_HESSIAN:
        raise ServiceError(
            Code.INVALID_ARGUMENT, "UNKNOWN_MODE", f"only products of the Hessian have a mode, got mode {spec.mode}"
        )
    if spec.mode == "linearized" and (
        spec.leaves or spec.block or spec.precision or "apply" not in objective.described.programs
    ):
        raise ServiceError(
            Code.INVALID_ARGUMENT,
            "UNKNOWN_MODE",
            "mode linearized keeps residuals: it is for the whole Hessian, in the objective's precision, of an objective that is "
            "neither sharded nor for any number of rows",
        )


def _not_stored(digests: Sequence[str]) -> ServiceError:
    """Also of what is stored, and not by whom it is asked for: they are told the same."""
    return ServiceError(
        Code.FAILED_PRECONDITION,
        "BLOBS_MISSING",
        f"{len(digests)} blobs of the bundle are not stored: upload them first",
        {"digests": ",".join(digests)},
    )
