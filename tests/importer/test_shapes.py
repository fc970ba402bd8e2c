"""Operations on shapes have native jax's derivatives, symbolic extents stay known, and
bad sizes are refused.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from hvpd_server.importer.table import Refused
from tests.importer.round_trip import assert_equal, assert_same, imported, text

POINT = np.array([0.3, -1.2, 0.7, 2.0, -0.4, 1.1])
TABLE = np.sin(np.arange(24.0).reshape(6, 4))


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


STATIC = {
    "reshape and transpose": lambda x: (x.reshape(2, 3).T ** 2).reshape(-1) * x,
    "reverse": lambda x: x[::-1] * x,
    "slice": lambda x: x[1:5:2] ** 3,
    "concatenate": lambda x: jnp.concatenate([x**2, x[:2]]),
    "pad": lambda x: lax.pad(x, x[0], [(1, 2, 1)]) ** 2,
    "cut by a pad": lambda x: lax.pad(x, 0.0, [(-1, -2, 0)]) ** 2,
    "broadcast": lambda x: jnp.broadcast_to(x[:, None], (6, 2)) ** 2,
    "iota": lambda x: x * jnp.arange(6) + lax.broadcasted_iota(jnp.float64, (2, 6), 0) * x,
    "constants": lambda x: x * np.linspace(0, 1, 6) + jnp.full(6, 2.0) * x**2,
    "large constant": lambda x: x.sum() * np.full(2000, 3.0).sum() + (np.arange(2000.0) * x[0]).sum() ** 2,
    "dynamic slice": lambda x: lax.dynamic_slice(x, (jnp.argmax(x),), (2,)) ** 2,
    "dynamic slice before the start": lambda x: lax.dynamic_slice(x, (-jnp.argmax(x),), (2,)) ** 2,
    "dynamic update slice": lambda x: lax.dynamic_update_slice(x, x[:2] * 3, (jnp.argmax(x),)) ** 2,
    "known start": lambda x: lax.dynamic_slice(x, (5,), (3,)) ** 2,
    "barrier": lambda x: lax.optimization_barrier(x**2) * x,
    "bits": lambda x: x * lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32),
}


def test_static_shapes():
    assert_same(STATIC, POINT)


SYMBOLIC = {
    "mean": lambda x: x.mean(0),
    "reshape": lambda x: x.reshape(-1),
    "concatenate": lambda x: jnp.concatenate([x, x[:1]]),
    "arange": lambda x: jnp.arange(x.shape[0]) * x[:, 0],
    "slice": lambda x: x[1:],
    "half": lambda x: x[: x.shape[0] // 2],
    "remainder": lambda x: x[: x.shape[0] % 4 + 1],
    "maximum of extents": lambda x: jnp.zeros((jax.core.max_dim(x.shape[0], 3), 1)) + x[0],
    "pad": lambda x: jnp.pad(x, ((1, 2), (0, 0))),
    "eye": lambda x: jnp.eye(x.shape[0]) @ x,
    "sort": lambda x: jnp.sort(x, 0),
    "median": lambda x: jnp.median(x, 0),
    "roll": lambda x: jnp.roll(x, 1, 0),
    "tile": lambda x: jnp.tile(x, (2, 1)),
    "repeat": lambda x: jnp.repeat(x, 2, 0),
    "softmax": jax.nn.softmax,
    "triangle": jnp.tril,
    "argmax": lambda x: jnp.argmax(x, 0),
    "pool": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1), (2, 1), "VALID"),
}


@pytest.mark.parametrize("extents", ["n, 4", "n, m"])
@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_extents(name, extents):
    spec = jax.ShapeDtypeStruct(export.symbolic_shape(extents), np.float64)
    function = SYMBOLIC[name]
    assert_equal(imported(function, spec)(TABLE), function(TABLE), tolerance=1e-14)


@pytest.mark.parametrize("start", [-7, -1, 0, 2, 9])
def test_a_slice_of_symbolic_size_from_a_start_in_data(start):
    def function(x, i):
        return jnp.sum(lax.dynamic_slice(x, (np.int32(0), i), (x.shape[0], 2)) ** 2)

    specs = jax.ShapeDtypeStruct(export.symbolic_shape("n, 4"), np.float64), jax.ShapeDtypeStruct((), np.int32)
    again = imported(function, *specs)
    index = jnp.int32(start)
    assert_equal(again(TABLE, index), function(TABLE, index))
    assert_equal(jax.grad(again)(TABLE, index), jax.grad(function)(TABLE, index))


def test_symbolic_programs_differentiate():
    spec = jax.ShapeDtypeStruct(export.symbolic_shape("n, 4"), np.float64)

    def function(x):
        return jnp.sum(jax.nn.softmax(x) * jnp.cumsum(x, 1)) / x.shape[0]

    again = imported(function, spec)
    point = jnp.asarray(TABLE[:2])
    assert_equal(jax.jit(jax.hessian(again))(point), jax.jit(jax.hessian(function))(point), tolerance=1e-14)


def _run(body, *args):
    return text(f"func.func @main({body} }}", *args)


def test_known_arrays_are_moved_with_numpy():
    x = np.arange(6, dtype=np.int64).reshape(2, 3)
    body = """%x: tensor<2x3xi64>, %i: tensor<i64>) -> (tensor<3x2xi64>, tensor<4x3x2xi64>, tensor<2x3xi64>, tensor<4x5xi64>,
            tensor<1x2xi64>, tensor<2x3xi64>, tensor<4x3xi64>, tensor<2x3xi64>, tensor<3xi64>) {
        %0 = stablehlo.transpose %x, dims = [1, 0] : (tensor<2x3xi64>) -> tensor<3x2xi64>
        %1 = stablehlo.broadcast_in_dim %x, dims = [2, 1] : (tensor<2x3xi64>) -> tensor<4x3x2xi64>
        %2 = stablehlo.reverse %x, dims = [1] : tensor<2x3xi64>
        %3 = stablehlo.pad %x, %i, low = [1, -1], high = [0, 1], interior = [1, 1]
          : (tensor<2x3xi64>, tensor<i64>) -> tensor<4x5xi64>
        %4 = stablehlo.dynamic_slice %x, %i, %i, sizes = [1, 2] : (tensor<2x3xi64>, tensor<i64>, tensor<i64>) -> tensor<1x2xi64>
        %5 = stablehlo.dynamic_update_slice %x, %4, %i, %i
          : (tensor<2x3xi64>, tensor<1x2xi64>, tensor<i64>, tensor<i64>) -> tensor<2x3xi64>
        %6 = stablehlo.concatenate %x, %5, dim = 0 : (tensor<2x3xi64>, tensor<2x3xi64>) -> tensor<4x3xi64>
        %7 = stablehlo.iota dim = 1 : tensor<2x3xi64>
        %8 = stablehlo.constant dense<7> : tensor<3xi64>
        return %0, %1, %2, %3, %4, %5, %6, %7, %8 : tensor<3x2xi64>, tensor<4x3x2xi64>, tensor<2x3xi64>, tensor<4x5xi64>,
          tensor<1x2xi64>, tensor<2x3xi64>, tensor<4x3xi64>, tensor<2x3xi64>, tensor<3xi64>"""
    known = _run(body, x, np.array(9))
    assert all(isinstance(each, np.ndarray) for each in known)
    traced = jax.jit(lambda x, i: _run(body, x, i))(x, 9)
    assert_equal(known, [np.asarray(each) for each in traced])


@pytest.mark.parametrize("order", [(1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
def test_a_broadcast_in_another_order_transposes(order):
    x = np.arange(8.0).reshape(2, 2, 2)
    body = f"""%x: tensor<2x2x2xf64>) -> tensor<2x2x2xf64> {{
        %0 = stablehlo.broadcast_in_dim %x, dims = {list(order)} : (tensor<2x2x2xf64>) -> tensor<2x2x2xf64>
        return %0 : tensor<2x2x2xf64>"""
    (found,) = jax.jit(lambda x: _run(body, x))(x)
    np.testing.assert_array_equal(found, np.transpose(x, np.argsort(order)))


@pytest.mark.parametrize("where", ["jit", "known"])
def test_dynamic_operations_with_known_sizes(where):
    body = """%x: tensor<?xf64>, %v: tensor<f64>, %shape: tensor<2xi64>, %low: tensor<1xi32>) -> (tensor<?x?xf64>, tensor<?xf64>,
            tensor<?x?xi32>, tensor<?xf64>) {
        %0 = stablehlo.dynamic_reshape %x, %shape : (tensor<?xf64>, tensor<2xi64>) -> tensor<?x?xf64>
        %1 = stablehlo.dynamic_pad %x, %v, %low, %low, %low
          : (tensor<?xf64>, tensor<f64>, tensor<1xi32>, tensor<1xi32>, tensor<1xi32>) -> tensor<?xf64>
        %2 = stablehlo.dynamic_iota %shape, dim = 0 : (tensor<2xi64>) -> tensor<?x?xi32>
        %3 = "stablehlo.real_dynamic_slice"(%x, %low, %low, %low)
          : (tensor<?xf64>, tensor<1xi32>, tensor<1xi32>, tensor<1xi32>) -> tensor<?xf64>
        return %0, %1, %2, %3 : tensor<?x?xf64>, tensor<?xf64>, tensor<?x?xi32>, tensor<?xf64>"""
    shape, low = np.array([2, 3]), np.array([1], np.int32)

    def run(x, v):
        return _run(body, x, v, shape, low)

    reshaped, padded, counted, empty = (jax.jit(run) if where == "jit" else run)(jnp.asarray(POINT), jnp.asarray(5.0))
    np.testing.assert_array_equal(reshaped, POINT.reshape(2, 3))
    np.testing.assert_array_equal(padded[::2], np.full(7, 5.0))
    np.testing.assert_array_equal(padded[1::2], POINT)
    np.testing.assert_array_equal(counted, [[0, 0, 0], [1, 1, 1]])
    assert empty.shape == (0,)


_RESHAPE = """%x: tensor<?xf64>, %s: tensor<1xi64>) -> tensor<?xf64> {
    %0 = stablehlo.dynamic_reshape %x, %s : (tensor<?xf64>, tensor<1xi64>) -> tensor<?xf64> return %0 : tensor<?xf64>"""
_IOTA = """%x: tensor<?xf64>, %s: tensor<1xi64>) -> tensor<?xi64> {
    %0 = stablehlo.dynamic_iota %s, dim = 0 : (tensor<1xi64>) -> tensor<?xi64> return %0 : tensor<?xi64>"""
_SLICE = """%x: tensor<?xf64>, %s: tensor<1xi64>) -> tensor<?xf64> {
    %0 = "stablehlo.real_dynamic_slice"(%x, %s, %s, %s)
      : (tensor<?xf64>, tensor<1xi64>, tensor<1xi64>, tensor<1xi64>) -> tensor<?xf64> return %0 : tensor<?xf64>"""
REFUSED = {
    "a negative size": (_RESHAPE, -1, "negative"),
    "another size": (_RESHAPE, 7, "as many elements"),
    "a size of 2^62": (_IOTA, 2**62, "limit"),
    "bounds outside": (_SLICE, 9, "valid bounds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sizes_that_are_refused(name):
    body, size, message = REFUSED[name]
    with pytest.raises(Refused, match=message):
        jax.make_jaxpr(lambda x: _run(body, x, np.array([size])))(POINT)


@pytest.mark.parametrize("body", [_RESHAPE, _IOTA, _SLICE])
def test_a_size_that_depends_on_data_is_refused(body):
    with pytest.raises(Refused, match="depends on"):
        jax.make_jaxpr(lambda size: _run(body, jnp.asarray(POINT), size))(np.array([6]))
