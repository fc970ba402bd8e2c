"""Marks that carry functions: custom rules, checkpoints, linear solves and loops become
jax's own constructs again.

Every function of a rule must fit the types of the operation, so that a wrong rule is
refused when the program is read, and not when it is differentiated.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.custom_derivatives
import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd import _text
from hvpd_server.importer.graph import TensorType
from hvpd_server.importer.mark import Mark, arrays, is_float_type, type_of
from hvpd_server.importer.table import Call, Refused, Value, known

_UNROLLED: Final = 64
"""Most copies of a scan's body that a program may ask for."""


def _stop_gradient(mark: Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
    mark.done()
    if len(args) != 1:
        raise mark.refuse(f"with {len(args)} operands: expected one")
    return [args[0] if known(args[0]) else lax.stop_gradient(args[0])]


def _checkpoint(mark: Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
    prevent_cse = mark.take("prevent_cse")
    mark.done()
    if type(prevent_cse) is not bool:
        prevent_cse = tuple(mark.booleans(prevent_cse, "prevent_cse", len(args)))
    call = mark.call
    body = call.attributes["decomposition"]
    mark.fit(body, "decomposition", [type_of(each) for each in [*sizes, *args]], call.types)
    return list(jax.checkpoint(lambda *args: arrays(call.call(body, *sizes, *args)), prevent_cse=prevent_cse)(*args))


def _scan(mark: Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
    call = mark.call
    body = mark.symbol(mark.take("body"), "body")
    first = mark.integer("consts", 0, len(args))
    carried = mark.integer("carry", 0, min(len(args) - first, len(call.types)))
    reverse = mark.boolean("reverse")
    length = mark.take("length")
    unroll = mark.integer("unroll", 0, (1 << 31) - 1)
    mark.done()
    consts, carry, rows = args[:first], args[first : first + carried], args[first + carried :]
    if length is None and rows and np.ndim(rows[0]):
        length = int(np.shape(rows[0])[0])
    length = mark.checked_integer(length, "length", 0, (1 << 31) - 1)
    if any(np.shape(each)[:1] != (length,) for each in rows):
        raise mark.refuse(f"whose rows are not {length}, its length")
    row_types = [TensorType(type_.shape[1:], type_.dtype) for type_ in map(type_of, rows)]
    out_types = [TensorType(type_.shape[1:], type_.dtype) for type_ in call.types[carried:]]
    carry_types = [type_of(each) for each in carry]
    taken = [*(type_of(each) for each in [*sizes, *consts]), *carry_types, *row_types]
    mark.fit(body, "body", taken, [*carry_types, *out_types])

    def step(carry: tuple[Value, ...], row: tuple[Value, ...]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
        found = arrays(call.call(body, *sizes, *consts, *carry, *row))
        return found[:carried], found[carried:]

    # Copies of the body beyond a few make programs larger, not faster. Zero means all
    # of a loop, as in jax.
    unroll = min(unroll or max(length, 1), _UNROLLED)
    call.check_rounds(length, carry)
    last, stacked = lax.scan(step, arrays(carry), arrays(rows), length=length, reverse=reverse, unroll=unroll)
    return [*last, *stacked]


def _linear_solve(mark: Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
    names = ("matvec", "vecmat", "solve", "transpose_solve")
    call = mark.call
    found = {name: mark.take(name) for name in names}
    lengths = mark.items("consts")
    if len(lengths) != len(names):
        raise mark.refuse(f"with {len(lengths)} numbers of constants: expected {len(names)}")
    lengths = [mark.checked_integer(each, "consts", 0, len(args)) for each in lengths]
    auxiliary = mark.integer("auxiliary", 0, len(call.types))
    mark.done()
    stops = list(itertools.accumulate(lengths, initial=0))
    right = args[stops[-1] :]
    if stops[-1] > len(args) or len(right) + auxiliary != len(call.types) or not right:
        raise mark.refuse("whose constants, right side and results do not fit its operands")
    types = [type_of(each) for each in right]
    constants = {name: args[start:stop] for name, start, stop in zip(names, stops[:-1], stops[1:], strict=True)}
    functions: dict[str, Callable[[Sequence[Value]], tuple[Value, ...]]] = {}
    for name in names:
        if found[name] is None and name in ("vecmat", "transpose_solve"):
            continue
        symbol = mark.symbol(found[name], name)
        results = types if name in ("matvec", "vecmat") else [*types, *call.types[len(types) :]]
        mark.fit(symbol, name, [*(type_of(each) for each in [*sizes, *constants[name]]), *types], results)
        functions[name] = _linear(call, symbol, [*sizes, *constants[name]])

    def solved(name: str) -> Callable[[Any, Sequence[Value]], Any]:
        def solve(_: Any, right: Sequence[Value]) -> Any:
            results = functions[name](right)
            return (results[: len(types)], results[len(types) :]) if auxiliary else results

        return solve

    results = lax.custom_linear_solve(
        functions["matvec"],
        arrays(right),
        solved("solve"),
        solved("transpose_solve") if "transpose_solve" in functions else None,
        symmetric=found["vecmat"] == found["matvec"],
        has_aux=auxiliary > 0,
    )
    return [*results[0], *results[1]] if auxiliary else list(results)


def _linear(call: Call, symbol: str, first: Sequence[Value]) -> Callable[[Sequence[Value]], tuple[Value, ...]]:
    return lambda right: arrays(call.call(symbol, *first, *right))


def _custom_jvp(mark: Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
    call = mark.call
    consts = mark.integer("consts", 0, len(args))
    symbolic = mark.boolean("symbolic_zeros")
    given = mark.mapping("rules")
    mark.done()
    types = [type_of(each) for each in args]
    floats = [is_float_type(type_) for type_ in types[consts:]]
    full = "1" * sum(floats)
    size_types = [type_of(each) for each in sizes]
    mark.fit(call.attributes["decomposition"], "decomposition", [*size_types, *types], call.types)
    rules: dict[str, tuple[str, list[bool]]] = {}
    for pattern, rule in given.items():
        if len(pattern) != len(full) or set(pattern) - {"0", "1"} or type(rule) is not dict:
            raise mark.refuse(
                f"with a rule for {_text.cut(pattern, 40)}: expected 0 or 1 for each of {len(full)} floating operands"
            )
        if rule.keys() != {"function", "zeros"} or (pattern != full and not symbolic):
            raise mark.refuse(f"whose rule for {_text.cut(pattern, 40)} has the wrong fields")
        symbol = mark.symbol(rule["function"], "rule")
        zeros = mark.booleans(rule["zeros"], "zeros", len(call.types))
        perturbed = iter(pattern)
        tangents = [
            t for t, is_float in zip(types[consts:], floats, strict=True) if is_float and next(perturbed) == "1"
        ]
        found = [t for t, zero in zip(call.types, zeros, strict=True) if not zero and is_float_type(t)]
        mark.fit(symbol, "rule", [*size_types, *types[consts:], *tangents], [*call.types, *found])
        rules[pattern] = (symbol, zeros)
    if rules and full not in rules:
        raise mark.refuse("without a rule for all operands together")
    fun = jax.custom_jvp(lambda *args: arrays(call.call(call.attributes["decomposition"], *sizes, *args)))

    def jvp(primals: Sequence[Value], tangents: Sequence[Any]) -> tuple[Any, Any]:
        if not rules:
            raise _exhausted(mark)
        directions = [t for t, is_float in zip(tangents[consts:], floats, strict=True) if is_float]
        pattern = "".join("0" if _is_zero(each) else "1" for each in directions)
        if pattern not in rules:
            pattern, directions = full, [_instantiated(each) for each in directions]
        symbol, zeros = rules[pattern]
        kept = [each for each, bit in zip(directions, pattern, strict=True) if bit == "1"]
        results = arrays(call.call(symbol, *sizes, *primals[consts:], *kept))
        outs, slopes = results[: len(zeros)], iter(results[len(zeros) :])
        return outs, tuple(
            _symbolic_zero(out) if zero or not is_float_type(type_) else next(slopes)
            for out, zero, type_ in zip(outs, zeros, call.types, strict=True)
        )

    fun.defjvp(jvp, symbolic_zeros=True)
    return list(fun(*args))


def _custom_vjp(mark: Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
    call = mark.call
    consts = mark.integer("consts", 0, len(args))
    forward, backward = mark.take("forward"), mark.take("backward")
    types = [type_of(each) for each in args]
    size_types = [type_of(each) for each in sizes]
    mark.fit(call.attributes["decomposition"], "decomposition", [*size_types, *types], call.types)
    fun = jax.custom_vjp(lambda *args: arrays(call.call(call.attributes["decomposition"], *sizes, *args)))
    if forward is None and backward is None:
        mark.done()
        fun.defvjp(functools.partial(_raise_exhausted, mark), functools.partial(_raise_exhausted, mark))
        return list(fun(*args))
    forward, backward = mark.symbol(forward, "forward"), mark.symbol(backward, "backward")
    residuals, given_zeros = mark.items("residuals"), mark.items("zeros")
    mark.done()
    taken = types[consts:]
    zeros = mark.booleans(given_zeros, "zeros", len(taken))
    sources = [r if r is None else mark.checked_integer(r, "residuals", 0, len(taken) - 1) for r in residuals]
    computed = sources.count(None)
    kept = iter(call.signature(forward).result_types)
    residual_types = [next(kept, None) if source is None else taken[source] for source in sources]
    if None in residual_types:
        raise mark.refuse(f"whose forward returns fewer arrays than its {computed} residuals")
    pruned = [t for t, source in zip(residual_types, sources, strict=True) if source is None and t is not None]
    mark.fit(forward, "forward", [*size_types, *taken], [*pruned, *call.types])
    cotangents = [type_ for type_ in call.types if is_float_type(type_)]
    found = [t for t, zero in zip(taken, zeros, strict=True) if not zero and is_float_type(t)]
    mark.fit(backward, "backward", [*size_types, *(t for t in residual_types if t is not None), *cotangents], found)

    def primal_and_residuals(*args: Any) -> tuple[Any, Any]:
        if any(each.perturbed for each in args[:consts]):
            raise mark.refuse("that closes over a value which is differentiated: pass it as an argument")
        values = [each.value for each in args[consts:]]
        results = arrays(call.call(forward, *sizes, *values))
        return results[computed:], (results[:computed], tuple(values[s] for s in sources if s is not None))

    def pull(kept: Any, slopes: Any) -> tuple[Any, ...]:
        computed_ones, forwarded = map(iter, kept)
        values = [next(computed_ones) if source is None else next(forwarded) for source in sources]
        directions = [
            _instantiated(slope) for slope, type_ in zip(slopes, call.types, strict=True) if is_float_type(type_)
        ]
        results = iter(arrays(call.call(backward, *sizes, *values, *directions)))
        pulled = [None if zero or not is_float_type(t) else next(results) for zero, t in zip(zeros, taken, strict=True)]
        return (*[None] * consts, *pulled)

    fun.defvjp(primal_and_residuals, pull, symbolic_zeros=True)
    return list(fun(*args))


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _instantiated(tangent: Any) -> Value:
    return jnp.zeros(tangent.shape, tangent.dtype) if _is_zero(tangent) else tangent


def _symbolic_zero(value: Value) -> Any:
    return jax.custom_derivatives.SymbolicZero(jax.typeof(value).to_tangent_aval())


def _exhausted(mark: Mark) -> Refused:
    return mark.call.refuse(
        f"{mark.call.attributes['name']} whose rule is differentiated again: rules are kept for the two derivatives of a Hessian, "
        "and for fewer where a rule raised an error when the client traced it. Register the function with "
        'mode="finite_difference", which needs one derivative only'
    )


def _raise_exhausted(mark: Mark, *_: Any) -> Any:
    raise _exhausted(mark)


STRUCTURAL: Final[Mapping[str, Callable[[Mark, Sequence[Value], Sequence[Value]], Sequence[Value]]]] = {
    "hvpd.stop_gradient": _stop_gradient,
    "hvpd.checkpoint": _checkpoint,
    "hvpd.scan": _scan,
    "hvpd.linear_solve": _linear_solve,
    "hvpd.custom_jvp": _custom_jvp,
    "hvpd.custom_vjp": _custom_vjp,
}
"""Marks that carry functions."""
