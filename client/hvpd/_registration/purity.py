"""Notices random numbers that Python draws while jax traces a function.

Such numbers become constants of the program, and every point has the same.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hvpd._composite import Composite
from hvpd._warnings import warn


@contextlib.contextmanager
def noticed(fun: Callable[..., Any]) -> Iterator[None]:
    """Warn if a trace of `fun` draws from a random generator of Python or NumPy.

    It watches the global generators, and those that `fun` names itself.
    """
    generators = {"random": random.getstate, "numpy.random": _numpy_state} | _own(fun)
    before = {name: state() for name, state in generators.items()}
    yield
    for name, state in generators.items():
        if state() != before[name]:
            warn(
                f"the function drew random numbers from {name} while jax traced it: they are constants now, the same at every "
                "point. Pass the numbers as data, or draw them with jax.random from jax.random.key_data(key) in data"
            )


def _numpy_state() -> Any:
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - it is the user's, and only read
    return state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"]


def _own(fun: Callable[..., Any]) -> dict[str, Callable[[], Any]]:
    """Return the generators that a function closes over or has as globals, by name."""
    functions = (fun.model, fun.loss) if isinstance(fun, Composite) else (fun,)
    found: dict[str, Callable[[], Any]] = {}
    for each in functions:
        code = getattr(each, "__code__", None)
        if code is None:
            continue
        values = {name: each.__globals__.get(name) for name in code.co_names}
        for name, cell in zip(code.co_freevars, each.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # The cell is empty.
                values[name] = cell.cell_contents
        for name, value in values.items():
            if isinstance(value, np.random.Generator):
                found[name] = lambda value=value: repr(value.bit_generator.state)  # type: ignore[misc]
            elif isinstance(value, random.Random):
                found[name] = value.getstate
    return found
