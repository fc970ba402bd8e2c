"""Minimisation reaches published minima, and SciPy's."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.optimize
from scipy.sparse.linalg import LinearOperator

import hvpd
from hvpd import krylov
from hvpd._krylov import trust_region

_spec = importlib.util.spec_from_file_location("published", Path(__file__).with_name("published.py"))
published = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(published)
PROBLEMS = published.PROBLEMS


class Objective:
    """A function of jax as an objective, in this process."""

    def __init__(self, fun):
        self.value_and_grad = jax.jit(jax.value_and_grad(fun))
        self.product = jax.jit(lambda x, v: jax.jvp(jax.grad(fun), (x,), (v,))[1])

    def at(self, x):
        value, gradient = self.value_and_grad(x)
        return SimpleNamespace(value=float(value), gradient=np.asarray(gradient), hessian=lambda: self.hessian(x))

    def hessian(self, x):
        return LinearOperator((len(x),) * 2, matvec=lambda v: np.asarray(self.product(x, v.reshape(-1))), dtype=x.dtype)


@pytest.mark.parametrize("name", PROBLEMS)
def test_published_minima_are_reached(name):
    fun, start, minima = PROBLEMS[name]
    gtol = 1e-6 if name == "ARWHEAD" else 1e-7  # Its terms cancel, so its rounding is large.
    with jax.enable_x64(True):
        objective = Objective(fun)
        for method in ("trust-ncg", "newton-cg", "lbfgs"):
            found = krylov.minimize(objective, np.array(start), method, gtol=gtol)
            assert found.success, (method, found.message)
            assert np.linalg.norm(found.jac) <= gtol
            distance = min(abs(found.fun - minimum) / (minimum or 1.0) for minimum in minima)
            assert distance < 1e-5, method


@pytest.mark.parametrize("name", ["WOODS", "BIGGS6", "KOWOSB"])
def test_it_takes_about_as_many_products_as_scipys(name):
    fun, start, _ = PROBLEMS[name]
    with jax.enable_x64(True):
        objective, products = Objective(fun), []

        def value_and_grad(x):
            point = objective.at(x)
            return point.value, point.gradient

        def hessp(x, p):
            products.append(p)
            return np.asarray(objective.product(x, p))

        theirs = scipy.optimize.minimize(
            value_and_grad, start, jac=True, hessp=hessp, method="trust-ncg", options={"gtol": 1e-6}
        )
        ours = krylov.minimize(objective, np.array(start), gtol=1e-6)
    assert abs(ours.fun - theirs.fun) < 1e-8
    assert ours.nhev <= 1.2 * len(products)


def quadratic(values, g=1.0, dtype=np.float64):
    values = np.asarray(values, dtype)

    def at(x):
        return SimpleNamespace(
            value=float(values @ (x * x) / 2 - g * x.sum()),
            gradient=(values * x - g).astype(dtype),
            hessian=lambda: np.diag(values),
        )

    return SimpleNamespace(at=at)


def test_a_preconditioner_saves_products():
    values = np.logspace(0, 4, 60)
    plain = krylov.minimize(quadratic(values), np.zeros(60), gtol=1e-8)
    for M in (1 / values, lambda point: 1 / np.diag(point.hessian())):
        found = krylov.minimize(quadratic(values), np.zeros(60), gtol=1e-8, M=M)
        assert found.success
        assert found.nhev < 0.5 * plain.nhev
        assert np.allclose(found.x, 1 / values, rtol=1e-6)
    lbfgs = krylov.minimize(quadratic(values), np.zeros(60), "lbfgs", gtol=1e-8, M=1 / values)
    assert lbfgs.nit < krylov.minimize(quadratic(values), np.zeros(60), "lbfgs", gtol=1e-8).nit


@pytest.mark.parametrize("method", ["trust-ncg", "newton-cg", "lbfgs"])
def test_a_saddle_is_left(method):
    def at(x):  # x^4 / 4 - x^2 / 2 + y^2, with a saddle at 0 and minima at x = 1 and -1
        return SimpleNamespace(
            value=x[0] ** 4 / 4 - x[0] ** 2 / 2 + x[1] ** 2,
            gradient=np.array([x[0] ** 3 - x[0], 2 * x[1]]),
            hessian=lambda: np.diag([3 * x[0] ** 2 - 1, 2.0]),
        )

    found = krylov.minimize(SimpleNamespace(at=at), [1e-3, 1.0], method)
    assert found.success
    assert np.isclose(found.fun, -0.25)


def test_the_step_of_the_trust_region():
    H = np.diag(np.linspace(1, 9, 20))
    g = np.ones(20)
    multiply = lambda V: V @ H  # noqa: E731
    inside = trust_region.steihaug(multiply, g, 100.0, tol=1e-12, maxiter=40)
    assert inside.reason == trust_region.SOLVED
    assert np.allclose(inside.p, -1 / np.diag(H))
    assert np.isclose(inside.predicted, -(1 / np.diag(H)).sum() / 2)
    edge = trust_region.steihaug(multiply, g, 0.3, tol=1e-12, maxiter=40)
    assert edge.reason == trust_region.BOUNDARY
    assert np.isclose(np.linalg.norm(edge.p), 0.3)
    assert np.isclose(edge.predicted, g @ edge.p + edge.p @ H @ edge.p / 2)
    # With M, the ball is that of the norm of M's inverse.
    M = 1 / np.linspace(1, 5, 20)
    scaled = trust_region.steihaug(multiply, g, 0.3, tol=1e-12, maxiter=40, precondition=lambda V: V * M)
    assert np.isclose(np.sqrt(scaled.p @ (scaled.p / M)), 0.3)
    down = trust_region.steihaug(lambda V: -V @ H, g, 2.0, tol=1e-12, maxiter=40)
    assert down.reason == trust_region.CURVATURE
    assert np.isclose(np.linalg.norm(down.p), 2.0)
    nothing = trust_region.steihaug(lambda V: V * np.nan, g, 2.0, tol=1e-12, maxiter=40)
    assert (nothing.reason, nothing.p.any()) == (trust_region.NOT_FINITE, False)


def test_float32_ends_where_rounding_hides_the_decrease():
    values = np.logspace(0, 3, 30, dtype=np.float32)
    found = krylov.minimize(quadratic(values, dtype=np.float32), np.zeros(30, np.float32), gtol=1e-12, maxiter=500)
    assert found.x.dtype == np.float32
    assert not found.success
    assert np.allclose(found.x, 1 / values, rtol=1e-3)


@pytest.mark.parametrize("method", ["trust-ncg", "newton-cg", "lbfgs"])
def test_callbacks_limits_and_results_are_scipys(method):
    seen = []
    fun = quadratic(np.linspace(1, 50, 20))

    def stop(intermediate_result):
        seen.append(intermediate_result.fun)
        if len(seen) == 2:
            raise StopIteration

    found = krylov.minimize(fun, np.full(20, 5.0), method, callback=stop)
    assert isinstance(found, scipy.optimize.OptimizeResult)
    assert (found.status, found.success, found.nit, len(seen)) == (99, False, 2, 2)
    assert seen[1] == found.fun < seen[0]
    limited = krylov.minimize(fun, np.full(20, 5.0), method, maxiter=1, callback=lambda x: seen.append(x))
    assert (limited.status, limited.nit) == (1, 1)
    assert limited.message == "the number of iterations is at its limit, maxiter=1"
    assert np.array_equal(seen[-1], limited.x)
    assert krylov.minimize(fun, 1 / np.linspace(1, 50, 20), method).nit == 0


UNBOUNDED = {
    "logarithm": (lambda x: jax.numpy.sum(jax.numpy.log(x)), 2.0),
    "linear": (lambda x: -jax.numpy.sum(x), 1.0),
    "concave": (lambda x: -jax.numpy.sum(x**2), 1.0),
    "exponential": (lambda x: -jax.numpy.sum(jax.numpy.exp(x)), 1.0),
}


@pytest.mark.parametrize("name", UNBOUNDED)
@pytest.mark.parametrize("method", ["trust-ncg", "newton-cg", "lbfgs"])
def test_a_function_without_a_minimum_is_suspected(name, method):
    fun, start = UNBOUNDED[name]
    with jax.enable_x64(True), np.errstate(all="ignore"):
        found = krylov.minimize(Objective(fun), np.full(3, start), method, maxiter=60)
    assert not found.success
    assert found.status in (1, 2, 3)
    assert found.message.endswith("is f unbounded below?"), found
    assert "rounding" not in found.message


@pytest.mark.parametrize("maxiter", [3, None])
def test_a_bounded_function_that_does_not_end_is_not_suspected(maxiter):
    found = krylov.minimize(quadratic(np.logspace(-3, 3, 30)), np.full(30, 9.0), gtol=0.0, maxiter=maxiter)
    assert not found.success
    assert "unbounded" not in found.message


def test_regions_where_the_function_is_not_finite_are_avoided():
    def at(x):  # x - log(x), with its minimum at 1
        with np.errstate(invalid="ignore", divide="ignore"):
            return SimpleNamespace(
                value=float((x - np.log(x)).sum()), gradient=1 - 1 / x, hessian=lambda: np.diag(1 / x**2)
            )

    for method in ("trust-ncg", "newton-cg", "lbfgs"):
        found = krylov.minimize(SimpleNamespace(at=at), [1e-3, 30.0], method, gtol=1e-8)
        assert np.allclose(found.x, 1, atol=1e-6), method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x0": [np.nan]}, "x0 must be finite, got NaN or infinity in 1 of 1 elements"),
        ({"x0": [[1.0]]}, r"x0 must have the shape \(n,\), got float64 of shape \(1, 1\)"),
        ({"method": "bfgs"}, "method must be one of trust-ncg"),
        ({"callback": 5}, "callback must be a function"),
        ({"maxiter": -1}, "maxiter must be an integer"),
        ({"gtol": -1.0}, "gtol must be at least 0, got -1.0"),
        ({"M": -np.eye(1)}, "M is not positive definite"),
        ({"M": np.eye(2)}, r"M must have the shape \(1, 1\) of A"),
        ({"M": lambda point: np.ones(2)}, "must have 1 positive elements"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(hvpd.InvalidArgumentError, match=message):
        krylov.minimize(quadratic([1.0]), **({"x0": [5.0]} | arguments))
    nowhere = SimpleNamespace(at=lambda x: SimpleNamespace(value=np.nan, gradient=x, hessian=None))
    with pytest.raises(hvpd.InvalidArgumentError, match="at x0 is NaN or infinity"):
        krylov.minimize(nowhere, [1.0])


@pytest.mark.parametrize("method", ["trust-ncg", "newton-cg"])
def test_products_of_a_large_gradient_do_not_overflow(method):
    size = 1e19
    values = size * np.linspace(1, 3, 20)
    x0 = np.full(20, 1e3, np.float32)
    found = krylov.minimize(quadratic(values, dtype=np.float32), x0, method, gtol=1e-4 * size)
    assert found.success, found.message
