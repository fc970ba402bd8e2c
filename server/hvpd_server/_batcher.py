"""Coalescing: while the device works, arrivals queue; when it is free, all that share a key go as one block, without waiting.

There is no thread of the batcher's own. A caller that finds the device free leads: it launches what is queued, its own
product among it, and then hands the lead to a caller that still waits. So a lone caller never changes threads, and many
callers are batched as fast as the device takes them. What goes next is up to _queue. A block waits to become wider only where
that is configured (_gathering), or where it was measured to serve everybody sooner (_crowd).

A device with memory of its own computes one launch while another's results are copied out and the host is busy with its vectors. There,
several launches are in flight: who leads hands the lead on as soon as it has taken its launch, and whoever has it then launches before that has
ended, where waiting would not make the block wider. Knows neither gRPC nor jax.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from hvpd_server import _buffers
from hvpd_server._crowd import Crowd
from hvpd_server._errors import Code, ServiceError
from hvpd_server._gathering import Gathering
from hvpd_server._queue import Block, FairQueue, Job, Weights

__all__ = ["Batcher", "Job", "pad", "split"]

Execute = Callable[[Hashable, Sequence[Job]], Sequence[Any]]
"""Multiplies the blocks V[k,n] of one key, in one launch; returns what each caller gets. Runs outside of any lock."""

Limit = Callable[[Hashable], int]
"""The most vectors that the next launch of a key can take; at least as many as any one of its products has."""

_EQUAL: Mapping[str, float] = MappingProxyType({})

_MEMORY = 0.9
"""How much of the rate of launches is remembered from one launch to the next."""


class _Ended(NamedTuple):
    """A launch, as it is looked back at."""

    key: Hashable
    crowd: Crowd | None
    widths: Sequence[int]
    started: float
    finished: float
    failed: bool


class Batcher:
    """The queue in front of one device.

    Args:
        execute: Multiplies.
        limit: How wide a launch may be.
        max_pending: Most vectors that wait; more are refused with RESOURCE_EXHAUSTED.
        max_launches: Most launches in flight.
        max_delay: Seconds for which a block that could be wider waits for more, counted from the arrival of its oldest product.
        weights: Of tenants; all have 1 without.
        clock: Seconds, monotonic.
        condition: Where a leader waits that has nothing to launch yet.
    """

    def __init__(
        self,
        execute: Execute,
        limit: Limit,
        *,
        max_pending: int,
        max_launches: int = 1,
        max_delay: float = 0.0,
        weights: Weights = _EQUAL,
        clock: Callable[[], float] = time.monotonic,
        condition: Callable[[threading.Lock], threading.Condition] = threading.Condition,
    ) -> None:
        self._execute = execute
        self._limit = limit
        self._max_pending = max_pending
        self._max_launches = max_launches
        self._several = max_launches > 1
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = condition(self._lock)
        self._queue = FairQueue(weights)
        self._gathering = Gathering(max_delay) if max_delay > 0 else None
        self._pending = 0
        self._in_flight = 0
        self._flying: list[Hashable] = []  # The keys of the launches in flight.
        self.begun = 0
        """Launches that began, so far."""
        self._landed = 0.0  # When the last launch ended.
        self._led = False  # Whether somebody has the right to take the next launch.
        self._parked = False  # Whether that one waits for a launch in flight to end.
        self._yielding = 0  # Launches in flight that do not run: they are in `alone`, and one of them has its turn.
        self._turn = threading.Lock()
        self._landing = threading.Condition(self._lock)
        self._alone: tuple[str, int] | None = None  # Tenant and vectors of a launch in flight that was in no queue.
        self._ended: _Ended | None = None  # A launch whose end is not noted yet: nobody waited for it.
        self._held: tuple[Crowd, int] | None = None
        self._launched_seconds = 0.0
        self._launched_columns = 0.0

    @property
    def pending(self) -> int:
        """Vectors that wait."""
        return self._pending

    @property
    def in_flight(self) -> int:
        """Vectors in launches."""
        self.settle()
        return self._in_flight

    def settle(self) -> None:
        """Notes what was left until there is time for it: without this, the next who looks does."""
        if self._ended is not None:
            with self._lock:
                self._note_end()

    def run(self, job: Job) -> Any:
        """Queues a product, waits for it, and perhaps leads. Returns what `execute` returned for it.

        Raises:
            ServiceError: The queue is full, or the deadline passed, or the job was cancelled.
            BaseException: What `execute` raised for the launch that this product was in.
        """
        with self._lock:
            self._note_end()
            self._admit(job)
            free = not self._led and not self._flying and self._gathering is None
            alone = free and self._due(job, len(job.block), job.queued)[0] <= job.queued
            if alone:  # Nothing waits: the queue has no part in it.
                self._alone = job.tenant, len(job.block)
                self._fly(job.key, len(job.block))
                self._led = not self._several
            else:
                job.gate.acquire()
                self._enqueue(job)
                job.leads = not self._led
                self._led = True
        if alone:
            return self._launch_alone(job)
        leads = job.leads
        while not job.done:
            if leads:
                self._lead(job)
                leads = False
            else:
                leads = self._follow(job)
        if job.error is not None:
            raise job.error
        return job.result

    @property
    def launches(self) -> int:
        """Launches in flight."""
        self.settle()
        return len(self._flying)

    @property
    def overlaps(self) -> bool:
        """Whether a launch may begin before another has ended."""
        return self._max_launches > 1

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """In it, the launch that calls is the only one that runs, and from now on there is one at a time."""
        with self._lock:
            self._max_launches = 1
            self._yielding += 1
            self._landing.notify_all()
        with self._turn:
            with self._lock:
                self._landing.wait_for(lambda: len(self._flying) == self._yielding)
            try:
                yield
            finally:
                with self._lock:
                    self._yielding -= 1

    def cancel(self, job: Job) -> None:
        """Drops a product that nobody waits for any more, unless its launch has begun."""
        with self._lock:
            job.cancelled = True
            if job.leads:  # Whoever leads drops its own, and hands the lead on.
                self._changed.notify()
            elif job.waits:
                self._drop(job)

    def _admit(self, job: Job) -> None:
        job.queued = self._clock()
        if self._pending + len(job.block) > self._max_pending:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                f"{self._pending} vectors wait for the device, and {len(job.block)} more would be over the limit of "
                f"{self._max_pending}: try again in a moment",
                retry_after=self._retry_after(),
            )
        if job.cancelled or job.deadline <= job.queued:
            raise _stale(job)
        if job.crowd is not None:
            job.crowd.arrived(len(job.block), job.queued)

    def _enqueue(self, job: Job) -> None:
        if self._alone is not None:
            self._queue.charge(*self._alone)
            self._alone = None
        if self._gathering is None or self._queue.columns(job.key):
            self._queue.add(job)
        else:
            ripe = self._gathering.add(job, self._limit(job.key), job.queued)
            for each in ripe:
                self._queue.add(each)
            if ripe:
                self._changed.notify()
        job.waits = True
        self._pending += len(job.block)
        if self._is_awaited(job):
            self._changed.notify()

    def _is_awaited(self, job: Job) -> bool:
        """Whether a leader waits that has no reason to any more, now that this is queued."""
        if self._held is not None:
            crowd, goal = self._held
            return job.crowd is not crowd or self._pending >= goal
        return self._parked and self._not_before(job.queued) <= job.queued

    def _drop(self, job: Job, error: BaseException | None = None) -> None:
        """Takes a product that waits out of the queue, and says why to its caller."""
        if self._gathering is None or not self._gathering.remove(job):
            self._queue.remove(job)
        job.waits = False
        self._pending -= len(job.block)
        job.finish(error or _stale(job))

    def _follow(self, job: Job) -> bool:
        """Waits for the result or for the lead; returns whether it leads now."""
        if not job.gate.acquire(timeout=_timeout(job.deadline - self._clock())):
            with self._lock:
                if job.waits and not job.leads:
                    self._drop(job)
            # Open by now, or as soon as the launch that it is in ends: the device cannot be called back.
            job.gate.acquire()
        return job.leads and not job.done

    def _lead(self, job: Job) -> None:
        """Launches until the own product is done, and then hands the lead on; where several may be in flight, launches once."""
        if self._several:
            batch = self._take(job)
            if batch:
                self._launch(batch)
            job.launching = False
            return
        try:
            while not job.done:
                batch = self._take(job)
                if batch:
                    self._launch(batch)
        finally:
            with self._lock:
                self._appoint()

    def _appoint(self) -> None:
        """Has somebody lead who waits; one who is not busy with a launch of others, where there is one."""
        # What tenants owe is forgotten only when nothing is in flight, either.
        following = self._queue.head() if self._pending or not self._flying else None
        if following is None and self._gathering is not None:
            following = self._gathering.first()
        if following is not None and following.launching:
            following = next((job for job in self._queue if not job.launching), following)
        self._led = following is not None
        if following is not None:
            following.leads = True
            following.gate.release()

    def _take(self, own: Job) -> list[Job]:
        """What to launch next; nothing where the leader's own product is done. Waits only where there is reason to.

        Where several launches may be in flight, somebody else leads from then on.
        """
        with self._lock:
            try:
                own.launching = True
                return self._next(own)
            except BaseException as error:  # Who is gone cannot be launched, or lead.
                if own.waits:
                    self._drop(own, error)
                raise
            finally:
                if self._several:
                    own.leads = False
                    self._appoint()

    def _next(self, own: Job) -> list[Job]:
        while True:
            now = self._clock()
            if own.waits and own.stale(now):
                self._drop(own)
            if own.done:
                return []
            if self._gathering is not None:
                for job in self._gathering.ripe(now):
                    self._queue.add(job)
            due = self._not_before(now)
            if due <= now:
                batch = self._block(now)
                if batch or self._gathering is None:
                    return batch
                continue  # All that was ripe has expired.
            self._parked = bool(self._flying)
            seconds = min(due, own.deadline) - now
            self._changed.wait(None if seconds > threading.TIMEOUT_MAX else seconds)
            self._held, self._parked = None, False

    def _not_before(self, now: float) -> float:
        """When what waits may be launched, as things stand: `now`, or later, or when another launch has ended (infinity)."""
        if self._flying:
            return self._ahead(now)
        if self._gathering is not None:
            return now if self._queue.head() is not None else self._gathering.due()
        return self._hold(now)

    def _ahead(self, now: float) -> float:
        """When the next launch may begin before that in flight has ended: when waiting does not make it wider, or infinity: not before."""
        head = self._queue.head()
        if head is None or len(self._flying) >= self._max_launches:
            return float("inf")
        until = float("inf")
        if head.key not in self._flying:
            until = now if head.crowd is None else head.crowd.awaited(now)
        if until <= now:
            return now
        try:
            full = self._queue.columns(head.key) >= self._limit(head.key)
        except Exception:  # noqa: BLE001 - raised again when it is launched
            return now
        return now if full else until

    def _hold(self, now: float) -> float:
        """Until when what waits is held back for its crowd; `now` where it is not, or where anything else waits."""
        head = self._queue.head()
        if head is None or head.crowd is None or self._queue.columns(head.key) < self._pending:
            return now
        due, goal = self._due(head, self._pending, now)
        if due > now:
            if any(job.deadline <= due for job in self._queue.jobs(head.key)):
                return now
            self._held = head.crowd, goal
        return due

    def _due(self, job: Job, columns: int, now: float) -> tuple[float, int]:
        """Until when so many vectors should wait for the rest of their crowd, and how many there are to be then."""
        crowd = job.crowd
        if crowd is None or not crowd.expected:
            return now, columns
        try:
            room = self._limit(job.key)
        except Exception:  # noqa: BLE001 - raised again when it is launched
            return now, columns
        return crowd.due(columns, room, now), min(columns + crowd.expected, room)

    def _block(self, now: float) -> list[Job]:
        """Takes the next launch out of the queue; what is found stale is dropped."""
        while (head := self._queue.head()) is not None:
            if head.stale(now):
                self._drop(head)
                continue
            try:
                room = self._limit(head.key)
            except BaseException as error:  # noqa: BLE001 - raised again, in its caller's own thread
                self._drop(head, error)
                continue
            if head.crowd is not None:
                room = head.crowd.width(self._queue.columns(head.key), room)
            batch, stale = self._queue.take(head, room, now)
            for job in batch:
                job.waits = False
                self._pending -= len(job.block)
            for job in stale:
                job.waits = False
                self._pending -= len(job.block)
                job.finish(_stale(job))
            if self._gathering is not None:
                self._gather_rest(self._gathering, head.key, room, now)
            if batch:
                self._fly(batch[0].key, sum([len(job.block) for job in batch]))
            return batch
        return []

    def _fly(self, key: Hashable, width: int) -> None:
        """Notes that a launch begins."""
        self.begun += 1
        self._flying.append(key)
        self._in_flight += width

    def _gather_rest(self, gathering: Gathering, key: Hashable, room: int, now: float) -> None:
        """Lets those that a launch had no room for gather again, where they are neither a full block nor old."""
        if not 0 < self._queue.columns(key) < room:
            return
        rest = sorted(self._queue.jobs(key), key=lambda job: job.queued)
        if all(gathering.due_of(job) > now for job in rest):
            for job in rest:
                self._queue.remove(job)
                for ripe in gathering.add(job, room, now):
                    self._queue.add(ripe)

    def _launch_alone(self, job: Job) -> Any:
        """Multiplies what waits beside nothing else. Where nobody came meanwhile, its end is noted later: the answer goes first."""
        width, failed, started = len(job.block), True, self._clock()
        try:
            results = self._execute(job.key, (job,))
            _check_count(results, 1)
            failed = False
        finally:
            finished = self._clock()
            seconds = finished - started
            with self._lock:
                self._ended = _Ended(job.key, job.crowd, (width,), started, finished, failed)
                if failed or self._several or self._alone is None:
                    seconds = self._note_end()
        job.width, job.started, job.finished, job.device_seconds = width, started, finished, seconds
        return results[0]

    def _note_end(self) -> float:
        """Notes that a launch has ended, where that was left, and has somebody lead who waits. Returns what `_land` does."""
        ended, self._ended = self._ended, None
        if ended is None:
            return 0.0
        try:
            return self._land(ended)
        finally:
            if not self._several:
                self._appoint()

    def _launch(self, batch: Sequence[Job]) -> None:
        """Multiplies, and lets those go on whose products these are."""
        started = self._clock()
        widths = [len(job.block) for job in batch]
        error: BaseException | None = None
        results: Sequence[Any] = ()
        try:
            results = self._execute(batch[0].key, batch)
            _check_count(results, len(batch))
        except BaseException as raised:  # noqa: BLE001 - it is raised again, in each caller's own thread
            error, results = raised, [None] * len(batch)
        finished = self._clock()
        with self._lock:
            seconds = self._land(_Ended(batch[0].key, batch[0].crowd, widths, started, finished, error is not None))
        total = sum(widths)
        for job, width, result in zip(batch, widths, results, strict=True):
            job.result, job.width, job.started, job.finished = result, total, started, finished
            job.device_seconds = seconds * width / total
            job.finish(error)

    def _land(self, ended: _Ended) -> float:
        """Notes that a launch has ended. Returns the seconds that the device had for it."""
        key, crowd, widths, started, finished, failed = ended
        width = sum(widths)
        self._flying.remove(key)
        self._in_flight -= width
        self._alone = None
        seconds = max(finished - max(started, self._landed), 0.0)  # While another was computed, this one waited.
        self._landed = max(finished, self._landed)
        if not failed and crowd is not None:
            crowd.answered(widths, finished - seconds, finished)
        self._launched_seconds = _MEMORY * self._launched_seconds + seconds
        self._launched_columns = _MEMORY * self._launched_columns + width
        if self._parked:
            self._changed.notify()
        elif self._several and not self._led:
            self._appoint()
        if self._yielding:
            self._landing.notify_all()
        return seconds

    def _retry_after(self) -> float:
        """Seconds until what waits is launched, at the rate of the last launches."""
        if not self._launched_columns:
            return 0.05
        return min(max(self._pending * self._launched_seconds / self._launched_columns, 0.01), 2.0)


def pad(blocks: Sequence[Block], width: int) -> Block:
    """The blocks under each other, filled up with zeros to `width` rows. One block of that width is returned as it is."""
    if len(blocks) == 1 and len(blocks[0]) == width:
        return blocks[0]
    padded = _buffers.empty((width, *blocks[0].shape[1:]), blocks[0].dtype)
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


def _check_count(results: Sequence[Any], blocks: int) -> None:
    if len(results) != blocks:
        raise RuntimeError(f"{len(results)} results for {blocks} blocks")


def _timeout(seconds: float) -> float:
    """Seconds as Lock.acquire takes them: -1 is for ever."""
    return -1.0 if seconds > threading.TIMEOUT_MAX else max(seconds, 0.0)


def _stale(job: Job) -> ServiceError:
    if job.cancelled:
        return ServiceError(Code.CANCELLED, "CANCELLED", "the caller cancelled the product before its launch")
    return ServiceError(Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the deadline passed before the device was free")
