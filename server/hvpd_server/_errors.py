"""Why a request is refused or fails, as the server's inner parts say it: a code, a reason, a sentence.

`to_status` is the one place where a failure becomes a google.rpc.Status (https://google.aip.dev/193).
"""

import errno
from collections.abc import Mapping

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

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
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.retry_after = retry_after


_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def to_service_error(error: BaseException) -> ServiceError:
    """What a client is told of an error; what nobody expected is INTERNAL."""
    if isinstance(error, OSError) and error.errno in _FULL_DISK:
        return ServiceError(
            Code.RESOURCE_EXHAUSTED,
            "DISK_FULL",
            f"the server's store has no room ({error.strerror}): nothing was stored; free space on the server's disk and retry",
        )
    if isinstance(error, HvpdError):  # From the code that client and server share: the codec, the tree specs.
        return ServiceError(Code.INVALID_ARGUMENT, error.reason or "INVALID_ARGUMENT", str(error))
    if not isinstance(error, ServiceError):
        return ServiceError(Code.INTERNAL, "INTERNAL", f"{type(error).__name__}: {error}")
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
