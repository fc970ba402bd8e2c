"""A rate limit for log lines, so that a client that repeats a failure does not fill the
disk.

This module knows no log, only a clock.
"""

import collections
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

from hvpd_server.token_bucket import TokenBucket

T = TypeVar("T")

QUIET = 10.0
"""Seconds until one more line of a kind passes, and until a line gives the number of
lines that were left out.
"""

_BURST = 10
"""Lines of one kind and one caller that pass at once."""

_BURST_OF_ALL = 100
"""Lines of all kinds and callers that pass at once."""

_A_SECOND_OF_ALL = 1.0
"""Lines a second that pass after that."""

_CALLERS = 1024
"""Most pairs of caller and kind that are told apart, and most kinds that are counted on
their own.
"""


class LeftOut(NamedTuple, Generic[T]):
    """Lines of one kind that were left out."""

    lines: int
    last: T


def _timer(seconds: float, call: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


class LogRateLimit(Generic[T]):
    """Lets some lines pass, and counts the others.

    Args:
        tell: Takes the left-out lines, QUIET seconds after the first of them.
        clock: Seconds, monotonic.
        later: Calls a function after a number of seconds.
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
        self._lock = threading.RLock()  # A finalizer may log, and may interrupt this thread anywhere.
        # Serious lines have a bucket of their own, so that other lines cannot use it
        # up.
        self._all = {serious: TokenBucket(_BURST_OF_ALL / _A_SECOND_OF_ALL) for serious in (False, True)}
        self._buckets: collections.OrderedDict[tuple[Hashable, Hashable], TokenBucket] = collections.OrderedDict()
        self._left_out: dict[Hashable, LeftOut[T]] = {}

    def admits(self, caller: Hashable, kind: Hashable, line: T, *, serious: bool = False) -> bool:
        """Return whether a line passes. Otherwise count it by its kind."""
        with self._lock:
            now, every = self._clock(), self._all[serious]
            bucket = self._buckets.pop((caller, kind), None) or TokenBucket(_BURST * QUIET)
            self._buckets[caller, kind] = bucket
            if len(self._buckets) > _CALLERS:
                self._buckets.popitem(last=False)
            if bucket.level(1 / QUIET, now) >= 1 and every.level(_A_SECOND_OF_ALL, now) >= 1:
                bucket.spend(1)
                every.spend(1)
                return True
            first = not self._left_out
            if kind not in self._left_out and len(self._left_out) >= _CALLERS:
                kind = None
            count = self._left_out[kind].lines if kind in self._left_out else 0
            self._left_out[kind] = LeftOut(count + 1, line)
        if first:
            try:
                self._later(QUIET, self.flush)
            except RuntimeError:  # The system has no more threads. The next line tries again.
                with self._lock:
                    self._left_out.clear()
        return False

    def flush(self) -> None:
        """Tell which lines were left out since the last time."""
        with self._lock:
            found, self._left_out = list(self._left_out.values()), {}
        if found:
            self._tell(found)
