"""Comparators of sorts are recognised, tangents move along, and other comparators are
refused.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hvpd_server.importer import evaluate, reader
from hvpd_server.importer.table import Refused, Report
from tests.importer.round_trip import assert_equal, assert_same, imported, text

POINT = np.array([0.3, -1.2, 0.7, 2.0, -0.4, 1.1])
TIES = np.array([1.0, 1.0, 0.0, -1.0, 1.0, -0.0])
ODD = np.array([0.0, np.nan, -0.0, np.inf, -np.inf, -np.nan])


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


SORTS = {
    "sort": jnp.sort,
    "descending": lambda x: jnp.sort(x, descending=True),
    "argsort": lambda x: x[jnp.argsort(x)] * jnp.arange(6),
    "lexsort": lambda x: x[jnp.lexsort((x, jnp.round(x)))],
    "two keys": lambda x: lax.sort((jnp.round(x), x, x * 2), num_keys=2),
    "integer key": lambda x: lax.sort((jnp.round(x).astype(int), x), num_keys=1)[1],
    "boolean key": lambda x: lax.sort((x > 0, x), num_keys=1)[1],
    "rows": lambda x: jnp.sort(x.reshape(2, 3), 0),
    "median": jnp.median,
    "quantile": lambda x: jnp.quantile(x, 0.3),
}


def test_sorts():
    assert_same(SORTS, POINT, TIES)


def test_values_that_compare_as_equal_keep_their_order():
    def function(x):
        return lax.sort((x, jnp.arange(6)), num_keys=1)

    again = imported(function, ODD)
    assert_equal(again(ODD), function(ODD))
    assert_equal(again(TIES), function(TIES))


def test_three_keys_and_complex_numbers():
    def function(x):
        return lax.sort((jnp.round(x), x.astype(jnp.bfloat16), -x, x), num_keys=3)

    assert_equal(imported(function, TIES)(TIES), function(TIES))

    def of_complex(x):
        return lax.sort((lax.complex(jnp.round(x), -x), x), num_keys=1)

    jaxpr = str(jax.make_jaxpr(imported(of_complex, POINT))(POINT))
    assert "num_keys=1" in jaxpr
    assert_equal(imported(of_complex, POINT)(POINT), of_complex(POINT))


def test_jax_comparators_need_no_extra_keys():
    for operands, keys in ((1, 1), (3, 2)):

        def function(x, operands=operands, keys=keys):
            return lax.sort((jnp.round(x), x, x * 2)[:operands], num_keys=keys)

        (found,) = (
            each for each in jax.make_jaxpr(imported(function, POINT))(POINT).eqns if str(each.primitive) == "sort"
        )
        (native,) = (each for each in jax.make_jaxpr(function)(POINT).eqns if str(each.primitive) == "sort")
        assert found.params == native.params
        assert len(found.invars) == operands


def _sort(comparator, kind="f64", stable="true"):
    module = f"""func.func @main(%x: tensor<6x{kind}>, %y: tensor<6xf64>) -> (tensor<6x{kind}>, tensor<6xf64>) {{
        %zero = stablehlo.constant dense<0.0> : tensor<f64>
        %0:2 = "stablehlo.sort"(%x, %y) ({{
          ^bb0(%a: tensor<{kind}>, %b: tensor<{kind}>, %c: tensor<f64>, %d: tensor<f64>): {comparator}
          stablehlo.return %r : tensor<i1> }}) {{dimension = 0 : i64, is_stable = {stable}}}
          : (tensor<6x{kind}>, tensor<6xf64>) -> (tensor<6x{kind}>, tensor<6xf64>)
        return %0#0, %0#1 : tensor<6x{kind}>, tensor<6xf64> }}"""
    return lambda *args: text(module, *args)


def _compare(direction, x, y, kind="f64", order=""):
    return f"stablehlo.compare {direction}, {x}, {y}{order} : (tensor<{kind}>, tensor<{kind}>) -> tensor<i1>"


def test_descending_floats_are_stable_and_differentiate():
    run = _sort(f"%r = {_compare('GT', '%a', '%b')}")
    first, second = run(jnp.asarray(TIES), jnp.arange(6.0))
    order = np.argsort(-TIES, kind="stable")
    np.testing.assert_array_equal(first, TIES[order])
    np.testing.assert_array_equal(second, order)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(run(x, x**2)[1] * jnp.arange(6.0))))(POINT)
    expected = jax.grad(lambda x: jnp.sum((x[jnp.argsort(-x)] ** 2) * jnp.arange(6.0)))(POINT)
    np.testing.assert_allclose(gradient, expected)


def test_exchanged_sides_and_another_key():
    ascending = _sort(f"%r = {_compare('GT', '%d', '%c')}")
    first, second = ascending(jnp.arange(6.0), jnp.asarray(POINT))
    np.testing.assert_array_equal(first, np.argsort(POINT))
    np.testing.assert_array_equal(second, np.sort(POINT))


def test_a_second_key_by_select():
    run = _sort(
        f"%less = {_compare('LT', '%a', '%b', 'i64')} %same = {_compare('EQ', '%a', '%b', 'i64')} "
        f"%next = {_compare('GT', '%c', '%d')} "
        "%r = stablehlo.select %same, %next, %less : tensor<i1>, tensor<i1>",
        "i64",
    )
    keys = np.array([1, 0, 1, 0, 1, 0])
    first, second = run(jnp.asarray(keys), jnp.asarray(POINT))
    order = np.lexsort((-POINT, keys))
    np.testing.assert_array_equal(first, keys[order])
    np.testing.assert_array_equal(second, POINT[order])


def test_the_total_order_tells_zeros_and_nans_apart():
    run = _sort(f"%r = {_compare('LT', '%a', '%b', order=', TOTALORDER')}")
    found, _ = run(jnp.asarray(ODD), jnp.arange(6.0))
    np.testing.assert_array_equal(np.signbit(found), [True, True, True, False, False, False])
    np.testing.assert_array_equal(found, [np.nan, -np.inf, -0.0, 0.0, np.inf, np.nan])


@pytest.mark.parametrize("kind", ["i1", "ui8", "i32"])
def test_descending_integers(kind):
    dtype = {"i1": np.bool_, "ui8": np.uint8, "i32": np.int32}[kind]
    x = np.array([0, 255, 3, 0, 1, 128]).astype(dtype)
    found, _ = _sort(f"%r = {_compare('GT', '%a', '%b', kind)}", kind)(jnp.asarray(x), jnp.arange(6.0))
    np.testing.assert_array_equal(found, np.sort(x)[::-1])


def test_an_order_of_floats_that_is_presumed_is_reported():
    report = Report()
    imported(jnp.sort, POINT, report=report)(POINT)
    assert not report.presumed
    plain = f"""func.func @main(%x: tensor<6xf64>) -> tensor<6xf64> {{
        %0 = "stablehlo.sort"(%x) ({{ ^bb0(%a: tensor<f64>, %b: tensor<f64>): %r = {_compare("LT", "%a", "%b")}
          stablehlo.return %r : tensor<i1> }}) {{dimension = 0 : i64}} : (tensor<6xf64>) -> tensor<6xf64>
        return %0 : tensor<6xf64> }}"""
    evaluate.function(reader.read(plain), report=report)(jnp.asarray(POINT))
    assert any("NaN is last" in each for each in report.presumed)


REFUSED = {
    "not strict": f"%r = {_compare('LE', '%a', '%b')}",
    "different operands": f"%r = {_compare('LT', '%a', '%d')}",
    "an outer value": f"%r = {_compare('LT', '%a', '%zero')}",
    "an expression": f"%e = stablehlo.sine %a : tensor<f64> %f = stablehlo.sine %b : tensor<f64> %r = {_compare('LT', '%e', '%f')}",
    "any of two": f"%e = {_compare('LT', '%a', '%b')} %f = {_compare('LT', '%c', '%d')} %r = stablehlo.or %e, %f : tensor<i1>",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_comparators_are_refused(name):
    with pytest.raises(Refused, match="comparator that is not recognised"):
        _sort(REFUSED[name])(jnp.asarray(POINT), jnp.arange(6.0))
