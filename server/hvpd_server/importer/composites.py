"""Composites: puts back derivative rules that a jax client marked, and maps CHLO's functions to jax's.

A composite named "hvpd.*" is a mark of `hvpd._registration.marks`. Its attribute "mark" is strict JSON: parameters, and symbols
of the functions of a rule. A program is hostile, so every field of a mark is checked, every function of a rule must fit the
operation's types, and only primitives of `PRIMITIVES` are bound. Any other composite stands for its decomposition.

Guarantees: a mark is put back exactly or refused by its name; no field of a mark is ignored; the functions of a rule are those
that the attribute "functions" lists, which the reader counts as calls.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.custom_derivatives
import jax.extend.core.primitives
import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd_server import _rules
from hvpd_server.importer import chlo
from hvpd_server.importer.graph import TensorType
from hvpd_server.importer.table import Call, Refused, Value, known, operation

VERSION: Final = 1
"""Version of the marks that this file reads."""

_MARK_CHARACTERS: Final = 1 << 16
"""Longest JSON of a mark."""

_UNROLLED: Final = 64
"""Most copies of a scan's body that a program may ask for."""

_Check = Callable[[Any, "_Mark", Sequence[Value]], Any]
"""Checks one parameter of a primitive: (JSON value, mark, operands) -> the value for jax."""


@dataclasses.dataclass
class _Mark:
    """The fields of a mark; each is taken once."""

    call: Call
    fields: dict[str, Any]
    functions: frozenset[str]

    def refuse(self, why: str) -> Refused:
        """Return the refusal of the mark; `why` completes "a stablehlo.composite hvpd.scan ..."."""
        return self.call.refuse(f"{str(self.call.attributes['name'])[:80]} {why}", _rules.BUNDLE_INVALID)

    def take(self, name: str) -> Any:
        """Return a field."""
        if name not in self.fields:
            raise self.refuse(f"without the field {name}")
        return self.fields.pop(name)

    def integer(self, name: str, low: int, high: int) -> int:
        """Return a field that is an integer from `low` to `high`."""
        return self.checked_integer(self.take(name), name, low, high)

    def checked_integer(self, value: Any, name: str, low: int, high: int) -> int:
        """Return a value that is an integer from `low` to `high`."""
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(f"whose {name} is {str(value)[:40]}: expected an integer from {low} to {high}")
        return value

    def boolean(self, name: str) -> bool:
        """Return a field that is true or false."""
        value = self.take(name)
        if type(value) is not bool:
            raise self.refuse(f"whose {name} is {str(value)[:40]}: expected true or false")
        return value

    def items(self, name: str) -> list[Any]:
        """Return a field that is a list."""
        value = self.take(name)
        if type(value) is not list:
            raise self.refuse(f"whose {name} is {str(value)[:40]}: expected a list")
        return value

    def booleans(self, value: Any, name: str, count: int) -> list[bool]:
        """Return a value that is a list of `count` booleans."""
        if type(value) is not list or len(value) != count or any(type(each) is not bool for each in value):
            raise self.refuse(f"whose {name} is {str(value)[:40]}: expected {count} booleans")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """Return a field that is an object."""
        value = self.take(name)
        if type(value) is not dict:
            raise self.refuse(f"whose {name} is {str(value)[:40]}: expected an object")
        return value

    def symbol(self, value: Any, name: str) -> str:
        """Return a value that names a function of the rule."""
        if type(value) is not str or value not in self.functions:
            raise self.refuse(f"whose {name} is {str(value)[:40]}: expected a name in its attribute functions")
        return value

    def done(self) -> None:
        """Check that every field was taken."""
        if self.fields:
            raise self.refuse(f"with the field {min(self.fields)[:40]}, which is not known")

    def fit(self, symbol: str, name: str, arguments: Sequence[TensorType], results: Sequence[TensorType]) -> None:
        """Check the types of a function.

        Raises:
            Refused: The function takes or returns other arrays.
        """
        block = self.call.signature(symbol)
        for what, found, expected in (
            ("takes", block.types, arguments),
            ("returns", block.result_types, results),
        ):
            fits = len(found) == len(expected) and all(map(_compatible, found, expected))
            if not fits:
                raise self.refuse(
                    f"whose {name} {what} {_written(found)}: expected {_written(expected)}, as the operation's types say"
                )


def _compatible(left: TensorType, right: TensorType) -> bool:
    return (
        left.dtype == right.dtype
        and len(left.shape) == len(right.shape)
        and all(a is None or b is None or a == b for a, b in zip(left.shape, right.shape, strict=True))
    )


def _written(types: Sequence[TensorType]) -> str:
    shown = [f"{type_.dtype}[{','.join('?' if e is None else str(e) for e in type_.shape)}]" for type_ in types[:6]]
    return f"({', '.join(shown)}{', ...' if len(types) > len(shown) else ''})"


def _type(value: Value) -> TensorType:
    return TensorType(tuple(int(extent) for extent in np.shape(value)), np.dtype(value.dtype).name)


def _is_float(type_: TensorType) -> bool:
    return bool(jnp.issubdtype(jnp.dtype(type_.dtype), np.inexact))


def _arrays(values: Sequence[Value]) -> tuple[Value, ...]:
    """Return jax arrays, as functions with a rule must return them."""
    return tuple(jnp.asarray(each) for each in values)


@operation("stablehlo.composite", attributes=["name", "decomposition", "composite_attributes", "version"])
def _composite(call: Call) -> Sequence[Value]:
    name = call.attributes.get("name")
    if type(name) is not str:
        raise call.refuse("without a name", _rules.BUNDLE_INVALID)
    if name.startswith("hvpd."):
        return _marked(call, name)
    if name.startswith("chlo."):
        return _chlo(call, name.removeprefix("chlo."))
    call.report.presumed[f"the composite {name[:80]} has the derivatives of its decomposition"] += 1
    return call.call(call.attributes["decomposition"], *call.operands)


def _marked(call: Call, name: str) -> Sequence[Value]:
    mark = _read(call)
    dimensions = mark.integer("dimensions", 0, len(call.operands))
    sizes, args = call.operands[:dimensions], call.operands[dimensions:]
    if not all(isinstance(size, np.ndarray) and size.shape == () and size.dtype.kind in "iu" for size in sizes):
        raise mark.refuse("whose dimensions depend on x or on data: sizes must follow from shapes")
    if name.startswith("hvpd.jax."):
        return _primitive(mark, name.removeprefix("hvpd.jax."), args)
    rule = _STRUCTURAL.get(name)
    if rule is None:
        raise mark.refuse("which is not known: use the version of hvpd that the server has")
    return rule(mark, sizes, args)


def _read(call: Call) -> _Mark:
    """Return the mark of a composite.

    Raises:
        Refused: Another version, or not the JSON of an object.
    """
    name = str(call.attributes["name"])[:80]
    if call.attributes.get("version") != VERSION:
        raise call.refuse(
            f"{name} of version {str(call.attributes.get('version'))[:20]}: expected version {VERSION}. Use the version of hvpd "
            "that the server has"
        )
    given = call.attributes.get("composite_attributes", {})
    text, functions = (given.get("mark"), given.get("functions")) if isinstance(given, Mapping) else (None, None)
    strings = isinstance(functions, list) and all(type(each) is str for each in functions)
    if functions is None or not strings or type(text) is not str or len(given) != 2 or len(text) > _MARK_CHARACTERS:
        raise call.refuse(f"{name} without the attributes mark and functions of a mark", _rules.BUNDLE_INVALID)
    try:
        fields = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise call.refuse(f"{name} whose mark is not JSON: {str(error)[:100]}", _rules.BUNDLE_INVALID) from None
    if type(fields) is not dict:
        raise call.refuse(f"{name} whose mark is not a JSON object", _rules.BUNDLE_INVALID)
    return _Mark(call, fields, frozenset(functions))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _stop_gradient(mark: _Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
    mark.done()
    if len(args) != 1:
        raise mark.refuse(f"with {len(args)} operands: expected one")
    return [args[0] if known(args[0]) else lax.stop_gradient(args[0])]


def _checkpoint(mark: _Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
    prevent_cse = mark.take("prevent_cse")
    mark.done()
    if type(prevent_cse) is not bool:
        prevent_cse = tuple(mark.booleans(prevent_cse, "prevent_cse", len(args)))
    call = mark.call
    body = call.attributes["decomposition"]
    mark.fit(body, "decomposition", [_type(each) for each in [*sizes, *args]], call.types)
    return list(jax.checkpoint(lambda *args: _arrays(call.call(body, *sizes, *args)), prevent_cse=prevent_cse)(*args))


def _scan(mark: _Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
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
    row_types = [TensorType(type_.shape[1:], type_.dtype) for type_ in map(_type, rows)]
    out_types = [TensorType(type_.shape[1:], type_.dtype) for type_ in call.types[carried:]]
    carry_types = [_type(each) for each in carry]
    taken = [*(_type(each) for each in [*sizes, *consts]), *carry_types, *row_types]
    mark.fit(body, "body", taken, [*carry_types, *out_types])

    def step(carry: tuple[Value, ...], row: tuple[Value, ...]) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
        found = _arrays(call.call(body, *sizes, *consts, *carry, *row))
        return found[:carried], found[carried:]

    # Copies of the body beyond a few make programs larger, not faster. Zero means all of a loop, as in jax.
    unroll = min(unroll or max(length, 1), _UNROLLED)
    last, stacked = lax.scan(step, _arrays(carry), _arrays(rows), length=length, reverse=reverse, unroll=unroll)
    return [*last, *stacked]


def _linear_solve(mark: _Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
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
    types = [_type(each) for each in right]
    constants = {name: args[start:stop] for name, start, stop in zip(names, stops[:-1], stops[1:], strict=True)}
    functions: dict[str, Callable[[Sequence[Value]], tuple[Value, ...]]] = {}
    for name in names:
        if found[name] is None and name in ("vecmat", "transpose_solve"):
            continue
        symbol = mark.symbol(found[name], name)
        results = types if name in ("matvec", "vecmat") else [*types, *call.types[len(types) :]]
        mark.fit(symbol, name, [*(_type(each) for each in [*sizes, *constants[name]]), *types], results)
        functions[name] = _linear(call, symbol, [*sizes, *constants[name]])

    def solved(name: str) -> Callable[[Any, Sequence[Value]], Any]:
        def solve(_: Any, right: Sequence[Value]) -> Any:
            results = functions[name](right)
            return (results[: len(types)], results[len(types) :]) if auxiliary else results

        return solve

    results = lax.custom_linear_solve(
        functions["matvec"],
        _arrays(right),
        solved("solve"),
        solved("transpose_solve") if "transpose_solve" in functions else None,
        symmetric=found["vecmat"] == found["matvec"],
        has_aux=auxiliary > 0,
    )
    return [*results[0], *results[1]] if auxiliary else list(results)


def _linear(call: Call, symbol: str, first: Sequence[Value]) -> Callable[[Sequence[Value]], tuple[Value, ...]]:
    return lambda right: _arrays(call.call(symbol, *first, *right))


def _custom_jvp(mark: _Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
    call = mark.call
    consts = mark.integer("consts", 0, len(args))
    symbolic = mark.boolean("symbolic_zeros")
    given = mark.mapping("rules")
    mark.done()
    types = [_type(each) for each in args]
    floats = [_is_float(type_) for type_ in types[consts:]]
    full = "1" * sum(floats)
    size_types = [_type(each) for each in sizes]
    mark.fit(call.attributes["decomposition"], "decomposition", [*size_types, *types], call.types)
    rules: dict[str, tuple[str, list[bool]]] = {}
    for pattern, rule in given.items():
        if len(pattern) != len(full) or set(pattern) - {"0", "1"} or type(rule) is not dict:
            raise mark.refuse(
                f"with a rule for {pattern[:40]}: expected 0 or 1 for each of {len(full)} floating operands"
            )
        if rule.keys() != {"function", "zeros"} or (pattern != full and not symbolic):
            raise mark.refuse(f"whose rule for {pattern[:40]} has the wrong fields")
        symbol = mark.symbol(rule["function"], "rule")
        zeros = mark.booleans(rule["zeros"], "zeros", len(call.types))
        perturbed = iter(pattern)
        tangents = [
            t for t, is_float in zip(types[consts:], floats, strict=True) if is_float and next(perturbed) == "1"
        ]
        found = [t for t, zero in zip(call.types, zeros, strict=True) if not zero and _is_float(t)]
        mark.fit(symbol, "rule", [*size_types, *types[consts:], *tangents], [*call.types, *found])
        rules[pattern] = (symbol, zeros)
    if rules and full not in rules:
        raise mark.refuse("without a rule for all operands together")
    fun = jax.custom_jvp(lambda *args: _arrays(call.call(call.attributes["decomposition"], *sizes, *args)))

    def jvp(primals: Sequence[Value], tangents: Sequence[Any]) -> tuple[Any, Any]:
        if not rules:
            raise _exhausted(mark)
        directions = [t for t, is_float in zip(tangents[consts:], floats, strict=True) if is_float]
        pattern = "".join("0" if _is_zero(each) else "1" for each in directions)
        if pattern not in rules:
            pattern, directions = full, [_instantiated(each) for each in directions]
        symbol, zeros = rules[pattern]
        kept = [each for each, bit in zip(directions, pattern, strict=True) if bit == "1"]
        results = _arrays(call.call(symbol, *sizes, *primals[consts:], *kept))
        outs, slopes = results[: len(zeros)], iter(results[len(zeros) :])
        return outs, tuple(
            _symbolic_zero(out) if zero or not _is_float(type_) else next(slopes)
            for out, zero, type_ in zip(outs, zeros, call.types, strict=True)
        )

    fun.defjvp(jvp, symbolic_zeros=True)
    return list(fun(*args))


def _custom_vjp(mark: _Mark, sizes: Sequence[Value], args: Sequence[Value]) -> Sequence[Value]:
    call = mark.call
    consts = mark.integer("consts", 0, len(args))
    forward, backward = mark.take("forward"), mark.take("backward")
    types = [_type(each) for each in args]
    size_types = [_type(each) for each in sizes]
    mark.fit(call.attributes["decomposition"], "decomposition", [*size_types, *types], call.types)
    fun = jax.custom_vjp(lambda *args: _arrays(call.call(call.attributes["decomposition"], *sizes, *args)))
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
    cotangents = [type_ for type_ in call.types if _is_float(type_)]
    found = [t for t, zero in zip(taken, zeros, strict=True) if not zero and _is_float(t)]
    mark.fit(backward, "backward", [*size_types, *(t for t in residual_types if t is not None), *cotangents], found)

    def primal_and_residuals(*args: Any) -> tuple[Any, Any]:
        if any(each.perturbed for each in args[:consts]):
            raise mark.refuse("that closes over a value which is differentiated: pass it as an argument")
        values = [each.value for each in args[consts:]]
        results = _arrays(call.call(forward, *sizes, *values))
        return results[computed:], (results[:computed], tuple(values[s] for s in sources if s is not None))

    def pull(kept: Any, slopes: Any) -> tuple[Any, ...]:
        computed_ones, forwarded = map(iter, kept)
        values = [next(computed_ones) if source is None else next(forwarded) for source in sources]
        directions = [_instantiated(slope) for slope, type_ in zip(slopes, call.types, strict=True) if _is_float(type_)]
        results = iter(_arrays(call.call(backward, *sizes, *values, *directions)))
        pulled = [None if zero or not _is_float(t) else next(results) for zero, t in zip(zeros, taken, strict=True)]
        return (*[None] * consts, *pulled)

    fun.defvjp(primal_and_residuals, pull, symbolic_zeros=True)
    return list(fun(*args))


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


def _instantiated(tangent: Any) -> Value:
    return jnp.zeros(tangent.shape, tangent.dtype) if _is_zero(tangent) else tangent


def _symbolic_zero(value: Value) -> Any:
    return jax.custom_derivatives.SymbolicZero(jax.typeof(value).to_tangent_aval())


def _exhausted(mark: _Mark) -> Refused:
    return mark.call.refuse(
        f"{mark.call.attributes['name']} whose rule is differentiated again: its derivatives were kept only as far as a Hessian "
        "needs them"
    )


def _raise_exhausted(mark: _Mark, *_: Any) -> Any:
    raise _exhausted(mark)


_STRUCTURAL: Final[Mapping[str, Callable[[_Mark, Sequence[Value], Sequence[Value]], Sequence[Value]]]] = {
    "hvpd.stop_gradient": _stop_gradient,
    "hvpd.checkpoint": _checkpoint,
    "hvpd.scan": _scan,
    "hvpd.linear_solve": _linear_solve,
    "hvpd.custom_jvp": _custom_jvp,
    "hvpd.custom_vjp": _custom_vjp,
}
"""Marks that carry functions."""


@dataclasses.dataclass(frozen=True)
class _Primitive:
    """A primitive that a mark may bind."""

    operands: int | None
    """Number of operands; None for one or more."""
    parameters: Mapping[str, _Check] = dataclasses.field(default_factory=dict)
    """The check of each parameter; a mark has exactly these."""
    rebuild: Callable[..., Any] | None = None
    """(*operands, **parameters) -> results; None for the primitive of this name."""


def _primitive(mark: _Mark, name: str, args: Sequence[Value]) -> Sequence[Value]:
    found = PRIMITIVES.get(name)
    if found is None:
        raise mark.refuse("which is not known: use the version of hvpd that the server has")
    given = mark.mapping("parameters")
    mark.done()
    if len(args) != found.operands if found.operands is not None else not args:
        raise mark.refuse(f"with {len(args)} operands: expected {found.operands or 'one or more'}")
    if given.keys() != found.parameters.keys():
        raise mark.refuse(f"with the parameters {sorted(given)}"[:200] + f": expected {sorted(found.parameters)}")
    params = {key: check(given[key], mark, args) for key, check in found.parameters.items()}
    if name in _SIZES and known(*args):
        # Sizes stay known when the operations of the decomposition compute them.
        return mark.call.call(mark.call.attributes["decomposition"], *mark.call.operands)
    results = found.rebuild(*args, **params) if found.rebuild else _bound(name)(*args, **params)
    return list(results) if isinstance(results, (list, tuple)) else [results]


_SIZES: Final = frozenset(["integer_pow", "square"])
"""Primitives that sizes are computed with."""


@functools.cache
def _bound(name: str) -> Callable[..., Any]:
    """Return the primitive's bind."""
    for module in (lax, lax.linalg, jax.extend.core.primitives):
        primitive = getattr(module, f"{name}_p", None)
        if primitive is not None:
            return lambda *args, **params: primitive.bind(*_arrays(args), **params)
    raise NotImplementedError(f"this version of jax has no {name}")


def _flag(value: Any, mark: _Mark, args: Sequence[Value]) -> bool:
    if type(value) is not bool:
        raise mark.refuse(f"with the parameter {str(value)[:40]}: expected true or false")
    return value


def _absent(value: Any, mark: _Mark, args: Sequence[Value]) -> None:
    if value is not None:
        raise mark.refuse(f"with the parameter {str(value)[:40]}: expected null")


def _is(expected: Any) -> _Check:
    def check(value: Any, mark: _Mark, args: Sequence[Value]) -> Any:
        if value is not expected:
            raise mark.refuse(f"with the parameter {str(value)[:40]}: expected {json.dumps(expected)}")
        return value

    return check


def _integer(low: int, high: int) -> _Check:
    return lambda value, mark, args: mark.checked_integer(value, "parameter", low, high)


def _number(low: float, high: float) -> _Check:
    def check(value: Any, mark: _Mark, args: Sequence[Value]) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise mark.refuse(f"with the parameter {str(value)[:40]}: expected a number from {low} to {high}")
        return float(value)

    return check


def _either(*checks: _Check) -> _Check:
    """Return a check that lets null pass, or what the given check lets pass."""
    (check,) = checks
    return lambda value, mark, args: None if value is None else check(value, mark, args)


def _axis(value: Any, mark: _Mark, args: Sequence[Value]) -> int:
    return mark.checked_integer(value, "axis", 0, np.ndim(args[0]) - 1)


def _any_axis(value: Any, mark: _Mark, args: Sequence[Value]) -> int:
    return mark.checked_integer(value, "axis", -np.ndim(args[0]), np.ndim(args[0]) - 1)


def _one_axis(value: Any, mark: _Mark, args: Sequence[Value]) -> tuple[int]:
    if type(value) is not list or len(value) != 1:
        raise mark.refuse(f"with the axes {str(value)[:40]}: expected one axis")
    return (_axis(value[0], mark, args),)


def _index_dtype(value: Any, mark: _Mark, args: Sequence[Value]) -> Any:
    if value not in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        raise mark.refuse(f"with the parameter {str(value)[:40]}: expected the name of an integer dtype")
    return np.dtype(value)


def _choice(**choices: Any) -> _Check:
    def check(value: Any, mark: _Mark, args: Sequence[Value]) -> Any:
        if type(value) is not str or value not in choices:
            raise mark.refuse(f"with the parameter {str(value)[:40]}: expected one of {', '.join(choices)}")
        return choices[value]

    return check


def _member(enum: Any) -> _Check:
    return _choice(**{each.name: each for each in enum})


def _keys(value: Any, mark: _Mark, args: Sequence[Value]) -> int:
    return mark.checked_integer(value, "num_keys", 1, len(args))


def _leading(value: Any, mark: _Mark, args: Sequence[Value]) -> int:
    return mark.checked_integer(value, "k", 0, max(np.shape(args[0]), default=0))


def _integers(count: int | None, low: int, high: int) -> _Check:
    """Return a check for a list of integers, one for each axis of the first operand when `count` is None."""

    def check(value: Any, mark: _Mark, args: Sequence[Value]) -> tuple[int, ...]:
        expected = np.ndim(args[0]) if count is None else count
        if type(value) is not list or len(value) != expected:
            raise mark.refuse(f"with the parameter {str(value)[:40]}: expected {expected} integers")
        return tuple(mark.checked_integer(each, "parameter", low, high) for each in value)

    return check


def _padding(value: Any, mark: _Mark, args: Sequence[Value]) -> tuple[tuple[int, ...], ...]:
    if type(value) is not list or len(value) != np.ndim(args[0]):
        raise mark.refuse(f"with the padding {str(value)[:40]}: expected a pair for each axis")
    return tuple(_integers(2, -_LARGE, _LARGE)(each, mark, args) for each in value)


def _gather_dimensions(value: Any, mark: _Mark, args: Sequence[Value]) -> lax.GatherDimensionNumbers:
    names = (
        "offset_dims",
        "collapsed_slice_dims",
        "start_index_map",
        "operand_batching_dims",
        "start_indices_batching_dims",
    )
    if type(value) is not dict or value.keys() != set(names):
        raise mark.refuse(f"with the dimension numbers {str(value)[:80]}: expected {', '.join(names)}")
    for each in value.values():
        if type(each) is not list or any(type(axis) is not int or not 0 <= axis < _RANK for axis in each):
            raise mark.refuse(f"with the dimension numbers {str(each)[:80]}: expected lists of axes")
    return lax.GatherDimensionNumbers(**{name: tuple(value[name]) for name in names})


def _slice_sizes(value: Any, mark: _Mark, args: Sequence[Value]) -> tuple[int, ...]:
    extents = np.shape(args[0])
    if type(value) is not list or len(value) != len(extents):
        raise mark.refuse(f"with the slice sizes {str(value)[:40]}: expected one for each of {len(extents)} axes")
    return tuple(
        extent if size is None else mark.checked_integer(size, "slice size", 0, extent)
        for size, extent in zip(value, extents, strict=True)
    )


def _fill_value(value: Any, mark: _Mark, args: Sequence[Value]) -> Any:
    if value is not None and type(value) not in (bool, int, float):
        raise mark.refuse(f"with the fill value {str(value)[:40]}: expected a number or null")
    return value


def _permutation_size(value: Any, mark: _Mark, args: Sequence[Value]) -> int:
    return mark.checked_integer(value, "permutation_size", max(np.shape(args[0])[-1:], default=0), _LARGE)


def _random_gamma(key: Value, shape: Value, *, impl: str, log_space: bool) -> Any:
    wrapped = jax.random.wrap_key_data(key, impl=impl)
    return _bound_key("random_gamma")(wrapped, shape, log_space=log_space)


def _bound_key(name: str) -> Callable[..., Any]:
    """Return the bind of a primitive whose first operand is a random key, which is no plain array."""
    bind: Callable[..., Any] = getattr(jax.extend.core.primitives, f"{name}_p").bind
    return bind


_LARGE: Final = (1 << 31) - 1
_RANK: Final = 64

_CUMULATIVE: Final = _Primitive(1, {"axis": _axis, "reverse": _flag})
_ARG: Final = _Primitive(1, {"axes": _one_axis, "index_dtype": _index_dtype})
_SUBSET: Final = _either(_integers(2, 0, _LARGE))

PRIMITIVES: Final[Mapping[str, _Primitive]] = {
    **{
        name: _Primitive(1)
        for name in (
            *("acos", "acosh", "asin", "asinh", "atan", "atanh", "cosh", "sinh", "square"),
            *("erf", "erfc", "erf_inv", "lgamma", "digamma", "bessel_i0e", "bessel_i1e"),
            *("cholesky", "lu", "hessenberg"),
        )
    },
    **{
        name: _Primitive(2)
        for name in (
            *("nextafter", "polygamma", "zeta", "igamma", "igammac", "igamma_grad_a", "pow"),
            *("max", "min"),
            "householder_product",
        )
    },
    "regularized_incomplete_beta": _Primitive(3),
    "threefry2x32": _Primitive(4),
    **{
        name: _Primitive(1, {"accuracy": _absent})
        for name in ("exp2", "logistic", "cos", "exp", "log", "log1p", "sin", "sqrt")
    },
    "integer_pow": _Primitive(1, {"y": _integer(-_LARGE, _LARGE)}),
    "random_gamma": _Primitive(
        2,
        {"log_space": _flag, "impl": _choice(threefry2x32="threefry2x32", rbg="rbg", unsafe_rbg="unsafe_rbg")},
        _random_gamma,
    ),
    "argmax": _ARG,
    "argmin": _ARG,
    "cumsum": _CUMULATIVE,
    "cumprod": _CUMULATIVE,
    "cummax": _CUMULATIVE,
    "cummin": _CUMULATIVE,
    "cumlogsumexp": _CUMULATIVE,
    "sort": _Primitive(None, {"dimension": _axis, "is_stable": _flag, "num_keys": _keys}),
    "top_k": _Primitive(1, {"k": _leading, "axis": _axis}),
    "approx_top_k": _Primitive(
        1,
        {
            "k": _leading,
            "reduction_dimension": _any_axis,
            "recall_target": _number(0.0, 1.0),
            "is_max_k": _flag,
            "reduction_input_size_override": _integer(-1, _LARGE),
            "aggregate_to_topk": _flag,
        },
    ),
    "gather": _Primitive(
        2,
        {
            "dimension_numbers": _gather_dimensions,
            "slice_sizes": _slice_sizes,
            "unique_indices": _flag,
            "indices_are_sorted": _flag,
            "mode": _member(lax.GatherScatterMode),
            "fill_value": _fill_value,
        },
    ),
    "select_and_gather_add": _Primitive(
        2,
        {
            "select_prim": _choice(ge=lax.ge_p, le=lax.le_p),
            "window_dimensions": _integers(None, 1, _LARGE),
            "window_strides": _integers(None, 1, _LARGE),
            "padding": _padding,
            "base_dilation": _integers(None, 1, _LARGE),
            "window_dilation": _integers(None, 1, _LARGE),
        },
    ),
    "eigh": _Primitive(
        1,
        {
            "lower": _flag,
            "sort_eigenvalues": _flag,
            "subset_by_index": _SUBSET,
            "algorithm": _either(_member(lax.linalg.EighImplementation)),
        },
    ),
    "eig": _Primitive(
        1,
        {
            "compute_left_eigenvectors": _flag,
            "compute_right_eigenvectors": _flag,
            "enable_eigvec_derivs": _flag,
            "implementation": _either(_member(lax.linalg.EigImplementation)),
        },
    ),
    "svd": _Primitive(
        1,
        {
            "full_matrices": _flag,
            "compute_uv": _flag,
            "subset_by_index": _SUBSET,
            "algorithm": _either(_member(lax.linalg.SvdAlgorithm)),
        },
    ),
    "qr": _Primitive(1, {"pivoting": _flag, "full_matrices": _flag, "use_magma": _either(_flag)}),
    "lu_pivots_to_permutation": _Primitive(1, {"permutation_size": _permutation_size}),
    "ormqr": _Primitive(3, {"left": _flag, "transpose": _flag}),
    "triangular_solve": _Primitive(
        2,
        dict.fromkeys(("left_side", "lower", "transpose_a", "conjugate_a", "unit_diagonal"), _flag),
    ),
    "tridiagonal": _Primitive(1, {"lower": _flag}),
    "tridiagonal_solve": _Primitive(4, {"perturb_singular": _flag}),
    "schur": _Primitive(1, {"compute_schur_vectors": _flag, "sort_eig_vals": _is(False), "select_callable": _absent}),
    "symmetric_product": _Primitive(2, {"alpha": _number(-math.inf, math.inf), "beta": _number(-math.inf, math.inf)}),
}
"""Every primitive that a mark may bind, with every parameter's check."""


def _chlo(call: Call, name: str) -> Sequence[Value]:
    given = call.attributes.get("composite_attributes", {})
    if name == "top_k" and isinstance(given, Mapping) and given.keys() == {"k"}:
        return chlo.top_k(call, given["k"])
    if name in chlo.FUNCTIONS and not given:
        return [chlo.apply(call, name)]
    call.report.presumed[f"the composite chlo.{name[:80]} has the derivatives of its decomposition"] += 1
    return call.call(call.attributes["decomposition"], *call.operands)
