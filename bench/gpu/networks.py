"""Programs of networks, in process: absolute times, and what share they reach of the
device's own rate of matrix products and of its bandwidth, both measured here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import _timing
from bench._networks import NETWORKS
from bench._objectives import normal
from bench._programs import Programs
from bench._report import Figure, Goal
from bench.gpu._scale import Scale

WIDTHS = (1, 4, 16, 64)
GGN_WIDTHS = (1, 16)

PREDICTED = {
    "MLP": {"value_and_grad": 0.6, "hvp 1": 2.1, "hvp 16": 1.6},
    "ResNet-50-like": {"value_and_grad": 0.35, "hvp 1": 2.3, "hvp 16": 1.7},
    "GPT 1 M": {"value_and_grad": 0.2, "hvp 1": 2.6, "hvp 16": 1.9},
    "GPT 10 M": {"value_and_grad": 0.4, "hvp 1": 2.4, "hvp 16": 1.7},
    "GPT 124 M": {"value_and_grad": 0.55, "hvp 1": 2.3, "hvp 16": 1.6},
}
"""For each network: the gradient's share of the matmul rate; and a product's time over
the gradient's, for one vector, and for each vector of a block of 16.

A product computes 2 to 2.6 times as many operations as a gradient. Small layers, norms
and softmax are limited by bandwidth, so a small GPT is far from the matmul rate. A
block of 16 shares what does not depend on v.
"""

GOALS = {
    ("ResNet-50-like", "hvp 1"): Goal("<=", 2.2),
    ("GPT 124 M", "hvp 1"): Goal("<=", 2.1),
    ("GPT 124 M", "hvp 16"): Goal("<=", 1.6),
}
"""Published for curvlinops, compiled, on an A6000: 2.78 for ResNet-50, and 2.90 for
nanoGPT.
"""


def run(scale: Scale, labels: Sequence[str]) -> Iterator[Figure]:
    """Yield the device's rates, and the figures of some networks."""
    rates = _rates(scale.of(8192, 256), scale.of(1024, 1) << 20, scale.rounds, scale.seconds)
    yield scale.measured("matmul rate, float32 at highest precision", "TFLOP/s", rates["matmul"] / 1e12)
    yield scale.measured("bandwidth, reading and writing", "GB/s", rates["copy"] / 1e9)
    flops, bandwidth = (float(np.median(rates[name])) for name in ("matmul", "copy"))
    for label in labels:
        yield from _network(scale, label, flops, bandwidth)


def _rates(size: int, copied: int, rounds: int, seconds: float) -> "dict[str, np.ndarray[Any, Any]]":
    """Return operations a second of a matrix product, and bytes a second of a copy."""
    A, x = jnp.asarray(normal(0, size, size)), jnp.zeros(copied // 4, np.float32)
    multiply = jax.jit(lambda A: jnp.matmul(A, A, precision="highest"))
    increase = jax.jit(lambda x: x + 1)
    calls: dict[str, _timing.Call] = {
        "matmul": lambda: jax.block_until_ready(multiply(A)),
        "copy": lambda: jax.block_until_ready(increase(x)),
    }
    work = {"matmul": 2 * size**3, "copy": 2 * copied}
    times = _timing.interleave(calls, rounds=rounds, seconds=seconds)
    return {name: work[name] / np.array(taken) for name, taken in times.items()}


def _network(scale: Scale, label: str, flops: float, bandwidth: float) -> Iterator[Figure]:
    network = NETWORKS[label]
    programs = Programs(scale.of(network.full, network.small)())
    kinds = [
        ("value_and_grad", 0),
        *(("hvp", k) for k in WIDTHS),
        ("apply", 1),
        *(("ggn", k) for k in GGN_WIDTHS),
        ("kfac", 0),
    ]
    calls, failed = dict[str, _timing.Call](), dict[str, str]()
    for name, k in kinds:
        try:
            call = _call(programs, name, k)
            call()
            calls[_key(name, k)] = call
        except (jax.errors.JaxRuntimeError, MemoryError) as error:  # The block does not fit on the device.
            failed[_key(name, k)] = str(error).partition("\n")[0][:120]
    if "value_and_grad" in failed:
        yield scale.skipped(f"{label}: value_and_grad", "ms", failed["value_and_grad"], n=programs.n)
        return
    times = _timing.interleave(calls, rounds=scale.rounds, seconds=scale.seconds)
    gradient = np.array(times["value_and_grad"])
    for name, k in kinds:
        key, n, width = _key(name, k), programs.n, k or None
        if key in failed:
            yield scale.skipped(f"{label}: {key}", "ms", failed[key], n=n, k=width)
            continue
        taken = np.array(times[key])
        cost = programs.compiled(name, k).cost_analysis() or {}
        start, expected = f"{label}: {name}", PREDICTED[label].get(key)
        yield scale.measured(start, "ms", taken * 1e3, n=n, k=width)
        share = cost.get("flops", np.nan) / taken / flops
        predicted = expected if key == "value_and_grad" else None
        yield scale.measured(f"{start}, share of the matmul rate", "", share, predicted=predicted, n=n, k=width)
        share = cost.get("bytes accessed", np.nan) / taken / bandwidth
        yield scale.measured(f"{start}, share of the bandwidth", "", share, n=n, k=width)
        if name != "value_and_grad":
            ratio = taken / gradient / max(k, 1)
            figure = f"{start}, for each vector over the gradient" if k else f"{start}, over the gradient"
            yield scale.measured(figure, "", ratio, predicted=expected, goal=GOALS.get((label, key)), n=n, k=width)


def _key(name: str, k: int) -> str:
    return f"{name} {k}" if k else name


def _call(programs: Programs, name: str, k: int) -> Callable[[], object]:
    """Return a function that runs a program with all arguments on the device, and waits
    until it has ended.
    """
    call = programs.on_device(name, k)
    return lambda: jax.block_until_ready(call())
