"""Gauss-Newton and Fisher matrices of composites, against dense constructions that use
neither linearize nor batching.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd

ROWS, CLASSES = 30, 3
CUT = np.random.default_rng(9).normal(size=(60, 50))  # The model closes over it: 24 kB, which are lifted.


def network(params, X):
    return jnp.tanh(X @ params["w1"]) @ params["w2"] + jnp.sum(CUT) * 1e-6


def cross_entropy(z, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1))


def squared_error(z, Y):
    return 0.5 * jnp.sum((z - Y) ** 2)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    params = {"w1": rng.normal(size=(4, 5)), "w2": rng.normal(size=(5, CLASSES))}
    return params, rng.normal(size=(ROWS, 4)), rng.integers(0, CLASSES, ROWS), rng.normal(size=(ROWS, CLASSES))


@pytest.fixture(scope="module")
def jacobian(problem):
    """Return the network's dense J[rows, classes, n], in the order of the raveling."""
    params, X, _, _ = problem
    with jax.enable_x64(True):
        J = jax.jacrev(network)({name: jnp.asarray(value) for name, value in params.items()}, X)
    return np.concatenate([np.asarray(J[name]).reshape(ROWS, CLASSES, -1) for name in ("w1", "w2")], axis=2)


def softmax(z):
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def output(problem):
    params, X, _, _ = problem
    return np.tanh(X @ params["w1"]) @ params["w2"] + CUT.sum() * 1e-6


def dense(operator):
    n = operator.shape[0]
    D = operator @ np.eye(n)
    assert np.allclose(D, np.stack([operator @ e for e in np.eye(n)], axis=1), rtol=1e-12, atol=1e-14)
    return D


def assert_close(found, expected):
    assert np.linalg.norm(found - expected) < 1e-10 * np.linalg.norm(expected)


def test_softmax_ggn_is_the_fisher_matrix_and_both_are_the_dense_one(client, problem, jacobian):
    params, X, labels, _ = problem
    composite = hvpd.composite(network, cross_entropy, distribution="categorical")
    objective = client.register(composite, params, X, labels, name="composite/softmax")
    assert [tuple(tensor.shape) for tensor in objective._bundle.captured] == [CUT.shape]
    point = client.objective("composite/softmax").at(params)
    p = softmax(output(problem))
    middle = np.einsum("ri,ij->rij", p, np.eye(CLASSES)) - np.einsum("ri,rj->rij", p, p)
    expected = np.einsum("ria,rij,rjb->ab", jacobian, middle, jacobian) / ROWS
    assert_close(dense(point.ggn()), expected)
    assert_close(dense(point.fisher()), expected)
    assert_close(dense(point.ggn(shift=0.5)), expected + 0.5 * np.eye(len(expected)))


def test_the_fisher_matrix_is_the_expectation_over_all_labels(client, problem, jacobian):
    """The truth is E over y ~ p(y|z) of g g', summed label by label. It does not use
    the program's formula.
    """
    params, X, labels, _ = problem
    composite = hvpd.composite(network, cross_entropy, distribution="categorical")
    point = client.register(composite, params, X, labels).at(params)
    p = softmax(output(problem))
    expected = 0
    for label in range(CLASSES):
        g = np.einsum("ria,ri->ra", jacobian, p - np.eye(CLASSES)[label])
        expected = expected + np.einsum("r,ra,rb->ab", p[:, label], g, g) / ROWS
    assert_close(dense(point.fisher()), expected)


def test_the_empirical_fisher_matrix_is_that_of_the_rows_gradients(client, problem, jacobian):
    params, X, labels, _ = problem
    point = client.register(hvpd.composite(network, cross_entropy), params, X, labels).at(params)
    g = np.einsum("ria,ri->ra", jacobian, softmax(output(problem)) - np.eye(CLASSES)[labels])
    assert_close(dense(point.empirical_fisher()), g.T @ g / ROWS)
    assert np.linalg.norm(g.mean(axis=0) - point.gradient) < 1e-12


def test_a_sum_of_squares(client, problem, jacobian):
    """The truth is J'J, for the Fisher matrix of a normal distribution too. For a
    linear model, the Hessian equals the GGN matrix.
    """
    params, X, _, Y = problem
    composite = hvpd.composite(network, squared_error, distribution="normal", reduction="sum")
    point = client.register(composite, params, X, Y).at(params)
    expected = np.einsum("ria,rib->ab", jacobian, jacobian)
    assert_close(dense(point.ggn()), expected)
    assert_close(dense(point.fisher()), expected)
    g = np.einsum("ria,ri->ra", jacobian, output(problem) - Y)
    assert_close(dense(point.empirical_fisher()), g.T @ g)
    linear = hvpd.composite(lambda W, X: X @ W, squared_error)
    point = client.register(linear, np.zeros((4, CLASSES)), X, Y).at(np.zeros((4, CLASSES)))
    assert_close(dense(point.ggn()), dense(point.hessian()))


def test_the_hessian_of_a_composite_is_that_of_the_whole(client, problem):
    params, X, labels, _ = problem
    whole = client.register(lambda p, X, y: cross_entropy(network(p, X), y), params, X, labels)
    composite = client.register(hvpd.composite(network, cross_entropy), params, X, labels)
    assert_close(dense(composite.at(params).hessian()), dense(whole.at(params).hessian()))
    assert composite.at(params).value == pytest.approx(whole.at(params).value, rel=1e-14)


def test_float32(client, problem, jacobian):
    params, X, labels, _ = problem
    single = {name: value.astype(np.float32) for name, value in params.items()}
    composite = hvpd.composite(network, cross_entropy, distribution="categorical")
    point = client.register(composite, single, X.astype(np.float32), labels).at(single)
    p = softmax(output(problem))
    middle = np.einsum("ri,ij->rij", p, np.eye(CLASSES)) - np.einsum("ri,rj->rij", p, p)
    expected = np.einsum("ria,rij,rjb->ab", jacobian, middle, jacobian) / ROWS
    found = point.ggn() @ np.eye(35, dtype=np.float32)
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_a_model_that_returns_a_pytree_has_a_ggn_and_no_fisher(client):
    model = lambda x, X: {"a": X @ x, "b": (jnp.sum(x**2),)}  # noqa: E731
    loss = lambda z, y: jnp.sum((z["a"] - y) ** 2) + z["b"][0] ** 2  # noqa: E731
    X, y, x = np.arange(6.0).reshape(3, 2), np.ones(3), np.array([1.0, 2.0])
    point = client.register(hvpd.composite(model, loss), x, X, y).at(x)
    J = np.vstack([X, 2 * x])
    assert_close(dense(point.ggn()), 2 * J.T @ J)
    with pytest.raises(hvpd.InvalidArgumentError, match=r"without empirical_fisher.*one array \[rows"):
        point.empirical_fisher()


def test_operators_that_an_objective_cannot_give_name_the_registration_that_can(client):
    plain = client.register(lambda x: jnp.sum(x**2), np.ones(2)).at(np.ones(2))
    for name in ("ggn", "fisher", "empirical_fisher"):
        with pytest.raises(hvpd.InvalidArgumentError, match=rf"without {name}: register hvpd.composite\(model, loss"):
            getattr(plain, name)()
    composite = client.register(hvpd.composite(lambda x: x, lambda z: jnp.sum(z**2), inputs=0), np.ones(2)).at(
        np.ones(2)
    )
    with pytest.raises(hvpd.InvalidArgumentError, match=r"distribution=\.\.\."):
        composite.fisher()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"distribution": "poisson"}, "distribution must be one of categorical, normal"),
        ({"reduction": "max"}, "reduction must be one of mean, sum"),
        ({"inputs": -1}, "inputs must be a number"),
        ({"loss": 3}, r"loss must be a function, got 3: composite\(model, loss\)"),
        ({"samples": 0}, "samples must be a whole number from 1"),
        ({"inputs": 3}, "the model takes 3 data arguments .* 2 were given"),
        (
            {"model": lambda p, X: X @ p["w1"], "distribution": None},
            r"the loss cannot take the value that the model returns, .*\[30, 5\]",
        ),
        ({"model": lambda p, X: jnp.sum(X) > 0}, "the model must return real floating arrays"),
        ({"model": lambda p, X: jnp.sum(p["w1"])}, "must return one array"),
        ({"loss": lambda z, y: z}, "must return a scalar"),
    ],
)
def test_composites_that_are_none(client, problem, options, says):
    params, X, labels, _ = problem
    stages = {"model": network, "loss": lambda z, y: cross_entropy(z @ jnp.eye(CLASSES), y)} | {
        name: value for name, value in options.items() if name in ("model", "loss")
    }
    rest = {"distribution": "categorical"} | {name: value for name, value in options.items() if name not in stages}
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        client.register(hvpd.composite(**stages, **rest), params, X, labels)


def test_composites_and_plain_products_do_not_share_launches(client, problem):
    """Threads ask at one point. Each operator gets its own product."""
    import concurrent.futures

    params, X, labels, _ = problem
    composite = hvpd.composite(network, cross_entropy, distribution="categorical")
    point = client.register(composite, params, X, labels).at(params)
    operators = [point.hessian(), point.ggn(), point.empirical_fisher()]
    expected = [dense(operator) for operator in operators]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for kind, product in pool.map(lambda i: (i % 3, operators[i % 3] @ np.ones(35)), range(60)):
            assert np.allclose(product, expected[kind] @ np.ones(35), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distribution", ["categorical", "normal"])
def test_the_monte_carlo_fisher_matrix_is_drawn_by_its_seed_and_right_on_average(client, problem, distribution):
    params, X, labels, Y = problem
    loss, targets = (cross_entropy, labels) if distribution == "categorical" else (squared_error, Y)
    composite = hvpd.composite(network, loss, distribution=distribution, samples=8)
    point = client.register(composite, params, X, targets).at(params)
    exact = dense(point.fisher())
    draws = [point.fisher(seed=seed) @ np.eye(len(exact)) for seed in range(60)]
    # Bits may differ, because a wider block may have been compiled since, and rounds
    # differently.
    np.testing.assert_allclose(draws[3], point.fisher(seed=3) @ np.eye(len(exact)), rtol=0, atol=1e-14)
    assert not np.array_equal(draws[3], draws[4])
    for draw in draws[:3]:
        assert np.allclose(draw, draw.T, rtol=1e-10, atol=1e-12)
        assert np.linalg.eigvalsh(draw).min() > -1e-10 * np.linalg.norm(exact)
    errors = [np.linalg.norm(draw - exact) for draw in draws]
    mean_error = np.linalg.norm(np.mean(draws, axis=0) - exact)
    assert min(errors) > 0
    # The error of a mean of 60 independent draws is about 1 / sqrt(60) of one draw's.
    # Twice that leaves room for chance.
    assert mean_error < 2 * np.sqrt(np.mean(np.square(errors)) / 60)


def test_a_draw_is_of_gradients_of_the_distribution(client, problem, jacobian):
    """One sample for each row gives J' g g' J, where each g is one of the few that the
    distribution has.
    """
    params, X, labels, _ = problem
    composite = hvpd.composite(network, cross_entropy, distribution="categorical")
    point = client.register(composite, params, X[:1], labels[:1]).at(params)
    p = softmax(output(problem))[0]
    possible = []
    for label in range(CLASSES):
        g = (p - np.eye(CLASSES)[label]) @ jacobian[0]
        possible.append(np.outer(g, g))
    found = set()
    for seed in (*range(40), 2**63, 2**64 - 1):
        draw = point.fisher(seed=seed) @ np.eye(35)
        (match,) = [label for label in range(CLASSES) if np.allclose(draw, possible[label], rtol=1e-9, atol=1e-12)]
        found.add(match)
    assert len(found) > 1
    for seed in (-1, 2**64):
        with pytest.raises(hvpd.InvalidArgumentError, match="seed must be an integer"):
            point.fisher(seed=seed)
