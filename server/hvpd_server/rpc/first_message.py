"""Calls of one message, which begin before their message arrives.

gRPC gives such a call to its handler together with the message. Until the message is
there, the call holds a thread and the bytes that have arrived, and no limit would know
of it. So the server takes these calls as streams of one message.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from hvpd_server.errors import Code, ServiceError
from hvpd_server.rpc.call_context import GrpcCall
from hvpd_server.rpc.call_limits import Stalls

MOST_OPEN = 16
"""Most calls of open methods that wait for their message."""


class FirstMessages:
    """Waits for the messages of calls.

    Args:
        stalls: Ends the calls whose message does not come.
        most_open: Most calls of open methods that wait. A further one ends the oldest,
            so that strangers cannot keep out probes, whose message comes at once.
    """

    def __init__(self, stalls: Stalls, most_open: int = MOST_OPEN) -> None:
        self._stalls = stalls
        self._most_open = most_open
        self._lock = threading.Lock()
        self._open: dict[GrpcCall, None] = {}  # In the order of their beginning.

    def early(
        self, handler: "grpc.RpcMethodHandler[Any, Any]", *, is_open: bool = False
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """Return the handler of a call that begins before its message arrives.

        Args:
            handler: The handler. One of a stream is returned unchanged.
            is_open: Whether the method needs no token.
        """
        if handler.request_streaming:
            return handler
        behaviour: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary
        read: Callable[[Any], Any] = handler.request_deserializer or _unchanged

        def serve(messages: Iterator[Any], context: Any) -> Any:
            call = GrpcCall.of(context)
            messages = self._stalls.watch(messages, call)
            data = self._next_of_open(messages, call) if is_open else next(messages, None)
            if data is None:
                call.abort(_malformed("the call has none"))
            try:
                request = read(data)
            except DecodeError as error:
                call.abort(_malformed(str(error)))
            return behaviour(request, context)

        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        return make(serve, None, handler.response_serializer)

    def _next_of_open(self, messages: Iterator[Any], call: GrpcCall) -> Any:
        oldest = None
        with self._lock:
            self._open[call] = None
            if len(self._open) > self._most_open:
                oldest = next(iter(self._open))
                del self._open[oldest]
        if oldest is not None:
            oldest.end("the message of this call did not come, and another call needs its place")
        try:
            return next(messages, None)
        finally:
            with self._lock:
                self._open.pop(call, None)


def _unchanged(data: Any) -> Any:
    return data


def _malformed(why: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, "MALFORMED_MESSAGE", f"a message cannot be read: {why}")
