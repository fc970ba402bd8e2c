"""A product from its arrival to its result, and the states that it passes through.
Knows no queue and no clock.
"""

import dataclasses
import enum
import threading
from collections.abc import Hashable, Mapping
from typing import Any

import numpy.typing as npt

from hvpd_server.errors import Code, ServiceError
from hvpd_server.scheduling.holdback import Holdback

Block = npt.NDArray[Any]


class State(enum.IntEnum):
    """The stages of a job."""

    NEW = enum.auto()
    """The batcher has not seen the job yet."""
    WAITING = enum.auto()
    """The job is queued, and its caller waits."""
    LEADING = enum.auto()
    """The job is queued, and its caller is the leader: it takes the next launch."""
    SERVING = enum.auto()
    """The job is queued, and its caller runs a launch of other jobs. Another caller
    leads.
    """
    LAUNCHED = enum.auto()
    """The job is in a launch."""
    DONE = enum.auto()
    """The job has its result or its error."""


_NEXT: Mapping[State, tuple[State, ...]] = {
    State.NEW: (State.WAITING, State.LAUNCHED),
    State.WAITING: (State.LEADING, State.LAUNCHED, State.DONE),
    State.LEADING: (State.SERVING, State.LAUNCHED, State.DONE),
    State.SERVING: (State.WAITING, State.LEADING, State.LAUNCHED, State.DONE),
    State.LAUNCHED: (State.DONE,),
    State.DONE: (),
}
"""The transitions that are allowed. A job that is done before its launch was
dropped.
"""


@dataclasses.dataclass(eq=False, slots=True)
class Job:
    """One product, from its arrival to its result."""

    key: Hashable
    """Jobs with equal keys can share a launch. A key names program, data, point and
    seed.
    """
    block: Block
    """V[k,n]."""
    tenant: str = ""
    """The tenant that asks. Tenants share the device in proportion to their weights."""
    deadline: float = float("inf")
    """The time from which on the result is of no use, in seconds on the batcher's
    clock.
    """
    priority: int = 0
    """Jobs of higher priority go first among one tenant's jobs. Equals go in the order
    of their arrival.
    """
    point: Any = None
    """The point of the product, if the key does not name it: products at several points
    may share a launch.
    """
    holdback: Holdback | None = None
    """The callers that may be worth waiting for, because their products can share a
    launch with this one.
    """
    result: Any = None
    """The result that `execute` returned, when the job is done."""
    error: BaseException | None = None
    """The reason why there is no result, when the job is done."""
    queued: float = 0.0
    """The time of arrival, in seconds on the batcher's clock."""
    started: float = 0.0
    """The time when the launch began."""
    finished: float = 0.0
    """The time when the launch ended."""
    width: int = 0
    """Vectors in the launch, of all callers."""
    device_seconds: float = 0.0
    """This job's share of the device's time for the launch."""
    cancelled: bool = False
    """Whether the caller has given up. A launch that has begun goes on."""
    state: State = State.NEW
    gate: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    """Closed while the job is queued; opened when its caller becomes the leader, or the
    job is done.
    """

    @property
    def is_queued(self) -> bool:
        """Whether the job is queued."""
        return State.WAITING <= self.state <= State.SERVING

    def become(self, state: State) -> None:
        """Change the state.

        Raises:
            RuntimeError: The table of transitions does not allow it.
        """
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"a job cannot change from {self.state.name} to {state.name}")
        self.state = state

    def stale(self, now: float) -> bool:
        """Return whether the caller does not wait any more."""
        return self.cancelled or self.deadline <= now

    def stale_error(self) -> ServiceError:
        """Return the error of a job that was dropped because it is stale."""
        if self.cancelled:
            return ServiceError(Code.CANCELLED, "CANCELLED", "the caller cancelled the product before its launch")
        return ServiceError(
            Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "the deadline passed before the device was free"
        )

    def finish(self, error: BaseException | None = None) -> None:
        """Let the caller go on."""
        self.error = error
        self.become(State.DONE)
        self.gate.release()
