"""A zoo of objectives, one for each thing that jax can differentiate, with their truth.

Truth is a closed form in numpy or scipy, if there is one. The others have `jax.hessian`
in process, and differences of values and gradients, which use no second derivatives.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from scipy.sparse.linalg import LaplacianNd
from scipy.spatial.distance import pdist, squareform
from scipy.special import softmax

from tests.support.objectives import quadratic


class Case(NamedTuple):
    """An objective, the point to look at, and its Hessian there."""

    fun: Callable[..., Any]
    x: Any
    data: tuple[Any, ...] = ()
    hessian: Callable[..., np.ndarray] | None = None
    """Closed form of (x, *data) in numpy. If it is None, truth is jax.hessian and
    differences.
    """


def cast(tree, dtype):
    """Return a pytree with its floating leaves in a dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if np.issubdtype(leaf.dtype, np.floating) else leaf, tree)


def normal(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(size=shape) * scale


def relative(found, expected):
    expected = np.asarray(expected)
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


def dense(operator):
    return operator @ np.eye(operator.shape[0])


# Quadratics

GRID = (5, 6)


def stretched(x, boundary):
    """Return x' (-L) x / 2: half the squared differences of neighbours on the grid."""
    x = x.reshape(GRID)
    energy = 0.0
    for axis in range(2):
        edge = [(0, 0), (0, 0)]
        edge[axis] = {"dirichlet": (1, 1), "neumann": (0, 0), "periodic": (0, 1)}[boundary]
        padded = jnp.pad(x, edge, mode="wrap" if boundary == "periodic" else "constant")
        energy += 0.5 * jnp.sum(jnp.diff(padded, axis=axis) ** 2)
    return energy


def laplacian(boundary):
    return LaplacianNd(GRID, boundary_conditions=boundary, dtype=np.float64)


def laplacian_case(boundary):
    return Case(
        lambda x: stretched(x, boundary),
        normal(1, *GRID).ravel(),
        hessian=lambda x: -laplacian(boundary).toarray(),
    )


SPECTRUM = np.concatenate([-np.logspace(-3, 1, 6), [0.0], np.logspace(-3, 2, 13)])
"""Twenty eigenvalues of both signs, over five orders of magnitude."""
BASIS = scipy.linalg.qr(normal(2, 20, 20))[0]


def least_squares(params, X, y):
    return jnp.mean((X @ params["w"] + params["b"] - y) ** 2)


def least_squares_hessian(params, X, y):
    design = np.column_stack([np.ones(len(X)), X])  # b comes before w in the raveling
    return 2 * design.T @ design / len(X)


# Smooth functions of few operations


def log_sum_exp_hessian(x):
    p = softmax(x)
    return np.diag(p) - np.outer(p, p)


def minus_log_det(X):
    return -jnp.linalg.slogdet(X)[1]


def minus_log_det_hessian(X):
    """Return the Hessian: d/dX_kl of -inv(X)_ji is inv(X)_jk inv(X)_li."""
    inverse = np.linalg.inv(X)
    return np.einsum("jk,li->ijkl", inverse, inverse).reshape(X.size, X.size)


# Lennard-Jones clusters, epsilon = sigma = 1


def lennard_jones(x):
    """Return the energy of atoms x[atoms, 3]."""
    i, j = np.triu_indices(len(x), 1)
    inverse = 1 / jnp.sum((x[i] - x[j]) ** 2, axis=1) ** 3
    return 4 * jnp.sum(inverse**2 - inverse)


def lennard_jones_hessian(x):
    """Return the Hessian, pair by pair: phi'' along the bond, phi'/r across it."""
    n = len(x)
    H = np.zeros((n, 3, n, 3))
    for i in range(n):
        for j in range(i):
            r = np.linalg.norm(x[i] - x[j])
            first, second = 4 * (-12 * r**-13 + 6 * r**-7), 4 * (156 * r**-14 - 42 * r**-8)
            along = np.outer(x[i] - x[j], x[i] - x[j]) / r**2
            block = second * along + first / r * (np.eye(3) - along)
            H[i, :, i] += block
            H[j, :, j] += block
            H[i, :, j] -= block
            H[j, :, i] -= block
    return H.reshape(3 * n, 3 * n)


def icosahedron():
    """Return twelve vertices at distance 1.08 from a thirteenth atom in their
    centre.
    """
    golden = (1 + 5**0.5) / 2
    face = np.array([[0, a, b * golden] for a in (-1, 1) for b in (-1, 1)])
    vertices = np.concatenate([np.roll(face, shift, axis=1) for shift in range(3)])
    return np.concatenate([np.zeros((1, 3)), 1.08 * vertices / np.sqrt(1 + golden**2)])


DIMER = np.array([[0.0, 0.0, 0.0], [2 ** (1 / 6), 0.0, 0.0]])


# A Gaussian process: hyperparameters are the logarithms of two lengths, of the signal's
# variance and of the noise's


def minus_log_evidence(theta, X, y):
    scaled = X / jnp.exp(theta[:2])
    squares = jnp.sum((scaled[:, None] - scaled[None]) ** 2, axis=2)
    K = jnp.exp(theta[2] - 0.5 * squares) + jnp.exp(theta[3]) * jnp.eye(len(X), dtype=X.dtype)
    L = jnp.linalg.cholesky(K)
    white = jax.scipy.linalg.solve_triangular(L, y, lower=True)
    return 0.5 * white @ white + jnp.sum(jnp.log(jnp.diag(L))) + 0.5 * len(X) * jnp.log(2 * jnp.pi)


def kernel_derivatives(theta, X):
    """Return K, its four first derivatives, and its second derivatives[4, 4], by
    hand.
    """
    squares = [squareform(pdist(X[:, [k]], "sqeuclidean")) * np.exp(-2 * theta[k]) for k in range(2)]
    signal, noise = np.exp(theta[2] - 0.5 * (squares[0] + squares[1])), np.exp(theta[3]) * np.eye(len(X))
    factors = [*squares, np.ones_like(signal)]  # the derivative of the signal is the signal times these
    first = np.stack([*(signal * factor for factor in factors), noise])
    second = np.zeros((4, 4, *noise.shape))
    second[3, 3] = noise
    for i in range(3):
        for j in range(3):
            second[i, j] = signal * factors[i] * factors[j]
        second[i, i] -= (2 * first[i]) if i < 2 else 0.0
    return signal + noise, first, second


def minus_log_evidence_gradient(theta, X, y):
    """Return the gradient by Rasmussen and Williams (2006), (5.9)."""
    K, first, _ = kernel_derivatives(theta, X)
    inverse = np.linalg.inv(K)
    alpha = inverse @ y
    return np.array([-0.5 * np.trace((np.outer(alpha, alpha) - inverse) @ K_i) for K_i in first])


def minus_log_evidence_hessian(theta, X, y):
    """Return the derivative of (5.9): d alpha = -inv(K) K_j alpha, d inv(K) = -inv(K)
    K_j inv(K).
    """
    K, first, second = kernel_derivatives(theta, X)
    inverse = np.linalg.inv(K)
    alpha = inverse @ y
    H = np.zeros((4, 4))
    for i, K_i in enumerate(first):
        for j, K_j in enumerate(first):
            H[i, j] = alpha @ K_i @ inverse @ K_j @ alpha - 0.5 * np.trace(inverse @ K_j @ inverse @ K_i)
            H[i, j] -= 0.5 * np.trace((np.outer(alpha, alpha) - inverse) @ second[i, j])
    return H


# Control flow


def control(u, A, B):
    """Return the cost of a linear system s' = A s + B u_t under scan: |s_t|^2 / 2
    summed, and |u|^2 / 2.
    """

    def step(s, u_t):
        s = A @ s + B @ u_t
        return s, 0.5 * s @ s

    _, costs = lax.scan(step, jnp.ones(len(A), u.dtype), u)
    return jnp.sum(costs) + 0.5 * jnp.sum(u**2)


def control_hessian(u, A, B):
    """Return I + G'G, where G[t, s] = A^(t-s) B takes the input at s to the state at
    t.
    """
    steps = len(u)
    power = [np.linalg.matrix_power(A, k) @ B for k in range(steps)]
    G = np.block([[power[t - s] if s <= t else np.zeros_like(B) for s in range(steps)] for t in range(steps)])
    return np.eye(u.size) + G.T @ G


def recurrent(params, inputs, targets):
    def step(h, input_and_target):
        z, target = input_and_target
        h = jnp.tanh(params["recur"] @ h + params["in"] @ z)
        return h, (params["out"] @ h - target) ** 2

    return jnp.sum(lax.scan(step, jnp.zeros(4, inputs.dtype), (inputs, targets))[1])


def either(x):
    return lax.cond(jnp.sum(x) > 0, lambda x: jnp.sum(x**4), lambda x: jnp.sum(jnp.exp(x)), x)


def heron(x):
    """Return the sum of square roots, by Heron's iteration with a fixed number of
    steps: a fori_loop that is a scan.
    """
    return jnp.sum(lax.fori_loop(0, 12, lambda _, y: 0.5 * (y + x / y), jnp.ones_like(x)))


def newton_roots(x):
    """Return y with y^3 + y = x, elementwise, by Newton's steps in a while_loop until y
    stays the same.
    """

    def unfinished(state):
        count, _, change = state
        return (change > 1e-6) & (count < 50)  # Newton squares the error: the last step leaves rounding

    def newton(state):
        count, y, _ = state
        change = (y**3 + y - x) / (3 * y**2 + 1)
        return count + 1, y - change, jnp.max(jnp.abs(change))

    return lax.while_loop(unfinished, newton, (0, jnp.zeros_like(x), jnp.array(1.0, x.dtype)))[1]


def implicit(x):
    """Return the sum of squares of the roots. custom_root differentiates the roots'
    equation, and never the loop.
    """
    roots = lax.custom_root(
        lambda y: y**3 + y - x,
        jnp.zeros_like(x),
        lambda f, _: newton_roots(x),
        lambda g, rhs: rhs / g(jnp.ones_like(rhs)),
    )
    return jnp.sum(roots**2)


def real_roots(x):
    """Return the roots by Cardano's formula, in the form for one real root that does
    not cancel.
    """
    return 2 / np.sqrt(3) * np.sinh(np.arcsinh(1.5 * np.sqrt(3) * x) / 3)


def implicit_hessian(x):
    y = real_roots(x)
    first = 1 / (3 * y**2 + 1)
    return np.diag(2 * first**2 - 12 * y**2 * first**3)


# Transforms, random numbers, integers


def power_spectrum(x, weights):
    return jnp.sum(weights * jnp.abs(jnp.fft.rfft(x)) ** 2)


def power_spectrum_hessian(x, weights):
    """Return the circulant Hessian. Its first column is the weights' cosine
    transform.
    """
    angles = 2 * np.pi * np.outer(np.arange(len(x)), np.arange(len(weights))) / len(x)
    return scipy.linalg.circulant(2 * np.cos(angles) @ weights)


def log_cosh(z):
    return jnp.logaddexp(z, -z) - np.log(2.0)


def filtered(x, c):
    """Return the sum of log cosh of the circular convolution of c and x."""
    return jnp.sum(log_cosh(jnp.fft.irfft(jnp.fft.rfft(c) * jnp.fft.rfft(x), len(x))))


def filtered_hessian(x, c):
    C = scipy.linalg.circulant(c)
    return (C.T / np.cosh(C @ x) ** 2) @ C


def draw(key):
    """Return features[40, 6] of a key. They have 32 bits, so that both precisions see
    the same numbers.
    """
    return jax.random.normal(jax.random.wrap_key_data(key), (40, 6), jnp.float32)


def random_features(x, key):
    return jnp.mean(log_cosh(draw(key).astype(x.dtype) @ x))


def random_features_hessian(x, key):
    Z = np.asarray(draw(key), np.float64)
    return (Z.T / np.cosh(Z @ x) ** 2) @ Z / len(Z)


def key_data(seed):
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


TOKENS = np.array([[1, 4, 1], [6, 3, 4]])
"""Tokens of a vocabulary of eight: 0, 2, 5 and 7 never occur."""


def gathered(table, tokens, U):
    return jnp.sum(log_cosh(jnp.sum(table[tokens] * U, axis=-1)))


def gathered_hessian(table, tokens, U):
    size = table.shape[1]
    H = np.zeros((len(table), size, len(table), size))
    for token, u in zip(tokens.ravel(), U.reshape(-1, size), strict=True):
        H[token, :, token] += np.outer(u, u) / np.cosh(table[token] @ u) ** 2
    return H.reshape(table.size, table.size)


# Networks


def convolutional(params, images, labels):
    """Return the loss of two convolutions, the second with stride, mean pooling, a
    linear layer, cross-entropy.
    """
    layout = ("NHWC", "HWIO", "NHWC")
    h = jnp.tanh(lax.conv_general_dilated(images, params["one"], (1, 1), "SAME", dimension_numbers=layout))
    h = jnp.tanh(lax.conv_general_dilated(h, params["two"], (2, 2), "VALID", dimension_numbers=layout))
    return cross_entropy(jnp.mean(h, axis=(1, 2)) @ params["out"], labels)


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1))


def layer_norm(h, scale, bias):
    centred = h - jnp.mean(h, axis=-1, keepdims=True)
    return scale * centred * lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-2) + bias


def transformer(params, tokens, labels):
    """Return the loss of a causal block: two heads with pre-normalization, a GELU
    network, and logits by the tied embedding.
    """
    h = params["embed"][tokens]
    q, k, v = jnp.einsum("td,kdhe->khte", layer_norm(h, *params["norm1"]), params["qkv"])
    scores = q @ jnp.swapaxes(k, -1, -2) / np.sqrt(2.0)
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    attended = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)) @ v
    h = h + jnp.einsum("hte,hed->td", attended, params["out"])
    h = h + jax.nn.gelu(layer_norm(h, *params["norm2"]) @ params["up"]) @ params["down"]
    return cross_entropy(h @ params["embed"].T, labels)


def relu_network(params, X, y):
    return 0.5 * jnp.mean((jax.nn.relu(X @ params["w1"] + params["b1"]) @ params["w2"] - y) ** 2)


RELU = Case(
    relu_network,
    {"w1": normal(40, 3, 5), "b1": normal(41, 5), "w2": normal(42, 5)},
    (normal(43, 12, 3), normal(44, 12)),
)

ZOO = {
    "laplacian/dirichlet": laplacian_case("dirichlet"),
    "laplacian/neumann": laplacian_case("neumann"),
    "laplacian/periodic": laplacian_case("periodic"),
    "quadratic": Case(quadratic, normal(3, 20), ((BASIS * SPECTRUM) @ BASIS.T,), lambda x, A: (A + A.T) / 2),
    "least_squares": Case(
        least_squares,
        {"w": normal(4, 7), "b": normal(5)},
        (normal(6, 30, 7), normal(7, 30)),
        least_squares_hessian,
    ),
    "log_sum_exp": Case(jax.nn.logsumexp, normal(8, 15, scale=2.0), hessian=log_sum_exp_hessian),
    "log_det": Case(minus_log_det, normal(9, 4, 4) + 4 * np.eye(4), hessian=minus_log_det_hessian),
    "lennard_jones/dimer": Case(lennard_jones, DIMER, hessian=lennard_jones_hessian),
    "lennard_jones/cluster": Case(
        lennard_jones, icosahedron() + normal(10, 13, 3, scale=0.05), hessian=lennard_jones_hessian
    ),
    "gaussian_process": Case(
        minus_log_evidence,
        np.array([0.2, -0.3, 0.4, -1.0]),
        (normal(11, 25, 2), normal(12, 25)),
        minus_log_evidence_hessian,
    ),
    "scan/control": Case(control, normal(13, 6, 2), (normal(14, 3, 3, scale=0.5), normal(15, 3, 2)), control_hessian),
    "scan/recurrent": Case(
        recurrent,
        {"recur": normal(16, 4, 4, scale=0.5), "in": normal(17, 4, 2), "out": normal(18, 4)},
        (normal(19, 6, 2), normal(20, 6)),
    ),
    "cond/true": Case(either, normal(21, 6) + 1.0, hessian=lambda x: np.diag(12 * x**2)),
    "cond/false": Case(either, normal(22, 6) - 1.0, hessian=lambda x: np.diag(np.exp(x))),
    "fori_loop": Case(heron, 0.5 + normal(23, 6) ** 2, hessian=lambda x: np.diag(-0.25 * x**-1.5)),
    "custom_root": Case(implicit, normal(24, 6, scale=3.0), hessian=implicit_hessian),
    "fft/even": Case(power_spectrum, normal(25, 12), (normal(26, 7) ** 2,), power_spectrum_hessian),
    "fft/odd": Case(power_spectrum, normal(27, 13), (normal(28, 7) ** 2,), power_spectrum_hessian),
    "fft/filtered": Case(filtered, normal(29, 12), (normal(30, 12, scale=0.5),), filtered_hessian),
    "random": Case(random_features, normal(31, 6), (key_data(5),), random_features_hessian),
    "gather": Case(gathered, normal(32, 8, 3), (TOKENS, normal(33, 2, 3, 3)), gathered_hessian),
    "convolutional": Case(
        convolutional,
        {"one": normal(34, 3, 3, 1, 3, scale=0.5), "two": normal(35, 2, 2, 3, 4, scale=0.5), "out": normal(36, 4, 3)},
        (normal(37, 6, 6, 6, 1), np.arange(6) % 3),
    ),
    "relu": RELU,
    "transformer": Case(
        transformer,
        {
            "embed": normal(50, 6, 4),
            "norm1": 1.0 + normal(51, 2, 4, scale=0.3),
            "qkv": normal(52, 3, 4, 2, 2, scale=0.5),
            "out": normal(53, 2, 2, 4, scale=0.5),
            "norm2": 1.0 + normal(54, 2, 4, scale=0.3),
            "up": normal(55, 4, 8, scale=0.5),
            "down": normal(56, 8, 4, scale=0.5),
        },
        (np.array([3, 1, 4, 1, 5, 0, 2]), np.array([1, 4, 1, 5, 0, 2, 3])),
    ),
}
# Numbers of 32 bits, so that both precisions are asked for the Hessian at the same
# place.
ZOO = {
    name: case._replace(
        x=cast(cast(case.x, np.float32), np.float64), data=cast(cast(case.data, np.float32), np.float64)
    )
    for name, case in ZOO.items()
}


@functools.cache
def truth(name):
    """Return the dense Hessian of a case, in float64 and without hvpd."""
    case = ZOO[name]
    if case.hessian is not None:
        return case.hessian(case.x, *case.data)
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(case.x)
        return np.asarray(jax.jit(jax.hessian(lambda x: case.fun(unravel(x), *case.data)))(flat))


def differenced(name):
    """Return gradient and Hessian by central differences of values and gradients.
    Richardson's step leaves errors of h^4.
    """
    case, h = ZOO[name], 5e-4
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree(case.x)
        derive = jax.value_and_grad(lambda x: case.fun(unravel(x), *case.data))
        evaluate = jax.jit(lambda points: jax.lax.map(derive, points))  # A batched convolution takes 20 s.
        steps = np.concatenate([step * np.eye(len(flat)) for step in (h, -h, h / 2, -h / 2)])
        outputs = [np.split(np.asarray(output), 4) for output in evaluate(np.asarray(flat) + steps)]
    return [
        (4 * (right - left) / h - (far_right - far_left) / (2 * h)) / 3 for far_right, far_left, right, left in outputs
    ]
