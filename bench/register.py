"""The cost of registering: seconds on the client, bytes on the wire, and whether
programs that the server derives run as fast as jax's own.

`python -m bench register --before DIR` measures another checkout of hvpd in the same
run, such as the version before a change.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import numpy as np

from bench import _timing
from bench._objectives import Problem, gaussian_process, logistic, mlp, normal, transformer
from bench._programs import Programs, aligned
from bench._registering import problems
from bench._report import Figure, Goal, measured

BENCH = "register"
GOAL_BEFORE = Goal(">=", 3.0)
GOAL_NATIVE = Goal("<=", 1.10)

# The client traces once instead of five times. It lowers one program for one platform
# instead of five for two.
PREDICTED_BEFORE = {"seconds": 4.0, "bytes": 8.0}
PREDICTED_NATIVE = 1.0

_FOLDER = Path(__file__).resolve().parent


def run(*, quick: bool, before: Path | None = None) -> Iterator[Figure]:
    """Yield the cost of a registration, its ratio to that of another checkout, and the
    speed of derived programs.
    """
    rounds = 1 if quick else 5
    for name in problems(quick=quick):
        checkouts = {"now": _FOLDER.parent} | ({} if before is None else {"before": before})
        found: dict[str, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
        for _ in range(rounds):
            for checkout, folder in checkouts.items():
                found[checkout].append(_registered_in(folder, name, quick=quick))
        for what, unit in [("seconds", "s"), ("bytes", "MB")]:
            values = {checkout: np.array([each[what] for each in taken]) for checkout, taken in found.items()}
            scale = 1e-6 if what == "bytes" else 1.0
            yield measured(BENCH, f"{name}: client {what}", unit, values["now"] * scale)
            if before is not None:
                ratio = values["before"] / values["now"]
                predicted = PREDICTED_BEFORE[what]
                yield measured(
                    BENCH, f"{name}: client {what}, before over now", "", ratio, predicted=predicted, goal=GOAL_BEFORE
                )
    yield from _against_native(quick=quick)


def _registered_in(folder: Path, name: str, *, quick: bool) -> dict[str, float]:
    """Trace and lower in a fresh process with the client of a checkout: nothing is in
    jax's caches.
    """
    roots = os.pathsep.join(map(str, (folder / "client", folder / "server", _FOLDER.parent)))
    child = subprocess.run(
        [sys.executable, "-m", "bench._registering", name, *(["--quick"] if quick else [])],
        env=os.environ | {"PYTHONPATH": roots},
        check=True,
        capture_output=True,
        text=True,
    )
    answer: dict[str, float] = json.loads(child.stdout)
    return answer


def _against_native(*, quick: bool) -> Iterator[Figure]:
    """Compare the compiled products of imported objectives with the same mathematics in
    jax, without export and import.
    """
    kinds: Mapping[str, Problem] = {
        "logistic regression": logistic(2_000, 1_000),
        "MLP": mlp((784, 128, 10), 250),
        "transformer": transformer(8),
        "Gaussian process": gaussian_process(200, 5),
    }
    for name, problem in list(kinds.items())[: 1 if quick else None]:
        programs = Programs(problem)
        for k in (1, 8):
            imported, native = programs.call("hvp", k), _native(problem, k)
            times = _timing.interleave(
                {"imported": imported, "native": native}, rounds=3 if quick else 15, seconds=0.02 if quick else 0.2
            )
            ratio = np.array(times["imported"]) / np.array(times["native"])
            label = f"{name}: imported product over jax's own"
            yield measured(BENCH, label, "", ratio, predicted=PREDICTED_NATIVE, goal=GOAL_NATIVE, n=problem.n, k=k)


def _native(problem: Problem, k: int) -> Any:
    """Return a product in jax alone, called as the server calls its own."""
    flat, unravel = jax.flatten_util.ravel_pytree(problem.x)

    def hvp(x: Any, V: Any, *data: Any) -> Any:
        gradient = jax.grad(lambda x: problem.fun(unravel(x), *data))
        return jax.vmap(lambda v: jax.jvp(gradient, (x,), (v,))[1])(V)

    V = aligned(normal(5, k, problem.n))
    arguments = [jax.device_put(flat), V, *map(jax.device_put, problem.data)]
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(hvp).lower(*arguments).compile()
    return lambda: np.asarray(compiled(*arguments))
