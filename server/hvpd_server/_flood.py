"""How often the same thing is said: who makes one failure after the other does not fill the disk. Knows no log, only a clock."""

import collections
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

QUIET = 10.0
"""Seconds for one more line of a kind, and until it is told how many were left out."""

_BURST = 10
"""Lines of a kind and a caller that are said at once."""

_BURST_OF_ALL = 100
_A_SECOND_OF_ALL = 1.0
"""Likewise of all together, and how many more there are for each second."""

_CALLERS = 1024
"""Most callers and kinds that are told apart, and most kinds that are counted on their own."""


class LeftOut(NamedTuple, Generic[T]):
    """Lines of one kind that were not said."""

    lines: int
    last: T


class _Bucket:
    """What may be said now: a number that grows with time up to a limit."""

    def __init__(self, most: float, rate: float, now: float) -> None:
        self._most, self._rate = most, rate
        self._has, self._at = most, now

    def full(self, now: float) -> bool:
        return self._refilled(now) >= 1

    def take(self) -> None:
        self._has -= 1

    def _refilled(self, now: float) -> float:
        self._has, self._at = min(self._has + (now - self._at) * self._rate, self._most), now
        return self._has


def _timer(seconds: float, call: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


class Flood(Generic[T]):
    """Lets some lines through, and counts the others.

    Args:
        tell: Takes what was left out, a while after it began.
        clock: Seconds, monotonic.
        later: Runs a call after so many seconds.
    """

    def __init__(
        self,
        tell: Callable[[Sequence[LeftOut[T]]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        later: Callable[[float, Callable[[], None]], None] = _timer,
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._later = later
        self._lock = threading.RLock()  # A finalizer may log, whatever it interrupts.
        # What is serious has its own: nobody silences it by what is not.
        self._all = {serious: _Bucket(_BURST_OF_ALL, _A_SECOND_OF_ALL, clock()) for serious in (False, True)}
        self._buckets: collections.OrderedDict[tuple[Hashable, Hashable], _Bucket] = collections.OrderedDict()
        self._left_out: dict[Hashable, LeftOut[T]] = {}

    def admits(self, who: Hashable, kind: Hashable, line: T, *, serious: bool = False) -> bool:
        """Whether a line is to be said; else it is counted, by its kind."""
        with self._lock:
            now, every = self._clock(), self._all[serious]
            bucket = self._buckets.pop((who, kind), None) or _Bucket(_BURST, 1 / QUIET, now)
            self._buckets[who, kind] = bucket
            if len(self._buckets) > _CALLERS:
                self._buckets.popitem(last=False)
            if bucket.full(now) and every.full(now):
                bucket.take()
                every.take()
                return True
            first = not self._left_out
            if kind not in self._left_out and len(self._left_out) >= _CALLERS:
                kind = None
            count = self._left_out[kind].lines if kind in self._left_out else 0
            self._left_out[kind] = LeftOut(count + 1, line)
        if first:
            self._later(QUIET, self.flush)
        return False

    def flush(self) -> None:
        """Tells what was left out since the last time."""
        with self._lock:
            found, self._left_out = list(self._left_out.values()), {}
        if found:
            self._tell(found)
