"""Vectors that are split by leaf over several devices, and programs that take them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvpd._wire import codec
from hvpd_server.derivation.spread import cut


class Leaves:
    """An array[..., n] on several devices, as one array for each leaf of x.

    Args:
        arrays: The leaves, of shape (*front, *shape of the leaf).
        front: Number of axes in front.
    """

    def __init__(self, arrays: Sequence[Any], front: int) -> None:
        self.arrays = arrays
        self._front = front

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> codec.Array:
        """Return the array in the host's memory."""
        flat = [np.asarray(each).reshape(*each.shape[: self._front], -1) for each in self.arrays]
        return np.concatenate(flat, axis=-1, dtype=dtype)

    def block_until_ready(self) -> "Leaves":
        """Wait until all leaves are computed."""
        for each in self.arrays:
            each.block_until_ready()
        return self


class LeafProgram:
    """A compiled program that takes x, and vectors if its width is not 0, by leaf.

    Args:
        compiled: The program.
        shapes: Shapes of the leaves.
        width: Vectors of a block.
        iterates: Whether the program takes several steps of an iteration. Its vectors
            are flat; see `derivation.spread`.
    """

    def __init__(self, compiled: Any, shapes: Sequence[Sequence[int]], width: int, *, iterates: bool = False) -> None:
        self._compiled = compiled
        self._shapes = shapes
        self._width = width
        self._iterates = iterates

    def __call__(self, x: Leaves, *args: Any) -> Any:
        """Run the program. Return HV, the value and the gradient, or what the steps
        return.
        """
        if self._iterates:
            return self._compiled(x.arrays, *args)
        if self._width:
            block, *data = args
            return Leaves(self._compiled(x.arrays, cut(block, self._shapes), *data), 1)
        value, gradient = self._compiled(x.arrays, *args)
        return value, Leaves(gradient, 0)
