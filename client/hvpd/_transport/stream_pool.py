"""Streams for products over gRPC, kept for the next product.

A product has a stream to itself, so that threads of one client do not wait for each
other.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

from hvpd._transport.channel import Channel
from hvpd._transport.exchange import ProductStream
from hvpd._transport.stream import Stream


class StreamPool:
    """Streams that no thread uses at the moment.

    Args:
        channel: The channel to open streams on.
        keeps: Returns whether a stream is kept after its use.
    """

    def __init__(self, channel: Channel, keeps: Callable[[], bool]) -> None:
        self._channel = channel
        self._keeps = keeps
        self._lock = threading.Lock()
        self._idle: list[ProductStream] = []

    @contextlib.contextmanager
    def take(self, left: float | None) -> Iterator[ProductStream]:
        """Give the caller a stream for one exchange.

        Args:
            left: Seconds that the exchange may take. With a limit, the stream is a new
                one, so that the server sees the deadline. None: any stream, without a
                deadline.
        """
        stream = None
        if left is None:
            with self._lock:
                stream = self._idle.pop() if self._idle else None
        if stream is None:
            metadata, request_id = self._channel.new_call()
            stream = Stream(self._channel.stream_products, metadata, left, request_id)
        try:
            yield stream
        except BaseException as error:  # Answers may still be on their way.
            stream.drop(error)
            raise
        with self._lock:
            keep = left is None and self._keeps()
            if keep:
                self._idle.append(stream)
        if not keep:
            stream.close()

    def end_idle(self) -> None:
        """End the idle streams, because each takes a thread of the server."""
        if self._idle:
            for stream in self.forget():
                stream.close()

    def forget(self) -> list[ProductStream]:
        """Return the idle streams, and keep none."""
        with self._lock:
            idle, self._idle = self._idle, []
        return idle
