"""The client for asyncio: `async with hvpd.aio.connect(...) as client`.

It is the same client with another interface. A call that may wait for the server runs
in a thread of a pool, and is awaited. Everything else answers at once. So retries,
restarts, errors and results are those of `hvpd.connect`, and each new call of the
client is here, too.

    await client.objective("digits/mlp")   an objective of this module
    await objective.at(x)                  a point of this module
    point.hessian()                        an operator of this module, without a wait
    await (H @ v)                          a product

Cancelling a task cancels its call: the client ends the exchange, and the server drops
the work if it has not begun.
"""

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from scipy.sparse.linalg import LinearOperator

from hvpd import _connect, _local, krylov
from hvpd._arguments import integer
from hvpd._client import Client
from hvpd._errors import HvpdError
from hvpd._objective import Objective
from hvpd._point import Point
from hvpd._transport.calls import CONNECT_AGAIN
from hvpd._transport.cancellation import Cancellation

__all__ = ["AsyncClient", "AsyncObjective", "AsyncOperator", "AsyncPoint", "AsyncRun", "connect", "local"]

_IN_FLIGHT = 64
"""Calls of a client that are under way at once. Others wait in the client."""


class _Calls:
    """Runs calls in threads, for callers in event loops.

    Args:
        in_flight: Number of threads.
    """

    def __init__(self, in_flight: int) -> None:
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="hvpd-aio")
        self._under_way: set[Cancellation] = set()
        self.closed = False

    async def run(self, call: Callable[[], Any], dropped: Callable[[Any], object] = lambda result: None) -> Any:
        """Run a function in a thread, and wait for it.

        Args:
            call: The function.
            dropped: Receives the result if the caller no longer waits for it.
        """
        loop, cancellation = asyncio.get_running_loop(), Cancellation()
        waiter: asyncio.Future[None] = loop.create_future()
        try:
            future = self._pool.submit(cancellation.run, call)
        except RuntimeError:
            if not self.closed:  # The system has no more threads, and the pool has kept the call.
                cancellation.cancel()
                raise
            raise HvpdError(f"this client is closed: {CONNECT_AGAIN}", reason="CLIENT_CLOSED") from None
        self._under_way.add(cancellation)

        def finished(future: "Future[Any]") -> None:
            self._under_way.discard(cancellation)
            with contextlib.suppress(RuntimeError):  # The loop was closed, and nothing waits.
                loop.call_soon_threadsafe(_wake, waiter)

        future.add_done_callback(finished)
        try:
            await waiter
        except BaseException:  # The task was cancelled, or its loop is gone.
            if not future.cancel():
                future.add_done_callback(functools.partial(_drop, dropped))
                cancellation.cancel()
            raise
        return future.result()

    def cancel(self) -> None:
        """Cancel all calls."""
        for cancellation in tuple(self._under_way):
            cancellation.cancel()

    def close(self) -> None:
        """Cancel all calls, and let the threads end."""
        self.closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.cancel()


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def _drop(dropped: Callable[[Any], object], future: "Future[Any]") -> None:
    if not future.cancelled() and future.exception() is None:
        dropped(future.result())


class _Face:
    """An object of the blocking client, with calls that are awaited."""

    _at_once: frozenset[str] = frozenset()
    """Methods that never wait for the server."""

    def __init__(self, calls: _Calls, blocking: Any) -> None:
        self._calls = calls
        self._blocking = blocking

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._blocking, name)
        if not inspect.ismethod(found):
            return self._faced(found)

        @functools.wraps(found)
        def method(*arguments: Any, **options: Any) -> Any:
            call = functools.partial(found, *map(_blocking, arguments), **options)
            return self._now(call) if name in self._at_once else self._later(name, call)

        return method

    def __dir__(self) -> list[str]:
        return [name for name in dir(self._blocking) if not name.startswith("_")]

    def __repr__(self) -> str:
        return f"<asyncio: {self._blocking!r}>"

    def _now(self, call: Callable[[], Any]) -> Any:
        return self._faced(call())

    def _later(self, name: str, call: Callable[[], Any]) -> Coroutine[Any, Any, Any]:
        """Return a coroutine of a call, with the call's name: Python warns with it if
        the coroutine is never awaited.
        """

        async def later() -> Any:
            return self._faced(await self._calls.run(call))

        later.__name__, later.__qualname__ = name, f"{type(self).__name__}.{name}"
        return later()

    def _faced(self, found: Any) -> Any:
        """Return the face of an object that has calls of its own."""
        for kind, face in _FACES.items():
            if isinstance(found, kind):
                return face(self._calls, found)
        return found


class AsyncOperator(_Face):
    """A linear operator at a point, for asyncio.

    `A @ v` and all methods that multiply are awaited. Shifted and scaled operators,
    blocks and sums are made at once.

    Example:
        >>> product = await (H @ v)
        >>> products = await asyncio.gather(*(H @ v for v in vectors))
    """

    _at_once = frozenset({"shifted", "updated", "block", "transpose", "adjoint", "as_jax"})

    __array_ufunc__ = None  # So that NumPy leaves `v @ A` to this class.

    def __matmul__(self, other: Any) -> Awaitable[Any]:
        return self._later("__matmul__", lambda: self._blocking @ _blocking(other))

    def __rmatmul__(self, other: Any) -> Awaitable[Any]:
        return self._later("__rmatmul__", lambda: other @ self._blocking)

    def __neg__(self) -> Any:
        return self._now(lambda: -self._blocking)

    def __mul__(self, factor: float) -> Any:
        return self._now(lambda: self._blocking * float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Any:
        return self._now(lambda: self._blocking / float(divisor))

    def __add__(self, other: Any) -> Any:
        return self._now(lambda: self._blocking + _blocking(other))

    def __sub__(self, other: Any) -> Any:
        return self._now(lambda: self._blocking - _blocking(other))


class AsyncRun(_Face):
    """A run of Lanczos iteration, for asyncio; `async with` ends it. Its methods are
    awaited.

    Example:
        >>> async with await H.lanczos(100) as run:
        ...     ritz = await run.ritz(5)
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._later("close", self._blocking.close)


class AsyncPoint(_Face):
    """A point, for asyncio. Its operators are made at once; `kfac`, `moved` and `pin`
    are awaited.

    Example:
        >>> point = await objective.at(x)
        >>> H = point.hessian(shift=1e-3)
    """

    _at_once = frozenset({"hessian", "ggn", "fisher", "empirical_fisher"})


class AsyncObjective(_Face):
    """An objective, for asyncio. Values, gradients, points and checks are awaited.

    Example:
        >>> value, gradient = await objective.value_and_grad(x)
    """

    _at_once = frozenset({"has", "slices", "ravel", "unravel", "vector", "derivative_rules", "dense_layers", "as_jax"})


class AsyncClient(_Face):
    """A connection to a server, for asyncio. Made by `hvpd.aio.connect`.

    It may be used from several event loops, one after the other or at once.

    Example:
        >>> async with hvpd.aio.connect("gpu-box:7070") as client:
        ...     objective = await client.objective("demo/logistic")
    """

    _at_once = frozenset({"statistics"})

    async def close(self) -> None:
        """Cancel all calls of this client, and end the connection.

        A second call has no effect.

        Example:
            >>> await client.close()
        """
        if self._calls.closed:
            return
        self._calls.cancel()
        try:
            await self._calls.run(self._blocking.close)
        finally:
            self._calls.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


_FACES: dict[type, type[_Face]] = {
    Client: AsyncClient,
    Objective: AsyncObjective,
    Point: AsyncPoint,
    LinearOperator: AsyncOperator,
    krylov.Lanczos: AsyncRun,
}


def _blocking(argument: Any) -> Any:
    """Return the blocking client's object behind a face; anything else as it is."""
    return argument._blocking if isinstance(argument, _Face) else argument  # noqa: SLF001 - our own


class Connecting:
    """A connection that is being made: awaited, or entered by `async with`."""

    def __init__(self, make: Callable[[], Client], in_flight: int) -> None:
        self._make = make
        self._in_flight = integer(in_flight, "in_flight", 1)
        self._client: AsyncClient | None = None

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"this connection is still being made, and has no {name!r}: await it, as in `client = await hvpd.aio.connect()`, "
            "or enter it by `async with`"
        )

    def __await__(self) -> Generator[Any, None, AsyncClient]:
        return self._connected().__await__()

    async def _connected(self) -> AsyncClient:
        calls = _Calls(self._in_flight)
        try:
            return AsyncClient(calls, await calls.run(self._make, dropped=lambda client: client.close()))
        except BaseException:
            calls.close()
            raise

    async def __aenter__(self) -> AsyncClient:
        self._client = await self._connected()
        return self._client

    async def __aexit__(self, *error: object) -> None:
        assert self._client is not None
        await self._client.close()


def connect(address: str | None = None, *, in_flight: int = _IN_FLIGHT, **settings: Any) -> Connecting:
    """Connect to a server, for asyncio.

    Args:
        address: As for `hvpd.connect`.
        in_flight: Calls that are under way at once, each in a thread. The server
            multiplies the vectors of concurrent products together.
        settings: As for `hvpd.connect`.

    Returns:
        An object to await, or to enter by `async with`; both give an `AsyncClient`.

    Raises:
        HvpdError: When awaited, in the cases of `hvpd.connect`.

    Example:
        >>> async with hvpd.aio.connect("gpu-box:7070") as client:
        ...     objective = await client.objective("demo/logistic")
    """
    return Connecting(functools.partial(_connect.connect, address, **settings), in_flight)


def local(*, in_flight: int = _IN_FLIGHT, **settings: Any) -> Connecting:
    """Start an embedded server and connect to it, for asyncio.

    Args:
        in_flight: As for `connect`.
        settings: As for `hvpd.local`.

    Returns:
        As `connect`.

    Raises:
        HvpdError: When awaited, in the cases of `hvpd.local`.

    Example:
        >>> async with hvpd.aio.local() as client:
        ...     objective = await client.register(loss, params)
    """
    return Connecting(functools.partial(_local.local, **settings), in_flight)
