"""Decides which failed call is repeated, when, and for how long.

Everything on this wire can be repeated. Knows neither messages nor channels.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import grpc

from hvpd._errors import Failure, to_error
from hvpd._progress import Reporter, Stage
from hvpd._transport import cancellation
from hvpd._transport.absence import spread
from hvpd._transport.stream import RpcFailure

_T = TypeVar("_T")

_log = logging.getLogger("hvpd")

_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
"""Seconds before a call is repeated: at first, and at most."""

_AT_WORK = 2.0
"""Seconds after which a failed call counts as cut off in the middle of its work. If the
server cannot be reached, the call fails sooner.
"""

_WARN_AFTER, _WARN_EVERY = 2.0, 60.0
"""Seconds without a server after which the log has a warning, and between warnings."""

_CODE = grpc.StatusCode


class Retry:
    """Repeats calls until they succeed, or fail for good.

    Args:
        address: "host:port" of the server, for messages.
        retry_timeout: Seconds for which a call is repeated after its first failure.
        timeout: Seconds that one call may take, its retries included; None for no
            limit.
        on_retry: Receives each failure after which a call is repeated.
        on_failure: Receives the failure that ends a call.
        reporter: Shows that a call is repeated.
    """

    def __init__(
        self,
        address: str,
        retry_timeout: float,
        timeout: float | None,
        on_retry: Callable[[Failure], None],
        on_failure: Callable[[Failure], None],
        reporter: Reporter | None = None,
    ) -> None:
        self.timeout = timeout
        self._address = address
        self._retry_timeout = retry_timeout
        self._on_retry = on_retry
        self._on_failure = on_failure
        self._reporter = reporter or Reporter()
        self._quiet_until = float("-inf")
        """The end of the time without a further warning in the log."""
        self._outer = threading.local()
        """`ends`: the end of the call for which this thread makes a point again."""

    def call(self, attempt: Callable[[float | None], _T], restore: Callable[[], None] | None = None) -> _T:
        """Run `attempt(seconds left)` until it succeeds.

        Args:
            attempt: One try; raises RpcFailure.
            restore: Makes the point resident again after the server forgot it. Its own
                calls must end within the time of this call.

        Raises:
            HvpdError: The attempt failed for good, or for longer than the retry
                timeout.
        """
        ends = float("inf")
        if self.timeout is not None:
            ends = min(time.monotonic() + self.timeout, getattr(self._outer, "ends", ends))
        gives_up: float | None = None
        pause, cut, failed = _PAUSE, 0, 0.0
        waiting: Stage | None = None
        try:
            while True:
                tried = time.monotonic()
                try:
                    return attempt(None if self.timeout is None else max(ends - tried, 0.001))
                except RpcFailure as error:
                    cancellation.check()
                    failure = error.failure
                    if error.progress:  # The rest of the work has not failed yet.
                        gives_up, pause = None, _PAUSE
                now = time.monotonic()
                cut += failure.code is _CODE.UNAVAILABLE and now - tried > _AT_WORK
                # From the first failure on, because a product may have been under way
                # for longer.
                if gives_up is None:
                    failed, gives_up = now, min(now + self._retry_timeout, ends)
                if failure.reason == "POINT_NOT_RESIDENT" and restore is not None:
                    if now < gives_up:
                        waiting = self._repeats(failure, waiting)
                        self._restore(restore, ends)
                        continue
                    failure = self._forgotten(failure, timed_out=now >= ends)
                wait = failure.retry_after if failure.retry_after is not None else pause
                if not is_transient(failure) or now + wait > gives_up:
                    failure = self._worded(failure, cut, now - failed)
                    self._on_failure(failure)
                    raise to_error(failure, self._address)
                waiting = self._repeats(failure, waiting)
                cancellation.sleep(spread(wait))
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            if waiting is not None:
                self._reporter.end(waiting)

    def _repeats(self, failure: Failure, waiting: Stage | None) -> Stage:
        """Report that a call is repeated. Return the stage that shows the wait."""
        self._on_retry(failure)
        reason = failure.reason or failure.code.name
        waiting = waiting or self._reporter.begin("")
        waiting.name = f"waiting for {self._address} ({reason})"
        seconds = time.monotonic() - waiting.began
        level = logging.INFO
        now = time.monotonic()
        if failure.code is _CODE.UNAVAILABLE and seconds >= _WARN_AFTER and now >= self._quiet_until:
            level, self._quiet_until = logging.WARNING, now + _WARN_EVERY
        _log.log(level, "repeating a call to %s after %.1f s: %s: %s", self._address, seconds, reason, failure.message)
        return waiting

    def _restore(self, restore: Callable[[], None], ends: float) -> None:
        try:
            self._outer.ends = ends
            restore()
        finally:  # Also after an interrupt, because a time in the past would end all later calls.
            self._outer.ends = float("inf")

    def _forgotten(self, failure: Failure, *, timed_out: bool) -> Failure:
        """Return the failure of a point that was made again and again."""
        return dataclasses.replace(
            failure,
            code=_CODE.DEADLINE_EXCEEDED if timed_out else _CODE.RESOURCE_EXHAUSTED,
            message=f"the server at {self._address} forgot the point as often as it was made again, for "
            f"retry_timeout={self._retry_timeout:g} s: it has too little memory for all that is asked of it",
        )

    def _worded(self, failure: Failure, cut: int, seconds: float) -> Failure:
        """Return the failure with a message for the user.

        Args:
            failure: The last failure of a call.
            cut: Number of times that the call was cut off in the middle of its work.
                The call itself may have ended the server.
            seconds: Time since the first failure.
        """
        message = failure.message
        if failure.code is _CODE.DEADLINE_EXCEEDED and self.timeout is not None:
            message = f"the server at {self._address} did not answer within timeout={self.timeout:g} s"
        if failure.code is _CODE.UNAVAILABLE and cut >= 2:
            message += (
                f"; it went away {cut} times in the middle of this call. The requested work may never end, or may crash "
                "the server; see the server's log"
            )
        elif failure.code is _CODE.UNAVAILABLE:
            message += f" (the client tried again for {seconds:.1f} s, of retry_timeout={self._retry_timeout:g} s)"
            if not failure.reason:  # Otherwise the server has answered, and has stated the cause.
                message += f". To find the cause, run `hvpd doctor --address {self._address}`"
        return dataclasses.replace(failure, message=message)


def is_transient(failure: Failure) -> bool:
    """Return whether a call with this failure may succeed later."""
    if failure.code is _CODE.UNAVAILABLE:
        return True
    if failure.code is _CODE.RESOURCE_EXHAUSTED:
        # gRPC itself refuses calls beyond the server's limit, without a time to retry
        # after.
        return failure.retry_after is not None or "concurrent rpc limit" in failure.message.lower()
    if failure.code is _CODE.CANCELLED and not failure.reason:
        return True  # The client cancels no call: the server drained (grpc issue 41785).
    # A server that was killed in the middle of a reply can look like this.
    return (
        failure.code in (_CODE.INTERNAL, _CODE.UNKNOWN) and not failure.reason and "stream" in failure.message.lower()
    )
