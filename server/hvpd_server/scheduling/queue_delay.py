"""Queue delay: a block that is not full waits for more jobs, for a configured time.
Knows no threads and no clock.

The rule is mosec's: the time counts from the arrival of the block's oldest job
(https://github.com/mosecorg/mosec).
"""

import collections
import heapq
import itertools
from collections.abc import Hashable

from hvpd_server.scheduling.job import Job


class QueueDelay:
    """Jobs that wait for others of their key, until the block is full or its oldest job
    has waited for `seconds`.

    If the deadline of a job comes before that, its block is released at once.

    Args:
        seconds: Longest wait of a job.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._blocks: dict[Hashable, _Block] = {}
        # Every block once, also blocks that were released. When a block loses its
        # oldest job, the next oldest is younger. So an entry's time is a lower bound,
        # which is corrected when it comes to the top.
        self._times: list[tuple[float, int, _Block]] = []
        self._order = itertools.count()

    def add(self, job: Job, full: int, now: float) -> list[Job]:
        """Add a job. Return the jobs of its block if that may be launched now, else
        nothing; returned jobs are removed.

        Args:
            job: The job.
            full: Vectors of a full block.
            now: Seconds.
        """
        due = self.due_of(job)
        block = self._blocks.get(job.key)
        if block is None:
            block = self._blocks[job.key] = _Block(job.key)
            heapq.heappush(self._times, (due, next(self._order), block))
        block.jobs[job] = None
        block.columns += len(job.block)
        return self._release(block) if block.columns >= full or due <= now else []

    def remove(self, job: Job) -> bool:
        """Remove a job. Return whether it was here."""
        block = self._blocks.get(job.key)
        if block is None or job not in block.jobs:
            return False
        del block.jobs[job]
        block.columns -= len(job.block)
        if not block.jobs:
            self._release(block)
        return True

    def due_of(self, job: Job) -> float:
        """Return until when a job would wait; its arrival if its deadline comes before
        that.
        """
        due = job.queued + self._seconds
        return due if due < job.deadline else job.queued

    def due(self) -> float:
        """Return when the next block is due; infinity if there is none."""
        times = self._times
        while times:
            time, _, block = times[0]
            if not block.jobs:
                heapq.heappop(times)
            elif (due := next(iter(block.jobs)).queued + self._seconds) > time:
                heapq.heapreplace(times, (due, next(self._order), block))
            else:
                return time
        return float("inf")

    def release(self, now: float) -> list[Job]:
        """Remove all blocks that are due, and return their jobs."""
        found: list[Job] = []
        while self.due() <= now:
            found += self._release(self._times[0][2])
        return found

    def first(self) -> Job | None:
        """Return the oldest job of the block that is due next, if there is one."""
        return next(iter(self._times[0][2].jobs)) if self.due() < float("inf") else None

    def _release(self, block: "_Block") -> list[Job]:
        del self._blocks[block.key]
        jobs = list(block.jobs)
        block.jobs.clear()
        block.key = None  # The heap keeps the block for a while, and a key holds a point.
        return jobs


class _Block:
    """The jobs of one key, in the order of their arrival."""

    __slots__ = ("columns", "jobs", "key")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.jobs: collections.OrderedDict[Job, None] = collections.OrderedDict()
        self.columns = 0
