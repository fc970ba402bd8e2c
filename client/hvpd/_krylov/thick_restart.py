"""Eigenpairs at the ends of a spectrum, by Lanczos iteration with thick restarts.

Source: Wu and Simon 2000 (https://doi.org/10.1137/S0895479898334605). The conventions
are those of `scipy.sparse.linalg.eigsh`, whose ARPACK restarts implicitly.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence

from hvpd import _text
from hvpd._arguments import check_choice, finite, integer
from hvpd._errors import HvpdError, InvalidArgumentError
from hvpd._krylov.lanczos import INVARIANT, NOT_FINITE, Lanczos, start_block
from hvpd._krylov.results import Eigenpairs
from hvpd._krylov.ritz import WHICH, select, tolerance
from hvpd._krylov.runner import Runner
from hvpd._krylov.vectors import Array

CONVERGED = "all eigenpairs have converged"


class NotConvergedError(ArpackNoConvergence, HvpdError):
    """An iteration ended before all eigenpairs had converged.

    It is also SciPy's `ArpackNoConvergence`.

    Attributes:
        pairs: The best approximations, an `Eigenpairs` with all k values.
        eigenvalues: Those values that have converged.
        eigenvectors: Their vectors, of shape (n, converged); or None.

    Example:
        >>> try:
        ...     values, vectors = H.eigsh(20, maxiter=3)
        ... except hvpd.krylov.NotConvergedError as error:
        ...     values = error.pairs.values
    """

    _reason = "NOT_CONVERGED"

    def __init__(self, message: str, pairs: Eigenpairs) -> None:
        found = pairs.vectors
        columns: Any = None if found is None else found[:, pairs.converged]
        ArpackNoConvergence.__init__(self, message, pairs.values[pairs.converged], columns)
        self.args = (_text.printable(message, keep="\n"),)  # Without SciPy's prefix.
        self.reason, self.request_id = self._reason, ""
        self.pairs = pairs

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.pairs)


def eigsh(
    runner: Runner,
    k: int | None,
    which: str,
    *,
    v0: Any,
    ncv: int | None,
    maxiter: int | None,
    tol: float,
    seed: int,
    return_eigenvectors: bool,
) -> Eigenpairs:
    """Return k eigenpairs; see `hvpd.krylov.eigsh`.

    Once all have converged, the iteration goes on from a random vector, to look for
    copies of multiple eigenvalues, which one Krylov space cannot see. It ends when the
    next Ritz value is away from the k values by more than its residual.
    """
    n = runner.n
    check_choice(which, "which", WHICH)
    k = min(6, n) if k is None else integer(k, "k", 1, n)
    if ncv is None:
        size = max(2 * k + 1, 20)
        # A second cycle takes size - k products more, and a whole basis is exact.
        size = n if n <= 2 * size - k else size
    else:
        size = integer(ncv, "ncv", min(k + 1, n), n)
    restarts = 10 * n if maxiter is None else integer(maxiter, "maxiter", 1)
    if finite(tol, "tol") < 0:
        raise InvalidArgumentError(
            f"tol must be at least 0, got {tol}: 0 asks for the accuracy of rounding", reason="INVALID_OPTION"
        )
    seed = integer(seed, "seed", 0)
    start = start_block(n, runner.dtype, v0, seed, 1)
    with runner.running("eigsh") as tick, Lanczos(runner.space(), start, origin=runner.seeded(seed)) as run:
        verified, left, number = False, 0.0, 0
        for number in range(1, restarts + 1):
            _fill(run, size, seed + number)
            if not run.size:
                break
            pairs = run.ritz(min(k, run.size), which, vectors=False, tol=tol)
            tick(run.steps, float(pairs.residuals.max(initial=0.0)))
            done = len(pairs.values) == k and bool(pairs.converged.all())
            if run.reason == NOT_FINITE or run.size == n:
                break
            values, _, couplings = run.decomposed()
            verified = verified and done
            if verified and _separated(values, np.linalg.norm(couplings, axis=0), k, which, tol, runner.dtype):
                break
            if done and not verified:
                # The couplings of these pairs end here, so their residuals are noted.
                left = max(left, float(pairs.residuals.max()))
                run.restart(select(values, k, which), fresh=seed + number)
            else:
                run.restart(select(values, k + (size - k) // 2, which))
            verified = done
        else:
            _fill(run, size, seed)
        reason = run.reason
        if not run.size:
            raise HvpdError(
                f"no eigenpairs: the first product holds NaN or infinity; {_NO_CURVATURE}", reason="NOT_FINITE"
            )
        pairs = run.ritz(min(k, run.size), which, vectors=return_eigenvectors, tol=tol)
    pairs = dataclasses.replace(pairs, residuals=np.maximum(pairs.residuals, left), reason=reason)
    return _judged(pairs, k, f"raise maxiter ({restarts}) or ncv ({size}), or tol ({tol:g})", restarts)


_NO_CURVATURE = "usually because x, the value or the gradient does: look at point.nonfinite"


def _judged(pairs: Eigenpairs, k: int, advice: str, restarts: int) -> Eigenpairs:
    """Return the pairs with the reason of their end.

    Raises:
        NotConvergedError: Some have not converged.
    """
    done = len(pairs.values) == k and bool(pairs.converged.all())
    reason = pairs.reason
    if reason == NOT_FINITE:
        advice = _NO_CURVATURE
    elif reason != INVARIANT:
        reason = CONVERGED if done else f"the number of restarts is at its limit of {restarts}"
    if done:
        return dataclasses.replace(pairs, reason=reason)
    raise NotConvergedError(
        f"{int(pairs.converged.sum())} of {k} eigenpairs converged with {pairs.products} products: {reason}; {advice}; the error's "
        "`pairs` has what was found",
        dataclasses.replace(pairs, reason=reason),
    )


def _separated(values: Array, residuals: Array, k: int, which: str, tol: float, dtype: np.dtype[Any]) -> bool:
    """Return whether the next Ritz value is away from the k chosen ones.

    Args:
        values: All Ritz values, ascending.
        residuals: Their residuals.
        k: Number of chosen ones.
        which: How they are chosen.
        tol: Tolerance of the chosen ones.
        dtype: dtype of the products.
    """
    chosen = select(values, k, which)
    others = np.setdiff1d(np.arange(len(values)), chosen)
    if not len(others):
        return False
    slack = float(tolerance(values, values, tol, dtype).max())
    if which == "LM":
        next_one = others[abs(values[others]).argmax()]
        return bool(abs(values[next_one]) + residuals[next_one] <= abs(values[chosen]).min() + slack)
    # The neighbours of the chosen values; "BE" has two.
    low = k // 2 if which == "BE" else 0 if which == "LA" else k
    first, last = others[0], others[-1]
    above = low == k or values[last] + residuals[last] <= values[last + 1] + slack
    below = low == 0 or values[first] - residuals[first] >= values[first - 1] - slack
    return bool(above and below)


def _fill(run: Lanczos, size: int, seed: int) -> None:
    """Extend the space to a size, from random vectors where it becomes invariant."""
    while run.size < size and run.reason != NOT_FINITE:
        if run.breakdown:
            run.enlarge(seed + run.size)
        run.extend(size - run.size)
