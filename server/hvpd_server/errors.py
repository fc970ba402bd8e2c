"""Errors of a request: a code, a reason, a sentence.

`to_status` is the one place where an error becomes a google.rpc.Status
(https://google.aip.dev/193).
"""

import errno
import re
from collections.abc import Mapping
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from hvpd import _text
from hvpd._errors import DOMAIN, HvpdError

Code = grpc.StatusCode


class ServiceError(Exception):
    """An error for the client.

    Args:
        code: gRPC's status code.
        reason: A constant in UPPER_SNAKE_CASE, part of the contract.
        message: The argument, its value, the expected value, and the remedy.
        metadata: Facts for programs.
        retry_after: Seconds after which a retry may help; None if it cannot, or if that
            is unknown.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        metadata: Mapping[str, str] | None = None,
        *,
        retry_after: float | None = None,
    ) -> None:
        # Parts of it may come from a client, and it goes to logs and pages.
        super().__init__(_text.printable(message, keep="\n"))
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after


def invalid(reason: str, message: str) -> ServiceError:
    """Return the error of a request that is wrong."""
    return ServiceError(Code.INVALID_ARGUMENT, reason, message)


_FULL: Final = (
    Code.RESOURCE_EXHAUSTED,
    "DISK_FULL",
    "the server's store has no room (%s): nothing was stored; free space on the server's disk and retry",
    None,
)
_SCARCE: Final = (
    Code.RESOURCE_EXHAUSTED,
    "DESCRIPTORS",
    "the server has no file descriptor free (%s): try again, or raise its limit (ulimit -n)",
    1.0,
)
_BUSY: Final = (
    Code.RESOURCE_EXHAUSTED,
    "HOST_MEMORY",
    "the server's machine has no memory, thread or process left for this (%s): try again later",
    1.0,
)
_NO_THREAD: Final = "can't start new thread"
"""Python's message when the system has no more threads."""

_DAMAGED: Final = (
    Code.DATA_LOSS,
    "STORE_DAMAGED",
    "the server's disk cannot be read or written (%s): its operator must check the disk; the server's log names the file",
    None,
)
_GONE: Final = (
    Code.FAILED_PRECONDITION,
    "STORE_UNAVAILABLE",
    "the server's store is missing, or the server may not use it (%s): its operator must restore it; the server's log has more",
    None,
)

_UNKNOWN: Final = (
    Code.INTERNAL,
    "INTERNAL",
    "an unexpected error of the server's operating system (%s): the server's log has more",
    None,
)

_SYSTEM: Final[Mapping[int, tuple[Code, str, str, float | None]]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _SCARCE),
    **dict.fromkeys((errno.ENOMEM, errno.EAGAIN), _BUSY),
    **dict.fromkeys((errno.EIO, errno.ENXIO, errno.ENODEV), _DAMAGED),
    **dict.fromkeys(
        (
            *(
                errno.ENOENT,
                errno.ENOTDIR,
                errno.EISDIR,
                errno.EACCES,
                errno.EPERM,
                errno.EROFS,
                errno.ESTALE,
                errno.ELOOP,
            ),
            *(errno.ETXTBSY, errno.EBUSY, errno.ENAMETOOLONG),
        ),
        _GONE,
    ),
}
"""The client's error for an error of the operating system: code, reason, message, and
seconds until a retry.
"""

_PATH: Final = re.compile(r"(?<![\w/.)\]])/(?:[^\s/'\"]+/)+[^\s'\":,;)\]]*")
"""An absolute path of at least two parts. A text behind a word, as in a method's name,
is no path.
"""


def to_service_error(error: BaseException) -> ServiceError:
    """Return the client's error for any error, without paths of the server.

    An unexpected error is INTERNAL.
    """
    if isinstance(error, HvpdError):  # From code that the client has, too.
        return invalid(error.reason, str(error))
    if isinstance(error, OSError):
        code, reason, message, retry_after = _SYSTEM.get(error.errno or 0, _UNKNOWN)
        said = error.strerror or type(error).__name__  # Without the file, which is in the log.
        return ServiceError(code, reason, message % said, retry_after=retry_after)
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        code, reason, message, retry_after = _BUSY
        return ServiceError(code, reason, message % _NO_THREAD, retry_after=retry_after)
    if not isinstance(error, ServiceError):
        said = _PATH.sub("[a path of the server]", str(error))
        return ServiceError(Code.INTERNAL, "INTERNAL", f"{type(error).__name__}: {said}")
    return error


def to_status(error: BaseException, request_id: str = "") -> status_pb2.Status:
    """Return the status to answer for an error.

    Args:
        error: Any error.
        request_id: Id for the RequestInfo.
    """
    error = to_service_error(error)
    details: list[any_pb2.Any] = []
    metadata = {key: _short(value, 2000) for key, value in error.metadata.items()}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    details.append(any_pb2.Any())
    details[-1].Pack(info)
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(any_pb2.Any())
        details[-1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if request_id:
        details.append(any_pb2.Any())
        details[-1].Pack(error_details_pb2.RequestInfo(request_id=request_id))
    return status_pb2.Status(code=error.code.value[0], message=_short(str(error), 2000), details=details)


def _short(text: str, most: int) -> str:
    """Return a text that fits into gRPC's 8 KiB for the end of a call, and how much is
    left out.
    """
    ours = text.encode()[:most].decode(errors="ignore")
    return text if len(ours) == len(text) else f"{ours} ... ({len(text)} characters)"
