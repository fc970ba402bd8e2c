"""The numbers of a group's orders, and how far each rank has come. Knows no sockets."""

import collections
from collections.abc import Sequence


class DisagreementError(Exception):
    """A rank has done something else than the leader ordered."""


class OrderLog:
    """The orders of one group. The caller excludes concurrent calls.

    Args:
        ranks: The ranks that execute orders, without the leader.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.latest = 0
        """The number of the last order."""
        self._waiting: dict[int, collections.deque[tuple[int, float]]] = {rank: collections.deque() for rank in ranks}

    def append(self, now: float) -> int:
        """Return the number of a new order.

        Args:
            now: The time, in seconds of a monotonic clock.
        """
        self.latest += 1
        for waiting in self._waiting.values():
            waiting.append((self.latest, now))
        return self.latest

    def done(self, rank: int, number: int) -> None:
        """Note that a rank has executed an order.

        Raises:
            DisagreementError: It is not the next order of that rank.
        """
        waiting = self._waiting[rank]
        if not waiting or waiting[0][0] != number:
            expected = f"order {waiting[0][0]}" if waiting else "no order"
            raise DisagreementError(f"rank {rank} reports order {number}, and {expected} was expected")
        waiting.popleft()

    def reached(self, number: int) -> bool:
        """Return whether all ranks have executed an order."""
        return all(not waiting or waiting[0][0] > number for waiting in self._waiting.values())

    @property
    def pending(self) -> int:
        """Orders that the slowest rank has not executed yet."""
        return max(map(len, self._waiting.values()), default=0)

    def oldest(self, rank: int) -> tuple[int, float] | None:
        """Return the number and the time of the oldest order that a rank has not
        executed; None if there is none.
        """
        waiting = self._waiting[rank]
        return waiting[0] if waiting else None
