"""Several steps of an iteration around a product, as one program.

A method (`Method`) is a step function and the arrays of its state. Here is all that the
methods share: the terms of the operator, the preconditioner, the loop, and the reason
why the loop ends. A step is usual if its product is finite, and its method has no
special case for it. A launch ends before a step that is not usual. The iteration in
NumPy takes that step, with a product of its own, and says why it ends.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hvpd._krylov.preconditioning import PARTS, Applied, Described
from hvpd_server.derivation.names import Form
from hvpd_server.derivation.spread import Spread

Function = Callable[..., Any]
Spec = jax.ShapeDtypeStruct

STEPS: Final = 64
"""Most steps of a launch."""

FLOAT: Final = np.dtype(np.float64)


class Sizes(NamedTuple):
    """Sizes of the arrays of an iteration."""

    rows: int
    """Right-hand sides."""
    n: int
    """Elements of a vector."""
    dtype: "np.dtype[Any]"
    """dtype of vectors."""
    form: Form = Form()
    spread: Spread | None = None
    """The layout of vectors that are split over several devices."""

    def vectors(self, *shape: int) -> Spec:
        """Return the spec of an array of vectors, of shape (*shape, n)."""
        return Spec((*shape, self.n), self.dtype, sharding=self._along(len(shape)))

    def columns(self, rank: int) -> Spec:
        """Return the spec of an array of vectors, of shape (n, rank)."""
        return Spec((self.n, rank), self.dtype, sharding=self._along(0))

    def _along(self, axis: int) -> Any:
        return None if self.spread is None else self.spread.along(axis)


class Stepped(NamedTuple):
    """The result of a step."""

    state: Sequence[Any]
    """The state after the step."""
    norms: Any
    """Norms of the residuals, float64 of the shape of the targets."""
    usual: Any
    """Whether the step is a usual one. If not, its state is not used."""
    ended: Any = np.False_
    """Whether no step can follow."""


class Method(NamedTuple):
    """An iteration."""

    state: Callable[[Sizes], Sequence[Spec]]
    """Returns the arrays of the state."""
    constant: Callable[[Sizes], Spec]
    """Returns the array that stays the same."""
    step: Callable[[Function, Function | None, jax.Array, Sequence[jax.Array]], Stepped]
    """Takes one step, given the product with the operator, that with the preconditioner
    or None, the array that stays the same, and the state.
    """


def specs_of(method: Method, sizes: Sizes) -> list[list[Spec]]:
    """Return the specs of a program's arguments, in five groups. They stand after x and
    before the arguments of the product.

    1. The state.
    2. The array that stays the same.
    3. The preconditioner's shift and arrays.
    4. U[n, rank] and C[rank, rank] of the operator's low-rank term.
    5. The operator's scale and shift; the norms of the residuals that end the steps;
       and the number of steps.
    """
    form, vector = sizes.form, sizes.dtype
    shift, rank = Spec((), vector), form.rank
    preconditioner = {
        "": [],
        "diagonal": [shift, sizes.vectors()],
        "low_rank": [shift, *(spec for r in form.sizes for spec in (sizes.columns(r), Spec((r,), vector)))],
        "kronecker": [shift],
    }[form.M]
    if form.M == "kronecker":
        for p, q in zip(form.sizes[::2], form.sizes[1::2], strict=True):
            shapes = zip(PARTS, ((p, q), (p, p), (q, q), (p, q)), strict=True)
            preconditioner += [
                Spec(shape, np.dtype(np.int32) if part == PARTS[0] else vector) for part, shape in shapes
            ]
    return [
        list(method.state(sizes)),
        [method.constant(sizes)],
        preconditioner,
        [sizes.columns(rank), Spec((rank, rank), vector)] if rank else [],
        [Spec((2,), FLOAT), Spec(targets_of(sizes), FLOAT), Spec((), np.dtype(np.int32))],
    ]


def targets_of(sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of the norms of all residuals."""
    return sizes.rows, sizes.form.shifts


def several(method: Method, multiply: Function, sizes: Sizes) -> Function:
    """Return the program of several steps: (x, *arguments, *args) -> (state, norms,
    facts).

    The norms are those after each step, of shape (STEPS, rows, shifts). facts are the
    steps that were taken, whether the next step is a usual one, and whether no step can
    follow. The loop ends when all residuals are small; or before a step that is not a
    usual one, or whose product is not finite.

    Args:
        method: The iteration.
        multiply: (x, V, *args) -> A V.
        sizes: Sizes of the arrays.
    """
    counts = [len(group) for group in specs_of(method, sizes)]
    splits = np.cumsum(counts).tolist()

    def launch(x: jax.Array, *arguments: jax.Array) -> Any:
        args = arguments[splits[-1] :]
        state, (constant,), arrays, low_rank, (terms, targets, count) = (
            arguments[end - size : end] for size, end in zip(counts, splits, strict=True)
        )
        scale, shift = terms.astype(sizes.dtype)

        def product(V: jax.Array) -> jax.Array:
            found: jax.Array = scale * multiply(x, V, *args) + shift * V
            if low_rank:
                U, C = low_rank
                found += ((V @ U) @ C) @ U.T
            return found

        def going(carried: Any) -> Any:
            number, goes = carried[:2]
            return (number < count) & goes

        def advance(carried: Any) -> Any:
            number, _, _, _, state, norms = carried
            found = method.step(product, _preconditioner(sizes.form, arrays), constant, state)
            state = [jnp.where(found.usual, new, old) for new, old in zip(found.state, state, strict=True)]
            latest = found.norms.reshape(targets.shape)
            goes = found.usual & ~found.ended & (latest > targets).any()
            return (
                number + found.usual,
                goes,
                found.usual,
                found.usual & found.ended,
                state,
                norms.at[number].set(latest),
            )

        yes, no = jnp.bool_(True), jnp.bool_(False)
        start = (jnp.int32(0), yes, yes, no, list(state), jnp.zeros((STEPS, *targets.shape)))
        number, _, usual, ended, found, norms = jax.lax.while_loop(going, advance, start)
        return tuple(found), norms, jnp.stack([fact.astype(FLOAT) for fact in (number, usual, ended)])

    return launch


def _preconditioner(form: Form, arrays: Sequence[jax.Array]) -> Function | None:
    """Return the function that multiplies rows by a preconditioner, or None."""
    if not form.M:
        return None
    shift, *others = arrays
    names = {
        "diagonal": ["M"],
        "low_rank": ["M_U", "M_weights"],
        "kronecker": [f"M_{part}_{number}" for number in range(len(form.sizes) // 2) for part in PARTS],
    }[form.M]
    described: Any = Described(form.M, dict(zip(names, others, strict=True)), shift)  # type: ignore[arg-type]
    return Applied(described, lambda rows, elements, values: rows.at[:, elements].set(values))
