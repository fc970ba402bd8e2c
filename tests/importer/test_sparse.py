"""Primitives of jax.experimental.sparse come back with native derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

from hvpd_server.importer import reader
from tests.importer.marked import artifact, imported
from tests.importer.test_kinks import QUICKLY

N = 4
PATTERN = np.random.default_rng(0).normal(size=(3, N)) * (np.arange(3 * N).reshape(3, N) % 3 > 0)
NSE = int(np.count_nonzero(PATTERN))


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def bcoo(x):
    """Return a matrix whose elements depend on x."""
    matrix = sparse.BCOO.fromdense(PATTERN, nse=NSE)
    return sparse.BCOO((matrix.data * jnp.resize(jnp.sin(x), matrix.nse), matrix.indices), shape=matrix.shape)


def bcsr(x):
    matrix = sparse.BCSR.fromdense(PATTERN, nse=NSE)
    data = matrix.data * jnp.resize(jnp.sin(x), matrix.nse)
    return sparse.BCSR((data, matrix.indices, matrix.indptr), shape=matrix.shape)


def coo(x, kind=sparse.COO):
    matrix = kind.fromdense(PATTERN, nse=NSE)
    arrays, facts = matrix.tree_flatten()
    return kind.tree_unflatten(facts, (arrays[0] * jnp.resize(jnp.sin(x), matrix.nse), *arrays[1:]))


CASES = {
    "bcoo matvec": lambda x: bcoo(x) @ x,
    "bcoo matmat": lambda x: bcoo(x) @ jnp.outer(x, x),
    "bcoo rmatvec": lambda x: x[:3] @ bcoo(x),
    "bcoo todense": lambda x: jnp.exp(bcoo(x).todense()),
    "bcoo transpose": lambda x: bcoo(x).T @ x[:3],
    "bcoo sums of duplicates": lambda x: (bcoo(x) + bcoo(x * x)).sum_duplicates(nse=N * 3).data ** 3,
    "bcoo sorted": lambda x: bcoo(x).T.sort_indices().data[:3] * x[:3] ** 2,
    "bcoo elements of a dense matrix": lambda x: (
        sparse.bcoo_extract(bcoo(x), jnp.outer(x[:3], x), assume_unique=True).data ** 2
    ),
    "bcoo from a dense matrix": lambda x: sparse.BCOO.fromdense(jnp.outer(x[:3], x) * PATTERN, nse=10).data ** 2,
    "bcoo sampled": lambda x: (
        sparse.bcoo_dot_general_sampled(
            jnp.outer(x[:3], x), jnp.outer(x, x), bcoo(x).indices, dimension_numbers=(([1], [0]), ([], []))
        )
        ** 2
    ),
    "bcsr matvec": lambda x: bcsr(x) @ x,
    "bcsr todense": lambda x: bcsr(x).todense() ** 2,
    "bcsr from a dense matrix": lambda x: sparse.BCSR.fromdense(jnp.outer(x[:3], x) * PATTERN, nse=10).data ** 2,
    "coo matvec": lambda x: coo(x) @ x,
    "coo matmat": lambda x: coo(x) @ jnp.outer(x, x),
    "coo todense": lambda x: coo(x).todense() ** 2,
    "csr matvec": lambda x: coo(x, sparse.CSR) @ x,
    "csr matmat": lambda x: coo(x, sparse.CSR) @ jnp.outer(x, x),
    "csr todense": lambda x: coo(x, sparse.CSR).todense() ** 2,
}


def value_gradient_product(fun):
    """Return f(x), its gradient, and H v, from one cheaply compiled program."""
    x, v = jnp.array([0.3, -1.2, 0.8, 2.1]), jnp.array([1.0, -0.5, 2.0, 0.25])

    def found(x, v):
        return fun(x), *jax.jvp(jax.grad(fun), (x,), (v,))

    return jax.jit(found).lower(x, v).compile(QUICKLY)(x, v)


SPEC = [jax.ShapeDtypeStruct((N,), np.float64)]


def served(fun):
    return imported(reader.read(artifact(fun, SPEC, ("cpu",))))


@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_those_of_native_jax(name):
    def fun(x):
        return jnp.sum(CASES[name](x) * 1.5)

    expected = value_gradient_product(fun)
    assert np.abs(expected[2]).max() > 0.1
    for one, other in zip(value_gradient_product(served(fun)), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12)


def test_no_library_of_a_gpu_is_called():
    def fun(x):
        return jnp.sum(bcoo(x) @ x + bcsr(x) @ x + coo(x) @ x + coo(x, sparse.CSR) @ x)

    assert artifact(fun, SPEC, ("cuda",)) == artifact(fun, SPEC, ("cpu",))


def test_a_product_of_sparse_matrices_has_the_derivatives_of_the_dense_product():
    """jax itself has no reverse mode for it."""

    def dense(x):
        return jnp.zeros((3, N)).at[tuple(bcoo(x).indices.T)].set(bcoo(x).data)

    found = value_gradient_product(served(lambda x: jnp.sum((bcoo(x) @ bcoo(x).T).data ** 2)))
    expected = value_gradient_product(lambda x: jnp.sum((dense(x) @ dense(x).T) ** 2))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11)
