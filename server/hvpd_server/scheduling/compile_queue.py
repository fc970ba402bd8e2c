"""The compile queue shares the threads for reading and compiling between tenants, so
that no tenant waits for all of another's objectives.

A tenant's calls run in their order, with one exception: an objective that is being
compiled waits while another objective can begin. So one process compiles all programs
of an objective, and processes of several objectives run at the same time.
"""

import collections
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from hvpd_server.errors import Code, ServiceError

THREADS = 4
"""Most programs that are read or compiled at the same time."""

EACH = 2
"""Most of these that one tenant may have."""


class CompileQueue:
    """Runs calls in threads, at most so many at a time, and takes tenants in turn.

    Args:
        threads: Most calls at a time.
        each: Most calls of one tenant at a time.
    """

    def __init__(self, threads: int = THREADS, each: int = EACH) -> None:
        self._threads = threads
        self._each = each
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        # In the order of turns; a tenant is in it while it has calls that wait.
        self._waiting: collections.OrderedDict[str, collections.deque[_Call]] = collections.OrderedDict()
        self._running: collections.Counter[str] = collections.Counter()
        self._objectives: collections.Counter[str] = collections.Counter()
        self._closed = False

    def of(self, tenant: str, objective: str) -> "concurrent.futures.Executor":
        """Return an executor for the calls of a tenant about an objective."""
        return _OfTenant(self, tenant, objective)

    def submit(self, tenant: str, objective: str, call: "Callable[[], Any]") -> "concurrent.futures.Future[Any]":
        """Run a call in its turn.

        Raises:
            ServiceError: The queue is closed.
            RuntimeError: The system has no thread for the call, and no other call runs.
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise ServiceError(Code.UNAVAILABLE, "SHUTTING_DOWN", "the server is stopping: nothing is compiled")
            self._waiting.setdefault(tenant, collections.deque()).append(_Call(future, call, objective))
            if (found := self._take()) is not None:
                self._start(*found)
        return future

    def close(self, *, wait: bool = False) -> None:
        """Cancel the calls that wait. Those that run go on. With `wait`, return when
        they have ended.
        """
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, collections.OrderedDict()
        for calls in waiting.values():
            for call in calls:
                call.future.cancel()
        if wait:
            with self._ended:
                self._ended.wait_for(lambda: not self._running.total())

    def _take(self) -> "tuple[str, _Call] | None":
        """Return the call that may run now, with its tenant, and count it as running.
        Call this with the lock held.
        """
        if self._running.total() >= self._threads:
            return None
        tenant = next((each for each in self._waiting if self._running[each] < self._each), None)
        if tenant is None:
            return None
        calls = self._waiting[tenant]
        call = next((each for each in calls if not self._objectives[each.objective]), calls[0])
        calls.remove(call)
        if calls:
            self._waiting.move_to_end(tenant)
        else:
            del self._waiting[tenant]
        self._running[tenant] += 1
        self._objectives[call.objective] += 1
        return tenant, call

    def _free(self, tenant: str, call: "_Call") -> None:
        self._running -= {tenant: 1}
        self._objectives -= {call.objective: 1}
        self._ended.notify_all()

    def _start(self, tenant: str, call: "_Call") -> None:
        """Run a call in a new thread. Call this with the lock held."""
        try:
            threading.Thread(target=self._run, args=(tenant, call), name="hvpd-compile", daemon=True).start()
        except RuntimeError:  # The system has no more threads.
            self._free(tenant, call)
            if not self._running.total():
                raise
            self._waiting.setdefault(tenant, collections.deque()).appendleft(call)  # A thread that runs takes it.

    def _run(self, tenant: str, call: "_Call") -> None:
        """Run a call, and then those that may run in its place."""
        found: tuple[str, _Call] | None = (tenant, call)
        while found is not None:
            tenant, call = found
            _settle(call)
            with self._lock:
                self._free(tenant, call)
                found = self._take()


def _settle(call: "_Call") -> None:
    if call.future.set_running_or_notify_cancel():
        try:
            call.future.set_result(call.run())
        except BaseException as error:  # noqa: BLE001 - raised again by future.result()
            call.future.set_exception(error)


class _Call(NamedTuple):
    future: "concurrent.futures.Future[Any]"
    run: Callable[[], Any]
    objective: str


class _OfTenant(concurrent.futures.Executor):
    def __init__(self, queue: CompileQueue, tenant: str, objective: str) -> None:
        self._queue = queue
        self._tenant = tenant
        self._objective = objective

    def submit(self, function: Callable[..., Any], /, *args: Any, **settings: Any) -> "concurrent.futures.Future[Any]":
        """Run a call in its tenant's turn."""
        return self._queue.submit(self._tenant, self._objective, lambda: function(*args, **settings))
