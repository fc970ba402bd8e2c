"""What may be used: of each device, and by each tenant; and how many vectors and how much device time each has used. Knows no gRPC, no jax.

What is resident is counted by _residency, what is stored by _owners: both ask here for nothing but the limit.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from hvpd_server._errors import Code, ServiceError

EVERYBODY = "*"
"""Whose limits are those of all tenants of whom nothing else is said."""

RATE_SECONDS = 1.0
"""Of vectors that may come at once."""

DEVICE_SECONDS = 10.0
"""Of a tenant's share of device time that may be used at once."""

_SHORTEST = 0.001
"""Seconds: nobody is told to come back sooner."""


@dataclasses.dataclass(frozen=True)
class TenantLimits:
    """What one tenant may use; None is as much as there is."""

    vectors_per_second: float | None = None
    """Vectors that are multiplied; a point that is made counts as one."""
    vectors_in_flight: int | None = None
    """Vectors that wait for the device, or are being multiplied. One product may be wider."""
    device_share: float | None = None
    """Seconds of device time in a second, on the average over some; of several devices all count."""
    resident_bytes: int | None = None
    """Bytes of points, of their residuals, and of the data that they need, on each device."""
    stored_bytes: int | None = None
    """Bytes of blobs in the store."""

    def __bool__(self) -> bool:
        return self is not _NONE and self != _NONE


_NONE = TenantLimits()

FIELDS: Mapping[str, type] = MappingProxyType(
    {
        "vectors_per_second": float,
        "vectors_in_flight": int,
        "device_share": float,
        "resident_bytes": int,
        "stored_bytes": int,
    }
)
"""The names of limits, and what they are."""


Said = Mapping[str, float | int | None]
"""What is said of a tenant's limits, by their names; None: there is none. What is not said is as for everybody."""


def combined(own: Said, everybodys: Said) -> TenantLimits:
    """What holds for a tenant."""
    limits: Mapping[str, Any] = {**everybodys, **own}
    return TenantLimits(**limits)


def parse(entry: object) -> Said:
    """What a JSON object says, or ValueError."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"limits of a tenant are an object, got {entry!r}")  # noqa: TRY004 - one kind of error for a file
    if unknown := sorted(entry.keys() - FIELDS):
        raise ValueError(f"no limit is called {', '.join(map(repr, unknown))}; there are {', '.join(FIELDS)}")
    return {name: None if value is None else check(name, value) for name, value in entry.items()}


def describe(limits: Mapping[str, Said]) -> list[list[str]]:
    """A table for people, its titles first: "-" is as for everybody."""
    titles = ["TENANT", *(name.upper() for name in FIELDS)]
    rows = [
        [tenant, *("-" if name not in said else "none" if said[name] is None else str(said[name]) for name in FIELDS)]
        for tenant, said in sorted(limits.items())
    ]
    return [titles, *rows]


def check(name: str, value: object) -> float | int:
    """A limit, or ValueError."""
    kinds: tuple[type, ...] = (int,) if FIELDS[name] is int else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not (0 < value < math.inf):  # type: ignore[operator]
        what = "a whole number from 1" if FIELDS[name] is int else "a number above 0"
        raise ValueError(f"{name} is {what}, got {value!r}")
    return value  # type: ignore[return-value]


def no_limits(tenant: str) -> TenantLimits:
    """Where nothing is said of anybody."""
    return _NONE


def equal_weights(tenant: str) -> float:
    """Of tenants of whom nothing is said."""
    return 1.0


@dataclasses.dataclass(frozen=True)
class Limits:
    """What may be used of each device."""

    memory_budget_bytes: int
    """For data, points and residuals on the device."""
    max_block_width: int
    """Most vectors in a launch; a power of two."""
    max_pending: int
    """Most vectors that wait for the device."""
    max_queue_delay: float = 0.0
    """Seconds for which a block that could be wider waits for more while the device is free."""
    max_launches: int | None = None
    """Most launches in flight on a device; without it 2 where it copies while it computes, else 1."""
    tenants: Callable[[str], TenantLimits] = no_limits
    """Of tenants. Must be quick, and not raise."""
    weights: Callable[[str], float] = equal_weights
    """Of tenants, more than 0: they share the device in this proportion. Must be quick, and not raise."""


class Meters:
    """How much of its limits each tenant has used. Safe for many threads.

    Args:
        limits_of: The limits of a tenant, as they are now; quick.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, limits_of: Callable[[str], TenantLimits] = no_limits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits_of = limits_of
        self._clock = clock
        self._lock = threading.Lock()
        self._meters: dict[str, Meter] = {}

    def of(self, tenant: str) -> "Meter | None":
        """That of a tenant; None where nothing limits what it multiplies."""
        limits = self._limits_of(tenant)
        if not limits:
            return None
        with self._lock:
            found = self._meters.get(tenant)
            if found is None:
                found = self._meters[tenant] = Meter(tenant, self._clock)
        found.limits = limits
        return found


class Meter:
    """What one tenant has used.

    Args:
        tenant: Who.
        clock: Seconds, monotonic.
    """

    def __init__(self, tenant: str, clock: Callable[[], float]) -> None:
        self.limits = _NONE
        """As they are now."""
        self._tenant = tenant
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight = 0
        self._rate = _Bucket(RATE_SECONDS)
        self._device = _Bucket(DEVICE_SECONDS)

    @property
    def in_flight(self) -> int:
        """Vectors that wait for the device, or are being multiplied."""
        return self._in_flight

    def begin(self, columns: int) -> None:
        """Counts vectors that are to be multiplied; `end` must follow.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED, with the time after which to try again: a limit is used up.
        """
        limits, now = self.limits, self._clock()
        with self._lock:
            most = limits.vectors_in_flight
            if most is not None and self._in_flight and self._in_flight + columns > most:
                raise self._refusal(
                    "TENANT_IN_FLIGHT", f"has {self._in_flight} vectors in flight, and may have {most}", 0.02
                )
            wait = self._device.wait(limits.device_share, now)
            if wait:
                raise self._refusal(
                    "TENANT_DEVICE_TIME", f"has used its share of device time, which is {limits.device_share:g}", wait
                )
            wait = self._rate.wait(limits.vectors_per_second, now)
            if wait:
                raise self._refusal(
                    "TENANT_RATE",
                    f"may have {limits.vectors_per_second:g} vectors a second multiplied, and had them",
                    wait,
                )
            self._rate.spend(columns)
            self._in_flight += columns

    def end(self, columns: int, device_seconds: float, *, answered: bool = True) -> None:
        """Counts that they are answered, and the device time that was theirs; what was not answered is given back."""
        with self._lock:
            self._in_flight -= columns
            self._device.spend(device_seconds)
            if not answered:
                self._rate.spend(-columns)

    def _refusal(self, reason: str, what: str, wait: float) -> ServiceError:
        return ServiceError(
            Code.RESOURCE_EXHAUSTED,
            reason,
            f"tenant {self._tenant} {what}: try again in {wait:.3g} s, or ask who operates the server for more",
            {"tenant": self._tenant},
            retry_after=wait,
        )


class _Bucket:
    """An allowance that grows with time, up to what some seconds give; it may be overdrawn by the last that is taken from it.

    So what is taken at once may be any amount, and is waited for afterwards.

    Args:
        seconds: Whose growth it holds.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._level = math.inf  # Full, whatever the rate.
        self._time = -math.inf

    def wait(self, rate: float | None, now: float) -> float:
        """Seconds until something is left, where the allowance grows by so much a second; None: as much as anybody likes."""
        if rate is None:
            self._level = math.inf
            return 0.0
        most = self._seconds * rate
        grown = self._level + rate * (now - self._time) if self._level < math.inf else most
        self._level, self._time = min(grown, most), now
        return 0.0 if self._level > 0 else max(-self._level / rate, _SHORTEST)

    def spend(self, amount: float) -> None:
        """Takes from it."""
        self._level -= amount
