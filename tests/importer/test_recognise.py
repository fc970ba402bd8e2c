"""Functions of jax in programs without marks are recognised by name and operations
together, and by neither alone.
"""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

from hvpd_server.importer import evaluate, reader
from hvpd_server.importer.table import Report

POINTS = np.array([-np.inf, -800.0, -1.0, 0.0, 0.5, 800.0, np.inf, np.nan])


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def unmarked(fun, dtype=np.float64, platforms=("cpu",), shape=POINTS.shape):
    """Return the function and the report of a program that plain jax exported."""
    exported = jax.export.export(jax.jit(fun), platforms=platforms)(jax.ShapeDtypeStruct(shape, dtype))
    report = Report()
    function = evaluate.function(reader.read(exported.mlir_module_serialized), report=report)
    index = [np.asarray(0)] if len(platforms) > 1 else []
    return lambda *args: function(*index, *args)[0], report


FUNCTIONS = {
    "relu": nn.relu,
    "softplus": nn.softplus,
    "silu": nn.silu,
    "sinc": jnp.sinc,
    "logaddexp": lambda x: jax.jit(jnp.logaddexp)(x, -x),
    "log_sigmoid": nn.log_sigmoid,
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_jax_gets_its_rule(name, dtype):
    fun = FUNCTIONS[name]
    found, report = unmarked(fun, dtype)
    x = jnp.asarray(POINTS, dtype)
    assert_same_derivatives(found, fun, x)
    # jax 0.11 writes sinc as a series without a rule of its own, so that there is
    # nothing to recognise.
    assert (sum(report.recognised.values()) > 0) == has_rule(fun, x)


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")], ids=len)
@pytest.mark.parametrize("shape", [POINTS.shape, "n"], ids=["fixed", "of any size"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_integers_that_jax_passes_make_no_difference(name, shape, platforms):
    """jax passes the platform's index and symbolic sizes to each function."""
    fun = FUNCTIONS[name]
    shape = jax.export.symbolic_shape(shape) if shape == "n" else shape
    found, report = unmarked(fun, platforms=platforms, shape=shape)
    x = jnp.asarray(POINTS)
    assert_same_derivatives(found, fun, x)
    assert (sum(report.recognised.values()) > 0) == has_rule(fun, x)
    assert not has_rule(fun, x) or not report.presumed


def assert_same_derivatives(found, fun, x):
    def derivatives(fun):
        gradient = jax.grad(lambda x: jnp.sum(fun(x)))
        return jax.jit(lambda x: (fun(x), gradient(x), jax.jvp(gradient, (x,), (jnp.ones_like(x),))[1]))(x)

    for left, right in zip(derivatives(found), derivatives(fun), strict=True):
        np.testing.assert_array_equal(np.asarray(left, np.float64), np.asarray(right, np.float64))


def has_rule(fun, x):
    return any(what in str(jax.make_jaxpr(fun)(x)) for what in ("custom_jvp_call", "logistic"))


def program(symbol, body, shape="3"):
    return f"""module {{
      func.func public @main(%arg0: tensor<{shape}xf64>) -> tensor<{shape}xf64> {{
        %0 = call @{symbol}(%arg0) : (tensor<{shape}xf64>) -> tensor<{shape}xf64>
        return %0 : tensor<{shape}xf64>
      }}
      func.func private @{symbol}(%arg0: tensor<{shape}xf64>) -> tensor<{shape}xf64> {{
        %cst = stablehlo.constant dense<0.0> : tensor<f64>
        %one = stablehlo.constant dense<1.0> : tensor<f64>
        %0 = stablehlo.broadcast_in_dim %cst, dims = [] : (tensor<f64>) -> tensor<{shape}xf64>
        %1 = stablehlo.broadcast_in_dim %one, dims = [] : (tensor<f64>) -> tensor<{shape}xf64>
        {body}
        return %2 : tensor<{shape}xf64>
      }}
    }}"""


@pytest.mark.parametrize(
    ("symbol", "body", "slope"),
    [
        ("relu", "%2 = stablehlo.maximum %arg0, %0 : tensor<3xf64>", [0, 0, 1]),
        ("relu_17", "%2 = stablehlo.maximum %0, %arg0 : tensor<3xf64>", [0, 0, 1]),
        # The name alone, and the operations alone, have the derivatives of the
        # operations.
        ("relu", "%2 = stablehlo.maximum %arg0, %1 : tensor<3xf64>", [0, 0, 1]),
        ("relu", "%2 = stablehlo.minimum %arg0, %0 : tensor<3xf64>", [1, 0.5, 0]),
        ("ramp", "%2 = stablehlo.maximum %arg0, %0 : tensor<3xf64>", [0, 0.5, 1]),
    ],
)
def test_neither_a_name_nor_operations_are_enough(symbol, body, slope):
    report = Report()
    function = evaluate.function(reader.read(program(symbol, body)), report=report)
    found = jax.grad(lambda x: jnp.sum(function(x)[0]))(jnp.array([-1.0, 0.0, 2.0]))
    np.testing.assert_array_equal(found, slope)
    recognised = symbol.startswith("relu") and "%0" in body and "maximum" in body
    assert bool(report.recognised) == recognised
    # A name that promises jax's rule, above operations that do not, is reported.
    said = any("are not those of jax's relu" in rule for rule in report.presumed)
    assert said == (symbol.startswith("relu") and not recognised)


def test_a_transposition_is_not_left_out():
    body = """%3 = stablehlo.broadcast_in_dim %arg0, dims = [1, 0] : (tensor<2x2xf64>) -> tensor<2x2xf64>
        %2 = stablehlo.maximum %3, %0 : tensor<2x2xf64>"""
    report, x = Report(), np.array([[1.0, 2.0], [-3.0, 4.0]])
    (found,) = jax.jit(evaluate.function(reader.read(program("relu", body, "2x2")), report=report))(x)
    np.testing.assert_array_equal(found, np.maximum(x.T, 0))
    assert not report.recognised


@pytest.mark.parametrize(("order", "count"), [("FLOAT", 1), ("TOTALORDER", 0)])
def test_a_comparison_of_another_order_is_not_that_of_jax(order, count):
    module = jax.export.export(jax.jit(jnp.sinc))(jax.ShapeDtypeStruct((3,), np.float64)).mlir_module()
    assert ", FLOAT :" in module
    report = Report()
    function = evaluate.function(reader.read(module.replace(", FLOAT :", f", {order} :")), report=report)
    np.testing.assert_allclose(jax.jit(function)(np.arange(3.0))[0], [1, 0, 0], atol=1e-15)
    assert sum(report.recognised.values()) == count
