"""A server's report on an objective: its programs, compilations and rules."""

import dataclasses
from collections.abc import Mapping

from hvpd import _html


@dataclasses.dataclass(frozen=True)
class Choice:
    """The program that multiplies blocks of one width; see `Objective.plan`.

    Example:
        >>> for choice in objective.plan():
        ...     print(choice.width, choice.program, choice.reason)
    """

    width: int
    """Vectors in a launch, a power of two."""
    program: str
    """"hvp" recomputes the part that depends on x, "apply" reads it from memory."""
    hvp_seconds: float | None
    """Seconds of the fastest measured launch of `hvp`; None without a measurement."""
    apply_seconds: float | None
    """Seconds of the fastest measured launch of `apply`; None without a measurement."""
    reason: str
    """Reason of the choice, in words."""


class Plan(list[Choice]):
    """The choices of `Objective.plan`, ascending by width: a list, with a table in
    notebooks.

    Example:
        >>> plan = objective.plan()
        >>> plan[0].program
    """

    def _repr_html_(self) -> str:
        seconds = [[c.hvp_seconds, c.apply_seconds] for c in self]
        times = [["" if time is None else f"{time:.2g}" for time in row] for row in seconds]
        rows = [[c.width, c.program, *row, c.reason] for c, row in zip(self, times, strict=True)]
        return _html.grid("Plan", [("width", "program", "hvp, s", "apply, s", "reason"), *rows])


@dataclasses.dataclass(frozen=True)
class Compile:
    """The compilation of one program at one block width; see `Objective.compiles`."""

    program: str
    """Its name, such as "hvp"."""
    width: int
    """Block width in vectors; 0 for programs that multiply nothing."""
    state: str
    """"queued", "compiling", "ready" or "failed"."""
    seconds: float
    """Seconds that the compilation took, or has taken so far."""
    error: str
    """Reason of a failure; empty without one."""


@dataclasses.dataclass(frozen=True)
class DerivativeRules:
    """Derivative rules that StableHLO does not state; see `Objective.derivative_rules`.

    Example:
        >>> print(objective.derivative_rules().presumed)
    """

    recognised: Mapping[str, int]
    """Rules that the server put back, with their number.

    They come from the client's marks, or from forms that the server knows."""
    presumed: Mapping[str, int]
    """Rules that the server presumed, because jax has them, with their number.

    The program states no rule for them. Compare them with the framework that wrote the
    program."""
