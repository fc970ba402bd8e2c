"""jax's logaddexp is recognised where jax writes its formula in place, and nothing else
is.
"""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hvpd_server.importer import evaluate, reader
from hvpd_server.importer.table import Report

POINTS = np.array([-np.inf, -800.0, -1.0, 0.0, 0.5, 800.0, np.inf, np.nan])
FORMULA = """
%d = stablehlo.subtract %x, %y : tensor<3xf64>
%n = stablehlo.compare NE, %d, %d, FLOAT : (tensor<3xf64>, tensor<3xf64>) -> tensor<3xi1>
%s = stablehlo.add %x, %y : tensor<3xf64>
%m = stablehlo.maximum %x, %y : tensor<3xf64>
%a = stablehlo.abs %d : tensor<3xf64>
%e = stablehlo.negate %a : tensor<3xf64>
%f = stablehlo.exponential %e : tensor<3xf64>
%g = stablehlo.log_plus_one %f : tensor<3xf64>
%h = stablehlo.add %m, %g : tensor<3xf64>
%r = stablehlo.select %n, %s, %h : tensor<3xi1>, tensor<3xf64>
"""
MAXIMUM = "maximum: half of each side's derivative at a tie"


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def written(formula, returned="%r"):
    return f"""func.func public @main(%x: tensor<3xf64>, %y: tensor<3xf64>) -> tensor<3xf64> {{
      {formula}
      return {returned} : tensor<3xf64>
    }}"""


def imported(module):
    report = Report()
    function = evaluate.function(reader.read(module), report=report)
    return lambda *args: function(*args)[0], report


def derivatives(fun):
    gradient = jax.grad(lambda x: jnp.sum(fun(x)))
    return jax.jit(lambda x: (fun(x), gradient(x), jax.jvp(gradient, (x,), (jnp.ones_like(x),))[1]))


FUNCTIONS = {
    "of a number": lambda x: jnp.logaddexp(0.0, -x),
    "of a scalar of the program": lambda x: jnp.logaddexp(x, x[3]),
    "of two arrays": lambda x: jnp.logaddexp(x, -x),
    "of other shapes": lambda x: jnp.logaddexp(x[:, None], x[None, :] ** 2),
    "twice": lambda x: jnp.logaddexp(0.0, jnp.logaddexp(x, -x)),
    "in a loop": lambda x: lax.scan(lambda c, _: (jnp.logaddexp(c, x), None), -x, length=3)[0],
}


@pytest.mark.parametrize("form", ["float64", "float32", "bfloat16", "for two platforms", "of any size"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_logaddexp_has_jaxs_derivatives(name, form):
    fun = FUNCTIONS[name]
    dtype = jnp.dtype(form if form[-1].isdigit() else "float64")
    platforms = ("cpu", "cuda") if form == "for two platforms" else ("cpu",)
    shape = jax.export.symbolic_shape("n", constraints=["n >= 8"]) if form == "of any size" else POINTS.shape
    exported = jax.export.export(jax.jit(fun), platforms=platforms)(jax.ShapeDtypeStruct(shape, dtype))
    found, report = imported(exported.mlir_module_serialized)
    index = [np.int64(0)] if len(platforms) > 1 else []
    x = jnp.asarray(POINTS, dtype)
    for left, right in zip(
        derivatives(lambda x: found(*map(np.asarray, index), x))(x), derivatives(fun)(x), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(left, np.float64), np.asarray(right, np.float64))
    assert any("logaddexp" in rule for rule in report.recognised)
    assert not report.presumed


def test_a_part_that_has_another_use_stays():
    found, report = imported(written(FORMULA + "%t = stablehlo.multiply %r, %m : tensor<3xf64>", "%t"))
    x, y = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 0.0, 5.0])
    expected = jax.grad(lambda x: jnp.sum(jnp.logaddexp(x, y) * jnp.maximum(x, y)))(x)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(found(x, y)))(x), expected)
    assert report.presumed == {MAXIMUM: 1}


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("stablehlo.maximum", "stablehlo.minimum"),
        ("NE", "EQ"),
        ("FLOAT", "TOTALORDER"),
        ("%g = stablehlo.log_plus_one %f", "%g = stablehlo.log_plus_one %e"),
        ("%s = stablehlo.add %x, %y", "%s = stablehlo.add %x, %x"),
        ("%m = stablehlo.maximum %x, %y", "%m = stablehlo.maximum %x, %d"),
    ],
)
def test_another_formula_is_computed_as_it_is(part, other):
    assert part in FORMULA
    module = written(FORMULA.replace(part, other))
    found, report = imported(module)
    x, y = jnp.array([0.0, 1.0, -2.0]), jnp.array([0.0, -1.0, 3.0])
    (plain,) = evaluate.function(reader.read(module), marked=True)(x, y)
    np.testing.assert_array_equal(found(x, y), plain)
    assert not report.recognised
    assert report.presumed


def test_a_marked_program_is_left_as_it_is():
    report = Report()
    function = evaluate.function(reader.read(written(FORMULA)), report=report, marked=True)
    function(jnp.ones(3), jnp.ones(3))
    assert not report.recognised
    assert MAXIMUM in report.presumed


def test_the_operation_that_takes_the_formulas_place_is_in_no_program():
    text = '%r = "hvpd.logaddexp"(%x, %y) : (tensor<3xf64>, tensor<3xf64>) -> tensor<3xf64>'
    with pytest.raises(Exception, match=r"hvpd\.logaddexp.* not served"):
        reader.read(written(text))
