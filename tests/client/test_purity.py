"""Random numbers of Python and NumPy in a traced function give a warning."""

import random
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvpd
from hvpd._registration import purity

RNG = np.random.default_rng(0)
DICE = random.Random(0)


def closing(rng):
    return lambda x: jnp.sum(x) * rng.normal()


def traced(fun):
    with purity.noticed(fun):
        jax.make_jaxpr(fun if not isinstance(fun, hvpd.Composite) else lambda x: fun.loss(fun.model(x)))(np.ones(3))


@pytest.mark.parametrize(
    ("fun", "name"),
    [
        (lambda x: jnp.sum(x) * np.random.normal(), "numpy.random"),  # noqa: NPY002
        (lambda x: jnp.sum(x) * random.random(), "from random "),
        (lambda x: jnp.sum(x) * RNG.normal(), "RNG"),
        (lambda x: jnp.sum(x) * DICE.random(), "DICE"),
        (closing(np.random.default_rng(1)), "rng"),
        (hvpd.composite(lambda x: x * RNG.normal(), jnp.sum, reduction="sum"), "RNG"),
    ],
    ids=["numpy", "random", "global", "dice", "closure", "composite"],
)
def test_a_draw_gives_a_warning_that_names_the_generator(fun, name):
    with pytest.warns(UserWarning, match=name):
        traced(fun)


def test_pure_functions_and_draws_outside_give_none():
    noise = RNG.normal()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(lambda x: jnp.sum(x) * noise)
        traced(lambda x: jnp.sum(jax.random.normal(jax.random.key(0), x.shape) * x))
        traced(jnp.sum)
