"""The fair queue of jobs that may be launched: fair between tenants, by priority within
one. Knows no threads and no clock.

The rule is start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), with launches
that may have products of several tenants. Each tenant has a virtual time. A launch adds
the tenant's vectors, divided by its weight, to that time. The next launch begins with
the tenant whose time is least. A tenant that was idle begins at the time of the launch
in progress, so that idle tenants gain no credit. The cost of an operation does not grow
with the number of jobs.
"""

import collections
import heapq
import itertools
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

from hvpd_server.scheduling.job import Job

Weights = Callable[[str], float]
"""Returns a tenant's weight, more than 0. Called under a lock; must not raise."""

_MISFITS = 64
"""Most jobs of a key that one launch passes over because they are wider than the room
that is left.
"""


class FairQueue:
    """The jobs that may be launched.

    Args:
        weights: Weights of the tenants.
    """

    def __init__(self, weights: Weights) -> None:
        self._weigh = weights
        self._tenants: dict[str, _Tenant] = {}
        self._keys: dict[Hashable, _Key] = {}
        # Every tenant once. Times only grow, so an entry holds a lower bound, which is
        # corrected when it comes to the top.
        self._turns: list[tuple[float, int, _Tenant]] = []
        self._order = itertools.count()
        self._time = 0.0

    def add(self, job: Job) -> None:
        """Add a job, as the last of its priority."""
        tenant = self._tenant(job.tenant)
        tenant.jobs.add(job)
        found = self._keys.get(job.key)
        if found is None:
            found = self._keys[job.key] = _Key()
        found.add(tenant, job)

    def remove(self, job: Job) -> None:
        """Remove a job."""
        tenant, found = self._tenants[job.tenant], self._keys[job.key]
        tenant.jobs.remove(job)
        found.remove(tenant, job)
        if not found.lines:
            del self._keys[job.key]

    def head(self) -> Job | None:
        """Return the job with which the next launch begins. If there is none, the
        device is idle, and all debts of tenants are forgotten.
        """
        turns = self._turns
        while turns:
            time, _, tenant = turns[0]
            if time < tenant.time:
                heapq.heapreplace(turns, (tenant.time, next(self._order), tenant))
            elif tenant.jobs.size:
                return next(iter(tenant.jobs))
            else:
                heapq.heappop(turns)
                del self._tenants[tenant.name]
        return None

    def take(self, head: Job, room: int, now: float) -> tuple[list[Job], list[Job]]:
        """Remove a launch: the head and all jobs that share its key and fit, those of
        its own tenant first. Charge the tenants.

        Args:
            head: The job that `head` returned.
            room: Most vectors of a launch. A head that is wider is launched without
                others.
            now: Seconds. Jobs whose deadline has passed by then are stale.

        Returns:
            The launch, and the stale jobs that were met on the way. Both are removed.
        """
        leader, found = self._tenants[head.tenant], self._keys[head.key]
        self._time = leader.time
        launch: list[Job] = []
        stale: list[Job] = []
        left, misfits = room, 0
        for tenant in _in_turn(leader, found.lines, room):
            taken: list[Job] = []
            columns = 0
            for job in found.lines[tenant]:
                width = len(job.block)
                if job.cancelled or job.deadline <= now:
                    stale.append(job)
                elif not (launch or taken) or width <= left:
                    taken.append(job)
                    left -= width
                    columns += width
                    if left <= 0:
                        break
                else:
                    misfits += 1
                    if misfits == _MISFITS:
                        break
            found.take(tenant, taken, columns)
            launch += taken
            # A tenant that joins launches of others owes one full launch of its own at
            # most.
            most = self._time + max(room, columns) / tenant.weight
            tenant.time = max(tenant.time, min(tenant.time + columns / tenant.weight, most))
            if left <= 0 or misfits == _MISFITS:
                break
        if not found.lines:
            del self._keys[head.key]
        for job in stale:
            self.remove(job)
        return launch, stale

    def __iter__(self) -> Iterator[Job]:
        """Iterate over all jobs, in no particular order."""
        return (job for found in self._keys.values() for line in found.lines.values() for job in line)

    def columns(self, key: Hashable) -> int:
        """Return how many vectors are queued with this key."""
        found = self._keys.get(key)
        return found.columns if found is not None else 0

    def jobs(self, key: Hashable) -> list[Job]:
        """Return the jobs that are queued with this key."""
        found = self._keys.get(key)
        return [job for line in found.lines.values() for job in line] if found is not None else []

    def charge(self, tenant: str, columns: int) -> None:
        """Charge a tenant for vectors that were multiplied without being queued."""
        charged = self._tenant(tenant)
        charged.time += columns / charged.weight

    def _tenant(self, name: str) -> "_Tenant":
        tenant = self._tenants.get(name)
        if tenant is None or not tenant.jobs.size:
            weight = self._weigh(name)
            if not weight > 0:
                raise ValueError(f"a tenant's weight is more than 0, got {weight!r} for {name!r}")
            if tenant is None:
                tenant = self._tenants[name] = _Tenant(name, self._time)
                heapq.heappush(self._turns, (tenant.time, next(self._order), tenant))
            tenant.weight = weight
        return tenant


class _Line:
    """Jobs in the order of launch: by priority, then by arrival. Any of them can be
    removed.
    """

    __slots__ = ("_levels", "size")

    def __init__(self) -> None:
        self._levels: dict[int, collections.OrderedDict[Job, None]] = {}
        self.size = 0

    def __iter__(self) -> Iterator[Job]:
        levels = self._levels
        if len(levels) == 1:
            return iter(*levels.values())
        return itertools.chain.from_iterable(levels[priority] for priority in sorted(levels, reverse=True))

    def add(self, job: Job) -> None:
        level = self._levels.get(job.priority)
        if level is None:
            level = self._levels[job.priority] = collections.OrderedDict()
        level[job] = None
        self.size += 1

    def remove(self, job: Job) -> None:
        del self._levels[job.priority][job]
        self.size -= 1


class _Tenant:
    """A tenant that has jobs in the queue, or whose virtual time is ahead."""

    __slots__ = ("jobs", "name", "time", "weight")

    def __init__(self, name: str, time: float) -> None:
        self.name = name
        self.time = time
        self.weight = 1.0
        self.jobs = _Line()


class _Key:
    """The jobs of one key, by tenant."""

    __slots__ = ("columns", "lines")

    def __init__(self) -> None:
        self.lines: dict[_Tenant, _Line] = {}
        self.columns = 0

    def add(self, tenant: _Tenant, job: Job) -> None:
        line = self.lines.get(tenant)
        if line is None:
            line = self.lines[tenant] = _Line()
        line.add(job)
        self.columns += len(job.block)

    def remove(self, tenant: _Tenant, job: Job) -> None:
        line = self.lines[tenant]
        line.remove(job)
        if not line.size:
            del self.lines[tenant]
        self.columns -= len(job.block)

    def take(self, tenant: _Tenant, jobs: Sequence[Job], columns: int) -> None:
        """Remove several jobs of one tenant, also from the tenant's own line."""
        line = self.lines[tenant]
        if len(jobs) == line.size:
            del self.lines[tenant]
        else:
            for job in jobs:
                line.remove(job)
        for job in jobs:
            tenant.jobs.remove(job)
        self.columns -= columns


def _in_turn(leader: _Tenant, lines: Mapping[_Tenant, _Line], room: int) -> list[_Tenant]:
    """Return the leader, then as many other tenants as there may be room for, by their
    virtual times.
    """
    if len(lines) == 1:
        return [leader]
    others = [tenant for tenant in lines if tenant is not leader]
    return [leader, *heapq.nsmallest(room, others, key=operator.attrgetter("time"))]
