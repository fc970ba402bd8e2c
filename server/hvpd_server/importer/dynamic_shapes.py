"""Operations that take sizes as operands.

The sizes follow from the shapes of arguments, so that they are known here.

`jax.export` writes these operations for programs with symbolic shapes.
"""

from typing import Final

import numpy as np
from jax import lax

from hvpd_server.importer import shapes
from hvpd_server.importer.table import Call, Value, operation


@operation("stablehlo.dynamic_reshape")
def _dynamic_reshape(call: Call) -> Value:
    return shapes.reshape(call, call.operands[0], shapes.extents_of(call, 1, "shape"))


@operation(
    "stablehlo.dynamic_broadcast_in_dim",
    # Which axes expand follows from the sizes, which are known here.
    attributes=["broadcast_dimensions", "known_expanding_dimensions", "known_nonexpanding_dimensions"],
)
def _dynamic_broadcast_in_dim(call: Call) -> Value:
    shape = shapes.extents_of(call, 1, "shape")
    return shapes.broadcast_in_dim(call, call.operands[0], shape, call.attributes["broadcast_dimensions"])


@operation("stablehlo.dynamic_iota", attributes=["iota_dimension"])
def _dynamic_iota(call: Call) -> Value:
    return shapes.iota(call, shapes.extents_of(call, 0, "shape"), call.attributes["iota_dimension"])


@operation("stablehlo.dynamic_pad")
def _dynamic_pad(call: Call) -> Value:
    x, value = call.operands[:2]
    low, high, interior = (shapes.extents_of(call, index, "padding") for index in (2, 3, 4))
    return shapes.pad(call, x, value, low, high, interior)


@operation("stablehlo.real_dynamic_slice")
def _real_dynamic_slice(call: Call) -> Value:
    x, start = call.operands[:2]
    strides = shapes.extents_of(call, 3, "strides")
    if isinstance(start, np.ndarray):
        starts, limits = shapes.extents_of(call, 1, "start"), shapes.extents_of(call, 2, "limit")
        return shapes.cut(call, x, starts, limits, strides)
    sizes = shapes.fits(call, _slice_sizes(call), np.dtype(x.dtype))
    if any(stride != 1 for stride in strides):
        raise call.refuse(f"from a start that depends on data, with the strides {list(strides)}: expected strides of 1")
    first = [lax.index_in_dim(start, axis, keepdims=False) for axis in range(len(sizes))]
    return lax.dynamic_slice(x, first, sizes, allow_negative_indices=False)


_MOST_COMPARED: Final = 64
"""Pairs of values that are compared to find two values equal."""


def _slice_sizes(call: Call) -> tuple[int, ...]:
    """Return the sizes of a slice that starts at an index that depends on data.

    The limit must be computed as the start plus a known size, as jax writes it.
    """
    _, start, limit, _ = call.operation.operands
    made = call.definition(limit)
    if made is not None and made.name == "stablehlo.add":
        for first, second in (made.operands, made.operands[::-1]):
            size = call.values[second]
            if isinstance(size, np.ndarray) and size.ndim == 1 and _is_same(call, start, first):
                return tuple(int(each) for each in size)
    raise call.refuse("whose start depends on data and whose limit is not the start plus a known size")


def _is_same(call: Call, one: int, other: int) -> bool:
    """Return whether two values are equal because equal operations make them of equal
    values.
    """
    pending = [(one, other)]
    for _ in range(_MOST_COMPARED):
        if not pending:
            return True
        one, other = pending.pop()
        if one == other:
            continue
        first, second = call.definition(one), call.definition(other)
        if first is None or second is None:
            return False
        # The results of a few operations are of two equal values; those with regions
        # may be of more.
        same = first.name == second.name and first.types == second.types and not (first.regions or second.regions)
        if not same or len(first.results) != 1 or first.attributes.keys() != second.attributes.keys():
            return False
        if not all(np.array_equal(value, second.attributes[name]) for name, value in first.attributes.items()):
            return False
        pending += zip(first.operands, second.operands, strict=True)
    return False
