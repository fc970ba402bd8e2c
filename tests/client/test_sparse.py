"""Sparse matrices are recovered to rounding, with a product for each colour."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import rosen_hess
from scipy.sparse.linalg import LaplacianNd

import hvpd
from hvpd._operators import sparse


def tridiagonal(n):
    return scipy.sparse.diags_array([np.ones(n - 1), np.ones(n), np.ones(n - 1)], offsets=[-1, 0, 1])


def arrow(n):
    """Return a dense first row and column with a diagonal, like a bias that touches
    every variable.
    """
    pattern = np.eye(n)
    pattern[0] = pattern[:, 0] = 1
    return pattern


def filled(pattern, seed=0, dtype=np.float64):
    """Return a symmetric matrix with that pattern."""
    values = np.random.default_rng(seed).standard_normal(pattern.shape)
    return (np.asarray(pattern, bool) * (values + values.T)).astype(dtype)


def colours(pattern):
    pattern = pattern if scipy.sparse.issparse(pattern) else np.asarray(pattern)
    return sparse.star_colouring(sparse.structure(pattern, pattern.shape[0]))


@pytest.mark.parametrize("n", [3, 4, 50, 1001])
def test_rosenbrocks_hessian_takes_three_products(dense_point, n):
    dense = rosen_hess(np.random.default_rng(n).standard_normal(n))
    point = dense_point(dense)
    H = hvpd.HessianOperator(point)
    found = H.sparse(tridiagonal(n), verify=False)
    assert point.products == [min(n, 3) if n > 3 else 2]  # On three vertices a star of two colours is enough.
    assert isinstance(found, scipy.sparse.csr_array)
    assert np.array_equal(found.toarray(), dense)
    assert np.array_equal(H.sparse(tridiagonal(n)).toarray(), dense)
    assert point.products[1] == point.products[0] + 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_laplacian_of_a_grid(dense_point, dtype):
    dense = LaplacianNd((12, 9), boundary_conditions="dirichlet", dtype=dtype).toarray()
    point = dense_point(dense)
    found = hvpd.HessianOperator(point).sparse(dense)
    assert found.dtype == dtype
    assert np.array_equal(found.toarray(), dense)
    assert point.products[0] - 1 <= 8


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (arrow(200), 2),  # Columns of an arrow all overlap: without symmetry it takes 200.
        (np.eye(20), 1),
        (np.ones((20, 20)), 20),
        (np.kron(np.eye(10), np.ones((4, 4))), 4),
        (scipy.sparse.diags_array([np.ones(300 - abs(k)) for k in range(-2, 3)], offsets=range(-2, 3)), 5),
    ],
)
def test_the_products_are_the_known_colours_of_these_graphs(dense_point, pattern, count):
    dense = filled(pattern.toarray() if scipy.sparse.issparse(pattern) else pattern)
    point = dense_point(dense)
    found = hvpd.HessianOperator(point).sparse(pattern)
    assert np.array_equal(found.toarray(), found.toarray().T)
    assert np.allclose(found.toarray(), dense, rtol=0, atol=1e-13)
    assert point.products == [count + 1]


symmetric_patterns = st.integers(1, 9).flatmap(
    lambda n: st.sets(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))).map(lambda edges: (n, edges))
)


@settings(deadline=None)
@given(symmetric_patterns)
def test_any_pattern_is_star_coloured_and_recovered(case):
    n, edges = case
    pattern = np.eye(n, dtype=bool)
    for i, j in edges:
        pattern[i, j] = pattern[j, i] = True
    found = colours(pattern)
    # The definition, by brute force: neighbours differ, and every path of four vertices
    # has three colours.
    neighbours = [set(np.flatnonzero(row)) - {i} for i, row in enumerate(pattern)]
    for i in range(n):
        assert all(found[i] != found[j] for j in neighbours[i])
    for b, c in itertools.permutations(range(n), 2):
        if c in neighbours[b]:
            for a, d in itertools.product(neighbours[b] - {c}, neighbours[c] - {b}):
                assert a == d or len({found[a], found[b], found[c], found[d]}) > 2
    dense = filled(pattern)
    matrix = sparse.recover(
        lambda rows: rows @ dense, sparse.structure(pattern, n), np.dtype(float), max_products=n, verify=True, seed=0
    )
    assert np.allclose(matrix.toarray(), dense, rtol=0, atol=1e-12)


def test_large_patterns_with_a_dense_row(dense_point):
    pattern = scipy.sparse.lil_array((20_000, 20_000))
    pattern[0] = 1
    pattern.setdiag(1, 1)
    assert colours(scipy.sparse.csr_array(pattern)).max() + 1 <= 4


@pytest.mark.parametrize(
    "give",
    [
        lambda dense: scipy.sparse.csc_matrix(dense),
        lambda dense: scipy.sparse.tril(scipy.sparse.coo_array(dense)),
        lambda dense: dense - np.diag(np.diag(dense)),
        lambda dense: 0 * scipy.sparse.coo_array(dense),  # The stored elements are the pattern, zero or not.
        lambda dense: SimpleNamespace(rows=np.nonzero(dense)[0], cols=np.nonzero(dense)[1], shape=dense.shape),
        lambda dense: (dense != 0).tolist(),
    ],
)
def test_patterns_in_any_form(dense_point, give):
    dense = rosen_hess(np.random.default_rng(0).standard_normal(9))
    point = dense_point(dense)
    assert np.array_equal(hvpd.HessianOperator(point).sparse(give(dense)).toarray(), dense)
    assert point.products == [4]


def test_scaled_and_shifted(dense_point):
    dense = rosen_hess(np.random.default_rng(0).standard_normal(9))
    H = (-2 * hvpd.HessianOperator(dense_point(dense))).shifted(0.5)
    assert np.allclose(H.sparse(tridiagonal(9)).toarray(), -2 * dense + 0.5 * np.eye(9), rtol=1e-14)
    detected = H.sparse()
    assert isinstance(detected, scipy.sparse.csr_array)
    assert np.allclose(detected.toarray(), -2 * dense + 0.5 * np.eye(9), rtol=1e-14)


def test_without_a_pattern_it_takes_n_products_and_finds_it(dense_point):
    dense = rosen_hess(np.random.default_rng(0).standard_normal(60))
    point = dense_point(dense)
    H = hvpd.HessianOperator(point)
    found = H.sparse()
    assert np.array_equal(found.toarray(), dense)
    assert found.nnz == 3 * 60 - 2
    assert point.products == [60]
    assert np.array_equal(H.sparse(found).toarray(), dense)  # From now on it is a pattern.
    assert point.products == [60, 4]


def test_a_pattern_that_misses_entries_is_refused(dense_point):
    dense = rosen_hess(np.random.default_rng(0).standard_normal(60))
    H = hvpd.HessianOperator(dense_point(dense))
    with pytest.raises(hvpd.InvalidArgumentError, match=r"the pattern misses entries.*in 60 of 60 rows"):
        H.sparse(np.eye(60))
    nearly = tridiagonal(60).tolil()
    nearly[30, 31] = nearly[31, 30] = 0
    for seed in range(20):
        with pytest.raises(hvpd.InvalidArgumentError, match="the pattern misses entries"):
            H.sparse(nearly, seed=seed)


def test_one_small_entry_that_is_missing_is_noticed(dense_point):
    dense = np.diag(np.linspace(1, 100, 30))
    dense[3, 20] = dense[20, 3] = 1e-6
    H = hvpd.HessianOperator(dense_point(dense))
    with pytest.raises(hvpd.InvalidArgumentError, match=r"in 2 of 30 rows \(3, 20\)"):
        H.sparse(np.eye(30))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda H: H.sparse(np.eye(4)), r"shape \(5, 5\) of the operator, got \(4, 4\)"),
        (lambda H: H.sparse(scipy.sparse.eye_array(5, 6)), r"got \(5, 6\)"),
        (lambda H: H.sparse(np.ones(5)), r"got \(5,\)"),
        (lambda H: H.sparse(max_products=4), "5 products are more than max_products=4: without a pattern"),
        (lambda H: H.sparse(np.ones((5, 5)), max_products=4), "5 products are more than max_products=4: this pattern"),
        (lambda H: H.sparse(np.eye(5), max_products=0), "max_products must be"),
        (lambda H: H.updated(np.ones(5)).sparse(np.eye(5)), "rank-1 update .* is a dense matrix"),
    ],
)
def test_bad_arguments(dense_point, call, message):
    point = dense_point(np.eye(5))
    with pytest.raises(hvpd.InvalidArgumentError, match=message):
        call(hvpd.HessianOperator(point))
    assert point.products == []


def test_products_that_are_not_finite_are_refused(dense_point):
    H = hvpd.HessianOperator(dense_point(np.full((5, 5), np.nan)))
    for pattern in (None, np.eye(5)):
        with pytest.raises(hvpd.InvalidArgumentError, match="NaN or infinity"):
            H.sparse(pattern)
