"""Registers, and waits until the server has checked and compiled, and has chosen a
program, so that it does nothing else while figures are taken.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

import hvpd
from bench._objectives import Problem
from hvpd._krylov.lanczos import Lanczos
from hvpd._krylov.runner import runner

_PATIENCE_SECONDS = 60.0


def registered(client: hvpd.Client, problem: Problem, **options: Any) -> hvpd.Objective:
    """Register a problem; return the objective when the server has checked it."""
    objective = client.register(problem.fun, problem.x, *problem.data, **options)
    checked(objective)
    return objective


def checked(objective: hvpd.Objective) -> None:
    """Wait until the server has checked an objective, and all that were registered
    before.
    """
    ends = time.monotonic() + 10 * _PATIENCE_SECONDS
    while objective.registration_check().verdict == "pending" and time.monotonic() < ends:
        time.sleep(0.02)


def vectors(objective: hvpd.Objective, H: Any) -> str:
    """Multiply single vectors until the server has chosen a program. Return its
    name.
    """
    v = np.ones(objective.n, objective.dtype)
    ends = time.monotonic() + _PATIENCE_SECONDS
    while True:
        for _ in range(4):
            H @ v
        choice = next((choice for choice in objective.plan() if choice.width == 1), None)
        if choice is not None and ("not yet" not in choice.reason or time.monotonic() > ends):
            return choice.program


def compiled(objective: hvpd.Objective, width: int) -> bool:
    """Wait, without a product, until the server has compiled a width. Return whether it
    has.
    """
    ends = time.monotonic() + _PATIENCE_SECONDS
    while not (found := any(choice.width == width for choice in objective.plan())) and time.monotonic() < ends:
        time.sleep(0.01)
    return found


def blocks(objective: hvpd.Objective, H: Any, most: int) -> None:
    """Let the server compile every width up to `most`."""
    for width in widths(most):
        H @ np.ones((objective.n, width), objective.dtype)  # The product requests the compile.
        compiled(objective, width)


def launched(H: hvpd.CurvatureOperator, steps: int) -> None:
    """Run Lanczos's iteration until the server launches several steps together, at the
    end of so many.
    """
    ends, place = time.monotonic() + _PATIENCE_SECONDS, ""
    while place != "device" and time.monotonic() < ends:
        space = runner(H).space()
        with Lanczos(space, np.arange(1.0, H.shape[0] + 1).reshape(1, -1).astype(H.dtype)) as run:
            run.extend(steps)
            place = getattr(space, "place", "")


def until(found: Callable[[], object]) -> None:
    """Wait until a result is true, or patience ends."""
    ends = time.monotonic() + _PATIENCE_SECONDS
    while not found() and time.monotonic() < ends:
        time.sleep(0.02)


def widths(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to `most`."""
    return [1 << power for power in range(most.bit_length())]
