"""Convolutions against jax's own."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hvpd_server.importer.table import Refused
from tests.importer import round_trip


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((1, 2, 4, 3), (3, 2, 2, 2), {}),
    "strides": ((1, 1, 5, 4), (2, 1, 2, 2), {"window_strides": (2, 1), "padding": "SAME"}),
    "uneven padding": ((1, 1, 4, 3), (2, 1, 2, 2), {"padding": [(2, 1), (0, -1)]}),
    "dilations": (
        (1, 1, 3, 4),
        (1, 1, 2, 2),
        {"lhs_dilation": (2, 1), "rhs_dilation": (1, 2), "padding": [(0, 1)] * 2},
    ),
    "last axis of features": ((1, 3, 4, 2), (2, 2, 2, 3), {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}),
    "mixed axes": ((2, 3, 1, 4), (2, 3, 2, 2), {"dimension_numbers": ("CHNW", "OHWI", "WNCH")}),
    "groups of features": ((1, 4, 3, 3), (4, 2, 2, 2), {"feature_group_count": 2}),
    "groups of batches": ((4, 2, 3, 3), (4, 2, 2, 2), {"batch_group_count": 2}),
    "one axis": ((2, 2, 5), (1, 2, 3), {}),
    "no axis": ((2, 3), (4, 3), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_convolutions(name: str) -> None:
    """Differentiates with respect to both operands, whose transposes are convolutions
    with dilations and groups.
    """
    lhs, rhs, settings = CASES[name]
    size = int(np.prod(lhs))

    def convolve(x: jax.Array) -> jax.Array:
        arguments = {"window_strides": (1,) * (len(lhs) - 2), "padding": "VALID", **settings}
        return lax.conv_general_dilated(x[:size].reshape(lhs), jnp.sin(x[size:].reshape(rhs)), **arguments)

    round_trip.assert_same({name: convolve}, _normal(size + int(np.prod(rhs))), tolerance=1e-11)


@pytest.mark.parametrize("name", ["strides", "dilations", "groups of features", "groups of batches", "mixed axes"])
def test_transposes_as_programs(name: str) -> None:
    """The program is itself a gradient, as an exporter of another framework may write
    it.
    """
    lhs, rhs, settings = CASES[name]
    kernel = _normal(*rhs)

    def convolve(x: jax.Array) -> jax.Array:
        arguments = {"window_strides": (1,) * (len(lhs) - 2), "padding": "VALID", **settings}
        return jnp.sum(lax.conv_general_dilated(x, kernel, **arguments) ** 3)

    round_trip.assert_same({name: jax.grad(convolve)}, _normal(*lhs), derivatives=False, tolerance=1e-11)


_MODULE = """
func.func @main(%x: tensor<1x1x4x5xf64>, %w: tensor<1x1x2x3xf64>) -> tensor<1x1x3x3xf64> {{
  %y = stablehlo.convolution(%x, %w) dim_numbers = [b, f, 0, 1]x[o, i, 0, 1]->[b, f, 0, 1],
    window = {{reverse = [{reverse}]}} {{batch_group_count = 1 : i64, feature_group_count = 1 : i64}}
    : (tensor<1x1x4x5xf64>, tensor<1x1x2x3xf64>) -> tensor<1x1x3x3xf64>
  return %y : tensor<1x1x3x3xf64>
}}
"""


@pytest.mark.parametrize("reverse", [(True, False), (False, True), (True, True)])
def test_reversed_window(reverse: tuple[bool, bool]) -> None:
    x, w = _normal(1, 1, 4, 5), _normal(1, 1, 2, 3, seed=1)
    (found,) = round_trip.text(_MODULE.format(reverse=", ".join(str(each).lower() for each in reverse)), x, w)
    turned = np.flip(w, [axis + 2 for axis, flag in enumerate(reverse) if flag])
    expected = [[np.sum(x[0, 0, i : i + 2, j : j + 3] * turned[0, 0]) for j in range(3)] for i in range(3)]
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-13)


_DYNAMIC = """
func.func @main(%x: tensor<1x1x4xf64>, %w: tensor<1x1x2xf64>, %p: tensor<1x2xi32>) -> tensor<1x1x?xf64> {
  %y = "stablehlo.dynamic_conv"(%x, %w, %p) <{batch_group_count = 1 : i64, feature_group_count = 1 : i64,
    dimension_numbers = #stablehlo.conv<[b, f, 0]x[o, i, 0]->[b, f, 0]>}>
    : (tensor<1x1x4xf64>, tensor<1x1x2xf64>, tensor<1x2xi32>) -> tensor<1x1x?xf64>
  return %y : tensor<1x1x?xf64>
}
"""


def test_known_padding() -> None:
    x, w = _normal(1, 1, 4), _normal(1, 1, 2, seed=1)
    (found,) = round_trip.text(_DYNAMIC, x, w, np.array([[1, 2]], np.int32))
    expected = lax.conv_general_dilated(x, w, (1,), [(1, 2)])
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_padding_that_depends_on_data_is_refused() -> None:
    x, w = _normal(1, 1, 4), _normal(1, 1, 2, seed=1)
    with pytest.raises(Refused, match=r"dynamic_conv.*padding depends on x or on data"):
        round_trip.text(_DYNAMIC, x, w, jnp.array([[1, 2]], jnp.int32))
