"""After a hundred thousand products by clients that come and go, the server has as many
descriptors and threads and as much memory as before.
"""

import concurrent.futures
import os
import statistics
import threading
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg

import hvpd

PRODUCTS = int(os.environ.get("HVPD_LEAK_PRODUCTS", "2500"))
"""Products after a warm-up. The warm-up has 5,000, or as many as this if that is
less.
"""

CALLERS = 4
EACH = 125
"""Products of one client, between its coming and going."""

N = 60
X = np.random.default_rng(0).normal(size=(2 * N, N)) / 8

MEMORY_MIB = 24
"""Most MiB by which memory may grow, for any number of products. It is several times
the usual variation (the allocator's arenas, one for each thread). A leak of 300 bytes a
product would be 29 MiB after 100,000.
"""


def logistic(x, X):
    return jnp.sum(jnp.logaddexp(0.0, X @ x)) + jnp.sum(x**2) / 2


def truth(x):
    s = 1 / (1 + np.exp(-X @ x))
    return (X.T * (s * (1 - s))) @ X + np.eye(N)


def seen(server):
    """Return the numbers of descriptors and threads, and the MiB of memory."""
    root = Path(f"/proc/{server.process.pid}")
    status = (root / "status").read_text()
    return (
        len(list((root / "fd").iterdir())),
        len(list((root / "task").iterdir())),
        int(status.split("VmRSS:")[1].split()[0]) / 1024,
    )


def visit(server, number):
    """Connect one client, solve, make products at new points, and leave."""
    rng = np.random.default_rng(number)
    x = rng.normal(size=N)
    with hvpd.connect(server.address) as client:
        objective = client.objective("leaks/logistic")
        H = objective.at(x).hessian()
        made = 0

        def count(_):
            nonlocal made
            made += 1

        solution, code = scipy.sparse.linalg.cg(H, x, rtol=1e-12, callback=count)
        assert code == 0
        np.testing.assert_allclose(solution, np.linalg.solve(truth(x), x), rtol=1e-7, atol=1e-10)
        v = rng.normal(size=N)
        Hv = H @ v
        for _ in range(EACH - made - 1):
            assert np.array_equal(H @ v, Hv) or np.allclose(H @ v, Hv, rtol=1e-9)
        if number % 10 == 0:
            hvpd.connect(server.address)._transport.channel.close()  # A client that just hangs up.
        return client.statistics().products


def visits(server, first, products):
    """Make at least as many products by visits of several clients at once. Return their
    number.
    """
    made, number = 0, first
    with concurrent.futures.ThreadPoolExecutor(CALLERS) as pool:
        while made < products:
            made += sum(pool.map(lambda each: visit(server, each), range(number, number + CALLERS)))
            number += CALLERS
    return made, number


def test_products_without_end_leave_nothing_behind(serve):
    """The budget holds two hundred points, so that points are evicted, too."""
    server = serve("--memory-budget", "256K", forked=False)  # Its own memory is measured.
    with hvpd.connect(server.address) as client:
        client.register(logistic, np.zeros(N), X, name="leaks/logistic")
    _, number = visits(server, 0, min(5000, PRODUCTS))
    before, readings, total = seen(server), [], 0
    while total < PRODUCTS:
        made, number = visits(server, number, max(PRODUCTS // 10, 1))
        total += made
        readings.append(seen(server))
    print(f"\n{total} products after the warm-up; descriptors, threads, MiB: {before}, then {readings}")  # noqa: T201 - a reading for docs/operate/security/attacks.md
    middle = [statistics.median(column) for column in zip(*readings[-5:], strict=True)]
    assert middle[0] <= before[0] + 4
    assert middle[1] <= before[1] + 8
    assert middle[2] <= before[2] + MEMORY_MIB
    assert server.metric("hvpd_open_calls") == 0
    assert server.metric("hvpd_pending_vectors") == 0


def test_an_idle_client_keeps_no_vector_that_it_multiplied(client):
    H = client.register(logistic, np.zeros(N), X).at(np.ones(N)).hessian()
    v, gone = np.ones(N), threading.Event()
    weakref.finalize(v, gone.set)
    assert np.allclose(H @ v, truth(np.ones(N)) @ v, rtol=1e-9)
    del v
    assert gone.wait(60)
