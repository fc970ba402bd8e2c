"""What objectives there are and how each is, as an operator sees them: all tenants'. Looks at the store and changes nothing there.

Who looks does so every few seconds, and there may be a thousand of them. So the listing is read again when its directories have
changed, and an objective when what is known of it is old.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from hvpd import _check
from hvpd_server import _admission
from hvpd_server._checks import Checks
from hvpd_server._errors import ServiceError
from hvpd_server._quarantine import Quarantine
from hvpd_server._store import Store

_FRESH = 30.0
"""Seconds for which what is known of an objective is taken to be so."""
_SETTLED = 1_000_000_000
"""Nanoseconds after which another change of a directory has another time, on every file system."""
_AT_ONCE = 20
"""Most objectives that are read for no other reason than that they might be damaged."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered objective."""

    digest: str
    names: Sequence[str]
    """Sorted; empty where it has none."""
    created: float
    """Seconds since 1970."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of one. Of a bundle that cannot be read there is the trouble alone."""

    n: int = 0
    dtype: str = ""
    mode: str = ""
    precision: str = ""
    check: str = ""
    """"passed", "failed", "undecided", "pending", or empty."""
    check_reason: str = ""
    """Why nothing was found, in words."""
    trouble: str = ""
    """"quarantined" or "damaged", or empty."""
    reason: str = ""
    """Of the trouble."""


class Catalogue:
    """The objectives of one store. Safe for many threads.

    Args:
        store: Where they are.
        checks: How they were found.
        quarantine: Which are not served any more.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, store: Store, checks: Checks, quarantine: Quarantine, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._checks = checks
        self._quarantine = quarantine
        self._clock = clock
        self._lock = threading.Lock()
        self._version: tuple[int, ...] | None = None
        self._entries: Sequence[Entry] = ()
        self._facts: dict[str, tuple[float, Facts]] = {}

    def entries(self) -> Sequence[Entry]:
        """All of them, those with names first."""
        with self._lock:
            began = time.time_ns()
            version = tuple((self._store.root / part).stat().st_mtime_ns for part in ("names", "objectives"))
            if version != self._version:
                self._entries = self._listed()
                self._version = version if began - max(version) > _SETTLED else None
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
        """Of one of them."""
        with self._lock:
            return self._look(digest)

    def troubled(self) -> dict[str, Facts]:
        """Those that cannot be served, as far as is known: each time a few are looked at that never were."""
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
        except (ServiceError, OSError) as error:
            return Facts(trouble="damaged", reason=str(error))
        facts = Facts(
            n=bundle.n,
            dtype=bundle.dtype,
            mode=bundle.mode,
            precision=bundle.precision,
            check=_check.verdict_of(check),
            check_reason=check.reason,
        )
        lost = [part for part in _admission.references(bundle) if not self._store.has(part)]
        if lost:
            reason = (
                f"{len(lost)} of its parts are lost on the server's disk, {lost[0][:12]} among them: register it again"
            )
            return dataclasses.replace(facts, trouble="damaged", reason=reason)
        return facts
