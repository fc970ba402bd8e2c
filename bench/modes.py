"""The cost of a product over that of a gradient, in time and in XLA's own count of
operations, in process. It shows whether the exported programs waste time that their
arithmetic does not explain.
"""

from collections.abc import Iterator

import numpy as np

from bench import _timing
from bench._objectives import convolution, logistic, mlp, transformer
from bench._programs import Programs
from bench._report import Figure, Goal, measured

BENCH = "modes"
GOAL = Goal("<=", 1.10)
WIDTHS = (1, 4, 16)

# FLOPs over a gradient's, from the design: (hvp of one vector, `apply` for each).
_FLOPS = {"logistic regression": (1.5, 1.0), "MLP": (2.1, 1.5), "convolution": (2.3, 1.7), "transformer": (2.6, 1.9)}


def predicted_flops(objective: str, program: str, k: int) -> float:
    """Return the predicted FLOPs over a gradient's. A product computes the part that
    depends on x once, and the part that is linear in v for each v. `prepare` is a
    gradient.
    """
    hvp, apply = _FLOPS[objective]
    return {"prepare": 1.0, "hvp": hvp - apply + k * apply, "apply": k * apply}[program]


def predicted_quotient(objective: str, program: str, k: int) -> float:
    """Return the predicted ratio of times over the ratio of FLOPs. It is 1 if
    arithmetic is the bound. If memory is, a block streams X once for all vectors.
    """
    if objective != "logistic regression" or program == "prepare":
        return 1.0
    return max(1.0 / k, 1 / 10)


def run(*, quick: bool) -> Iterator[Figure]:
    """Yield the figures of each objective."""
    problems = [logistic(4_000, 2_000), mlp((784, 256, 256, 10), 250), convolution(32), transformer(8)]
    for problem in problems[: 1 if quick else None]:
        programs = Programs(problem)
        kinds = [("value_and_grad", 0), ("prepare", 0), *((name, k) for name in ("hvp", "apply") for k in WIDTHS)]
        contenders = {f"{name} {k}": programs.call(name, k) for name, k in kinds}
        times = _timing.interleave(contenders, rounds=3 if quick else 15, seconds=0.02 if quick else 0.2)
        gradient, gradient_flops = np.array(times["value_and_grad 0"]), programs.flops("value_and_grad")
        facts = {"n": problem.n, "k": None}
        yield measured(BENCH, f"{problem.name}: gradient", "ms", gradient * 1e3, **facts)
        for name, k in kinds[1:]:
            flops = programs.flops(name, k) / gradient_flops
            time = np.array(times[f"{name} {k}"]) / gradient
            width = max(k, 1)
            expected = predicted_flops(problem.name, name, width)
            quotient = predicted_quotient(problem.name, name, width)
            label, facts = f"{problem.name}: {name}", {"n": problem.n, "k": k or None}
            yield measured(BENCH, f"{label}, time", "gradients", time, predicted=expected * quotient, **facts)
            yield measured(BENCH, f"{label}, FLOPs", "gradients", [flops], predicted=expected, **facts)
            yield measured(BENCH, f"{label}, time over FLOPs", "", time / flops, predicted=quotient, goal=GOAL, **facts)
