"""Sends jax functions through StableHLO and back, and compares them with themselves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from hvpd_server.importer import evaluate, reader
from hvpd_server.importer.table import Report

PLATFORMS = ("cpu", "cuda")
"""Platforms for which functions are lowered; the imported function runs on the test's
own.
"""


def imported(
    function: Callable[..., Any], *specs: Any, platform: str = "cpu", report: Report | None = None
) -> Callable[..., Any]:
    """Return a function after a round trip through StableHLO.

    Args:
        function: Function of arrays.
        specs: Arguments, or their shapes, with symbolic extents where wanted.
        platform: Platform for which the function is lowered.
        report: Where the importer notes derivative rules.
    """
    exported = export.export(jax.jit(function), platforms=[platform])(*specs)
    run = evaluate.function(reader.read(bytes(exported.serialize())), platform=platform, report=report)
    kept = exported.module_kept_var_idx

    def again(*args: Any) -> Any:
        flat = [jnp.asarray(each) for each in jax.tree.leaves(args)]
        return exported.out_tree.unflatten(run(*(flat[index] for index in kept)))

    return again


def text(module: str, *args: Any) -> list[Any]:
    """Run the main function of a module in MLIR's text; NumPy arguments count as
    known.
    """
    return evaluate.function(reader.read(module))(*args)


def assert_equal(found: Any, expected: Any, *, tolerance: float = 0.0, name: str = "") -> None:
    """Assert equal trees of arrays, with NaN in the same places."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype, name
        if tolerance and jnp.issubdtype(want.dtype, jnp.inexact):
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want), err_msg=name)


def assert_same(
    functions: Mapping[str, Callable[..., Any]],
    *points: Any,
    platforms: Sequence[str] = PLATFORMS,
    derivatives: bool = True,
    tolerance: float = 1e-12,
) -> None:
    """Assert that the values, gradients and HVPs of functions survive the round trip.

    All functions are compiled as one program, because most of the time goes into
    starting a compilation.

    Args:
        functions: Functions of one array, by name.
        points: Arrays of the same shape and dtype.
        platforms: Platforms for which the functions are lowered.
        derivatives: Whether to compare the gradient and an HVP of a weighted sum of
            squares of the results.
        tolerance: Relative and absolute tolerance for floats; 0 asserts equal bits.
    """

    def everything(each: Callable[..., Any], x: Any) -> dict[str, Any]:
        def loss(x: Any) -> Any:
            leaves = [leaf for leaf in jax.tree.leaves(each(x)) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
            weights = [jnp.sin(1.0 + jnp.arange(leaf.size).reshape(leaf.shape)) for leaf in leaves]
            return sum(jnp.sum(jnp.abs(leaf) ** 2 * weight) for leaf, weight in zip(leaves, weights, strict=True))

        if not derivatives:
            return {"value": each(x)}
        gradient, product = jax.jvp(jax.grad(loss), (x,), (jnp.cos(jnp.arange(x.size)).reshape(x.shape),))
        return {"value": each(x), "gradient": gradient, "HVP": product}

    def program(each: Mapping[str, Callable[..., Any]]) -> Callable[..., dict[str, Any]]:
        return lambda x: {name: everything(function, x) for name, function in each.items()}

    native = jax.jit(program(functions))
    expected = [native(point) for point in points]
    seen: dict[str, set[str]] = {name: set() for name in functions}
    for platform in platforms:
        again = {name: imported(each, points[0], platform=platform) for name, each in functions.items()}
        programs = {name: str(jax.make_jaxpr(each)(points[0])) for name, each in again.items()}
        # Lowerings for several platforms are often one program: compile it once.
        again = {name: each for name, each in again.items() if programs[name] not in seen[name]}
        compiled = jax.jit(program(again))
        for point, want in zip(points, expected, strict=True):
            for name, found in (compiled(point) if again else {}).items():
                for what, value in found.items():
                    where = f"{what} of {name} for {platform} at {point}"
                    assert_equal(value, want[name][what], tolerance=tolerance, name=where)
        for name in functions:
            seen[name].add(programs[name])
