"""Chooses the entries to evict from a full cache. The tenant with the most bytes loses
entries first, so that no tenant can evict the entries of smaller tenants.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Generic, TypeVar

_Entry = TypeVar("_Entry")


@dataclasses.dataclass(frozen=True, eq=False)
class Holding(Generic[_Entry]):
    """An entry of the cache."""

    entry: _Entry
    tenants: Collection[str]
    """The tenants that have the entry. The entry counts in full for each."""
    size_bytes: int
    used: float
    """Time of the last use. A tenant's least recently used entry is evicted first."""
    stays: bool = False
    """Whether the entry may not be evicted."""


def shares(holdings: Iterable[Holding[_Entry]]) -> collections.Counter[str]:
    """Return the bytes of each tenant. An entry without a tenant counts for the empty
    name.
    """
    found: collections.Counter[str] = collections.Counter()
    for each in holdings:
        for tenant in each.tenants or ("",):
            found[tenant] += each.size_bytes
    return found


def surplus(
    holdings: Sequence[Holding[_Entry]],
    most_bytes: int,
    limit_of: Callable[[str], int | None],
    asking: Collection[str] = (),
    kept: float = 1.0,
) -> list[Holding[_Entry]]:
    """Return the holdings to evict, so that the rest fits.

    First, a tenant over its own limit loses its least recently used entries. Then the
    tenant with the most bytes loses entries, until the rest fits. Tenants with fewer
    bytes than the asking tenant keep their entries.

    Args:
        holdings: All holdings.
        most_bytes: Most bytes of all together.
        limit_of: Most bytes of a tenant; None for no limit.
        asking: The tenants that need room, if any.
        kept: Share of a limit that stays if the limit is exceeded.
    """
    cache = _Cache(holdings)
    least = max((cache.held[tenant] for tenant in asking), default=0)
    for tenant, size in list(cache.held.items()):
        limit = limit_of(tenant) if tenant else None
        while limit is not None and size > limit and cache.held[tenant] > limit * kept and cache.last_used[tenant]:
            cache.drop(tenant)
    full = cache.total > most_bytes
    while full and cache.total > most_bytes * kept:
        held, last_used = cache.held, cache.last_used
        losing = [tenant for tenant in held if last_used[tenant] and (held[tenant] >= least or tenant in asking)]
        if not losing:
            break
        cache.drop(max(losing, key=lambda tenant: (held[tenant], -last_used[tenant][-1].used)))
    return list(cache.evicted.values())


class _Cache(Generic[_Entry]):
    """The holdings, while some of them are evicted."""

    def __init__(self, holdings: Sequence[Holding[_Entry]]) -> None:
        self.held = shares(holdings)
        self.total = sum(each.size_bytes for each in holdings)
        self.evicted: dict[int, Holding[_Entry]] = {}
        self.last_used: dict[str, list[Holding[_Entry]]] = {tenant: [] for tenant in self.held}
        """The evictable holdings of each tenant, latest use first."""
        for each in sorted(holdings, key=lambda each: each.used, reverse=True):
            for tenant in each.tenants or ("",) if not each.stays else ():
                self.last_used[tenant].append(each)

    def drop(self, tenant: str) -> None:
        """Drop the holding that a tenant used longest ago."""
        each = self.last_used[tenant].pop()
        if id(each) in self.evicted:  # Another of its tenants has lost it.
            return
        self.evicted[id(each)] = each
        self.total -= each.size_bytes
        for other in each.tenants or ("",):
            self.held[other] -= each.size_bytes
