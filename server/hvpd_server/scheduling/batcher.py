"""The batcher joins products that arrive while the device works, and launches them as
one block.

It has no thread of its own. A caller that finds the device free becomes the leader: it
launches the waiting products, its own included, and then hands the lead to a caller
that still waits. So a lone caller never changes threads, and many callers are
batched as fast as the device takes them.

A device with memory of its own computes one launch while the results of another are
copied out. There, several launches are in flight: a leader hands the lead on as soon as
it has taken its launch. The next leader launches beside it when waiting would not make
the block wider. Knows neither gRPC nor jax.
"""

import functools
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from hvpd_server.errors import Code, ServiceError
from hvpd_server.scheduling.backlog import Backlog, Limit
from hvpd_server.scheduling.fair_queue import Weights
from hvpd_server.scheduling.in_flight import InFlight
from hvpd_server.scheduling.job import Job, State
from hvpd_server.scheduling.wait_policy import Wait, WaitPolicy

Execute = Callable[[Hashable, Sequence[Job]], Sequence[Any]]
"""Multiplies the blocks V[k,n] of one key. Returns a result for each. Needs no lock."""


class Batcher:
    """The queue in front of one device.

    Args:
        execute: Multiplies.
        limit: Most vectors of a launch.
        max_pending: Most vectors that wait; more are refused with RESOURCE_EXHAUSTED.
        max_launches: Most launches in flight.
        max_delay: Seconds that a block waits for more jobs, unless it is full.
        weights: Weights of the tenants; by default all have 1.
        clock: Seconds, monotonic.
        condition: Makes the condition on which a leader waits until it may launch.
    """

    def __init__(
        self,
        execute: Execute,
        limit: Limit,
        *,
        max_pending: int,
        max_launches: int = 1,
        max_delay: float = 0.0,
        weights: Weights = lambda tenant: 1.0,
        clock: Callable[[], float] = time.monotonic,
        condition: Callable[[threading.Lock], threading.Condition] = threading.Condition,
    ) -> None:
        self._execute = execute
        self._max_pending = max_pending
        self._several = max_launches > 1
        self._clock = clock
        self._lock = threading.Lock()
        self._may_launch = condition(self._lock)
        self._backlog = Backlog(limit, weights, max_delay)
        self._policy = WaitPolicy(limit)
        self.in_flight = InFlight(self._lock, max_launches)
        """The launches in flight."""
        self._led = False  # Whether a caller has the lead.
        self._parked: Wait | None = None  # The wait of the leader.
        self._lone: Job | None = None  # The lone product in flight.
        self._deferred: Callable[[], None] | None = None  # The record of a lone launch.

    @property
    def pending(self) -> int:
        """Vectors that wait."""
        return self._backlog.columns

    def run(self, job: Job) -> Any:
        """Queue a product, and wait for it. Return its result from `execute`.

        Raises:
            ServiceError: The queue is full, the deadline passed, or `cancel` was
                called.
            BaseException: The error of `execute` for the launch of this product.
        """
        leads = False
        with self._lock:
            self._record()
            self._admit(job)
            lone = self._begin_lone(job)
            if not lone:
                job.gate.acquire()
                self._enqueue(job)
                leads, self._led = not self._led, True
                if leads:
                    job.become(State.LEADING)
        if lone:
            return self._launch_lone(job)
        if leads:
            self._lead(job)
        while job.state is not State.DONE:
            self._follow(job)
            if job.state is State.LEADING:
                self._lead(job)
        if job.error is not None:
            raise job.error
        return job.result

    def cancel(self, job: Job) -> None:
        """Drop a product that its caller has given up, unless its launch has begun."""
        with self._lock:
            job.cancelled = True
            if job.state is State.LEADING:  # The leader itself drops its job.
                self._may_launch.notify()
            elif job.is_queued:
                self._backlog.drop(job)

    def _admit(self, job: Job) -> None:
        job.queued = self._clock()
        pending = self._backlog.columns
        if pending + len(job.block) > self._max_pending:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                f"{pending} vectors wait for the device, and {len(job.block)} more would exceed the limit of "
                f"{self._max_pending}: try again in a moment",
                retry_after=self.in_flight.retry_after(pending),
            )
        if job.stale(job.queued):
            raise job.stale_error()
        if job.holdback is not None:
            job.holdback.arrived(len(job.block), job.queued)

    def _enqueue(self, job: Job) -> None:
        if self._lone is not None:
            self._backlog.queue.charge(self._lone.tenant, len(self._lone.block))
            self._lone = None
        released, wait = self._backlog.add(job), self._parked
        if released or (wait and self._policy.ends(wait, job, self._backlog, self.in_flight)):
            self._may_launch.notify()

    # Callers: one leads, the others follow

    def _follow(self, job: Job) -> None:
        """Wait until the job is done, or its caller leads."""
        seconds = max(job.deadline - self._clock(), 0.0)
        if not job.gate.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
            with self._lock:
                if job.state is State.WAITING:
                    self._backlog.drop(job)
            # The gate is open, or opens when the launch ends. No launch can be stopped.
            job.gate.acquire()

    def _lead(self, job: Job) -> None:
        """Launch until the leader's own job is done. If launches may overlap, launch
        once.
        """
        if self._several:
            self._launch(self._take(job))
            with self._lock:
                if job.state is State.SERVING:
                    job.become(State.WAITING)
            return
        try:
            while job.state is not State.DONE:
                self._launch(self._take(job))
        finally:
            with self._lock:
                self._appoint()

    def _appoint(self) -> None:
        """Give the lead to a caller that waits."""
        # An idle queue forgets the debts of tenants: do not ask it during a launch.
        following = self._backlog.next_leader() if self.pending or not self.in_flight.keys else None
        self._led = following is not None
        if following is not None:
            following.become(State.LEADING)
            following.gate.release()

    def _take(self, own: Job) -> list[Job]:
        """Return the next launch, or nothing if the leader's own job is done."""
        with self._lock:
            try:
                return self._next(own)
            except BaseException as error:  # The caller leaves, so its job must, too.
                if own.is_queued:
                    self._backlog.drop(own, error)
                raise
            finally:
                self._parked = None
                if self._several:  # The lead goes on before the launch begins.
                    if own.is_queued:
                        own.become(State.SERVING)
                    self._appoint()

    def _next(self, own: Job) -> list[Job]:
        """Wait for as long as the policy says, and take the next launch."""
        while True:
            now = self._clock()
            if own.is_queued and own.stale(now):
                self._backlog.drop(own)
            if own.state is State.DONE:
                return []
            self._backlog.release(now)
            wait = self._policy.next_launch(self._backlog, self.in_flight, now)
            if wait.until > now:
                self._parked = wait
                self._may_launch.wait(min(wait.until - now, own.deadline - now, threading.TIMEOUT_MAX))
            elif batch := self._backlog.take(now):
                self.in_flight.begin(batch[0].key, sum([len(job.block) for job in batch]))
                return batch

    def _launch(self, batch: Sequence[Job]) -> None:
        """Multiply the jobs of a launch, and let their callers go on."""
        if not batch:
            return
        widths = [len(job.block) for job in batch]
        total = sum(widths)
        error: BaseException | None = None
        started = self._clock()
        try:
            results = self._multiply(batch)
        except BaseException as raised:  # noqa: BLE001 - it is raised again, in each caller's own thread
            error, results = raised, [None] * len(batch)
        finished = self._clock()
        with self._lock:
            seconds = self._land(batch[0], total, started, finished)
            if error is None and batch[0].holdback is not None:
                batch[0].holdback.answered(widths, finished - seconds, finished)
        for job, width, result in zip(batch, widths, results, strict=True):
            job.result, job.width, job.started, job.finished = result, total, started, finished
            job.device_seconds = seconds * width / total
            job.finish(error)

    def _multiply(self, batch: Sequence[Job]) -> Sequence[Any]:
        results = self._execute(batch[0].key, batch)
        if len(results) != len(batch):
            raise RuntimeError(f"{len(results)} results for {len(batch)} blocks")
        return results

    def _land(self, first: Job, columns: int, started: float, finished: float) -> float:
        """Record the end of a launch. Return the seconds that the device had for it."""
        seconds = self.in_flight.end(first.key, columns, started, finished)
        if self._parked is not None:
            self._may_launch.notify()
        elif self._several and not self._led:
            self._appoint()
        return seconds

    # Shortcut: a lone product skips the backlog, and is recorded after its answer

    def _begin_lone(self, job: Job) -> bool:
        """Begin a launch of this job, if it need not wait. Return whether it begins."""
        columns = len(job.block)
        busy = self._led or self.in_flight.keys or self._backlog.delays
        if busy or self._policy.held_back(job, columns, job.queued).until > job.queued:
            return False
        job.become(State.LAUNCHED)
        self.in_flight.begin(job.key, columns)
        self._lone, self._led = job, not self._several
        return True

    def _launch_lone(self, job: Job) -> Any:
        """Multiply a lone job. Defer its record, if no other product arrived."""
        columns, answered, started = len(job.block), False, self._clock()
        try:
            (result,) = self._multiply((job,))
            answered = True
        finally:
            finished = self._clock()
            with self._lock:
                deferred, self._lone = self._lone is not None and not self._several, None
                seconds = self._land(job, columns, started, finished)
                if answered and (holdback := job.holdback) is not None:
                    self._deferred = functools.partial(holdback.answered, (columns,), finished - seconds, finished)
                if not deferred:
                    self._record()
                if not self._several:
                    self._appoint()
                job.become(State.DONE)
        job.width, job.started, job.finished, job.device_seconds = columns, started, finished, seconds
        return result

    def record_deferred(self) -> None:
        """Record the last lone launch, if its record was deferred. Without this call,
        the next product records it.
        """
        if self._deferred is not None:
            with self._lock:
                self._record()

    def _record(self) -> None:
        record, self._deferred = self._deferred, None
        if record is not None:
            record()
