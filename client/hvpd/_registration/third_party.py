"""Functions of jax in place of primitives of lineax and equinox. Needs jax.

lineax solves linear systems by a primitive with rules of its own. For a square operator
these rules are those of `jax.lax.custom_linear_solve`, which a mark can carry. equinox
batches its primitives by the primitive "vprim".
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.flatten_util

Flat = Callable[..., Sequence[Any]]
"""A function of flat arrays."""

NAMES: Final = frozenset(["linear_solve", "vprim"])
"""Names of the primitives that `function` knows."""


class NoRuleError(Exception):
    """The derivative of a function that may be evaluated only."""


def forbids(error: Exception) -> bool:
    """Return whether a rule raised because its function must not be differentiated."""
    return type(error) is RuntimeError and str(error).startswith("Unexpected tangent")


def function(primitive: Any, params: Mapping[str, Any], count: int) -> Flat:
    """Return a function with the values and derivatives of a primitive.

    It uses the primitive itself for values.

    Args:
        primitive: One of `NAMES`.
        params: Its parameters.
        count: Number of its operands.
    """
    if primitive.name == "vprim":
        inner, own = params["prim"], dict(params["params"])
        batched: Flat = jax.vmap(
            function(inner, own, count) if inner.name in NAMES else lambda *args: inner.bind(*args, **own),
            in_axes=tuple(params["__batch_axes"]),
            axis_size=params["__axis_size"],
            axis_name=params["__axis_name"],
        )
        return batched
    return _linear_solve(primitive, params, count)


def _linear_solve(primitive: Any, params: Mapping[str, Any], count: int) -> Flat:
    """Return a linear solve whose derivative is another one.

    For an operator that is not square it may be evaluated only.
    """

    def values(*args: Any) -> list[Any]:
        return list(primitive.bind(*args, **params))

    positions = _arguments(range(count), params)
    places = jax.tree.leaves(positions[2])
    assert all(type(place) is int for place in places)

    def solve(*args: Any) -> Sequence[Any]:
        operator, state, vector, options, solver, _ = _arguments(args, params)
        if operator.in_size() != operator.out_size():
            return _evaluated(values)(*args)
        flat, unravel = jax.flatten_util.ravel_pytree(vector)
        zeros = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), operator.in_structure())
        ends, unravel_solution = jax.flatten_util.ravel_pytree(zeros)
        leaves = len(jax.tree.leaves(zeros))
        others = jax.eval_shape(values, *args)[leaves:]

        def matvec(x: Any) -> Any:
            return jax.flatten_util.ravel_pytree(operator.mv(unravel_solution(x)))[0].astype(flat.dtype)

        def solved(_: Any, b: Any) -> Any:
            taken = list(args)
            for place, leaf in zip(places, jax.tree.leaves(unravel(b)), strict=True):
                taken[place] = leaf
            outs = values(*taken)
            return jax.flatten_util.ravel_pytree(outs[:leaves])[0].astype(flat.dtype), outs[leaves:]

        def solved_transpose(_: Any, b: Any) -> Any:
            found = solver.compute(*_swapped(solver.transpose(state, options), unravel_solution(b.astype(ends.dtype))))
            # jax wants the same auxiliary results here, and does not use them.
            return jax.flatten_util.ravel_pytree(found[0])[0].astype(flat.dtype), [
                jax.numpy.zeros(each.shape, each.dtype) for each in others
            ]

        x, rest = jax.lax.custom_linear_solve(matvec, flat, solved, solved_transpose, has_aux=True)
        return [*jax.tree.leaves(unravel_solution(x.astype(ends.dtype))), *rest]

    return solve


def _swapped(state_and_options: tuple[Any, Any], vector: Any) -> tuple[Any, Any, Any]:
    return state_and_options[0], vector, state_and_options[1]


def _evaluated(values: Flat) -> Flat:
    """Return a function that may be evaluated, and not differentiated."""
    found = jax.custom_jvp(values)

    @found.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NoRuleError

    return found


def _arguments(dynamic: Sequence[Any], params: Mapping[str, Any]) -> Any:
    """Return the arguments of an equinox primitive with some operands."""
    missing = sys.modules["equinox.internal._primitive"]._missing_dynamic  # noqa: SLF001 - a placeholder without another name
    iterator = iter(dynamic)
    leaves = [next(iterator) if each is missing else each for each in params["static"]]
    return jax.tree.unflatten(params["treedef"], leaves)
