"""`minimize` reaches SciPy's minima on problems of CUTEst. `python -m
tests.truth.cutest` compares on more of them.
"""

import importlib.util

import pytest

from bench import _cutest
from tests.truth import cutest


@pytest.mark.skipif(importlib.util.find_spec("sif2jax") is None, reason="needs sif2jax")
@pytest.mark.parametrize("name", ["BROWNDEN", "CHNROSNB", "HELIX", "OSBORNEB", "S308"])
def test_a_minimum_is_scipys(client, name):
    found = cutest.compare(client, _cutest.problem(name))
    assert found.ours.success
    assert found.theirs.success
    assert abs(found.excess) < 1e-8
    assert found.ours.nhev <= 1.5 * found.theirs.nhev
