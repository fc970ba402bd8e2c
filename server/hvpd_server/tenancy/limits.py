"""Limits: of each device, and of each tenant."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

ALL_TENANTS = "*"
"""Key of the limits of every tenant that has no value of its own."""


@dataclasses.dataclass(frozen=True)
class TenantLimits:
    """Limits of one tenant; None is no limit."""

    vectors_per_second: float | None = None
    """Vectors multiplied in a second; each new point counts as one."""
    vectors_in_flight: int | None = None
    """Vectors that wait for the device, or are being multiplied. A single product may
    be wider.
    """
    device_share: float | None = None
    """Seconds of device time in a second, on all devices, averaged over some seconds.
    """
    resident_bytes: int | None = None
    """Bytes of points, of their residuals, and of their data, on each device."""
    stored_bytes: int | None = None
    """Bytes of blobs, names and registrations in the store."""
    transit_bytes: int | None = None
    """Bytes of vectors and answers in the host's memory. One product may be larger."""
    program_bytes: int | None = None
    """Bytes of compiled programs in the host's memory, and of their files in the cache.
    """

    def __bool__(self) -> bool:
        return self is not _NONE and self != _NONE


_NONE = TenantLimits()

FIELDS: Mapping[str, type] = {
    name: kind for name, hint in get_type_hints(TenantLimits).items() for kind in get_args(hint)[:1]
}
"""Names of limits, with their types."""


Said = Mapping[str, float | int | None]
"""Values of a tenant's own limits by name; None is no limit. A missing name means the
limit of `ALL_TENANTS`.
"""


def combined(own: Said, general: Said) -> TenantLimits:
    """Return a tenant's limits: its own, and the general limits for the rest."""
    limits: Mapping[str, Any] = {**general, **own}
    return TenantLimits(**limits)


def parse(entry: object) -> Said:
    """Return the limits of a JSON object if it is valid; else raise ValueError."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"the limits of a tenant must be an object, got {entry!r}")  # noqa: TRY004 - one kind of error for a file
    if unknown := sorted(entry.keys() - FIELDS):
        raise ValueError(f"unknown limit {', '.join(map(repr, unknown))}; the limits are {', '.join(FIELDS)}")
    return {name: None if value is None else check(name, value) for name, value in entry.items()}


def describe(limits: Mapping[str, Said]) -> list[list[str]]:
    """Return a table for people, titles first; "-" means the limit of `ALL_TENANTS`."""
    titles = ["TENANT", *(name.upper() for name in FIELDS)]
    rows = [
        [tenant, *("-" if name not in said else "none" if said[name] is None else str(said[name]) for name in FIELDS)]
        for tenant, said in sorted(limits.items())
    ]
    return [titles, *rows]


def check(name: str, value: object) -> float | int:
    """Return a limit if it is valid; else raise ValueError."""
    kinds: tuple[type, ...] = (int,) if FIELDS[name] is int else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not (0 < value < math.inf):  # type: ignore[operator]
        what = "a whole number from 1" if FIELDS[name] is int else "a number above 0"
        raise ValueError(f"{name} must be {what}, got {value!r}")
    return value  # type: ignore[return-value]


def no_limits(tenant: str) -> TenantLimits:
    """Return no limits, for every tenant."""
    return _NONE


def equal_weights(tenant: str) -> float:
    """Return weight 1, for every tenant."""
    return 1.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of each device."""

    memory_budget_bytes: int
    """Bytes of data, points and residuals on the device."""
    max_block_width: int
    """Most vectors in a launch, a power of two."""
    max_pending: int
    """Most vectors that wait for the device."""
    max_queue_delay: float = 0.0
    """Seconds that a block waits for more vectors while the device is free."""
    max_launches: int | None = None
    """Most launches in flight on a device. None: 2 if it copies while it computes, else
    1.
    """
    tenants: Callable[[str], TenantLimits] = no_limits
    """Returns a tenant's limits. Must be quick, and not raise."""
    program_bytes: int = 4 << 30
    """Bytes of compiled programs in the host's memory, of all objectives."""
    cache_bytes: int = 16 << 30
    """Bytes of compiled programs on the disk."""
    weights: Callable[[str], float] = equal_weights
    """Returns a tenant's weight, more than 0. Must be quick, and not raise."""
