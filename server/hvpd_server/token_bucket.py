"""A token bucket: an allowance that grows with time."""

import math


class TokenBucket:
    """An allowance that grows with time, up to a limit. A full bucket at the beginning.

    An amount is taken whole and can overdraw the bucket: the wait comes after a large
    amount, not before it.

    Args:
        seconds: Seconds of growth that the bucket holds.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._level = math.inf  # Full, at any rate.
        self._time = -math.inf

    def level(self, rate: float | None, now: float) -> float:
        """Return the tokens that are left.

        Args:
            rate: Growth in a second; None for no limit.
            now: Seconds, monotonic.
        """
        if rate is None:
            self._level = math.inf
        else:
            full = self._seconds * rate
            grown = self._level + rate * (now - self._time) if self._level < math.inf else full
            self._level, self._time = min(grown, full), now
        return self._level

    def spend(self, amount: float) -> None:
        """Take an amount; give it back if it is negative."""
        self._level -= amount
