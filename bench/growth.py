"""The cost of more objectives, points, elements and clients: one caller's latency, and
the server's memory; for objectives also the time of a registration. Each server with
many objects is measured in turns with a server that has one of each kind.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np
from scipy.sparse.linalg import LinearOperator

import hvpd
from bench import _processes, _timing, _warm
from bench._objectives import identity, normal, quartic
from bench._report import Figure, Goal, measured, skipped

BENCH = "growth"
GOAL = Goal("<=", 1.10)
_N = 1_000

_ENDS = 10
"""Number of first and of last registrations that are compared."""

# Dictionaries find everything, so nothing gets slower. A connected client has an idle
# stream and its thread.
PREDICTED_LATENCY = {"objectives": 1.0, "points": 1.02, "clients": 1.02}
# MiB of a server with one of everything (Python, jax, gRPC), and of each further one.
# An objective has compiled programs and StableHLO, a point has x and a gradient, and a
# client has a connection, a stream and a thread.
PREDICTED_BASE = 330.0
PREDICTED_EACH = {"objectives": 1.0, "points": 0.02, "clients": 0.15}
# A registration reads nothing of other objectives.
PREDICTED_REGISTRATION = 1.0


def predicted_milliseconds(n: int) -> float:
    """Return the predicted milliseconds of a product of float32 vectors: 0.65 ms, and
    1.2 GB/s.
    """
    return 0.65 + 4 * n / 1.2e6


def predicted_mebibytes(n: int) -> float:
    """Return the predicted memory at rest: x and gradient beside the server itself."""
    return PREDICTED_BASE + 2 * 4 * n / 2**20


@dataclasses.dataclass
class _Measured:
    """A server with one caller, and a function that adds objects of one kind."""

    server: _processes.Child
    call: Callable[[], object]
    grow: Callable[[int], None]
    """Add until there are so many."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Seconds that each object took until its first product, if that is measured."""


@contextlib.contextmanager
def _objectives() -> Iterator[_Measured]:
    """Add objectives. The caller stays with the first. Each has had one product."""
    with _processes.serving() as server, hvpd.connect(_processes.address(server)) as client:
        v = normal(6, _N)
        hessians: list[LinearOperator] = []
        seconds: list[float] = []

        def grow(count: int) -> None:
            for index in range(len(hessians), count):
                problem, started = quartic(_N, 1.0 + index), time.perf_counter()
                objective = client.register(problem.fun, problem.x)
                hessians.append(objective.at(problem.x).hessian())
                hessians[-1] @ v
                seconds.append(time.perf_counter() - started)
                if index == 0:
                    _warm.vectors(objective, hessians[0])
                if index == count - 1:
                    _warm.checked(objective)

        grow(1)
        yield _Measured(server, lambda: hessians[0] @ v, grow, seconds)


@contextlib.contextmanager
def _points() -> Iterator[_Measured]:
    """Add points. The caller goes round all of them."""
    with _processes.serving() as server, hvpd.connect(_processes.address(server)) as client:
        problem, v = quartic(_N), normal(6, _N)
        objective = _warm.registered(client, problem)
        hessians = [objective.at(problem.x).hessian()]
        _warm.vectors(objective, hessians[0])
        turns = itertools.count()

        def grow(count: int) -> None:
            for index in range(len(hessians), count):
                hessians.append(objective.at(normal(100 + index, _N)).hessian())
                for _ in range(3):  # The server may choose to keep residuals after some products.
                    hessians[-1] @ v

        yield _Measured(server, lambda: hessians[next(turns) % len(hessians)] @ v, grow)


@contextlib.contextmanager
def _clients() -> Iterator[_Measured]:
    """Add clients. The caller is the first. The others have asked once, and stay
    connected.
    """
    with _processes.serving() as server, contextlib.ExitStack() as connections:
        problem, v = quartic(_N), normal(6, _N)

        def connect() -> hvpd.Client:
            return connections.enter_context(hvpd.connect(_processes.address(server)))

        clients = [connect()]
        objective = _warm.registered(clients[0], problem)
        H = objective.at(problem.x).hessian()
        _warm.vectors(objective, H)

        def grow(count: int) -> None:
            while len(clients) < count:
                clients.append(connect())
                clients[-1].objective(objective.digest).at(problem.x).hessian() @ v

        yield _Measured(server, lambda: H @ v, grow)


KINDS = {
    "objectives": (_objectives, (1, 10, 100, 1000)),
    "points": (_points, (1, 10, 100, 1000)),
    "clients": (_clients, (1, 4, 16, 64, 256)),
}


def run(*, quick: bool) -> Iterator[Figure]:
    """Yield latency and memory by the number of objects of each kind, then by n."""
    rounds, seconds = (3, 0.02) if quick else (25, 0.1)
    for what, (open_server, counts) in KINDS.items():
        with open_server() as one, open_server() as many:
            for count in counts[: 2 if quick else None]:
                many.grow(count)
                times = _timing.interleave({"many": many.call, "one": one.call}, rounds=rounds, seconds=seconds)
                found = {name: np.array(of_round) for name, of_round in times.items()}
                label = f"{count:,} {what if count > 1 else what.removesuffix('s')}"
                goal = GOAL if what == "objectives" and count == 1000 else None
                ratio, expected = found["many"] / found["one"], PREDICTED_LATENCY[what] if count > 1 else 1.0
                yield measured(
                    BENCH, f"{label}: latency over one's", "", ratio, n=_N, k=1, predicted=expected, goal=goal
                )
                milliseconds, expected = found["many"] * 1e3, predicted_milliseconds(_N)
                yield measured(BENCH, f"{label}: latency", "ms", milliseconds, n=_N, k=1, predicted=expected)
                memory = _processes.resident_bytes(many.server.pid) / 2**20
                expected = PREDICTED_BASE + PREDICTED_EACH[what] * (count - 1)
                yield measured(BENCH, f"{label}: memory of the server", "MiB", [memory], n=_N, k=1, predicted=expected)
                if count >= 2 * _ENDS and many.seconds:
                    # The first object also waits for imports and first uses.
                    ratio = np.array(many.seconds[-_ENDS:]) / np.median(many.seconds[1 : 1 + _ENDS])
                    label = f"{label}: registration over the first ones'"
                    yield measured(BENCH, label, "", ratio, n=_N, predicted=PREDICTED_REGISTRATION)
    for power in range(3, 6 if quick else 9):
        yield from _elements(10**power, rounds=rounds, seconds=seconds)


def _elements(n: int, *, rounds: int, seconds: float) -> Iterator[Figure]:
    needs = 16 * 4 * n
    if needs > _processes.available_bytes():
        why = f"needs {needs >> 30} GiB of memory on this machine"
        yield skipped(BENCH, "latency against n", "ms", why, n=n, k=1, predicted=predicted_milliseconds(n))
        return
    with _processes.serving() as server, hvpd.connect(_processes.address(server)) as client:
        problem, v = identity(n), normal(6, n)
        objective = _warm.registered(client, problem)
        H = objective.at(problem.x).hessian()
        _warm.vectors(objective, H)
        times = _timing.interleave({"product": lambda: H @ v}, rounds=rounds if n < 10**7 else 5, seconds=seconds)
        milliseconds = np.array(times["product"]) * 1e3
        yield measured(BENCH, "latency against n", "ms", milliseconds, n=n, k=1, predicted=predicted_milliseconds(n))
        memory = _processes.resident_bytes(server.pid) / 2**20
        yield measured(
            BENCH, "memory of the server against n", "MiB", [memory], n=n, k=1, predicted=predicted_mebibytes(n)
        )
