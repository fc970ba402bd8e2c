"""A network between a solve and its server that is slow, cuts, or goes black. The solve
ends with the right answer, or with the reason.
"""

import concurrent.futures
import contextlib
import os
import random
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg

import hvpd
from bench._network import Network
from tests.support.waiting import until

N = 100


@pytest.fixture
def network(server):
    """Make networks to the server. All of them end with the test."""
    with contextlib.ExitStack() as stack:

        def make(**settings):
            return stack.enter_context(contextlib.closing(Network(server.port, **settings)))

        yield make


@pytest.fixture(scope="module")
def A():
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))
    return (Q * np.geomspace(1, 1e3, N)) @ Q.T


@pytest.fixture(scope="module")
def registered(client, A):
    client.register(lambda x, A: x @ A @ x / 2, np.zeros(N), A, name="network/quadratic")
    client.register(
        lambda x: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2), np.zeros(8), name="network/rosen"
    )


def solve_cg(client, A):
    H = client.objective("network/quadratic").at(np.zeros(N)).hessian(shift=0.1)
    b = np.linspace(-1, 1, N)
    solution, code = scipy.sparse.linalg.cg(H, b, rtol=1e-12, maxiter=5000)
    assert code == 0
    np.testing.assert_allclose(solution, np.linalg.solve(A + 0.1 * np.eye(N), b), rtol=1e-6, atol=1e-9)


def solve_eigsh(client, A):
    H = client.objective("network/quadratic").at(np.zeros(N)).hessian()
    found = scipy.sparse.linalg.eigsh(H, k=5, return_eigenvectors=False, v0=np.ones(N))
    np.testing.assert_allclose(np.sort(found), np.linalg.eigvalsh(A)[-5:], rtol=1e-9)


def solve_trust(client, A):
    f = client.objective("network/rosen")
    found = scipy.optimize.minimize(
        f.value_and_grad, np.full(8, 0.7), jac=True, hessp=f.hessp, method="trust-ncg", tol=1e-9
    )
    assert found.success, found
    np.testing.assert_allclose(found.x, np.ones(8), rtol=1e-6)


SOLVES = [solve_cg, solve_eigsh, solve_trust]


@pytest.mark.parametrize(
    ("solve", "settings"),
    [(solve_cg, {"delay": 0.002}), (solve_eigsh, {"rate": 1 << 20}), (solve_trust, {"rate": 4 << 20})],
)
def test_a_slow_network_is_only_slow(network, registered, A, solve, settings):
    with hvpd.connect(network(**settings).address) as client:
        solve(client, A)
        assert client.statistics().retries == 0


@pytest.mark.parametrize("seed", range(2))
def test_a_network_that_cuts_at_random_moments(network, registered, A, seed):
    """The network cuts at least twelve times, each time after some more bytes, under
    three solves of three clients.
    """
    flaky = network()
    chance, done = random.Random(seed), threading.Event()

    def cutting():
        while not done.is_set():
            until = flaky.passed + chance.randrange(1000, 40_000)
            while flaky.passed < until and not done.wait(0.001):
                pass
            flaky.cut()

    def solve(what):
        rounds = 0
        with hvpd.connect(flaky.address, connect_timeout=60) as client:
            while flaky.cuts < 12 or not rounds:
                what(client, A)
                rounds += 1
        return rounds

    cutter = threading.Thread(target=cutting)
    cutter.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(len(SOLVES)) as pool:
            assert all(rounds > 0 for rounds in pool.map(solve, SOLVES, timeout=240))
    finally:
        done.set()
        cutter.join(60)
    assert flaky.cuts >= 12


def test_a_network_that_is_black_for_a_while(network, registered, A):
    """The network is black in a solve for longer than a product takes. Calls under way
    arrive late.
    """
    black = network()
    with hvpd.connect(black.address) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        solve_cg(client, A)
        before = black.passed
        solving = pool.submit(solve_cg, client, A)
        until(lambda: black.passed >= before + 5_000 or solving.done())
        assert not solving.done()
        black.darken()
        with pytest.raises(concurrent.futures.TimeoutError):
            solving.result(timeout=2)
        black.lighten()
        solving.result(timeout=120)


def test_a_network_that_is_black_and_then_cut(network, registered, A):
    """Calls under way never arrive."""
    black = network()
    with hvpd.connect(black.address) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        solve_cg(client, A)
        before = black.passed
        solving = pool.submit(solve_cg, client, A)
        until(lambda: black.passed >= before + 5_000 or solving.done())
        assert not solving.done()
        black.darken()
        black.cut()
        black.lighten()
        solving.result(timeout=120)
        assert client.statistics().retries > 0


def test_a_network_that_stays_black_ends_a_call_that_has_a_timeout(network, registered, A):
    black = network()
    with hvpd.connect(black.address, timeout=1, retry_timeout=2) as client:
        H = client.objective("network/quadratic").at(np.zeros(N)).hessian()
        H @ np.ones(N)
        black.darken()
        started = time.monotonic()
        with pytest.raises((hvpd.DeadlineError, hvpd.UnavailableError)):
            H @ np.ones(N)
        assert time.monotonic() - started < 10
        black.lighten()
        np.testing.assert_allclose(H @ np.ones(N), A @ np.ones(N))


@pytest.mark.slow
@pytest.mark.skipif("HVPD_LONG" not in os.environ, reason="takes a minute: set $HVPD_LONG")
def test_a_network_that_stays_black_is_noticed_without_a_timeout(network, registered, A):
    """The keepalive notices: 20 s of silence, 10 s without an answer, then 1 s of
    attempts to connect.
    """
    black = network()
    with hvpd.connect(black.address, retry_timeout=1) as client:
        H = client.objective("network/quadratic").at(np.zeros(N)).hessian()
        H @ np.ones(N)
        black.darken()
        started = time.monotonic()
        with pytest.raises((hvpd.UnavailableError, hvpd.DeadlineError)):
            H @ np.ones(N)
        assert time.monotonic() - started < 90


def test_a_server_that_cannot_be_reached_any_more_is_told_within_the_retry_timeout(network, registered):
    gone = network()
    with hvpd.connect(gone.address, retry_timeout=1) as client:
        H = client.objective("network/quadratic").at(np.zeros(N)).hessian()
        H @ np.ones(N)
        gone.close()
        started = time.monotonic()
        with pytest.raises(hvpd.UnavailableError, match=f"no answer from the hvpd server at {gone.address}"):
            H @ np.ones(N)
        assert time.monotonic() - started < 10
