"""Calls, branches and loops against jax's own. A loop that counts becomes a scan again,
with the memory of a scan.
"""

import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax, nn

from hvpd._registration import marks
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
    """Return the length, the direction, and the numbers of xs, ys and carried floats of
    a scan.
    """
    parameters = scan.params
    consts, carry = marks._scan_counts(parameters)
    carried = parameters["jaxpr"].out_avals[:carry]
    return (
        parameters["length"],
        parameters["reverse"],
        len(scan.invars) - consts - carry,
        len(scan.outvars) - carry,
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
    """Both the number of rounds and the width of a row are known only when the program
    is evaluated.
    """

    def function(x: jax.Array) -> Any:
        return lax.scan(_cell, jnp.ones(x.shape[1]), x)

    spec = jax.ShapeDtypeStruct(export.symbolic_shape("n, d"), jnp.float64)
    again = round_trip.imported(function, spec)
    x = jnp.asarray(_normal(4, 3))
    (found,), (expected,) = _scans(again, x), _scans(function, x)
    assert _layout(found) == _layout(expected)
    round_trip.assert_equal(again(x), function(x), tolerance=1e-15)


def _loop(condition: str, body: str, start: str = "0") -> str:
    """Return a loop over a counter of i32 and a float, which the body names %i and %c.
    Their next values are %j and %d.
    """
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
    """A counter that goes from 3 in steps of 2 is never 4, so the number of rounds
    depends on how integers wrap around.
    """
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
    """A row outside of the array is moved inside by StableHLO, so such a loop reads or
    writes the whole array as before.
    """
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
    """A loop that carried its arrays whole would keep a copy of each for each round in
    reverse mode.
    """

    def hvp(function: Callable[..., Any], rounds: int) -> int:
        xs = jax.ShapeDtypeStruct((rounds, 8), jnp.float64)
        weights = jax.ShapeDtypeStruct((8, 8), jnp.float64)
        product = jax.jit(lambda w, v, x: jax.jvp(jax.grad(lambda w: function(w, x)), (w,), (v,))[1])
        return product.lower(weights, weights, xs).compile().memory_analysis().temp_size_in_bytes

    for rounds in (64, 512):
        specs = jax.ShapeDtypeStruct((8, 8), jnp.float64), jax.ShapeDtypeStruct((rounds, 8), jnp.float64)
        again = round_trip.imported(_rnn, *specs)
        assert hvp(again, rounds) <= 1.2 * hvp(_rnn, rounds)


# Loops as TensorFlow writes them: regions that only call functions, and reshapes that
# change nothing.

_STATE = "tensor<i32>, tensor<i32>, tensor<i32>, tensor<3xf64>, tensor<3x3xf64>, tensor<5x3xf64>"
_ARGUMENTS = (
    "%i: tensor<i32>, %n: tensor<i32>, %k: tensor<i32>, %s: tensor<3xf64>, %w: tensor<3x3xf64>, %y: tensor<5x3xf64>"
)


def _sweep(rounds: int, condition: str, body: str) -> str:
    """Return a loop over two counters from 0, a limit and three arrays, whose regions
    only call functions. Its state is %r#3.
    """
    return f"""
      %zero = stablehlo.constant dense<0> : tensor<i32>
      %limit = stablehlo.constant dense<{rounds}> : tensor<i32>
      %r:6 = stablehlo.while(%i = %zero, %n = %limit, %k = %zero, %s = %h, %v = %w, %z = %y) : {_STATE}
      cond {{
        %t = func.call @{condition}(%i, %n, %k, %s, %v, %z) : ({_STATE}) -> tensor<i1>
        stablehlo.return %t : tensor<i1>
      }} do {{
        %o:6 = func.call @{body}(%i, %n, %k, %s, %v, %z) : ({_STATE}) -> ({_STATE})
        stablehlo.return %o#0, %o#1, %o#2, %o#3, %o#4, %o#5 : {_STATE}
      }}
    """


def _condition(name: str, rounds: int) -> str:
    return f"""
    func.func private @{name}_limits({_ARGUMENTS}) -> tensor<i1> {{
      %limit = stablehlo.constant dense<{rounds}> : tensor<i32>
      %a = stablehlo.compare LT, %i, %n : (tensor<i32>, tensor<i32>) -> tensor<i1>
      %b = stablehlo.compare LT, %k, %limit : (tensor<i32>, tensor<i32>) -> tensor<i1>
      %c = stablehlo.and %a, %b : tensor<i1>
      %t = stablehlo.reshape %c : (tensor<i1>) -> tensor<i1>
      return %t : tensor<i1>
    }}
    func.func private @{name}({_ARGUMENTS}) -> tensor<i1> {{
      %t = call @{name}_limits(%i, %n, %k, %s, %w, %y) : ({_STATE}) -> tensor<i1>
      return %t : tensor<i1>
    }}
    """


def _body(name: str, step: str) -> str:
    return f"""
    func.func private @{name}({_ARGUMENTS}) -> ({_STATE}) {{
      %one = stablehlo.constant dense<1> : tensor<i32>
      %i1 = stablehlo.add %i, %one : tensor<i32>
      %k1 = stablehlo.add %one, %k : tensor<i32>
      {step}
      %a = stablehlo.reshape %i1 : (tensor<i32>) -> tensor<i32>
      %b = stablehlo.reshape %n : (tensor<i32>) -> tensor<i32>
      %c = stablehlo.convert %k1 : tensor<i32>
      %d = stablehlo.reshape %s1 : (tensor<3xf64>) -> tensor<3xf64>
      %e = stablehlo.reshape %w : (tensor<3x3xf64>) -> tensor<3x3xf64>
      %f = stablehlo.reshape %y : (tensor<5x3xf64>) -> tensor<5x3xf64>
      return %a, %b, %c, %d, %e, %f : {_STATE}
    }}
    """


_CELL = (
    "%s1 = call @cell(%k, %s, %w, %y) : (tensor<i32>, tensor<3xf64>, tensor<3x3xf64>, tensor<5x3xf64>) -> tensor<3xf64>"
)
_SWEEP = "call @sweep({state}, %w, %y) : (tensor<3xf64>, tensor<3x3xf64>, tensor<5x3xf64>) -> tensor<3xf64>"
_PASSES = f"""
      %s0 = {_SWEEP.format(state="%s")}
      {_CELL.replace("%s,", "%s0,")}
"""


def _framed(main: str) -> str:
    """Return a recurrent network. @sweep runs @cell for all rows of %y, and @passes
    runs @sweep and one more @cell.
    """
    return f"""
    func.func private @row(%k: tensor<i32>, %y: tensor<5x3xf64>) -> tensor<3xf64> {{
      %zero = stablehlo.constant dense<0> : tensor<i32>
      %rows = stablehlo.constant dense<5> : tensor<i32>
      %a = stablehlo.reshape %k : (tensor<i32>) -> tensor<1xi32>
      %b = stablehlo.reshape %zero : (tensor<i32>) -> tensor<1xi32>
      %c = stablehlo.concatenate %a, %b, dim = 0 : (tensor<1xi32>, tensor<1xi32>) -> tensor<2xi32>
      %d = stablehlo.slice %c [0:1] : (tensor<2xi32>) -> tensor<1xi32>
      %e = stablehlo.reshape %d : (tensor<1xi32>) -> tensor<i32>
      %negative = stablehlo.compare LT, %e, %zero : (tensor<i32>, tensor<i32>) -> tensor<i1>
      %f = stablehlo.add %rows, %e : tensor<i32>
      %g = stablehlo.select %negative, %f, %e : tensor<i1>, tensor<i32>
      %x = stablehlo.dynamic_slice %y, %g, %zero, sizes = [1, 3]
        : (tensor<5x3xf64>, tensor<i32>, tensor<i32>) -> tensor<1x3xf64>
      %z = stablehlo.reshape %x : (tensor<1x3xf64>) -> tensor<3xf64>
      return %z : tensor<3xf64>
    }}
    func.func private @squares(%s: tensor<3xf64>) -> tensor<f64> {{
      %zero = stablehlo.constant dense<0.0> : tensor<f64>
      %p = stablehlo.multiply %s, %s : tensor<3xf64>
      %q = stablehlo.reduce(%p init: %zero) applies stablehlo.add across dimensions = [0]
        : (tensor<3xf64>, tensor<f64>) -> tensor<f64>
      return %q : tensor<f64>
    }}
    func.func private @relu(%s: tensor<3xf64>) -> tensor<3xf64> {{
      %zero = stablehlo.constant dense<0.0> : tensor<3xf64>
      %r = stablehlo.maximum %s, %zero : tensor<3xf64>
      return %r : tensor<3xf64>
    }}
    func.func private @cell(%k: tensor<i32>, %s: tensor<3xf64>, %w: tensor<3x3xf64>, %y: tensor<5x3xf64>) -> tensor<3xf64> {{
      %x = call @row(%k, %y) : (tensor<i32>, tensor<5x3xf64>) -> tensor<3xf64>
      %a = stablehlo.dot %w, %s : (tensor<3x3xf64>, tensor<3xf64>) -> tensor<3xf64>
      %b = stablehlo.add %a, %x : tensor<3xf64>
      %c = stablehlo.tanh %b : tensor<3xf64>
      %d = call @relu(%s) : (tensor<3xf64>) -> tensor<3xf64>
      %p = call @squares(%s) : (tensor<3xf64>) -> tensor<f64>
      %q = call @squares(%x) : (tensor<3xf64>) -> tensor<f64>
      %m = stablehlo.multiply %p, %q : tensor<f64>
      %n = stablehlo.broadcast_in_dim %m, dims = [] : (tensor<f64>) -> tensor<3xf64>
      %e = stablehlo.add %c, %d : tensor<3xf64>
      %f = stablehlo.add %e, %n : tensor<3xf64>
      %g = stablehlo.sine %f : tensor<3xf64>
      return %g : tensor<3xf64>
    }}
    {_condition("five", 5)} {_body("step", _CELL)}
    func.func private @sweep(%h: tensor<3xf64>, %w: tensor<3x3xf64>, %y: tensor<5x3xf64>) -> tensor<3xf64> {{
      {_sweep(5, "five", "step")}
      return %r#3 : tensor<3xf64>
    }}
    {_condition("two", 2)} {_body("passes", _PASSES)}
    func.func @main(%w: tensor<3x3xf64>, %y: tensor<5x3xf64>) -> tensor<f64> {{
      %h = stablehlo.constant dense<0.0> : tensor<3xf64>
      {main}
      %l = call @squares(%last) : (tensor<3xf64>) -> tensor<f64>
      return %l : tensor<f64>
    }}
    """


def _take(name: str) -> str:
    return f"%last = stablehlo.reshape {name} : (tensor<3xf64>) -> tensor<3xf64>"


FRAMED = {
    "in the entry": (_framed(f"{_sweep(5, 'five', 'step')} {_take('%r#3')}"), [0, 1, 2, 3, 4], 1),
    "in a function": (_framed(f"%a = {_SWEEP.format(state='%h')} {_take('%a')}"), [0, 1, 2, 3, 4], 1),
    "one after the other": (
        _framed(f"%a = {_SWEEP.format(state='%h')} %b = {_SWEEP.format(state='%a')} {_take('%b')}"),
        [0, 1, 2, 3, 4] * 2,
        2,
    ),
    "nested": (_framed(f"{_sweep(2, 'two', 'passes')} {_take('%r#3')}"), [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 1], 2),
}


@pytest.mark.parametrize("name", FRAMED)
def test_loops_whose_regions_only_call_functions(name: str) -> None:
    """Such a loop becomes a scan that reads its rows. @relu stays a call, because it
    has a derivative rule by its name.
    """
    module, rows, loops = FRAMED[name]
    report = Report()
    run = evaluate.function(reader.read(module), report=report)

    def expected(w: jax.Array, y: jax.Array) -> jax.Array:
        def cell(s: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return jnp.sin(jnp.tanh(w @ s + x) + nn.relu(s) + jnp.sum(s**2) * jnp.sum(x**2)), None

        return jnp.sum(lax.scan(cell, jnp.zeros(3), y[np.array(rows)])[0] ** 2)

    w, y = jnp.asarray(_normal(3, 3)) / 3, jnp.asarray(_normal(5, 3, seed=1)) / 3
    for derivative in (lambda f: f, jax.grad, jax.hessian):
        found, want = jax.jit(derivative(lambda w: run(w, y)[0]))(w), jax.jit(derivative(lambda w: expected(w, y)))(w)
        np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)
    assert report.recognised[control_flow.RAISED_LOOP] == 3 * loops
    assert any("@relu" in each for each in report.recognised)
    assert not report.presumed
    scans = _scans(run, w, y)
    inner = scans if name != "nested" else _inside(scans[0])
    assert {_layout(each)[0] for each in inner} == {5}
    assert {_layout(each)[2] for each in inner} == {1}


def _inside(scan: Any) -> list[Any]:
    return [each for each in scan.params["jaxpr"].jaxpr.eqns if each.primitive.name == "scan"]


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
