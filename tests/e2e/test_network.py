"""A network between a solve and its server that is slow, cuts, or goes black. The solve
ends with the right answer, or with the reason.
"""

import concurrent.futures
import contextlib
import os
import random
import socket
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg

import hvpd
from tests.support.waiting import until

N = 100


class Network:
    """A path to a server that can be slow, cut, or black. When it is black, it takes
    bytes and passes none on.

    Args:
        port: The server's port on this machine.
        delay: Seconds of delay for each piece.
        rate: Bytes a second, each way of each connection; 0 for no limit.
    """

    def __init__(self, port, *, delay=0.0, rate=0):
        self._target = port
        self._delay, self._rate = delay, rate
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._open = []
        self._ends = []
        self._light = threading.Event()
        self._light.set()
        self.cuts = 0
        self.passed = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                try:
                    theirs = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    ours.close()
                    continue
                with self._lock:
                    self._open.append((ours, theirs))
                    self._ends += [ours, theirs]
                for source, target in ((ours, theirs), (theirs, ours)):
                    self._threads.append(threading.Thread(target=self._pass, args=(source, target)))
                    self._threads[-1].start()

    def _pass(self, source, target):
        pause = threading.Event()
        with contextlib.suppress(OSError):
            while piece := source.recv(4096 if self._rate else 1 << 16):
                self._light.wait()
                pause.wait(self._delay + (len(piece) / self._rate if self._rate else 0))
                target.sendall(piece)
                self.passed += len(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self, how=socket.SHUT_RDWR):
        """End every connection, in the middle of its messages."""
        with self._lock:
            opened, self._open = self._open, []
        for pair in opened:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(how)
        self.cuts += bool(opened)

    def darken(self):
        """Pass nothing on from now on, without telling the ends."""
        self._light.clear()

    def lighten(self):
        """Pass the held bytes on."""
        self._light.set()

    def close(self):
        self._light.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        for end in self._ends:
            end.close()


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
