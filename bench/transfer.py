"""One vector of 1 KiB to 256 MiB goes through a product that computes next to nothing.

The figures are its rate over that of bare echoes, and the most memory that it takes on
either side, over its own size.
"""

import os
from collections.abc import Iterator, Mapping

import numpy as np

import hvpd
from bench import _floor, _processes, _timing, _warm
from bench._objectives import identity, normal
from bench._programs import Programs
from bench._report import Figure, Goal, measured, skipped

BENCH = "transfer"
GOAL = Goal(">=", 0.9)
GOAL_FROM_BYTES = 1 << 20

SIZES = [1 << 10 << (2 * power) for power in range(10)]
"""Sizes of the vector in bytes."""

# Vectors in memory while a product runs: V and HV on the server, HV on the client (V is
# the caller's own), and a few chunks.
MEMORY_GOALS = {"server": Goal("<=", 2.25), "client": Goal("<=", 1.25)}
_MEMORY_FROM_BYTES = 16 << 20
"""Smallest vector whose memory is measured. Below, allocators and compilers take more
memory than the vector.
"""
_MEMORY_GOAL_FROM_BYTES = 64 << 20
_PREDICTED_MEMORY = {"server": 2.25, "client": 1.1}

_MODE = "reverse_over_forward"
"""A mode with one program, so that neither residuals nor compiles count as the
message's memory.
"""

_NEEDS = 25
"""Vectors of a size that must fit into the machine's memory to measure that size. Both
sides hold x, gradient, V, HV and their copies, and the echoes' payloads.
"""


def predictions(size: int) -> Mapping[str, float]:
    """Return the predictions for a vector of so many bytes, by figure.

    An echo of gRPC takes 0.4 ms and then moves 1.9 GB/s, a raw one 0.05 ms and 2.5
    GB/s. A product adds 0.25 ms of its own. Since it has all of V before the first
    byte of HV leaves, sends and receives take turns: 1.2 GB/s, from 1 MiB up.
    """
    grpc, tcp, product = 4e-4 + size / 1.9e9, 5e-5 + size / 2.5e9, 6.5e-4 + size / 1.2e9
    return {
        "over gRPC echo": grpc / product,
        "over gRPC echo and program in process": (grpc + size / 10e9) / product,
        "over gRPC echo of the whole": (4e-4 + size / 1.3e9) / product,
        "over TCP echo": tcp / product,
        "product": size / product / 1e6,
        "gRPC echo": size / grpc / 1e6,
        "TCP echo": size / tcp / 1e6,
    }


def run(*, quick: bool) -> Iterator[Figure]:
    """Yield the figures of each size."""
    with _floor.echoing() as echo, _processes.serving() as server, hvpd.connect(_processes.address(server)) as client:
        for size in SIZES[: 5 if quick else None]:
            if _NEEDS * size > _processes.available_bytes():
                yield skipped(
                    BENCH, f"{_label(size)}: all", "", f"needs {_NEEDS} such vectors of memory", n=size // 4, k=1
                )
            else:
                yield from _figures(size, echo, server, client, quick=quick)


def _figures(
    size: int, echo: _floor.Echo, server: _processes.Child, client: hvpd.Client, *, quick: bool
) -> Iterator[Figure]:
    n, label, predicted = size // 4, _label(size), predictions(size)
    problem = identity(n)
    objective = _warm.registered(client, problem, mode=_MODE)
    H = objective.at(problem.x).hessian()
    v = normal(6, n)
    _warm.compiled(objective, 1)

    pids = {"server": server.pid, "client": os.getpid()}
    before = {side: _processes.resident_bytes(pid) for side, pid in pids.items()}
    for pid in pids.values():
        _processes.reset_peak(pid)
    for _ in range(4):
        H @ v
    peak = {side: (_processes.peak_bytes(pid) - before[side]) / size for side, pid in pids.items()}

    with _floor.channel(echo.address) as channel:
        payload = v.tobytes()
        tcp = _floor.SocketEcho(echo.tcp, payload)
        contenders: dict[str, _timing.Call] = {
            "product": lambda: H @ v,
            "gRPC": _floor.StreamEcho(channel, payload),
            "whole": _floor.StreamEcho(channel, payload, whole=True),
            "TCP": tcp,
            "program": Programs(problem, mode=_MODE).call("hvp", 1),
        }
        times = _timing.interleave(contenders, rounds=3 if quick else 15, seconds=0.02 if quick else 0.1)
        tcp.close()
    found = {name: np.array(seconds) for name, seconds in times.items()}
    ratios = {
        "over gRPC echo": found["gRPC"] / found["product"],
        "over gRPC echo and program in process": (found["gRPC"] + found["program"]) / found["product"],
        "over gRPC echo of the whole": found["whole"] / found["product"],
        "over TCP echo": found["TCP"] / found["product"],
    }
    for name, ratio in ratios.items():
        goal = GOAL if name == "over gRPC echo" and size >= GOAL_FROM_BYTES else None
        yield measured(BENCH, f"{label}: {name}", "", ratio, n=n, k=1, predicted=predicted[name], goal=goal)
    for name, seconds in {"product": "product", "gRPC echo": "gRPC", "TCP echo": "TCP"}.items():
        rates = size / found[seconds] / 1e6
        yield measured(BENCH, f"{label}: {name}", "MB/s", rates, n=n, k=1, predicted=predicted[name])
    if size >= _MEMORY_FROM_BYTES:
        for side, vectors in peak.items():
            goal = MEMORY_GOALS[side] if size >= _MEMORY_GOAL_FROM_BYTES else None
            figure = f"{label}: peak memory of {side}"
            expected = _PREDICTED_MEMORY[side]
            yield measured(BENCH, figure, "vectors", [vectors], n=n, k=1, predicted=expected, goal=goal)


def _label(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
