"""The server without its transport: objectives, points and products, from the store to the device and back.

A product's way: `multiply` -> `_lane` (one for each device) -> `_batcher` (queue, coalesce) -> `_kernels` (compiled programs).
A point's way: `create_point` -> `_lane` -> `_store` (data by digest) -> `_residency` (what is on the device) -> `_kernels`.
"""

import collections
import concurrent.futures
import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hvpd import _codec, _protocol
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2
from hvpd_server import _admission, _batcher, _kernels, _lane
from hvpd_server._checks import Checks
from hvpd_server._errors import Code, ServiceError
from hvpd_server._lane import Lane, Limits
from hvpd_server._metrics import Metrics
from hvpd_server._objective import OPERATORS, Objective, program_of
from hvpd_server._point import Point, point_id
from hvpd_server._store import Store

_log = logging.getLogger(__name__)


class Engine:
    """Everything between the transport and the device.

    Args:
        store: What is on disk.
        devices: Where programs run.
        limits: What may be used.
        metrics: Counts.
    """

    def __init__(self, store: Store, devices: Sequence[_kernels.Device], limits: Limits, metrics: Metrics) -> None:
        self.store = store
        self.devices = devices
        self.limits = limits
        self.metrics = metrics
        self.lanes = _lane.lanes(devices, store, limits, metrics)
        self._compiler = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="hvpd-compile")
        self._objectives: dict[str, Objective] = {}
        self._lane_of: dict[str, Lane] = {}
        self._objectives_lock = threading.Lock()
        self.checks = Checks(store, self._pending, metrics.checked)
        metrics.observe(self._used_bytes, self._pending)

    def close(self) -> None:
        """Stops compiling, checking and reading."""
        self.checks.close()
        for lane in self.lanes:
            lane.close()
        self._compiler.shutdown(wait=False, cancel_futures=True)

    # Objectives

    def register(self, digest: str, name: str, x_digest: str = "") -> Objective:
        """Makes an objective of an uploaded bundle and starts to compile it, and to check it at x where one came.

        Raises:
            ServiceError: The bundle is not stored, incomplete, or not what it must be; nothing was registered.
        """
        if name:
            _admission.check_name(name)
        bundle = _admission.parse(self.store.read(digest))
        missing = sorted({reference for reference in _admission.references(bundle) if not self.store.has(reference)})
        if missing:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "BLOBS_MISSING",
                f"{len(missing)} blobs of the bundle are not stored: upload them first",
                {"digests": ",".join(missing)},
            )
        objective = self.objective(digest)
        self.store.add_objective(digest, name)
        self.lane(objective).warm(objective)
        if x_digest:
            points = functools.partial(self.lane(objective).loose_points, objective)
            self.checks.start(digest, objective.bundle, x_digest, points, name)
        return objective

    def objective(self, digest: str) -> Objective:
        """The objective of a stored bundle, its programs read."""
        with self._objectives_lock:
            found = self._objectives.get(digest)
        if found is not None:
            return found
        bundle = self.bundle(digest)
        with self._objectives_lock:
            lane = self._lane_of.get(digest)
            if lane is None:
                lane = self._lane_of[digest] = self._choose_lane(bundle)
                lane.expect(bundle)
        read = functools.partial(self._part, digest)
        programs = _kernels.Programs(bundle, lane.device, read, self._compiler, self.metrics.compiled)
        _admission.check_signatures(bundle, programs.signatures())
        with self._objectives_lock:
            return self._objectives.setdefault(digest, lane.objective(digest, bundle, programs))

    def lane(self, objective: Objective) -> Lane:
        """Where an objective is served."""
        return self._lane_of[objective.digest]

    def _choose_lane(self, bundle: objective_pb2.Bundle) -> Lane:
        """All devices together for data that is to be split over them; else the one with least data, or where its own is already."""
        if bundle.sharded:
            return self.lanes[-1]
        singles = self.lanes[: len(self.devices)]
        return min(singles, key=lambda lane: lane.load_with(bundle))

    def _used_bytes(self) -> Mapping[str, int]:
        return sum((collections.Counter(lane.residency.used_bytes()) for lane in self.lanes), collections.Counter())

    def _pending(self) -> int:
        return sum(lane.pending for lane in self.lanes)

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
        for digest in dict.fromkeys(digest for _, digest, _ in self.store.objectives()):
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

    def locate(self, spec: curvature_pb2.PointSpec) -> tuple[Objective, Sequence[tensor_pb2.Tensor], str]:
        """Objective, data and id of the point that a spec names.

        Raises:
            ServiceError: The objective is not registered, or the data does not fit it.
        """
        digest = spec.objective_digest
        if not self.store.registered(digest):
            _, digest, _ = self.store.objective(digest)  # Says why not.
        objective = self.objective(digest)
        data = objective.bundle.data if spec.default_data else spec.data
        _admission.check_data(objective.bundle, data)
        return objective, data, point_id(objective.digest, data, spec.x_digest)

    def find_point(self, spec: curvature_pb2.PointSpec) -> Point | None:
        """The point, where it is resident."""
        objective, _, identity = self.locate(spec)
        found: Point | None = self.lane(objective).residency.get(identity)
        return found

    def moved(
        self, spec: curvature_pb2.PointSpec, move: curvature_pb2.Move, direction: _codec.Array | None = None
    ) -> _codec.Array | None:
        """The x of a point that is a step from another, in the host's memory; None where that is not resident.

        Args:
            spec: Of the new point.
            move: How it comes about.
            direction: Where it just came; else it must be here.

        Raises:
            ServiceError: NOT_FOUND with reason DIRECTION_NOT_RESIDENT: the direction is wanted.
        """
        objective, _, _ = self.locate(spec)
        residency = self.lane(objective).residency
        base: Point | None = residency.get(move.base_id)
        if base is None or base.objective is not objective:
            return None
        if direction is None:
            direction = residency.get(("direction", move.direction_digest))
        if direction is None or direction.dtype != objective.dtype or direction.size != objective.n:
            raise ServiceError(Code.NOT_FOUND, "DIRECTION_NOT_RESIDENT", "the direction is not here: send it")
        with np.errstate(all="ignore"):  # What is not finite is counted, and told.
            x: _codec.Array = direction * objective.dtype.type(move.alpha)
            x += _kernels.host(base.x)
        return x

    def keep_direction(self, spec: curvature_pb2.PointSpec, digest: str, direction: _codec.Array) -> None:
        """Keeps the direction of a move, for the steps along it that follow."""
        if _codec.digest(_codec.payload(direction)) != digest:
            raise ServiceError(
                Code.INVALID_ARGUMENT, "DIGEST_MISMATCH", "the direction does not have its digest: send it again"
            )
        residency = self.lane(self.locate(spec)[0]).residency
        with contextlib.suppress(ServiceError):  # Where there is no room, it serves this one step.
            residency.put(("direction", digest), "direction", direction, direction.nbytes)

    def pin(self, point: Point, seconds: int) -> None:
        """Keeps a point on the device until it has not been used for so long; for a week at most."""
        self.lane(point.objective).residency.pin(point.id, min(seconds, _protocol.MAX_PIN_SECONDS))

    def create_point(self, spec: curvature_pb2.PointSpec, x: _codec.Array) -> Point:
        """Makes a point resident: x and its data on the device, value and gradient computed."""
        objective, data, identity = self.locate(spec)
        if _codec.digest(_codec.payload(x)) != spec.x_digest:
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "DIGEST_MISMATCH",
                "x does not have the digest that the spec gives: send it again",
            )

        return self.lane(objective).create_point(objective, data, identity, x)

    # Products

    def resident(self, spec: curvature_pb2.ProductSpec) -> Point:
        """The point of a product, whose request is checked as far as it can be without its vectors.

        Raises:
            ServiceError: NOT_FOUND with reason POINT_NOT_RESIDENT, or the request is malformed.
        """
        if spec.operator not in OPERATORS:
            raise ServiceError(
                Code.INVALID_ARGUMENT, "UNKNOWN_OPERATOR", f"this server has no operator {spec.operator}: upgrade it"
            )
        point = self._point(spec.point_id)
        program = program_of(spec)
        if not 0 <= spec.block < len(point.objective.sizes):
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "UNKNOWN_BLOCK",
                f"objective {point.objective.digest[:12]} has {len(point.objective.sizes) - 1} blocks, got {spec.block}",
            )
        if program not in point.objective.bundle.programs:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "NO_SUCH_OPERATOR",
                f"objective {point.objective.digest[:12]} was registered without {program}: "
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

    def _point(self, identity: str) -> Point:
        for lane in self.lanes:
            found: Point | None = lane.residency.get(identity)
            if found is not None:
                return found
        raise ServiceError(
            Code.NOT_FOUND,
            "POINT_NOT_RESIDENT",
            f"point {identity[:12]} is not on the device (evicted, or the server restarted): create it again and repeat",
        )

    def factors(self, identity: str, seed: int | None) -> list[_codec.Array]:
        """The Kronecker factors A_0, G_0, A_1, ... of the dense layers at a point, in the host's memory.

        Args:
            identity: The point's.
            seed: Of targets that are drawn; None: from the loss's Hessian.

        Raises:
            ServiceError: As for `resident`.
        """
        point = self._point(identity)
        program = "kfac" if seed is None else "sampled_kfac"
        if program not in point.objective.bundle.programs:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                "NO_SUCH_OPERATOR",
                f"objective {point.objective.digest[:12]} was registered without {program}: register "
                "hvpd.composite(model, loss) with a model of dense layers, with a distribution where targets are to be drawn",
            )
        return self.lane(point.objective).factors(point, program, seed)

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
        return self.lane(point.objective).multiply(job, on_queue)

    def choices(self, digest: str) -> objective_pb2.GetPlanResponse:
        """What multiplies blocks of which width."""
        _, digest, _ = self.store.objective(digest)
        objective = self.objective(digest)
        kernels = objective.kernels
        widths = sorted({width for name in ("hvp", "apply") for width in kernels.widths(name)})
        return objective_pb2.GetPlanResponse(
            choices=[objective.plan.choose(width) for width in widths],
            residual_bytes=objective.residual_bytes,
            compiles=kernels.compiles(),
        )
