"""A product through `H.as_jax()`, over the same plain product: one call of a compiled
function, one call without `jit`, and one of many in a compiled loop.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import hvpd
from bench import _processes, _timing, _warm
from bench._objectives import mlp, normal
from bench._report import Figure, Goal, measured

BENCH = "as_jax"
GOAL = Goal("<=", 1.5)

_SIZES = {6_160: ((64, 82, 10), 500), 269_322: ((784, 256, 256, 10), 250)}

_STEPS = 16
"""Products of a compiled loop."""

# A plain product of 6,160 takes some 0.3 ms. A compiled call adds jax's dispatch, the
# lock of the interpreter and two copies: some 0.08 ms. A loop has one dispatch for all
# of its products.
PREDICTED = {
    6_160: {"compiled": 1.3, "without jit": 1.2, "in a loop": 1.15},
    269_322: {"compiled": 1.1, "without jit": 1.05, "in a loop": 1.1},
}


def run(*, quick: bool) -> Iterator[Figure]:
    """Yield the figures of each size."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_processes.serving(None))
        client = stack.enter_context(hvpd.connect(_processes.address(server)))
        for n, (sizes, rows) in list(_SIZES.items())[: 1 if quick else None]:
            problem = mlp(sizes, rows)
            assert problem.n == n
            objective = _warm.registered(client, problem)
            H = objective.at(problem.x).hessian()
            _warm.vectors(objective, H)
            yield from _figures(H, n, quick=quick)


def _figures(H: hvpd.CurvatureOperator, n: int, *, quick: bool) -> Iterator[Figure]:
    A, v = H.as_jax(), normal(6, n)
    on_device = jnp.asarray(v)
    compiled = jax.jit(A)
    loop = jax.jit(lambda v: jax.lax.fori_loop(0, _STEPS, lambda _, v: A(v) / 8, v))
    contenders: dict[str, _timing.Call] = {
        "product": lambda: H @ v,
        "compiled": lambda: jax.block_until_ready(compiled(on_device)),
        "without jit": lambda: jax.block_until_ready(A(on_device)),
        "in a loop": lambda: jax.block_until_ready(loop(on_device)),
    }
    times = _timing.interleave(contenders, rounds=3 if quick else 25, seconds=0.02 if quick else 0.2)
    found = {name: np.array(seconds) for name, seconds in times.items()}
    found["in a loop"] /= _STEPS
    plain = found.pop("product")
    for name, seconds in found.items():
        goal = GOAL if n == min(_SIZES) else None
        yield measured(
            BENCH,
            f"as_jax over a product, {name}",
            "",
            seconds / plain,
            n=n,
            k=1,
            predicted=PREDICTED[n][name],
            goal=goal,
        )
    yield measured(BENCH, "product", "ms", plain * 1e3, n=n, k=1)
