"""Data of ten times the server's memory budget gives the same numbers as data that
fits, also under faults.

Truth is dense, in numpy, or from the same objective on a server with room for all.
"""

import concurrent.futures
import os
import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg

import hvpd
from tests.support.waiting import until

N, ROWS, CLASSES = 20, 20_003, 3
BUDGET = 330_000
"""Bytes: a tenth of the data."""


def logistic(w, X, y, strength):
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + 0.5 * strength * w @ w


def truth(w, X, y, strength):
    """Return the value, the gradient and the Hessian."""
    margin = y * (X @ w)
    s = 1.0 / (1.0 + np.exp(margin))
    value = np.mean(np.logaddexp(0.0, -margin)) + 0.5 * strength * w @ w
    gradient = -(X.T @ (y * s)) / len(y) + strength * w
    return value, gradient, (X.T * (s * (1 - s))) @ X / len(y) + strength * np.eye(len(w))


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, N)), np.sign(rng.normal(size=count))


def assert_close(found, expected, error=1e-10):
    assert np.linalg.norm(np.asarray(found, np.float64) - expected) <= error * np.linalg.norm(expected)


X, Y = rows(ROWS)
W = np.random.default_rng(1).normal(size=N)
VALUE, GRADIENT, HESSIAN = truth(W, X, Y, 0.1)


@pytest.fixture(scope="module")
def small(serve_module):
    """Yield a server with room for a tenth of the data."""
    assert X.nbytes + Y.nbytes >= 10 * BUDGET
    return serve_module("--memory-budget", str(BUDGET))


@pytest.fixture(scope="module")
def cramped(small):
    with hvpd.connect(small.address) as client:
        yield client


@pytest.fixture(scope="module")
def objective(cramped):
    return cramped.register(logistic, np.zeros(N), X, Y, 0.1, row_reduction="mean", name="large/logistic")


@pytest.fixture(scope="module")
def point(objective):
    return objective.at(W)


def test_value_gradient_and_hessian_are_those_of_all_rows(small, point):
    assert point.value == pytest.approx(VALUE, rel=1e-12)
    assert_close(point.gradient, GRADIENT)
    assert_close(point.hessian() @ np.eye(N), HESSIAN)
    assert_close(point.hessian(shift=2.0) @ W, HESSIAN @ W + 2 * W)
    assert small.metric("hvpd_resident_bytes") <= BUDGET
    assert small.metric("hvpd_evictions_total") == 0


@pytest.mark.parametrize("width", [1, 2, 3, 64, 100])
def test_blocks_of_vectors(point, width):
    V = np.random.default_rng(width).normal(size=(N, width))
    assert_close(point.hessian() @ V, HESSIAN @ V)


def test_quadratic_forms(point):
    V = np.random.default_rng(2).normal(size=(N, 7))
    assert np.allclose(point.hessian().quadratic_form(V), np.einsum("nk,nm,mk->k", V, HESSIAN, V), rtol=1e-10)


def test_its_registration_was_checked_and_its_products_pass(cramped, objective):
    until(lambda: objective.registration_check().verdict != "pending")
    found = objective.registration_check()
    assert (found.verdict, found.reason) == ("passed", "")
    assert objective.check(W, probes=2).passed


def test_solvers_do_not_notice(objective):
    found = scipy.optimize.minimize(
        objective.value_and_grad, np.zeros(N), jac=True, hessp=objective.hessp, method="trust-ncg", tol=1e-9
    )
    value, gradient, hessian = truth(found.x, X, Y, 0.1)
    assert found.fun == pytest.approx(value, rel=1e-12)
    assert np.linalg.norm(gradient) < 1e-8
    step, code = scipy.sparse.linalg.cg(objective.at(found.x).hessian(), W, rtol=1e-10)
    assert code == 0
    assert_close(step, np.linalg.solve(hessian, W), 1e-8)


def test_krylov_runs_do_not_notice(point):
    H = point.hessian()
    with H.lanczos(N) as run:
        assert_close(run.ritz(3).values, np.linalg.eigvalsh(HESSIAN)[-3:])
    assert_close(H.solve(W, tol=1e-12).x, np.linalg.solve(HESSIAN, W), 1e-9)
    assert_close(H.trace(products=N).value, np.trace(HESSIAN))


def test_float32(cramped):
    data = [array.astype(np.float32) for array in (np.tile(X, (2, 1)), np.tile(Y, 2))]
    point = cramped.register(logistic, W.astype(np.float32), *data, np.float32(0.1), row_reduction="mean").at(W)
    assert point.value == pytest.approx(VALUE, rel=1e-6)
    assert_close(point.gradient, GRADIENT, 1e-5)
    products = point.hessian() @ np.eye(N, dtype=np.float32)
    assert products.dtype == np.float32
    assert_close(products, HESSIAN, 1e-5)


def test_a_sum(cramped):
    objective = cramped.register(lambda w, X, y: jnp.sum((X @ w - y) ** 2) / 2, np.zeros(N), X, Y, row_reduction="sum")
    point = objective.at(W)
    assert point.value == pytest.approx(np.sum((X @ W - Y) ** 2) / 2, rel=1e-12)
    assert_close(point.gradient, X.T @ (X @ W - Y))
    assert_close(point.hessian() @ np.eye(N), X.T @ X)


def test_pytrees_and_principal_blocks(cramped):
    """The data is a dict with a leaf without rows and with integers. x is a dict, with
    a block that has its own programs.
    """

    def loss(params, batch):
        margin = (2 * batch["label"] - 1) * (batch["X"] @ (params["w"] * batch["scale"]) + params["b"])
        return jnp.mean(jnp.logaddexp(0.0, -margin))

    batch = {"X": X, "label": (Y > 0).astype(np.int32), "scale": np.linspace(0.5, 1, N)}
    params = {"w": W, "b": np.array([0.3])}
    objective = cramped.register(loss, params, batch, row_reduction="mean", blocks=["b"])
    with jax.enable_x64(True):
        dense = jax.hessian(lambda x: loss({"b": x[:1], "w": x[1:]}, batch))(np.concatenate([[0.3], W]))
    H = objective.at(params).hessian()
    assert_close(H @ np.eye(N + 1), np.asarray(dense))
    assert_close(H.block("b") @ np.ones(1), np.asarray(dense)[:1, :1] @ np.ones(1))
    assert_close(H.block("w") @ np.eye(N), np.asarray(dense)[1:, 1:])


@pytest.mark.parametrize("count", [1, 7, 500, 19_997, 40_001])
def test_points_with_any_number_of_other_rows_those_that_fit_and_those_that_do_not(objective, count):
    other = rows(count, seed=count)
    value, gradient, hessian = truth(W, *other, 0.7)
    point = objective.at(W, *other, 0.7)
    assert point.value == pytest.approx(value, rel=1e-12)
    assert_close(point.gradient, gradient)
    V = np.random.default_rng(2).normal(size=(N, 3))
    assert_close(point.hessian() @ V, hessian @ V)


# Composites


def network(params, X):
    return jnp.tanh(X @ params["a"]["w"] + params["a"]["b"]) @ params["out"]


def cross_entropy(z, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1))


def squared_error(z, Y):
    return 0.5 * jnp.sum((z - Y) ** 2)


COMPOSITES = {
    "mean": (
        hvpd.composite(network, cross_entropy, distribution="categorical"),
        np.random.default_rng(3).integers(0, CLASSES, ROWS),
    ),
    "sum": (
        hvpd.composite(network, squared_error, distribution="normal", reduction="sum"),
        np.random.default_rng(3).normal(size=(ROWS, CLASSES)),
    ),
}


@pytest.fixture(scope="module", params=["mean", "sum"])
def both(request, cramped, client):
    """Yield the same point on two servers: with data in chunks, and with all data
    resident.
    """
    composite, targets = COMPOSITES[request.param]
    rng = np.random.default_rng(5)
    params = {"a": {"w": rng.normal(size=(N, 3)), "b": rng.normal(size=3)}, "out": rng.normal(size=(3, CLASSES))}
    return [
        each.register(composite, params, X, targets, row_reduction=request.param).at(params)
        for each in (cramped, client)
    ]  # Each server compiles for itself, and the first one for two lengths of chunks.


@pytest.mark.parametrize("operator", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_all_operators_of_a_composite_are_those_in_memory(both, operator):
    V = np.random.default_rng(7).normal(size=(both[0].n, 3))
    streamed, resident = (getattr(point, operator)() @ V for point in both)
    assert_close(streamed, resident)


def test_kronecker_factors_are_those_in_memory(both):
    for streamed, resident in zip(*(point.kfac().layers for point in both), strict=True):
        assert_close(streamed.A, resident.A)
        assert_close(streamed.G, resident.G)
    K = both[0].kfac(shift=0.1)
    assert_close(K @ (K.inverse() @ np.ones(K.shape[0])), np.ones(K.shape[0]), 1e-8)


def test_samples_repeat_for_a_seed_and_are_right_on_average(both):
    point = both[0]
    probe = np.random.default_rng(6).normal(size=point.n)
    draws = [point.fisher(seed=seed) @ probe for seed in range(16)]
    for seed in (0, 7):  # A wider launch, compiled meanwhile, may round differently.
        np.testing.assert_allclose(point.fisher(seed=seed) @ probe, draws[seed], rtol=1e-9)
    exact = point.fisher() @ probe
    errors = [np.linalg.norm(draw - exact) for draw in draws]
    assert min(errors) > 0
    # The mean of 16 independent draws is off by a quarter of one draw's error. Twice
    # that leaves room for chance.
    assert np.linalg.norm(np.mean(draws, axis=0) - exact) < 2 * np.sqrt(np.mean(np.square(errors)) / 16)
    first, second = (point.kfac(seed=seed).layers[0].G for seed in (4, 5))
    assert np.array_equal(first, point.kfac(seed=4).layers[0].G)
    assert not np.array_equal(first, second)


def test_chunks_draw_independently(cramped):
    """All rows are equal. If the chunks' draws were equal too, their mean would be as
    far off as that of one chunk.
    """
    composite = hvpd.composite(lambda x, X: X * x, squared_error, distribution="normal", reduction="sum")
    ones = np.ones(ROWS * (N + 1))
    point = cramped.register(composite, np.ones(1), ones, ones, row_reduction="sum").at(np.ones(1))
    exact = (point.fisher() @ np.ones(1))[0]
    assert exact == pytest.approx(len(ones))
    # A sum of g^2, of standard normal g: its variance is 2 for each row.
    off = [(point.fisher(seed=seed) @ np.ones(1))[0] - exact for seed in range(10)]
    assert np.abs(off).max() < 5 * np.sqrt(2 * len(ones))
    assert len(set(off)) == 10


# Refusals


def test_a_reduction_that_is_not_the_composites_is_refused(cramped):
    composite, targets = COMPOSITES["mean"]
    params = {"a": {"w": np.ones((N, 3)), "b": np.ones(3)}, "out": np.ones((3, CLASSES))}
    with pytest.raises(hvpd.InvalidArgumentError, match="composite's reduction is 'mean', row_reduction is 'sum'"):
        cramped.register(composite, params, X, targets, row_reduction="sum")
    with pytest.raises(hvpd.InvalidArgumentError, match="row_reduction must be one of mean, sum, got 'max'"):
        cramped.register(composite, params, X, targets, row_reduction="max")


def test_an_objective_that_is_no_mean_or_sum_over_rows_is_refused(serve):
    """A sum with a penalty would have the penalty once for each chunk."""

    def penalized(w, X, y):
        return jnp.sum((X @ w - y) ** 2) + w @ w

    few = rows(50)
    with hvpd.connect(serve("--memory-budget", str(BUDGET)).address) as client:
        for reduction in ("mean", "sum"):
            objective = client.register(penalized, W, X, Y, row_reduction=reduction)
            says = f"row_reduction '{reduction}'.*A mean may have a penalty"
            with pytest.raises(hvpd.InvalidArgumentError, match=says) as no:
                objective.at(W)
            assert no.value.reason == "ROW_REDUCTION"
            until(lambda objective=objective: objective.registration_check().verdict != "pending")
            found = objective.registration_check()
            assert found.verdict == "undecided"
            assert "row_reduction" in found.reason
            assert objective.at(W, *few).value == pytest.approx(np.sum((few[0] @ W - few[1]) ** 2) + W @ W)


def test_without_the_word_for_it_data_must_fit_and_the_error_has_the_word(cramped):
    objective = cramped.register(logistic, np.zeros(N), X, Y, 0.1, any_rows=True)
    with pytest.raises(hvpd.OverloadedError, match=r"memory budget.*--memory-budget.*register it with row_reduction"):
        objective.at(W)
    assert objective.at(W, *rows(50), 0.1).value > 0


def test_a_row_that_does_not_fit_is_refused_with_its_size(cramped):
    wide = np.ones((4, BUDGET // 8))
    objective = cramped.register(
        lambda w, X: jnp.mean(X @ jnp.ones(BUDGET // 8)) * w[0] ** 2, np.ones(1), wide, row_reduction="mean"
    )
    with pytest.raises(hvpd.OverloadedError, match=rf"--memory-budget.* 1 rows of {BUDGET // 8 * 8} bytes"):
        objective.at(np.ones(1))


def test_data_without_rows_that_does_not_fit_is_refused(cramped):
    table = np.ones(BUDGET // 8)
    objective = cramped.register(
        lambda w, X, y, table: logistic(w, X, y, 0.1) * table[0], np.zeros(N), X, Y, table, row_reduction="mean"
    )
    with pytest.raises(hvpd.OverloadedError, match="--memory-budget"):
        objective.at(W)


# Faults


def test_killed_in_the_middle_of_a_solve_and_restarted(serve):
    server = serve("--memory-budget", str(BUDGET))
    with hvpd.connect(server.address) as client:
        objective = client.register(logistic, np.zeros(N), X, Y, 0.1, row_reduction="mean")
        H = objective.at(W).hessian()
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
        assert client.statistics().retries > 0
        assert_close(solution, np.linalg.solve(HESSIAN, W), 1e-8)
        assert_close(objective.at(W + 1).hessian() @ W, truth(W + 1, X, Y, 0.1)[2] @ W)


def blob(server, objective, leaf=0):
    digest = objective._bundle.data[leaf].digest
    return server.store / "blobs" / digest[:2] / digest


def register_here(client):
    return client.register(logistic, np.zeros(N), X, Y, 0.1, row_reduction="mean", name="large/mended")


def test_a_blob_that_is_corrupt_is_found_set_aside_and_healed(serve):
    server = serve("--memory-budget", str(BUDGET))
    with hvpd.connect(server.address) as client:
        path = blob(server, register_here(client))
    server.kill()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    server.start()
    with hvpd.connect(server.address) as client:
        with pytest.raises(hvpd.HvpdError, match="corrupt on the server's disk; it was set aside: register") as error:
            client.objective("large/mended").at(W)
        assert error.value.reason == "BLOB_CORRUPT"
        assert [found.name.split(".")[0] for found in (server.store / "corrupt").iterdir()] == [path.name]
        assert_close(register_here(client).at(W).hessian() @ W, HESSIAN @ W)


def test_a_file_that_is_cut_short_while_it_is_in_use_ends_the_product_and_not_the_server(serve):
    server = serve("--memory-budget", str(BUDGET))
    with hvpd.connect(server.address) as client:
        objective = register_here(client)
        H = objective.at(W).hessian()
        assert_close(H @ W, HESSIAN @ W)
        os.truncate(blob(server, objective), 100_000)
        with pytest.raises(hvpd.HvpdError, match="register the objective again to restore it"):
            H @ W
        assert server.process.poll() is None
        register_here(client)
        assert_close(H @ W, HESSIAN @ W)


def test_two_tenants_one_with_data_in_chunks_and_one_with_data_that_is_resident(serve):
    """Both tenants ask at once, from several threads, with points that come and go.
    Each gets its own products.
    """
    server = serve("--memory-budget", str(BUDGET))
    few = rows(300, seed=9)
    with hvpd.connect(server.address) as one, hvpd.connect(server.address) as two:
        large = one.register(logistic, np.zeros(N), X, Y, 0.1, row_reduction="mean")
        resident = two.register(logistic, np.zeros(N), *few, 0.1)

        def work(seed):
            rng = np.random.default_rng(seed)
            objective, data = ((large, (X, Y)), (resident, few))[seed % 2]
            for _ in range(3):
                w, v = rng.normal(size=N), rng.normal(size=N)
                value, gradient, hessian = truth(w, *data, 0.1)
                found, slope = objective.value_and_grad(w)
                assert found == pytest.approx(value, rel=1e-12)
                assert_close(slope, gradient)
                assert_close(objective.hessp(w, v), hessian @ v)

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        assert server.metric("hvpd_resident_bytes") <= BUDGET


def test_the_process_does_not_hold_the_data(serve):
    """Fifteen million numbers, 120 MB on the disk, go through a budget of 2 MB. Memory
    that has passed through the allocator stays there, and so does gRPC's, of up to 32
    MiB for each call.
    """
    server = serve("--memory-budget", "2M")

    def anonymous_bytes():
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024

    ones = np.random.default_rng(0).normal(size=15_000_000)
    with hvpd.connect(server.address) as client:
        first = client.register(lambda x, d: jnp.mean((d - x) ** 2), np.zeros(()), ones[:1000], row_reduction="mean")
        first.at(np.ones(())).hessian() @ np.ones(1)
        before = anonymous_bytes()
        point = first.at(np.ones(()), ones)
        assert point.value == pytest.approx(np.mean((ones - 1) ** 2), rel=1e-12)
        assert point.hessian() @ np.ones(1) == pytest.approx(2)
        assert anonymous_bytes() - before < ones.nbytes * 3 // 4
