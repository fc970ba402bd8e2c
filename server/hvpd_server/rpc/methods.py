"""Decorators for the methods of services, which answer errors, and the registration
with gRPC.
"""

import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import grpc

from hvpd._wire import frames
from hvpd_server.errors import Code, ServiceError
from hvpd_server.rpc.call_context import GrpcCall

_T = TypeVar("_T")


def unary(method: Callable[[Any, Any, GrpcCall], _T]) -> Callable[[Any, Any, GrpcCall], _T]:
    """Decorate a method that returns one response."""

    @functools.wraps(method)
    def serve(self: Any, request: Any, call: GrpcCall) -> _T:
        try:
            return method(self, request, call)
        except Exception as error:
            call.abort(error)
            raise

    return serve


def streaming(
    method: Callable[[Any, Any, GrpcCall], Generator[_T, None, None]],
) -> Callable[[Any, Any, GrpcCall], Iterator[_T]]:
    """Decorate a method of a service with `stalls` that yields responses."""

    @functools.wraps(method)
    def serve(self: Any, request: Any, call: GrpcCall) -> Iterator[_T]:
        try:
            yield from self.stalls.answers(method(self, request, call), call)
        except Exception as error:  # noqa: BLE001 - every error is answered
            call.abort(error)

    return serve


def add_to_server(server: grpc.Server, file: Any, servicer: object) -> None:
    """Register the one service of a proto file. Its methods take and give messages with
    chunks as frames.
    """
    (service,) = file.DESCRIPTOR.services_by_name.values()
    handlers = {method.name: frames.handler(servicer, method) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def check_administers(call: GrpcCall, what: str) -> None:
    """Raise ServiceError if the call may not touch objects of other tenants."""
    if not call.may_administer:
        raise ServiceError(
            Code.PERMISSION_DENIED,
            "RIGHT_MISSING",
            f"{what} takes a token with the right 'administer'.",
            {"right": "administer", "tenant": call.owner},
        )
