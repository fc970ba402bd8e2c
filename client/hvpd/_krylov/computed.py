"""The numbers of a whole computation, which may come from a server."""

from typing import NamedTuple

from hvpd._krylov.vectors import Array


class Solved(NamedTuple):
    """Solutions of s shifted systems of m right-hand sides each."""

    X: Array
    """Solutions, of shape (s, m, n)."""
    history: Array
    """Norms of the residuals after each step, float64 of shape (steps + 1, s, m).

    The last ones are computed from the solutions."""
    reason: str
    """Why the computation ended, as a sentence."""
    direction: Array | None = None
    """A unit vector without positive curvature, of shape (n,), if CG met one."""
    curvature: float | None = None
    """The curvature along it."""


class Estimated(NamedTuple):
    """An estimate of a trace, or of a diagonal."""

    values: Array
    """Float64 of shape (1,) for a trace, or (n,)."""
    errors: Array
    """Standard errors, of the same shape."""
    size: float = 0.0
    """Size of the numbers that were added, for the rounding of a trace."""
