"""Objectives that solve inside, by lineax, optimistix and diffrax, and batch norms of
equinox, against native jax.

A process of its own registers them, because EQX_ON_ERROR is read at the first import.
"""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, warnings
import diffrax, equinox as eqx, jax, jax.numpy as jnp, lineax, numpy as np, optimistix, hvpd

jax.config.update("jax_enable_x64", True)
B = np.random.default_rng(0).normal(size=(6, 6)) + 4 * np.eye(6)
b = np.linspace(-1, 2, 6)
X, Y = np.linspace(-1, 1, 6), np.array([1.0, 0.5, 1.2, 0.7])
SPD = lineax.positive_semidefinite_tag


def linear(solver, tag=None):
    def fun(x):
        A = B + jnp.diag(x**2)
        operator = lineax.MatrixLinearOperator(A @ A.T, tag) if tag else lineax.MatrixLinearOperator(A)
        return jnp.sum(lineax.linear_solve(operator, b * jnp.cos(x), solver).value ** 2)

    return fun, X


def batched(x):
    solve = lambda s: lineax.linear_solve(lineax.MatrixLinearOperator(B + s * jnp.diag(x)), b, lineax.LU()).value
    return jnp.sum(jax.vmap(solve)(jnp.array([0.5, 1.0])) ** 2)


def root(solver):
    def fun(x):
        solution = optimistix.root_find(lambda y, x: y**3 + 2 * y - jnp.sin(x) - b, solver, jnp.zeros(6), args=x)
        return jnp.sum(solution.value**2 * x)

    return fun, X


def fixed_point(x):
    solver = optimistix.FixedPointIteration(1e-13, 1e-13)
    return jnp.sum(optimistix.fixed_point(lambda y, x: jnp.cos(0.3 * y + x), solver, jnp.zeros(6), args=x).value ** 3)


def least_squares(x):
    residuals = lambda y, x: jnp.concatenate([y - x, 0.5 * (y**2 - 1)])
    solver = optimistix.LevenbergMarquardt(1e-12, 1e-12)
    return jnp.sum(optimistix.least_squares(residuals, solver, jnp.ones(6), args=x).value ** 2)


def minimum(x):
    value = lambda y, x: jnp.sum((y - x) ** 2 + 0.1 * (y - 1) ** 4)
    return jnp.sum(jnp.sin(optimistix.minimise(value, optimistix.BFGS(1e-12, 1e-12), jnp.zeros(6), args=x).value))


def ode(adjoint):
    def fun(x):
        field = lambda t, y, a: jnp.stack([y[1], a[1] * (1 - y[0] ** 2) * y[1] - a[0] * y[0]])
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Heun(), 0.0, 0.5, 0.1, x[:2], args=x[2:], adjoint=adjoint, max_steps=8
        )
        return jnp.sum(found.ys**2)

    return fun, Y


norm = eqx.nn.BatchNorm(6, axis_name="batch", mode="batch")
state = eqx.nn.State(norm)
weights, rest = eqx.partition(norm, eqx.is_inexact_array)
batch = np.sin(np.arange(30.0)).reshape(5, 6)
_, trained = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(batch, state)


def batch_norm(state, inference):
    def fun(x):
        module = eqx.combine(eqx.tree_at(lambda w: w.weight, weights, x), rest)
        module = eqx.nn.inference_mode(module, inference)
        found, after = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(batch * x, state)
        return jnp.sum(jnp.sin(found) ** 2) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(after) if leaf.ndim)

    return fun, X


CASES = {
    "BatchNorm": batch_norm(state, False),
    "BatchNorm inference": batch_norm(trained, True),
    "LU": linear(lineax.LU()),
    "QR": linear(lineax.QR()),
    "CG": linear(lineax.CG(1e-13, 1e-13), SPD),
    "batched": (batched, X),
    "Newton": root(optimistix.Newton(1e-12, 1e-12)),
    "fixed point": (fixed_point, X),
    "Levenberg-Marquardt": (least_squares, X),
    "BFGS": (minimum, X),
    "diffrax": ode(diffrax.DirectAdjoint()),
}
REFUSED = {
    "default adjoint": ode(diffrax.RecursiveCheckpointAdjoint()),
    "tall": (lambda x: jnp.sum(lineax.linear_solve(
        lineax.MatrixLinearOperator(jnp.concatenate([B + jnp.diag(x), B])), jnp.ones(12), lineax.QR()).value ** 2), X),
}
client = hvpd.connect(sys.argv[1])
results = {}
for name, (fun, x) in CASES.items():
    v = np.cos(np.arange(len(x)))
    truth = jax.jit(lambda x, v, fun=fun: (*jax.value_and_grad(fun)(x), jax.jvp(jax.grad(fun), (x,), (v,))[1]))
    value, gradient, expected = truth(x, v)
    point = client.register(fun, x, name="solves").at(x)
    pairs = (point.value, value), (point.gradient, gradient), (point.hessian() @ v, expected)
    results[name] = [float(np.max(np.abs(a - np.asarray(b))) / np.max(np.abs(b))) for a, b in pairs]
    client.delete("solves")  # So that the server ends the compiles of its other programs.
for name, (fun, x) in REFUSED.items():
    try:
        client.register(fun, x)
    except hvpd.InvalidArgumentError as error:
        results[name] = str(error)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(server):
    """Run all cases in one process, because the imports take seconds."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, server.address],
        check=False,
        env=os.environ | {"EQX_ON_ERROR": "nan"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "name",
    [
        *("LU", "QR", "CG", "batched", "Newton", "fixed point", "Levenberg-Marquardt", "BFGS", "diffrax"),
        *("BatchNorm", "BatchNorm inference"),
    ],
)
def test_value_gradient_and_product_are_those_of_native_jax(results, name):
    value, gradient, product = results[name]
    assert max(value, gradient) < 1e-12
    assert product < 1e-10


def test_a_loop_that_jax_differentiates_once_names_the_other_adjoint(results):
    assert "adjoint=diffrax.DirectAdjoint()" in results["default adjoint"]
    assert "any_rows" not in results["default adjoint"]


def test_a_least_squares_solve_is_refused_and_not_wrong(results):
    assert "whose rule is differentiated again" in results["tall"]
