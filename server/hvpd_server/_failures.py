"""The failures that were answered last, for people: what happens again and again is one of them, with a count."""

import collections
import dataclasses
import re
import threading
import time
from collections.abc import Callable

_MOST = 100
"""Most that are kept."""
_LONGEST = 400
"""Most characters of a message, and of whatever else a client may have chosen."""

_VARYING = re.compile(r"[0-9a-f]{8,}|\d+")
"""What differs from one message to the next of its like: digests, sizes, ports."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """What was answered, once or several times."""

    code: str
    """gRPC's."""
    reason: str
    method: str
    """Empty where it is not known."""
    tenant: str
    message: str
    """The last time."""
    request_id: str
    """Likewise, empty where it is not known: the log has more under it."""
    time: float
    """Of the last time, seconds since 1970."""
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
        """Notes a failure that was answered just now; see `Failure`."""
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
        """What is kept, the last first."""
        with self._lock:
            return [*reversed(self._kept.values())]
