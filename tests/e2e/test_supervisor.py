"""`hvpd serve` replaces a server that dies or hangs, and solves do not notice."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import hvpd
from tests.support.objectives import quadratic
from tests.support.waiting import until

WAIT = 120.0


def child(server):
    """Return the process that serves."""
    pid = server.process.pid
    (found,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found)


def gone(pid):
    """Return whether a process has ended. It may stay as a zombie until its new parent
    collects it.
    """
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.fixture(scope="module")
def spd():
    n = 300
    Q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(n, n)))
    return (Q * np.geomspace(1, 1e4, n)) @ Q.T


def test_a_solve_rides_through_the_death_of_the_server_under_it(serve, spd):
    server = serve(supervised=True, forked=False)  # With the true command lines.
    n, died = len(spd), []
    with hvpd.connect(server.address) as client:
        H = client.register(quadratic, np.zeros(n), spd).at(np.zeros(n)).hessian()
        products = 0

        def matvec(v):
            nonlocal products
            products += 1
            if products == 5:
                died.append(child(server))
                os.kill(died[-1], signal.SIGKILL)
            return H @ v

        operator = scipy.sparse.linalg.LinearOperator((n, n), matvec, dtype=float)
        b = np.ones(n)
        solution, code = scipy.sparse.linalg.cg(operator, b, rtol=1e-10, maxiter=2000)
        assert code == 0
        assert np.linalg.norm(spd @ solution - b) <= 1e-9 * np.linalg.norm(b)
        assert client.statistics().retries > 0
    assert len({*died, child(server)}) == 2
    assert server.process.poll() is None
    assert sum("was ended by SIGKILL" in line for line in server.lines) == 1
    assert not (server.store / "quarantine").exists()  # No objective is to blame.
    assert server.terminate() == 0


def test_nothing_is_left_when_the_supervisor_is_killed(serve):
    server = serve(supervised=True)
    under = child(server)
    server.kill()
    until(lambda: gone(under))
    server.start()  # On the same store and port.
    with hvpd.connect(server.address) as client:
        assert client.objectives() == []
    assert server.terminate() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_when_it_is_told_to_and_lets_products_finish(serve, number):
    server = serve(supervised=True)
    under = child(server)
    server.process.send_signal(number)
    assert server.process.wait(WAIT) == 0
    assert gone(under)
    server._reader.join(WAIT)
    assert "hvpd: stopped" in server.lines


def test_a_server_that_is_told_to_stop_is_not_replaced(serve):
    server = serve(supervised=True)
    os.kill(child(server), signal.SIGTERM)
    assert server.process.wait(WAIT) == 0


def test_a_server_that_cannot_start_is_not_started_again(tmp_path, command):
    done = command("serve", "--port", "0", "--store", str(tmp_path), "--tokens", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert done.stderr.count("cannot read the tokens") == 1


def test_a_server_that_is_to_have_a_gpu_and_finds_none_does_not_serve_on_the_cpu(tmp_path):
    if any(Path("/dev").glob("nvidia[0-9]")):
        pytest.skip("there is one")
    command = [sys.executable, "-m", "hvpd._cli", "serve", "--port", "0", "--store", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False, env=environment)
    assert done.returncode == 1
    assert "cannot start: jax finds none of the devices that it may use, JAX_PLATFORMS='cuda'" in done.stderr


def endless(x, held):
    """Return sum(x^4) / 12 if `held` is 0; else loop without an end."""
    return jnp.sum(x**4) / 12 * jax.lax.while_loop(lambda count: held > 0, lambda count: count + 1, 1.0)


def test_a_product_that_never_ends_costs_the_server_a_few_lives_and_its_objective_its_place(serve, spd):
    server = serve("--launch-timeout", "2", "--quarantine-after", "2", supervised=True)
    n, solved = len(spd), []
    with hvpd.connect(server.address) as client, hvpd.connect(server.address) as other:
        H = other.register(quadratic, np.zeros(n), spd).at(np.zeros(n)).hessian()
        objective = client.register(endless, np.ones(5), np.float64(0), mode="reverse_over_reverse")
        assert np.allclose(objective.at(np.ones(5)).gradient, 1 / 3)
        stop = threading.Event()

        def solve():
            while not stop.is_set():
                solution, code = scipy.sparse.linalg.cg(H, np.ones(n), rtol=1e-10, maxiter=2000)
                solved.append((code, np.linalg.norm(spd @ solution - 1)))

        solver = threading.Thread(target=solve)
        solver.start()
        try:
            with pytest.raises(hvpd.HvpdError, match=r"did not end within 2 s.*2 times") as error:
                objective.at(np.ones(5), np.float64(1))
            assert error.value.reason == "QUARANTINED"
        finally:
            stop.set()
            solver.join(WAIT)
        assert all(code == 0 and residual < 1e-7 for code, residual in solved)
        with pytest.raises(hvpd.HvpdError, match="not served any more"):
            objective.at(np.full(5, 2.0))
        (server.store / "quarantine" / objective.digest).unlink()
        assert np.allclose(objective.at(np.full(5, 2.0)).gradient, 8 / 3)
    assert sum("had no answer of its device for 2 s" in line for line in server.lines) == 2


def slow(steps):
    """Return a function that takes seconds to compile for a hundred steps."""

    def f(x, scale):
        for step in range(steps):
            x = jnp.sort(jnp.sin(x + step * scale))
        return jnp.sum(x**2)

    return f


def test_no_objective_is_blamed_for_a_crash_while_a_worker_compiles(serve):
    server = serve(supervised=True)
    with hvpd.connect(server.address) as client:
        objective = client.register(slow(3), np.ones(7), np.float64(1e-3), name="slow")
        objective.registration_check()  # Until its verdict, the objective itself computes.
        H = objective.at(np.ones(7)).hessian()
        assert np.isfinite((H @ np.ones(7)).sum())
        serving = child(server)
        with ThreadPoolExecutor() as pool:
            products = pool.submit(lambda: H @ np.ones((7, 2)))
            until(lambda: any((c.width, c.state) == (2, "compiling") for c in objective.compiles()))
            os.kill(serving, signal.SIGSEGV)
            assert np.isfinite(products.result(WAIT).sum())
    assert not list((server.store / "quarantine").glob("[0-9a-f]*"))


def test_a_compile_that_takes_too_long_is_refused_and_delays_no_others(serve, spd):
    server = serve("--compile-timeout", "2.5", "--quarantine-after", "1", supervised=True)
    n = len(spd)
    with hvpd.connect(server.address) as client:
        H = client.register(quadratic, np.zeros(n), spd).at(np.zeros(n)).hessian()
        before = child(server)
        with pytest.raises(hvpd.InvalidArgumentError, match=r"cannot compile .*: it took more than 2\.5 s") as error:
            client.register(slow(200), np.ones(8), np.float64(1e-3), name="slow")
        assert error.value.reason == "COMPILE_FAILED"
        assert "slow" not in [each.name for each in client.objectives()]
        np.testing.assert_allclose(H @ np.ones(n), spd @ np.ones(n), rtol=1e-9)
        assert child(server) == before
    assert server.terminate() == 0
