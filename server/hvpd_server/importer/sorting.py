"""Sorting. The comparator is recognised and rebuilt as keys of `jax.lax.sort`, whose
derivative rule moves tangents along.

jax's comparator first makes -0 to 0 and every NaN to one NaN, then compares floats in
the total order. A comparator without that step, or in descending order, is served by
sorting integers that have the same order.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd_server.importer.elementwise import total_order
from hvpd_server.importer.graph import Block, TensorType
from hvpd_server.importer.table import Call, Value, dtype_of, operation
from hvpd_server.importer.value_numbering import ValueNumbering


@dataclasses.dataclass(frozen=True)
class Key:
    """A number by which elements are ordered."""

    operand: int
    """Index of the operand that holds the number."""
    part: str = ""
    """Part of a complex number: "real" or "imag"."""
    descending: bool = False
    """Whether the largest number comes first."""
    canonical: bool = True
    """Whether -0 counts as 0, and all NaNs count as one."""


_EXPECTED: Final = "keys of operands compared by LT or GT, each used if all keys before are equal"


@operation("stablehlo.sort", attributes=["dimension", "is_stable"], regions=1)
def _sort(call: Call) -> list[Value]:
    keys = _keys(call, call.regions[0])
    dimension = call.attributes.get("dimension", -1)
    is_stable = call.attributes.get("is_stable", False)
    operands = list(call.operands)
    rank = np.ndim(operands[0])
    if not -rank <= dimension < rank:
        raise call.refuse(f"along the dimension {dimension} of {rank}")
    dimension %= rank
    leading = _leading(operands, keys)
    if leading is None:
        numbers = [_ordered(operands[key.operand], key) for key in keys]
        leading, operands = len(numbers), numbers + operands
    results = lax.sort(operands, dimension=dimension, is_stable=is_stable, num_keys=leading)
    return list(results[len(results) - len(call.operands) :])


def _leading(operands: list[Value], keys: list[Key]) -> int | None:
    """Return how many first operands are the keys in jax's order, or None if the keys
    are others.
    """
    expected: list[Key] = []
    for index, operand in enumerate(operands):
        is_complex = jnp.issubdtype(operand.dtype, jnp.complexfloating)
        expected += [Key(index, "real"), Key(index, "imag")] if is_complex else [Key(index)]
        if keys == expected:
            return index + 1
    return None


def _ordered(x: Value, key: Key) -> Value:
    """Return integers in the order of a key."""
    if key.part:
        x = lax.real(x) if key.part == "real" else lax.imag(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        if key.canonical:
            x = jnp.where(x == 0, jnp.zeros_like(x), jnp.where(jnp.isnan(x), jnp.full_like(x, jnp.nan), x))
        x = total_order(x)
    elif x.dtype == np.bool_:
        x = lax.convert_element_type(x, np.uint8)
    return lax.bitwise_not(x) if key.descending else lax.stop_gradient(x)


def _keys(call: Call, body: Block) -> list[Key]:
    """Return the keys of a comparator, the most important first.

    Raises:
        Refused: The comparator does not compare keys one after another.
    """
    numbering = ValueNumbering(call)
    returned = numbering.block(body)
    if len(returned) != 1 or len(body.arguments) != 2 * len(call.operands):
        raise call.refuse("with a comparator of other arguments or results than its operands need")
    sides = _sides(numbering, body.types)
    keys = []
    rest: int | None = returned[0]
    while rest is not None:
        found = next(_splits(numbering, sides, rest), None)
        if found is None:
            raise call.refuse(f"with a comparator that is not recognised: expected {_EXPECTED}")
        key, rest, is_presumed = found
        keys.append(key)
        if is_presumed:
            call.report.presumed["a sort of floats: NaN is last and -0 equals 0, as in jax"] += 1
    return keys


Sides = dict[Key, tuple[int, int, bool]]
"""A key's number in the first and in the second element, and whether it is a float."""


def _sides(numbering: ValueNumbering, types: tuple[TensorType, ...]) -> Sides:
    """Return each key that a comparator may use."""
    sides: Sides = {}
    for index, type_ in enumerate(types[::2]):
        dtype = dtype_of(type_)
        first, second = numbering.argument(2 * index), numbering.argument(2 * index + 1)
        if not jnp.issubdtype(dtype, jnp.inexact):
            sides[Key(index)] = (first, second, False)
            continue
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        part_dtype = np.dtype(f"float{dtype.itemsize * 4}") if is_complex else dtype
        for part in ("real", "imag") if is_complex else ("",):
            pair = [numbering.apply(part, side) if part else side for side in (first, second)]
            canonical = [_canonical(numbering, side, part_dtype) for side in pair]
            sides[Key(index, part)] = (canonical[0], canonical[1], True)
            sides[Key(index, part, canonical=False)] = (pair[0], pair[1], True)
    return sides


def _canonical(numbering: ValueNumbering, x: int, dtype: "np.dtype[np.generic]") -> int:
    """Return the number of a float whose zero has no sign and whose NaN is always the
    same.
    """
    zero, nan = numbering.constant(np.zeros((), dtype)), numbering.constant(np.full((), np.nan, dtype))
    signless = numbering.apply("select", numbering.compare("EQ", x, zero), zero, x)
    return numbering.apply("select", numbering.compare("NE", x, x), nan, signless)


def _splits(numbering: ValueNumbering, sides: Sides, number: int) -> Iterator[tuple[Key, int | None, bool]]:
    """Yield the first key of a comparison, the comparison of the keys after it, and
    whether the order is presumed.
    """
    node = numbering.node(number)
    for side, (first, second, is_float) in sides.items():
        for total, descending in itertools.product((True, False) if is_float else (False,), (False, True)):
            # Floats that are compared in no total order are presumed to be in jax's.
            is_presumed = is_float and not total
            key = dataclasses.replace(side, descending=descending, canonical=side.canonical or is_presumed)
            less = numbering.compare("GT" if descending else "LT", first, second, total=total)
            equal = numbering.compare("EQ", first, second, total=total)
            if number == less:
                yield key, None, is_presumed
            if node[0] == "stablehlo.or" and less in node[2:]:
                inner = numbering.node(_other(node[2:], less))
                if inner[0] == "stablehlo.and" and equal in inner[2:]:
                    yield key, _other(inner[2:], equal), is_presumed
            if node[0] == "stablehlo.select" and node[2] == equal and node[4] == less:
                yield key, node[3], is_presumed


def _other(pair: Sequence[int], number: int) -> int:
    return pair[1] if pair[0] == number else pair[0]
