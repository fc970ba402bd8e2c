"""Arrays that a device takes without a copy."""

import jax
import numpy as np
import pytest

from hvpd_server import _buffers


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 1000), (1 << 20,)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8"])
def test_they_are_aligned_and_of_their_own(shape, dtype):
    found = [_buffers.empty(shape, np.dtype(dtype)) for _ in range(5)]
    for value, array in enumerate(found):
        assert (array.shape, array.dtype, array.flags.c_contiguous) == (shape, np.dtype(dtype), True)
        assert array.size == 0 or array.__array_interface__["data"][0] % _buffers.ALIGNMENT == 0
        array[:] = value
    assert all((array == value).all() for value, array in enumerate(found))


def test_they_are_not_copied_on_a_cpu():
    """What XLA hands back of such an array is the same memory."""
    array = _buffers.empty((1000,), np.dtype(np.float32))
    array[:] = 1
    if jax.default_backend() != "cpu":
        pytest.skip("jax has a device of its own memory here")
    placed = jax.device_put(array, may_alias=True)
    assert placed.unsafe_buffer_pointer() == array.__array_interface__["data"][0]
