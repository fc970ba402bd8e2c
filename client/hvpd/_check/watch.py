"""Warns about an objective whose check at registration did not pass.

The server checks in the background, so the verdict may come while a solver runs.
"""

import threading
import time
from collections.abc import Callable

from hvpd._check.verdicts import Item, RegistrationCheck
from hvpd._warnings import CurvatureWarning, warn

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two questions for a verdict: at first, and at most."""

_BAD = ("failed", "undecided")

_REMEDY = (
    "Call objective.check(x) at the x of your solve, and see docs/how-to/warnings-and-progress.md. Usual causes are a kink "
    "(abs, sqrt or a norm at 0), a custom derivative rule, half precision inside of the function, NaN in the data, and numbers "
    "beyond the dtype"
)


class Watch:
    """The check of one objective, as one client knows it.

    Args:
        label: Name of the objective, for the warning.
        found: The check as the server told it with the objective.
        ask: Asks the server once; returns None if it does not answer.
        warned: Whether the client has warned about this objective already.
    """

    def __init__(
        self,
        label: str,
        found: RegistrationCheck,
        ask: Callable[[], RegistrationCheck | None],
        *,
        warned: bool = False,
    ) -> None:
        self.found = found
        """The latest known check."""
        self.warned = warned
        """Whether the client has warned about this objective."""
        self.used = False
        """Whether the objective was used."""
        self._label = label
        self._ask = ask
        self._lock = threading.Lock()
        self._pause = _FIRST_PAUSE
        self._next = 0.0

    @property
    def over(self) -> bool:
        """Whether there is nothing more to look for."""
        return self.warned or self.found.verdict not in ("pending", *_BAD)

    def look(self, *, now: bool = False) -> None:
        """Warn if the check failed or is undecided. Ask the server if it is pending.

        Args:
            now: Whether to ask even if the last question was a moment ago.
        """
        if not self._lock.acquire(blocking=False):  # Another thread looks.
            return
        try:
            self.used = True
            if self.found.verdict == "pending" and (now or time.monotonic() >= self._next):
                self.found = self._ask() or self.found
                self._next = time.monotonic() + self._pause
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            if self.warned or self.found.verdict not in _BAD:
                return
            self.warned = True
        finally:
            self._lock.release()
        warn(message(self._label, self.found), CurvatureWarning)


def message(label: str, found: RegistrationCheck) -> str:
    """Return the warning: the reason or the items that did not pass, and the remedy."""
    why = found.reason or "; ".join(_item(item) for item in found.items if item.verdict.lower() == found.verdict)
    if found.verdict == "failed":
        said = f"products of objective {label} are wrong at the x of its registration"
    else:
        said = f"the server cannot tell whether products of objective {label} are right at the x of its registration"
    return f"{said}: {why}. {_REMEDY}."


def _item(item: Item) -> str:
    if item.passed is None:
        return f"{item.name} is undecided ({item.meaning})"
    return f"{item.name} is {item.measured:.2g}, at most {item.threshold:.2g} passes ({item.meaning})"
