"""Sees every call from its arrival to its answer: how many are open, how long each took, and how it failed. The outermost
interceptor, so that refusals of the others are seen, too. Knows metrics and gRPC, and nothing of what the calls do.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

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
        streams = handler.request_streaming, handler.response_streaming
        inner, make = {
            (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
            (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
            (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
            (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
        }[streams]
        observed = self._streaming(method, inner) if handler.response_streaming else self._unary(method, inner)
        return make(observed, handler.request_deserializer, handler.response_serializer)

    def _unary(self, method: str, inner: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            self._metrics.opened()
            started = time.monotonic()
            try:
                return inner(request, context)
            except Exception:
                self._failed(context)
                raise
            finally:
                self._ended(method, started)

        return call

    def _streaming(self, method: str, inner: Callable[..., Any]) -> Callable[[Any, Any], Iterator[Any]]:
        def call(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self._metrics.opened()
            started = time.monotonic()
            try:
                yield from inner(request, context)
            except Exception:
                self._failed(context)
                raise
            finally:
                self._ended(method, started)

        return call

    def _ended(self, method: str, started: float) -> None:
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
