"""Two processes as one server: what it computes, and what happens when one of them
dies or stops.
"""

import os
import signal
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from bench._striking import Solves
from tests.support.security import Place
from tests.support.serving import _command
from tests.support.waiting import until

N, ROWS = 12, 64
TIMEOUT = "6"
"""Seconds of --launch-timeout: a rank that is silent for half of it has stopped."""

pytestmark = pytest.mark.slow


def free_address():
    """Return an address of this machine at which no program listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


class Group:
    """A leader, and one rank beside it, each with its supervisor. Clients and orders
    are encrypted.
    """

    def __init__(self, store, place, serve, zygotes):
        self.trust = place.trust
        leader = free_address()
        flags = ["--leader", leader, "--size", "2", "--launch-timeout", TIMEOUT, "--memory-budget", "1M"]
        flags += ["--tls-cert", str(place.root / "server.pem"), "--tls-key", str(place.root / "server.key")]
        self.log = store.parent / f"{store.name}.log"
        with self.log.open("wb") as log:
            arguments = ["serve", "--store", str(store), *flags, "--rank", "1"]
            self.rank = _command(zygotes, arguments, {}, (0, log.fileno(), log.fileno()))
        self.server = serve(*flags, "--rank", "0", store=store, supervised=True)

    def lines(self):
        """Return the log of the rank."""
        return self.log.read_text().splitlines()


def child(pid):
    """Return the process that a supervisor has started; None while there is none."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else None


@pytest.fixture(autouse=True)
def _double():
    jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module")
def group(tmp_path_factory, serve_module, zygotes):
    place = Place(tmp_path_factory.mktemp("place"))
    found = Group(tmp_path_factory.mktemp("store"), place, serve_module, zygotes)
    yield found
    found.rank.kill()
    found.rank.wait(60)


@pytest.fixture(scope="module")
def client(group):
    with hvpd.connect(group.server.address, ca=group.trust) as found:
        yield found


@pytest.fixture(scope="module")
def one(server):
    """Yield a client of a server that is one process."""
    with hvpd.connect(server.address) as found:
        yield found


def logistic(w, X, y):
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + 0.05 * jnp.sum(w**2)


def data(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, N)), np.sign(rng.normal(size=rows))


def hessian(w, X, y):
    s = 1.0 / (1.0 + np.exp(y * (X @ w)))
    return (X.T * (s * (1 - s))) @ X / len(y) + 0.1 * np.eye(N)


W = np.random.default_rng(1).normal(size=N)


def close(found, expected):
    return np.linalg.norm(found - expected) <= 1e-12 * np.linalg.norm(expected)


def network():
    rng = np.random.default_rng(2)
    params = {"A": rng.normal(size=(6, 4)), "B": rng.normal(size=(4, 3))}
    X, labels = rng.normal(size=(32, 6)), np.eye(3)[rng.integers(0, 3, 32)]

    def model(params, X):
        return jnp.tanh(X @ params["A"]) @ params["B"]

    def loss(logits, labels):
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=1))

    return hvpd.composite(model, loss), params, X, labels


@pytest.fixture(scope="module")
def points(client, one):
    """Return a point of the group, and the same one of one process."""
    return [
        each.register(logistic, np.zeros(N), *data(), sharded=number == 0).at(W)
        for number, each in enumerate((client, one))
    ]


def test_the_group_counts_the_devices_of_all_ranks(client):
    assert client.server.device_count == 2


def test_values_gradients_and_products_equal_those_of_one_process(points):
    ours, theirs = points
    assert close(np.array([ours.value]), np.array([theirs.value]))
    assert close(ours.gradient, theirs.gradient)
    for width in (1, 3, N):
        V = np.random.default_rng(width).normal(size=(N, width))
        assert close(ours.hessian() @ V, theirs.hessian() @ V)
        assert close(ours.hessian() @ V, hessian(W, *data()) @ V)


def test_gauss_newton_and_kronecker_factors_equal_those_of_one_process(client, one):
    function, params, X, labels = network()
    ours = client.register(function, params, X, labels, sharded=True).at(params)
    theirs = one.register(function, params, X, labels).at(params)
    V = np.random.default_rng(3).normal(size=(ours.n, 4))
    assert close(ours.ggn() @ V, theirs.ggn() @ V)
    for layer, same in zip(ours.kfac().layers, theirs.kfac().layers, strict=True):
        assert close(layer.A, same.A)
        assert close(layer.G, same.G)


def test_krylov_runs_equal_those_of_one_process(group, points):
    ours, theirs = (point.hessian() for point in points)
    values, _ = ours.eigsh(4)
    assert close(values, theirs.eigsh(4)[0])
    expected = theirs.solve(np.ones(N), tol=1e-14).x

    def launched():
        assert close(ours.solve(np.ones(N), tol=1e-14).x, expected)
        return group.server.metric(r'hvpd_launches_total\{program="cg_hvp"\}')

    until(launched)  # Several steps are one order as soon as their program is there.
    assert close(np.array([ours.trace(seed=1).value]), np.array([theirs.trace(seed=1).value]))


@pytest.mark.parametrize("rows", [63, 1])
def test_rows_that_do_not_divide_are_on_each_rank(client, rows):
    point = client.register(logistic, np.zeros(N), *data(rows, seed=rows), sharded=True).at(W)
    assert close(point.hessian() @ np.eye(N), hessian(W, *data(rows, seed=rows)))


def test_scalars_are_on_each_rank(client):
    def scaled(w, X, strength):
        return strength * jnp.sum(jnp.cosh(X @ w))

    X = data()[0]
    point = client.register(scaled, np.zeros(N), X, 0.5, sharded=True).at(W / 10)
    assert close(point.hessian() @ np.eye(N), 0.5 * (X.T * np.cosh(X @ W / 10)) @ X)


def test_x_is_not_split_over_a_group(client):
    with pytest.raises(hvpd.HvpdError, match="x cannot be split over the processes of a group") as error:
        client.register(logistic, np.zeros(N), *data(), sharded="parameters")
    assert error.value.reason == "NO_GROUP"


def test_other_objectives_stay_on_the_leader(group, client):
    placed = r'hvpd_group_orders_total\{kind="place"\}'
    before = group.server.metric(placed)
    for sharded, orders in ((False, 0), (True, 2)):  # X and y.
        X, y = data(seed=20 + sharded)
        point = client.register(logistic, np.zeros(N), X, y, sharded=sharded).at(W)
        assert close(point.hessian() @ W, hessian(W, X, y) @ W)
        assert group.server.metric(placed) == before + orders


def test_data_that_does_not_fit_goes_through_all_ranks_in_chunks(client):
    X, y = data(20_000, seed=9)  # Two MB, with a budget of half a MB for each rank.
    point = client.register(logistic, np.zeros(N), X, y, sharded=True, row_reduction="mean").at(W)
    found, expected = point.hessian() @ np.eye(N), hessian(W, X, y)
    assert np.linalg.norm(found - expected) <= 1e-11 * np.linalg.norm(expected)


def strike(group, victim, number):
    """Send a signal to a process under 16 solves. Return the number of wrong answers,
    and the errors that a caller saw, before all solves went on.
    """
    before = child(group.server.process.pid)
    with Solves(lambda: hvpd.connect(group.server.address, ca=group.trust)) as solves:
        os.kill(victim, number)
        until(lambda: child(group.server.process.pid) not in (None, before))
        solves.wait_for_each()
    return solves.wrong, solves.errors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("side", ["rank", "leader"])
def test_solves_ride_through_the_end_of_a_process(group, side, number):
    supervisor = group.rank if side == "rank" else group.server.process
    victim = child(supervisor.pid)
    assert strike(group, victim, number) == (0, [])
    assert child(supervisor.pid) != victim
    assert not (group.server.store / "quarantine").exists()  # No objective is to blame.


def test_a_leader_that_waits_for_the_others_stops_when_it_is_told_to(tmp_path, zygotes):
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        arguments = ["serve", "--port", "0", "--store", str(tmp_path / "store"), "--rank", "0", "--size", "2"]
        alone = _command(zygotes, [*arguments, "--leader", free_address()], {}, (0, 1, stderr.fileno()))
    until(lambda: "waits for the others" in log.read_text())
    alone.terminate()
    assert alone.wait(60) == 0


def test_a_rank_of_another_size_is_refused(tmp_path, zygotes):
    leader, logs = free_address(), [tmp_path / "0", tmp_path / "1"]
    started = []
    for rank, size in enumerate("23"):
        with logs[rank].open("wb") as stderr:
            arguments = [
                "serve",
                "--port",
                "0",
                "--store",
                str(tmp_path / "store"),
                "--rank",
                str(rank),
                "--size",
                size,
            ]
            started.append(_command(zygotes, [*arguments, "--leader", leader], {}, (0, 1, stderr.fileno())))
    assert started[1].wait(60) == 1
    assert "cannot start: rank 1 has --size 3, and the leader has --size 2" in logs[1].read_text()
    started[0].terminate()
    assert started[0].wait(60) == 0


def test_both_ranks_stop_when_they_are_told_to(group):
    group.rank.terminate()
    assert group.rank.wait(60) == 0
    assert group.server.terminate() == 0
