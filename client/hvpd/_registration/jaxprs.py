"""Makes, opens and walks through jaxprs. Needs jax."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.api_util
import jax.extend.core as jex
import jax.extend.linear_util
import jax.interpreters.partial_eval


def traced(fun: Callable[..., Any], avals: Sequence[Any]) -> Any:
    """Trace a function of flat arrays, which may have symbolic shapes."""
    debug = jax.api_util.debug_info("hvpd mark", fun, tuple(avals), {})
    wrapped = jax.extend.linear_util.wrap_init(lambda *args: listed(fun(*args)), debug_info=debug)
    jaxpr, _, consts = jax.interpreters.partial_eval.trace_to_jaxpr_dynamic(wrapped, list(avals))
    return jex.ClosedJaxpr(jaxpr, consts)


def is_sharded(constant: Any) -> bool:
    """Return whether a constant is an array of numbers on a mesh of devices."""
    return (
        isinstance(constant, jax.Array)
        and not isinstance(constant, jax.core.Tracer)
        and not jax.numpy.issubdtype(constant.dtype, jax.dtypes.extended)
        and not isinstance(constant.sharding, jax.sharding.SingleDeviceSharding)
    )


def listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (list, tuple)) else [results]


def open_jaxpr(closed: Any) -> Callable[..., list[Any]]:
    """Return the function of a jaxpr that takes its constants, then its arguments."""
    inner = closed.jaxpr
    taken = [*inner.constvars, *inner.invars]
    names = jex.DebugInfo("opened", "opened", ("",) * len(taken), ("",) * len(inner.outvars))
    function: Callable[..., list[Any]] = jex.jaxpr_as_fun(
        jex.ClosedJaxpr(jex.Jaxpr([], taken, inner.outvars, inner.eqns, inner.effects, names), ())
    )
    return function


def held(closed: Any) -> Iterator[Any]:
    """Yield the constants of a jaxpr, and those of the jits that it calls.

    Loops and branches take closed-over arrays as operands.
    """
    yield from closed.consts
    for equation in closed.jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            yield from held(equation.params["jaxpr"])


def inside(closed: Any) -> Iterator[Any]:
    """Yield the closed jaxprs inside a jaxpr, at any depth."""
    for equation in getattr(closed, "jaxpr", closed).eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield value
                yield from inside(value)


def equations(closed: Any) -> Iterator[Any]:
    """Yield the operations of a jaxpr, and of those inside it."""
    for each in (closed, *inside(closed)):
        yield from getattr(each, "jaxpr", each).eqns


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")
