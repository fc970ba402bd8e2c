"""What happens when the device itself is out of memory: caches give way, and if that does not help, the sizes are told."""

import logging
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from hvpd_server._errors import ServiceError
from hvpd_server._residency import Residency

_log = logging.getLogger(__name__)

REASON = "DEVICE_MEMORY"
"""Of errors that say so."""

_RETRIES = 2
"""One when residuals have given way, one when the rest has."""

_T = TypeVar("_T")


def relieving(residency: Residency, call: Callable[[], _T], keep: Sequence[Hashable], asked: str) -> _T:
    """What `call` gives; where the device is out of memory, again when caches have given way.

    Args:
        residency: Where residuals give way first, then all that is not kept.
        call: What needs memory.
        keep: Entries that it uses.
        asked: What it asks for, for the message.

    Raises:
        ServiceError: Of `call`; or the device has no memory even so.
    """
    tries = 0
    while True:
        try:
            return call()
        except ServiceError as error:
            if error.reason != REASON:
                raise
            tries += 1
            # What failed holds on to its arrays for as long as there is the error: the next try is after this block.
            if tries > _RETRIES or not given_way(residency, keep, asked):
                raise with_sizes(error, residency, asked) from error


def given_way(residency: Residency, keep: Sequence[Hashable], asked: str) -> bool:
    """Has caches give way; returns whether anything went."""
    gone = residency.give_way(keep)
    if gone:
        _log.warning("the device is out of memory for %s: caches give way", asked)
    return gone


def with_sizes(error: ServiceError, residency: Residency, asked: str) -> ServiceError:
    """The error of a device that is out of memory, with what is resident there, and what was asked for."""
    used = {kind: size for kind, size in residency.used_bytes().items() if size}
    resident = ", ".join(f"{size} bytes of {kind}" for kind, size in used.items()) or "nothing"
    return ServiceError(
        error.code,
        error.reason,
        f"{str(error).rstrip('.')}. Asked for: {asked}. Resident: {resident}, of a memory budget of {residency.budget_bytes} bytes. Where other "
        "programs use the device, lower `hvpd serve --memory-budget`",
        error.metadata | {f"{kind}_bytes": str(size) for kind, size in used.items()},
    )
