"""K-FAC from a real server, against dense Gauss-Newton matrices and closed forms, and
under faults.
"""

import subprocess
import sys
import textwrap

import grpc
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import hvpd
from hvpd.v1 import curvature_pb2, curvature_pb2_grpc

CLASSES = 3


def network(params, X):
    """Return the scores of two dense layers. The second kernel is [out, in] without a
    bias, and a scale between them is in no layer.
    """
    hidden = jnp.tanh(X @ params["first"]["w"] + params["first"]["b"]) * params["scale"]
    return hidden @ params["second"].T


def cross_entropy(z, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1))


def squared_error(z, Y):
    return 0.5 * jnp.sum((z - Y) ** 2)


def mean_squared_error(z, Y):
    return squared_error(z, Y) / len(z)


def softmax(z):
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def output_hessian(p):
    """Return the Hessian of each row's cross-entropy in its logits."""
    return np.einsum("...i,ij->...ij", p, np.eye(p.shape[-1])) - np.einsum("...i,...j->...ij", p, p)


def relative(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


def dense(operator):
    return operator @ np.eye(operator.shape[0], dtype=operator.dtype)


def block_diagonal(operator, matrix):
    """Return the matrix with zeros outside of the blocks of a Kronecker operator's
    layers.
    """
    kept = np.zeros_like(matrix)
    for layer in operator.layers:
        inside = np.ix_(layer.elements.reshape(-1), layer.elements.reshape(-1))
        kept[inside] = matrix[inside]
    return kept


def ggn_of(model, loss, params, *data):
    """Return the dense J' H J, from jax's Jacobian and Hessian of the two stages."""
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        J = np.asarray(jax.jacrev(lambda x: jnp.ravel(model(unravel(x), data[0])))(flat))
        z = model(params, data[0])
        H = jax.hessian(lambda u: loss(u.reshape(z.shape), data[1]))(jnp.ravel(z))
    return J.T @ np.asarray(H) @ J


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    first = {"w": rng.normal(size=(4, 4)), "b": rng.normal(size=4)}
    params = {"first": first, "scale": rng.normal(size=4), "second": rng.normal(size=(CLASSES, 4))}
    return params, rng.normal(size=(30, 4)), rng.integers(0, CLASSES, 30)


@pytest.fixture(scope="module")
def point(client, problem):
    """Yield a point of a composite with a distribution, at 30 rows."""
    params, X, labels = problem
    composite = hvpd.composite(network, cross_entropy, distribution="categorical", samples=2)
    return client.register(composite, params, X, labels, name="kfac/network").at(params)


@pytest.fixture(scope="module")
def one_row(client, problem):
    """Yield a point at one row, with one sample."""
    params, X, labels = problem
    composite = hvpd.composite(network, cross_entropy, distribution="categorical")
    return client.register(composite, params, X[:1], labels[:1], any_rows=True, name="kfac/any").at(params)


def test_layers_are_named_and_say_where_their_elements_lie(point, problem):
    params, _, _ = problem
    layers = point.objective.dense_layers()
    assert [(layer.kernel, layer.bias) for layer in layers] == [("first/w", "first/b"), ("second", None)]
    first, second = (point.x[layer.elements] for layer in layers)
    assert np.array_equal(first, np.vstack([params["first"]["w"], params["first"]["b"]]))
    assert np.array_equal(second, params["second"].T)
    for layer, block in zip(layers, point.kfac().layers, strict=True):
        assert np.array_equal(layer.elements, block.elements)
        p, q = layer.elements.shape
        assert (block.A.shape, block.G.shape) == ((p, p), (q, q))


def test_one_row_is_exact_and_parameters_outside_layers_are_zero(one_row, problem):
    params, X, labels = problem
    expected = ggn_of(network, cross_entropy, params, X[:1], labels[:1])
    K = one_row.kfac()
    assert relative(dense(K), block_diagonal(K, expected)) < 1e-10
    scale = one_row.objective.slices()["scale"]
    assert not dense(K)[scale].any()
    assert not dense(K)[:, scale].any()
    assert np.linalg.norm(expected[scale]) > 0.01
    assert relative(dense(one_row.kfac(shift=0.5)), block_diagonal(K, expected) + 0.5 * np.eye(one_row.n)) < 1e-10


def test_many_rows_are_the_closed_form(point, problem):
    """A is the mean of (x, 1)(x, 1)'. G is the sum of J' (diag(p) - p p') J / rows."""
    params, X, _ = problem
    t = np.tanh(X @ params["first"]["w"] + params["first"]["b"])
    hidden = t * params["scale"]
    H = output_hessian(softmax(hidden @ params["second"].T)) / len(X)
    J = np.einsum("rq,q,iq->riq", 1 - t**2, params["scale"], params["second"])
    ones = np.hstack([X, np.ones((len(X), 1))])
    first, second = point.kfac().layers
    assert relative(first.A, ones.T @ ones / len(X)) < 1e-12
    assert relative(first.G, np.einsum("riq,rij,rjp->qp", J, H, J)) < 1e-12
    assert relative(second.A, hidden.T @ hidden / len(X)) < 1e-12
    assert relative(second.G, H.sum(axis=0)) < 1e-12


@pytest.mark.parametrize("distribution", [None, "normal"])
@pytest.mark.parametrize(("reduction", "loss"), [("mean", mean_squared_error), ("sum", squared_error)])
def test_deep_linear_networks_are_exact_for_any_number_of_rows(client, reduction, loss, distribution):
    """Under a squared error, all rows have the same derivatives."""
    rng = np.random.default_rng(1)
    model = lambda p, X: (X @ p["a"] + p["b"]) @ p["c"].T + p["d"]  # noqa: E731
    shapes = {"a": (3, 4), "b": 4, "c": (2, 4), "d": 2}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    X, Y = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
    composite = hvpd.composite(model, loss, distribution=distribution, reduction=reduction)
    K = client.register(composite, params, X, Y).at(params).kfac()
    assert [(layer.kernel, layer.bias) for layer in K.layers] == [("a", "b"), ("c", "d")]
    assert relative(dense(K), block_diagonal(K, ggn_of(model, loss, params, X, Y))) < 1e-10


def test_rows_and_positions_are_the_expanding_formula(client):
    """With z_r the mean over positions of tanh(y_rt) V, A is a mean over rows and
    positions, and G is a sum over both.
    """
    rng = np.random.default_rng(2)
    model = lambda p, X: jnp.mean(jnp.tanh(X @ p["w"] + p["b"]), axis=1) @ p["v"]  # noqa: E731
    params = {"w": rng.normal(size=(4, 5)), "b": rng.normal(size=5), "v": rng.normal(size=(5, CLASSES))}
    X, labels = rng.normal(size=(6, 7, 4)), rng.integers(0, CLASSES, 6)
    point = client.register(hvpd.composite(model, cross_entropy), params, X, labels).at(params)
    t = np.tanh(X @ params["w"] + params["b"])
    H = output_hessian(softmax(t.mean(axis=1) @ params["v"])) / 6
    J = np.einsum("rtq,qi->rtqi", 1 - t**2, params["v"]) / 7
    ones = np.concatenate([X, np.ones((6, 7, 1))], axis=2)
    second, first = sorted(point.kfac().layers, key=lambda layer: layer.kernel)
    assert (first.kernel, first.bias, second.kernel, second.bias) == ("w", "b", "v", None)
    assert relative(first.A, np.einsum("rtp,rtq->pq", ones, ones) / 42) < 1e-12
    assert relative(first.G, np.einsum("rtqi,rij,rtpj->qp", J, H, J)) < 1e-12
    assert relative(second.A, np.einsum("rp,rq->pq", t.mean(axis=1), t.mean(axis=1)) / 6) < 1e-12
    assert relative(second.G, H.sum(axis=0)) < 1e-12


# Factors that are drawn


def test_drawn_factors_are_their_seeds_and_right_on_average(point):
    exact = point.kfac()
    draws = [point.kfac(seed=seed) for seed in (*range(60), 2**64 - 1)]
    again = point.kfac(seed=np.uint64(7))
    for layer, (A, G) in enumerate((block.A, block.G) for block in exact.layers):
        assert all(relative(draw.layers[layer].A, A) < 1e-14 for draw in draws)
        found = [draw.layers[layer].G for draw in draws]
        assert np.array_equal(again.layers[layer].G, found[7])
        assert not np.array_equal(found[7], found[8])
        assert all(np.linalg.eigvalsh(one).min() > -1e-12 * np.linalg.norm(G) for one in found)
        errors = [np.linalg.norm(one - G) for one in found]
        # The error of a mean of independent draws is about one draw's, divided by the
        # root of their number.
        assert np.linalg.norm(np.mean(found, axis=0) - G) < 2 * np.sqrt(np.mean(np.square(errors)) / len(found))
        assert min(errors) > 0.01 * np.linalg.norm(G)


def test_a_draw_for_one_row_is_of_one_of_the_labels(one_row, problem):
    """The result is J' g g' J, where g is p - e_label for a drawn label. All labels
    occur, and nothing else.
    """
    params, X, _ = problem
    t = np.tanh(X[0] @ params["first"]["w"] + params["first"]["b"])
    p = softmax(t * params["scale"] @ params["second"].T)
    J = np.einsum("q,q,iq->iq", 1 - t**2, params["scale"], params["second"])
    gradients = [p - np.eye(CLASSES)[label] for label in range(CLASSES)]
    labels = set()
    for seed in range(25):
        first, second = one_row.kfac(seed=seed).layers
        (label,) = [label for label, g in enumerate(gradients) if relative(second.G, np.outer(g, g)) < 1e-10]
        assert relative(first.G, np.outer(gradients[label] @ J, gradients[label] @ J)) < 1e-10
        labels.add(label)
    assert len(labels) > 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_normal_draws_have_the_variance_of_the_reduction(client, reduction):
    """For a linear model, G is s times the sum over rows of g g'. g is standard normal
    and s is the reduction's, so G is s rows I on average.
    """
    X = np.random.default_rng(3).normal(size=(2000, 2))
    loss = mean_squared_error if reduction == "mean" else squared_error
    composite = hvpd.composite(lambda W, X: X @ W, loss, distribution="normal", reduction=reduction, samples=3)
    (layer,) = client.register(composite, np.zeros((2, 2)), X, X).at(np.ones((2, 2))).kfac(seed=5).layers
    off = layer.G / (1 if reduction == "mean" else len(X)) - np.eye(2)
    # Elements are means of 6000 squares or products of normal numbers, of variance 2 or
    # 1: five standard errors.
    assert np.abs(off).max() < 5 * np.sqrt(2 / 6000)
    assert np.abs(off).min() > 0
    assert relative(layer.A, X.T @ X / len(X)) < 1e-12


# The inverse


@pytest.mark.parametrize(("dtype", "accuracy"), [(np.float64, 1e-10), (np.float32, 1e-4)])
def test_the_inverse_is_that_of_the_dense_matrix(client, problem, dtype, accuracy):
    params, X, labels = problem
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    composite = hvpd.composite(network, cross_entropy, distribution="categorical", samples=2)
    point = client.register(composite, params, X.astype(dtype), labels).at(params)
    for K in (point.kfac(1e-2), point.kfac(0.1, seed=3), point.kfac().shifted(1.0)):
        inverse = K.inverse()
        assert K.dtype == inverse.dtype == dtype
        assert relative(dense(inverse), np.linalg.inv(dense(K).astype(np.float64))) < accuracy
        v = np.linspace(-1, 1, point.n).astype(dtype)
        assert (inverse @ v).dtype == dtype
        assert relative(K @ (inverse @ v), v) < accuracy


def test_products_and_the_inverse_ask_the_server_nothing(client, point):
    K = point.kfac(0.1)
    before = client.statistics()
    K.inverse() @ (K.shifted(1.0) @ np.ones(point.n))
    assert client.statistics() == before


def test_it_preconditions_cg_on_the_gauss_newton_matrix(client):
    """Softmax regression has features of scales 1 to 1000. CG alone takes many times
    the products that it takes with K-FAC.
    """
    rng = np.random.default_rng(4)
    X, labels = rng.normal(size=(400, 20)) * np.logspace(0, 3, 20), rng.integers(0, CLASSES, 400)
    W = rng.normal(size=(20, CLASSES)) / np.logspace(0, 3, 20)[:, None] / 5
    point = client.register(hvpd.composite(lambda W, X: X @ W, cross_entropy), W, X, labels).at(W)
    G, M, b = point.ggn(1e-2), point.kfac(1e-2).inverse(), rng.normal(size=60)
    taken, solutions = [], []
    for preconditioner in (None, M):
        before = client.statistics().products
        solution, failed = scipy.sparse.linalg.cg(G, b, rtol=1e-8, maxiter=2000, M=preconditioner)
        assert not failed
        taken.append(client.statistics().products - before)
        solutions.append(solution)
    assert 5 * taken[1] < taken[0]
    assert (
        relative(
            solutions[1],
            np.linalg.solve(ggn_of(lambda W, X: X @ W, cross_entropy, W, X, labels) + 1e-2 * np.eye(60), b),
        )
        < 1e-5
    )


# Other data, other clients


@pytest.mark.parametrize("rows", [2, 13])
def test_other_data_of_any_number_of_rows(one_row, problem, rows):
    params, _, _ = problem
    rng = np.random.default_rng(rows)
    X, labels = rng.normal(size=(rows, 4)), rng.integers(0, CLASSES, rows)
    point = one_row.objective.at(params, X, labels)
    t = np.tanh(X @ params["first"]["w"] + params["first"]["b"])
    _, second = point.kfac().layers
    assert relative(second.A, (t * params["scale"]).T @ (t * params["scale"]) / rows) < 1e-12
    assert relative(second.G, output_hessian(softmax(t * params["scale"] @ params["second"].T)).mean(axis=0)) < 1e-12
    K, again = point.kfac(seed=1), point.kfac(seed=1)
    assert np.array_equal(dense(K), dense(again))
    single = one_row.objective.at(params, X[:1], labels[:1]).kfac()
    assert (
        relative(dense(single), block_diagonal(single, ggn_of(network, cross_entropy, params, X[:1], labels[:1])))
        < 1e-10
    )


def test_other_data_of_the_registered_shapes(point, problem):
    params, X, labels = problem
    other = point.objective.at(params, 2 * X, labels)
    first, _ = other.kfac().layers
    ones = np.hstack([2 * X, np.ones((len(X), 1))])
    assert relative(first.A, ones.T @ ones / len(X)) < 1e-12


def test_a_client_without_the_model_and_jax_gets_the_factors(point):
    program = textwrap.dedent("""
        import sys, numpy as np, hvpd
        with hvpd.connect(sys.argv[1]) as client:
            point = client.objective("kfac/network").at(np.frombuffer(bytes.fromhex(sys.argv[2])))
            K = point.kfac(0.5)
            print([layer.kernel for layer in K.layers], "jax" in sys.modules)
            print((K.inverse() @ np.ones(point.n)).tobytes().hex())
    """)
    address = point._transport.address
    command = [sys.executable, "-c", program, address, point.x.tobytes().hex()]
    names, product = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert names == "['first/w', 'second'] False"
    expected = np.linalg.solve(dense(point.kfac(0.5)), np.ones(point.n))
    assert relative(np.frombuffer(bytes.fromhex(product)), expected) < 1e-10


def test_factors_of_more_than_one_chunk_arrive_whole(client):
    """A of a kernel of 600 x 10 with a bias has 2.9 MB."""
    rng = np.random.default_rng(5)
    X, labels = rng.normal(size=(3, 600)), rng.integers(0, 10, 3)
    params = {"w": rng.normal(size=(600, 10)) / 30, "b": rng.normal(size=10)}
    model = lambda p, X: X @ p["w"] + p["b"]  # noqa: E731
    (layer,) = client.register(hvpd.composite(model, cross_entropy), params, X, labels).at(params).kfac().layers
    assert layer.A.nbytes > 2 << 20
    ones = np.hstack([X, np.ones((3, 1))])
    assert relative(layer.A, ones.T @ ones / 3) < 1e-12
    p = softmax(X @ params["w"] + params["b"])
    assert relative(layer.G, output_hessian(p).mean(axis=0)) < 1e-12


# Faults


def test_a_server_that_was_killed_and_started_again_between_the_point_and_its_factors(serve, problem):
    server = serve()
    params, X, labels = problem
    composite = hvpd.composite(network, cross_entropy, distribution="categorical")
    with hvpd.connect(server.address) as client:
        point = client.register(composite, params, X, labels).at(params)
        before, drawn = dense(point.kfac()), dense(point.kfac(seed=1))
        for call, expected in [(point.kfac, before), (lambda: point.kfac(seed=1), drawn)]:
            retries = client.statistics().retries
            server.kill()
            server.start()
            assert relative(dense(call()), expected) < 1e-12
            assert client.statistics().retries > retries


def test_points_that_were_evicted_have_factors_all_the_same(serve):
    """The budget holds the data and two points, and three take turns."""
    n, rows = 300, 4
    X, Y = np.random.default_rng(6).normal(size=(rows, n)), np.zeros((rows, 1))
    server = serve("--memory-budget", str(X.nbytes + Y.nbytes + 2 * 2 * n * 8))
    with hvpd.connect(server.address) as client:
        objective = client.register(hvpd.composite(lambda w, X: jnp.tanh(X @ w), squared_error), np.zeros((n, 1)), X, Y)
        points = [objective.at(np.full((n, 1), value / n)) for value in (0.0, 1.0, 2.0)]
        for _ in range(2):
            for point in points:
                (layer,) = point.kfac().layers
                z = np.tanh(X @ point.x)
                assert relative(layer.G, np.sum((1 - z**2) ** 2)) < 1e-12
        assert client.statistics().retries > 0
    assert server.metric("hvpd_evictions_total") > 0


def test_objectives_without_factors_name_the_registration_that_has_them(client, problem):
    params, X, labels = problem
    plain = client.register(lambda x: jnp.sum(x**2), np.ones(2)).at(np.ones(2))
    no_layers = client.register(
        hvpd.composite(lambda w, X: X @ jnp.exp(w), squared_error), np.ones((2, 3)), X[:, :2], X[:, :3]
    )
    tree = hvpd.composite(lambda w, X: [X @ w, X], lambda z, Y: squared_error(z[0], Y))
    several = client.register(tree, np.ones((2, 3)), X[:, :2], X[:, :3])
    for point in (plain, no_layers.at(np.ones((2, 3))), several.at(np.ones((2, 3)))):
        assert point.objective.dense_layers() == []
        with pytest.raises(
            hvpd.InvalidArgumentError, match=r"without kfac: register hvpd\.composite\(model, loss\).*layers a @ W \+ b"
        ):
            point.kfac()
    no_distribution = client.register(hvpd.composite(network, cross_entropy), params, X, labels).at(params)
    with pytest.raises(hvpd.InvalidArgumentError, match=r"without sampled_kfac.*distribution=\.\.\."):
        no_distribution.kfac(seed=1)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", np.float64(2)])
def test_seeds_that_are_none(point, seed):
    with pytest.raises(hvpd.InvalidArgumentError, match="seed must be an integer from 0"):
        point.kfac(seed=seed)


@pytest.mark.parametrize("shift", [np.nan, -np.inf, "1", 1j])
def test_shifts_that_are_none(point, shift):
    with pytest.raises(hvpd.InvalidArgumentError, match="shift must be a finite real number"):
        point.kfac(shift)


def test_a_singular_one_has_no_inverse(client, point, problem):
    with pytest.raises(hvpd.InvalidArgumentError, match=r"not positive definite: .* use a shift of "):
        point.kfac().inverse()  # The logits' sum does not matter, so G of the last layer is singular.
    with pytest.raises(hvpd.InvalidArgumentError, match="not positive definite"):
        point.kfac(-1.0).inverse()
    rng = np.random.default_rng(7)
    outside = lambda p, X: X @ p["w"] * jnp.exp(p["s"])  # noqa: E731
    params = {"w": rng.normal(size=(2, 2)), "s": rng.normal(size=2)}
    data = rng.normal(size=(2, 5, 2))
    K = client.register(hvpd.composite(outside, squared_error), params, *data).at(params).kfac()
    with pytest.raises(hvpd.InvalidArgumentError, match=r"2 elements of x are in no dense layer.*that is positive"):
        K.inverse()
    assert relative(dense(K.shifted(1e-3).inverse())[:2, :2], 1e3 * np.eye(2)) < 1e-10


def test_an_indefinite_one_says_which_shift_makes_it_definite(client):
    """For the loss sum(cos(z)) of a linear model, G is the diagonal of -sum(cos(z))
    over rows.
    """
    X, W = np.array([[1.0, 2.0], [0.5, -1.0], [0.0, 1.0]]), np.array([[0.1], [0.2]])
    K = client.register(hvpd.composite(lambda W, X: X @ W, lambda z, _: jnp.sum(jnp.cos(z))), W, X, X).at(W).kfac()
    least = np.linalg.eigvalsh(-np.sum(np.cos(X @ W)) * X.T @ X / 3)[0]
    assert least < -1
    with pytest.raises(
        hvpd.InvalidArgumentError, match=rf"block of '' has an eigenvalue of {least:.3g}.*use a shift of"
    ):
        K.inverse()
    shifted = K.shifted(-1.001 * least)
    assert relative(dense(shifted.inverse()), np.linalg.inv(dense(shifted))) < 1e-10


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_point_that_is_not_finite_has_products_of_nan_and_no_inverse(point, bad):
    x = point.x.copy()
    x[-1] = bad
    broken = point.objective.at(x)
    assert "x" in broken.nonfinite
    K = broken.kfac(1.0)
    assert np.isnan(K @ np.ones(point.n)).any()
    with pytest.raises(hvpd.InvalidArgumentError, match=r"factors of '.*' hold NaN or infinity, and have no inverse"):
        K.inverse()


def test_on_the_wire(client, server, point):
    def reason(**request):
        with grpc.insecure_channel(server.address) as channel:
            factors = curvature_pb2_grpc.CurvatureServiceStub(channel).ComputeFactors
            with pytest.raises(grpc.RpcError) as error:
                list(factors(curvature_pb2.ComputeFactorsRequest(**request), timeout=60))
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in rpc_status.from_call(error.value).details)
        return error.value.code(), info.reason

    plain = client.register(lambda x: jnp.sum(x**2), np.ones(2)).at(np.ones(2))
    assert reason(point_id="0" * 64) == (grpc.StatusCode.NOT_FOUND, "POINT_NOT_RESIDENT")
    assert reason(point_id=plain._id) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_SUCH_OPERATOR")
    assert reason(point_id=plain._id, seed=0) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_SUCH_OPERATOR")
    with grpc.insecure_channel(server.address) as channel:
        request = curvature_pb2.ComputeFactorsRequest(point_id=point._id)
        chunks = [reply.chunk for reply in curvature_pb2_grpc.CurvatureServiceStub(channel).ComputeFactors(request)]
    assert b"".join(chunks) == b"".join(f.tobytes() for layer in point.kfac().layers for f in (layer.A, layer.G))
