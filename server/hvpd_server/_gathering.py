"""Which blocks are to grow for a while before they may be launched, and until when. Knows no threads and no clock.

The rule is mosec's: the time counts from the arrival of the first that waits (https://github.com/mosecorg/mosec).
"""

import collections
import heapq
import itertools
from collections.abc import Hashable

from hvpd_server._queue import Job


class Gathering:
    """Jobs that wait for others of their key: until the oldest of them has waited for so long, or the block is full.

    A job whose deadline comes before that does not wait, and neither do those that it could go with.

    Args:
        seconds: Most that a job waits here.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._blocks: dict[Hashable, _Block] = {}
        # Each block once, also those that have left. The oldest job of a block only gets younger, so an entry's time is a lower
        # bound, which is mended when it comes to the top.
        self._times: list[tuple[float, int, _Block]] = []
        self._order = itertools.count()

    def add(self, job: Job, full: int, now: float) -> list[Job]:
        """Takes a job in. Returns the block that may be launched by that, or nothing; what is returned has left.

        Args:
            job: The job.
            full: How many vectors are a full block.
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
        """Takes a job out; returns whether it was there."""
        block = self._blocks.get(job.key)
        if block is None or job not in block.jobs:
            return False
        del block.jobs[job]
        block.columns -= len(job.block)
        if not block.jobs:
            self._release(block)
        return True

    def due_of(self, job: Job) -> float:
        """Until when a job would wait."""
        due = job.queued + self._seconds
        return due if due < job.deadline else job.queued

    def due(self) -> float:
        """When the next block may be launched; infinity where there is none."""
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

    def ripe(self, now: float) -> list[Job]:
        """Takes out all blocks whose time has come."""
        found: list[Job] = []
        while self.due() <= now:
            found += self._release(self._times[0][2])
        return found

    def first(self) -> Job | None:
        """A job of the block that is due next."""
        return next(iter(self._times[0][2].jobs)) if self.due() < float("inf") else None

    def _release(self, block: "_Block") -> list[Job]:
        del self._blocks[block.key]
        jobs = list(block.jobs)
        block.jobs.clear()
        block.key = None  # It stays among the times for a while, and a key may hold much.
        return jobs


class _Block:
    """The jobs of one key, in the order of their arrival."""

    __slots__ = ("columns", "jobs", "key")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.jobs: collections.OrderedDict[Job, None] = collections.OrderedDict()
        self.columns = 0
