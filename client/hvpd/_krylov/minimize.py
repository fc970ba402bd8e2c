"""Minimisation by trust regions, Newton's method and L-BFGS, with products only.

Sources: Conn, Gould, Toint, Trust-Region Methods (2000) for "trust-ncg"; Nocedal and
Wright, Numerical Optimization (2006), 7.1 for "newton-cg" and 7.2 for "lbfgs"; Lewis
and Overton 2013 (https://doi.org/10.1007/s10107-012-0514-2) for the line search.
"""

import inspect
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hvpd import _text
from hvpd._arguments import check_choice, finite, integer
from hvpd._errors import InvalidArgumentError
from hvpd._krylov import trust_region, vectors
from hvpd._krylov.preconditioning import preconditioner
from hvpd._krylov.runner import Runner, runner
from hvpd._krylov.vectors import Array

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

METHODS = ("trust-ncg", "newton-cg", "lbfgs")
"""Choices of `method`."""

SUCCESS = "the norm of the gradient is within the tolerance"
MAXITER = "the number of iterations is at its limit"
PRECISION = "rounding hides any further decrease; the gradient is above the tolerance"
NOT_FINITE = "a product holds NaN or infinity; x is the last point"
STOPPED = "the callback raised StopIteration"
_STATUS = {SUCCESS: 0, MAXITER: 1, PRECISION: 2, NOT_FINITE: 3, STOPPED: 99}

UNBOUNDED = "f still falls, and x or the gradient has grown without end: is f unbounded below?"
"""Added to the message of a search that fails."""

_NO_POINT = "the search finds no lower point whose value is finite"

_GRADIENT_GROWTH, _X_GROWTH = 1e6, 1e8
"""Factors over the start above which growth counts as unbounded."""

_MEMORY = 10
"""Pairs that L-BFGS keeps."""

_LINE_STEPS = 40
"""Most points of one line search."""


class Point(Protocol):
    """A point with value, gradient and curvature."""

    @property
    def value(self) -> float:
        """Return f(x)."""
        ...

    @property
    def gradient(self) -> Array:
        """Return the gradient, of shape (n,)."""
        ...

    def hessian(self) -> Any:
        """Return the Hessian, any symmetric operator."""
        ...


class Objective(Protocol):
    """A function that makes points."""

    def at(self, x: Any, /, *data: Any) -> Point:
        """Return the point x."""
        ...


class Search:
    """A minimisation: its point, its counts, and the parts that all methods share."""

    def __init__(
        self,
        objective: Objective,
        x0: Any,
        args: tuple[Any, ...],
        gtol: float,
        maxiter: int | None,
        M: Any,
        callback: Any,
    ) -> None:
        self._objective, self._args, self._M = objective, args, M
        self._callback = _called(callback)
        self.plain = M is None
        """Whether the trust region is a ball in the usual norm."""
        self.gtol = finite(gtol, "gtol")
        if self.gtol < 0:
            raise InvalidArgumentError(f"gtol must be at least 0, got {gtol}", reason="INVALID_OPTION")
        vector = getattr(objective, "vector", None)
        x = np.array(np.asarray(x0) if vector is None else vector(x0, "x0"))
        self.x = x if x.dtype in (np.float32, np.float64) else x.astype(np.float64)
        if self.x.ndim != 1:
            raise InvalidArgumentError(
                f"x0 must have the shape (n,), got {self.x.dtype} of shape {self.x.shape}", reason="SHAPE"
            )
        if bad := int(np.count_nonzero(~np.isfinite(self.x))):
            raise InvalidArgumentError(
                f"x0 must be finite, got NaN or infinity in {bad} of {self.x.size} elements: pass finite numbers",
                reason="NOT_FINITE",
            )
        self.limit = 200 * len(self.x) if maxiter is None else integer(maxiter, "maxiter", 0)
        self.evaluations = self.products = self.iterations = 0
        self.point = self.at(self.x)
        if not self.good(self.point):
            raise InvalidArgumentError(
                "the value or the gradient at x0 is NaN or infinity: start from another point", reason="NOT_FINITE"
            )
        self._start = self.point.value, self.norm, float(vectors.norms(self.x[None])[0])

    def at(self, x: Array) -> Point:
        """Return a point, and count it."""
        self.evaluations += 1
        return self._objective.at(x, *self._args)

    def moved(self, alpha: float, p: Array) -> tuple[Array, Point]:
        """Return x + alpha p and its point."""
        alpha = float(self.x.dtype.type(alpha))
        x = self.x + self.x.dtype.type(alpha) * p
        move = getattr(self.point, "moved", None)
        if move is None:
            return x, self.at(x)
        self.evaluations += 1
        return x, move(alpha, p)

    @staticmethod
    def good(point: Point) -> bool:
        """Return whether value and gradient are finite."""
        return bool(np.isfinite(point.value) and np.isfinite(point.gradient).all())

    @property
    def gradient(self) -> Array:
        """Return the gradient at the point, in the dtype of x."""
        return np.asarray(self.point.gradient, self.x.dtype)

    @property
    def norm(self) -> float:
        """Return the norm of the gradient."""
        return float(vectors.norms(self.gradient[None])[0])

    @property
    def rounding(self) -> float:
        """Return the size of changes of the value that rounding hides."""
        return 10 * float(np.finfo(self.x.dtype).eps) * max(abs(self.point.value), float(np.finfo(np.float32).tiny))

    def hessian(self) -> Runner:
        """Return the runner of the Hessian at the point."""
        return runner(self.point.hessian())

    @property
    def preconditioner(self) -> Any:
        """Return M at the point, as the user gave it."""
        made = callable(self._M) and not hasattr(self._M, "matvec") and not hasattr(self._M, "__array__")
        return self._M(self.point) if made else self._M

    def step(self, gradient: Array, radius: float) -> trust_region.Step:
        """Return the step of truncated CG, with the tolerance of Newton's method."""
        rows, exponents = vectors.scaled(gradient[None])  # So that no product overflows.
        exponent = int(exponents[0])
        norm = float(vectors.norms(rows)[0])
        newton = min(0.5, np.sqrt(np.ldexp(norm, exponent)))
        M = self.preconditioner
        preconditioner(M, len(self.x), self.x.dtype)  # Here, so that every runner refuses the same M.
        found = self.hessian().steihaug(
            rows[0], float(np.ldexp(radius, -exponent)), tol=newton * norm, maxiter=2 * len(self.x) + 10, M=M
        )
        self.products += found.products
        with np.errstate(over="ignore", under="ignore"):
            return found._replace(
                p=np.ldexp(found.p, exponent), predicted=float(np.ldexp(found.predicted, 2 * exponent))
            )

    def accept(self, x: Array, point: Point) -> None:
        """Move to a point."""
        self.x, self.point = x, point

    def iterated(self) -> str | None:
        """End an iteration; return why the search ends, or None."""
        self.iterations += 1
        if self._callback is not None:
            try:
                self._callback(_result(x=self.x.copy(), fun=self.point.value, nit=self.iterations))
            except StopIteration:
                return STOPPED
        return None

    @property
    def unbounded(self) -> bool:
        """Return whether f has fallen, and x or the gradient has grown without end."""
        value, norm, size = self._start
        grown = self.norm > _GRADIENT_GROWTH * norm
        return self.point.value < value and (
            grown or float(vectors.norms(self.x[None])[0]) > _X_GROWTH * max(size, 1.0)
        )

    def result(self, message: str) -> "OptimizeResult":
        """Return SciPy's result."""
        text = f"{message}, maxiter={self.limit}" if message == MAXITER else message
        if message in (MAXITER, PRECISION, NOT_FINITE) and self.unbounded:
            text = f"{_NO_POINT if message == PRECISION else text}; {UNBOUNDED}"
        return _result(
            x=self.x,
            fun=self.point.value,
            jac=self.gradient.copy(),
            nit=self.iterations,
            nfev=self.evaluations,
            njev=self.evaluations,
            nhev=self.products,
            success=message == SUCCESS,
            status=_STATUS[message],
            message=text,
        )


def _result(**fields: Any) -> "OptimizeResult":
    """Return a result of SciPy's class, whose import is slow and therefore late."""
    from scipy.optimize import OptimizeResult

    kind: Any = OptimizeResult  # The stubs know none of its fields.
    found: OptimizeResult = kind(**fields)
    return found


def minimize(
    objective: Objective,
    x0: Any,
    *,
    method: str,
    args: tuple[Any, ...],
    gtol: float,
    maxiter: int | None,
    M: Any,
    callback: Any,
) -> "OptimizeResult":
    """Return a minimum; see `hvpd.krylov.minimize`."""
    check_choice(method, "method", METHODS)
    search = Search(objective, x0, args, gtol, maxiter, M, callback)
    run = {"trust-ncg": _trust, "newton-cg": _newton, "lbfgs": _lbfgs}[method]
    return search.result(run(search))


def _trust(search: Search) -> str:
    radius = 1.0
    smallest = float(np.finfo(search.x.dtype).eps)
    while search.norm > search.gtol:
        if search.iterations >= search.limit:
            return MAXITER
        step = search.step(search.gradient, radius)
        if step.reason == trust_region.NOT_FINITE and not step.p.any():
            return NOT_FINITE
        x, point = search.moved(1.0, step.p)
        # Near the minimum, rounding hides the decrease of a step. Both differences are
        # lifted by the size of rounding, so that such a step counts as good.
        lift = search.rounding
        ratio = -np.inf
        if search.good(point):
            ratio = (search.point.value - point.value + lift) / (-step.predicted + lift)
        size = float(vectors.norms(step.p[None])[0])
        if ratio < 0.25:
            radius = 0.25 * min(radius, size) if search.plain else 0.25 * radius
        elif ratio > 0.75 and step.reason in (trust_region.BOUNDARY, trust_region.CURVATURE):
            radius = min(2 * radius, 1e10)
        if ratio > 0.1:
            search.accept(x, point)
        elif size <= smallest * (float(vectors.norms(search.x[None])[0]) + smallest):
            return PRECISION
        if stop := search.iterated():
            return stop
    return SUCCESS


def _newton(search: Search) -> str:
    while search.norm > search.gtol:
        if search.iterations >= search.limit:
            return MAXITER
        step = search.step(search.gradient, np.inf)
        if not step.p.any():
            return NOT_FINITE if step.reason == trust_region.NOT_FINITE else PRECISION
        if not _line(search, step.p, 1.0):
            return PRECISION
        if stop := search.iterated():
            return stop
    return SUCCESS


def _lbfgs(search: Search) -> str:
    pairs: deque[tuple[Array, Array, float]] = deque(maxlen=_MEMORY)
    while search.norm > search.gtol:
        if search.iterations >= search.limit:
            return MAXITER
        p = _two_loops(search, pairs)
        if _inner(p, search.gradient) >= 0:
            pairs.clear()
            p = -search.gradient
        x, gradient = search.x, search.gradient
        if not _line(search, p, 1.0 if pairs else min(1.0, 1.0 / search.norm)):
            if not pairs:
                return PRECISION
            pairs.clear()  # A direction from old pairs may be bad; that of the gradient is not.
            continue
        s, y = search.x - x, search.gradient - gradient
        if (curvature := _inner(s, y)) > np.finfo(x.dtype).eps * _inner(y, y):
            pairs.append((s, y, curvature))
        if stop := search.iterated():
            return stop
    return SUCCESS


def _two_loops(search: Search, pairs: deque[tuple[Array, Array, float]]) -> Array:
    """Return minus the inverse of L-BFGS times the gradient."""
    q, alphas = search.gradient.copy(), []
    for s, y, curvature in reversed(pairs):
        alphas.append(_inner(s, q) / curvature)
        q -= q.dtype.type(alphas[-1]) * y
    precondition = preconditioner(search.preconditioner, len(q), q.dtype)
    if precondition is not None:
        q = precondition(q[None])[0]
    elif pairs:
        _, y, curvature = pairs[-1]
        q *= q.dtype.type(curvature / _inner(y, y))
    for (s, y, curvature), alpha in zip(pairs, reversed(alphas), strict=True):
        q += q.dtype.type(alpha - _inner(y, q) / curvature) * s
    return -q


def _line(search: Search, p: Array, alpha: float) -> bool:
    """Move along p to a point of the weak Wolfe conditions; return whether one exists.

    Near a minimum, where rounding hides the decrease, the slope alone decides.
    """
    start, slope, lift = search.point.value, _inner(search.gradient, p), search.rounding
    low, high = 0.0, np.inf
    best: tuple[float, Array, Point] | None = None
    for _ in range(_LINE_STEPS):
        x, point = search.moved(alpha, p)
        if not search.good(point) or point.value > start + 1e-4 * alpha * slope + lift:
            high = alpha
        else:
            if best is None or point.value < best[0]:
                best = point.value, x, point
            if _inner(np.asarray(point.gradient, p.dtype), p) >= 0.9 * slope:
                moved = not np.array_equal(x, search.x)
                search.accept(x, point)
                return moved
            low = alpha
        alpha = 2 * low if np.isinf(high) else (low + high) / 2
    if best is None or np.array_equal(best[1], search.x):
        return False
    search.accept(best[1], best[2])
    return True


def _inner(u: Array, v: Array) -> float:
    return float(vectors.dots(u[None], v[None])[0])


def _called(callback: Any) -> Callable[["OptimizeResult"], object] | None:
    """Return the callback as a function of a result, with SciPy's two signatures."""
    if callback is None:
        return None
    if not callable(callback):
        raise InvalidArgumentError(
            f"callback must be a function, got {_text.described(callback)}", reason="INVALID_OPTION"
        )
    try:
        names = set(inspect.signature(callback).parameters)
    except (TypeError, ValueError):
        names = set()
    if names == {"intermediate_result"}:
        return lambda result: callback(intermediate_result=result)
    return lambda result: callback(result.x)
