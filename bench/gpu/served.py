"""Products through a server on the device: over the same program in process, with many
callers, and within the memory budget.
"""

from collections.abc import Iterator

import numpy as np

import hvpd
from bench import _callers, _floor, _processes, _timing, _warm
from bench._networks import perceptron
from bench._objectives import normal
from bench._programs import Programs
from bench._report import Figure, Goal
from bench.gpu._scale import Scale

_SIZES = {"1 M": (784, 512, 1_024, 10), "10 M": (784, 2_048, 4_096, 10), "100 M": (784, 8_192, 11_264, 10)}
_SMALL = (64, 32, 10)
_ROWS = 1_024

PREDICTED = {"1 M": 1.25, "10 M": 1.1, "100 M": 1.3}
"""A product over its program in process, by n.

Below a millisecond the socket and Python show. At 100 M, V and HV take 800 MB. A
product copies them through shared memory at 5 GB/s beside the copies of the device.
"""
GOAL = Goal("<=", 1.05)

CALLERS = (1, 4, 16, 64, 256)
OVER_ONE_CALLER = {1: 1.0, 4: 2.5, 16: 8.0, 64: 20.0, 256: 25.0}
"""Predicted rates of many callers over that of one. A block of 64 costs the device
little more than a vector. Beyond that the server's Python is the bound.
"""

BUDGET = 2 << 30
IN_USE = 1.1
"""Predicted bytes in use over the budget. Programs and a launch's working memory come
on top.
"""


def products(scale: Scale) -> Iterator[Figure]:
    """Yield the ratio of a product to the program in process, from a vector in the
    host's memory to one there.
    """
    with _processes.serving() as server, hvpd.connect(_processes.address(server)) as client:
        for label, sizes in _SIZES.items() if not scale.small else [("1 M", _SMALL)]:
            problem = perceptron(sizes, scale.of(_ROWS, 100))
            objective = _warm.registered(client, problem)
            H = objective.at(problem.x).hessian()
            program, v = _warm.vectors(objective, H), normal(5, problem.n)
            calls: dict[str, _timing.Call] = {
                "product": lambda H=H, v=v: H @ v,  # type: ignore[misc]  # mypy wants a type
                "in process": Programs(problem).call(program, 1),
            }
            times = _timing.interleave(calls, rounds=scale.rounds, seconds=scale.seconds)
            ratio = np.array(times["product"]) / np.array(times["in process"])
            figure = f"product: {label}, over {program} in process"
            yield scale.measured(figure, "", ratio, n=problem.n, k=1, predicted=PREDICTED[label], goal=GOAL)
            for name, taken in times.items():
                yield scale.measured(f"product: {label}, {name}", "ms", np.array(taken) * 1e3, n=problem.n, k=1)


def callers(scale: Scale) -> Iterator[Figure]:
    """Yield the rate of 1 to 256 callers at one point, and the width of their
    launches.
    """
    problem = perceptron(scale.of(_SIZES["1 M"], _SMALL), scale.of(_ROWS, 100))
    counts = CALLERS[:2] if scale.quick else CALLERS
    with _floor.echoing() as echo, _processes.serving(None, "--max-block-width", "256") as server:
        address = _processes.address(server)
        with hvpd.connect(address) as client:
            objective = _warm.registered(client, problem)
            H = objective.at(_callers.start(problem.n)).hessian()
            _warm.vectors(objective, H)
            _warm.blocks(objective, H, counts[-1])
        with _callers.processes(address, echo.address, objective.digest, counts[-1]) as many:
            for count in counts:  # Opens streams and warms caches.
                many.products(count, 2 * scale.seconds)
            rates = [{count: many.products(count, 5 * scale.seconds) for count in counts} for _ in range(scale.rounds)]
    for count in counts:
        over_one = [each[count].vectors / each[1].vectors for each in rates]
        products, widths = ([getattr(each[count], name) for each in rates] for name in ("vectors", "width"))
        name, predicted = "callers: products over one caller's", OVER_ONE_CALLER[count]
        yield scale.measured(name, "", over_one, n=problem.n, k=count, predicted=predicted)
        yield scale.measured("callers: products", "/s", products, n=problem.n, k=count)
        yield scale.measured("callers: mean batch width", "vectors", widths, n=problem.n, k=count)


def memory(scale: Scale) -> Iterator[Figure]:
    """Yield the device's bytes in use over the budget, while points come and go."""
    problem = perceptron(scale.of(_SIZES["10 M"], _SMALL), scale.of(_ROWS, 100))
    budget, flat, v = scale.of(BUDGET, 4 << 20), problem.flat(), normal(5, problem.n)
    in_use = list[float]()
    with (
        _processes.serving(None, "--memory-budget", str(budget)) as server,
        hvpd.connect(_processes.address(server)) as client,
    ):
        objective = _warm.registered(client, problem)
        for step in range(8 if scale.quick else 100):
            H = objective.at(flat * np.float32(1 + 1e-3 * step)).hessian()
            for _ in range(3):
                H @ v
            in_use.append(_processes.metric(server, r"hvpd_device_memory_in_use_bytes\S*"))
        evicted = _processes.metric(server, r"hvpd_evictions_total\S*")
    name = "memory: most bytes in use over the budget"
    if max(in_use) > 0:
        yield scale.measured(name, "", [max(in_use) / budget], n=problem.n, predicted=IN_USE)
    else:
        yield scale.skipped(name, "", "this device reports no memory in use", n=problem.n)
    yield scale.measured("memory: evictions", "", [evicted], n=problem.n)
