"""`python -m bench._version ROWS LAYER...`: one client with an embedded server, for
`bench versions`.

Each line on stdin is an order: the number of callers, the number of points, and
seconds. Callers go round the points. The answer is the median time of a product in
seconds.
"""

import sys
import threading
import time
from typing import Any

import numpy as np

import hvpd
from bench import _warm
from bench._objectives import mlp, normal

_MOST = 8
"""Most callers, and most points."""


def main() -> None:
    """Take orders until stdin ends."""
    rows, *layers = map(int, sys.argv[1:])
    problem = mlp(layers, rows)
    with hvpd.local() as client:
        objective = _warm.registered(client, problem)
        flat = objective.ravel(problem.x)
        operators = [objective.at(flat * (1 + 0.01 * index)).hessian() for index in range(_MOST)]
        H = operators[0]
        _warm.vectors(objective, H)
        vectors = [normal(seed, problem.n) for seed in range(_MOST)]
        for width in (2, 4, 8):
            H @ np.stack(vectors[:width], axis=1)  # Otherwise these widths compile during the first rounds.
        while any(each.state in ("queued", "compiling") for each in objective.compiles()):
            H @ vectors[0]
        print("ready", file=sys.stderr, flush=True)
        for line in sys.stdin:
            callers, points, seconds = line.split()
            work = [(operators[index % int(points)], vectors[index]) for index in range(int(callers))]
            print(_product(work, float(seconds)), flush=True)


def _product(work: list[tuple[Any, Any]], seconds: float) -> float:
    """Return the median time of a product while one thread for each operator and vector
    multiplies them again and again.
    """
    times: list[float] = []
    ends = time.perf_counter() + seconds

    def multiply(H: Any, v: Any) -> None:
        while (started := time.perf_counter()) < ends or not times:
            H @ v
            times.append(time.perf_counter() - started)

    threads = [threading.Thread(target=multiply, args=each) for each in work[1:]]
    for thread in threads:
        thread.start()
    multiply(*work[0])
    for thread in threads:
        thread.join()
    return float(np.median(times))


if __name__ == "__main__":
    main()
