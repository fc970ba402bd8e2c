"""Bodies of reductions are recognised, derivatives at ties are native jax's, and other
bodies are refused.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hvpd_server.importer.table import Refused, Report
from tests.importer.round_trip import assert_equal, assert_same, imported, text

POINT = np.array([0.3, -1.2, 0.7, 2.0, -0.4, 1.1])
TIES = np.array([1.0, 1.0, 0.0, -1.0, 1.0, 0.0])
IMAGE = np.sin(np.arange(72.0)).reshape(1, 6, 6, 2)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


AXES = {
    "sum": jnp.sum,
    "product": jnp.prod,
    "maximum": jnp.max,
    "minimum": jnp.min,
    "one axis": lambda x: jnp.max(x.reshape(2, 3), 1) * jnp.min(x.reshape(2, 3), 1),
    "initial": lambda x: jnp.max(x, initial=0.5) + jnp.sum(x, initial=2.0),
    "mean and variance": lambda x: jnp.mean(x) * jnp.var(x),
    "any and all": lambda x: jnp.any(x > 0) * x + jnp.all(x > 0) * x,
    "bits": lambda x: x * (lax.reduce_xor(jnp.arange(6), (0,)) + lax.reduce_or(jnp.arange(6), (0,))),
    "bfloat16": lambda x: jnp.max(x.astype(jnp.bfloat16)).astype(x.dtype) + jnp.sum(x.astype(jnp.bfloat16)),
    "argmax": lambda x: x[jnp.argmax(x)] * jnp.sum(x),
    "argmin": lambda x: x[jnp.argmin(x)] * jnp.sum(x),
    "norm": jnp.linalg.norm,
}


def test_whole_axes():
    assert_same(AXES, POINT, TIES)


RUNNING = {
    "sum": jnp.cumsum,
    "product": jnp.cumprod,
    "maximum": lax.cummax,
    "minimum backwards": lambda x: lax.cummin(x, reverse=True),
    "sum backwards": lambda x: lax.cumsum(x.reshape(2, 2), axis=1, reverse=True),
}


def test_running_reductions():
    assert_same(RUNNING, POINT[:4], TIES[:4])


def test_a_running_logsumexp():
    report = Report()
    again = imported(lax.cumlogsumexp, POINT, report=report)
    again(POINT)
    assert report.recognised["cumlogsumexp"] == 1

    def loss(each):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(each(x) ** 2)))

    for point in (POINT, TIES, np.array([-np.inf, 0.0, -np.inf, 1.0, 2.0, np.inf])):
        assert_equal(loss(again)(point), loss(lax.cumlogsumexp)(point), tolerance=1e-14)


def _pool(x, start, combine, size, stride, padding="SAME", **options):
    return lax.reduce_window(x, start, combine, (1, size, size, 1), (1, stride, stride, 1), padding, **options)


WINDOWS = {
    "max-pool": lambda x: _pool(x, -jnp.inf, lax.max, 2, 2),
    "max-pool that overlaps": lambda x: _pool(x, -jnp.inf, lax.max, 3, 2),
    "min-pool": lambda x: _pool(x, jnp.inf, lax.min, 3, 1, "VALID"),
    "average-pool": lambda x: _pool(x, 0.0, lax.add, 3, 2) / 9,
    "dilated": lambda x: _pool(x, 0.0, lax.add, 2, 1, "VALID", window_dilation=(1, 2, 2, 1)),
    "dilated base": lambda x: _pool(x, 0.0, lax.add, 3, 1, "VALID", base_dilation=(1, 2, 2, 1)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name):
    assert_same({name: WINDOWS[name]}, IMAGE, np.round(IMAGE), platforms=["cuda"])


def test_the_gradient_of_a_max_pool_inside_an_objective():
    gradient = jax.grad(lambda x: jnp.sum(_pool(x, -jnp.inf, lax.max, 2, 2) ** 3))
    overlapping = jax.grad(lambda x: jnp.sum(_pool(x, -jnp.inf, lax.max, 3, 2, "VALID") ** 3))
    assert_same({"apart": gradient, "overlapping": overlapping}, IMAGE, np.round(IMAGE))


def test_a_window_with_a_start_of_its_own_starts_there_and_pads_with_it():
    def function(x):
        return lax.reduce_window(x, 2.0, lax.add, (2,), (1,), [(1, 0)])

    assert_equal(imported(function, POINT)(POINT), function(POINT))

    def product(x):
        return lax.reduce_window(x, 1.0, lax.mul, (2,), (1,), "VALID")

    assert_equal(jax.jvp(imported(product, POINT), (POINT,), (TIES,)), jax.jvp(product, (POINT,), (TIES,)))


def test_argmax_takes_the_first_nan_and_the_first_of_ties():
    for function in (jnp.argmax, jnp.argmin):
        for point in (POINT, TIES, np.array([1.0, np.nan, 3.0, np.nan, -np.inf, 0.0]), np.full(6, -np.inf)):
            assert_equal(imported(function, point)(point), function(point))


def _reduce(kinds, body, operands="%x init: %s"):
    module = f"""func.func @main(%x: tensor<6x{kinds[0]}>, %s: tensor<{kinds[0]}>) -> tensor<{kinds[0]}> {{
        %0 = "stablehlo.reduce"(%x, %s) ({{ ^bb0(%a: tensor<{kinds[0]}>, %b: tensor<{kinds[0]}>): {body} }})
          {{dimensions = array<i64: 0>}} : (tensor<6x{kinds[0]}>, tensor<{kinds[0]}>) -> tensor<{kinds[0]}>
        return %0 : tensor<{kinds[0]}> }}"""
    return lambda *args: text(module, *args)[0]


def test_known_integers_are_reduced_with_numpy():
    x = np.array([2, 3, 1, 4, 1, 2])
    run = _reduce(["i64"], "%c = stablehlo.multiply %b, %a : tensor<i64> stablehlo.return %c : tensor<i64>")
    found = run(x, np.array(2))
    assert isinstance(found, np.ndarray)
    assert found == 96
    assert jax.jit(run)(x, 2) == 96


def test_booleans_are_reduced_by_logic():
    x = jnp.array([False, True, True, False, False, True])
    for name, expected in (("add", True), ("multiply", False), ("maximum", True), ("minimum", False), ("xor", True)):
        run = _reduce(["i1"], f"%c = stablehlo.{name} %a, %b : tensor<i1> stablehlo.return %c : tensor<i1>")
        identity = name in ("multiply", "minimum")
        assert run(x, np.array(identity)) == expected, name


def test_a_body_in_a_function_is_recognised():
    module = """
      func.func private @plus(%a: tensor<f64>, %b: tensor<f64>) -> tensor<f64> {
        %0 = stablehlo.reshape %b : (tensor<f64>) -> tensor<f64>
        %1 = stablehlo.add %0, %a : tensor<f64> return %1 : tensor<f64> }
      func.func public @main(%x: tensor<6xf64>) -> tensor<f64> {
        %s = stablehlo.constant dense<0.0> : tensor<f64>
        %0 = "stablehlo.reduce"(%x, %s) ({ ^bb0(%a: tensor<f64>, %b: tensor<f64>):
          %c = func.call @plus(%a, %b) : (tensor<f64>, tensor<f64>) -> tensor<f64> stablehlo.return %c : tensor<f64> })
          {dimensions = array<i64: 0>} : (tensor<6xf64>, tensor<f64>) -> tensor<f64>
        return %0 : tensor<f64> }"""
    jaxpr = jax.make_jaxpr(lambda x: text(module, x)[0])(POINT)
    assert [str(each.primitive) for each in jaxpr.eqns] == ["reduce_sum"]


def test_several_reductions_at_once():
    module = """func.func @main(%x: tensor<6xf64>, %i: tensor<6xi64>) -> (tensor<f64>, tensor<i64>) {
        %s = stablehlo.constant dense<0.0> : tensor<f64> %t = stablehlo.constant dense<3> : tensor<i64>
        %0:2 = "stablehlo.reduce"(%x, %i, %s, %t) ({
          ^bb0(%a: tensor<f64>, %b: tensor<i64>, %c: tensor<f64>, %d: tensor<i64>):
          %e = stablehlo.add %a, %c : tensor<f64> %f = stablehlo.maximum %d, %b : tensor<i64>
          stablehlo.return %e, %f : tensor<f64>, tensor<i64> }) {dimensions = array<i64: 0>}
          : (tensor<6xf64>, tensor<6xi64>, tensor<f64>, tensor<i64>) -> (tensor<f64>, tensor<i64>)
        return %0#0, %0#1 : tensor<f64>, tensor<i64> }"""
    total, most = text(module, jnp.asarray(POINT), jnp.array([1, 2, 0, 1, 2, 1]))
    np.testing.assert_allclose(total, POINT.sum())
    assert most == 3


def test_extremes_with_indices_that_do_not_count_up():
    module = """func.func @main(%x: tensor<6xf64>, %i: tensor<6xi32>) -> (tensor<f64>, tensor<i32>) {
        %s = stablehlo.constant dense<0xFFF0000000000000> : tensor<f64> %t = stablehlo.constant dense<0> : tensor<i32>
        %0:2 = "stablehlo.reduce"(%x, %i, %s, %t) ({
          ^bb0(%a: tensor<f64>, %b: tensor<i32>, %c: tensor<f64>, %d: tensor<i32>):
          %e = stablehlo.compare GE, %a, %c : (tensor<f64>, tensor<f64>) -> tensor<i1>
          %f = stablehlo.select %e, %a, %c : tensor<i1>, tensor<f64>
          %g = stablehlo.compare EQ, %a, %c : (tensor<f64>, tensor<f64>) -> tensor<i1>
          %h = stablehlo.minimum %b, %d : tensor<i32>
          %i0 = stablehlo.select %e, %b, %d : tensor<i1>, tensor<i32>
          %j = stablehlo.select %g, %h, %i0 : tensor<i1>, tensor<i32>
          stablehlo.return %f, %j : tensor<f64>, tensor<i32> }) {dimensions = array<i64: 0>}
          : (tensor<6xf64>, tensor<6xi32>, tensor<f64>, tensor<i32>) -> (tensor<f64>, tensor<i32>)
        return %0#0, %0#1 : tensor<f64>, tensor<i32> }"""
    indices = jnp.array([9, 8, 7, 6, 5, 4], jnp.int32)
    for point, place in ((POINT, 6), (TIES, 5)):
        most, found = text(module, jnp.asarray(point), indices)
        assert most == point.max()
        assert found == place


REFUSED = {
    "subtract": "%c = stablehlo.subtract %a, %b : tensor<f64> stablehlo.return %c : tensor<f64>",
    "the first": "stablehlo.return %a : tensor<f64>",
    "add with itself": "%c = stablehlo.add %a, %a : tensor<f64> stablehlo.return %c : tensor<f64>",
    "more": """%c = stablehlo.add %a, %b : tensor<f64> %d = stablehlo.sine %c : tensor<f64>
        stablehlo.return %d : tensor<f64>""",
    "an outer value": "%c = stablehlo.add %a, %s : tensor<f64> stablehlo.return %c : tensor<f64>",
    "too long": "%c0 = stablehlo.add %a, %b : tensor<f64>"
    + "".join(f" %c{i + 1} = stablehlo.add %c{i}, %c{i} : tensor<f64>" for i in range(300))
    + " stablehlo.return %c300 : tensor<f64>",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_bodies_are_refused(name):
    with pytest.raises(Refused, match="region of more than" if name == "too long" else "expected one of add"):
        _reduce(["f64"], REFUSED[name])(jnp.asarray(POINT), jnp.asarray(0.0))


def test_a_start_of_its_own_is_combined():
    run = _reduce(["f64"], "%c = stablehlo.maximum %a, %b : tensor<f64> stablehlo.return %c : tensor<f64>")
    for start in (5.0, -5.0):
        assert run(jnp.asarray(POINT), jnp.asarray(start)) == max(POINT.max(), start)
