"""Custom calls, each looked up in `targets`.

Factorizations have their rules in `factorizations`, all others have them here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

from hvpd import _text
from hvpd_server.importer import factorizations, random_bits, reductions, refusals, shapes
from hvpd_server.importer.table import Call, Refused, Value, dtype_of, operation
from hvpd_server.importer.targets import TARGETS, CustomCall, Target, check_layouts, target

_ATTRIBUTES: Final = frozenset(
    [
        # The calling convention and the place of arrays have no meaning for an
        # operation that is rebuilt.
        "api_version",
        "backend_config",
        "call_target_name",
        "custom_call_schedule",
        "has_side_effect",
        "indices_of_shape_operands",
        "mhlo.backend_config",
        "operand_layouts",
        "output_operand_aliases",
        "result_layouts",
    ]
)
"""Attributes of every custom call."""

_SPECIAL: Final = ("called_computations", "error_message", "rng_algorithm", "mhlo.frontend_attributes")
"""Attributes of some targets."""

MESSAGE_CHARACTERS: Final = 500
"""Most characters of a program's own error message that are shown."""


@operation("stablehlo.custom_call", attributes=(*_ATTRIBUTES, *_SPECIAL))
def _custom_call(call: Call) -> Sequence[Value]:
    name = call.attributes["call_target_name"]
    entry = TARGETS.get(name)
    if entry is None:
        raise call.refuse(f"of {_text.cut(name, 80)}, which is not served: {factorizations.why_not(name)}")
    custom = CustomCall(call, name, _without_shapes(call), _options(call))
    _check(custom, entry)
    if entry.what:
        call.report.recognised[f"{entry.what} ({name})"] += 1
    return entry.rule(custom)


def _options(call: Call) -> Mapping[str, Any]:
    """Return the options of a call; an older form of call has a text without them."""
    stated = call.attributes.get("mhlo.backend_config", call.attributes.get("backend_config", {}))
    return stated if isinstance(stated, dict) else {}


def _without_shapes(call: Call) -> list[Value]:
    """Return the operands that are not the shape of a result; these shapes are checked
    with the results.
    """
    indices = [int(each) for each in call.attributes.get("indices_of_shape_operands", ())]
    for index in indices:
        call.concrete(index, "result shape")
    return [each for index, each in enumerate(call.operands) if index not in indices]


def _check(custom: CustomCall, entry: Target) -> None:
    """Check everything about a call that is known before its rule runs."""
    foreign = sorted(custom.call.attributes.keys() - _ATTRIBUTES - entry.attributes)
    if foreign:
        raise custom.refuse(f"with the attribute {foreign[0]}, which is not served")
    if entry.operands is not None and len(custom.operands) != entry.operands:
        raise custom.refuse(f"with {len(custom.operands)} operands: expected {entry.operands}")
    if entry.options is not None and custom.options.keys() != entry.options:
        raise custom.refuse(
            f"with the options {', '.join(sorted(custom.options)) or 'none'}: expected "
            f"{', '.join(sorted(entry.options)) or 'none'}"
        )
    if entry.dtype is not None and np.dtype(custom.operands[0].dtype).name != entry.dtype:
        raise custom.refuse(f"of {custom.operands[0].dtype}: expected {entry.dtype}")
    if entry.column_major is not None:
        check_layouts(custom, column_major=entry.column_major)


@target("Sharding", "annotate_device_placement", operands=1, attributes=["mhlo.frontend_attributes"])
def _annotation(custom: CustomCall) -> Sequence[Value]:
    """Return the operand: an annotation says where an array should be, and changes no
    value.
    """
    return custom.operands


@target("shape_assertion", attributes=["error_message"])
def _shape_assertion(custom: CustomCall) -> Sequence[Value]:
    call = custom.call
    holds = bool(call.concrete(0, "condition"))
    if not holds:
        values = [call.concrete(index, "sizes").item() for index in range(1, len(call.operands))]
        text = _text.cut(str(call.attributes.get("error_message", "")), MESSAGE_CHARACTERS)
        # str.format would let the program's text reach attributes of Python objects.
        message = re.sub(
            r"\{(\d{1,2})\}", lambda found: str(values[int(found[1])]) if int(found[1]) < len(values) else "?", text
        )
        raise Refused(refusals.BUNDLE_INVALID, f"does not fit the shapes of its arguments: {message}")
    return []


@target("cu_threefry2x32_ffi", "hip_threefry2x32_ffi", operands=4, options=[])
def _threefry(custom: CustomCall) -> Sequence[Value]:
    if any(each.dtype != np.uint32 for each in custom.operands):
        raise custom.refuse("of other arrays than four of uint32")
    found: Sequence[Value] = threefry2x32_p.bind(*(jnp.asarray(each) for each in custom.operands))
    return found


_TOP_K: Final = ("aggregate_to_topk", "is_fallback", "recall_target", "reduction_dim", "reduction_input_size_override")


@target("ApproxTopK", what="top k", operands=4, options=[*_TOP_K, "top_k"], attributes=["called_computations"])
def _approx_top_k(custom: CustomCall) -> Sequence[Value]:
    return _largest(custom, custom.options["top_k"])


@target(
    "stablehlo.dynamic_approx_top_k",
    what="top k",
    operands=5,
    options=_TOP_K,
    attributes=["called_computations"],
)
def _dynamic_approx_top_k(custom: CustomCall) -> Sequence[Value]:
    return _largest(custom, int(custom.call.concrete(4, "number of values")))


def _largest(custom: CustomCall, k: int) -> Sequence[Value]:
    """Return the k largest or smallest values along an axis, with their positions."""
    call, options = custom.call, custom.options
    axis = options["reduction_dim"]
    indices = call.definition(call.operation.operands[1])
    if (
        indices is None
        or indices.name not in ("stablehlo.iota", "stablehlo.dynamic_iota")
        or indices.attributes.get("iota_dimension") != axis
    ):
        raise custom.refuse(f"whose indices are not a stablehlo.iota along the axis {axis}")
    function: Callable[..., Any] = lax.approx_max_k if _compares(custom) == "GT" else lax.approx_min_k
    return list(
        function(
            jnp.asarray(custom.operands[0]),
            k,
            reduction_dimension=axis,
            recall_target=options["recall_target"],
            reduction_input_size_override=options["reduction_input_size_override"],
            aggregate_to_topk=options["aggregate_to_topk"],
        )
    )


def _compares(custom: CustomCall) -> str:
    """Return the direction in which a comparator orders its first two arguments: "GT"
    or "LT".
    """
    body = custom.call.signature(_only(custom))
    comparison = body.operations[-1] if body.operations else None
    if (
        comparison is None
        or comparison.name != "stablehlo.compare"
        or comparison.operands != body.arguments[:2]
        or comparison.results != body.returns
        or comparison.attributes.get("comparison_direction") not in ("GT", "LT")
    ):
        raise custom.refuse("whose comparator is not a single stablehlo.compare GT or LT of two values")
    return str(comparison.attributes["comparison_direction"])


def _only(custom: CustomCall) -> str:
    """Return the name of the one function that a call refers to."""
    names = custom.call.attributes.get("called_computations", [])
    if len(names) != 1:
        raise custom.refuse(f"that refers to {len(names)} functions: expected one")
    return str(names[0])


@target("stablehlo.dynamic_top_k", what="top k", operands=2)
def _dynamic_top_k(custom: CustomCall) -> Sequence[Value]:
    return list(lax.top_k(jnp.asarray(custom.operands[0]), int(custom.call.concrete(1, "number of values"))))


@target("stablehlo.dynamic_reduce_window", attributes=["called_computations"])
def _dynamic_reduce_window(custom: CustomCall) -> Sequence[Value]:
    call = custom.call
    count, remaining = divmod(len(custom.operands) - 5, 2)
    if count < 1 or remaining:
        raise custom.refuse(
            f"with {len(custom.operands)} operands: expected pairs of an array and a start, and 5 sizes"
        )
    first = len(custom.operands) - 5
    *steps, padding = (call.concrete(first + each, "window") for each in range(5))
    sizes, strides, base, dilations = (tuple(int(size) for size in each) for each in steps)
    return reductions.reduce_window(
        call,
        call.signature(_only(custom)),
        custom.operands[:count],
        custom.operands[count : 2 * count],
        reductions.Window(
            sizes,
            strides,
            base,
            dilations,
            tuple((int(low), int(high)) for low, high in padding.reshape(-1, 2)),
        ),
    )


@target("stablehlo.dynamic_rng_bit_generator", operands=2, attributes=["rng_algorithm"])
def _dynamic_rng_bit_generator(custom: CustomCall) -> Sequence[Value]:
    call = custom.call
    shape = [int(each) for each in call.concrete(1, "shape")]
    dtype = dtype_of(call.types[1])
    return random_bits.generate(call, custom.operands[0], shapes.fits(call, shape, dtype), dtype)
