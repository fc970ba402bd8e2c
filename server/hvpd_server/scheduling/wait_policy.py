"""Decides how long the next launch waits. There are three reasons to wait:

- The device is busy, and the launch would become wider, or as many launches as allowed
  are in flight.
- With a queue delay, no block is full or old enough.
- Hold-back: callers that were just answered are about to ask again; see `holdback`.

Knows no threads and no clock, and has no state. When it asks a hold-back, the hold-back
gives up callers that are late.
"""

import dataclasses
from typing import NamedTuple

from hvpd_server.scheduling.backlog import Backlog, Limit
from hvpd_server.scheduling.holdback import Holdback
from hvpd_server.scheduling.in_flight import InFlight
from hvpd_server.scheduling.job import Job

_LANDING = float("inf")


class Wait(NamedTuple):
    """A wait before the next launch."""

    until: float
    """When it ends, in seconds; infinity: when a launch in flight ends."""
    holdback: Holdback | None = None
    """The callers that the launch is held back for, if any."""
    goal: int = 0
    """Vectors with which the hold-back ends early."""


@dataclasses.dataclass(frozen=True)
class WaitPolicy:
    """Decides until when the next launch waits.

    Args:
        limit: Most vectors of a launch.
    """

    limit: Limit

    def next_launch(self, backlog: Backlog, in_flight: InFlight, now: float) -> Wait:
        """Return the wait of the next launch; until `now` if it may begin.

        Args:
            backlog: The jobs that wait.
            in_flight: The launches in flight.
            now: Seconds.
        """
        if in_flight.keys:
            return Wait(self._beside(backlog, in_flight, now))
        if backlog.delays:
            return Wait(now if backlog.queue.head() is not None else backlog.due())
        head = backlog.queue.head()
        if head is None or backlog.queue.columns(head.key) < backlog.columns:  # Others wait, too.
            return Wait(now)
        wait = self.held_back(head, backlog.columns, now)
        if wait.until > now and any(job.deadline <= wait.until for job in backlog.queue.jobs(head.key)):
            return Wait(now)
        return wait

    def ends(self, wait: Wait, job: Job, backlog: Backlog, in_flight: InFlight) -> bool:
        """Return whether a job ends a wait, because it was just queued."""
        if wait.holdback is not None:
            return job.holdback is not wait.holdback or backlog.columns >= wait.goal
        return bool(in_flight.keys) and self.next_launch(backlog, in_flight, job.queued).until <= job.queued

    def held_back(self, job: Job, columns: int, now: float) -> Wait:
        """Return the hold-back of a launch of `columns` vectors that begins with a job;
        until `now` if there is none.
        """
        holdback = job.holdback
        if holdback is None or not holdback.expected:
            return Wait(now)
        room = self._room(job)
        if room is None:
            return Wait(now)
        return Wait(holdback.due(columns, room, now), holdback, min(columns + holdback.expected, room))

    def _beside(self, backlog: Backlog, in_flight: InFlight, now: float) -> float:
        """Return when the next launch may begin beside those in flight: when waiting
        would not make it wider.
        """
        head = backlog.queue.head()
        if head is None or len(in_flight.keys) >= in_flight.max_launches:
            return _LANDING
        until = _LANDING
        if head.key not in in_flight.keys:
            until = now if head.holdback is None else head.holdback.expected_until(now)
        if until <= now:
            return now
        room = self._room(head)
        return now if room is None or backlog.queue.columns(head.key) >= room else until

    def _room(self, job: Job) -> int | None:
        try:
            return self.limit(job.key)
        except Exception:  # noqa: BLE001 - raised again when the job is launched
            return None
