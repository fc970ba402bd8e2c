"""Operators on a real server, against dense matrices from other code, with counts of
products.
"""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from scipy.optimize import rosen_hess

import hvpd
from tests.support.objectives import quadratic


def rosenbrock(x):
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def mlp(params, X, y):
    hidden = jnp.tanh(X @ params["hidden"]["w"] + params["hidden"]["b"])
    return jnp.mean((hidden @ params["out"][0] - y) ** 2)


def relative(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


@pytest.fixture
def counted(client):
    """Call a function; return its result, and its numbers of products and vectors."""

    def count(call):
        before = client.statistics()
        result = call()
        taken = client.statistics() - before
        return result, taken.products, taken.vectors

    return count


@pytest.fixture(scope="module")
def network(client):
    """Yield a point, and jax's own dense Hessian there."""
    rng = np.random.default_rng(3)
    params = {"hidden": {"w": rng.normal(size=(4, 6)), "b": rng.normal(size=6)}, "out": [rng.normal(size=(6, 2))]}
    X, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 2))
    objective = client.register(mlp, params, X, y)
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        dense = jax.hessian(lambda x: mlp(unravel(x), X, y))(flat)
    return objective.at(params), np.asarray(dense)


def test_a_composition_is_one_round_trip(network, counted):
    point, dense = network
    n = point.n
    U = np.random.default_rng(0).normal(size=(n, 2))
    H = -2 * point.hessian(shift=0.5).updated(U, [1, -1]) + scipy.sparse.identity(n)
    V = np.random.default_rng(1).normal(size=(n, 5))
    found, products, vectors = counted(lambda: H @ V)
    assert relative(found, -2 * (dense @ V + 0.5 * V + (U * [1, -1]) @ (U.T @ V)) + V) < 1e-10
    assert (products, vectors) == (1, 5)


def test_slices_and_blocks_follow_the_pytree(network):
    point, dense = network
    slices = point.objective.slices()
    assert slices == {"hidden/b": slice(0, 6), "hidden/w": slice(6, 30), "out/0": slice(30, 42)}
    H = point.hessian()
    for names, indices in [
        (("out",), np.r_[30:42]),
        (("hidden/b", "out/0"), np.r_[0:6, 30:42]),
        (("hidden",), np.r_[:30]),
    ]:
        block = H.block(*names)
        assert relative(block @ np.eye(len(indices)), dense[np.ix_(indices, indices)]) < 1e-10
        assert np.array_equal(block.indices, indices)
    with pytest.raises(hvpd.InvalidArgumentError, match="there are 'hidden/b', 'hidden/w', 'out/0'"):
        H.block("outer")


def test_a_block_is_solved_by_scipy(network):
    point, dense = network
    block = dense[30:, 30:]
    b = np.random.default_rng(0).normal(size=12)
    solution, failed = scipy.sparse.linalg.minres(point.hessian().block("out"), b, rtol=1e-12)
    assert not failed
    assert relative(solution, np.linalg.solve(block, b)) < 1e-6


def test_diagonals(network, counted):
    point, dense = network
    H = point.hessian(shift=0.5)
    exact, products, vectors = counted(H.diagonal)
    assert relative(exact.values, np.diag(dense) + 0.5) < 1e-10
    assert (products, vectors) == (1, point.n)
    estimate, _, vectors = counted(lambda: H.diagonal(samples=30, seed=1))
    assert vectors == estimate.products == 30
    off = (estimate.values - np.diag(dense) - 0.5) / estimate.standard_error
    assert 0.5 < np.sqrt(np.mean(off**2)) < 1.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rosenbrocks_hessian_comes_in_three_products(client, counted, dtype):
    n = 2000
    x = np.random.default_rng(0).normal(size=n).astype(dtype)
    point = client.register(rosenbrock, x).at(x)
    pattern = scipy.sparse.diags_array([np.ones(n - 1), np.ones(n)], offsets=[-1, 0])
    found, products, vectors = counted(lambda: point.hessian().sparse(pattern))
    assert (products, vectors) == (1, 4)  # Three colours and the check.
    assert found.nnz == 3 * n - 2
    assert found.dtype == dtype
    assert relative(found.toarray(), rosen_hess(x.astype(np.float64))) < (1e-5 if dtype == np.float32 else 1e-10)
    with pytest.raises(hvpd.InvalidArgumentError, match="the pattern misses entries"):
        point.hessian().sparse(scipy.sparse.eye_array(n))


def test_a_pattern_is_found_and_used_at_the_next_point(client, counted):
    x, y = np.random.default_rng(0).normal(size=(2, 150))
    objective = client.register(rosenbrock, x)
    found, _, vectors = counted(objective.at(x).hessian().sparse)
    assert vectors == 150
    assert found.nnz == 3 * 150 - 2
    again, _, vectors = counted(lambda: objective.at(y).hessian().sparse(found))
    assert vectors == 4
    assert relative(again.toarray(), rosen_hess(y)) < 1e-10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nystrom_speeds_up_cg_and_low_rank_finds_the_top(client, counted, dtype):
    n = 120
    values = np.concatenate([1e4 * 0.5 ** np.arange(20), np.linspace(1e-2, 1e-3, n - 20)])
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
    A = ((Q * values) @ Q.T).astype(dtype)
    A = (A + A.T) / 2
    point = client.register(quadratic, np.zeros(n, dtype), A).at(np.zeros(n, dtype))
    H = point.hessian(shift=1e-1)
    b = np.random.default_rng(1).normal(size=n).astype(dtype)
    M, _, vectors = counted(lambda: hvpd.nystrom(H, 20))
    assert vectors == 60
    rtol = 1e-4 if dtype == np.float32 else 1e-8
    (_, plain_failed), plain, _ = counted(lambda: scipy.sparse.linalg.cg(H, b, rtol=rtol, maxiter=1000))
    (solution, failed), preconditioned, _ = counted(lambda: scipy.sparse.linalg.cg(H, b, rtol=rtol, maxiter=1000, M=M))
    assert plain_failed == failed == 0
    assert 3 * preconditioned < plain
    assert relative(A @ solution + 0.1 * solution, b.astype(np.float64)) < 10 * rtol
    low, _, vectors = counted(lambda: H.low_rank(5))
    assert vectors == 30
    assert np.allclose(low.eigenvalues, values[:5], rtol=1e-5 if dtype == np.float32 else 1e-6)


def test_nystrom_of_an_indefinite_hessian_is_refused(client):
    n = 30
    A = np.diag(np.r_[-1.0, np.ones(n - 1)])
    H = client.register(quadratic, np.zeros(n), A).at(np.zeros(n)).hessian()
    with pytest.raises(
        hvpd.InvalidArgumentError, match=r"indefinite.*smallest Ritz value is -1 .*shift of more than 1,"
    ):
        hvpd.nystrom(H, 10)
    assert hvpd.nystrom(H, 10, 1.5).shift == 1.5


def test_curvature_along_directions_is_one_trip_and_only_numbers_come_back(network, counted, server):
    import grpc

    from hvpd.v1 import curvature_pb2, curvature_pb2_grpc

    point, dense = network
    V = np.random.default_rng(0).normal(size=(point.n, 70))
    U = np.random.default_rng(1).normal(size=(point.n, 2))
    H = (-2 * point.hessian(shift=0.3)).updated(U, np.array([1.0, -3.0]))
    matrix = -2 * (dense + 0.3 * np.eye(point.n)) + U @ np.diag([1.0, -3.0]) @ U.T
    form, products, vectors = counted(lambda: H.quadratic_form(V))
    assert (products, vectors) == (2, 70)  # 64 and 6
    assert relative(form, np.einsum("nk,nm,mk->k", V, matrix, V)) < 1e-10
    assert H.quadratic_form(V[:, 0]) == pytest.approx(form[0], rel=1e-12)
    block = point.hessian(0.5).block("out")
    inside = np.ix_(block.indices, block.indices)
    v = V[block.indices, 0]
    assert block.quadratic_form(v) == pytest.approx(v @ (dense[inside] + 0.5 * np.eye(len(v))) @ v, rel=1e-10)
    assert H.quadratic_form(V[:, :0]).shape == (0,)
    with grpc.insecure_channel(server.address) as channel:
        spec = curvature_pb2.ProductSpec(
            point_id=point._id, operator=curvature_pb2.OPERATOR_HESSIAN, k=3, quadratic_form=True
        )
        request = curvature_pb2.ComputeProductRequest(spec=spec, vectors=V[:, :3].T.tobytes())
        reply = curvature_pb2_grpc.CurvatureServiceStub(channel).ComputeProduct(request)
    assert len(reply.vectors) == 3 * 8
    assert relative(np.frombuffer(reply.vectors), np.einsum("nk,nm,mk->k", V[:, :3], dense, V[:, :3])) < 1e-10


@pytest.mark.parametrize("shape", [(3,), (3, 3), (), (1, 2, 3)])
def test_directions_of_another_shape_are_refused(network, shape):
    point, _ = network
    with pytest.raises(hvpd.InvalidArgumentError, match="directions must have the shape"):
        point.hessian().quadratic_form(np.ones(shape))
    with pytest.raises(hvpd.InvalidArgumentError, match="real vectors"):
        point.hessian().quadratic_form(np.ones(point.n) * 1j)


def test_leaves_have_names_shapes_and_offsets(network):
    point, _ = network
    leaves = point.objective.leaves
    assert [(leaf.name, leaf.shape, leaf.offset, leaf.size) for leaf in leaves] == [
        ("hidden/b", (6,), 0, 6),
        ("hidden/w", (4, 6), 6, 24),
        ("out/0", (6, 2), 30, 12),
    ]


def test_named_leaves_are_taken_in_any_order(network):
    point, _ = network
    objective, x = point.objective, point.x
    named = {leaf.name: x[leaf.offset : leaf.offset + leaf.size].reshape(leaf.shape) for leaf in objective.leaves}
    shuffled = dict(reversed(named.items()))
    assert objective.at(shuffled).value == point.value
    np.testing.assert_array_equal(objective.hessp(shuffled, shuffled), point.hessian() @ x)
    with pytest.raises(hvpd.InvalidArgumentError, match="shape"):
        objective.at(named | {"out/0": named["out/0"].T})
    with pytest.raises(hvpd.InvalidArgumentError, match="structure"):
        objective.at({name: leaf for name, leaf in named.items() if name != "out/0"})
