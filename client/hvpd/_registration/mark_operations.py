"""Writes the operations of marks into a module: composites, and calls of functions.

`marks` decides what becomes a mark. `hvpd_server.importer.mark` reads marks.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.interpreters.mlir as lowering
import jax.interpreters.partial_eval
from jax.extend.core import ClosedJaxpr, Primitive
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from hvpd._registration.closures import check_rule
from hvpd._registration.hijax import is_high
from hvpd._registration.marked_primitives import UnmarkableError

VERSION: Final = 1
"""Version of all marks."""

Results = Sequence[Any]

CALL: Final = Primitive("hvpd_call")
"""Calls a function of the module by its symbol.

So a decomposition shares the body with the mark."""
CALL.multiple_results = True
CALL.def_abstract_eval(lambda *_, symbol, results: list(results))


def calling(symbol: str, results: Sequence[Any]) -> Callable[..., Any]:
    """Return a function that calls a function of the module."""
    return lambda *args: CALL.bind(*args, symbol=symbol, results=tuple(results))


def without_float0(jaxpr: Any, consts: Sequence[Any], what: str) -> ClosedJaxpr:
    """Drop the float0 arguments and results of a rule.

    An integer's tangent has no value to send.

    Raises:
        UnmarkableError: The rule computes with such a tangent.
    """
    # jax 0.11 tells constants from arguments only while their values are attached.
    jaxpr = ClosedJaxpr(jaxpr, consts).jaxpr
    kept = [variable.aval.dtype != jax.dtypes.float0 for variable in jaxpr.outvars]
    values = [variable.aval.dtype != jax.dtypes.float0 for variable in jaxpr.invars]
    reduced, used_consts, used = jax.interpreters.partial_eval.dce_jaxpr_consts(
        jaxpr, kept, [False] * len(jaxpr.constvars) + values
    )
    if any(use and not value for use, value in zip(used, values, strict=True)):
        raise UnmarkableError(
            f"the rule of a {what} uses the tangent of an integer, which has no value: ignore this tangent in the rule"
        )
    return ClosedJaxpr(reduced, [const for const, use in zip(consts, used_consts, strict=True) if use])


_ASKS_FOR_RESULTS: Final = "out_avals" in inspect.signature(lowering.lower_jaxpr_to_fun).parameters
"""Whether jax's function that lowers a jaxpr takes the types of its results."""


def emit_function(module: lowering.ModuleContext, name: str, jaxpr: ClosedJaxpr) -> str:
    """Lower a jaxpr into a private function of the module, and return its symbol.

    The function's leading arguments are the dimension variables, as in every function
    that jax lowers.
    """
    check_rule(jaxpr)
    if is_high(jaxpr):
        raise UnmarkableError(
            "the function has a derivative rule with a jitted function that jax traced before, and that uses custom_root or "
            "jax.experimental.hijax: register the function before it is called, or take jax.jit away from this part"
        )
    # Only jax 0.11 asks for the results' types, which the jaxpr has.
    results = {"out_avals": jaxpr.out_avals} if _ASKS_FOR_RESULTS else {}
    lowered = lowering.lower_jaxpr_to_fun(module, name, jaxpr, (), num_const_args=0, in_avals=jaxpr.in_avals, **results)
    return str(ir.StringAttr(lowered.attributes["sym_name"]).value)


def _flat(values: Sequence[Any]) -> list[Any]:
    """Return MLIR values or types in one list: an array can have several."""
    return list(lowering.ir_tree_registry.flatten(list(values))[0])


def _result_types(ctx: lowering.LoweringRuleContext, avals: Sequence[Any]) -> list[ir.Type]:
    return _flat([lowering.aval_to_ir_type(ctx.module_context, aval) for aval in avals])


def emit_composite(
    ctx: lowering.LoweringRuleContext,
    name: str,
    decomposition: str,
    facts: Mapping[str, Any],
    args: Sequence[Any],
    symbols: Sequence[str] = (),
) -> Results:
    """Emit the operation of a mark.

    Its operands are the dimension variables, then the arguments.
    """
    mark = json.dumps({"dimensions": len(ctx.dim_var_values), **facts}, allow_nan=False, sort_keys=True)
    # The references keep the functions of the rule alive in every pass, and let a
    # reader count them.
    functions = [ir.FlatSymbolRefAttr.get(symbol) for symbol in sorted(set(symbols))]
    attributes = {"mark": ir.StringAttr.get(mark), "functions": ir.ArrayAttr.get(functions)}
    operation = ir.Operation.create(
        "stablehlo.composite",
        _result_types(ctx, ctx.avals_out),
        [*ctx.dim_var_values, *_flat(args)],
        {
            "name": ir.StringAttr.get(f"hvpd.{name}"),
            "decomposition": ir.FlatSymbolRefAttr.get(decomposition),
            "composite_attributes": ir.DictAttr.get(attributes),
            "version": lowering.i32_attr(VERSION),
        },
    )
    return list(operation.results)


def emit_call(ctx: lowering.LoweringRuleContext, symbol: str, args: Sequence[Any], results: Sequence[Any]) -> Results:
    """Emit a call of a function of the module."""
    operands = [*ctx.dim_var_values, *_flat(args)]
    call = func.CallOp(_result_types(ctx, results), ir.FlatSymbolRefAttr.get(symbol), operands)
    return list(call.results)


def lower_call(ctx: lowering.LoweringRuleContext, *args: Any, symbol: str, results: Sequence[Any]) -> Results:
    """Lower `CALL`."""
    return emit_call(ctx, symbol, args, results)
