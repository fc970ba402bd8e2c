"""Many callers at one point: their products a second over three rates. These are the
rate of callers that first pay for the wire and then for the device, the device's own
rate, and one caller's.
"""

import collections
from collections.abc import Iterator
from typing import Any

import hvpd
from bench import _callers, _floor, _processes, _timing, _warm
from bench._objectives import Problem, logistic, mlp
from bench._programs import Programs
from bench._report import Figure, Goal, floor_rate, measured

BENCH = "coalescing"
GOAL_CALLERS = 16
GOAL = Goal(">=", 0.8)
_MOST = 64

# The design's readings in vectors a second: E, echoes of as many callers; B, the block,
# with other widths in between. The memory-bound block grows until X streams once for
# all of it. The compute-bound block gains little.
_ECHOES = {
    "memory-bound": {1: 2300, 2: 3500, 4: 4500, 8: 4800, 16: 4800, 32: 4800, 64: 4500},
    "compute-bound": {1: 370, 2: 500, 4: 600, 8: 700, 16: 703, 32: 700, 64: 650},
}
_BLOCKS = {
    "memory-bound": {1: 397, 2: 700, 4: 1200, 8: 1900, 16: 2750, 32: 3500, 64: 4000},
    "compute-bound": {1: 220, 2: 230, 4: 250, 8: 260, 16: 269, 32: 270, 64: 270},
}
# One caller pays the latency's overhead. Several callers fill about half a block,
# because a caller that was just answered asks again while the others' launch runs. That
# slows the memory-bound objective, whose vectors get cheaper with the width, and hardly
# the other.
_OF_FLOOR = {
    "memory-bound": {1: 0.85, 2: 0.75, 4: 0.7, 8: 0.7, 16: 0.7, 32: 0.7, 64: 0.7},
    "compute-bound": {1: 0.85, 2: 0.9, 4: 0.95, 8: 0.95, 16: 0.95, 32: 0.95, 64: 0.9},
}


def predictions(bound: str, callers: int) -> dict[str, float]:
    """Return the predictions for a number of callers, by figure."""

    def rate(count: int) -> float:
        return _OF_FLOOR[bound][count] * floor_rate(_ECHOES[bound][count], _BLOCKS[bound][count])

    return {
        "over floor": _OF_FLOOR[bound][callers],
        "over block in process": rate(callers) / _BLOCKS[bound][callers],
        "over one caller": rate(callers) / rate(1),
        "mean batch width": max(callers / 2, 1),
        "products": rate(callers),
        "echoes": _ECHOES[bound][callers],
        "block in process": _BLOCKS[bound][callers],
    }


UNITS = collections.defaultdict(
    str, {"mean batch width": "vectors", "products": "/s", "echoes": "/s", "block in process": "/s"}
)


def run(*, quick: bool) -> Iterator[Figure]:
    """Yield the figures of each objective and each kind of callers."""
    problems = {
        "memory-bound": logistic(4_000, 2_000),
        "compute-bound": mlp((784, 256, 256, 10), 250),
    }
    with _floor.echoing() as echo, _processes.serving() as server:
        for bound, problem in list(problems.items())[: 1 if quick else None]:
            with hvpd.connect(_processes.address(server)) as client:
                objective = _warm.registered(client, problem)
                H = objective.at(_callers.start(problem.n)).hessian()
                counts = _warm.widths(2 if quick else _MOST)
                single = _warm.vectors(objective, H)
                _warm.blocks(objective, H, counts[-1])
            for kind in (_callers.threads, _callers.processes):
                with kind(_processes.address(server), echo.address, objective.digest, counts[-1]) as callers:
                    label = f"{bound}, {kind.__name__}"
                    yield from _figures(label, bound, problem, callers, counts, single, quick=quick)


def _figures(
    label: str,
    bound: str,
    problem: Problem,
    callers: _callers.Callers,
    counts: list[int],
    single: str,
    *,
    quick: bool,
) -> Iterator[Figure]:
    programs = Programs(problem)
    in_process = {count: programs.call("hvp" if count > 1 else single, count) for count in counts}
    rounds, seconds = (2, 0.2) if quick else (5, 1.0)
    found: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for count in counts:  # Opens streams and warms caches.
        callers.echoes(count, seconds / 4)
        callers.products(count, seconds / 4)
    for _ in range(rounds):
        for count in counts:
            echoes = callers.echoes(count, seconds)
            blocks = count / _timing.interleave({"": in_process[count]}, rounds=1, seconds=seconds / 2)[""][0]
            products = callers.products(count, seconds)
            one = found[counts[0]][-1]["products"] if count > 1 else products.vectors
            found[count].append(
                {
                    "over floor": products.vectors / floor_rate(echoes, blocks),
                    "over block in process": products.vectors / blocks,
                    "over one caller": products.vectors / one,
                    "mean batch width": products.width,
                    "products": products.vectors,
                    "echoes": echoes,
                    "block in process": blocks,
                }
            )
    for count in counts:
        predicted = predictions(bound, count)
        for name in found[count][0]:
            facts: dict[str, Any] = {"n": problem.n, "k": count, "predicted": predicted[name]}
            if name == "over floor" and count == GOAL_CALLERS:
                facts["goal"] = GOAL
            yield measured(BENCH, f"{label}: {name}", UNITS[name], [each[name] for each in found[count]], **facts)
