"""Batch normalization equals the examples of StableHLO's specification, and its
derivatives are those of its formula.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd_server.importer import evaluate, reader
from hvpd_server.importer.table import Refused

X = np.array([[[1.0, 2.0], [3.0, 4.0]], [[3.0, 4.0], [1.0, 2.0]]])
ONES = np.ones(2)
EXPECTED = np.array([[[0.0, 0.0], [2.0, 2.0]], [[2.0, 2.0], [0.0, 0.0]]])


@pytest.fixture(autouse=True)
def _wide():
    with jax.enable_x64(True):
        yield


def inference(epsilon="0.0", feature=2):
    return f"""func.func public @main(%x: tensor<2x2x2xf64>, %scale: tensor<2xf64>, %offset: tensor<2xf64>,
        %mean: tensor<2xf64>, %variance: tensor<2xf64>) -> tensor<2x2x2xf64> {{
      %r = "stablehlo.batch_norm_inference"(%x, %scale, %offset, %mean, %variance)
        {{epsilon = {epsilon} : f32, feature_index = {feature} : i64}} : (tensor<2x2x2xf64>, tensor<2xf64>,
        tensor<2xf64>, tensor<2xf64>, tensor<2xf64>) -> tensor<2x2x2xf64>
      return %r : tensor<2x2x2xf64> }}"""


TRAINING = """func.func public @main(%x: tensor<2x2x2xf64>, %scale: tensor<2xf64>, %offset: tensor<2xf64>)
    -> (tensor<2x2x2xf64>, tensor<2xf64>, tensor<2xf64>) {
  %r:3 = "stablehlo.batch_norm_training"(%x, %scale, %offset)
    {epsilon = 0.0 : f32, feature_index = 2 : i64} : (tensor<2x2x2xf64>, tensor<2xf64>, tensor<2xf64>)
    -> (tensor<2x2x2xf64>, tensor<2xf64>, tensor<2xf64>)
  return %r#0, %r#1, %r#2 : tensor<2x2x2xf64>, tensor<2xf64>, tensor<2xf64> }"""


def test_inference():
    function = evaluate.function(reader.read(inference()))
    (found,) = function(X, ONES, ONES, np.array([2.0, 3.0]), ONES)
    np.testing.assert_array_equal(found, EXPECTED)


def test_training():
    found, mean, variance = evaluate.function(reader.read(TRAINING))(X, ONES, ONES)
    np.testing.assert_array_equal(found, EXPECTED)
    np.testing.assert_array_equal(mean, [2.0, 3.0])
    np.testing.assert_array_equal(variance, ONES)


def test_features_scale_and_epsilon():
    rng = np.random.default_rng(0)
    x, scale, offset, mean, variance = rng.normal(size=(2, 2, 2)), *rng.uniform(1, 2, size=(4, 2))
    (found,) = evaluate.function(reader.read(inference("0.5", 1)))(x, scale, offset, mean, variance)
    for feature in range(2):
        expected = scale[feature] * (x[:, feature] - mean[feature]) / np.sqrt(variance[feature] + 0.5) + offset[feature]
        np.testing.assert_allclose(found[:, feature], expected, rtol=1e-14)


def test_the_derivatives_of_training():
    function = evaluate.function(reader.read(TRAINING))
    x, weights = np.random.default_rng(0).normal(size=(2, 2, 2, 2))

    def formula(x):
        return jnp.sum(weights * ((x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1))) + 1))

    found = jax.hessian(lambda x: jnp.sum(weights * function(x, ONES, ONES)[0]))(x)
    np.testing.assert_allclose(found, jax.hessian(formula)(x), rtol=1e-10, atol=1e-12)


def test_a_feature_index_outside_is_refused():
    with pytest.raises((Refused, ValueError), match=r"feature_index|cannot be read"):
        evaluate.function(reader.read(inference(feature=3)))(X, ONES, ONES, ONES, ONES)
