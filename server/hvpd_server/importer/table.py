"""The table of operations: how each is rebuilt through jax, and which attributes and
regions it may have.

A rule takes a `Call` and returns the results. Every attribute that a program may set is
named where the rule is registered; `evaluate` refuses an operation that is not in the
table, and an operation with any other attribute before its rule runs.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np

from hvpd import _text
from hvpd_server.importer import refusals, sizes
from hvpd_server.importer.graph import Block, Operation, TensorType

Value = Any
"""A jax array, or a NumPy array if the value is known while the program is read."""

Rule = Callable[["Call"], Sequence[Value] | Value]
"""Rebuilds one operation: returns its result, or the sequence of its results."""

FOLD_ELEMENTS: Final = 1 << 10
"""Largest array of integers that is computed while the program is read: sizes and
indices are, data is not.
"""


LOOP_BYTES: Final = 1 << 40
"""Most bytes that all rounds of a loop carry together. XLA aborts the process if such a
size overflows.
"""


class Refused(Exception):  # noqa: N818 - a verdict
    """A program is not served.

    Args:
        reason: Constant of `refusals.REASONS`.
        message: Operation, the value that arrived, and the expected value.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass
class Report:
    """The importer's findings that a program's author may want to know."""

    recognised: "collections.Counter[str]" = dataclasses.field(default_factory=collections.Counter)
    """Derivative rules that were put back, by description."""
    presumed: "collections.Counter[str]" = dataclasses.field(default_factory=collections.Counter)
    """Derivative rules that the program does not state and that were chosen as jax
    would, by description.
    """


@dataclasses.dataclass
class Call:
    """One operation with its operands, as a rule sees it."""

    operation: Operation
    operands: Sequence[Value]
    """Values of the operands."""
    run: Callable[..., list[Value]]
    """run(block, *args): results of a region's block, which may use the values around
    it.
    """
    call: Callable[..., list[Value]]
    """call(symbol, *args): results of another function of the module."""
    signature: Callable[[str], Block]
    """signature(symbol): the body of another function, for its types."""
    report: Report
    """The report that gets recognised and presumed rules."""
    recognises: bool = True
    """Whether functions are recognised by their names and operations, because the
    program has no marks.
    """
    platform: str = "cpu"
    """Platform whose branch is taken if the program has one for each."""
    precision: str = "highest"
    """Precision of matrix products and convolutions for which the program states none:
    "default", "high" or "highest".
    """
    values: Mapping[int, Value] = dataclasses.field(default_factory=dict)
    """Values that the operation's regions can use."""
    definition: Callable[[int], Operation | None] = lambda value: None
    """definition(value): the operation in the same block that makes it, or None."""

    @property
    def name(self) -> str:
        """Name of the operation."""
        return self.operation.name

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Attributes as plain Python."""
        return self.operation.attributes

    @property
    def types(self) -> tuple[TensorType, ...]:
        """Types of the results."""
        return self.operation.types

    @property
    def regions(self) -> tuple[Block, ...]:
        """Regions."""
        return self.operation.regions

    def region(self, index: int = 0) -> Callable[..., list[Value]]:
        """Return a region as a function: (*arguments) -> results."""
        block = self.regions[index]
        return lambda *args: self.run(block, *args)

    def refuse(self, why: str, reason: str = refusals.OPERATION_REFUSED) -> Refused:
        """Return the refusal of this operation; `why` completes "has a stablehlo.add
        ...".
        """
        where = f" at {self.operation.location}" if self.operation.location else ""
        return Refused(reason, f"has a {self.name}{where} {why}")

    def plain(self, value: Value) -> Value:
        """Return a value as an array that a rule can use.

        Raises:
            Refused: The value is a size that its dtype cannot hold.
        """
        if sizes.exceeds(value):
            raise self.refuse(
                f"of {_text.cut(str(value.exact), 40)}, a number computed from sizes that {value.dtype} cannot hold: with so many "
                "rows a size is too large. Register without any_rows, or with fewer rows",
                refusals.PROGRAM_TOO_LARGE,
            )
        return np.asarray(value) if isinstance(value, sizes.Size) else value

    def check_rounds(self, rounds: int, carried: Sequence[Value]) -> None:
        """Check that a loop can keep its carried values of each round, because its
        derivative needs them.

        Raises:
            Refused: That is more than `LOOP_BYTES`.
        """
        size = sum(np.dtype(each.dtype).itemsize * math.prod(np.shape(each)) for each in carried)
        if rounds * max(size, 1) > LOOP_BYTES:
            raise self.refuse(
                f"of {rounds} rounds that carry {size} bytes: its derivative keeps them all, and {LOOP_BYTES >> 40} TiB are allowed",
                refusals.PROGRAM_TOO_LARGE,
            )

    def concrete(self, index: int, what: str) -> np.ndarray[Any, Any]:
        """Return an operand that must be known while reading, such as a shape.

        Raises:
            Refused: The operand depends on x or on data.
        """
        value = self.operands[index]
        if not isinstance(value, np.ndarray):
            raise self.refuse(f"whose {what} depends on x or on data: sizes must follow from shapes")
        return value


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the table."""

    rule: Rule
    attributes: frozenset[str]
    """Attributes that the operation may have."""
    regions: int
    """Regions that the operation has; -1: one or more; -2: any number."""


KINKS: Final = {
    "stablehlo.abs": "abs: derivative 0 at 0",
    "stablehlo.clamp": "clamp: derivative 0 at both ends",
    "stablehlo.maximum": "maximum: half of each side's derivative at a tie",
    "stablehlo.minimum": "minimum: half of each side's derivative at a tie",
}
"""Derivatives that jax chooses at the kink of an operation, and other frameworks may
choose otherwise.
"""

TABLE: Final[dict[str, Entry]] = {}
"""Every operation that may be in a program, by name."""


def operation(*names: str, attributes: Sequence[str] = (), regions: int = 0) -> Callable[[Rule], Rule]:
    """Register a rule for operations.

    Args:
        names: Names with their dialect.
        attributes: Names of the attributes that the operation may have.
        regions: Regions that the operation has; -1: one or more; -2: any number.
    """

    def register(rule: Rule) -> Rule:
        for name in names:
            assert name not in TABLE, name
            TABLE[name] = Entry(rule, frozenset(attributes), regions)
        return rule

    return register


def known(*values: Value) -> bool:
    """Return whether all values are small, integral or boolean, and known while the
    program is read. A size that its dtype cannot hold does not count.
    """
    return all(
        isinstance(value, np.ndarray)
        and value.dtype.kind in "iub"
        and value.size <= FOLD_ELEMENTS
        and not sizes.exceeds(value)
        for value in values
    )


def static_shape(call: Call, index: int = 0) -> tuple[int, ...]:
    """Return the shape of a result whose type states it.

    Raises:
        Refused: An extent is computed.
    """
    shape = call.types[index].shape
    if any(extent is None for extent in shape):
        raise call.refuse("whose result has a size that cannot be known")
    return tuple(extent for extent in shape if extent is not None)


def dtype_of(type_: TensorType) -> np.dtype[Any]:
    """Return the NumPy dtype of an array type."""
    return np.dtype(jax.numpy.dtype(type_.dtype))
