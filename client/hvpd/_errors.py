"""The errors that users see.

    HvpdError
    ├── InvalidArgumentError  also ValueError: an argument is wrong, so do not retry
    ├── NotFoundError         also LookupError: no objective has this name or digest
    ├── UnavailableError      also ConnectionError: no server answers, or TLS differs
    ├── AccessError           also PermissionError: the token is missing, not valid, or
    │                         lacks a right
    ├── DeadlineError         also TimeoutError: the caller's timeout is over
    ├── OverloadedError       the server lacks a resource: queue, memory or disk
    ├── IncompatibleError     client, server and bundle have versions that do not fit
    └── MissingExtraError     also ImportError: `pip install 'hvpd[...]'` is needed

Only `to_error` makes them from the failure of a call.
"""

import contextlib
import os
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from google.protobuf.message import DecodeError

from hvpd import _text
from hvpd._quiet import grpc

DOMAIN = "hvpd"
"""Domain of hvpd's ErrorInfo details (https://google.aip.dev/193)."""


_OWN_FOLDER = str(Path(__file__).parent) + os.sep


class HvpdError(Exception):
    """The base of all errors that hvpd raises on purpose.

    Attributes:
        reason: A constant for programs, such as `POINT_NOT_RESIDENT`.
            docs/reference/errors.md lists all of them.
        request_id: Id of the failed call; empty if it reached no server. The server's
            log and traces have the same id, and the message ends with it. A repeated
            call has one id for all tries; a product has the id of its last try.

    Example:
        >>> try:
        ...     objective = client.objective("demo/logistic")
        ... except hvpd.HvpdError as error:
        ...     print(error, error.reason, error.request_id)
    """

    _reason = "UNKNOWN"
    """Reason of an error that states none."""

    def __init__(self, message: str, *, reason: str = "", request_id: str = "") -> None:
        # Parts of a message come from servers and callers, and the message goes to
        # terminals and logs.
        super().__init__(_text.printable(message, keep="\n"))
        self.reason = reason or self._reason
        self.request_id = request_id

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython and Jupyter show: the caller's own frames."""
        frames = traceback.extract_tb(self.__traceback__)
        own = [
            each
            for each in frames
            if not ("site-packages" in each.filename or each.filename.startswith((_OWN_FOLDER, contextlib.__file__)))
        ]
        return [*"".join(traceback.format_list(own)).splitlines(), f"{type(self).__name__}: {self}"]


class InvalidArgumentError(HvpdError, ValueError):
    """An argument is wrong.

    The message names the argument, the value that arrived, and the expected value.

    Example:
        >>> try:
        ...     objective.at(x)
        ... except hvpd.InvalidArgumentError as error:
        ...     print(error)
    """

    _reason = "INVALID_ARGUMENT"


class NotFoundError(HvpdError, LookupError):
    """The server has no objective with this name or digest.

    Example:
        >>> try:
        ...     objective = client.objective("demo/logistic")
        ... except hvpd.NotFoundError:
        ...     objective = client.register(loss, params, X, y, name="demo/logistic")
    """

    _reason = "NOT_FOUND"


class UnavailableError(HvpdError, ConnectionError):
    """No server answers at the address, for longer than the client retries.

    With reason `TLS`, a server answers, and client and server disagree on TLS. Either
    only one of them uses TLS, or one does not accept the other's certificate.

    Example:
        >>> try:
        ...     client = hvpd.connect("gpu-box:7070")
        ... except hvpd.UnavailableError:
        ...     client = hvpd.local()
    """

    _reason = "UNAVAILABLE"


class AccessError(HvpdError, PermissionError):
    """The token is missing, unknown or expired, or lacks a right; the message says
    which.

    Example:
        >>> try:
        ...     client.delete("demo/logistic")
        ... except hvpd.AccessError as error:
        ...     print(error.reason)
    """

    _reason = "PERMISSION_DENIED"


class DeadlineError(HvpdError, TimeoutError):
    """The caller's timeout is over.

    Example:
        >>> client = hvpd.connect("gpu-box:7070", timeout=5.0)
        >>> try:
        ...     point = client.objective("demo/logistic").at(x)
        ... except hvpd.DeadlineError:
        ...     point = None
    """

    _reason = "DEADLINE_EXCEEDED"


class OverloadedError(HvpdError):
    """The server lacks a resource: a place in its queue, memory or disk.

    Example:
        >>> try:
        ...     point.pin(600)
        ... except hvpd.OverloadedError as error:
        ...     assert error.reason == "PINNED"
    """

    _reason = "RESOURCE_EXHAUSTED"


class IncompatibleError(HvpdError):
    """The versions of client and server, or of a bundle and a server, do not fit.

    Example:
        >>> try:
        ...     client = hvpd.connect("gpu-box:7070")
        ... except hvpd.IncompatibleError as error:
        ...     print(error)
    """

    _reason = "INCOMPATIBLE"


class MissingExtraError(HvpdError, ImportError):
    """An optional package is not installed; the message has the `pip install`.

    Example:
        >>> try:
        ...     client = hvpd.local()
        ... except hvpd.MissingExtraError as error:
        ...     print(error)
    """

    _reason = "EXTRA_MISSING"


@dataclass(frozen=True)
class Failure:
    """The failure of a call: its status and its google.rpc details."""

    code: grpc.StatusCode
    """gRPC's status code."""
    message: str
    """Message for people."""
    reason: str = ""
    """ErrorInfo.reason."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """ErrorInfo.metadata."""
    retry_after: float | None = None
    """RetryInfo.retry_delay, in seconds; None if the server states none."""
    request_id: str = ""
    """RequestInfo.request_id, otherwise the id that the client sent.

    Empty if no server can have received the call."""

    def sent_as(self, request_id: str) -> "Failure":
        """Return the failure with the id of its call, unless it has one.

        Proxies and older servers do not state it.
        """
        if self.request_id or self.code is grpc.StatusCode.UNAVAILABLE:
            return self
        return replace(self, request_id=request_id)


_LONGEST = 4000
"""Most characters of a server's message. Servers of hvpd send 2000 bytes."""

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
    """Read a google.rpc.Status."""
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
        except (DecodeError, ValueError):  # The detail does not have its type, or the duration is not valid.
            continue
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return Failure(code, _text.cut(status.message, _LONGEST), reason, metadata, retry_after, request_id)


def _valid(form: re.Pattern[str], text: str) -> str:
    """Return the text if it has the form, otherwise an empty one."""
    return text if form.fullmatch(text) else ""


def failure_of_rpc(error: grpc.RpcError) -> Failure:
    """Read an RpcError, with its details if the server sent some."""
    from grpc_status import rpc_status

    call = cast("grpc.Call", error)  # A stub's errors are both.
    try:
        status = rpc_status.from_call(call)
    except (ValueError, DecodeError):  # A proxy rewrote the status and left the details, so the status counts.
        status = None
    if status is not None:
        return failure_of_status(status)
    return Failure(call.code(), _text.cut(call.details() or "", _LONGEST))


def to_error(failure: Failure, address: str) -> HvpdError:
    """Make the user's error from a failure of the server at `address`."""
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
    return kind(f"{message}{suffix}", reason=failure.reason or failure.code.name, request_id=failure.request_id)
