"""Memory relief: when the device is out of memory, evict values that can be made
again, and repeat the call.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from hvpd_server.device.residency import Residency
from hvpd_server.errors import ServiceError

_log = logging.getLogger(__name__)

REASON = "DEVICE_MEMORY"
"""Reason of the errors of a device that is out of memory."""

_RETRIES = 2
"""Most repetitions: one after residuals are evicted, one after the rest."""

_T = TypeVar("_T")


def with_relief(residency: Residency, call: Callable[[], _T], keep: Sequence[Hashable], asked: str) -> _T:
    """Return the result of `call`. If the device is out of memory, evict residuals,
    then all else, and repeat.

    Args:
        residency: The resident values.
        call: A call that needs memory.
        keep: Keys of the entries that the call uses.
        asked: Description of the call, for the message.

    Raises:
        ServiceError: The error of `call`; if the device is still out of memory, with
            the sizes of the resident values.
    """
    tries = 0
    while True:
        try:
            return call()
        except ServiceError as error:
            if error.reason != REASON:
                raise
            tries += 1
            # The error keeps the arrays of the failed call alive, so the next try is
            # outside of this block.
            if tries > _RETRIES or not relieve(residency, keep, asked):
                raise with_sizes(error, residency, asked) from error


def relieve(residency: Residency, keep: Sequence[Hashable], asked: str) -> bool:
    """Evict values that can be made again. Return whether any was evicted."""
    evicted = residency.relieve(keep)
    if evicted:
        _log.warning("the device is out of memory for %s: caches are evicted", asked)
    return evicted


def with_sizes(error: ServiceError, residency: Residency, asked: str) -> ServiceError:
    """Return an error that adds the request, and the sizes of all that is resident."""
    used = {kind: size for kind, size in residency.used_bytes().items() if size}
    resident = ", ".join(f"{size} bytes of {kind}" for kind, size in used.items()) or "nothing"
    return ServiceError(
        error.code,
        error.reason,
        f"{str(error).rstrip('.')}. Asked for: {asked}. Resident: {resident}, of a memory budget of {residency.budget_bytes} bytes. If other "
        "programs use the device, lower `hvpd serve --memory-budget`",
        error.metadata | {f"{kind}_bytes": str(size) for kind, size in used.items()},
    )
