"""Networks of the sizes that people train, as composites of a model and a
cross-entropy, in float32 on synthetic data: a perceptron, a ResNet and a GPT.

Times depend on shapes alone. On a machine without an accelerator they are small.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import hvpd
from bench._objectives import Problem, normal

Labels = npt.NDArray[np.int32]


def perceptron(sizes: Sequence[int], rows: int) -> Problem:
    """Return dense layers with tanh."""

    def model(layers: Any, X: Any) -> Any:
        for W, b in layers[:-1]:
            X = jnp.tanh(X @ W + b)
        W, b = layers[-1]
        return X @ W + b

    layers = [_dense(seed, a, b) for seed, (a, b) in enumerate(itertools.pairwise(sizes))]
    return _classifier("MLP", model, layers, normal(9, rows, sizes[0]), _labels(sizes[-1], rows))


def resnet(depths: Sequence[int], width: int, side: int, classes: int, rows: int) -> Problem:
    """Return a residual network with bottlenecks. (3, 4, 6, 3) of width 64 is
    ResNet-50's shape. Layer norms replace its batch norms, whose statistics are no
    function of the parameters.
    """

    def model(x: Any, images: Any) -> Any:
        h = jax.nn.relu(_norm(_convolved(images, x["stem"], 2), x["stem norm"]))
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        for stage, blocks in enumerate(x["stages"]):
            for index, block in enumerate(blocks):
                stride = 2 if stage and not index else 1
                kept = _convolved(h, block["project"], stride) if "project" in block else h
                for step, (kernel, scale) in enumerate(zip(block["kernels"], block["norms"], strict=True)):
                    h = _norm(_convolved(h, kernel, stride if step == 1 else 1), scale)
                    h = jax.nn.relu(h) if step < 2 else h
                h = jax.nn.relu(h + kept)
        W, b = x["dense"]
        return jnp.mean(h, axis=(1, 2)) @ W + b

    random = np.random.default_rng(0)

    def kernel(size: int, inputs: int, outputs: int) -> npt.NDArray[np.float32]:
        scale = math.sqrt(2 / (size * size * inputs))
        return random.standard_normal((size, size, inputs, outputs), np.float32) * np.float32(scale)

    stages, inputs = [], width
    for stage, depth in enumerate(depths):
        inner, outputs = width << stage, width << stage + 2
        blocks = []
        for _ in range(depth):
            block = {
                "kernels": [kernel(1, inputs, inner), kernel(3, inner, inner), kernel(1, inner, outputs)],
                "norms": [np.ones(channels, np.float32) for channels in (inner, inner, outputs)],
            }
            if inputs != outputs:
                block["project"] = kernel(1, inputs, outputs)  # type: ignore[assignment]  # a leaf
            blocks.append(block)
            inputs = outputs
        stages.append(blocks)
    x = {
        "stem": kernel(7, 3, width),
        "stem norm": np.ones(width, np.float32),
        "stages": stages,
        "dense": _dense(1, inputs, classes),
    }
    return _classifier("ResNet", model, x, normal(9, rows, side, side, 3), _labels(classes, rows))


def gpt(layers: int, width: int, heads: int, vocabulary: int, length: int, rows: int) -> Problem:
    """Return a causal language model as GPT-2's: attention, layer norms, GELU, and an
    embedding that is also the last layer. (12, 768, 12, 50304, 1024) has 124 million
    parameters.
    """

    def attend(h: Any, block: Any) -> Any:
        W, b = block["qkv"]
        query, key, value = (
            part.reshape(*h.shape[:2], heads, -1) for part in jnp.split(_norm(h, block["norm 1"]) @ W + b, 3, axis=-1)
        )
        scores = jnp.einsum("blhd,bmhd->bhlm", query, key) / math.sqrt(width / heads)
        weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -1e9))
        W, b = block["out"]
        return jnp.einsum("bhlm,bmhd->blhd", weights, value).reshape(h.shape) @ W + b

    def model(x: Any, tokens: Any) -> Any:
        h = x["embedding"][tokens] + x["position"]
        for block in x["blocks"]:
            h = h + attend(h, block)
            (up, a), (down, b) = block["up"], block["down"]
            h = h + jax.nn.gelu(_norm(h, block["norm 2"]) @ up + a) @ down + b
        return _norm(h, x["norm"]) @ x["embedding"].T

    ones = np.ones(width, np.float32)
    blocks = [
        {
            "qkv": _dense(4 * index, width, 3 * width),
            "out": _dense(4 * index + 1, width, width),
            "up": _dense(4 * index + 2, width, 4 * width),
            "down": _dense(4 * index + 3, 4 * width, width),
            "norm 1": ones,
            "norm 2": ones,
        }
        for index in range(layers)
    ]
    x = {
        "embedding": normal(100, vocabulary, width, scale=0.02),
        "position": normal(101, length, width, scale=0.02),
        "blocks": blocks,
        "norm": ones,
    }
    tokens = _labels(vocabulary, rows, length + 1)
    return _classifier("GPT", model, x, tokens[:, :-1].copy(), tokens[:, 1:].copy())


@dataclasses.dataclass(frozen=True)
class Network:
    """A network at the size for an accelerator, and at a size for a CPU."""

    full: Callable[[], Problem]
    small: Callable[[], Problem]


NETWORKS: Mapping[str, Network] = {
    "MLP": Network(
        lambda: perceptron((784, 1024, 1024, 10), 4096),
        lambda: perceptron((64, 32, 10), 100),
    ),
    "ResNet-50-like": Network(
        lambda: resnet((3, 4, 6, 3), 64, 224, 1000, 32),
        lambda: resnet((1, 1), 4, 16, 10, 4),
    ),
    "GPT 1 M": Network(
        lambda: gpt(4, 128, 4, 1024, 256, 16),
        lambda: gpt(1, 16, 2, 32, 8, 2),
    ),
    "GPT 10 M": Network(
        lambda: gpt(6, 360, 6, 1024, 256, 16),
        lambda: gpt(2, 16, 2, 32, 8, 2),
    ),
    "GPT 124 M": Network(
        lambda: gpt(12, 768, 12, 50_304, 1024, 4),
        lambda: gpt(3, 16, 2, 64, 8, 2),
    ),
}


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Return the mean cross-entropy of labels, by logits of shape (..., classes)."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1))


def _classifier(name: str, model: Callable[..., Any], x: Any, inputs: Any, labels: Labels) -> Problem:
    composite = hvpd.composite(model, cross_entropy, distribution="categorical")
    return Problem(name, composite, x, (inputs, labels))


def _dense(seed: int, inputs: int, outputs: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    return normal(seed, inputs, outputs, scale=inputs**-0.5), np.zeros(outputs, np.float32)


def _convolved(images: Any, kernel: Any, stride: int) -> Any:
    return jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _norm(h: Any, scale: Any) -> Any:
    centered = h - jnp.mean(h, axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-5) * scale


def _labels(classes: int, *shape: int) -> Labels:
    return np.random.default_rng(4).integers(0, classes, shape, dtype=np.int32)
