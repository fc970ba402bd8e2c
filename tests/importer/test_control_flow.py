"""Calls, branches and loops against jax's own: a loop that counts is a scan again, with the scan's memory."""

import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

from hvpd_server.importer import control_flow, evaluate, reader
from hvpd_server.importer.table import Refused, Report
from tests.importer import round_trip


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def _scans(function: Callable[..., Any], *args: Any) -> list[Any]:
    return [each for each in jax.make_jaxpr(function)(*args).eqns if each.primitive.name == "scan"]


def _layout(scan: Any) -> tuple[int, bool, int, int, int]:
    """Length, direction, and the numbers of xs, ys and carried floats of a scan."""
    parameters = scan.params
    carried = parameters["jaxpr"].out_avals[: parameters["num_carry"]]
    return (
        parameters["length"],
        parameters["reverse"],
        len(scan.invars) - parameters["num_consts"] - parameters["num_carry"],
        len(scan.outvars) - parameters["num_carry"],
        sum(jnp.issubdtype(each.dtype, jnp.floating) for each in carried),
    )


def _cell(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    h = jnp.tanh(h * x + 0.5)
    return h, h**2 + x


SCANS: dict[str, Callable[[jax.Array], Any]] = {
    "forward": lambda x: lax.scan(_cell, jnp.ones(3), x),
    "reverse": lambda x: lax.scan(_cell, jnp.ones(3), x, reverse=True),
    "unrolled": lambda x: lax.scan(_cell, jnp.ones(3), x, unroll=2),
    "without carry": lambda x: lax.map(lambda row: jnp.sin(row) * x[0], x),
    "without rows": lambda x: lax.scan(lambda h, _: (jnp.sin(h), jnp.cos(h)), x, length=4),
    "nested": lambda x: lax.scan(lambda h, row: (lax.scan(_cell, h, jnp.stack([row, x[1]]))[0], h), jnp.ones(3), x),
    "associated": lambda x: lax.associative_scan(jnp.multiply, x),
    "counted": lambda x: lax.fori_loop(0, 4, lambda i, c: c * x[i] + i, jnp.ones(3)),
    "counted from elsewhere": lambda x: lax.fori_loop(1, 4, lambda i, c: c * x[i - 1] + i, jnp.ones(3)),
    "counted in small integers": lambda x: lax.fori_loop(np.int8(0), np.int8(4), lambda i, c: c * x[i], jnp.ones(3)),
    "never": lambda x: lax.fori_loop(4, 4, lambda i, c: c * x[i], x[0]),
    "once": lambda x: lax.fori_loop(0, 1, lambda i, c: c * x[i], x[0]),
    "in place": lambda x: lax.fori_loop(0, 4, lambda i, c: c.at[i].set(jnp.sin(x[i]) + c[i - 1]), x),
}
NATIVE_SCANS = ("forward", "reverse", "without carry", "without rows")


def test_loops_that_count() -> None:
    round_trip.assert_same(SCANS, _normal(4, 3), platforms=["cpu"], tolerance=1e-11)


@pytest.mark.parametrize("name", NATIVE_SCANS)
def test_scans_are_rebuilt(name: str) -> None:
    x = jnp.asarray(_normal(4, 3))
    report = Report()
    (found,) = _scans(round_trip.imported(SCANS[name], x, report=report), x)
    (expected,) = _scans(SCANS[name], x)
    assert _layout(found) == _layout(expected)
    assert report.recognised[control_flow.RAISED_LOOP] == 1
    assert not report.presumed


def test_symbolic_sizes_are_rebuilt() -> None:
    """Both the number of rounds and the width of a row are known only when the program is evaluated."""

    def function(x: jax.Array) -> Any:
        return lax.scan(_cell, jnp.ones(x.shape[1]), x)

    spec = jax.ShapeDtypeStruct(export.symbolic_shape("n, d"), jnp.float64)
    again = round_trip.imported(function, spec)
    x = jnp.asarray(_normal(4, 3))
    (found,), (expected,) = _scans(again, x), _scans(function, x)
    assert _layout(found) == _layout(expected)
    round_trip.assert_equal(again(x), function(x), tolerance=1e-15)


def _loop(condition: str, body: str, start: str = "0") -> str:
    """A loop over a counter of i32 and a float, which the body names %i and %c, and whose next values it names %j and %d."""
    return textwrap.dedent(f"""
    func.func @main(%x: tensor<5xf64>, %n: tensor<i32>) -> (tensor<i32>, tensor<f64>) {{
      %start = stablehlo.constant dense<{start}> : tensor<i32>
      %one = stablehlo.constant dense<1> : tensor<i32>
      %two = stablehlo.constant dense<2> : tensor<i32>
      %four = stablehlo.constant dense<4> : tensor<i32>
      %f = stablehlo.constant dense<1.0> : tensor<f64>
      %r:3 = stablehlo.while(%i = %start, %c = %f, %y = %x) : tensor<i32>, tensor<f64>, tensor<5xf64>
      cond {{
        {condition}
        stablehlo.return %t : tensor<i1>
      }} do {{
        %s = stablehlo.dynamic_slice %y, %i, sizes = [1] : (tensor<5xf64>, tensor<i32>) -> tensor<1xf64>
        %e = stablehlo.reshape %s : (tensor<1xf64>) -> tensor<f64>
        %m = stablehlo.multiply %c, %e : tensor<f64>
        %d = stablehlo.sine %m : tensor<f64>
        {body}
        stablehlo.return %j, %d, %y : tensor<i32>, tensor<f64>, tensor<5xf64>
      }}
      return %r#0, %r#1 : tensor<i32>, tensor<f64>
    }}
    """)


def _compare(a: str, direction: str, b: str, result: str = "t") -> str:
    return f"%{result} = stablehlo.compare {direction}, %{a}, %{b} : (tensor<i32>, tensor<i32>) -> tensor<i1>"


_ADD = "%j = stablehlo.add %i, %one : tensor<i32>"
COUNTED = {
    "LT": (_loop(_compare("i", "LT", "four"), _ADD), [0, 1, 2, 3], 4),
    "LE": (_loop(_compare("i", "LE", "four"), _ADD), [0, 1, 2, 3, 4], 5),
    "NE": (_loop(_compare("i", "NE", "four"), _ADD), [0, 1, 2, 3], 4),
    "limit first": (_loop(_compare("four", "GT", "i"), _ADD), [0, 1, 2, 3], 4),
    "step first": (_loop(_compare("i", "LT", "four"), "%j = stablehlo.add %one, %i : tensor<i32>"), [0, 1, 2, 3], 4),
    "down": (_loop(_compare("i", "GE", "one"), "%j = stablehlo.subtract %i, %one : tensor<i32>", "4"), [4, 3, 2, 1], 0),
    "by two": (_loop(_compare("i", "LT", "four"), "%j = stablehlo.add %i, %two : tensor<i32>", "1"), [1, 3], 5),
    "never": (_loop(_compare("i", "GT", "four"), _ADD), [], 0),
    "two limits": (
        _loop(
            f"{_compare('i', 'LT', 'four', 'a')} {_compare('i', 'LT', 'two', 'b')} "
            "%t = stablehlo.and %a, %b : tensor<i1>",
            _ADD,
        ),
        [0, 1],
        2,
    ),
    "computed limit": (
        _loop(f"%l = stablehlo.subtract %n, %one : tensor<i32> {_compare('i', 'LT', 'l')}", _ADD),
        [0, 1, 2, 3],
        4,
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_forms_of_counting(name: str) -> None:
    """Each form can be differentiated in reverse mode, which a while loop cannot."""
    module, rows, last = COUNTED[name]
    run = evaluate.function(reader.read(module))

    def expected(x: jax.Array) -> jax.Array:
        c = jnp.ones(())
        for row in rows:
            c = jnp.sin(c * x[row])
        return c

    x, n = jnp.asarray(_normal(5)), np.array(5, np.int32)
    assert int(run(x, n)[0]) == last
    for derivative in (lambda f: f, jax.grad, jax.hessian):
        found, want = jax.jit(derivative(lambda x: run(x, n)[1]))(x), jax.jit(derivative(expected))(x)
        np.testing.assert_allclose(found, want, rtol=1e-12, atol=1e-14)


ROWS_ARE_READ = {"LT": True, "NE": True, "down": True, "by two": False}


@pytest.mark.parametrize("name", ROWS_ARE_READ)
def test_rows_are_read_in_either_direction(name: str) -> None:
    run = evaluate.function(reader.read(COUNTED[name][0]))
    (scan,) = _scans(lambda x: run(x, np.array(5, np.int32)), jnp.ones(5))
    assert _layout(scan)[2] == int(ROWS_ARE_READ[name])


DYNAMIC = {
    "limit in data": (_loop(_compare("i", "LT", "n"), _ADD), 3),
    "step that changes": (
        _loop(
            _compare("i", "LT", "four"),
            "%k = stablehlo.add %i, %i : tensor<i32> %j = stablehlo.add %k, %one : tensor<i32>",
        ),
        3,
    ),
    "a missed limit": (_loop(_compare("i", "NE", "four"), "%j = stablehlo.add %i, %two : tensor<i32>", "2"), 1),
}


@pytest.mark.parametrize("name", ["limit in data", "step that changes"])
def test_other_loops_only_have_forward_mode(name: str) -> None:
    module, rounds = DYNAMIC[name]
    report = Report()
    run = evaluate.function(reader.read(module), report=report)
    x, n = jnp.asarray(_normal(5)), jnp.array(3, jnp.int32)

    def loss(x: jax.Array) -> jax.Array:
        return run(x, n)[1]

    visited = list(range(3)) if name == "limit in data" else [0, 1, 3]
    c = np.ones(())
    for row in visited:
        c = np.sin(c * x[row])
    assert len(visited) == rounds
    np.testing.assert_allclose(loss(x), c, rtol=1e-14)
    assert report.presumed == {control_flow.DYNAMIC_LOOP: 1}
    assert np.all(np.isfinite(jax.jacfwd(loss)(x)))
    with pytest.raises(ValueError, match=r"Reverse-mode differentiation does not work for lax\.while_loop"):
        jax.grad(loss)(x)


def test_a_counter_that_misses_its_limit_is_no_scan() -> None:
    """A counter that goes from 3 in steps of 2 is never 4, so the number of rounds depends on how integers wrap around."""
    module = _loop(_compare("i", "NE", "four"), "%j = stablehlo.add %i, %two : tensor<i32>", "3")
    report = Report()
    jaxpr = jax.make_jaxpr(evaluate.function(reader.read(module), report=report))(jnp.ones(5), jnp.array(3, jnp.int32))
    assert "while" in {each.primitive.name for each in jaxpr.eqns}
    assert report.presumed == {control_flow.DYNAMIC_LOOP: 1}


def test_a_counter_that_would_wrap_around_is_no_scan() -> None:
    module = textwrap.dedent("""
    func.func @main(%x: tensor<f64>) -> tensor<f64> {
      %start = stablehlo.constant dense<0> : tensor<i8>
      %step = stablehlo.constant dense<100> : tensor<i8>
      %limit = stablehlo.constant dense<127> : tensor<i8>
      %r:2 = stablehlo.while(%i = %start, %c = %x) : tensor<i8>, tensor<f64>
      cond {
        %t = stablehlo.compare LT, %i, %limit : (tensor<i8>, tensor<i8>) -> tensor<i1>
        stablehlo.return %t : tensor<i1>
      } do {
        %d = stablehlo.sine %c : tensor<f64>
        %j = stablehlo.add %i, %step : tensor<i8>
        stablehlo.return %j, %d : tensor<i8>, tensor<f64>
      }
      return %r#1 : tensor<f64>
    }
    """)
    report = Report()
    jax.make_jaxpr(evaluate.function(reader.read(module), report=report))(jnp.ones(()))
    assert report.presumed == {control_flow.DYNAMIC_LOOP: 1}


_WRITES = """
func.func @main(%x: tensor<3x2xf64>, %y: tensor<{rows}x2xf64>) -> tensor<{rows}x2xf64> {{
  %zero = stablehlo.constant dense<0> : tensor<i32>
  %one = stablehlo.constant dense<1> : tensor<i32>
  %two = stablehlo.constant dense<2> : tensor<i32>
  %three = stablehlo.constant dense<3> : tensor<i32>
  %r:3 = stablehlo.while(%i = %zero, %a = %x, %b = %y) : tensor<i32>, tensor<3x2xf64>, tensor<{rows}x2xf64>
  cond {{
    %t = stablehlo.compare LT, %i, %three : (tensor<i32>, tensor<i32>) -> tensor<i1>
    stablehlo.return %t : tensor<i1>
  }} do {{
    {read}
    %s = stablehlo.dynamic_slice %a, %p, %zero, sizes = [1, 2] : (tensor<3x2xf64>, tensor<i32>, tensor<i32>) -> tensor<1x2xf64>
    %e = stablehlo.sine %s : tensor<1x2xf64>
    {write}
    %c = stablehlo.dynamic_update_slice %b, %e, %q, %zero : (tensor<{rows}x2xf64>, tensor<1x2xf64>, tensor<i32>, tensor<i32>) -> tensor<{rows}x2xf64>
    %j = stablehlo.add %i, %one : tensor<i32>
    stablehlo.return %j, %a, %c : tensor<i32>, tensor<3x2xf64>, tensor<{rows}x2xf64>
  }}
  return %r#2 : tensor<{rows}x2xf64>
}}
"""
_UP, _DOWN = "= stablehlo.add %i, %zero : tensor<i32>", "= stablehlo.subtract %two, %i : tensor<i32>"
_SHIFTED = "= stablehlo.add %i, %one : tensor<i32>"


@pytest.mark.parametrize(
    ("read", "write", "rows", "xs", "ys"),
    [
        (_UP, _UP, 3, 1, 1),
        (_DOWN, _DOWN, 3, 1, 1),
        (_UP, _DOWN, 3, 1, 1),
        (_DOWN, _UP, 5, 1, 1),
        (_UP, _SHIFTED, 5, 1, 1),
        (_SHIFTED, _UP, 3, 0, 1),
        (_UP, _SHIFTED, 3, 1, 0),
    ],
)
def test_rows_in_any_order(read: str, write: str, rows: int, xs: int, ys: int) -> None:
    """A row outside of the array is moved inside by StableHLO, so such a loop reads or writes the whole array as before."""
    run = evaluate.function(reader.read(_WRITES.format(read=f"%p {read}", write=f"%q {write}", rows=rows)))
    x, y = jnp.asarray(_normal(3, 2)), jnp.asarray(_normal(rows, 2, seed=1))

    def expected(x: jax.Array, y: jax.Array) -> jax.Array:
        position = {_UP: lambda i: i, _DOWN: lambda i: 2 - i, _SHIFTED: lambda i: i + 1}
        for i in range(3):
            y = y.at[min(position[write](i), rows - 1)].set(jnp.sin(x[min(position[read](i), 2)]))
        return y

    (scan,) = _scans(run, x, y)
    assert _layout(scan)[2:4] == (xs, ys)
    np.testing.assert_array_equal(run(x, y)[0], expected(x, y))
    weights = _normal(rows, 2, seed=2)
    for argument in (0, 1):
        found = jax.grad(lambda *args: jnp.sum(weights * run(*args)[0]), argument)(x, y)
        want = jax.grad(lambda *args: jnp.sum(weights * expected(*args)), argument)(x, y)
        np.testing.assert_allclose(found, want, rtol=1e-14)


def test_an_endless_count_is_not_unrolled() -> None:
    """The number of rounds costs nothing while the program is read."""
    module = _loop(_compare("i", "LT", "n"), _ADD)
    run = evaluate.function(reader.read(module))
    (scan,) = _scans(lambda x: run(x, np.array(2**31 - 1, np.int32)), jnp.ones(5))
    assert scan.params["length"] == 2**31 - 1


def _rnn(weights: jax.Array, xs: jax.Array) -> jax.Array:
    def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(weights @ h + x)
        return h, h

    last, hidden = lax.scan(step, jnp.zeros(weights.shape[0]), xs)
    return jnp.sum(hidden**2) + jnp.sum(last)


def test_memory_of_a_recurrent_network_grows_as_natively() -> None:
    """A loop that carried its arrays whole would keep a copy of each for each round in reverse mode."""

    def hvp(function: Callable[..., Any], rounds: int) -> int:
        xs = jax.ShapeDtypeStruct((rounds, 8), jnp.float64)
        weights = jax.ShapeDtypeStruct((8, 8), jnp.float64)
        product = jax.jit(lambda w, v, x: jax.jvp(jax.grad(lambda w: function(w, x)), (w,), (v,))[1])
        return product.lower(weights, weights, xs).compile().memory_analysis().temp_size_in_bytes

    for rounds in (64, 512):
        specs = jax.ShapeDtypeStruct((8, 8), jnp.float64), jax.ShapeDtypeStruct((rounds, 8), jnp.float64)
        again = round_trip.imported(_rnn, *specs)
        assert hvp(again, rounds) <= 1.2 * hvp(_rnn, rounds)


# Branches.

BRANCHES: dict[str, Callable[[jax.Array], Any]] = {
    "two": lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
    "with values around": lambda x: lax.cond(x[0] > 0, lambda: x**2, lambda: jnp.sin(x) * x[1]),
    "three": lambda x: lax.switch(jnp.int32(jnp.floor(x[0])), [jnp.sin, jnp.cos, lambda x: x**3], x),
    "one": lambda x: lax.switch(jnp.int32(jnp.floor(x[0])), [jnp.sin], x),
    "in a loop": lambda x: lax.fori_loop(0, 3, lambda i, c: lax.cond(i % 2 == 0, jnp.sin, jnp.cos, c), x),
    "batched": lambda x: jax.vmap(lambda a: lax.cond(a > 0, jnp.sin, jnp.cos, a))(x),
}


def test_branches() -> None:
    points = [np.array([first, 0.7]) for first in (-0.5, 0.5, 1.5)]
    round_trip.assert_same(BRANCHES, *points, platforms=["cpu"])


_CASE = """
func.func @main(%i: tensor<i32>, %x: tensor<f64>) -> tensor<f64> {
  %r = "stablehlo.case"(%i) ({
    %a = stablehlo.sine %x : tensor<f64>
    stablehlo.return %a : tensor<f64>
  }, {
    %a = stablehlo.cosine %x : tensor<f64>
    stablehlo.return %a : tensor<f64>
  }, {
    %a = stablehlo.tanh %x : tensor<f64>
    stablehlo.return %a : tensor<f64>
  }) : (tensor<i32>) -> tensor<f64>
  return %r : tensor<f64>
}
"""


@pytest.mark.parametrize("index", [-(2**31), -1, 0, 1, 2, 3, 2**31 - 1])
def test_an_index_out_of_range_takes_the_last_branch(index: int) -> None:
    run = evaluate.function(reader.read(_CASE))
    expected = {0: np.sin, 1: np.cos}.get(index, np.tanh)(0.3)
    for given in (np.array(index, np.int32), jnp.array(index, jnp.int32)):
        np.testing.assert_allclose(run(given, jnp.array(0.3))[0], expected, rtol=1e-15)


@pytest.mark.parametrize("predicate", [True, False])
def test_a_known_predicate_takes_its_branch(predicate: bool) -> None:
    module = """
    func.func @main(%p: tensor<i1>, %x: tensor<f64>) -> tensor<f64> {
      %r = "stablehlo.if"(%p) ({
        %a = stablehlo.sine %x : tensor<f64>
        stablehlo.return %a : tensor<f64>
      }, {
        %a = stablehlo.cosine %x : tensor<f64>
        stablehlo.return %a : tensor<f64>
      }) : (tensor<i1>) -> tensor<f64>
      return %r : tensor<f64>
    }
    """
    run = evaluate.function(reader.read(module))
    expected = (np.sin if predicate else np.cos)(0.3)
    np.testing.assert_allclose(run(np.array(predicate), jnp.array(0.3))[0], expected, rtol=1e-15)
    np.testing.assert_allclose(run(jnp.array(predicate), jnp.array(0.3))[0], expected, rtol=1e-15)
    jaxpr = jax.make_jaxpr(lambda x: run(np.array(predicate), x))(0.3)
    assert [each.primitive.name for each in jaxpr.eqns] == ["sin" if predicate else "cos"]


def test_calls() -> None:
    inner = jax.jit(lambda x, y: (jnp.sin(x) * y, y))

    def function(x: jax.Array) -> jax.Array:
        first, second = inner(x, x + 1)
        return inner(first, second)[0]

    round_trip.assert_same({"calls": function}, _normal(3))


def test_a_refusal_inside_a_loop_names_the_operation() -> None:
    module = _loop(_compare("i", "LT", "four"), f"%k = stablehlo.partition_id : tensor<ui32> {_ADD}")
    with pytest.raises(Refused, match=r"stablehlo\.partition_id"):
        evaluate.function(reader.read(module))(jnp.ones(5), np.array(5, np.int32))
