"""The zoo of objectives on a real server, against truth from other code. Other files
have logistic and softmax regression, and Rosenbrock's function (test_truth,
test_modes).
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from scipy.optimize import minimize
from scipy.sparse.linalg import eigsh
from scipy.stats import multivariate_normal

import hvpd
from tests.support.waiting import until
from tests.support.zoo import (
    BASIS,
    DIMER,
    RELU,
    SPECTRUM,
    TOKENS,
    ZOO,
    cast,
    dense,
    differenced,
    gathered_hessian,
    kernel_derivatives,
    key_data,
    laplacian,
    lennard_jones_hessian,
    log_sum_exp_hessian,
    minus_log_evidence_gradient,
    newton_roots,
    normal,
    random_features_hessian,
    real_roots,
    relative,
    truth,
)

MODES = [
    "forward_over_reverse",
    "reverse_over_forward",
    "reverse_over_reverse",
    "linearized",
    "finite_difference",
    "auto",
]
TOLERANCE = {np.float64: 1e-10, np.float32: 1e-5}
ONLY_IN_FLOAT64 = {"laplacian/neumann", "laplacian/periodic", "cond/false", "fft/odd", "transformer"}
"""To save time: these are twins of others, and one takes ten seconds to compile."""
WITHOUT_CLOSED_FORM = [name for name, case in ZOO.items() if case.hessian is None]


@pytest.fixture(scope="module")
def registered(client):
    """Yield the zoo's objectives, by name, dtype and mode. Each is traced once for all
    tests.
    """

    @functools.cache
    def register(name, dtype=np.float64, mode="forward_over_reverse"):
        case = ZOO[name]
        platforms = (client.server.platform,)  # One platform takes half the time of two.
        return client.register(case.fun, cast(case.x, dtype), *cast(case.data, dtype), mode=mode, platforms=platforms)

    return register


def check_products(objective, name, dtype):
    """Assert that a block and single vectors have right products. The data are those of
    the registration.
    """
    expected = truth(name)
    assert (objective.dtype, objective.n) == (dtype, len(expected))
    H = objective.at(cast(ZOO[name].x, dtype)).hessian()
    V = normal(99, len(expected), 4).astype(dtype)
    assert relative(H @ V, expected @ V) < TOLERANCE[dtype]
    # Fused at first, from residuals later. test_modes has residuals in float32, too.
    for v in V.T[: 4 if dtype is np.float64 else 1]:
        assert relative(H @ v, expected @ v) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ZOO)
def test_products_in_float64(registered, name):
    check_products(registered(name), name, np.float64)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ONLY_IN_FLOAT64])
def test_products_in_float32(registered, name):
    check_products(registered(name, np.float32), name, np.float32)


@pytest.mark.parametrize("mode", ["reverse_over_reverse", "linearized"])
@pytest.mark.parametrize("name", ["log_det", "scan/control", "cond/true", "custom_root", "fft/filtered", "gather"])
def test_products_in_other_modes(registered, name, mode):
    objective = registered(name, mode=mode)
    assert objective.mode == mode
    check_products(objective, name, np.float64)


@pytest.mark.parametrize("name", WITHOUT_CLOSED_FORM)
def test_without_a_closed_form_differences_agree(registered, name):
    point = registered(name).at(ZOO[name].x)
    gradient, hessian = differenced(name)
    assert relative(point.gradient, gradient) < 1e-7
    V = normal(98, len(hessian), 3)
    assert relative(point.hessian() @ V, hessian @ V) < 1e-7


def test_the_relu_network_is_away_from_its_kinks():
    """No unit changes sign within a difference's step, and some are on, some off.
    Otherwise this would not test ReLU.
    """
    X = RELU.data[0]
    before = X @ RELU.x["w1"] + RELU.x["b1"]
    assert np.abs(before).min() > 1e-3 * max(1.0, np.abs(X).max())
    assert 0.2 < np.mean(before > 0) < 0.8


# Eigenvalues


@pytest.mark.parametrize("boundary", ["dirichlet", "neumann", "periodic"])
def test_eigsh_finds_the_laplacians_spectrum(registered, boundary):
    case = ZOO[f"laplacian/{boundary}"]
    H = registered(f"laplacian/{boundary}").at(case.x).hessian()
    spectrum = np.sort(-laplacian(boundary).eigenvalues())
    assert np.linalg.eigvalsh(dense(H)) == pytest.approx(spectrum, rel=1e-12, abs=1e-13)
    for which, expected in (("LA", spectrum[-6:]), ("SA", spectrum[:6])):
        found = eigsh(H, 6, which=which, tol=1e-12, v0=np.arange(1.0, H.shape[0] + 1), return_eigenvectors=False)
        assert np.sort(found) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_a_prescribed_spectrum_of_both_signs(registered):
    A = (BASIS * SPECTRUM) @ BASIS.T
    H = registered("quadratic").at(ZOO["quadratic"].x, A).hessian()
    assert np.linalg.eigvalsh(dense(H)) == pytest.approx(np.sort(SPECTRUM), abs=1e-12)
    found = eigsh(H, 4, which="BE", v0=np.ones(20), return_eigenvectors=False)
    assert np.sort(found) == pytest.approx(np.sort(SPECTRUM)[[0, 1, -2, -1]], rel=1e-10)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_log_sum_exp_does_not_bend_along_ones(registered, dtype):
    """This holds also for numbers whose exponentials overflow."""
    objective = registered("log_sum_exp", dtype)
    x = ZOO["log_sum_exp"].x.astype(dtype)
    for shift in (0.0, 1e4):
        H = objective.at(x + dtype(shift)).hessian()
        assert np.abs(H @ np.ones(len(x), dtype)).max() < 4 * np.finfo(dtype).eps
        assert relative(dense(H), log_sum_exp_hessian((x + dtype(shift)).astype(np.float64))) < TOLERANCE[dtype]


def test_the_lennard_jones_dimer_has_one_mode_that_is_not_zero(registered):
    H = dense(registered("lennard_jones/dimer").at(DIMER).hessian())
    assert relative(H, lennard_jones_hessian(DIMER)) < 1e-10
    *zero, stretch = np.linalg.eigvalsh(H)
    assert np.abs(zero).max() < 1e-13 * stretch
    assert stretch == pytest.approx(144 / 2 ** (1 / 3), rel=1e-14)
    assert round(stretch, 4) == 114.2929


def test_the_lennard_jones_icosahedron(registered):
    """LJ13's global minimum is found from a distorted start. Its energy and modes are
    published to the given digits.
    """
    objective = registered("lennard_jones/cluster")
    start = ZOO["lennard_jones/cluster"].x
    found = minimize(
        objective.value_and_grad,
        start.ravel(),
        jac=True,
        hessp=objective.hessp,
        method="trust-ncg",
        options={"gtol": 1e-4},
    )
    assert found.success
    x = found.x
    for _ in range(
        2
    ):  # Newton's steps go on to rounding, because the rest of the gradient is in the eigenvalues of the rotations.
        point = objective.at(x)
        x = x - np.linalg.lstsq(dense(point.hessian()), point.gradient, rcond=1e-6)[0]
    point = objective.at(x)
    assert np.linalg.norm(point.gradient) < 1e-11
    assert round(point.value, 6) == -44.326801
    H = dense(point.hessian())
    assert relative(H, lennard_jones_hessian(x.reshape(-1, 3))) < 1e-10
    modes = np.linalg.eigvalsh(H)
    zero = np.abs(modes) < 1e-12 * modes[-1]
    assert zero.sum() == 6
    assert round(modes[~zero][0], 3) == 42.654
    assert round(modes[-1], 3) == 592.740
    top = eigsh(point.hessian(), 3, which="LA", v0=np.arange(1.0, 40.0), return_eigenvectors=False)
    assert top == pytest.approx(modes[-3:], rel=1e-10)


# Properties of single objectives


def test_a_gaussian_processs_gradient_and_value(registered):
    """Truth is Rasmussen and Williams (5.8) and (5.9), in float64."""
    case = ZOO["gaussian_process"]
    point = registered("gaussian_process").at(case.x)
    X, y = case.data
    K = kernel_derivatives(case.x, X)[0]
    assert point.value == pytest.approx(-multivariate_normal(np.zeros(len(y)), K).logpdf(y), rel=1e-12)
    assert relative(point.gradient, minus_log_evidence_gradient(case.x, X, y)) < 1e-10


@pytest.mark.parametrize("name", ["true", "false"])
def test_one_objective_takes_both_sides_of_its_cond(registered, name):
    """This does not depend on the side of the registration's x. A block at one point
    never sees the other side.
    """
    objective = registered(f"cond/{name}")
    on, off = (objective.at(ZOO[f"cond/{side}"].x).hessian() for side in ("true", "false"))
    for _ in range(2):
        assert relative(dense(on), truth("cond/true")) < 1e-10
        assert relative(dense(off), truth("cond/false")) < 1e-10


def test_another_key_is_another_hessian(registered):
    """Keys are data, which are bound at a point without another registration."""
    x, objective = ZOO["random"].x, registered("random")
    for seed in (5, 6):
        expected = random_features_hessian(x, key_data(seed))
        assert relative(dense(objective.at(x, key_data(seed)).hessian()), expected) < 1e-10
    assert relative(truth("random"), expected) > 0.1


def test_rows_that_no_token_names_are_zero(registered):
    H = dense(registered("gather").at(ZOO["gather"].x).hessian()).reshape(8, 3, 8, 3)
    untouched = [row for row in range(8) if row not in TOKENS]
    assert untouched == [0, 2, 5, 7]
    assert not H[untouched].any()
    assert not H[:, :, untouched].any()
    assert H[1].any()
    assert H[3].any()


def test_other_tokens_at_the_same_objective(registered):
    case = ZOO["gather"]
    _, U = case.data
    other = np.array([[0, 2, 2], [7, 0, 5]])
    H = registered("gather").at(case.x, other, U).hessian()
    assert relative(dense(H), gathered_hessian(case.x, other, U)) < 1e-10


# while_loop: forward mode only, and every Hessian begins with a gradient


@pytest.mark.parametrize("mode", MODES)
def test_a_while_loop_over_x_is_refused_in_every_mode(client, mode):
    def solved(x):
        return jnp.sum(newton_roots(x) ** 2)

    says = r"test_zoo.py:\d+, solved: .*cannot differentiate it even once: .*Reverse-mode differentiation does not work for lax\.while_loop"
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        client.register(solved, np.ones(3), mode=mode)


def test_a_fori_loop_of_a_traced_length_is_a_while_loop(client):
    def steps(x, count):
        return jnp.sum(lax.fori_loop(0, count, lambda _, y: 0.5 * (y + x / y), x))

    with pytest.raises(hvpd.InvalidArgumentError, match=r"Reverse-mode.*fori_loop with dynamic start/stop"):
        client.register(steps, np.ones(3), np.int32(4))


# The server's check compares with differences of gradients, which see the roots change.
@pytest.mark.filterwarnings("ignore::hvpd.CurvatureWarning")
@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse", "linearized"])
def test_a_while_loop_that_nothing_differentiates_is_fine(client, mode):
    """The loop is before stop_gradient, behind it, or over data: the roots are
    constants.
    """
    x, b = normal(60, 4), normal(61, 4)

    def weighted(x, b):
        before = lax.stop_gradient(newton_roots(x))
        behind = newton_roots(lax.stop_gradient(2 * x))
        return jnp.sum(x**2 * before + x**3 * behind + x**4 * newton_roots(b))

    H = client.register(weighted, x, b, mode=mode).at(x).hessian()
    expected = np.diag(2 * real_roots(x) + 6 * x * real_roots(2 * x) + 12 * x**2 * real_roots(b))
    assert relative(dense(H), expected) < 1e-10
    assert relative(H @ b, expected @ b) < 1e-10


@pytest.mark.parametrize(
    "name", ["log_det", "scan/control", "cond/true", "custom_root", "fft/filtered", "random", "gather"]
)
def test_a_block_in_one_launch(registered, name):
    """Until its program is compiled in the background, narrower launches make a block.
    Here one launch makes all of it.

    This test is the last, so that the compiler has had its time during the others.
    """
    objective, expected = registered(name), truth(name)
    H, V = objective.at(ZOO[name].x).hessian(), normal(97, len(expected), 4)

    def launched():
        assert relative(H @ V, expected @ V) < 1e-10
        return any(choice.width == 4 and choice.hvp_seconds for choice in objective.plan())

    until(launched)
