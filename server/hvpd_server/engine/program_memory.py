"""The memory of loaded objectives: their compiled programs and descriptions. Knows
neither jax nor gRPC.

When the memory is full, an objective is unloaded: it is forgotten with its points. A
product that uses it keeps its programs alive until the product ends. A client makes the
point again, and the programs come back from the cache.
"""

import collections
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from hvpd_server.errors import Code, ServiceError
from hvpd_server.tenancy.fair_share import Holding, shares, surplus

_KEPT = 15 / 16
"""Share of a full memory that stays loaded, so that not every compile is a reason to
count all objectives.
"""

_REFUSED = 1.0
"""Seconds for which an objective is refused without a new count: each product may ask
for a program.
"""

_PINNED = 1e12
"""Seconds by which pinned points make an objective seem used later: it goes last."""


class Loaded(Protocol):
    """A loaded objective."""

    digest: str
    description_bytes: int
    """Bytes of everything but programs in memory."""

    @property
    def program_bytes(self) -> int:
        """Bytes of the compiled programs in memory."""

    @property
    def used(self) -> float:
        """Time of the last use."""


_Loaded = TypeVar("_Loaded", bound=Loaded)


class ProgramMemory(Generic[_Loaded]):
    """Decides which objectives are unloaded before a program is compiled or loaded.

    Args:
        budget_bytes: Most bytes of all loaded objectives. One program for each compile
            under way may be above it.
        loaded: Returns the objectives that are in memory.
        pinned: Returns the digests of objectives with pinned points.
        unload: Unloads an objective.
        tenants_of: Returns the tenants of an objective, by its digest.
        limit_of: Returns the most bytes of a tenant; None for no limit.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        budget_bytes: int,
        loaded: Callable[[], Sequence[_Loaded]],
        pinned: Callable[[], Collection[str]],
        unload: Callable[[_Loaded], None],
        tenants_of: Callable[[str], Collection[str]],
        limit_of: Callable[[str], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._loaded = loaded
        self._pinned = pinned
        self._unload = unload
        self._tenants_of = tenants_of
        self._limit_of = limit_of
        self._clock = clock
        self._refusals: dict[str, _Refusal] = {}  # By objective.
        self._lock = threading.Lock()
        self._added: collections.Counter[str] = collections.Counter()
        """Bytes that were ever loaded for each tenant; the empty name has all."""
        self._gone: collections.Counter[str] = collections.Counter()
        """How many of them were gone at the last count."""

    def used_bytes(self, tenant: str = "") -> int:
        """Return the bytes of a tenant's loaded objectives; of all if empty."""
        return sum(_bytes_of(each) for each in self._loaded() if not tenant or tenant in self._tenants_of(each.digest))

    def added(self, tenants: Collection[str], size_bytes: int) -> None:
        """Count programs of some tenants, which `loaded` reports already."""
        with self._lock:
            for tenant in {"", *tenants}:
                self._added[tenant] += size_bytes

    def has_room(self, tenants: Collection[str]) -> bool:
        """Return whether neither the memory nor the share of one of the tenants is
        full.
        """
        limits = self._limits(tenants)
        with self._lock:
            return not any(self._added[tenant] - self._gone[tenant] > limit for tenant, limit in limits.items())

    def _limits(self, tenants: Collection[str]) -> dict[str, int]:
        """Return the limits of tenants that have one, and that of all."""
        found = {tenant: limit for tenant in tenants if (limit := self._limit_of(tenant)) is not None}
        return {**found, "": self.budget_bytes}

    def make_room(self, digest: str, tenants: Collection[str]) -> None:
        """Unload objectives, if the memory or the share of a tenant is full, before a
        program of an objective is compiled or loaded for its tenants.

        The tenant that has most loses the objectives that it used longest ago.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED: the objective's own programs are too many.
        """
        if self.has_room(tenants):
            return
        now, last = self._clock(), self._refusals.get(digest)
        if last is not None and now < last.until:
            raise last.error()
        limits, pinned = self._limits(tenants), self._pinned()
        with self._lock:  # Before the count, which may miss programs that come meanwhile.
            added = self._added.copy()
        holdings = [self._holding(each, pinned) for each in self._loaded() if each.digest != digest]
        # Without descriptions, so that each objective may have one program at least.
        own = [
            Holding(each, tenants, each.program_bytes, each.used, stays=True)
            for each in self._loaded()
            if each.digest == digest
        ]
        dropped = set(surplus([*holdings, *own], self.budget_bytes, limits.get, tenants or ("",), _KEPT))
        for each in dropped:
            self._unload(each.entry)
        left = [each for each in [*holdings, *own] if each not in dropped]
        held = shares(left)
        held[""] = sum(each.size_bytes for each in left)
        with self._lock:
            for tenant in limits:
                self._gone[tenant] = added[tenant] - held[tenant]
        for tenant, limit in limits.items():
            if held[tenant] > limit:
                refusal = _Refusal(tenant, held[tenant], limit, now + _REFUSED)
                with self._lock:
                    recent = {key: each for key, each in self._refusals.items() if now < each.until}
                    self._refusals = {**recent, digest: refusal}
                raise refusal.error()

    def _holding(self, each: _Loaded, pinned: Collection[str]) -> Holding[_Loaded]:
        used = each.used + _PINNED * (each.digest in pinned)
        return Holding(each, self._tenants_of(each.digest), _bytes_of(each), used)


def _bytes_of(each: Loaded) -> int:
    return each.program_bytes + each.description_bytes


class _Refusal(NamedTuple):
    """A program that was not compiled for want of room."""

    tenant: str
    used: int
    limit: int
    until: float
    """Time until which the objective's other programs are refused, too."""

    def error(self) -> ServiceError:
        whose = f"of tenant {self.tenant}" if self.tenant else "of all tenants"
        return ServiceError(
            Code.RESOURCE_EXHAUSTED,
            "TENANT_PROGRAMS" if self.tenant else "PROGRAM_MEMORY",
            f"Compiled programs {whose} take {self.used} bytes of memory, and {self.limit} are allowed. The objectives that may be "
            "unloaded are unloaded, so this program is not compiled. Multiply in fewer block widths, or by fewer blocks, operators and "
            "precisions, or ask the server's operator for more.",
            {"tenant": self.tenant} if self.tenant else {},
        )
