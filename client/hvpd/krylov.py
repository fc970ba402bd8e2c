"""Krylov iterations, trace estimates and minimisation for symmetric operators.

Each function takes an operator of hvpd, a SciPy LinearOperator, a sparse matrix or an
array, which must be real and symmetric. Arrays and sparse matrices that are not
symmetric are refused. Nothing checks a LinearOperator: if it is not symmetric, results
are wrong. Operators of hvpd have the same functions as methods: `H.eigsh(5)` is
`eigsh(H, 5)`.

>>> import numpy as np
>>> from hvpd import krylov
>>> A = np.diag(np.arange(1.0, 101.0))
>>> values, vectors = krylov.eigsh(A, 3, which="LA")
>>> np.round(values, 8)
array([ 98.,  99., 100.])
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hvpd._krylov import lanczos as _lanczos
from hvpd._krylov import minimize as _minimize
from hvpd._krylov import quadrature, thick_restart
from hvpd._krylov import solve as _solve
from hvpd._krylov import trace as _trace
from hvpd._krylov.lanczos import Lanczos
from hvpd._krylov.results import (
    DiagonalEstimate,
    Eigenpairs,
    Estimate,
    Origin,
    Result,
    Solution,
    load,
)
from hvpd._krylov.runner import runner
from hvpd._krylov.spectrum import Spectrum
from hvpd._krylov.thick_restart import NotConvergedError
from hvpd._krylov.vectors import Array

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

__all__ = [
    "DiagonalEstimate",
    "Eigenpairs",
    "Estimate",
    "Lanczos",
    "NotConvergedError",
    "Origin",
    "Result",
    "Solution",
    "Spectrum",
    "diagonal",
    "eigsh",
    "lanczos",
    "load",
    "logdet",
    "minimize",
    "solve",
    "spectrum",
    "trace",
    "trace_of",
]


def lanczos(
    A: Any,
    steps: int,
    v0: Any = None,
    seed: int = 0,
    block: int = 1,
    reorthogonalize: Literal["full", "none"] = "full",
) -> Lanczos:
    """Run Lanczos iteration, and return the run, which can be extended.

    Each step multiplies one block. "full" makes each new block orthogonal to the whole
    basis in two passes, and keeps steps * block vectors. "none" keeps two blocks:
    Ritz values then come with copies (`Eigenpairs.ghosts`), and without vectors.

    If the space becomes invariant, the run ends early, and all of its Ritz pairs are
    exact. If a product holds NaN or infinity, the run keeps the steps before it. In
    both cases `run.reason` says so.

    Source: Golub and Van Loan, Matrix Computations, 10.1 to 10.3.

    Args:
        A: Symmetric operator of shape (n, n).
        steps: Number of steps; steps * block is at most n for "full".
        v0: Start vector of shape (n,), or (n, block); None for random ones.
        seed: Seed of random start vectors.
        block: Number of start vectors.
        reorthogonalize: "full" or "none".

    Raises:
        InvalidArgumentError: v0 is zero or not finite, or there are too many steps.

    Example:
        >>> run = hvpd.krylov.lanczos(H, 100)
        >>> run.ritz(5).values
    """
    return _lanczos.lanczos(runner(A), steps, v0, seed, block, reorthogonalize)


def eigsh(
    A: Any,
    k: int | None = None,
    which: Literal["LA", "SA", "LM", "BE"] = "LM",
    v0: Any = None,
    ncv: int | None = None,
    maxiter: int | None = None,
    tol: float = 0.0,
    return_eigenvectors: bool = True,
    seed: int = 0,
) -> Any:
    """Return k eigenvalues and eigenvectors, as `scipy.sparse.linalg.eigsh` does.

    It is Lanczos iteration with thick restarts. Once all pairs have converged, it goes
    on from a random vector, to look for copies of multiple eigenvalues.

    Source: Wu and Simon 2000 (https://doi.org/10.1137/S0895479898334605).

    Args:
        A: Symmetric operator of shape (n, n).
        k: Number of eigenvalues, 1 to n; None for 6, or n if n is less.
        which: "LA" or "SA" for the largest or smallest, "LM" for the largest magnitude,
            "BE" for half from each end.
        v0: Start vector of shape (n,); None for a random one.
        ncv: Number of vectors of the basis; None for max(2 k + 1, 20).
        maxiter: Number of restarts; None for 10 n.
        tol: A pair has converged if |A v - value v| is at most tol |value|; 0 for
            the accuracy of rounding.
        return_eigenvectors: Whether to return vectors.
        seed: Seed of random vectors.

    Returns:
        `Eigenpairs`, which unpacks as values of shape (k,), ascending, and vectors of
        shape (n, k). Without vectors, the values alone, as an array.

    Raises:
        NotConvergedError: Not all pairs have converged. It is also SciPy's
            `ArpackNoConvergence`, and its `pairs` has what was found.
        InvalidArgumentError: An argument is out of its range.

    Example:
        >>> values, vectors = hvpd.krylov.eigsh(H, 5, which="LA")
    """
    pairs = thick_restart.eigsh(
        runner(A),
        k,
        which,
        v0=v0,
        ncv=ncv,
        maxiter=maxiter,
        tol=tol,
        seed=seed,
        return_eigenvectors=return_eigenvectors,
    )
    return pairs if return_eigenvectors else pairs.values


def solve(
    A: Any,
    b: Any,
    *,
    tol: float = 1e-5,
    maxiter: int | None = None,
    x0: Any = None,
    M: Any = None,
    shifts: Sequence[float] | Array | None = None,
    method: Literal["cg", "minres"] = "cg",
) -> Solution:
    """Solve A x = b, for one or several right-hand sides, or for several shifts of A.

    With "cg", several right-hand sides share one block Krylov space. With shifts, the
    space of each right-hand side serves all of them, so that more shifts cost no more
    products, but one each at the end. The result's `converged` is about the true
    residual, for which the last products are made.

    If CG meets a direction without positive curvature, it stops. The direction is
    `solution.direction`, and x is the last iterate. MINRES takes indefinite operators.

    Sources: Dubrulle 2001 (block CG); Paige and Saunders 1975
    (https://doi.org/10.1137/0712047); Frommer and Maass 1999
    (https://doi.org/10.1137/S1064827596313310).

    Args:
        A: Symmetric operator of shape (n, n); for "cg", positive definite.
        b: Right-hand side of shape (n,), or several as columns of (n, k).
        tol: |b - A x| must be at most tol |b|.
        maxiter: Largest number of steps; None for 10 n.
        x0: Start, of the shape of b; None for zero.
        M: Positive definite approximation of A's inverse: an operator, such as
            `hvpd.nystrom(H, 20)` or `point.kfac(mu).inverse()`; a matrix; or a vector,
            the diagonal of one.
        shifts: Solves (A + shift I) x = b for each. They exclude x0 and M.
        method: "cg" or "minres".

    Raises:
        InvalidArgumentError: An argument does not fit, or M is not positive definite.

    Example:
        >>> solution = hvpd.krylov.solve(H, -gradient, tol=1e-8)
        >>> step = solution.x
    """
    return _solve.solve(runner(A), b, tol=tol, maxiter=maxiter, x0=x0, M=M, shifts=shifts, method=method)


def spectrum(
    A: Any,
    probes: int = 10,
    steps: int = 100,
    seed: int = 0,
    reorthogonalize: Literal["full", "none"] | None = None,
) -> Spectrum:
    """Return the distribution of the eigenvalues, by stochastic Lanczos quadrature.

    It takes probes * steps products, in blocks of `probes`.

    Sources: Lin, Saad, Yang 2016 (https://doi.org/10.1137/130934283); Ubaru, Chen, Saad
    2017 (https://doi.org/10.1137/16M1104974).

    Args:
        A: Symmetric operator of shape (n, n).
        probes: Number of random vectors, at least 2. Errors fall with their square
            root.
        steps: Steps of each iteration. More resolve more of the spectrum; more than n
            count as n.
        seed: Seed of the vectors.
        reorthogonalize: "full" or "none"; None for "full" if the basis of a probe has
            at most 1 GiB. Without it, nodes have copies, which share their weight.

    Raises:
        InvalidArgumentError: An argument is out of its range, or probes * steps exceeds
            1,048,576.
        HvpdError: The first products are not finite (reason `NOT_FINITE`).

    Example:
        >>> spectrum = hvpd.krylov.spectrum(H)
        >>> density = spectrum.density(spectrum.grid())
    """
    return quadrature.spectrum(runner(A), probes, steps, seed, reorthogonalize)


def trace_of(A: Any, function: Callable[[Array], Any], probes: int = 30, steps: int = 100, seed: int = 0) -> Estimate:
    """Estimate the trace of a function of A, by stochastic Lanczos quadrature.

    It takes probes * steps products. If these are at least n, and n is at most 2048, it
    takes n products with unit vectors instead, and the result is exact.

    Source: Ubaru, Chen, Saad 2017 (https://doi.org/10.1137/16M1104974).

    Args:
        A: Symmetric operator of shape (n, n).
        function: Maps an array of eigenvalues to the function's values, of the same
            shape.
        probes: Number of random vectors, at least 2.
        steps: Steps of each iteration; more than n count as n.
        seed: Seed of the vectors.

    Returns:
        An `Estimate`. Its error includes that of the quadrature, by extrapolation from
        the changes of the last two doublings of the steps. It is infinite for 1 step.
        If the method is "exact", the error is that of rounding.

    Raises:
        InvalidArgumentError: The function is not finite at an eigenvalue, or returns
            another shape than it gets.
        HvpdError: A product is not finite (reason `NOT_FINITE`).

    Example:
        >>> freedom = hvpd.krylov.trace_of(H, lambda values: values / (values + 1e-3))
    """
    return quadrature.trace_of(runner(A), function, probes, steps, seed, "trace_of")


def logdet(A: Any, probes: int = 30, steps: int = 100, seed: int = 0) -> Estimate:
    """Estimate the logarithm of the determinant of a positive definite operator.

    It is the trace of the logarithm; see `trace_of`. So it is exact for a small n.

    Args:
        A: Symmetric positive definite operator of shape (n, n).
        probes: Number of random vectors, at least 2.
        steps: Steps of each iteration; more than n count as n.
        seed: Seed of the vectors.

    Raises:
        InvalidArgumentError: A is not positive definite. The message has a bound of its
            smallest eigenvalue.

    Example:
        >>> evidence = hvpd.krylov.logdet(H.shifted(1e-3))
    """
    return quadrature.trace_of(runner(A), quadrature.log, probes, steps, seed, "logdet")


def trace(
    A: Any,
    method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace",
    products: int | None = None,
    seed: int = 0,
) -> Estimate:
    """Estimate the trace.

    "xtrace" is best if eigenvalues decay. "hutchinson" needs no memory for blocks, and
    is best if they do not.

    Sources: Epperly, Tropp, Webber 2024 (https://doi.org/10.1137/23M1548323); Meyer,
    Musco, Musco, Woodruff 2021 (https://arxiv.org/abs/2010.09649); Hutchinson 1990.

    Args:
        A: Symmetric operator of shape (n, n).
        method: "xtrace", "hutch++" or "hutchinson".
        products: Number of products to spend; None for 100. From n on, the trace is
            exact.
        seed: Seed of the random vectors.

    Raises:
        HvpdError: A product is not finite (reason `NOT_FINITE`).

    Example:
        >>> found = hvpd.krylov.trace(H, products=60)
        >>> found.value, found.standard_error
    """
    return _trace.trace(runner(A), method, products, seed)


def diagonal(
    A: Any, method: Literal["xdiag", "hutchinson"] = "xdiag", products: int | None = None, seed: int = 0
) -> DiagonalEstimate:
    """Estimate the diagonal.

    Sources: Epperly, Tropp, Webber 2024 (https://doi.org/10.1137/23M1548323); Bekas,
    Kokiopoulou, Saad 2007 (https://doi.org/10.1016/j.apnum.2007.01.003).

    Args:
        A: Symmetric operator of shape (n, n).
        method: "xdiag", which is best if eigenvalues decay, or "hutchinson".
        products: Number of products to spend; None for 100. From n on, the diagonal is
            exact.
        seed: Seed of the random vectors.

    Raises:
        HvpdError: A product is not finite (reason `NOT_FINITE`).

    Example:
        >>> values, standard_error, products = hvpd.krylov.diagonal(H)
    """
    return _trace.diagonal(runner(A), method, products, seed)


def minimize(
    objective: _minimize.Objective,
    x0: Any,
    method: Literal["trust-ncg", "newton-cg", "lbfgs"] = "trust-ncg",
    *,
    args: tuple[Any, ...] = (),
    M: Any = None,
    callback: Callable[..., object] | None = None,
    gtol: float = 1e-5,
    maxiter: int | None = None,
) -> "OptimizeResult":
    """Minimise an objective, with products in place of its Hessian.

    "trust-ncg" is the most robust: it follows negative curvature. "newton-cg" uses a
    line search. "lbfgs" needs no products.

    Sources: Steihaug 1983 (https://doi.org/10.1137/0720042) and Toint 1981 for the step
    of the trust region; Conn, Gould, Toint, Trust-Region Methods (2000); Nocedal and
    Wright, Numerical Optimization (2006), chapter 7.

    Args:
        objective: An `hvpd.Objective`; or anything whose `at(x)` has `value`,
            `gradient` and `hessian()`.
        x0: Start, of shape (n,), or what `objective.at` takes.
        method: "trust-ncg", "newton-cg" or "lbfgs".
        args: Data in place of the registered data, as for `objective.at`.
        M: Positive definite approximation of the Hessian's inverse, as for `solve`; or
            a function of a point that returns one, such as
            `lambda point: point.kfac(mu).inverse()`.
        callback: Called after each iteration, as by SciPy: `callback(x)`, or
            `callback(intermediate_result=...)` if its argument has this name. It ends
            the iteration by raising StopIteration.
        gtol: The norm of the gradient must be at most this.
        maxiter: Largest number of iterations; None for 200 n.

    Returns:
        SciPy's OptimizeResult: `x`, `fun`, `jac`, `nit`, `nfev`, `nhev` (products),
        `success`, `status`, `message`.

    Raises:
        InvalidArgumentError: x0 or the function at x0 is not finite, or M is not
            positive definite.

    Example:
        >>> found = hvpd.krylov.minimize(objective, x0)
        >>> found.x, found.success
    """
    return _minimize.minimize(
        objective, x0, method=method, args=args, gtol=gtol, maxiter=maxiter, M=M, callback=callback
    )
