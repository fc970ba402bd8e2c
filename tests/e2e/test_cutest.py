"""`minimize` reaches SciPy's minima on problems of CUTEst. `python -m
tests.truth.cutest` compares on more of them.
"""

import pytest

from tests.truth import cutest


@pytest.fixture(scope="module")
def problems():
    pytest.importorskip("sif2jax")
    return cutest.problems()


@pytest.mark.parametrize("name", ["BROWNDEN", "CHNROSNB", "HELIX", "OSBORNEB", "S308"])
def test_a_minimum_is_scipys(client, problems, name):
    found = cutest.compare(client, problems[name])
    assert found.ours.success
    assert found.theirs.success
    assert abs(found.excess) < 1e-8
    assert found.ours.nhev <= 1.5 * found.theirs.nhev
