"""The rounding of values, gradients and products close to a point.

Every threshold of a check is widened by this rounding. The file makes no verdicts.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hvpd._check.verdicts import EPS, Curved
from hvpd._wire.codec import Array

_CONTRACT: Mapping[str, float] = {"float64": 1e-12, "float32": 1e-5}
"""Largest error of symmetry and linearity, relative.

For float64 it is 4500 eps, for float32 84 eps, which equals the bound on float32
products. Rounding errors of dot products grow like sqrt(n) eps (Higham and Mary, 2019,
doi:10.1137/18M1226312), and a random u averages them down again. Formats coarser than
float32 have as many eps of their own."""

_PRODUCT: Mapping[str, float] = {"float64": 1e-10, "float32": 1e-5}
"""Largest error of a product against the truth, relative."""

_ULPS = 2.0**7
"""Relative size, in eps, of the perturbations of x that measure rounding.

It is large, so that the effects of rounding and of a change of x can be told apart. It
is smaller for formats such as bfloat16, of which 2^7 eps are more than 1/64 of x."""

_PERTURBATIONS = 2
"""Directions in which x is perturbed, each to both sides, once and twice as far."""

MARGIN = 8.0
"""Thresholds over measured rounding, because the rounding is a sample of few."""


class Counter:
    """A point and its neighbours, with a count of their cost. Vectors are in float64.

    Args:
        point: The base point.
        at: Makes a point of the same objective and data from a flat vector in its
            dtype.
        eps: Relative precision of the products' arithmetic; see `verdicts.resolution`.
        mode: How the objective's products are made.
        kind: The operator, by its number on the wire.
    """

    def __init__(self, point: Curved, at: Callable[[Array], Curved], eps: float, mode: str, kind: int) -> None:
        self.point = point
        self.products = 0
        self.points = 1
        self.n, self.dtype = point.n, point.dtype
        self.eps = eps
        coarser = _CONTRACT["float32"] / EPS["float32"] * eps if eps > EPS["float32"] else 0.0
        self.contract = max(_CONTRACT[point.dtype.name], coarser)
        self.product_contract = max(_PRODUCT[point.dtype.name], coarser)
        self.truncation = 2 * eps ** (2 / 3) if mode == "finite_difference" else 0.0
        """Relative error of products by finite differences, without their rounding."""
        self.ulps = max(2.0, min(_ULPS, 2.0**-6 / eps))
        self.x = point.x.astype(np.float64)
        self.gradient = point.gradient.astype(np.float64)
        self._at = at
        self._kind = kind

    def at(self, x: Array) -> tuple[Curved, Array]:
        """Return the point nearest to x in the dtype, and the exact step to it."""
        self.points += 1
        there = self._at(x.astype(self.dtype))
        return there, there.x.astype(np.float64) - self.x

    def multiply(self, block: Array, point: Curved | None = None) -> Array:
        """Multiply V[k,n] -> HV[k,n] at the base point, or at another point."""
        self.products += len(block)
        product = (point or self.point).multiply(np.ascontiguousarray(block, self.dtype), self._kind)
        return product.astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The rounding at the base point.

    Points a few ulp away show it. Half the difference of both sides is the effect of x,
    and is divided by the ulps. The third difference is the effect of rounding. The
    larger one counts, because no algorithm in this dtype can be expected to be more
    exact. Products at the base point take no part, and neither do other blocks. An
    error in them must not widen the threshold that it is held against.
    """

    eps: float
    value: float
    """Error of f, absolute; at least eps |f|."""
    gradient: float
    """Error of the gradient, in the 2-norm; at least eps |g|."""
    product: float
    """Error of products that a threshold may allow, relative."""
    moved: float
    """All of the error of products, relative; NaN if it could not be measured."""


def least_rounding(counter: Counter) -> Rounding:
    """Return the rounding that exists at every point, without a look at neighbours."""
    eps = counter.eps
    value, gradient = eps * abs(counter.point.value), eps * norm(counter.gradient)
    return Rounding(eps, value, gradient, counter.truncation, math.nan)


def measure_rounding(counter: Counter, V: Array, rng: np.random.Generator, *, repeatable: bool) -> Rounding:
    """Measure the rounding at the base point from close neighbours.

    The idea is that of Moré and Wild, 2011, doi:10.1137/100786125.

    Args:
        counter: The base point.
        V: Tangents of shape (k, n).
        rng: Draws the directions of the neighbours.
        repeatable: Whether the same product has the same bits again. If not, products
            widen their thresholds up to the contract only.
    """
    x, least = counter.x, least_rounding(counter)
    size = np.abs(x)
    size[size == 0] = size[size > 0].min() if size.any() else 1.0  # a zero has no ulp of its own
    value, gradient, product, moved = least.value, least.gradient, least.product, math.nan
    for _ in range(_PERTURBATIONS):
        delta = counter.ulps * counter.eps * size * rng.choice([-1.0, 1.0], counter.n)
        near = [counter.at(x + step * delta)[0] for step in (-2, -1, 1, 2)]
        if any(there.nonfinite for there in near):
            continue
        value = max(value, *_effects([there.value for there in near], counter.ulps))
        gradient = max(gradient, *_effects([there.gradient.astype(np.float64) for there in near], counter.ulps))
        # As a block and alone, because these round differently.
        for products in zip(
            *([*counter.multiply(V, there), *counter.multiply(V[:1], there)] for there in near), strict=True
        ):
            length = norm(products[0])
            by_x, by_rounding = _effects(products, counter.ulps)
            moved = max(least.product if math.isnan(moved) else moved, ratio(max(by_x, by_rounding), length))
            if not repeatable:
                by_rounding = min(by_rounding, counter.contract / MARGIN * length)
            product = max(product, ratio(max(by_x, by_rounding), length))
    return Rounding(counter.eps, value, gradient, product if math.isfinite(product) else 0.0, moved)


def _effects(near: Sequence[Any], ulps: float) -> tuple[float, float]:
    """Return the effects of one ulp of x and of rounding.

    Args:
        near: Results at -2, -1, 1 and 2 perturbations.
        ulps: Size of one perturbation.
    """
    far_behind, behind, ahead, far_ahead = near
    return norm(ahead - behind) / 2 / ulps, norm((far_ahead - far_behind) - 2 * (ahead - behind)) / 2


def sharp(eps: float) -> float:
    """Return half the dtype's digits: a difference need not be more exact."""
    return math.sqrt(eps)


def coarse(eps: float) -> float:
    """Return a quarter of the dtype's digits: a larger threshold decides nothing."""
    return float(eps**0.25)


def difference(found: Array, expected: Array) -> float:
    """Return the largest difference of elements, relative to the largest element."""
    return ratio(float(np.abs(found - expected).max()), float(np.abs(expected).max()))


def norm(vector: Any) -> float:
    """Return the 2-norm, also if squares would overflow or vanish."""
    largest = float(np.abs(vector).max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm(vector / largest))


def ratio(part: float, whole: float) -> float:
    """Return the quotient, and 0 if both are 0."""
    if whole:
        return float(part / whole)
    return math.inf if part else 0.0
