"""MLIR to `graph`: reads a serialized program once, within limits.

Does not know the operations' meaning.

Reading is not safe: bytes may be made to crash MLIR's parser, or to fill the memory. So
read foreign bytes in a process that may crash.

Guarantees for a module that was read:

- It has one entry function. Every called function is there, and none calls itself.
- Its operations are within the limits. They count as often as their function is called.
- Every value is an array within the limits. No attribute places a value in memory.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jax.interpreters.mlir
from jaxlib.mlir import ir

from hvpd_server.importer import attributes, refusals
from hvpd_server.importer.attributes import short
from hvpd_server.importer.calls import Size, add_symbols, marked, reached, too_many
from hvpd_server.importer.graph import Block, Module, Operation, TensorType
from hvpd_server.importer.inert import check_function, check_module, is_inert
from hvpd_server.importer.parsing import EXPORT_PLAIN, parse
from hvpd_server.importer.refusals import Limits
from hvpd_server.importer.table import Refused

_DIALECTS: Final = ("stablehlo.", "chlo.", "func.call", "func.return")
"""First characters of the names of operations."""

_RETURNS: Final = frozenset(["func.return", "stablehlo.return", "chlo.return"])

_FRONTEND: Final = "mhlo.frontend_attributes"
_FRONTEND_DROPPED: Final = frozenset(["num_batch_dims", "xla.sdy.sharding_rule"])
"""Keys of a custom call's settings that only divide the call among devices."""

_EFFECTS: Final = frozenset(
    [
        *("stablehlo.send", "stablehlo.recv", "stablehlo.infeed", "stablehlo.outfeed"),
        *("stablehlo.after_all", "stablehlo.create_token"),
        *("stablehlo.all_reduce", "stablehlo.all_gather", "stablehlo.all_to_all", "stablehlo.reduce_scatter"),
        *("stablehlo.collective_permute", "stablehlo.collective_broadcast"),
        *("stablehlo.partition_id", "stablehlo.replica_id", "stablehlo.cross-replica-sum"),
        *("stablehlo.async_start", "stablehlo.async_done"),
    ]
)
"""Operations that talk to the host or to other devices."""


def read(blob: bytes | bytearray | str, limits: Limits | None = None, *, context: ir.Context | None = None) -> Module:
    """Return the program of a serialized module.

    Args:
        blob: StableHLO as a portable artifact, MLIR bytecode, or MLIR text; or a
            `jax.export.Exported` of any number of derivatives, serialized, whose
            derivatives are ignored.
        limits: The largest program.
        context: To read in. A context keeps the memory of the programs that it
            read, so the default is a fresh one.

    Raises:
        Refused: The bytes are no program that this jax reads, or the program is not
            served. The message says what arrived and what to do, and completes "the
            program ...".
    """
    limits = limits if limits is not None else Limits()
    if len(blob) > limits.bundle_bytes:
        raise Refused(
            refusals.PROGRAM_TOO_LARGE,
            f"has {len(blob)} bytes, more than {limits.bundle_bytes}: pass large constants as data",
        )
    if not blob.strip():
        raise Refused(refusals.BUNDLE_INVALID, "is empty: expected StableHLO")
    context = context if context is not None else jax.interpreters.mlir.make_ir_context()
    context.enable_multithreading(False)  # A process that has threads cannot fork, as the one that reads programs does.
    context.allow_unregistered_dialects = True  # So that the refusal of a foreign operation can name it.
    with context, ir.Location.unknown():
        module = parse(blob if isinstance(blob, str) else bytes(blob))
        try:
            return _Reader(module, limits).module()
        except RecursionError:
            raise Refused(refusals.PROGRAM_TOO_LARGE, "has attributes that are nested too deeply to be read") from None
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise Refused(
                refusals.BUNDLE_INVALID,
                f"has names or attributes that cannot be read: {type(error).__name__}: {short(error)}",
            ) from None


_Values = dict[Any, int]
"""Numbers of MLIR's values, which jaxlib's stubs type incompletely."""


@dataclasses.dataclass
class _Pending:
    """An operation whose regions are being read."""

    operation: ir.Operation
    regions: Iterator[ir.Region]
    blocks: list[Block] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Frame:
    """A block that is being read."""

    arguments: tuple[int, ...]
    types: tuple[TensorType, ...]
    rest: Iterator[Any]
    pending: _Pending | None
    """The operation that the block belongs to; None for a function."""
    operations: list[Operation] = dataclasses.field(default_factory=list)
    returns: tuple[int, ...] | None = None
    result_types: tuple[TensorType, ...] = ()

    def block(self) -> Block:
        """Return the finished block."""
        if self.returns is None:
            raise Refused(refusals.BUNDLE_INVALID, "has a block without a return at its end")
        return Block(self.arguments, self.types, self.operations, self.returns, self.result_types)


class _Reader:
    """One module.

    Args:
        module: Parsed.
        limits: The largest program.
    """

    def __init__(self, module: ir.Module, limits: Limits) -> None:
        self._module = module
        self._limits = limits
        self._constants = 0
        self._operations = 0
        self._types: dict[ir.Type, TensorType] = {}
        self._locations: dict[ir.Location, str] = {}

    def module(self) -> Module:
        """Return the module as plain Python."""
        check_module(self._module)
        functions: dict[str, Block] = {}
        sizes: dict[str, Size] = {}
        public: list[str] = []
        for view in self._module.body.operations:
            operation = view.operation
            if operation.name != "func.func":
                raise self._refused(operation, f"beside its functions: {EXPORT_PLAIN}")
            symbol = ir.StringAttr(operation.attributes["sym_name"]).value
            visibility = operation.attributes.get("sym_visibility")
            if visibility is None or ir.StringAttr(visibility).value == "public":
                public.append(symbol)
            check_function(operation)
            functions[symbol], sizes[symbol] = self._function(operation)
        for size in sizes.values():
            size.calls += [name for name in size.named if name in functions]
        entry = self._entry(public, functions)
        called = reached(entry, sizes, self._limits)
        others = [symbol for symbol in public if symbol not in called]
        if others:
            raise Refused(
                refusals.OPERATION_REFUSED,
                f"has several entry points: {short(entry)} and {short(', '.join(others))}. Make all but one of them private, or "
                "register each as a program of its own",
            )
        return Module(functions, entry)

    def _entry(self, public: list[str], functions: Mapping[str, Block]) -> str:
        if "main" in functions:
            return "main"
        if len(public) == 1:
            return public[0]
        what = (
            f"has {len(public)} public functions ({short(', '.join(public))})" if public else "has no public function"
        )
        raise Refused(refusals.BUNDLE_INVALID, f"{what}: expected one, or one that is called main")

    def _function(self, function: ir.Operation) -> tuple[Block, Size]:
        """Return the body of a function, and its size."""
        values: _Values = {}
        size = Size()
        (region,) = function.regions
        frames = [self._frame(function, region, values, None)]
        while True:
            frame = frames[-1]
            view = next(frame.rest, None)
            if view is None:
                frames.pop()
                pending = frame.pending
                if pending is None:
                    return frame.block(), size
                pending.blocks.append(frame.block())
                self._regions(pending, frames, values, size)
                continue
            operation = view.operation
            if frame.returns is not None:
                raise self._refused(operation, "behind the return of its block", refusals.BUNDLE_INVALID)
            self._count(size)
            name = operation.name
            if name in _RETURNS:
                frame.returns = tuple(self._operands(operation, values))
                frame.result_types = tuple(self._type(operand.type, operation) for operand in operation.operands)
                continue
            if not name.startswith(_DIALECTS) or name in _EFFECTS:
                raise self._refused(
                    operation,
                    "which is not served: expected pure operations of StableHLO or CHLO, on one device, and calls of functions",
                )
            self._regions(_Pending(operation, iter(operation.regions)), frames, values, size)

    def _regions(self, pending: _Pending, frames: list[_Frame], values: _Values, size: Size) -> None:
        """Open the next region of an operation; if there is none, add the operation."""
        region = next(pending.regions, None)
        if region is None:
            frames[-1].operations.append(self._operation(pending, values, size))
            return
        if len(frames) >= self._limits.nesting:
            raise self._refused(
                pending.operation,
                f"more than {self._limits.nesting} regions deep: nest loops and conditions less deeply, or move inner parts into functions (jax.jit)",
                refusals.PROGRAM_TOO_LARGE,
            )
        frames.append(self._frame(pending.operation, region, values, pending))

    def _frame(self, operation: ir.Operation, region: ir.Region, values: _Values, pending: _Pending | None) -> _Frame:
        blocks = list(region.blocks)
        if len(blocks) != 1:
            raise self._refused(
                operation,
                f"with a region of {len(blocks)} blocks: expected one block, and control flow by stablehlo.if, case or while",
            )
        (block,) = blocks
        arguments = tuple(self._number(argument, values) for argument in block.arguments)
        types = tuple(self._type(argument.type, operation) for argument in block.arguments)
        return _Frame(arguments, types, iter(block.operations), pending)

    def _operation(self, pending: _Pending, values: _Values, size: Size) -> Operation:
        operation = pending.operation
        operands = self._operands(operation, values)
        types = tuple(self._type(result.type, operation) for result in operation.results)
        results = tuple(self._number(result, values) for result in operation.results)
        if operation.name == "stablehlo.constant":
            found = self._constant(operation, types[0])
        else:
            found = self._plain(operation, size)
        return Operation(
            operation.name, tuple(operands), results, types, found, tuple(pending.blocks), self._location(operation)
        )

    def _constant(self, operation: ir.Operation, type_: TensorType) -> dict[str, Any]:
        self._constants += _bytes(type_)
        if self._constants > self._limits.constant_bytes:
            raise self._refused(
                operation,
                f"with which its constants take more than {self._limits.constant_bytes} bytes: pass arrays as data",
                refusals.PROGRAM_TOO_LARGE,
            )
        try:
            return {"value": attributes.constant(operation, type_)}
        except Refused as refused:
            raise self._refused(operation, str(refused), refused.reason) from None

    def _plain(self, operation: ir.Operation, size: Size) -> dict[str, Any]:
        """Return the attributes that have a meaning."""
        found: dict[str, Any] = {}
        for name in operation.attributes:
            try:
                value = operation.attributes[name]
            except TypeError as error:
                raise self._refused(
                    operation, f"whose attribute {short(name)} cannot be read: {short(error)}"
                ) from None
            if is_inert(name, value):
                continue
            try:
                found[name] = attributes.plain(value)
            except Refused as refused:
                raise self._refused(operation, f"with an attribute {short(name)} {refused}", refused.reason) from None
            except TypeError as error:
                raise self._refused(
                    operation, f"whose attribute {short(name)} cannot be read: {short(error)}"
                ) from None
            # A rule gets strings for both symbols and strings, so both may name
            # functions.
            is_rule = name == "composite_attributes"
            add_symbols(value, size.named if is_rule else size.calls, strings=is_rule)
        size.calls += marked(found)
        if _FRONTEND in found and (name != "stablehlo.custom_call" or found[_FRONTEND].keys() <= _FRONTEND_DROPPED):
            del found[_FRONTEND]  # Hints for a compiler, such as TensorFlow's grad_x. They never reach XLA.
        return found

    def _operands(self, operation: ir.Operation, values: _Values) -> list[int]:
        return [values[operand] for operand in operation.operands]

    def _number(self, value: Any, values: _Values) -> int:
        return values.setdefault(value, len(values))

    def _count(self, size: Size) -> None:
        size.operations += 1
        self._operations += 1
        if self._operations > self._limits.operations:
            raise too_many(self._limits)

    def _type(self, type_: ir.Type, operation: ir.Operation) -> TensorType:
        """Return a value's type, within the limits."""
        found = self._types.get(type_)
        if found is not None:
            return found
        try:
            found = attributes.tensor_type(type_)
        except Refused as refused:
            raise self._refused(operation, f"with a value {refused}", refused.reason) from None
        if len(found.shape) > self._limits.rank:
            raise self._refused(
                operation,
                f"with an array of {len(found.shape)} axes, more than {self._limits.rank}",
                refusals.PROGRAM_TOO_LARGE,
            )
        if any(extent is not None and extent < 0 for extent in found.shape):
            raise self._refused(operation, f"with a negative extent: {short(type_)}", refusals.BUNDLE_INVALID)
        if _bytes(found) > self._limits.array_bytes:
            raise self._refused(
                operation,
                f"with an array of more than {self._limits.array_bytes >> 40} TiB: {short(type_)}",
                refusals.PROGRAM_TOO_LARGE,
            )
        self._types[type_] = found
        return found

    def _location(self, operation: ir.Operation) -> str:
        location = operation.location
        found = self._locations.get(location)
        if found is None:
            found = self._locations[location] = _place(location)
        return found

    def _refused(self, operation: ir.Operation, why: str, reason: str = refusals.OPERATION_REFUSED) -> Refused:
        """Return an operation's refusal; `why` completes "has a stablehlo.add ..."."""
        place = self._location(operation)
        return Refused(reason, f"has a {short(operation.name)}{f' at {place}' if place else ''} {why}")


def _bytes(type_: TensorType) -> int:
    """Return the size of an array, its symbolic extents taken as 1."""
    size = math.prod(extent for extent in type_.shape if extent is not None)
    return size * attributes.dtype(type_.dtype).itemsize


def _place(location: Any) -> str:
    """Return a short form of a location: "file:line", else the name that the program
    gives.
    """
    name = ""
    for _ in range(64):  # Locations may be nested without end.
        match location:
            case ir.FileLineColLoc():
                file = short(location.filename)[-60:]
                return f"line {location.start_line}" if file == "-" else f"{file}:{location.start_line}"
            case ir.NameLoc():
                name = name or short(location.name_str)[-60:]
                location = location.child_loc
            case ir.CallSiteLoc():
                location = location.callee
            case ir.FusedLoc() if location.locations:
                location = location.locations[0]
            case _:
                break
    return name
