"""Which product streams are open, which of them are idle, and when one must end. Knows of gRPC only that a call can be cancelled."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import grpc


class Streams:
    """The open product streams: a drain ends the idle ones and lets the busy ones finish, and one stream too many ends the one
    that has been idle for longest. Each takes a thread, and whoever is sent away comes back when it has something to ask.

    Args:
        limit: Most streams that are kept open.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: dict[Stream, None] = {}
        self._draining = False
        self.last_asked: Stream | None = None
        """On which a message came last."""

    @property
    def count(self) -> int:
        """How many are open."""
        return len(self._open)

    @contextlib.contextmanager
    def opened(self, context: grpc.ServicerContext) -> "Iterator[Stream]":
        """Registers a stream while it is open."""
        stream = Stream(self, context)
        with self._lock:
            self._open[stream] = None
            idle = next((other for other in self._open if not other.busy), None)
            crowded, late = len(self._open) > self._limit, self._draining
        if late:
            context.cancel()
        if crowded and idle is not None and idle is not stream:
            idle.context.cancel()
        try:
            yield stream
        finally:
            with self._lock:
                del self._open[stream]
                if stream.asked_last:
                    self.last_asked = None

    def rest(self, stream: "Stream") -> bool:
        """Notes that a stream is idle, as the last of all; returns whether it must end."""
        with self._lock:
            stream.busy = False
            del self._open[stream]
            self._open[stream] = None
            return self._draining

    def drain(self) -> None:
        """Ends idle streams now, busy ones after what they have begun."""
        with self._lock:
            self._draining = True
            idle = [stream for stream in self._open if not stream.busy]
        for stream in idle:
            stream.context.cancel()


class Stream:
    """One open stream."""

    def __init__(self, streams: Streams, context: grpc.ServicerContext) -> None:
        self._streams = streams
        self.context: Any = context
        self.busy = False

    def begin(self) -> None:
        """A message came."""
        self.busy = True
        self._streams.last_asked = self

    @property
    def asked_last(self) -> bool:
        """Whether no message came on another since."""
        return self._streams.last_asked is self

    def end(self) -> bool:
        """Everything was answered. Returns whether the stream must end."""
        return self._streams.rest(self)
