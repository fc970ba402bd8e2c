"""Sparse matrices as data, against native jax with the same matrix as a dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse

import hvpd

M, N = 40, 9
X = np.linspace(-1, 1, N)
V = np.cos(np.arange(3.0 * N)).reshape(N, 3)


def random(density, seed=0, shape=(M, N)):
    return scipy.sparse.random_array(shape, density=density, rng=np.random.default_rng(seed), format="csr")


A, B = random(0.2), random(0.1, 1)


def loss(x, A):
    return jnp.sum(jnp.logaddexp(0.0, A @ x)) + jnp.sum(x**4)


def products(matrix):
    with jax.enable_x64(True):
        return jax.hessian(loss)(X, jnp.asarray(matrix.toarray())) @ V


def jax_matrix(make, matrix, **options):
    with jax.enable_x64(True):
        return make(matrix, **options)


@pytest.fixture(scope="module")
def objective(client):
    return client.register(loss, X, A, name="sparse/logistic")


KINDS = {
    "csr": lambda: A,
    "csc": lambda: A.tocsc(),
    "coo": lambda: scipy.sparse.coo_matrix(A),
    "BCOO": lambda: jax_matrix(sparse.BCOO.from_scipy_sparse, A),
    "BCSR": lambda: jax_matrix(sparse.BCSR.from_scipy_sparse, A),
    "padded": lambda: jax_matrix(sparse.BCOO.fromdense, A.toarray(), nse=200),
    "batched": lambda: jax_matrix(sparse.BCOO.fromdense, A.toarray(), n_batch=1),
    "COO": lambda: jax_matrix(sparse.COO.fromdense, A.toarray()),
    "CSR": lambda: jax_matrix(sparse.CSR.fromdense, A.toarray()),
}
"""Functions, because all processes of the suite read this file, and jax compiles."""


@pytest.mark.parametrize("kind", KINDS)
def test_registered_matrices_of_every_kind(client, kind):
    matrix = KINDS[kind]()
    found = client.register(loss, X, matrix).at(X)
    np.testing.assert_allclose(found.hessian() @ V, products(A), rtol=1e-12)
    assert found.value == pytest.approx(float(loss(jnp.asarray(X), A.toarray())), rel=1e-6)


def test_a_dense_matrix_is_not_sent(objective):
    stored = sum(np.prod(each.shape) for each in objective._bundle.data)
    assert stored == 3 * A.nnz


@pytest.mark.parametrize(
    "other",
    [lambda: B, lambda: B.todia(), lambda: jax_matrix(sparse.BCOO.fromdense, B.toarray())],
    ids=["csr", "dia", "BCOO"],
)
def test_other_matrices_with_fewer_elements_at_a_point(objective, other):
    assert B.nnz < A.nnz
    np.testing.assert_allclose(objective.at(X, other()).hessian() @ V, products(B), rtol=1e-12)


def test_a_teammate_passes_a_matrix_of_scipy(objective, client):
    found = client.objective("sparse/logistic").value_and_grad(X, B)
    assert found[0] == pytest.approx(objective.value(X, B), rel=1e-15)


def test_matrices_inside_pytrees(client):
    fun = lambda x, data: loss(x, data["A"][0]) * jnp.sum(data["scale"])  # noqa: E731
    objective = client.register(fun, X, {"A": [A], "scale": np.ones(2)})
    found = objective.at(X, {"A": [B], "scale": np.full(2, 0.5)}).hessian() @ V
    np.testing.assert_allclose(found, products(B), rtol=1e-12)


def test_a_matrix_that_the_function_closes_over(client):
    matrix = jax_matrix(sparse.BCOO.from_scipy_sparse, random(0.9, shape=(3000, N)))
    objective = client.register(lambda x: loss(x, matrix), X)
    assert [tuple(each.shape) for each in objective._bundle.captured] == [matrix.data.shape, matrix.indices.shape]
    scipy_matrix = scipy.sparse.coo_array((matrix.data, np.asarray(matrix.indices).T), shape=matrix.shape)
    np.testing.assert_allclose(objective.at(X).hessian() @ V, products(scipy_matrix), rtol=1e-11)


def test_float32(client):
    objective = client.register(loss, X.astype(np.float32), A)
    assert {each.dtype for each in objective._bundle.data} == {"float32", "int32"}
    np.testing.assert_allclose(objective.at(X, B.astype(np.float32)).hessian() @ V, products(B), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda o: o.at(X, random(0.9)), r"data\[0\] stores 324 elements, and the registered matrix stores 72"),
        (lambda o: o.at(X, random(0.2, shape=(M, N + 1))), r"of shape \(40, 9\), as registered; got a .* \(40, 10\)"),
        (lambda o: o.at(X, A.toarray()), r"must be a BCOO\(data, indices\), got a ndarray"),
        (
            lambda o: o.at(X, sparse.BCOO((jnp.ones(72), jnp.zeros((72, 2), int)), shape=A.shape)),
            "got a BCOO without indices_sorted and unique_indices",
        ),
    ],
)
def test_other_matrices_that_do_not_fit_say_why(objective, call, says):
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        call(objective)


@pytest.mark.parametrize(
    ("register", "says"),
    [
        (lambda c: c.register(loss, X, A, any_rows=True), "need a first leaf of data that is a dense array"),
        (lambda c: c.register(lambda x: jnp.sum(x), A), r"x must be.*a scipy.sparse csr_array.*\.toarray\(\)"),
        (
            lambda c: c.register(lambda x: jnp.sum(A @ x), X),
            r"test_sparse_data.py:\d+, in <lambda>.*pass matrices of scipy.sparse as data",
        ),
    ],
)
def test_matrices_that_cannot_be_registered_say_why(client, register, says):
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        register(client)
