"""The step of block conjugate gradients, for programs of several steps.

It is the step of `hvpd._krylov.conjugate_gradients.BlockCG`, in the same form, so that
an iteration can change from one to the other. For one right-hand side, the steps of
`hvpd._krylov.trust_region.steihaug` are the same steps within a ball.

A block has zeros in the rows that it has too many: those without a right-hand side, and
those that depended on other rows.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hvpd_server.derivation.lanczos import dots, gram
from hvpd_server.derivation.several_steps import FLOAT, Function, Method, Sizes, Spec, Stepped

PREFIX: Final = "cg_"
"""Prefix of the name of such a program. The name of the product follows."""

_LEAST: Final = 1e-6
"""Smallest part of a row that is not in the rows before it, over the largest. A smaller
one has lost digits to rounding, or will soon be zero.
"""


class State(NamedTuple):
    """The state between two steps."""

    X: Any
    """As in `BlockCG`, of shape (k, n)."""
    Q: Any
    """As X."""
    S: Any
    """As X."""
    C: Any
    """As in `BlockCG`, float64 of shape (k, k)."""
    norm: Any
    """A lower bound of the norm of the operator."""
    XX: Any
    """X X^T in the inner product of the inverse of M, of shape (k, k)."""
    XS: Any
    """X S^T in this inner product."""
    SS: Any
    """S S^T in this inner product."""


def state_of(sizes: Sizes) -> State:
    """Return the arrays of the state."""
    vectors, square = sizes.vectors(sizes.rows), Spec((sizes.rows, sizes.rows), FLOAT)
    return State(vectors, vectors, vectors, square, Spec((), FLOAT), square, square, square)


def step(product: Function, precondition: Function | None, radius: jax.Array, before: Sequence[jax.Array]) -> Stepped:
    """Take one step within a ball of a radius, in the norm of the inverse of M.

    A step is unusual if its product is not finite, a curvature may not be positive, its
    end is not within the ball, or rows of the residual may depend on each other.
    """
    X, Q, S, C, norm, XX, XS, SS = State(*before)
    dtype = S.dtype
    W = product(S)
    squares, lengths = dots(S, S), dots(W, W)
    live = squares > 0
    norm = jnp.maximum(norm, jnp.sqrt(jnp.where(live, lengths / jnp.where(live, squares, 1.0), 0.0)).max())
    inverse = _inverse_of(gram(S, W), live)
    # The norm of the inverse is at least 1 over the smallest curvature.
    curved = 1 / jnp.sqrt((inverse**2).sum()) > float(np.finfo(dtype).eps) * norm * squares.sum()
    Q, Z, change, independent = _factored(Q - inverse.astype(dtype) @ W, precondition, live)
    D = inverse @ C
    XX = XX + XS @ D + (XS @ D).T + D.T @ SS @ D
    inside = (jnp.diagonal(XX) < radius**2).all()
    after = State(
        X + D.T.astype(dtype) @ S,
        Q,
        Z + change.astype(dtype) @ S,
        change @ C,
        norm,
        XX,
        (XS + D.T @ SS) @ change.T,
        jnp.diag(live.astype(FLOAT)) + change @ SS @ change.T,
    )
    weighted = after.C if precondition is None else gram(Q, Q) @ after.C
    usual = jnp.isfinite(lengths).all() & curved & independent & inside
    return Stepped(after, jnp.sqrt(jnp.maximum((after.C * weighted).sum(axis=0), 0.0)), usual)


METHOD: Final = Method(state_of, lambda sizes: Spec((), FLOAT), step)


def _factored(R: jax.Array, precondition: Function | None, live: jax.Array) -> tuple[jax.Array, ...]:
    """Return Q, M Q and C, so that R = C^T Q and Q M Q^T = I; and whether the rows of R
    are independent. Rows that do not live are 0.

    Source: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015, Roundoff error analysis of
    the CholeskyQR2 algorithm (https://etna.ricam.oeaw.ac.at/vol.44.2015/).
    """
    Q, Z = R, R if precondition is None else precondition(R)
    C, independent = jnp.diag(live.astype(FLOAT)), jnp.bool_(True)
    for _ in range(min(len(R), 2)):
        L = _triangle(gram(Q, Z), live)
        parts = jnp.diagonal(L)
        independent &= jnp.where(live, parts, jnp.inf).min() > _LEAST * jnp.where(live, parts, 0.0).max()
        scale = _inverse(L).astype(R.dtype)
        Q, Z = scale @ Q, scale @ Z
        C = L.T @ C
    return Q, Z, C, independent


def _triangle(G: jax.Array, live: jax.Array) -> jax.Array:
    """Return the lower triangle L with L L^T = G, with the identity for the rows that
    do not live; NaN if G is not positive definite.
    """
    G = jnp.where(live[:, None] & live, G, jnp.eye(len(G)))
    return jnp.sqrt(G) if len(G) == 1 else jax.lax.linalg.cholesky(G)


def _inverse_of(G: jax.Array, live: jax.Array) -> jax.Array:
    """Return the inverse of the rows of G that live, with zeros for the others; NaN if
    G is not positive definite.
    """
    if len(G) == 1:  # Without the rounding of a root.
        return jnp.where(G > 0, 1 / G, jnp.nan)
    root = _inverse(_triangle((G + G.T) / 2, live))
    return jnp.where(live[:, None] & live, root.T @ root, 0.0)


def _inverse(L: jax.Array) -> jax.Array:
    """Return the inverse of a lower triangle."""
    if len(L) == 1:
        return 1 / L
    found: jax.Array = jax.lax.linalg.triangular_solve(L, jnp.eye(len(L)), left_side=True, lower=True)
    return found
