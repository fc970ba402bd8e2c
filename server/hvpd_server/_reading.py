"""What a serialized program is made of, read operation by operation and held against `_rules`. It knows nothing of processes.

Only `_vetter` reads what has just come. Reading is not safe: whoever made the bytes may have made them to crash, or to fill the memory
of, whoever parses them.
"""

import dataclasses
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jax
import jax.export
import jax.extend.mlir
import jax.interpreters.mlir
import numpy as np
from jaxlib.mlir import ir

from hvpd_server import _rules
from hvpd_server._rules import Limits

_BYTECODE: Final = b"ML\xefR"
"""How MLIR's bytecode begins. Its text would be read, too, by another parser, which nobody needs here."""


class Refused(Exception):  # noqa: N818 - a verdict
    """What a program is refused for.

    Args:
        reason: Of `_rules.REASONS`.
        message: What arrived, and what is allowed.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def vet(programs: Mapping[str, bytes], limits: Limits, context: ir.Context) -> None:
    """Raises Refused for the first program that is not what a program may be.

    Args:
        programs: Serialized, by name.
        limits: What they may be.
        context: To read them in, with one thread.
    """
    for name, blob in programs.items():
        try:
            with context, ir.Location.unknown():
                _vet(blob, limits)
        except Refused as refused:
            raise Refused(refused.reason, f"{name} {refused}") from None


def _vet(blob: bytes, limits: Limits) -> None:
    try:
        exported = jax.export.deserialize(bytearray(blob))
        _check_shell(exported)
        module = jax.extend.mlir.deserialize_portable_artifact(exported.mlir_module_serialized)
    except (MemoryError, Refused):
        raise
    except RecursionError:
        raise Refused(_rules.PROGRAM_TOO_LARGE, "has arguments or results that are nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - of whatever kind: it is no program that this jax can read
        raise Refused(
            _rules.BUNDLE_INCOMPATIBLE,
            f"is no program that this server (jax {jax.__version__}) can read: {type(error).__name__}: {_short(error)}",
        ) from None
    _Reading(module, limits).check(exported)


def _check_shell(exported: jax.export.Exported) -> None:
    """What is around the module: arrays in, arrays out, on the device, and no more."""
    taken, returned = exported.in_tree, exported.out_tree
    arguments: Any = jax.tree.structure(((0,) * len(exported.in_avals), {}))
    if arguments != taken:
        raise Refused(_rules.BUNDLE_INVALID, "takes something else than arrays, one after the other")
    if not _is_flat(returned):
        raise Refused(_rules.BUNDLE_INVALID, "returns something else than arrays")
    for aval in (*exported.in_avals, *exported.out_avals):
        if getattr(aval, "memory_space", None) is not jax.memory.Space.Device:
            raise Refused(_rules.BUNDLE_INVALID, f"takes or returns what is no array on the device: {aval}")
    if any(sharding is not None for sharding in (*exported.in_shardings_hlo, *exported.out_shardings_hlo)):
        raise Refused(_rules.BUNDLE_INVALID, "says where its arrays are: only programs of one device are served")
    if exported.has_vjp():
        raise Refused(_rules.BUNDLE_INVALID, "comes with derivatives, which nobody would call")
    if not exported.mlir_module_serialized.startswith(_BYTECODE):
        raise Refused(_rules.BUNDLE_INCOMPATIBLE, "holds no module in bytecode, as jax writes it")
    if exported.disabled_safety_checks:
        raise Refused(_rules.BUNDLE_INVALID, "was exported with safety checks disabled")


def _is_flat(tree: Any, depth: int = 3) -> bool:
    """Whether a structure is of tuples and lists only, not deeply nested."""
    data = tree.node_data()
    return data is None or (
        depth > 0 and data[0] in (tuple, list) and all(_is_flat(c, depth - 1) for c in tree.children())
    )


_ELEMENT: Final = re.compile(r"u?i(1|2|4|8|16|32|64)|bf16|f16|f32|f64|f[468]E\w+|complex<f(32|64)>")
_BITS: Final = re.compile(r"\d+")
_CALLS: Final = {
    "func.call": "callee",
    "stablehlo.composite": "decomposition",
    "stablehlo.custom_call": "called_computations",
}
"""Operations that call functions, and the attribute that names these."""


@dataclasses.dataclass
class _Function:
    """What a function is made of, without what it calls."""

    operations: int = 0
    calls: list[str] = dataclasses.field(default_factory=list)


class _Reading:
    """One module, gone through operation by operation, without recursion.

    Args:
        module: Read, not verified.
        limits: What it may be.
    """

    def __init__(self, module: ir.Module, limits: Limits) -> None:
        self._module = module
        self._limits = limits
        self._constants = 0
        self._types: dict[Any, int] = {}

    def check(self, exported: jax.export.Exported) -> None:
        """Raises Refused. What a program does comes before what is written on it: that is the better reason."""
        functions: dict[str, _Function] = {}
        for view in self._module.body.operations:
            operation = view.operation
            name = operation.name
            if name != "func.func":
                raise self._refused(name, "outside of functions")
            symbol = ir.StringAttr(operation.attributes["sym_name"]).value
            functions[symbol] = self._function(operation)
            if symbol == "main":
                _check_signature(operation, exported)
        if "main" not in functions:
            raise Refused(_rules.BUNDLE_INVALID, "has no function main")
        self._check_calls(functions)
        self._check_module()

    def _check_module(self) -> None:
        for name, value in self._module.operation.attributes.items():
            if name not in _rules.MODULE_ATTRIBUTES or _rules.MODULE_ATTRIBUTES[name] not in (None, str(value)):
                raise self._refused(f"attribute {name} = {_short(value)}", "of its module")

    def _check_function(self, function: ir.Operation) -> None:
        for name in function.attributes:
            if name not in _rules.FUNCTION_ATTRIBUTES:
                raise self._refused(f"attribute {name}", "of a function")
        parts = [function.attributes[part] for part in ("arg_attrs", "res_attrs") if part in function.attributes]
        for attributes in itertools.chain.from_iterable(map(ir.ArrayAttr, parts)):
            for name, _ in _items(attributes):
                if name not in _rules.ARGUMENT_ATTRIBUTES:
                    raise self._refused(f"attribute {name}", "of an argument or result")

    def _function(self, function: ir.Operation) -> _Function:
        self._check_function(function)
        found = _Function()
        levels = [_inside(function, self)]
        while levels:
            operation = next(levels[-1], None)
            if operation is None:
                levels.pop()
                continue
            found.operations += 1
            if found.operations > self._limits.operations:
                raise self._too_many()
            self._operation(operation, found)
            if len(operation.regions):
                levels.append(_inside(operation, self))
                if len(levels) > self._limits.nesting:
                    raise Refused(
                        _rules.PROGRAM_TOO_LARGE,
                        f"has operations more than {self._limits.nesting} deep inside each other, down to {operation.name}",
                    )
        return found

    def _operation(self, operation: ir.Operation, function: _Function) -> None:
        name = operation.name
        if name not in _rules.OPERATIONS or name == "func.func":
            raise self._refused(name)
        if name == "stablehlo.custom_call":
            check_call(operation)
        self._check_attributes(name, operation.attributes)
        for result in operation.results:
            self.bytes_of(result.type)
        if name == "stablehlo.constant":
            self._constant(operation)
        elif name == "stablehlo.composite":
            composite = ir.StringAttr(operation.attributes["name"]).value
            if composite not in _rules.COMPOSITES:
                raise self._refused(f"stablehlo.composite of {composite}")
        if name in _CALLS:
            function.calls += _called(operation.attributes, _CALLS[name])

    def _check_attributes(self, name: str, attributes: ir.OpAttributeMap) -> None:
        """Attributes that StableHLO does not know have a dot in their name, or are the compiler's own."""
        for attribute in attributes:
            foreign = "." in attribute or attribute.startswith(("_", "xla"))
            if foreign and attribute not in _rules.OPERATION_ATTRIBUTES:
                raise self._refused(f"{name} with the attribute {attribute}")
        if "mhlo.frontend_attributes" in attributes:
            for key, _ in _items(attributes["mhlo.frontend_attributes"]):
                if key not in _rules.FRONTEND_ATTRIBUTES:
                    raise self._refused(f"{name} with the attribute {key}")

    def _constant(self, operation: ir.Operation) -> None:
        self._constants += self.bytes_of(operation.results[0].type)
        if self._constants > self._limits.constant_bytes:
            raise Refused(
                _rules.PROGRAM_TOO_LARGE,
                f"has constants of more than {self._limits.constant_bytes >> 20} MiB: pass them as data",
            )

    def bytes_of(self, type_: ir.Type) -> int:
        """The size of an array, its symbolic extents taken as 1."""
        found = self._types.get(type_)
        if found is None:
            found = self._types[type_] = self._measure(type_)
        return found

    def _measure(self, type_: ir.Type) -> int:
        if not isinstance(type_, ir.RankedTensorType) or type_.encoding is not None:
            raise Refused(_rules.OPERATION_REFUSED, f"has values of type {_short(type_)}, and only arrays are served")
        element = str(type_.element_type)
        if not _ELEMENT.fullmatch(element):
            raise Refused(_rules.OPERATION_REFUSED, f"has arrays of {_short(element)}")
        bits = max(int(_BITS.findall(element)[0]), 8) * (2 if element.startswith("complex") else 1)
        shape = _shape(type_)
        size = math.prod(extent for extent in shape if extent >= 0) * bits // 8
        if len(shape) > self._limits.rank or size > self._limits.array_bytes:
            raise Refused(
                _rules.PROGRAM_TOO_LARGE,
                f"has an array of more than {self._limits.array_bytes >> 40} TiB: {_short(type_)}",
            )
        return size

    def _check_calls(self, functions: Mapping[str, _Function]) -> None:
        """Nothing calls itself, and nothing grows beyond the limit where calls are replaced by what they call."""
        sizes: dict[str, int] = {}
        depths: dict[str, int] = {}
        pending = ["main"]
        under_way: set[str] = set()
        while pending:
            name = pending[-1]
            if name in sizes:
                pending.pop()
                continue
            if name not in functions:
                raise Refused(_rules.BUNDLE_INVALID, f"calls {_short(name)}, which is not there")
            function = functions[name]
            missing = [called for called in dict.fromkeys(function.calls) if called not in sizes]
            if missing:
                if name in under_way:
                    raise Refused(_rules.OPERATION_REFUSED, f"has functions that call themselves: {_short(name)}")
                under_way.add(name)
                pending += missing
                continue
            sizes[name] = function.operations + sum(sizes[called] for called in function.calls)
            depths[name] = 1 + max((depths[called] for called in function.calls), default=0)
            if sizes[name] > self._limits.operations:
                raise self._too_many()
            if depths[name] > self._limits.calls:
                raise Refused(
                    _rules.PROGRAM_TOO_LARGE, f"has more than {self._limits.calls} functions that call each other"
                )
            pending.pop()

    def _too_many(self) -> Refused:
        return Refused(_rules.PROGRAM_TOO_LARGE, f"has more than {self._limits.operations} operations")

    def _refused(self, what: str, where: str = "") -> Refused:
        return Refused(
            _rules.OPERATION_REFUSED,
            f"has {_short(what)}{where and ' '}{where}, which is not served: "
            "only what jax writes for pure functions on one device",
        )


def _inside(operation: ir.Operation, reading: _Reading) -> Iterator[ir.Operation]:
    """The operations right inside of one, whose blocks' arguments are looked at on the way."""
    for region in operation.regions:
        for block in region:
            for argument in block.arguments:
                reading.bytes_of(argument.type)
            for view in block.operations:
                yield view.operation


def check_routines(module: ir.Module) -> None:
    """Raises Refused where a routine of jaxlib is called with arrays that it does not fit, in a module whose arguments are all known.

    For programs with symbolic extents: what these are, only the module that is to be compiled tells.
    """
    if _all_known(module):
        return
    written = io.BytesIO()
    module.operation.write_bytecode(written)
    refined = jax.extend.mlir.refine_polymorphic_shapes(
        mlir_module=written.getvalue(),
        enable_shape_assertions=True,
        validate_static_shapes=True,
        enable_shardy=jax.config.values["jax_use_shardy_partitioner"],
    )
    with jax.interpreters.mlir.make_ir_context():
        known = _all_known(ir.Module.parse(refined))
    if not known:
        raise Refused(_rules.OPERATION_REFUSED, "has routines that are called with arrays of unknown shapes")


def _all_known(module: ir.Module) -> bool:
    """Whether no routine is called with arrays of symbolic extents.

    Raises:
        Refused: As for `check_call`, of routines.
    """
    known = True
    refused: list[Refused] = []

    def look(operation: ir.Operation) -> ir.WalkResult:
        nonlocal known
        if operation.name != "stablehlo.custom_call":
            return ir.WalkResult.ADVANCE
        if ir.StringAttr(operation.attributes["call_target_name"]).value in _rules.ROUTINES:
            try:
                known &= check_call(operation)
            except Refused as error:  # What is raised in here comes out as something else.
                refused.append(error)
        return ir.WalkResult.INTERRUPT if refused else ir.WalkResult.ADVANCE

    module.operation.walk(look)
    if refused:
        raise refused[0]
    return known


def check_call(operation: ir.Operation) -> bool:
    """Whether all is known of a custom call that may be: where a routine's arrays have symbolic extents, they are not looked at.

    Raises:
        Refused: It is not listed, or its arrays are not of the shapes that the routine takes them to be of.
    """
    attributes = operation.attributes
    target = ir.StringAttr(attributes["call_target_name"]).value
    if target not in _rules.TARGETS:
        why = _rules.REFUSED_TARGETS.get(
            target, "only routines that jax guarantees, and none that run code of the host's"
        )
        raise Refused(
            _rules.OPERATION_REFUSED, f"has a stablehlo.custom_call of {_short(target)}, which is not served: {why}"
        )
    effects = "has_side_effect" in attributes and ir.BoolAttr(attributes["has_side_effect"]).value
    # A routine is called with settings by name, of which there must be one list.
    places = ("mhlo.backend_config", "backend_config")
    version = ir.IntegerAttr(attributes["api_version"]).value if "api_version" in attributes else 1
    configs = [
        attributes[place] for place in places if place in attributes and isinstance(attributes[place], ir.DictAttr)
    ]
    called_so = (len(configs) == 1 and version in (1, 4)) if target in _rules.ROUTINES else len(configs) <= 1
    if (effects and target != "shape_assertion") or not called_so:
        raise Refused(
            _rules.OPERATION_REFUSED, f"has a stablehlo.custom_call of {target} that is not called as jax calls it"
        )
    if target not in _rules.ROUTINES:
        return True
    hidden: set[int] = set()
    if "indices_of_shape_operands" in attributes:
        hidden = {
            int(index) for index in np.asarray(ir.DenseElementsAttr(attributes["indices_of_shape_operands"])).flat
        }
    operands = [_shape(value.type) for index, value in enumerate(operation.operands) if index not in hidden]
    results = [_shape(value.type) for value in operation.results]
    if any(extent < 0 for shape in (*operands, *results) for extent in shape):
        return False
    settings = {
        key: int(value.value) for key, value in _items(configs[0]) if isinstance(value, ir.IntegerAttr | ir.BoolAttr)
    }
    if not _rules.fits(target, operands, results, settings):
        raise Refused(
            _rules.OPERATION_REFUSED,
            f"has a stablehlo.custom_call of {target} with arrays that do not fit each other: {operands} to {results}",
        )
    return True


def _check_signature(function: ir.Operation, exported: jax.export.Exported) -> None:
    """The module takes and returns what the program says."""
    type_ = ir.FunctionType(ir.TypeAttr(function.attributes["function_type"]).value)
    kept = exported.module_kept_var_idx
    avals = exported.in_avals
    if list(kept) != sorted(set(kept)) or not all(0 <= index < len(avals) for index in kept):
        raise Refused(_rules.BUNDLE_INVALID, "keeps arguments that it does not have")
    inputs = [str(each) for each in type_.inputs]
    if len(exported.platforms) > 1:
        if inputs[:1] not in (["tensor<i32>"], ["tensor<i64>"]):
            raise Refused(_rules.BUNDLE_INVALID, "is for several platforms, and does not take the platform's number")
        inputs = inputs[1:]
    takes = [_written(avals[index]) for index in kept]
    returns = [_written(aval) for aval in exported.out_avals]
    results = [str(each) for each in type_.results]
    if (inputs, results) != (takes, returns):
        raise Refused(
            _rules.BUNDLE_INVALID,
            f"is of type {_short(type_)}, and says that it is {_short(f'({takes}) -> {returns}')}",
        )


def _written(aval: Any) -> str:
    """An array's type in StableHLO."""
    extents = "".join(f"{extent if isinstance(extent, int) else '?'}x" for extent in aval.shape)
    return f"tensor<{extents}{jax.interpreters.mlir.dtype_to_ir_type(np.dtype(aval.dtype))}>"


def _shape(type_: Any) -> list[int]:
    """Extents; -1 for one that is symbolic."""
    if not isinstance(type_, ir.RankedTensorType):
        return [-1]
    return [-1 if type_.is_dynamic_dim(axis) else type_.get_dim_size(axis) for axis in range(type_.rank)]


def _called(attributes: ir.OpAttributeMap, name: str) -> list[str]:
    """The functions that an attribute names, one or a list."""
    if name not in attributes:
        return []
    named = attributes[name]
    return [
        ir.FlatSymbolRefAttr(each).value
        for each in (ir.ArrayAttr(named) if isinstance(named, ir.ArrayAttr) else [named])
    ]


def _items(attribute: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of a dictionary."""
    for named in ir.DictAttr(attribute):  # type: ignore[attr-defined] # It can, and says so nowhere.
        name = named if isinstance(named, str) else named.name
        yield name, attribute[name]


def _short(what: object) -> str:
    """At most 200 characters, all printable: a program's own words go into logs and on terminals."""
    text = "".join(character if character.isprintable() else "?" for character in itertools.islice(str(what), 201))
    return text if len(text) <= 200 else text[:200] + "..."
