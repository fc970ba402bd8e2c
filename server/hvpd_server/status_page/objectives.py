"""The objectives of all tenants, as an operator sees them.

The page asks every few seconds, and there may be a thousand objectives. So the listing
is read again when its directories change, and an objective when its facts are old.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from hvpd._check import verdicts
from hvpd.v1 import objective_pb2
from hvpd_server import bundle as _admission
from hvpd_server.engine.registration_checks import Checks
from hvpd_server.errors import ServiceError
from hvpd_server.store.quarantine import Quarantine
from hvpd_server.store.store import Store

_FRESH = 30.0
"""Seconds that the facts of an objective are used."""
_AT_ONCE = 20
"""Most objectives to read at once only because they may be damaged."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered objective."""

    digest: str
    names: Sequence[str]
    """Names, sorted; empty if there is none."""
    created: float
    """Time of the registration, in seconds since 1970."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about an objective. If its bundle cannot be read, only `trouble` is set."""

    n: int = 0
    dtype: str = ""
    mode: str = ""
    """Mode of its products, which a custom_vjp can change."""
    precision: str = ""
    check: str = ""
    """"passed", "failed", "undecided", "pending", or empty."""
    check_reason: str = ""
    """Reason of the verdict, in words."""
    trouble: str = ""
    """"quarantined" or "damaged", or empty."""
    reason: str = ""
    """Reason of the trouble, in words."""


class Catalogue:
    """The objectives of one store. Safe for many threads.

    Args:
        store: The store.
        checks: Registration checks.
        quarantine: Objectives that are not served.
        derivation: Returns the derivation of an objective; None if it is not known.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        store: Store,
        checks: Checks,
        quarantine: Quarantine,
        derivation: Callable[[str], objective_pb2.Derivation | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._checks = checks
        self._quarantine = quarantine
        self._derivation = derivation
        self._clock = clock
        self._lock = threading.Lock()
        self._revision = -1
        self._entries: Sequence[Entry] = ()
        self._facts: dict[str, tuple[float, Facts]] = {}

    def entries(self) -> Sequence[Entry]:
        """Return all objectives, those with names first."""
        with self._lock:
            self._store.look()
            revision = self._store.revision
            if revision != self._revision:
                self._entries = self._listed()
                self._revision = revision
                known = {entry.digest for entry in self._entries}
                self._facts = {digest: found for digest, found in self._facts.items() if digest in known}
            return self._entries

    def _listed(self) -> Sequence[Entry]:
        names: dict[str, list[str]] = {}
        created: dict[str, float] = {}
        for name, digest, when in self._store.objectives():
            names.setdefault(digest, []).extend([name] if name else [])
            created[digest] = when / 1e9
        return [Entry(digest, found, created[digest]) for digest, found in names.items()]

    def facts(self, digest: str) -> Facts:
        """Return the facts of an objective."""
        with self._lock:
            return self._look(digest)

    def troubled(self) -> dict[str, Facts]:
        """Return the objectives that cannot be served, as far as is known.

        Each call reads a few objectives that were never read.
        """
        entries = self.entries()
        with self._lock:
            unknown = [entry.digest for entry in entries if entry.digest not in self._facts]
            for digest in unknown[:_AT_ONCE]:
                self._look(digest)
            found = {digest: facts for digest, (_, facts) in self._facts.items() if facts.trouble == "damaged"}
        for entry in entries:
            if why := self._refused(entry.digest):
                found[entry.digest] = dataclasses.replace(self.facts(entry.digest), trouble="quarantined", reason=why)
        return found

    def _refused(self, digest: str) -> str:
        try:
            self._quarantine.check(digest)
        except ServiceError as error:
            return str(error)
        return ""

    def _look(self, digest: str) -> Facts:
        until, found = self._facts.get(digest, (0.0, Facts()))
        now = self._clock()
        if now >= until:
            found = self._read(digest)
            self._facts[digest] = now + (_FRESH if found.check != "pending" else 0.0), found
        return found

    def _read(self, digest: str) -> Facts:
        try:
            bundle = _admission.parse(self._store.read(digest, set_aside=False))
            check = self._checks.overall(digest, bundle)
            derived = self._derivation(digest)
        except (ServiceError, OSError) as error:
            return Facts(trouble="damaged", reason=str(error))
        facts = Facts(
            n=bundle.n,
            dtype=bundle.dtype,
            mode=derived.mode if derived is not None else bundle.mode,
            precision=bundle.precision,
            check=verdicts.verdict_of(check),
            check_reason=check.reason,
        )
        lost = [part for part in _admission.references(bundle) if not self._store.has(part)]
        if lost:
            reason = (
                f"{len(lost)} of its parts are lost on the server's disk, {lost[0][:12]} among them: register it again"
            )
            return dataclasses.replace(facts, trouble="damaged", reason=reason)
        return facts
