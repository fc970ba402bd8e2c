"""Several clients share one device. If a delay is configured, their blocks wait for
each other, with any priorities.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from tests.support.waiting import until

WAIT = 60
X = np.arange(1.0, 6.0)


@pytest.fixture(scope="module")
def patient(serve_module):
    """Yield a server on which blocks wait for up to half a minute for others to fill
    them.
    """
    return serve_module("--max-queue-delay", "30", "--max-block-width", "2")


def quartic(client):
    """Return the Hessian of x -> sum(x^4) / 12, which is diag(x^2), when launches of
    two vectors are compiled.

    Until then a block of one has the largest width, and waits for no other.
    """
    objective = client.register(lambda x: jnp.sum(x**4) / 12, X, name="sharing/quartic")
    H = objective.at(X).hessian()
    np.testing.assert_allclose(H @ np.ones((5, 2)), np.outer(X**2, np.ones(2)))
    until(lambda: any((c.program, c.width, c.state) == ("hvp", 2, "ready") for c in objective.compiles()))
    return H


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
