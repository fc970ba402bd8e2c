"""The same state gives the same random bits, and draws without a state are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hvpd_server.importer.table import Refused
from tests.importer.round_trip import assert_equal, assert_same, imported, text


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("algorithm", list(lax.RandomAlgorithm))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.uint64])
def test_bits_are_those_of_jax(algorithm, dtype):
    key = np.array([3, 1, 4, 1], np.uint32)

    def function(key):
        return lax.rng_bit_generator(key, (5,), dtype, algorithm)

    assert_equal(imported(function, key)(key), function(key))


def test_signed_bits_are_those_of_unsigned_bits():
    module = """func.func @main(%s: tensor<2xui64>) -> (tensor<4xi32>, tensor<4xui32>) {
        %0, %1 = stablehlo.rng_bit_generator %s, algorithm = THREE_FRY : (tensor<2xui64>) -> (tensor<2xui64>, tensor<4xi32>)
        %2, %3 = stablehlo.rng_bit_generator %s, algorithm = THREE_FRY : (tensor<2xui64>) -> (tensor<2xui64>, tensor<4xui32>)
        return %1, %3 : tensor<4xi32>, tensor<4xui32> }"""
    signed, unsigned = text(module, jnp.array([1, 2], jnp.uint64))
    np.testing.assert_array_equal(signed.view(np.uint32), unsigned)


def test_draws_from_a_key_differentiate():
    point = np.array([0.5, -1.0, 2.0])

    def noisy(x):
        return (x + jax.random.normal(jax.random.key(3, impl="rbg"), x.shape)) ** 2

    assert_same({"noise": noisy}, point)


def test_a_draw_without_a_state_is_refused():
    module = """func.func @main(%a: tensor<f64>, %b: tensor<f64>) -> tensor<3xf64> {
        %s = stablehlo.constant dense<3> : tensor<1xi64>
        %0 = stablehlo.rng %a, %b, %s, distribution = UNIFORM : (tensor<f64>, tensor<f64>, tensor<1xi64>) -> tensor<3xf64>
        return %0 : tensor<3xf64> }"""
    with pytest.raises(Refused, match="draw from a key"):
        text(module, jnp.asarray(0.0), jnp.asarray(1.0))


def test_a_state_of_another_size_is_refused():
    module = """func.func @main(%s: tensor<3xui64>) -> tensor<4xui32> {
        %0, %1 = stablehlo.rng_bit_generator %s, algorithm = PHILOX : (tensor<3xui64>) -> (tensor<3xui64>, tensor<4xui32>)
        return %1 : tensor<4xui32> }"""
    with pytest.raises(Refused, match=r"expected uint64\[2\]"):
        text(module, jnp.arange(3, dtype=jnp.uint64))
