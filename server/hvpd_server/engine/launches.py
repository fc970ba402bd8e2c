"""Launches of products on one device: from the queue to the result, with the best
program and width.
"""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2
from hvpd_server.device import data_sources, memory_relief
from hvpd_server.device.device import Device, computed, host
from hvpd_server.device.memory_relief import with_relief
from hvpd_server.device.residency import Residency
from hvpd_server.engine import pairs, probes
from hvpd_server.engine.objective import LINEARIZED, Objective
from hvpd_server.engine.pairs import PairKey
from hvpd_server.engine.point import Point
from hvpd_server.engine.residuals import residuals_of
from hvpd_server.errors import Code, ServiceError
from hvpd_server.liveness import Liveness
from hvpd_server.scheduling.batcher import Batcher
from hvpd_server.scheduling.blocks import join, split
from hvpd_server.scheduling.holdback import bucket_of
from hvpd_server.scheduling.job import Job
from hvpd_server.scheduling.probation import OnWait
from hvpd_server.telemetry.metrics import Metrics, ProductRecord
from hvpd_server.tenancy.limits import Limits

_log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Iteration:
    """Several steps of an iteration at a point, in one launch of their own."""

    point: Point
    program: str
    """The program."""
    width: int
    """The width that the program is compiled for."""
    front: Sequence[Any]
    """The arguments after x."""
    steps: int
    """Most steps. The program's last result begins with the steps that were taken."""
    vectors: int = 1
    """Vectors that each step multiplies."""
    seed: int | None = None
    """Seed, if the operator draws random numbers."""
    by_apply: bool = False
    """Whether the program multiplies by `apply`, and takes the point's residuals."""

    @property
    def columns(self) -> int:
        """Most vectors to multiply."""
        return self.steps * self.vectors

    def multiplied(self, found: Sequence[Any]) -> int:
        """Return the vectors that were multiplied, by the results.

        A first product that is not used counts, too.
        """
        return max(int(found[-1][0]), 1) * self.vectors if found else 0


class Launches:
    """Multiplies at the points of one device.

    Args:
        device: The device.
        residency: The entries on the device.
        limits: Limits of the server.
        metrics: Counters.
        liveness: Shows the supervisor the work that runs.
    """

    def __init__(
        self, device: Device, residency: Residency, limits: Limits, metrics: Metrics, liveness: Liveness
    ) -> None:
        self._residency = residency
        self._metrics = metrics
        self._liveness = liveness
        self._max_block_width = limits.max_block_width
        self._batcher = Batcher(
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
        return self._batcher.in_flight.columns

    def record_deferred(self) -> None:
        """Record a launch whose record was deferred until its answer was sent."""
        self._batcher.record_deferred()

    def multiply(
        self, job: Job, on_queue: Callable[[Callable[[], None]], object]
    ) -> tuple[codec.Array, curvature_pb2.ProductInfo]:
        """Multiply V[k,n] -> HV[k,n], coalesced with other products at that point."""
        point, program, seed = _key(job.key)
        self._ready(point, program, job, on_queue)
        job.point = point
        if program == "hvp" and point.pair_key is not None and point.objective.plan.pairs_may_pay:
            job.key, job.holdback = point.pair_key, point.objective.pair_holdback
        elif not seed:
            job.holdback = point.holdback(program)
        try:
            result, made_by = self._in_turn(job, on_queue)
        except ServiceError as error:
            if error.reason == "QUEUE_FULL":
                self._metrics.refused()
            raise
        self._count(job, len(job.block), job.width)
        info = curvature_pb2.ProductInfo(
            queue_duration_ns=int((job.started - job.queued) * 1e9),
            compute_duration_ns=int((job.finished - job.started) * 1e9),
            batch_width=job.width,
            program=made_by,
        )
        return result, info

    def iterate(self, job: Job, on_queue: OnWait) -> list[Any]:
        """Launch an iteration, the key of a job, in its turn. Return its results: the
        first one where the device has it, the others in the host's memory. Return no
        results if there is no room for the residuals that it needs.
        """
        iteration = job.key
        assert isinstance(iteration, Iteration)
        job.point = iteration.point
        found: list[Any] = self._in_turn(job, on_queue)
        if found:
            columns = iteration.multiplied(found)
            self._count(job, columns, columns)
            self._metrics.launched(iteration.program, columns, 0)
        return found

    def _count(self, job: Job, columns: int, width: int) -> None:
        """Count a product of so many vectors, in a launch of a width."""
        self._metrics.product(
            ProductRecord(
                job.point.objective.digest,
                job.tenant,
                columns,
                width,
                job.started - job.queued,
                job.finished - job.started,
                job.device_seconds,
                job.finished,
            )
        )

    def _iterated(self, iteration: Iteration) -> list[Any]:
        point, seed = iteration.point, iteration.seed
        source, program, front = point.source, (iteration.program, iteration.width), (point.x, *iteration.front)

        def call() -> list[Any]:
            if iteration.by_apply:
                assert isinstance(source, data_sources.Resident)
                residuals = residuals_of(point, source, 1, point.objective.plan_of(LINEARIZED), self._residency)
                if residuals is None:
                    return []
                found = source.kernels.call(*program, *front, *residuals)
            else:
                found = source.call(*program, *front, seed=seed)
            return [computed(found[0]), *map(host, found[1:])]

        return with_relief(self._residency, call, [point.id], f"{iteration.steps} steps of {iteration.program}")

    def _in_turn(self, job: Job, on_queue: OnWait) -> Any:
        """Queue a product, and wait for it. If its objective is on probation, wait for
        the objective's turn first, so that no launch waits for that turn.
        """
        digest = job.point.objective.digest
        with self._liveness.probation.turn(digest, deadline=job.deadline, on_wait=on_queue):
            on_queue(lambda: self._batcher.cancel(job))
            return self._batcher.run(job)

    def base(self, objective: Objective, program: str) -> str:
        """Return the program whose compiled widths limit the launches of a program."""
        return "apply" if objective.plan_of(program).needs_apply else program

    def bucket(self, objective: Objective) -> int:
        """Return the fixed width of an objective's launches; 0 if it is not fixed."""
        return min(objective.fixed_bucket, self._max_block_width)

    def _ready(self, point: Point, program: str, job: Job, on_queue: OnWait) -> None:
        """Wait until a product can be launched, and start the compile for its width in
        the background.
        """
        width = len(job.block)
        if (program, width) in point.launchable:
            return
        base, fixed, kernels = self.base(point.objective, program), self.bucket(point.objective), point.source.kernels
        if not fixed and isinstance(point.source, data_sources.Streamed):
            # Each narrower launch would go through all the data, which takes longer
            # than the compile.
            pending = self._have(point, base, width)
            if pending is not None:
                pending.result()
            return
        if not (kernels.ready(base, fixed) if fixed else kernels.widths(base)):
            self._compiled_now(point, base, fixed or 1)
        if base == "apply" and not kernels.ready("prepare"):
            self._compiled_now(point, "prepare")
        if fixed:
            working = functools.partial(
                self._liveness.working, point.objective.digest, deadline=job.deadline, on_wait=on_queue
            )
            self._probe(point, program, fixed, working)
        if fixed or self._have(point, base, width) is None:
            point.launchable.add((program, width))

    def _compiled_now(self, point: Point, name: str, width: int = 0) -> None:
        """Wait for the compile of a program, with memory relief."""

        def wait() -> None:
            point.source.kernels.request(name, width).result()

        with_relief(self._residency, wait, [point.id], f"compiling {name} for {width} vectors")

    def _have(self, point: Point, base: str, width: int) -> data_sources.Pending | None:
        """Start the compile of the bucket for a width, unless it is compiled. Return
        the compile, if there is one.
        """
        kernels = point.source.kernels
        bucket = min(bucket_of(width), self._widest(point, base))
        if self.bucket(point.objective) or kernels.ready(base, bucket):
            return None
        return kernels.request(base, bucket)

    def _widest(self, point: Point, base: str) -> int:
        """Return the most vectors of a launch."""
        return point.objective.widest.get((base, point.source.kernels.rows), self._max_block_width)

    def _room(self, key: Hashable) -> int:
        if isinstance(key, Iteration):
            return key.columns
        if isinstance(key, PairKey):
            return max(*key.kernels.widths(pairs.PROGRAM), *key.kernels.widths("hvp"), 1)
        point, program, _ = _key(key)
        return max(self._compiled(point, self.base(point.objective, program)), default=1)

    def _compiled(self, point: Point, base: str) -> list[int]:
        """Return the widths that a launch can have, ascending."""
        fixed, widest = self.bucket(point.objective), self._widest(point, base)
        if fixed:
            return [fixed]
        return [width for width in point.source.kernels.widths(base) if width <= widest] or [1]

    def _fitting(self, point: Point, base: str, total: int) -> int:
        """Return the width of each launch for `total` vectors."""
        objective = point.objective
        if not objective.fixed_bucket and not objective.widest and point.source.kernels.ready(base, total):
            return total
        compiled = self._compiled(point, base)
        return next((width for width in compiled if width >= total), compiled[-1])

    def _launch(self, key: Hashable, jobs: Sequence[Job]) -> Sequence[Any]:
        """Multiply jobs that share a key. Return the product of each, and the program
        that computed it; or the results of an iteration.
        """
        slot = self._liveness.begin(jobs[0].point.objective.digest)
        try:
            if isinstance(key, Iteration):
                return [self._iterated(key)]
            if not isinstance(key, PairKey):
                return self._launch_blocks(*_key(key), [job.block for job in jobs])
            if len(jobs) > 1:
                return self._launch_at_points(key, jobs)
            return self._launch_blocks(jobs[0].point, "hvp", 0, [jobs[0].block])
        finally:
            self._liveness.end(slot)

    def _launch_at_points(self, key: PairKey, jobs: Sequence[Job]) -> Sequence[tuple[codec.Array, str]]:
        """Multiply at several points: as pairs if that pays, else point by point."""
        by_point: dict[Point, list[int]] = {}
        for index, job in enumerate(jobs):
            by_point.setdefault(job.point, []).append(index)
        if len(by_point) > 1:
            found = pairs.multiply(key, jobs, len(by_point), self._max_block_width, self._metrics)
            if found is not None:
                return [(product, pairs.PROGRAM) for product in found]
        answers: dict[int, tuple[codec.Array, str]] = {}
        for point, indices in by_point.items():
            products = self._launch_blocks(point, "hvp", 0, [jobs[index].block for index in indices])
            answers.update(zip(indices, products, strict=True))
        return [answers[index] for index in range(len(jobs))]

    def _launch_blocks(
        self, point: Point, program: str, seed: int, blocks: Sequence[codec.Array]
    ) -> Sequence[tuple[codec.Array, str]]:
        """Multiply the blocks of one point in as few launches as the compiled buckets
        allow, usually one.
        """
        products: list[tuple[codec.Array, str]] = []
        if self._batcher.in_flight.max_launches > 1:
            products = self._beside_others(point, program, seed, blocks)
        if not products:
            products = self._as_memory_allows(point, program, seed, blocks)
        if len(blocks) == len(products) == 1 and len(blocks[0]) == len(products[0][0]):
            return products
        whole = products[0][0] if len(products) == 1 else np.concatenate([product for product, _ in products])
        return [(block, products[0][1]) for block in split(whole, [len(block) for block in blocks])]

    def _beside_others(
        self, point: Point, program: str, seed: int, blocks: Sequence[codec.Array]
    ) -> list[tuple[codec.Array, str]]:
        """Multiply while another launch may be in flight. If the device has no memory
        for both, multiply in exclusive launches.

        Return an empty list if the device ran out of memory with no other launch in
        flight.
        """
        in_flight = self._batcher.in_flight
        others, begun = len(in_flight.keys) > 1, in_flight.begun
        try:
            return self._as_memory_allows(point, program, seed, blocks, relieve=False)
        except ServiceError as error:
            if error.reason != memory_relief.REASON:
                raise
            if not others and in_flight.begun == begun:
                return []
            _log.warning("the device is out of memory for two launches: one at a time from now on (%s)", error)
        # Outside of the except block, because the error keeps arrays alive.
        with in_flight.exclusive():
            return self._as_memory_allows(point, program, seed, blocks)

    def _as_memory_allows(
        self, point: Point, program: str, seed: int, blocks: Sequence[codec.Array], *, relieve: bool = True
    ) -> list[tuple[codec.Array, str]]:
        """Multiply. If the device is out of memory, evict caches and repeat, then use
        narrower launches.
        """
        base, total, pending = self.base(point.objective, program), sum(map(len, blocks)), self._batcher.pending
        if pending:
            self._have(point, base, min(total + pending, self._max_block_width))
        products: list[tuple[codec.Array, str]] = []
        while not products:
            bucket = self._fitting(point, base, total)
            try:
                if len(blocks) == 1 and bucket == total and not point.objective.fixed_bucket:
                    return [self._product(point, program, seed, blocks[0], 0)]
                products = self._products(point, program, seed, blocks, bucket)
            except ServiceError as error:
                if error.reason != memory_relief.REASON or not relieve:
                    raise
                # The next try is outside of this block, because the error keeps arrays
                # alive.
                if not self._relieved(point, base, bucket, _asked(program, bucket)):
                    raise memory_relief.with_sizes(error, self._residency, _asked(program, bucket)) from error
        return products

    def _products(
        self, point: Point, program: str, seed: int, blocks: Sequence[codec.Array], bucket: int
    ) -> list[tuple[codec.Array, str]]:
        """Multiply in launches of one width, one after the other."""
        total = sum(map(len, blocks))
        if not self.bucket(point.objective) or point.objective.steady.get((program, point.source.kernels.rows)):
            padded = join(blocks, -(-total // bucket) * bucket)
            return [
                self._product(point, program, seed, padded[row : row + bucket], max(row + bucket - total, 0))
                for row in range(0, total, bucket)
            ]
        vectors = [block[row : row + 1] for block in blocks for row in range(len(block))]
        found = [self._product(point, program, seed, join([vector], bucket), bucket - 1) for vector in vectors]
        return [(product[:1], made_by) for product, made_by in found]

    def _relieved(self, point: Point, base: str, bucket: int, asked: str) -> bool:
        """Evict caches or, if there are none, halve the width of launches. Return
        whether a repetition may succeed.
        """
        if memory_relief.relieve(self._residency, [point.id], asked):
            return True
        if bucket == 1 or self.bucket(point.objective):
            return False
        _log.warning("the device is out of memory for %s: at most half as many from now on", asked)
        point.launchable.clear()
        point.objective.widest[base, point.source.kernels.rows] = bucket // 2
        return True

    def _probe(
        self,
        point: Point,
        program: str,
        bucket: int,
        working: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        """Probe, unless it is known, whether other vectors in a launch of fixed width
        change the bits of a product.
        """
        objective, key = point.objective, (program, point.source.kernels.rows)
        if key in objective.steady:
            return
        with objective.probing:
            if key in objective.steady:
                return
            sample = dataclasses.replace(point, source=point.source.sample)
            shape = (bucket, objective.columns(program))
            vectors = np.random.default_rng(0).standard_normal(shape).astype(objective.dtype)

            def multiply(block: codec.Array) -> codec.Array:
                with working():
                    return self._multiplied(sample, program, 0, block)[0]

            def probe() -> bool | None:
                if not probes.repeats(multiply, vectors):
                    raise ServiceError(
                        Code.FAILED_PRECONDITION,
                        "NOT_DETERMINISTIC",
                        f"this device does not compute {program} of objective {objective.digest[:12]} with the same bits twice: "
                        "register it without fixed_bucket",
                    )
                return probes.steady(multiply, vectors)

            found = with_relief(self._residency, probe, [point.id], _asked(program, bucket))
            if found is not None:
                objective.steady[key] = found

    def _product(
        self, point: Point, program: str, seed: int, block: codec.Array, padding: int
    ) -> tuple[codec.Array, str]:
        """Launch V[width,n] -> [width,n], whose last `padding` rows are padding. Record
        the time. Return the product and the program.
        """
        point.launches += 1
        started = time.perf_counter()
        product, made_by = self._multiplied(point, program, seed, block)
        point.objective.plan_of(program).add(made_by, len(block), time.perf_counter() - started)
        self._metrics.launched(made_by, len(block), padding)
        return product, made_by

    def _multiplied(self, point: Point, program: str, seed: int, block: codec.Array) -> tuple[codec.Array, str]:
        """Launch the program that the plan chose. Return the product in the host's
        memory, and the program.
        """
        source, width = point.source, len(block)
        if program in ("hvp", LINEARIZED) and isinstance(source, data_sources.Resident):
            residuals = residuals_of(point, source, width, point.objective.plan_of(program), self._residency)
            if residuals is not None:
                return host(source.kernels.call("apply", width, block, *residuals)), "apply"
        drawn = seed if program.startswith("sampled_") else None
        return host(source.call(program, width, point.x, block, seed=drawn)), program


def _asked(program: str, bucket: int) -> str:
    return f"{program} of {bucket} vectors at once"


def _key(key: Hashable) -> tuple[Point, str, int]:
    assert isinstance(key, tuple)
    return key
