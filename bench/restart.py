"""The time from exec to SERVING with 20 objectives in the store: with their compiled
programs in its cache, and without.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

import hvpd
from bench import _processes, _warm
from bench._objectives import mlp
from bench._report import Figure, measured

BENCH = "restart"
OBJECTIVES = 20


def predictions(objectives: int) -> dict[str, float]:
    """Return the predicted seconds. Importing Python, jax and gRPC takes about 2. Cold,
    two programs of each objective compile on two threads, 0.25 each. Warm, they are
    read, parsed and loaded, 0.04 each, mostly under the interpreter's lock.
    """
    warm, cold = 2 + 2 * 0.04 * objectives, 2 + 0.25 * objectives
    return {"warm": warm, "cold": cold, "warm over cold": warm / cold}


def run(*, quick: bool) -> Iterator[Figure]:
    """Fill a store, then start servers on it and on copies of it that have no cache, in
    turns.
    """
    objectives, rounds = (2, 1) if quick else (OBJECTIVES, 5)
    with tempfile.TemporaryDirectory(prefix="hvpd-bench-", ignore_cleanup_errors=True) as folder:
        store, n = Path(folder, "warm"), 0
        with _processes.serving(store) as server, hvpd.connect(_processes.address(server)) as client:
            for index in range(objectives):
                problem = mlp((64, 64 + index, 10), 100)
                objective = _warm.registered(client, problem, name=f"bench/{index}")
                _warm.vectors(objective, objective.at(problem.x).hessian())
                n = problem.n
        found: dict[str, list[tuple[float, float]]] = {"warm": [], "cold": []}
        for _ in range(rounds):
            found["warm"].append(_start(store))
            cold = Path(folder, "cold")
            shutil.copytree(store, cold, ignore=lambda path, names: names if Path(path) == store / "cache" else [])
            found["cold"].append(_start(cold))
            shutil.rmtree(cold)
    seconds = {kind: np.array(starts) for kind, starts in found.items()}
    label, predicted = f"{objectives} objectives", predictions(objectives)
    ratio = seconds["warm"][:, 1] / seconds["cold"][:, 1]
    yield measured(BENCH, f"{label}: warm cache over cold", "", ratio, n=n, predicted=predicted["warm over cold"])
    for kind, starts in seconds.items():
        for column, event in enumerate(("until the ready line", "until health says SERVING")):
            yield measured(BENCH, f"{label}: {kind} {event}", "s", starts[:, column], n=n, predicted=predicted[kind])


def _start(store: Path) -> tuple[float, float]:
    """Return the seconds from exec until a server prints its ready line, and until its
    health is SERVING.
    """
    started = time.perf_counter()
    with _processes.serving(store) as server, grpc.insecure_channel(_processes.address(server)) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        while health.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True).status != serving:
            time.sleep(0.001)
        return server.seconds, time.perf_counter() - started
