"""Elementwise operations have native jax's derivatives, and known integers follow
StableHLO's rules.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hvpd_server.importer.table import Refused
from tests.importer.round_trip import assert_equal, assert_same, imported, text

POINT = np.array([0.3, -1.2, 0.7, 2.0, -0.4, 1.1])
TIES = np.array([1.0, 1.0, 0.0, -1.0, -0.0, 0.5])


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


SMOOTH = {
    "exp": jnp.exp,
    "expm1": jnp.expm1,
    "log": lambda x: jnp.log(x * x + 0.1),
    "log1p": lambda x: jnp.log1p(x * x),
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "cos": jnp.cos,
    "tan": lax.tan,
    "sqrt": lambda x: jnp.sqrt(x * x + 0.1),
    "rsqrt": lambda x: lax.rsqrt(x * x + 0.1),
    "cbrt": lambda x: jnp.cbrt(x * x + 0.1),
    "pow": lambda x: jnp.abs(x) ** x,
    "atan2": lambda x: jnp.arctan2(x, x[::-1] + 0.1),
    "divide": lambda x: x / (x[::-1] + 3.0),
    "complex": lambda x: jnp.exp(lax.complex(x, x[::-1])),
    "complex parts": lambda x: jnp.real(1j * x) - jnp.imag((x + 1j) ** 2) + jnp.abs(x + 2j),
    "float32": lambda x: jnp.sum(x.astype(jnp.float32) * 2).astype(x.dtype),
    "bfloat16": lambda x: jnp.max(x.astype(jnp.bfloat16)).astype(x.dtype),
}


def test_smooth():
    assert_same(SMOOTH, POINT)


KINKS = {
    "abs": jnp.abs,
    "sign": lambda x: jnp.sign(x) * x,
    "maximum": lambda x: jnp.maximum(x, x[::-1]),
    "minimum": lambda x: jnp.minimum(x, 0.5) * x,
    "clamp": lambda x: lax.clamp(0.0, x, 1.0),
    "select": lambda x: jnp.where(x > 0, x**2, -x),
    "compare": lambda x: x * (x >= x[::-1]) + (x != x[::-1]) * x + (x == x[::-1]) * x,
    "remainder": lambda x: lax.rem(x, 0.7 * jnp.ones(6)) * x,
    "floor": lambda x: jnp.floor(x) * x,
    "ceil": lambda x: jnp.ceil(x) * x,
    "round": lambda x: jnp.round(x) * x,
    "round away": lambda x: lax.round(x) * x,
    "is_finite": lambda x: jnp.where(jnp.isfinite(1 / x), x, 2 * x),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 10) * x,
}


def test_kinks():
    assert_same(KINKS, POINT, TIES)


INTEGERS = {
    np.int32: np.array([-(2**31), -7, -1, 0, 1, 2, 33, 2**31 - 1], np.int32),
    np.int64: np.array([-(2**63), -7, -1, 0, 1, 2, 65, 2**63 - 1], np.int64),
    np.uint8: np.array([0, 1, 2, 7, 9, 127, 128, 255], np.uint8),
}
BINARY = {
    "add": lax.add,
    "subtract": lax.sub,
    "multiply": lax.mul,
    "divide": lax.div,
    "remainder": lax.rem,
    "maximum": lax.max,
    "minimum": lax.min,
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
    "xor": lax.bitwise_xor,
    "shift_left": lax.shift_left,
    "shift_right_arithmetic": lax.shift_right_arithmetic,
    "shift_right_logical": lax.shift_right_logical,
}
UNARY = {
    "abs": lax.abs,
    "negate": lax.neg,
    "not": lax.bitwise_not,
    "sign": lax.sign,
    "popcnt": lax.population_count,
    "count_leading_zeros": lax.clz,
}


def _type(dtype, size):
    kind = np.dtype(dtype)
    return f"tensor<{size}x{'ui' if kind.kind == 'u' else 'i'}{kind.itemsize * 8}>"


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("name", BINARY)
def test_known_integers_follow_xla(name, dtype):
    x, y = (np.array(each) for each in zip(*itertools.product(INTEGERS[dtype], repeat=2), strict=True))
    kind = _type(dtype, len(x))
    module = f"""func.func @main(%x: {kind}, %y: {kind}) -> {kind} {{
        %0 = stablehlo.{name} %x, %y : {kind} return %0 : {kind} }}"""
    (known,) = text(module, x, y)
    assert isinstance(known, np.ndarray)
    (computed,) = text(module, jnp.asarray(x), jnp.asarray(y))
    assert_equal(known, np.asarray(BINARY[name](x, y)), name=name)
    assert_equal(np.asarray(computed), known, name=name)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("name", UNARY)
def test_known_integers_of_one_operand(name, dtype):
    x = INTEGERS[dtype]
    kind = _type(dtype, len(x))
    (known,) = text(
        f"func.func @main(%x: {kind}) -> {kind} {{ %0 = stablehlo.{name} %x : {kind} return %0 : {kind} }}", x
    )
    assert isinstance(known, np.ndarray)
    assert_equal(known, np.asarray(UNARY[name](x)), name=name)


def test_booleans_add_by_or_and_multiply_by_and():
    x, y = np.array([False, False, True, True]), np.array([False, True, False, True])
    module = """func.func @main(%x: tensor<4xi1>, %y: tensor<4xi1>) -> (tensor<4xi1>, tensor<4xi1>) {
        %0 = stablehlo.add %x, %y : tensor<4xi1> %1 = stablehlo.multiply %x, %y : tensor<4xi1>
        return %0, %1 : tensor<4xi1>, tensor<4xi1> }"""
    for args in ((x, y), (jnp.asarray(x), jnp.asarray(y))):
        total, product = text(module, *args)
        np.testing.assert_array_equal(total, x | y)
        np.testing.assert_array_equal(product, x & y)


def test_integer_power():
    x, y = np.array([2, -3, 7, 1, -1, -1, 2, 0]), np.array([10, 3, 0, -5, -3, -2, -1, 0])
    module = """func.func @main(%x: tensor<8xi64>, %y: tensor<8xi64>) -> tensor<8xi64> {
        %0 = stablehlo.power %x, %y : tensor<8xi64> return %0 : tensor<8xi64> }"""
    (power,) = text(module, jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_array_equal(power, [1024, -27, 1, 1, -1, 1, 0, 1])


@pytest.mark.parametrize(
    ("direction", "less"), [("LT", True), ("LE", True), ("GT", False), ("GE", False), ("NE", True)]
)
def test_total_order(direction, less):
    rising = np.array([-np.nan, -np.inf, -1.0, -0.0, 0.0, 1.0, np.inf, np.nan], np.float32)
    assert np.signbit(rising[0])
    module = f"""func.func @main(%x: tensor<7xf32>, %y: tensor<7xf32>) -> tensor<7xi1> {{
        %0 = stablehlo.compare {direction}, %x, %y, TOTALORDER : (tensor<7xf32>, tensor<7xf32>) -> tensor<7xi1>
        return %0 : tensor<7xi1> }}"""
    (found,) = text(module, jnp.asarray(rising[:-1]), jnp.asarray(rising[1:]))
    assert np.all(found) if less else not np.any(found)


def test_a_comparison_type_that_does_not_fit_is_refused():
    module = """func.func @main(%x: tensor<3xi32>) -> tensor<3xi1> {
        %0 = stablehlo.compare LT, %x, %x, UNSIGNED : (tensor<3xi32>, tensor<3xi32>) -> tensor<3xi1>
        return %0 : tensor<3xi1> }"""
    with pytest.raises(Refused, match="expected SIGNED"):
        text(module, jnp.arange(3, dtype=jnp.int32))


def test_a_known_choice_keeps_its_branch_known():
    module = """func.func @main(%p: tensor<i1>, %x: tensor<2xi32>, %y: tensor<2xi32>) -> tensor<2xi32> {
        %0 = stablehlo.select %p, %x, %y : tensor<i1>, tensor<2xi32> return %0 : tensor<2xi32> }"""
    (found,) = text(module, np.array(True), np.array([1, 2], np.int32), jnp.zeros(2, jnp.int32))
    assert isinstance(found, np.ndarray)


@pytest.mark.parametrize(
    ("source", "target"), [("i64", "i8"), ("i64", "i1"), ("i1", "i64"), ("i64", "f32"), ("ui8", "i32"), ("i64", "ui32")]
)
def test_known_conversions(source, target):
    dtypes = {"i64": np.int64, "i8": np.int8, "i1": np.bool_, "f32": np.float32, "ui8": np.uint8, "i32": np.int32}
    dtypes["ui32"] = np.uint32
    x = np.array([-129, -1, 0, 1, 255, 2**40]).astype(dtypes[source])
    module = f"""func.func @main(%x: tensor<6x{source}>) -> tensor<6x{target}> {{
        %0 = stablehlo.convert %x : (tensor<6x{source}>) -> tensor<6x{target}> return %0 : tensor<6x{target}> }}"""
    (found,) = text(module, x)
    assert isinstance(found, np.ndarray)
    assert_equal(found, np.asarray(lax.convert_element_type(x, dtypes[target])))


def test_conversions_of_complex_numbers():
    z = jnp.array([1 + 2j, 0j, 3j])
    module = """func.func @main(%z: tensor<3xcomplex<f64>>) -> (tensor<3xf64>, tensor<3xi1>) {
        %0 = stablehlo.convert %z : (tensor<3xcomplex<f64>>) -> tensor<3xf64>
        %1 = stablehlo.convert %z : (tensor<3xcomplex<f64>>) -> tensor<3xi1>
        return %0, %1 : tensor<3xf64>, tensor<3xi1> }"""
    parts, nonzero = text(module, z)
    np.testing.assert_array_equal(parts, [1, 0, 0])
    # The specification ignores the imaginary part. jax writes a comparison in which all
    # of the number counts.
    np.testing.assert_array_equal(nonzero, [True, False, False])


def test_map_applies_its_region_to_each_element():
    module = """func.func @main(%x: tensor<2x3xf64>, %y: tensor<2x3xf64>) -> tensor<2x3xf64> {
        %0 = "stablehlo.map"(%x, %y) ({ ^bb0(%a: tensor<f64>, %b: tensor<f64>):
          %1 = stablehlo.sine %a : tensor<f64> %2 = stablehlo.multiply %1, %b : tensor<f64>
          stablehlo.return %2 : tensor<f64> }) {dimensions = array<i64: 0, 1>}
          : (tensor<2x3xf64>, tensor<2x3xf64>) -> tensor<2x3xf64> return %0 : tensor<2x3xf64> }"""
    x = POINT.reshape(2, 3)
    (found,) = text(module, jnp.asarray(x), jnp.asarray(x + 1))
    np.testing.assert_allclose(found, np.sin(x) * (x + 1), rtol=1e-15)


def test_bitcasts_between_widths():
    x = jnp.arange(4.0, dtype=jnp.float32)

    def function(x):
        return lax.bitcast_convert_type(x, jnp.uint8)

    assert_equal(imported(function, x)(x), function(x))
