"""Quarantine: objectives that crashed the server too often are not served.

A crash is a strike only if one objective ran. If several ran, all of them are on
probation (`scheduling.probation`), and none has a strike.
"""

import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from hvpd._wire import codec
from hvpd_server.errors import Code, ServiceError
from hvpd_server.files import atomic_file

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
        root: Directory of the store.
        limit: Number of strikes from which on an objective is not served.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self._directory = root / _DIRECTORY
        self._limit = limit
        self._quarantined = {digest for digest in self._known() if self._record(digest).strikes >= limit}

    def strike(self, digest: str, reason: str) -> Record:
        """Count a strike of an objective."""
        if not codec.is_digest(digest):
            raise ValueError(f"{digest!r} is no digest")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = Record(self._record(digest).strikes + 1, reason, now)
        self._write(digest, dataclasses.asdict(record))
        if record.strikes >= self._limit:
            self._quarantined.add(digest)
        return record

    def suspect(self, digests: Iterable[str], seconds: float) -> Probation:
        """Put objectives on probation, beside those that are; the time begins anew.

        If one of them is on probation already, put all objectives on it.
        """
        found, before = frozenset(filter(codec.is_digest, digests)), self.probation()
        everyone = before is not None and (before.everyone or bool(before.suspects & found))
        suspects = found | (before.suspects if before is not None else frozenset())
        probation = Probation(suspects, everyone, time.time() + seconds)
        self._write(_PROBATION, {**dataclasses.asdict(probation), "suspects": sorted(suspects)})
        return probation

    def probation(self) -> Probation | None:
        """Return the probation; None if there is none, or its time is over."""
        try:
            found = json.loads((self._directory / _PROBATION).read_text())
            probation = Probation(
                frozenset(map(str, found["suspects"])), bool(found["everyone"]), float(found["until"])
            )
        except (OSError, ValueError, TypeError, KeyError):  # A damaged file: the next crash writes another.
            return None
        return probation if time.time() < probation.until else None

    def end_probation(self) -> None:
        """Take all objectives off probation."""
        with contextlib.suppress(FileNotFoundError):
            (self._directory / _PROBATION).unlink()

    def _write(self, name: str, record: Mapping[str, object]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._directory, mode=0o666) as (file, commit):
            file.write(json.dumps(record).encode())
            commit(self._directory / name)

    def release(self, digest: str) -> int:
        """Forget the strikes of an objective; return their number."""
        strikes = self._record(digest).strikes
        (self._directory / digest).unlink(missing_ok=True)
        self._quarantined.discard(digest)
        return strikes

    def check(self, digest: str) -> None:
        """Raise ServiceError if an objective is not to be served."""
        if digest not in self._quarantined:
            return
        if not (self._directory / digest).exists():
            self._quarantined.discard(digest)
            return
        record = self._record(digest)
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "QUARANTINED",
            f"objective {digest[:12]} is not served any more: {record.reason} ({record.strikes} times, the last at "
            f"{record.time}). Mend it and register it anew, or ask the server's operator to release it "
            f"(`hvpd release {digest[:12]}`)",
        )

    def _known(self) -> list[str]:
        try:
            return [found.name for found in self._directory.iterdir() if codec.is_digest(found.name)]
        except FileNotFoundError:
            return []

    def _record(self, digest: str) -> Record:
        try:
            return Record(**json.loads((self._directory / digest).read_text()))
        except FileNotFoundError:
            return Record(0, "", "")
        except (OSError, ValueError, TypeError) as error:  # A damaged file was there for a reason.
            return Record(self._limit, f"its record cannot be read ({error})", "an unknown time")
