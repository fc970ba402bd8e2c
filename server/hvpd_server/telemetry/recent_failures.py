"""The failures that were answered last, for the status page. A failure that repeats is
one entry with a count.
"""

import collections
import dataclasses
import re
import threading
import time
from collections.abc import Callable

_MOST = 100
"""Most failures that are kept."""
_LONGEST = 400
"""Most characters of a message, and of other texts that a client can choose."""

_VARYING = re.compile(r"[0-9a-f]{8,}|\d+")
"""The parts of a message that differ when a failure repeats: digests, sizes, ports."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A failure that was answered once or several times."""

    code: str
    """The name of the gRPC code."""
    reason: str
    method: str
    """The method's name, or empty if it is not known."""
    tenant: str
    message: str
    """The message of the last time."""
    request_id: str
    """The request id of the last time, or empty. The log has more under it."""
    time: float
    """Seconds since 1970, of the last time."""
    count: int


class Failures:
    """The last failures. Safe for many threads.

    Args:
        clock: Seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[tuple[str, ...], Failure] = collections.OrderedDict()

    def add(self, code: str, reason: str, method: str, tenant: str, message: str, request_id: str = "") -> None:
        """Note a failure that was answered just now; see `Failure`."""
        code, reason, method, tenant, message, request_id = (
            text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
            for text in (code, reason, method, tenant, message, request_id)
        )
        alike = code, reason, method, tenant, _VARYING.sub("#", message)
        with self._lock:
            before = self._kept.pop(alike, None)
            count = 1 if before is None else before.count + 1
            self._kept[alike] = Failure(code, reason, method, tenant, message, request_id, self._clock(), count)
            if len(self._kept) > _MOST:
                self._kept.popitem(last=False)

    def recent(self) -> list[Failure]:
        """Return the failures, the last first."""
        with self._lock:
            return [*reversed(self._kept.values())]
