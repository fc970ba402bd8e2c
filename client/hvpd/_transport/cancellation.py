"""Calls of one thread that another thread can cancel.

`hvpd.aio` makes each call in a thread of a pool, as part of a `Cancellation`. When a
call waits for the server, it states with `ending` how to end that wait. Cancelling ends
the wait, and forbids further tries. Calls outside of a `Cancellation`, which are all
calls of the blocking client, cannot be cancelled in this way.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from hvpd._errors import HvpdError

_T = TypeVar("_T")

_thread = threading.local()
"""`current`: the Cancellation that the thread's calls are part of."""

_NOTHING = contextlib.nullcontext()


class Cancellation:
    """The calls of one thread, which another thread may cancel once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._end: Callable[[], object] | None = None

    def run(self, call: Callable[[], _T]) -> _T:
        """Run a function in this thread, so that its calls can be cancelled.

        Raises:
            HvpdError: It was cancelled (reason `CANCELLED`).
        """
        _thread.current = self
        try:
            self.check()
            return call()
        finally:
            _thread.current = None

    def cancel(self) -> None:
        """End the current wait, and let the call fail. Other threads call it."""
        with self._lock:
            self._cancelled.set()
            if self._end is not None:
                self._end()

    def check(self) -> None:
        """Raise HvpdError if the call was cancelled."""
        if self._cancelled.is_set():
            raise HvpdError("the call was cancelled", reason="CANCELLED")

    @contextlib.contextmanager
    def ending(self, end: Callable[[], object]) -> Iterator[None]:
        """Call `end` if the call is cancelled inside this `with`. The end of the `with`
        then raises HvpdError, because the stream or connection was ended.
        """
        with self._lock:
            self.check()
            self._end = end
        try:
            yield
        finally:
            with self._lock:
                self._end = None
        self.check()

    def sleep(self, seconds: float) -> None:
        """Sleep, but wake up if the call is cancelled."""
        self._cancelled.wait(seconds)


def possible() -> bool:
    """Return whether this thread's calls can be cancelled."""
    return getattr(_thread, "current", None) is not None


def ending(end: Callable[[], object]) -> "contextlib.AbstractContextManager[None]":
    """Call `end` if this thread's call is cancelled inside the `with`."""
    current: Cancellation | None = getattr(_thread, "current", None)
    return _NOTHING if current is None else current.ending(end)


def check() -> None:
    """Raise HvpdError if this thread's call was cancelled."""
    current: Cancellation | None = getattr(_thread, "current", None)
    if current is not None:
        current.check()


def sleep(seconds: float) -> None:
    """Sleep, but wake up if this thread's call is cancelled."""
    current: Cancellation | None = getattr(_thread, "current", None)
    if current is None:
        time.sleep(seconds)
    else:
        current.sleep(seconds)
