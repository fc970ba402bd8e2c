"""Random numbers and side effects in a traced function give a warning."""

import functools
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
        (lambda x: jax.lax.map(lambda each: each * RNG.normal(), x).sum(), "RNG"),
        (closing(np.random.default_rng(1)), "rng"),
        (hvpd.composite(lambda x: x * RNG.normal(), jnp.sum, reduction="sum"), "RNG"),
    ],
    ids=["numpy", "random", "global", "dice", "nested", "closure", "composite"],
)
def test_a_draw_gives_a_warning_that_names_the_generator(fun, name):
    with pytest.warns(UserWarning, match=name):
        traced(fun)


CALLS = {"n": 0}
TOTAL = 0


def counts(x):
    CALLS["n"] += 1
    return jnp.sum(x)


def rebinds(x):
    global TOTAL  # noqa: PLW0603 - what users write
    TOTAL += 1
    return jnp.sum(x)


def keeping(history):
    def keeps(x):
        history.append(x)
        return jnp.sum(x)

    return keeps


def counting():
    count = 0

    def fun(x):
        nonlocal count
        count += 1
        return jnp.sum(x)

    return fun


def calls(x):
    return counts(x) + again(x)


def again(x):
    return calls(x) if x is None else jnp.sum(x)


@jax.jit
def compiled(x):
    CALLS["n"] += 1
    return jnp.sum(x)


def of_a_function_that_is_kept():
    keep = keeping([])
    return lambda x: keep(x) + 1


class Model:
    def __init__(self):
        self.calls = 0

    def loss(self, x):
        self.calls += 1
        return jnp.sum(x)

    @functools.cached_property
    def weight(self):
        return 2.0

    def pure(self, x):
        return jnp.sum(x) * self.weight


@pytest.mark.parametrize(
    ("fun", "name"),
    [
        (counts, "CALLS"),
        (calls, "CALLS"),
        (lambda x: jax.lax.map(calls, x[None])[0], "CALLS"),
        (lambda x: compiled(x), "CALLS"),
        (of_a_function_that_is_kept(), "history"),
        (rebinds, "TOTAL"),
        (keeping([]), "history"),
        (counting(), "count"),
        (Model().loss, "self"),
        (jax.jit(keeping([])), "history"),
        (functools.partial(keeping([1])), "history"),
        (hvpd.composite(keeping([]), jnp.sum, reduction="sum"), "history"),
    ],
    ids=[
        "dict",
        "called",
        "mapped",
        "compiled",
        "closed over",
        "global",
        "list",
        "nonlocal",
        "attribute",
        "jit",
        "partial",
        "composite",
    ],
)
def test_a_change_of_a_python_object_gives_one_warning_that_names_it(fun, name):
    with pytest.warns(UserWarning, match=f"changed {name} while") as shown:
        traced(fun)
    assert len(shown) == 1


def test_pure_functions_and_draws_outside_give_none():
    noise = RNG.normal()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(lambda x: jnp.sum(x) * noise)
        traced(lambda x: jnp.sum(jax.random.normal(jax.random.key(0), x.shape) * x))
        traced(jnp.sum)
        traced(Model().pure)
        traced(lambda x: jnp.sum(x) * len(CALLS))
        traced(again)
