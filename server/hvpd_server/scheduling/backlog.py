"""The jobs that wait for the device: in the fair queue or, with a queue delay, beside
it. Knows no threads and no clock.
"""

from collections.abc import Callable, Hashable, Sequence

from hvpd_server.scheduling.fair_queue import FairQueue, Weights
from hvpd_server.scheduling.job import Job, State
from hvpd_server.scheduling.queue_delay import QueueDelay

Limit = Callable[[Hashable], int]
"""The most vectors that the next launch of a key can take; at least as many as each of
its products has.
"""


class Backlog:
    """The jobs that wait for the device.

    Args:
        limit: Most vectors of a launch.
        weights: Weights of the tenants.
        max_delay: Seconds that a block which is not full waits for more jobs; 0: none.
    """

    def __init__(self, limit: Limit, weights: Weights, max_delay: float) -> None:
        self._limit = limit
        self.queue = FairQueue(weights)
        """The jobs that may be launched."""
        self._delay = QueueDelay(max_delay) if max_delay > 0 else None
        self.columns = 0
        """Vectors that wait."""

    @property
    def delays(self) -> bool:
        """Whether there is a queue delay."""
        return self._delay is not None

    def add(self, job: Job) -> bool:
        """Add a job. Return whether that ends the queue delay of its block."""
        released: Sequence[Job] = ()
        if self._delay is None or self.queue.columns(job.key):
            self.queue.add(job)
        else:
            released = self._delay.add(job, self._limit(job.key), job.queued)
            self._add_to_queue(released)
        job.become(State.WAITING)
        self.columns += len(job.block)
        return bool(released)

    def drop(self, job: Job, error: BaseException | None = None) -> None:
        """Remove a job, and give its caller an error: by default, that the job is
        stale.
        """
        if self._delay is None or not self._delay.remove(job):
            self.queue.remove(job)
        self.columns -= len(job.block)
        job.finish(error or job.stale_error())

    def release(self, now: float) -> None:
        """Let all blocks whose queue delay has ended be launched."""
        if self._delay is not None:
            self._add_to_queue(self._delay.release(now))

    def due(self) -> float:
        """Return when the next queue delay ends; infinity if there is none."""
        return float("inf") if self._delay is None else self._delay.due()

    def next_leader(self) -> Job | None:
        """Return the job whose caller should lead: the first job of the next launch or,
        if its caller is busy, a job whose caller waits.
        """
        found = self.queue.head()
        if found is None and self._delay is not None:
            found = self._delay.first()
        if found is not None and found.state is State.SERVING:
            found = next((job for job in self.queue if job.state is State.WAITING), found)
        return found

    def take(self, now: float) -> list[Job]:
        """Remove the next launch, and return it; nothing if no job may be launched.
        Stale jobs on the way are dropped.
        """
        while (head := self.queue.head()) is not None:
            if head.stale(now):
                self.drop(head)
                continue
            try:
                room = self._limit(head.key)
            except BaseException as error:  # noqa: BLE001 - raised again, in its caller's own thread
                self.drop(head, error)
                continue
            if head.holdback is not None:
                room = head.holdback.width(self.queue.columns(head.key), room)
            launch, stale = self.queue.take(head, room, now)
            for job in launch:
                self.columns -= len(job.block)
                job.become(State.LAUNCHED)
            for job in stale:
                self.columns -= len(job.block)
                job.finish(job.stale_error())
            self._delay_rest(head.key, room, now)
            return launch
        return []

    def _add_to_queue(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.queue.add(job)

    def _delay_rest(self, key: Hashable, room: int, now: float) -> None:
        """Delay again the jobs that a launch had no room for, unless they fill a block
        or one of them is due.
        """
        delay = self._delay
        if delay is None or not 0 < self.queue.columns(key) < room:
            return
        rest = sorted(self.queue.jobs(key), key=lambda job: job.queued)
        if all(delay.due_of(job) > now for job in rest):
            for job in rest:
                self.queue.remove(job)
                self._add_to_queue(delay.add(job, room, now))
