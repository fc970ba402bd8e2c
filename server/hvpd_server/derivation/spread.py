"""Flat vectors that are split evenly over several devices.

Their elements are in an order of their own: first all elements that the first device
has of the leaves of x, then those of the second device, and so on. So each device makes
its part of a flat vector from its parts of the leaves, without any other device. A leaf
that is not split has its elements, and zeros behind them, shared out evenly. Zeros stay
zeros in every linear iteration, and change no inner product.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from hvpd._wire import codec

if TYPE_CHECKING:
    from hvpd_server.derivation.compiling import Target

Function = Callable[..., Any]

_F = TypeVar("_F", bound=Function)

ROWS = "rows"
"""The axis of the mesh of devices."""


class Spread:
    """The layout of vectors in the shape of x.

    Args:
        shapes: Shapes of the leaves.
        target: The devices.

    Attributes:
        n: Elements of a flat vector, with zeros at the ends of leaves.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], target: "Target") -> None:
        self._target = target
        self._parts = parts = len(target.parts)
        self._leaves = [(tuple(shape), target.axis(shape)) for shape in shapes]
        self._ends = [0, *itertools.accumulate(-(-math.prod(shape) // parts) for shape in shapes)]
        self.n = parts * self._ends[-1]

    def along(self, axis: int) -> jax.sharding.NamedSharding:
        """Return the sharding of an array that has vectors along an axis."""
        return jax.sharding.NamedSharding(self._target.mesh, jax.sharding.PartitionSpec(*[None] * axis, ROWS))

    def through(self, multiply: Function) -> Function:
        """Return (x, V[k,n], *args) -> A V of a product that takes V by leaf."""

        def multiplied(x: Any, V: jax.Array, *args: jax.Array) -> jax.Array:
            shardings = [self._target.by_leaf(shape, V.ndim - 1) for shape, _ in self._leaves]
            leaves = jax.lax.with_sharding_constraint(self._cut(V, jnp), shardings)
            found = jax.lax.with_sharding_constraint(multiply(x, leaves, *args), shardings)
            product: jax.Array = jax.lax.with_sharding_constraint(self._joined(found, jnp), self.along(V.ndim - 1))
            return product

        return multiplied

    def put(self, array: codec.Array, axis: int = -1) -> jax.Array:
        """Copy vectors from the host's memory to the devices; blocks until it is done.

        Args:
            array: Vectors along an axis.
            axis: The axis.
        """
        leaves = cut(np.moveaxis(array, axis, -1), [shape for shape, _ in self._leaves])
        placed = np.moveaxis(self._joined(leaves, np), -1, axis)
        found: jax.Array = jax.block_until_ready(jax.device_put(placed, self.along(axis % array.ndim)))
        return found

    def host(self, array: Any, axis: int = -1) -> codec.Array:
        """Return vectors from the devices in the host's memory."""
        flat = np.moveaxis(np.asarray(array), axis, -1)
        leaves = [leaf.reshape((*flat.shape[:-1], -1)) for leaf in self._cut(flat, np)]
        return np.moveaxis(np.concatenate(leaves, axis=-1), -1, axis)

    def _joined(self, leaves: Sequence[Any], xp: Any) -> Any:
        """Return flat vectors from their leaves, with NumPy or with jax."""
        found, front = [], leaves[0].shape[: leaves[0].ndim - len(self._leaves[0][0])]
        for leaf, (shape, axis), (start, end) in zip(leaves, self._leaves, itertools.pairwise(self._ends), strict=True):
            if axis is None:
                missing = (end - start) * self._parts - math.prod(shape)
                part = xp.pad(leaf.reshape((*front, -1)), [*[(0, 0)] * len(front), (0, missing)])
            else:
                divided = (*shape[:axis], self._parts, shape[axis] // self._parts, *shape[axis + 1 :])
                part = xp.moveaxis(leaf.reshape((*front, *divided)), len(front) + axis, len(front))
            found.append(part.reshape((*front, self._parts, end - start)))
        return xp.concatenate(found, axis=-1).reshape((*front, self.n))

    def _cut(self, array: Any, xp: Any) -> list[Any]:
        """Return the leaves of flat vectors, with NumPy or with jax."""
        found, front = [], array.shape[:-1]
        array = array.reshape((*front, self._parts, self.n // self._parts))
        for (shape, axis), (start, end) in zip(self._leaves, itertools.pairwise(self._ends), strict=True):
            part = array[..., start:end]
            if axis is None:
                leaf = part.reshape((*front, -1))[..., : math.prod(shape)]
            else:
                divided = (*shape[:axis], shape[axis] // self._parts, *shape[axis + 1 :])
                leaf = xp.moveaxis(part.reshape((*front, self._parts, *divided)), len(front), len(front) + axis)
            found.append(leaf.reshape((*front, *shape)))
        return found


def cut(array: Any, shapes: Sequence[Sequence[int]]) -> list[Any]:
    """Return the leaves of an array[..., n], as views."""
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)]).tolist()
    front = array.shape[:-1]
    return [
        array[..., start:end].reshape((*front, *shape))
        for shape, start, end in zip(shapes, ends, ends[1:], strict=False)
    ]


def summed(product: _F) -> _F:
    """Have each device compute its part of inner products, within `jax.set_mesh`, so
    that no device gathers vectors. The last axes of the arguments are those of the
    vectors; numbers are the same on all devices.
    """

    @functools.wraps(product)
    def over_devices(*arrays: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if ROWS not in mesh.auto_axes:
            return product(*arrays)

        def part(*parts: Any) -> Any:
            return jax.lax.psum(product(*parts), ROWS)

        axes: list[list[str | None]] = [[None] * (array.ndim - 1) + [ROWS] * (array.ndim > 0) for array in arrays]
        specs = tuple(jax.sharding.PartitionSpec(*each) for each in axes)
        together: Function = jax.shard_map(
            part, in_specs=specs, out_specs=jax.sharding.PartitionSpec(), check_vma=False
        )
        return together(*arrays)

    return cast("_F", over_devices)
