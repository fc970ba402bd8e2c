"""Who is let in, and to what: calls that can be served now, of clients that speak a protocol that is served, with a token that has
the method's right. Errors leave through here, too.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import grpc
from grpc_status import rpc_status

import hvpd
from hvpd import _protocol
from hvpd_server import _requests
from hvpd_server._auth import ADMINISTER, PUBLISH, USE, Grant, Tokens
from hvpd_server._calls import Calls
from hvpd_server._errors import Code, ServiceError
from hvpd_server._handlers import Behaviour, wrapped
from hvpd_server._requests import owner_of

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
        "/hvpd.v1.ServerService/GetUsage": USE,
    }
)
"""Which right a method takes, where the server asks for tokens. Those of ours that are not here take `administer`."""

OPEN = frozenset({"/hvpd.v1.ServerService/GetServer", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List"})
"""Methods for everybody who can connect. Health's Watch is none of them: it holds a call for as long as the caller likes."""


def abort(context: grpc.ServicerContext, error: Exception, method: str = "") -> None:
    """Ends the call with the error's status. A call that is already dead is left alone."""
    if isinstance(error, grpc.RpcError):
        raise error
    request = _requests.of(context, method)
    request.error = _requests.failed(request, error)
    context.abort_with_status(rpc_status.to_status(request.error.status))


def tenant_of(context: grpc.ServicerContext) -> str:
    """Who calls: the token's tenant, and without tokens the connection."""
    return owner_of(context) or str(context.peer())


def caller_of(context: grpc.ServicerContext) -> "Caller | None":
    """Who makes a call, where that is asked."""
    found = getattr(context, "hvpd_caller", None)
    return found if isinstance(found, Caller) else None


class Gate(grpc.ServerInterceptor):
    """Refuses calls that cannot be served: all while the server warms up, and those of clients whose protocol revision is
    not served. Clients that say no revision (grpcurl) are taken at their word.

    Args:
        tokens: Who may do what; None: everybody everything.
        calls: Counts those that are open, but for the open methods; None: as many as gRPC takes.
    """

    def __init__(self, tokens: Tokens | None = None, calls: Calls | None = None) -> None:
        self.open = False
        self._tokens = tokens
        self._calls = calls
        self._lock = threading.Lock()
        self._streams: dict[int, tuple[grpc.ServicerContext, Caller]] = {}

    def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Continues, or answers why not."""
        method = str(handler_call_details.method)
        handler = continuation(handler_call_details)
        if handler is None or method in OPEN:
            return handler
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
        return handler if self._calls is None else _counted(handler, self._calls, caller, method)

    def _check_warm(self) -> None:
        if not self.open:
            raise ServiceError(Code.UNAVAILABLE, "WARMING_UP", "the server is warming its programs", retry_after=0.2)

    def _caller(self, method: str, authorization: "list[str | bytes]") -> "Caller | None":
        """Who calls, where that is asked."""
        if self._tokens is None:
            return None
        right = RIGHT_OF.get(method, ADMINISTER) if method.startswith("/hvpd.") else ""
        return Caller(self._tokens, self._tokens.find(authorization), method, right)

    def _bound(self, handler: "grpc.RpcMethodHandler[Any, Any]", caller: "Caller") -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler, its calls being a caller's; those that stream end when the caller's token does."""
        streams = handler.request_streaming or handler.response_streaming

        def wrap(behaviour: Behaviour) -> Behaviour:
            def call(request: Any, context: grpc.ServicerContext) -> Any:
                # Where whoever serves the call looks for it: gRPC hands this object, and no other, from here to there.
                context.hvpd_tenant = caller.grant.tenant  # type: ignore[attr-defined]
                context.hvpd_rights = caller.grant.rights  # type: ignore[attr-defined]
                context.hvpd_caller = caller  # type: ignore[attr-defined]
                if streams:
                    self._watch(context, caller)
                if caller.right and handler.request_streaming:
                    request = _Checked(request, caller.check)
                return behaviour(request, context)

            return call

        return wrapped(handler, wrap)

    @contextlib.contextmanager
    def admitted(self, connection: Any, caller: "Caller | None") -> Iterator[None]:
        """Counts a connection past gRPC as a call of whoever has its ticket, while it lasts, and ends it when their token does.

        Args:
            connection: Has what `_watch` asks of a context.
            caller: Of `caller_of`, when the ticket was made.

        Raises:
            ServiceError: There are too many calls, or the token is not good any more.
        """
        tenant = caller.grant.tenant if caller is not None else ""
        if caller is not None:
            caller.check()
        if self._calls is not None:
            self._calls.begin(tenant)
        try:
            if caller is not None:
                self._watch(connection, caller)
            yield
        finally:
            if self._calls is not None:
                self._calls.end(tenant)

    def _watch(self, context: grpc.ServicerContext, caller: "Caller") -> None:
        key = id(context)
        with self._lock:
            self._streams[key] = context, caller

        def forget() -> None:
            with self._lock:
                self._streams.pop(key, None)

        if not context.add_callback(forget):  # It has ended already.
            forget()

    def sweep(self) -> None:
        """Reads the tokens again where they changed, and ends the streams of those that are not good any more."""
        if self._tokens is None:
            return
        self._tokens.refresh()
        with self._lock:
            streams = list(self._streams.values())
        for context, caller in streams:
            try:
                caller.check()
            except ServiceError as error:
                _log.info("a stream of tenant %s is ended: %s", caller.grant.tenant, error)
                context.cancel()


def _counted(
    handler: "grpc.RpcMethodHandler[Any, Any]", calls: Calls, caller: "Caller | None", method: str
) -> "grpc.RpcMethodHandler[Any, Any]":
    """The handler, its calls being counted from their beginning to their end."""
    tenant = caller.grant.tenant if caller is not None else ""

    def wrap(behaviour: Behaviour) -> Behaviour:
        def call(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                calls.begin(tenant)
            except ServiceError as error:
                abort(context, error, method.rpartition("/")[2])
            if not context.add_callback(functools.partial(calls.end, tenant)):  # It has ended already.
                calls.end(tenant)
            return behaviour(request, context)

        return call

    return wrapped(handler, wrap)


def _refusing(error: ServiceError, method: str) -> "grpc.RpcMethodHandler[Any, Any]":
    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        context.hvpd_tenant = error.metadata.get("tenant")  # type: ignore[attr-defined] # For the log.
        abort(context, error, method.rpartition("/")[2])

    # Of any kind of call: one that streams is refused without waiting for a message, which may never come.
    return grpc.stream_stream_rpc_method_handler(refuse)


class Caller:
    """Who makes one call, and with which right.

    Args:
        tokens: Where the token is looked for again, while the call lasts.
        grant: What it gave when the call began.
        method: That is called.
        right: That this takes; empty: any token does.
    """

    def __init__(self, tokens: Tokens, grant: Grant, method: str, right: str) -> None:
        self._tokens = tokens
        self._method = method
        self.grant = grant
        self.right = right

    def check(self) -> None:
        """Raises ServiceError where the token is not good any more, or not for this."""
        grant = self._tokens.current(self.grant.sha256)
        if grant is not self.grant:  # The file was read again.
            if grant.tenant != self.grant.tenant:
                raise ServiceError(
                    Code.UNAUTHENTICATED, "TOKEN_UNKNOWN", f"the token is not tenant {self.grant.tenant}'s any more"
                )
            self._check_right(grant)
            self.grant = grant

    def check_right(self) -> None:
        """Raises ServiceError where the token has not the right that the method takes."""
        self._check_right(self.grant)

    def _check_right(self, grant: Grant) -> None:
        if self.right and self.right not in grant.rights:
            raise ServiceError(
                Code.PERMISSION_DENIED,
                "RIGHT_MISSING",
                f"{self._method.rpartition('/')[2]} takes the right {self.right!r}, and this token of tenant {grant.tenant} has "
                f"{', '.join(sorted(grant.rights))}: ask who operates the server for another token",
                {"right": self.right, "tenant": grant.tenant},
            )


class _Checked:
    """Messages of a call, of which each is let through only while a check passes."""

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
    said = metadata.get(_protocol.REVISION_KEY, "")
    if said and not (len(said) < 10 and said.isdecimal() and _protocol.OLDEST <= int(said) <= _protocol.NEWEST):
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "PROTOCOL_MISMATCH",
            f"the client (hvpd {metadata.get(_protocol.VERSION_KEY, 'unknown')}) speaks protocol {said}, this server "
            f"(hvpd {hvpd.__version__}) speaks {_protocol.OLDEST} to {_protocol.NEWEST}: install the same version on both",
        )
