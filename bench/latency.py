"""One caller, warm, at a resident point: a product over what nobody can avoid, the bare echo of its bytes and the same compiled
program called in process; and what the barest handler around that program makes of it.
"""

from collections.abc import Iterator

import numpy as np

import hvpd
from bench import _floor, _handler, _processes, _timing, _warm
from bench._objectives import Problem, mlp, normal
from bench._programs import Programs
from bench._report import Figure, Goal, measured

BENCH = "latency"
GOAL = Goal("<=", 1.10)

_SIZES = {6_160: ((64, 82, 10), 500), 269_322: ((784, 256, 256, 10), 250), 1_863_690: ((784, 1024, 1024, 10), 100)}

# By n. The prototype of the design took 1.17 to 1.22 times the floor with hand-offs that are gone now; what is left are SciPy's
# operator, protobuf and a few copies, some 0.1 ms and 10 % of the transport. In the largest, compute (1.6 GFLOP at some 70 GFLOP/s)
# outweighs the wire; but a product waits for its whole vector before it answers, and an echo does not.
PREDICTED = {
    6_160: {
        "over floor": 1.15,
        "handler over floor": 1.17,
        "product": 0.85,
        "stream echo": 0.42,
        "unary echo": 0.55,
        "in process": 0.3,
    },
    269_322: {
        "over floor": 1.2,
        "handler over floor": 1.2,
        "product": 9.0,
        "stream echo": 2.5,
        "unary echo": 4.0,
        "in process": 5.0,
    },
    1_863_690: {
        "over floor": 1.15,
        "handler over floor": 1.1,
        "product": 35.0,
        "stream echo": 8.0,
        "unary echo": 25.0,
        "in process": 22.0,
    },
}


def run(*, quick: bool) -> Iterator[Figure]:
    """Yields the figures of one size after the other."""
    with _floor.echoing() as echo, _processes.serving() as server, hvpd.connect(_processes.address(server)) as client:
        for n, (sizes, rows) in list(_SIZES.items())[: 1 if quick else None]:
            problem = mlp(sizes, rows)
            assert problem.n == n
            objective = _warm.registered(client, problem)
            H = objective.at(problem.x).hessian()
            program = _warm.vectors(objective, H)
            with _handler.handling(program, rows, sizes) as address, _floor.channel(address) as handler:
                yield from _figures(problem, H, program, echo, handler, quick=quick)


def _figures(
    problem: Problem,
    H: hvpd.CurvatureOperator,
    program: str,
    echo: _floor.Echo,
    handler: _floor.Channel,
    *,
    quick: bool,
) -> Iterator[Figure]:
    n, v = problem.n, normal(6, problem.n)
    with _floor.channel(echo.address) as channel:
        contenders: dict[str, _timing.Call] = {
            "product": lambda: H @ v,
            "stream echo": _floor.StreamEcho(channel, v.tobytes()),
            "in process": Programs(problem).call(program, 1),
            "handler": _floor.StreamEcho(handler, v.tobytes(), whole=True),
            "unary echo": _floor.UnaryEcho(channel, v.tobytes()),
        }
        times = _timing.interleave(contenders, rounds=3 if quick else 25, seconds=0.02 if quick else 0.2)
    found, predicted = {name: np.array(seconds) for name, seconds in times.items()}, PREDICTED[n]
    floor, handled = found["stream echo"] + found["in process"], found.pop("handler")
    over, bare = found["product"] / floor, handled / floor
    yield measured(BENCH, "product over floor", "", over, n=n, k=1, predicted=predicted["over floor"], goal=GOAL)
    yield measured(BENCH, "bare handler over floor", "", bare, n=n, k=1, predicted=predicted["handler over floor"])
    for name, seconds in found.items():
        figure = f"{name} ({program})" if name == "in process" else name
        yield measured(BENCH, figure, "ms", seconds * 1e3, n=n, k=1, predicted=predicted[name])
