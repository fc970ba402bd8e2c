"""Jaxprs, evaluated with changes: nested jits inlined, results tapped."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

Tap = Callable[[Any, Sequence[Any], list[Any]], list[Any]]
"""Maps (equation, operands, results) to results."""


def inlined(closed: Any) -> Any:
    """Return the same traced function without nested jits and checkpoints."""
    return jax.make_jaxpr(lambda *args: evaluate(closed, args))(*closed.in_avals)


def _inner(equation: Any) -> Any:
    """Return the jaxpr of a call of a nested jit or of a `jax.checkpoint`; None for
    other equations.
    """
    name = equation.primitive.name
    if name in ("jit", "pjit"):
        return equation.params["jaxpr"]
    if name in ("checkpoint", "remat2"):
        return jex.ClosedJaxpr(equation.params["jaxpr"], ())
    return None


def evaluate(
    closed: Any,
    args: Sequence[Any],
    *,
    tap: Tap = lambda equation, operands, outputs: outputs,
) -> list[Any]:
    """Evaluate a jaxpr, its nested jits and checkpoints inlined.

    Args:
        closed: A jaxpr of `jax.make_jaxpr`.
        args: Arguments of the jaxpr.
        tap: Takes each equation with its operands and results; returns the results to
            go on with.
    """
    values = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = _inner(equation)
        if inner is not None:
            values.update(zip(equation.outvars, evaluate(inner, operands, tap=tap), strict=True))
        else:
            values.update(_single(equation, operands, read, tap))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _single(equation: Any, operands: Sequence[Any], read: Callable[[Any], Any], tap: Tap) -> dict[Any, Any]:
    """Evaluate one equation; return its results by variable, changed by the tap."""
    variables = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, jex.Literal)))
    kept = [variable for variable in equation.outvars if not isinstance(variable, jex.DropVar)]
    names = jex.DebugInfo("eval", "equation", ("",) * len(variables), ("",) * len(kept))
    single = jex.Jaxpr([], variables, kept, [equation], equation.effects, names)
    outputs = jex.jaxpr_as_fun(jex.ClosedJaxpr(single, ()))(*map(read, variables))
    return dict(zip(kept, tap(equation, operands, outputs), strict=True))
