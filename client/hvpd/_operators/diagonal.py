"""The diagonal of a symmetric operator, from products."""

from typing import Any, NamedTuple

import numpy as np

from hvpd._arguments import integer
from hvpd._operators import blocks
from hvpd._wire import codec

_EXACT = 2048
"""Largest n for which the default is n products and the exact diagonal."""

_SAMPLES = 256
"""Default samples for larger n. The standard error falls with their square root."""


class Diagonal(NamedTuple):
    """A diagonal with its standard error. Made by `CurvatureOperator.diagonal`.

    Example:
        >>> values, standard_error, products = H.diagonal()
    """

    values: codec.Array
    """Values of shape (n,)."""
    standard_error: codec.Array
    """Standard error of each value, of shape (n,); 0 for an exact diagonal.

    It is the sample deviation over the square root of the samples."""
    products: int
    """Vectors that were multiplied."""


def diagonal(multiply: blocks.Multiply, n: int, dtype: np.dtype[Any], *, samples: int | None, seed: int) -> Diagonal:
    """Return the diagonal in float64; see `CurvatureOperator.diagonal`."""
    seed = integer(seed, "seed", 0)
    if samples is None:
        samples = n if n <= _EXACT else _SAMPLES
    samples = integer(samples, "samples", min(2, n))
    if samples >= n:
        return _exact(multiply, n, dtype)
    return _estimate(multiply, n, dtype, samples, np.random.default_rng(seed))


def _exact(multiply: blocks.Multiply, n: int, dtype: np.dtype[Any]) -> Diagonal:
    values = np.empty(n)
    for span, rows in blocks.unit_products(multiply, n, dtype):
        values[span] = rows[np.arange(len(rows)), np.arange(span.start, span.stop)]
    return Diagonal(values, np.zeros(n), n)


def _estimate(
    multiply: blocks.Multiply, n: int, dtype: np.dtype[Any], samples: int, random: np.random.Generator
) -> Diagonal:
    """Estimate the diagonal as Hutchinson does: E[v * (A v)] = diag(A) for signs v.

    Mean and squares are merged by blocks, as Chan, Golub, LeVeque 1983 do.
    """
    mean, squares, taken = np.zeros(n), np.zeros(n), 0
    for span in codec.spans(samples, n, dtype):
        signs = random.integers(0, 2, (span.stop - span.start, n), dtype=np.int8).astype(dtype) * 2 - 1
        terms = (signs * blocks.products(multiply, signs)).astype(np.float64)
        block_mean = terms.mean(axis=0)
        total = taken + len(terms)
        delta = block_mean - mean
        squares += ((terms - block_mean) ** 2).sum(axis=0) + delta**2 * (taken * len(terms) / total)
        mean += delta * (len(terms) / total)
        taken = total
    return Diagonal(mean, np.sqrt(squares / (samples - 1) / samples), samples)
