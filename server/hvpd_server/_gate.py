"""Who is let in, and to what: calls that can be served now, of clients that speak a protocol that is served, with a token that has
the method's right. Errors leave through here, too.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import grpc
from grpc_status import rpc_status

import hvpd
from hvpd import _protocol
from hvpd_server._auth import ADMINISTER, PUBLISH, USE, Grant, Tokens
from hvpd_server._errors import Code, ServiceError, to_status
from hvpd_server._handlers import Behaviour, wrapped

_log = logging.getLogger(__name__)

RIGHT_OF: Mapping[str, str] = MappingProxyType(
    {
        "/hvpd.v1.BlobService/FindMissingBlobs": PUBLISH,
        "/hvpd.v1.BlobService/UploadBlob": PUBLISH,
        "/hvpd.v1.ObjectiveService/CreateObjective": PUBLISH,
        "/hvpd.v1.ObjectiveService/GetObjective": USE,
        "/hvpd.v1.ObjectiveService/ListObjectives": USE,
        "/hvpd.v1.ObjectiveService/GetPlan": USE,
        "/hvpd.v1.CurvatureService/CreatePoint": USE,
        "/hvpd.v1.CurvatureService/ComputeProduct": USE,
        "/hvpd.v1.CurvatureService/StreamProducts": USE,
        "/hvpd.v1.CurvatureService/ComputeFactors": USE,
    }
)
"""Which right a method takes, where the server asks for tokens. Those of ours that are not here take `administer`."""

OPEN = frozenset({"/hvpd.v1.ServerService/GetServer", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List"})
"""Methods for everybody who can connect. Health's Watch is none of them: it holds a call for as long as the caller likes."""

_QUIET_SECONDS = 10.0
"""Least time between two lines of the log on refused callers."""


def abort(context: grpc.ServicerContext, error: Exception) -> None:
    """Ends the call with the error's status. A call that is already dead is left alone."""
    if isinstance(error, grpc.RpcError):
        raise error
    context.abort_with_status(rpc_status.to_status(to_status(error)))


def tenant_of(context: grpc.ServicerContext) -> str:
    """Who calls: the token's tenant, and without tokens the connection."""
    return owner_of(context) or str(context.peer())


def owner_of(context: grpc.ServicerContext) -> str:
    """Whose is what the call leaves: the token's tenant's; without tokens, empty, everybody's."""
    tenant = getattr(context, "hvpd_tenant", None)
    return tenant if isinstance(tenant, str) else ""


class Gate(grpc.ServerInterceptor):
    """Refuses calls that cannot be served: all while the server warms up, and those of clients whose protocol revision is
    not served. Clients that say no revision (grpcurl) are taken at their word.

    Args:
        tokens: Who may do what; None: everybody everything.
        clock: Seconds, monotonic.
    """

    def __init__(self, tokens: Tokens | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.open = False
        self._tokens = tokens
        self._clock = clock
        self._lock = threading.Lock()
        self._streams: dict[int, tuple[grpc.ServicerContext, Caller]] = {}
        self._refused = 0
        self._said = float("-inf")

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
            if caller is None:
                return handler
            caller.check_right()
        except ServiceError as error:
            return self._refusing(error)
        return self._bound(handler, caller)

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
                if streams:
                    self._watch(context, caller)
                if caller.right and handler.request_streaming:
                    request = _Checked(request, caller.check)
                return behaviour(request, context)

            return call

        return wrapped(handler, wrap)

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

    def _refusing(self, error: ServiceError) -> "grpc.RpcMethodHandler[Any, Any]":
        def refuse(request: Any, context: grpc.ServicerContext) -> Any:
            if error.code in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED):
                self._note(context.peer(), error)
            abort(context, error)

        # Of any kind of call: one that streams is refused without waiting for a message, which may never come.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _note(self, peer: str, error: ServiceError) -> None:
        """Says in the log that callers are refused, now and then: whoever tries many tokens does not fill it."""
        with self._lock:
            self._refused += 1
            now = self._clock()
            if now - self._said < _QUIET_SECONDS:
                return
            count, self._refused, self._said = self._refused, 0, now
        _log.warning("%d calls refused since the last such line, the last from %s: %s", count, peer, error)


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
    if said and not (said.isdecimal() and _protocol.OLDEST <= int(said) <= _protocol.NEWEST):
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "PROTOCOL_MISMATCH",
            f"the client (hvpd {metadata.get(_protocol.VERSION_KEY, 'unknown')}) speaks protocol {said}, this server "
            f"(hvpd {hvpd.__version__}) speaks {_protocol.OLDEST} to {_protocol.NEWEST}: install the same version on both",
        )
