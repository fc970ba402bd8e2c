"""The lock of a store, which excludes other threads and other servers."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from hvpd_server.errors import Code, ServiceError

SECONDS = 30.0
"""Seconds to wait for the change of another server."""


class Exclusion:
    """A lock that a thread can hold several times.

    Args:
        store: Name of the store, for messages.
        take: Takes the lock that other servers see. Its argument is the time until
            which it may wait, on time.monotonic's clock.
        give_back: Gives that lock back.
    """

    def __init__(self, store: str, take: Callable[[float], None], give_back: Callable[[], None]) -> None:
        self._store = store
        self._take = take
        self._give_back = give_back
        self._thread = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock.

        Raises:
            ServiceError: UNAVAILABLE: another server holds it for too long.
        """
        ends = time.monotonic() + SECONDS
        if not self._thread.acquire(timeout=SECONDS):
            raise busy(self._store)
        try:
            if not self._depth:
                self._take(ends)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if not self._depth:
                    self._give_back()
        finally:
            self._thread.release()


def busy(store: str) -> ServiceError:
    """Return the error for a lock that another server holds for too long."""
    return ServiceError(
        Code.UNAVAILABLE,
        "STORE_BUSY",
        f"another server has been changing the store {store} for {SECONDS:g} s: nothing was changed; try again, and look "
        "whether a server of this store is stopped or hangs",
        retry_after=1.0,
    )
