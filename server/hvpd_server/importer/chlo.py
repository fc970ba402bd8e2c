"""Operations of CHLO, which compilers and people write before a program is made
portable.

A portable artifact has composites in their place. `composites` gives these the same
functions.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd import _text
from hvpd_server.importer import reductions, refusals
from hvpd_server.importer.table import Call, Value, operation

FUNCTIONS: Final[Mapping[str, tuple[int, Callable[..., Any]]]] = {
    "acos": (1, lax.acos),
    "acosh": (1, lax.acosh),
    "asin": (1, lax.asin),
    "asinh": (1, lax.asinh),
    "atan": (1, lax.atan),
    "atanh": (1, lax.atanh),
    "bessel_i1e": (1, lax.bessel_i1e),
    "conj": (1, lambda x: lax.conj(x) if jnp.iscomplexobj(x) else x),
    "cosh": (1, lax.cosh),
    "digamma": (1, lax.digamma),
    "erf": (1, lax.erf),
    "erf_inv": (1, lax.erf_inv),
    "erfc": (1, lax.erfc),
    "is_inf": (1, jnp.isinf),
    "is_neg_inf": (1, jnp.isneginf),
    "is_pos_inf": (1, jnp.isposinf),
    "lgamma": (1, lax.lgamma),
    "next_after": (2, lax.nextafter),
    "polygamma": (2, lax.polygamma),
    "sinh": (1, lax.sinh),
    "square": (1, lax.square),
    "tan": (1, lax.tan),
    "zeta": (2, lax.zeta),
}
"""Functions of CHLO, with their number of operands, as jax functions with the same
derivatives as jax's own.
"""


def apply(call: Call, name: str) -> Value:
    """Return the result of a function of `FUNCTIONS` for the operands of a call."""
    count, function = FUNCTIONS[name]
    if len(call.operands) != count:
        raise call.refuse(f"chlo.{name} with {len(call.operands)} operands: expected {count}", refusals.BUNDLE_INVALID)
    return function(*(jnp.asarray(each) for each in call.operands))


def top_k(call: Call, k: Any) -> list[Value]:
    """Return the k largest elements along the last axis, and their indices."""
    if len(call.operands) != 1:
        raise call.refuse(f"chlo.top_k with {len(call.operands)} operands: expected 1", refusals.BUNDLE_INVALID)
    (x,) = call.operands
    if type(k) is not int or not np.ndim(x) or not 0 <= k <= np.shape(x)[-1]:
        raise call.refuse(f"chlo.top_k whose k is {_text.cut(str(k), 40)}: expected an integer up to the last extent")
    return list(lax.top_k(x, k))


def _register(name: str) -> None:
    operation(f"chlo.{name}")(functools.partial(apply, name=name))


for _name in FUNCTIONS:
    _register(_name)


@operation("chlo.top_k", attributes=["k"])
def _top_k(call: Call) -> list[Value]:
    return top_k(call, call.attributes["k"])


def scan(call: Call) -> list[Value] | None:
    """Return the running reduction and its last value, for a composite chlo.scan that
    jax 0.11 writes for GPUs.

    Returns:
        None for any other scan, which is done by its decomposition.
    """
    given = call.attributes.get("composite_attributes", {})
    fields = {"dimension", "is_associative", "is_reverse", "operandSegmentSizes", "resultSegmentSizes"}
    if len(call.regions) != 1 or len(call.operands) != 2 or not isinstance(given, Mapping) or given.keys() != fields:
        return None
    (body,), (x, start) = call.regions, call.operands
    axis, is_reverse = given["dimension"], given["is_reverse"]
    returned = set(body.returns)
    if len(body.returns) != 2 or len(returned) != 1 or type(axis) is not int or not 0 <= axis < np.ndim(x):
        return None
    if type(is_reverse) is not bool or np.ndim(start) or not np.shape(x)[axis]:
        return None
    found = reductions.running(call, dataclasses.replace(body, returns=body.returns[:1]), start)
    if found is None:
        return None
    result = found(jnp.asarray(x), axis, is_reverse)
    return [result, lax.index_in_dim(result, 0 if is_reverse else -1, axis, keepdims=False)]
