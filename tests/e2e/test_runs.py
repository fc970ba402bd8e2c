"""Krylov runs on a real server: equal to the same iteration here, with less traffic;
they survive evictions, restarts and broken calls; they end with their callers.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd._krylov.lanczos import NOT_FINITE, Lanczos, start_block
from hvpd._krylov.runner import Runner
from hvpd_server.tenancy import token_file
from tests.support.waiting import until

N, ROWS = 40, 120


def logistic(x, X, y):
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ x))) + 0.05 * jnp.sum(x**2)


def halves(x, X, y):
    return logistic(jnp.concatenate([x["a"], x["b"]]), X, y)


def quartic(x, data):
    """Return a function whose Hessian is diag(data x^2)."""
    return jnp.sum(data * x**4) / 12


def problem(dtype=np.float64, n=N):
    rng = np.random.default_rng(0)
    X, x = rng.standard_normal((ROWS, n)).astype(dtype), rng.standard_normal(n).astype(dtype)
    return x, X, np.sign(X[:, 0])


def begin(H, *, block=1, seed=0, reorthogonalize="full", space=None):
    runner = H._krylov()
    space = space or runner.space(reorthogonalize)
    start = start_block(H.shape[0], H.dtype, None, seed, block)
    return Lanczos(space, start)


def here(H, **settings):
    """Begin the same run here, one product after the other."""
    reorthogonalize = settings.pop("reorthogonalize", "full")
    return begin(H, space=Runner.space(H._krylov(), reorthogonalize), **settings)


@pytest.fixture(scope="module")
def objective(client):
    x, X, y = problem()
    return client.register(halves, {"a": x[:15], "b": x[15:]}, X, y, name="runs/logistic", fixed_bucket=4)


@pytest.fixture
def H(objective):
    return objective.at(problem()[0]).hessian()


def assert_same(run, expected):
    for name in ("alphas", "betas"):
        for found, true in zip(getattr(run, name), getattr(expected, name), strict=True):
            np.testing.assert_allclose(found, true, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize(
    "operator",
    [
        lambda H: H,
        lambda H: (-2.0 * H).shifted(0.25),
        lambda H: H.updated(np.random.default_rng(2).standard_normal((N, 2)), [1.0, -2.0]),
        lambda H: H.block("b"),
    ],
    ids=["plain", "shifted", "updated", "principal block"],
)
def test_a_run_equals_the_iteration_here(H, operator, block):
    A = operator(H)
    with begin(A, block=block) as run:
        run.extend(3).extend(4)
        assert_same(run, here(A, block=block).extend(7))
        Q = run.combine(np.eye(run.size))
        np.testing.assert_allclose(Q.T @ Q, np.eye(run.size), atol=1e-12)
        np.testing.assert_allclose(Q.T @ (A @ Q), run.projected, atol=1e-12)


def test_eigenvalues_after_restarts_are_those_of_the_dense_matrix(H):
    dense = np.linalg.eigvalsh(H @ np.eye(N))
    with begin(H) as run:
        run.extend(20)
        for _ in range(6):
            run.restart(np.arange(12, 20))
            run.extend(12)
        np.testing.assert_allclose(run.ritz(4).values, dense[-4:], rtol=1e-10)


def test_a_run_without_reorthogonalization_keeps_no_basis(H):
    with begin(H, reorthogonalize="none") as run:
        run.extend(10)
        assert_same(run, here(H, reorthogonalize="none").extend(10))
        with pytest.raises(hvpd.HvpdError, match="keeps no basis"):
            run.combine(np.eye(3))


def test_a_run_in_float32_is_orthogonal(client):
    x, X, y = problem(np.float32)
    H = client.register(logistic, x, X, y).at(x).hessian()
    with begin(H) as run:
        run.extend(30)
        Q = run.combine(np.eye(30)).astype(np.float64)
    assert Q.shape == (N, 30)
    np.testing.assert_allclose(Q.T @ Q, np.eye(30), atol=1e-6)


def test_a_run_on_the_server_says_that_it_is_closed(H):
    with H.lanczos(3) as run:
        values = run.ritz(2).values
    for call in (lambda: run.extend(1), lambda: run.ritz(2), lambda: run.combine(np.eye(3)), lambda: run.pin(1)):
        with pytest.raises(hvpd.HvpdError, match="this run is closed"):
            call()
    assert np.array_equal(run.ritz(2, vectors=False).values, values)


def test_an_invariant_space_ends_the_run(client):
    x = np.ones(5)
    H = client.register(quartic, x, np.array([1.0, 1, 2, 2, 3])).at(x).hessian()
    with begin(H) as run:
        run.extend(5)
        assert run.breakdown
        np.testing.assert_allclose(np.linalg.eigvalsh(run.projected), [1, 2, 3], rtol=1e-12)


def test_a_product_that_is_not_finite_keeps_the_steps_before_it(client):
    def fun(x, data):
        return jnp.sum(jnp.where(x > 1e3, jnp.nan, data) * x**4) / 12

    x = np.ones(5)
    x[3] = 2e3
    H = client.register(fun, np.ones(5), np.arange(1.0, 6)).at(x).hessian()
    start = np.eye(5)[:1]
    run = Lanczos(H._krylov().space(), start)
    run.extend(3)
    assert run.reason == NOT_FINITE
    assert run.steps == 0
    assert (run.ritz().vectors.shape, run.ritz().reason) == ((5, 0), NOT_FINITE)
    assert run.combine(np.eye(1)).shape == (5, 1)


def test_a_caller_that_stops_early_goes_on_from_there(H):
    space = H._krylov().space()
    space.append(start_block(N, H.dtype, None, 0, 1))
    steps = space.extend(30)
    first = [next(steps) for _ in range(6)]
    steps.close()
    assert space.rows == 7
    more = list(space.extend(4))
    expected = here(H).extend(10)
    np.testing.assert_allclose([step.alpha[0, 0] for step in (*first, *more)], expected.alphas, rtol=1e-12)
    space.close()


@pytest.fixture(scope="module")
def free(client):
    """Return an objective without a fixed bucket: its steps are launched together."""
    x, X, y = problem()
    return client.register(halves, {"a": x[:15], "b": x[15:]}, X, y, name="runs/free")


def on_device(make):
    """Return a run of 12 steps that the device took: its program compiles meanwhile."""

    def find():
        run = make()
        run.extend(12)
        if run._space.place == "device":
            return run
        run.close()
        return None

    return until(find)


@pytest.mark.parametrize(
    "operator",
    [lambda H: H, lambda H: (-2.0 * H).shifted(0.25), lambda H: H.block("b")],
    ids=["plain", "shifted", "principal block"],
)
def test_steps_that_are_launched_together_equal_the_iteration_here(free, operator):
    A = operator(free.at(problem()[0]).hessian())
    n = A.shape[0]
    with on_device(lambda: begin(A)) as run:
        run.extend(n - 12)
        assert run.steps == n
        np.testing.assert_allclose(run.alphas[:20], here(A).extend(20).alphas, rtol=1e-10, atol=1e-12)
        Q = run.combine(np.eye(run.size))
        np.testing.assert_allclose(Q.T @ Q, np.eye(n), atol=1e-12)
        np.testing.assert_allclose(np.linalg.eigvalsh(run.projected), np.linalg.eigvalsh(A @ np.eye(n)), atol=1e-12)


def test_a_restarted_run_goes_on_in_launches(free):
    H = free.at(problem()[0]).hessian()
    with on_device(lambda: begin(H)) as run:
        for _ in range(6):
            run.restart(np.arange(run.size - 8, run.size))
            run.extend(12)
        np.testing.assert_allclose(run.ritz(3).values, np.linalg.eigvalsh(H @ np.eye(N))[-3:], rtol=1e-10)


def test_launches_in_float32_are_orthogonal(client):
    n = 32768 + 5  # Inner products of float32 are taken by parts.
    x, data = np.ones(n, np.float32), np.linspace(1, 2, n, dtype=np.float32)
    H = client.register(quartic, x, data).at(x).hessian()
    with on_device(lambda: begin(H)) as run:
        Q = run.extend(10).combine(np.eye(22)).astype(np.float64)
        np.testing.assert_allclose(Q.T @ Q, np.eye(22), atol=1e-6)


def test_launches_end_at_an_invariant_space(client):
    values = [1.0, 2.0]
    H = client.register(quartic, np.ones(50), np.resize(values, 50)).at(np.ones(50)).hessian()
    run = until(lambda: ended(H))
    assert run.breakdown
    np.testing.assert_allclose(np.linalg.eigvalsh(run.projected), values, rtol=1e-12)
    run.close()


def ended(H):
    run = begin(H)
    run.extend(20)
    return run if run._space.place == "device" else run.close()


def test_a_launch_that_is_not_finite_keeps_the_steps_before_it(client):
    """The product of the first start is finite, and that of the second is not."""

    def fun(x, data):
        return jnp.sum(data * x**3) / 6

    x, data = np.ones(50), np.linspace(1, 2, 50)
    x[49] = 1e308
    data[49] = 100.0
    objective = client.register(fun, np.ones(50), data)
    on_device(lambda: begin(objective.at(np.ones(50)).hessian())).close()
    run = begin(objective.at(x).hessian(), seed=3)
    run.extend(5)
    assert run._space.place == "device"
    assert run.reason == NOT_FINITE
    assert run.steps == 0
    assert run.combine(np.eye(1)).shape == (50, 1)
    run.close()


def test_a_lost_run_comes_back_with_the_same_bits(H):
    """The run is closed behind the client's back. The bucket is fixed."""
    run = begin(H)
    run.extend(8)
    run.restart(np.arange(3, 8))
    run.extend(5)
    before = run.combine(np.eye(run.size))
    space = run._space
    for _ in range(2):
        space._transport.ask_once(space._transport.channel.close_run, close_request(space))
        assert run.combine(np.eye(run.size)).tobytes() == before.tobytes()
    products = run.products
    run.extend(2)
    assert run.products == products + 2
    run.close()


def test_a_lost_run_whose_steps_were_launched_together_is_consistent_again(free):
    """The first steps may have been products, and the repeated ones are launched."""
    H = free.at(problem()[0]).hessian()
    with on_device(lambda: begin(H)) as run:
        run.extend(12)
        space = run._space
        space._transport.ask_once(space._transport.channel.close_run, close_request(space))
        Q = run.combine(np.eye(run.size))
        np.testing.assert_allclose(Q.T @ (H @ Q), run.projected, atol=1e-12)
        np.testing.assert_allclose(Q.T @ Q, np.eye(24), atol=1e-12)


def test_numbers_that_rounding_does_not_explain_end_a_run_after_a_restart(H):
    with begin(H) as run:
        run.extend(12)
        run.restart(np.arange(8, 12))
        run.extend(2)
        run._alphas[0][...] += 0.1  # Another machine, say.
        space = run._space
        space._transport.ask_once(space._transport.channel.close_run, close_request(space))
        with pytest.raises(hvpd.HvpdError, match="differ from the first ones") as error:
            run.extend(1)
        assert error.value.reason == "RUN_LOST"


def close_request(space):
    from hvpd.v1 import krylov_pb2

    return krylov_pb2.CloseRunRequest(point_id=space._point_id, run_id=space._run_id)


LARGE = 5000


def large(client, **options):
    """Return an operator whose runs of as many steps take a while."""
    x = np.ones(LARGE)
    return client.register(quartic, x, np.linspace(1, 2, LARGE), **options).at(x).hessian()


def test_a_run_survives_kills_between_and_within_its_steps(serve):
    server = serve()
    with hvpd.connect(server.address) as client:
        H = large(client, fixed_bucket=1)
        expected = here(H, reorthogonalize="none").extend(3000)
        killed = threading.Event()

        def kill():
            server.kill()
            server.start()

        killer = threading.Thread(target=kill)

        def progress(steps, residual):
            if not killed.is_set():
                killed.set()
                killer.start()

        with begin(H, reorthogonalize="none") as run:
            run.extend(3000, progress=progress)
            killer.join()
            assert_same(run, expected)
        with begin(H) as run:
            run.extend(10)
            before = run.combine(np.eye(10))
            server.kill()
            server.start()
            run.extend(5)
            np.testing.assert_array_equal(run.combine(np.eye(10)), before)
            assert_same(run, here(H).extend(15))


def test_a_run_ends_with_its_caller(serve):
    server = serve()
    with hvpd.connect(server.address) as client:
        H = large(client)
        space = H._krylov().space("none")
        space.append(start_block(LARGE, H.dtype, None, 0, 1))
        steps = space.extend(LARGE)
        next(steps)
        steps.close()
        until(lambda: server.metric('hvpd_runs_total{kind="lanczos",outcome="left"}'))
        assert server.metric("hvpd_columns_total") < LARGE
        assert server.metric("hvpd_in_flight_vectors") == server.metric("hvpd_pending_vectors") == 0


def test_a_neighbour_is_answered_while_a_run_goes_on(serve):
    server = serve()
    with hvpd.connect(server.address) as client, hvpd.connect(server.address) as other:
        H, G = large(client), 2 * large(other, name="neighbour")
        done = threading.Event()
        space = H._krylov().space("none")
        space.append(start_block(LARGE, H.dtype, None, 0, 1))

        def steps():
            count = sum(1 for _ in space.extend(3000))
            done.set()
            return count

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(steps)
            answered = 0
            while not done.is_set():
                np.testing.assert_allclose(G @ np.ones(LARGE), 2 * np.linspace(1, 2, LARGE), rtol=1e-12)
                answered += 1
            assert running.result() == 3000
        assert answered > 30


def test_a_run_beyond_the_memory_is_refused_with_sizes_before_it_begins(serve):
    n = 4000
    server = serve("--memory-budget", "2000000")
    x = np.ones(n)
    with hvpd.connect(server.address) as client:
        H = client.register(quartic, x, np.arange(1.0, n + 1)).at(x).hessian()
        with begin(H) as run:
            run.extend(10)
            vectors = server.metric("hvpd_columns_total")
            with pytest.raises(
                hvpd.OverloadedError, match=r"keeps 10\d vectors of 4000 float64 .*2000000 bytes"
            ) as refused:
                run.extend(90)
            assert refused.value.reason == "MEMORY_BUDGET"
            with pytest.raises(hvpd.OverloadedError, match="the combinations have 3200000 bytes"):
                run.combine(np.zeros((10, 100)))
            assert server.metric("hvpd_columns_total") == vectors
            run.extend(5)  # The run is as it was.
            assert_same(run, here(H).extend(15))


def test_a_pinned_run_is_not_evicted(serve):
    n = 4000
    server = serve("--memory-budget", "4000000")
    x = np.ones(n)
    with hvpd.connect(server.address) as client:
        H = client.register(quartic, x, np.linspace(1, 2, n)).at(x).hessian()
        with begin(H) as run:
            assert run.id == ""
            run.extend(10)
            name = run.id
            assert len(name) == 32
            run.pin(600)
            with begin(H, seed=1) as other, pytest.raises(hvpd.OverloadedError, match="pinned"):
                other.extend(100)
            run.extend(2)
            assert run.id == name
            run.pin(0)
            with begin(H, seed=1) as other:
                other.extend(100)
            assert run.extend(1).id != name
            for seconds in (-1, 1 << 40):
                with pytest.raises(hvpd.InvalidArgumentError, match="seconds"):
                    run.pin(seconds)


def test_runs_that_do_not_fit_together_take_turns(serve):
    """Each evicts the other, and comes back."""
    n = 4000
    server = serve("--memory-budget", "2000000")
    x = np.ones(n)
    with hvpd.connect(server.address) as client:
        H = client.register(quartic, x, np.linspace(1, 2, n)).at(x).hessian()
        first, second = begin(H, seed=1), begin(H, seed=2)
        for _ in range(3):
            first.extend(10)
            second.extend(10)
        assert server.metric('hvpd_evictions_total{kind="run"}') > 0
        assert_same(first, here(H, seed=1).extend(30))
        assert_same(second, here(H, seed=2).extend(30))


def test_a_run_counts_for_its_tenant_and_for_nobody_else(tmp_path, serve):
    tokens = tmp_path / "tokens.json"
    secrets = {name: token_file.create(tokens, name, ["use", "publish"])[0] for name in ("one", "two")}
    server = serve("--tokens", str(tokens))
    x, X, y = problem()
    with (
        hvpd.connect(server.address, token=secrets["one"]) as one,
        hvpd.connect(server.address, token=secrets["two"]) as two,
    ):
        # A fixed bucket keeps no residuals.
        objective = one.register(logistic, x, X, y, name="logistic", fixed_bucket=1)
        H = objective.at(x).hessian()
        before = one.usage().resident_bytes
        run = begin(H)
        run.extend(20)
        held = one.usage().resident_bytes - before
        assert 21 * N * 8 <= held <= 30 * N * 8
        thief = begin(two.register(logistic, x, X, y, name="logistic", fixed_bucket=1).at(x).hessian())
        thief.extend(1)
        thief._space._run_id = run._space._run_id
        thief.combine(np.eye(2))  # It gets a run of its own.
        assert thief._space._run_id != run._space._run_id
        run.close()  # It does not wait for the server.
        until(lambda: one.usage().resident_bytes == before)
        thief.close()


@pytest.mark.parametrize("pinned", [False, True])
def test_only_the_close_of_a_pinned_run_takes_a_round_trip(H, monkeypatch, pinned):
    with begin(H) as run:
        run.extend(1)
        if pinned:
            run.pin(60)
        waited, transport = [], run._space._transport
        monkeypatch.setattr(transport, "ask_once", lambda method, request: waited.append(request.run_id))
        number = run.id
    assert waited == [number] * pinned


def test_a_run_of_another_point_is_refused(H, objective):
    run, other = begin(H), begin(objective.at(np.ones(N)).hessian())
    run.extend(2)
    other.extend(2)
    other._space._run_id = run._space._run_id
    with pytest.raises(hvpd.InvalidArgumentError, match="belongs to point") as error:
        other.extend(1)
    assert error.value.reason == "RUN_OF_ANOTHER_POINT"
    run.close()


def test_a_tenant_over_its_rate_waits_within_the_run(tmp_path, serve):
    tokens = tmp_path / "tokens.json"
    token = token_file.create(tokens, "slow", ["use", "publish"])[0]
    server = serve("--tokens", str(tokens))
    x, X, y = problem()
    with hvpd.connect(server.address, token=token) as client:
        H = client.register(logistic, x, X, y).at(x).hessian()
        token_file.limit(tokens, "slow", {"vectors_per_second": 40})
        until(lambda: client.usage().vectors_per_second_limit is not None)
        with begin(H) as run:
            run.extend(30).extend(9)
            assert run.steps == 39
        assert client.statistics().retries == 0
