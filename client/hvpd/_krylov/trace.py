"""Estimates of traces and diagonals from products with random vectors.

Sources: Epperly, Tropp, Webber 2024 (https://doi.org/10.1137/23M1548323) for XTrace and
XDiag; Meyer, Musco, Musco, Woodruff 2021 (https://arxiv.org/abs/2010.09649) for
Hutch++; Hutchinson 1990 (https://doi.org/10.1080/03610919008812866).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from hvpd._arguments import check_choice, integer
from hvpd._errors import HvpdError, InvalidArgumentError
from hvpd._krylov import probes, vectors
from hvpd._krylov.computed import Estimated
from hvpd._krylov.results import DiagonalEstimate, Estimate
from hvpd._krylov.runner import Runner
from hvpd._krylov.space import NotFiniteError
from hvpd._krylov.vectors import Array, check_scale

TRACE = ("xtrace", "hutch++", "hutchinson")
"""Choices of `method` for a trace."""

DIAGONAL = ("xdiag", "hutchinson")
"""Choices of `method` for a diagonal."""

_CORRELATED = 1.5
"""Factor of the standard error of leave-one-out estimates.

They share most of their vectors. So their deviation understates the error of their
mean, in measurements by a factor of up to 1.5."""

_BLOCK = 64
"""Vectors of one product, for methods that do not need all vectors at once."""


def trace(runner: Runner, method: str, products: int | None, seed: int) -> Estimate:
    """Return the estimate of a trace; see `hvpd.krylov.trace`."""
    check_choice(method, "method", TRACE)
    budget = _budget(products, {"xtrace": 4, "hutch++": 6, "hutchinson": 2}[method], runner.n)
    seed = integer(seed, "seed", 0)
    before = runner.products
    method = "exact" if budget >= runner.n else method
    with runner.running(f"trace by {method}") as tick, finite_only():
        found = runner.estimate(False, method, budget, seed, tick) or estimated(
            runner, False, method, budget, seed, tick
        )
    if method != "exact":
        check_scale(found.size / runner.n, runner.n, runner.dtype)
    error = float(np.hypot(found.errors[0], 4 * np.finfo(runner.dtype).eps * found.size))
    return Estimate(float(found.values[0]), error, runner.products - before, method, origin=runner.seeded(seed))


def diagonal(runner: Runner, method: str, products: int | None, seed: int) -> DiagonalEstimate:
    """Return the estimate of a diagonal; see `hvpd.krylov.diagonal`."""
    check_choice(method, "method", DIAGONAL)
    budget = _budget(products, {"xdiag": 4, "hutchinson": 2}[method], runner.n)
    seed = integer(seed, "seed", 0)
    before = runner.products
    method = "exact" if budget >= runner.n else method
    with runner.running(f"diagonal by {method}") as tick, finite_only():
        found = runner.estimate(True, method, budget, seed, tick) or estimated(runner, True, method, budget, seed, tick)
    if method != "exact":
        check_scale(float(abs(found.values).max(initial=0.0)), runner.n, runner.dtype)
    values, error = found.values.astype(runner.dtype), found.errors.astype(runner.dtype)
    return DiagonalEstimate(values, error, runner.products - before, method, origin=runner.seeded(seed))


def estimated(
    runner: Runner, of_diagonal: bool, method: str, products: int, seed: int, tick: probes.Ticking
) -> Estimated:
    """Return the estimate of the trace or of the diagonal.

    Args:
        runner: Multiplies.
        of_diagonal: Whether to estimate the diagonal.
        method: One of `TRACE` or `DIAGONAL`, or "exact".
        products: Products to take.
        seed: Seed of the random vectors.
        tick: Shows progress.

    Raises:
        NotFiniteError: A product holds NaN or infinity.
    """
    if of_diagonal:
        if method == "exact":
            return Estimated(_exact(runner), np.zeros(runner.n))
        if method == "xdiag":
            return Estimated(*_xdiag(runner, seed, products // 2))
        return Estimated(*_hutchinson_diagonal(runner, seed, products, tick))
    if method == "exact":
        terms = _exact(runner)
        value, error, size = float(terms.sum()), 0.0, float(abs(terms).sum())
    elif method == "hutchinson":
        samples = _hutchinson(runner, seed, products, tick)
        value, error, size = float(samples.mean()), float(probes.standard_error(samples)), float(abs(samples).max())
    elif method == "xtrace":
        value, error, size = _xtrace(runner, seed, products // 2)
    else:
        value, error, size = _hutchpp(runner, seed, products)
    return Estimated(np.array([value]), np.array([error]), size)


def _budget(products: int | None, least: int, n: int) -> int:
    """Return the number of products to spend; n for an exact result."""
    found = min(100 if products is None else integer(products, "products", min(least, n)), n)
    if found > MOST_PRODUCTS:
        raise InvalidArgumentError(
            f"products must be at most {MOST_PRODUCTS}, got {products}: 100 are usual", reason="STEPS"
        )
    return found


MOST_PRODUCTS = 1 << 20
"""Most products of one call. A call of more would run for hours by mistake."""


NOT_FINITE = (
    "products with finite vectors hold NaN or infinity, usually because x, the value or the gradient does: look at "
    "point.nonfinite"
)


@contextlib.contextmanager
def finite_only() -> Iterator[None]:
    """Turn NotFiniteError into the error that users see."""
    try:
        yield
    except NotFiniteError:
        raise HvpdError(NOT_FINITE, reason="NOT_FINITE") from None


def matrix(runner: Runner) -> Array:
    """Return the whole matrix in float64, by n products with unit vectors.

    Raises:
        NotFiniteError: A product holds NaN or infinity.
    """
    found = np.empty((runner.n, runner.n))
    for rows, products in _unit_products(runner):
        found[rows] = products
    return found


def _exact(runner: Runner) -> Array:
    """Return the diagonal in float64, by n products with unit vectors."""
    values = np.empty(runner.n)
    for rows, products in _unit_products(runner):
        values[rows] = products[np.arange(len(rows)), rows]
    return values


def _unit_products(runner: Runner) -> Iterator[tuple[Array, Array]]:
    """Yield blocks of rows: their positions, and their products (k, n)."""
    for start in range(0, runner.n, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, runner.n))
        units = np.zeros((len(rows), runner.n), runner.dtype)
        units[np.arange(len(rows)), rows] = 1
        yield rows, probes.finite(runner.multiply(units))


def _hutchinson(runner: Runner, seed: int, count: int, tick: probes.Ticking) -> Array:
    """Return v'Av for random signs v, float64 of shape (count,)."""
    samples = np.empty(count)
    for first in range(0, count, _BLOCK):
        V = probes.signs(seed, first, min(_BLOCK, count - first), runner.n, runner.dtype)
        samples[first : first + len(V)] = vectors.dots(V, probes.finite(runner.multiply(V)))
        tick(first + len(V), 0.0)
    return samples


def _xtrace(runner: Runner, seed: int, count: int) -> tuple[float, float, float]:
    """Return the mean of the leave-one-out estimates, its error, and the size of the
    numbers that were added.
    """
    R, W, H = runner.sketch(seed, count)
    S = probes.left_out(R)
    X = W - S * (S * W).sum(axis=0)
    squares = np.maximum(runner.n - (X**2).sum(axis=0), 0.0)
    rests = (W * R).sum(axis=0) - 2 * (X * R).sum(axis=0) + (X * (H @ X)).sum(axis=0)
    dimensions = runner.n - (len(R) - S.any(axis=0))
    scale = np.where(squares > 1e-10 * runner.n, dimensions / np.where(squares > 0, squares, 1.0), 0.0)
    samples = np.trace(H) - (S * (H @ S)).sum(axis=0) + scale * rests
    size = float(abs(np.diag(H)).sum() + (abs(W) * abs(R)).sum(axis=0).max(initial=0.0))
    return float(samples.mean()), _CORRELATED * float(probes.standard_error(samples)), size


def _hutchpp(runner: Runner, seed: int, budget: int) -> tuple[float, float, float]:
    """Return the estimate, its error, and the size of the numbers that were added. Each
    of three parts takes a third of the products.
    """
    third = budget // 3
    omega = probes.signs(seed, 0, third, runner.n, runner.dtype)
    found = probes.sketched(runner.multiply, omega)
    H, Q = found.sketch.H, found.Q
    G = probes.signs(seed, third, budget - 2 * third, runner.n, runner.dtype)
    if len(Q):
        vectors.subtract(G, vectors.gram(Q, G), Q)
    samples = vectors.dots(G, probes.finite(runner.multiply(G)))
    size = float(abs(np.diag(H)).sum() + abs(samples).max())
    return float(np.trace(H) + samples.mean()), float(probes.standard_error(samples)), size


def _xdiag(runner: Runner, seed: int, count: int) -> tuple[Array, Array]:
    """Return the mean of the leave-one-out estimates and its error, (n,) each."""
    omega = probes.signs(seed, 0, count, runner.n, runner.dtype)
    found = probes.sketched(runner.multiply, omega)
    (R, _, _), Q, Z = found
    S = probes.left_out(R)
    lengths = (S * R).sum(axis=0)
    values, errors = np.zeros(runner.n), np.zeros(runner.n)
    eps = np.finfo(runner.dtype).eps
    for part in vectors.parts(4 * count, runner.n):
        q, z, signs = (block[:, part].T.astype(np.float64) for block in (Q, Z, omega))
        lost = q @ S
        samples = (q * z).sum(axis=1, keepdims=True) - lost * (z @ S) + signs * lost * lengths
        values[part] = samples.mean(axis=1)
        rounding = 4 * eps * (abs(q * z).sum(axis=1) + abs(lost * lengths).max(axis=1, initial=0.0))
        errors[part] = np.hypot(_CORRELATED * probes.standard_error(samples), rounding)
    return values, errors


def _hutchinson_diagonal(runner: Runner, seed: int, count: int, tick: probes.Ticking) -> tuple[Array, Array]:
    """Return the mean of v * (A v) for random signs v, and its error."""
    samples: Any = np.empty((runner.n, count), runner.dtype)
    for first in range(0, count, _BLOCK):
        V = probes.signs(seed, first, min(_BLOCK, count - first), runner.n, runner.dtype)
        samples[:, first : first + len(V)] = (V * probes.finite(runner.multiply(V))).T
        tick(first + len(V), 0.0)
    return samples.mean(axis=1, dtype=np.float64), probes.standard_error(samples)
