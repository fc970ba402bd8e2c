"""One bidirectional call: sending from iterables, receiving, and ending it."""

import dataclasses
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grpc
import numpy as np

from hvpd._errors import Failure, failure_of_rpc
from hvpd._transport.interrupts import never_free
from hvpd._wire import codec

_T = TypeVar("_T")
_Message = TypeVar("_Message")

_CODE = grpc.StatusCode


class RpcFailure(Exception):  # noqa: N818 - `Retry.call` repeats the call, or makes an HvpdError
    """The failure of one attempt.

    Attributes:
        failure: The failure.
        progress: Whether a part of the request was answered, so that the next attempt
            asks for less.
    """

    def __init__(self, failure: Failure, *, progress: bool = False) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.progress = progress


class Stream(Generic[_Message, _T]):
    """A bidirectional call.

    gRPC takes messages one at a time from a queue of iterables, as fast as it has room.

    Args:
        method: The method, as a stub has it.
        metadata: Metadata of the call.
        timeout: Seconds that the call may take; None for no limit.
        request_id: Id of the call.

    Attributes:
        request_id: Id of the call.
    """

    def __init__(self, method: Callable[..., Any], metadata: Any, timeout: float | None, request_id: str = "") -> None:
        self.request_id = request_id
        self._outgoing: queue.SimpleQueue[Iterable[_Message] | None] = queue.SimpleQueue()
        self._call = method(_drain(self._outgoing), metadata=metadata, timeout=timeout)
        self._next_tag = 1

    def reserve_tags(self, count: int) -> int:
        """Return the first of `count` unused tags of this stream."""
        first = self._next_tag
        self._next_tag += count
        return first

    def send(self, messages: Iterable[_Message]) -> None:
        """Send messages in the background, and advance an iterator as they leave."""
        self._outgoing.put(messages)

    def receive(self) -> _T:
        """Wait for the next message.

        Raises:
            RpcFailure: The stream broke or ended.
        """
        try:
            return next(self._call)  # type: ignore[no-any-return]
        except StopIteration:
            raise RpcFailure(Failure(_CODE.UNAVAILABLE, "the server ended the stream")) from None
        except grpc.RpcError as error:
            failure = failure_of_rpc(error)
            if failure.code is _CODE.CANCELLED:  # The server drains, so another try may reach another server.
                failure = dataclasses.replace(failure, code=_CODE.UNAVAILABLE)
            raise RpcFailure(failure.sent_as(self.request_id)) from None

    def close(self) -> None:
        """End the call."""
        self._outgoing.put(None)
        self._call.cancel()

    def cancel(self) -> None:
        """Cancel the call at the server. Other threads may call it."""
        self._call.cancel()

    def drop(self, error: BaseException) -> None:
        """End the call after an error; keep it after an interrupt (`interrupts`)."""
        if isinstance(error, Exception):
            self.close()
        else:
            never_free(self)


def _drain(outgoing: "queue.SimpleQueue[Iterable[_Message] | None]") -> Iterator[_Message]:
    while (messages := outgoing.get()) is not None:
        yield from messages


_EMPTY = 4
"""Most messages without a chunk that may come with one array.

A server asks for x or a direction, and describes a point."""


class Filling:
    """An array that is filled from consecutive chunks.

    Args:
        shape: Shape of the array.
        dtype: dtype of the array.
        target: The array to fill; None for a new one.
        empty: Most chunks without bytes, so that a server cannot keep a caller waiting
            for ever.
    """

    def __init__(
        self, shape: Sequence[int], dtype: np.dtype[Any], target: codec.Array | None = None, *, empty: int = _EMPTY
    ) -> None:
        self.array = np.empty(shape, dtype) if target is None else target
        self._bytes = self.array.reshape(-1).view(np.uint8).data
        self._filled = 0
        self._empty = empty

    def append(self, chunk: codec.Buffer) -> None:
        """Add the next chunk.

        Raises:
            RpcFailure: The server sends more bytes than the array has, or nothing.
        """
        end = self._filled + len(chunk)
        self._empty -= not len(chunk)
        if self._empty < 0:
            raise RpcFailure(Failure(_CODE.DATA_LOSS, "the server sends one message after the other without content"))
        if end > len(self._bytes):
            raise RpcFailure(
                Failure(_CODE.DATA_LOSS, f"the server sent more than the {len(self._bytes)} bytes of an array")
            )
        self._bytes[self._filled : end] = chunk
        self._filled = end

    @property
    def complete(self) -> bool:
        """Return whether the array is full."""
        return self._filled == len(self._bytes)
