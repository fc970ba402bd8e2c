"""A device with what is resident on it and the queue in front of it. A product's way from the queue to its result is here."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from hvpd import _codec
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2
from hvpd_server import _batcher, _kernels, _sources
from hvpd_server._checks import LoosePoint
from hvpd_server._errors import ServiceError
from hvpd_server._metrics import Metrics
from hvpd_server._objective import Objective, Placement, array_bytes, tensor_key
from hvpd_server._point import Point, nonfinite
from hvpd_server._residency import Residency, no_room
from hvpd_server._store import Store


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the lane may use."""

    memory_budget_bytes: int
    """For data, points and residuals on the device."""
    max_block_width: int
    """Most vectors in a launch; a power of two."""
    max_pending: int
    """Most vectors that wait for the device."""
    max_queue_delay: float = 0.0
    """Seconds for which a block that could be wider waits for more while the device is free."""


_LOOSE_VECTORS = 6
"""Of n elements, that a check has on the device at a time: two points, a vector and its product."""


def lanes(devices: Sequence[_kernels.Device], store: Store, limits: Limits, metrics: Metrics) -> "list[Lane]":
    """One for each device; where there are several, a last one for all together, and then each has half of the memory for each."""
    if len(devices) == 1:
        return [Lane(devices[0], store, limits, metrics)]
    half = dataclasses.replace(limits, memory_budget_bytes=limits.memory_budget_bytes // 2)
    together = dataclasses.replace(limits, memory_budget_bytes=half.memory_budget_bytes * len(devices))
    single = [Lane(device, store, half, metrics) for device in devices]
    return [*single, Lane(_kernels.Device.together(devices), store, together, metrics)]


class Lane:
    """One device, or several that work as one.

    Args:
        device: Where programs run.
        store: What is on disk.
        limits: What may be used.
        metrics: Counts.
    """

    def __init__(self, device: _kernels.Device, store: Store, limits: Limits, metrics: Metrics) -> None:
        self.device = device
        self.budget_bytes = limits.memory_budget_bytes
        self.residency = Residency(limits.memory_budget_bytes, on_evict=metrics.evicted)
        self._store = store
        self._metrics = metrics
        self._max_block_width = limits.max_block_width
        self._expected: dict[Hashable, int] = {}
        self._ahead = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hvpd-read")
        self._batcher = _batcher.Batcher(
            self._launch, self._room, max_pending=limits.max_pending, max_delay=limits.max_queue_delay
        )

    def close(self) -> None:
        """Reads nothing more."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    @property
    def pending(self) -> int:
        """Vectors that wait for the device."""
        return self._batcher.pending

    # Objectives

    def warm(self, objective: Objective) -> list[_sources.Pending]:
        """Compiles what a first point and a first product need, in the background."""
        first = [("value_and_grad", 0), (self._base(objective, "hvp"), self._bucket(objective) or 1)]
        if objective.plan.needs_apply:
            first.append(("prepare", 0))
        return [objective.kernels.request(name, width) for name, width in first]

    def expected_bytes(self, bundle: objective_pb2.Bundle) -> int:
        """The data of all objectives that were put here, this one's too; what several have counts once."""
        return sum((self._expected | _bytes_of(bundle)).values())

    def expect(self, bundle: objective_pb2.Bundle) -> None:
        """Notes that an objective was put here."""
        self._expected |= _bytes_of(bundle)

    # Points

    def create_point(
        self, objective: Objective, data: Sequence[tensor_pb2.Tensor], identity: str, x: _codec.Array
    ) -> Point:
        """Makes a point resident: x and its data on the device, value and gradient computed."""
        placement = objective.placement(data)
        needs, size_bytes = placement.needs, 2 * (x.nbytes + placement.chunk_bytes)
        self.residency.check(size_bytes + sum(needs.values()), "a point")

        def make() -> tuple[Point, int]:
            source = self.source(objective, data, placement)
            on_device = self.device.put(x)
            value, gradient = source.call("value_and_grad", 0, on_device)
            self._metrics.points.inc()
            point = Point(identity, objective, source, on_device, float(value), _kernels.host(gradient), nonfinite(x))
            return point, size_bytes

        point: Point = self.residency.load(identity, "point", make, needs=list(needs))
        return point

    def loose_points(self, objective: Objective, turn: Callable[[], None]) -> Callable[[_codec.Array], LoosePoint]:
        """Makes points with the registered data for a check. The data stays, for who comes next; nothing is dropped for it.

        Raises:
            ServiceError: There is no room beside what is resident.
        """
        placement = objective.placement(objective.bundle.data)
        absent = [size for key, size in placement.needs.items() if self.residency.get(key) is None]
        vectors = _LOOSE_VECTORS * objective.n * objective.dtype.itemsize + 2 * placement.chunk_bytes
        size_bytes = sum(absent) + vectors + objective.residual_bytes * objective.plan.needs_apply
        if size_bytes > self.residency.free_bytes():
            raise no_room(size_bytes)
        source = self.source(objective, objective.bundle.data, placement, unnoticed=True)

        def at(x: _codec.Array) -> LoosePoint:
            on_device = self.device.put(x)

            def product(row: _codec.Array) -> Any:
                block = _batcher.pad([row], self._bucket(objective) or 1)
                if objective.plan.needs_apply and isinstance(source, _sources.Resident):
                    residuals = source.residuals(objective.bundle.residuals, on_device)
                    return source.kernels.call("apply", len(block), block, *residuals)[:1]
                return source.call("hvp", len(block), on_device, block)[:1]

            return LoosePoint(source, x, on_device, product, turn)

        return at

    # Data

    def source(
        self,
        objective: Objective,
        data: Sequence[tensor_pb2.Tensor],
        placement: Placement,
        *,
        unnoticed: bool = False,
    ) -> _sources.Source:
        """The data of a point, put where it goes."""
        placed = {tensor_key(tensor): self.tensor(tensor, unnoticed=unnoticed) for tensor in placement.resident}
        tensors, kernels = [*objective.bundle.captured, *data], objective.kernels_for(data)
        if isinstance(kernels, _kernels.Kernels):
            return _sources.Resident(kernels, [placed[tensor_key(tensor)] for tensor in tensors])
        on_disk = {
            tensor_key(tensor): self._store.map_tensor(tensor) for tensor in tensors if tensor_key(tensor) not in placed
        }

        def load(rows: slice) -> list[Any]:
            return [
                placed[key] if key in placed else self.device.put(on_disk[key][rows], data=True)
                for key in map(tensor_key, tensors)
            ]

        return _sources.Streamed(kernels, placement.spans, objective.bundle.row_reduction, load, self._ahead)

    def tensor(self, tensor: tensor_pb2.Tensor, *, unnoticed: bool = False) -> Any:
        """A tensor on the device; unnoticed, nothing is dropped for it, and a corrupt one stays in the store for others to find."""

        def make() -> tuple[Any, int]:
            array = self._store.read_tensor(tensor, set_aside=not unnoticed)
            return self.device.put(array, data=True), array.nbytes

        return self.residency.load(tensor_key(tensor), "data", make, evict=not unnoticed)

    # Products

    def multiply(
        self, job: _batcher.Job, on_queue: Callable[[Callable[[], None]], object]
    ) -> tuple[_codec.Array, curvature_pb2.ProductInfo]:
        """V[k,n] -> HV[k,n], coalesced with whatever else waits for the same point."""
        point, program, _ = _key(job.key)
        self._ready(point, program, len(job.block))
        on_queue(lambda: self._batcher.cancel(job))
        result, made_by = self._batcher.run(job)
        self._metrics.product(job)
        info = curvature_pb2.ProductInfo(
            queue_duration_ns=int((job.started - job.queued) * 1e9),
            compute_duration_ns=int((job.finished - job.started) * 1e9),
            batch_width=job.width,
            program=made_by,
        )
        return result, info

    def _base(self, objective: Objective, program: str) -> str:
        """The program whose compiled widths decide how wide a launch can be."""
        return "apply" if program == "hvp" and objective.plan.needs_apply else program

    def _bucket(self, objective: Objective) -> int:
        """The only width of launches, where the objective asked for one; else 0."""
        return min(objective.bundle.fixed_bucket, self._max_block_width)

    def _ready(self, point: Point, program: str, width: int) -> None:
        """Waits until a product can be launched at all, and has the bucket for its width compiled in the background."""
        base, fixed, kernels = self._base(point.objective, program), self._bucket(point.objective), point.source.kernels
        if fixed or not kernels.widths(base):
            kernels.request(base, fixed or 1).result()
        if base == "apply":
            kernels.request("prepare").result()
        if fixed and (program, kernels.rows) not in point.objective.steady:
            point.objective.steady[program, kernels.rows] = self._steady(point, program, fixed)
        self._have(point, base, width)

    def _have(self, point: Point, base: str, width: int) -> None:
        """Has the bucket for a block of this width compiled, in the background."""
        bucket = min(1 << (width - 1).bit_length(), self._max_block_width)
        if not self._bucket(point.objective) and not point.source.kernels.ready(base, bucket):
            point.source.kernels.request(base, bucket)

    def _room(self, key: Hashable) -> int:
        point, program, _ = _key(key)
        return max(self._compiled(point, self._base(point.objective, program)), default=1)

    def _compiled(self, point: Point, base: str) -> list[int]:
        """The widths that a launch can have, ascending."""
        fixed, widest = self._bucket(point.objective), point.objective.widest
        if fixed:
            return [fixed]
        return [width for width in point.source.kernels.widths(base) if width <= widest.get(base, width)]

    def _launch(self, key: Hashable, blocks: Sequence[_codec.Array]) -> Sequence[tuple[_codec.Array, str]]:
        """Multiplies the blocks of one point by as few launches as the compiled buckets allow: mostly one.

        Returns:
            For each block its product, and the program that made it.
        """
        point, program, seed = _key(key)
        base = self._base(point.objective, program)
        widths = [len(block) for block in blocks]
        total = sum(widths)
        if self._batcher.pending:
            self._have(point, base, min(total + self._batcher.pending, self._max_block_width))
        compiled = self._compiled(point, base)
        bucket = next((width for width in compiled if width >= total), compiled[-1])
        try:
            products = self._products(point, program, seed, blocks, bucket)
        except ServiceError as error:
            if error.reason != "DEVICE_MEMORY" or not self._relieved(point, base, bucket):
                raise
            return self._launch(key, blocks)
        whole = products[0][0] if len(products) == 1 else np.concatenate([product for product, _ in products])
        return [(block, products[0][1]) for block in _batcher.split(whole, widths)]

    def _products(
        self, point: Point, program: str, seed: int, blocks: Sequence[_codec.Array], bucket: int
    ) -> list[tuple[_codec.Array, str]]:
        """Launches of one width, one after the other."""
        total = sum(map(len, blocks))
        if point.objective.steady.get((program, point.source.kernels.rows), True):
            padded = _batcher.pad(blocks, -(-total // bucket) * bucket)
            return [self._product(point, program, seed, padded[row : row + bucket]) for row in range(0, total, bucket)]
        vectors = [block[row : row + 1] for block in blocks for row in range(len(block))]
        alone = [self._product(point, program, seed, _batcher.pad([vector], bucket)) for vector in vectors]
        return [(product[:1], made_by) for product, made_by in alone]

    def _relieved(self, point: Point, base: str, bucket: int) -> bool:
        """Whether there is reason to try again, now that the device was out of memory: caches gave way, or launches get narrower."""
        if self.residency.give_way([point.id]):
            return True
        point.objective.widest[base] = bucket // 2
        return bucket > 1 and not self._bucket(point.objective)

    def _steady(self, point: Point, program: str, bucket: int) -> bool:
        """Whether a vector's product has the same bits wherever in a block the vector stands; then vectors can share launches.

        It depends on how the compiler cuts the block. Where it is not so, each goes alone, in the first row.
        """
        objective = point.objective
        vectors = np.random.default_rng(0).standard_normal((bucket, objective.columns(program))).astype(objective.dtype)

        def product(block: _codec.Array) -> bytes:
            return self._multiplied(point, program, 0, block)[0].tobytes()

        row = len(vectors[:1].tobytes())
        expected = product(vectors)
        for shift in range(1, bucket):
            found = product(np.roll(vectors, shift, axis=0))
            if found[shift * row :] + found[: shift * row] != expected:
                return False
        return product(_batcher.pad([vectors[:1]], bucket))[:row] == expected[:row]

    def _product(self, point: Point, program: str, seed: int, block: _codec.Array) -> tuple[_codec.Array, str]:
        """One launch: V[width,n] -> [width,n], and the program that made it; timed and counted."""
        point.launches += 1
        started = time.perf_counter()
        product, made_by = self._multiplied(point, program, seed, block)
        point.objective.plan.add(made_by, len(block), time.perf_counter() - started)
        self._metrics.launches.labels(program=made_by).inc()
        return product, made_by

    def _multiplied(self, point: Point, program: str, seed: int, block: _codec.Array) -> tuple[_codec.Array, str]:
        """One launch, for Hessians of the program that the plan chose; the product is in the host's memory."""
        source, width = point.source, len(block)
        if program == "hvp" and isinstance(source, _sources.Resident):
            residuals = self._residuals(point, source, width)
            if residuals is not None:
                return _kernels.host(source.kernels.call("apply", width, block, *residuals)), "apply"
        drawn = seed if program.startswith("sampled_") else None
        return _kernels.host(source.call(program, width, point.x, block, seed=drawn)), program

    def _residuals(self, point: Point, source: _sources.Resident, width: int) -> Sequence[Any] | None:
        """The residuals of a point, where its plan wants `apply` for this width and they can be had now; else None."""
        objective, kernels = point.objective, source.kernels
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
        found = source.residuals(objective.bundle.residuals, point.x)
        self.residency.put(("residuals", point.id), "residuals", found, objective.residual_bytes, needs=[point.id])
        return found


def _bytes_of(bundle: objective_pb2.Bundle) -> dict[Hashable, int]:
    return {tensor_key(tensor): array_bytes(tensor) for tensor in [*bundle.captured, *bundle.data]}


def _key(key: Hashable) -> tuple[Point, str, int]:
    assert isinstance(key, tuple)
    return key
