"""A lock for servers that share nothing but an object store: a lease.

The lock is a file. A server takes it by a conditional write of its own text, and gives
it back by writing nothing. If the file does not change for `SECONDS`, its holder is
gone, and another server takes it by a conditional write in place of that version. Only
the own monotonic clock counts, never the time of another machine.

A holder renews the lease before its writes (`keep`). If another server has taken it
meanwhile, that fails, and the holder changes nothing any more. A write has limits of
time, so it ends before another server may take the lease:

    _BEGIN_SECONDS + 2 * WRITE_SECONDS < SECONDS

Only a server that is stopped between a renewal and its write can write later, and a
request that the object store carries out after it was given up.
"""

import contextlib
import secrets
import threading
import time

from hvpd_server.errors import Code, ServiceError
from hvpd_server.store.exclusion import Exclusion, busy
from hvpd_server.store.objects import Objects

KEY = "lock"

SECONDS = 20.0
"""Seconds without a change after which the holder counts as gone."""

WRITE_SECONDS = 7.0
"""Most seconds of a write with its retries. It may ask for credentials first, which
takes as long at most.
"""

_RENEW_SECONDS = 4.0
"""Seconds after which a holder renews its lease before the next write."""

_BEGIN_SECONDS = 5.0
"""Most seconds from the beginning of a renewal to the beginning of the next write."""

_POLL_SECONDS = 0.1
"""Seconds between two looks at a lease that another server holds."""


class Lease:
    """The lock of one store, for one server. A thread can take it several times.

    Args:
        objects: The files of the store. They must have conditional writes.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._exclusion = Exclusion(objects.name, self._take, self._give_back)
        self._holder = 0
        self._tag = ""
        self._renewed = 0.0

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock.

        Raises:
            ServiceError: UNAVAILABLE: another server holds it for too long.
        """
        return self._exclusion.held()

    def _take(self, ends: float) -> None:
        ends += SECONDS  # So that a lease whose holder is gone can be taken.
        mine, seen, since = secrets.token_hex(16).encode(), "", 0.0
        while True:
            found = self._objects.read(KEY)
            content, tag = found if found is not None else (b"", None)
            now = time.monotonic()
            if tag != seen:
                seen, since = tag or "", now
            if not content or now - since > SECONDS:
                taken = self._objects.replace(KEY, mine, tag)
                if taken is not None:
                    self._tag, self._renewed, self._holder = taken, now, threading.get_ident()
                    return
            if now > ends:
                raise busy(self._objects.name)
            time.sleep(_POLL_SECONDS)

    def _give_back(self) -> None:
        self._holder = 0
        self._objects.replace(KEY, b"", self._tag)

    def keep(self) -> None:
        """Renew the lease before a write, if this thread holds it.

        Raises:
            ServiceError: UNAVAILABLE: another server has taken it, or the renewal took
                too long.
        """
        if self._holder != threading.get_ident() or time.monotonic() - self._renewed < _RENEW_SECONDS:
            return
        now = time.monotonic()
        self._holder = 0  # The renewal is a write, too.
        taken = self._objects.replace(KEY, secrets.token_hex(16).encode(), self._tag)
        if taken is None:
            raise busy(self._objects.name)
        self._tag, self._renewed, self._holder = taken, now, threading.get_ident()
        if time.monotonic() - now > _BEGIN_SECONDS:
            raise ServiceError(
                Code.UNAVAILABLE,
                "STORE_AWAY",
                f"the store {self._objects.name} took {time.monotonic() - now:.0f} s for one write, and a change allows "
                f"{_BEGIN_SECONDS:g} s: the change was not completed; try again later",
                retry_after=1.0,
            )
