"""Each symmetric operator has the functions of hvpd.krylov as methods."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse

import hvpd
from hvpd import krylov
from hvpd._krylov.runner import Runner

N = 40


@pytest.fixture
def point(dense_point):
    A = np.random.default_rng(0).standard_normal((N, N))
    return dense_point(A @ A.T / N + 0.1 * np.eye(N), slices={"a": slice(0, 30), "b": slice(30, N)})


U = np.random.default_rng(5).standard_normal((N, 2))

OPERATORS = {
    "Hessian": (lambda H: H, lambda A: A),
    "shifted": (lambda H: H.shifted(0.5), lambda A: A + 0.5 * np.eye(N)),
    "scaled": (lambda H: 3 * H, lambda A: 3 * A),
    "updated": (lambda H: H.updated(U), lambda A: A + U @ U.T),
    "block": (lambda H: H.block("a"), lambda A: A[:30, :30]),
    "low rank": (lambda H: H.shifted(0.5).low_rank(N), lambda A: A + 0.5 * np.eye(N)),
}


@pytest.mark.parametrize("case", OPERATORS)
def test_every_operator_has_every_method(point, case):
    compose, dense = OPERATORS[case]
    H, A = compose(hvpd.HessianOperator(point)), dense(point.matrix)
    n = len(A)
    values = np.linalg.eigvalsh(A)
    assert np.allclose(H.eigsh(3, which="LA").values, values[-3:])
    assert np.allclose(H.eigsh(3, which="SA", return_eigenvectors=False), values[:3])
    assert np.allclose(H.solve(np.ones(n), tol=1e-10).x, np.linalg.solve(A, np.ones(n)))
    assert np.allclose(H.lanczos(n).ritz().values, values)
    assert np.isclose(float(H.trace(products=n)), np.trace(A))
    logdet = H.logdet(steps=n)
    assert abs(float(logdet) - np.log(values).sum()) < 3 * logdet.standard_error
    assert np.isclose(float(H.trace_of(np.ones_like)), n)
    assert H.spectrum(3, 10).n == n
    diagonal = H.diagonal(method="xdiag", products=n)
    assert np.allclose(diagonal.values, np.diag(A))


def test_a_spectrum_of_curvature_names_its_program_and_precision(point):
    H = hvpd.HessianOperator(point, precision="")
    found = H.spectrum(2, 5, seed=3)
    assert (found.seed, found.digest, found.program, found.precision) == (3, "d1gest", "hessian", "highest")
    assert hvpd.HessianOperator(point).lanczos(4, seed=7).origin.seed == 7


def test_the_default_diagonal_of_curvature_is_an_operator(point):
    H = hvpd.HessianOperator(point)
    assert type(H.diagonal()) is hvpd.Diagonal
    assert type(H.diagonal(method="xdiag")) is krylov.DiagonalEstimate
    with pytest.raises(hvpd.InvalidArgumentError, match="method must be one of hutchinson, xdiag"):
        H.diagonal(method="exact")


def test_shifts_and_updates_cost_a_diagonal_no_accuracy(point):
    H = hvpd.HessianOperator(point)
    bare = H.diagonal(method="xdiag", products=12)
    composed = H.shifted(1e6).updated(U, [1e6, -1e6]).diagonal(method="xdiag", products=12)
    exact = 1e6 + 1e6 * (U[:, 0] ** 2 - U[:, 1] ** 2)
    assert np.allclose(composed.values, bare.values + exact, rtol=1e-12)
    assert np.array_equal(composed.standard_error, bare.standard_error)


def test_blocks_take_one_product(point):
    H = hvpd.HessianOperator(point)
    H.spectrum(probes=7, steps=5)
    H.solve(np.ones((N, 3)) + np.eye(N)[:, :3], maxiter=2)
    H.trace(products=20)
    assert point.products == [7] * 5 + [3] * 3 + [10] * 2


def test_a_runner_of_the_operator_is_used(point):
    H = hvpd.HessianOperator(point)
    runner = H._krylov()
    H._krylov = lambda: runner
    runner.space = lambda reorthogonalize: pytest.fail("the basis belongs elsewhere")
    with pytest.raises(pytest.fail.Exception, match="elsewhere"):
        krylov.lanczos(H, 3)


@pytest.mark.parametrize("make", [np.asarray, scipy.sparse.csr_array, scipy.sparse.coo_matrix])
def test_matrices_that_are_not_symmetric_are_refused(make):
    with pytest.raises(
        hvpd.InvalidArgumentError, match=r"A\[\d, \d\] is [23], A\[\d, \d\] is [23]: pass a symmetric matrix"
    ):
        krylov.eigsh(make(np.array([[1.0, 2.0], [3.0, 4.0]])), 1)
    wide = np.diag(np.arange(1.0, 201.0))
    wide[150, 70] = 1e-3
    with pytest.raises(hvpd.InvalidArgumentError, match=r"A\[(70|150), (70|150)\] is 0.001|is 0.001: pass"):
        krylov.trace(make(wide))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_rounding_is_no_lack_of_symmetry(dtype):
    J = np.random.default_rng(0).standard_normal((300, 80))
    A = (J.T @ J + np.triu(np.full((80, 80), 1e-14))).astype(dtype) if dtype != np.int64 else np.diag(np.arange(1, 81))
    for each in (A, scipy.sparse.csr_array(A), scipy.sparse.csr_array((80, 80))):
        assert np.isfinite(float(krylov.trace(each, products=20)))


def test_an_unsymmetric_matrix_with_nan_is_not_finite():
    with pytest.raises(hvpd.HvpdError) as caught:
        krylov.trace(np.full((4, 4), np.nan))
    assert caught.value.reason == "NOT_FINITE"


def test_progress_shows_a_residual_where_there_is_one():
    stage = SimpleNamespace(name="", done=0)
    reporter = SimpleNamespace(stage=lambda *arguments: contextlib.nullcontext(stage))
    with Runner(None, N, np.dtype(float), reporter=reporter, label="a").running("solve") as tick:
        tick(3, 0.0)
        assert (stage.name, stage.done) == ("solve of a", 3)
        tick(4, 2e-3)
        assert (stage.name, stage.done) == ("solve of a, residual 2.0e-03", 4)
