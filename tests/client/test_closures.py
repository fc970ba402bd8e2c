"""Values that functions with derivative rules close over, or nested jits hold: lifted,
and right by jax's own derivatives.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd._registration import export as _export
from hvpd._registration import lift, stages
from hvpd_server.importer import reader
from tests.importer.marked import imported

pytestmark = pytest.mark.slow

LARGE = np.random.default_rng(0).normal(size=(300, 20))
SPEC = jax.ShapeDtypeStruct((20,), jnp.float32)


def _jvp(A):
    @jax.custom_jvp
    def fun(x):
        return jnp.sum(jnp.tanh(A() @ x))

    @fun.defjvp
    def _(primals, tangents):
        (x,), (v,) = primals, tangents
        return fun(x), jnp.sum((1 - jnp.tanh(A() @ x) ** 2) * (A() @ v))

    return fun


def _vjp(A):
    @jax.custom_vjp
    def fun(x):
        return jnp.sum(jnp.tanh(A() @ x))

    def backward(x, g):
        return (g * (A().T @ (1 - jnp.tanh(A() @ x) ** 2)),)

    fun.defvjp(lambda x: (fun(x), x), backward)
    return fun


def _in_scan(fun):
    return lambda x: jax.lax.scan(lambda total, _: (total + fun(x), None), jnp.zeros(()), None, length=2)[0]


AROUND = {
    "alone": lambda fun: fun,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": _in_scan,
    "scan of jit": lambda fun: _in_scan(jax.jit(fun)),
    "cond of jit": lambda fun: lambda x: jax.lax.cond(x[0] > -9, jax.jit(fun), jnp.sum, x),
    "vmap": lambda fun: lambda x: jnp.sum(jax.vmap(lambda s: fun(s * x))(jnp.ones(2, x.dtype))),
    "while": lambda fun: lambda x: jax.lax.fori_loop(0, 2, lambda _, total: total + fun(x), jnp.zeros((), x.dtype)),
}


@pytest.mark.parametrize("before", [False, True], ids=["", "traced before"])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize(
    "made", [_jvp, _vjp, lambda A: lambda x: jnp.sum(jnp.tanh(A() @ x))], ids=["jvp", "vjp", "plain"]
)
def test_large_arrays_leave_every_call(made, around, before):
    """The array is lifted once, and the program is small. The values stay."""
    array = jnp.asarray(LARGE, jnp.float32)
    fun = AROUND[around](made(lambda: array))
    if before:
        jax.jit(fun)(jnp.ones(20))
        fun = jax.jit(fun)
    with lift.forgetting():
        closed, _ = lift.trace(fun, [SPEC], widened=False, lift_bytes=_export.LIFT_BYTES)
        captured, lifted = lift.lift(closed, _export.LIFT_BYTES)
    assert [each.shape for each in captured] == [LARGE.shape]
    x = jnp.linspace(-1, 1, 20)
    np.testing.assert_allclose(lifted(captured, [x])[0], fun(x), rtol=1e-6)
    exported = _export.export(fun, np.zeros(20, np.float32), (), platforms=("cpu",), precision="highest")
    assert sum(program.size_bytes for program in exported.bundle.programs.values()) < 8000


def _cube(kind, factor):
    """Return b -> factor * b**3, whose rule closes over the factor."""
    if kind == "vjp":
        cube = jax.custom_vjp(lambda b: b**3 * factor)
        cube.defvjp(lambda b: (b**3 * factor, b), lambda b, g: (3 * b**2 * g * factor,))
    else:
        cube = jax.custom_jvp(lambda b: b**3 * factor)
        cube.defjvp(lambda p, t: (cube(*p), 3 * p[0] ** 2 * t[0] * factor))
    return cube


def _bound(kind, value):
    """Return loss(x, A), whose rule closes over value(x, A)."""

    return lambda x, A: jnp.sum(_cube(kind, value(x, A))(x))


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_rule_may_close_over_data_and_not_over_x(kind, jitted):
    specs = [jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((4, 4), jnp.float32)]
    x, A = jnp.arange(1.0, 5.0), jnp.eye(4) + 0.1

    def subject(fun):
        fun = jax.jit(fun) if jitted else fun
        given = stages.Subject(lambda leaves: leaves[0], lambda leaves: leaves, specs, 1, 1 << 14, widened=False)
        found = given.trace(fun)[1]["objective"].fun
        return lambda x, A: found(x, A)[0]

    data = lambda x, A: jnp.tanh(A @ jnp.ones(4))  # noqa: E731
    found = subject(_bound(kind, data))
    expected = lambda x, A: jnp.sum(x**3 * data(x, A))  # noqa: E731
    for derivative in (lambda fun: fun, jax.grad, lambda fun: jax.grad(lambda x, A: jnp.sum(jax.grad(fun)(x, A) ** 2))):
        np.testing.assert_allclose(derivative(found)(x, A), derivative(expected)(x, A), rtol=1e-5)
    constant = jax.grad(_bound(kind, lambda x, A: jnp.tanh(jax.lax.stop_gradient(x))))(x, A)
    stopped = subject(_bound(kind, lambda x, A: jnp.tanh(jax.lax.stop_gradient(x))))
    np.testing.assert_allclose(jax.grad(stopped)(x, A), constant, rtol=1e-5)
    with pytest.raises(hvpd.InvalidArgumentError, match="closes over a value that depends on x"):
        subject(_bound(kind, lambda x, A: jnp.tanh(A @ x)))


def _inside_a_rule(outer, kind, value, *, jitted):
    """Return a function whose rule makes a function with rules over value(x)."""

    def slope(x):
        made = _cube(kind, value(x))
        return (jax.jit(made) if jitted else made)(x)

    if outer == "vjp":
        fun = jax.custom_vjp(lambda x: jnp.sum(x**2))
        fun.defvjp(lambda x: (jnp.sum(x**2), x), lambda x, g: (g * slope(x),))
    else:
        fun = jax.custom_jvp(lambda x: jnp.sum(x**2))
        fun.defjvp(lambda p, t: (fun(*p), jnp.sum(slope(p[0]) * t[0])))
    return fun


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
@pytest.mark.parametrize("outer", ["jvp", "vjp"])
@pytest.mark.parametrize(("jitted", "before"), [(False, ""), (False, "differentiated before"), (True, "traced before")])
def test_a_function_made_in_a_rule_is_right_or_refused(outer, kind, jitted, before):
    """The truth is jax's reverse mode: a custom_vjp has no forward mode."""
    x = jnp.arange(1.0, 5.0)

    def made(value, before=""):
        fun = _inside_a_rule(outer, kind, value, jitted=jitted)
        if before:
            fun = jax.jit(fun)
            fun(x)
        if before == "differentiated before":
            jax.jit(jax.grad(fun))(x)
        return fun

    def program(fun):
        exported = _export.export(fun, np.asarray(x), (), platforms=("cpu",), precision="highest")
        return imported(reader.read(exported.blobs[exported.bundle.programs["objective"].digest]))

    stopped = lambda x: jnp.sin(jax.lax.stop_gradient(x))  # noqa: E731
    expected = jax.jacrev(jax.grad(made(stopped)))(x)
    np.testing.assert_allclose(jax.jacrev(jax.grad(program(made(stopped, before))))(x), expected, rtol=1e-5)
    with pytest.raises(Exception, match=r"tracer|custom_vjp|float0|Tracer|JVP"):
        jax.jacrev(jax.grad(made(jnp.sin)))(x)
    with pytest.raises(hvpd.InvalidArgumentError, match="closes over a value that depends on x"):
        program(made(jnp.sin, before))


def test_large_arrays_of_keys_are_lifted_as_their_bits():
    keys = jax.random.split(jax.random.key(3), 5000)
    fun = lambda x: jnp.sum(x) * jnp.sum(jax.vmap(jax.random.normal)(keys))  # noqa: E731
    closed, _ = lift.trace(fun, [SPEC], widened=False, lift_bytes=_export.LIFT_BYTES)
    captured, lifted = lift.lift(closed, _export.LIFT_BYTES)
    np.testing.assert_array_equal(captured[0], jax.random.key_data(keys))
    np.testing.assert_allclose(lifted(captured, [jnp.ones(20)])[0], fun(jnp.ones(20)), rtol=1e-6)
