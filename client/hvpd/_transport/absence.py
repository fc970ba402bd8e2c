"""For how long a client leaves a server alone that is away or full.

Pure code: the caller states the time.
"""

import random

_FORGIVEN = 60.0
"""Seconds after an absence without another one, after which pauses are short again."""

# The user's generators must not change while jax traces the user's function.
_generator = random.Random()  # noqa: S311 - no secret


def spread(seconds: float) -> float:
    """Return a little more seconds, so that many clients do not return at once."""
    return seconds * _generator.uniform(1.0, 1.3)


class Absence:
    """The absences of one server. Each is longer than the one before, so that
    objectives do not move back and forth.

    Args:
        first: Seconds of the first absence.
        most: Most seconds of an absence.

    Attributes:
        until: The time when the latest absence ends.
    """

    def __init__(self, first: float, most: float) -> None:
        self.until = float("-inf")
        self._first = first
        self._most = most
        self._seconds = 0.0

    def over(self, now: float) -> bool:
        """Return whether the server may be asked again."""
        return now >= self.until

    def begin(self, now: float) -> None:
        """Begin an absence. If there is one, it does not become longer, because many
        calls may fail at once.
        """
        if now < self.until:
            return
        again = now < self.until + _FORGIVEN
        self._seconds = min(2 * self._seconds, self._most) if again else self._first
        self.until = now + spread(self._seconds)
