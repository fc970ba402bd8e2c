"""Fourier transforms have native jax's values and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd_server.importer.table import Refused
from tests.importer.round_trip import assert_equal, assert_same, imported, text

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


@pytest.mark.parametrize(("kind", "element"), [("FFT", "complex<f32>"), ("IRFFT", "complex<f32>"), ("RFFT", "f32")])
def test_extents_that_do_not_fit_the_length_are_refused(kind, element):
    result = "f32" if kind == "IRFFT" else "complex<f32>"
    module = f"""func.func @main(%x: tensor<?x{element}>) -> tensor<?x{result}> {{
        %0 = stablehlo.fft %x, type = {kind}, length = [9] : (tensor<?x{element}>) -> tensor<?x{result}>
        return %0 : tensor<?x{result}> }}"""
    with pytest.raises(Refused, match="as last extents"):
        text(module, jnp.ones(4, jnp.float32 if kind == "RFFT" else jnp.complex64))
