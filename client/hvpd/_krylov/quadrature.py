"""Functions of a symmetric operator by stochastic Lanczos quadrature.

Each Lanczos iteration from a random sign vector v gives a Gauss quadrature of the
spectrum, weighted by v. The mean over several vectors estimates trace f(A). For a small
operator, n products with unit vectors cost less, and are exact.

Sources: Golub and Meurant, Matrices, Moments and Quadrature (2010); Ubaru, Chen, Saad
2017 (https://doi.org/10.1137/16M1104974); Lin, Saad, Yang 2016
(https://doi.org/10.1137/130934283) for densities.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg

from hvpd import _arrays, _text
from hvpd._arguments import integer
from hvpd._errors import HvpdError, InvalidArgumentError
from hvpd._krylov import probes as _probes
from hvpd._krylov.probes import Tridiagonals
from hvpd._krylov.results import Estimate
from hvpd._krylov.runner import Runner
from hvpd._krylov.spectrum import Spectrum
from hvpd._krylov.trace import MOST_PRODUCTS, NOT_FINITE, finite_only, matrix
from hvpd._krylov.vectors import Array, check_scale

_DENSE = 2048
"""Largest n whose matrix is made for an exact trace: 32 MiB in float64."""


def spectrum(runner: Runner, probes: int, steps: int, seed: int, reorthogonalize: str | None) -> Spectrum:
    """Return the Spectrum of an operator; see `hvpd.krylov.spectrum`."""
    before = runner.products
    found = _run(runner, probes, steps, seed, reorthogonalize)
    nodes, weights = rules(found, found.alphas.shape[1])
    return Spectrum(
        nodes,
        weights,
        found.sizes,
        cumulative_error(nodes, weights),
        runner.n,
        runner.products - before,
        found.reorthogonalize,
        "all steps are done" if found.finite else "a product holds NaN or infinity: the nodes are from before it",
        origin=runner.seeded(seed),
    )


def trace_of(
    runner: Runner, function: Callable[[Array], Any], probes: int, steps: int, seed: int, name: str
) -> Estimate:
    """Return the estimate of trace f(A); see `hvpd.krylov.trace_of`."""
    if not callable(function):
        raise InvalidArgumentError(
            f"function must be a function of an array of eigenvalues, such as numpy.sqrt, got {_text.described(function)}",
            reason="INVALID_OPTION",
        )
    before = runner.products
    probes, steps, seed = _checked(runner, probes, steps, seed)
    if runner.n <= min(probes * steps, _DENSE):
        with runner.running(f"{name} by n products"), finite_only():
            dense = matrix(runner)
        value, error = _exact(dense, function, name, float(np.finfo(runner.dtype).eps))
        return Estimate(value, error, runner.products - before, "exact", origin=runner.seeded(seed))
    found = _run(runner, probes, steps, seed, None)
    if not found.finite:
        raise HvpdError(NOT_FINITE, reason="NOT_FINITE")
    samples = runner.n * _expectations(found, found.alphas.shape[1], function, name)
    bias = _bias(found, samples, runner.n, function, name)
    rounding = np.finfo(runner.dtype).eps * float(abs(samples).max())
    error = float(np.sqrt(_probes.standard_error(samples) ** 2 + bias**2 + rounding**2))
    return Estimate(float(samples.mean()), error, runner.products - before, name, origin=runner.seeded(seed))


def log(values: Array) -> Array:
    """Return logarithms.

    Raises:
        InvalidArgumentError: A value is not positive.
    """
    if (values <= 0).any():
        raise InvalidArgumentError(
            f"the operator is not positive definite: it has an eigenvalue of at most {values.min():.6g}; add a shift of more than "
            f"{-values.min():.3g}",
            reason="NOT_POSITIVE_DEFINITE",
        )
    return np.log(values)


def rules(found: Tridiagonals, most: int) -> tuple[Array, Array]:
    """Return the nodes and weights of the first `most` steps, each of shape (p, most).

    The weights of each row add up to 1. An iteration of fewer steps ends with weights
    of 0.
    """
    p = len(found.alphas)
    nodes, weights = np.zeros((p, most)), np.zeros((p, most))
    for row in range(p):
        size = min(int(found.sizes[row]), most)
        values, Y = scipy.linalg.eigh_tridiagonal(found.alphas[row, :size], found.betas[row, : size - 1])
        nodes[row, :size], weights[row, :size] = values, Y[0] ** 2
        nodes[row, size:] = values[-1]
    return nodes, weights


def cumulative_error(nodes: Array, weights: Array) -> float:
    """Return the largest standard error of the share of eigenvalues below a node."""
    thresholds = np.unique(nodes)[:: max(nodes.size // 500, 1)]
    shares = np.array([(weights * (nodes <= threshold)).sum(axis=1) for threshold in thresholds])
    return float(_probes.standard_error(shares).max())


def steps_error(nodes: Array, weights: Array, sizes: Array, n: int, thresholds: Array) -> Array:
    """Return bounds of the error that few steps make of the shares below thresholds.

    A Gauss quadrature's share below a threshold is wrong by at most the weight of one
    of the two nodes beside it. An iteration that ended by itself has no such error.

    Source: the Chebyshev-Markov-Stieltjes inequalities; Szego, Orthogonal Polynomials
        (1975), 3.41.

    Args:
        nodes: Nodes of shape (p, steps).
        weights: Their weights.
        sizes: Nodes of each probe that count, of shape (p,).
        n: Number of eigenvalues.
        thresholds: Thresholds of shape (t,).
    """
    found = np.zeros(len(thresholds))
    for row in np.flatnonzero((sizes == nodes.shape[1]) & (sizes < n)):
        padded = np.concatenate([[0.0], weights[row, : sizes[row]], [0.0]])
        places = np.searchsorted(nodes[row, : sizes[row]], thresholds)
        found += np.maximum(padded[places], padded[places + 1])
    bound: Array = found / len(nodes)
    return bound


def _checked(runner: Runner, probes: int, steps: int, seed: int) -> tuple[int, int, int]:
    """Return probes, steps of at most n, and seed, if they are valid."""
    probes, steps = integer(probes, "probes", 2), integer(steps, "steps", 1, None)
    return probes, min(steps, runner.n), integer(seed, "seed", 0)


def _exact(dense: Array, function: Callable[[Array], Any], name: str, eps: float) -> tuple[float, float]:
    """Return trace f(A) of a matrix, and its error by rounding.

    The error is how much f changes if rounding moves the eigenvalues.
    """
    values = np.linalg.eigvalsh((dense + dense.T) / 2)
    found = _applied(function, values, name)
    moved = _values(function, values + 4 * eps * abs(values).max(initial=0.0)) - found
    moved = moved[np.isfinite(moved)]
    return float(found.sum()), float(np.hypot(np.linalg.norm(moved), 4 * eps * abs(found).sum()))


def _run(runner: Runner, probes: int, steps: int, seed: int, reorthogonalize: str | None) -> Tridiagonals:
    probes, steps, seed = _checked(runner, probes, steps, seed)
    if probes * steps > MOST_PRODUCTS:
        raise InvalidArgumentError(
            f"{probes} probes of {steps} steps are {probes * steps} products, and one call takes at most {MOST_PRODUCTS}: take fewer "
            "probes, of which 10 to 30 are usual, or fewer steps, of which 100 are usual",
            reason="STEPS",
        )
    if reorthogonalize not in (None, "full", "none"):
        raise InvalidArgumentError(
            f'reorthogonalize must be "full", "none" or None, got {_text.described(reorthogonalize)}',
            reason="INVALID_OPTION",
        )
    most = {None: _probes.BASIS_BYTES, "full": 1 << 62, "none": 0}[reorthogonalize]
    with runner.running("spectrum", probes * steps) as tick:
        found = runner.tridiagonals(seed=seed, probes=probes, steps=steps, tick=tick, basis_bytes=most)
    if not found.finite and not found.sizes.all():
        raise HvpdError(NOT_FINITE, reason="NOT_FINITE")
    with np.errstate(invalid="ignore"):
        largest = max(float(abs(part).max(initial=0.0)) for part in (found.alphas, found.betas))
    check_scale(largest, runner.n, runner.dtype)
    return found


def _expectations(found: Tridiagonals, most: int, function: Callable[[Array], Any], name: str) -> Array:
    """Return the mean of the function under each iteration's quadrature, (p,)."""
    nodes, weights = rules(found, most)
    used = weights > 0
    values = np.zeros_like(nodes)
    values[used] = _applied(function, nodes[used], name)
    result: Array = (values * weights).sum(axis=1)
    return result


def _bias(found: Tridiagonals, samples: Array, n: int, function: Callable[[Array], Any], name: str) -> float:
    """Return the error of the quadrature itself, by extrapolation.

    d1 and d2 are the changes of the mean by the last two doublings of the steps. If
    each doubling shrinks the change by the same factor r = d2 / d1, the changes to come
    add up to d2 r / (1 - r). An iteration of fewer steps is exact.

    Args:
        found: The iterations.
        samples: The estimate of each, of shape (p,).
        n: Number of eigenvalues.
        function: The function.
        name: Name of the result.
    """
    steps = found.alphas.shape[1]
    if found.reorthogonalize == "full" and steps >= n:
        return 0.0
    quarter = steps // 4
    # A quarter is rounded down, and so d2 is rather too large.
    halves = n * _expectations(found, 2 * quarter or max(steps // 2, 1), function, name)
    inexact = found.sizes >= steps
    d2 = abs(float(((samples - halves) * inexact).mean()))
    if steps == 1 and inexact.any():
        return np.inf
    ratio = _SLOWEST
    if quarter:
        earlier = n * _expectations(found, quarter, function, name)
        d1 = abs(float(((halves - earlier) * inexact).mean()))
        ratio = min(d2 / d1, _SLOWEST) if d1 else _SLOWEST
    return d2 * max(ratio / (1 - ratio), 1.0)


_SLOWEST = 0.95
"""Largest ratio of two changes that counts. The changes of the slowest convergence add
up to 19 times the last one."""


def _applied(function: Callable[[Array], Any], nodes: Array, name: str) -> Array:
    """Return the function's values.

    Raises:
        InvalidArgumentError: A value is not finite.
    """
    values = _values(function, nodes)
    if not np.isfinite(values).all():
        bad = nodes[~np.isfinite(values)][0]
        raise InvalidArgumentError(
            f"{name} is not finite at {bad:.6g}, which is near an eigenvalue of the operator: pass a function that is "
            "finite there, or add a shift to the operator",
            reason="NOT_FINITE",
        )
    return values


def _values(function: Callable[[Array], Any], nodes: Array) -> Array:
    with np.errstate(all="ignore"):  # Values that are not finite get an error of their own.
        found = np.asarray(function(nodes))
    if found.shape != nodes.shape or found.dtype.kind not in "fiub":
        raise InvalidArgumentError(
            f"function must return a real number for each eigenvalue: it got an array of shape {nodes.shape}, and returned "
            f"{found.dtype} of shape {found.shape}",
            reason=_arrays.fault(found),
        )
    return found.astype(np.float64, copy=False)
