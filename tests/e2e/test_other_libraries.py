"""pymanopt, scikit-learn and joblib on objectives of a real server."""

import copy

import joblib
import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone

N = 5
MATRIX = np.diag(np.arange(1.0, N + 1)) + 0.1


@pytest.fixture(scope="module")
def objective(client):
    return client.register(lambda x, A: x @ A @ x / 2, np.ones(N), MATRIX, name="libraries/quadratic")


def test_pymanopt_finds_the_smallest_eigenvector(objective):
    import pymanopt  # Here, because it sets jax's x64 mode.
    import pymanopt.manifolds
    import pymanopt.optimizers

    """The minimum of x'Ax/2 on the sphere is half of A's smallest eigenvalue."""
    manifold = pymanopt.manifolds.Sphere(N)

    @pymanopt.function.numpy(manifold)
    def cost(x):
        return objective.value(x)

    @pymanopt.function.numpy(manifold)
    def gradient(x):
        return objective.gradient(x)

    @pymanopt.function.numpy(manifold)
    def hessian(x, v):
        return objective.hessp(x, v)

    problem = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian)
    optimizer = pymanopt.optimizers.TrustRegions(verbosity=0, min_gradient_norm=1e-9)
    found = optimizer.run(problem, initial_point=np.ones(N) / np.sqrt(N))
    assert np.isclose(2 * found.cost, np.linalg.eigvalsh(MATRIX)[0])


class Newton(BaseEstimator):
    """An estimator with an objective and an operator among its parameters."""

    def __init__(self, objective=None, H=None, shift=0.0):
        self.objective = objective
        self.H = H
        self.shift = shift


def test_sklearn_clones_estimators_that_hold_objectives(client, objective):
    H = objective.at(np.ones(N)).hessian()
    cloned = clone(Newton(objective, H, shift=0.5))
    assert cloned.shift == 0.5
    assert cloned.objective is objective
    assert cloned.H.point is H.point
    np.testing.assert_allclose(cloned.H @ np.ones(N), MATRIX.sum(axis=1))
    assert copy.deepcopy({"client": client})["client"] is client


def newton_step(objective, x):
    point = objective.at(x)
    return np.linalg.solve(point.hessian() @ np.eye(N), -point.gradient)


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_joblib_sends_objectives_to_its_workers(objective, backend):
    starts = [np.full(N, float(start)) for start in range(4)]
    work = (joblib.delayed(newton_step)(objective, x) for x in starts)
    steps = joblib.Parallel(n_jobs=2, backend=backend)(work)
    np.testing.assert_allclose(steps, -np.array(starts), atol=1e-12)
