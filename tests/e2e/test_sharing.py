"""Several clients of one device: blocks that wait for each other where that is configured, whatever the clients' priorities."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd

WAIT = 60
X = np.arange(1.0, 6.0)


@pytest.fixture(scope="module")
def patient(serve_module):
    """A server on which blocks wait for up to half a minute for others to fill them."""
    return serve_module("--max-queue-delay", "30", "--max-block-width", "2")


def quartic(client):
    """The Hessian of x -> sum(x^4) / 12, which is diag(x^2), where launches of two vectors are compiled.

    Until then a block of one is as wide as can be, and has nothing to wait for.
    """
    objective = client.register(lambda x: jnp.sum(x**4) / 12, X, name="sharing/quartic")
    H = objective.at(X).hessian()
    for _ in range(10_000):
        np.testing.assert_allclose(H @ np.ones((5, 2)), np.outer(X**2, np.ones(2)))
        if any((c.program, c.width, c.state) == ("hvp", 2, "ready") for c in objective.compiles()):
            return H
    pytest.fail(f"no launches of two vectors: {objective.compiles()}")


def test_products_of_two_clients_wait_for_each_other(patient):
    together = threading.Barrier(2)
    vectors = np.random.default_rng(0).normal(size=(2, 5))

    def caller(v, priority):
        with hvpd.connect(patient.address, priority=priority) as client:
            H = quartic(client)
            before = client.statistics()
            together.wait(WAIT)
            product = H @ v
            return product, (client.statistics() - before).mean_batch_width

    with ThreadPoolExecutor(2) as pool:
        for v, (product, width) in zip(vectors, pool.map(caller, vectors, [-100, 100]), strict=True):
            np.testing.assert_allclose(product, X**2 * v)
            assert width == 2


def test_a_product_that_has_not_so_much_time_does_not_wait(patient):
    with hvpd.connect(patient.address, timeout=25) as client:
        np.testing.assert_allclose(quartic(client) @ np.ones(5), X**2)
