"""Low-rank approximations and the Nyström preconditioner, for matrices of given
spectra.
"""

import re

import numpy as np
import pytest
import scipy.sparse
from scipy.sparse.linalg import cg

import hvpd

DECAY = np.concatenate([1e4 * 0.6 ** np.arange(40), np.linspace(1e-3, 1e-4, 160)])


def iterations(A, b, M=None, rtol=1e-8):
    taken = []
    solution, failed = cg(A, b, rtol=rtol, maxiter=5000, M=M, callback=lambda _: taken.append(1))
    return len(taken), solution, failed


@pytest.mark.parametrize(("dtype", "accuracy"), [(np.float32, 2e-6), (np.float64, 1e-10)])
def test_the_largest_eigenpairs(dense_point, spectrum, dtype, accuracy):
    values = np.concatenate([[50.0, -40.0, 30.0, -20.0], 5 * 0.5 ** np.arange(96.0)])
    matrix, Q = spectrum(values, dtype=dtype)
    point = dense_point(matrix)
    low = hvpd.HessianOperator(point).low_rank(4, passes=3)
    assert point.products == [14, 14, 14]
    assert np.allclose(low.eigenvalues, values[:4], rtol=accuracy)
    assert low.eigenvectors.dtype == low.dtype == dtype
    assert np.allclose(abs(np.sum(low.eigenvectors * Q[:, :4], axis=0)), 1.0, atol=10 * accuracy)
    assert np.allclose(low.eigenvectors.T @ low.eigenvectors, np.eye(4), atol=10 * np.finfo(dtype).eps)


def test_residuals_bound_the_distance_to_an_eigenvalue(dense_point, spectrum):
    values = np.linspace(1, 2, 80)  # No decay: the worst case, with errors to be seen.
    matrix, _ = spectrum(values)
    low = hvpd.HessianOperator(dense_point(matrix)).low_rank(5, oversampling=3, passes=1, seed=2)
    U = low.eigenvectors
    assert np.allclose(low.residuals, np.linalg.norm(matrix @ U - U * low.eigenvalues, axis=0))
    assert low.residuals.min() > 1e-3
    assert all(abs(values - found).min() <= bound for found, bound in zip(low.eigenvalues, low.residuals, strict=True))


def test_as_an_operator_it_multiplies_without_products(dense_point, spectrum):
    matrix, _ = spectrum([9.0, -7.0, 5.0, *[0.0] * 20])
    point = dense_point(matrix)
    H = (2 * hvpd.HessianOperator(point)).shifted(0.5)
    low = H.low_rank(3)
    asked = list(point.products)
    dense = 2 * matrix + 0.5 * np.eye(23)
    V = np.random.default_rng(0).standard_normal((23, 4))
    for found in (low @ V, low.T @ V, low.rmatmat(V)):
        assert np.allclose(found, dense @ V, rtol=0, atol=1e-12)
    assert np.allclose(low @ V[:, 0], dense @ V[:, 0], rtol=0, atol=1e-12)
    assert point.products == asked
    assert np.allclose(low.eigenvalues, [18, -14, 10])
    assert low.shift == 0.5
    assert repr(low) == "<LowRankOperator 23x23 float64, rank 3, shift=0.5>"


def test_an_update_takes_part(dense_point, spectrum):
    matrix, _ = spectrum(np.linspace(0, 1e-3, 30))
    u = np.random.default_rng(0).standard_normal(30)
    low = hvpd.HessianOperator(dense_point(matrix)).updated(u).low_rank(1)
    assert np.allclose(low.eigenvalues, np.linalg.eigvalsh(matrix + np.outer(u, u))[-1], rtol=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_small_n_is_exact_with_any_sampling(dense_point, spectrum, rank, passes):
    values = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    matrix, _ = spectrum(values)
    H = hvpd.HessianOperator(dense_point(matrix))
    assert np.allclose(H.low_rank(rank, passes=passes).eigenvalues, values[:rank], rtol=1e-12)
    assert np.allclose(hvpd.nystrom(H, rank, passes=passes).eigenvalues, values[:rank], rtol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-4), (np.float64, 1e-8)])
def test_cg_needs_few_iterations_with_nystrom(dense_point, spectrum, dtype, rtol):
    matrix, _ = spectrum(DECAY, dtype=dtype)
    shift = 1e-2
    point = dense_point(matrix)
    H = hvpd.HessianOperator(point, shift)
    b = np.random.default_rng(1).standard_normal(200).astype(dtype)
    M = hvpd.nystrom(H, 30)
    assert point.products == [40, 40]
    assert M.dtype == dtype
    assert M.shift == pytest.approx(shift)
    plain, _, failed = iterations(H, b, rtol=rtol)
    preconditioned, solution, failed_with = iterations(H, b, M, rtol=rtol)
    assert failed == failed_with == 0
    assert preconditioned <= 12 < 5 * preconditioned < plain
    if dtype == np.float64:
        assert np.allclose(solution, np.linalg.solve(matrix + shift * np.eye(200), b), rtol=1e-5)


def test_the_condition_number_agrees_with_the_theory(dense_point, spectrum):
    matrix, _ = spectrum(DECAY)
    shift, rank = 1e-2, 30
    M = hvpd.nystrom(hvpd.HessianOperator(dense_point(matrix), shift), rank) @ np.eye(200)
    assert np.allclose(M, M.T, rtol=0, atol=1e-12)
    root = np.linalg.cholesky((M + M.T) / 2)
    preconditioned = np.linalg.eigvalsh(root.T @ (matrix + shift * np.eye(200)) @ root)
    before = (DECAY[0] + shift) / (DECAY[-1] + shift)
    # An exact decomposition leaves the difference between the rank's eigenvalue and the
    # smallest one. The sketch leaves at most twice that.
    ideal = (DECAY[rank - 1] + shift) / (DECAY[-1] + shift)
    assert preconditioned[-1] / preconditioned[0] < 2 * ideal < before / 1000


@pytest.mark.parametrize("passes", [1, 2])
def test_nystroms_formula(dense_point, spectrum, passes):
    matrix, _ = spectrum(np.geomspace(1, 1e-3, 40))
    M = hvpd.nystrom(hvpd.HessianOperator(dense_point(matrix)), 8, 1.0, oversampling=0, passes=passes, seed=6)
    V = np.random.default_rng(6).standard_normal((40, 8))
    Q = np.hstack([V, *([matrix @ V] * (passes - 1))])
    formula = matrix @ Q @ np.linalg.inv(Q.T @ matrix @ Q) @ Q.T @ matrix
    assert np.allclose(M.eigenvalues, np.linalg.eigvalsh(formula)[::-1][:8], rtol=1e-8)


def test_the_operators_own_shift_counts(dense_point, spectrum):
    matrix, _ = spectrum(DECAY)
    H = hvpd.HessianOperator(dense_point(matrix))
    b = np.random.default_rng(1).standard_normal(200)
    inside, outside, split = (
        hvpd.nystrom(H.shifted(0.1), 20),
        hvpd.nystrom(H, 20, 0.1),
        hvpd.nystrom(H.shifted(0.06), 20, 0.04),
    )
    assert np.allclose(inside @ b, outside @ b, rtol=1e-12)
    assert np.allclose(inside @ b, split @ b, rtol=1e-10)
    assert inside.eigenvalues[0] == pytest.approx(1e4, rel=1e-8)


def test_any_symmetric_operator_is_taken(spectrum):
    matrix, _ = spectrum(DECAY)
    b = np.random.default_rng(1).standard_normal(200)
    expected = hvpd.nystrom(matrix, 20, 0.1) @ b
    assert np.allclose(hvpd.nystrom(scipy.sparse.csr_array(matrix), 20, 0.1) @ b, expected)
    with pytest.raises(hvpd.InvalidArgumentError, match=r"square real operator .* got \(200, 3\)"):
        hvpd.nystrom(matrix[:, :3], 2)
    with pytest.raises(hvpd.InvalidArgumentError, match=r"square real operator .* complex128"):
        hvpd.nystrom(1j * matrix, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_indefinite_operator_is_refused_with_the_shift_that_helps(dense_point, spectrum, dtype):
    matrix, _ = spectrum(np.concatenate([[-3.0], 1e3 * 0.6 ** np.arange(30), np.linspace(0.1, 0.01, 69)]), dtype=dtype)
    H = hvpd.HessianOperator(dense_point(matrix))
    with pytest.raises(hvpd.InvalidArgumentError) as raised:
        hvpd.nystrom(H, 30, 0.5)
    found = re.search(
        r"with the shift 0.5 its smallest Ritz value is (\S+) .* more than (\S+), such as (\S+), ", str(raised.value)
    )
    ritz, needed, such = (float(number) for number in found.groups())
    assert -2.5 < ritz < -2  # Rayleigh's quotients are above the smallest eigenvalue.
    assert needed == -ritz
    M = hvpd.nystrom(H, 30, 0.5 + such)
    assert np.linalg.eigvalsh(M @ np.eye(100)).min() > 0
    b = np.ones(100, dtype)
    taken, _, failed = iterations(H.shifted(0.5 + such), b, M, rtol=1e-4)
    plain, _, _ = iterations(H.shifted(0.5 + such), b, rtol=1e-4)
    assert not failed
    assert 2 * taken < plain


def test_a_shift_that_mends_an_indefinite_operator_spoils_no_preconditioner(dense_point, spectrum):
    matrix, _ = spectrum(np.concatenate([[-3.0], np.linspace(0.01, 10, 99)]))
    H = hvpd.HessianOperator(dense_point(matrix), 3.3)
    M = hvpd.nystrom(H, 30)
    b = np.random.default_rng(1).standard_normal(100)
    plain, _, _ = iterations(H, b)
    preconditioned, _, failed = iterations(H, b, M)
    assert not failed
    assert preconditioned <= plain


def test_a_negative_operator_is_refused(dense_point, spectrum):
    H = hvpd.HessianOperator(dense_point(spectrum(DECAY)[0]))
    with pytest.raises(hvpd.InvalidArgumentError, match="indefinite"):
        hvpd.nystrom(-H, 10, 1.0)
    with pytest.raises(hvpd.InvalidArgumentError, match="indefinite"):
        hvpd.nystrom(H, 10, -1.0)


def test_a_semidefinite_operator_without_shift_is_kept_to_its_range(dense_point, spectrum):
    matrix, _ = spectrum([3.0, 2.0, 1.0, *[0.0] * 20])
    M = hvpd.nystrom(hvpd.HessianOperator(dense_point(matrix)), 10)
    assert np.allclose(M.eigenvalues, [3, 2, 1])
    assert np.linalg.eigvalsh(M @ np.eye(23)).min() > 0
    with pytest.raises(hvpd.InvalidArgumentError, match=r"zero to rounding.*give a shift"):
        hvpd.nystrom(hvpd.HessianOperator(dense_point(np.zeros((5, 5)))), 2)
    zero = hvpd.nystrom(hvpd.HessianOperator(dense_point(np.zeros((5, 5)))), 2, 1.0)
    assert np.allclose(zero @ np.eye(5), np.eye(5))


def test_seeds_repeat_and_differ(dense_point, spectrum):
    H = hvpd.HessianOperator(dense_point(spectrum(np.linspace(1, 2, 80))[0]))
    once, again, other = (H.low_rank(3, seed=seed).eigenvalues for seed in (4, 4, 5))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be an integer from 1 to 5, got 0"),
        ({"rank": 6}, "rank must be an integer from 1 to 5, got 6"),
        ({"rank": 2, "oversampling": -1}, "oversampling must be an integer of at least 0"),
        ({"rank": 2, "passes": 0}, "passes must be an integer of at least 1"),
        ({"rank": 2, "seed": None}, "seed must be an integer of at least 0, got None"),
    ],
)
def test_bad_arguments(dense_point, arguments, message):
    H = hvpd.HessianOperator(dense_point(np.eye(5)))
    for call in (H.low_rank, lambda **given: hvpd.nystrom(H, **given)):
        with pytest.raises(hvpd.InvalidArgumentError, match=message):
            call(**arguments)
    with pytest.raises(hvpd.InvalidArgumentError, match="NaN or infinity"):
        hvpd.nystrom(hvpd.HessianOperator(dense_point(np.full((5, 5), np.nan))), 2)


@pytest.mark.parametrize("kind", [np.asarray, scipy.sparse.csr_array])
def test_the_matrix_of_a_preconditioner_must_be_symmetric(kind):
    A = np.triu(np.random.default_rng(0).standard_normal((30, 30))) + 40 * np.eye(30)
    with pytest.raises(hvpd.InvalidArgumentError, match=r"A must be symmetric, and A\[") as raised:
        hvpd.nystrom(kind(A), 5)
    assert raised.value.reason == "NOT_SYMMETRIC"
    assert hvpd.nystrom(kind((A + A.T) / 2), 5).shape == (30, 30)
