"""The diagonal of a symmetric operator that can only be multiplied by."""

from typing import Any, NamedTuple

import numpy as np

from hvpd import _blocks, _codec

_EXACT = 2048
"""Up to this n, n products are taken without asking."""

_SAMPLES = 256
"""Beyond that; the standard error falls with the square root."""


class Diagonal(NamedTuple):
    """A diagonal, and how well it is known. Made by `CurvatureOperator.diagonal`."""

    values: _codec.Array
    """Shape (n,)."""
    standard_error: _codec.Array
    """Standard error of each value, of shape (n,): the sample deviation over the square root of the samples; 0 where exact."""
    products: int
    """Vectors that were multiplied."""


def diagonal(multiply: _blocks.Multiply, n: int, dtype: np.dtype[Any], *, samples: int | None, seed: int) -> Diagonal:
    """The diagonal in float64; exact where that takes no more products. See `CurvatureOperator.diagonal`."""
    seed = _blocks.integer(seed, "seed", 0)
    if samples is None:
        samples = n if n <= _EXACT else _SAMPLES
    samples = _blocks.integer(samples, "samples", min(2, n))
    if samples >= n:
        return _exact(multiply, n, dtype)
    return _estimate(multiply, n, dtype, samples, np.random.default_rng(seed))


def _exact(multiply: _blocks.Multiply, n: int, dtype: np.dtype[Any]) -> Diagonal:
    values = np.empty(n)
    for span, rows in _blocks.unit_products(multiply, n, dtype):
        values[span] = rows[np.arange(len(rows)), np.arange(span.start, span.stop)]
    return Diagonal(values, np.zeros(n), n)


def _estimate(
    multiply: _blocks.Multiply, n: int, dtype: np.dtype[Any], samples: int, random: np.random.Generator
) -> Diagonal:
    """Hutchinson's: E[v * (A v)] = diag(A) for signs v. Mean and squares block by block, as Chan, Golub, LeVeque 1983 merge them."""
    mean, squares, taken = np.zeros(n), np.zeros(n), 0
    for span in _blocks.spans(samples, n, dtype):
        signs = random.integers(0, 2, (span.stop - span.start, n), dtype=np.int8).astype(dtype) * 2 - 1
        terms = (signs * _blocks.products(multiply, signs)).astype(np.float64)
        block_mean = terms.mean(axis=0)
        total = taken + len(terms)
        delta = block_mean - mean
        squares += ((terms - block_mean) ** 2).sum(axis=0) + delta**2 * (taken * len(terms) / total)
        mean += delta * (len(terms) / total)
        taken = total
    return Diagonal(mean, np.sqrt(squares / (samples - 1) / samples), samples)
