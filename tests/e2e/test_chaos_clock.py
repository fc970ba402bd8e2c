"""The wall clock jumps back and forth by hours and years under solves. Only tokens that
end are affected.
"""

import datetime
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import hvpd
from hvpd_server.tenancy import token_file

N = 80
X = np.random.default_rng(0).normal(size=(200, N))


def logistic(x, X):
    return jnp.mean(jnp.logaddexp(0.0, -X @ x)) + jnp.sum(x**2) / 20


SHIM = """
import time
real, real_ns = time.time, time.time_ns
def jumped():
    try:
        with open({file!r}) as file:
            return int(file.read() or 0)
    except OSError:
        return 0
time.time = lambda: real() + jumped()
time.time_ns = lambda: real_ns() + jumped() * 10**9
"""
"""A module that Python runs before all others. It leaves the monotonic clock alone, as
a person does who sets the time.
"""


class Clock:
    """A server's wall clock as Python sees it. gRPC and XLA use the monotonic clock for
    all their waits.
    """

    def __init__(self, directory):
        self._file = directory / "clock"
        (directory / "sitecustomize.py").write_text(SHIM.format(file=str(self._file)))
        path = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {"PYTHONPATH": os.pathsep.join(path)}
        self.set(0)

    def set(self, hours):
        """Set the clock to so many hours from now. The file is replaced atomically,
        because each look at the clock reads it.
        """
        aside = self._file.with_suffix(".new")
        aside.write_text(str(hours * 3600))
        aside.replace(self._file)


@pytest.fixture
def clock(tmp_path):
    found = Clock(tmp_path)
    found.set(24)
    program = "import time; print(time.time())"
    said = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | found.environment, capture_output=True, text=True, check=True
    )
    assert float(said.stdout) > datetime.datetime.now(datetime.UTC).timestamp() + 23 * 3600
    found.set(0)
    return found


JUMPS = [1, -1, 24, -24 * 400, 24 * 365 * 5, 0]
"""Jumps in hours."""


def solve(client, seed):
    x = np.random.default_rng(seed).normal(size=N)
    H = client.objective("clock/logistic").at(x).hessian()
    solution, code = scipy.sparse.linalg.cg(H, x, rtol=1e-12)
    assert code == 0
    s = 1 / (1 + np.exp(X @ x))
    np.testing.assert_allclose(
        solution, np.linalg.solve((X.T * (s * (1 - s))) @ X / len(X) + np.eye(N) / 10, x), rtol=1e-7, atol=1e-10
    )


@pytest.mark.parametrize("supervised", [False, True])
def test_solves_go_on_while_the_clock_of_the_server_jumps(serve, clock, supervised):
    """Products, pinned points, new clients and the supervisor's patience do not depend
    on the wall clock.
    """
    server = serve("--launch-timeout", "30", environment=clock.environment, supervised=supervised)
    pid = server.process.pid
    with hvpd.connect(server.address, retry_timeout=0) as client:
        client.register(logistic, np.zeros(N), X, name="clock/logistic")
        pinned = client.objective("clock/logistic").at(np.ones(N), pin=300)
        for seed, hours in enumerate(JUMPS):
            clock.set(hours)
            solve(client, seed)
            with hvpd.connect(server.address, retry_timeout=0) as newcomer:
                solve(newcomer, seed)
            pinned.hessian() @ np.ones(N)
        listed = client.objectives()
        assert [each.name for each in listed] == ["clock/logistic"]
        assert client.statistics().retries == 0
    assert server.process.pid == pid
    assert not [line for line in server.lines if "silent" in line or "Traceback" in line]
    assert server.terminate() == 0


def test_a_token_ends_by_the_servers_clock_and_comes_back_with_it(serve, clock, tmp_path):
    """Tokens are the only thing that a wall clock decides."""
    tokens = tmp_path / "tokens.json"
    ends = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2)
    token, _ = token_file.create(tokens, "vision", ["use", "publish"], expires=ends)
    server = serve("--tokens", str(tokens), environment=clock.environment)
    with hvpd.connect(server.address, token=token) as client:
        client.register(logistic, np.zeros(N), X, name="clock/logistic")
        solve(client, 0)
        clock.set(3)
        with pytest.raises(hvpd.AccessError, match="was good until"):
            client.objectives()
        clock.set(-24 * 365)
        solve(client, 1)
    assert server.terminate() == 0


def test_an_objective_registered_in_the_future_is_served_and_listed(serve, clock):
    server = serve(environment=clock.environment)
    clock.set(24 * 365 * 10)
    with hvpd.connect(server.address) as client:
        client.register(logistic, np.zeros(N), X, name="clock/logistic")
        (listed,) = client.objectives()
        assert listed.created.year == (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3650)).year
    server.kill()
    clock.set(-24 * 365 * 20)
    server.start()
    with hvpd.connect(server.address) as client:
        solve(client, 0)
        client.register(logistic, np.zeros(N), X, name="clock/again")
        assert len(client.objectives()) == 2
    assert server.terminate() == 0
