"""Random vectors, and Lanczos iterations and sketches that begin with them.

Vector i of a seed is the same in every group of vectors and on every machine. So a
server makes the vectors itself, from the seed.

`tridiagonals` and `sketch` are primitives that a server may run: few numbers come back.
"""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.special

from hvpd._krylov import vectors
from hvpd._krylov.space import LEAST_LEFT, Multiply, NotFiniteError
from hvpd._krylov.vectors import Array

BASIS_BYTES = 1 << 30
"""Most bytes of all bases that are kept at once for full reorthogonalization."""

GROUP_BYTES = 256 << 20
"""Most bytes of the vectors of one product."""


class Ticking(Protocol):
    """Shows progress: the steps so far, and the current residual, or 0."""

    def __call__(self, done: int, residual: float, /) -> object: ...


def signs(seed: int, first: int, count: int, n: int, dtype: npt.DTypeLike) -> Array:
    """Return the random signs `first` to `first + count` of a seed, as rows."""
    rows = np.empty((count, n), dtype)
    for row in range(count):
        random = np.random.default_rng([seed, first + row])
        rows[row] = random.integers(0, 2, n, dtype=np.int8) * 2 - 1
    return rows


def spherical(seed: int, count: int, n: int, dtype: npt.DTypeLike) -> Array:
    """Return random vectors of norm sqrt(n), uniform in direction, as rows."""
    rows = np.empty((count, n), dtype)
    for row in range(count):
        vector = np.random.default_rng([seed, row]).standard_normal(n)
        rows[row] = vector * (np.sqrt(n) / np.linalg.norm(vector))
    return rows


@dataclasses.dataclass
class Tridiagonals:
    """The tridiagonal matrices of p Lanczos iterations of at most m steps."""

    alphas: Array
    """Diagonals, float64 of shape (p, m)."""
    betas: Array
    """Subdiagonals, float64 of shape (p, m - 1)."""
    sizes: Array
    """Number of steps of each iteration, integers of shape (p,).

    It is below m if the space is invariant, or if a product was not finite."""
    reorthogonalize: str
    """"full" or "none": what was done."""
    finite: bool
    """Whether all products were finite."""


def tridiagonals(
    multiply: Multiply,
    n: int,
    dtype: np.dtype[np.floating],
    *,
    seed: int,
    probes: int,
    steps: int,
    tick: Ticking,
    basis_bytes: int = BASIS_BYTES,
) -> Tridiagonals:
    """Run Lanczos iteration from random signs, side by side.

    Their products go as one block. All bases are kept for full reorthogonalization, in
    as many groups as the memory needs, if at least one basis fits.

    Args:
        multiply: Multiplies a block.
        n: Number of elements of a vector.
        dtype: float32 or float64.
        seed: Seed of the signs.
        probes: Number of iterations p.
        steps: Steps of each, m.
        tick: Shows progress.
        basis_bytes: Most bytes of bases.
    """
    full = steps * n * dtype.itemsize <= basis_bytes
    limit = basis_bytes // (steps * n * dtype.itemsize) if full else GROUP_BYTES // (n * dtype.itemsize)
    width = max(min(limit, GROUP_BYTES // (n * dtype.itemsize), probes), 1)
    found = Tridiagonals(
        np.zeros((probes, steps)),
        np.zeros((probes, max(steps - 1, 0))),
        np.zeros(probes, np.int64),
        "full" if full else "none",
        finite=True,
    )
    for first in range(0, probes, width):
        start = signs(seed, first, min(width, probes - first), n, dtype) / dtype.type(np.sqrt(n))
        rows = slice(first, first + len(start))
        _iterate(multiply, start, found, rows, tick)
    return found


def _iterate(multiply: Multiply, V: Array, found: Tridiagonals, rows: slice, tick: Ticking) -> None:
    """Run the iterations of one group, and note their numbers."""
    p, n = V.shape
    steps, dtype = found.alphas.shape[1], V.dtype
    full = found.reorthogonalize == "full"
    basis = np.empty((p, steps if full else 0, n), dtype)
    before, beta, size = np.zeros_like(V), np.zeros(p), np.zeros(p)
    alphas, betas, sizes = found.alphas[rows], found.betas[rows], found.sizes[rows]
    going = np.ones(p, bool)
    for step in range(steps):
        if full:
            basis[:, step] = V
        W = np.array(multiply(V), dtype)
        if not np.isfinite(W).all():
            found.finite = False
            return
        W -= beta[:, None].astype(dtype) * before
        alpha = vectors.dots(V, W)
        W -= alpha[:, None].astype(dtype) * V
        if full:
            for row in np.flatnonzero(going):
                _orthogonalize(W[row : row + 1], basis[row, : step + 1])
        alphas[going, step] = alpha[going]
        sizes[going] = step + 1
        size = np.maximum(size, abs(alpha) + beta)
        beta = vectors.norms(W)
        going &= beta > 10 * np.finfo(dtype).eps * size
        tick((rows.start * steps) + (step + 1) * p, 0.0)
        if step + 1 == steps or not going.any():
            return
        betas[going, step] = beta[going]
        beta = np.where(going, beta, 0.0)
        before, V = V, W * np.where(going, 1.0 / np.where(going, beta, 1.0), 0.0)[:, None].astype(dtype)


def _orthogonalize(w: Array, Q: Array) -> None:
    """Make a row of the three-term recurrence orthogonal to all rows of Q."""
    after = float(vectors.norms(w)[0])
    for _ in range(3):
        vectors.subtract(w, vectors.gram(Q, w), Q)
        before, after = after, float(vectors.norms(w)[0])
        if not after < LEAST_LEFT * before:
            return


class Sketch(NamedTuple):
    """The small matrices of a sketch A Omega = Q R of a symmetric operator."""

    R: Array
    """Float64 of shape (r, N)."""
    W: Array
    """Q^T Omega, float64 of shape (r, N)."""
    H: Array
    """Q^T A Q, float64 of shape (r, r)."""


class Range(NamedTuple):
    """A sketch with its vectors, as rows."""

    sketch: Sketch
    Q: Array
    """Orthonormal basis, of shape (r, n)."""
    Z: Array
    """A Q, of shape (r, n)."""


def sketched(multiply: Multiply, omega: Array) -> Range:
    """Return the range of A Omega.

    Raises:
        NotFiniteError: A product holds NaN or infinity.
    """
    Y = finite(multiply(omega))
    columns, upper, order = scipy.linalg.qr(Y.T.astype(np.float64), mode="economic", pivoting=True)
    sizes = abs(np.diag(upper))
    rank = int((sizes > np.finfo(Y.dtype).eps * sizes.max(initial=0.0)).sum())
    R = np.empty((rank, len(omega)))
    R[:, order] = upper[:rank]
    Q = np.ascontiguousarray(columns[:, :rank].T, dtype=Y.dtype)
    Z = finite(multiply(Q)) if rank else Q
    H = vectors.gram(Q, Z)
    return Range(Sketch(R, vectors.gram(Q, omega), (H + H.T) / 2), Q, Z)


def finite(products: Array) -> Array:
    """Return the products.

    Raises:
        NotFiniteError: They hold NaN or infinity.
    """
    if not np.isfinite(products).all():
        raise NotFiniteError
    return products


def left_out(R: Array) -> Array:
    """Return the unit vectors s_i, float64 of shape (r, N).

    s_i spans the part of the range that is lost without column i of A Omega. It is zero
    if the other columns span the whole range.
    """
    if not R.size:
        return np.zeros_like(R)
    U, values, V = np.linalg.svd(R, full_matrices=False)  # NumPy's, because SciPy's holds the GIL.
    S = U @ (V / values[:, None])
    needed = (V**2).sum(axis=0) > 1 - 1e-6
    found: Array = np.where(needed, S / np.linalg.norm(S, axis=0), 0.0)
    return found


def standard_error(samples: Array) -> Array:
    """Return the standard error of the mean over the last axis.

    The deviation of few samples is itself an estimate, so this is its upper bound at
    95 % confidence, for normal samples. So the mean lies within 2 standard errors at
    least as often as for a known deviation.
    """
    count = samples.shape[-1]
    if count < 2:
        return np.full(samples.shape[:-1], np.inf)
    factor = np.sqrt((count - 1) / scipy.special.chdtri(count - 1, 0.95))
    found: Array = samples.std(axis=-1, ddof=1) * (factor / np.sqrt(count))
    return found
