"""What waits for the device, and what goes next: fair between tenants, by priority within one. Knows no threads and no clock.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), where a launch may have several tenants' products. Each tenant has
a virtual time, which grows by its vectors in a launch over its weight, and the launch begins with the tenant whose time is least.
Who was idle begins at the time of the launch in progress: nobody saves up. What an operation costs does not grow with the
number of jobs that wait.
"""

import collections
import dataclasses
import heapq
import itertools
import operator
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from hvpd_server._crowd import Crowd

Block = npt.NDArray[Any]

Weights = Mapping[str, float] | Callable[[str], float]
"""Of tenants, more than 0; 1 for those that a mapping does not have. A function is called under a lock, and must not raise."""

_MISFITS = 64
"""Most jobs of a launch's key that are passed over since they are wider than the room that is left."""


@dataclasses.dataclass(eq=False, slots=True)
class Job:
    """One product, from arrival to result."""

    key: Hashable
    """What must be equal to share a launch: program, data, point, operator."""
    block: Block
    """V[k,n]."""
    tenant: str = ""
    """Who asks: tenants share the device in proportion to their weights."""
    deadline: float = float("inf")
    """When it is of no use any more, on the batcher's clock, in seconds."""
    priority: int = 0
    """Of one tenant's jobs the higher goes first, and among equals the earlier."""
    point: Any = None
    """Where it multiplies, where the key says less: products at several points may share a launch."""
    crowd: Crowd | None = None
    """Those with whom it can share a launch, where they are worth waiting for."""
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
    device_seconds: float = 0.0
    """Its share of the time that the device had for its launch."""
    done: bool = False
    launching: bool = False
    cancelled: bool = False
    waits: bool = False
    leads: bool = False
    gate: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def stale(self, now: float) -> bool:
        """Whether nobody waits for it any more."""
        return self.cancelled or self.deadline <= now

    def finish(self, error: BaseException | None = None) -> None:
        """Lets its caller go on."""
        self.error = error
        self.done = True
        self.gate.release()


class FairQueue:
    """The jobs that may be launched.

    Args:
        weights: Of tenants.
    """

    def __init__(self, weights: Weights) -> None:
        self._weigh = weights if callable(weights) else lambda tenant: weights.get(tenant, 1.0)
        self._tenants: dict[str, _Tenant] = {}
        self._keys: dict[Hashable, _Key] = {}
        # All tenants, once each. Times only grow, so an entry's is a lower bound, which is mended when it comes to the top.
        self._turns: list[tuple[float, int, _Tenant]] = []
        self._order = itertools.count()
        self._time = 0.0

    def add(self, job: Job) -> None:
        """Queues a job, as the last of its priority."""
        tenant = self._tenant(job.tenant)
        tenant.jobs.add(job)
        found = self._keys.get(job.key)
        if found is None:
            found = self._keys[job.key] = _Key()
        found.add(tenant, job)

    def remove(self, job: Job) -> None:
        """Takes out a job that is queued."""
        tenant, found = self._tenants[job.tenant], self._keys[job.key]
        tenant.jobs.remove(job)
        found.remove(tenant, job)
        if not found.lines:
            del self._keys[job.key]

    def head(self) -> Job | None:
        """The job with which the next launch begins. Where there is none, what tenants owe is forgotten: the device is idle."""
        turns = self._turns
        while turns:
            time, _, tenant = turns[0]
            if time < tenant.time:
                heapq.heapreplace(turns, (tenant.time, next(self._order), tenant))
            elif tenant.jobs.size:
                return next(iter(tenant.jobs))
            else:  # It owes nothing any more.
                heapq.heappop(turns)
                del self._tenants[tenant.name]
        return None

    def take(self, head: Job, room: int, now: float) -> tuple[list[Job], list[Job]]:
        """Takes out a launch: the head and all that share its key and fit, its own tenant's first. Charges the tenants.

        Args:
            head: What `head` gave.
            room: The most vectors of a launch. A head that is wider goes alone.
            now: What is stale by then is taken out, too.

        Returns:
            The launch, and what is stale of what was looked at.
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
            # Who rides along while others' turns come and go owes one full launch of its own at most.
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
        """All jobs that are queued, in no order that matters."""
        return (job for found in self._keys.values() for line in found.lines.values() for job in line)

    def columns(self, key: Hashable) -> int:
        """Vectors that are queued with this key."""
        found = self._keys.get(key)
        return found.columns if found is not None else 0

    def jobs(self, key: Hashable) -> list[Job]:
        """The jobs that are queued with this key."""
        found = self._keys.get(key)
        return [job for line in found.lines.values() for job in line] if found is not None else []

    def charge(self, tenant: str, columns: int) -> None:
        """Counts vectors that a tenant has had multiplied, without its having queued them."""
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
            tenant.weight = weight  # One that is known and idle owes something: its time is ahead.
        return tenant


class _Line:
    """Jobs in the order in which they go: by priority, then by arrival. Any of them can be taken out."""

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
    """Whose products wait, or who has had more than its share of late."""

    __slots__ = ("jobs", "name", "time", "weight")

    def __init__(self, name: str, time: float) -> None:
        self.name = name
        self.time = time
        self.weight = 1.0
        self.jobs = _Line()


class _Key:
    """What waits with one key, by tenant."""

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
        """Removes several jobs of one tenant, from its own line too."""
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
    """The leader, then as many others as there may be room for, those that have had least first."""
    if len(lines) == 1:
        return [leader]
    others = [tenant for tenant in lines if tenant is not leader]
    return [leader, *heapq.nsmallest(room, others, key=operator.attrgetter("time"))]
