"""The server without its transport: objectives, points and products, from the store to the device and back.

A product's way: `multiply` -> `_batcher` (queue, coalesce) -> `_launch` -> `_kernels` (compiled programs).
A point's way: `create_point` -> `_store` (data by digest) -> `_residency` (what is on the device) -> `_kernels`.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from hvpd import _codec
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2
from hvpd_server import _admission, _batcher, _kernels
from hvpd_server._errors import Code, ServiceError
from hvpd_server._metrics import Metrics
from hvpd_server._plan import Plan
from hvpd_server._residency import Residency
from hvpd_server._store import Store

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the engine may use."""

    memory_budget_bytes: int
    """For data, points and residuals on the device."""
    max_block_width: int
    """Most vectors in a launch; a power of two."""
    max_pending: int
    """Most vectors that wait for the device."""


OPERATORS: Mapping[int, str] = {
    curvature_pb2.OPERATOR_HESSIAN: "hvp",
    curvature_pb2.OPERATOR_GGN: "ggn",
    curvature_pb2.OPERATOR_FISHER: "fisher",
    curvature_pb2.OPERATOR_EMPIRICAL_FISHER: "empirical_fisher",
    curvature_pb2.OPERATOR_SAMPLED_FISHER: "sampled_fisher",
}
"""The program that multiplies by an operator."""


class Objective:
    """A registered objective with its programs."""

    def __init__(
        self, digest: str, bundle: objective_pb2.Bundle, kernels: _kernels.Kernels, residual_budget_bytes: int
    ) -> None:
        self.digest = digest
        self.bundle = bundle
        self.kernels = kernels
        self.dtype = _codec.dtype(bundle.dtype)
        self.n = bundle.n
        self.residual_bytes = sum(
            _array_bytes(residual.spec) for residual in bundle.residuals if residual.WhichOneof("source") == "result"
        )
        self.plan = Plan(
            bundle.mode, has_apply="apply" in bundle.programs, fits=self.residual_bytes <= residual_budget_bytes
        )


@dataclasses.dataclass(eq=False)
class Point:
    """(objective, data, x) on the device. Compared by identity: products of the same resident point are coalesced."""

    id: str
    objective: Objective
    kernels: _kernels.Kernels
    """The objective's, for as many rows as the data has."""
    x: Any
    """x[n] on the device."""
    args: Sequence[Any]
    """The captured arrays and the data, on the device."""
    value: float
    gradient: _codec.Array
    """In the host's memory."""
    nonfinite_x: int
    launches: int = 0
    """So far: residuals pay from the second on."""

    def message(self) -> curvature_pb2.Point:
        return curvature_pb2.Point(
            id=self.id,
            value=self.value,
            nonfinite_x=self.nonfinite_x,
            nonfinite_value=not np.isfinite(self.value),
            nonfinite_gradient=_nonfinite(self.gradient),
        )


def point_id(objective_digest: str, data: Sequence[tensor_pb2.Tensor], x_digest: str) -> str:
    """Names a point by what it is made of."""
    leaves = (f"{tensor.dtype}{list(tensor.shape)}{tensor.digest}" for tensor in data)
    return _codec.digest("\n".join((objective_digest, *leaves, x_digest)).encode())


class Engine:
    """Everything between the transport and the device.

    Args:
        store: What is on disk.
        device: Where programs run.
        limits: What may be used.
        metrics: Counts.
    """

    def __init__(self, store: Store, device: _kernels.Device, limits: Limits, metrics: Metrics) -> None:
        self.store = store
        self.device = device
        self.limits = limits
        self.metrics = metrics
        self.residency = Residency(limits.memory_budget_bytes, on_evict=metrics.evicted)
        self._compiler = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="hvpd-compile")
        self._objectives: dict[str, Objective] = {}
        self._objectives_lock = threading.Lock()
        self._batcher = _batcher.Batcher(self._launch, self._room, max_pending=limits.max_pending)
        metrics.observe(self.residency.used_bytes, lambda: self._batcher.pending)

    def close(self) -> None:
        """Stops compiling."""
        self._compiler.shutdown(wait=False, cancel_futures=True)

    # Objectives

    def register(self, digest: str, name: str) -> Objective:
        """Makes an objective of an uploaded bundle and starts to compile it.

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
        self.warm(objective)
        return objective

    def objective(self, digest: str) -> Objective:
        """The objective of a stored bundle, its programs read."""
        with self._objectives_lock:
            found = self._objectives.get(digest)
        if found is not None:
            return found
        bundle = self.bundle(digest)
        kernels = _kernels.Kernels(
            bundle, self.device, functools.partial(self._part, digest), self._compiler, self.metrics.compiled
        )
        _admission.check_signatures(bundle, kernels.signatures())
        with self._objectives_lock:
            return self._objectives.setdefault(
                digest, Objective(digest, bundle, kernels, self.limits.memory_budget_bytes // 4)
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

    def warm(self, objective: Objective) -> "list[concurrent.futures.Future[Any]]":
        """Compiles what a first point and a first product need, in the background."""
        first = [("value_and_grad", 0), (self._base(objective, curvature_pb2.OPERATOR_HESSIAN), 1)] + [
            ("prepare", 0)
        ] * objective.plan.needs_apply
        kernels = objective.kernels.for_rows(_admission.rows_of(objective.bundle, objective.bundle.data))
        return [kernels.request(name, width) for name, width in first]

    def warm_all(self) -> None:
        """Compiles all registered objectives, from the cache where they are in it; logs those that cannot be."""
        futures = []
        for digest in dict.fromkeys(digest for _, digest, _ in self.store.objectives()):
            try:
                futures += self.warm(self.objective(digest))
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
        found: Point | None = self.residency.get(self.locate(spec)[2])
        return found

    def create_point(self, spec: curvature_pb2.PointSpec, x: _codec.Array) -> Point:
        """Makes a point resident: x and its data on the device, value and gradient computed."""
        objective, data, identity = self.locate(spec)
        if _codec.digest(_codec.payload(x)) != spec.x_digest:
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "DIGEST_MISMATCH",
                "x does not have the digest that the spec gives: send it again",
            )

        tensors = [*objective.bundle.captured, *data]
        kernels = objective.kernels.for_rows(_admission.rows_of(objective.bundle, data))
        together = {_tensor_key(tensor): _array_bytes(tensor) for tensor in tensors}
        self.residency.check(2 * x.nbytes + sum(together.values()), "a point")

        def make() -> tuple[Point, int]:
            args = [self._tensor(tensor) for tensor in tensors]
            on_device = self.device.put(x)
            value, gradient = kernels.call("value_and_grad", 0, on_device, *args)
            self.metrics.points.inc()
            return (
                Point(
                    identity, objective, kernels, on_device, args, float(value), _kernels.host(gradient), _nonfinite(x)
                ),
                2 * x.nbytes,
            )

        point: Point = self.residency.load(identity, "point", make, needs=list(together))
        return point

    def _tensor(self, tensor: tensor_pb2.Tensor) -> Any:
        def make() -> tuple[Any, int]:
            array = self.store.read_tensor(tensor)
            return self.device.put(array), array.nbytes

        return self.residency.load(_tensor_key(tensor), "data", make)

    # Products

    def resident(self, spec: curvature_pb2.ProductSpec) -> Point:
        """The point of a product, whose request is checked as far as it can be without its vectors.

        Raises:
            ServiceError: NOT_FOUND with reason POINT_NOT_RESIDENT, or the request is malformed.
        """
        program = OPERATORS.get(spec.operator)
        if program is None:
            raise ServiceError(
                Code.INVALID_ARGUMENT, "UNKNOWN_OPERATOR", f"this server has no operator {spec.operator}: upgrade it"
            )
        point: Point | None = self.residency.get(spec.point_id)
        if point is None:
            raise ServiceError(
                Code.NOT_FOUND,
                "POINT_NOT_RESIDENT",
                f"point {spec.point_id[:12]} is not on the device (evicted, or the server restarted): create it again and repeat",
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
        return point

    def multiply(
        self,
        point: Point,
        operator: int,
        vectors: _codec.Array,
        *,
        seed: int = 0,
        tenant: str = "",
        deadline: float = float("inf"),
        on_queue: Callable[[Callable[[], None]], object] = lambda cancel: None,
    ) -> tuple[_codec.Array, curvature_pb2.ProductInfo]:
        """V[k,n] -> HV[k,n], coalesced with whatever else waits for the same point.

        Args:
            seed: Of operators that are drawn.
            deadline: On time.monotonic's clock.
            on_queue: Given a function that cancels the product while it waits.
        """
        self._ready(point, operator, len(vectors))
        job = _batcher.Job((point, operator, seed), vectors, tenant, deadline)
        on_queue(lambda: self._batcher.cancel(job))
        result, program = self._batcher.run(job)
        self.metrics.product(job)
        info = curvature_pb2.ProductInfo(
            queue_duration_ns=int((job.started - job.queued) * 1e9),
            compute_duration_ns=int((job.finished - job.started) * 1e9),
            batch_width=job.width,
            program=program,
        )
        return result, info

    def choices(self, digest: str) -> objective_pb2.GetPlanResponse:
        """What multiplies blocks of which width."""
        _, digest, _ = self.store.objective(digest)
        objective = self.objective(digest)
        kernels = objective.kernels.for_rows(_admission.rows_of(objective.bundle, objective.bundle.data))
        widths = sorted({width for name in ("hvp", "apply") for width in kernels.widths(name)})
        return objective_pb2.GetPlanResponse(
            choices=[objective.plan.choose(width) for width in widths], residual_bytes=objective.residual_bytes
        )

    def _base(self, objective: Objective, operator: int) -> str:
        """The program whose compiled widths decide how wide a launch can be."""
        program = OPERATORS[operator]
        return "apply" if program == "hvp" and objective.plan.needs_apply else program

    def _ready(self, point: Point, operator: int, width: int) -> None:
        """Waits until a product can be launched at all, and has the bucket for its width compiled in the background."""
        base = self._base(point.objective, operator)
        if not point.kernels.widths(base):
            point.kernels.request(base, 1).result()
        if base == "apply":
            point.kernels.request("prepare").result()
        self._have(point, base, width)

    def _have(self, point: Point, base: str, width: int) -> None:
        """Has the bucket for a block of this width compiled, in the background."""
        bucket = min(1 << (width - 1).bit_length(), self.limits.max_block_width)
        if not point.kernels.ready(base, bucket):
            point.kernels.request(base, bucket)

    def _room(self, key: Hashable) -> int:
        point, operator, _ = _key(key)
        return max(point.kernels.widths(self._base(point.objective, operator)), default=1)

    def _launch(self, key: Hashable, blocks: Sequence[_codec.Array]) -> Sequence[tuple[_codec.Array, str]]:
        """Multiplies the blocks of one point by as few launches as the compiled buckets allow: mostly one.

        Returns:
            For each block its product, and the program that made it.
        """
        point, operator, seed = _key(key)
        base = self._base(point.objective, operator)
        widths = [len(block) for block in blocks]
        total = sum(widths)
        if self._batcher.pending:
            self._have(point, base, min(total + self._batcher.pending, self.limits.max_block_width))
        compiled = point.kernels.widths(base)
        bucket = next((width for width in compiled if width >= total), compiled[-1])
        padded = _batcher.pad(blocks, -(-total // bucket) * bucket)
        parts = [self._product(point, operator, seed, padded[row : row + bucket]) for row in range(0, total, bucket)]
        products = [product for product, _ in parts]
        whole = products[0] if len(products) == 1 else np.concatenate(products)
        return [(block, parts[0][1]) for block in _batcher.split(whole, widths)]

    def _product(self, point: Point, operator: int, seed: int, block: _codec.Array) -> tuple[_codec.Array, str]:
        """One launch: V[width,n] -> [width,n], and the program that made it; for Hessians, the one that the plan chose."""
        kernels, width, program = point.kernels, len(block), OPERATORS[operator]
        point.launches += 1
        residuals = self._residuals(point, width) if program == "hvp" else None
        started = time.perf_counter()
        if residuals is None:
            drawn = [_random_key(seed)] if program == "sampled_fisher" else []
            result = kernels.call(program, width, point.x, block, *drawn, *point.args)
        else:
            program, result = "apply", kernels.call("apply", width, block, *residuals)
        on_host = _kernels.host(result)
        point.objective.plan.add(program, width, time.perf_counter() - started)
        self.metrics.launches.labels(program=program).inc()
        return on_host, program

    def _residuals(self, point: Point, width: int) -> Sequence[Any] | None:
        """The residuals of a point, where its plan wants `apply` for this width and they can be had now; else None."""
        objective, kernels = point.objective, point.kernels
        if objective.plan.choose(width).program != "apply":
            return None
        if not objective.plan.needs_apply:
            if not (kernels.ready("prepare") and kernels.ready("apply", width)):
                kernels.request("prepare")
                kernels.request("apply", width)
                return None
            if point.launches < 2:  # Whoever asks for one product alone pays for no residuals.
                return None
        found: Sequence[Any] | None = self.residency.get(("residuals", point.id))
        if found is not None:
            return found
        try:
            self.residency.check(objective.residual_bytes, "residuals", [point.id])
        except ServiceError:  # They pay only where there is room.
            return None
        results = kernels.call("prepare", 0, point.x, *point.args)[2:]
        arguments = [point.x, *point.args]
        found = [
            results[residual.result] if residual.WhichOneof("source") == "result" else arguments[residual.argument]
            for residual in objective.bundle.residuals
        ]
        self.residency.put(("residuals", point.id), "residuals", found, objective.residual_bytes, needs=[point.id])
        return found


def _key(key: Hashable) -> tuple[Point, int, int]:
    assert isinstance(key, tuple)
    return key


def _random_key(seed: int) -> _codec.Array:
    """The data of jax.random.key(seed), for its default generator."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


def _array_bytes(array: tensor_pb2.Tensor | tensor_pb2.ArraySpec) -> int:
    return math.prod(array.shape) * _codec.dtype(array.dtype).itemsize


def _tensor_key(tensor: tensor_pb2.Tensor) -> Hashable:
    return tensor.digest, tensor.dtype, tuple(tensor.shape)


def _nonfinite(array: _codec.Array) -> int:
    return int(array.size - np.count_nonzero(np.isfinite(array)))
