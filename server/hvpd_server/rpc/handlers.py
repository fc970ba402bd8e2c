"""gRPC's handlers with another behaviour wrapped around their own."""

from collections.abc import Callable
from typing import Any

import grpc

Behaviour = Callable[[Any, Any], Any]
"""Serves a call: takes a request, or an iterator of them, and a context. Returns a
response, or an iterator of them.
"""

_KINDS: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def wrapped(
    handler: "grpc.RpcMethodHandler[Any, Any]", wrap: Callable[[Behaviour], Behaviour]
) -> "grpc.RpcMethodHandler[Any, Any]":
    """Return the handler with its behaviour wrapped."""
    kind, make = _KINDS[handler.request_streaming, handler.response_streaming]
    made: grpc.RpcMethodHandler[Any, Any] = make(
        wrap(getattr(handler, kind)), handler.request_deserializer, handler.response_serializer
    )
    return made
