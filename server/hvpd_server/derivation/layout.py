"""The layout of the leaves of x in the flat vector: all of x, or some leaves while the
others stay.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

View = Callable[..., Any]
"""Maps (y, *args) to (leaves of x, *the function's own args). Derivatives are taken by
y.
"""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The leaves of x in the order in which they are raveled."""

    leaves: Sequence[jax.ShapeDtypeStruct]
    """Shape and dtype of each leaf."""

    def split(self, x: Any) -> list[jax.Array]:
        """Return the leaves of x, which is flat, or has been split before, in their own
        dtypes.
        """
        if isinstance(x, list | tuple):
            return [part.astype(leaf.dtype) for part, leaf in zip(x, self.leaves, strict=True)]
        return [
            x[span].reshape(leaf.shape).astype(leaf.dtype)
            for span, leaf in zip(self._spans(), self.leaves, strict=True)
        ]

    def whole(self, x: jax.Array, *args: jax.Array) -> Any:
        """Return the view in which derivatives are taken by x itself."""
        return self.split(x), *args

    def block(self, positions: Sequence[int]) -> View:
        """Return the view in which derivatives are taken by some leaves, raveled.

        It maps (y, x, *args) to (leaves, *args); the other leaves are those of x.
        """

        def view(y: jax.Array, x: jax.Array, *args: jax.Array) -> Any:
            leaves = self.split(x)
            part = Layout([self.leaves[position] for position in positions]).split(y)
            for position, leaf in zip(positions, part, strict=True):
                leaves[position] = leaf
            return leaves, *args

        return view

    def take(self, x: jax.Array, positions: Sequence[int]) -> jax.Array:
        """Return the elements of some leaves of the flat x."""
        spans = self._spans()
        return jnp.concatenate([x[spans[position]] for position in positions])

    def size(self, positions: Sequence[int] | None = None) -> int:
        """Return the number of elements of some leaves, or of all."""
        leaves = self.leaves if positions is None else [self.leaves[position] for position in positions]
        return sum(math.prod(leaf.shape) for leaf in leaves)

    def _spans(self) -> list[slice]:
        ends = [0, *itertools.accumulate(math.prod(leaf.shape) for leaf in self.leaves)]
        return list(itertools.starmap(slice, itertools.pairwise(ends)))
