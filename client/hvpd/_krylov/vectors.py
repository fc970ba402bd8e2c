"""Inner products of vectors that are rows, accumulated in float64.

float32 vectors stay float32 in memory. They are converted by parts that fit a cache.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hvpd._errors import HvpdError

Array = npt.NDArray[Any]

_PART_BYTES = 1 << 20
"""Approximate bytes of the part of a block that is converted at once."""


def parts(rows: int, n: int) -> Iterator[slice]:
    """Yield slices of the columns of a block, each small enough to convert."""
    width = max(_PART_BYTES // (8 * max(rows, 1)), 256)
    for start in range(0, n, width):
        yield slice(start, min(start + width, n))


def gram(U: Array, V: Array) -> Array:
    """Return the inner products U V^T, float64 (k, l), for U[k, n] and V[l, n]."""
    if U.dtype == np.float64:
        exact: Array = U @ V.T
        return exact
    total = np.zeros((len(U), len(V)))
    for part in parts(len(U) + len(V), U.shape[1]):
        total += U[:, part].astype(np.float64) @ V[:, part].T.astype(np.float64)
    return total


def dots(U: Array, V: Array) -> Array:
    """Return the inner product of each pair of rows, float64 of shape (k,)."""
    if U.dtype == np.float64:
        exact: Array = np.einsum("kn,kn->k", U, V)
        return exact
    total = np.zeros(len(U))
    for part in parts(2 * len(U), U.shape[1]):
        total += np.einsum("kn,kn->k", U[:, part].astype(np.float64), V[:, part].astype(np.float64))
    return total


def norms(V: Array) -> Array:
    """Return the norm of each row, float64 of shape (k,)."""
    with np.errstate(over="ignore"):
        found: Array = np.sqrt(dots(V, V))
    return found


def check_scale(size: float, n: int, dtype: np.dtype[Any]) -> None:
    """Check that products have a norm whose square is in the range of floats.

    Args:
        size: Norm of a product with a unit vector, or a lower bound of it.
        n: Number of elements of a vector.
        dtype: dtype of products.

    Raises:
        HvpdError: It is too small or too large (reason `SCALE`).
    """
    wide = np.finfo(np.float64)
    least = max(float(wide.tiny) ** 0.5 / float(wide.eps), float(np.finfo(dtype).tiny / np.finfo(dtype).eps) * n**0.5)
    if 0 < size < least or not size < float(wide.max) ** 0.5 * float(wide.eps):
        norm = f"a norm of about {size:.2g}" if np.isfinite(size) else "an infinite norm"
        raise HvpdError(
            f"products with unit vectors have {norm}, which is too {'small' if size < 1 else 'large'} for the "
            f"iteration in {dtype}: multiply the operator by a factor, and divide the eigenvalues by it",
            reason="SCALE",
        )


def scaled(V: Array) -> tuple[Array, Array]:
    """Return V / 2^e with elements of at most 1, and the exponents e, of shape (k,).

    The division is exact. Squares of the elements then stay in the range of floats.
    """
    rows = V if V.dtype.kind == "f" else V.astype(np.float64)
    exponents = np.frexp(abs(rows).max(axis=1, initial=0.0).astype(np.float64))[1]
    return np.ldexp(rows, -exponents[:, None]), exponents


def combination(Y: Array, Q: Array) -> Array:
    """Return Y^T Q of shape (k, n) in the dtype of Q, for Y[m, k], Q[m, n]."""
    found: Array = Y.T.astype(Q.dtype) @ Q
    return found


def subtract(W: Array, C: Array, Q: Array) -> None:
    """Subtract C^T Q from W in place, for C[m, k], Q[m, n], W[k, n]."""
    W -= C.T.astype(Q.dtype) @ Q
