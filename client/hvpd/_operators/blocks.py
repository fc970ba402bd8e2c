"""Products with many vectors, in blocks that fit the device and this machine."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hvpd._errors import InvalidArgumentError
from hvpd._krylov.trace import NOT_FINITE
from hvpd._wire import codec

Multiply = Callable[[codec.Array], codec.Array]
"""Multiplies V[k,n] -> AV[k,n], where A is symmetric. Vectors are rows."""


def products(multiply: Multiply, block: codec.Array) -> codec.Array:
    """Return multiply(block).

    Raises:
        InvalidArgumentError: The products hold NaN or infinity (reason `NOT_FINITE`).
    """
    found = multiply(block)
    if not np.isfinite(found).all():
        raise InvalidArgumentError(NOT_FINITE, reason="NOT_FINITE")
    return found


def unit_products(multiply: Multiply, n: int, dtype: np.dtype[Any]) -> Iterator[tuple[slice, codec.Array]]:
    """Yield the rows of the matrix by blocks: their positions and their elements."""
    for span in codec.spans(n, n, dtype):
        units = np.zeros((span.stop - span.start, n), dtype)
        units[np.arange(len(units)), np.arange(span.start, span.stop)] = 1
        yield span, products(multiply, units)
