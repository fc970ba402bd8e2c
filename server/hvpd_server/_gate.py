"""Who is let in: calls that can be served now, of clients that speak a protocol that is served. Errors leave through here, too."""

from collections.abc import Callable
from typing import Any

import grpc
from grpc_status import rpc_status

import hvpd
from hvpd import _protocol
from hvpd_server._errors import Code, ServiceError, to_status


def abort(context: grpc.ServicerContext, error: Exception) -> None:
    """Ends the call with the error's status. A call that is already dead is left alone."""
    if isinstance(error, grpc.RpcError):
        raise error
    context.abort_with_status(rpc_status.to_status(to_status(error)))


class Gate(grpc.ServerInterceptor):
    """Refuses calls that cannot be served: all while the server warms up, and those of clients whose protocol revision is
    not served. Clients that say no revision (grpcurl) are taken at their word.
    """

    def __init__(self) -> None:
        self.open = False

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Continues, or answers why not."""
        method = str(handler_call_details.method)
        if not method.startswith("/hvpd.") or method == "/hvpd.v1.ServerService/GetServer":
            return continuation(handler_call_details)
        metadata = {str(key): str(value) for key, value in handler_call_details.invocation_metadata or ()}
        said = metadata.get(_protocol.REVISION_KEY, "")
        if said and not (said.isdecimal() and _protocol.OLDEST <= int(said) <= _protocol.NEWEST):
            return _refusing(
                ServiceError(
                    Code.FAILED_PRECONDITION,
                    "PROTOCOL_MISMATCH",
                    f"the client (hvpd {metadata.get(_protocol.VERSION_KEY, 'unknown')}) speaks protocol {said}, this server "
                    f"(hvpd {hvpd.__version__}) speaks {_protocol.OLDEST} to {_protocol.NEWEST}: install the same version on both",
                )
            )
        if not self.open:
            return _refusing(
                ServiceError(Code.UNAVAILABLE, "WARMING_UP", "the server is warming its programs", retry_after=0.2)
            )
        return continuation(handler_call_details)


def _refusing(error: ServiceError) -> "grpc.RpcMethodHandler[Any, Any]":
    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        abort(context, error)

    return grpc.unary_unary_rpc_method_handler(refuse)
