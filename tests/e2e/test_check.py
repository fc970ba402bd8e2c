"""The certificate of objectives on a real server, as a call and as a command."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd

ALGEBRA = ["finite", "symmetry", "linearity", "matmat", "repeats", "widths", "precision"]
NAMES = [*ALGEBRA, "difference", "taylor"]
BOTH = pytest.mark.parametrize("dtype", [np.float64, np.float32])


def rosenbrock(x):
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def logistic(w, X, y):
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + 0.5e-3 * w @ w


def gaussian(x, S):
    """Return a Gaussian's negative log density, by a Cholesky factorization and a
    triangular solve.
    """
    L = jnp.linalg.cholesky(S * jnp.exp(x[0]) + jnp.diag(jnp.exp(x[1:])))
    z = jax.scipy.linalg.solve_triangular(L, jnp.ones(len(S), x.dtype), lower=True)
    return jnp.sum(jnp.log(jnp.diag(L))) + 0.5 * z @ z


def spectral(x):
    return jnp.sum(jnp.log1p(jnp.abs(jnp.fft.rfft(x)) ** 2))


def network(params, X):
    hidden = jax.nn.relu(X @ params["w"] + params["b"])
    return jnp.mean((hidden @ params["out"]) ** 2)


@jax.custom_jvp
def off(x):
    """Return the sum of x^4, whose second derivative is written down 0.1 % too
    large.
    """
    return jnp.sum(x**4)


@jax.custom_jvp
def cubed(x):
    return 4 * x**3


off.defjvp(lambda primals, tangents: (off(*primals), jnp.vdot(cubed(*primals), tangents[0])))
cubed.defjvp(lambda primals, tangents: (cubed(*primals), 12 * 1.001 * primals[0] ** 2 * tangents[0]))


def problems(dtype):
    rng = np.random.default_rng(5)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    B = normal(8, 8)
    params = {"w": normal(4, 8), "b": normal(8), "out": normal(8)}
    return {
        "rosenbrock": (rosenbrock, normal(30)),
        "logistic": (logistic, normal(20), normal(2000, 20), np.sign(normal(2000))),
        "gaussian": (gaussian, normal(9), B @ B.T),
        "spectral": (spectral, normal(64)),
        "network": (network, params, normal(50, 4)),
        "scalar": (lambda x: jnp.cosh(x[0]), normal(1)),
    }


@BOTH
@pytest.mark.parametrize("name", list(problems(np.float64)))
def test_objectives_that_jax_differentiates_pass(client, name, dtype):
    fun, x, *data = problems(dtype)[name]
    objective = client.register(fun, x, *data, name=f"check/{name}-{np.dtype(dtype)}")
    for seed in range(2):
        certificate = objective.check(x, seed=seed)
        assert certificate.passed, str(certificate)
        assert [item.name for item in certificate.items] == NAMES
    assert certificate.objective == objective.name
    assert certificate.digest == objective.digest
    assert (certificate.n, certificate.dtype, certificate.precision) == (objective.n, np.dtype(dtype).name, "highest")
    if dtype is np.float64:
        assert certificate.items[7].passed is True
    precision = certificate.items[6]
    assert 0 < precision.measured < {np.float64: 1e-10, np.float32: 1e-3}[dtype]
    assert precision.meaning.startswith("precision highest: ")


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        *itertools.product(
            ["reverse_over_forward", "reverse_over_reverse", "linearized", "finite_difference", "auto"], [np.float64]
        ),
        *itertools.product(["linearized", "finite_difference"], [np.float32]),  # These two round differently.
    ],
)
def test_every_mode_passes(client, mode, dtype):
    fun, x, *data = problems(dtype)["logistic"]
    certificate = client.register(fun, x, *data, mode=mode).check(x)
    assert certificate.passed, str(certificate)


@BOTH
def test_a_wrong_derivative_rule_is_found(client, dtype):
    x = np.linspace(0.5, 2.0, 6, dtype=dtype)
    certificate = client.register(off, x).check(x)
    assert not certificate.passed
    items = {item.name: item for item in certificate.items}
    assert items["difference"].passed is False
    assert items["difference"].measured == pytest.approx(1e-3, rel=0.05)
    assert items["symmetry"].passed is True


def test_other_data_and_probes_of_ones_own(client):
    fun, w, X, y = problems(np.float64)["logistic"]
    objective = client.register(fun, w, X, y)
    assert objective.check(w, 2 * X, -y, probes=np.eye(20)[:3]).passed
    with pytest.raises(hvpd.InvalidArgumentError, match=r"probes\[0\] holds NaN or infinity"):
        objective.check(w, probes=np.full((1, 20), np.nan))
    with pytest.raises(hvpd.InvalidArgumentError, match="vector of shape"):
        objective.check(w[:3])


def test_a_point_that_is_not_finite_fails(client):
    certificate = client.register(rosenbrock, np.zeros(3)).check(np.array([0.0, np.nan, 1.0]))
    assert [item.passed for item in certificate.items] == [False] + 8 * [None]
    assert "x, value, gradient, products" in certificate.items[0].meaning


def test_a_lower_precision_is_in_the_certificate_and_in_every_listing(client):
    fun, x, *data = problems(np.float32)["logistic"]
    objective = client.register(fun, x, *data, precision="default", name="check/default")
    certificate = objective.check(x)
    assert certificate.passed
    assert certificate.precision == certificate.to_json()["precision"] == "default"
    assert certificate.items[6].meaning.startswith("precision default: ")
    assert certificate.items[6].threshold > 1e-3
    (listing,) = [listing for listing in client.objectives() if listing.name == "check/default"]
    assert listing.precision == objective.precision == "default"


def composite(loss, targets):
    model = lambda W, X: jnp.tanh(X @ W["in"]) @ W["out"]  # noqa: E731
    rng = np.random.default_rng(2)
    W = {"in": rng.normal(size=(4, 6)), "out": rng.normal(size=(6, 3))}
    return W, hvpd.composite(model, loss, distribution="categorical"), rng.normal(size=(20, 4)), targets(rng)


def cross_entropy(z, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1))


@pytest.mark.parametrize("operator", ["ggn", "fisher", "empirical_fisher"])
def test_the_curvature_of_a_composite_passes(client, operator):
    W, fun, X, labels = composite(cross_entropy, lambda rng: rng.integers(0, 3, 20))
    objective = client.register(fun, W, X, labels, name="check/composite")
    certificate = objective.check(W, operator=operator)
    assert [(item.name, item.passed) for item in certificate.items] == [(name, True) for name in [*ALGEBRA, "definite"]]
    assert certificate.operator == operator
    assert certificate.items[-1].measured > 0
    assert objective.check(W, 2 * X, labels, operator=operator, seed=1).passed


def test_the_gauss_newton_matrix_of_a_loss_that_is_not_convex(client):
    """A loss of -z^2 / 2: the matrix is -J'J."""
    W, fun, X, targets = composite(lambda z, y: -jnp.mean((z - y) ** 2), lambda rng: rng.normal(size=(20, 3)))
    objective = client.register(fun, W, X, targets)
    definite = objective.check(W, operator="ggn").items[-1]
    assert (definite.name, definite.passed) == ("definite", None)
    assert definite.measured < -1e-3
    assert "not convex" in definite.meaning
    assert objective.check(W, operator="empirical_fisher").items[-1].passed is True


def test_an_operator_that_is_none_or_that_the_objective_lacks(client):
    objective = client.register(rosenbrock, np.zeros(3))
    for operator in ("ggn", "fisher", "empirical_fisher"):
        with pytest.raises(hvpd.InvalidArgumentError) as refused:
            objective.check(np.zeros(3), operator=operator)
        with pytest.raises(hvpd.InvalidArgumentError) as expected:
            getattr(objective.at(np.zeros(3)), operator)()
        assert str(refused.value) == str(expected.value)
    with pytest.raises(hvpd.InvalidArgumentError, match=r"operator must be one of hessian, ggn.*got 'kfac'"):
        objective.check(np.zeros(3), operator="kfac")


def test_it_leaves_the_objectives_own_points_alone(client):
    objective = client.register(rosenbrock, np.zeros(3))
    points = [objective.at(np.full(3, value)) for value in (1.0, 2.0)]
    objective.check(np.full(3, 1.5))
    assert [objective.at(point.x) for point in points] == points


def test_the_command(client, tmp_path, command):
    client.register(rosenbrock, np.zeros(4), name="check/cli")
    client.register(off, np.zeros(4), name="check/off")
    done = command("check", "check/cli", "--address", client.address)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("check/cli (")
    assert [line.split()[0] for line in lines[2:-1]] == NAMES
    assert lines[-1].startswith("passed: ")

    np.save(tmp_path / "x.npy", np.array([0.5, 1.0, -1.5, 2.0]))
    done = command(
        "check", "check/off", "--x", str(tmp_path / "x.npy"), "--json", "--seed", "3", "--address", client.address
    )
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert (found["passed"], found["seed"], found["objective"]) == (False, 3, "check/off")
    assert found["operator"] == "hessian"

    W, fun, X, labels = composite(cross_entropy, lambda rng: rng.integers(0, 3, 20))
    client.register(fun, W, X, labels, name="check/composite")
    done = command("check", "check/composite", "--operator", "ggn", "--address", client.address)
    assert (done.returncode, done.stderr) == (0, "")
    assert ": ggn, n = 42" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[-2].split()[0] == "definite"

    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "several.npz", x=np.zeros(3))
    for arguments, says in [
        (["check/none"], "check/none"),
        (["check/cli", "--x", str(tmp_path / "none.npy")], "cannot read"),
        (["check/cli", "--x", str(tmp_path / "text.npy")], "no file of numpy.save"),
        (["check/cli", "--x", str(tmp_path / "several.npz")], "no file of numpy.save"),
        (["check/cli", "--probes", "0"], "probes must be"),
        (["check/cli", "--seed", "-1"], "--seed must be from 0"),
        (["check/cli", "--operator", "ggn"], "registered without ggn"),
    ]:
        failed = command("check", *arguments, "--address", client.address)
        assert failed.returncode == 1
        assert failed.stderr.startswith("hvpd: ")
        assert says in failed.stderr
        assert "Traceback" not in failed.stderr
    failed = command("check", "check/cli", "--operator", "hesse", "--address", client.address)
    assert failed.returncode == 2
    assert "invalid choice: 'hesse' (choose from" in failed.stderr


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "fun",
    [
        lambda x: jnp.sum(jnp.abs(x)) + jnp.sum(jnp.logaddexp(0.0, x)),
        lambda x: jnp.sum(jnp.abs(x)),
        lambda x: jnp.sum(jnp.abs(x) + x**2),
    ],
)
def test_at_a_kink_nothing_is_decided(client, fun, dtype):
    """Penalties of the absolute value are registered at zeros. Away from there, the
    check passes.
    """
    objective = client.register(fun, np.zeros(4, dtype))
    certificate = objective.check(np.zeros(4, dtype))
    assert certificate.passed
    verdicts = {item.name: item.verdict for item in certificate.items}
    assert verdicts["difference"] == "undecided"
    assert objective.check(np.arange(1, 5).astype(dtype)).passed


def test_probes_whose_squares_the_dtype_cannot_hold(client):
    objective = client.register(lambda x: jnp.sum(x**4), np.ones(5))
    for size in (1e308, 1e-320):
        with pytest.raises(hvpd.InvalidArgumentError, match=r"probes\[0\] is too"):
            objective.check(np.ones(5), probes=np.full((1, 5), size))
