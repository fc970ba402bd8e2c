"""A StableHLO module as plain Python data. Knows neither MLIR nor jax.

Values are numbered within a function. A region's operations may use the values of the
operations around it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class TensorType:
    """The type of an array."""

    shape: tuple[int | None, ...]
    """Extents; None for an extent that the program computes."""
    dtype: str
    """Name of a NumPy or ml_dtypes dtype, such as "float32", "bfloat16" or "bool"."""

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join('?' if extent is None else str(extent) for extent in self.shape)}]"

    def fits(self, other: "TensorType") -> bool:
        """Return whether both may be the type of one array: an extent that is not known
        fits any.
        """
        return (
            self.dtype == other.dtype
            and len(self.shape) == len(other.shape)
            and all(a is None or b is None or a == b for a, b in zip(self.shape, other.shape, strict=True))
        )


@dataclasses.dataclass(frozen=True)
class Block:
    """The body of a function, or of a region: operations in order, then the returned
    values.
    """

    arguments: tuple[int, ...]
    """Values of the arguments."""
    types: tuple[TensorType, ...]
    """Types of the arguments."""
    operations: Sequence["Operation"]
    """Operations without the final return."""
    returns: tuple[int, ...]
    """Returned values."""
    result_types: tuple[TensorType, ...]
    """Types of the returned values."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation."""

    name: str
    """Name with its dialect, such as "stablehlo.add"."""
    operands: tuple[int, ...]
    """Values that the operation takes."""
    results: tuple[int, ...]
    """Values that the operation makes."""
    types: tuple[TensorType, ...]
    """Types of the results."""
    attributes: Mapping[str, Any]
    """Attributes as plain Python; see `attributes.plain`."""
    regions: tuple[Block, ...] = ()
    """Regions, of one block each."""
    location: str = ""
    """Place in the source, if the program states it."""


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: functions that call each other, without recursion."""

    functions: Mapping[str, Block]
    """Bodies by the function's symbol, without "@"."""
    entry: str = "main"
    """Symbol of the function that is the program."""

    @property
    def main(self) -> Block:
        """The body of the entry function."""
        return self.functions[self.entry]
