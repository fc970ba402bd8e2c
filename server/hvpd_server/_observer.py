"""Sees every call from its arrival to its answer: how many are open, how long each took, and how it failed. The outermost
interceptor, so that refusals of the others are seen, too. Knows metrics and gRPC, and nothing of what the calls do.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from hvpd_server._handlers import Behaviour, wrapped
from hvpd_server._metrics import Metrics

_OURS = "/hvpd."
_DETAILS = "grpc-status-details-bin"

_PRODUCTS = "StreamProducts"
"""A stream of many requests, whose durations the service tells."""


class Observer(grpc.ServerInterceptor):
    """Counts calls of this server's own services.

    Args:
        metrics: Where.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Continues, with whatever serves the call under observation."""
        handler: Any = continuation(handler_call_details)
        path = str(handler_call_details.method)
        if handler is None or not path.startswith(_OURS):
            return handler  # type: ignore[no-any-return] # None, or a handler
        method = path.rpartition("/")[2]

        def unary(inner: Behaviour) -> Behaviour:
            def call(request: Any, context: grpc.ServicerContext) -> Any:
                with self._observed(method, context):
                    return inner(request, context)

            return call

        def streaming(inner: Behaviour) -> Behaviour:
            def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                with self._observed(method, context):
                    yield from inner(request, context)

            return call

        return wrapped(handler, streaming if handler.response_streaming else unary)

    @contextlib.contextmanager
    def _observed(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        """One call, from its beginning to its end."""
        self._metrics.opened()
        started = time.monotonic()
        try:
            yield
        except Exception:
            self._failed(context)
            raise
        finally:
            self._metrics.closed()
            if method != _PRODUCTS:
                self._metrics.answered(method, time.monotonic() - started)

    def _failed(self, context: Any) -> None:
        """Counts what the call was aborted with. A caller who went away was told nothing."""
        for key, value in context.trailing_metadata() or ():
            if key == _DETAILS:
                status = status_pb2.Status()
                try:
                    status.ParseFromString(value)
                except DecodeError:  # Somebody else's.
                    continue
                self._metrics.failed(status)
                return
