"""Deaths of the server at random moments, under many solves. Each solve ends with the
right answer.
"""

import concurrent.futures
import os
import random
import signal
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import hvpd
from tests.support.objectives import quadratic

SOLVES = 16
N = 200


def logistic(x, X):
    return jnp.mean(jnp.logaddexp(0.0, -X @ x)) + jnp.sum(x**2) / 20


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_at_random_moments_under_sixteen_solves(serve, seed):
    """Several clients solve by CG and trust regions at points of two objectives, while
    the server is killed four times.
    """
    server = serve("--memory-budget", "4M", supervised=True)  # The budget is small, so that points are evicted, too.
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.normal(size=(N, N)))
    A = (Q * np.geomspace(1, 1e2, N)) @ Q.T
    X = rng.normal(size=(300, N))
    with hvpd.connect(server.address) as client:
        client.register(quadratic, np.zeros(N), A, name="chaos/quadratic")
        client.register(logistic, np.zeros(N), X, name="chaos/logistic")
    began, done = threading.Semaphore(0), threading.Event()

    def solve(number):
        with hvpd.connect(server.address, connect_timeout=120, retry_timeout=300) as own:
            for round_ in range(4):
                x = np.random.default_rng([seed, number, round_]).normal(size=N)
                if number % 2:
                    H = own.objective("chaos/quadratic").at(x).hessian(shift=0.1)
                    expected = A + 0.1 * np.eye(N)
                else:
                    H = own.objective("chaos/logistic").at(x).hessian()
                    s = 1 / (1 + np.exp(X @ x))
                    expected = (X.T * (s * (1 - s))) @ X / len(X) + np.eye(N) / 10
                began.release()
                solution, code = scipy.sparse.linalg.cg(H, x, rtol=1e-12, maxiter=5000)
                assert code == 0
                np.testing.assert_allclose(solution, np.linalg.solve(expected, x), rtol=1e-6, atol=1e-9)

    def kill():
        """Kill the server each time after a few more solves began, in the middle of
        others.
        """
        chance, killed = random.Random(seed), 0
        for _ in range(4):
            for _ in range(chance.randrange(3, 12)):
                began.acquire(timeout=300)
            pid = server.process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if not children or done.is_set():
                continue
            os.kill(int(children[0]), signal.SIGKILL)
            killed += 1
        return killed

    with concurrent.futures.ThreadPoolExecutor(SOLVES + 1) as pool:
        killer = pool.submit(kill)
        solves = [pool.submit(solve, number) for number in range(SOLVES)]
        for each in concurrent.futures.as_completed(solves, timeout=280):
            each.result()
        done.set()
        began.release(100)
        assert killer.result(60) >= 2
    assert server.terminate() == 0
