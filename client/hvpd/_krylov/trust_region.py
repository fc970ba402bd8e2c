"""The step of a trust region, by truncated conjugate gradients.

Sources: Steihaug 1983 (https://doi.org/10.1137/0720042); Toint 1981; Conn, Gould,
Toint, Trust-Region Methods (2000), algorithm 7.5.1 for the norm of a preconditioner.
"""

from typing import NamedTuple

import numpy as np

from hvpd._errors import InvalidArgumentError
from hvpd._krylov import vectors
from hvpd._krylov.space import Multiply
from hvpd._krylov.vectors import Array

SOLVED = "the residual is within the tolerance"
BOUNDARY = "the step reaches the boundary of the trust region"
CURVATURE = "the curvature along a direction is not positive"
NOT_FINITE = "a product holds NaN or infinity"
LIMIT = "the number of products is at its limit"


class Step(NamedTuple):
    """A step, and what the quadratic model says of it."""

    p: Array
    """The step, of shape (n,)."""
    predicted: float
    """g'p + p'Hp / 2, at most 0."""
    products: int
    """Vectors that were multiplied."""
    reason: str
    """Why the iteration ended, as a sentence."""


class State(NamedTuple):
    """Truncated CG between two steps."""

    p: Array
    """The step so far, of shape (1, n)."""
    r: Array
    """H p + g, of shape (1, n)."""
    d: Array
    """The next direction, of shape (1, n)."""
    rz: float
    """r'M r."""
    pp: float
    """p'p, in the inner product of the inverse of M."""
    pd: float
    """p'd, in this inner product."""
    dd: float
    """d'd, in this inner product."""
    products: int
    """Products so far."""


def steihaug(
    multiply: Multiply,
    gradient: Array,
    radius: float,
    *,
    tol: float,
    maxiter: int,
    precondition: Multiply | None = None,
    state: State | None = None,
) -> Step:
    """Return an approximate minimiser of g'p + p'Hp / 2 in a ball.

    Args:
        multiply: Multiplies a block V[k, n] by H.
        gradient: g, of shape (n,).
        radius: Radius of the ball, in the norm of the inverse of M. If it is infinite,
            a direction without positive curvature ends the step. Only the first
            direction is then followed, with the factor 1.
        tol: Largest |H p + g| of a solution.
        maxiter: Largest number of products.
        precondition: Multiplies a block by M, a positive definite approximation of the
            inverse of H; None for the identity.
        state: Where to go on; None for the start.
    """
    dtype = gradient.dtype
    if state is None:
        z = gradient[None] if precondition is None else precondition(gradient[None])
        rz = _positive(_dot(gradient[None], z))
        state = State(np.zeros_like(gradient[None]), gradient[None].copy(), -z, rz, 0.0, 0.0, rz, 0)
    p, r, d, rz, pp, pd, dd, begun = state
    if begun and float(vectors.norms(r)[0]) <= tol:
        return _finished(p, gradient, r, begun, SOLVED)
    for number in range(begun, maxiter):
        Hd = multiply(d)
        if not np.isfinite(Hd).all():
            return _finished(p, gradient, r, number, NOT_FINITE)
        kappa = _dot(d, Hd)
        alpha = rz / kappa if kappa > 0 else np.inf
        outside = pp + 2 * alpha * pd + alpha**2 * dd >= radius**2 if np.isfinite(alpha) else True
        if outside:
            if np.isinf(radius):
                tau = 0.0 if number else 1.0
            else:
                tau = (np.sqrt(pd**2 + dd * max(radius**2 - pp, 0.0)) - pd) / dd
            p = p + dtype.type(tau) * d
            r = r + dtype.type(tau) * Hd
            return _finished(p, gradient, r, number + 1, CURVATURE if kappa <= 0 else BOUNDARY)
        p = p + dtype.type(alpha) * d
        r = r + dtype.type(alpha) * Hd
        if float(vectors.norms(r)[0]) <= tol:
            return _finished(p, gradient, r, number + 1, SOLVED)
        z = r if precondition is None else precondition(r)
        before, rz = rz, _positive(_dot(r, z))
        beta = rz / before
        d = dtype.type(beta) * d - z
        pp += 2 * alpha * pd + alpha**2 * dd
        pd, dd = beta * (pd + alpha * dd), rz + beta**2 * dd
    return _finished(p, gradient, r, maxiter, LIMIT)


def _positive(square: float) -> float:
    if not square > 0:
        raise InvalidArgumentError(
            f"M is not positive definite: r'Mr is {square:.3g} for a residual r; pass a positive definite approximation of the "
            "inverse, or None",
            reason="NOT_POSITIVE_DEFINITE",
        )
    return square


def _dot(u: Array, v: Array) -> float:
    return float(vectors.dots(u, v)[0])


def _finished(p: Array, gradient: Array, r: Array, products: int, reason: str) -> Step:
    """Return the step; r is H p + g."""
    # g'p + p'Hp / 2 = p'(g + r) / 2
    return Step(p[0], (_dot(p, gradient[None]) + _dot(p, r)) / 2, products, reason)
