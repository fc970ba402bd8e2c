"""Krylov iterations of a served objective equal dense linear algebra on jax.hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg

N = 50


def coupled(x, A):
    return jnp.sum(jnp.cosh(A @ x)) + 0.1 * jnp.sum(x**4)


@pytest.fixture(scope="module")
def data():
    return np.random.default_rng(0).standard_normal((70, N)) / np.sqrt(N)


@pytest.fixture(scope="module")
def objective(client, data):
    return client.register(coupled, np.zeros(N), data, name="krylov/coupled")


@pytest.fixture(scope="module")
def x():
    return 0.5 * np.random.default_rng(1).standard_normal(N)


@pytest.fixture(scope="module")
def dense(data, x):
    with jax.enable_x64(True):
        return np.asarray(jax.hessian(coupled)(x, data))


def close(found, expected, accuracy=1e-10):
    return np.linalg.norm(found - expected) <= accuracy * np.linalg.norm(expected)


def test_eigenvalues_and_bases(objective, x, dense):
    H = objective.at(x).hessian()
    expected = np.linalg.eigvalsh(dense)
    for which, positions in (("LA", slice(-4, None)), ("SA", slice(0, 4))):
        values, vectors = H.eigsh(4, which)
        assert close(values, expected[positions])
        assert close(dense @ vectors, vectors * values)
        assert close(values, np.sort(scipy.sparse.linalg.eigsh(dense, 4, which=which)[0]))
    with H.lanczos(30, seed=3) as run:
        Q = run.combine(np.eye(30))
        assert abs(Q.T @ Q - np.eye(30)).max() < 1e-12
        assert close(Q.T @ dense @ Q, run.projected)
        assert close(run.extend(20).ritz().values, expected)
        assert run.id
        run.pin(5)
    assert run.origin.digest == objective.digest


def test_linear_systems(objective, x, dense):
    point = objective.at(x)
    H, b = point.hessian(), -point.gradient
    B = np.random.default_rng(2).standard_normal((N, 3))
    for method in ("cg", "minres"):
        assert close(H.solve(b, tol=1e-12, method=method).x, np.linalg.solve(dense, b))
        assert close(H.solve(B, tol=1e-12, method=method).x, np.linalg.solve(dense, B))
        many = H.solve(b, tol=1e-12, shifts=[0.0, 1.0, 10.0], method=method)
        for shift, found in zip([0.0, 1.0, 10.0], many.x, strict=True):
            assert close(found, np.linalg.solve(dense + shift * np.eye(N), b))
    preconditioned = H.solve(b, tol=1e-12, M=1 / np.diag(dense))
    assert close(preconditioned.x, np.linalg.solve(dense, b))
    indefinite = H.shifted(-20.0).solve(b)
    assert not indefinite.converged
    direction = indefinite.direction
    assert np.isclose(direction @ dense @ direction - 20, indefinite.curvature)
    assert indefinite.curvature < 0


def test_traces(objective, x, dense):
    H = objective.at(x).hessian()
    for found, exact in [
        (H.trace(products=24), np.trace(dense)),
        (H.logdet(probes=100, steps=N), np.linalg.slogdet(dense)[1]),
        (H.trace_of(np.sqrt, steps=N), np.sqrt(np.linalg.eigvalsh(dense)).sum()),
    ]:
        assert abs(found.value - exact) < 3 * found.standard_error < 0.5 * abs(exact)
    assert close(H.trace(products=N).value, np.trace(dense))
    assert close(H.diagonal(method="xdiag", products=N).values, np.diag(dense))
    assert close(H.spectrum(50, N).moments(1)[0], np.trace(dense) / N, 0.05)


def test_minimisation(objective):
    start = np.full(N, 2.0)
    theirs = scipy.optimize.minimize(
        objective.value_and_grad,
        start,
        jac=True,
        hessp=objective.hessp,
        method="trust-ncg",
        options={"gtol": 1e-9},
    )
    for method in ("trust-ncg", "newton-cg", "lbfgs"):
        ours = objective.minimize(start, method, gtol=1e-8)
        assert ours.success
        assert abs(ours.fun - theirs.fun) < 1e-10 * theirs.fun
    preconditioned = objective.minimize(start, M=lambda point: 1 / point.hessian().diagonal().values, gtol=1e-8)
    assert preconditioned.success


def test_a_network_on_digits_reaches_scipys_minimum(client):
    datasets = pytest.importorskip("sklearn.datasets")
    X, y = datasets.load_digits(return_X_y=True)
    X, y = X[:400] / 16, y[:400]
    random = np.random.default_rng(0)
    params = [(random.normal(0, 1 / np.sqrt(p), (p, q)), np.zeros(q)) for p, q in ((64, 12), (12, 10))]

    def loss(params, X, y):
        (W, b), (V, c) = params
        scores = jax.nn.log_softmax(jnp.tanh(X @ W + b) @ V + c)
        decay = 0.5 * 1e-2 * sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(params))
        return -jnp.take_along_axis(scores, y[:, None], axis=1).mean() + decay

    objective = client.register(loss, params, X, y, name="krylov/digits")
    start = objective.ravel(params)
    theirs = scipy.optimize.minimize(
        objective.value_and_grad, start, jac=True, hessp=objective.hessp, method="trust-ncg", options={"gtol": 1e-6}
    )
    # A network has several minima, and another method may go to another one.
    for method, excess in (("trust-ncg", 1e-6), ("lbfgs", 0.02)):
        ours = objective.minimize(params, method, gtol=1e-6)
        assert ours.success
        assert ours.fun < theirs.fun * (1 + excess)
    assert objective.unravel(ours.x)[0][0].shape == (64, 12)
