"""Objectives of several kinds, in float32, on synthetic data from fixed seeds.

Times depend on shapes alone.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Problem:
    """f(x, *data) with an x and data for it."""

    name: str
    fun: Callable[..., Any]
    x: Any
    """A pytree."""
    data: tuple[npt.NDArray[Any], ...] = ()

    @property
    def n(self) -> int:
        """Return the number of elements of x."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.x))

    def flat(self) -> Vector:
        """Return x as a vector of shape (n,)."""
        return np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(self.x)])


def normal(seed: int, *shape: int, scale: float = 1.0) -> Vector:
    """Return standard normal numbers, times a scale."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)


def logistic(n: int, rows: int) -> Problem:
    """Return a regularized logistic regression. A gradient passes over X twice, so
    memory is the bound.
    """

    def fun(w: Any, X: Any, y: Any) -> Any:
        return jnp.mean(jnp.logaddexp(0.0, -y * (X @ w))) + 1e-3 * jnp.sum(w * w)

    X = normal(0, rows, n)
    return Problem("logistic regression", fun, normal(1, n, scale=n**-0.5), (X, np.sign(X[:, 0])))


def mlp(sizes: Sequence[int], rows: int) -> Problem:
    """Return a perceptron with tanh and cross entropy. Arithmetic is the bound."""

    def fun(layers: Any, X: Any, labels: Any) -> Any:
        for W, b in layers[:-1]:
            X = jnp.tanh(X @ W + b)
        W, b = layers[-1]
        return _cross_entropy(X @ W + b, labels)

    layers = [
        (normal(seed, *shape, scale=shape[0] ** -0.5), np.zeros(shape[1], np.float32))
        for seed, shape in enumerate(itertools.pairwise(sizes))
    ]
    return Problem("MLP", fun, layers, (normal(9, rows, sizes[0]), _labels(rows, sizes[-1])))


def convolution(rows: int, side: int = 28, channels: int = 16) -> Problem:
    """Return two strided convolutions and a dense layer on square images."""

    def fun(x: Any, images: Any, labels: Any) -> Any:
        for kernel in x["kernels"]:
            images = jnp.tanh(
                jax.lax.conv_general_dilated(images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            )
        return _cross_entropy(images.reshape(len(images), -1) @ x["dense"], labels)

    kernels = [normal(0, 3, 3, 1, channels, scale=0.3), normal(1, 3, 3, channels, 2 * channels, scale=0.1)]
    features = math.ceil(side / 4) ** 2 * 2 * channels
    x = {"kernels": kernels, "dense": normal(2, features, 10, scale=features**-0.5)}
    return Problem("convolution", fun, x, (normal(3, rows, side, side, 1), _labels(rows, 10)))


def transformer(rows: int, length: int = 32, width: int = 64, blocks: int = 2, heads: int = 4) -> Problem:
    """Return a small causal language model: attention, layer norm, GELU."""
    vocabulary = 64

    def attend(h: Any, block: Any) -> Any:
        query, key, value = (
            part.reshape(*h.shape[:2], heads, -1) for part in jnp.split(_norm(h) @ block["qkv"], 3, axis=-1)
        )
        scores = jnp.einsum("blhd,bmhd->bhlm", query, key) / (width / heads) ** 0.5
        weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -1e9))
        return jnp.einsum("bhlm,bmhd->blhd", weights, value).reshape(h.shape) @ block["out"]

    def fun(x: Any, tokens: Any) -> Any:
        h = x["embedding"][tokens[:, :-1]] + x["position"]
        for block in x["blocks"]:
            h = h + attend(h, block)
            h = h + jax.nn.gelu(_norm(h) @ block["up"]) @ block["down"]
        return _cross_entropy(_norm(h) @ x["embedding"].T, tokens[:, 1:])

    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    x = {
        "embedding": normal(0, vocabulary, width, scale=width**-0.5),
        "position": normal(1, length, width, scale=0.1),
        "blocks": [
            {name: normal(2 + i, *shape, scale=shape[0] ** -0.5) for name, shape in shapes.items()}
            for i in range(blocks)
        ],
    }
    return Problem("transformer", fun, x, (_labels(rows * (length + 1), vocabulary).reshape(rows, length + 1),))


def gaussian_process(rows: int, features: int) -> Problem:
    """Return a Gaussian process's negative log marginal likelihood in its
    hyperparameters: a Cholesky factor and two solves.
    """

    def fun(x: Any, X: Any, y: Any) -> Any:
        scaled = X * jnp.exp(x["log_scales"])
        squares = jnp.sum(scaled**2, axis=1)
        distances = squares[:, None] + squares[None, :] - 2 * scaled @ scaled.T
        covariance = jnp.exp(x["log_variance"] - 0.5 * distances) + jnp.exp(x["log_noise"]) * jnp.eye(rows)
        factor = jnp.linalg.cholesky(covariance)
        half = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
        return 0.5 * jnp.sum(half**2) + jnp.sum(jnp.log(jnp.diag(factor)))

    x = {
        "log_scales": np.zeros(features, np.float32),
        "log_variance": np.zeros((), np.float32),
        "log_noise": np.full((), -1.0, np.float32),
    }
    X = normal(6, rows, features)
    return Problem("Gaussian process", fun, x, (X, np.sin(X[:, 0])))


def identity(n: int) -> Problem:
    """Return 0.5 |x|^2. The product is the vector itself, so only transport is
    measured.
    """

    def fun(x: Any) -> Any:
        return 0.5 * jnp.sum(x * x)

    return Problem("identity", fun, np.ones(n, np.float32))


def quartic(n: int, constant: float = 1.0) -> Problem:
    """Return a multiple of sum(x^4). Each constant gives another objective, which is
    quick to trace and to compile.
    """

    def fun(x: Any) -> Any:
        return constant * jnp.sum(x**4)

    return Problem("quartic", fun, normal(0, n))


def _cross_entropy(logits: Any, labels: Any) -> Any:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1))


def _norm(h: Any) -> Any:
    centered = h - jnp.mean(h, axis=-1, keepdims=True)
    return centered / jnp.sqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-5)


def _labels(count: int, classes: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(4).integers(0, classes, count, dtype=np.int32)
