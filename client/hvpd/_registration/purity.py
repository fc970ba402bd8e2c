"""Notices side effects of a function in Python, while jax traces the function.

Python runs the function only then. So random numbers that it draws become constants of
the program, and containers that it changes do not change any more.
"""

import contextlib
import functools
import inspect
import operator
import random
from collections import deque
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any

import numpy as np

from hvpd._composite import Composite
from hvpd._warnings import warn

_CONTAINERS = (dict, list, set, deque)


@contextlib.contextmanager
def noticed(fun: Callable[..., Any]) -> Iterator[None]:
    """Warn if a trace of `fun` draws random numbers or changes objects of Python.

    It watches the global generators of random numbers, and the values that `fun` names:
    those it closes over, its globals, and the object that a method belongs to. The same
    holds for functions that it defines, and for functions of its module that it names.
    """
    named = _named(fun)
    generators = {"random": random.getstate, "numpy.random": _numpy_state} | _generators(named)
    before = {name: state() for name, state in generators.items()}
    contents = {name: _content(value) for name, value in named.items()}
    yield
    for name, state in generators.items():
        if state() != before[name]:
            warn(
                f"the function drew random numbers from {name} while jax traced it: they are constants now, the same at every "
                "point. Pass the numbers as data, or draw them with jax.random from jax.random.key_data(key) in data"
            )
    now = _named(fun)
    changed = [name for name, value in named.items() if _differs(value, contents[name], now.get(name))]
    if changed:
        warn(
            f"the function changed {', '.join(sorted(changed))} while jax traced it. Python runs the function only now, and not "
            "at each point, and values of x and data in it are tracers of jax, which cannot be used later. Change nothing in the "
            "function, and compute counts and histories outside of it"
        )


def _numpy_state() -> Any:
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - it is the user's, and only read
    return state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"]


def _named(fun: Callable[..., Any]) -> dict[str, Any]:
    """Return the values that a function closes over or has as globals, by name, and
    those of the functions of its module that it names.
    """
    pending = [fun.model, fun.loss] if isinstance(fun, Composite) else [fun]
    found: dict[str, Any] = {}
    seen: set[CodeType] = set()
    while pending:
        inner = _function_in(pending.pop())
        code = getattr(inner, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        named = _named_by(inner, code)
        found = named | found
        # Functions of other modules may be a library's, which may fill a cache.
        pending += [each for each in named.values() if _module_of(each) is inner.__globals__]
    return found


def _function_in(value: Any) -> Any:
    """Return the function in a wrapper of it, such as jax.jit's; else the value."""
    return inspect.unwrap(value.func if isinstance(value, functools.partial) else value)


def _module_of(value: Any) -> Any:
    """Return the globals of a function; None if the value is none."""
    if isinstance(value, (ModuleType, type)) or not callable(value):
        return None
    return getattr(_function_in(value), "__globals__", None)


def _named_by(inner: Any, code: CodeType) -> dict[str, Any]:
    found = {name: inner.__globals__.get(name) for name in _names(code)}
    for name, cell in zip(code.co_freevars, inner.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # The cell is empty.
            found[name] = cell.cell_contents
    if inspect.ismethod(inner):
        found["self"] = inner.__self__
    return found


def _names(code: CodeType) -> Iterator[str]:
    """Yield the global names of a function and of the functions that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _generators(named: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Return the generators of random numbers among some values, by name."""
    found: dict[str, Callable[[], Any]] = {}
    for name, value in named.items():
        if isinstance(value, np.random.Generator):
            found[name] = lambda value=value: repr(value.bit_generator.state)  # type: ignore[misc]
        elif isinstance(value, random.Random):
            found[name] = value.getstate
    return found


def _content(value: Any) -> list[Any]:
    """Return what a container or an object holds, at one moment."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, _CONTAINERS):
        return list(value)
    if isinstance(value, (ModuleType, type, random.Random)):  # A module may import parts of itself at their first use.
        return []
    return list(getattr(value, "__dict__", {}).values())


def _differs(value: Any, before: list[Any], now: Any) -> bool:
    """Return whether a name stands for another value, or the value holds others.

    An added attribute is no difference, because functools.cached_property and others
    add attributes.
    """
    after = _content(now)
    resized = len(after) < len(before) or (isinstance(value, _CONTAINERS) and len(after) > len(before))
    return now is not value or resized or any(map(operator.is_not, before, after))
