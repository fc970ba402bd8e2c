"""Exact arithmetic of sizes, beyond the range of their dtype.

A program with a symbolic number of rows computes its sizes in 32 bits while jax's x64
is off. A count of elements, such as the divisor of a mean, could wrap around there.
Without symbolic rows jax computes sizes as integers of Python. This file does so too.

Only scalars are followed, because jax computes each size as a scalar. Known integers
that do not come from a size wrap around, as jax's arrays do.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from hvpd_server.importer.graph import Operation

MAX_BITS: Final = 1023
"""Bits of the largest number that is computed from sizes: the range of float64."""

CARRYING: Final = frozenset(["func.call", "stablehlo.composite", "stablehlo.optimization_barrier"])
"""Operations whose rules hand sizes on as they are."""


class Size(np.ndarray[Any, Any]):
    """A scalar that was computed from sizes and constants alone."""

    exact: int | None = None
    """The exact value. None for the arrays that NumPy makes of a `Size`."""


def size(exact: int, dtype: np.dtype[Any]) -> Size:
    """Return a size of a signed dtype. The elements of the array wrap around."""
    found = np.asarray(exact % (1 << 64), np.uint64).astype(dtype).view(Size)
    found.exact = exact
    return found


def is_size(value: Any) -> bool:
    """Return whether a value is a size."""
    return isinstance(value, Size) and value.exact is not None


def exceeds(value: Any) -> bool:
    """Return whether a value is a size that its dtype cannot hold."""
    return is_size(value) and value.exact != int(value)


def _quotient(x: int, y: int) -> int | None:
    return (abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)) if y else None


def _remainder(x: int, y: int) -> int | None:
    return (abs(x) % abs(y) * (-1 if x < 0 else 1)) if y else None


_EXACT: Final[Mapping[str, Callable[..., int | None]]] = {
    "abs": abs,
    "add": operator.add,
    "convert": int,
    "divide": _quotient,
    "maximum": max,
    "minimum": min,
    "multiply": operator.mul,
    "negate": operator.neg,
    "remainder": _remainder,
    "select": lambda which, on_true, on_false: on_true if which else on_false,
    "sign": lambda x: (x > 0) - (x < 0),
    "subtract": operator.sub,
}
"""Operations on integers of Python; None for a division by zero."""

_COMPARISONS: Final[Mapping[Any, Callable[[int, int], bool]]] = {
    direction: getattr(operator, direction.lower()) for direction in ("EQ", "NE", "GE", "GT", "LE", "LT")
}


def result(operation: Operation, operands: Sequence[Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any] | None:
    """Return the result of an operation on sizes and known scalars, computed exactly.

    Returns:
        A size if `dtype` is signed. None if the operation is no such arithmetic, or is
        of other values.

    Raises:
        OverflowError: The result has more than `MAX_BITS` bits.
    """
    if dtype.kind == "u" or not all(map(_is_integer, operands)):
        return None
    name = operation.name.removeprefix("stablehlo.")
    if name == "compare":
        compute: Any = _COMPARISONS.get(operation.attributes["comparison_direction"])
    else:
        compute = _EXACT.get(name)
    exact = None if compute is None else compute(*(each.exact if is_size(each) else int(each) for each in operands))
    if exact is None:
        return None
    if exact.bit_length() > MAX_BITS:
        raise OverflowError(f"a number computed from sizes has more than {MAX_BITS} bits")
    if dtype.kind == "i":
        return size(exact, dtype)
    if dtype.kind == "b":
        return np.asarray(bool(exact))
    # A direct conversion from 64 bits rounds once.
    with np.errstate(over="ignore"):
        return np.asarray(exact if exact.bit_length() < 64 else float(exact)).astype(dtype)


def _is_integer(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iub"
