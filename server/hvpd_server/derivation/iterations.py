"""Lanczos's iteration around a product, as a program of several steps.

The basis comes in as an argument, and the new rows go out, so that a launch copies no
basis. Inner products accumulate in float64.
"""

from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

Function = Callable[..., Any]

PREFIX: Final = "lanczos_"
"""Prefix of the name of such a program. The name of the product follows."""

_PASSES: Final = 4
"""Most passes of an orthogonalization. Two are enough, unless little is left."""

_NEW_ELEMENTS: Final = 1 << 20
"""Elements of the rows that one launch may add, above which it adds one row."""

_PART: Final = 8192
"""Elements of a vector that are converted to float64 at once."""

_MOST_STEPS: Final = 64
"""Most steps of a launch."""


def steps_of(n: int) -> int:
    """Return the most steps of a launch for vectors of n elements."""
    return min(max(_NEW_ELEMENTS // max(n, 1), 1), _MOST_STEPS)


def specs_of(rows: int, n: int, dtype: "np.dtype[Any]") -> list[jax.ShapeDtypeStruct]:
    """Return the arguments of a program between x and the product's own: the basis
    Q[rows, n]; the scale and the shift of the operator, and the largest norm of a
    product so far; the number of rows that count, and of steps to take.
    """
    return [
        jax.ShapeDtypeStruct((rows, n), dtype),
        jax.ShapeDtypeStruct((3,), np.dtype(np.float64)),
        jax.ShapeDtypeStruct((2,), np.dtype(np.int32)),
    ]


def inner_products(V: jax.Array, w: jax.Array) -> jax.Array:
    """Return V w in float64, for V[m, n] and w[n]."""
    if V.dtype == jnp.float64:
        return V @ w
    # By parts that fit a cache, because all of V in float64 would be a copy in memory.
    parts, rest = divmod(w.size, _PART)

    def product(start: Any, size: int) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(V, start, size, 1).astype(jnp.float64)
        return part @ jax.lax.dynamic_slice_in_dim(w, start, size).astype(jnp.float64)

    total = product(parts * _PART, rest)
    if not parts:
        return total
    found: jax.Array = jax.lax.fori_loop(
        0, parts, lambda number, before: before + product(number * _PART, _PART), total
    )
    return found


def lanczos_of(multiply: Function, steps: int) -> Function:
    """Return (x, Q, numbers, counts, *args) -> (new rows, alphas, betas, facts).

    The last row of Q that counts waits for its product. The new rows have the shape
    [steps, n]. facts are the steps that were taken, whether the last product was
    finite, and the largest norm of a product. The iteration ends early if the basis
    spans an invariant space, whose last beta is 0, or if a product is not finite.

    Args:
        multiply: (x, v, *args) -> A v.
        steps: Most steps.
    """

    def lanczos(x: jax.Array, Q: jax.Array, numbers: jax.Array, counts: jax.Array, *args: jax.Array) -> Any:
        dtype = Q.dtype
        scale, shift, size = numbers[0], numbers[1], numbers[2]
        rows, count = counts[0], counts[1]
        known = jnp.arange(Q.shape[0]) < rows

        def norm(w: jax.Array) -> jax.Array:
            return jnp.sqrt(jnp.sum(jnp.square(w.astype(jnp.float64))))

        def orthogonal(w: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            """Return coefficients in Q and in the new rows, the rest, and its norm."""

            def again(state: Any) -> Any:
                number, _, _, _, before, after = state
                return (number < 2) | ((number < _PASSES) & (after < 0.5 * before))

            def once(state: Any) -> Any:
                number, h, g, w, _, before = state
                more = jnp.where(known, inner_products(Q, w), 0.0)
                newer = inner_products(new, w)
                w = w - more.astype(dtype) @ Q - newer.astype(dtype) @ new
                return number + 1, h + more, g + newer, w, before, norm(w)

            nothing = jnp.zeros(Q.shape[0]), jnp.zeros(steps)
            _, h, g, rest, _, left = jax.lax.while_loop(again, once, (0, *nothing, w, 0.0, norm(w)))
            return h, g, rest, left

        def going(state: Any) -> Any:
            return (state[0] < count) & state[5]

        def step(state: Any) -> Any:
            number, new, alphas, betas, size, _, _, q = state
            w = scale.astype(dtype) * multiply(x, q, *args) + shift.astype(dtype) * q
            length = norm(w)
            finite = jnp.isfinite(length)
            size = jnp.where(finite, jnp.maximum(size, length), size)
            h, g, rest, beta = orthogonal(w, new)
            alpha = jnp.where(number == 0, h[rows - 1], g[number - 1])
            ended = beta <= 10 * np.finfo(dtype).eps * size
            beta = jnp.where(ended, 0.0, beta)
            following = jnp.where(ended, 0.0, rest / jnp.where(ended, 1.0, beta).astype(dtype))
            kept = finite & ~ended
            new = jax.lax.dynamic_update_index_in_dim(new, jnp.where(kept, following, 0.0), number, 0)
            alphas = alphas.at[number].set(jnp.where(finite, alpha, 0.0))
            betas = betas.at[number].set(jnp.where(finite, beta, 0.0))
            return number + finite, new, alphas, betas, size, kept, finite, following

        start = (
            jnp.int32(0),
            jnp.zeros((steps, Q.shape[1]), dtype),
            jnp.zeros(steps),
            jnp.zeros(steps),
            size,
            jnp.bool_(True),
            jnp.bool_(True),
            jax.lax.dynamic_index_in_dim(Q, rows - 1, keepdims=False),
        )
        number, new, alphas, betas, size, _, finite, _ = jax.lax.while_loop(going, step, start)
        return new, alphas, betas, jnp.stack([number.astype(jnp.float64), finite.astype(jnp.float64), size])

    return lanczos
