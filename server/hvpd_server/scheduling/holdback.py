"""Hold-back: a launch waits a short while for callers that were just answered and are
about to ask again.

Callers that wait for each answer fall into two groups that take turns. While the device
computes for one group, the other group is answered and asks again. So every launch is
half as wide as it could be. If a wider launch takes hardly longer, all callers get
their answers sooner when the device waits for the other group.

This module measures, on real traffic, how reliably and how soon callers ask again, and
how long launches take. It knows no threads and no clock.
"""

import collections
from collections.abc import Sequence

_GAIN = 1.1
"""Minimum factor by which a wait, or a narrower launch, must raise the vectors per
second.
"""

_MIN_RELIABILITY = 0.5
"""Least share of recent launches whose callers all returned in time."""

_MAX_PAUSES = 1.5
"""Multiple of the usual pause after which a caller is no longer expected."""

_NEW_WEIGHT = 0.25
"""Weight of the latest observation in a running mean."""

_DECAY = 0.995
"""Factor by which each launch of another width lowers the confidence in a width's time,
so that one slow launch is forgotten.
"""

_MIN_CONFIDENCE = 1e-6
"""Least confidence in a time, so that nothing is divided by 0."""

_MIN_SECONDS = 1e-9
"""Least seconds of a launch."""

_MAX_LAUNCHES = 8
"""Most launches whose callers are followed."""


class Timing:
    """Measures one program of an objective, at all points: how long launches take, and
    how soon their callers ask again.
    """

    def __init__(self) -> None:
        self.pause: float | None = None
        """Seconds from the end of a launch until all its callers have asked again."""
        self.reliability = _MIN_RELIABILITY
        """Share of recent launches whose callers all asked again in time."""
        self._seconds: dict[int, float] = {}
        self._confidence: dict[int, float] = {}

    def launched(self, width: int, seconds: float) -> None:
        """Record the duration of a launch of `width` vectors."""
        bucket, seconds = bucket_of(width), max(seconds, _MIN_SECONDS)
        for other in self._confidence:
            self._confidence[other] = max(self._confidence[other] * _DECAY, _MIN_CONFIDENCE)
        weight = 1 - (1 - _NEW_WEIGHT) * self._confidence.get(bucket, 0.0)
        known = self._seconds.get(bucket, seconds)
        self._seconds[bucket] = known + weight * (seconds - known)
        self._confidence[bucket] = 1.0

    def seconds(self, width: int) -> float | None:
        """Return the duration of a launch of `width` vectors; None if it was not
        measured. The older the measurement is, the shorter the returned duration, so
        that one slow launch is forgotten.
        """
        bucket = bucket_of(width)
        known = self._seconds.get(bucket)
        return None if known is None else known * self._confidence[bucket]

    def returned(self, pause: float) -> None:
        """Record that all callers of a launch asked again, the last of them after
        `pause` seconds.
        """
        self.pause = pause if self.pause is None else self.pause + _NEW_WEIGHT * (pause - self.pause)
        self.reliability += _NEW_WEIGHT * (1 - self.reliability)

    def missed(self) -> None:
        """Record that some callers of a launch did not ask again in time."""
        self.reliability -= _NEW_WEIGHT * self.reliability
        if self.pause is not None:
            self.pause *= 1 + _NEW_WEIGHT  # The callers may have become slower.


class Holdback:
    """Decides until when a launch waits for the callers whose products can share it.

    These products belong to one program at one point or, if they go as pairs, to one
    objective.

    Args:
        timing: Times of the program.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._answered: collections.deque[_Answered] = collections.deque(maxlen=_MAX_LAUNCHES)
        self.expected = 0
        """Vectors of callers that were answered and have not asked again yet."""

    def answered(self, widths: Sequence[int], started: float, finished: float) -> None:
        """Record a launch whose callers get their answers next; `widths` has the number
        of vectors of each caller.
        """
        columns = sum(widths)
        self._timing.launched(columns, finished - started)
        if len(self._answered) == _MAX_LAUNCHES:
            self._give_up()
        self._answered.append(_Answered(list(widths), finished))
        self.expected += columns

    def arrived(self, columns: int, now: float) -> None:
        """Record a product, and match it with the oldest answered product of the same
        width. If none has this width, match it with the oldest answered product.
        """
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
            self._timing.returned(now - found.time)

    def expected_until(self, now: float) -> float:
        """Return until when a caller is expected to ask again; `now` if none is. Stop
        expecting callers that are late.
        """
        pause = self._timing.pause
        if pause is None:
            return now
        while self._answered and self._answered[0].time + _MAX_PAUSES * pause <= now:
            self._give_up()
        if not self.expected or self._timing.reliability < _MIN_RELIABILITY:
            return now
        return self._answered[-1].time + _MAX_PAUSES * pause

    def due(self, columns: int, room: int, now: float) -> float:
        """Return until when a launch that could begin now should wait for expected
        callers; `now` if it should not wait.

        Args:
            columns: Vectors that would be launched.
            room: Most vectors of a launch.
            now: Time in seconds.
        """
        timing, pause = self._timing, self._timing.pause
        coming = min(self.expected, room - columns) if self.expected_until(now) > now else 0
        if pause is None or coming <= 0:
            return now
        # Two plans are compared in vectors per second: launch the narrow block now, or
        # wait for the expected callers and launch the wide block.
        narrow, wide = self.width(columns, room), self.width(columns + coming, room)
        narrow_seconds = timing.seconds(narrow)
        if narrow_seconds is None:
            return now
        # A wide launch that was never measured is assumed to take as long as the narrow
        # one. Otherwise it would never be tried.
        wide_seconds = timing.seconds(wide) or narrow_seconds
        last = self._answered[-1].time
        wait = max(last + pause - now, 0.0)
        # If both blocks are padded to one width, both launches take the same time. Then
        # any gain is enough.
        gain = _GAIN if bucket_of(wide) > bucket_of(narrow) else 1.0
        # A wait may last as long as the longer launch. On a CPU, even a wait that lasts
        # longer than the narrow launch can pay, because that launch would slow down the
        # callers that are about to ask.
        longest = max(wide_seconds, narrow_seconds)
        if wait > longest or wide / (wait + wide_seconds) < gain * narrow / narrow_seconds:
            return now
        return min(last + _MAX_PAUSES * pause, now + longest)

    def width(self, columns: int, room: int) -> int:
        """Return how many of the waiting vectors to launch: all, or only as many as
        need no padding, if that gives more vectors a second.
        """
        columns = min(columns, room)
        full = bucket_of(columns + 1) // 2
        padded, exact = self._timing.seconds(columns), self._timing.seconds(full)
        if full == columns or padded is None or (exact is not None and full / exact < _GAIN * columns / padded):
            return columns
        return full

    def _give_up(self) -> None:
        """Stop expecting the callers of the oldest launch."""
        self.expected -= sum(self._answered.popleft().missing)
        self._timing.missed()


class _Answered:
    """A launch, with the number of vectors of each caller that has not asked again."""

    __slots__ = ("missing", "time")

    def __init__(self, missing: list[int], time: float) -> None:
        self.missing = missing
        self.time = time


def bucket_of(width: int) -> int:
    """Return the smallest power of two that is not less than a block width."""
    return 1 << (width - 1).bit_length()
