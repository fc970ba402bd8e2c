"""A cache of entries on the device, within a budget of bytes; the least recently used
entry is evicted first.

A dropped entry is only forgotten: a launch that uses the entry keeps it alive until the
launch ends. An entry that is needed again is loaded again.

Entries can have users, and each user can have a limit. The share of a user has three
parts: the entries that the user joined, the entries that these need, and the entries
that need these and have no other user. An entry that several users share counts in full
for each. A user over its limit leaves the entries that were used least recently. An
entry that its last user leaves is dropped. This module knows no jax and no gRPC.
"""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from hvpd_server.device.entries import Entries
from hvpd_server.errors import Code, ServiceError

_NOTHING: Mapping[Hashable, int] = MappingProxyType({})

_ENTRY_BYTES = 16 << 10
"""Bytes of the budget for each entry that may exist."""

_LEAST_ENTRIES = 1000
"""Number of entries that may exist with any budget."""


class Residency:
    """A cache with a budget of bytes.

    Args:
        budget_bytes: Most bytes that all entries may hold together.
        on_evict: Called with the kind of each entry that is evicted.
        limit_of: Most bytes of a user; None: the budget.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        budget_bytes: int,
        on_evict: Callable[[str], None] = lambda kind: None,
        limit_of: Callable[[str], int | None] = lambda user: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._on_evict = on_evict
        self._limit_of = limit_of
        self._clock = clock
        self._lock = threading.Lock()
        self._entries = Entries(clock)
        # Small entries take memory of the host, too: some 12 KiB a point.
        self._most_entries = max(budget_bytes // _ENTRY_BYTES, _LEAST_ENTRIES)
        self._loading: dict[Hashable, threading.Lock] = {}
        self._hits: collections.Counter[str] = collections.Counter()
        self._misses: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def _evicting(self) -> Iterator[list[str]]:
        """Hold the lock, and yield a list for the kinds of evicted entries, which are
        reported afterwards.
        """
        evicted: list[str] = []
        with self._lock:
            yield evicted
        for kind in evicted:
            self._on_evict(kind)

    def used_bytes(self) -> dict[str, int]:
        """Return the resident bytes, by kind."""
        with self._lock:
            return dict(self._entries.used_bytes)

    def counts(self) -> dict[str, int]:
        """Return the number of entries, by kind."""
        with self._lock:
            return dict(self._entries.counts)

    def asked(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the hits (entries that were found) and the misses (entries that were
        made), by kind.
        """
        with self._lock:
            return dict(self._hits), dict(self._misses)

    def get(self, key: Hashable, user: str | None = None) -> Any | None:
        """Return the value of an entry, and note that the entry was used.

        Args:
            key: The key of the entry.
            user: The user that asks; None to ask for no user.

        Returns:
            None if the entry is not resident, or does not belong to the user.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or (user is not None and user not in entry.users):
                return None
            # The use of the latest entry is recorded. A pin is renewed at each use.
            if self._entries.leased or entry is not self._entries.latest:
                self._entries.touch(key)
            self._hits[entry.kind] += 1
            return entry.value

    def values(self) -> list[Any]:
        """Return the values of all entries."""
        with self._lock:
            return [entry.value for entry in self._entries.values()]

    def free_bytes(self) -> int:
        """Return the bytes of the budget that are not in use."""
        with self._lock:
            return self.budget_bytes - self._entries.used_bytes.total()

    def put(
        self,
        key: Hashable,
        kind: str,
        value: Any,
        size_bytes: int,
        *,
        needs: Sequence[Hashable] = (),
        evict: bool = True,
    ) -> None:
        """Add an entry, and evict others until it fits.

        Args:
            key: The key.
            kind: The kind, for metrics.
            value: The value.
            size_bytes: Bytes on the device.
            evict: Whether others may be evicted for the entry.
            needs: Keys of entries that this one needs. Each use of this entry uses
                them, too. If one of them is dropped, so is this entry. Keys that are
                not resident are ignored.

        Raises:
            ServiceError: The entry does not fit beside the entries that it needs and
                the pinned ones; or, without `evict`, beside all others. Then nothing
                was dropped, except an earlier entry with this key.
        """
        with self._evicting() as evicted:
            self._entries.forget(key, [])
            present = tuple(need for need in dict.fromkeys(needs) if need in self._entries)
            self._check(size_bytes, kind, present)
            if not evict and self._entries.used_bytes.total() + size_bytes > self.budget_bytes:
                raise no_room(size_bytes)
            for need in present:
                self._entries.touch(need)
            held = self._entries.closure([*present, *self._entries.pinned()])
            while self._entries.used_bytes.total() + size_bytes > self.budget_bytes:
                self._entries.forget(next(entry for entry in self._entries if entry not in held), evicted)
            while evict and len(self._entries) >= self._most_entries:
                oldest = next((entry for entry in self._entries if entry not in held), None)
                if oldest is None:
                    break
                self._entries.forget(oldest, evicted)
            self._entries.add(key, kind, value, size_bytes, present)
            self._misses[kind] += 1

    def check(self, size_bytes: int, kind: str, needs: Mapping[Hashable, int] = _NOTHING) -> None:
        """Raise ServiceError if an entry cannot be resident beside the entries that it
        needs, and the pinned ones.

        Args:
            size_bytes: Bytes of the entry.
            kind: Name of the entry, for the message.
            needs: Keys of the entries that it needs, with their bytes. The bytes count
                if the entry is not resident.
        """
        with self._lock:
            absent = sum(size for key, size in needs.items() if key not in self._entries)
            self._check(size_bytes + absent, kind, [key for key in needs if key in self._entries])

    def resize(self, key: Hashable, size_bytes: int) -> bool:
        """Change the bytes of an entry, and evict others until it fits. Return whether
        the entry is resident.

        Raises:
            ServiceError: As for `put`. Then nothing was changed.
        """
        with self._evicting() as evicted:
            entry = self._entries.get(key)
            if entry is None:
                return False
            self._entries.touch(key)
            more = size_bytes - entry.size_bytes
            if more > 0:
                self._check(more, entry.kind, [key])
            held = self._entries.closure([key, *self._entries.pinned()])
            while more > 0 and self._entries.used_bytes.total() + more > self.budget_bytes:
                self._entries.forget(next(other for other in self._entries if other not in held), evicted)
            entry.size_bytes = size_bytes
            self._entries.used_bytes[entry.kind] += more
        self.fit(key)
        return True

    def _check(self, size_bytes: int, kind: str, present: Sequence[Hashable]) -> None:
        needed = self._entries.closure(present)
        size_bytes += self._entries.bytes_of(needed)
        if size_bytes > self.budget_bytes:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "MEMORY_BUDGET",
                f"{kind} of {size_bytes} bytes, with the entries that it needs, is larger than the server's memory budget of "
                f"{self.budget_bytes} bytes: raise `hvpd serve --memory-budget`",
            )
        pinned = self._entries.bytes_of(self._entries.closure(self._entries.pinned()) - needed)
        if size_bytes + pinned > self.budget_bytes:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "PINNED",
                f"{kind} of {size_bytes} bytes, with the entries that it needs, does not fit beside {pinned} bytes that are pinned, in the "
                f"server's memory budget of {self.budget_bytes} bytes: unpin points, or raise `hvpd serve --memory-budget`",
            )

    def load(
        self,
        key: Hashable,
        kind: str,
        loader: Callable[[], tuple[Any, int]],
        *,
        needs: Sequence[Hashable] = (),
        evict: bool = True,
    ) -> Any:
        """Return an entry. If it is not resident, `loader` makes it, and returns its
        value and bytes. Concurrent callers share one call of `loader`.
        """
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
                    self.put(key, kind, value, size_bytes, needs=needs, evict=evict)
                finally:
                    with self._lock:
                        self._loading.pop(key, None)
        return value

    # Users

    def join(self, key: Hashable, user: str) -> None:
        """Add a user to an entry, if it is resident. A user over its limit leaves other
        entries.
        """
        with self._evicting() as evicted:
            entry = self._entries.get(key)
            if entry is None:
                return
            entry.users.add(user)
            self._entries.joined[user].add(key)
            self._fit(user, key, evicted)

    def had_bytes(self, user: str) -> int:
        """Return the bytes of a user's share."""
        with self._lock:
            return self._entries.bytes_of(
                {part for key in self._entries.joined.get(user, ()) for part in self._had(key, user)}
            )

    def check_user(self, user: str, size_bytes: int, kind: str, needs: Mapping[Hashable, int] = _NOTHING) -> None:
        """Raise ServiceError if an entry exceeds a user's limit even after the user has
        left all other entries that are not pinned; see `check`.
        """
        limit = self._limit_of(user)
        if limit is None:
            return
        with self._lock:
            present = self._entries.closure(key for key in needs if key in self._entries)
            size_bytes += sum(size for key, size in needs.items() if key not in self._entries)
            size_bytes += self._entries.bytes_of(present)
            pinned = {part for key in self._entries.pinned(user) for part in self._had(key, user)}
            beside = self._entries.bytes_of(pinned - present)
        if size_bytes + beside > limit:
            pins = f" beside {beside} bytes that are pinned" if beside else ""
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "TENANT_MEMORY",
                f"{kind} of {size_bytes} bytes, with the entries that it needs, is more than tenant {user} may have on the device{pins}. "
                f"The limit is {limit} bytes: ask the server's operator for a higher limit",
                {"tenant": user},
            )

    def users(self, key: Hashable) -> set[str]:
        """Return the users of an entry."""
        with self._lock:
            entry = self._entries.get(key)
            return set() if entry is None else set(entry.users)

    def fit(self, key: Hashable) -> None:
        """Enforce the limits of an entry's users, after another entry was added that
        needs it: users over their limits leave other entries.
        """
        with self._evicting() as evicted:
            entry = self._entries.get(key)
            for user in tuple(entry.users) if entry is not None else ():
                self._fit(user, key, evicted)

    def _fit(self, user: str, keep: Hashable, evicted: list[str]) -> None:
        """Let a user over its limit leave entries. Add the kinds of the entries that
        were dropped to `evicted`.
        """
        limit = self._limit_of(user)
        if limit is None:
            return
        had = {key: self._had(key, user) for key in self._entries.joined[user]}
        times = collections.Counter(part for parts in had.values() for part in parts)
        excess = self._entries.bytes_of(times) - limit
        if excess <= 0:
            return
        staying = {keep, *self._entries.pinned(user)}
        for key in sorted(had.keys() - staying, key=lambda key: self._entries[key].used):
            for part in had[key]:
                times[part] -= 1
                excess -= self._entries[part].size_bytes if not times[part] else 0
            self._entries.joined[user].discard(key)
            self._entries[key].users.discard(user)
            if excess <= 0:
                break
        for key in had.keys() - self._entries.joined[user]:
            if key in self._entries and not self._entries[key].users:
                self._entries.forget(key, evicted)

    def _had(self, key: Hashable, user: str) -> set[Hashable]:
        """Return an entry, all that it needs, and all that needs it, except entries of
        other users only.
        """
        needing = (each for each in self._entries[key].needed_by if self._entries[each].users <= {user})
        return self._entries.closure({key, *needing})

    # Pins

    def pin(self, key: Hashable, seconds: float, user: str = "") -> None:
        """Pin a resident entry, with all that it needs, until it has not been used for
        `seconds`. 0 removes the user's pin.

        Raises:
            ServiceError: More than half of the budget would be pinned.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return
            if not seconds:
                entry.leases.pop(user, None)
                if not entry.leases:
                    self._entries.leased.discard(key)
                return
            size_bytes = self._entries.bytes_of(self._entries.closure([*self._entries.pinned(), key]))
            if size_bytes > self.budget_bytes // 2:
                raise ServiceError(
                    Code.RESOURCE_EXHAUSTED,
                    "PINNED",
                    f"{size_bytes} bytes would be pinned, but at most half of the server's memory budget of {self.budget_bytes} bytes may "
                    "be pinned: do without the pin, or unpin other points",
                )
            entry.leases[user] = seconds
            entry.pinned_until = self._clock() + max(entry.leases.values())
            self._entries.leased.add(key)

    def pinned(self) -> list[Any]:
        """Return the values of all pinned entries."""
        with self._lock:
            return [self._entries[key].value for key in self._entries.pinned()]

    def relieve(self, keep: Sequence[Hashable]) -> bool:
        """Evict all residuals. If there are none, evict all entries, except entries in
        `keep`, pinned entries, and the entries that these need. Return whether any
        entry was evicted.
        """
        with self._evicting() as evicted:
            residuals = [key for key, entry in self._entries.items() if entry.kind == "residuals"]
            kept = self._entries.closure([*(key for key in keep if key in self._entries), *self._entries.pinned()])
            for key in residuals or [key for key in self._entries if key not in kept]:
                self._entries.forget(key, evicted)
        return bool(evicted)

    def drop(self, key: Hashable) -> None:
        """Drop an entry."""
        with self._lock:
            self._entries.forget(key, [])

    def drop_where(self, condition: Callable[[Any], bool]) -> None:
        """Drop all entries whose value fulfils a condition."""
        with self._lock:
            for key in [key for key, entry in self._entries.items() if condition(entry.value)]:
                self._entries.forget(key, [])


def no_room(size_bytes: int) -> ServiceError:
    """Return the error of an entry for which nothing may be evicted."""
    return ServiceError(
        Code.RESOURCE_EXHAUSTED,
        "MEMORY_BUDGET",
        f"{size_bytes} bytes more do not fit in the server's memory budget beside the resident values",
    )
