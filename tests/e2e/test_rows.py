"""One program for data of any number of rows."""

import numpy as np
import pytest

import hvpd


def logistic(w, X, y, strength):
    import jax.numpy as jnp

    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + 0.5 * strength * w @ w


def logistic_hessian(w, X, y, strength):
    s = 1.0 / (1.0 + np.exp(-y * (X @ w)))
    return (X.T * (s * (1 - s))) @ X / len(y) + strength * np.eye(len(w))


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 6)), np.sign(rng.normal(size=count))


@pytest.fixture(scope="module")
def objective(client):
    return client.register(logistic, np.zeros(6), *rows(50), 0.1, any_rows=True, name="rows/logistic")


@pytest.mark.parametrize("count", [1, 7, 50, 400])
def test_any_number_of_rows(client, objective, count):
    w, (X, y) = np.linspace(-1, 1, 6), rows(count, seed=count)
    point = client.objective("rows/logistic").at(w, X, y, 0.1)
    dense = logistic_hessian(w, X, y, 0.1)
    assert np.allclose(point.hessian() @ np.eye(6), dense, rtol=1e-10, atol=1e-12)
    for _ in range(4):
        assert np.allclose(point.hessian() @ np.ones(6), dense @ np.ones(6), rtol=1e-10, atol=1e-12)
    assert point.value == pytest.approx(np.mean(np.logaddexp(0, -y * (X @ w))) + 0.05 * w @ w, rel=1e-12)


def test_the_registered_rows_are_the_default(objective):
    w = np.ones(6)
    dense = logistic_hessian(w, *rows(50), 0.1)
    assert np.allclose(objective.at(w).hessian() @ np.eye(6), dense, rtol=1e-10, atol=1e-12)
    assert {choice.program for choice in objective.plan()} == {"hvp"}


def test_the_program_does_not_depend_on_the_rows_it_was_registered_with(client, objective):
    other = client.register(logistic, np.zeros(6), *rows(9), 0.1, any_rows=True)
    digests = [each._bundle.programs["hvp"].digest for each in (objective, other)]
    assert digests[0] == digests[1]
    assert objective.digest != other.digest


def test_composites_too(client):
    import jax
    import jax.numpy as jnp

    composite = hvpd.composite(
        lambda W, X: X @ W,
        lambda z, Y: -jnp.mean(jnp.sum(Y * jax.nn.log_softmax(z), axis=1)),
        distribution="categorical",
    )
    X, Y = rows(20)[0], np.eye(3)[np.arange(20) % 3]
    objective = client.register(composite, np.zeros((6, 3)), X, Y, any_rows=True)
    W = np.random.default_rng(1).normal(size=(6, 3))
    for count in (5, 20):
        point = objective.at(W, X[:count], Y[:count])
        H, G, F = (operator @ np.eye(18) for operator in (point.hessian(), point.ggn(), point.fisher()))
        assert np.allclose(H, G, rtol=1e-10, atol=1e-12)  # the model is linear
        assert np.allclose(F, G, rtol=1e-10, atol=1e-12)  # and the distribution is the loss's own
        gradients = np.einsum("ra,rc->rac", X[:count], _softmax(X[:count] @ W) - Y[:count]).reshape(count, 18)
        assert np.allclose(
            point.empirical_fisher() @ np.eye(18), gradients.T @ gradients / count, rtol=1e-10, atol=1e-12
        )


def _softmax(z):
    p = np.exp(z)
    return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ((np.ones((4, 5)), np.ones(4), 0.1), r"data\[0\] must be float64\[4, 6\]"),
        ((np.ones((4, 6)), np.ones(5), 0.1), r"data\[1\] must be float64\[4\] as long as data\[0\], got float64\[5\]"),
        ((np.ones((0, 6)), np.ones(0), 0.1), r"data needs at least one row, and data\[0\] has the shape \[0, 6\]"),
        ((np.ones(6), np.ones(6), 0.1), r"data\[0\] must be"),
        ((np.ones((4, 6)), np.ones(4), np.ones(4)), r"data\[2\] must be float64\[\]"),
    ],
)
def test_rows_that_do_not_fit_each_other(objective, data, says):
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        objective.at(np.zeros(6), *data)


def test_any_rows_is_refused_with_settings_that_contradict_it(client):
    import jax.numpy as jnp

    for mode in ("linearized", "auto"):
        with pytest.raises(hvpd.InvalidArgumentError, match="does not go with any_rows"):
            client.register(logistic, np.zeros(6), *rows(5), 0.1, any_rows=True, mode=mode)
    for data in ((), (1.0,)):
        with pytest.raises(hvpd.InvalidArgumentError, match="any_rows needs data whose first leaf has rows"):
            client.register(lambda x, *data: jnp.sum(x), np.zeros(6), *data, any_rows=True)
    fixed = client.register(lambda x, X: jnp.sum(X.reshape(10, 3) @ x[:3]), np.zeros(6), np.ones((5, 6)), any_rows=True)
    assert fixed.value(np.ones(6)) == 30.0
    with pytest.raises(
        hvpd.InvalidArgumentError,
        match=r"cannot compile value_and_grad \(width 0\): objective has a stablehlo.reshape from shape \[7, 6\] to shape \[10, 3\]",
    ):
        fixed.at(np.zeros(6), np.ones((7, 6)))


def test_numbers_of_sizes_are_exact_in_single_precision(client):
    import jax.numpy as jnp

    def pairs(w, X):
        mean = jnp.mean(jnp.broadcast_to(w @ w, (X.shape[0], 1000, 1000)))
        return mean + jnp.sum(w * w * X.sum(0)) / (X.shape[0] * (X.shape[0] - 1) / 2)

    w, v = np.array([[1.0, -2.0, 0.5], [3.0, 1.0, -1.0]], np.float32)
    X = np.ones((70_000, 3), np.float32)
    objective = client.register(pairs, w, X[:3000], any_rows=True)
    for count in (3000, 70_000):
        factor = 1 + 2 / (count - 1)
        point = objective.at(w, X[:count])
        assert point.value == pytest.approx(factor * w @ w, rel=1e-5)
        assert np.allclose(point.hessian() @ v, 2 * factor * v, rtol=1e-5)


def test_sizes_beyond_32_bits_are_refused(client):
    import jax.numpy as jnp

    def flat(w, X):
        return jnp.sum(w * w) * jnp.ones(X.shape[0] * 2**20)[0]

    X = np.ones((2048, 3), np.float32)
    objective = client.register(flat, np.ones(3, np.float32), X[:2047], any_rows=True)
    assert objective.value(np.ones(3, np.float32)) == 3.0
    says = "of 2147483648, a number computed from sizes that int32 cannot hold.*Register without any_rows"
    with pytest.raises(hvpd.InvalidArgumentError, match=says) as info:
        objective.at(np.ones(3, np.float32), X)
    assert info.value.reason == "PROGRAM_TOO_LARGE"
    with pytest.raises(hvpd.InvalidArgumentError, match=r"Register without any_rows, or write the number as a float"):
        client.register(lambda w, X: jnp.sum(w) / (X.shape[0] * 2**33), np.ones(3, np.float32), X, any_rows=True)


def test_sizes_of_an_exported_function_are_exact(client):
    import jax
    import jax.export
    import jax.numpy as jnp

    def pairs(w, X):
        return jnp.sum(w * w * X.sum(0)) / (X.shape[0] * (X.shape[0] - 1) / 2)

    w, X = np.ones(3, np.float32), np.ones((70_000, 3), np.float32)
    (m,) = jax.export.symbolic_shape("m")
    with jax.enable_x64(False):
        exported = jax.export.export(jax.jit(pairs))(w, jax.ShapeDtypeStruct((m, 3), np.float32))
    objective = client.register_stablehlo(bytes(exported.serialize()), w, X)
    assert objective.value(w) == pytest.approx(6 / 69_999, rel=1e-6)
    assert np.allclose(objective.at(w).hessian() @ w, 4 / 69_999, rtol=1e-5)
