"""The gate lets a call in, or refuses it, and ends calls whose token is no longer good.

A call needs a server that is warm, a client whose protocol revision is served, and a
token that has the method's right.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import grpc

import hvpd
from hvpd._wire import protocol
from hvpd_server.errors import Code, ServiceError
from hvpd_server.rpc.call_context import CallContext, Caller, GrpcCall
from hvpd_server.rpc.call_limits import Calls, Stalls
from hvpd_server.rpc.first_message import FirstMessages
from hvpd_server.rpc.handlers import Behaviour, wrapped
from hvpd_server.tenancy.token_file import ADMINISTER, PUBLISH, USE
from hvpd_server.tenancy.tokens import Tokens

_log = logging.getLogger(__name__)

RIGHT_OF: Mapping[str, str] = MappingProxyType(
    {
        "/hvpd.v1.BlobService/FindMissingBlobs": PUBLISH,
        "/hvpd.v1.BlobService/UploadBlob": PUBLISH,
        "/hvpd.v1.BlobService/PruneBlobs": PUBLISH,
        "/hvpd.v1.ObjectiveService/CreateObjective": PUBLISH,
        "/hvpd.v1.ObjectiveService/DeleteObjective": PUBLISH,
        "/hvpd.v1.ObjectiveService/GetObjective": USE,
        "/hvpd.v1.ObjectiveService/ListObjectives": USE,
        "/hvpd.v1.ObjectiveService/GetPlan": USE,
        "/hvpd.v1.ObjectiveService/ReleaseObjective": ADMINISTER,
        "/hvpd.v1.CurvatureService/CreatePoint": USE,
        "/hvpd.v1.CurvatureService/ComputeProduct": USE,
        "/hvpd.v1.CurvatureService/StreamProducts": USE,
        "/hvpd.v1.CurvatureService/CreateVectorTicket": USE,
        "/hvpd.v1.CurvatureService/ComputeFactors": USE,
        **dict.fromkeys(
            (
                "/hvpd.v1.KrylovService/StartRun",
                "/hvpd.v1.KrylovService/ExtendRun",
                "/hvpd.v1.KrylovService/AppendRun",
                "/hvpd.v1.KrylovService/RestartRun",
                "/hvpd.v1.KrylovService/CombineRun",
                "/hvpd.v1.KrylovService/CloseRun",
                "/hvpd.v1.KrylovService/Compute",
            ),
            USE,
        ),
        "/hvpd.v1.ServerService/GetUsage": USE,
        "/hvpd.v1.ServerService/GetLoad": ADMINISTER,
    }
)
"""The right that each method takes if the server asks for tokens. A method of ours that
is not here takes `administer`.
"""

OPEN = frozenset({"/hvpd.v1.ServerService/GetServer", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List"})
"""Methods for every client that can connect. Health's Watch is not one of them, because
it holds a call for as long as the client likes.
"""


class Gate(grpc.ServerInterceptor):
    """Refuses calls that cannot be served.

    A client that sends no protocol revision, such as grpcurl, is let in.

    Args:
        tokens: The tokens and their rights. None lets every client do everything.
        calls: Counts the open calls, except those of the open methods. None counts no
            calls.
        messages: Waits for the messages of calls of one message.
    """

    def __init__(
        self, tokens: Tokens | None = None, calls: Calls | None = None, messages: FirstMessages | None = None
    ) -> None:
        self.open = False
        self._tokens = tokens
        self._calls = calls
        self._messages = messages or FirstMessages(Stalls())
        self._lock = threading.Lock()
        self._streams: set[CallContext] = set()

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Return the handler that serves the call, or one that refuses it."""
        method = str(handler_call_details.method)
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        if method in OPEN:
            return self._messages.early(handler, is_open=True)
        metadata = handler_call_details.invocation_metadata or ()
        ours = method.startswith("/hvpd.")
        try:
            if ours:
                _check_protocol({str(key): str(value) for key, value in metadata})
            caller = self._caller(method, [value for key, value in metadata if key == "authorization"])
            if ours:
                self._check_warm()
            if caller is not None:
                caller.check_right()
                handler = self._bound(handler, caller)
        except ServiceError as error:
            return _refusing(error, method)
        handler = self._messages.early(handler)
        return handler if self._calls is None else _counted(handler, self._calls, caller, method)

    def _check_warm(self) -> None:
        if not self.open:
            raise ServiceError(Code.UNAVAILABLE, "WARMING_UP", "the server is warming its programs", retry_after=0.2)

    def _caller(self, method: str, authorization: "list[str | bytes]") -> Caller | None:
        """Return the call's token, or None if the server asks for no tokens."""
        if self._tokens is None:
            return None
        right = RIGHT_OF.get(method, ADMINISTER) if method.startswith("/hvpd.") else ""
        return Caller(self._tokens, self._tokens.find(authorization), method, right)

    def _bound(self, handler: "grpc.RpcMethodHandler[Any, Any]", caller: Caller) -> "grpc.RpcMethodHandler[Any, Any]":
        """Return the handler with its calls admitted by a token. A stream ends when its
        token does.
        """
        streams = handler.request_streaming or handler.response_streaming

        def wrap(behaviour: Behaviour) -> Behaviour:
            def serve(request: Any, context: Any) -> Any:
                call = GrpcCall.of(context)
                call.admit(caller)
                if streams:
                    with self._lock:
                        self._streams.add(call)
                    forget = functools.partial(self._forget, call)
                    if not call.on_end(forget):  # It has ended already.
                        forget()
                if caller.right and handler.request_streaming:
                    request = _Checked(request, caller.check)
                return behaviour(request, context)

            return serve

        return wrapped(handler, wrap)

    def _forget(self, call: CallContext) -> None:
        with self._lock:
            self._streams.discard(call)

    @contextlib.contextmanager
    def admitted(self, call: CallContext) -> Iterator[None]:
        """Count a connection past gRPC as a call of its ticket's tenant, and end it
        when the ticket's token does.

        Raises:
            ServiceError: Too many calls are open, or the token is no longer good.
        """
        if call.caller is not None:
            call.caller.check()
        if self._calls is not None:
            self._calls.begin(call.owner)
        try:
            with self._lock:
                self._streams.add(call)
            yield
        finally:
            self._forget(call)
            if self._calls is not None:
                self._calls.end(call.owner)

    def sweep(self) -> None:
        """Read the tokens again if their file has changed, and end the streams whose
        token is no longer good.
        """
        if self._tokens is None:
            return
        self._tokens.refresh()
        with self._lock:
            streams = list(self._streams)
        for call in streams:
            try:
                if call.caller is not None:
                    call.caller.check()
            except ServiceError as error:
                _log.info("a stream of tenant %s is ended: %s", call.owner, error)
                call.cancel()


def _counted(
    handler: "grpc.RpcMethodHandler[Any, Any]", calls: Calls, caller: Caller | None, method: str
) -> "grpc.RpcMethodHandler[Any, Any]":
    """Return the handler with its calls counted from their beginning to their end."""
    tenant = caller.grant.tenant if caller is not None else ""

    def wrap(behaviour: Behaviour) -> Behaviour:
        def serve(request: Any, context: Any) -> Any:
            call = GrpcCall.of(context, method.rpartition("/")[2])
            try:
                calls.begin(tenant)
            except ServiceError as error:
                call.abort(error)
            if not call.on_end(functools.partial(calls.end, tenant)):  # It has ended already.
                calls.end(tenant)
            return behaviour(request, context)

        return serve

    return wrapped(handler, wrap)


def _refusing(error: ServiceError, method: str) -> "grpc.RpcMethodHandler[Any, Any]":
    def refuse(request: Any, context: Any) -> Any:
        call = GrpcCall.of(context, method.rpartition("/")[2])
        call.owner = error.metadata.get("tenant", "")  # For the log.
        call.abort(error)

    # A handler for any kind of call: it refuses a stream without waiting for a message,
    # which may never come.
    return grpc.stream_stream_rpc_method_handler(refuse)


class _Checked:
    """The messages of a call. Each passes only while a check does."""

    def __init__(self, messages: Iterator[Any], check: Callable[[], None]) -> None:
        self._messages = iter(messages)
        self._check = check

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        message = next(self._messages)
        self._check()
        return message


def _check_protocol(metadata: Mapping[str, str]) -> None:
    said = metadata.get(protocol.REVISION_KEY, "")
    if said and not (len(said) < 10 and said.isdecimal() and protocol.OLDEST <= int(said) <= protocol.NEWEST):
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "PROTOCOL_MISMATCH",
            f"the client (hvpd {metadata.get(protocol.VERSION_KEY, 'unknown')}) speaks protocol {said}, this server "
            f"(hvpd {hvpd.__version__}) speaks {protocol.OLDEST} to {protocol.NEWEST}: install the same version on both",
        )
