"""Recognises functions of jax in programs without marks, and gives them jax's
derivative rules, such as 0 for `relu` at 0.

jax writes a jitted function as a private function of its name, such as @relu. The name
alone proves nothing. A function is recognised only if the formula of its whole body is,
operation by operation, one that jax writes for this name. Then jax's function takes its
place. Values stay the same; derivatives at kinks and limits become jax's. Each is noted
in the report.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from hvpd_server.importer.graph import Block, Operation, TensorType
from hvpd_server.importer.table import Call, Value

_OPERATIONS: Final = 40
"""Most operations of a body that is read."""

_CALLS: Final = 2
"""Most functions inside each other that are read."""

_CHARACTERS: Final = 2_000
"""Longest formula that is read: repeated subterms double it."""

_INTEGERS: Final = frozenset(["int32", "int64"])
"""Types of sizes, and of the platform's index."""

_SIZE: Final = "size"
"""Text of an integer. No formula has one."""

_NUMBERED: Final = re.compile(r"_\d+$")
"""The number that MLIR adds to a name that is taken."""


@dataclasses.dataclass(frozen=True)
class _Known:
    """A function of jax."""

    function: Callable[..., Any]
    formulas: frozenset[str]
    """Possible bodies; x and y are the arguments."""


def _known(function: Callable[..., Any], *formulas: str) -> _Known:
    return _Known(function, frozenset("".join(formula.split()) for formula in formulas))


_LOGISTIC: Final = "divide(1.0,add(1.0,exponential(negate(x))))"

_SUM: Final = """select(NE(subtract(x,{y}),subtract(x,{y})),add({y},x),
    add(log_plus_one(exponential(negate(abs(subtract(x,{y}))))),maximum({y},x)))"""

_FUNCTIONS: Final[Mapping[str, _Known]] = {
    "relu": _known(jax.nn.relu, "maximum(0.0,x)"),
    "sigmoid": _known(jax.nn.sigmoid, _LOGISTIC, "logistic(x)"),
    "silu": _known(jax.nn.silu, f"multiply({_LOGISTIC},x)", "multiply(logistic(x),x)"),
    "softplus": _known(jax.nn.softplus, _SUM.format(y="0.0")),
    "logaddexp": _known(jnp.logaddexp, _SUM.format(y="y").replace("(y,x)", "(x,y)")),
    "sinc": _known(
        jnp.sinc,
        """select(EQ(0.0,x),add(1.0,multiply(0.0,multiply(pi,x))),
        divide(sine(select(EQ(0.0,x),1.0,multiply(pi,x))),select(EQ(0.0,x),1.0,multiply(pi,x))))""",
        """select(EQ(0.0,x),add(1.0,multiply(0.0,select(EQ(0.0,x),1.0,multiply(pi,x)))),
        divide(sine(select(EQ(0.0,x),1.0,multiply(pi,x))),select(EQ(0.0,x),1.0,multiply(pi,x))))""",
    ),
}
"""jax's functions whose rules differ from the derivatives of their formulas."""

_COMMUTATIVE: Final = frozenset(["add", "multiply", "maximum", "minimum", "EQ", "NE"])
_ALIKE: Final = frozenset(["stablehlo.broadcast_in_dim", "stablehlo.convert", "stablehlo.reshape"])
"""Operations that only give an array another form."""


def rule_of(call: Call, symbol: str) -> Callable[..., list[Value]] | None:
    """Return jax's function for a private function, or None when the body is called as
    it is.

    Args:
        call: The call; its report gets a note when the function is recognised.
        symbol: The function that is called.
    """
    name = _name(symbol)
    if not has_rule(call, symbol):
        if call.recognises and name in _FUNCTIONS:
            call.report.presumed[f"@{name}, whose operations are not those of jax's {name}: their derivatives"] += 1
        return None
    call.report.recognised[f"@{name}, by its name and its operations, has the derivatives of jax's {name}"] += 1
    first = _sizes(call.signature(symbol))
    return lambda *args: [_FUNCTIONS[name].function(*map(jnp.asarray, args[first:]))]


def has_rule(call: Call, symbol: str) -> bool:
    """Return whether a private function is recognised as one of jax's functions."""
    found = _FUNCTIONS.get(_name(symbol)) if call.recognises else None
    if found is None:
        return False
    block = call.signature(symbol)
    first = _sizes(block)
    arguments = (*[_SIZE] * first, *("x", "y")[: len(block.arguments) - first])
    return _elementwise(block, first) and _formula(call, block, arguments, _CALLS) in found.formulas


def _name(symbol: str) -> str:
    """Return a function's name without the number that MLIR adds."""
    return _NUMBERED.sub("", symbol)


def _sizes(block: Block) -> int:
    """Return how many integers a function takes first: jax passes the index of the
    platform and symbolic sizes to each function.
    """
    is_size = [type_.shape == () and type_.dtype in _INTEGERS for type_ in block.types]
    return [*is_size, False].index(False)


def _elementwise(block: Block, first: int) -> bool:
    """Return whether a function takes, after its sizes, one or two arrays of the type
    that it returns.
    """
    return (
        1 <= len(block.arguments) - first <= 2
        and len(block.result_types) == 1
        and all(type_ == block.result_types[0] for type_ in block.types[first:])
        and jnp.issubdtype(jnp.dtype(block.result_types[0].dtype), jnp.floating)
    )


def _formula(call: Call, block: Block, arguments: tuple[str, ...], calls: int) -> str | None:
    """Return a function's computation as text, or None if it has another form."""
    if len(block.operations) > _OPERATIONS or len(block.returns) != 1 or len(arguments) != len(block.arguments):
        return None
    terms: dict[int, str | None] = dict(zip(block.arguments, arguments, strict=True))
    types: dict[int, TensorType] = dict(zip(block.arguments, block.types, strict=True))
    for each in block.operations:
        if len(each.results) != 1 or each.regions:
            return None
        taken = [terms.get(value) for value in each.operands]
        if any(term is None for term in taken):
            return None
        types[each.results[0]] = each.types[0]
        if each.types[0].dtype in _INTEGERS:
            terms[each.results[0]] = _SIZE
            continue
        if each.name == "stablehlo.dynamic_broadcast_in_dim" and _is_scalar(types.get(each.operands[0])):
            terms[each.results[0]] = taken[0]
            continue
        if each.name in _ALIKE and not _keeps(each, types.get(each.operands[0])):
            return None
        term = _term(call, each, [term for term in taken if term is not None], calls)
        if term is None or len(term) > _CHARACTERS:
            return None
        terms[each.results[0]] = term
    return terms.get(block.returns[0])


def _is_scalar(type_: TensorType | None) -> bool:
    return type_ is not None and type_.shape == ()


def _keeps(each: Operation, before: TensorType | None) -> bool:
    """Return whether an array keeps its elements and their order, or a number fills the
    array.

    The form may change. The dtype may not become coarser.
    """
    after, dimensions = each.types[0], list(each.attributes.get("broadcast_dimensions", ()))
    if before is None or before.dtype != after.dtype or dimensions != sorted(dimensions):
        return False
    return before.shape in (after.shape, ())


def _term(call: Call, each: Operation, taken: list[str], calls: int) -> str | None:
    """Return an operation's text."""
    name = each.name.removeprefix("stablehlo.")
    if each.name == "stablehlo.constant":
        return _number(np.asarray(each.attributes.get("value")))
    if each.name in _ALIKE:
        return taken[0]
    if each.name == "func.call":
        symbol = each.attributes["callee"]
        return _formula(call, call.signature(symbol), tuple(taken), calls - 1) if calls else None
    if each.name == "stablehlo.compare":
        if each.attributes.get("compare_type") == "TOTALORDER":
            return None
        name = str(each.attributes.get("comparison_direction"))
    elif each.attributes.keys() - {"result_accuracy"}:
        return None
    if name in _COMMUTATIVE:
        taken = sorted(taken)
    return f"{name}({','.join(taken)})"


def _number(value: "np.ndarray[Any, Any]") -> str | None:
    """Return a constant's text: a floating number, or an array of one floating number;
    else None.
    """
    if not value.size or not jnp.issubdtype(value.dtype, jnp.floating) or (value != value.flat[0]).any():
        return None
    return "pi" if value.flat[0] == np.asarray(np.pi).astype(value.dtype) else repr(float(value.flat[0]))
