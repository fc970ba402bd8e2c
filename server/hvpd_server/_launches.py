"""Launches of products on one device: from the queue to the result, by the program and the width that serve best."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from hvpd import _codec
from hvpd.v1 import curvature_pb2
from hvpd_server import _batcher, _kernels, _probes, _relief, _sources
from hvpd_server._board import Board
from hvpd_server._errors import Code, ServiceError
from hvpd_server._limits import Limits
from hvpd_server._metrics import Metrics
from hvpd_server._objective import LINEARIZED, Objective
from hvpd_server._plan import Plan
from hvpd_server._point import Point, Shares
from hvpd_server._relief import relieving
from hvpd_server._residency import Residency

_log = logging.getLogger(__name__)


class Launches:
    """What multiplies at the points of a device.

    Args:
        device: Where.
        residency: What is resident there.
        limits: What may be used.
        metrics: Counts.
        board: Where others see what runs.
    """

    def __init__(
        self, device: _kernels.Device, residency: Residency, limits: Limits, metrics: Metrics, board: Board
    ) -> None:
        self._residency = residency
        self._metrics = metrics
        self._board = board
        self._max_block_width = limits.max_block_width
        self._batcher = _batcher.Batcher(
            self._launch,
            self._room,
            max_pending=limits.max_pending,
            max_launches=limits.max_launches or (2 if device.overlaps else 1),
            max_delay=limits.max_queue_delay,
            weights=limits.weights,
        )

    @property
    def pending(self) -> int:
        """Vectors that wait for the device."""
        return self._batcher.pending

    @property
    def in_flight(self) -> int:
        """Vectors in launches."""
        return self._batcher.in_flight

    def settle(self) -> None:
        """For whoever has answered a product, and has time now: notes what was left of it."""
        self._batcher.settle()

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

    def base(self, objective: Objective, program: str) -> str:
        """The program whose compiled widths decide how wide a launch can be."""
        return "apply" if objective.plan_of(program).needs_apply else program

    def bucket(self, objective: Objective) -> int:
        """The only width of launches, where the objective asked for one; else 0."""
        return min(objective.fixed_bucket, self._max_block_width)

    def _ready(self, point: Point, program: str, width: int) -> None:
        """Waits until a product can be launched at all, and has the bucket for its width compiled in the background."""
        if (program, width) in point.launchable:
            return
        base, fixed, kernels = self.base(point.objective, program), self.bucket(point.objective), point.source.kernels
        if not fixed and isinstance(point.source, _sources.Streamed):
            # Waits for its own: narrower launches would each go through all the data, which takes longer.
            pending = self._have(point, base, width)
            if pending is not None:
                pending.result()
            return
        if not (kernels.ready(base, fixed) if fixed else kernels.widths(base)):
            self._compiled_now(point, base, fixed or 1)
        if base == "apply" and not kernels.ready("prepare"):
            self._compiled_now(point, "prepare")
        if fixed:
            self._probe(point, program, fixed)
        if fixed or self._have(point, base, width) is None:
            point.launchable.add((program, width))

    def _compiled_now(self, point: Point, name: str, width: int = 0) -> None:
        """Waits for a program; where the device has no memory to compile it, caches give way."""

        def wait() -> None:
            point.source.kernels.request(name, width).result()

        relieving(self._residency, wait, [point.id], f"compiling {name} for {width} vectors")

    def _have(self, point: Point, base: str, width: int) -> _sources.Pending | None:
        """Has the bucket for a block of this width compiled, in the background, unless it is."""
        kernels = point.source.kernels
        bucket = min(1 << (width - 1).bit_length(), self._widest(point, base))
        if self.bucket(point.objective) or kernels.ready(base, bucket):
            return None
        return kernels.request(base, bucket)

    def _widest(self, point: Point, base: str) -> int:
        """The most vectors that a launch may have."""
        return point.objective.widest.get((base, point.source.kernels.rows), self._max_block_width)

    def _room(self, key: Hashable) -> int:
        if isinstance(key, Shares):
            return max(*key.kernels.widths("hvp_pairs"), *key.kernels.widths("hvp"), 1)
        point, program, _ = _key(key)
        return max(self._compiled(point, self.base(point.objective, program)), default=1)

    def _compiled(self, point: Point, base: str) -> list[int]:
        """The widths that a launch can have, ascending."""
        fixed, widest = self.bucket(point.objective), self._widest(point, base)
        if fixed:
            return [fixed]
        return [width for width in point.source.kernels.widths(base) if width <= widest] or [1]

    def _fitting(self, point: Point, base: str, total: int) -> int:
        """The width of the launch, or the launches, for so many vectors."""
        objective = point.objective
        if not objective.fixed_bucket and not objective.widest and point.source.kernels.ready(base, total):
            return total
        compiled = self._compiled(point, base)
        return next((width for width in compiled if width >= total), compiled[-1])

    def _launch(self, key: Hashable, jobs: Sequence[_batcher.Job]) -> Sequence[tuple[_codec.Array, str]]:
        """Multiplies what shares a key.

        Returns:
            For each job its product, and the program that made it.
        """
        slot = self._board.begin(jobs[0].point.objective.digest)
        try:
            if not isinstance(key, Shares):
                return self._launch_blocks(*_key(key), [job.block for job in jobs])
            if len(jobs) > 1:
                return self._launch_shared(key, jobs)
            return self._launch_blocks(jobs[0].point, "hvp", 0, [jobs[0].block])
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
        products = self._beside_others(point, program, seed, blocks) if self._batcher.overlaps else []
        if not products:
            products = self._as_memory_allows(point, program, seed, blocks)
        if len(blocks) == len(products) == 1 and len(blocks[0]) == len(products[0][0]):
            return products
        whole = products[0][0] if len(products) == 1 else np.concatenate([product for product, _ in products])
        return [(block, products[0][1]) for block in _batcher.split(whole, [len(block) for block in blocks])]

    def _beside_others(
        self, point: Point, program: str, seed: int, blocks: Sequence[_codec.Array]
    ) -> list[tuple[_codec.Array, str]]:
        """Multiplies while another launch may be in flight; where the device has no memory for both, alone. Nothing where it was alone."""
        others, begun = self._batcher.launches > 1, self._batcher.begun
        try:
            return self._as_memory_allows(point, program, seed, blocks, relieve=False)
        except ServiceError as error:
            if error.reason != _relief.REASON:
                raise
            if not others and self._batcher.begun == begun:  # Also none that has come and gone.
                return []
            _log.warning("the device is out of memory for two launches: one at a time from now on (%s)", error)
        with self._batcher.alone():  # What failed holds on to its arrays for as long as there is the error.
            return self._as_memory_allows(point, program, seed, blocks)

    def _as_memory_allows(
        self, point: Point, program: str, seed: int, blocks: Sequence[_codec.Array], *, relieve: bool = True
    ) -> list[tuple[_codec.Array, str]]:
        """Multiplies; where the device is out of memory, again when caches gave way, and then by narrower launches."""
        base, total, pending = self.base(point.objective, program), sum(map(len, blocks)), self._batcher.pending
        if pending:
            self._have(point, base, min(total + pending, self._max_block_width))
        products: list[tuple[_codec.Array, str]] = []
        while not products:  # Once, unless the device's memory does not suffice.
            bucket = self._fitting(point, base, total)
            try:
                if len(blocks) == 1 and bucket == total and not point.objective.fixed_bucket:  # As it came.
                    return [self._product(point, program, seed, blocks[0], 0)]
                products = self._products(point, program, seed, blocks, bucket)
            except ServiceError as error:
                if error.reason != _relief.REASON or not relieve:
                    raise
                # As in `relieving`, the next try is after this block.
                if not self._relieved(point, base, bucket, _asked(program, bucket)):
                    raise _relief.with_sizes(error, self._residency, _asked(program, bucket)) from error
        return products

    def _products(
        self, point: Point, program: str, seed: int, blocks: Sequence[_codec.Array], bucket: int
    ) -> list[tuple[_codec.Array, str]]:
        """Launches of one width, one after the other."""
        total = sum(map(len, blocks))
        if not self.bucket(point.objective) or point.objective.steady.get((program, point.source.kernels.rows)):
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
        if _relief.given_way(self._residency, [point.id], asked):
            return True
        if bucket == 1 or self.bucket(point.objective):
            return False
        _log.warning("the device is out of memory for %s: no more than half as many from now on", asked)
        point.launchable.clear()
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
                with self._board.working(objective.digest):
                    return self._multiplied(sample, program, 0, block)[0]

            def probe() -> bool | None:
                if not _probes.repeats(multiply, vectors):
                    raise ServiceError(
                        Code.FAILED_PRECONDITION,
                        "NOT_DETERMINISTIC",
                        f"this device does not compute {program} of objective {objective.digest[:12]} with the same bits twice: "
                        "register it without fixed_bucket",
                    )
                return _probes.steady(multiply, vectors)

            found = relieving(self._residency, probe, [point.id], _asked(program, bucket))
            if found is not None:
                objective.steady[key] = found

    def _product(
        self, point: Point, program: str, seed: int, block: _codec.Array, padding: int
    ) -> tuple[_codec.Array, str]:
        """One launch: V[width,n] -> [width,n], its last rows padding, and the program that made it; timed and counted."""
        point.launches += 1
        started = time.perf_counter()
        product, made_by = self._multiplied(point, program, seed, block)
        point.objective.plan_of(program).add(made_by, len(block), time.perf_counter() - started)
        self._metrics.launched(made_by, len(block), padding)
        return product, made_by

    def _multiplied(self, point: Point, program: str, seed: int, block: _codec.Array) -> tuple[_codec.Array, str]:
        """One launch, for Hessians of the program that the plan chose; the product is in the host's memory."""
        source, width = point.source, len(block)
        if program in ("hvp", LINEARIZED) and isinstance(source, _sources.Resident):
            residuals = self._residuals(point, source, width, point.objective.plan_of(program))
            if residuals is not None:
                return _kernels.host(source.kernels.call("apply", width, block, *residuals)), "apply"
        drawn = seed if program.startswith("sampled_") else None
        return _kernels.host(source.call(program, width, point.x, block, seed=drawn)), program

    def _residuals(self, point: Point, source: _sources.Resident, width: int, plan: Plan) -> Sequence[Any] | None:
        """The residuals of a point, where its plan wants `apply` for this width and they can be had now; else None."""
        kernels = source.kernels
        if plan.program(width) != "apply":
            return None
        ready, waits = kernels.ready("apply", width), plan.needs_apply
        found: Sequence[Any] | None = self._residency.get(("residuals", point.id)) if ready or waits else None
        if found is not None:
            return found
        if not waits:
            if not (ready and kernels.ready("prepare")):
                kernels.request("prepare")
                kernels.request("apply", width)
                return None
            if point.launches < 2:  # Whoever asks for one product alone pays for no residuals.
                return None
        return self._make_residuals(point, source, plan)

    def _make_residuals(self, point: Point, source: _sources.Resident, plan: Plan) -> Sequence[Any] | None:
        """New residuals, resident where there is room. None: they pay only with room, and there is none.

        Of a fixed bucket the program is fixed, too: residuals that cannot stay are made for one product alone.
        """
        objective, size_bytes = point.objective, point.objective.residual_bytes
        fixed, stay = self.bucket(objective) > 0, True

        def make() -> Sequence[Any]:
            made: Sequence[Any] = _kernels.computed(source.residuals(objective.described.residuals, point.x))
            return made

        try:
            self._residency.check(size_bytes, "residuals", {point.id: 0})
            for tenant in self._residency.users(point.id):
                self._residency.check_user(tenant, size_bytes, "residuals", {point.id: 0})
        except ServiceError:
            if not fixed:
                return None
            stay = False
        try:
            found = relieving(self._residency, make, [point.id], f"residuals of {size_bytes} bytes")
        except ServiceError as error:
            if fixed or error.reason != _relief.REASON:
                raise
            plan.forgo_residuals()
            return None
        if stay:
            with contextlib.suppress(ServiceError):  # Something else was pinned meanwhile.
                self._residency.put(("residuals", point.id), "residuals", found, size_bytes, needs=[point.id])
            self._residency.fit(point.id)
        return found


def _asked(program: str, bucket: int) -> str:
    return f"{program} of {bucket} vectors at once"


def _key(key: Hashable) -> tuple[Point, str, int]:
    assert isinstance(key, tuple)
    return key
