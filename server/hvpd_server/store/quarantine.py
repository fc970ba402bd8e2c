"""Quarantine: objectives that crashed the server too often are not served.

A crash is a strike only if one objective ran. If several ran, all of them are on
probation (`scheduling.probation`), and none has a strike.
"""

import dataclasses
import datetime
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from hvpd._wire import codec
from hvpd_server.errors import Code, ServiceError
from hvpd_server.store.objects import CHANGES, Directory, Objects

_DIRECTORY = "quarantine"
_PROBATION = "probation"


@dataclasses.dataclass(frozen=True)
class Record:
    """The strikes of an objective."""

    strikes: int
    """Number of strikes."""
    reason: str
    """The fault of the objective at the last strike."""
    time: str
    """Time of the last strike, ISO 8601, UTC."""


@dataclasses.dataclass(frozen=True)
class Probation:
    """The objectives that must run one at a time."""

    suspects: frozenset[str]
    """Digests of the objectives that ran when the server crashed."""
    everyone: bool
    """Whether all objectives are on probation: a suspect ran beside others in another
    crash.
    """
    until: float
    """End of the probation, in seconds since 1970."""


class Quarantine:
    """The records of a store: one file for each objective, and one for probation.

    Removing the file of an objective releases it.


    Args:
        where: The store's directory, or its files.
        limit: Number of strikes from which on an objective is not served.
    """

    def __init__(self, where: Path | Objects, limit: int) -> None:
        self._objects = Directory(where) if isinstance(where, Path) else where
        self._limit = limit
        self._known: frozenset[str] = frozenset()
        self.load()

    def load(self) -> None:
        """Find the objectives with strikes, of all servers of the store."""
        self._known = frozenset(filter(codec.is_digest, (entry.name for entry in self._objects.list(_DIRECTORY))))

    def strike(self, digest: str, reason: str) -> Record:
        """Count a strike of an objective."""
        if not codec.is_digest(digest):
            raise ValueError(f"{digest!r} is no digest")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._objects.locked():
            record = Record(self._record(digest).strikes + 1, reason, now)
            self._write(digest, dataclasses.asdict(record))
            self._known |= {digest}
        return record

    def suspect(self, digests: Iterable[str], seconds: float) -> Probation:
        """Put objectives on probation, beside those that are; the time begins anew.

        If one of them is on probation already, put all objectives on it.
        """
        found = frozenset(filter(codec.is_digest, digests))
        with self._objects.locked():
            before = self.probation()
            everyone = before is not None and (before.everyone or bool(before.suspects & found))
            suspects = found | (before.suspects if before is not None else frozenset())
            probation = Probation(suspects, everyone, time.time() + seconds)
            self._write(_PROBATION, {**dataclasses.asdict(probation), "suspects": sorted(suspects)})
        return probation

    def probation(self) -> Probation | None:
        """Return the probation; None if there is none, or its time is over."""
        try:
            found = json.loads(self._objects.get(f"{_DIRECTORY}/{_PROBATION}") or b"")
            probation = Probation(
                frozenset(map(str, found["suspects"])), bool(found["everyone"]), float(found["until"])
            )
        except (OSError, ValueError, TypeError, KeyError):  # A damaged file: the next crash writes another.
            return None
        return probation if time.time() < probation.until else None

    def end_probation(self) -> None:
        """Take all objectives off probation."""
        self._objects.delete(f"{_DIRECTORY}/{_PROBATION}")

    def _write(self, name: str, record: Mapping[str, object]) -> None:
        self._objects.put(f"{_DIRECTORY}/{name}", json.dumps(record).encode())
        self._objects.bump(CHANGES, "")

    def release(self, digest: str) -> int:
        """Forget the strikes of an objective; return their number."""
        with self._objects.locked():
            strikes = self._record(digest).strikes
            self._objects.delete(f"{_DIRECTORY}/{digest}")
            self._known -= {digest}
            self._objects.bump(CHANGES, "")
        return strikes

    def check(self, digest: str) -> None:
        """Raise ServiceError if an objective is not to be served."""
        known = digest in self._known
        if not known and self._objects.quick and codec.is_digest(digest):
            known = self._objects.exists(f"{_DIRECTORY}/{digest}")
        if not known:
            return
        record = self._record(digest)
        if record.strikes < self._limit:
            return
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "QUARANTINED",
            f"objective {digest[:12]} is not served any more: {record.reason} ({record.strikes} times, the last at "
            f"{record.time}). Mend it and register it anew, or ask the server's operator to release it "
            f"(`hvpd release {digest[:12]}`)",
        )

    def _record(self, digest: str) -> Record:
        try:
            content = self._objects.get(f"{_DIRECTORY}/{digest}")
            return Record(0, "", "") if content is None else Record(**json.loads(content))
        except (OSError, ValueError, TypeError) as error:  # A damaged file was there for a reason.
            return Record(self._limit, f"its record cannot be read ({error})", "an unknown time")
