"""Writes tensorflow.json beside this file: objectives that TensorFlow compiled to
StableHLO, and its own derivatives of them.

`python tests/truth/tensorflow_values.py` in an environment with tensorflow 2.21;
tests/e2e/test_stablehlo.py reads the file.
"""

import base64
import json
from pathlib import Path

import numpy as np
import tensorflow as tf

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 6))
Y = np.sign(X[:, 0])
IMAGES = RNG.normal(size=(2, 6, 6, 1))


def logistic(w, X, y):
    return tf.reduce_mean(tf.math.softplus(-y * tf.linalg.matvec(X, w))) + 0.01 * tf.reduce_sum(w * w)


def perceptron(w, X, y):
    hidden = tf.tanh(tf.matmul(X, tf.reshape(w[:18], (6, 3))))
    return tf.reduce_mean((tf.linalg.matvec(hidden, w[18:]) - y) ** 2)


def rectified(w, X, y):
    return tf.reduce_sum(tf.nn.relu(tf.linalg.matvec(X, w)) ** 3)


def softmax(w, X, y):
    logits = tf.matmul(X, tf.reshape(w, (6, 2)))
    labels = tf.cast(y > 0, tf.int32)
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))


def determinant(w, X, y):
    gram = tf.matmul(X * w, X * w, transpose_a=True) + tf.eye(6, dtype=tf.float64)
    return tf.reduce_sum(tf.math.log(tf.linalg.diag_part(tf.linalg.cholesky(gram))))


def recurrent(w, X, y):
    W, state = tf.reshape(w, (6, 6)), tf.zeros(6, tf.float64)
    for step in tf.range(12):
        state = tf.tanh(tf.linalg.matvec(W, state) + X[step])
    return tf.reduce_sum(state**2)


def convolution(w, images):
    kernel = tf.reshape(w[:9], (3, 3, 1, 1))
    pooled = tf.nn.max_pool2d(tf.tanh(tf.nn.conv2d(images, kernel, 1, "SAME")), 2, 2, "VALID")
    return tf.reduce_sum(tf.reshape(pooled, (2, 9)) * w[9:18]) ** 2


def normalized(w, X, y):
    h = X * w
    centered = h - tf.reduce_mean(h, axis=1, keepdims=True)
    variance = tf.reduce_mean(centered**2, axis=1, keepdims=True)
    return tf.reduce_mean(tf.nn.gelu(centered * tf.math.rsqrt(variance + 1e-5)) * y[:, None])


def stopped(w, X, y):
    """Return a loss with tf.nn.moments, which stops the gradient at the mean. StableHLO
    loses that, and TensorFlow's second derivative with it.
    """
    _, variance = tf.nn.moments(X * w, axes=[1])
    return tf.reduce_sum(variance * y)


CASES = {
    "logistic": (logistic, 6, (X, Y)),
    "perceptron": (perceptron, 21, (X, Y)),
    "rectified": (rectified, 6, (X, Y)),
    "softmax": (softmax, 12, (X, Y)),
    "determinant": (determinant, 6, (X, Y)),
    "recurrent": (recurrent, 36, (X, Y)),
    "convolution": (convolution, 18, (IMAGES,)),
    "normalized": (normalized, 6, (X, Y)),
    "stopped": (stopped, 6, (X, Y)),
}


def case(fun, n, data):
    """Return the module, its point, and TensorFlow's value, gradient and Hessian
    there.
    """
    x = RNG.normal(size=n) / 2
    w, arrays = tf.constant(x), [tf.constant(array) for array in data]
    compiled = tf.function(fun, jit_compile=True)
    module = compiled.experimental_get_compiler_ir(w, *arrays)(stage="stablehlo_serialized")
    with tf.GradientTape(persistent=True) as outer:
        outer.watch(w)
        with tf.GradientTape() as inner:
            inner.watch(w)
            value = tf.function(fun)(w, *arrays)
        gradient = inner.gradient(value, w)
    hessian = outer.jacobian(gradient, w, experimental_use_pfor=False)
    return {
        "module": base64.b64encode(module).decode(),
        "x": x.tolist(),
        "data": [array.tolist() for array in data],
        "value": float(value),
        "gradient": gradient.numpy().tolist(),
        "hessian": hessian.numpy().tolist(),
    }


if __name__ == "__main__":
    found = {"tensorflow": tf.__version__} | {name: case(*given) for name, given in CASES.items()}
    Path(__file__).with_name("tensorflow.json").write_text(json.dumps(found) + "\n")
