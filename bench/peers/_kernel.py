"""The product of every peer that runs jax: forward over reverse, compiled once for each
width, with data on the device. It is what one writes by hand.
"""

from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from bench._objectives import mlp
from bench.peers._spec import MOST, Multiply, Spec, Vector

# The calling thread computes, which saves a hand-off. This must be set before jax finds
# its devices.
jax.config.update("jax_cpu_enable_async_dispatch", False)

_WIDTHS = tuple(1 << power for power in range(MOST.bit_length()))


class Kernel:
    """Products with the Hessian at any x."""

    def __init__(self, spec: Spec, *, most: int = MOST) -> None:
        """Compile every width up to `most`."""
        problem = mlp(spec.sizes, spec.rows)
        x, unravel = ravel_pytree(problem.x)
        self.x = np.asarray(x)
        self._data = [jax.device_put(array) for array in problem.data]
        shape: Any = jax.ShapeDtypeStruct

        def gradient(x: jax.Array, *data: jax.Array) -> jax.Array:
            found: jax.Array = jax.grad(lambda x: problem.fun(unravel(x), *data))(x)
            return found

        def products(x: jax.Array, V: jax.Array, *data: jax.Array) -> jax.Array:
            found: jax.Array = jax.vmap(lambda v: jax.jvp(lambda x: gradient(x, *data), (x,), (v,))[1])(V)
            return found

        self._gradient = jax.jit(gradient)

        self._compiled = {
            width: jax.jit(products)
            .lower(shape(x.shape, x.dtype), shape((width, x.size), x.dtype), *self._data)
            .compile()
            for width in _WIDTHS
            if width <= most
        }

    def at(self, x: Vector) -> Multiply:
        """Return the products at a resident x: from rows of shape (k, n) to rows."""
        resident = jax.device_put(x)

        def multiply(V: Vector) -> Vector:
            width = next(width for width in self._compiled if width >= len(V))
            padded = V if len(V) == width else np.concatenate([V, np.zeros((width - len(V), V.shape[1]), V.dtype)])
            return np.asarray(self._compiled[width](resident, padded, *self._data))[: len(V)]

        for width in self._compiled:
            multiply(np.zeros((width, x.size), x.dtype))
        return multiply

    def multiply(self, x: Vector, v: Vector) -> Vector:
        """Return one product at an x that comes with it."""
        product: Vector = np.asarray(self._compiled[1](x, v[None], *self._data))[0]
        return product

    def gradient(self, x: Vector) -> Vector:
        """Return the gradient at any x."""
        gradient: Vector = np.asarray(self._gradient(x, *self._data))
        return gradient
