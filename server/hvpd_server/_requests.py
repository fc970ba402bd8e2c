"""Which request is served: its id, who asks, and what is said when it fails. Every failure becomes a status here, and a line of the log."""

import logging
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.rpc import status_pb2

from hvpd import _request_id
from hvpd_server._auth import ADMINISTER
from hvpd_server._errors import Code, ServiceError, to_service_error, to_status

if TYPE_CHECKING:
    from hvpd_server._tracing import CallSpan

_log = logging.getLogger(__name__)

_LEVELS: Final = {
    Code.UNKNOWN: logging.ERROR,
    Code.INTERNAL: logging.ERROR,
    Code.DATA_LOSS: logging.ERROR,
    Code.RESOURCE_EXHAUSTED: logging.WARNING,
    Code.UNAVAILABLE: logging.WARNING,
    Code.UNAUTHENTICATED: logging.WARNING,
    Code.PERMISSION_DENIED: logging.WARNING,
    Code.CANCELLED: logging.DEBUG,  # The caller went away.
}
"""How serious a failure is, by its code. All others are the caller's own, and INFO."""

_OPERATORS: Final = {"STORE_UNAVAILABLE"}
"""Reasons of which the server's operator must hear, whatever their code."""

_ROUTINE: Final = {"POINT_NOT_RESIDENT", "WARMING_UP"}
"""What clients answer by themselves: part of the protocol, and DEBUG."""

_serving = threading.local()


class Request:
    """One call, while it is served.

    Args:
        context: gRPC's, which knows who calls.
        id: The client's, where it is one; else a new one.
        method: Its name, without the service.
    """

    __slots__ = ("_context", "error", "id", "method", "objective", "span", "started")

    def __init__(self, context: grpc.ServicerContext, id: str = "", method: str = "") -> None:  # noqa: A002 - its name
        self._context = context
        self.id = id or _request_id.new()
        self.method = method
        self.objective = ""
        """Name or digest of the objective that it is about."""
        self.started = time.monotonic()
        self.error: Failed | None = None
        """What the call was ended with."""
        self.span: CallSpan | None = None
        """Where it is traced."""

    @property
    def peer(self) -> str:
        """The connection's other end, as gRPC writes it."""
        return str(self._context.peer())

    @property
    def tenant(self) -> str:
        """Who calls; empty without tokens."""
        return owner_of(self._context)

    def fields(self) -> dict[str, object]:
        """What a line of the log says of it; empty values are left out there."""
        trace = self.span.ids if self.span is not None else {}
        return {
            "request_id": self.id,
            "method": self.method,
            "tenant": self.tenant,
            "peer": self.peer,
            "objective": self.objective,
            **trace,
        }


class Failed:
    """How a request ended.

    Args:
        status: Its answer.
        refusal: Why, in the server's terms.
        cause: What nobody expected; None where it is a refusal.
    """

    def __init__(self, status: status_pb2.Status, refusal: ServiceError, cause: BaseException | None) -> None:
        self.status = status
        self.code: grpc.StatusCode = refusal.code
        self.reason = refusal.reason
        self.cause = cause


def id_of(metadata: Iterable[tuple[Any, Any]] | None) -> str:
    """The id that a client sent, where it can be one; else empty."""
    return next((value for key, value in metadata or () if key == _request_id.KEY and _request_id.is_valid(value)), "")


def of(context: grpc.ServicerContext, method: str = "") -> Request:
    """The request that a context is of."""
    request = getattr(context, "hvpd_request", None)
    return request if isinstance(request, Request) else Request(context, method=method)


def owner_of(context: grpc.ServicerContext) -> str:
    """Whose is what the call leaves: the token's tenant's; without tokens, empty, everybody's."""
    tenant = getattr(context, "hvpd_tenant", None)
    return tenant if isinstance(tenant, str) else ""


def may_administer(context: grpc.ServicerContext) -> bool:
    """Whether what is others' is the caller's business: with the right `administer`; without tokens, everybody's."""
    rights = getattr(context, "hvpd_rights", None)
    return rights is None or ADMINISTER in rights


def serve(request: Request | None) -> None:
    """From now on this thread serves that request, or none: whatever it logs is about it."""
    _serving.request = request


def served() -> Request | None:
    """The request that this thread serves."""
    return getattr(_serving, "request", None)


def failed(
    request: Request, error: BaseException, *, tag: int | None = None, started: float | None = None, objective: str = ""
) -> Failed:
    """The answer to a request that failed; it is logged, once, since each failure comes here once.

    Args:
        request: Which.
        error: A refusal, or what nobody expected, which is INTERNAL and logged with its traceback.
        tag: Of the product, on a stream of them.
        started: When it began, on time.monotonic's clock; None: with the call.
        objective: Digest of what it was about, where the request does not say.
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
            # The path of a file is for the log alone.
            "error": f"{refusal} ({error})" if isinstance(error, OSError) else str(refusal),
        }
        if objective:
            fields["objective"] = objective
        _log.log(level, "request failed", exc_info=cause, extra={"fields": fields})
    return Failed(to_status(refusal, request_id), refusal, cause)


def answered(request: Request) -> None:
    """Logs a call that was answered, where somebody wants to know that."""
    if _log.isEnabledFor(logging.DEBUG):
        fields = request.fields() | {"duration_seconds": round(time.monotonic() - request.started, 6)}
        _log.debug("request answered", extra={"fields": fields})
