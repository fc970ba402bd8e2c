"""Lanczos's iteration around a product, as a program of several steps.

The basis comes in as an argument, and the new rows go out, so that a launch copies no
basis. Inner products accumulate in float64.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from hvpd._krylov.space import LEAST_LEFT
from hvpd_server.derivation.spread import summed

Function = Callable[..., Any]

PREFIX: Final = "lanczos_"
"""Prefix of the name of such a program. The name of the product follows."""

_PASSES: Final = 4
"""Most passes of an orthogonalization; see `hvpd._krylov.space.LEAST_LEFT`."""

_NEW_ELEMENTS: Final = 1 << 20
"""Elements of the rows that one launch may add, above which it adds one row."""

_PART: Final = 8192
"""Elements of each vector of a block that are converted to float64 at once."""

_PART_OF_ONE: Final = 32768
"""As `_PART`, if a basis is multiplied by one vector."""

_ROWS: Final = 8
"""Most rows of a basis that a CPU multiplies at once. So the time grows with the rows
that count, not with those that the program is compiled for. An accelerator multiplies
all rows at once, because each part would be a launch of its own.
"""

_MOST_STEPS: Final = 64
"""Most steps of a launch."""


def steps_of(n: int) -> int:
    """Return the most steps of a launch for vectors of n elements."""
    return min(max(_NEW_ELEMENTS // max(n, 1), 1), _MOST_STEPS)


def specs_of(rows: int, n: int, dtype: "np.dtype[Any]", sharding: Any = None) -> list[jax.ShapeDtypeStruct]:
    """Return the arguments of a program between x and the product's own: the basis
    Q[rows, n]; the scale and the shift of the operator, and the largest norm of a
    product so far; the number of rows that count, and of steps to take.

    `sharding` is that of Q; None: Q is whole on each device.
    """
    return [
        jax.ShapeDtypeStruct((rows, n), dtype, sharding=sharding),
        jax.ShapeDtypeStruct((3,), np.dtype(np.float64)),
        jax.ShapeDtypeStruct((2,), np.dtype(np.int32)),
    ]


def inner_products(V: jax.Array, w: jax.Array, first: Any = 0, rows: int | None = None) -> jax.Array:
    """Return V w in float64, for some rows of V[m, n] and w[n].

    Args:
        V: The rows.
        w: The vector.
        first: The first row that counts.
        rows: Number of rows that count, from the first on; None for all.
    """
    rows = len(V) if rows is None else rows

    def product(start: Any, size: int) -> jax.Array:
        part = jax.lax.dynamic_slice(V, (jnp.int32(first), jnp.int32(start)), (rows, size))
        return part.astype(jnp.float64) @ jax.lax.dynamic_slice_in_dim(w, start, size).astype(jnp.float64)

    return _by_parts(w.size, product, _PART_OF_ONE)


@summed
def gram(U: jax.Array, V: jax.Array) -> jax.Array:
    """Return the inner products U V^T in float64, for U[k, n] and V[l, n]."""
    if len(U) == len(V) == 1:
        return dots(U, V)[:, None]
    if len(V) == 1:
        return inner_products(U, V[0])[:, None]

    def product(start: Any, size: int) -> jax.Array:
        u, v = (jax.lax.dynamic_slice_in_dim(rows, start, size, 1).astype(jnp.float64) for rows in (U, V))
        return u @ v.T

    return _by_parts(V.shape[1], product)


@summed
def dots(U: jax.Array, V: jax.Array) -> jax.Array:
    """Return the inner product of each pair of rows, float64 of shape (k,).

    The parts are added before the elements of a part are, because a sum over one array
    takes three times as long on a CPU.
    """

    def product(start: Any, size: int) -> jax.Array:
        u, v = (jax.lax.dynamic_slice_in_dim(rows, start, size, 1).astype(jnp.float64) for rows in (U, V))
        return u * v

    parts, rest = divmod(V.shape[1], _PART)
    total = product(parts * _PART, rest).sum(axis=1)
    if not parts:
        return total
    sums: jax.Array = jax.lax.fori_loop(
        1, parts, lambda number, before: before + product(number * _PART, _PART), product(0, _PART)
    )
    return total + sums.sum(axis=1)


def _by_parts(n: int, product: Callable[[Any, int], jax.Array], size: int = _PART) -> jax.Array:
    """Return the sum of products over parts of the elements that fit a cache, because
    all of a block in float64 would be a copy in memory.

    Args:
        n: Number of elements.
        product: Returns the product over some elements, given the first one and their
            number.
        size: Elements of a part.
    """
    parts, rest = divmod(n, size)
    total = product(parts * size, rest)
    if not parts:
        return total
    found: jax.Array = jax.lax.fori_loop(0, parts, lambda number, before: before + product(number * size, size), total)
    return found


def coefficients(V: jax.Array, w: jax.Array, count: jax.Array, rows: int) -> jax.Array:
    """Return V w in float64 for the first `count` rows of V[m, n], and 0 for others.

    `rows` rows are multiplied at once. They divide m.
    """

    @summed
    def products(V: jax.Array, w: jax.Array, count: jax.Array) -> jax.Array:
        def some(number: Any, before: jax.Array) -> jax.Array:
            found = inner_products(V, w, number * rows, rows)
            return jax.lax.dynamic_update_slice_in_dim(before, found, number * rows, 0)

        found: jax.Array = jax.lax.fori_loop(0, -(-count // rows), some, jnp.zeros(len(V)))
        return found

    found = products(V, w, count)
    return jnp.where(jnp.arange(len(V)) < count, found, 0.0)


def without(w: jax.Array, h: jax.Array, V: jax.Array, count: jax.Array, rows: int) -> jax.Array:
    """Return w - h V for the first `count` rows of V[m, n]. The other elements of h are
    0. `rows` is as in `coefficients`.
    """
    h = h.astype(w.dtype)

    def some(number: Any, before: jax.Array) -> jax.Array:
        if rows > _ROWS:
            part, weights = (jax.lax.dynamic_slice_in_dim(array, number * rows, rows) for array in (V, h))
            return before - weights @ part
        for row in range(rows):  # XLA's product takes two to eight times as long on a CPU.
            v, weight = (jax.lax.dynamic_index_in_dim(array, number * rows + row, keepdims=False) for array in (V, h))
            before -= weight * v
        return before

    found: jax.Array = jax.lax.fori_loop(0, -(-count // rows), some, w)
    return found


def _together(rows: int, platform: str) -> int:
    """Return how many of some rows to multiply at once: a divisor of their number."""
    return rows if rows <= _ROWS or platform != "cpu" else math.gcd(rows, _ROWS)


def lanczos_of(multiply: Function, steps: int, platform: str = "cpu") -> Function:
    """Return (x, Q, numbers, counts, *args) -> (new rows, alphas, betas, facts).

    The last row of Q that counts waits for its product. The new rows have the shape
    [steps, n]. facts are the steps that were taken, whether the last product was
    finite, and the largest norm of a product. The iteration ends early if the basis
    spans an invariant space, whose last beta is 0, or if a product is not finite.

    Args:
        multiply: (x, v, *args) -> A v.
        steps: Most steps.
        platform: Platform that the program is for.
    """

    def lanczos(x: jax.Array, Q: jax.Array, numbers: jax.Array, counts: jax.Array, *args: jax.Array) -> Any:
        dtype = Q.dtype
        scale, shift, size = numbers[0], numbers[1], numbers[2]
        rows, count = counts[0], counts[1]
        some, few = _together(len(Q), platform), _together(steps, platform)

        def dot(v: jax.Array, w: jax.Array) -> jax.Array:
            return dots(v[None], w[None])[0]

        def norm(w: jax.Array) -> jax.Array:
            return jnp.sqrt(dot(w, w))

        def orthogonal(w: jax.Array, new: jax.Array, made: jax.Array) -> tuple[jax.Array, ...]:
            """Return the coefficients of w in Q and in the new rows that were made, the
            rest of w, and its norm.
            """

            def again(state: Any) -> Any:
                number, _, _, _, before, after = state
                return (number == 0) | ((number < _PASSES) & (after < LEAST_LEFT * before))

            def once(state: Any) -> Any:
                number, h, g, w, _, before = state
                more, newer = coefficients(Q, w, rows, some), coefficients(new, w, made, few)
                w = without(without(w, more, Q, rows, some), newer, new, made, few)
                return number + 1, h + more, g + newer, w, before, norm(w)

            nothing = jnp.zeros(Q.shape[0]), jnp.zeros(steps)
            _, h, g, rest, _, left = jax.lax.while_loop(again, once, (0, *nothing, w, 0.0, norm(w)))
            return h, g, rest, left

        def going(state: Any) -> Any:
            return (state[0] < count) & state[5]

        def step(state: Any) -> Any:
            number, new, alphas, betas, size, _, _, q, before = state
            w = scale.astype(dtype) * multiply(x, q, *args) + shift.astype(dtype) * q
            length = norm(w)
            finite = jnp.isfinite(length)
            size = jnp.where(finite, jnp.maximum(size, length), size)
            alpha = dot(q, w)
            w -= alpha.astype(dtype) * q
            w -= dot(before, w).astype(dtype) * before
            h, g, rest, beta = orthogonal(w, new, number)
            alpha += jnp.where(number == 0, h[rows - 1], g[number - 1])
            ended = beta <= 10 * np.finfo(dtype).eps * size
            beta = jnp.where(ended, 0.0, beta)
            following = jnp.where(ended, 0.0, rest / jnp.where(ended, 1.0, beta).astype(dtype))
            kept = finite & ~ended
            new = jax.lax.dynamic_update_index_in_dim(new, jnp.where(kept, following, 0.0), number, 0)
            alphas = alphas.at[number].set(jnp.where(finite, alpha, 0.0))
            betas = betas.at[number].set(jnp.where(finite, beta, 0.0))
            return number + finite, new, alphas, betas, size, kept, finite, following, q

        start = (
            jnp.int32(0),
            jnp.zeros((steps, Q.shape[1]), dtype),
            jnp.zeros(steps),
            jnp.zeros(steps),
            size,
            jnp.bool_(True),
            jnp.bool_(True),
            jax.lax.dynamic_index_in_dim(Q, rows - 1, keepdims=False),
            jax.lax.dynamic_index_in_dim(Q, jnp.maximum(rows - 2, 0), keepdims=False),
        )
        number, new, alphas, betas, size, _, finite, _, _ = jax.lax.while_loop(going, step, start)
        return new, alphas, betas, jnp.stack([number.astype(jnp.float64), finite.astype(jnp.float64), size])

    return lanczos
