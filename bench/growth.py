"""What more objectives, points, elements and clients cost those who are there already: latency of one caller and memory of the
server. Each crowded server is measured in turns with one that has one of everything.
"""

import contextlib
import dataclasses
import itertools
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

# Everything is found by a dictionary, so nothing gets slower; a client that is connected has an idle stream and its thread.
PREDICTED_LATENCY = {"objectives": 1.0, "points": 1.02, "clients": 1.02}
# MiB: what a server has with one of everything (Python, jax, gRPC), and what each further one adds: compiled programs and their
# StableHLO; x and gradient; a connection, a stream, a thread.
PREDICTED_BASE = 330.0
PREDICTED_EACH = {"objectives": 1.0, "points": 0.02, "clients": 0.15}


def predicted_milliseconds(n: int) -> float:
    """A product of float32 vectors: 0.65 ms, and 1.2 GB/s."""
    return 0.65 + 4 * n / 1.2e6


def predicted_mebibytes(n: int) -> float:
    """At rest: x and gradient beside the server itself."""
    return PREDICTED_BASE + 2 * 4 * n / 2**20


@dataclasses.dataclass
class _Crowd:
    """A server with one caller, and how to put more of something on it."""

    server: _processes.Child
    call: Callable[[], object]
    grow: Callable[[int], None]
    """Until there are so many."""


@contextlib.contextmanager
def _objectives() -> Iterator[_Crowd]:
    """The caller stays with the first; every objective has been multiplied with once."""
    with _processes.serving() as server, hvpd.connect(_processes.address(server)) as client:
        v = normal(6, _N)
        hessians: list[LinearOperator] = []

        def grow(count: int) -> None:
            for index in range(len(hessians), count):
                problem = quartic(_N, 1.0 + index)
                objective = client.register(problem.fun, problem.x)
                hessians.append(objective.at(problem.x).hessian())
                hessians[-1] @ v
                if index == 0:
                    _warm.vectors(objective, hessians[0])
                if index == count - 1:
                    _warm.checked(objective)

        grow(1)
        yield _Crowd(server, lambda: hessians[0] @ v, grow)


@contextlib.contextmanager
def _points() -> Iterator[_Crowd]:
    """The caller goes round all points."""
    with _processes.serving() as server, hvpd.connect(_processes.address(server)) as client:
        problem, v = quartic(_N), normal(6, _N)
        objective = _warm.registered(client, problem)
        hessians = [objective.at(problem.x).hessian()]
        _warm.vectors(objective, hessians[0])
        turns = itertools.count()

        def grow(count: int) -> None:
            for index in range(len(hessians), count):
                hessians.append(objective.at(normal(100 + index, _N)).hessian())
                for _ in range(3):  # Until residuals are there, if that is what the server does.
                    hessians[-1] @ v

        yield _Crowd(server, lambda: hessians[next(turns) % len(hessians)] @ v, grow)


@contextlib.contextmanager
def _clients() -> Iterator[_Crowd]:
    """The caller is the first; the others have asked once, and stay connected."""
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

        yield _Crowd(server, lambda: H @ v, grow)


CROWDS = {
    "objectives": (_objectives, (1, 10, 100, 1000)),
    "points": (_points, (1, 10, 100, 1000)),
    "clients": (_clients, (1, 4, 16, 64, 256)),
}


def run(*, quick: bool) -> Iterator[Figure]:
    """Yields latency and memory against each kind of crowd, then against n."""
    rounds, seconds = (3, 0.02) if quick else (25, 0.1)
    for what, (crowd, counts) in CROWDS.items():
        with crowd() as one, crowd() as many:
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
