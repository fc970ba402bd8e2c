"""What is on the device, within a budget of bytes: least recently used out first. Knows no jax and no gRPC.

Dropping an entry only forgets it: a launch that uses it keeps it alive until it ends. Whoever needs it again loads it again.
"""

import collections
import dataclasses
import threading
from collections.abc import Callable, Hashable
from typing import Any

from hvpd_server._errors import Code, ServiceError


@dataclasses.dataclass(slots=True)
class _Entry:
    kind: str
    value: Any
    size_bytes: int


class Residency:
    """A cache with a budget.

    Args:
        budget_bytes: Most bytes that all entries may hold together.
        on_evict: Told the kind of each entry that is dropped for want of room.
    """

    def __init__(self, budget_bytes: int, on_evict: Callable[[str], None] = lambda kind: None) -> None:
        self.budget_bytes = budget_bytes
        self._on_evict = on_evict
        self._lock = threading.Lock()
        self._entries: collections.OrderedDict[Hashable, _Entry] = collections.OrderedDict()
        self._loading: dict[Hashable, threading.Lock] = {}
        self._used: collections.Counter[str] = collections.Counter()

    def used_bytes(self) -> dict[str, int]:
        """Bytes that are resident, by kind."""
        with self._lock:
            return dict(self._used)

    def get(self, key: Hashable) -> Any | None:
        """The entry, most recently used from now on; None where it is not resident."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry.value

    def put(self, key: Hashable, kind: str, value: Any, size_bytes: int) -> None:
        """Makes an entry resident and drops others until it fits.

        Raises:
            ServiceError: It alone is larger than the budget.
        """
        self.check(size_bytes, kind)
        with self._lock:
            self._forget(key)
            evicted = []
            while sum(self._used.values()) + size_bytes > self.budget_bytes:
                oldest = next(iter(self._entries))
                evicted.append(self._entries[oldest].kind)
                self._forget(oldest)
            self._entries[key] = _Entry(kind, value, size_bytes)
            self._used[kind] += size_bytes
        for dropped in evicted:
            self._on_evict(dropped)

    def check(self, size_bytes: int, kind: str) -> None:
        """Raises ServiceError where something of this size can never be resident."""
        if size_bytes > self.budget_bytes:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "MEMORY_BUDGET",
                f"{kind} of {size_bytes} bytes is larger than the server's memory budget of {self.budget_bytes} bytes: "
                "raise `hvpd serve --memory-budget`",
            )

    def load(self, key: Hashable, kind: str, loader: Callable[[], tuple[Any, int]]) -> Any:
        """The entry; where it is not resident, `loader` makes it and says its bytes. Called once for many who ask at once."""
        value = self.get(key)
        if value is not None:
            return value
        with self._lock:
            lock = self._loading.setdefault(key, threading.Lock())
        with lock:
            value = self.get(key)
            if value is None:
                try:
                    value, size_bytes = loader()
                    self.put(key, kind, value, size_bytes)
                finally:
                    with self._lock:
                        self._loading.pop(key, None)
        return value

    def drop(self, key: Hashable) -> None:
        """Forgets an entry."""
        with self._lock:
            self._forget(key)

    def _forget(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._used[entry.kind] -= entry.size_bytes
