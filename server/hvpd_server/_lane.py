"""A device with what is resident on it and the queue in front of it. A product's way from the queue to its result is here."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from hvpd import _check, _codec
from hvpd.v1 import curvature_pb2, objective_pb2, tensor_pb2
from hvpd_server import _batcher, _kernels, _probes, _relief, _sources
from hvpd_server._board import Board
from hvpd_server._checks import LoosePoint
from hvpd_server._errors import Code, ServiceError
from hvpd_server._metrics import Metrics
from hvpd_server._objective import Objective, Placement, array_bytes, tensor_key
from hvpd_server._point import Point, Shares, nonfinite
from hvpd_server._relief import relieving
from hvpd_server._residency import Residency, no_room
from hvpd_server._store import Store

_log = logging.getLogger(__name__)


def equal_weights(tenant: str) -> float:
    """Of tenants of whom nothing is said."""
    return 1.0


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
    max_launches: int | None = None
    """Most launches in flight on a device; without it 2 where it copies while it computes, else 1."""
    weights: Callable[[str], float] = equal_weights
    """Of tenants, more than 0: they share the device in this proportion. Must be quick, and not raise."""


_LOOSE_VECTORS = 6
"""Of n elements, that a check has on the device at a time: two points, a vector and its product."""


def lanes(
    devices: Sequence[_kernels.Device], store: Store, limits: Limits, metrics: Metrics, board: Board
) -> "list[Lane]":
    """One for each device; where there are several, a last one for all together, and then each has half of the memory for each."""
    if len(devices) == 1:
        return [Lane(devices[0], store, limits, metrics, board)]
    half = dataclasses.replace(limits, memory_budget_bytes=limits.memory_budget_bytes // 2)
    together = dataclasses.replace(limits, memory_budget_bytes=half.memory_budget_bytes * len(devices))
    single = [Lane(device, store, half, metrics, board) for device in devices]
    return [*single, Lane(_kernels.Device.together(devices), store, together, metrics, board)]


class Lane:
    """One device, or several that work as one.

    Args:
        device: Where programs run.
        store: What is on disk.
        limits: What may be used.
        metrics: Counts.
        board: Where others see what runs.
    """

    def __init__(self, device: _kernels.Device, store: Store, limits: Limits, metrics: Metrics, board: Board) -> None:
        self._board = board
        self.device = device
        self.budget_bytes = limits.memory_budget_bytes
        self.residency = Residency(limits.memory_budget_bytes, on_evict=metrics.evicted)
        self._store = store
        self._metrics = metrics
        self._max_block_width = limits.max_block_width
        self._expected: dict[Hashable, int] = {}
        self._objectives = 0
        self._ahead = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hvpd-read")
        self._batcher = _batcher.Batcher(
            self._launch,
            self._room,
            max_pending=limits.max_pending,
            max_launches=limits.max_launches or (2 if device.overlaps else 1),
            max_delay=limits.max_queue_delay,
            weights=limits.weights,
        )

    def close(self) -> None:
        """Reads nothing more."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    @property
    def pending(self) -> int:
        """Vectors that wait for the device."""
        return self._batcher.pending

    @property
    def in_flight(self) -> int:
        """Vectors in launches."""
        return self._batcher.in_flight

    # Objectives

    def warm(self, objective: Objective) -> list[_sources.Pending]:
        """Compiles what a first point and a first product need, in the background."""
        first = [("value_and_grad", 0), (self._base(objective, "hvp"), self._bucket(objective) or 1)]
        if objective.plan.needs_apply:
            first.append(("prepare", 0))
        return [objective.kernels.request(name, width) for name, width in first]

    def objective(self, digest: str, bundle: objective_pb2.Bundle, programs: _kernels.Programs) -> Objective:
        """An objective to be served here."""
        copies = functools.partial(self.device.copies, data=True)
        return Objective(digest, bundle, programs, self.budget_bytes, parts=len(self.device.parts), copies=copies)

    def load_with(self, bundle: objective_pb2.Bundle) -> tuple[int, int, int]:
        """How much there would be to do here with one more objective: the less, the better it is put here.

        First the bytes of data of all, where what several have counts once; among equals, the bytes that would be new, since
        copies are a waste; then how many objectives there are.
        """
        own = _bytes_of(bundle)
        new = sum(size for key, size in own.items() if key not in self._expected)
        return sum(self._expected.values()) + new, new, self._objectives

    def expect(self, bundle: objective_pb2.Bundle) -> None:
        """Notes that an objective was put here."""
        self._expected |= _bytes_of(bundle)
        self._objectives += 1

    # Points

    def create_point(
        self, objective: Objective, data: Sequence[tensor_pb2.Tensor], identity: str, x: _codec.Array
    ) -> Point:
        """Makes a point resident: x and its data on the device, value and gradient computed."""
        placement = objective.placement(data)
        self._check_room(objective, data, placement)

        def make() -> tuple[Point, int]:
            source = self.source(objective, data, placement)
            self._check_rows(objective, source, x)
            on_device = self._put(x)
            source.kernels.request("value_and_grad").result()
            with self._board.working(objective.digest):
                value, gradient = map(_kernels.host, source.call("value_and_grad", 0, on_device))
            self._metrics.made(identity)
            point = Point(identity, objective, source, on_device, float(value), gradient, nonfinite(x))
            return point, 2 * objective.vector_bytes

        def load() -> Point:
            point: Point = self.residency.load(identity, "point", make, needs=list(placement.needs))
            return point

        asked = f"a point of {2 * objective.vector_bytes} bytes, with data of {sum(placement.needs.values())}"
        return relieving(self.residency, load, list(placement.needs), asked)

    def _check_room(self, objective: Objective, data: Sequence[tensor_pb2.Tensor], placement: Placement) -> None:
        """Raises ServiceError where a point has no room, whatever is dropped for it; says what would help."""
        try:
            self.residency.check(2 * objective.vector_bytes, "a point", placement.needs)
        except ServiceError as error:
            if error.reason != "MEMORY_BUDGET":
                raise
            if placement.spans:
                rows, row = placement.spans[0].stop, placement.row_bytes
                hint = f" (its data goes through the device in chunks, two at a time, the smallest of {rows} rows of {row} bytes)"
            elif data and not objective.bundle.row_reduction:
                hint = ", or, if it is a mean or a sum over the rows of its data, register it with row_reduction"
            else:
                raise
            raise ServiceError(error.code, error.reason, f"{error}{hint}", error.metadata) from None

    def _check_rows(self, objective: Objective, source: _sources.Source, x: _codec.Array) -> None:
        """Raises ServiceError where data is to be gone through in chunks, and the objective is no mean, or sum, over its rows."""
        if objective.goes_by_rows.is_set() or not isinstance(source, _sources.Streamed):
            return
        with objective.probing:
            if objective.goes_by_rows.is_set():
                return
            near = self.device.put(_probes.nearby(x))
            eps = _check.resolution([leaf.dtype for leaf in objective.bundle.x_leaves], objective.bundle.precision)
            found = _probes.goes_by_rows(
                source, objective.programs.for_rows, near, math.sqrt(eps), len(self.device.parts)
            )
            if found is False:
                raise ServiceError(
                    Code.INVALID_ARGUMENT,
                    "ROW_REDUCTION",
                    f"objective {objective.digest[:12]} was registered with row_reduction {source.reduction!r}, and its gradient over some "
                    f"rows is not the {source.reduction} of its gradients over two parts of them: so its data cannot be gone through in "
                    "chunks. A mean may have a penalty beside it, a sum may not; register it as what it is, or raise "
                    "`hvpd serve --memory-budget` until the data fits",
                )
            if found:
                objective.goes_by_rows.set()

    def loose_points(self, objective: Objective, turn: Callable[[], None]) -> Callable[[_codec.Array], LoosePoint]:
        """Makes points with the registered data for a check. The data stays, for who comes next; nothing is dropped for it.

        Raises:
            ServiceError: There is no room beside what is resident.
        """
        placement = objective.placement(objective.bundle.data)
        absent = [size for key, size in placement.needs.items() if self.residency.get(key) is None]
        vectors = _LOOSE_VECTORS * objective.vector_bytes
        size_bytes = sum(absent) + vectors + objective.residual_bytes * objective.plan.needs_apply
        if size_bytes > self.residency.free_bytes():
            raise no_room(size_bytes)
        source = self.source(objective, objective.bundle.data, placement, unnoticed=True)

        def at(x: _codec.Array) -> LoosePoint:
            turn()
            self._check_rows(objective, source, x)
            on_device = self.device.put(x)

            resident = source if objective.plan.needs_apply and isinstance(source, _sources.Resident) else None

            def product(row: _codec.Array) -> Any:
                block = _batcher.pad([row], self._bucket(objective) or 1)
                source.kernels.request("apply" if resident else "hvp", len(block)).result()
                with self._board.working(objective.digest):
                    if resident:
                        residuals = resident.residuals(objective.bundle.residuals, on_device)
                        return _kernels.host(resident.kernels.call("apply", len(block), block, *residuals))[:1]
                    return _kernels.host(source.call("hvp", len(block), on_device, block))[:1]

            source.kernels.request("value_and_grad").result()
            with self._board.working(objective.digest):
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
        tensors, kernels = [*objective.bundle.captured, *data], objective.kernels_for(data)
        if isinstance(kernels, _kernels.Kernels):
            return _sources.Resident(kernels, [self.tensor(tensor, unnoticed=unnoticed) for tensor in tensors])
        room_bytes = placement.needs[placement.room_key]
        self.residency.load(placement.room_key, "data", lambda: (True, room_bytes), evict=not unnoticed)
        moving = {len(objective.bundle.captured) + leaf for leaf in objective.bundle.row_leaves}
        parts = [
            self._store.open_tensor(tensor, set_aside=not unnoticed)
            if position in moving
            else self.tensor(tensor, unnoticed=unnoticed)
            for position, tensor in enumerate(tensors)
        ]

        def load(rows: slice) -> list[Any]:
            return [
                self._put(part[rows], data=True, owned=True) if position in moving else part
                for position, part in enumerate(parts)
            ]

        return _sources.Streamed(
            kernels, placement.spans, objective.bundle.row_reduction, load, self._ahead, self._board.renew
        )

    def tensor(self, tensor: tensor_pb2.Tensor, *, unnoticed: bool = False) -> Any:
        """A tensor on the device; unnoticed, nothing is dropped for it, and a corrupt one stays in the store for others to find."""

        def make() -> tuple[Any, int]:
            array = self._store.read_tensor(tensor, set_aside=not unnoticed)
            return self._put(array, data=True), array.nbytes * self.device.copies(array.shape, data=True)

        return self.residency.load(tensor_key(tensor), "data", make, evict=not unnoticed)

    def _put(self, array: _codec.Array, *, data: bool = False, owned: bool = False) -> Any:
        """Copies an array to the device, and counts how long that took."""
        started = time.perf_counter()
        placed = self.device.put(array, data=data, owned=owned)
        self._metrics.put(time.perf_counter() - started)
        return placed

    # Products

    def factors(self, point: Point, program: str, seed: int | None) -> list[_codec.Array]:
        """The Kronecker factors at a point, in the host's memory."""

        def compute() -> list[_codec.Array]:
            point.source.kernels.request(program).result()
            with self._board.working(point.objective.digest):
                return [_kernels.host(factor) for factor in point.source.call(program, 0, point.x, seed=seed)]

        return relieving(self.residency, compute, [point.id], program)

    def multiply(
        self, job: _batcher.Job, on_queue: Callable[[Callable[[], None]], object]
    ) -> tuple[_codec.Array, curvature_pb2.ProductInfo]:
        """V[k,n] -> HV[k,n], coalesced with whatever else waits for the same point."""
        point, program, seed = _key(job.key)
        self._ready(point, program, len(job.block))
        job.point = point
        if program == "hvp" and point.shares is not None and point.objective.plan.pairs_may_pay:
            job.key, job.crowd = point.shares, point.objective.crowd
        elif not seed:
            job.crowd = point.crowd(program)
        on_queue(lambda: self._batcher.cancel(job))
        try:
            result, made_by = self._batcher.run(job)
        except ServiceError as error:
            if error.reason == "QUEUE_FULL":
                self._metrics.refused()
            raise
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
        if not fixed and isinstance(point.source, _sources.Streamed):
            # Waits for its own: narrower launches would each go through all the data, which takes longer.
            pending = self._have(point, base, width)
            if pending is not None:
                pending.result()
            return
        if fixed or not kernels.widths(base):
            kernels.request(base, fixed or 1).result()
        if base == "apply":
            kernels.request("prepare").result()
        if fixed:
            self._probe(point, program, fixed)
        else:
            self._have(point, base, width)

    def _have(self, point: Point, base: str, width: int) -> _sources.Pending | None:
        """Has the bucket for a block of this width compiled, in the background, unless it is."""
        kernels = point.source.kernels
        bucket = min(1 << (width - 1).bit_length(), self._widest(point, base))
        if self._bucket(point.objective) or kernels.ready(base, bucket):
            return None
        return kernels.request(base, bucket)

    def _widest(self, point: Point, base: str) -> int:
        """The most vectors that a launch may have."""
        return point.objective.widest.get((base, point.source.kernels.rows), self._max_block_width)

    def _room(self, key: Hashable) -> int:
        if isinstance(key, Shares):
            return max(*key.kernels.widths("hvp_pairs"), *key.kernels.widths("hvp"), 1)
        point, program, _ = _key(key)
        return max(self._compiled(point, self._base(point.objective, program)), default=1)

    def _compiled(self, point: Point, base: str) -> list[int]:
        """The widths that a launch can have, ascending."""
        fixed, widest = self._bucket(point.objective), self._widest(point, base)
        if fixed:
            return [fixed]
        return [width for width in point.source.kernels.widths(base) if width <= widest] or [1]

    def _launch(self, key: Hashable, jobs: Sequence[_batcher.Job]) -> Sequence[tuple[_codec.Array, str]]:
        """Multiplies what shares a key.

        Returns:
            For each job its product, and the program that made it.
        """
        slot = self._board.begin(jobs[0].point.objective.digest)
        try:
            if not isinstance(key, Shares):
                return self._launch_blocks(*_key(key), [job.block for job in jobs])
            return self._launch_shared(key, jobs)
        finally:
            self._board.end(slot)

    def _launch_shared(self, key: Shares, jobs: Sequence[_batcher.Job]) -> Sequence[tuple[_codec.Array, str]]:
        """Multiplies at several points of a small objective: as pairs, or one point after the other."""
        by_point: dict[Point, list[int]] = {}
        for index, job in enumerate(jobs):
            by_point.setdefault(job.point, []).append(index)
        products = self._launch_pairs(key, jobs, len(by_point)) if len(by_point) > 1 else None
        if products is not None:
            return products
        answers: dict[int, tuple[_codec.Array, str]] = {}
        for point, indices in by_point.items():
            found = self._launch_blocks(point, "hvp", 0, [jobs[index].block for index in indices])
            answers.update(zip(indices, found, strict=True))
        return [answers[index] for index in range(len(jobs))]

    def _launch_pairs(
        self, shares: Shares, jobs: Sequence[_batcher.Job], points: int
    ) -> Sequence[tuple[_codec.Array, str]] | None:
        """Products at several points as one launch of pairs (x, v); None where that does not pay, or is not compiled yet."""
        plan, widths = jobs[0].point.objective.plan, [len(job.block) for job in jobs]
        total = sum(widths)
        bucket = min(1 << (total - 1).bit_length(), self._max_block_width)
        if total > bucket or not plan.pairs(bucket, points):
            return None
        if not shares.kernels.ready("hvp_pairs", bucket):
            shares.kernels.request("hvp_pairs", bucket)
            return None
        X = np.repeat([_kernels.host(job.point.x) for job in jobs], widths, axis=0)
        X = np.concatenate([X, X[-1:].repeat(bucket - total, axis=0)])
        started = time.perf_counter()
        try:
            found = shares.call("hvp_pairs", bucket, X, _batcher.pad([job.block for job in jobs], bucket))
            whole = _kernels.host(found)
        except ServiceError as error:
            if error.reason != _relief.REASON:
                raise
            return None  # One after the other takes less memory.
        plan.add("hvp_pairs", bucket, time.perf_counter() - started)
        self._metrics.launched("hvp_pairs", bucket, bucket - total)
        return [(block, "hvp_pairs") for block in _batcher.split(whole, widths)]

    def _launch_blocks(
        self, point: Point, program: str, seed: int, blocks: Sequence[_codec.Array]
    ) -> Sequence[tuple[_codec.Array, str]]:
        """Multiplies the blocks of one point by as few launches as the compiled buckets allow: mostly one."""
        base = self._base(point.objective, program)
        widths = [len(block) for block in blocks]
        total = sum(widths)
        if self._batcher.pending:
            self._have(point, base, min(total + self._batcher.pending, self._max_block_width))
        products: list[tuple[_codec.Array, str]] = []
        while not products:  # Once, unless the device's memory does not suffice.
            compiled = self._compiled(point, base)
            bucket = next((width for width in compiled if width >= total), compiled[-1])
            try:
                products = self._products(point, program, seed, blocks, bucket)
            except ServiceError as error:
                if error.reason != _relief.REASON:
                    raise
                # As in `relieving`, the next try is after this block.
                if self._batcher.launch_alone():
                    _log.warning(
                        "the device is out of memory for %s: one launch at a time from now on", _asked(program, bucket)
                    )
                elif not self._relieved(point, base, bucket, _asked(program, bucket)):
                    raise _relief.with_sizes(error, self.residency, _asked(program, bucket)) from error
        if len(blocks) == len(products) == 1 and len(blocks[0]) == bucket:
            return products
        whole = products[0][0] if len(products) == 1 else np.concatenate([product for product, _ in products])
        return [(block, products[0][1]) for block in _batcher.split(whole, widths)]

    def _products(
        self, point: Point, program: str, seed: int, blocks: Sequence[_codec.Array], bucket: int
    ) -> list[tuple[_codec.Array, str]]:
        """Launches of one width, one after the other."""
        total = sum(map(len, blocks))
        if not self._bucket(point.objective) or point.objective.steady.get((program, point.source.kernels.rows)):
            padded = _batcher.pad(blocks, -(-total // bucket) * bucket)
            return [
                self._product(point, program, seed, padded[row : row + bucket], max(row + bucket - total, 0))
                for row in range(0, total, bucket)
            ]
        vectors = [block[row : row + 1] for block in blocks for row in range(len(block))]
        alone = [self._product(point, program, seed, _batcher.pad([vector], bucket), bucket - 1) for vector in vectors]
        return [(product[:1], made_by) for product, made_by in alone]

    def _relieved(self, point: Point, base: str, bucket: int, asked: str) -> bool:
        """Whether there is reason to try again, now that the device was out of memory: caches gave way, or launches get narrower."""
        if _relief.given_way(self.residency, [point.id], asked):
            return True
        if bucket == 1 or self._bucket(point.objective):
            return False
        _log.warning("the device is out of memory for %s: no more than half as many from now on", asked)
        point.objective.widest[base, point.source.kernels.rows] = bucket // 2
        return True

    def _probe(self, point: Point, program: str, bucket: int) -> None:
        """Finds out whether vectors can share launches of a fixed width, unless it is known, or cannot be told here."""
        objective, key = point.objective, (program, point.source.kernels.rows)
        if key in objective.steady:
            return
        with objective.probing:
            if key in objective.steady:
                return
            sample = dataclasses.replace(point, source=point.source.sample)
            shape = (bucket, objective.columns(program))
            vectors = np.random.default_rng(0).standard_normal(shape).astype(objective.dtype)

            def multiply(block: _codec.Array) -> _codec.Array:
                return self._multiplied(sample, program, 0, block)[0]

            def probe() -> bool | None:
                return _probes.steady(multiply, vectors)

            found = relieving(self.residency, probe, [point.id], _asked(program, bucket))
            if found is not None:
                objective.steady[key] = found

    def _product(
        self, point: Point, program: str, seed: int, block: _codec.Array, padding: int
    ) -> tuple[_codec.Array, str]:
        """One launch: V[width,n] -> [width,n], its last rows padding, and the program that made it; timed and counted."""
        point.launches += 1
        started = time.perf_counter()
        product, made_by = self._multiplied(point, program, seed, block)
        point.objective.plan.add(made_by, len(block), time.perf_counter() - started)
        self._metrics.launched(made_by, len(block), padding)
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
        if objective.plan.program(width) != "apply":
            return None
        if not objective.plan.needs_apply:
            if not (kernels.ready("prepare") and kernels.ready("apply", width)):
                kernels.request("prepare")
                kernels.request("apply", width)
                return None
            if point.launches < 2:  # Whoever asks for one product alone pays for no residuals.
                return None
        found: Sequence[Any] | None = self.residency.get(("residuals", point.id))
        return found if found is not None else self._make_residuals(point, source)

    def _make_residuals(self, point: Point, source: _sources.Resident) -> Sequence[Any] | None:
        """New residuals, resident where there is room. None: they pay only with room, and there is none.

        Of a fixed bucket the program is fixed, too: residuals that cannot stay are made for one product alone.
        """
        objective, size_bytes = point.objective, point.objective.residual_bytes
        fixed, stay = self._bucket(objective) > 0, True

        def make() -> Sequence[Any]:
            made: Sequence[Any] = _kernels.computed(source.residuals(objective.bundle.residuals, point.x))
            return made

        try:
            self.residency.check(size_bytes, "residuals", {point.id: 0})
        except ServiceError:
            if not fixed:
                return None
            stay = False
        try:
            found = relieving(self.residency, make, [point.id], f"residuals of {size_bytes} bytes")
        except ServiceError as error:
            if fixed or error.reason != _relief.REASON:
                raise
            objective.plan.forgo_residuals()
            return None
        if stay:
            with contextlib.suppress(ServiceError):  # Something else was pinned meanwhile.
                self.residency.put(("residuals", point.id), "residuals", found, size_bytes, needs=[point.id])
        return found


def _bytes_of(bundle: objective_pb2.Bundle) -> dict[Hashable, int]:
    return {tensor_key(tensor): array_bytes(tensor) for tensor in [*bundle.captured, *bundle.data]}


def _asked(program: str, bucket: int) -> str:
    return f"{program} of {bucket} vectors at once"


def _key(key: Hashable) -> tuple[Point, str, int]:
    assert isinstance(key, tuple)
    return key
