"""Fourier transforms: values and derivatives as native jax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.importer.round_trip import assert_equal, assert_same, imported

POINT = np.array([0.3, -1.2, 0.7, 2.0, -0.4, 1.1])


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


TRANSFORMS = {
    "fft": lambda x: jnp.fft.fft(x),
    "ifft": lambda x: jnp.fft.ifft(x + 1j * x[::-1]),
    "rfft": lambda x: jnp.fft.rfft(x),
    "irfft": lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * 2, 6),
    "odd length": lambda x: jnp.fft.irfft(jnp.fft.rfft(x[:5]), 5),
    "two axes": lambda x: jnp.fft.ifft2(jnp.fft.fft2(x.reshape(2, 3)) ** 2).real,
    "real, two axes": lambda x: jnp.fft.irfft2(jnp.fft.rfft2(x.reshape(3, 2)) ** 2, (3, 2)),
}


def test_transforms():
    assert_same(TRANSFORMS, POINT)


def test_a_batch_of_symbolic_size():
    spec = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 4"), np.float32)
    x = np.sin(np.arange(12.0, dtype=np.float32)).reshape(3, 4)
    assert_equal(imported(jnp.fft.rfft, spec)(x), jnp.fft.rfft(x))
