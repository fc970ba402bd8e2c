"""The steps of MINRES and of CG for several shifts, for programs of several steps.

They are the steps of `hvpd._krylov.short_recurrence`, with jax in the place of NumPy.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from hvpd._krylov.short_recurrence import CG, Arithmetic, Links, Minres, advanced_cg, advanced_minres, linked
from hvpd_server.derivation.lanczos import dots
from hvpd_server.derivation.several_steps import FLOAT, Function, Method, Sizes, Spec, Stepped

MINRES_PREFIX: Final = "minres_"
"""Prefix of the name of a program of MINRES. The name of the product follows."""

CG_PREFIX: Final = "shifted_cg_"
"""Prefix of the name of a program of CG for several shifts."""

_LINKS: Final = len(Links._fields)


def _nothing(squares: Any) -> None:
    """Leave the step with NaN to the iteration in NumPy, which says what is wrong."""


_HERE: Final = Arithmetic(jnp, dots, _nothing)


def _specs(sizes: Sizes) -> list[Spec]:
    """Return the arrays of `Links`."""
    vectors, numbers = sizes.vectors(sizes.rows), Spec((sizes.rows,), FLOAT)
    return [*[vectors] * 3, *[numbers] * 2]


def _cg_specs(sizes: Sizes) -> list[Spec]:
    """Return the arrays of `Links` and of `CG`."""
    vectors, numbers = sizes.vectors(sizes.rows, sizes.form.shifts), _numbers(sizes)
    return [*_specs(sizes), *[vectors] * 2, *[numbers] * 3]


def _minres_specs(sizes: Sizes) -> list[Spec]:
    """Return the arrays of `Links` and of `Minres`."""
    shape = sizes.rows, sizes.form.shifts
    vectors, numbers = sizes.vectors(*shape), _numbers(sizes)
    residuals = vectors if sizes.form.M else Spec((*shape, 0), sizes.dtype)
    logical = Spec(shape, np.dtype(bool))
    return [*_specs(sizes), *[vectors] * 3, residuals, *[numbers] * 7, logical]


def _numbers(sizes: Sizes) -> Spec:
    return Spec((sizes.rows, sizes.form.shifts), FLOAT)


def _cg_step(
    product: Function, precondition: Function | None, shifts: jax.Array, state: Sequence[jax.Array]
) -> Stepped:
    """Take a step of CG. It is unusual if a product is not finite, or a curvature is
    not positive.
    """
    link, links, finite = _linked(product, precondition, state)
    found = advanced_cg(CG(*state[_LINKS:]), link, shifts, _HERE)
    return Stepped([*links, *found], found.norms, finite & (found.d > 0).all())


def _minres_step(
    product: Function, precondition: Function | None, shifts: jax.Array, state: Sequence[jax.Array]
) -> Stepped:
    """Take a step of MINRES. It is unusual if a product is not finite, or M is not
    positive definite.
    """
    link, links, finite = _linked(product, precondition, state)
    found = advanced_minres(Minres(*state[_LINKS:]), link, shifts, _HERE)
    return Stepped([*links, *found], found.norms, finite, (found.least_squares | (found.norms == 0)).all())


def _linked(product: Function, precondition: Function | None, state: Sequence[jax.Array]) -> tuple[Any, ...]:
    """Return a step of the recurrences, their state, and whether all is finite."""
    links = Links(*state[:_LINKS])
    W = product(links.v)
    link, following = linked(links, W, precondition, _HERE)
    return link, following, jnp.isfinite(W).all() & jnp.isfinite(link.beta).all()


METHODS: Final[Mapping[str, Method]] = {
    MINRES_PREFIX: Method(_minres_specs, _numbers, _minres_step),
    CG_PREFIX: Method(_cg_specs, _numbers, _cg_step),
}
"""The methods by the prefixes of their programs."""
