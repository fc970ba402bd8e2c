"""What calls may take of the server while they last: their number, the memory of what arrives in pieces, and time in which nothing comes.

A tenant has half of each at most, so that nobody is shut out by one. Knows of gRPC only that a call can be cancelled.
"""

import collections
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from hvpd_server._errors import Code, ServiceError

_T = TypeVar("_T")

STALLED_SECONDS = 60.0
"""For which a message that must come may be awaited."""

_RETRY_SECONDS = 0.2


class Calls:
    """How many calls are open.

    Args:
        most: Of all together.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._open: collections.Counter[str] = collections.Counter()

    def begin(self, tenant: str) -> None:
        """Counts a call, of a tenant, or of nobody in particular; `end` must follow.

        Raises:
            ServiceError: There are too many.
        """
        with self._lock:
            own, every = self._open[tenant], self._open.total()
            if every >= self._most or (tenant and own >= max(self._most // 2, 1)):
                whose = f"tenant {tenant} has {own}" if every < self._most else f"there are {every}"
                raise ServiceError(
                    Code.RESOURCE_EXHAUSTED,
                    "TOO_MANY_CALLS",
                    f"{whose} calls open, of {self._most} that the server has for all, and half of them for one tenant: "
                    "try again in a moment, or raise `hvpd serve --max-calls`",
                    retry_after=_RETRY_SECONDS,
                )
            self._open[tenant] += 1

    def end(self, tenant: str) -> None:
        """Counts the end of a call."""
        with self._lock:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]


class Arrivals:
    """The memory of vectors that come in pieces, from the first until they are answered.

    Args:
        most_bytes: Of all together; somebody of whom nothing else is there may have more.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._lock = threading.Lock()
        self._bytes: collections.Counter[str] = collections.Counter()
        # Filled without the lock: a garbage collection may run a finalizer in a thread that holds it.
        self._returned: collections.deque[tuple[str, int]] = collections.deque()

    def take(self, tenant: str, size_bytes: int) -> None:
        """Counts bytes; `give_back` must follow.

        Raises:
            ServiceError: There are too many.
        """
        with self._lock:
            self._settle()
            own, every = self._bytes[tenant], self._bytes.total()
            if own and (every + size_bytes > self._most or own + size_bytes > self._most // 2):
                raise ServiceError(
                    Code.RESOURCE_EXHAUSTED,
                    "ARRIVALS_FULL",
                    f"{own} bytes of vectors of yours are arriving, and {every} of all: {size_bytes} more are too many for the server's memory: "
                    "try again when some are answered",
                    retry_after=_RETRY_SECONDS,
                )
            self._bytes[tenant] += size_bytes

    def give_back(self, tenant: str, size_bytes: int) -> None:
        """Note that the bytes are gone. Takes no lock, since finalizers call this."""
        self._returned.append((tenant, size_bytes))

    def held(self) -> dict[str, int]:
        """Return the bytes of each tenant that has some."""
        with self._lock:
            self._settle()
            return dict(self._bytes)

    def _settle(self) -> None:
        """Subtract what was given back. Call this with the lock held."""
        while self._returned:
            tenant, size_bytes = self._returned.popleft()
            self._bytes[tenant] -= size_bytes
            if not self._bytes[tenant]:
                del self._bytes[tenant]


class Stalls:
    """Calls that wait for a message.

    Args:
        seconds: For how long one that must come is awaited.
        clock: Seconds, monotonic.
    """

    def __init__(self, seconds: float = STALLED_SECONDS, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[float, Any, Callable[[], bool]]] = {}

    def watch(self, messages: Iterator[_T], context: Any, awaited: Callable[[], bool] = lambda: True) -> Iterator[_T]:
        """The messages of a call, which is cancelled where one does not come that is awaited."""
        number = next(self._numbers)
        try:
            while True:
                self._waiting[number] = self._clock(), context, awaited
                try:
                    message = next(messages)
                except StopIteration:
                    return
                self._waiting.pop(number, None)
                yield message
        finally:
            self._waiting.pop(number, None)

    def sweep(self) -> None:
        """Cancels the calls that have waited for too long."""
        latest = self._clock() - self._seconds
        for since, context, awaited in list(self._waiting.values()):
            if since < latest and awaited():
                context.cancel()
