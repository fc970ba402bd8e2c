"""Rows of vectors in the memory of a device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hvpd._wire import codec
from hvpd_server.derivation.spread import Spread
from hvpd_server.device.device import Device, device_errors, host


class Basis:
    """An array of rows on a device, which is written in place.

    Args:
        device: The device.
        rows: Number of rows.
        n: Elements of a row.
        dtype: dtype of the elements.
        spread: The layout of rows that are split over several devices.
    """

    def __init__(self, device: Device, rows: int, n: int, dtype: "np.dtype[Any]", spread: Spread | None = None) -> None:
        self.rows = rows
        self._device, self._spread = device, spread
        n, sharding = (n, device.target.whole) if spread is None else (spread.n, spread.along(1))
        with device_errors():
            self.array = jnp.zeros((rows, n), dtype, device=sharding)

    def write(self, rows: Any, first: int, count: int) -> None:
        """Write the first `count` of some rows, from row `first` on."""
        numbers = np.arange(len(rows))
        # Rows that do not count go beyond the end, where they are dropped, so that one
        # program serves every count.
        where = np.where(numbers < count, first + numbers, self.rows).astype(np.int32)
        with device_errors():
            self.array = _written(self.array, rows, where)

    def put(self, rows: codec.Array, first: int) -> None:
        """Write rows of the host's memory, from row `first` on."""
        device, spread = self._device, self._spread
        placed = device.put(rows) if spread is None else device.put_spread(rows, spread)
        self.write(placed, first, len(rows))

    def host(self, rows: Any) -> codec.Array:
        """Return rows, such as those of `first`, in the host's memory."""
        return host(rows, self._spread)

    def first(self, rows: int) -> Any:
        """Return a copy of the first rows."""
        with device_errors():
            return self.array[:rows]

    def row(self, number: int) -> Any:
        """Return a copy of one row, of shape (1, n)."""
        with device_errors():
            return jax.lax.dynamic_slice_in_dim(self.array, number, 1)

    def combination(self, Y: codec.Array) -> Any:
        """Return Y^T Q for the first rows Q, on the device."""
        with device_errors():
            return _combined(jnp.asarray(Y.T, self.array.dtype), self.array[: len(Y)])


@functools.partial(jax.jit, donate_argnums=0)
def _written(array: jax.Array, rows: jax.Array, where: jax.Array) -> jax.Array:
    return array.at[where].set(rows, mode="drop")


@jax.jit
def _combined(Y: jax.Array, Q: jax.Array) -> jax.Array:
    return jax.lax.dot(Y, Q, precision=jax.lax.Precision.HIGHEST)
