"""One bidirectional call: sending from iterables, receiving, and ending it whatever happened."""

import ctypes
import dataclasses
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grpc
import numpy as np

from hvpd import _codec
from hvpd._errors import Failure, failure_of_rpc

_T = TypeVar("_T")
_Message = TypeVar("_Message")

_CODE = grpc.StatusCode


class RpcFailure(Exception):  # noqa: N818 - not an error of its own: `Transport.call` retries it, or makes an HvpdError of it
    """What one attempt met.

    Attributes:
        progress: Whether some of what was asked for was answered: the next attempt asks for less.
    """

    def __init__(self, failure: Failure, *, progress: bool = False) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.progress = progress


class Stream(Generic[_Message, _T]):
    """A bidirectional call: messages are taken from a queue of iterables, one at a time, as the transport has room for them.

    Attributes:
        request_id: The call's.
    """

    def __init__(self, method: Callable[..., Any], metadata: Any, timeout: float | None, request_id: str = "") -> None:
        self.request_id = request_id
        self._outgoing: queue.SimpleQueue[Iterable[_Message] | None] = queue.SimpleQueue()
        self._call = method(_drain(self._outgoing), metadata=metadata, timeout=timeout)
        self._next_tag = 1

    def reserve_tags(self, count: int) -> int:
        """The first of `count` tags that were not used on this stream."""
        first = self._next_tag
        self._next_tag += count
        return first

    def send(self, messages: Iterable[_Message]) -> None:
        """Sends messages, in the background; an iterator is advanced only as fast as they leave."""
        self._outgoing.put(messages)

    def receive(self) -> _T:
        """Waits for the next message.

        Raises:
            RpcFailure: The stream broke or ended.
        """
        try:
            return next(self._call)  # type: ignore[no-any-return]
        except StopIteration:
            raise RpcFailure(Failure(_CODE.UNAVAILABLE, "the server ended the stream")) from None
        except grpc.RpcError as error:
            failure = failure_of_rpc(error)
            if failure.code is _CODE.CANCELLED:  # The server drains: go elsewhere, or come back.
                failure = dataclasses.replace(failure, code=_CODE.UNAVAILABLE)
            raise RpcFailure(failure.sent_as(self.request_id)) from None

    def close(self) -> None:
        """Ends the call."""
        self._outgoing.put(None)
        self._call.cancel()

    def drop(self, error: BaseException) -> None:
        """Ends the call after an error; after an interrupt, leaves it as it is (see `Transport._abandon`)."""
        if isinstance(error, Exception):
            self.close()
        else:
            never_free(self)


def _drain(outgoing: "queue.SimpleQueue[Iterable[_Message] | None]") -> Iterator[_Message]:
    while (messages := outgoing.get()) is not None:
        yield from messages


_EMPTY = 4
"""Most messages without a chunk that belong to one array: a server says that it wants x, or a direction, and what a point is."""


class Filling:
    """An array that is filled from consecutive chunks.

    Args:
        shape: Of the array.
        dtype: Of the array.
        target: The array; None: a new one.
        empty: Most chunks without bytes, so that a server cannot keep a caller waiting by sending nothing for ever.
    """

    def __init__(
        self, shape: Sequence[int], dtype: np.dtype[Any], target: _codec.Array | None = None, *, empty: int = _EMPTY
    ) -> None:
        self.array = np.empty(shape, dtype) if target is None else target
        self._bytes = self.array.reshape(-1).view(np.uint8).data
        self._filled = 0
        self._empty = empty

    def append(self, chunk: _codec.Buffer) -> None:
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
        return self._filled == len(self._bytes)


def never_free(thing: object) -> None:
    """Keeps an object beyond the end of the interpreter: gRPC's destructors, too, take the locks that an interrupt left behind."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
