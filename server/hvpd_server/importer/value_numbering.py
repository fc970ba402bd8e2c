"""Value numbering of a region's body: equal expressions of scalars get equal numbers.

A rule recognises a reduction or a comparator by building the expected expression with
`apply` and comparing numbers. The order of operands of commutative operations, calls of
functions, and operations that leave a scalar as it is make no difference. Numbering
shares equal expressions, so that a body takes time in proportion to its operations.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from hvpd_server.importer.graph import Block, Operation
from hvpd_server.importer.table import Call

_COMMUTATIVE: Final = frozenset(
    f"stablehlo.{each}" for each in ("add", "multiply", "maximum", "minimum", "and", "or", "xor")
)

_UNCHANGED: Final = frozenset(
    f"stablehlo.{each}" for each in ("reshape", "broadcast_in_dim", "transpose", "optimization_barrier")
)
"""Operations that leave a scalar as it is."""

_MIRRORED: Final = {"GT": "LT", "GE": "LE"}
"""Comparisons that are another one with exchanged operands."""

MAX_OPERATIONS: Final = 256
"""Most operations of a body, with those of called functions: jax's longest comparator
has 13 for each key.
"""

MAX_CALLS: Final = 8
"""Most functions that call each other in a region: jax's bodies call at most one."""

Node = tuple[Any, ...]
"""An expression that has a number: ("argument", index), ("constant", dtype, bytes), or
(name, attributes, *numbers of operands).
"""


class ValueNumbering:
    """Numbers of the expressions in one region.

    Args:
        call: The operation that has the region.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._numbers: dict[Node, int] = {}
        self._nodes: list[Node] = []
        self._operations = 0

    def node(self, number: int) -> Node:
        """Return the node that has a number."""
        return self._nodes[number]

    def argument(self, index: int) -> int:
        """Return the number of an argument of the region."""
        return self._number(("argument", index))

    def constant(self, value: Any) -> int:
        """Return the number of a scalar constant. All NaNs are one constant."""
        scalar = np.asarray(value)
        is_nan = scalar.dtype.kind not in "iubc" and bool(scalar != scalar)  # noqa: PLR0124 - NaN of any dtype
        return self._number(("constant", scalar.dtype.name, b"NaN" if is_nan else scalar.tobytes()))

    def apply(self, name: str, *operands: int) -> int:
        """Return the number of an operation of StableHLO that has no attributes."""
        return self._apply(f"stablehlo.{name}", (), list(operands))

    def compare(self, direction: str, x: int, y: int, *, total: bool = False) -> int:
        """Return the number of a comparison.

        Args:
            direction: "EQ", "NE", "LT", "LE", "GT" or "GE".
            x: Number of the left side.
            y: Number of the right side.
            total: Whether floats are compared in the total order.
        """
        if direction in _MIRRORED:
            direction, x, y = _MIRRORED[direction], y, x
        elif direction in ("EQ", "NE"):
            x, y = sorted((x, y))
        return self._number(("stablehlo.compare", (direction, total), x, y))

    def block(self, block: Block) -> tuple[int, ...]:
        """Return the numbers of the values that a region returns."""
        return self._block(block, [self.argument(index) for index in range(len(block.arguments))], depth=0)

    def _block(self, block: Block, arguments: Sequence[int], *, depth: int) -> tuple[int, ...]:
        if depth > MAX_CALLS:
            raise self._call.refuse(f"with a region in which more than {MAX_CALLS} functions call each other")
        numbers = dict(zip(block.arguments, arguments, strict=True))
        for each in block.operations:
            self._operations += 1
            if self._operations > MAX_OPERATIONS:
                raise self._call.refuse(f"with a region of more than {MAX_OPERATIONS} operations")
            operands = [self._look_up(value, numbers, depth) for value in each.operands]
            numbers.update(zip(each.results, self._results(each, operands, depth), strict=True))
        return tuple(self._look_up(value, numbers, depth) for value in block.returns)

    def _look_up(self, value: int, numbers: dict[int, int], depth: int) -> int:
        if value in numbers:
            return numbers[value]
        # A called function cannot use the values around the region.
        known = self._call.values.get(value) if depth == 0 else None
        if isinstance(known, np.ndarray) and known.size == 1:
            return self.constant(known.reshape(()))
        return self._unknown()

    def _results(self, operation: Operation, operands: list[int], depth: int) -> Sequence[int]:
        attributes = operation.attributes
        if operation.name == "func.call":
            return self._block(self._call.signature(attributes["callee"]), operands, depth=depth + 1)
        if operation.regions or len(operation.results) != 1 or any(type_.shape for type_ in operation.types):
            return [self._unknown() for _ in operation.results]
        if operation.name == "stablehlo.constant":
            return [self.constant(attributes["value"])]
        if operation.name == "stablehlo.compare":
            is_total = attributes.get("compare_type") == "TOTALORDER"
            return [self.compare(attributes["comparison_direction"], *operands, total=is_total)]
        if operation.name in _UNCHANGED:
            return operands
        # The result of a conversion also depends on its type.
        types = (operation.types[0].dtype,) if operation.name.endswith("convert") else ()
        return [self._unknown() if attributes else self._apply(operation.name, types, operands)]

    def _apply(self, name: str, attributes: tuple[Any, ...], operands: list[int]) -> int:
        return self._number((name, attributes, *(sorted(operands) if name in _COMMUTATIVE else operands)))

    def _unknown(self) -> int:
        return self._number(("unknown", len(self._nodes)))

    def _number(self, node: Node) -> int:
        if node not in self._numbers:
            self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
        return self._numbers[node]
