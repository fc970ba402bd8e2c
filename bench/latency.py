"""One caller, warm, at a resident point: a product over its floor, which is the bare
echo of its bytes and the same compiled program called in process. The barest handler
around that program is measured, too.
"""

import contextlib
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

# By n. The design's prototype took 1.17 to 1.22 times the floor, with hand-offs that
# are gone. SciPy's operator, protobuf and a few copies remain: some 0.1 ms, and 10 % of
# the transport. In the largest size, compute (1.6 GFLOP at some 70 GFLOP/s) outweighs
# the wire. But a product waits for its whole vector before it answers, and an echo does
# not.
PREDICTED = {
    6_160: {
        "over floor": 1.15,
        "handler over floor": 1.17,
        "product": 0.85,
        "stream echo": 0.42,
        "unary echo": 0.55,
        "in process": 0.3,
        "over socket floor": 1.6,
        "over floor by gRPC": 1.65,
        "socket echo": 0.06,
    },
    269_322: {
        "over floor": 1.2,
        "handler over floor": 1.2,
        "product": 9.0,
        "stream echo": 2.5,
        "unary echo": 4.0,
        "in process": 5.0,
        "over socket floor": 1.15,
        "over floor by gRPC": 1.35,
        "socket echo": 0.8,
    },
    1_863_690: {
        "over floor": 1.15,
        "handler over floor": 1.1,
        "product": 35.0,
        "stream echo": 8.0,
        "unary echo": 25.0,
        "in process": 22.0,
        "over socket floor": 1.05,
        "over floor by gRPC": 1.22,
        "socket echo": 5.0,
    },
}


def run(*, quick: bool) -> Iterator[Figure]:
    """Yield the figures of each size."""
    with contextlib.ExitStack() as stack:
        echo = stack.enter_context(_floor.echoing())
        clients = []
        for flags in ((), ("--vector-port", "off")):
            server = stack.enter_context(_processes.serving(None, *flags))
            clients.append(stack.enter_context(hvpd.connect(_processes.address(server))))
        for n, (sizes, rows) in list(_SIZES.items())[: 1 if quick else None]:
            problem = mlp(sizes, rows)
            assert problem.n == n
            objectives = [_warm.registered(client, problem) for client in clients]
            H, by_grpc = (objective.at(problem.x).hessian() for objective in objectives)
            program = _warm.vectors(objectives[0], H)
            _warm.vectors(objectives[1], by_grpc)
            with _handler.handling(program, rows, sizes) as address, _floor.channel(address) as handler:
                yield from _figures(problem, H, by_grpc, program, echo, handler, quick=quick)


def _figures(
    problem: Problem,
    H: hvpd.CurvatureOperator,
    by_grpc: hvpd.CurvatureOperator,
    program: str,
    echo: _floor.Echo,
    handler: _floor.Channel,
    *,
    quick: bool,
) -> Iterator[Figure]:
    n, v = problem.n, normal(6, problem.n)
    with _floor.channel(echo.address) as channel:
        socket = _floor.SocketEcho(echo.tcp, v.tobytes())
        contenders: dict[str, _timing.Call] = {
            "product": lambda: H @ v,
            "stream echo": _floor.StreamEcho(channel, v.tobytes()),
            "in process": Programs(problem).call(program, 1),
            "by gRPC": lambda: by_grpc @ v,
            "handler": _floor.StreamEcho(handler, v.tobytes(), whole=True),
            "unary echo": _floor.UnaryEcho(channel, v.tobytes()),
            "socket echo": socket,
        }
        times = _timing.interleave(contenders, rounds=3 if quick else 25, seconds=0.02 if quick else 0.2)
        socket.close()
    found, predicted = {name: np.array(seconds) for name, seconds in times.items()}, PREDICTED[n]
    floor, least = found["stream echo"] + found["in process"], found["socket echo"] + found["in process"]
    over = {
        "product over floor": (found["product"] / floor, "over floor"),
        "product by gRPC over floor": (found.pop("by gRPC") / floor, "over floor by gRPC"),
        "bare handler over floor": (found.pop("handler") / floor, "handler over floor"),
        "product over socket and program": (found["product"] / least, "over socket floor"),
    }
    for figure, (ratio, name) in over.items():
        goal = GOAL if name == "over floor" else None
        yield measured(BENCH, figure, "", ratio, n=n, k=1, predicted=predicted[name], goal=goal)
    for name, seconds in found.items():
        figure = f"{name} ({program})" if name == "in process" else name
        yield measured(BENCH, figure, "ms", seconds * 1e3, n=n, k=1, predicted=predicted[name])
