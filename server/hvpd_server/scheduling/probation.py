"""Probation: after a crash, the objectives that may have caused it run one at a time,
until the cause is clear.

Each product, point and load of a suspect takes the turn of its objective. Work of all
other objectives takes no turn and does not wait. Knows no jax.
"""

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from hvpd_server.errors import Code, ServiceError

_log = logging.getLogger(__name__)

_MIN_SECONDS = 60.0
"""Seconds on probation before a suspect can be cleared: clients repeat a request that
crashed within seconds.
"""

_LOAD_SECONDS = 30.0
"""Longest wait of a load for its turn, in seconds. Then it goes on without, because a
launch that has the turn may wait for a thread that loads.
"""

OnWait = Callable[[Callable[[], None]], object]
"""Called with a function that cancels the wait."""


class Probation:
    """The turns of objectives on probation.

    Args:
        suspects: Digests of the objectives on probation.
        everyone: Whether all objectives are on probation. Then none is cleared before
            the end.
        seconds: Seconds until probation ends.
        label: Gives an objective's name by digest, for the log.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        suspects: Iterable[str] = (),
        *,
        everyone: bool = False,
        seconds: float = 0.0,
        label: Callable[[str], str] = lambda digest: digest[:12],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._suspects = set(suspects)
        self._everyone = everyone
        self._label = label
        self._clock = clock
        self._clears = clock() + _MIN_SECONDS
        self._ends = clock() + seconds
        self._lock = threading.Lock()
        self._line: collections.deque[_Ticket] = collections.deque()
        self._holder = ""
        self._held = 0  # Pieces of work that share the holder's turn.
        self._on = seconds > 0 and (everyone or bool(self._suspects))
        if self._on:
            _log.info(
                "on probation for at most %.0f s: %s. They run one at a time, because the server crashed while several ran",
                seconds,
                "all objectives" if everyone else ", ".join(sorted(map(label, self._suspects))),
            )

    def suspect(self, digest: str) -> bool:
        """Return whether an objective is on probation."""
        if not self._on:
            return False
        if self._clock() >= self._ends:
            self._end()
            return False
        return self._everyone or digest in self._suspects

    def turn(
        self,
        digest: str,
        *,
        load: bool = False,
        deadline: float = float("inf"),
        on_wait: OnWait = lambda cancel: None,
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context in which work of an objective runs in its turn. Work of an
        objective that is not on probation runs at once.

        Args:
            digest: Digest of the objective.
            load: Whether an executable is loaded. It shares a turn of its objective,
                because the launch may wait for it.
            deadline: When the caller gives up, on the clock.
            on_wait: Called with a function that cancels the wait.

        Raises:
            ServiceError: The deadline passed, or the caller cancelled.
        """
        return self._turn(digest, load, deadline, on_wait) if self.suspect(digest) else contextlib.nullcontext()

    @contextlib.contextmanager
    def _turn(self, digest: str, load: bool, deadline: float, on_wait: OnWait) -> Iterator[None]:
        holds = self._take(digest, load, deadline, on_wait)
        try:
            yield
            if not load:
                self._clear(digest)
        finally:
            if holds:
                with self._lock:
                    self._held -= 1
                    if not self._held:
                        self._holder = ""
                        self._advance()

    def _take(self, digest: str, load: bool, deadline: float, on_wait: OnWait) -> bool:
        """Wait for the turn. Return whether this work holds it; if not, probation has
        ended, or a load has waited too long.
        """
        ticket = _Ticket(digest)
        with self._lock:
            if load and self._holder == digest:
                self._held += 1
                return True
            self._line.append(ticket)
            self._advance()
        if not ticket.called.is_set():
            on_wait(ticket.called.set)
            until = min(deadline, self._ends, self._clock() + _LOAD_SECONDS if load else float("inf"))
            ticket.called.wait(min(max(until - self._clock(), 0.0), threading.TIMEOUT_MAX))
        with self._lock:
            if ticket.passed:
                return ticket.holds
            self._line.remove(ticket)
            self._advance()
        if ticket.called.is_set():
            raise ServiceError(Code.CANCELLED, "CANCELLED", "the caller cancelled before the objective's turn came")
        if deadline <= self._clock():
            raise ServiceError(
                Code.DEADLINE_EXCEEDED,
                "DEADLINE_EXCEEDED",
                f"the deadline passed before the turn of objective {digest[:12]} came: the server crashed while it ran beside others, "
                "and runs these one at a time until it knows which of them crashed it. Try again later",
            )
        return False

    def _advance(self) -> None:
        """Let all work go on that may. Call this with the lock held."""
        line, self._line = self._line, collections.deque()
        for ticket in line:
            if not self.suspect(ticket.digest):
                ticket.go(holds=False)
            elif not self._line and self._holder in ("", ticket.digest):
                self._holder = ticket.digest
                self._held += 1
                ticket.go(holds=True)
            else:
                self._line.append(ticket)

    def _clear(self, digest: str) -> None:
        """Take an objective off probation, if its work ended without a crash after
        `_MIN_SECONDS`.
        """
        if not self._on or self._everyone or self._clock() < self._clears:
            return
        with self._lock:
            if digest not in self._suspects:
                return
            self._suspects.discard(digest)
            self._advance()
        _log.info("objective %s is off probation", self._label(digest), extra={"fields": {"objective": digest}})
        if not self._suspects:
            self._end()

    def _end(self) -> None:
        if self._on:
            self._on = False
            _log.info("probation has ended")


class _Ticket:
    """Work that waits for its turn."""

    __slots__ = ("called", "digest", "holds", "passed")

    def __init__(self, digest: str) -> None:
        self.digest = digest
        self.called = threading.Event()
        self.passed = False
        self.holds = False

    def go(self, *, holds: bool) -> None:
        self.holds, self.passed = holds, True
        self.called.set()
