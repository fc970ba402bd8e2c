"""Reductions: of whole axes, of windows, and the scatter of a window's maximum.

The importer recognises a reduction's body, and rebuilds it as jax's own primitive. So
its derivative rule is that of native jax. For example, `reduce_max` shares the
derivative among equal largest elements. The body itself never reaches XLA.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd_server.importer import shapes
from hvpd_server.importer.elementwise import converted
from hvpd_server.importer.graph import Block
from hvpd_server.importer.table import Call, Value, dtype_of, known, operation
from hvpd_server.importer.value_numbering import ValueNumbering


@dataclasses.dataclass(frozen=True)
class Monoid:
    """An operation of two numbers by which an array can be reduced."""

    combine: Callable[[Value, Value], Value]
    """Combines two arrays."""
    reduce: Callable[[Value, Sequence[int]], Value]
    """Reduces axes of an array."""
    fold: "np.ufunc"
    """The same operation in NumPy."""
    identity: Callable[[np.dtype[Any]], Any]
    """Neutral element of a dtype."""
    cumulative: Callable[..., Value] | None = None
    """cumulative(x, axis, reverse): running reduction along an axis, if jax has one."""


def _smallest(dtype: np.dtype[Any]) -> Any:
    if dtype == np.bool_:
        return False
    return np.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.integer) else _infinity(dtype, -1)


def _largest(dtype: np.dtype[Any]) -> Any:
    if dtype == np.bool_:
        return True
    return np.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else _infinity(dtype, 1)


def _infinity(dtype: np.dtype[Any], sign: int) -> Any:
    infinity = np.asarray(sign * np.inf).astype(dtype)
    # Some floats of 8 bits have no infinity.
    return infinity if np.isinf(infinity) else sign * jnp.finfo(dtype).max  # type: ignore[no-untyped-call]


def _all_bits(dtype: np.dtype[Any]) -> Any:
    return np.bitwise_not(np.zeros((), dtype))


def _zero(dtype: np.dtype[Any]) -> Any:
    return 0


def _one(dtype: np.dtype[Any]) -> Any:
    return 1


_AND: Final = Monoid(lax.bitwise_and, lax.reduce_and, np.bitwise_and, _all_bits)
_OR: Final = Monoid(lax.bitwise_or, lax.reduce_or, np.bitwise_or, _zero)

_MONOIDS: Final[Mapping[str, Monoid]] = {
    "add": Monoid(lax.add, lax.reduce_sum, np.add, _zero, lax.cumsum),
    "multiply": Monoid(lax.mul, lax.reduce_prod, np.multiply, _one, lax.cumprod),
    "maximum": Monoid(lax.max, lax.reduce_max, np.maximum, _smallest, lax.cummax),
    "minimum": Monoid(lax.min, lax.reduce_min, np.minimum, _largest, lax.cummin),
    "and": _AND,
    "or": _OR,
    "xor": Monoid(lax.bitwise_xor, lax.reduce_xor, np.bitwise_xor, _zero),
}
"""Bodies of one operation, by its name."""

_LOGICAL: Final[Mapping[str, Monoid]] = {"add": _OR, "multiply": _AND, "maximum": _OR, "minimum": _AND}
"""The meaning of arithmetic for booleans, in StableHLO."""

BODIES: Final = f"one of {', '.join(_MONOIDS)}"
"""Bodies that are served, for messages."""


def monoids(call: Call, block: Block) -> list[Monoid] | None:
    """Return the monoid of each result of a body that reduces each operand for itself,
    or None for any other body.
    """
    count = len(block.returns)
    numbering = ValueNumbering(call)
    returned = numbering.block(block)
    if len(block.arguments) != 2 * count:
        return None
    found = []
    for index, number in enumerate(returned):
        x, y = numbering.argument(index), numbering.argument(count + index)
        bodies = {name: numbering.apply(name, x, y) for name in _MONOIDS}
        if block.types[index].dtype.startswith("complex"):
            bodies |= {name: _lexicographic(numbering, name, x, y) for name in ("maximum", "minimum")}
        names = [name for name, body in bodies.items() if body == number]
        if not names:
            return None
        is_bool = block.types[index].dtype == "bool"
        found.append(_LOGICAL.get(names[0], _MONOIDS[names[0]]) if is_bool else _MONOIDS[names[0]])
    return found


def _lexicographic(numbering: ValueNumbering, name: str, x: int, y: int) -> int:
    """Return the number of an extreme of complex numbers, which compares real parts and
    then imaginary parts.
    """
    apply, direction = numbering.apply, "GT" if name == "maximum" else "LT"
    real, imag = ((apply(part, x), apply(part, y)) for part in ("real", "imag"))
    by_part = (numbering.compare(direction, *imag), numbering.compare(direction, *real))
    return apply("select", apply("select", numbering.compare("EQ", *real), *by_part), x, y)


def is_identity(monoid: Monoid, start: Value) -> bool:
    """Return whether a reduction may start anywhere because its start is the neutral
    element.
    """
    if not isinstance(start, np.ndarray) or start.size != 1:
        return False
    return bool(np.all(start == np.asarray(monoid.identity(start.dtype)).astype(start.dtype)))


@operation("stablehlo.reduce", attributes=["dimensions"], regions=1)
def _reduce(call: Call) -> list[Value]:
    count = len(call.operands) // 2
    values, starts = call.operands[:count], call.operands[count:]
    axes = tuple(call.attributes["dimensions"])
    (body,) = call.regions
    found = monoids(call, body)
    if found is not None:
        # A body may accumulate in a wider type than that of the elements.
        wide = [converted(value, dtype_of(type_)) for value, type_ in zip(values, body.types, strict=False)]
        return [_reduced(call, *each, axes) for each in zip(found, wide, starts, strict=True)]
    extreme = _extreme(call, body) if count == 2 and len(axes) == 1 else None
    if extreme is not None:
        return _arg_extreme(call, extreme, axes[0])
    raise call.refuse(
        f"with a body that is not recognised: expected {BODIES}, or that of argmax or argmin. Write "
        "another reduction as a loop, or slice by slice with the function itself"
    )


def _reduced(call: Call, monoid: Monoid, x: Value, start: Value, axes: tuple[int, ...]) -> Value:
    """Reduce axes, from a start that need not be neutral."""
    if known(x, start):
        with np.errstate(all="ignore"):
            reduced = np.asarray(monoid.fold.reduce(x, axis=axes, dtype=x.dtype) if axes else x)
            return np.asarray(monoid.fold(reduced, start))
    result = monoid.reduce(x, axes)
    if is_identity(monoid, start):
        return result
    if monoid.combine is not lax.add:  # A sum's derivative does not depend on its start.
        call.report.presumed[
            "a reduction with a start of its own: derivatives as of jax's reduction and one more operation"
        ] += 1
    return monoid.combine(result, lax.broadcast(start, result.shape))


def _extreme(call: Call, body: Block) -> str | None:
    """Return "argmax" or "argmin" for a body that keeps the extreme value and its
    index, else None.
    """
    numbering = ValueNumbering(call)
    returned = numbering.block(body)
    if len(returned) != 2 or len(body.arguments) != 4:
        return None
    x, i, y, j = (numbering.argument(index) for index in range(4))
    apply, compare = numbering.apply, numbering.compare
    for name, strict, weak in (("argmax", "GT", "GE"), ("argmin", "LT", "LE")):
        # As jax writes it: a NaN counts as extreme, and the smaller index wins a tie.
        take = apply("or", compare(strict, x, y), compare("NE", x, x))
        take_index = apply("or", take, apply("and", compare("EQ", x, y), compare("LT", i, j)))
        if returned == (apply("select", take, x, y), apply("select", take_index, i, j)):
            return name
        # As TensorFlow writes it, where NaN follows no rule.
        take = compare(weak, x, y)
        index = apply("select", compare("EQ", x, y), apply("minimum", i, j), apply("select", take, i, j))
        if returned == (apply("select", take, x, y), index):
            call.report.presumed[f"{name} as jax's: the first NaN is the extreme"] += 1
            return name
    return None


def _arg_extreme(call: Call, name: str, axis: int) -> list[Value]:
    """Return the extreme values along an axis, and their indices."""
    x, indices, start, first = call.operands
    monoid = _MONOIDS["maximum" if name == "argmax" else "minimum"]
    if not is_identity(monoid, start) or not (isinstance(first, np.ndarray) and first.size == 1 and first == 0):
        raise call.refuse(f"with the body of {name} and a start other than the neutral element and index 0")
    extreme = monoid.reduce(x, (axis,))
    if _counts_up(call, axis):
        place = lax.argmax if name == "argmax" else lax.argmin
        return [extreme, place(x, axis, indices.dtype)]
    # Any other indices: the smallest of those at which the extreme is.
    spread = jnp.expand_dims(lax.stop_gradient(extreme), axis)
    at = (x == spread) | ((x != x) & (spread != spread))  # noqa: PLR0124 - NaN
    return [extreme, jnp.min(jnp.where(at, indices, np.iinfo(indices.dtype).max), axis)]


def _counts_up(call: Call, axis: int) -> bool:
    """Return whether the second operand holds each element's index along an axis."""
    indices = call.operands[1]
    if isinstance(indices, np.ndarray):
        extents = [1] * indices.ndim
        extents[axis] = indices.shape[axis]
        return bool(np.all(indices == np.arange(indices.shape[axis]).reshape(extents)))
    made = call.definition(call.operation.operands[1])
    iotas = ("stablehlo.iota", "stablehlo.dynamic_iota")
    return made is not None and made.name in iotas and made.attributes["iota_dimension"] == axis


@dataclasses.dataclass(frozen=True)
class Window:
    """Windows over an array."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    base_dilations: tuple[int, ...]
    window_dilations: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def running(self, shape: Sequence[int]) -> tuple[int, bool] | None:
        """Return (axis, reverse) of windows that begin, or end, at the array's edge and
        grow by one element each.
        """
        ones = (1,) * len(shape)
        if not self.strides == self.base_dilations == self.window_dilations == ones:
            return None
        axes = [axis for axis, size in enumerate(self.sizes) if size != 1 or self.padding[axis] != (0, 0)]
        if len(axes) != 1 or self.sizes[axes[0]] != shape[axes[0]]:
            return None
        beyond = shape[axes[0]] - 1
        is_reverse = self.padding[axes[0]] == (0, beyond)
        return (axes[0], is_reverse) if is_reverse or self.padding[axes[0]] == (beyond, 0) else None


def _window(call: Call, rank: int) -> Window:
    ones = (1,) * rank
    attributes = call.attributes
    names = ("window_dimensions", "window_strides", "base_dilations", "window_dilations")
    sizes, strides, base, dilations = (tuple(int(each) for each in attributes.get(name, ones)) for name in names)
    padding = np.asarray(attributes.get("padding", np.zeros((rank, 2), int)))
    if any(len(each) != rank for each in (sizes, strides, base, dilations)) or padding.shape != (rank, 2):
        raise call.refuse(f"with windows of {len(sizes)} axes and a padding of shape {padding.shape} for {rank} axes")
    return Window(sizes, strides, base, dilations, tuple((int(low), int(high)) for low, high in padding))


_WINDOW: Final = ("window_dimensions", "window_strides", "base_dilations", "window_dilations", "padding")


@operation("stablehlo.reduce_window", attributes=_WINDOW, regions=1)
def _reduce_window(call: Call) -> list[Value]:
    count = len(call.operands) // 2
    return reduce_window(
        call, call.regions[0], call.operands[:count], call.operands[count:], _window(call, np.ndim(call.operands[0]))
    )


def reduce_window(
    call: Call, body: Block, values: Sequence[Value], starts: Sequence[Value], window: Window
) -> list[Value]:
    """Reduce windows by a body that is recognised.

    Args:
        call: The operation, for messages.
        body: Combines two elements of each array.
        values: Arrays of the same shape.
        starts: Scalar for each array from which each window's reduction starts, also
            the value of the padding.
        window: Windows.
    """
    found = monoids(call, body)
    if found is not None:
        return [_windowed(call, *each, window) for each in zip(found, values, starts, strict=True)]
    running = window.running(values[0].shape)
    if running and len(values) == 1 and _is_logaddexp(call, body) and np.array_equal(starts[0], -np.inf):
        call.report.recognised["cumlogsumexp"] += 1
        return [lax.cumlogsumexp(values[0], *running)]
    gathered = _gathered(call, body) if len(values) == 2 else None
    if gathered is not None:
        return _select_and_gather(call, gathered, values, starts, window)
    raise call.refuse(f"with a body that is not recognised: expected {BODIES}, or logaddexp along a whole axis")


def running(call: Call, body: Block, start: Value) -> Callable[..., Value] | None:
    """Return the running reduction (x, axis, reverse) of a body with one result, or
    None if jax has none for it.

    Args:
        call: The operation, for messages.
        body: Combines two elements.
        start: Scalar from which the reduction starts; it must be neutral.
    """
    found = monoids(call, body)
    if found is not None:
        return found[0].cumulative if is_identity(found[0], start) else None
    return lax.cumlogsumexp if _is_logaddexp(call, body) and np.array_equal(start, -np.inf) else None


def _gathered(call: Call, body: Block) -> str | None:
    """Return the comparison by which a body keeps one of two pairs, or None for any
    other body.
    """
    numbering = ValueNumbering(call)
    returned = numbering.block(body)
    if len(body.arguments) != 4:
        return None
    x, tangent, y, other = (numbering.argument(index) for index in range(4))
    for direction in ("GE", "LE"):
        take = numbering.compare(direction, x, y)
        if returned == (numbering.apply("select", take, x, y), numbering.apply("select", take, tangent, other)):
            return direction
    return None


def _select_and_gather(
    call: Call, direction: str, values: Sequence[Value], starts: Sequence[Value], window: Window
) -> list[Value]:
    """Return each window's extreme, and the element of the second array at the
    extreme's place.
    """
    x, tangents = values
    extreme = _MONOIDS["maximum" if direction == "GE" else "minimum"]
    if not is_identity(extreme, starts[0]) or not is_identity(_MONOIDS["add"], starts[1]):
        raise call.refuse("that selects elements at the extremes, with a start other than the neutral element and 0")
    gathered = lax.select_and_gather_add_p.bind(
        jnp.asarray(tangents),
        jnp.asarray(x),
        select_prim=lax.ge_p if direction == "GE" else lax.le_p,
        window_dimensions=window.sizes,
        window_strides=window.strides,
        padding=window.padding,
        base_dilation=window.base_dilations,
        window_dilation=window.window_dilations,
    )
    return [_windowed(call, extreme, x, starts[0], window), gathered]


def _windowed(call: Call, monoid: Monoid, x: Value, start: Value, window: Window) -> Value:
    shape = _windows(call, x, window)
    running = window.running(x.shape)
    if running and is_identity(monoid, start) and monoid.cumulative is not None and math.prod(shape):
        return monoid.cumulative(x, *running)
    # jax finds the derivative rule of a sum or extreme only if the start is concrete
    # and neutral.
    at = np.asarray(monoid.identity(x.dtype)).astype(x.dtype) if is_identity(monoid, start) else start
    return lax.reduce_window(
        x,
        at,
        monoid.combine,
        window.sizes,
        window.strides,
        window.padding,
        window.base_dilations,
        window.window_dilations,
    )


def _windows(call: Call, x: Value, window: Window) -> tuple[int, ...]:
    """Return the number of windows along each axis, within the limits."""
    steps = (window.sizes, window.strides, window.base_dilations, window.window_dilations)
    if any(each < 1 for step in steps for each in step):
        raise call.refuse("with a window, stride or dilation that is not positive")
    counts = []
    for axis, extent in enumerate(x.shape):
        size, stride, base, dilation = (step[axis] for step in steps)
        padded = sum(window.padding[axis]) + (max(extent - 1, 0) * base + min(extent, 1))
        reach = (size - 1) * dilation + 1
        counts.append(max(0, (padded - reach) // stride + 1))
    return shapes.fits(call, counts, np.dtype(x.dtype))


def _is_logaddexp(call: Call, body: Block) -> bool:
    """Return whether a body is jax's logaddexp."""
    numbering = ValueNumbering(call)
    returned = numbering.block(body)
    if len(body.arguments) != 2:
        return False
    x, y, apply = numbering.argument(0), numbering.argument(1), numbering.apply
    gap = apply("subtract", x, y)
    small = apply("log_plus_one", apply("exponential", apply("negate", apply("abs", gap))))
    total = apply("add", apply("maximum", x, y), small)
    return returned == (apply("select", numbering.compare("NE", gap, gap), apply("add", x, y), total),)


@operation("stablehlo.select_and_scatter", attributes=["window_dimensions", "window_strides", "padding"], regions=2)
def _select_and_scatter(call: Call) -> Value:
    """Add each source element to the place of its window's extreme: the transpose of a
    reduction to that extreme.
    """
    x, source, start = call.operands
    select = _selection(call, call.regions[0])
    scattered = monoids(call, call.regions[1])
    sum_ = _OR if x.dtype == np.bool_ else _MONOIDS["add"]
    if select is None or scattered is None or scattered[0] is not sum_:
        raise call.refuse(
            "with bodies that are not recognised: expected a selection by GE or LE, and a scatter by add. "
            "For other functions, find the extremes by reduce_window or argmax, and scatter to them"
        )
    window = _window(call, x.ndim)
    if _windows(call, x, window) != source.shape:
        raise call.refuse(f"whose source is of shape {list(source.shape)}, which is not the number of windows")
    result = lax.select_and_scatter_add_p.bind(
        source,
        x,
        select_prim=select,
        window_dimensions=window.sizes,
        window_strides=window.strides,
        padding=window.padding,
    )
    return result if is_identity(sum_, start) else sum_.combine(result, lax.broadcast(start, result.shape))


def _selection(call: Call, body: Block) -> Any:
    """Return jax's primitive for the comparison by which a body selects, or None for
    any other body.
    """
    numbering = ValueNumbering(call)
    returned = numbering.block(body)
    if len(body.arguments) != 2:
        return None
    x, y = numbering.argument(0), numbering.argument(1)
    for direction, primitive in (("GE", lax.ge_p), ("LE", lax.le_p)):
        if returned == (numbering.compare(direction, x, y),):
            return primitive
    return None
