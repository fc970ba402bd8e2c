"""Objectives that ended the server, or had it restarted: counted, and in the end not served any more."""

import dataclasses
import datetime
import json
import os
from pathlib import Path

from hvpd import _codec
from hvpd_server._errors import Code, ServiceError

_DIRECTORY = "quarantine"


@dataclasses.dataclass(frozen=True)
class Record:
    """What an objective did."""

    strikes: int
    """How many times."""
    reason: str
    """The last time."""
    time: str
    """When that was, ISO 8601, UTC."""


class Quarantine:
    """The records of a store, a file for each objective, without which it is released.

    Args:
        root: Of the store.
        limit: From how many strikes on an objective is not served.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self._directory = root / _DIRECTORY
        self._limit = limit
        self._quarantined = {digest for digest in self._known() if self._record(digest).strikes >= limit}

    def strike(self, digest: str, reason: str) -> Record:
        """Counts what an objective did; written atomically."""
        if not _codec.is_digest(digest):
            raise ValueError(f"{digest!r} is no digest")
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = Record(self._record(digest).strikes + 1, reason, time)
        self._directory.mkdir(parents=True, exist_ok=True)
        incoming = self._directory / f".{digest}.{os.getpid()}"
        try:
            with incoming.open("w") as file:
                json.dump(dataclasses.asdict(record), file)
                file.flush()
                os.fsync(file.fileno())
            incoming.replace(self._directory / digest)
        finally:
            incoming.unlink(missing_ok=True)
        if record.strikes >= self._limit:
            self._quarantined.add(digest)
        return record

    def release(self, digest: str) -> int:
        """Forgets what an objective did; returns how many times."""
        strikes = self._record(digest).strikes
        (self._directory / digest).unlink(missing_ok=True)
        self._quarantined.discard(digest)
        return strikes

    def check(self, digest: str) -> None:
        """Raises ServiceError where an objective is not to be served."""
        if digest not in self._quarantined:
            return
        if not (self._directory / digest).exists():
            self._quarantined.discard(digest)
            return
        record = self._record(digest)
        raise ServiceError(
            Code.FAILED_PRECONDITION,
            "QUARANTINED",
            f"objective {digest[:12]} is not served any more: {record.reason} ({record.strikes} times, the last at {record.time}). "
            f"Mend it and register it anew, or have the server's operator release it (`hvpd release {digest[:12]}`)",
        )

    def _known(self) -> list[str]:
        try:
            return [found.name for found in self._directory.iterdir() if _codec.is_digest(found.name)]
        except FileNotFoundError:
            return []

    def _record(self, digest: str) -> Record:
        try:
            return Record(**json.loads((self._directory / digest).read_text()))
        except FileNotFoundError:
            return Record(0, "", "")
        except (OSError, ValueError, TypeError) as error:  # Damaged: it was there for a reason.
            return Record(self._limit, f"its record cannot be read ({error})", "an unknown time")
