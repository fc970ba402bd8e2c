"""Fixtures of the bundle's tests: a valid export, and a copy of its bundle."""

import numpy as np
import pytest

from tests.support.bundle import Pair, _fun, copy


@pytest.fixture(scope="module")
def valid(export):
    """Return an export with named trees, data, captured arrays, and residuals of both
    kinds.
    """
    rng = np.random.default_rng(2)
    x = {"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(2)}
    data = {"features": rng.standard_normal((5, 3)), "labels": rng.standard_normal(5)}
    return export(_fun, x, data, Pair(np.float64(0.1), np.arange(4)))


@pytest.fixture
def bundle(valid):
    """Return a copy to change."""
    return copy(valid.bundle)
