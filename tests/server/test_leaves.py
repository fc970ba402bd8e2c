"""Vectors that are split by leaf, and what a device holds of them."""

import jax
import numpy as np
import pytest

from hvpd_server.derivation.spread import cut
from hvpd_server.device.leaves import LeafProgram, Leaves
from tests.support import split

SHAPES = [(2, 3), (), (4,)]


@pytest.mark.parametrize("front", [(), (5,)])
def test_leaves_are_cut_and_joined_again(front):
    array = np.arange(11.0 * 5)[: 11 * (front or (1,))[0]].reshape(*front, 11)
    parts = cut(array, SHAPES)
    assert [part.shape for part in parts] == [(*front, *shape) for shape in SHAPES]
    assert all(np.shares_memory(part, array) for part in parts)
    joined = Leaves(list(map(jax.numpy.asarray, parts)), len(front)).block_until_ready()
    np.testing.assert_array_equal(np.asarray(joined), array)


def test_a_program_takes_and_returns_vectors_by_leaf():
    x, V, data = np.arange(11.0), np.arange(22.0).reshape(2, 11), np.ones(1)
    seen = []

    def compiled(*args):
        seen.append(args)
        return args[1] if len(args) == 3 else (np.float64(7), args[0])

    leaves = Leaves(cut(x, SHAPES), 0)
    np.testing.assert_array_equal(np.asarray(LeafProgram(compiled, SHAPES, 2)(leaves, V, data)), V)
    value, gradient = LeafProgram(compiled, SHAPES, 0)(leaves, data)
    assert value == 7
    np.testing.assert_array_equal(np.asarray(gradient), x)
    assert [args[-1] is data for args in seen] == [True, True]


@pytest.mark.slow
def test_a_device_holds_a_part_of_x_and_of_vectors():
    found = split.measured([("value_and_grad", 0), ("hvp", 2)])
    for name in ("value_and_grad", "hvp"):
        assert found[f"{name} parameters"][0] < found[f"{name} True"][0] / 3
