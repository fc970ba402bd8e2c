"""Gauss-Newton products of a language model's last layer: a softmax over a large
vocabulary. Its loss has a Hessian of vocabulary by vocabulary for each token, which no
program may form.
"""

from collections.abc import Iterator

import jax
import numpy as np

import hvpd
from bench import _networks, _timing
from bench._objectives import Problem, normal
from bench._programs import Programs
from bench._report import Figure, Goal
from bench.gpu._scale import Scale

TOKENS, VOCABULARY, WIDTH = 16_384, 50_304, 768
SMALL = (64, 512, 16)

PREDICTED = {"highest": (75.0, 13.5), "default": (20.0, 13.5)}
"""Milliseconds and GB of a product on an H200, by precision. "default" is TF32 there.

It multiplies three times: 3.8 TFLOP, at some 55 TFLOP/s in float32 and 350 in TF32.
The logits take 3.3 GB in float32. XLA's program for a CPU holds four arrays of that
size. A product passes over them about ten times.
"""
GOALS = (Goal("<=", 14.5), Goal("<=", 9.9))
"""Milliseconds and GB. Published for a fused kernel on an A100."""


def problem(tokens: int, vocabulary: int, width: int) -> Problem:
    """Return the cross-entropy of a last layer, as a function of its weights."""
    composite = hvpd.composite(lambda W, h: h @ W.T, _networks.cross_entropy, distribution="categorical")
    labels = np.random.default_rng(4).integers(0, vocabulary, tokens, dtype=np.int32)
    return Problem(
        "last layer", composite, normal(0, vocabulary, width, scale=0.02), (normal(1, tokens, width), labels)
    )


def run(scale: Scale) -> Iterator[Figure]:
    """Yield the time and memory of a product, by precision."""
    sizes = scale.of((TOKENS, VOCABULARY, WIDTH), SMALL)
    layer = problem(*sizes)
    calls, memory = dict[str, _timing.Call](), dict[str, float]()
    for precision in PREDICTED:
        programs = Programs(layer, precision=precision)
        call = programs.on_device("ggn", 1)
        calls[precision] = lambda call=call: jax.block_until_ready(call())  # type: ignore[misc]  # mypy wants a type
        memory[precision] = peak_bytes(programs) / 1e9
    times = _timing.interleave(calls, rounds=scale.rounds, seconds=scale.seconds)
    for precision, (milliseconds, gigabytes) in PREDICTED.items():
        label, taken, held = f"cross-entropy: {precision}", np.array(times[precision]) * 1e3, memory[precision]
        logits = 4e-9 * sizes[0] * sizes[1]
        yield scale.measured(f"{label}: product", "ms", taken, n=layer.n, k=1, predicted=milliseconds, goal=GOALS[0])
        yield scale.measured(f"{label}: memory", "GB", [held], n=layer.n, k=1, predicted=gigabytes, goal=GOALS[1])
        ratio = gigabytes / logits
        yield scale.measured(f"{label}: memory over the logits'", "", [held / logits], n=layer.n, predicted=ratio)


def peak_bytes(programs: Programs) -> int:
    """Return the bytes of a product's arguments, results and working memory."""
    found = programs.compiled("ggn", 1).memory_analysis()
    return int(found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes)
