"""Attributes that change no value on one device, which the reader leaves out."""

from collections.abc import Mapping
from typing import Any, Final

from jaxlib.mlir import ir

from hvpd_server.importer import attributes, refusals
from hvpd_server.importer.attributes import short
from hvpd_server.importer.parsing import EXPORT_PLAIN
from hvpd_server.importer.table import Refused

_ONE: Final = frozenset(["1 : i32", "1 : i64"])
_EMPTY: Final = frozenset(["[]", "{}"])

_MODULE: Final[Mapping[str, frozenset[str] | None]] = {
    "sym_name": None,
    "jax.uses_shape_polymorphism": None,
    "mhlo.num_partitions": _ONE,
    "mhlo.num_replicas": _ONE,
    # As other exporters write them.
    "mhlo.cross_program_prefetches": _EMPTY,
    "mhlo.input_output_alias": _EMPTY,
    "mhlo.frontend_attributes": _EMPTY,
    "mhlo.is_dynamic": None,
    "mhlo.use_auto_spmd_partitioning": frozenset(["false"]),
    "tf.versions": None,
}
"""Attributes of a module that change nothing on one device, and the values that they
may have, as text; None for any.
"""

_FUNCTION: Final = frozenset(
    ["sym_name", "function_type", "sym_visibility", "arg_attrs", "res_attrs", "no_inline", "tf.entry_function"]
)
"""Attributes of a function that do not change its meaning."""

_ARGUMENT: Final[Mapping[str, frozenset[str] | None]] = {
    "jax.global_constant": None,
    "jax.arg_info": None,
    "jax.result_info": None,
    "tf._user_specified_name": None,
    "mhlo.layout_mode": frozenset(['"default"', '"auto"']),
    "mhlo.sharding": frozenset(['""', '"{replicated}"', '"{maximal device=0}"']),
}
"""Attributes of arguments and results that change nothing on one device, and the values
that they may have, as text.
"""

_DROPPED: Final[Mapping[str, frozenset[str] | None]] = {
    "mhlo.sharding": _ARGUMENT["mhlo.sharding"],
    "sdy.sharding_rule": None,
    "mhlo.layout_mode": None,
    "operandSegmentSizes": None,
    "resultSegmentSizes": None,
}
"""Attributes of operations that change no value on one device, and the values that they
may have, as text.
"""


def check_module(module: ir.Module) -> None:
    """Refuse a module that has other attributes."""
    for name in module.operation.attributes:
        value = module.operation.attributes[name]
        if not _allowed(_MODULE, name, value):
            raise Refused(
                refusals.OPERATION_REFUSED,
                f"has the attribute {short(name)} = {short(value)} on its module, which is not served: {EXPORT_PLAIN}",
            )


def check_function(function: ir.Operation) -> None:
    """Refuse a function that has other attributes, on itself, its arguments or its
    results.
    """
    symbol = short(ir.StringAttr(function.attributes["sym_name"]).value)
    for name in function.attributes:
        if name not in _FUNCTION:
            raise Refused(
                refusals.OPERATION_REFUSED,
                f"has the attribute {short(name)} on the function {symbol}, which is not served: {EXPORT_PLAIN}",
            )
    for part in ("arg_attrs", "res_attrs"):
        if part not in function.attributes:
            continue
        for index, dictionary in enumerate(ir.ArrayAttr(function.attributes[part])):
            for name, value in attributes.items(ir.DictAttr(dictionary)):
                if not _allowed(_ARGUMENT, name, value):
                    kind = "argument" if part == "arg_attrs" else "result"
                    raise Refused(
                        refusals.OPERATION_REFUSED,
                        f"has the attribute {short(name)} = {short(value)} on {kind} {index} of the function {symbol}, "
                        f"which is not served: {EXPORT_PLAIN}",
                    )


def is_inert(name: str, value: Any) -> bool:
    """Return whether an attribute of an operation changes no value on one device, or
    only states its default.
    """
    is_default = name == "result_accuracy" and "mode<DEFAULT>" in str(value)
    return is_default or _allowed(_DROPPED, name, value)


def _allowed(table: Mapping[str, frozenset[str] | None], name: str, value: Any) -> bool:
    if name not in table:
        return False
    texts = table[name]
    return texts is None or str(value) in texts
