"""Sees every call from its arrival to its answer: which it is, how many are open, how long each took, and how it failed. The outermost
interceptor, so that refusals of the others are seen, too. Knows metrics, spans and gRPC, and nothing of what the calls do.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from hvpd_server import _requests
from hvpd_server._handlers import Behaviour, wrapped
from hvpd_server._metrics import Metrics
from hvpd_server._requests import Request
from hvpd_server._tracing import Tracing

_OURS = "/hvpd."
_DETAILS = "grpc-status-details-bin"

_PRODUCTS = "StreamProducts"
"""A stream of many requests, whose durations and spans the service makes."""


class Observer(grpc.ServerInterceptor):
    """Counts calls of this server's own services.

    Args:
        metrics: Where.
        tracing: Makes their spans; None: there are none.
    """

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._metrics = metrics
        self._tracing = tracing

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
        metadata = handler_call_details.invocation_metadata
        request_id = _requests.id_of(metadata)

        def begun(context: grpc.ServicerContext) -> Request:
            found = Request(context, request_id, method)
            # Where whoever serves the call looks for it: gRPC hands this object, and no other, from here to there.
            context.hvpd_request = found  # type: ignore[attr-defined]
            if self._tracing is not None and method != _PRODUCTS:
                self._tracing.call(found, path, metadata)
            return found

        def unary(inner: Behaviour) -> Behaviour:
            def call(request: Any, context: grpc.ServicerContext) -> Any:
                with self._observed(begun(context), context):
                    return inner(request, context)

            return call

        def streaming(inner: Behaviour) -> Behaviour:
            def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
                with self._observed(begun(context), context):
                    yield from inner(request, context)

            return call

        return wrapped(handler, streaming if handler.response_streaming else unary)

    @contextlib.contextmanager
    def _observed(self, request: Request, context: grpc.ServicerContext) -> Iterator[None]:
        """One call, from its beginning to its end."""
        self._metrics.opened()
        _requests.serve(request)
        whole = False
        try:
            yield
            whole = True
            _requests.answered(request)
        except Exception:
            self._failed(request, context)
            raise
        finally:
            if _requests.served() is request:  # A stream that was left in the middle ends in any thread.
                _requests.serve(None)
            self._metrics.closed()
            if request.method != _PRODUCTS:
                self._metrics.answered(request.method, time.monotonic() - request.started)
            if request.span is not None:
                request.span.end(request, request.error, whole=whole)
            context.hvpd_request = None  # type: ignore[attr-defined] # Each holds the other.

    def _failed(self, request: Request, context: Any) -> None:
        """Counts what the call was aborted with. A caller who went away was told nothing."""
        for key, value in context.trailing_metadata() or ():
            if key == _DETAILS:
                status = status_pb2.Status()
                try:
                    status.ParseFromString(value)
                except DecodeError:  # Somebody else's.
                    continue
                self._metrics.failed(status, request.method, request.tenant)
                return
