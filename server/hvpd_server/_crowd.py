"""Those who ask for products that can share a launch, ask again once they are answered, and are worth a short wait.

Callers that each wait for their answer fall into groups that take turns: while the products of one are computed, the others
are answered and ask again, and every launch is half as wide as it could be. Where a wider launch takes hardly longer, all are
better served if the device waits for those who are about to ask. Whether they are, how soon, and how long launches take, is
measured here, on what happens anyway. Knows no threads and no clock.
"""

import collections
from collections.abc import Sequence

_GAIN = 1.1
"""How many times the vectors a second a wait, or a narrower launch, must promise."""

_TRUST = 0.5
"""What share of those who were answered must have asked again in time of late."""

_GRACE = 1.5
"""Those who take longer than this many usual pauses are not waited for."""

_NEWS = 0.25
"""How much of what is remembered the last observation makes."""

_OBLIVION = 0.995
"""How much of the time of a launch is still believed after each launch of another width: so that one slow launch is not for ever."""

_FAITH = 1e-6
"""How much of it is believed at least."""

_INSTANT = 1e-9
"""Seconds that a launch takes at least."""

_RECORDS = 8
"""Most launches whose callers are followed."""


class Habits:
    """What was seen of an objective's callers and of its launches, at all of its points."""

    def __init__(self) -> None:
        self.pause: float | None = None
        """Seconds from a launch's end until all its callers have asked again."""
        self.trust = _TRUST
        """Share of the launches of late whose callers all asked again in time."""
        self._seconds: dict[int, float] = {}
        self._belief: dict[int, float] = {}

    def launched(self, width: int, seconds: float) -> None:
        """Notes how long a launch of so many vectors took."""
        bucket, seconds = _bucket(width), max(seconds, _INSTANT)
        for other in self._belief:
            self._belief[other] = max(self._belief[other] * _OBLIVION, _FAITH)
        weight = 1 - (1 - _NEWS) * self._belief.get(bucket, 0.0)
        known = self._seconds.get(bucket, seconds)
        self._seconds[bucket] = known + weight * (seconds - known)
        self._belief[bucket] = 1.0

    def seconds(self, width: int) -> float | None:
        """How long a launch of so many vectors takes, or less if that was long ago; None where it was not seen yet."""
        bucket = _bucket(width)
        known = self._seconds.get(bucket)
        return None if known is None else known * self._belief[bucket]

    def returned(self, pause: float) -> None:
        """Notes that all callers of a launch asked again, the last of them after so many seconds."""
        self.pause = pause if self.pause is None else self.pause + _NEWS * (pause - self.pause)
        self.trust += _NEWS * (1 - self.trust)

    def failed(self) -> None:
        """Notes that callers of a launch did not ask again in time."""
        self.trust -= _NEWS * self.trust
        if self.pause is not None:
            self.pause *= 1 + _NEWS  # They may have become slower.


class Crowd:
    """The callers whose products can share launches: those of one program at one point, or, as pairs, of one objective.

    Args:
        habits: Of their kind.
    """

    def __init__(self, habits: Habits) -> None:
        self._habits = habits
        self._answered: collections.deque[_Answered] = collections.deque(maxlen=_RECORDS)
        self.expected = 0
        """Vectors of those who were answered and have not asked again yet."""

    def answered(self, widths: Sequence[int], started: float, finished: float) -> None:
        """Notes a launch whose callers are about to be answered, with so many vectors each."""
        columns = sum(widths)
        self._habits.launched(columns, finished - started)
        if len(self._answered) == _RECORDS:
            self._give_up()
        self._answered.append(_Answered(list(widths), finished))
        self.expected += columns

    def arrived(self, columns: int, now: float) -> None:
        """Notes that somebody asks: presumably who was answered first of those who asked for as many vectors, or else of all."""
        if not self._answered:
            return
        found, width = self._answered[0], columns
        if columns not in found.missing:
            found = next((answered for answered in self._answered if columns in answered.missing), found)
            width = columns if columns in found.missing else found.missing[0]
        found.missing.remove(width)
        self.expected -= width
        if not found.missing:
            self._answered.remove(found)
            self._habits.returned(now - found.time)

    def awaited(self, now: float) -> float:
        """Until when somebody is expected to ask again; `now` where nobody is. Who has taken too long is given up."""
        pause = self._habits.pause
        if pause is None:
            return now
        while self._answered and self._answered[0].time + _GRACE * pause <= now:
            self._give_up()
        if not self.expected or self._habits.trust < _TRUST:
            return now
        return self._answered[-1].time + _GRACE * pause

    def due(self, columns: int, room: int, now: float) -> float:
        """Until when a launch that could begin now should wait for those who are expected; `now` where it should not wait.

        Args:
            columns: Vectors that would be launched.
            room: The most that a launch can take.
            now: Seconds.
        """
        habits, pause = self._habits, self._habits.pause
        coming = min(self.expected, room - columns) if self.awaited(now) > now else 0
        if pause is None or coming <= 0:
            return now
        alone, together = self.width(columns, room), self.width(columns + coming, room)
        seconds = habits.seconds(alone)
        if seconds is None:
            return now
        last = self._answered[-1].time
        wait = max(last + pause - now, 0.0)
        # A width that was never launched is worth a try; one with the same padding takes the same time.
        wide = habits.seconds(together) or seconds
        gain = _GAIN if _bucket(together) > _bucket(alone) else 1.0
        # A narrow launch that would end before they come is no use of the time: on a CPU they come the later for it.
        longest = max(wide, seconds)
        if wait > longest or together / (wait + wide) < gain * alone / seconds:
            return now
        return min(last + _GRACE * pause, now + longest)

    def width(self, columns: int, room: int) -> int:
        """How many of the vectors that could be launched now should be: all, or as many as need no padding, if that is quicker."""
        columns = min(columns, room)
        full = _bucket(columns + 1) // 2
        padded, exact = self._habits.seconds(columns), self._habits.seconds(full)
        if full == columns or padded is None or (exact is not None and full / exact < _GAIN * columns / padded):
            return columns
        return full

    def _give_up(self) -> None:
        self.expected -= sum(self._answered.popleft().missing)
        self._habits.failed()


class _Answered:
    """A launch, and how many vectors each of its callers had who has not asked again."""

    __slots__ = ("missing", "time")

    def __init__(self, missing: list[int], time: float) -> None:
        self.missing = missing
        self.time = time


def _bucket(width: int) -> int:
    return 1 << (width - 1).bit_length()
