"""A group of two processes, with their supervisors, that loses a process or its network
under 16 solves.
"""

import concurrent.futures
import contextlib
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

import hvpd
from bench import _processes, _warm
from bench._network import Network, Way
from hvpd._wire import codec
from hvpd_server.group import failure

SOLVES: Final = 16
PULSES: Final = 6
"""Times that a slow rank stands still."""

N, ROWS = 12, 64


class Outcome(NamedTuple):
    """What 16 callers saw."""

    seconds: float
    """Seconds until each caller had another answer; of a slow rank, of its slowness."""
    wrong: int
    """Wrong answers."""
    errors: int
    """Errors that a caller saw."""


class Group:
    """A running group.

    Args:
        server: The leader's supervisor.
        rank: The supervisor of the other rank.
        network: The way from that rank to the leader.
    """

    def __init__(self, server: _processes.Child, rank: _processes.Child, network: Network) -> None:
        self._address = _processes.address(server)
        self.network = network
        self._supervisors = {"leader": server.pid, "rank": rank.pid}

    def connect(self) -> hvpd.Client:
        """Return a client of the group."""
        return hvpd.connect(self._address)

    def process(self, side: str) -> int | None:
        """Return the process of the leader or of the rank; None while there is none."""
        supervisor = self._supervisors[side]
        found = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        return int(found[0]) if found else None

    def signal(self, side: str, number: signal.Signals) -> None:
        """Send a signal to the leader or to the rank."""
        found = self.process(side)
        assert found is not None
        os.kill(found, number)


@contextlib.contextmanager
def forming(folder: Path) -> Iterator[Group]:
    """Run a group of two processes, whose orders go through a network."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    leader = f"127.0.0.1:{port}"
    with contextlib.closing(Network(port)) as network, contextlib.ExitStack() as stack:
        # The rank looks for the secret under the address that it has.
        (folder / "groups").mkdir(parents=True)
        (folder / "groups" / _key(network.address)).symlink_to(_key(leader))
        serve = [sys.executable, "-m", "hvpd._cli", "serve", "--port", "0", "--store", str(folder), "--size", "2"]
        other = [*serve, "--rank", "1", "--leader", network.address]
        rank = stack.enter_context(_processes.child(other, "waits for the leader"))
        first = [*serve, "--rank", "0", "--leader", leader]
        yield Group(stack.enter_context(_processes.child(first, r"^hvpd: serving on (\S+)$")), rank, network)


def _key(address: str) -> str:
    return codec.digest(address.encode())


class Solves:
    """Callers that solve and compare until the block ends.

    Args:
        connect: Returns a client of the group.
    """

    def __init__(self, connect: Callable[[], hvpd.Client]) -> None:
        rng = np.random.default_rng(0)
        X, y, x = rng.normal(size=(ROWS, N)), np.sign(rng.normal(size=ROWS)), rng.normal(size=N)
        s = 1.0 / (1.0 + np.exp(y * (X @ x)))
        self._H = (X.T * (s * (1 - s))) @ X / ROWS + 0.1 * np.eye(N)
        self._x = x
        self._connect = connect
        self._done = threading.Event()
        self.counts = [0] * SOLVES
        self.wrong = 0
        self.errors: list[Exception] = []
        jax.config.update("jax_enable_x64", True)
        with connect() as client:
            client.register(logistic, np.zeros(N), X, y, sharded=True, name="bench/struck")

    def __enter__(self) -> Self:
        self._pool = concurrent.futures.ThreadPoolExecutor(SOLVES)
        for number in range(SOLVES):
            self._pool.submit(self._solve, number)
        self.wait_for_each()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._pool.shutdown()

    def wait_for_each(self) -> None:
        """Wait until each caller has two more answers: the first may be an old one."""
        before = list(self.counts)
        _warm.until(
            lambda: bool(self.errors) or all(now > was + 1 for now, was in zip(self.counts, before, strict=True))
        )

    def _solve(self, number: int) -> None:
        b = np.random.default_rng(number).normal(size=N)
        truth = np.linalg.solve(self._H, b)
        with self._connect() as client:
            H = client.objective("bench/struck").at(self._x).hessian()
            while not self._done.is_set():
                try:
                    found = H.solve(b, tol=1e-12).x
                except hvpd.HvpdError as error:
                    self.errors.append(error)
                    return
                self.wrong += bool(np.linalg.norm(found - truth) > 1e-9)
                self.counts[number] += 1


def logistic(w: jax.Array, X: jax.Array, y: jax.Array) -> jax.Array:
    """Return the regularized loss of a logistic regression."""
    return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + 0.05 * jnp.sum(w**2)


# Faults


def _signals(side: str, number: signal.Signals) -> Callable[[Group], None]:
    return lambda group: group.signal(side, number)


def _black(*ways: Way) -> Callable[[Group], None]:
    return lambda group: group.network.darken(*ways)


FAULTS: Final[dict[str, Callable[[Group], None]]] = {
    "SIGKILL of the rank": _signals("rank", signal.SIGKILL),
    "SIGKILL of the leader": _signals("leader", signal.SIGKILL),
    "SIGSTOP of the rank": _signals("rank", signal.SIGSTOP),
    "SIGSTOP of the leader": _signals("leader", signal.SIGSTOP),
    "connection cut": lambda group: group.network.cut(),
    "no bytes either way": _black("there", "back"),
    "no bytes to the rank": _black("back"),
    "no bytes to the leader": _black("there"),
}
"""What happens to a group, by name. The rank connects, so its bytes go "there"."""


def strike(fault: str, folder: Path) -> Outcome:
    """Form a group, and let it fail under solves."""
    with forming(folder) as group, Solves(group.connect) as solves:
        before = group.process("leader")
        began = time.perf_counter()
        FAULTS[fault](group)
        _warm.until(lambda: group.process("leader") not in (None, before))
        group.network.lighten()
        solves.wait_for_each()
        return Outcome(time.perf_counter() - began, solves.wrong, len(solves.errors))


def slow(folder: Path) -> Outcome:
    """Form a group, and let its rank stand still again and again, a little shorter than
    what counts as stopped.

    Raises:
        RuntimeError: The group has ended.
    """
    chance, pause, seconds = random.Random(0), threading.Event(), 0.0
    with forming(folder) as group, Solves(group.connect) as solves:
        before = group.process("leader"), group.process("rank")
        for _ in range(PULSES):
            length = chance.uniform(0.5, 0.8) * failure.silence_seconds(0.0)
            group.signal("rank", signal.SIGSTOP)
            pause.wait(length)
            group.signal("rank", signal.SIGCONT)
            solves.wait_for_each()
            seconds += length
        if (group.process("leader"), group.process("rank")) != before:
            raise RuntimeError("a group with a slow rank has ended")
        return Outcome(seconds, solves.wrong, len(solves.errors))
