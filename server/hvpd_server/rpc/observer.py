"""Observes every call from its arrival to its answer: it counts, times and traces them.

The observer is the outermost interceptor, so that it also sees calls that the gate
refuses. It makes each call's `GrpcCall`, and hands it on in the place of gRPC's
context.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.handlers import Behaviour, wrapped
from hvpd_server.telemetry import requests
from hvpd_server.telemetry.metrics import Metrics
from hvpd_server.telemetry.tracing import Tracing

_OURS = "/hvpd."

_PRODUCTS = "StreamProducts"
"""A stream of many requests: `products.Products` times and traces each of them."""


class Observer(grpc.ServerInterceptor):
    """Observes the calls of this server's own services.

    Args:
        metrics: Counts the calls.
        tracing: Makes their spans, unless it is None.
    """

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._metrics = metrics
        self._tracing = tracing

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Return the handler that serves the call, with the observation around it."""
        handler: Any = continuation(handler_call_details)
        path = str(handler_call_details.method)
        if handler is None or not path.startswith(_OURS):
            return handler  # type: ignore[no-any-return] # None, or a handler
        method = path.rpartition("/")[2]
        metadata = handler_call_details.invocation_metadata
        request_id = requests.id_of(metadata)

        def begun(context: grpc.ServicerContext) -> GrpcCall:
            call = GrpcCall(context, request_id, method)
            if self._tracing is not None and method != _PRODUCTS:
                self._tracing.call(call, path, metadata)
            return call

        def unary(inner: Behaviour) -> Behaviour:
            def serve(request: Any, context: grpc.ServicerContext) -> Any:
                call = begun(context)
                with self._observed(call):
                    return inner(request, call)

            return serve

        def streaming(inner: Behaviour) -> Behaviour:
            def serve(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                call = begun(context)
                with self._observed(call):
                    yield from inner(request, call)

            return serve

        return wrapped(handler, streaming if handler.response_streaming else unary)

    @contextlib.contextmanager
    def _observed(self, call: GrpcCall) -> Iterator[None]:
        """Observe one call, from its beginning to its end."""
        self._metrics.opened()
        requests.serve(call)
        whole = False
        try:
            yield
            whole = True
            requests.answered(call)
        finally:
            if call.error is not None:  # A client that went away got no error.
                self._metrics.failed(call.error.status, call.method, call.owner)
            if requests.served() is call:  # A stream that was left in the middle ends in any thread.
                requests.serve(None)
            self._metrics.closed()
            if call.method != _PRODUCTS:
                self._metrics.answered(call.method, time.monotonic() - call.started)
            if call.span is not None:
                call.span.end(call, call.error, whole=whole)
