"""Which Ritz values a caller wants, and when one has converged."""

from typing import Any

import numpy as np

from hvpd._krylov.vectors import Array

WHICH = ("LA", "SA", "LM", "BE")
"""Choices of `which`, as in SciPy: largest or smallest algebraic, largest magnitude,
and both ends.
"""


def select(values: Array, k: int, which: str) -> Array:
    """Return the positions of k of the ascending values, ascending."""
    m = len(values)
    if which == "LA":
        return np.arange(m - k, m)
    if which == "SA":
        return np.arange(k)
    if which == "LM":
        return np.sort(np.argsort(-abs(values), kind="stable")[:k])
    low = k // 2  # "BE": SciPy takes one more from the high end if k is odd.
    return np.concatenate([np.arange(low), np.arange(m - (k - low), m)])


def tolerance(values: Array, every: Array, tol: float, dtype: np.dtype[Any]) -> Array:
    """Return the largest residual of a converged pair, for each value.

    This is never less than the rounding of the operator's norm.
    """
    eps = float(np.finfo(dtype).eps)
    norm = float(abs(every).max(initial=0.0))
    found: Array = np.maximum(max(tol, eps) * abs(values), 10 * eps * norm)
    return found
