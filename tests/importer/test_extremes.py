"""Extremes of complex numbers and of windows: values and derivatives as native jax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.importer.round_trip import assert_equal, assert_same, imported

POINT = np.array([0.3, -1.2, 0.7, 0.7, -0.4, 1.1, 0.3, 2.0])
"""Has ties within windows of three."""


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def pooled(x, *, largest=True):
    start, combine = (-jnp.inf, lax.max) if largest else (jnp.inf, lax.min)
    return lax.reduce_window(x, start, combine, (3,), (2,), [(1, 0)])


def turned(x):
    """Complex numbers of which two have the same real part."""
    return jnp.round(x) + 1j * x[::-1]


FUNCTIONS = {
    "largest of windows": pooled,
    "smallest of windows": lambda x: pooled(x, largest=False),
    "gradient of the largest": jax.grad(lambda x: jnp.sum(pooled(x) ** 3)),
    "gradient of the smallest": jax.grad(lambda x: jnp.sum(pooled(x, largest=False) ** 3)),
    "largest complex number": lambda x: jnp.abs(lax.reduce_max(turned(x), (0,))),
    "smallest complex number": lambda x: jnp.abs(lax.reduce_min(turned(x), (0,))),
    "running complex extreme": lambda x: jnp.abs(lax.cummax(turned(x))),
}


TANGENTS = {
    "tangent of the largest": lambda x: jax.jvp(pooled, (x,), (x**2,))[1],
    "tangent of the smallest": lambda x: jax.jvp(lambda y: pooled(y, largest=False), (x,), (x**2,))[1],
}


def test_extremes():
    assert_same(FUNCTIONS, POINT)


def test_tangents_of_extremes():
    # For GPUs jax packs value and tangent into one number, with a warning that this loses precision.
    assert_same(TANGENTS, POINT, platforms=["cpu"])


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.bool_])
def test_sources_at_the_extremes_of_integers(dtype):
    def scattered(source, x):
        return lax.select_and_scatter_add_p.bind(
            source, x, select_prim=lax.ge_p, window_dimensions=(3,), window_strides=(2,), padding=((0, 0),)
        )

    x = np.array([3, 1, 3, 0, 2, 2, 5]).astype(dtype)
    source = np.array([1, 0, 1]).astype(dtype)
    found = imported(scattered, source, x)(source, x)
    assert_equal(found, scattered(jnp.asarray(source), jnp.asarray(x)))
