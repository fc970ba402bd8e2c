"""Inner products of vectors that are rows, accumulated in float64.

float32 vectors stay float32 in memory. They are converted by parts that fit a cache.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

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
