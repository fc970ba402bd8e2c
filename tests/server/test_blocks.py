"""Blocks are aligned, so that a CPU takes them without a copy. Several arrays become
one block, and one becomes several.
"""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvpd_server.scheduling import blocks
from hvpd_server.scheduling.blocks import join, split


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 1000), (1 << 20,)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8"])
def test_they_are_aligned_and_of_their_own(shape, dtype):
    found = [blocks.empty(shape, np.dtype(dtype)) for _ in range(5)]
    for value, array in enumerate(found):
        assert (array.shape, array.dtype, array.flags.c_contiguous) == (shape, np.dtype(dtype), True)
        assert array.size == 0 or array.__array_interface__["data"][0] % blocks.ALIGNMENT == 0
        array[:] = value
    assert all((array == value).all() for value, array in enumerate(found))


def test_they_are_not_copied_on_a_cpu():
    """XLA returns such an array in the same memory."""
    array = blocks.empty((1000,), np.dtype(np.float32))
    array[:] = 1
    if jax.default_backend() != "cpu":
        pytest.skip("jax has a device of its own memory here")
    placed = jax.device_put(array, may_alias=True)
    assert placed.unsafe_buffer_pointer() == array.__array_interface__["data"][0]


@settings(deadline=None)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    n=st.integers(1, 4),
    spare=st.integers(0, 9),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_split_undoes_join(widths, n, spare, dtype):
    parts = [np.random.default_rng(i).standard_normal((width, n)).astype(dtype) for i, width in enumerate(widths)]
    joined = join(parts, sum(widths) + spare)
    assert joined.shape == (sum(widths) + spare, n)
    assert joined.dtype == dtype
    assert not joined[sum(widths) :].any()
    for block, again in zip(parts, split(joined, widths), strict=True):
        np.testing.assert_array_equal(again, block)


def test_one_block_of_the_right_width_is_not_copied():
    block = np.ones((4, 3))
    assert join([block], 4) is block
