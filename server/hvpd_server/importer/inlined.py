"""Recognises jax's logaddexp in programs without marks, and gives it jax's derivatives.

jax writes `jnp.logaddexp` into the function that calls it, so that it has no name. Its
formula is enough, because logaddexp is smooth: there is only one right derivative. The
formula has a maximum and an absolute value, and their kinks do not cancel where both
arguments are equal, as at log(1 + exp(0)).
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from hvpd_server.importer.graph import Block, Operation
from hvpd_server.importer.loops import used_by
from hvpd_server.importer.table import Call, Value, operation

LOGADDEXP: Final = "hvpd.logaddexp"
"""The operation that takes the formula's place. The reader refuses it in a program."""

_DIFFERENCE: Final = ("subtract", "x", "y")

_FORMULA: Final = (
    "select",
    ("compare", _DIFFERENCE, _DIFFERENCE),
    ("add", "x", "y"),
    (
        "add",
        ("maximum", "x", "y"),
        ("log_plus_one", ("exponential", ("negate", ("abs", _DIFFERENCE)))),
    ),
)
"""jax's logaddexp: the comparison is NE, and finds NaN."""


def rewritten(block: Block) -> Sequence[Operation]:
    """Return the operations of a block, with one for each formula of logaddexp."""
    if not any(each.name == "stablehlo.log_plus_one" for each in block.operations):
        return block.operations
    makers = {result: each for each in block.operations for result in each.results}
    first = _first_equal(block)
    found: list[Operation] = []
    parts: set[int] = set()
    for each in block.operations:
        bound: dict[str, int] = {}
        inside: list[Operation] = []
        if each.name == "stablehlo.select" and _matches(_FORMULA, each.results[0], makers, first, bound, inside):
            parts.update(result for part in inside for result in part.results)
            operands = (bound["x"], bound["y"])
            found.append(Operation(LOGADDEXP, operands, each.results, each.types, {}, location=each.location))
        else:
            found.append(each)
    return _without_unused(found, parts, block.returns)


def _first_equal(block: Block) -> Mapping[int, int]:
    """Return, for the values of a block, the first value that the same operation makes
    of the same operands: jax broadcasts a number anew for each use.
    """
    first: dict[int, int] = {}
    known: dict[Hashable, int] = {}
    for each in block.operations:
        attributes = [
            (name, value.tobytes() if isinstance(value, np.ndarray) and value.size == 1 else value)
            for name, value in sorted(each.attributes.items())
        ]
        if len(each.results) != 1 or each.regions or any(isinstance(value, np.ndarray) for _, value in attributes):
            continue
        operands = tuple(first.get(value, value) for value in each.operands)
        (result,) = each.results
        first[result] = known.setdefault((each.name, repr(attributes), each.types, operands), result)
    return first


def _matches(
    pattern: Any,
    value: int,
    makers: Mapping[int, Operation],
    first: Mapping[int, int],
    bound: dict[str, int],
    inside: list[Operation],
) -> bool:
    """Return whether a value has a formula.

    Args:
        pattern: The name of an argument; or of an operation, then patterns of operands.
        value: The value.
        makers: Operations by the values that they make.
        first: See `_first_equal`.
        bound: Values of the arguments, which this function fills in.
        inside: The formula's operations, which this function fills in.
    """
    if isinstance(pattern, str):
        return bound.setdefault(pattern, first.get(value, value)) == first.get(value, value)
    maker = makers.get(value)
    name, *operands = pattern
    if maker is None or maker.name != f"stablehlo.{name}" or len(maker.operands) != len(operands):
        return False
    wanted = {"comparison_direction": "NE", "compare_type": "FLOAT"} if name == "compare" else {}
    if maker.attributes != wanted:
        return False
    inside.append(maker)
    return all(
        _matches(each, operand, makers, first, bound, inside)
        for each, operand in zip(operands, maker.operands, strict=True)
    )


def _without_unused(operations: Sequence[Operation], parts: set[int], returns: Sequence[int]) -> list[Operation]:
    """Return the operations without the parts of formulas that nothing uses."""
    used, kept = set(returns), []
    for each in reversed(operations):
        if parts.isdisjoint(each.results) or each.name == LOGADDEXP or not used.isdisjoint(each.results):
            used.update(used_by(each))
            kept.append(each)
    return kept[::-1]


@operation(LOGADDEXP)
def _logaddexp(call: Call) -> Value:
    call.report.recognised["the formula of logaddexp has the derivatives of jax's logaddexp"] += 1
    return jnp.logaddexp(*map(jnp.asarray, call.operands))
