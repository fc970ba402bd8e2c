"""The error and the time of a product at jax's default precision (TF32), and at
highest.
"""

from collections.abc import Iterator

import jax
import jax.flatten_util
import numpy as np

from bench import _timing
from bench._networks import perceptron
from bench._objectives import normal
from bench._programs import Programs
from bench._report import Figure, Goal
from bench.gpu._scale import Scale

PREDICTED = {"highest": 1e-6, "default": 6e-4, "time": 3.0}
"""Relative errors of a product, and the time at highest precision over that at default
precision, which is TF32 on NVIDIA's devices since Ampere.
"""
GOAL = Goal("<=", 1e-5)
"""The contract's error of a product in float32 at highest precision."""


def run(scale: Scale) -> Iterator[Figure]:
    """Yield the errors against float64, and the ratio of the times."""
    network = scale.of(lambda: perceptron((784, 1024, 1024, 10), 4096), lambda: perceptron((64, 32, 10), 100))()
    v = normal(5, 1, network.n)
    with jax.enable_x64(True):
        x, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(np.float64), network.x))
        data = [array.astype(np.float64) if array.dtype == np.float32 else array for array in network.data]
        gradient = jax.grad(lambda x: network.fun(unravel(x), *data))
        truth = np.asarray(jax.jit(lambda x, v: jax.jvp(gradient, (x,), (v,))[1])(x, v[0].astype(np.float64)))
    calls = dict[str, _timing.Call]()
    for name in ("highest", "default"):
        programs = Programs(network, precision=name)
        error = np.linalg.norm(programs.multiply("hvp")(v)[0] - truth) / np.linalg.norm(truth)
        goal = GOAL if name == "highest" else None
        figure = f"precision: error of a product, {name}"
        yield scale.measured(figure, "", [error], n=network.n, predicted=PREDICTED[name], goal=goal)
        call = programs.on_device("hvp", 1)
        calls[name] = lambda call=call: jax.block_until_ready(call())  # type: ignore[misc]  # mypy wants a type
    times = _timing.interleave(calls, rounds=scale.rounds, seconds=scale.seconds)
    ratio = np.array(times["highest"]) / np.array(times["default"])
    yield scale.measured("precision: time at highest over default", "", ratio, n=network.n, predicted=PREDICTED["time"])
