"""How the leaves of x lie in the flat vector, for programs: x whole, or some of its leaves while the others stay. Needs jax."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

View = Callable[..., Any]
"""(y, *args) -> (leaves of x, *the function's own args), where y is what derivatives are taken by."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The leaves of x in the order in which they are raveled."""

    leaves: Sequence[jax.ShapeDtypeStruct]
    """Shape and dtype of each."""

    def split(self, x: jax.Array) -> list[jax.Array]:
        """The leaves of the flat x, in their own dtypes."""
        return [
            x[span].reshape(leaf.shape).astype(leaf.dtype)
            for span, leaf in zip(self._spans(), self.leaves, strict=True)
        ]

    def whole(self, x: jax.Array, *args: jax.Array) -> Any:
        """The view in which x itself is what derivatives are taken by."""
        return self.split(x), *args

    def block(self, positions: Sequence[int]) -> View:
        """The view in which that is some leaves, raveled: (y, x, *args) -> (leaves, *args), the other leaves being x's."""

        def view(y: jax.Array, x: jax.Array, *args: jax.Array) -> Any:
            leaves = self.split(x)
            part = Layout([self.leaves[position] for position in positions]).split(y)
            for position, leaf in zip(positions, part, strict=True):
                leaves[position] = leaf
            return leaves, *args

        return view

    def take(self, x: jax.Array, positions: Sequence[int]) -> jax.Array:
        """The elements of some leaves of the flat x."""
        spans = self._spans()
        return jnp.concatenate([x[spans[position]] for position in positions])

    def size(self, positions: Sequence[int] | None = None) -> int:
        """How many elements some leaves have, or all."""
        leaves = self.leaves if positions is None else [self.leaves[position] for position in positions]
        return sum(math.prod(leaf.shape) for leaf in leaves)

    def _spans(self) -> list[slice]:
        ends = [0, *itertools.accumulate(math.prod(leaf.shape) for leaf in self.leaves)]
        return list(itertools.starmap(slice, itertools.pairwise(ends)))
