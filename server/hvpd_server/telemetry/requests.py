"""The request that is served. Every failure becomes a status here, and a line of the
log.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final, Protocol

from google.rpc import status_pb2

from hvpd._wire import request_id as _request_id
from hvpd.v1 import curvature_pb2
from hvpd_server.errors import Code, ServiceError, to_service_error, to_status

_log = logging.getLogger(__name__)

_LEVELS: Final = {
    Code.UNKNOWN: logging.ERROR,
    Code.INTERNAL: logging.ERROR,
    Code.DATA_LOSS: logging.ERROR,
    Code.RESOURCE_EXHAUSTED: logging.WARNING,
    Code.UNAVAILABLE: logging.WARNING,
    Code.UNAUTHENTICATED: logging.WARNING,
    Code.PERMISSION_DENIED: logging.WARNING,
    Code.CANCELLED: logging.DEBUG,  # The client went away.
}
"""The log level of a failure, by its code. All other codes are the client's own
failures, at INFO.
"""

_OPERATORS: Final = {"STORE_UNAVAILABLE"}
"""Reasons that the operator must see with every code."""

_ROUTINE: Final = {"POINT_NOT_RESIDENT", "RUN_NOT_RESIDENT", "WARMING_UP"}
"""Reasons that are part of the protocol: clients handle them, so they are logged at
DEBUG.
"""

_serving = threading.local()


class Span(Protocol):
    """The trace of one call: `tracing.CallSpan`."""

    @property
    def ids(self) -> Mapping[str, str]:
        """The span's ids, for the log."""

    def made(self, info: curvature_pb2.ProductInfo, computed: float, *, n: int = 0, k: int = 0) -> None:
        """Note how a product was made."""

    def end(self, request: "Request", failed: "Failed | None", *, whole: bool) -> None:
        """End the span."""


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One call, while the server serves it."""

    id: str = ""
    """The client's id, or a new one."""
    method: str = ""
    """The method's name, without the service."""
    owner: str = ""
    """The tenant of the call's token; empty without tokens. The owner owns what the
    call stores.
    """
    peer: str = ""
    """The other end of the connection, as gRPC writes it."""
    objective: str = ""
    """Name or digest of the objective that the call is about."""
    started: float = dataclasses.field(default_factory=time.monotonic)
    error: "Failed | None" = None
    """The failure that ended the call."""
    span: Span | None = None
    """The call's trace."""

    def __post_init__(self) -> None:
        self.id = self.id or _request_id.new()

    def fields(self) -> dict[str, object]:
        """Return the log line's fields for the request. The log leaves out empty
        values.
        """
        trace = self.span.ids if self.span is not None else {}
        return {
            "request_id": self.id,
            "method": self.method,
            "tenant": self.owner,
            "peer": self.peer,
            "objective": self.objective,
            **trace,
        }


class Failed:
    """The failure of a request.

    Args:
        status: The answer.
        refusal: The reason, in the server's terms.
        cause: The unexpected error, or None if the server refused the request.
    """

    def __init__(self, status: status_pb2.Status, refusal: ServiceError, cause: BaseException | None) -> None:
        self.status = status
        self.code: Code = refusal.code
        self.reason = refusal.reason
        self.cause = cause


def id_of(metadata: Iterable[tuple[Any, Any]] | None) -> str:
    """Return the request id that a client sent, or an empty one if there is none that
    is valid.
    """
    return next((value for key, value in metadata or () if key == _request_id.KEY and _request_id.is_valid(value)), "")


def serve(request: Request | None) -> None:
    """Set the request that this thread serves. The thread's log lines have the
    request's fields.
    """
    _serving.request = request


def served() -> Request | None:
    """Return the request that this thread serves."""
    return getattr(_serving, "request", None)


def failed(
    request: Request, error: BaseException, *, tag: int | None = None, started: float | None = None, objective: str = ""
) -> Failed:
    """Log a failure, and return it with its answer. Each failure comes here once.

    Args:
        request: The request that failed.
        error: A refusal, or an unexpected error. That one is INTERNAL, and logged with
            its traceback.
        tag: The product's tag, on a stream of products.
        started: When the product began, on time.monotonic's clock; None if it began
            with the call.
        objective: The objective's digest, if the request does not have it.
    """
    refusal = to_service_error(error)
    request_id = request.id if tag is None else f"{request.id}/{tag}"
    cause = None if refusal is error or refusal.code is not Code.INTERNAL else error
    level = _LEVELS.get(refusal.code, logging.INFO) if refusal.reason not in _ROUTINE else logging.DEBUG
    level = logging.ERROR if refusal.reason in _OPERATORS else level
    if _log.isEnabledFor(level):
        fields = request.fields() | {
            "request_id": request_id,
            "code": refusal.code.name,
            "reason": refusal.reason,
            "duration_seconds": round(time.monotonic() - (request.started if started is None else started), 6),
            # The path of a file is for the log only, not for the client.
            "error": f"{refusal} ({error})" if isinstance(error, OSError) else str(refusal),
        }
        if objective:
            fields["objective"] = objective
        _log.log(level, "request failed", exc_info=cause, extra={"fields": fields})
    return Failed(to_status(refusal, request_id), refusal, cause)


def answered(request: Request) -> None:
    """Log a call that was answered, at DEBUG."""
    if _log.isEnabledFor(logging.DEBUG):
        fields = request.fields() | {"duration_seconds": round(time.monotonic() - request.started, 6)}
        _log.debug("request answered", extra={"fields": fields})
