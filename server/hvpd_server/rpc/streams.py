"""The open product streams, by gRPC and by the vector port: which of them are idle, and
which must end.
"""

import contextlib
import threading
from collections.abc import Iterator

from hvpd_server.rpc.call_context import CallContext


class Streams:
    """The open product streams.

    A drain ends the idle streams and lets the busy ones finish. Each stream takes a
    thread, so one stream too many ends the stream that has been idle for longest. A
    call for which there is no room ends one, too. The client of an ended stream
    connects again when it has another product to ask for.

    Args:
        limit: The most streams to keep open.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: dict[Stream, None] = {}
        self._draining = False
        self.last_asked: Stream | None = None
        """The stream of the last message."""

    @property
    def count(self) -> int:
        """Return how many streams are open."""
        return len(self._open)

    @contextlib.contextmanager
    def opened(self, call: CallContext) -> "Iterator[Stream]":
        """Register a stream while it is open."""
        stream = Stream(self, call)
        with self._lock:
            self._open[stream] = None
            late = self._draining
        if late:
            call.cancel()
        self._end_surplus()
        try:
            yield stream
        finally:
            with self._lock:
                del self._open[stream]
                if stream.asked_last:
                    self.last_asked = None

    def rest(self, stream: "Stream") -> bool:
        """Note that a stream is idle, the last of all to become so. Return whether it
        must end.
        """
        with self._lock:
            stream.busy = False
            del self._open[stream]
            self._open[stream] = None
            late, too_many = self._draining, len(self._open) > self._limit
        if too_many:
            self._end_surplus()
        return late

    def _end_surplus(self) -> None:
        """End idle streams, if too many are open. The newest stays: it has not asked
        yet.
        """
        with self._lock:
            staying = [stream for stream in self._open if not stream.ending]
            idle = [stream for stream in staying[:-1] if not stream.busy]
            surplus = idle[: max(len(staying) - self._limit, 0)]
            for stream in surplus:
                stream.ending = True
        for stream in surplus:
            stream.call.cancel()

    def end_idle(self, tenant: str) -> None:
        """End the stream that has been idle for longest, for a call that found no room.

        Args:
            tenant: The tenant whose stream must end; empty for any.
        """
        with self._lock:
            found = next(
                (each for each in self._open if not each.busy and not each.ending and tenant in ("", each.call.owner)),
                None,
            )
            if found is not None:
                found.ending = True
        if found is not None:
            found.call.cancel()

    def drain(self) -> None:
        """End idle streams now, and busy ones after the products they have begun."""
        with self._lock:
            self._draining = True
            idle = [stream for stream in self._open if not stream.busy]
        for stream in idle:
            stream.call.cancel()


class Stream:
    """One open stream."""

    def __init__(self, streams: Streams, call: CallContext) -> None:
        self._streams = streams
        self.call = call
        self.busy = False
        self.ending = False
        """Whether the server has ended it to make room."""

    def begin(self) -> None:
        """Note that a message came."""
        self.busy = True
        self._streams.last_asked = self

    @property
    def asked_last(self) -> bool:
        """Whether no other stream has had a message since this one's last."""
        return self._streams.last_asked is self

    def end(self) -> bool:
        """Note that every product is answered. Return whether the stream must end."""
        return self._streams.rest(self)
