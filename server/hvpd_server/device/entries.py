"""The entries of a residency, in the order of their use, and what they need.

Knows neither the budget nor the limits of users. `residency` has the lock.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Final


@dataclasses.dataclass(slots=True)
class Entry:
    """A value on the device."""

    kind: str
    value: Any
    size_bytes: int
    needs: tuple[Hashable, ...]
    all_needs: "Mapping[Hashable, Entry]"
    """All entries that this entry needs, directly or indirectly. Each comes after the
    entries that it needs itself. If one of them is dropped, so is this entry.
    """
    needed_by: set[Hashable] = dataclasses.field(default_factory=set)
    leases: dict[str, float] = dataclasses.field(default_factory=dict)
    """By user, the seconds for which the entry is pinned after each use; empty if it is
    not pinned.
    """
    pinned_until: float = 0.0
    used: int = 0
    """Number of the last use: the larger, the later."""
    users: set[str] = dataclasses.field(default_factory=set)


_NONE: Final = Entry("", None, 0, (), {})


class Entries(collections.OrderedDict[Hashable, Entry]):
    """Entries by key, the least recently used first.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._uses = itertools.count(1)
        self.latest = _NONE
        """The entry that was used last."""
        self.leased: set[Hashable] = set()
        """Entries with a pin, which may have ended."""
        self.joined: collections.defaultdict[str, set[Hashable]] = collections.defaultdict(set)
        """By user, the entries that the user joined."""
        self.used_bytes: collections.Counter[str] = collections.Counter()
        """Bytes of the entries, by kind."""
        self.counts: collections.Counter[str] = collections.Counter()
        """Number of entries, by kind."""

    def add(self, key: Hashable, kind: str, value: Any, size_bytes: int, needs: Sequence[Hashable]) -> None:
        """Add an entry, as the one that was used last.

        Args:
            key: The key, which is free.
            kind: The kind.
            value: The value.
            size_bytes: Bytes on the device.
            needs: Keys of entries that this one needs. All of them are here.
        """
        all_needs: dict[Hashable, Entry] = {}
        for need in needs:
            all_needs |= {**self[need].all_needs, need: self[need]}
            self[need].needed_by.add(key)
        entry = Entry(kind, value, size_bytes, tuple(needs), all_needs, used=next(self._uses))
        self.latest = self[key] = entry
        self.used_bytes[kind] += size_bytes
        self.counts[kind] += 1

    def pinned(self, user: str | None = None) -> list[Hashable]:
        """Return the keys that are pinned, by this user or by any."""
        now = self._clock()
        return [
            key for key in self.leased if self[key].pinned_until > now and (user is None or user in self[key].leases)
        ]

    def closure(self, keys: Iterable[Hashable]) -> set[Hashable]:
        """Return these entries, and all that they need."""
        rest = list(keys)
        held = set(rest)
        while rest:
            new = set(self[rest.pop()].needs) - held
            held |= new
            rest.extend(new)
        return held

    def bytes_of(self, keys: Iterable[Hashable]) -> int:
        """Return the bytes of entries."""
        return sum(self[key].size_bytes for key in keys)

    def touch(self, key: Hashable) -> None:
        """Note the use of an entry, and so of all that it needs."""
        entry, used = self[key], next(self._uses)
        for each, needed in entry.all_needs.items():
            if needed.leases:
                self._renew(each, needed)
            needed.used = used
            self.move_to_end(each)
        self.latest, entry.used = entry, used
        if entry.leases:
            self._renew(key, entry)
        self.move_to_end(key)

    def _renew(self, key: Hashable, entry: Entry) -> None:
        """Renew the pin of an entry. A pin that has ended is not renewed: others may
        have been pinned in its place.
        """
        now = self._clock()
        if entry.pinned_until > now:
            entry.pinned_until = now + max(entry.leases.values())
        else:
            entry.leases.clear()
            self.leased.discard(key)

    def forget(self, key: Hashable, dropped: list[str]) -> None:
        """Drop an entry, if it is here, and all that need it. Their kinds are added to
        `dropped`.
        """
        entry = self.pop(key, None)
        if entry is None:
            return
        if self.latest is entry:
            self.latest = _NONE
        self.leased.discard(key)
        for user in entry.users:
            self.joined[user].discard(key)
        dropped.append(entry.kind)
        self.used_bytes[entry.kind] -= entry.size_bytes
        self.counts[entry.kind] -= 1
        for need in entry.needs:
            if need in self:
                self[need].needed_by.discard(key)
        for dependent in tuple(entry.needed_by):
            self.forget(dependent, dropped)
