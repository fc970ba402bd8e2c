"""What is on the device, within a budget of bytes: least recently used out first. Knows no jax and no gRPC.

Dropping an entry only forgets it: a launch that uses it keeps it alive until it ends. Whoever needs it again loads it again.

Entries can have users, each of whom may have a limit. A user has the entries that it joined, what these need, and what needs them; what several
have counts in full for each. Over its limit, a user leaves what it has used least recently, and what is nobody's then is dropped.
"""

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from hvpd_server._errors import Code, ServiceError

_NOTHING: Mapping[Hashable, int] = MappingProxyType({})

_ENTRY_BYTES = 16 << 10
_LEAST_ENTRIES = 1000
"""There are as many entries as the budget has of these bytes, and at least so many."""


@dataclasses.dataclass(slots=True)
class _Entry:
    kind: str
    value: Any
    size_bytes: int
    needs: tuple[Hashable, ...]
    all_needs: "Mapping[Hashable, _Entry]"
    """What it needs, however indirectly, from the ground up. When one of these goes, or is replaced, this goes, too."""
    needed_by: set[Hashable] = dataclasses.field(default_factory=set)
    leases: dict[str, float] = dataclasses.field(default_factory=dict)
    """By user, the seconds for which it is pinned after each use; empty where it is not, or was not used for so long."""
    pinned_until: float = 0.0
    used: int = 0
    """The larger, the later."""
    users: set[str] = dataclasses.field(default_factory=set)


_NO_ENTRY: Final = _Entry("", None, 0, (), {})


class Residency:
    """A cache with a budget.

    Args:
        budget_bytes: Most bytes that all entries may hold together.
        on_evict: Told the kind of each entry that is dropped for want of room.
        limit_of: Most bytes that a user may have; None: the budget.
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
        self._entries: collections.OrderedDict[Hashable, _Entry] = collections.OrderedDict()
        self._latest = _NO_ENTRY  # Used last, but for what is put off.
        self._put_off: Hashable | None = None  # Something that this needs: used since.
        self._leased: set[Hashable] = set()
        # Also what is small takes memory of the host, some 12 KiB a point.
        self._most_entries = max(budget_bytes // _ENTRY_BYTES, _LEAST_ENTRIES)
        self._uses = itertools.count(1)
        self._joined: collections.defaultdict[str, set[Hashable]] = collections.defaultdict(set)
        self._loading: dict[Hashable, threading.Lock] = {}
        self._used: collections.Counter[str] = collections.Counter()
        self._hits: collections.Counter[str] = collections.Counter()
        self._misses: collections.Counter[str] = collections.Counter()

    def used_bytes(self) -> dict[str, int]:
        """Bytes that are resident, by kind."""
        with self._lock:
            return dict(self._used)

    def asked(self) -> tuple[dict[str, int], dict[str, int]]:
        """How many times an entry was asked for and was there, and how many times one was made, by kind."""
        with self._lock:
            return dict(self._hits), dict(self._misses)

    def get(self, key: Hashable, user: str | None = None) -> Any | None:
        """The entry, most recently used from now on; None where it is not resident, or not this user's."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or (user is not None and user not in entry.users):
                return None
            if self._leased:  # Leases count from each use.
                self._touch(key)
            elif entry is self._latest:  # It is so still, and what was put off is used with it.
                self._put_off = None
            elif self._put_off is None and key in self._latest.all_needs:
                self._put_off = key  # Mostly a point, whose residuals come next, again.
            else:
                self._touch(key)
            self._hits[entry.kind] += 1
            return entry.value

    def values(self) -> list[Any]:
        """All entries."""
        with self._lock:
            return [entry.value for entry in self._entries.values()]

    def free_bytes(self) -> int:
        """What the budget leaves beside all that is resident."""
        with self._lock:
            return self.budget_bytes - sum(self._used.values())

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
        """Makes an entry resident and drops others until it fits.

        Args:
            evict: Whether others may be dropped for it.
            needs: Entries that this one holds on to: used whenever it is, and when one of them goes, it goes too. One that
                has been dropped meanwhile is ignored.

        Raises:
            ServiceError: It does not fit, even with nothing else resident but what it needs and what is pinned; or beside what is
                resident, where nothing may be dropped. Then nothing was dropped, but for an entry of that key.
        """
        evicted: list[str] = []
        with self._lock:
            self._forget(key, [])
            present = tuple(need for need in dict.fromkeys(needs) if need in self._entries)
            self._check(size_bytes, kind, present)
            self._catch_up()
            if not evict and sum(self._used.values()) + size_bytes > self.budget_bytes:
                raise no_room(size_bytes)
            for need in present:
                self._touch(need)
            held = self._closure([*present, *self._pinned()])
            while sum(self._used.values()) + size_bytes > self.budget_bytes:
                self._forget(next(entry for entry in self._entries if entry not in held), evicted)
            while evict and len(self._entries) >= self._most_entries:
                oldest = next((entry for entry in self._entries if entry not in held), None)
                if oldest is None:
                    break
                self._forget(oldest, evicted)
            all_needs: dict[Hashable, _Entry] = {}
            for need in present:
                all_needs |= {**self._entries[need].all_needs, need: self._entries[need]}
            entry = _Entry(kind, value, size_bytes, present, all_needs, used=next(self._uses))
            self._latest = self._entries[key] = entry
            self._misses[kind] += 1
            for need in present:
                self._entries[need].needed_by.add(key)
            self._used[kind] += size_bytes
        for dropped in evicted:
            self._on_evict(dropped)

    def check(self, size_bytes: int, kind: str, needs: Mapping[Hashable, int] = _NOTHING) -> None:
        """Raises ServiceError where something of this size cannot be resident beside what it needs, and what is pinned.

        Args:
            size_bytes: Its own size.
            kind: What it is, for the message.
            needs: Entries that it needs, and the bytes that each will have where it is not resident yet.
        """
        with self._lock:
            absent = sum(size for key, size in needs.items() if key not in self._entries)
            self._check(size_bytes + absent, kind, [key for key in needs if key in self._entries])

    def _check(self, size_bytes: int, kind: str, present: Sequence[Hashable]) -> None:
        needed = self._closure(present)
        size_bytes += self._bytes(needed)
        if size_bytes > self.budget_bytes:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "MEMORY_BUDGET",
                f"{kind} of {size_bytes} bytes, with what it needs, is larger than the server's memory budget of {self.budget_bytes} bytes: "
                "raise `hvpd serve --memory-budget`",
            )
        pinned = self._bytes(self._closure(self._pinned()) - needed)
        if size_bytes + pinned > self.budget_bytes:
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "PINNED",
                f"{kind} of {size_bytes} bytes, with what it needs, does not fit beside {pinned} bytes that are pinned, in the server's "
                f"memory budget of {self.budget_bytes} bytes: unpin points, or raise `hvpd serve --memory-budget`",
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
                    self.put(key, kind, value, size_bytes, needs=needs, evict=evict)
                finally:
                    with self._lock:
                        self._loading.pop(key, None)
        return value

    # Users

    def join(self, key: Hashable, user: str) -> None:
        """Makes an entry a user's, too, who leaves others where that is more than it may have. Not resident: nothing."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return
            entry.users.add(user)
            self._joined[user].add(key)
            evicted = self._fit(user, key)
        for dropped in evicted:
            self._on_evict(dropped)

    def had_bytes(self, user: str) -> int:
        """What a user has."""
        with self._lock:
            return self._bytes({part for key in self._joined.get(user, ()) for part in self._had(key)})

    def check_user(self, user: str, size_bytes: int, kind: str, needs: Mapping[Hashable, int] = _NOTHING) -> None:
        """Raises ServiceError where a user may not have something of this size, whatever else it leaves; see `check`."""
        limit = self._limit_of(user)
        if limit is None:
            return
        with self._lock:
            present = self._closure(key for key in needs if key in self._entries)
            size_bytes += sum(size for key, size in needs.items() if key not in self._entries) + self._bytes(present)
            pinned = {part for key in self._pinned(user) for part in self._had(key)}
            beside = self._bytes(pinned - present)
        if size_bytes + beside > limit:
            pins = f" beside {beside} bytes that are pinned" if beside else ""
            raise ServiceError(
                Code.RESOURCE_EXHAUSTED,
                "TENANT_MEMORY",
                f"{kind} of {size_bytes} bytes, with what it needs, is more than tenant {user} may have on the device{pins}, which "
                f"is {limit} bytes: ask who operates the server for more",
                {"tenant": user},
            )

    def users(self, key: Hashable) -> set[str]:
        """Whose an entry is."""
        with self._lock:
            entry = self._entries.get(key)
            return set() if entry is None else set(entry.users)

    def fit(self, key: Hashable) -> None:
        """Has all users of an entry leave others, where they have more than they may since something needs it."""
        evicted: list[str] = []
        with self._lock:
            entry = self._entries.get(key)
            for user in tuple(entry.users) if entry is not None else ():
                evicted += self._fit(user, key)
        for dropped in evicted:
            self._on_evict(dropped)

    def _fit(self, user: str, keep: Hashable) -> list[str]:
        """Returns the kinds of what was dropped."""
        limit, evicted = self._limit_of(user), list[str]()
        if limit is None:
            return evicted
        had = {key: self._had(key) for key in self._joined[user]}
        times = collections.Counter(part for parts in had.values() for part in parts)
        excess = self._bytes(times) - limit
        if excess <= 0:
            return evicted
        self._catch_up()
        staying = {keep, *self._pinned(user)}
        for key in sorted(had.keys() - staying, key=lambda key: self._entries[key].used):
            for part in had[key]:
                times[part] -= 1
                excess -= self._entries[part].size_bytes if not times[part] else 0
            self._joined[user].discard(key)
            self._entries[key].users.discard(user)
            if excess <= 0:
                break
        for key in had.keys() - self._joined[user]:
            if key in self._entries and not self._entries[key].users:
                self._forget(key, evicted)
        return evicted

    def _had(self, key: Hashable) -> set[Hashable]:
        """An entry, all that it needs, and all that needs it."""
        return self._closure({key, *self._entries[key].needed_by})

    # What stays

    def pin(self, key: Hashable, seconds: float, user: str = "") -> None:
        """Keeps an entry, and what it needs, until it has not been used for so long; 0 gives up the user's own pin. Not resident: nothing.

        Raises:
            ServiceError: More than half of the budget would be pinned.
        """
        with self._lock:
            self._catch_up()  # Or it would renew the lease when it comes.
            entry = self._entries.get(key)
            if entry is None:
                return
            if not seconds:
                entry.leases.pop(user, None)
                if not entry.leases:
                    self._leased.discard(key)
                return
            size_bytes = self._bytes(self._closure([*self._pinned(), key]))
            if size_bytes > self.budget_bytes // 2:
                raise ServiceError(
                    Code.RESOURCE_EXHAUSTED,
                    "PINNED",
                    f"{size_bytes} bytes would be pinned, half of the server's memory budget of {self.budget_bytes} may be: do "
                    "without, or unpin others",
                )
            entry.leases[user] = seconds
            entry.pinned_until = self._clock() + max(entry.leases.values())
            self._leased.add(key)

    def _pinned(self, user: str | None = None) -> list[Hashable]:
        """What is pinned, by this user or by any."""
        now = self._clock()
        return [
            key
            for key in self._leased
            if self._entries[key].pinned_until > now and (user is None or user in self._entries[key].leases)
        ]

    def give_way(self, keep: Sequence[Hashable]) -> bool:
        """Drops residuals, or, where there are none, all but what is kept and what that needs; returns whether anything went."""
        evicted: list[str] = []
        with self._lock:
            residuals = [key for key, entry in self._entries.items() if entry.kind == "residuals"]
            kept = self._closure([*(key for key in keep if key in self._entries), *self._pinned()])
            for key in residuals or [key for key in self._entries if key not in kept]:
                self._forget(key, evicted)
        for kind in evicted:
            self._on_evict(kind)
        return bool(evicted)

    def drop(self, key: Hashable) -> None:
        """Forgets an entry."""
        with self._lock:
            self._forget(key, [])

    def drop_where(self, condition: Callable[[Any], bool]) -> None:
        """Forgets all entries whose value fulfils a condition."""
        with self._lock:
            for key in [key for key, entry in self._entries.items() if condition(entry.value)]:
                self._forget(key, [])

    def _closure(self, keys: Iterable[Hashable]) -> set[Hashable]:
        """These entries, and all that they need."""
        rest = list(keys)
        held = set(rest)
        while rest:
            new = set(self._entries[rest.pop()].needs) - held
            held |= new
            rest.extend(new)
        return held

    def _bytes(self, keys: Iterable[Hashable]) -> int:
        return sum(self._entries[key].size_bytes for key in keys)

    def _catch_up(self) -> None:
        """Notes the use that was put off, now that the order counts."""
        key, self._put_off = self._put_off, None
        if key is not None:
            self._touch(key)

    def _touch(self, key: Hashable) -> None:
        self._catch_up()
        entries, used = self._entries, next(self._uses)
        entry = entries[key]
        for each, needed in entry.all_needs.items():
            if needed.leases:
                self._renew(each, needed)
            needed.used = used
            entries.move_to_end(each)
        self._latest, entry.used = entry, used
        if entry.leases:
            self._renew(key, entry)
        entries.move_to_end(key)

    def _renew(self, key: Hashable, entry: _Entry) -> None:
        """Keeps what is pinned for as long again; not where that has ended: others may have been pinned in its place."""
        now = self._clock()
        if entry.pinned_until > now:
            entry.pinned_until = now + max(entry.leases.values())
        else:
            entry.leases.clear()
            self._leased.discard(key)

    def _forget(self, key: Hashable, dropped: list[str]) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if self._latest is entry:
            self._latest, self._put_off = _NO_ENTRY, None
        self._leased.discard(key)
        for user in entry.users:
            self._joined[user].discard(key)
        dropped.append(entry.kind)
        self._used[entry.kind] -= entry.size_bytes
        for need in entry.needs:
            if need in self._entries:
                self._entries[need].needed_by.discard(key)
        for dependent in tuple(entry.needed_by):
            self._forget(dependent, dropped)


def no_room(size_bytes: int) -> ServiceError:
    """For what would fit if others were dropped, and is not worth it."""
    return ServiceError(
        Code.RESOURCE_EXHAUSTED,
        "MEMORY_BUDGET",
        f"{size_bytes} bytes more do not fit in the server's memory budget beside what is resident",
    )
