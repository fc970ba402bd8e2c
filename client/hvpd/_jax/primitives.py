"""Two primitives of jax whose values a server computes.

    product    (x..., v) -> A v, linear in v and symmetric
    point      x -> (f(x), gradient of f at x)

The derivative of `point` is a `product`, so f is twice differentiable. Both batch:
`product` multiplies the vectors of a vmapped axis as blocks, and `point` visits the x
of a vmapped axis one after the other.

Callbacks use NumPy only. `jax.pure_callback` first copies its arguments to a device of
jax, in a thread pool of as many threads as there are cores. Callbacks occupy these
threads, so they can wait for each other for ever (jax issue 24255). The callbacks here
get NumPy's views from XLA. Outside of a compiled program, no callback is needed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from hvpd._errors import HvpdError, InvalidArgumentError
from hvpd._jax import errors
from hvpd._wire import codec

errors.install()


class Multiplies(Protocol):
    """A source of products: hashable, because jax keys its caches by it."""

    def multiply(self, x: codec.Array | None, rows: codec.Array) -> codec.Array:
        """Multiply V[k,n] -> AV[k,n], at x of shape (n,) if A depends on x."""


class Visits(Protocol):
    """A source of points: hashable, as `Multiplies`."""

    def visit(self, x: codec.Array) -> tuple[float, codec.Array]:
        """Return f(x) and its gradient, for x of shape (n,)."""

    def multiply(self, x: codec.Array | None, rows: codec.Array) -> codec.Array:
        """Multiply V[k,n] -> HV[k,n], where H is the Hessian at x."""


# On the host


def _product(*arrays: Any, source: Multiplies) -> codec.Array:
    """Multiply v[..., n] at no x, at one x of shape (n,), or at an x for each v."""
    *x, v = (np.asarray(array) for array in arrays)
    rows = v.reshape(-1, v.shape[-1])
    if not x or x[0].ndim == 1:
        return source.multiply(x[0] if x else None, rows).reshape(v.shape)
    places = x[0].reshape(rows.shape)
    result = np.empty_like(rows)
    start = 0
    for end in range(1, len(rows) + 1):  # Neighbours at the same x are one block.
        if end == len(rows) or not np.array_equal(places[end], places[start]):
            result[start:end] = source.multiply(places[start], rows[start:end])
            start = end
    return result.reshape(v.shape)


def _point(x: Any, *, source: Visits) -> tuple[codec.Array, codec.Array]:
    array = np.asarray(x)
    values = np.empty(array.shape[:-1], array.dtype)
    gradients = np.empty_like(array)
    for place in np.ndindex(values.shape):
        values[place], gradients[place] = source.visit(array[place])
    return values, gradients


class _Results(tuple[Any, ...]):
    """Results of a callback, which jax does not narrow to 32 bits.

    XLA can run a callback in a thread of its own, where `jax.enable_x64` of the
    caller's thread has no effect. jax converts each result while it iterates.
    """

    __slots__ = ()

    def __iter__(self) -> Iterator[Any]:
        with jax.enable_x64(True):
            yield from super().__iter__()


def _callback(compute: Callable[..., Any], source: Any) -> Callable[..., Any]:
    """Return a callback whose errors keep their identity."""

    def call(*arrays: Any) -> Any:
        try:
            found = compute(*arrays, source=source)
        except (HvpdError, KeyboardInterrupt) as error:
            raise errors.marked(error) from error
        return _Results(found if isinstance(found, tuple) else (found,))

    return call


def _define(primitive: Primitive, compute: Callable[..., Any], avals: Callable[..., Any]) -> None:
    def evaluate(*arrays: Any, source: Any) -> Any:
        found = compute(*arrays, source=source)
        return [jnp.asarray(each) for each in found] if isinstance(found, tuple) else jnp.asarray(found)

    def lower(ctx: Any, *operands: Any, source: Any) -> Any:
        results, _, _ = mlir.emit_python_callback(
            ctx,
            _callback(compute, source),
            None,
            list(operands),
            ctx.avals_in,
            ctx.avals_out,
            has_side_effect=False,
            returns_token=False,
        )
        return results

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(avals)
    # Each module has callbacks of its own, so a cached lowering would call another's.
    mlir.register_lowering(primitive, lower, cacheable=False)


def _zero(primal: Any) -> ad.Zero:
    """Return the tangent of a value that does not change."""
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


# product

product_p = Primitive("hvpd_product")
_define(product_p, _product, lambda *avals, source: avals[-1])


def _product_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, source: Multiplies) -> tuple[Any, Any]:
    if len(tangents) == 2 and not isinstance(tangents[0], ad.Zero):
        raise InvalidArgumentError(
            "an objective of a server is twice differentiable, and its third derivative was asked for: differentiate "
            "at most twice by x, or stop the gradient at a product's x (jax.lax.stop_gradient)",
            reason="THIRD_DERIVATIVE",
        )
    out = product_p.bind(*primals, source=source)
    if isinstance(tangents[-1], ad.Zero):
        return out, _zero(out)
    return out, product_p.bind(*primals[:-1], tangents[-1], source=source)


def _product_transpose(cotangent: Any, *operands: Any, source: Multiplies) -> list[Any]:
    *x, v = operands
    if isinstance(cotangent, ad.Zero):
        return [*(None for _ in x), ad.Zero(v.aval)]
    return [*(None for _ in x), product_p.bind(*x, cotangent, source=source)]


def _product_batch(operands: Sequence[Any], axes: Sequence[Any], *, source: Multiplies) -> tuple[Any, int]:
    *x, v = (_first(operand, axis) for operand, axis in zip(operands, axes, strict=True))
    if not x:
        return product_p.bind(v, source=source), 0
    size = next(operand.shape[axis] for operand, axis in zip(operands, axes, strict=True) if axis is not None)
    if axes[-1] is None:
        v = jnp.broadcast_to(v, (size, *v.shape))
    place = x[0]
    if axes[0] is None and place.ndim > 1:  # An x for each v of an outer axis.
        place = jnp.broadcast_to(place, v.shape)
    elif axes[0] is not None and place.ndim < v.ndim:
        place = jnp.broadcast_to(place.reshape(size, *(1,) * (v.ndim - 2), -1), v.shape)
    return product_p.bind(place, v, source=source), 0


def _first(operand: Any, axis: int | None) -> Any:
    array = jnp.asarray(operand)  # Constants of NumPy are not batched otherwise.
    return array if axis is None else jnp.moveaxis(array, axis, 0)


ad.primitive_jvps[product_p] = _product_jvp
ad.primitive_transposes[product_p] = _product_transpose
batching.primitive_batchers[product_p] = _product_batch


# point

point_p = Primitive("hvpd_point")
point_p.multiple_results = True
_define(point_p, _point, lambda x, source: [jax.core.ShapedArray(x.shape[:-1], x.dtype), x])


def _point_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, source: Visits) -> tuple[Any, Any]:
    (x,), (direction,) = primals, tangents
    value, gradient = point_p.bind(x, source=source)
    if isinstance(direction, ad.Zero):
        return [value, gradient], [_zero(each) for each in (value, gradient)]
    slope = jnp.sum(gradient * direction, axis=-1)
    return [value, gradient], [slope, product_p.bind(x, direction, source=source)]


def _point_batch(operands: Sequence[Any], axes: Sequence[Any], *, source: Visits) -> tuple[Any, list[int]]:
    return point_p.bind(_first(operands[0], axes[0]), source=source), [0, 0]


ad.primitive_jvps[point_p] = _point_jvp
batching.primitive_batchers[point_p] = _point_batch
