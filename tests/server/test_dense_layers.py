"""The layers of a model that are found in its jaxpr, and their factors, against closed
forms and dense Jacobians.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd._operators import kronecker
from hvpd.v1 import objective_pb2, tensor_pb2
from hvpd_server.derivation import dense_layers as _dense
from hvpd_server.derivation import layout as _layout
from hvpd_server.derivation import products as _derivatives

pytestmark = pytest.mark.slow  # Real programs, compiled and run.

SIZE = 4  # Rows, inputs and outputs have one size, so no extent identifies an axis.
CLASSES = 3
OUT = np.random.default_rng(7).normal(size=(SIZE, CLASSES))


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def cross_entropy(z, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1))


def softmax(z):
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""The compiler's options. The programs are small, so compiling them takes the time."""


def trace(model, params, X, labels=None, loss=cross_entropy, **options):
    """Return the found layers by name, the flat x, and a function of the factors
    there.
    """
    leaves, treedef = jax.tree.flatten(params)
    names = ["/".join(str(key.key) for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    labels = np.zeros(len(X), int) if labels is None else labels
    stages = _derivatives.Stages(
        lambda x, X, labels: model(jax.tree.unflatten(treedef, x), X),
        lambda z, X, labels: loss(z, labels),
        arguments=2,
        rows=jax.eval_shape(model, params, X).shape[0],
    )
    layout = _layout.Layout([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves])
    composite = objective_pb2.Composite(**{"reduction": "mean", "samples": 1} | options)
    factors = _dense.Factors.of(
        stages, layout, [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (X, labels)], composite
    )
    dtype = np.result_type(np.float32, *(leaf.dtype for leaf in leaves if leaf.dtype == np.float64))
    flat = np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(dtype)
    slices, start = {}, 0
    for name, leaf in zip(names, leaves, strict=True):
        slices[name] = slice(start, start + leaf.size)
        start += leaf.size
    bundle = objective_pb2.Bundle(x_leaves=[tensor_pb2.ArraySpec(shape=leaf.shape) for leaf in leaves])
    return SimpleNamespace(
        factors=factors,
        layers=kronecker.dense_layers(bundle, [layer.message for layer in factors.layers], slices),
        transposed=[layer.message.transposed for layer in factors.layers],
        flat=flat,
        kfac=lambda: [
            np.asarray(each) for each in jax.jit(factors.kfac).lower(flat, X, labels).compile(QUICKLY)(flat, X, labels)
        ],
    )


def found(*args, **kwargs):
    """Return the kernel and the bias of each layer."""
    return [(layer.kernel, layer.bias) for layer in trace(*args, **kwargs).layers]


def assert_close(found, expected, tolerance=1e-12):
    assert np.shape(found) == np.shape(expected)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def assert_exact_for_one_row(model, params, X):
    """Compare A (x) G of one row with the Gauss-Newton matrix's block, from dense
    derivatives of model and loss.
    """
    traced = trace(model, params, X)
    jacobian = jax.jacrev(model)(params, X)
    J = np.concatenate(
        [np.asarray(J).reshape(CLASSES, -1) for J in jax.tree.leaves(jacobian)], axis=1
    )  # J[1, classes, *leaf]
    z = model(params, X)
    H = np.asarray(jax.hessian(cross_entropy)(z, np.zeros(1, int))).reshape(CLASSES, CLASSES)
    dense = J.T @ H @ J
    factors = traced.kfac()
    assert len(factors) == 2 * len(traced.layers) > 0
    for layer, A, G in zip(traced.layers, factors[::2], factors[1::2], strict=True):
        inside = layer.elements.reshape(-1)
        assert_close(np.kron(A, G), dense[np.ix_(inside, inside)])


# Every way to write a layer: (function, transposed). W is [in, out] or [out, in], as
# the layer takes it.

LAYERS = {
    "x @ W": (lambda W, b, X: X @ W + b, False),
    "bias first": (lambda W, b, X: b + X @ W, False),
    "x @ W.T": (lambda W, b, X: X @ W.T + b, True),
    "transposed twice": (lambda W, b, X: X @ W.T.T + b, False),
    "columns as rows": (lambda W, b, X: (W @ X.T).T + b, True),
    "columns as rows, bias before the transpose": (lambda W, b, X: (W @ X.T + b[:, None]).T, True),
    "columns as rows, W.T": (lambda W, b, X: (W.T @ X.T + b[:, None]).T, False),
    "einsum": (lambda W, b, X: jnp.einsum("ni,io->no", X, W) + b, False),
    "einsum, kernel first": (lambda W, b, X: jnp.einsum("oi,ni->no", W, X) + b, True),
    "einsum, rows last": (lambda W, b, X: (jnp.einsum("ni,io->on", X, W) + b[:, None]).T, False),
    "einsum of columns": (lambda W, b, X: jnp.einsum("in,oi->no", X.T, W) + b, True),
    "tensordot": (lambda W, b, X: jnp.tensordot(X, W, 1) + b, False),
    "dot_general": (lambda W, b, X: jax.lax.dot_general(W, X, (((0,), (1,)), ((), ()))).T + b, False),
    "vmap of W @ x": (lambda W, b, X: jax.vmap(lambda x: W @ x + b)(X), True),
    "vmap of x @ W": (lambda W, b, X: jax.vmap(lambda x: x @ W + b)(X), False),
    "vmap over columns": (lambda W, b, X: jax.vmap(lambda x: x @ W + b, in_axes=1, out_axes=1)(X.T).T, False),
    "jit": (lambda W, b, X: jax.jit(lambda W, b, X: X @ W + b)(W, b, X), False),
    "jit in jit": (lambda W, b, X: jax.jit(lambda W, b, X: jax.jit(jnp.matmul)(X, W) + b)(W, b, X), False),
    "checkpoint": (lambda W, b, X: jax.checkpoint(lambda W, b, X: X @ W + b)(W, b, X), False),
    "jit, bias outside": (lambda W, b, X: jax.jit(lambda W, X: X @ W.T)(W, X) + b, True),
    "b[None, :]": (lambda W, b, X: X @ W + b[None, :], False),
    "b.reshape(1, -1)": (lambda W, b, X: X @ W + b.reshape(1, -1), False),
    "b broadcast by hand": (lambda W, b, X: X @ W + jnp.broadcast_to(b, (len(X), SIZE)), False),
    "broadcast by the addition": (
        lambda W, b, X: jnp.mean(X[:, None] @ W + jnp.broadcast_to(b, (len(X), 3, SIZE)), axis=1),
        False,
    ),
    "copies": (lambda W, b, X: X @ jnp.array(W) + jnp.array(b), False),
    "an axis in front, taken away": (lambda W, b, X: X @ jnp.squeeze(W[None], 0) + jnp.squeeze(b[None], 0), False),
    "an axis at the end, taken away": (lambda W, b, X: X @ W[..., None].reshape(SIZE, SIZE) + b, False),
    "converted and back": (lambda W, b, X: X @ W.astype(jnp.float64) + b.astype(jnp.float64), False),
    "rows merged, then split": (
        lambda W, b, X: ((X[:, None].reshape(-1, SIZE) @ W).reshape(len(X), 1, SIZE) + b)[:, 0],
        False,
    ),
    "half of the rows along another axis": (
        lambda W, b, X: (X.reshape(-1, max(len(X) // 2, 1), SIZE) @ W).reshape(-1, SIZE) + b,
        False,
    ),
}


@pytest.mark.parametrize("way", LAYERS)
def test_every_way_to_write_a_layer_gives_the_closed_form(way):
    """With y = x W + b and z = tanh(y) OUT: A = mean of (x, 1)(x, 1)', G = sum over
    rows of D OUT (diag(p) - p p') OUT' D / rows.
    """
    rng = np.random.default_rng(0)
    W, b, X = rng.normal(size=(SIZE, SIZE)), rng.normal(size=SIZE), rng.normal(size=(SIZE, SIZE))
    layer, transposed = LAYERS[way]
    params = {"W": W.T.copy() if transposed else W, "b": b}
    model = lambda p, X: jnp.tanh(layer(p["W"], p["b"], X)) @ OUT  # noqa: E731
    traced = trace(model, params, X)
    (only,) = traced.layers
    assert (only.kernel, only.bias, traced.transposed) == ("W", "b", [transposed])
    assert np.array_equal(traced.flat[only.elements], np.vstack([W, b]))
    t = np.tanh(X @ W + b)
    p = softmax(t @ OUT)
    H = (np.einsum("ri,ij->rij", p, np.eye(CLASSES)) - np.einsum("ri,rj->rij", p, p)) / SIZE
    ones = np.hstack([X, np.ones((SIZE, 1))])
    A, G = traced.kfac()
    assert_close(A, ones.T @ ones / SIZE)
    assert_close(G, np.einsum("rq,qi,rij,pj,rp->qp", 1 - t**2, OUT, H, OUT, 1 - t**2))
    assert_exact_for_one_row(model, params, X[:1])


@pytest.mark.parametrize("way", ["x @ W", "x @ W.T", "columns as rows", "vmap of W @ x"])
def test_kernels_that_are_not_square_without_a_bias(way):
    rng = np.random.default_rng(0)
    W, X = rng.normal(size=(6, SIZE)), rng.normal(size=(5, 6))
    layer, transposed = LAYERS[way]
    params = {"W": W.T.copy() if transposed else W}
    model = lambda p, X: jnp.tanh(layer(p["W"], 0.0 if "columns" in way else np.zeros(SIZE), X)) @ OUT  # noqa: E731
    traced = trace(model, params, X)
    (only,) = traced.layers
    assert (only.kernel, only.bias, traced.transposed) == ("W", None, [transposed])
    assert np.array_equal(traced.flat[only.elements], W)
    assert_close(traced.kfac()[0], X.T @ X / 5)
    assert_exact_for_one_row(model, params, X[:1])


@pytest.mark.parametrize(
    "layer",
    [
        lambda W, b, X: X + jnp.tanh(X) @ W + b,
        lambda W, b, X: X + (jnp.tanh(X) @ W + b),
        lambda W, b, X: b + (2 * X + X @ W.T + 1.0),
    ],
)
def test_a_bias_is_found_after_other_additions(layer):
    rng = np.random.default_rng(0)
    params, X = {"W": rng.normal(size=(SIZE, SIZE)), "b": rng.normal(size=SIZE)}, rng.normal(size=(5, SIZE))
    model = lambda p, X: jnp.tanh(layer(p["W"], p["b"], X)) @ OUT  # noqa: E731
    (only,) = trace(model, params, X).layers
    assert (only.kernel, only.bias) == ("W", "b")
    assert_exact_for_one_row(model, params, X[:1])


# Leaves that look like a bias, and are none. The kernel is found without them.


def twice(y, b):
    return jnp.tanh(y + b) + b


NO_BIAS = {
    "added twice": lambda W, b, X: twice(X @ W, b),
    "broadcast once, added twice": lambda W, b, X: twice(X @ W, jnp.broadcast_to(b, (len(X), SIZE))),
    "also an output": lambda W, b, X: jnp.concatenate([X @ W + b, jnp.broadcast_to(b, (len(X), SIZE))], axis=1),
    "scaled": lambda W, b, X: X @ W + 2 * b,
    "subtracted": lambda W, b, X: X @ W - b,
    "reversed": lambda W, b, X: X @ W + b[::-1],
    "added after the activation": lambda W, b, X: jnp.tanh(X @ W) + b,
    "where y is read once more": lambda W, b, X: twice(b, X @ W),
    "multiplied": lambda W, b, X: X @ W * b,
    "in a branch": lambda W, b, X: X @ W + jax.lax.cond(X[0, 0] > 0, lambda: b, lambda: -b),
    "where y is cut": lambda W, b, X: (X @ W)[:, :2] + b[:2],
    "where y is reshaped": lambda W, b, X: ((X @ W).reshape(-1, 2, 2) + b.reshape(2, 2)).reshape(-1, SIZE),
}


@pytest.mark.parametrize("way", NO_BIAS)
def test_additions_that_only_look_like_a_bias_are_not_taken(way):
    rng = np.random.default_rng(1)
    params = {"W": rng.normal(size=(SIZE, SIZE)), "b": rng.normal(size=SIZE)}
    X = rng.normal(size=(SIZE, SIZE))

    def model(p, X):
        y = NO_BIAS[way](p["W"], p["b"], X)
        return jnp.tanh(y) @ np.resize(OUT, (y.shape[1], CLASSES))

    assert found(model, params, X) == [("W", None)]
    assert_exact_for_one_row(model, params, X[:1])


@pytest.mark.parametrize("rows", [1, SIZE])
def test_a_bias_along_the_rows_is_none(rows):
    """The layer's y is square."""
    rng = np.random.default_rng(1)
    params = {"W": rng.normal(size=(SIZE, SIZE)), "b": rng.normal(size=rows)}
    model = lambda p, X: jnp.tanh(X @ p["W"] + p["b"][:, None]) @ OUT  # noqa: E731
    assert found(model, params, rng.normal(size=(rows, SIZE))) == [("W", None)]
    columns = lambda p, X: jnp.tanh((p["W"] @ X.T + p["b"]).T) @ OUT  # noqa: E731
    assert found(columns, params, rng.normal(size=(rows, SIZE))) == [("W", None)]
    assert_exact_for_one_row(model, params | {"b": np.ones(1)}, rng.normal(size=(1, SIZE)))


def test_a_bias_that_is_broadcast_along_the_channels_is_none():
    """One case has one number for all channels. The other broadcasts a y of one channel
    to a bias.
    """
    rng = np.random.default_rng(1)
    X = rng.normal(size=(3, SIZE))
    model = lambda p, X: (X @ p["W"] + p["b"]) @ OUT  # noqa: E731
    for W, b in [((SIZE, SIZE), 1), ((SIZE, 1), SIZE)]:
        params = {"W": rng.normal(size=W), "b": rng.normal(size=b)}
        assert found(model, params, X) == [("W", None)]
        assert_exact_for_one_row(model, params, X[:1])
    broadcast = lambda p, X: (X @ p["W"] + jnp.broadcast_to(p["b"][None], (len(X), SIZE))) @ OUT  # noqa: E731
    params = {"W": rng.normal(size=(SIZE, SIZE)), "b": rng.normal(size=1)}
    assert found(broadcast, params, X) == [("W", None)]


def test_one_channel_has_its_bias():
    rng = np.random.default_rng(1)
    params = {"W": rng.normal(size=(SIZE, 1)), "b": rng.normal(size=1)}
    model = lambda p, X: jnp.tanh(X @ p["W"] + p["b"]) @ OUT[:1]  # noqa: E731
    assert found(model, params, rng.normal(size=(3, SIZE))) == [("W", "b")]
    assert_exact_for_one_row(model, params, rng.normal(size=(1, SIZE)))


# Operations that are no layer. Each model has a leaf "V" that makes a layer, so that a
# search that stops altogether is noticed.


@jax.custom_vjp
def own_derivative(W, X):
    return X @ W


own_derivative.defvjp(lambda W, X: (X @ W, (W, X)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))


@jax.jit
def jitted(W, X):
    return jnp.tanh(X @ W)


def normalized(p, X):
    centered = X - jnp.mean(X, axis=-1, keepdims=True)
    return centered / jnp.sqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-6) * p["scale"] + p["shift"]


def convolved(p, X):
    return jax.lax.conv_general_dilated(X.reshape(-1, 1, 2, 2), p["W"], (1, 1), "SAME").reshape(len(X), -1)


SQUARE, COLUMN, ROW = (SIZE, SIZE), (SIZE, 1), (1, SIZE)

NO_LAYER = {
    "tied": ({"W": SQUARE}, lambda p, X: jnp.tanh(X @ p["W"]) @ p["W"]),
    "tied to its transpose": ({"W": SQUARE}, lambda p, X: jnp.tanh(X @ p["W"]) @ p["W"].T),
    "tied, under jit": ({"W": SQUARE}, lambda p, X: jax.jit(lambda W, X: jnp.tanh(X @ W) @ W)(p["W"], X)),
    "tied, one jit each": ({"W": SQUARE}, lambda p, X: jitted(p["W"], jitted(p["W"], X))),
    "its own Gram matrix": ({"W": SQUARE}, lambda p, X: X @ (p["W"] @ p["W"])),
    "also in the output": ({"W": SQUARE}, lambda p, X: X @ p["W"] + jnp.sum(p["W"] ** 2)),
    "scaled": ({"W": SQUARE}, lambda p, X: X @ (0.5 * p["W"])),
    "masked": ({"W": SQUARE}, lambda p, X: X @ jnp.where(np.tri(SIZE, dtype=bool), p["W"], 0.0)),
    "cut": ({"W": SQUARE}, lambda p, X: X[:, :2] @ p["W"][:2]),
    "reversed": ({"W": SQUARE}, lambda p, X: X @ p["W"][::-1]),
    "reshaped": ({"W": (2, 8)}, lambda p, X: X @ p["W"].reshape(SQUARE)),
    "reshaped to a transposed shape": ({"W": SQUARE}, lambda p, X: X[:, :2] @ p["W"].reshape(2, 8)[:, :4]),
    "reshaped in another order": ({"W": SQUARE}, lambda p, X: X @ p["W"].reshape(SQUARE, order="F")),
    "in a scan": ({"W": SQUARE}, lambda p, X: jax.lax.scan(lambda c, x: (c, x @ p["W"]), 0.0, X)[1]),
    "scanned over": ({"W": SQUARE}, lambda p, X: jax.lax.scan(lambda c, w: (c + w, X @ w), 0 * X[0], p["W"])[1].T),
    "in a loop": (
        {"W": SQUARE},
        lambda p, X: jax.lax.fori_loop(0, 2, lambda i, X: jnp.tanh(X @ p["W"]), X),
    ),
    "in a branch": (
        {"W": SQUARE},
        lambda p, X: jax.lax.cond(X[0, 0] > 0, lambda W: X @ W, lambda W: -X @ W, p["W"]),
    ),
    "in a function with its own derivative": ({"W": SQUARE}, lambda p, X: own_derivative(p["W"], X)),
    "stopped": ({"W": SQUARE}, lambda p, X: X @ jax.lax.stop_gradient(p["W"])),
    "rounded to integers": ({"W": SQUARE}, lambda p, X: X @ p["W"].astype(int)),
    "integers only": ({"W": SQUARE}, lambda p, X: (X.astype(int) @ p["W"].astype(int)).astype(float)),
    "into integers": (
        {"W": SQUARE},
        lambda p, X: jax.lax.dot(X, p["W"], preferred_element_type=jnp.int32).astype(float),
    ),
    "of complex inputs": ({"W": SQUARE}, lambda p, X: jnp.real(jax.lax.dot(X.astype(complex), p["W"]))),
    "complex": ({"W": SQUARE}, lambda p, X: jnp.real(X @ p["W"].astype(complex))),
    "broadcast along the inputs": ({"W": ROW}, lambda p, X: X @ jnp.broadcast_to(p["W"], SQUARE)),
    "broadcast along the outputs": ({"W": COLUMN}, lambda p, X: X @ jnp.broadcast_to(p["W"], SQUARE)),
    "a batch of one kernel": (
        {"W": SQUARE},
        lambda p, X: jnp.einsum("nbi,bio->no", X[:, None], jnp.broadcast_to(p["W"], (1, *SQUARE))),
    ),
    "a kernel that is copied for several": (
        {"W": SQUARE},
        lambda p, X: jnp.tensordot(X, jnp.broadcast_to(p["W"], (2, *SQUARE)), ([1], [1])).sum(axis=1),
    ),
    "a kernel for each of several": ({"W": (1, *SQUARE)}, lambda p, X: jnp.einsum("nbi,bio->no", X[:, None], p["W"])),
    "a vector": ({"W": (SIZE,)}, lambda p, X: jnp.tanh(X @ p["W"])[:, None] * np.ones(SIZE)),
    "summed along one axis": (
        {"W": SQUARE},
        lambda p, X: jnp.einsum("ni,ij->n", X, p["W"])[:, None] * np.ones(SIZE),
    ),
    "contracted along both axes": (
        {"W": SQUARE},
        lambda p, X: jnp.tensordot(X[:, :, None] * X[:, None], p["W"], 2)[:, None] * np.ones(SIZE),
    ),
    "a vector for each row": (
        {"W": SQUARE},
        lambda p, X: jnp.einsum("ni,ni->n", X, p["W"])[:, None] * np.ones(SIZE),
    ),
    "elementwise": ({"W": SQUARE}, lambda p, X: X * p["W"][0] + p["W"][1]),
    "looked up": ({"W": SQUARE}, lambda p, X: p["W"][jnp.argmax(X, axis=1)]),
    "a product of two leaves": ({"B": COLUMN, "C": ROW}, lambda p, X: X @ (p["B"] @ p["C"])),
    "a low-rank update": ({"W": SQUARE, "B": COLUMN, "C": ROW}, lambda p, X: X @ (p["W"] + p["B"] @ p["C"])),
    "of a leaf": ({"W": SQUARE, "a": SQUARE}, lambda p, X: X + (jnp.tanh(p["a"]) @ p["W"])[0]),
    "of what no row changes": (
        {"W": SQUARE},
        lambda p, X: X + jnp.mean(jnp.sin(jnp.arange(16.0)).reshape(SQUARE) @ p["W"], axis=0),
    ),
    "of fewer rows than there are": ({"W": SQUARE}, lambda p, X: X + jnp.mean(X, axis=0, keepdims=True) @ p["W"]),
    "of rows that are no multiple": ({"W": SQUARE}, lambda p, X: X + jnp.sum(X.reshape(-1)[:8].reshape(2, 4) @ p["W"])),
    "a normalization": ({"scale": (SIZE,), "shift": (SIZE,)}, normalized),
    "a convolution": ({"W": (1, 1, 2, 2)}, convolved),
    "a kernel without elements": ({"W": (SIZE, 0), "b": (0,)}, lambda p, X: X + jnp.sum(X @ p["W"] + p["b"])),
}


@pytest.mark.parametrize("way", NO_LAYER)
def test_stages_that_only_look_like_a_layer_are_not_taken(way):
    rng = np.random.default_rng(2)
    shapes, stage = NO_LAYER[way]
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()} | {"V": rng.normal(size=(SIZE, CLASSES))}
    model = lambda p, X: jnp.tanh(stage(p, X)) @ p["V"]  # noqa: E731
    assert found(model, params, rng.normal(size=(SIZE, SIZE))) == [("V", None)]


def test_a_model_of_one_example_that_returns_its_vector_has_no_rows_to_go_by():
    """z[0] is not the first of several examples here."""
    params = {"W": np.ones((2, 3))}
    assert (
        found(lambda p, x: x @ p["W"], params, np.ones(2), np.zeros(3), loss=lambda z, y: jnp.sum((z - y) ** 2)) == []
    )


@pytest.mark.parametrize(("rows", "outputs"), [(0, 3), (4, 0)])
def test_models_that_return_nothing_have_no_layers(rows, outputs):
    params, Y = {"W": np.ones((2, 3))}, np.zeros((rows, outputs))
    model = lambda p, X: (X @ p["W"])[:, :outputs]  # noqa: E731
    assert found(model, params, np.ones((rows, 2)), Y, loss=lambda z, y: jnp.sum((z - y) ** 2)) == []


# Whole networks


def transformer(p, X, nudges=None, seen=None):
    """Return a transformer of one layer: attention of two heads, a gated and a
    rectified dense part, norms. X[rows, positions, features].
    """
    nudges, seen = nudges or {}, {} if seen is None else seen

    def dense(name, a, bias=None):
        seen[name] = a
        y = a @ p[name]
        y = y + nudges[name] if name in nudges else y
        return y if bias is None else y + p[bias]

    def norm(a, name):
        centered = a - jnp.mean(a, axis=-1, keepdims=True)
        return centered / jnp.sqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + 1e-5) * p[name]

    heads = lambda a: a.reshape(*a.shape[:2], 2, -1)  # noqa: E731
    h = norm(X + p["position"], "norm1")
    q, k, v = (heads(dense(name, h)) for name in ("q", "k", "v"))
    weights = jax.nn.softmax(jnp.einsum("bthc,bshc->bhts", q, k) / np.sqrt(q.shape[-1]), axis=-1)
    X = X + dense("o", jnp.einsum("bhts,bshc->bthc", weights, v).reshape(X.shape), "ob")
    h = norm(X, "norm2")
    up = jax.nn.relu(dense("up", h, "upb")) * jax.nn.silu(dense("gate", h))
    X = X + dense("down", up, "downb")
    return dense("head", jnp.mean(X, axis=1), "headb")


@functools.cache
def transformer_problem():
    rng = np.random.default_rng(3)
    D, F = 4, 6
    shapes = {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "ob": D, "up": (D, F), "upb": F, "gate": (D, F)}
    shapes |= {"down": (F, D), "downb": D, "head": (D, CLASSES), "headb": CLASSES}
    shapes |= {"norm1": D, "norm2": D, "position": (3, D)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return params, rng.normal(size=(2, 3, D)), np.array([0, 2])


def test_a_transformers_layers_are_found_and_nothing_else():
    params, X, labels = transformer_problem()
    expected = [("down", "downb"), ("gate", None), ("head", "headb"), ("k", None), ("o", "ob"), ("q", None)]
    expected += [("up", "upb"), ("v", None)]
    assert found(transformer, params, X, labels) == expected
    assert found(jax.jit(transformer), params, X, labels) == expected


def test_a_transformers_factors_are_those_of_the_expanding_formula():
    """A is the mean of a'a over rows and positions. G is the sum over both of J' H J,
    with J from the derivative in an added term of y.
    """
    params, X, labels = transformer_problem()
    seen = {}
    z = transformer(params, X, seen=seen)
    kernels = [name for name in seen if params[name].ndim == 2]
    zeros = {name: jnp.zeros((*seen[name].shape[:-1], params[name].shape[1])) for name in kernels}
    jacobians = jax.jit(jax.jacrev(lambda nudges: transformer(params, X, nudges)))(zeros)
    H = jax.hessian(cross_entropy)(z, labels)
    traced = trace(transformer, params, X, labels)
    factors = traced.kfac()
    assert {layer.kernel for layer in traced.layers} == set(kernels)
    for layer, A, G in zip(traced.layers, factors[::2], factors[1::2], strict=True):
        a = np.asarray(seen[layer.kernel]).reshape(-1, params[layer.kernel].shape[0])
        a = a if layer.bias is None else np.hstack([a, np.ones((len(a), 1))])
        assert_close(A, a.T @ a / len(a))
        J = np.asarray(jacobians[layer.kernel]).reshape(2, CLASSES, -1, params[layer.kernel].shape[1])
        assert_close(G, np.einsum("icnp,icjd,jdnq->pq", J, np.asarray(H), J))


@pytest.mark.parametrize("between", [jax.nn.relu, jax.nn.gelu, jax.nn.silu, jax.nn.softmax, jax.checkpoint(jnp.sin)])
def test_layers_with_anything_between_them_are_exact_for_one_row(between):
    rng = np.random.default_rng(4)
    params = {
        "first": {"b": rng.normal(size=SIZE), "W": rng.normal(size=(SIZE, SIZE))},
        "second": {"b": rng.normal(size=SIZE), "W": rng.normal(size=(SIZE, SIZE))},
        "third": {"W": rng.normal(size=(CLASSES, SIZE))},
    }

    def model(p, X):
        h = between(X @ p["first"]["W"] + p["first"]["b"])
        h = between((p["second"]["W"] @ h.T + p["second"]["b"][:, None]).T)
        return h @ p["third"]["W"].T

    X = rng.normal(size=(1, SIZE))
    traced = trace(model, params, X)
    assert [(layer.kernel, layer.bias) for layer in traced.layers] == [
        ("first/W", "first/b"),
        ("second/W", "second/b"),
        ("third/W", None),
    ]
    assert traced.transposed == [False, True, True]
    assert_exact_for_one_row(model, params, X)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_layers_in_half_precision_have_factors_that_do_not_overflow(dtype):
    """The sum of 2000 squares of 16 is beyond the largest float16, and so is that of
    2000 curvatures of about 200.
    """
    rng = np.random.default_rng(5)
    params = {"W": (rng.normal(size=(3, CLASSES)) / 16).astype(dtype), "b": rng.normal(size=CLASSES).astype(dtype)}
    X = (16 * np.sign(rng.normal(size=(2000, 3)))).astype(dtype)
    labels = rng.integers(0, CLASSES, 2000)
    loss = lambda z, labels: 2e6 * cross_entropy(z.astype(jnp.float32), labels)  # noqa: E731
    traced = trace(lambda p, X: X @ p["W"] + p["b"], params, X, labels, loss)
    assert [(layer.kernel, layer.bias) for layer in traced.layers] == [("W", "b")]
    A, G = traced.kfac()
    assert min(2000 * A.max(), G.max()) > np.finfo(np.float16).max
    assert A.dtype == G.dtype == traced.flat.dtype == np.float32
    a = np.hstack([X.astype(np.float64), np.ones((2000, 1))])
    assert_close(A, a.T @ a / 2000, 1e-6)
    z = np.asarray(X @ params["W"] + params["b"]).astype(np.float64)
    p = softmax(z)
    assert_close(G, 1000 * (np.diag(p.sum(axis=0)) - p.T @ p), 4 * float(jnp.finfo(dtype).eps))


def test_inputs_of_narrow_integers_do_not_overflow():
    params = {"W": np.linspace(-1, 1, 2 * CLASSES).reshape(2, CLASSES) / 100}
    X = np.array([[100, -120], [90, 127], [-128, 3]], np.int8)
    traced = trace(lambda p, X: jax.lax.dot(X, p["W"]), params, X)
    assert [(layer.kernel, layer.bias) for layer in traced.layers] == [("W", None)]
    assert_close(traced.kfac()[0], X.astype(float).T @ X.astype(float) / 3)


def test_a_kernel_of_another_dtype_than_its_data_is_found():
    params = {"W": np.ones((2, CLASSES), np.float32), "b": np.ones(CLASSES, np.float64)}
    X = np.random.default_rng(0).normal(size=(3, 2))
    traced = trace(lambda p, X: X.astype(jnp.float16) @ p["W"].astype(jnp.float16) + p["b"], params, X)
    assert [(layer.kernel, layer.bias) for layer in traced.layers] == [("W", "b")]
    a = np.hstack([X.astype(np.float16).astype(np.float64), np.ones((3, 1))])
    assert_close(traced.kfac()[0], a.T @ a / 3)


@pytest.mark.parametrize("positions", [1, 2])
def test_with_any_number_of_rows_layers_are_those_that_have_them(positions):
    """With symbolic rows, a value is a layer if it has as many rows, or a multiple, for
    any number. No other value is.
    """
    (m,) = jax.export.symbolic_shape("m")
    params = {"W": (SIZE, SIZE), "V": (SIZE, CLASSES), "P": (SIZE, SIZE), "b": (SIZE,)}
    layout = _layout.Layout([jax.ShapeDtypeStruct(params[name], np.float64) for name in sorted(params)])

    def model(x, X, table):
        P, V, W, b = x
        hidden = (X.reshape(-1, SIZE) @ W).reshape(-1, positions, SIZE) + b + jnp.mean(table @ P, axis=0)
        return jnp.mean(jnp.tanh(hidden), axis=1) @ V

    composite = objective_pb2.Composite(reduction="mean", samples=1)
    stages = _derivatives.Stages(model, lambda z, X, table: jnp.sum(z**2), arguments=2, rows=m)
    args = [jax.ShapeDtypeStruct((m, positions * SIZE), np.float64), jax.ShapeDtypeStruct((12, SIZE), np.float64)]
    factors = _dense.Factors.of(stages, layout, args, composite)
    messages = [(layer.message.kernel, layer.message.HasField("bias")) for layer in factors.layers]
    assert messages == [(1, False), (2, True)]


def test_programs_are_those_that_the_composite_can_give():
    params, X = {"W": np.ones((2, CLASSES))}, np.ones((3, 2))
    linear, other = (lambda p, X: X @ p["W"]), (lambda p, X: X @ jnp.exp(p["W"]))
    assert set(trace(linear, params, X).factors.programs()) == {"kfac"}
    assert set(trace(linear, params, X, distribution="categorical").factors.programs()) == {"kfac", "sampled_kfac"}
    assert trace(other, params, X, distribution="categorical").factors.programs() == {}
