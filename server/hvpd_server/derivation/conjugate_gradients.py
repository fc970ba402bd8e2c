"""Conjugate gradients around a product, as a program of several steps.

It takes the steps of `hvpd._krylov.conjugate_gradients.BlockCG` for one right-hand
side, in the same form, so that an iteration can change from one to the other. The steps
of `hvpd._krylov.trust_region.steihaug` are the same steps within a ball. So one program
serves both.
"""

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from hvpd_server.derivation.iterations import inner_products

Function = Callable[..., Any]

PREFIX: Final = "cg_"
"""Prefix of the name of such a program. The name of the product follows."""

STEPS: Final = 64
"""Most steps of a launch."""


def specs_of(n: int, rank: int, dtype: "np.dtype[Any]") -> list[jax.ShapeDtypeStruct]:
    """Return the arguments of a program between x and the product's own.

    These are X, Q and S, as in `BlockCG`, and the diagonal of M, each of shape (1, n);
    the scale and the shift of the operator, the norm of the residual that ends the
    iteration, the radius of the ball, and the state: a lower bound of the norm of the
    operator, C, and the inner products X X, X S and S S with the inverse of M; and the
    number of steps to take. An operator with a low-rank term has U[n, rank] and a small
    matrix of its own, too.
    """
    vector = jax.ShapeDtypeStruct((1, n), dtype)
    return [
        *[vector] * 4,
        jax.ShapeDtypeStruct((9,), np.dtype(np.float64)),
        jax.ShapeDtypeStruct((), np.dtype(np.int32)),
        *([jax.ShapeDtypeStruct((n, rank), dtype), jax.ShapeDtypeStruct((rank, rank), dtype)] if rank else []),
    ]


def cg_of(multiply: Function, rank: int = 0) -> Function:
    """Return (x, X, Q, S, M, numbers, count, *args) -> ((X, Q, S), norms, facts).

    With a rank, the first two of args are those of a low-rank term U D U^T.

    norms are those of the residual after each step. facts are the steps that were
    taken, whether the next step is a usual one, and the five numbers of the state. The
    iteration ends when the norm of the residual is at its target; or before an unusual
    step, whose product is not finite, whose curvature is not positive, whose end is not
    within the ball, or after which the residual is zero.

    Args:
        multiply: (x, v, *args) -> A v.
        rank: Rank of the low-rank term; 0 for none.
    """

    def cg(
        x: jax.Array,
        X: jax.Array,
        Q: jax.Array,
        S: jax.Array,
        M: jax.Array,
        numbers: jax.Array,
        count: jax.Array,
        *args: jax.Array,
    ) -> Any:
        dtype = S.dtype
        scale, shift, target, radius = (numbers[number] for number in range(4))
        eps, M = float(np.finfo(dtype).eps), M[0]
        low_rank, args = args[:2] if rank else (), args[2:] if rank else args

        def going(state: Any) -> Any:
            number, usual, latest = state[:3]
            return (number < count) & usual & (latest > target)

        def step(state: Any) -> Any:
            number, _, latest, X, Q, S, (size, C, *ball), norms = state
            XX, XS, SS = ball
            W = scale.astype(dtype) * multiply(x, S, *args) + shift.astype(dtype) * S
            if low_rank:
                U, D = low_rank
                W += U @ (D @ (S @ U))
            square, curvature, length = _dot(S, S), _dot(S, W), _dot(W, W)
            size = jnp.where(jnp.isfinite(length), jnp.maximum(size, jnp.sqrt(length / square)), size)
            R = Q - (1 / curvature).astype(dtype) * W
            change = jnp.sqrt(_dot(R, M * R))
            alpha = C / curvature
            moved = XX + 2 * alpha * XS + alpha**2 * SS
            usual = jnp.isfinite(length) & (curvature > eps * size * square) & (moved < radius**2) & (change > 0)
            following = R / change.astype(dtype)
            found = (
                X + alpha.astype(dtype) * S,
                following,
                M * following + change.astype(dtype) * S,
                C * change,
                moved,
                change * (XS + alpha * SS),
                1 + change**2 * SS,
            )
            X, Q, S, C, *ball = (
                jnp.where(usual, new, old) for new, old in zip(found, (X, Q, S, C, *ball), strict=True)
            )
            latest = jnp.where(usual, C * jnp.sqrt(_dot(Q, Q)), latest)
            return number + usual, usual, latest, X, Q, S, (size, C, *ball), norms.at[number].set(latest)

        state = tuple(numbers[number] for number in range(4, 9))
        start = (jnp.int32(0), jnp.bool_(True), jnp.float64(np.inf), X[0], Q[0], S[0], state, jnp.zeros(STEPS))
        number, usual, _, X, Q, S, state, norms = jax.lax.while_loop(going, step, start)
        facts = jnp.stack([number.astype(jnp.float64), usual.astype(jnp.float64), *state])
        return (X[None], Q[None], S[None]), norms, facts

    return cg


def _dot(u: jax.Array, v: jax.Array) -> jax.Array:
    """Return the inner product of two vectors, in float64."""
    return inner_products(u[None], v)[0]
