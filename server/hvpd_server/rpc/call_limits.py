"""The limits of calls while they last: their number, their bytes in transit, and the
time in which nothing moves.

A tenant has at most half of the calls and of the bytes, so that one tenant cannot shut
out the others.
"""

import collections
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple, TypeVar

from hvpd_server.errors import Code, ServiceError
from hvpd_server.rpc.call_context import GrpcCall

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

STALLED_SECONDS = 60.0
"""Seconds to wait for a message that must come, or until the client takes an answer."""

_RETRY_SECONDS = 0.2


def _end_nothing(tenant: str) -> None:
    """End no call."""


class Calls:
    """Counts the open calls.

    Args:
        most: The most open calls of all tenants together.
        end_idle: Ends an idle call of a tenant; of any tenant if the name is empty.
    """

    def __init__(self, most: int, end_idle: Callable[[str], None] = _end_nothing) -> None:
        self._most = most
        self._end_idle = end_idle
        self._lock = threading.Lock()
        self._open: collections.Counter[str] = collections.Counter()

    def begin(self, tenant: str) -> None:
        """Count a call of a tenant; `end` must follow. Without tokens the tenant is
        empty, and has no share of its own.

        A call that finds no room ends an idle one, so that its next try finds room.

        Raises:
            ServiceError: Too many calls are open.
        """
        with self._lock:
            own, every = self._open[tenant], self._open.total()
            if every < self._most and not (tenant and own >= max(self._most // 2, 1)):
                self._open[tenant] += 1
                return
        self._end_idle(tenant if every < self._most else "")
        found = f"tenant {tenant} has {own}" if every < self._most else f"all tenants have {every}"
        raise ServiceError(
            Code.RESOURCE_EXHAUSTED,
            "TOO_MANY_CALLS",
            f"Too many calls are open: {found}. The limit is {self._most} for all tenants, and half of that for one. "
            "Retry in a moment, or raise `hvpd serve --max-calls`.",
            retry_after=_RETRY_SECONDS,
        )

    def end(self, tenant: str) -> None:
        """Count the end of a call."""
        with self._lock:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]


def _no_limit(tenant: str) -> None:
    """Return no limit for any tenant."""


class Arrivals:
    """The memory of messages in transit: from a message's arrival until the transport
    has its answer, or the answer is dropped.

    Args:
        most_bytes: The limit of all tenants together. A tenant has half of it at most.
            A tenant of which nothing is in transit may exceed any limit once.
        limit: Returns a tenant's own limit in bytes, or None.
    """

    def __init__(self, most_bytes: int, limit: Callable[[str], int | None] = _no_limit) -> None:
        self._most = most_bytes
        self._limit = limit
        self._lock = threading.Lock()
        self._bytes: dict[str, int] = {}
        self._every = 0
        # Filled without the lock, because the garbage collector may close a generator
        # that gives back, in a thread that holds the lock.
        self._returned: collections.deque[tuple[str, int]] = collections.deque()

    def take(self, tenant: str, size_bytes: int) -> None:
        """Count bytes; `give_back` must follow.

        Raises:
            ServiceError: The tenant, or all tenants together, would have too many.
        """
        limit = self._limit(tenant)
        most = self._most // 2 if limit is None else min(limit, self._most // 2)
        with self._lock:
            if self._returned:
                self._subtract_returned()
            own = self._bytes.get(tenant, 0)
            every = self._every
            if own and (every + size_bytes > self._most or own + size_bytes > most):
                raise ServiceError(
                    Code.RESOURCE_EXHAUSTED,
                    "TENANT_TRANSIT" if limit == most else "ARRIVALS_FULL",
                    f"Too many vectors and answers are in transit: this tenant has {own} bytes, of at most {most}, and {size_bytes} more do "
                    "not fit. Retry after earlier answers are read.",
                    retry_after=_RETRY_SECONDS,
                )
            self._bytes[tenant] = own + size_bytes
            self._every = every + size_bytes

    def give_back(self, tenant: str, size_bytes: int) -> None:
        """Note that the bytes are gone. Takes no lock."""
        self._returned.append((tenant, size_bytes))

    @contextlib.contextmanager
    def holding(self, tenant: str, size_bytes: int) -> Iterator[None]:
        """Count bytes inside the block; raise as `take` does."""
        self.take(tenant, size_bytes)
        try:
            yield
        finally:
            self.give_back(tenant, size_bytes)

    def held(self) -> dict[str, int]:
        """Return the bytes in transit of each tenant that has any."""
        with self._lock:
            self._subtract_returned()
            return dict(self._bytes)

    def _subtract_returned(self) -> None:
        """Subtract the bytes that were given back. Call this with the lock held."""
        while self._returned:
            tenant, size_bytes = self._returned.popleft()
            left = self._bytes[tenant] - size_bytes
            self._every -= size_bytes
            if left:
                self._bytes[tenant] = left
            else:
                del self._bytes[tenant]


class Segments:
    """The shared memory of all connections, in use or idle. Memory beyond the limits is
    not refused with an error: the vectors then come by the socket.

    Args:
        most_bytes: The limit of all tenants together. A tenant has half of it at most,
            and a segment a quarter.
        limit: Returns a tenant's own limit in bytes, or None.
    """

    def __init__(self, most_bytes: int, limit: Callable[[str], int | None] = _no_limit) -> None:
        self._most = most_bytes
        self._limit = limit
        self.largest = most_bytes // 4
        """Bytes of the largest segment."""
        self._lock = threading.Lock()
        self._bytes: collections.Counter[str] = collections.Counter()

    def take(self, tenant: str, size_bytes: int) -> bool:
        """Count a segment. Return whether there is room; then `give_back` must
        follow.
        """
        limit = self._limit(tenant)
        own = self._most // 2 if limit is None else min(limit, self._most // 2)
        with self._lock:
            room = min(own - self._bytes[tenant], self._most - self._bytes.total())
            if not 0 < size_bytes <= min(room, self.largest):
                return False
            self._bytes[tenant] += size_bytes
        return True

    def give_back(self, tenant: str, size_bytes: int) -> None:
        """Note that a segment is gone."""
        with self._lock:
            self._bytes[tenant] -= size_bytes
            if not self._bytes[tenant]:
                del self._bytes[tenant]

    @property
    def held(self) -> int:
        """Return the bytes of all segments."""
        with self._lock:
            return self._bytes.total()


class _Wait(NamedTuple):
    """A call that waits for its client."""

    since: float
    call: GrpcCall
    awaited: Callable[[], bool]
    """Whether the call may not go on waiting."""
    unread: bool
    """Whether the client must read an answer; else it must send a message."""


class Stalls:
    """Calls that wait for their clients: for a message, or until an answer is read.

    Args:
        seconds: The longest wait.
        clock: Seconds, monotonic.
    """

    def __init__(self, seconds: float = STALLED_SECONDS, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._numbers = itertools.count()
        self._waiting: dict[int, _Wait] = {}

    def watch(self, messages: Iterator[_T], call: GrpcCall, awaited: Callable[[], bool] = lambda: True) -> Iterator[_T]:
        """Yield the messages of a call, and cancel the call if an awaited message does
        not come.
        """
        number = next(self._numbers)
        try:
            while True:
                self._waiting[number] = _Wait(self._clock(), call, awaited, unread=False)
                try:
                    message = next(messages)
                except StopIteration:
                    return
                self._waiting.pop(number, None)
                yield message
                del message  # It may be large, and the next one may come much later.
        finally:
            self._waiting.pop(number, None)

    def answers(self, answers: Generator[_T, None, None], call: GrpcCall) -> Iterator[_T]:
        """Yield the answers of a call, which ends with UNAVAILABLE if its client does
        not read one of them in time.
        """
        number = next(self._numbers)
        try:
            for answer in answers:
                self._waiting[number] = _Wait(self._clock(), call, _always, unread=True)
                yield answer
                del self._waiting[number]
        finally:
            self._waiting.pop(number, None)
            answers.close()

    def sweep(self) -> None:
        """End the calls that have waited for too long."""
        latest = self._clock() - self._seconds
        for since, call, awaited, unread in list(self._waiting.values()):
            if since >= latest or not awaited():
                continue
            if unread:
                _log.info("a call of %s is ended: its client has not read an answer for %g s", call.peer, self._seconds)
                call.end(
                    f"the client did not read its answers for {self._seconds:g} s, and the server has dropped them"
                )
            else:
                call.cancel()


def _always() -> bool:
    return True
