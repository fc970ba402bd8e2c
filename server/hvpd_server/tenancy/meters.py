"""The vectors and the device time that each tenant has used, against its limits.

Resident bytes are counted by `device.residency`, and stored bytes by
`store.tenant_content`.
"""

import threading
import time
from collections.abc import Callable

from hvpd_server.errors import Code, ServiceError
from hvpd_server.tenancy.limits import TenantLimits, no_limits
from hvpd_server.token_bucket import TokenBucket

RATE_SECONDS = 1.0
"""Seconds of a tenant's rate of vectors that may come at once."""

DEVICE_SECONDS = 10.0
"""Seconds of a tenant's share of device time that may be used at once."""

_SHORTEST = 0.001
"""Shortest wait that a refusal gives, in seconds."""


class Meters:
    """The meters of all tenants. Safe for many threads.

    Args:
        limits_of: Returns a tenant's limits as they are now; must be quick.
        clock: Returns seconds, monotonic.
    """

    def __init__(
        self, limits_of: Callable[[str], TenantLimits] = no_limits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits_of = limits_of
        self._clock = clock
        self._lock = threading.Lock()
        self._meters: dict[str, Meter] = {}

    def of(self, tenant: str) -> "Meter | None":
        """Return a tenant's meter; None if the tenant has no limits."""
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
    """The use of one tenant.

    Args:
        tenant: Name of the tenant.
        clock: Returns seconds, monotonic.
    """

    def __init__(self, tenant: str, clock: Callable[[], float]) -> None:
        self.limits = TenantLimits()
        """The tenant's limits, as they are now."""
        self._tenant = tenant
        self._clock = clock
        self._lock = threading.Lock()
        self._in_flight = 0
        self._rate = TokenBucket(RATE_SECONDS)
        self._device = TokenBucket(DEVICE_SECONDS)

    @property
    def in_flight(self) -> int:
        """Vectors that wait for the device, or are being multiplied."""
        return self._in_flight

    def begin(self, columns: int) -> None:
        """Count vectors that are to be multiplied; `end` must follow.

        Raises:
            ServiceError: RESOURCE_EXHAUSTED, with the seconds until a retry: a limit is
                reached.
        """
        limits, now = self.limits, self._clock()
        with self._lock:
            most = limits.vectors_in_flight
            if most is not None and self._in_flight and self._in_flight + columns > most:
                raise self._refusal(
                    "TENANT_IN_FLIGHT", f"has {self._in_flight} vectors in flight, and may have {most}", 0.02
                )
            wait = _wait(self._device, limits.device_share, now)
            if wait:
                raise self._refusal(
                    "TENANT_DEVICE_TIME", f"has used its share of device time, which is {limits.device_share:g}", wait
                )
            wait = _wait(self._rate, limits.vectors_per_second, now)
            if wait:
                raise self._refusal(
                    "TENANT_RATE",
                    f"may have {limits.vectors_per_second:g} vectors a second multiplied, and had them",
                    wait,
                )
            self._rate.spend(columns)
            self._in_flight += columns

    def end(self, columns: int, device_seconds: float, multiplied: int) -> None:
        """Count vectors as done, and the device time that they took.

        Vectors that were not multiplied are given back to the tenant's rate.
        """
        with self._lock:
            self._in_flight -= columns
            self._device.spend(device_seconds)
            self._rate.spend(multiplied - columns)

    def _refusal(self, reason: str, what: str, wait: float) -> ServiceError:
        return ServiceError(
            Code.RESOURCE_EXHAUSTED,
            reason,
            f"tenant {self._tenant} {what}: try again in {wait:.3g} s, or ask the server's operator for more",
            {"tenant": self._tenant},
            retry_after=wait,
        )


def _wait(bucket: TokenBucket, rate: float | None, now: float) -> float:
    """Return the seconds until something is left in a bucket."""
    level = bucket.level(rate, now)
    return 0.0 if rate is None or level > 0 else max(-level / rate, _SHORTEST)
