"""Calls of any method with raw bytes, for the conformance suite."""

from collections.abc import Iterable, Iterator
from typing import Any, Final

import grpc

from hvpd._errors import failure_of_rpc
from hvpd._transport.channel import Channel

_SECONDS: Final = 60.0
"""Seconds for one call."""


class RefusedError(Exception):
    """A call that the server refused.

    Attributes:
        code: Name of the gRPC status, such as "NOT_FOUND".
        reason: `ErrorInfo.reason` of the domain hvpd; empty without one.
    """

    def __init__(self, code: str, reason: str, text: str) -> None:
        super().__init__(f"{code}{f' ({reason})' if reason else ''}: {text}")
        self.code = code
        self.reason = reason


class RawCalls:
    """Calls methods by their paths, such as "hvpd.v1.ServerService/GetServer"."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def unary(self, path: str, request: bytes) -> bytes:
        """Return the answer's bytes.

        Raises:
            RefusedError: The server refused the call.
        """
        method: Any = self._channel.raw.unary_unary(f"/{path}")
        return self._called(lambda **options: method(request, **options))  # type: ignore[no-any-return]

    def upload(self, path: str, requests: Iterable[bytes]) -> bytes:
        """Send several messages, and return the answer's bytes.

        Raises:
            RefusedError: The server refused the call.
        """
        method: Any = self._channel.raw.stream_unary(f"/{path}")
        return self._called(lambda **options: method(iter(requests), **options))  # type: ignore[no-any-return]

    def stream(self, path: str, requests: Iterable[bytes]) -> Iterator[bytes]:
        """Send messages, and yield the bytes of each answer as it comes.

        Raises:
            RefusedError: The server refused the call.
        """
        method: Any = self._channel.raw.stream_stream(f"/{path}")
        answers = self._called(lambda **options: method(iter(requests), **options))
        try:
            yield from answers
        except grpc.RpcError as error:
            raise _refused(error) from None
        finally:
            answers.cancel()

    def _called(self, call: Any) -> Any:
        try:
            return call(metadata=self._channel.metadata, timeout=_SECONDS)
        except grpc.RpcError as error:
            raise _refused(error) from None


def _refused(error: grpc.RpcError) -> RefusedError:
    failure = failure_of_rpc(error)
    return RefusedError(failure.code.name, failure.reason, failure.message)
