"""Whole computations on a real server: equal to dense algebra and to the same algorithm
here, in one call; they end with their callers, and are repeated after a crash.
"""

import signal
import threading

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from scipy.sparse.linalg import aslinearoperator

import hvpd
from hvpd._krylov import trust_region
from hvpd._krylov.preconditioning import Described
from hvpd._krylov.runner import runner
from hvpd._transport.server_space import chunked, described_arrays
from hvpd._wire.frames import Frame
from hvpd.v1 import krylov_pb2
from tests.support.waiting import until

N, ROWS = 40, 120


def logistic(x, X, y):
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ x))) + 0.05 * jnp.sum(x**2)


def problem(dtype=np.float64):
    rng = np.random.default_rng(0)
    X, x = rng.standard_normal((ROWS, N)).astype(dtype), rng.standard_normal(N).astype(dtype)
    return x, X, np.sign(X[:, 0])


@pytest.fixture(scope="module")
def H(client):
    x, X, y = problem()
    return client.register(logistic, x, X, y, name="computations/logistic").at(x).hessian(shift=0.01)


@pytest.fixture(scope="module")
def A(H):
    return H @ np.eye(N)


@pytest.fixture
def b():
    return np.random.default_rng(1).standard_normal(N)


@pytest.fixture
def calls(client, monkeypatch):
    """Return the number of products that the client asked for, when it is called."""
    before = client.statistics().vectors
    return lambda: client.statistics().vectors - before


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_solve_is_one_call_and_equals_the_dense_solution(H, A, b, calls, method):
    found = H.solve(b, tol=1e-12, method=method)
    assert found.converged
    assert found.residual_norms[0] == pytest.approx(np.linalg.norm(b))
    np.testing.assert_allclose(found.x, np.linalg.solve(A, b), rtol=1e-10)
    expected = hvpd.krylov.solve(aslinearoperator(A), b, tol=1e-12, method=method)
    assert found.products == expected.products
    np.testing.assert_allclose(found.residual_norms[:5], expected.residual_norms[:5], rtol=1e-9)
    assert calls() == 0


def launches(server, program):
    return server.metric(f'hvpd_launches_total{{program="{program}"}}')


def in_launches(server, program, solve, most=1):
    """Solve until the steps are launched together. Return the result, the launches of
    several steps, and the products beside them, which are at most `most`.
    """

    def solved():
        before = launches(server, program), launches(server, "(hvp|apply)")
        found = solve()
        several, products = launches(server, program) - before[0], launches(server, "(hvp|apply)") - before[1]
        return (found, several, products) if several and products <= most else None

    return until(solved)


@pytest.fixture(scope="module")
def launched(server, H):
    """Return H when its steps of conjugate gradients are launched together."""
    in_launches(server, "cg_apply", lambda: H.solve(np.ones(N), maxiter=2))
    return H


METHODS = {
    "cg": ("cg_apply", 1, {}),
    "many": ("cg_hvp", 5, {}),
    "minres": ("minres_apply", 1, {"method": "minres"}),
    "minres of many": ("minres_hvp", 3, {"method": "minres"}),
    "shifts": ("shifted_cg_apply", 1, {"shifts": [0.01, 0.5, 3.0]}),
    "shifts of many": ("shifted_cg_hvp", 2, {"shifts": [0.01, 0.5]}),
    "minres with shifts": ("minres_apply", 1, {"method": "minres", "shifts": [0.01, 0.5]}),
}


@pytest.mark.parametrize(
    ("method", "M"),
    [*((method, None) for method in METHODS), ("cg", "diagonal"), ("many", "low rank"), ("minres", "low rank")],
)
def test_a_solve_in_launches_equals_the_iteration_here(server, H, A, method, M):
    program, count, options = METHODS[method]
    B = np.random.default_rng(2).standard_normal((N, count))
    options = options | {"M": {"diagonal": 1 / np.diag(A), "low rank": hvpd.nystrom(aslinearoperator(A), 5)}.get(M)}
    B = B[:, 0] if count == 1 else B
    found, several, products = in_launches(server, program, lambda: H.solve(B, tol=1e-11, **options))
    expected = hvpd.krylov.solve(aslinearoperator(A), B, tol=1e-11, **options)
    assert found.converged
    assert abs(found.products - expected.products) <= 2 * count
    np.testing.assert_allclose(found.residual_norms[:4], expected.residual_norms[:4], rtol=1e-8)
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-7, atol=1e-9)
    for x, shift in zip(found.x if "shifts" in options else [found.x], options.get("shifts", [0.0]), strict=True):
        np.testing.assert_allclose(x, np.linalg.solve(A + shift * np.eye(N), B), rtol=1e-7, atol=1e-9)
    assert several < len(found.residual_norms) - 1
    assert products == 1  # The check of the residual.


def test_the_mode_linearized_is_solved_in_launches(client, server, A, b):
    """They share the program and the residuals of the objective's own mode."""
    point = client.objective("computations/logistic").at(problem()[0])
    operator = point.hessian(shift=0.01, mode="linearized")
    found, several, _ = in_launches(server, "cg_apply", lambda: operator.solve(b, tol=1e-12))
    assert several < len(found.residual_norms) - 1
    np.testing.assert_allclose(found.x, np.linalg.solve(A, b), rtol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_operators_with_a_low_rank_term_are_solved_in_launches(launched, server, A, b, rank):
    U = np.random.default_rng(6).standard_normal((N, rank))
    C = np.linspace(0.5, 2, rank)
    updated, dense = (2.0 * launched).updated(U, C), 2 * A + (U * C) @ U.T
    found, _, _ = in_launches(server, "cg_apply", lambda: updated.solve(b, tol=1e-12))
    expected = hvpd.krylov.solve(aslinearoperator(dense), b, tol=1e-12)
    assert abs(found.products - expected.products) <= 1
    np.testing.assert_allclose(found.x, np.linalg.solve(dense, b), rtol=1e-9)
    step = updated._krylov().steihaug(b, 0.3, tol=1e-10, maxiter=200)
    np.testing.assert_allclose(
        step.p, runner(aslinearoperator(dense)).steihaug(b, 0.3, tol=1e-10, maxiter=200).p, rtol=1e-8
    )


def test_launches_end_with_the_reason_and_the_steps_of_the_iteration_here(launched, A, b):
    shift = -np.sort(np.linalg.eigvalsh(A))[:2].mean()  # One eigenvalue is negative.
    found = launched.shifted(shift).solve(b, tol=1e-12)
    expected = hvpd.krylov.solve(aslinearoperator(A + shift * np.eye(N)), b, tol=1e-12)
    assert found.reason == expected.reason
    assert len(found.residual_norms) == len(expected.residual_norms) > 4
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-6)
    assert found.curvature == pytest.approx(expected.curvature, rel=1e-6)
    assert found.direction @ (A + shift * np.eye(N)) @ found.direction == pytest.approx(found.curvature)
    limited = launched.solve(b, tol=1e-12, maxiter=7)
    assert "maxiter=7" in limited.reason
    assert len(limited.residual_norms) == 8


def test_many_right_hand_sides_and_many_shifts_are_solved_together(H, A):
    B = np.random.default_rng(2).standard_normal((N, 5))
    np.testing.assert_allclose(H.solve(B, tol=1e-12).x, np.linalg.solve(A, B), rtol=1e-9, atol=1e-11)
    shifts = [0.0, 0.5, 3.0]
    found = H.solve(B[:, 0], tol=1e-12, shifts=shifts)
    for x, shift in zip(found.x, shifts, strict=True):
        np.testing.assert_allclose(x, np.linalg.solve(A + shift * np.eye(N), B[:, 0]), rtol=1e-9)
        np.testing.assert_allclose(x, H.shifted(shift).solve(B[:, 0], tol=1e-12).x, rtol=1e-9)


def test_preconditioners_live_on_the_server(H, A, b, calls):
    nystrom = hvpd.nystrom(aslinearoperator(A), 8)
    for M in (1 / np.diag(A), nystrom):
        found = H.solve(b, tol=1e-12, M=M)
        expected = hvpd.krylov.solve(aslinearoperator(A), b, tol=1e-12, M=M)
        assert abs(found.products - expected.products) <= 1
        np.testing.assert_allclose(found.x, np.linalg.solve(A, b), rtol=1e-9)
    start = H.solve(b, tol=1e-4).x
    assert H.solve(b, tol=1e-12, x0=start).products < H.solve(b, tol=1e-12).products
    assert calls() == 0


def test_kfac_preconditions_on_the_server(client, server, calls):
    rng = np.random.default_rng(3)
    X, W = rng.standard_normal((30, 4)), rng.standard_normal((4, 3))

    def model(p, X):
        return jnp.tanh(X @ p["w"] + p["b"]) @ p["v"]

    def loss(z, y):
        return jnp.mean((z - y) ** 2)

    p = {"w": W, "b": np.zeros(3), "v": rng.standard_normal((3, 2))}
    point = client.register(hvpd.composite(model, loss), p, X, rng.standard_normal((30, 2))).at(p)
    G, M = point.ggn(0.1), point.kfac(0.1).inverse()
    rhs = rng.standard_normal(G.shape[0])
    dense = G @ np.eye(len(rhs))
    before = calls()
    found = G.solve(rhs, tol=1e-12, M=M)
    assert calls() == before
    np.testing.assert_allclose(found.x, np.linalg.solve(dense, rhs), rtol=1e-9)
    assert found.products == hvpd.krylov.solve(aslinearoperator(dense), rhs, tol=1e-12, M=M).products
    for method in ("cg", "minres"):
        found, _, _ = in_launches(server, f"{method}_ggn", lambda: G.solve(rhs, tol=1e-11, M=M, method=method))  # noqa: B023 - called here
        np.testing.assert_allclose(found.x, np.linalg.solve(dense, rhs), rtol=1e-8)


def test_an_indefinite_operator_gives_its_direction(H, A, b):
    found = (-H).solve(b)
    assert not found.converged
    assert "not positive definite" in found.reason
    assert found.curvature < 0
    assert found.direction @ (-A) @ found.direction == pytest.approx(found.curvature)


def test_a_preconditioner_without_arrays_runs_here(H, A, b, calls):
    M = scipy.sparse.linalg.LinearOperator((N, N), lambda v: np.linalg.solve(A, v), dtype=float)
    np.testing.assert_allclose(H.solve(b, tol=1e-12, M=M).x, np.linalg.solve(A, b), rtol=1e-9)
    assert calls() > 0


@pytest.mark.parametrize("method", ["xtrace", "hutch++", "hutchinson"])
def test_estimates_equal_those_of_the_same_vectors_here(H, A, calls, method):
    found = H.trace(method, products=18, seed=5)
    expected = hvpd.krylov.trace(aslinearoperator(A), method, products=18, seed=5)
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-6)
    assert found.products == expected.products
    assert abs(found.value - np.trace(A)) <= 4 * found.standard_error
    assert H.trace(products=N).value == pytest.approx(np.trace(A), rel=1e-12)
    assert calls() == 0


def test_diagonals_and_quadratures_equal_those_here(H, A, calls):
    found = hvpd.krylov.diagonal(H, products=20, seed=5)
    np.testing.assert_allclose(found.values, hvpd.krylov.diagonal(aslinearoperator(A), products=20, seed=5).values)
    for reorthogonalize in (None, "full", "none"):
        spectrum = H.spectrum(probes=4, steps=12, seed=5, reorthogonalize=reorthogonalize)
        expected = hvpd.krylov.spectrum(aslinearoperator(A), 4, 12, 5, reorthogonalize)
        np.testing.assert_allclose(spectrum.nodes, expected.nodes, rtol=1e-7)
        assert spectrum.reorthogonalize == expected.reorthogonalize
    found = H.trace_of(np.exp, probes=4, steps=9, seed=5)
    truth = np.trace(scipy.linalg.expm(A))
    assert abs(found.value - truth) <= 4 * found.standard_error
    assert calls() == 0
    exact = H.trace_of(np.exp)
    assert (exact.value, exact.products) == (pytest.approx(truth, rel=1e-12), N)


@pytest.mark.parametrize("radius", [0.1, np.inf])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_step_of_a_trust_region_is_one_call(H, A, b, calls, radius, preconditioned):
    M = 1 / np.diag(A) if preconditioned else None
    found = H._krylov().steihaug(b, radius, tol=1e-10, maxiter=200, M=M)
    expected = runner(aslinearoperator(A)).steihaug(b, radius, tol=1e-10, maxiter=200, M=M)
    np.testing.assert_allclose(found.p, expected.p, rtol=1e-9)
    assert found.predicted == pytest.approx(expected.predicted)
    assert (found.products, found.reason) == (expected.products, expected.reason)
    if np.isinf(radius):
        np.testing.assert_allclose(found.p, np.linalg.solve(A, -b), rtol=1e-8)
    assert calls() == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("shift", "radius", "maxiter", "reason"),
    [
        (0.0, np.inf, 200, trust_region.SOLVED),
        (0.0, 100.0, 200, trust_region.SOLVED),
        (0.0, 0.5, 200, trust_region.BOUNDARY),
        (0.0, 1e-3, 200, trust_region.BOUNDARY),
        (0.0, np.inf, 7, trust_region.LIMIT),
        (-1.0, 1e3, 200, trust_region.CURVATURE),
        (-1.0, np.inf, 200, trust_region.CURVATURE),
        (-1e3, np.inf, 200, trust_region.CURVATURE),
    ],
)
def test_a_step_in_launches_equals_the_step_here(launched, server, A, b, weighted, shift, radius, maxiter, reason):
    M = 1 / np.diag(A) if weighted else None

    def step():
        """Return the step, once its program is compiled: it takes no residuals."""
        before = launches(server, "cg_hvp")
        found = launched.shifted(shift)._krylov().steihaug(b, radius, tol=1e-10, maxiter=maxiter, M=M)
        return found if launches(server, "cg_hvp") > before else None

    found = until(step)
    dense = aslinearoperator(A + shift * np.eye(N))
    expected = runner(dense).steihaug(b, radius, tol=1e-10, maxiter=maxiter, M=M)
    assert found.reason == expected.reason == reason
    assert abs(found.products - expected.products) <= 1
    np.testing.assert_allclose(found.p, expected.p, rtol=1e-7, atol=1e-10 * np.linalg.norm(expected.p))
    assert found.predicted == pytest.approx(expected.predicted, rel=1e-9)


def test_a_minimisation_multiplies_on_the_server(client, calls):
    x, X, y = problem()
    objective = client.register(logistic, x, X, y, name="computations/logistic")
    found = objective.minimize(x, gtol=1e-10)
    assert found.success
    assert np.linalg.norm(objective.gradient(found.x)) < 1e-10
    assert found.nhev > 0
    assert calls() == 0


def test_a_product_that_is_not_finite_is_said(client):
    def fun(x, data):
        return jnp.sum(data * x**3) / 6

    x = np.ones(50)
    x[49] = 1e308
    data = np.linspace(1, 2, 50)
    data[49] = 100.0
    H = client.register(fun, np.ones(50), data).at(x).hessian()
    found = H.solve(np.ones(50))
    assert "NaN or infinity" in found.reason
    assert not found.converged
    for estimate in (lambda: H.trace(products=20), lambda: H.spectrum(2, 10)):
        with pytest.raises(hvpd.HvpdError, match="NaN or infinity"):
            estimate()


def chain(x, w):
    return (x[0] ** 2 + jnp.sum((w * (x[1:] - x[:-1])) ** 2)) / 2


@pytest.fixture(scope="module")
def overflows_in_step_4000(client):
    """Return an operator whose product is not finite from element 4,000 on. A start at
    the first element reaches one more element with each step.
    """
    n, last = 4100, 4000
    objective = client.register(chain, np.zeros(n), np.ones(n - 1))
    data = np.where(np.arange(1, n) == last, 1e200, 1.0)
    return objective.at(np.zeros(n), data).hessian(), np.eye(1, n)[0], last - 1


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_nan_in_step_4000_keeps_the_solution_so_far(overflows_in_step_4000, method):
    H, b, steps = overflows_in_step_4000
    found = H.solve(b, method=method, tol=1e-10)
    assert "NaN or infinity: x is from before it" in found.reason
    assert len(found.residual_norms) == steps + 1
    assert np.count_nonzero(found.x) == steps
    if method == "cg":  # The solution of the chain's first part.
        np.testing.assert_allclose(found.x[:steps], np.arange(steps, 0, -1) / (steps + 1), rtol=1e-8)


def test_nan_in_step_4000_keeps_the_run_so_far(overflows_in_step_4000):
    H, start, steps = overflows_in_step_4000
    with H.lanczos(4100, v0=start, reorthogonalize="none") as run:
        assert "NaN or infinity: the run keeps the steps before it" in run.reason
        assert run.steps == steps
        np.testing.assert_allclose(run.alphas, 2, rtol=1e-12)
        np.testing.assert_allclose(abs(run.betas), 1, rtol=1e-12)


class Layers(scipy.sparse.linalg.LinearOperator):
    """Twice the identity, as the inverse of K-FAC of layers that no objective has."""

    def __init__(self):
        super().__init__(float, (N, N))

    def _matvec(self, v):
        return 2 * v

    def _described(self):
        one = {f"M_{part}_0": np.ones((1, 1)) for part in ("a", "g", "weights")}
        return Described("kronecker", {**one, "M_elements_0": np.zeros((1, 1), np.int64)}, 2.0)


def test_no_program_is_compiled_for_layers_of_another_objective(client, launched, server, b):
    """A client could ask for any number of such programs."""
    before = launches(server, "cg_apply")
    for _ in range(2):
        assert launched.solve(b, tol=1e-10, M=Layers()).converged
    assert launches(server, "cg_apply") == before
    programs = [each.program for each in client.objective("computations/logistic").compiles()]
    assert "cg_apply" in programs
    assert not any("kronecker" in program for program in programs)


def test_shifts_in_launches_end_at_one_without_positive_curvature(server, H, A, b):
    """The solutions are those of the steps before."""
    lowest = float(np.linalg.eigvalsh(A)[0])
    shifts = [1.0, -1.5 * lowest]
    found, _, _ = in_launches(server, "shifted_cg_apply", lambda: H.solve(b, tol=1e-11, shifts=shifts), most=2)
    expected = hvpd.krylov.solve(aslinearoperator(A), b, tol=1e-11, shifts=shifts)
    assert found.reason == expected.reason
    assert "not positive definite" in found.reason
    assert len(found.residual_norms) == len(expected.residual_norms)
    np.testing.assert_allclose(found.x, expected.x, rtol=1e-6)
    shifted = A + shifts[1] * np.eye(N)
    assert found.curvature < 0
    assert found.direction @ shifted @ found.direction == pytest.approx(found.curvature)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_right_hand_side_of_zeros_has_the_solution_zero(H, method):
    _, count, options = METHODS[method]
    found = H.solve(np.zeros((N, count)), **options)
    assert found.converged
    assert not found.x.any()
    B = np.eye(N)[:, :count]
    B[:, -1] = 0
    assert H.solve(B, tol=1e-8, **options).converged


def slow(x, data):
    """Return a function whose product takes a moment."""
    return jax.lax.fori_loop(0, 100, lambda _, y: jnp.sin(y) + data, x).sum()


def test_a_computation_ends_with_its_caller(serve):
    server = serve()
    with hvpd.connect(server.address) as client:
        n = 2000
        x = np.ones(n)
        H = client.register(slow, x, np.linspace(0, 1, n)).at(x).hessian()
        H @ x
        runner = H._krylov()
        spec = krylov_pb2.ComputationSpec(
            operator=runner._operator.message,
            estimate=krylov_pb2.EstimateSpec(method="hutchinson", products=n),
        )
        call = runner._operator.transport.channel.compute(
            iter([Frame(krylov_pb2.ComputeRequest(spec=spec))]), metadata=runner._operator.transport.channel.metadata
        )
        until(lambda: server.metric("hvpd_resident_bytes") and server.metric("hvpd_columns_total") > 1)
        call.cancel()
        with pytest.raises(grpc.RpcError):
            next(call)
        until(lambda: server.metric("hvpd_open_calls") == server.metric("hvpd_open_streams"))
        assert server.metric("hvpd_columns_total") < n
        assert server.metric('hvpd_resident_bytes{kind="run"}') == 0


def test_an_interrupted_call_ends_at_the_server(serve):
    server, over = serve(), threading.Event()
    main = threading.main_thread().ident

    def strike():
        until(lambda: server.metric("hvpd_columns_total") > begun + 5)
        while not over.is_set():  # gRPC swallows some interrupts.
            signal.pthread_kill(main, signal.SIGUSR1)
            over.wait(5)

    with hvpd.connect(server.address) as client:
        H = client.register(slow, np.ones(2000), np.linspace(0, 1, 2000)).at(np.ones(2000)).hessian()
        begun = server.metric("hvpd_columns_total")
        before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
        striking = threading.Thread(target=strike)
        striking.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                H.spectrum(probes=200, steps=300)
        finally:
            over.set()
            striking.join()
            signal.signal(signal.SIGUSR1, before)
        until(lambda: server.metric("hvpd_open_calls") == server.metric("hvpd_open_streams"))
        assert server.metric("hvpd_columns_total") < begun + 2000
        assert np.isfinite(H @ np.ones(2000)).all()


@pytest.fixture
def long(serve):
    """Return a server, and a function that begins to solve a system that takes 100,000
    steps. It returns the call when its steps are launches.
    """
    server = serve("--memory-budget", "30000000")
    n = 100_000
    with hvpd.connect(server.address) as client:
        H = client.register(chain, np.zeros(n), np.ones(n - 1)).at(np.zeros(n)).hessian()
        runner = H._krylov()
        channel = runner._operator.transport.channel

        def begin(method):
            B = np.eye(1, n)
            spec = krylov_pb2.ComputationSpec(
                operator=runner._operator.message,
                solve=krylov_pb2.SolveSpec(method=method, tol=0, maxiter=1 << 30, shifts=[0.0]),
                arrays=described_arrays({"B": B}),
            )
            frames = chunked(krylov_pb2.ComputeRequest(spec=spec), krylov_pb2.ComputeRequest, B)
            call = channel.compute(frames, metadata=channel.metadata)
            until(lambda: launches(server, f"{method}_(hvp|apply)") > 2)
            return call

        yield server, client, begin


def test_launches_end_with_their_caller(long):
    server, _, begin = long
    for method in ("cg", "minres"):
        call = begin(method)
        call.cancel()
        until(lambda: server.metric('hvpd_resident_bytes{kind="run"}') == 0)


def test_launches_end_when_other_work_needs_their_memory(long):
    server, client, begin = long
    call = begin("minres")
    n = 1_000_000
    objective = client.register(lambda x, d: jnp.sum(d * x**2), np.zeros(n), np.ones(n))
    objective.at(np.zeros(n))
    with pytest.raises(grpc.RpcError, match="other work needed its memory"):
        list(call)
    assert server.metric('hvpd_resident_bytes{kind="run"}') == 0


def test_a_computation_is_repeated_after_a_crash(serve):
    server = serve()
    x, X, y = problem()
    with hvpd.connect(server.address) as client:
        H = client.register(logistic, x, X, y, fixed_bucket=1).at(x).hessian()
        expected = H.spectrum(probes=3, steps=20, seed=1)
        killed = threading.Thread(target=lambda: (server.kill(), server.start()))
        started = threading.Event()

        def computed():
            started.set()
            return [H.spectrum(probes=3, steps=20, seed=1) for _ in range(20)]

        results: list = []
        worker = threading.Thread(target=lambda: results.extend(computed()))
        worker.start()
        started.wait(60)
        killed.start()
        killed.join(120)
        worker.join(120)
        assert len(results) == 20
        for found in results:
            assert found.nodes.tobytes() == expected.nodes.tobytes()


def test_a_computation_beyond_the_memory_is_refused_with_sizes(serve):
    n = 4000
    server = serve("--memory-budget", "2000000")
    x = np.ones(n)
    with hvpd.connect(server.address) as client:
        objective = client.register(lambda x, d: jnp.sum(d * x**4) / 12, x, np.linspace(1, 2, n))
        H = objective.at(x).hessian()
        with pytest.raises(hvpd.OverloadedError, match=r"an estimate with 100 random vectors .* 2000000 bytes"):
            H.trace(products=200)
        with pytest.raises(hvpd.OverloadedError, match=r"1 iterations with 85 vectors"):
            H.spectrum(probes=2, steps=80, reorthogonalize="full")
        assert H.spectrum(probes=2, steps=80).reorthogonalize == "none"
        assert H.solve(np.ones(n), tol=1e-10).converged
        assert server.metric('hvpd_runs_total{kind="solve",outcome="done"}') == 1
