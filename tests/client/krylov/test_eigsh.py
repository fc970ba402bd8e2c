"""eigsh equals dense eigenvalues and SciPy, with multiple eigenvalues, and says why it
fails.
"""

import pickle

import numpy as np
import pytest
import scipy.sparse
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator
from scipy.sparse.linalg import eigsh as scipys

import hvpd
from hvpd import krylov


def symmetric(n, seed=0, dtype=np.float64):
    A = np.random.default_rng(seed).standard_normal((n, n))
    return ((A + A.T) / 2).astype(dtype)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_it_equals_scipy(which):
    A = symmetric(150)
    values, vectors = krylov.eigsh(A, 5, which)
    expected = scipys(A, 5, which=which, return_eigenvectors=False)
    assert abs(values - np.sort(expected)).max() < 1e-10 * np.linalg.norm(A, 2)
    assert abs(A @ vectors - vectors * values).max() < 1e-10 * np.linalg.norm(A, 2)
    assert abs(vectors.T @ vectors - np.eye(5)).max() < 1e-12


def test_float32_is_right_to_its_rounding():
    A = symmetric(120, dtype=np.float32)
    pairs = krylov.eigsh(A, 4, "LA")
    assert pairs.vectors.dtype == np.float32
    assert abs(pairs.values - np.linalg.eigvalsh(A.astype(np.float64))[-4:]).max() < 1e-6 * np.linalg.norm(A, 2)


@pytest.mark.parametrize(
    ("values", "k", "expected"),
    [
        (np.repeat([1.0, 1001.0], 30), 4, [1001] * 4),
        (np.r_[np.arange(1.0, 81), 80, 80], 3, [80] * 3),
        (np.zeros(20), 2, [0, 0]),
        (np.ones(1), 1, [1]),
    ],
)
def test_multiple_eigenvalues_are_all_found(values, k, expected):
    pairs = krylov.eigsh(np.diag(values), k, "LA")
    assert np.allclose(pairs.values, expected, rtol=1e-12)
    assert pairs.converged.all()


def test_all_eigenvalues_and_a_sparse_matrix():
    A = scipy.sparse.diags_array([np.full(29, -1.0), np.full(30, 2.0), np.full(29, -1.0)], offsets=[-1, 0, 1])
    exact = 2 - 2 * np.cos(np.arange(1, 31) * np.pi / 31)
    assert abs(krylov.eigsh(A, 30, "LA").values - exact).max() < 1e-13
    assert abs(krylov.eigsh(A, 3, "SA", return_eigenvectors=False) - exact[:3]).max() < 1e-13


def test_too_few_restarts_are_an_error_with_the_found_eigenpairs():
    A = symmetric(200)
    with pytest.raises(
        krylov.NotConvergedError, match=r"of 6 eigenpairs converged .* limit of 2; raise maxiter"
    ) as raised:
        krylov.eigsh(A, 6, "LA", maxiter=2)
    error = pickle.loads(pickle.dumps(raised.value))
    assert isinstance(error, ArpackNoConvergence)
    assert isinstance(error, hvpd.HvpdError)
    assert error.pairs.values.shape == (6,)
    assert len(error.eigenvalues) == error.pairs.converged.sum() < 6
    assert (error.pairs.values <= np.linalg.eigvalsh(A)[-6:]).all()


def test_a_late_product_that_is_not_finite_keeps_the_pairs():
    A, count = np.diag(np.arange(200.0)), iter(range(1000))
    broken = LinearOperator(A.shape, matvec=lambda v: A @ v * (np.nan if next(count) == 40 else 1), dtype=float)
    with pytest.raises(krylov.NotConvergedError, match="a product holds NaN or infinity") as raised:
        krylov.eigsh(broken, 3)
    assert raised.value.pairs.values[-1] > 190
    with pytest.raises(hvpd.HvpdError, match=r"no eigenpairs: the first product holds NaN.*look at point\.nonfinite"):
        krylov.eigsh(np.full((9, 9), np.nan), 3)


@pytest.mark.parametrize(("n", "k"), [(21, 2), (38, 2), (21, 21), (32, 10)])
def test_a_small_matrix_takes_at_most_n_products(n, k):
    found = krylov.eigsh(symmetric(n), k)
    assert found.products <= n
    expected = np.linalg.eigvalsh(symmetric(n))
    expected = np.sort(expected[np.argsort(-abs(expected))[:k]])
    np.testing.assert_allclose(np.sort(found.values), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 10}, "k must be an integer from 1 to 9, got 10"),
        ({"k": 0}, "k must be an integer"),
        ({"which": "SM"}, "which must be one of LA, SA, LM, BE, got 'SM'"),
        ({"ncv": 3}, "ncv must be an integer from 4 to 9"),
        ({"tol": -1.0}, "tol must be at least 0"),
        ({"v0": np.zeros(9)}, "v0 is zero"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(hvpd.InvalidArgumentError, match=message):
        krylov.eigsh(symmetric(9), **({"k": 3} | arguments))


@pytest.mark.parametrize("A", [np.ones((3, 4)), np.eye(3) * 1j, "text", None])
def test_bad_operators(A):
    with pytest.raises(hvpd.InvalidArgumentError, match="A must be a"):
        krylov.eigsh(A, 1)
