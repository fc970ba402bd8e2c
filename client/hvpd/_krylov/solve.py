"""Linear systems: arguments, the choice of the recurrence, and a check of the result.

Each solve ends with a product that checks its residual. If rounding has moved the true
residual away from the recurrence's, the solve goes on from there. So `converged` means
that the true residual is small.
"""

from typing import Any

import numpy as np

from hvpd import _arrays, _text
from hvpd._arguments import check_choice, finite, integer
from hvpd._errors import InvalidArgumentError
from hvpd._krylov import vectors
from hvpd._krylov.computed import Solved
from hvpd._krylov.conjugate_gradients import BlockCG, IndefiniteError
from hvpd._krylov.preconditioning import preconditioner
from hvpd._krylov.probes import Ticking
from hvpd._krylov.results import Solution
from hvpd._krylov.runner import Advance, Runner
from hvpd._krylov.short_recurrence import Minres, ShortRecurrence
from hvpd._krylov.space import Multiply, NotFiniteError
from hvpd._krylov.vectors import Array

METHODS = ("cg", "minres")
"""Choices of `method`."""

CONVERGED = "all residuals are within the tolerance"
MAXITER = "the number of steps is at its limit"
ROUNDING = "rounding keeps a residual above the tolerance"
INDEFINITE = "the operator is not positive definite: `direction` has no positive curvature; use method='minres' or a larger shift"
NOT_FINITE = "a product, or its norm, is NaN or infinity: x is from before it"
RANGE = "x is too large or too small for {dtype}: scale the operator or the right-hand side"
INCONSISTENT = "the operator has no inverse, and b is not in its range: x minimises the residual"


class Systems:
    """The systems of one call as m independent rows, and what is known of each.

    Attributes:
        B: Right-hand sides, of shape (m, n).
        X: Solutions so far, of shape (m, n).
        R: True residuals, of shape (m, n).
        shifts: Shift of each row, of shape (m,).
        targets: Norms that the residuals must reach, of shape (m,).
        history: Norms of the residuals after each step, each of shape (m,).
        sizes: Lower bounds of the norms of the operators, preconditioned, of shape
            (m,); 0 if unknown.
        failed: Whether the operator of each row has no positive curvature along a
            direction that CG met, of shape (m,).
    """

    def __init__(self, runner: Runner, B: Array, X: Array | None, shifts: Array, tol: float) -> None:
        self._runner = runner
        self.B = B
        self.X = np.zeros_like(B) if X is None else X
        self.shifts = shifts
        self.targets = tol * vectors.norms(B)
        self.R = B.copy()
        if X is not None and X.any():
            self.measure(np.arange(len(B)))
        self.history = [vectors.norms(self.R)]
        self.sizes = np.zeros(len(B))
        self.failed = np.zeros(len(B), bool)

    def measure(self, rows: Array) -> None:
        """Compute the residuals of some rows, with one product each."""
        self.R[rows] = self.B[rows] - self._multiply(rows, self.X[rows])

    def _multiply(self, rows: Array, V: Array) -> Array:
        found: Array = self._runner.multiply(V) + self.shifts[rows, None].astype(V.dtype) * V
        return found

    def inconsistent(self, rows: Array, precondition: Multiply | None) -> bool:
        """Return whether a residual of some rows is large, and A maps it to about zero.

        Then no x has a smaller residual. A residual of rounding is small, or A maps it
        to something of its own size. It takes a product for each row.
        """
        R, eps = self.R[rows], float(np.finfo(self.R.dtype).eps)
        Z = R if precondition is None else precondition(R)
        W = self._multiply(rows, Z)
        WM = W if precondition is None else precondition(W)
        flat = np.sqrt(abs(vectors.dots(W, WM))) <= 10 * eps**0.5 * self.sizes[rows] * np.sqrt(abs(vectors.dots(R, Z)))
        attained = vectors.norms(self.B[rows])
        if precondition is None:
            attained = attained + self.sizes[rows] * vectors.norms(self.X[rows])
        return bool((flat & (vectors.norms(R) > 100 * eps * attained)).any())

    @property
    def open(self) -> Array:
        """Return the positions of the systems that have not converged."""
        found: Array = np.flatnonzero(~(vectors.norms(self.R) <= self.targets))
        return found

    def note(self, rows: Array, norms: Array) -> None:
        """Note the norms of some rows after a step; the other norms stay."""
        latest = self.history[-1].copy()
        latest[rows] = norms
        self.history.append(latest)


def solve(
    runner: Runner,
    b: Any,
    *,
    tol: float,
    maxiter: int | None,
    x0: Any,
    M: Any,
    shifts: Any,
    method: str,
) -> Solution:
    """Return a Solution; see `hvpd.krylov.solve`."""
    n, dtype = runner.n, runner.dtype
    check_choice(method, "method", METHODS)
    B, exponents = vectors.scaled(_rows(b, "b", n))
    B = B.astype(dtype)
    if finite(tol, "tol") < 0:
        raise InvalidArgumentError(f"tol must be at least 0, got {tol}", reason="INVALID_OPTION")
    limit = 10 * n if maxiter is None else integer(maxiter, "maxiter", 0)
    X = None
    if x0 is not None:
        start = _rows(x0, "x0", n)
        if np.shape(x0) != np.shape(b):
            raise InvalidArgumentError(
                f"x0 must have the shape of b, {np.shape(b)}, got {np.shape(x0)}", reason="SHAPE"
            )
        with np.errstate(over="ignore"):
            X = np.ldexp(start.astype(np.float64), -exponents[:, None]).astype(dtype)
        if not np.isfinite(X).all():
            raise InvalidArgumentError("x0 is too large beside b: pass a smaller x0, or None", reason="NOT_FINITE")
    every = np.zeros(1) if shifts is None else _shifts(shifts)
    if shifts is not None and (X is not None or M is not None):
        raise InvalidArgumentError(
            "shifts need the Krylov space of b itself: pass no x0 and no M, or solve H.shifted(...) for each shift",
            reason="CONFLICTING_OPTIONS",
        )
    precondition = preconditioner(M, n, dtype)
    before = runner.products
    with runner.running(f"solve by {method}", None) as tick:
        found = runner.solve(B, X, every, M, tol=tol, maxiter=limit, method=method, tick=tick)
        if found is None:
            found = solved(runner, B, X, every, precondition, tol=tol, maxiter=limit, method=method, tick=tick)
    with np.errstate(over="ignore", under="ignore"):
        x, history = np.ldexp(found.X, exponents[:, None]), np.ldexp(found.history, exponents)
        lost = vectors.norms((np.ldexp(x, -exponents[:, None]) - found.X).reshape(-1, n))
    fits = bool((lost <= np.finfo(dtype).eps * vectors.norms(found.X.reshape(-1, n))).all())
    reason = found.reason if fits else RANGE.format(dtype=dtype)
    converged = fits and bool((found.history[-1] <= tol * vectors.norms(B)).all())
    if np.ndim(b) == 1:
        x, history = x[:, 0], history[..., 0]
    else:
        x = x.transpose(0, 2, 1)
    return Solution(
        _arrays.back(x[0] if shifts is None else x, b),
        converged,
        history[:, 0] if shifts is None else history,
        runner.products - before,
        CONVERGED if converged else _worded(reason, limit),
        found.direction,
        found.curvature,
        origin=runner.origin,
    )


def _worded(reason: str, limit: int) -> str:
    """Return a reason with the limit that ended the solve."""
    if reason != MAXITER:
        return reason
    return f"{MAXITER}, maxiter={limit}: allow more steps, or pass a preconditioner M or a larger tol"


def solved(
    runner: Runner,
    B: Array,
    X: Array | None,
    shifts: Array,
    precondition: Multiply | None,
    *,
    tol: float,
    maxiter: int,
    method: str,
    tick: Ticking,
) -> Solved:
    """Solve (A + shift I) x = b for each shift and each row b of B.

    Args:
        runner: Multiplies.
        B: Right-hand sides, of shape (m, n).
        X: Where to start, of shape (m, n); None for zero. With several shifts: None.
        shifts: Shifts, float64 of shape (s,).
        precondition: Multiplies by M; None for the identity.
        tol: Norm of a residual, relative to its right-hand side, that is small enough.
        maxiter: Largest number of steps.
        method: "cg" or "minres".
        tick: Shows progress.
    """
    # Row i * m + j is right-hand side j with shift i.
    systems = Systems(runner, np.tile(B, (len(shifts), 1)), X, np.repeat(shifts, len(B)), tol)
    reason, found = _iterate(runner, systems, len(B), precondition, method, maxiter, tick)
    history = np.array(systems.history)
    history[-1] = vectors.norms(systems.R)
    return Solved(
        systems.X.reshape(len(shifts), *B.shape),
        history.reshape(len(history), len(shifts), len(B)),
        CONVERGED if not len(systems.open) else _indefinite(systems, shifts) if systems.failed.any() else reason,
        None if found is None else found.direction,
        None if found is None else found.curvature,
    )


def _indefinite(systems: Systems, shifts: Array) -> str:
    """Return the reason of systems whose operator is not positive definite."""
    if len(shifts) == 1:
        return INDEFINITE
    failed = [f"{shift:g}" for shift in np.unique(systems.shifts[systems.failed])]
    named = ", ".join([*failed[:5], *(["..."] if len(failed) > 5 else [])])
    return f"{INDEFINITE}; this is about the shifts {named} of {len(shifts)}"


def _iterate(
    runner: Runner, systems: Systems, k: int, precondition: Multiply | None, method: str, limit: int, tick: Ticking
) -> tuple[str, IndefiniteError | None]:
    """Solve until all systems have converged; return the reason and a direction."""
    first, reason, found = True, ROUNDING, None
    while len(rows := systems.open[~systems.failed[systems.open]]):
        earlier = systems.X[rows], systems.R[rows]  # Copies.
        steps = limit - len(systems.history) + 1
        if steps <= 0:
            return MAXITER, None
        try:
            if method == "cg" and not systems.shifts.any():
                reason = _block_cg(runner, systems, rows, precondition, steps, tick)
            else:
                joint = first and k < len(rows) == len(systems.B)
                reason, indefinite = _short(runner, systems, rows, k if joint else 0, precondition, method, steps, tick)
                found = found or indefinite
        except IndefiniteError as error:
            reason, found = INDEFINITE, found or error
        except NotFiniteError:
            reason = NOT_FINITE
        before = vectors.norms(earlier[1])
        if reason != NOT_FINITE:
            systems.measure(rows)
        after = vectors.norms(systems.R[rows])
        first = False
        if reason == INCONSISTENT and not systems.inconsistent(rows, precondition):
            reason = CONVERGED
        if reason != CONVERGED:
            return reason, found
        worse = ~(after <= before)
        systems.X[rows[worse]], systems.R[rows[worse]] = earlier[0][worse], earlier[1][worse]
        left = (after > systems.targets[rows]) & ~systems.failed[rows]
        if left.any() and not (after[left] < 0.5 * before[left]).all():
            return ROUNDING, None
    return reason, found


def _block_cg(
    runner: Runner, systems: Systems, rows: Array, precondition: Multiply | None, steps: int, tick: Ticking
) -> str:
    state = BlockCG(runner.multiply, precondition, systems.R[rows])
    try:
        with runner.stepping(state, precondition) as advance:
            return _run(advance, state, systems, rows, steps, tick)
    finally:
        systems.X[rows] += state.X


def _short(
    runner: Runner,
    systems: Systems,
    rows: Array,
    k: int,
    precondition: Multiply | None,
    method: str,
    steps: int,
    tick: Ticking,
) -> tuple[str, IndefiniteError | None]:
    """Run a short recurrence. With k > 0, the rows are the shifts of k vectors.

    Return why it ended, and a direction without positive curvature.
    """
    R = systems.R[rows[:k]] if k else systems.R[rows]
    shifts = systems.shifts[rows].reshape(-1, k).T if k else systems.shifts[rows][:, None]
    state = ShortRecurrence(runner.multiply, precondition, R, shifts, method)
    try:
        with runner.stepping(state, precondition) as advance:
            reason = _run(advance, state, systems, rows, steps, tick)
    finally:
        systems.X[rows] += state.solutions()
        systems.failed[rows] = state.failed.T.reshape(-1)
        if isinstance(state.solved, Minres):
            systems.sizes[rows] = state.solved.sizes.T.reshape(-1)
    inconsistent = isinstance(state.solved, Minres) and state.finished and state.solved.least_squares.any()
    return INCONSISTENT if inconsistent else reason, state.indefinite


def _run(
    advance: Advance,
    state: BlockCG | ShortRecurrence,
    systems: Systems,
    rows: Array,
    steps: int,
    tick: Ticking,
) -> str:
    """Take steps until the recurrence's residuals are small.

    Args:
        advance: Takes steps until the residuals are at most its first argument, and at
            most as many as its second; see `BlockCG.advance`.
        state: The recurrence.
        systems: The systems.
        rows: Positions of the systems that the recurrence solves.
        steps: Most steps.
        tick: Shows progress.
    """
    # A little below the target, because the true residual differs a little. Rounding
    # keeps the true residual above the smallest targets here.
    least = 0.1 * float(np.finfo(systems.R.dtype).eps) * vectors.norms(systems.R[rows])
    targets = np.maximum(0.9 * systems.targets[rows], least)
    last = len(systems.history) + steps
    while len(systems.history) < last:
        for norms in advance(targets, last - len(systems.history)):
            latest = np.where(_failed(state), systems.history[-1][rows], norms)
            systems.note(rows, latest)
            tick(len(systems.history) - 1, float(latest.max()))
        if state.finished or ((systems.history[-1][rows] <= targets) | _failed(state)).all():
            return CONVERGED
    return MAXITER


def _failed(state: BlockCG | ShortRecurrence) -> Array:
    """Return which systems have ended without a solution, while others go on."""
    return state.failed.T.reshape(-1) if isinstance(state, ShortRecurrence) else np.zeros(1, bool)


def _rows(vector: Any, name: str, n: int) -> Array:
    """Return right-hand sides as rows, in the dtype of the argument."""
    found = _arrays.vectors(vector, name)
    if found.ndim not in (1, 2) or len(found) != n or found.dtype.kind not in "fiub" or not found.size:
        raise InvalidArgumentError(
            f"{name} must be real, of shape ({n},) or ({n}, k), got {found.dtype} of shape {found.shape}",
            reason=_arrays.fault(found),
        )
    rows = np.array(found.reshape(n, -1).T, order="C")
    if not np.isfinite(rows).all():
        raise InvalidArgumentError(f"{name} holds NaN or infinity: pass finite numbers", reason="NOT_FINITE")
    return rows


def _shifts(shifts: Any) -> Array:
    found = np.asarray(shifts)
    if found.ndim != 1 or not found.size or found.dtype.kind not in "fiub" or not np.isfinite(found).all():
        raise InvalidArgumentError(
            f"shifts must be finite real numbers of shape (s,), got {_text.described(shifts)}", reason="INVALID_OPTION"
        )
    return found.astype(np.float64)
