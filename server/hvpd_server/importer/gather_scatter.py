"""Gather and scatter: indices out of bounds are clamped by a gather, and dropped by a
scatter, as StableHLO defines.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd import _text
from hvpd_server.importer.graph import Block
from hvpd_server.importer.table import Call, Value, operation

_UPDATES: Final[Mapping[str, Callable[..., Value]]] = {
    "stablehlo.add": lax.scatter_add,
    "stablehlo.subtract": lax.scatter_sub,
    "stablehlo.multiply": lax.scatter_mul,
    "stablehlo.minimum": lax.scatter_min,
    "stablehlo.maximum": lax.scatter_max,
}
"""Functions of jax by the operation of the update body."""

_BOOLEAN: Final[Mapping[str, str]] = {
    "stablehlo.or": "stablehlo.maximum",
    "stablehlo.and": "stablehlo.minimum",
    # jax writes the sum of booleans as a disjunction.
    "stablehlo.add": "stablehlo.maximum",
    "stablehlo.multiply": "stablehlo.minimum",
}
"""Operations that have the same result for booleans."""


def _vector_last(call: Call, indices: Value, dimension: int, batching: Sequence[int]) -> tuple[Value, tuple[int, ...]]:
    """Move the axis of index vectors to the end, as jax expects.

    Returns:
        The indices, and the batching axes of the moved indices.
    """
    indices = jnp.asarray(indices)
    if not 0 <= dimension <= indices.ndim:
        raise call.refuse(f"with index_vector_dim {dimension} for indices of {indices.ndim} axes")
    if dimension == indices.ndim:
        return indices[..., None], tuple(batching)
    moved = jnp.moveaxis(indices, dimension, -1) if dimension != indices.ndim - 1 else indices
    return moved, tuple(axis - (axis > dimension) for axis in batching)


def _gather_with(call: Call, sizes: Sequence[int]) -> Value:
    numbers = call.attributes["dimension_numbers"]
    indices, batching = _vector_last(
        call, call.operands[1], numbers.get("index_vector_dim", 0), numbers.get("start_indices_batching_dims", ())
    )
    return lax.gather(
        jnp.asarray(call.operands[0]),
        indices,
        lax.GatherDimensionNumbers(
            offset_dims=tuple(numbers.get("offset_dims", ())),
            collapsed_slice_dims=tuple(numbers.get("collapsed_slice_dims", ())),
            start_index_map=tuple(numbers.get("start_index_map", ())),
            operand_batching_dims=tuple(numbers.get("operand_batching_dims", ())),
            start_indices_batching_dims=batching,
        ),
        tuple(int(size) for size in sizes),
        indices_are_sorted=bool(call.attributes.get("indices_are_sorted", False)),
        mode=lax.GatherScatterMode.CLIP,
    )


@operation("stablehlo.gather", attributes=["dimension_numbers", "slice_sizes", "indices_are_sorted"])
def _gather(call: Call) -> Value:
    return _gather_with(call, call.attributes["slice_sizes"])


@operation("stablehlo.dynamic_gather", attributes=["dimension_numbers", "indices_are_sorted"])
def _dynamic_gather(call: Call) -> Value:
    return _gather_with(call, call.concrete(2, "slice sizes").tolist())


def _update(call: Call, body: Block, dtype: Any) -> Callable[..., Value]:
    """Recognise the function that combines an element with its update."""
    old, new = body.arguments
    (returned,) = body.returns
    if returned == new and not body.operations:
        return lax.scatter
    if len(body.operations) == 1 and returned in body.operations[0].results:
        (only,) = body.operations
        name = _BOOLEAN.get(only.name, only.name) if dtype == np.bool_ else only.name
        in_order = tuple(only.operands) == (old, new)
        swapped = tuple(only.operands) == (new, old) and name != "stablehlo.subtract"
        if name in _UPDATES and not only.attributes and (in_order or swapped):
            return _UPDATES[name]
    names = ", ".join(each.name for each in body.operations) or "no operation"
    raise call.refuse(
        f"whose body is not recognised ({_text.cut(names, 200)}): expected one that returns the update, or a single "
        f"{', '.join(name.removeprefix('stablehlo.') for name in _UPDATES)} of the element and its update. For another function, gather the elements, and scatter its results"
    )


@operation(
    "stablehlo.scatter",
    attributes=["scatter_dimension_numbers", "indices_are_sorted", "unique_indices"],
    regions=1,
)
def _scatter(call: Call) -> Value:
    if len(call.operands) != 3:
        raise call.refuse(f"of {len(call.operands) // 2} arrays at once: expected one array")
    operand, indices, updates = (jnp.asarray(each) for each in call.operands)
    combine = _update(call, call.regions[0], operand.dtype)
    numbers = call.attributes["scatter_dimension_numbers"]
    indices, batching = _vector_last(
        call, indices, numbers.get("index_vector_dim", 0), numbers.get("scatter_indices_batching_dims", ())
    )
    return combine(
        operand,
        indices,
        updates,
        lax.ScatterDimensionNumbers(
            update_window_dims=tuple(numbers.get("update_window_dims", ())),
            inserted_window_dims=tuple(numbers.get("inserted_window_dims", ())),
            scatter_dims_to_operand_dims=tuple(numbers.get("scatter_dims_to_operand_dims", ())),
            operand_batching_dims=tuple(numbers.get("input_batching_dims", ())),
            scatter_indices_batching_dims=batching,
        ),
        indices_are_sorted=bool(call.attributes.get("indices_are_sorted", False)),
        unique_indices=bool(call.attributes.get("unique_indices", False)),
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )
