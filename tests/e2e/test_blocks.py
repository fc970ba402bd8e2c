"""Principal blocks with programs of their own: the same matrix as jax's dense one, at
the cost of the block.
"""

import concurrent.futures
import re
import warnings

import grpc
import jax
import jax.export
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from google.rpc import error_details_pb2
from grpc_status import rpc_status

import hvpd
from hvpd._registration import export as _export
from hvpd.v1 import curvature_pb2, curvature_pb2_grpc
from hvpd_server.derivation.programs import Derivation
from hvpd_server.importer import reader

MODES = [
    "forward_over_reverse",
    "reverse_over_forward",
    "reverse_over_reverse",
    "linearized",
    "auto",
    "finite_difference",
]

BLOCKS = ["out", ("out", "hidden/b"), "hidden"]
"""Blocks of `network`: a leaf's parent; two leaves that do not touch, in reverse order;
and two leaves.
"""

LEAVES = (("out/0",), ("hidden/b", "out/0"), ("hidden/b", "hidden/w"))
INDICES = (np.r_[30:42], np.r_[0:6, 30:42], np.r_[0:30])
SAMPLED, EMPIRICAL = curvature_pb2.OPERATOR_SAMPLED_FISHER, curvature_pb2.OPERATOR_EMPIRICAL_FISHER


def network(params, X):
    hidden = jnp.tanh(X @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"][0]


def squared_error(z, Y):
    return jnp.mean(jnp.sum((z - Y) ** 2, axis=1)) / 2


def loss(params, X, Y):
    return squared_error(network(params, X), Y)


def relative(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


def dense(operator):
    return operator @ np.eye(operator.shape[0], dtype=operator.dtype)


def hessian(fun, x, *data):
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(x)
        return np.asarray(jax.hessian(lambda x: fun(unravel(x), *data))(flat))


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(3)
    params = {"hidden": {"w": rng.normal(size=(4, 6)), "b": rng.normal(size=6)}, "out": [rng.normal(size=(6, 2))]}
    return params, rng.normal(size=(30, 4)), rng.normal(size=(30, 2))


@pytest.fixture(scope="module")
def truth(problem):
    return hessian(loss, *problem)


@pytest.fixture(scope="module")
def point(client, problem):
    """Yield a point of a plain function."""
    return client.register(loss, *problem, blocks=BLOCKS, name="blocks/plain").at(problem[0])


@pytest.fixture(scope="module")
def composite(client, problem):
    """Yield a point of a composite with all of its operators."""
    stages = hvpd.composite(network, squared_error, distribution="normal", samples=2)
    return client.register(stages, *problem, blocks=BLOCKS).at(problem[0])


@pytest.fixture
def programs(server):
    """Return a function that returns the names of the programs that a call launches."""

    def launched(call):
        names = ["hvp", "ggn", "hvp[]", "ggn[]"]
        count = lambda name: server.metric('hvpd_launches_total{program="' + re.escape(name) + '"')  # noqa: E731
        before = {name: count(name) for name in names}
        call()
        return {name for name in names if count(name) > before[name]}

    return launched


@pytest.mark.parametrize("mode", MODES)
def test_in_each_mode_blocks_are_those_of_the_dense_hessian(client, problem, truth, mode):
    point = client.register(loss, *problem, mode=mode, blocks=BLOCKS).at(problem[0])
    plain = client.register(loss, *problem, mode=mode).at(problem[0])
    # A difference of gradients is good to eps ** (2/3), times (1 + |x|) ** 2, 64 here,
    # and a factor of the fourth derivatives.
    tolerance = 1000 * np.finfo(float).eps ** (2 / 3) if mode == "finite_difference" else 1e-10
    for leaves, indices in zip(LEAVES, INDICES, strict=True):
        block, embedded = point.hessian().block(*leaves), plain.hessian().block(*leaves)
        expected = truth[np.ix_(indices, indices)]
        assert relative(dense(block), expected) < tolerance
        assert relative(dense(embedded), expected) < tolerance
        v = np.linspace(-1, 1, len(indices))
        for _ in range(3):
            assert relative(block @ v, expected @ v) < tolerance
        assert np.array_equal(block @ np.zeros(len(indices)), np.zeros(len(indices)))
    assert relative(dense(point.hessian()), truth) < tolerance


def test_a_block_runs_its_own_program(client, point, problem, programs):
    """That holds also for a block that was not named at registration."""
    H = point.hessian()
    for leaves in LEAVES:
        assert programs(lambda leaves=leaves: dense(H.block(*leaves))) == {"hvp[]"}
    assert programs(lambda: H.block("out") @ np.ones(12)) == {"hvp[]"}
    assert programs(lambda: H.block("hidden", "out").block("hidden/b", "out") @ np.ones(18)) == {"hvp[]"}
    assert programs(lambda: H.block("hidden", "out").block("hidden").block("hidden/w") @ np.ones(24)) == {"hvp[]"}
    assert programs(lambda: (2 * H.block("hidden").shifted(1.0)).updated(np.ones(30)) @ np.ones(30)) == {"hvp[]"}
    assert programs(lambda: H.block("hidden").quadratic_form(np.ones((30, 2)))) == {"hvp[]"}


def test_another_client_knows_and_uses_the_blocks(client, server, point, truth, programs):
    assert point.objective.blocks == LEAVES
    with hvpd.connect(server.address) as other:
        found = other.objective("blocks/plain")
        assert found.blocks == LEAVES
        assert "blocks/plain" in [listing.name for listing in other.objectives()]
        block = found.at(point.x).hessian().block("out")
        assert programs(lambda: dense(block)) == {"hvp[]"}
        assert relative(dense(block), truth[30:, 30:]) < 1e-10


def test_blocks_that_were_not_registered_are_those_of_the_whole(point, truth):
    for names, indices in [(("hidden/w",), np.r_[6:30]), (("hidden", "out"), np.r_[:42]), (("",), np.r_[:42])]:
        block = point.hessian().block(*names)
        assert relative(dense(block), truth[np.ix_(indices, indices)]) < 1e-10


def test_the_whole_can_be_a_block_and_so_can_a_single_array(client):
    A = np.diag(np.arange(1.0, 6.0))
    for blocks in ([""], [("",)]):
        point = client.register(lambda x, A: x @ A @ x / 2, np.ones(5), A, blocks=blocks).at(np.ones(5))
        assert point.objective.blocks == (("",),)
        assert np.allclose(dense(point.hessian().block("")), A, rtol=1e-12)
    pair = client.register(lambda x: jnp.sum(x[0] ** 3) + x[1] ** 3, (np.ones(2), np.float64(2)), blocks=["", "1"])
    H = pair.at((np.ones(2), np.float64(2))).hessian()
    assert pair.blocks == (("0", "1"), ("1",))
    assert np.allclose(dense(H.block("0", "1")), np.diag([6, 6, 12]), rtol=1e-12)
    assert np.allclose(dense(H.block("1")), [[12]], rtol=1e-12)


# Other properties of a block


def test_arithmetic_stays_one_product_of_the_block(client, point, truth):
    rng = np.random.default_rng(0)
    U, C, V = rng.normal(size=(30, 2)), np.array([1.0, -2.0]), rng.normal(size=(30, 5))
    B, D = point.hessian(0.25).block("hidden"), truth[:30, :30]
    operator = -3 * B.updated(U, C) / 2 + 0.5 * scipy.sparse.identity(30) + B
    expected = -1.5 * (D + 0.25 * np.eye(30) + (U * C) @ U.T) + 0.5 * np.eye(30) + D + 0.25 * np.eye(30)
    before = client.statistics()
    found = operator @ V
    taken = client.statistics() - before
    assert (taken.products, taken.vectors) == (1, 5)
    assert relative(found, expected @ V) < 1e-10
    assert relative(operator.quadratic_form(V), np.einsum("nk,nm,mk->k", V, expected, V)) < 1e-10
    assert operator.quadratic_form(V[:, 0]) == pytest.approx(V[:, 0] @ expected @ V[:, 0], rel=1e-10)
    inner = operator.block("hidden/b")
    assert relative(dense(inner), expected[:6, :6]) < 1e-10
    # An update of the whole is cut to the block.
    W = rng.normal(size=(42, 2))
    assert relative(dense(point.hessian().updated(W).block("hidden")), D + W[:30] @ W[:30].T) < 1e-10


def test_operators_made_of_many_products_work_on_a_block(point, truth):
    H, D = point.hessian(0.5).block("out"), truth[30:, 30:] + 0.5 * np.eye(12)
    assert relative(H.diagonal().values, np.diag(D)) < 1e-10
    assert relative(H.sparse().toarray(), D) < 1e-10
    assert relative(H.low_rank(12) @ np.eye(12), D) < 1e-8
    assert np.array_equal(H.indices, INDICES[0])
    assert "out/0, shift=0.5" in repr(H)


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical_fisher", "hessian"])
def test_the_operators_of_a_composite(composite, problem, truth, kind):
    params, X, Y = problem
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        J = np.asarray(jax.jacrev(lambda x: network(unravel(x), X))(flat))
    residuals = np.tanh(X @ params["hidden"]["w"] + params["hidden"]["b"]) @ params["out"][0] - Y
    rows = np.einsum("ri,rin->rn", residuals, J)
    expected = {
        "ggn": np.einsum("rin,rim->nm", J, J) / 30,
        "fisher": np.einsum("rin,rim->nm", J, J) / 30,
        "empirical_fisher": rows.T @ rows / 30,
        "hessian": truth,
    }[kind]
    for leaves, indices in zip(LEAVES, INDICES, strict=True):
        block = getattr(composite, kind)(shift=0.5).block(*leaves)
        part = expected[np.ix_(indices, indices)]
        assert relative(dense(block), part + 0.5 * np.eye(len(part))) < 1e-10
        v = np.linspace(-1, 1, len(part))
        assert block.quadratic_form(v) == pytest.approx(v @ part @ v + 0.5 * v @ v, rel=1e-10)


def test_a_drawn_fisher_matrix_is_the_same_draw_in_its_blocks(composite):
    whole = dense(composite.fisher(seed=11))
    for leaves, indices in zip(LEAVES, INDICES, strict=True):
        found = dense(composite.fisher(seed=11).block(*leaves))
        assert relative(found, whole[np.ix_(indices, indices)]) < 1e-10
        assert relative(dense(composite.fisher(seed=12).block(*leaves)), found) > 0.01


def test_composites_run_the_programs_of_their_blocks(composite, programs):
    for leaves in LEAVES:
        assert programs(lambda leaves=leaves: dense(composite.ggn().block(*leaves))) == {"ggn[]"}
    assert programs(lambda: dense(composite.ggn().block("hidden/w"))) == {"ggn[]"}


@pytest.mark.parametrize("count", [1, 12, 30])
def test_data_of_any_number_of_rows(client, problem, count):
    params, X, Y = problem
    stages = hvpd.composite(network, squared_error)
    point = client.register(stages, *problem, blocks=BLOCKS, any_rows=True).at(params, X[:count], Y[:count])
    expected = hessian(loss, params, X[:count], Y[:count])
    for leaves, indices in zip(LEAVES, INDICES, strict=True):
        assert relative(dense(point.hessian().block(*leaves)), expected[np.ix_(indices, indices)]) < 1e-10
    hidden = np.tanh(X[:count] @ params["hidden"]["w"] + params["hidden"]["b"])
    assert relative(dense(point.ggn().block("out")), np.kron(hidden.T @ hidden / count, np.eye(2))) < 1e-10


@jax.custom_vjp
def cubes(x):
    return jnp.sum(x**3)


@jax.custom_vjp
def square(x):
    return x**2


cubes.defvjp(lambda x: (cubes(x), x), lambda x, g: (g * 3 * square(x),))
square.defvjp(lambda x: (square(x), x), lambda x, g: (g * 2 * x,))


def test_a_custom_vjp_falls_back_in_its_blocks_too(client):
    x = {"a": np.arange(1.0, 4.0), "b": np.arange(4.0, 6.0)}
    fun = lambda x: cubes(x["a"]) * jnp.sum(x["b"]) + jnp.sum(x["b"] ** 4)  # noqa: E731
    with pytest.warns(UserWarning, match="registered with mode 'reverse_over_reverse'"):
        objective = client.register(fun, x, blocks=["a", "b"])
    assert objective.mode == "reverse_over_reverse"
    H = objective.at(x).hessian()
    assert np.allclose(dense(H.block("a")), np.diag(6 * x["a"] * 9), rtol=1e-12)
    assert np.allclose(dense(H.block("b")), np.diag(12 * x["b"] ** 2), rtol=1e-12)


def test_blocks_in_single_precision(client, problem, truth):
    single = jax.tree.map(lambda leaf: leaf.astype(np.float32), problem)
    H = client.register(loss, *single, blocks=BLOCKS).at(single[0]).hessian()
    for leaves, indices in zip(LEAVES, INDICES, strict=True):
        found = dense(H.block(*leaves))
        assert found.dtype == np.float32
        assert relative(found, truth[np.ix_(indices, indices)]) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_leaves_in_half_precision_are_computed_as_they_are(client, dtype):
    x = {"a": jnp.asarray([0.5, 1.5], dtype), "b": np.array([2.0], np.float32)}
    fun = lambda x: (jnp.sum(x["a"] ** 3) * x["b"][0] ** 2).astype(jnp.float32)  # noqa: E731
    H = client.register(fun, x, blocks=["a", "b"]).at(x).hessian()
    a = H.block("a") @ np.eye(2)
    assert a.dtype == np.float32
    assert relative(a, np.diag([6 * 0.5 * 4, 6 * 1.5 * 4])) < 1e-6  # exact in either, but for b's rounding
    assert relative(H.block("b") @ np.ones(1), [2 * (0.125 + 3.375)]) < 1e-6


def test_blocks_and_the_whole_do_not_share_launches(point, truth):
    """Threads ask at one point. Each gets its own product."""
    operators = [point.hessian(), *(point.hessian().block(*leaves) for leaves in LEAVES)]
    expected = [truth, *(truth[np.ix_(indices, indices)] for indices in INDICES)]

    def work(index):
        V = np.random.default_rng(index).normal(size=(len(expected[index % 4]), 1 + index % 3))
        return relative(operators[index % 4] @ V, expected[index % 4] @ V)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(80))) < 1e-10


# Cost


def test_the_last_layers_block_costs_less_than_half_of_the_whole():
    """XLA counts the compiled programs' operations for eight vectors."""
    rng = np.random.default_rng(0)
    params = [rng.normal(size=shape) for shape in [(64, 64), (64, 64), (64, 8)]]
    X, Y = rng.normal(size=(100, 64)), rng.normal(size=(100, 8))

    def deep(params, X, Y):
        first, second, last = params
        return jnp.mean((jnp.tanh(jnp.tanh(X @ first) @ second) @ last - Y) ** 2)

    made = _export.export(deep, params, (X, Y), platforms=("cpu",), precision="highest")
    read = lambda name: reader.read(made.blobs[made.bundle.programs[name].digest])  # noqa: E731
    sized = Derivation(made.bundle, read, "cpu").for_rows(0)

    def operations(name):
        with sized.tracing():
            program = sized.program(name, 8)
            return jax.jit(program.ways[0]).lower(*program.specs).compile().cost_analysis()["flops"]

    whole = operations("hvp")
    assert operations("hvp[2]") < whole / 2
    # The first layer's block is no cheaper, because all later values have tangents.
    assert operations("hvp[2]") < operations("hvp[0]") / 2


# Refusals


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        (["outer"], "no leaf of x is named 'outer'.*'hidden/b', 'hidden/w', 'out/0'"),
        ([("out", "hidden/c")], "no leaf of x is named 'hidden/c'"),
        (["hidden/"], "no leaf of x is named 'hidden/'"),
        ([()], "name the leaves of the block"),
        (["out", "hidden", "out/0"], r"blocks\[2\] has the same leaves as an earlier one: 'out/0'"),
        ([("hidden/w", "hidden/b"), "hidden"], r"blocks\[1\] has the same leaves"),
        ("out", "blocks must be a list of names.*got 'out'"),
        ([5], r"blocks must be a list of names.*got \[5\]"),
        ([("out", 5)], "no leaf of x is named 5"),
    ],
)
def test_blocks_that_are_none(client, problem, blocks, says):
    with pytest.raises(hvpd.InvalidArgumentError, match=says):
        client.register(loss, *problem, blocks=blocks)


def test_a_block_without_elements_is_refused(client):
    x = {"a": np.ones(2), "none": np.ones((0, 3))}
    with pytest.raises(hvpd.InvalidArgumentError, match=r"blocks\[0\] must be of .* that have elements"):
        client.register(lambda x: jnp.sum(x["a"] ** 2), x, blocks=["none"])


def test_names_within_a_block_are_of_its_leaves(point):
    with pytest.raises(
        hvpd.InvalidArgumentError, match=r"no leaf of x is named 'out'.*there are 'hidden/b', 'hidden/w'$"
    ):
        point.hessian().block("hidden").block("out")
    with pytest.raises(hvpd.InvalidArgumentError, match="name the leaves"):
        point.hessian().block()


def test_vectors_of_another_size_are_refused_before_they_are_sent(point):
    for size, leaves in [(42, (2,)), (12, (0, 2)), (12, ()), (0, (2,))]:
        with pytest.raises(hvpd.InvalidArgumentError, match=r"must be float64\[k, \d+\], got float64\[2, "):
            point.multiply(np.ones((2, size)), leaves=leaves)
        with pytest.raises(hvpd.InvalidArgumentError, match=r"must be float64\[k, "):
            point.quadratic_form(np.ones((2, size)), leaves=leaves)


@pytest.fixture
def product(server):
    """Send one product as a foreign client would."""

    def send(point, vectors, **fields):
        spec = {"point_id": point._id, "operator": curvature_pb2.OPERATOR_HESSIAN, "k": len(vectors)} | fields
        request = curvature_pb2.ComputeProductRequest(spec=curvature_pb2.ProductSpec(**spec), vectors=vectors.tobytes())
        with grpc.insecure_channel(server.address) as channel:
            return curvature_pb2_grpc.CurvatureServiceStub(channel).ComputeProduct(request, timeout=60)

    return send


def test_on_the_wire_a_block_is_its_elements(point, truth, product):
    V = np.random.default_rng(0).normal(size=(2, 12))
    reply = product(point, V, leaves=[2])
    assert reply.info.program == "hvp[2]"
    assert relative(np.frombuffer(reply.vectors).reshape(2, 12), V @ truth[30:, 30:]) < 1e-10
    numbers = np.frombuffer(product(point, V, leaves=[2], quadratic_form=True).vectors)
    assert relative(numbers, np.einsum("kn,nm,km->k", V, truth[30:, 30:], V)) < 1e-10


def test_older_clients_name_a_registered_block_by_its_number(point, truth, product):
    V = np.random.default_rng(0).normal(size=(2, 12))
    reply = product(point, V, block=1)
    assert reply.info.program == "hvp[2]"
    assert relative(np.frombuffer(reply.vectors).reshape(2, 12), V @ truth[30:, 30:]) < 1e-10


@pytest.mark.parametrize(
    ("fields", "size", "expected"),
    [
        ({"leaves": [3]}, 12, "UNKNOWN_BLOCK"),
        ({"leaves": [-1]}, 12, "UNKNOWN_BLOCK"),
        ({"leaves": [2, 0]}, 18, "UNKNOWN_BLOCK"),
        ({"leaves": [2, 2]}, 24, "UNKNOWN_BLOCK"),
        ({"leaves": [2], "block": 1}, 12, "UNKNOWN_BLOCK"),
        ({"leaves": [2]}, 42, "SIZE_MISMATCH"),
        ({"leaves": [0, 2]}, 12, "SIZE_MISMATCH"),
        ({"block": 4}, 12, "UNKNOWN_BLOCK"),
        ({"block": -1}, 12, "UNKNOWN_BLOCK"),
        ({"block": 2**31 - 1}, 42, "UNKNOWN_BLOCK"),
        ({"block": 1}, 42, "SIZE_MISMATCH"),
        ({"block": 1}, 11, "SIZE_MISMATCH"),
        ({"block": 2}, 12, "SIZE_MISMATCH"),
        ({"block": 0}, 12, "SIZE_MISMATCH"),
        ({"block": 4, "operator": curvature_pb2.OPERATOR_GGN}, 12, "UNKNOWN_BLOCK"),
    ],
)
def test_on_the_wire_blocks_and_sizes_that_are_none_are_refused(point, product, fields, size, expected):
    with pytest.raises(grpc.RpcError) as error:
        product(point, np.ones((2, size)), **fields)
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(error.value).details)
    assert (error.value.code(), info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, expected)


def test_an_operator_that_the_objective_has_not_has_no_blocks_either(point, product):
    with pytest.raises(grpc.RpcError) as error:
        product(point, np.ones((2, 12)), block=1, operator=EMPIRICAL)
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "has no empirical_fisher" in error.value.details()


def test_an_objective_without_blocks_has_none(client, product):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        point = client.register(lambda x: jnp.sum(x**2), np.ones(3)).at(np.ones(3))
    assert point.objective.blocks == ()
    with pytest.raises(grpc.RpcError, match="has 0 blocks, got 1"):
        product(point, np.ones((1, 3)), block=1)
