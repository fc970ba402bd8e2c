"""Runs a graph operation by operation with the rules of `table`: under a jax trace this
gives a jax function.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hvpd import _text
from hvpd_server.importer import families, inlined, refusals, sizes
from hvpd_server.importer.graph import Block, Module, Operation, TensorType
from hvpd_server.importer.table import KINKS, TABLE, Call, Entry, Refused, Report, Value, dtype_of, known

families.load()

_FLOATING = ("float", "bfloat", "complex")

MAX_CALLS = 64
"""Most functions that call each other in a chain."""


def function(
    module: Module,
    *,
    platform: str = "cpu",
    precision: str = "highest",
    report: Report | None = None,
    marked: bool = False,
) -> Callable[..., list[Value]]:
    """Return the entry function of a module as a function of jax arrays.

    Args:
        module: Read by `reader.read`.
        platform: Branch to take if the program has one for each platform: "cpu",
            "cuda", "rocm" or "tpu".
        precision: Precision of matrix products and convolutions for which the program
            states none: "default", "high" or "highest".
        report: Where to note recognised and presumed derivative rules.
        marked: Whether the program states each derivative rule by marks. Then no
            function is recognised by its name: a user's own `relu` keeps its own
            derivatives.

    Returns:
        (*arguments) -> results. Each call evaluates the operations; call it inside
        `jax.jit` or `jax.make_jaxpr`. NumPy arrays among the arguments count as known:
        sizes may be computed from them.

    Raises:
        Refused: (from the returned function) An operation is not in the table, or not
            in a form that is served.
    """
    evaluator = _Evaluator(module, platform, precision, report if report is not None else Report(), marked=marked)

    def evaluate(*args: Value) -> list[Value]:
        try:
            return evaluator.call(module.entry, *args)
        except RecursionError:
            message = "has operations inside each other that are too deep for Python: use fewer functions in functions"
            raise Refused(refusals.PROGRAM_TOO_LARGE, message) from None

    return evaluate


@dataclasses.dataclass
class _Evaluator:
    module: Module
    platform: str
    precision: str
    report: Report
    depth: int = 0
    marked: bool = False
    definitions: dict[int, tuple[Block, dict[int, Operation]]] = dataclasses.field(default_factory=dict)
    rewritten: dict[int, tuple[Block, Sequence[Operation]]] = dataclasses.field(default_factory=dict)

    def call(self, symbol: str, *args: Value) -> list[Value]:
        """Return the results of a function."""
        if symbol not in self.module.functions:
            raise Refused(refusals.BUNDLE_INVALID, f"calls {_text.cut(symbol, 80)}, which is not there")
        if self.depth >= MAX_CALLS:
            raise Refused(refusals.PROGRAM_TOO_LARGE, f"has more than {MAX_CALLS} functions that call each other")
        self.depth += 1
        try:
            return self.run(self.module.functions[symbol], {}, args)
        finally:
            self.depth -= 1

    def run(self, block: Block, around: dict[int, Value], args: Sequence[Value]) -> list[Value]:
        """Return the results of a block, given the values around it."""
        if len(args) != len(block.arguments):
            raise Refused(refusals.BUNDLE_INVALID, f"passes {len(args)} values where {len(block.arguments)} are taken")
        values = {**around, **dict(zip(block.arguments, args, strict=True))}
        for each in self._operations(block):
            results = self.operation(each, values, block)
            values.update(zip(each.results, results, strict=True))
        return [values[value] for value in block.returns]

    def operation(self, operation: Operation, values: dict[int, Value], within: Block) -> Sequence[Value]:
        """Return the results of an operation of a block."""
        entry = TABLE.get(operation.name)
        call = Call(
            operation,
            [values[value] for value in operation.operands],
            lambda block, *args: [call.plain(each) for each in self.run(block, values, args)],
            # A function of a mark must return arrays that jax can use.
            self.call
            if operation.name == "func.call"
            else lambda symbol, *args: [call.plain(each) for each in self.call(symbol, *args)],
            self._signature,
            self.report,
            platform=self.platform,
            precision=self.precision,
            recognises=not self.marked,
            values=values,
            definition=lambda value: self._definition(within, value),
        )
        if entry is None:
            raise call.refuse(
                "which is not served: the importer has no rule for it. Let the exporter write it in simpler operations of StableHLO, "
                "such as dot_general, gather, reduce and elementwise ones"
            )
        foreign = sorted(operation.attributes.keys() - entry.attributes)
        if foreign:
            raise call.refuse(f"with the attribute {foreign[0]}, which is not served")
        any_regions = entry.regions == -2 or (entry.regions == -1 and operation.regions)
        if len(operation.regions) != entry.regions and not any_regions:
            raise call.refuse(f"with {len(operation.regions)} regions", refusals.BUNDLE_INVALID)
        try:
            found = _built(call, entry)
        except (Refused, MemoryError, RecursionError):
            raise
        except (
            TypeError,
            ValueError,
            IndexError,
            KeyError,
            NotImplementedError,
            AssertionError,
            OverflowError,
        ) as error:
            if isinstance(error, TypeError) and "custom_vjp" in str(error):
                raise  # The program fits. jax has no forward mode for it, and the caller chooses another mode.
            raise call.refuse(f"that does not fit: {type(error).__name__}: {_text.cut(str(error), 300)}") from error
        results = list(found) if isinstance(found, (list, tuple)) else [found]
        self._check(call, results)
        if operation.name in KINKS and not known(*results) and operation.types[0].dtype.startswith(_FLOATING):
            self.report.presumed[KINKS[operation.name]] += 1
        return results

    def _operations(self, block: Block) -> Sequence[Operation]:
        """Return the operations of a block, with jax's formulas recognised. Reads each
        block once.
        """
        if self.marked:
            return block.operations
        if id(block) not in self.rewritten:
            # As in `_definition`, the entry keeps the block.
            self.rewritten[id(block)] = (block, inlined.rewritten(block))
        return self.rewritten[id(block)][1]

    def _definition(self, block: Block, value: int) -> Operation | None:
        """Return the operation of a block that makes a value. Reads each block once."""
        if id(block) not in self.definitions:
            # The entry keeps the block, because a rule may make blocks, and an id is
            # used again after its object is gone.
            found = {result: each for each in block.operations for result in each.results}
            self.definitions[id(block)] = (block, found)
        return self.definitions[id(block)][1].get(value)

    def _signature(self, symbol: str) -> Block:
        if symbol not in self.module.functions:
            raise Refused(refusals.BUNDLE_INVALID, f"refers to {_text.cut(symbol, 80)}, which is not there")
        return self.module.functions[symbol]

    def _check(self, call: Call, results: Sequence[Any]) -> None:
        """Raise Refused unless results have the types that the program states."""
        types = call.types
        if len(results) != len(types):
            raise call.refuse(f"with {len(types)} results, it has {len(results)}", refusals.BUNDLE_INVALID)
        for result, type_ in zip(results, types, strict=True):
            found = TensorType(np.shape(result), np.dtype(result.dtype).name)
            if not type_.fits(found):
                raise call.refuse(f"whose result is {found}, the program says {type_}", refusals.BUNDLE_INVALID)


def _built(call: Call, entry: Entry) -> Sequence[Value] | Value:
    """Return the results of an operation: exactly if it computes a size, or else by its
    rule.
    """
    if any(map(sizes.is_size, call.operands)):
        exact = sizes.result(call.operation, call.operands, dtype_of(call.types[0])) if len(call.types) == 1 else None
        if exact is not None:
            return exact
        if call.name not in sizes.CARRYING:
            call.operands = [call.plain(each) for each in call.operands]
    return entry.rule(call)
