"""Large arrays that a function closes over, made arguments of its jaxpr. Needs jax.

Arrays that a function closes over are data, not constants of a program. jax keeps those of a nested jit inside its jaxpr, so
such calls are inlined where they hold one.
"""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from hvpd import _codec
from hvpd._registration.hijax import is_high

Lifted = Callable[[Sequence[Any], Sequence[Any]], list[Any]]
"""The outputs of a traced function, given the captured arrays and its own flat arguments."""

_NARROW = ("float32", "complex64", "int32", "uint32")
"""dtypes that jax may have made of one of twice the bits."""

_seen = threading.local()
"""Whether arrays were closed over in 64 bits that whatever else jax traces takes in 32."""


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """Decorates what traces, so that nothing of it is left to whoever traces in 32 bits afterwards; see `trace`."""
    _seen.widened = False
    yield
    if _seen.widened:
        _forget()


def _forget() -> None:
    jax.clear_caches()
    gc.collect()


def trace(fun: Callable[..., Any], specs: Sequence[Any], *, widened: bool) -> tuple[Any, Any]:
    """The jaxpr of a function for arguments of such specs, and what it returns, as shapes.

    jax 0.10.2 converts a NumPy array that a function closes over once, and takes what it made again for as long as there is any jaxpr with it:
    also in 64 bits where that was in 32, and the other way round. Digits are lost in silence then, or dtypes do not fit. So jax is made to forget
    all that it traced: before this, where such an array is found in 32 bits, and after it (`forgetting`).

    Args:
        widened: Whether this is in 64 bits, and whatever else jax traces in 32.
    """
    found: tuple[Any, Any] = jax.make_jaxpr(fun, return_shape=True)(*specs)
    arrays = (
        [constant.dtype for constant in _constants(found[0]) if isinstance(constant, np.ndarray)] if widened else []
    )
    # A nested jit that jax traced before this export can have high-level primitives, whose rules `kept_rules` did not see.
    if any(dtype.name in _NARROW for dtype in arrays) or is_high(found[0]):
        del found
        _forget()
        found = jax.make_jaxpr(fun, return_shape=True)(*specs)
    _seen.widened |= bool(arrays)
    return found


def lift(closed: Any, lift_bytes: int) -> tuple[list[_codec.Array], Lifted]:
    """Takes the constants of more than `lift_bytes` out of a traced function: the arrays, and the function that is given them."""
    found = {id(constant): constant for constant in _constants(closed) if getattr(constant, "nbytes", 0) > lift_bytes}
    # A NumPy constant stands there as it was given; the jaxpr means it in the dtype that jax's x64 mode leaves it.
    captured = [np.asarray(constant, jax.dtypes.canonicalize_dtype(constant.dtype)) for constant in found.values()]

    def lifted(arrays: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        return _evaluate(closed, arguments, dict(zip(found, arrays, strict=True)))

    return captured, lifted


def _calls(closed: Any) -> Iterator[tuple[Any, Any]]:
    """The equations that call a nested jit, with its jaxpr. Loops and branches take what they close over as operands."""
    for equation in closed.jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            yield equation, equation.params["jaxpr"]


def _constants(closed: Any) -> Iterator[Any]:
    yield from closed.consts
    for _, inner in _calls(closed):
        yield from _constants(inner)


def _evaluate(closed: Any, args: Sequence[Any], replaced: Mapping[int, Any]) -> list[Any]:
    """Evaluate a jaxpr with values in place of constants, by the constants' id. Nested jits that hold one are inlined."""
    opened = {
        id(equation): inner
        for equation, inner in _calls(closed)
        if any(id(constant) in replaced for constant in _constants(inner))
    }
    constants = [replaced.get(id(constant), constant) for constant in closed.consts]
    values = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*constants, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        inner = opened.get(id(equation))
        if inner is not None:
            outputs = _evaluate(inner, [read(atom) for atom in equation.invars], replaced)
            values.update(zip(equation.outvars, outputs, strict=True))
        else:
            variables = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, jex.Literal)))
            kept = [variable for variable in equation.outvars if not isinstance(variable, jex.DropVar)]
            names = jex.DebugInfo("eval", "equation", ("",) * len(variables), ("",) * len(kept))
            single = jex.Jaxpr([], variables, kept, [equation], equation.effects, names)
            outputs = jex.jaxpr_as_fun(jex.ClosedJaxpr(single, ()))(*map(read, variables))
            values.update(zip(kept, outputs, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]
