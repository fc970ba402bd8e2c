"""Extremes of complex numbers and of windows, and CHLO's scan, have native jax's values
and derivatives.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hvpd_server.importer import evaluate, reader
from tests.importer.round_trip import assert_equal, assert_same, imported

POINT = np.array([0.3, -1.2, 0.7, 0.7, -0.4, 1.1, 0.3, 2.0])
"""A point with ties within windows of three."""


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def pooled(x, *, largest=True):
    start, combine = (-jnp.inf, lax.max) if largest else (jnp.inf, lax.min)
    return lax.reduce_window(x, start, combine, (3,), (2,), [(1, 0)])


def turned(x):
    """Return complex numbers of which two have the same real part."""
    return jnp.round(x) + 1j * x[::-1]


FUNCTIONS = {
    "largest of windows": pooled,
    "smallest of windows": lambda x: pooled(x, largest=False),
    "gradient of the largest": jax.grad(lambda x: jnp.sum(pooled(x) ** 3)),
    "gradient of the smallest": jax.grad(lambda x: jnp.sum(pooled(x, largest=False) ** 3)),
}


COMPLEX = {
    "largest complex number": lambda x: jnp.abs(lax.reduce_max(turned(x), (0,))),
    "smallest complex number": lambda x: jnp.abs(lax.reduce_min(turned(x), (0,))),
    "running complex extreme": lambda x: jnp.abs(lax.cummax(turned(x))),
}

TANGENTS = {
    "tangent of the largest": lambda x: jax.jvp(pooled, (x,), (x**2,))[1],
    "tangent of the smallest": lambda x: jax.jvp(lambda y: pooled(y, largest=False), (x,), (x**2,))[1],
}


def test_extremes():
    assert_same(FUNCTIONS, POINT)


def test_extremes_of_complex_numbers():
    # jax 0.11 has no derivatives of these.
    assert_same(COMPLEX, POINT, derivatives=False)


def test_tangents_of_extremes():
    # For GPUs jax packs value and tangent into one number, with a warning that this
    # loses precision.
    assert_same(TANGENTS, POINT, platforms=["cpu"])


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_])
def test_sources_at_the_extremes_of_integers(dtype):
    def scattered(source, x):
        return lax.select_and_scatter_add_p.bind(
            source, x, select_prim=lax.ge_p, window_dimensions=(3,), window_strides=(2,), padding=((0, 0),)
        )

    x = np.array([3, 1, 3, 0, 2, 2, 5]).astype(dtype)
    source = np.array([1, 0, 1]).astype(dtype)
    found = imported(scattered, source, x)(source, x)
    assert_equal(found, scattered(jnp.asarray(source), jnp.asarray(x)))


SCAN = """func.func public @main(%x: tensor<8xf64>) -> (tensor<8xf64>, tensor<f64>) {{
  %start = stablehlo.constant dense<{start}> : tensor<f64>
  %r:2 = "stablehlo.composite"(%x, %start) <{{name = "chlo.scan", decomposition = @other, version = 1 : i32,
    composite_attributes = {{dimension = 0 : i64, is_associative = true, is_reverse = {reverse},
    operandSegmentSizes = array<i32: 1, 1>, resultSegmentSizes = array<i32: 1, 1>}}}}> ({{
    ^bb0(%a: tensor<f64>, %b: tensor<f64>):
    %s = stablehlo.{body} %a, %b : tensor<f64> stablehlo.return %s, %s : tensor<f64>, tensor<f64>
  }}) : (tensor<8xf64>, tensor<f64>) -> (tensor<8xf64>, tensor<f64>)
  return %r#0, %r#1 : tensor<8xf64>, tensor<f64>
}}
func.func private @other(%x: tensor<8xf64>, %start: tensor<f64>) -> (tensor<8xf64>, tensor<f64>) {{
  %y = stablehlo.negate %x : tensor<8xf64>
  return %y, %start : tensor<8xf64>, tensor<f64>
}}"""


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("body", "start", "native"), [("add", "0.0", lax.cumsum), ("multiply", "1.0", lax.cumprod)])
def test_a_scan_of_chlo(body, start, native, reverse):
    found = evaluate.function(reader.read(SCAN.format(body=body, start=start, reverse=str(reverse).lower())))
    expected = jax.jacobian(lambda x: native(x, 0, reverse))(POINT)
    jacobian, last = jax.jacobian(found)(jnp.asarray(POINT))
    assert_equal(jacobian, expected)
    assert_equal(last, expected[0 if reverse else -1])


def test_another_scan_of_chlo_is_its_decomposition():
    values, last = evaluate.function(reader.read(SCAN.format(body="add", start="2.0", reverse="false")))(POINT)
    np.testing.assert_array_equal(values, -POINT)
    assert last == 2.0
