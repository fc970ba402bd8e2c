"""Arrays that a function closes over, taken out of its jaxpr: they are data, not constants of a program. Needs jax.

jax keeps the constants of a nested jit inside its jaxpr, so such calls are inlined where they hold one of these arrays.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from hvpd import _codec

Lifted = Callable[[Sequence[Any], Sequence[Any]], list[Any]]
"""The outputs of a traced function, given the captured arrays and its own flat arguments."""


def lift(closed: Any, lift_bytes: int) -> tuple[list[_codec.Array], Lifted]:
    """Takes the constants of more than `lift_bytes` out of a traced function: the arrays, and the function that is given them."""
    found = {id(constant): constant for constant in _constants(closed) if getattr(constant, "nbytes", 0) > lift_bytes}
    # A NumPy constant stands there as it was given; the jaxpr means it in the dtype that jax's x64 mode leaves it.
    captured = [np.asarray(constant, jax.dtypes.canonicalize_dtype(constant.dtype)) for constant in found.values()]

    def lifted(arrays: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        return _evaluate(closed, arguments, dict(zip(found, arrays, strict=True)))

    return captured, lifted


def _calls(closed: Any) -> Iterator[tuple[Any, Any]]:
    """The equations that are calls of a nested jit, with its jaxpr. Loops and branches take what they close over as operands."""
    for equation in closed.jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            yield equation, equation.params["jaxpr"]


def _constants(closed: Any) -> Iterator[Any]:
    yield from closed.consts
    for _, inner in _calls(closed):
        yield from _constants(inner)


def _evaluate(closed: Any, args: Sequence[Any], replaced: Mapping[int, Any]) -> list[Any]:
    """Evaluates a jaxpr with some constants replaced; nested jits that hold one of them are inlined, all else stays."""
    inlined = {
        id(equation): inner
        for equation, inner in _calls(closed)
        if any(id(constant) in replaced for constant in _constants(inner))
    }
    constants = [replaced.get(id(constant), constant) for constant in closed.consts]
    values = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*constants, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        inner = inlined.get(id(equation))
        if inner is not None:
            outputs = _evaluate(inner, [read(atom) for atom in equation.invars], replaced)
            values.update(zip(equation.outvars, outputs, strict=True))
        else:
            variables = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, jex.Literal)))
            kept = [variable for variable in equation.outvars if not isinstance(variable, jex.DropVar)]
            names = jex.DebugInfo("eval", "equation", ("",) * len(variables), ("",) * len(kept))
            single = jex.Jaxpr([], variables, kept, [equation], equation.effects, names)
            values.update(zip(kept, jex.jaxpr_as_fun(jex.ClosedJaxpr(single, ()))(*map(read, variables)), strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]
