"""A device whose memory really does not suffice: the server says so, and everybody else goes on. What gives way before that, and
that launches get narrower, is in tests/server/test_lane.py."""

import jax.numpy as jnp
import numpy as np
import pytest

import hvpd


def quartic(x):
    return jnp.sum(x**4) / 12


def square(x, C):
    """Needs a matrix of n x n for each vector that it is multiplied with."""
    return jnp.sum((jnp.tanh(jnp.outer(x, x)) @ C) ** 2)


def test_what_no_memory_is_enough_for_is_refused_with_the_sizes_and_others_go_on(serve):
    """A matrix of three million rows and columns: 72 TB."""
    n = 3_000_000
    with hvpd.connect(serve().address) as client:
        other = client.register(quartic, np.zeros(9)).at(np.arange(9.0))
        with pytest.raises(hvpd.OverloadedError, match=r"takes \d{13,} bytes of memory beside") as error:
            client.register(square, np.zeros(n), np.ones((n, 1))).at(np.ones(n))
        assert error.value.reason == "DEVICE_MEMORY"
        assert np.array_equal(other.hessian() @ np.ones(9), np.arange(9.0) ** 2)
