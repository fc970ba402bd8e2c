"""The launches in flight, and the time that the device had for each."""

import contextlib
import threading
from collections.abc import Hashable, Iterator

_MEMORY = 0.9
"""Weight of the earlier launches in the rate, from one launch to the next."""

_RETRY_SECONDS = 0.05
"""Seconds until a retry, when no launch has ended yet."""


class InFlight:
    """The launches in flight. `begin` and `end` are called with the lock held.

    Args:
        lock: The batcher's lock.
        max_launches: Most launches in flight.
    """

    def __init__(self, lock: threading.Lock, max_launches: int) -> None:
        self.max_launches = max_launches
        """Most launches in flight."""
        self.keys: list[Hashable] = []
        """Keys of the launches."""
        self.columns = 0
        """Vectors of the launches."""
        self.begun = 0
        """Launches that have begun so far."""
        self._last_end = 0.0
        self._seconds = 0.0
        self._columns = 0.0
        self._lock = lock
        self._landed = threading.Condition(lock)
        self._turn = threading.Lock()
        self._exclusive = 0  # Launches that are in `exclusive`, or wait for it.

    def begin(self, key: Hashable, columns: int) -> None:
        """Record that a launch begins."""
        self.begun += 1
        self.keys.append(key)
        self.columns += columns

    def end(self, key: Hashable, columns: int, started: float, finished: float) -> float:
        """Record that a launch has ended. Return the seconds that the device had for
        it, without the wait for another launch.
        """
        self.keys.remove(key)
        self.columns -= columns
        seconds = max(finished - max(started, self._last_end), 0.0)
        self._last_end = max(finished, self._last_end)
        self._seconds = _MEMORY * self._seconds + seconds
        self._columns = _MEMORY * self._columns + columns
        if self._exclusive:
            self._landed.notify_all()
        return seconds

    def retry_after(self, columns: int) -> float:
        """Return the seconds that launches of `columns` vectors take, at the rate of
        the last launches; at least 0.01, at most 2.
        """
        if not self._columns:
            return _RETRY_SECONDS
        return min(max(columns * self._seconds / self._columns, 0.01), 2.0)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Let the calling launch run when all others have ended or wait here. From then
        on, launches do not overlap.
        """
        with self._lock:
            self.max_launches = 1
            self._exclusive += 1
            self._landed.notify_all()
        with self._turn:
            with self._lock:
                self._landed.wait_for(lambda: len(self.keys) == self._exclusive)
            try:
                yield
            finally:
                with self._lock:
                    self._exclusive -= 1
