"""The layout of flat vectors that are split over devices, and what a device holds of
them in programs of several steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvpd_server.derivation.compiling import Target
from hvpd_server.derivation.spread import Spread, summed
from tests.support import split

SHAPES = [(3, 8), (4, 2), (), (5,), (2, 4, 2)]
SIZE = 24 + 8 + 1 + 5 + 16


class Four:
    """Four devices, without the devices."""

    parts = [None] * 4
    axis = Target.axis


@pytest.fixture
def spread():
    return Spread(SHAPES, Four())


@pytest.mark.parametrize("front", [(), (2,), (2, 3)], ids=str)
def test_each_device_has_its_own_part_of_each_leaf(spread, front):
    count = int(np.prod(front))
    leaves = [np.arange(count * np.prod(shape, dtype=int)).reshape((*front, *shape)) + 1.0 for shape in SHAPES]
    joined = spread._joined(leaves, np)
    assert joined.shape == (*front, spread.n)
    assert spread.n == 4 * (6 + 2 + 1 + 2 + 4)
    for device, part in enumerate(np.split(joined, 4, axis=-1)):
        own = [
            leaves[0][..., 2 * device : 2 * device + 2],
            leaves[1][..., device : device + 1, :],
            leaves[4][..., device : device + 1, :],
        ]
        for leaf, (start, end) in zip(own, [(0, 6), (6, 8), (11, 15)], strict=True):
            np.testing.assert_array_equal(part[..., start:end], leaf.reshape(*front, -1))
    assert np.count_nonzero(joined) == count * SIZE
    for xp in (np, jnp):
        for leaf, expected in zip(spread._cut(xp.asarray(joined), xp), leaves, strict=True):
            np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize(("shape", "axis"), [((SIZE,), 0), ((2, SIZE), 1), ((SIZE, 3), 0)], ids=str)
def test_vectors_go_to_the_devices_and_back(shape, axis):
    spread = Spread(SHAPES, Target(jax.devices()[:1]))
    array = np.random.default_rng(0).standard_normal(shape, np.float32)
    np.testing.assert_array_equal(spread.host(spread.put(array, axis), axis), array)


def test_inner_products_are_summed_over_the_devices_of_a_mesh():
    @summed
    def product(U, v, factor):
        return factor * (U @ v)

    U, v = jnp.arange(6.0).reshape(2, 3), jnp.arange(3.0)
    target = Target(jax.devices()[:1])
    made = []
    with jax.set_mesh(target.mesh):
        made.append(jax.jit(product).lower(U, v, jnp.float32(2)).as_text())
        np.testing.assert_array_equal(jax.jit(product)(U, v, jnp.float32(2)), 2 * U @ v)
    made.append(jax.jit(lambda *arrays: product(*arrays)).lower(U, v, jnp.float32(2)).as_text())
    assert ["all_reduce" in text for text in made] == [True, False]


HELD = """
from hvpd_server.derivation import spread
from hvpd_server.device import basis, device

four = device.Device(jax.devices())
layout = spread.Spread([tuple(leaf.shape) for leaf in bundle.x_leaves], four.target)
rows = np.random.default_rng(0).standard_normal((3, bundle.n))
held = basis.Basis(four, 32, bundle.n, np.dtype(np.float64), layout)
held.put(rows, 0)
held.write(held.combination(2 * np.eye(3)), 3, 2)
kept = {str(leaf): [shard.data.nbytes for shard in leaf.addressable_shards] for leaf in (held.array, held.first(4), held.row(1))}
found["held"] = [max(sizes) / (8 * bundle.n) for sizes in kept.values()]
np.testing.assert_allclose(held.host(held.first(5)), [*rows, *2 * rows[:2]])
"""


@pytest.mark.slow
def test_a_device_holds_a_part_of_each_vector_of_an_iteration():
    """The largest array that is gathered is no leaf of a vector."""
    names = ("lanczos_hvp", "cg_hvp", "minres_hvp{4.0..}")
    found = split.measured(list(zip(names, (32, 1, 2), strict=True)), HELD)
    assert found.pop("held") == [32 / 4, 4 / 4, 1 / 4]
    for name in names:
        (whole, _), (part, gathered) = found[f"{name} True"], found[f"{name} parameters"]
        assert part < whole / 3
        assert 0 < gathered < 96 * 96 / 2
