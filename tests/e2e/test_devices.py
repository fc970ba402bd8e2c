"""Several devices of one host, here a CPU that acts as four. Objectives are spread over
them, and one objective's data is split over all.
"""

import concurrent.futures
import itertools
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg

import hvpd
from tests.support.waiting import until

FOUR = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"}
N = 16


def logistic(w, X, y):
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + 0.05 * jnp.sum(w**2)


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, N)), np.sign(rng.normal(size=count))


def truth(w, X, y):
    """Return the value, the gradient and the Hessian."""
    margin = y * (X @ w)
    s = 1.0 / (1.0 + np.exp(margin))
    value = np.mean(np.logaddexp(0.0, -margin)) + 0.05 * w @ w
    gradient = -(X.T @ (y * s)) / len(y) + 0.1 * w
    return value, gradient, (X.T * (s * (1 - s))) @ X / len(y) + 0.1 * np.eye(N)


W = np.random.default_rng(1).normal(size=N)


def assert_right(point, X, y):
    value, gradient, hessian = truth(point.x, X, y)
    assert point.value == pytest.approx(value, rel=1e-12)
    assert np.linalg.norm(point.gradient - gradient) <= 1e-10 * np.linalg.norm(gradient)
    for width in (1, 3):
        V = np.random.default_rng(width).normal(size=(N, width))
        found = point.hessian() @ V
        assert np.linalg.norm(found - hessian @ V) <= 1e-10 * np.linalg.norm(hessian @ V)


@pytest.fixture(scope="module")
def devices(serve_module):
    return serve_module(environment=FOUR)


@pytest.fixture(scope="module")
def host(devices):
    with hvpd.connect(devices.address) as client:
        yield client


def test_the_server_says_how_many_there_are(host, client):
    assert host.server.device_count == 4
    assert client.server.device_count == 1


@pytest.mark.filterwarnings("ignore::hvpd.CurvatureWarning")  # No device has room for the checks.
def test_objectives_are_spread_so_that_each_device_has_one_of_four(serve):
    """A device has half of 400 kB, and two of these data sets are larger."""
    server = serve("--memory-budget", "400K", environment=FOUR)
    with hvpd.connect(server.address) as client:
        data = [rows(1100, seed) for seed in range(4)]
        points = [client.register(logistic, np.zeros(N), *each).at(W) for each in data]
        for _ in range(2):
            for point, each in zip(points, data, strict=True):
                assert_right(point, *each)
        assert server.metric("hvpd_evictions_total") == 0
        assert server.metric("hvpd_resident_bytes") > sum(X.nbytes for X, _ in data)
        fifth = rows(1100, 5)
        assert_right(client.register(logistic, np.zeros(N), *fifth).at(W), *fifth)
        assert server.metric("hvpd_evictions_total") > 0


def test_objectives_with_the_same_data_have_one_copy(serve):
    server = serve(environment=FOUR)
    with hvpd.connect(server.address) as client:
        X, y = rows(1000)
        for scale in (1.0, 2.0, 3.0):
            point = client.register(lambda w, X, y, s=scale: s * logistic(w, X, y), np.zeros(N), X, y).at(W)
            assert point.value == pytest.approx(scale * truth(W, X, y)[0], rel=1e-12)
        assert X.nbytes + y.nbytes <= server.metric("hvpd_resident_bytes") < 2 * X.nbytes


@pytest.mark.parametrize(
    ("count", "options"),
    [
        *itertools.product([1000, 1001], [{}, {"any_rows": True}, {"row_reduction": "mean"}, {"fixed_bucket": 4}]),
        (4, {"row_reduction": "mean"}),
        (3, {"any_rows": True}),
    ],
    ids=str,
)
def test_split_data_gives_the_same_results_as_whole_data(host, count, options):
    """If four does not divide the rows, each device has all of them."""
    data = rows(count)
    assert_right(host.register(logistic, np.zeros(N), *data, sharded=True, **options).at(W), *data)


def test_krylov_runs_over_split_data(devices, host):
    X, y = rows(1000)
    H = host.register(logistic, np.zeros(N), X, y, sharded=True).at(W).hessian()
    dense = truth(W, X, y)[2]
    with H.lanczos(N) as run:
        np.testing.assert_allclose(run.ritz(3).values, np.linalg.eigvalsh(dense)[-3:], rtol=1e-10)

    def launched():
        np.testing.assert_allclose(H.solve(W, tol=1e-12).x, np.linalg.solve(dense, W), rtol=1e-9)
        return devices.metric(r'hvpd_launches_total\{program="cg_hvp"\}')

    until(launched)  # Several steps are one launch as soon as their program is there.


def test_other_data_and_other_numbers_of_rows(host):
    objective = host.register(logistic, np.zeros(N), *rows(100), sharded=True, any_rows=True)
    for count in (8, 10, 400):
        assert_right(objective.at(W, *rows(count, seed=count)), *rows(count, seed=count))


def test_split_data_needs_room_only_for_its_part_on_each_device(serve):
    """Each device has half of 400 kB: 530 kB fit in four halves, and in no single
    one.
    """
    server = serve("--memory-budget", "400K", environment=FOUR)
    with hvpd.connect(server.address) as client:
        data = rows(4000)
        whole = client.register(logistic, np.zeros(N), *data)
        with pytest.raises(hvpd.OverloadedError, match="memory budget of 204800 bytes"):
            whole.at(W)
        assert_right(client.register(logistic, np.zeros(N), *data, sharded=True).at(W), *data)
        # As a whole, on each device, it is too large again.
        uneven = rows(4001)
        with pytest.raises(hvpd.OverloadedError, match="memory budget of 819200 bytes"):
            client.register(logistic, np.zeros(N), *uneven, sharded=True).at(W)


@pytest.mark.parametrize("count", [20_000, 20_003])
def test_data_too_large_for_all_devices_goes_through_in_split_chunks(serve, count):
    server = serve("--memory-budget", "200K", environment=FOUR)
    with hvpd.connect(server.address) as client:
        data = rows(count)
        assert data[0].nbytes > 6 * 4 * 102_400
        assert_right(client.register(logistic, np.zeros(N), *data, sharded=True, row_reduction="mean").at(W), *data)
        assert server.metric("hvpd_resident_bytes") <= 4 * 102_400


def test_composites_with_all_their_operators(host, client):
    def model(params, X):
        return jnp.tanh(X @ params["w"] + params["b"])

    def cross_entropy(z, labels):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1))

    X, y = rows(200)
    composite = hvpd.composite(model, cross_entropy, distribution="categorical")
    params = {"w": np.random.default_rng(2).normal(size=(N, 2)), "b": np.zeros(2)}
    split = host.register(composite, params, X, (y > 0).astype(int), sharded=True).at(params)
    whole = client.register(composite, params, X, (y > 0).astype(int)).at(params)
    for operator in ("ggn", "fisher", "empirical_fisher"):
        found, expected = (getattr(point, operator)() @ np.eye(point.n) for point in (split, whole))
        assert np.linalg.norm(found - expected) <= 1e-10 * np.linalg.norm(expected)
    (found,), (expected,) = (point.kfac().layers for point in (split, whole))
    assert np.allclose(found.A, expected.A, rtol=1e-12)
    assert np.allclose(found.G, expected.G, rtol=1e-10, atol=1e-14)
    draw = split.fisher(seed=3) @ np.ones(split.n)
    assert np.allclose(draw, whole.fisher(seed=3) @ np.ones(split.n), rtol=1e-9, atol=1e-12)


def test_all_at_once(devices, host):
    """Many threads use objectives of one device and of all devices, with points that
    come and go. Each gets its own products.
    """
    data = [rows(200, seed) for seed in range(6)]
    objectives = [
        host.register(logistic, np.zeros(N), *each, sharded=index % 2 == 0) for index, each in enumerate(data)
    ]
    together = threading.Barrier(12)

    def ask(seed):
        rng = np.random.default_rng(seed)
        together.wait(60)
        for _ in range(6):
            index = rng.integers(6)
            w, V = rng.normal(size=N), rng.normal(size=(N, rng.integers(1, 9)))
            value, _, hessian = truth(w, *data[index])
            point = objectives[index].at(w)
            assert point.value == pytest.approx(value, rel=1e-12)
            assert np.linalg.norm(point.hessian() @ V - hessian @ V) <= 1e-10 * np.linalg.norm(hessian @ V)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(12)))


def test_pins_and_steps_on_whichever_device(host):
    objectives = [host.register(lambda x, k=k: k * jnp.sum(x**4) / 12, np.ones(5)) for k in (1, 2, 3, 4)]
    for k, objective in enumerate(objectives, start=1):
        point = objective.at(np.ones(5), pin=60).moved(2.0, np.ones(5))
        assert np.allclose(point.hessian() @ np.ones(5), k * 9.0)
    split = host.register(logistic, np.zeros(N), *rows(40), sharded=True)
    assert_right(split.at(np.zeros(N), pin=60).moved(1.0, W), *rows(40))


def test_killed_in_the_middle_of_a_solve(serve):
    server = serve(environment=FOUR)
    with hvpd.connect(server.address) as client:
        data = rows(400)
        H = client.register(logistic, np.zeros(N), *data, sharded=True).at(W).hessian()
        products = 0

        def kill():
            server.kill()
            server.start()

        def matvec(v):
            nonlocal products
            products += 1
            if products == 4:
                killer.start()
            return H @ v

        killer = threading.Thread(target=kill)
        operator = scipy.sparse.linalg.LinearOperator((N, N), matvec, dtype=float)
        solution, code = scipy.sparse.linalg.cg(operator, W, rtol=1e-12)
        killer.join(120)
        assert code == 0
        assert np.allclose(solution, np.linalg.solve(truth(W, *data)[2], W), rtol=1e-8)


def test_a_product_that_never_ends_on_one_device_leaves_the_others_alone(serve):
    """At points whose first element is positive, the loop does not end."""
    server = serve("--drain", "0.5", environment=FOUR)

    def trap(x):
        held = jax.lax.stop_gradient(x[0])
        return jnp.sum(x**4) / 12 * jax.lax.while_loop(lambda count: held > 0, lambda count: count + 1, 1.0)

    with hvpd.connect(server.address) as client:
        trapped = client.register(trap, np.zeros(3), name="trap")
        assert np.allclose(trapped.hessp(-np.ones(3), np.ones(3)), 1)
        data = [rows(100, seed) for seed in range(3)]
        others = [client.register(logistic, np.zeros(N), *each) for each in data]
        with hvpd.connect(server.address, timeout=0.5) as impatient, pytest.raises(hvpd.DeadlineError):
            impatient.objective("trap").at(np.ones(3))
        for objective, each in zip(others, data, strict=True):
            assert_right(objective.at(W), *each)
        assert server.metric("hvpd_pending_vectors") == 0
    assert server.terminate() == 0


def test_residuals_do_not_go_with_it(host):
    for mode in ("linearized", "auto"):
        with pytest.raises(hvpd.InvalidArgumentError, match="nor with sharded"):
            host.register(logistic, np.zeros(N), *rows(8), sharded=True, mode=mode)


def test_on_one_device_it_is_as_if_it_had_not_been_said(client):
    data = rows(101)
    assert_right(client.register(logistic, np.zeros(N), *data, sharded=True).at(W), *data)


def perceptron(params, X, y):
    h = jnp.tanh(X @ params["A"] + params["a"])
    return jnp.mean((jnp.tanh(h @ params["B"] + params["b"]) @ params["c"] - y) ** 2)


def parameters(width=32):
    """Return parameters of which four devices can split the matrices and two
    vectors.
    """
    rng = np.random.default_rng(4)
    shapes = {"A": (N, width), "a": (width,), "B": (width, 7), "b": (7,), "c": (7,)}
    return {name: rng.normal(size=shape) / 4 for name, shape in shapes.items()}


def test_x_that_is_split_by_leaf_gives_the_same_results(host, client):
    params, data = parameters(), rows(24)
    objective = host.register(perceptron, params, *data, sharded="parameters")
    ours = objective.at(params)
    theirs = client.register(perceptron, params, *data).at(params)
    assert ours.value == pytest.approx(theirs.value, rel=1e-13)
    assert np.linalg.norm(ours.gradient - theirs.gradient) <= 1e-12 * np.linalg.norm(theirs.gradient)
    for width in (1, 3, 8):
        V = np.random.default_rng(width).normal(size=(ours.n, width))
        found, expected = ours.hessian() @ V, theirs.hessian() @ V
        assert np.linalg.norm(found - expected) <= 1e-12 * np.linalg.norm(expected)
    until(lambda: objective.registration_check().verdict == "passed")


def test_each_device_has_a_part_of_x(serve):
    resident = []
    for sharded in (True, "parameters"):
        server = serve(environment=FOUR)
        with hvpd.connect(server.address) as client:
            client.register(perceptron, parameters(), *rows(24), sharded=sharded).at(parameters())
            resident.append(server.metric(r'hvpd_resident_bytes\{kind="point"\}'))
    whole, split = resident
    assert 4 * split < whole * 4 / 3  # A few small leaves are on each device.


def test_solves_and_line_searches_with_split_x(host):
    params, data = parameters(4), rows(24)
    objective = host.register(perceptron, params, *data, sharded="parameters")
    H = objective.at(params).hessian()
    dense = H @ np.eye(objective.n)
    np.testing.assert_allclose(H.eigsh(2)[0], np.linalg.eigvalsh(dense)[-2:], rtol=1e-9)
    b = np.ones(objective.n)
    shifted = objective.at(params).hessian(shift=10.0)
    np.testing.assert_allclose(
        shifted.solve(b, tol=1e-12).x, np.linalg.solve(dense + 10 * np.eye(len(b)), b), rtol=1e-8
    )
    x0 = objective.ravel(params)
    found = scipy.optimize.minimize(
        objective.value_and_grad, x0, jac=True, hessp=objective.hessp, method="Newton-CG", options={"maxiter": 5}
    )
    assert found.fun < objective.value(x0)


def assert_same(found, expected):
    assert np.linalg.norm(found - expected) <= 1e-12 * np.linalg.norm(expected)


SOLVES = {
    "cg": ("cg_hvp", 1, {}),
    "many": ("cg_hvp", 3, {}),
    "diagonal": ("cg_hvp", 1, {"M": np.linspace(0.5, 2.0, 32 * (N + 8) + 14)}),
    "low rank": ("minres_hvp", 1, {"method": "minres"}),
    "shifts": ("shifted_cg_hvp", 1, {"shifts": [0.0, 5.0, 10.0]}),
}
"""Program, right-hand sides and options of each solve."""


@pytest.fixture(scope="module")
def split_and_whole(host, client):
    data = rows(24)
    return [
        each.register(perceptron, parameters(), *data, sharded=sharded).at(parameters())
        for each, sharded in ((host, "parameters"), (client, False))
    ]


@pytest.mark.parametrize("name", SOLVES)
def test_solves_with_split_x_stay_on_the_devices(devices, split_and_whole, name):
    program, count, options = SOLVES[name]
    ours, theirs = (point.hessian(shift=10.0) for point in split_and_whole)
    if name == "low rank":
        options = options | {"M": hvpd.nystrom(theirs, 4, shift=0.1)}
    if name == "many":
        U = np.random.default_rng(2).normal(size=(theirs.shape[0], 3)) / 10
        ours, theirs = (each.updated(U) for each in (ours, theirs))
    b = np.random.default_rng(1).normal(size=(ours.shape[0], count)).squeeze()
    expected = theirs.solve(b, tol=1e-14, **options).x
    launches = lambda: [devices.metric(f'hvpd_launches_total{{program="{each}"}}') for each in (program, "hvp")]  # noqa: E731

    def launched():
        before = launches()
        assert_same(ours.solve(b, tol=1e-14, **options).x, expected)
        several, products = np.subtract(launches(), before)
        return several and products <= 1  # The last residual takes a product.

    until(launched)


def test_bases_with_split_x_stay_on_the_devices(devices, split_and_whole):
    operators = [point.hessian(shift=0.5) for point in split_and_whole]
    products = devices.metric('hvpd_launches_total{program="hvp"}')
    (values, vectors), (expected, columns) = (H.eigsh(3, seed=1) for H in operators)
    assert_same(values, expected)
    assert_same(abs(vectors), abs(columns))
    found, expected = (H.spectrum(steps=20, probes=2, seed=1) for H in operators)
    assert found.reorthogonalize == expected.reorthogonalize == "full"
    assert_same(found.nodes, expected.nodes)
    assert_same(found.moments(3), expected.moments(3))
    with operators[0].lanczos(4, seed=1) as ours, operators[1].lanczos(4, seed=1) as theirs:
        assert_same(ours.extend(4).alphas, theirs.extend(4).alphas)
    assert devices.metric('hvpd_launches_total{program="lanczos_hvp"}') > 0
    assert devices.metric('hvpd_launches_total{program="hvp"}') == products


def test_runs_and_products_with_split_x_at_the_same_time(split_and_whole):
    ours, theirs = (point.hessian(shift=10.0) for point in split_and_whole)
    b = np.random.default_rng(3).normal(size=ours.shape[0])
    asks = [
        lambda H: H.solve(b, tol=1e-14).x,
        lambda H: H.eigsh(2, seed=1)[0],
        lambda H: H @ b,
        lambda H: H.spectrum(steps=10, probes=2, seed=1).nodes,
    ]
    expected = [ask(theirs) for ask in asks]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda ask: ask(ours), asks * 4))
    for number, each in enumerate(found):
        assert_same(each, expected[number % len(asks)])


def test_a_spectrum_with_split_x_that_is_not_finite(split_and_whole):
    objective = split_and_whole[0].objective
    H = objective.at(np.full(objective.n, np.nan)).hessian()
    with pytest.raises(hvpd.HvpdError, match="NaN or infinity") as error:
        H.spectrum(steps=20, probes=2)
    assert error.value.reason == "NOT_FINITE"


def test_steps_of_minimize_with_split_x(host, client):
    found = [
        each.register(perceptron, parameters(), *rows(24), sharded=sharded).minimize(parameters(), maxiter=6)
        for each, sharded in ((host, "parameters"), (client, False))
    ]
    assert_same(found[0].x, found[1].x)
    assert found[0].nit == found[1].nit


def test_split_x_on_one_device_is_x_on_that_device(client):
    params, data = parameters(), rows(24)
    ours = client.register(perceptron, params, *data, sharded="parameters").at(params)
    theirs = client.register(perceptron, params, *data).at(params)
    v = np.ones(ours.n)
    assert np.linalg.norm(ours.hessian() @ v - theirs.hessian() @ v) <= 1e-12 * np.linalg.norm(theirs.hessian() @ v)


def test_split_x_has_products_of_the_whole_hessian_only(host):
    params, data = parameters(), rows(24)
    objective = host.register(perceptron, params, *data, sharded="parameters")
    H = objective.at(params).hessian()
    with pytest.raises(hvpd.InvalidArgumentError, match='registered with sharded="parameters"') as error:
        H.block("A") @ np.ones(N * 32)
    assert error.value.reason == "UNKNOWN_BLOCK"


@pytest.mark.parametrize(
    "options",
    [{"mode": "reverse_over_reverse"}, {"any_rows": True}, {"row_reduction": "mean"}, {"blocks": ["A"]}],
    ids=str,
)
def test_options_that_need_a_whole_x_are_refused(host, options):
    with pytest.raises(hvpd.InvalidArgumentError, match='sharded="parameters" splits x by leaf') as error:
        host.register(perceptron, parameters(), *rows(24), sharded="parameters", **options)
    assert error.value.reason == "CONFLICTING_OPTIONS"


def test_another_word_for_sharded_is_refused(host):
    with pytest.raises(hvpd.InvalidArgumentError, match="sharded must be False, True or") as error:
        host.register(perceptron, parameters(), *rows(24), sharded="params")
    assert error.value.reason == "INVALID_OPTION"


def test_an_objective_without_forward_mode_cannot_split_x(host):
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))

    @jax.custom_vjp
    def cube(x):
        return jnp.sum(x**3)

    cube.defvjp(lambda x: (cube(x), x), lambda x, g: (g * 3 * square(x),))
    with pytest.raises(hvpd.InvalidArgumentError, match="has a rule for reverse mode only"):
        host.register(lambda x, X: cube(X @ x), np.zeros(N), rows(8)[0], sharded="parameters")
