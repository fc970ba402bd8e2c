"""Products with many vectors at once, as blocks that are wide enough for the device and small enough for this machine."""

import math
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hvpd import _codec
from hvpd._errors import InvalidArgumentError

Multiply = Callable[[_codec.Array], _codec.Array]
"""V[k,n] -> AV[k,n], A symmetric: vectors are rows."""

_BYTES = 64 << 20
"""What a block takes here, about. The transport cuts it into the server's widths, and sends these without waiting."""


def spans(count: int, n: int, dtype: np.dtype[Any]) -> Iterator[slice]:
    """Which of `count` vectors of n elements go together."""
    width = min(max(_BYTES // max(n * dtype.itemsize, 1), 16), 1024)
    for start in range(0, count, width):
        yield slice(start, min(start + width, count))


def products(multiply: Multiply, block: _codec.Array) -> _codec.Array:
    """multiply(block), where that is finite.

    Raises:
        InvalidArgumentError: NaN or infinity came back.
    """
    found = multiply(block)
    if not np.isfinite(found).all():
        raise InvalidArgumentError(
            "products with finite vectors hold NaN or infinity here: there is no curvature at this point (see point.nonfinite)"
        )
    return found


def unit_products(multiply: Multiply, n: int, dtype: np.dtype[Any]) -> Iterator[tuple[slice, _codec.Array]]:
    """Rows of the matrix, block by block: which, and their elements."""
    for span in spans(n, n, dtype):
        units = np.zeros((span.stop - span.start, n), dtype)
        units[np.arange(len(units)), np.arange(span.start, span.stop)] = 1
        yield span, products(multiply, units)


def integer(number: Any, what: str, least: int, most: int | None = None) -> int:
    """`number` as an int in [least, most].

    Raises:
        InvalidArgumentError: It is not.
    """
    if not isinstance(number, (int, np.integer)) or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidArgumentError(f"{what} must be an integer {limits}, got {number!r}")
    return int(number)


def finite(number: Any, what: str) -> float:
    """`number` as a float.

    Raises:
        InvalidArgumentError: It is no finite real number.
    """
    if not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise InvalidArgumentError(f"{what} must be a finite real number, got {number!r}")
    return float(number)
