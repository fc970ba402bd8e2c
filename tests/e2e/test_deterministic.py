"""With a fixed bucket, the bits of a product do not depend on other callers. They are
compared with those of the product alone.
"""

import concurrent.futures
import threading

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd

N, ROWS = 64, 300


def logistic(w, X, y):
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + 0.05 * jnp.sum(w**2)


def network(p, X, y):
    """Return a network. In float32 at width two, on some CPUs, the second vector of a
    block has other bits than the first.
    """
    W, u = p[:48].reshape(3, 16), p[48:].reshape(16, 1)
    return jnp.mean((jnp.tanh(X[:, :3] @ W) @ u - y[:, None]) ** 2)


def problem(dtype=np.float64, rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, N)).astype(dtype)
    return (rng.normal(size=N) / 8).astype(dtype), X, np.sign(X[:, 0])


def bits(product):
    """Return the bits of each vector of a product[n,k]."""
    return [column.tobytes() for column in np.ascontiguousarray(product.T)]


def under_load(addresses, name, x, V, expected, *, product=lambda H, V: bits(H @ V), threads=16, rounds=8):
    """Ask from many threads of several clients for blocks of all widths. Return the
    mean number of vectors in a launch.
    """
    clients = [hvpd.connect(address) for address in addresses]
    operators = [client.objective(name).at(x).hessian() for client in clients]
    together = threading.Barrier(threads)

    def ask(seed):
        rng = np.random.default_rng(seed)
        together.wait(60)
        for _ in range(rounds):
            columns = rng.permutation(V.shape[1])[: rng.integers(1, V.shape[1] + 1)]
            found = product(operators[seed % len(operators)], V[:, columns])
            assert found == [expected[column] for column in columns]

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, range(threads)))
    statistics = [client.statistics() for client in clients]
    for client in clients:
        client.close()
    asked = sum(each.vectors for each in statistics) / sum(each.products for each in statistics)
    return sum(each.launched_vectors for each in statistics) / sum(each.products for each in statistics), asked


@pytest.mark.parametrize(
    ("fun", "dtype", "bucket", "mode"),
    [
        (logistic, np.float64, 8, "forward_over_reverse"),
        (logistic, np.float32, 8, "auto"),
        (logistic, np.float64, 4, "linearized"),
        (network, np.float32, 2, "forward_over_reverse"),
        (network, np.float64, 1, "reverse_over_reverse"),
    ],
)
def test_bits_are_the_same_alone_and_under_load(server, client, fun, dtype, bucket, mode):
    x, X, y = problem(dtype)
    name = f"deterministic/{fun.__name__}-{dtype.__name__}-{bucket}"
    objective = client.register(fun, x, X, y, fixed_bucket=bucket, mode=mode, name=name)
    V = np.random.default_rng(1).normal(size=(N, 12)).astype(dtype)
    H = objective.at(x).hessian()
    alone = [bits(H @ column[:, None])[0] for column in V.T]
    assert len(set(alone)) == 12
    assert bits(H @ V) == alone
    launched, asked = under_load([server.address] * 4, name, x, V, alone)
    assert launched > asked or bucket == 1  # Launches were shared between callers.
    for found in objective.compiles():
        assert found.width in (0, bucket)


def test_products_are_right(client):
    x, X, y = problem()
    H = client.register(logistic, x, X, y, fixed_bucket=8).at(x).hessian()
    s = 1 / (1 + np.exp(-y * (X @ x)))
    dense = (X.T * (s * (1 - s))) @ X / ROWS + 0.1 * np.eye(N)
    for width in (1, 5, 8, 20, 100):
        V = np.random.default_rng(width).normal(size=(N, width))
        assert np.linalg.norm(H @ V - dense @ V) < 1e-10 * np.linalg.norm(dense @ V)


def test_numbers_of_a_quadratic_form_too(server, client):
    x, X, y = problem()
    objective = client.register(logistic, x, X, y, fixed_bucket=8, name="deterministic/form")
    V = np.random.default_rng(2).normal(size=(N, 9))
    H = objective.at(x).hessian()
    alone = [H.quadratic_form(column[:, None])[0] for column in V.T]
    under_load(
        [server.address] * 2,
        "deterministic/form",
        x,
        V,
        alone,
        product=lambda H, V: list(H.quadratic_form(V)),
        threads=8,
    )


def test_bits_are_the_same_after_a_restart(serve):
    server = serve()
    x, X, y = problem(np.float32)
    V = np.random.default_rng(3).normal(size=(N, 5)).astype(np.float32)
    with hvpd.connect(server.address) as client:
        H = client.register(logistic, x, X, y, fixed_bucket=8).at(x).hessian()
        before = bits(H @ V)
        server.kill()
        server.start()
        assert bits(H @ V[:, ::-1]) == before[::-1]
        assert client.statistics().retries > 0


def test_a_point_where_everything_is_not_finite_or_zero_settles_nothing(client):
    """At the point of the objective's first product, the server cannot see whether the
    place in a block matters.
    """
    x, X, y = problem(np.float32)
    objective = client.register(network, x, X, y, fixed_bucket=2)
    V = np.random.default_rng(4).normal(size=(N, 4)).astype(np.float32)
    assert np.isnan(objective.at(np.full(N, np.nan, np.float32)).hessian() @ V).any()
    H = objective.at(x).hessian()
    alone = [bits(H @ column[:, None])[0] for column in V.T]
    assert bits(H @ V) == alone
    assert bits(H @ V[:, ::-1]) == alone[::-1]


def test_data_in_chunks(serve):
    """The budget has room for a tenth of the data."""
    x, X, y = problem(rows=3001)
    server = serve("--memory-budget", str(X.nbytes // 10))
    with hvpd.connect(server.address) as client:
        objective = client.register(
            logistic, x, X, y, fixed_bucket=4, row_reduction="mean", name="deterministic/chunks"
        )
        V = np.random.default_rng(5).normal(size=(N, 6))
        H = objective.at(x).hessian()
        alone = [bits(H @ column[:, None])[0] for column in V.T]
        under_load([server.address] * 2, "deterministic/chunks", x, V, alone, threads=8, rounds=3)


@pytest.mark.parametrize("bucket", [0, 3, -8, 2048, 8.0, "8", True])
def test_buckets_that_are_none(client, bucket):
    with pytest.raises(hvpd.InvalidArgumentError, match="fixed_bucket must be a power of two from 1 to 1024"):
        client.register(logistic, *problem(), fixed_bucket=bucket)
