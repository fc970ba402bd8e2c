"""An objective that kills the server again and again is quarantined. Objectives that
merely ran beside it are not. The servers are real, with tenants.

The killer is a thread of the test. It reads the supervisor's liveness, and sends
SIGSEGV while the evil objective runs there.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd_server.liveness import Liveness
from hvpd_server.tenancy import token_file
from tests.support.waiting import until

WAIT = 240.0
RETRIES = 200.0
LIMIT = 2
"""Number of strikes before the quarantine."""
N = 700
FRESH = 0.01
"""Seconds. Work that began so recently does not end before a signal ends the
process.
"""


def quadratic(x, A):
    """Return x @ A @ x / 2, in small steps that take tens of milliseconds together."""
    steps = 60

    def add(total, scale):
        scaled = scale * x
        return total + scaled @ A @ scaled / 2, None

    return jax.lax.scan(add, 0.0, jnp.full(steps, steps**-0.5))[0]


def heavy(x, A):
    """A point takes milliseconds. A product of many vectors takes much longer."""
    for _ in range(16):
        x = jnp.tanh(A @ x)
    return x @ x


def children(pid):
    return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def liveness_of(server):
    """Return the liveness that a server's supervisor sees."""
    for found in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "hvpd-liveness" in str(found.readlink()):
                with found.open("r+b") as file:
                    return Liveness(file.fileno())
    raise AssertionError("the supervisor has no liveness")


class Killer:
    """Kills the server while an objective runs. In its first lives it waits until other
    given objectives run, too.

    Args:
        server: A supervised server.
        evil: The objective's digest.
        beside: For each of the first lives, the objectives that must run, too.
        age: Seconds for which the objective must have run.
    """

    def __init__(self, server, evil, beside, age):
        self._server, self._evil, self._beside, self._age = server, evil, list(beside), age
        self.liveness = liveness_of(server)
        self.ran = []
        """The objectives that ran at each death."""
        self.together = set()
        """Pairs that ran at the same time in lives after the first."""
        self.died = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join(WAIT)

    def _run(self):
        before, killed = set(), None
        while not self._stop.wait(0.001):
            (child,) = children(self._server.process.pid) or (None,)
            if child in (None, killed):  # The liveness shows the work that ran when the server died.
                before = set()
                continue
            work = self.liveness.work()
            now = {(each.digest, each.since) for each in work}
            running = {digest for digest, _ in now & before}  # Work that runs at both looks ran in between.
            fresh = {each.digest for each in work if time.monotonic() - each.since < FRESH}
            before = now
            if self.ran:
                self.together |= {frozenset((one, other)) for one in running for other in running if one != other}
            since = min((each.since for each in work if each.digest == self._evil), default=None)
            wanted = self._beside[len(self.ran)] if len(self.ran) < len(self._beside) else set()
            if since is None or time.monotonic() - since < self._age or not wanted <= running & fresh:
                continue
            os.kill(child, signal.SIGSTOP)  # Work that runs now must still be there at the crash.
            found = {each.digest for each in self.liveness.work()}
            # Threads go on for a moment while a signal ends the process, so no work may
            # be near its end.
            if self._evil in found and wanted <= found:
                os.kill(child, signal.SIGSEGV)
                killed = child
                self.ran.append(found)
                self.died.set()
            os.kill(child, signal.SIGCONT)


class Neighbour:
    """A tenant that streams products and makes points until the test ends it."""

    def __init__(self, client, seed):
        rng = np.random.default_rng(seed)
        A = rng.normal(size=(N, N))
        self.A = A + A.T
        self.objective = client.register(quadratic, np.zeros(N), self.A, name="objective")
        self.products, self.points, self.errors = 0, 0, []
        self.stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(what,)) for what in (self._multiply, self._point)]

    def start(self):
        for thread in self._threads:
            thread.start()

    def end(self):
        self.stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(WAIT)

    def _run(self, step):
        rng = np.random.default_rng(len(self.A))
        H = self.objective.at(np.zeros(N)).hessian()
        try:
            while not self.stop.is_set():
                step(H, rng)
        except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
            self.errors.append(error)

    def _multiply(self, H, rng):
        V = rng.normal(size=(N, 3))
        np.testing.assert_allclose(H @ V, self.A @ V, rtol=1e-7, atol=1e-7)
        self.products += 1

    def _point(self, H, rng):
        x = rng.normal(size=N)
        np.testing.assert_allclose(self.objective.at(x).gradient, self.A @ x, rtol=1e-7, atol=1e-7)
        self.points += 1


@pytest.fixture
def server(serve, tmp_path):
    tokens = tmp_path / "tokens.json"
    made = {name: token_file.create(tokens, name, ["use", "publish"])[0] for name in ("evil", "neighbour", "bystander")}
    found = serve("--tokens", str(tokens), "--quarantine-after", str(LIMIT), supervised=True)
    with contextlib.ExitStack() as stack:
        found.clients = {
            name: stack.enter_context(hvpd.connect(found.address, token=token, retry_timeout=RETRIES))
            for name, token in made.items()
        }
        yield found


def records(server):
    return {path.name for path in (server.store / "quarantine").iterdir() if len(path.name) == 64}


def quarantined(use):
    """Use an objective until the server refuses it."""
    ends = time.monotonic() + WAIT
    while True:
        assert time.monotonic() < ends, "it never was quarantined"
        try:
            use()
        except hvpd.HvpdError as error:
            if error.reason == "QUARANTINED":
                return
            raise


def evil_of(server, what):
    """Return an evil objective, and a function that uses it slowly enough to be
    seen.
    """
    A = np.random.default_rng(1).normal(size=(N, N)) / N**0.5
    if what == "point":
        objective = server.clients["evil"].register(looping, np.ones(5), np.float64(0), mode="reverse_over_reverse")
        return objective, lambda: objective.at(np.ones(5), np.float64(1))
    objective = server.clients["evil"].register(heavy, np.ones(N), A)
    block = np.random.default_rng(2).normal(size=(N, 256))
    return objective, lambda: objective.at(np.full(N, 0.5)).hessian() @ block


def looping(x, held):
    """Loop without an end if `held` is positive."""
    return jnp.sum(x**4) / 12 * jax.lax.while_loop(lambda count: held > 0, lambda count: count + 1, 1.0)


@pytest.mark.parametrize("what", ["point", "product"])
def test_only_the_objective_that_kills_the_server_is_quarantined(server, what):
    """A point alone proves nothing: the second evil objective makes points, and only
    its products crash.
    """
    neighbour = Neighbour(server.clients["neighbour"], 3)
    objective, use = evil_of(server, what)
    evil, innocent = objective.digest, neighbour.objective.digest
    neighbour.start()
    try:
        with Killer(server, evil, [{innocent}], 0.05) as killer:
            quarantined(use)
        done = neighbour.products, neighbour.points
        # The neighbour is served still.
        until(lambda: neighbour.errors or (neighbour.products > done[0] and neighbour.points > done[1]))
    finally:
        neighbour.end()
    assert neighbour.errors == []
    assert killer.ran == [{evil, innocent}] + [{evil}] * LIMIT
    assert killer.together == set()
    assert records(server) == {evil}
    assert sum("one of them may have done this: these run one at a time" in line for line in server.lines) == 1
    assert sum("on probation for at most" in line and "neighbour/objective" in line for line in server.lines) >= 1


def test_one_that_came_later_is_not_blamed_either(server):
    """A crash beside an objective that is no suspect proves nothing against either of
    them.
    """
    neighbour, bystander = (
        Neighbour(server.clients[name], seed) for seed, name in enumerate(("neighbour", "bystander"))
    )
    objective, use = evil_of(server, "point")
    evil, innocent, late = objective.digest, neighbour.objective.digest, bystander.objective.digest
    user = threading.Thread(target=quarantined, args=(use,))
    neighbour.start()
    try:
        with Killer(server, evil, [{innocent}, {late}], 0.05) as killer:
            user.start()
            assert killer.died.wait(WAIT)
            bystander.start()
            user.join(WAIT)
            assert not user.is_alive()
    finally:
        neighbour.end()
        bystander.end()
    assert neighbour.errors == bystander.errors == []
    first, second, *rest = killer.ran
    assert first == {evil, innocent}
    assert second == {evil, late}
    assert rest == [{evil}] * LIMIT
    assert records(server) == {evil}
    assert frozenset((evil, innocent)) not in killer.together
    with pytest.raises(
        hvpd.HvpdError, match=r"it was being computed or loaded when the server was ended by SIGSEGV \(2 times"
    ):
        use()


def test_a_hanging_device_is_blamed_on_the_hanging_objective(serve):
    server = serve("--launch-timeout", "2", "--quarantine-after", str(LIMIT), supervised=True)
    with hvpd.connect(server.address, retry_timeout=RETRIES) as client:
        neighbour = Neighbour(client, 3)
        objective = client.register(looping, np.ones(5), np.float64(0), mode="reverse_over_reverse")
        neighbour.start()
        try:
            quarantined(lambda: objective.at(np.ones(5), np.float64(1)))
        finally:
            neighbour.end()
    assert neighbour.errors == []
    assert sum("had no answer of its device for 2 s" in line for line in server.lines) == LIMIT
    assert records(server) == {objective.digest}
    assert not any("on probation" in line for line in server.lines)  # Work that goes on meanwhile is no suspect.
