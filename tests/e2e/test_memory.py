"""A device whose memory is really too small: the server refuses the request, and serves
all others.

tests/server/lane/test_memory_relief.py tests the steps before: evictions and narrower
launches.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from tests.support.objectives import quartic


def square(x, C):
    """Return f(x), which needs a matrix of n x n for each vector of a product."""
    return jnp.sum((jnp.tanh(jnp.outer(x, x)) @ C) ** 2)


def test_a_request_beyond_all_memory_is_refused_with_the_sizes_and_others_go_on(serve):
    """A matrix of three million rows and columns takes 72 TB."""
    n = 3_000_000
    with hvpd.connect(serve().address) as client:
        other = client.register(quartic, np.zeros(9)).at(np.arange(9.0))
        with pytest.raises(hvpd.OverloadedError, match=r"takes \d{13,} bytes of memory beside") as error:
            client.register(square, np.zeros(n), np.ones((n, 1))).at(np.ones(n))
        assert error.value.reason == "DEVICE_MEMORY"
        assert np.array_equal(other.hessian() @ np.ones(9), np.arange(9.0) ** 2)
