"""One call to the server: its id, its tries, its span, its error.

Every call goes through here. The file knows no message of hvpd's.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from hvpd._errors import Failure, HvpdError, failure_of_rpc
from hvpd._progress import Reporter
from hvpd._transport import cancellation
from hvpd._transport import tracing as _tracing
from hvpd._transport.channel import Channel, answered
from hvpd._transport.credentials import CallMetadata
from hvpd._transport.interrupts import OutsideGrpcError, interrupt_behind
from hvpd._transport.retry import Retry
from hvpd._transport.statistics import Counts
from hvpd._transport.stream import RpcFailure

_T = TypeVar("_T")

_log = logging.getLogger("hvpd")

CONNECT_AGAIN = "connect again, and use the objectives and points of the new client"
"""What to do after a client was closed."""

_ASK_SECONDS = 1.0
"""Seconds to wait for an answer that a caller can do without."""


class Calls:
    """Calls on one channel.

    Args:
        address: "host:port" of the server.
        channel: The channel, with the methods that `unary` takes.
        retry_timeout: Seconds for which a call is repeated while the server is away.
        timeout: Seconds that one call may take, its retries included; None for no
            limit.
        reporter: Shows work that takes long.
        counts: Counts the products; None for counts of its own.
    """

    def __init__(
        self,
        address: str,
        channel: Channel,
        retry_timeout: float,
        timeout: float | None,
        reporter: Reporter,
        counts: Counts | None = None,
    ) -> None:
        self.address = address
        self.channel = channel
        self._owner = os.getpid()
        self._closed = False
        self.check_server: Callable[[], None] | None = None
        """Raises if the server will never answer again; called before a retry."""
        self._counts = counts or Counts()
        self._tracing = _tracing.of(address)
        self._retry = Retry(address, retry_timeout, timeout, self._on_retry, self._on_failure, reporter)
        self.reporter = reporter

    @property
    def closed(self) -> bool:
        """Return whether the connection was ended."""
        return self._closed

    def call(
        self,
        attempt: Callable[[float | None], _T],
        *,
        restore: Callable[[], None] | None = None,
        request_id: str = "",
    ) -> _T:
        """Run `attempt(seconds left)` until it succeeds; see `Retry.call`.

        All tries of a call have one id. The error of a call has it, and the server's
        log has a line with it for each try. A product is one of many on a stream. Its
        id consists of the stream's id and a tag, and each try has another id.

        Args:
            attempt: One try; raises grpc.RpcError or RpcFailure.
            restore: Makes the point resident again after the server forgot it.
            request_id: Id of the call; empty if its stream has the id.

        Raises:
            HvpdError: The attempt failed for good, or for longer than the retry
                timeout.
        """
        return self._retry.call(lambda left: self._try(attempt, left, request_id), restore)

    def _try(self, attempt: Callable[[float | None], _T], left: float | None, request_id: str) -> _T:
        """Run one try; raise RpcFailure if the server or the network made it fail.

        If the server refuses the token, and the token's file has another one, try once
        more.
        """
        token = self.channel.token()
        try:
            return self._try_once(attempt, left, request_id)
        except RpcFailure as error:
            if error.failure.code is not grpc.StatusCode.UNAUTHENTICATED or not self.channel.renew_token(token):
                raise
        return self._try_once(attempt, left, request_id)

    def _try_once(self, attempt: Callable[[float | None], _T], left: float | None, request_id: str) -> _T:
        before = sys.exc_info()[1]
        try:
            self._check_usable()
            cancellation.check()
            return attempt(left)
        except grpc.RpcError as error:
            raise RpcFailure(failure_of_rpc(error).sent_as(request_id)) from None
        except (RpcFailure, HvpdError):
            raise
        except OutsideGrpcError as error:
            raise error.by from None
        except Exception as error:
            interrupt = interrupt_behind(error, before)
            if interrupt is None:
                raise
            self._abandon()
            raise interrupt from None
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Open another channel after an interrupt; see `interrupts`."""
        self.channel.replace()

    def _check_usable(self) -> None:
        if self.closed:
            raise HvpdError(f"this client of {self.address} is closed: {CONNECT_AGAIN}", reason="CLIENT_CLOSED")
        if os.getpid() != self._owner:
            raise HvpdError(
                f"this client of {self.address} was connected before a fork, and gRPC does not survive one: connect again in "
                "this process",
                reason="CLIENT_FORKED",
            )

    def _on_retry(self, failure: Failure) -> None:
        if self.check_server is not None:
            self.check_server()
        self._counts.add_retry()
        if self._tracing is not None:
            self._tracing.repeated(failure)

    def _on_failure(self, failure: Failure) -> None:
        if self._tracing is not None:
            self._tracing.failed(failure)

    @contextlib.contextmanager
    def sending(self, method: Callable[[], str], **facts: Any) -> Iterator[tuple[CallMetadata, str]]:
        """Make the metadata and the id of a call, and a span around all of its tries.

        Args:
            method: Returns "hvpd.v1.Service/Method"; called only if spans are made.
            facts: Attributes of the span.
        """
        metadata, request_id = self.channel.new_call()
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s to %s, request %s %s", method(), self.address, request_id, facts or "")
        if self._tracing is None:
            yield metadata, request_id
            return
        with self._tracing.call(method(), request_id, **facts) as span:
            yield metadata.plus(span.metadata), request_id

    def inside(self, name: str, /, **facts: Any) -> "contextlib.AbstractContextManager[None]":
        """Make one span around several calls, if spans are made."""
        return contextlib.nullcontext() if self._tracing is None else self._tracing.inside(name, **facts)

    def ask_once(self, method: Callable[..., _T], request: Any) -> _T | None:
        """Call a unary method without a retry; return None if it fails.

        For facts that a caller can do without.
        """
        if self.closed or os.getpid() != self._owner:
            return None
        metadata, _ = self.channel.new_call()
        try:
            return method(request, metadata=metadata, timeout=_ASK_SECONDS)
        except grpc.RpcError:
            return None

    def tell(self, method: Any, request: Any) -> None:
        """Call a unary method, and do not wait for its answer. `Channel.close` waits.

        For what the server may also find out later.
        """
        if not (self.closed or os.getpid() != self._owner):
            metadata, _ = self.channel.new_call()
            self.channel.await_at_end(method.future(request, metadata=metadata, timeout=_ASK_SECONDS))

    def unary(self, method: Callable[..., _T], request: Any) -> _T:
        """Call a unary method of `channel`."""
        with self.sending(lambda: _tracing.method_of(request)) as (metadata, request_id):
            answer = self.call(lambda left: answer_of(method, request, metadata, left), request_id=request_id)
            return answered(answer, self.address)


def answer_of(method: Callable[..., _T], message: Any, metadata: CallMetadata, left: float | None) -> _T:
    """Return the answer of a method that answers once.

    Args:
        method: The method.
        message: A message, or an iterator of messages.
        metadata: Metadata of the call.
        left: Seconds that the call may take; None for no limit.
    """
    if not cancellation.possible():
        return method(message, metadata=metadata, timeout=left)
    # A tuple, because gRPC asks for the length of a stream's metadata here.
    future = method.future(message, metadata=tuple(metadata), timeout=left)  # type: ignore[attr-defined]  # as gRPC's stubs have it
    with cancellation.ending(future.cancel):
        try:
            answer: _T = future.result()
        except grpc.FutureCancelledError:
            cancellation.check()
            raise
    return answer
