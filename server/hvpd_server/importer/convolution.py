"""Convolutions, with padding that is stated or known."""

from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd_server.importer.linear_algebra import precision
from hvpd_server.importer.table import Call, Value, dtype_of, operation

_ATTRIBUTES: Final = (
    "batch_group_count",
    "dimension_numbers",
    "feature_group_count",
    "lhs_dilation",
    "padding",
    "precision_config",
    "rhs_dilation",
    "window_reversal",
    "window_strides",
)
_LABELS: Final = {"input": ("b", "f"), "kernel": ("o", "i"), "output": ("b", "f")}


@operation("stablehlo.convolution", attributes=_ATTRIBUTES)
def _convolution(call: Call) -> Value:
    return _convolve(call, call.attributes.get("padding"))


@operation("stablehlo.dynamic_conv", attributes=_ATTRIBUTES)
def _dynamic_conv(call: Call) -> Value:
    return _convolve(call, call.concrete(2, "padding"))


def _convolve(call: Call, padding: Any) -> Value:
    attributes = call.attributes
    lhs, rhs = (jnp.asarray(each) for each in call.operands[:2])
    dims = lhs.ndim - 2
    numbers = lax.ConvDimensionNumbers(*(_axes(call, part, dims) for part in ("input", "kernel", "output")))
    pads = np.zeros((dims, 2), np.int64) if padding is None else np.asarray(padding).reshape(dims, 2)
    reversal = tuple(attributes.get("window_reversal") or (False,) * dims)
    if len(reversal) != dims:
        raise call.refuse(f"with {len(reversal)} values in window_reversal: expected {dims}")
    # A convolution of jax never reverses its window, so the kernel is reversed instead.
    reversed_axes = tuple(axis for axis, flag in zip(numbers.rhs_spec[2:], reversal, strict=True) if flag)
    return lax.conv_general_dilated(
        lhs,
        lax.rev(rhs, reversed_axes) if reversed_axes else rhs,
        window_strides=_sizes(call, "window_strides", dims),
        padding=[(int(low), int(high)) for low, high in pads],
        lhs_dilation=_sizes(call, "lhs_dilation", dims),
        rhs_dilation=_sizes(call, "rhs_dilation", dims),
        dimension_numbers=numbers,
        feature_group_count=attributes.get("feature_group_count", 1),
        batch_group_count=attributes.get("batch_group_count", 1),
        precision=precision(call),
        preferred_element_type=dtype_of(call.types[0]),
    )


def _sizes(call: Call, name: str, dims: int) -> tuple[int, ...]:
    """Return one size for each spatial axis; sizes that are not stated are 1."""
    sizes = tuple(int(each) for each in (call.attributes.get(name) or (1,) * dims))
    if len(sizes) != dims:
        raise call.refuse(f"with {len(sizes)} values in {name}: expected {dims}, one for each spatial axis")
    return sizes


def _axes(call: Call, part: str, dims: int) -> tuple[int, ...]:
    """Return the axes of an array in jax's order: the two labelled ones, then the
    spatial ones.
    """
    labels = call.attributes["dimension_numbers"][part]
    expected = [*_LABELS[part], *range(dims)]
    if sorted(map(str, labels)) != sorted(map(str, expected)):
        raise call.refuse(f"with the {part} axes {list(labels)}: expected {expected} in any order")
    return tuple(labels.index(each) for each in expected)
