"""A client on the server's machine: products by gRPC, by TCP, by the server's Unix
socket and by shared memory, of a small vector and of a large one.

The small vector's figures are round trips over those by TCP. The large one's are over
the same program in process, with and without copies of V and HV, and the most memory
that each side takes.
"""

import contextlib
import os
from collections.abc import Iterator

import numpy as np

import hvpd
from bench import _floor, _processes, _timing, _warm
from bench._objectives import identity, normal
from bench._programs import Programs, aligned
from bench._report import Figure, Goal, measured

BENCH = "samehost"
SMALL_BYTES, LARGE_BYTES = 1 << 10, 64 << 20

GOAL_SMALL = Goal("<=", 0.7)
"""Goal for a round trip by the Unix socket over one by TCP."""
GOAL_LARGE = Goal("<=", 1.3)
"""Goal for the best way of a large product over the same program in process, which
copies V into the device and HV out of it.
"""

WAYS = ("gRPC", "TCP", "Unix socket", "shared memory")
"""Ways of a product. A small one does not use shared memory."""

_MODE = "reverse_over_forward"
"""A mode with one program, so that neither residuals nor compiles count as the
message's memory.
"""

# A bare echo of 1 KiB takes 0.029 ms by a Unix socket and 0.051 by TCP. A product adds
# some 0.08 ms of Python and XLA, which are the same in both. 64 MiB take 25 ms in
# process, most of them for the fresh pages of the result. `transfer` moves them at 1
# GB/s by TCP, and at half of that by gRPC. A Unix socket saves TCP's packets. By shared
# memory, V is copied once and HV twice, at 5 GB/s. A device copies each once.
PREDICTED = {
    "1 KiB: echo by Unix socket over TCP": 0.57,
    "1 KiB: product by Unix socket over TCP": 0.85,
    "1 KiB: product by gRPC over TCP": 3.0,
    "64 MiB: by gRPC over in process": 5.0,
    "64 MiB: by TCP over in process": 2.6,
    "64 MiB: by Unix socket over in process": 2.2,
    "64 MiB: by shared memory over in process": 1.8,
    "64 MiB: by shared memory over in process with copies": 1.3,
}


def run(*, quick: bool) -> Iterator[Figure]:
    """Yield the figures of both sizes."""
    with contextlib.ExitStack() as stack:
        echo = stack.enter_context(_floor.echoing())
        server = stack.enter_context(_processes.serving())
        clients = {way: stack.enter_context(_client(_processes.address(server), way)) for way in WAYS}
        yield from _small(echo, {way: clients[way] for way in WAYS[:3]}, quick=quick)
        yield from _large(server, clients, quick=quick)


@contextlib.contextmanager
def _client(address: str, way: str) -> Iterator[hvpd.Client]:
    """Connect a client whose products go one way."""
    with hvpd.connect(address) as client:
        vectors = client._transport._vectors  # noqa: SLF001 - clients choose their way by themselves
        vectors.offered = way != "gRPC"
        vectors.unix = way in WAYS[2:]
        vectors.shares_memory = way == WAYS[3]
        yield client


def _products(clients: dict[str, hvpd.Client], size: int) -> dict[str, _timing.Call]:
    """Return a product of each client. None has been asked for yet."""
    problem, v, calls = identity(size // 4), normal(6, size // 4), dict[str, _timing.Call]()
    for way, client in clients.items():
        objective = _warm.registered(client, problem, mode=_MODE)
        _warm.compiled(objective, 1)
        H = objective.at(problem.x).hessian()
        calls[way] = lambda H=H: H @ v  # type: ignore[misc]  # mypy wants a type for H
    return calls


def _warm_up(client: hvpd.Client, call: _timing.Call) -> None:
    """Multiply until products go their way."""
    vectors = client._transport._vectors  # noqa: SLF001
    while vectors.offered and not vectors.ready:
        call()
    call()


def _rounds(
    contenders: dict[str, _timing.Call], *, quick: bool
) -> dict[str, "np.ndarray[tuple[int], np.dtype[np.float64]]"]:
    times = _timing.interleave(contenders, rounds=3 if quick else 25, seconds=0.02 if quick else 0.2)
    return {name: np.array(seconds) for name, seconds in times.items()}


def _small(echo: _floor.Echo, clients: dict[str, hvpd.Client], *, quick: bool) -> Iterator[Figure]:
    n, payload = SMALL_BYTES // 4, bytes(SMALL_BYTES)
    sockets = {"TCP": _floor.SocketEcho(echo.tcp, payload), "Unix socket": _floor.SocketEcho(echo.unix, payload)}
    contenders = _products(clients, SMALL_BYTES)
    for way, call in contenders.items():
        _warm_up(clients[way], call)
    found = _rounds({**contenders, **{f"echo by {way}": each for way, each in sockets.items()}}, quick=quick)
    for each in sockets.values():
        each.close()
    ratios = {
        "echo by Unix socket over TCP": found["echo by Unix socket"] / found["echo by TCP"],
        "product by Unix socket over TCP": found["Unix socket"] / found["TCP"],
        "product by gRPC over TCP": found["gRPC"] / found["TCP"],
    }
    for name, ratio in ratios.items():
        figure = f"1 KiB: {name}"
        goal = GOAL_SMALL if "Unix" in name else None
        yield measured(BENCH, figure, "", ratio, n=n, k=1, predicted=PREDICTED[figure], goal=goal)
    for name, seconds in found.items():
        label = name if name.startswith("echo") else f"product by {name}"
        yield measured(BENCH, f"1 KiB: {label}", "ms", seconds * 1e3, n=n, k=1)


def _large(server: _processes.Child, clients: dict[str, hvpd.Client], *, quick: bool) -> Iterator[Figure]:
    size = LARGE_BYTES
    n = size // 4
    contenders = _products(clients, size)
    pids = {"server": server.pid, "client": os.getpid()}
    before = {side: _processes.resident_bytes(pid) for side, pid in pids.items()}
    peaks = {}
    for way, call in contenders.items():
        _warm_up(clients[way], call)
        for pid in pids.values():
            _processes.reset_peak(pid)
        for _ in range(4):
            call()
        peaks[way] = {side: (_processes.peak_bytes(pid) - before[side]) / size for side, pid in pids.items()}
    programs, V = Programs(identity(n), mode=_MODE), normal(6, 1, n)
    multiply, on_device = programs.multiply("hvp"), aligned(V)

    def copied() -> object:
        np.copyto(on_device, V)
        return multiply(on_device).copy()

    contenders["in process"] = programs.call("hvp", 1)
    contenders["in process with copies"] = copied
    found = _rounds(contenders, quick=quick)
    for way in WAYS:
        figure = f"64 MiB: by {way} over in process"
        ratio = found[way] / found["in process"]
        yield measured(BENCH, figure, "", ratio, n=n, k=1, predicted=PREDICTED[figure])
    figure = f"64 MiB: by {WAYS[-1]} over in process with copies"
    ratio = found[WAYS[-1]] / found["in process with copies"]
    yield measured(BENCH, figure, "", ratio, n=n, k=1, predicted=PREDICTED[figure], goal=GOAL_LARGE)
    for name, seconds in found.items():
        label = name if name.startswith("in process") else f"by {name}"
        yield measured(BENCH, f"64 MiB: {label}", "ms", seconds * 1e3, n=n, k=1)
    for way, peak in peaks.items():
        for side, vectors in peak.items():
            yield measured(BENCH, f"64 MiB: peak memory of {side} by {way}", "vectors", [vectors], n=n, k=1)
