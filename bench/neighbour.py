"""One caller's products while another client uses the server: its worst product while
the server reads and compiles a program of 100,000 operations, and its 99th percentile
while a Krylov run takes thousands of steps.
"""

import sys
import time
from collections.abc import Iterator

import numpy as np
from scipy.sparse.linalg import LinearOperator

import hvpd
from bench import _processes, _stepping, _warm
from bench._objectives import Vector, mlp, normal
from bench._report import Figure, Goal, measured
from hvpd_server.krylov.launcher import LAUNCH_SECONDS

BENCH = "neighbour"
PARTS = ("registration", "run")
OPERATIONS = 100_000
SECONDS = 20.0
GOAL = Goal("<=", 3.0)
PREDICTED = 2.0
"""Processes of lower priority read and compile the program. They share two cores with
the server and its caller.
"""

RUN_STEPS = 500
"""Steps of a run. Runs follow each other, which makes 10,000 steps and more."""

RUN_SECONDS = 2.5
"""Seconds of one measurement, of some 120 products beside launches. The whole part
should end within 100 seconds.
"""

GOAL_RUN = Goal("<=", 1.25)
"""The rise of the 99th percentile over the time that is planned for a launch. Launches
differ in length, because each is planned by the time of the launch before it.
"""
PREDICTED_RUN = {"lanczos": 1.1, "cg": 1.1, "products": 0.03}
"""A caller that asks again at once meets a launch that has just begun, and waits for
the whole of it. A single product takes 0.2 ms, and the steps around it take time of the
server's Python and of the two cores, too: three products' time.
"""

_CG = r'hvpd_launches_total{program="cg_(hvp|apply)"}'
"""Launches of several steps of CG, whose program is compiled while CG runs."""


def run(*, quick: bool, part: str | None = None) -> Iterator[Figure]:
    """Measure a caller's products alone, and beside another client, in turns."""
    if part in ("registration", None):
        yield from _registration(quick=quick)
    if part in ("run", None):
        yield from _run(quick=quick)


def _registration(*, quick: bool) -> Iterator[Figure]:
    operations, rounds, seconds = (2_000, 1, 1.0) if quick else (OPERATIONS, 3, SECONDS)
    ratios, alone, beside = [], [], []
    for _ in range(rounds):
        with _processes.serving() as server, hvpd.connect(_processes.address(server)) as client:
            problem = mlp((64, 64, 10), 100)
            objective = _warm.registered(client, problem, name="bench/neighbour")
            H = objective.at(problem.x).hessian()
            _warm.vectors(objective, H)
            v = normal(7, problem.n)
            alone.append(_products(H, v, seconds).max())
            argv = [sys.executable, "-m", "bench._large", _processes.address(server), str(operations)]
            with _processes.child(argv, "registering"):
                beside.append(_products(H, v, seconds).max())
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


def _run(*, quick: bool) -> Iterator[Figure]:
    rounds, seconds = (1, 1.0) if quick else (5, RUN_SECONDS)
    methods = list(_stepping.METHODS)[: 1 if quick else None]
    alone: list[float] = []
    beside: dict[str, list[float]] = {method: [] for method in methods}
    launches: dict[str, list[float]] = {method: [] for method in methods}
    with _processes.serving(None, "--metrics-port", "0") as server, hvpd.connect(_processes.address(server)) as client:
        problem = _stepping.problem(500)
        objective = _warm.registered(client, problem, name="bench/neighbour")
        H = objective.at(problem.x).hessian()
        _warm.vectors(objective, H)
        v = normal(7, problem.n)
        for method in methods:
            alone.append(_p99(_products(H, v, seconds)))
            # Another number of rows is another program, with figures of its own.
            argv = [sys.executable, "-m", "bench._stepping", _processes.address(server), method, "501"]
            with _processes.child([*argv, str(RUN_STEPS)], "stepping"):
                _warm.until(lambda: method != "cg" or _processes.metric(server, _CG) > 0)  # noqa: B023 - called here
                for _ in range(rounds):
                    before = _launches(server)
                    beside[method].append(_p99(_products(H, v, seconds)))
                    count, total = np.subtract(_launches(server), before)
                    launches[method].append(total / count)
    for method in methods:
        label, launch = _stepping.METHODS[method], np.array(launches[method])
        yield measured(
            BENCH,
            f"{label}: rise of the neighbour's p99, over {LAUNCH_SECONDS * 1e3:g} ms",
            "",
            (np.array(beside[method]) - np.median(alone)) / LAUNCH_SECONDS,
            n=problem.n,
            predicted=PREDICTED_RUN[method],
            goal=GOAL_RUN,
        )
        yield measured(BENCH, f"{label}: mean launch", "ms", launch * 1e3, n=problem.n)
        yield measured(BENCH, f"{label}: p99 beside it", "ms", np.array(beside[method]) * 1e3, n=problem.n)
    yield measured(BENCH, "p99 alone", "ms", np.array(alone) * 1e3, n=problem.n)


def _launches(server: _processes.Child) -> tuple[float, float]:
    """Return the number of launches at the run's objective, and their seconds."""
    labels = rf'{{objective="{_stepping.NAME}",[^}}]*}}'
    count, total = (
        _processes.metric(server, f"hvpd_usage_compute_seconds_{each}{labels}") for each in ("count", "sum")
    )
    return count, total


def _products(H: LinearOperator, v: Vector, seconds: float) -> Vector:
    """Return the seconds of each product within so many seconds."""
    ends, found = time.perf_counter() + seconds, list[float]()
    while (started := time.perf_counter()) < ends:
        _ = H @ v
        found.append(time.perf_counter() - started)
    return np.array(found)


def _p99(seconds: Vector) -> float:
    return float(np.quantile(seconds, 0.99))
