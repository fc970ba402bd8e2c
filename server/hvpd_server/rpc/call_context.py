"""One call while the server serves it: its caller, its deadline, and the ways to end
it.

The observer makes the call of each gRPC request and hands it on in the place of gRPC's
own context. A connection of the vector port makes a call of its own.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import grpc
from grpc_status import rpc_status

from hvpd_server.errors import Code, ServiceError
from hvpd_server.telemetry import requests
from hvpd_server.telemetry.requests import Request
from hvpd_server.tenancy.token_file import ADMINISTER, Grant
from hvpd_server.tenancy.tokens import Tokens

_ENDING_SECONDS = 0.1
"""Seconds within which gRPC says that a call has ended, if it has."""


class Caller:
    """The token of one call, with the right that the call takes.

    Args:
        tokens: Finds the token again while the call lasts.
        grant: The rights of the token when the call began.
        method: The name of the called method.
        right: The right that the method takes; empty if any token will do.
    """

    def __init__(self, tokens: Tokens, grant: Grant, method: str, right: str) -> None:
        self._tokens = tokens
        self._method = method
        self.grant = grant
        self.right = right

    def check(self) -> None:
        """Raise ServiceError if the token is no longer good, or no longer good for this
        call.
        """
        grant = self._tokens.current(self.grant.sha256)
        if grant is not self.grant:  # The file was read again.
            if grant.tenant != self.grant.tenant:
                raise ServiceError(
                    Code.UNAUTHENTICATED, "TOKEN_UNKNOWN", f"the token is not tenant {self.grant.tenant}'s any more"
                )
            self._check_right(grant)
            self.grant = grant

    def check_right(self) -> None:
        """Raise ServiceError if the token does not have the right that the method
        takes.
        """
        self._check_right(self.grant)

    def _check_right(self, grant: Grant) -> None:
        if self.right and self.right not in grant.rights:
            raise ServiceError(
                Code.PERMISSION_DENIED,
                "RIGHT_MISSING",
                f"{self._method.rpartition('/')[2]} takes the right {self.right!r}, and this token of tenant {grant.tenant} has "
                f"{', '.join(sorted(grant.rights))}. Ask the server's operator for another token.",
                {"right": self.right, "tenant": grant.tenant},
            )


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class CallContext(Request):
    """One call, by gRPC or by a connection of the vector port."""

    cancel: Callable[[], object]
    """Ends the call, also while it waits. Any thread may call this."""
    tenant: str
    """The tenant that shares the device: the token's, or without tokens the connection.
    """
    caller: Caller | None = None
    """The call's token; None if the server asks for no tokens."""

    @property
    def may_administer(self) -> bool:
        """Whether the call may touch objects of other tenants."""
        return self.caller is None or ADMINISTER in self.caller.grant.rights


class GrpcCall(CallContext):
    """One call by gRPC.

    Args:
        context: gRPC's own.
        id: The request id that the client sent, or empty.
        method: The method's name, without the service.
    """

    __slots__ = ("_context", "deadline")

    def __init__(self, context: grpc.ServicerContext, id: str = "", method: str = "") -> None:  # noqa: A002 - its name
        peer = str(context.peer())
        super().__init__(id=id, method=method, peer=peer, tenant=peer, cancel=context.cancel)
        self._context = context
        self.deadline = time.monotonic() + context.time_remaining()
        """When the client stops waiting, on time.monotonic's clock."""

    @classmethod
    def of(cls, context: "grpc.ServicerContext | GrpcCall", method: str = "") -> "GrpcCall":
        """Return the call that the observer made. The observer leaves other services'
        calls alone.
        """
        return context if isinstance(context, GrpcCall) else cls(context, method=method)

    def admit(self, caller: Caller) -> None:
        """Note the token that the call was let in with."""
        self.caller = caller
        self.owner = self.tenant = caller.grant.tenant

    def on_end(self, callback: Callable[[], None]) -> bool:
        """Have a function called when the call ends. Return False if the call has ended
        already.
        """
        return bool(self._context.add_callback(callback))

    def ends(self) -> bool:
        """Return whether a call that sends no more has ended, which gRPC says a moment
        later.

        Otherwise the client still waits for its answers.
        """
        ended = threading.Event()
        return not self.on_end(ended.set) or ended.wait(_ENDING_SECONDS)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Raise ServiceError with CANCELLED if a body that is read here is refused, and
        its client has gone away: it may have been about to send the rest.
        """
        try:
            yield
        except ServiceError as refusal:
            if not self.ends():
                raise
            raise gone(refusal) from None

    def abort(self, error: Exception) -> None:
        """End the call with the error's status. A call that gRPC has ended is left
        alone.
        """
        if isinstance(error, grpc.RpcError):
            raise error
        self.error = requests.failed(self, error)
        self._context.abort_with_status(rpc_status.to_status(self.error.status))

    def end(self, why: str) -> None:
        """End the call with UNAVAILABLE, from any thread and at any moment.
        Clients then repeat it.

        gRPC's context can only cancel, which tells the client nothing. The call beneath
        it takes a status, too, which is sent even if the client takes no more messages.
        """
        try:
            code: int = Code.UNAVAILABLE.value[0]
            self._context._rpc_event.call.cancel(code, why)  # type: ignore[attr-defined]  # noqa: SLF001 - there is no public way
        except Exception:  # noqa: BLE001 - another version of gRPC: the call must end all the same
            self.cancel()


def gone(refusal: Exception) -> ServiceError:
    """Return the error of a caller that went away before it had sent a whole body."""
    return ServiceError(Code.CANCELLED, "CANCELLED", f"the caller went away: {refusal}")
