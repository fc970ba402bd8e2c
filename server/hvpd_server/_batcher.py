"""Coalescing without waiting: while the device works, arrivals queue; when it is free, all that share a key go as one block.

There is no thread of the batcher's own. A caller that finds the device free leads: it launches what is queued, its own
product among it, and then hands the lead to the first caller that still waits. So a lone caller never changes threads, and
many callers are batched as fast as the device takes them. Knows neither gRPC nor jax.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hvpd_server._errors import Code, ServiceError

Block = npt.NDArray[Any]

Execute = Callable[[Hashable, Sequence[Block]], Sequence[Any]]
"""Multiplies the blocks V[k,n] of one key, in one launch; returns what each caller gets. Runs outside of any lock."""

Limit = Callable[[Hashable], int]
"""The most vectors that the next launch of a key can take; at least as many as any one of its products has."""


@dataclasses.dataclass(eq=False, slots=True)
class Job:
    """One product, from arrival to result."""

    key: Hashable
    """What must be equal to share a launch: program, data, point, operator."""
    block: Block
    """V[k,n]."""
    tenant: str = ""
    """Tenants take turns."""
    deadline: float = float("inf")
    """When it is of no use any more, on the batcher's clock, in seconds."""
    result: Any = None
    """What `execute` returned for it, when done."""
    error: BaseException | None = None
    """Why there is no result, when done."""
    queued: float = 0.0
    """When it arrived, on the batcher's clock, in seconds."""
    started: float = 0.0
    """When its launch began."""
    finished: float = 0.0
    """When its launch ended."""
    width: int = 0
    """Vectors in its launch, of all callers."""
    done: bool = False
    cancelled: bool = False
    leads: bool = False
    gate: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def finish(self, error: BaseException | None = None) -> None:
        self.error = error
        self.done = True
        self.gate.release()


class Batcher:
    """The queue in front of one device.

    Args:
        execute: Multiplies.
        limit: How wide a launch may be.
        max_pending: Most vectors that wait; more are refused with RESOURCE_EXHAUSTED.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, execute: Execute, limit: Limit, *, max_pending: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._execute = execute
        self._limit = limit
        self._max_pending = max_pending
        self._clock = clock
        self._lock = threading.Lock()
        self._queues: collections.OrderedDict[str, collections.deque[Job]] = collections.OrderedDict()
        self._pending = 0
        self._busy = False

    @property
    def pending(self) -> int:
        """Vectors that wait."""
        return self._pending

    def run(self, job: Job) -> Any:
        """Queues a product, waits for it, and perhaps leads. Returns what `execute` returned for it.

        Raises:
            ServiceError: The queue is full, or the deadline passed, or the job was cancelled.
            BaseException: What `execute` raised for the launch that this product was in.
        """
        job.gate.acquire()
        with self._lock:
            self._enqueue(job)
            leads, self._busy = not self._busy, True
        while not job.done:
            if leads:
                self._lead(job)
            else:
                leads = self._follow(job)
        if job.error is not None:
            raise job.error
        return job.result

    def cancel(self, job: Job) -> None:
        """Drops a product that nobody waits for any more, unless its launch has begun."""
        with self._lock:
            job.cancelled = True
            if not job.done and not job.leads and self._remove(job):
                job.finish(_stale(job))

    def _enqueue(self, job: Job) -> None:
        job.queued = self._clock()
        if self._pending + len(job.block) > self._max_pending:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                f"{self._pending} vectors wait for the device, {self._max_pending} may: try again in a moment",
                retry_after=0.05,
            )
        self._queues.setdefault(job.tenant, collections.deque()).append(job)
        self._pending += len(job.block)

    def _remove(self, job: Job) -> bool:
        queue = self._queues.get(job.tenant, ())
        if job not in queue:
            return False
        assert isinstance(queue, collections.deque)
        queue.remove(job)
        self._pending -= len(job.block)
        if not queue:
            del self._queues[job.tenant]
        return True

    def _follow(self, job: Job) -> bool:
        """Waits for the result or for the lead; returns whether it leads now."""
        if not job.gate.acquire(timeout=_timeout(job.deadline - self._clock())):
            with self._lock:
                if not job.done and not job.leads and self._remove(job):
                    job.finish(_stale(job))
            # Open by now, or as soon as the launch that it is in ends: the device cannot be called back.
            job.gate.acquire()
        return job.leads and not job.done

    def _lead(self, job: Job) -> None:
        """Launches until the own product is done, then hands the lead on."""
        try:
            while not job.done:
                batch = self._take()
                if batch:
                    self._launch(batch)
        finally:
            with self._lock:
                following = next((queue[0] for queue in self._queues.values()), None)
                self._busy = following is not None
                if following is not None:
                    following.leads = True
                    following.gate.release()

    def _take(self) -> list[Job]:
        """The next tenant's first product, and all that share its key and fit; what is stale is dropped."""
        with self._lock:
            now = self._clock()
            for job in [
                job for queue in self._queues.values() for job in queue if job.deadline <= now or job.cancelled
            ]:
                self._remove(job)
                job.finish(_stale(job))
            if not self._queues:
                return []
            tenant, queue = next(iter(self._queues.items()))
            self._queues.move_to_end(tenant)
            key = queue[0].key
            try:
                room = self._limit(key)
            except BaseException as error:  # noqa: BLE001 - likewise
                failed = queue[0]
                self._remove(failed)
                failed.finish(error)
                return []
            batch: list[Job] = []
            for candidates in [queue, *(other for other in self._queues.values() if other is not queue)]:
                for job in candidates:
                    if job.key == key and (not batch or len(job.block) <= room):
                        batch.append(job)
                        room -= len(job.block)
            for job in batch:
                self._remove(job)
            return batch

    def _launch(self, batch: Sequence[Job]) -> None:
        started = self._clock()
        width = sum(len(job.block) for job in batch)
        error: BaseException | None = None
        results: Sequence[Any] = [None] * len(batch)
        try:
            results = self._execute(batch[0].key, [job.block for job in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} blocks")  # noqa: TRY301 - everybody must hear
        except BaseException as raised:  # noqa: BLE001 - it is raised again, in each caller's own thread
            error, results = raised, [None] * len(batch)
        finished = self._clock()
        for job, result in zip(batch, results, strict=True):
            job.result, job.width, job.started, job.finished = result, width, started, finished
            job.finish(error)


def pad(blocks: Sequence[Block], width: int) -> Block:
    """The blocks under each other, filled up with zeros to `width` rows. One block of that width is returned as it is."""
    if len(blocks) == 1 and len(blocks[0]) == width:
        return blocks[0]
    padded = np.empty((width, *blocks[0].shape[1:]), blocks[0].dtype)
    row = 0
    for block in blocks:
        padded[row : row + len(block)] = block
        row += len(block)
    padded[row:] = 0
    return padded


def split(block: Block, widths: Sequence[int]) -> list[Block]:
    """Undoes `pad`: views of the first rows, one for each width."""
    found, row = [], 0
    for width in widths:
        found.append(block[row : row + width])
        row += width
    return found


def _timeout(seconds: float) -> float:
    """Seconds as Lock.acquire takes them: -1 is for ever."""
    return -1.0 if seconds > threading.TIMEOUT_MAX else max(seconds, 0.0)


def _stale(job: Job) -> ServiceError:
    if job.cancelled:
        return ServiceError(Code.CANCELLED, "CANCELLED", "the caller cancelled the product before its launch")
    return ServiceError(Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the deadline passed before the device was free")
