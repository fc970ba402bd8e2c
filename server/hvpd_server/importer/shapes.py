"""Operations that make, move or cut arrays of a size that the program states.

Sizes that are computed: `dynamic_shapes`.

Small arrays of known integers are moved with NumPy and stay known. So does any known
scalar, because a rule for reductions must see the value from which a reduction starts.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from hvpd import _text
from hvpd_server.importer import refusals, sizes
from hvpd_server.importer.elementwise import Array
from hvpd_server.importer.table import FOLD_ELEMENTS, Call, Value, dtype_of, known, operation, static_shape


def stays_known(shape: Sequence[int], *values: Value) -> bool:
    """Return whether NumPy makes a result of this shape from these values."""
    size = math.prod(shape)
    if known(*values):
        return size <= FOLD_ELEMENTS
    return size == 1 and all(isinstance(value, np.ndarray) and value.size == 1 for value in values)


def fits(call: Call, shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[int, ...]:
    """Return a shape after a check of its size.

    Raises:
        Refused: An extent is negative, or the array is larger than the server allows.
    """
    limit = refusals.Limits().array_bytes
    if any(extent < 0 for extent in shape):
        raise call.refuse(f"whose result would be of shape {list(shape)}: an extent is negative")
    if math.prod(shape) * dtype.itemsize > limit:
        raise call.refuse(
            f"whose result would be {dtype.name}{list(shape)}: the limit is {limit} bytes", refusals.PROGRAM_TOO_LARGE
        )
    return tuple(shape)


def reshape(call: Call, x: Value, shape: Sequence[int]) -> Value:
    """Reshape to known extents."""
    shape = fits(call, shape, np.dtype(x.dtype))
    # jax makes no such check of its own while it traces.
    if math.prod(shape) != math.prod(x.shape):
        raise call.refuse(f"from shape {list(x.shape)} to shape {list(shape)}: expected as many elements")
    return x.reshape(shape) if stays_known(shape, x) else lax.reshape(x, shape)


def broadcast_in_dim(call: Call, x: Value, shape: Sequence[int], dimensions: Sequence[int]) -> Value:
    """Broadcast to known extents; `dimensions` says which axis of the result each axis
    of x becomes.
    """
    shape = fits(call, shape, np.dtype(x.dtype))
    if len(dimensions) != x.ndim or len(set(dimensions)) != x.ndim:
        raise call.refuse(f"with the dimensions {list(dimensions)}: expected {x.ndim} different ones")
    order = np.argsort(np.asarray(dimensions, int))
    if not stays_known(shape, x):
        # jax leaves out the transposition if the shape stays the same.
        return lax.broadcast_in_dim(lax.transpose(x, order), shape, sorted(dimensions))
    extents = [1] * len(shape)
    for axis in order:
        extents[dimensions[axis]] = x.shape[axis]
    return np.array(np.broadcast_to(np.transpose(x, order).reshape(extents), shape))


def iota(call: Call, shape: Sequence[int], dimension: int) -> Value:
    """Count up along an axis."""
    dtype = dtype_of(call.types[0])
    shape = fits(call, shape, dtype)
    if not 0 <= dimension < len(shape):
        raise call.refuse(f"along the dimension {dimension} of {len(shape)}")
    if dtype.kind in "iu" and math.prod(shape) <= FOLD_ELEMENTS:
        along = np.arange(shape[dimension]).astype(dtype)
        return np.array(np.broadcast_to(np.expand_dims(along, tuple(range(1, len(shape) - dimension))), shape))
    if dtype.kind == "c":
        part = np.dtype(f"float{dtype.itemsize * 4}")
        return lax.convert_element_type(lax.broadcasted_iota(part, shape, dimension), dtype)
    return lax.broadcasted_iota(dtype, shape, dimension)


def cut(call: Call, x: Value, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]) -> Value:
    """Slice with known bounds."""
    if not len(starts) == len(limits) == len(strides) == x.ndim:
        raise call.refuse(
            f"with {len(starts)} starts, {len(limits)} limits and {len(strides)} strides for {x.ndim} axes"
        )
    bounds = zip(starts, limits, strides, x.shape, strict=True)
    if any(not 0 <= start <= limit <= extent or stride < 1 for start, limit, stride, extent in bounds):
        raise call.refuse(
            f"of [{starts}:{limits}:{strides}] from an array of shape {list(x.shape)}: expected valid bounds"
        )
    if known(x):
        return x[tuple(slice(*each) for each in zip(starts, limits, strides, strict=True))]
    return lax.slice(x, tuple(starts), tuple(limits), tuple(strides))


def pad(call: Call, x: Value, value: Value, low: Sequence[int], high: Sequence[int], interior: Sequence[int]) -> Value:
    """Pad with known amounts, of which `low` and `high` may be negative and `interior`
    goes between elements.
    """
    if not len(low) == len(high) == len(interior) == x.ndim or any(amount < 0 for amount in interior):
        raise call.refuse(f"by {list(low)}, {list(high)} and {list(interior)} for {x.ndim} axes")
    steps = [each + 1 for each in interior]
    spans = [max(extent - 1, 0) * step + min(extent, 1) for extent, step in zip(x.shape, steps, strict=True)]
    shape = fits(call, [a + b + c for a, b, c in zip(low, spans, high, strict=True)], np.dtype(x.dtype))
    if not (known(x, value) and math.prod(shape) <= FOLD_ELEMENTS):
        return lax.pad(x, value, tuple(zip(low, high, interior, strict=True)))
    places = [start + step * np.arange(n) for start, step, n in zip(low, steps, x.shape, strict=True)]
    inside = [(place >= 0) & (place < extent) for place, extent in zip(places, shape, strict=True)]
    padded = np.full(shape, value)
    if x.ndim == 0:
        return x
    kept = [place[keep] for place, keep in zip(places, inside, strict=True)]
    padded[np.ix_(*kept)] = x[np.ix_(*(np.flatnonzero(keep) for keep in inside))]
    return padded


@operation("stablehlo.constant", attributes=["value"])
def _constant(call: Call) -> Value:
    value = call.attributes["value"]
    if not isinstance(value, np.ndarray):
        raise call.refuse(f"of the value {_text.cut(str(value), 80)}: expected an array")
    if value.size > FOLD_ELEMENTS and not any(value.strides):
        # One element repeated: the compiled program need not contain a copy for each
        # place.
        return lax.full(value.shape, value.reshape(-1)[:1].reshape(()), value.dtype)
    return value


@operation("stablehlo.iota", attributes=["iota_dimension"])
def _iota(call: Call) -> Value:
    return iota(call, static_shape(call), call.attributes["iota_dimension"])


@operation("stablehlo.reshape")
def _reshape(call: Call) -> Value:
    return reshape(call, call.operands[0], static_shape(call))


@operation("stablehlo.broadcast_in_dim", attributes=["broadcast_dimensions"])
def _broadcast_in_dim(call: Call) -> Value:
    return broadcast_in_dim(call, call.operands[0], static_shape(call), call.attributes["broadcast_dimensions"])


@operation("stablehlo.broadcast", attributes=["broadcast_sizes"])
def _broadcast(call: Call) -> Value:
    (x,) = call.operands
    sizes = tuple(call.attributes["broadcast_sizes"])
    return broadcast_in_dim(call, x, (*sizes, *x.shape), range(len(sizes), len(sizes) + x.ndim))


@operation("stablehlo.transpose", attributes=["permutation"])
def _transpose(call: Call) -> Value:
    (x,) = call.operands
    permutation = tuple(call.attributes["permutation"])
    return np.transpose(x, permutation) if stays_known(x.shape, x) else lax.transpose(x, permutation)


@operation("stablehlo.reverse", attributes=["dimensions"])
def _reverse(call: Call) -> Value:
    (x,) = call.operands
    dimensions = tuple(call.attributes["dimensions"])
    return np.flip(x, dimensions) if stays_known(x.shape, x) else lax.rev(x, dimensions)


@operation("stablehlo.slice", attributes=["start_indices", "limit_indices", "strides"])
def _slice(call: Call) -> Value:
    attributes = call.attributes
    return cut(call, call.operands[0], *(attributes[name] for name in ("start_indices", "limit_indices", "strides")))


@operation("stablehlo.concatenate", attributes=["dimension"])
def _concatenate(call: Call) -> Value:
    dimension = call.attributes["dimension"]
    if known(*call.operands):
        return np.concatenate(call.operands, dimension)
    return lax.concatenate(call.operands, dimension)


@operation("stablehlo.pad", attributes=["edge_padding_low", "edge_padding_high", "interior_padding"])
def _pad(call: Call) -> Value:
    attributes = call.attributes
    amounts = (attributes[name] for name in ("edge_padding_low", "edge_padding_high", "interior_padding"))
    return pad(call, *call.operands, *amounts)


def _clamped(call: Call, starts: Sequence[Value], extents: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
    """Return known starts so that each slice is inside the array, or None if a start is
    not known.
    """
    if not len(starts) == len(extents) == len(sizes):
        raise call.refuse(f"with {len(starts)} starts and {len(sizes)} sizes for {len(extents)} axes")
    if not known(*starts):
        return None
    return [min(max(int(s), 0), max(e - n, 0)) for s, e, n in zip(starts, extents, sizes, strict=True)]


@operation("stablehlo.dynamic_slice", attributes=["slice_sizes"])
def _dynamic_slice(call: Call) -> Value:
    x, *starts = call.operands
    sizes = tuple(call.attributes["slice_sizes"])
    clamped = _clamped(call, starts, x.shape, sizes)
    if clamped is not None:
        return cut(call, x, clamped, [a + b for a, b in zip(clamped, sizes, strict=True)], (1,) * len(sizes))
    # jax adds the extent to a negative start by default; StableHLO takes 0 in place of
    # a negative start.
    return lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)


@operation("stablehlo.dynamic_update_slice")
def _dynamic_update_slice(call: Call) -> Value:
    x, update, *starts = call.operands
    clamped = _clamped(call, starts, x.shape, update.shape)
    if clamped is not None and known(x, update):
        updated = x.copy()
        updated[tuple(slice(a, a + n) for a, n in zip(clamped, update.shape, strict=True))] = update
        return updated
    return lax.dynamic_update_slice(x, update, starts, allow_negative_indices=False)


@operation("stablehlo.get_dimension_size", attributes=["dimension"])
def _get_dimension_size(call: Call) -> Value:
    (x,) = call.operands
    return sizes.size(np.shape(x)[call.attributes["dimension"]], dtype_of(call.types[0]))


@operation("stablehlo.optimization_barrier")
def _optimization_barrier(call: Call) -> list[Value]:
    unknown = [value for value in call.operands if not (known(value) or sizes.is_size(value))]
    kept: list[Value] = list(lax.optimization_barrier(unknown)) if unknown else []
    # A known size stays known: a barrier orders computations, and a size needs none.
    return [value if known(value) or sizes.is_size(value) else kept.pop(0) for value in call.operands]


def extents_of(call: Call, index: int, what: str) -> tuple[int, ...]:
    """Return an operand that holds a known size for each axis.

    Raises:
        Refused: The operand depends on x or on data, or is not a vector of integers.
    """
    value: Array = call.concrete(index, what)
    if value.ndim != 1 or value.dtype.kind not in "iu":
        raise call.refuse(f"whose {what} is {value.dtype}{list(value.shape)}: expected a vector of integers")
    return tuple(int(each) for each in value)
