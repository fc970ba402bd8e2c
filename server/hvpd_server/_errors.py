"""Why a request is refused or fails, as the server's inner parts say it: a code, a reason, a sentence.

`to_status` is the one place where a failure becomes a google.rpc.Status (https://google.aip.dev/193).
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
    """A failure that the client is told of.

    Args:
        code: gRPC's status code.
        reason: A constant in UPPER_SNAKE_CASE, part of the contract.
        message: What arrived, what was expected, what to do.
        metadata: Facts for programs.
        retry_after: Seconds after which a retry may help; None where it cannot, or nobody knows.
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
        super().__init__(
            _text.printable(message, keep="\n")
        )  # Parts of it may be a client's, and it goes to logs and pages.
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after


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
    "the server's machine has no memory or no process left for this (%s): try again later",
    1.0,
)
_DAMAGED: Final = (
    Code.DATA_LOSS,
    "STORE_DAMAGED",
    "the server's disk cannot be read or written (%s): its operator must look at the disk; the server's log names the file",
    None,
)
_GONE: Final = (
    Code.FAILED_PRECONDITION,
    "STORE_UNAVAILABLE",
    "the server's store is not there, or the server may not use it (%s): its operator must bring it back; the server's log has more",
    None,
)

_UNKNOWN: Final = (
    Code.INTERNAL,
    "INTERNAL",
    "the server met an error of its operating system that it did not expect (%s): its log has more",
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
"""What a client is told of an error of the operating system: code, reason, message, and seconds after which to retry."""

_PATH: Final = re.compile(r"(?<![\w/.)\]])/(?:[^\s/'\"]+/)+[^\s'\":,;)\]]*")
"""An absolute path of at least two parts. What stands behind a word, as in a method's name, is none."""


def to_service_error(error: BaseException) -> ServiceError:
    """Return what a client is told of an error. An error that nobody expected is INTERNAL. Paths of the server are left out."""
    if isinstance(error, HvpdError):  # From the code that client and server share: the codec, the tree specs.
        return ServiceError(Code.INVALID_ARGUMENT, error.reason or "INVALID_ARGUMENT", str(error))
    if isinstance(error, OSError):
        code, reason, message, retry_after = _SYSTEM.get(error.errno or 0, _UNKNOWN)
        said = error.strerror or type(error).__name__  # Without the file, which is for the log.
        return ServiceError(code, reason, message % said, retry_after=retry_after)
    if not isinstance(error, ServiceError):
        said = _PATH.sub("[a path of the server]", str(error))
        return ServiceError(Code.INTERNAL, "INTERNAL", f"{type(error).__name__}: {said}")
    return error


def to_status(error: BaseException, request_id: str = "") -> status_pb2.Status:
    """The status to answer for an error.

    Args:
        error: Any.
        request_id: Goes into its RequestInfo.
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
    """What fits into the 8 KiB that gRPC has for the end of a call, where text is percent-encoded, and what is left out."""
    ours = text.encode()[:most].decode(errors="ignore")
    return text if len(ours) == len(text) else f"{ours} ... ({len(text)} characters)"
