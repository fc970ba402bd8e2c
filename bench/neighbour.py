"""One caller's worst product while the server reads and compiles another client's
program of 100,000 operations.
"""

import sys
import time
from collections.abc import Iterator

import numpy as np
from scipy.sparse.linalg import LinearOperator

import hvpd
from bench import _processes, _warm
from bench._objectives import Vector, mlp, normal
from bench._report import Figure, Goal, measured

BENCH = "neighbour"
OPERATIONS = 100_000
SECONDS = 20.0
GOAL = Goal("<=", 3.0)
PREDICTED = 2.0
"""Processes of lower priority read and compile the program. They share two cores with
the server and its caller.
"""


def run(*, quick: bool) -> Iterator[Figure]:
    """Measure a caller's products alone, and then while the program is registered, in
    turns.
    """
    operations, rounds, seconds = (2_000, 1, 1.0) if quick else (OPERATIONS, 3, SECONDS)
    ratios, alone, beside = [], [], []
    for _ in range(rounds):
        with _processes.serving() as server, hvpd.connect(_processes.address(server)) as client:
            problem = mlp((64, 64, 10), 100)
            objective = _warm.registered(client, problem, name="bench/neighbour")
            H = objective.at(problem.x).hessian()
            _warm.vectors(objective, H)
            v = normal(7, problem.n)
            alone.append(_products(H, v, seconds))
            argv = [sys.executable, "-m", "bench._large", _processes.address(server), str(operations)]
            with _processes.child(argv, "registering"):
                beside.append(_products(H, v, seconds))
            ratios.append(beside[-1] / alone[-1])
    label = f"{operations:,} operations"
    yield measured(
        BENCH,
        f"{label}: worst product beside over alone",
        "",
        np.array(ratios),
        n=problem.n,
        predicted=PREDICTED,
        goal=GOAL,
    )
    yield measured(BENCH, f"{label}: worst product alone", "ms", np.array(alone) * 1e3, n=problem.n)
    yield measured(BENCH, f"{label}: worst product beside", "ms", np.array(beside) * 1e3, n=problem.n)


def _products(H: LinearOperator, v: Vector, seconds: float) -> float:
    """Return the seconds of the slowest product within so many seconds."""
    ends, worst = time.perf_counter() + seconds, 0.0
    while time.perf_counter() < ends:
        started = time.perf_counter()
        _ = H @ v
        worst = max(worst, time.perf_counter() - started)
    return worst
