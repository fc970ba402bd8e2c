"""Products, values and gradients of a real server, against truth from other code."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from scipy.optimize import minimize, rosen, rosen_der, rosen_hess, rosen_hess_prod


def rosenbrock(x):
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def logistic(w, X, y):
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + 0.5e-3 * w @ w


def logistic_hessian(w, X, y):
    """Return the closed form: X' diag(s (1 - s)) X / m + 1e-3 I."""
    s = 1.0 / (1.0 + np.exp(-y * (X @ w)))
    return (X.T * (s * (1 - s))) @ X / len(y) + 1e-3 * np.eye(len(w))


def relative(found, expected):
    expected = np.asarray(expected)
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def classification():
    rng = np.random.default_rng(7)
    X, w = rng.normal(size=(300, 40)), rng.normal(size=40)
    return w, X, np.sign(X @ rng.normal(size=40) + rng.normal(size=300))


@pytest.mark.parametrize("n", [2, 1_000, 100_000])
def test_rosenbrock_in_float64(client, n):
    rng = np.random.default_rng(n)
    x, v = rng.normal(size=(2, n))
    objective = client.register(rosenbrock, x, name=f"rosenbrock/{n}")
    point = objective.at(x)
    assert point.value == pytest.approx(rosen(x), rel=1e-10)
    assert relative(point.gradient, rosen_der(x)) < 1e-10
    for _ in range(4):  # fused at first, from residuals later
        assert relative(point.hessian() @ v, rosen_hess_prod(x, v)) < 1e-10


def test_float32_at_highest_precision(client, classification):
    w, X, y = (np.asarray(array, np.float32) for array in classification)
    H = client.register(logistic, w, X, y).at(w).hessian()
    assert H.dtype == np.float32
    V = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    expected = logistic_hessian(*classification) @ V.astype(np.float64)
    assert relative(H @ V, expected) < 1e-5
    assert relative(H @ V[:, 0], expected[:, 0]) < 1e-5


def test_float64_agrees_with_the_closed_form_and_is_symmetric(client, classification):
    w, X, y = classification
    H = client.register(logistic, w, X, y).at(w).hessian()
    dense = logistic_hessian(w, X, y)
    assert relative(H @ np.eye(40), dense) < 1e-10
    u, v = np.random.default_rng(1).normal(size=(2, 40))
    scale = np.linalg.norm(u) * np.linalg.norm(dense @ v)
    assert abs(u @ (H @ v) - v @ (H @ u)) < 1e-12 * scale
    assert relative(H.T @ v, dense @ v) < 1e-10
    assert relative(H.rmatmat(np.eye(40)), dense) < 1e-10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 3, 7, 64, 65, 130])
def test_a_block_is_its_columns(client, classification, k, dtype):
    w, X, y = (np.asarray(array, dtype) for array in classification)
    H = client.register(logistic, w, X, y).at(w).hessian(shift=0.5)
    V = np.random.default_rng(k).normal(size=(40, k)).astype(dtype)
    block, columns = H @ V, np.stack([H @ v for v in V.T], axis=1)
    assert block.shape == (40, k)
    assert np.abs(block - columns).max() <= 10 * np.finfo(dtype).eps * np.abs(columns).max()


def test_an_mlp_agrees_with_jax_in_process(client):
    rng = np.random.default_rng(3)
    params = {
        "hidden": {"w": rng.normal(size=(5, 8)) * 0.3, "b": np.zeros(8)},
        "out": {"w": rng.normal(size=(8, 3)) * 0.3, "b": np.zeros(3)},
    }
    X, labels = rng.normal(size=(50, 5)), rng.integers(0, 3, 50)

    def loss(params, X, labels):
        hidden = jnp.tanh(X @ params["hidden"]["w"] + params["hidden"]["b"])
        logits = hidden @ params["out"]["w"] + params["out"]["b"]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))

    objective = client.register(loss, params, X, labels, name="mlp")
    point = objective.at(params)
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        in_process = jax.hessian(lambda x: loss(unravel(x), X, labels))(flat)
        gradient = jax.grad(lambda x: loss(unravel(x), X, labels))(flat)
    assert np.array_equal(objective.ravel(params), flat)
    assert relative(point.gradient, gradient) < 1e-10
    assert relative(point.hessian() @ np.eye(objective.n), np.asarray(in_process)) < 1e-10


def test_scipy_minimizes_with_the_objectives_methods_as_they_are(client):
    objective = client.register(rosenbrock, np.zeros(4), name="rosenbrock/scipy")
    x0 = np.array([-1.2, 1.0, -0.5, 2.0])
    for method in ("trust-ncg", "Newton-CG", "trust-krylov", "trust-constr"):
        found = minimize(objective.value_and_grad, x0, jac=True, hessp=objective.hessp, method=method)
        assert np.allclose(found.x, 1.0, atol=1e-3), method
    assert objective.value(x0) == pytest.approx(rosen(x0))
    assert relative(objective.gradient(x0), rosen_der(x0)) < 1e-10


def test_scipys_solvers_take_the_operator(client, classification):
    w, X, y = classification
    H = client.register(logistic, w, X, y).at(w).hessian(shift=1e-2)
    dense = logistic_hessian(w, X, y) + 1e-2 * np.eye(40)
    b = np.random.default_rng(0).normal(size=40)
    for solver in (scipy.sparse.linalg.cg, scipy.sparse.linalg.minres):
        solution, code = solver(H, b, rtol=1e-10)
        assert code == 0
        assert relative(solution, np.linalg.solve(dense, b)) < 1e-6
    top = np.linalg.eigvalsh(dense)[-3:]
    assert np.allclose(scipy.sparse.linalg.eigsh(H, 3, return_eigenvectors=False), top, rtol=1e-8)
    start = np.random.default_rng(1).normal(size=(40, 3))
    found, _ = scipy.sparse.linalg.lobpcg(H, start, maxiter=200, tol=1e-8)
    assert np.allclose(np.sort(found), top, rtol=1e-6)


def test_other_data_at_the_same_objective(client, classification):
    w, X, y = classification
    objective = client.register(logistic, w, X, y)
    other = objective.at(w, 2 * X, -y)
    assert relative(other.hessian() @ np.eye(40), logistic_hessian(w, 2 * X, -y)) < 1e-10
    assert objective.at(w).value != other.value


def test_rosenbrocks_dense_hessian(client):
    x = np.array([1.3, 0.7, 0.8, 1.9, 1.2])
    H = client.register(rosenbrock, x).at(x).hessian()
    assert relative(H @ np.eye(5), rosen_hess(x)) < 1e-10


def test_nonfinite_points_are_allowed_and_reported(client):
    objective = client.register(rosenbrock, np.zeros(3))
    assert objective.at(np.ones(3)).nonfinite == ()
    point = objective.at(np.array([0.0, np.nan, 1.0]))
    assert point.nonfinite == ("x", "value", "gradient")
    assert "not finite: x, value, gradient" in repr(point)
    assert np.isnan(point.value)
    assert np.isnan(point.hessian() @ np.ones(3)).any()
    huge = objective.at(np.full(3, 1e200))
    assert huge.nonfinite == ("value", "gradient")


def test_a_nonfinite_vector_stays_its_callers_own(client, classification):
    w, X, y = classification
    H = client.register(logistic, w, X, y).at(w).hessian()
    V = np.random.default_rng(0).normal(size=(40, 3))
    V[0, 1] = np.inf
    product = H @ V
    assert np.isfinite(product[:, [0, 2]]).all()
    assert not np.isfinite(product[:, 1]).all()
