"""What can go wrong, as the user sees it.

    HvpdError
    ├── InvalidArgumentError   also ValueError: the call's arguments; repeating it cannot help
    ├── NotFoundError          also LookupError: no objective of that name or digest
    ├── UnavailableError       also ConnectionError: no server answers there, or not over TLS as it was asked to, or it went away
    ├── AccessError            also PermissionError: no token or one that is not good, or a right is missing
    ├── DeadlineError          also TimeoutError: the time that the caller gave is over
    ├── OverloadedError        the server is out of a resource: its queue, its memory, its disk
    ├── IncompatibleError      client and server, or bundle and server, are of versions that do not fit
    └── MissingExtraError      also ImportError: this needs `pip install 'hvpd[...]'`

Every RPC's failure becomes one of these in `from_rpc`, nowhere else.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import grpc
from google.protobuf.message import DecodeError

from hvpd import _text

DOMAIN = "hvpd"
"""The domain of our ErrorInfo details (https://google.aip.dev/193)."""


class HvpdError(Exception):
    """Base of everything that hvpd raises on purpose.

    Attributes:
        reason: A constant such as `POINT_NOT_RESIDENT`, for programs; empty where there is none.
        request_id: Id of the call that failed, under which the server's log and traces have it; empty where no server was reached.
            The message ends with it, for whoever operates the server. A call that was repeated has one id for all tries; a product
            has that of its last try.
    """

    def __init__(self, message: str, *, reason: str = "", request_id: str = "") -> None:
        # Parts of a message come from servers and callers, and the message goes to terminals and logs.
        super().__init__(_text.printable(message, keep="\n"))
        self.reason = reason
        self.request_id = request_id


class InvalidArgumentError(HvpdError, ValueError):
    """An argument is wrong; the message says which, what arrived, and what was expected."""


class NotFoundError(HvpdError, LookupError):
    """The server has no objective of that name or digest."""


class UnavailableError(HvpdError, ConnectionError):
    """No server answers at the address, or it has been away for longer than the client retries.

    Its reason is `TLS` where somebody answers, and client and server do not agree on TLS: one of them speaks it and the other does
    not, or a certificate is not accepted.
    """


class AccessError(HvpdError, PermissionError):
    """The server asks who calls, and the token is missing, unknown, expired, or has not the right; the message says which."""


class DeadlineError(HvpdError, TimeoutError):
    """The time that the caller allowed is over."""


class OverloadedError(HvpdError):
    """The server lacks a resource: a place in its queue, memory, disk."""


class IncompatibleError(HvpdError):
    """Client and server, or a bundle and a server, are of versions that do not fit."""


class MissingExtraError(HvpdError, ImportError):
    """Something optional is not installed."""


@dataclass(frozen=True)
class Failure:
    """An RPC's failure in plain terms: what a status and its google.rpc details say."""

    code: grpc.StatusCode
    """gRPC's status code."""
    message: str
    """For people."""
    reason: str = ""
    """ErrorInfo.reason."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """ErrorInfo.metadata."""
    retry_after: float | None = None
    """RetryInfo.retry_delay, in seconds; None where the server did not say."""
    request_id: str = ""
    """RequestInfo.request_id; else what the client sent, where somebody may have received it."""

    def sent_as(self, request_id: str) -> "Failure":
        """The same of a call that was sent with an id, for servers and proxies that do not say it themselves."""
        if self.request_id or self.code is grpc.StatusCode.UNAVAILABLE:
            return self
        return replace(self, request_id=request_id)


_LONGEST = 4000
"""Most characters of a message of a server; ours have 2000 bytes."""

_REASON = re.compile(r"[A-Z][A-Z0-9_]{0,62}")

_REQUEST_ID = re.compile(r"[0-9A-Za-z.:/-]{1,128}")

_CODES = {code.value[0]: code for code in grpc.StatusCode}

_CLASSES: Mapping[grpc.StatusCode, type[HvpdError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
    grpc.StatusCode.PERMISSION_DENIED: AccessError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNIMPLEMENTED: IncompatibleError,
}

_REASONS: Mapping[str, type[HvpdError]] = {
    "PROTOCOL_MISMATCH": IncompatibleError,
    "BUNDLE_INCOMPATIBLE": IncompatibleError,
}


def failure_of_status(status: object) -> Failure:
    """The failure that a google.rpc.Status message tells."""
    from google.rpc import error_details_pb2, status_pb2

    assert isinstance(status, status_pb2.Status)
    reason, metadata, retry_after, request_id = "", {}, None, ""
    for detail in status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        request = error_details_pb2.RequestInfo()
        try:
            if detail.Unpack(info):
                reason, metadata = _valid(_REASON, info.reason), dict(info.metadata)
            elif detail.Unpack(retry):
                retry_after = max(retry.retry_delay.ToNanoseconds() / 1e9, 0.0)
            elif detail.Unpack(request):
                request_id = _valid(_REQUEST_ID, request.request_id)
        except (DecodeError, ValueError):  # Not what its type says, or a duration that is none.
            continue
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return Failure(code, _text.cut(status.message, _LONGEST), reason, metadata, retry_after, request_id)


def _valid(form: re.Pattern[str], text: str) -> str:
    """Return a text that has the form it must have; else an empty one."""
    return text if form.fullmatch(text) else ""


def failure_of_rpc(error: grpc.RpcError) -> Failure:
    """The failure that a raised RpcError tells, with its details where the server sent any."""
    from grpc_status import rpc_status

    call = cast("grpc.Call", error)  # What a stub raises is both.
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):  # A proxy rewrote the status and left the details: believe the status.
        status = None
    if status is not None:
        return failure_of_status(status)
    return Failure(call.code(), _text.cut(call.details() or "", _LONGEST))


def to_error(failure: Failure, address: str) -> HvpdError:
    """The exception that the user sees for a failure of the server at `address`."""
    kind = _REASONS.get(failure.reason) or _CLASSES.get(failure.code, HvpdError)
    message = failure.message
    if kind is UnavailableError:
        message = f"no answer from the hvpd server at {address}: {failure.message}"
    elif failure.code is grpc.StatusCode.UNIMPLEMENTED:
        message = (
            f"the server at {address} does not know this call ({failure.message}): it is no hvpd server, or older than "
            "this client; upgrade the server, or install the client of the server's version"
        )
    elif kind is HvpdError and not failure.reason:
        message = f"the server at {address} failed: {failure.message} ({failure.code.name})"
    suffix = f" [request {failure.request_id}]" if failure.request_id else ""
    return kind(f"{message}{suffix}", reason=failure.reason, request_id=failure.request_id)
