"""Sizes are computed exactly, as Python computes them without symbolic rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from hvpd_server.importer import evaluate, reader, sizes
from hvpd_server.importer.graph import Operation, TensorType
from hvpd_server.importer.refusals import PROGRAM_TOO_LARGE
from hvpd_server.importer.table import Refused
from tests.importer import marked, round_trip

W = np.array([0.5, -1.0, 2.0], np.float32)


@pytest.fixture(autouse=True)
def _x32():
    with jax.enable_x64(False):
        yield


def rows_of(count, dtype=np.float32):
    return np.ones((count, 3), dtype)


def with_symbolic_rows(function, dtype=np.float32, marks=False):
    (m,) = export.symbolic_shape("m")
    specs = [jax.ShapeDtypeStruct((3,), dtype), jax.ShapeDtypeStruct((m, 3), dtype)]
    if marks:
        return marked.imported(reader.read(marked.artifact(function, specs, ["cpu"])))
    return round_trip.imported(function, *specs)


both = pytest.mark.parametrize("marks", [False, True], ids=["plain", "marked"])


def spread(w, X):
    """Return an array with a million equal elements for each row."""
    return jnp.broadcast_to(w @ w, (X.shape[0], 1000, 1000))


def weighted(number):
    """Return a function that multiplies by a number computed from the rows."""
    return lambda w, X: jnp.sum(w * w * X[0]) * number(X.shape[0])


FUNCTIONS = {
    "mean": (3000, lambda w, X: jnp.mean(spread(w, X))),
    "mean of few": (2000, lambda w, X: jnp.mean(spread(w, X))),
    "variance": (3000, lambda w, X: jnp.var(spread(w, X) * 3, ddof=1) + jnp.mean(spread(w, X))),
    "pairs": (70_000, lambda w, X: jnp.sum(w * w * X.sum(0)) / (X.shape[0] * (X.shape[0] - 1) / 2)),
    "quadruples": (3000, weighted(lambda n: n * (n - 1) * (n - 2) * (n - 3) / 24)),
    "quotient": (3000, weighted(lambda n: n**3 // 3_000_001)),
    "negative quotient": (3000, weighted(lambda n: -(n**3) // 3_000_001)),
    "remainder": (3000, weighted(lambda n: n**3 % 300_007)),
    "negative remainder": (3000, weighted(lambda n: -(n**3) % 300_007)),
    "loop": (3000, lambda w, X: jax.lax.fori_loop(0, 3, lambda i, a: a + jnp.mean(spread(w, X)) * i, 0.0)),
    "checkpoint": (3000, lambda w, X: jax.checkpoint(lambda w: jnp.mean(spread(w, X)))(w)),
    "branch": (3000, lambda w, X: jax.lax.cond(w[0] > 0, lambda: jnp.mean(spread(w, X)), lambda: 0.0)),
}
"""Rows, and a function of weights and rows whose sizes exceed 32 bits."""


@both
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_of_sizes_are_those_of_fixed_shapes(name, marks):
    count, function = FUNCTIONS[name]
    X, v = rows_of(count), W[::-1]

    def product(function):
        return jax.jit(lambda w, X: (function(w, X), jax.jvp(jax.grad(lambda w: function(w, X)), (w,), (v,))[1]))

    expected = product(function)(W, X)
    found = product(with_symbolic_rows(function, marks=marks))(W, X)
    assert np.isfinite(expected[0])
    assert expected[0] != 0
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_number_is_rounded_once():
    # Rounding first to float64 would end at 2**60 + 2**37.
    exact = (1 << 60) + (1 << 36) + 1
    found = sizes.result(_operation("convert"), [sizes.size(exact, np.dtype(np.int32))], np.dtype(np.float32))
    assert found.dtype == np.float32
    assert int(found) == (1 << 60) + (1 << 37)


@both
@pytest.mark.parametrize(
    "function",
    [
        lambda w, X: jnp.sum(w) * jnp.ones(X.shape[0] * 2**30 + 5)[0],
        lambda w, X: jnp.sum(w) * jnp.sum(jnp.arange(3) * X.shape[0] ** 3),
        lambda w, X: jax.lax.fori_loop(0, X.shape[0] ** 3, lambda i, a: a + w[0], 0.0),
        lambda w, X: jax.lax.cond(w[0] > 0, lambda: X.shape[0] ** 3, lambda: 0) * w[0],
        lambda w, X: jnp.sum(w) * jnp.asarray(X.shape[0] ** 3).astype(jnp.uint32),
    ],
    ids=["extent", "array", "limit of a loop", "result of a branch", "unsigned"],
)
def test_a_size_beyond_its_dtype_is_refused(function, marks):
    run = with_symbolic_rows(function, marks=marks)
    with pytest.raises(Refused, match=r"computed from sizes that int32 cannot hold.*Register without any_rows") as info:
        run(W, rows_of(3000))
    assert info.value.reason == PROGRAM_TOO_LARGE


@pytest.mark.parametrize(
    "function",
    [
        lambda w, X: jax.checkpoint(lambda n: n * w[0])(jnp.asarray(X.shape[0] ** 3)),
        lambda w, X: jax.checkpoint(lambda n: X.shape[0] ** 3)(w[0]) * w[0],
    ],
    ids=["argument", "result"],
)
def test_a_mark_takes_and_returns_no_size_beyond_its_dtype(function):
    with pytest.raises(Refused, match=r"has a stablehlo\.composite of 27000000000, a number computed from sizes"):
        with_symbolic_rows(function, marks=True)(W, rows_of(3000))


@both
def test_a_size_beyond_64_bits_is_refused(marks):
    with jax.enable_x64(True):
        run = with_symbolic_rows(lambda w, X: jnp.sum(w) * jnp.ones(X.shape[0] * 2**62 + 5)[0], np.float64, marks)
        with pytest.raises(
            Refused, match="of 18446744073709551621, a number computed from sizes that int32 cannot hold"
        ):
            run(np.ones(3), rows_of(4, np.float64))


@both
def test_arrays_wrap_around_as_in_jax(marks):
    def function(w, X):
        return jnp.sum(w) * jnp.sum(jnp.arange(3) * X.shape[0] ** 2 * 7)

    X = rows_of(30_000)
    assert with_symbolic_rows(function, marks=marks)(W, X) == function(W, X)


SQUARED = """func.func @main(%x0: tensor<?xf32>) -> tensor<f32> {{
  %0 = stablehlo.get_dimension_size %x0, dim = 0 : (tensor<?xf32>) -> tensor<i32>
  {squares}
  %r = stablehlo.convert %{last} : (tensor<i32>) -> tensor<f32>
  return %r : tensor<f32>
}}"""


@pytest.mark.parametrize(("times", "fits"), [(6, True), (7, False), (60, False)])
def test_exact_numbers_have_a_limit(times, fits):
    squares = "\n".join(f"%{each + 1} = stablehlo.multiply %{each}, %{each} : tensor<i32>" for each in range(times))
    run = evaluate.function(reader.read(SQUARED.format(squares=squares, last=times)))
    x = np.zeros(2048, np.float32)
    if fits:
        assert np.isinf(run(x)[0])
    else:
        with pytest.raises(Refused, match="more than 1023 bits"):
            run(x)


CAPTURED = """func.func @main(%x: tensor<?xf32>) -> tensor<f32> {
  %zero = stablehlo.constant dense<0> : tensor<i32>
  %limit = stablehlo.constant dense<100> : tensor<i32>
  %start = stablehlo.constant dense<0.0> : tensor<f32>
  %n = stablehlo.get_dimension_size %x, dim = 0 : (tensor<?xf32>) -> tensor<i32>
  %square = stablehlo.multiply %n, %n : tensor<i32>
  %r:2 = stablehlo.while(%i = %zero, %a = %start) : tensor<i32>, tensor<f32>
    cond {
      %more = stablehlo.compare LT, %i, %limit : (tensor<i32>, tensor<i32>) -> tensor<i1>
      stablehlo.return %more : tensor<i1>
    } do {
      %next = stablehlo.add %i, %square : tensor<i32>
      %size = stablehlo.convert %square : (tensor<i32>) -> tensor<f32>
      %sum = stablehlo.add %a, %size : tensor<f32>
      stablehlo.return %next, %sum : tensor<i32>, tensor<f32>
    }
  return %r#1 : tensor<f32>
}"""


def test_a_loop_does_not_count_by_a_size_beyond_its_dtype():
    run = evaluate.function(reader.read(CAPTURED))
    assert run(np.zeros(9, np.float32))[0] == 162
    # The square is 2**32 + 2**17 + 1, which is 131073 in 32 bits.
    with pytest.raises(Refused, match=r"has a stablehlo\.add.* of 4295098369, a number computed from sizes"):
        run(np.zeros((1 << 16) + 1, np.float32))


BARRIER = """func.func @main(%x: tensor<?xf32>) -> tensor<f32> {
  %n = stablehlo.get_dimension_size %x, dim = 0 : (tensor<?xf32>) -> tensor<i32>
  %square = stablehlo.multiply %n, %n : tensor<i32>
  %same, %y = stablehlo.optimization_barrier %square, %x : tensor<i32>, tensor<?xf32>
  %r = stablehlo.convert %same : (tensor<i32>) -> tensor<f32>
  return %r : tensor<f32>
}"""


def test_barriers_hand_sizes_on():
    run = evaluate.function(reader.read(BARRIER))
    assert run(np.zeros(1 << 16, np.float32))[0] == 2.0**32


def test_divisions_truncate():
    def divided(name, x, y):
        numbers = [sizes.size(each, np.dtype(np.int32)) for each in (x, y)]
        return sizes.result(_operation(name), numbers, np.dtype(np.int32))

    for x, y, quotient, remainder in ((7, 2, 3, 1), (-7, 2, -3, -1), (7, -2, -3, 1), (-7, -2, 3, -1)):
        assert divided("divide", x, y).exact == quotient
        assert divided("remainder", x, y).exact == remainder
    # The elementwise rule gives what XLA gives.
    assert divided("divide", 7, 0) is None
    assert divided("remainder", 7, 0) is None


def test_a_size_wraps_around_as_its_dtype_does():
    for exact in (0, 5, -5, 1 << 31, 1 << 40, (1 << 70) + 3, -(1 << 33) - 1):
        for dtype in (np.int8, np.int32, np.int64):
            found = sizes.size(exact, np.dtype(dtype))
            bits = found.dtype.itemsize * 8
            assert (int(found) - exact) % (1 << bits) == 0
            assert sizes.exceeds(found) == (not -(1 << bits - 1) <= exact < 1 << bits - 1)
    assert not sizes.is_size(sizes.size(5, np.dtype(np.int32)).reshape(1))


def _operation(name):
    return Operation(f"stablehlo.{name}", (0,), (1,), (TensorType((), "int32"),), {})
