"""The certificate of an objective at a point.

It answers one question: do products behave like the Hessian of the values and
gradients? It is not a proof. It sees as much as random tangents and the dtype's
rounding let it see, and says "undecided" if rounding or a kink hides the answer.
Nothing here needs jax, or knows how products are made.

    rounding   value, gradient and products 2^7 and 2^8 ulp of x away, on both sides
    algebra    symmetry, linearity, matmat, repeats, widths: products at x compared
    walk       gradients for the central difference, values for the Taylor remainder

Gauss-Newton and Fisher matrices are no derivative of the gradient, so the sign of their
quadratic form is checked instead of the walk. `brief` is the cheap part, which the
server applies to each registered objective.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np

from hvpd import _html, _text
from hvpd._arguments import check_choice
from hvpd._check.rounding import (
    MARGIN,
    Counter,
    Rounding,
    coarse,
    difference,
    least_rounding,
    measure_rounding,
    norm,
    ratio,
    sharp,
)
from hvpd._check.verdicts import MEANINGS, Curved, Item, rows_of
from hvpd._check.walk import walk
from hvpd._errors import InvalidArgumentError
from hvpd._wire.codec import Array
from hvpd._wire.protocol import OPERATORS, OperatorName
from hvpd.v1 import curvature_pb2

if TYPE_CHECKING:
    from hvpd._point import Point

_BLOCK_EPS = 10.0
"""Largest error of a block against its columns, in eps of the largest element.

Block widths differ in rounding, and in nothing else."""

_WIDTHS = (1, 2, 4, 8)
_REPEATS = 4

_PATIENCE = 10.0
"""Seconds of the first look of `brief` after which no second look follows.

A second look costs about ten times as much."""

_BRIEF = ("finite", "symmetry", "linearity", "difference")


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The result of `Objective.check`; its `str` is a table.

    Example:
        >>> certificate = objective.check(x)
        >>> print(certificate)
        >>> assert certificate.passed
    """

    objective: str
    """The objective's name, or the beginning of its digest."""
    digest: str
    """SHA-256 of the registered objective."""
    operator: str
    """The operator that was checked: hessian, ggn, fisher or empirical_fisher."""
    n: int
    """Number of elements of x."""
    dtype: str
    """float32 or float64; thresholds follow from it."""
    precision: str
    """Matrix-multiplication precision that the objective was traced with."""
    seed: int
    """Seed of the probes: the same seed draws the same probes."""
    items: tuple[Item, ...]
    """The items, in the order of the table."""
    products: int
    """Vectors that were multiplied."""
    points: int
    """Points whose value and gradient were computed."""
    seconds: float
    """Duration of the check."""

    @property
    def passed(self) -> bool:
        """Return whether no item failed; undecided items do not count.

        Example:
            >>> assert objective.check(x).passed
        """
        return all(item.passed is not False for item in self.items)

    def to_json(self) -> dict[str, Any]:
        """Return plain types for json.dumps.

        NaN and infinity become the strings "nan", "inf" and "-inf".

        Example:
            >>> json.dump(objective.check(x).to_json(), open("certificate.json", "w"))
        """
        items = [
            dataclasses.asdict(item)
            | {"measured": _plain(item.measured), "threshold": _plain(item.threshold), "verdict": item.verdict.lower()}
            for item in self.items
        ]
        return dataclasses.asdict(self) | {"passed": self.passed, "items": items}

    @property
    def _title(self) -> str:
        facts = f"n = {self.n}, {self.dtype}, precision {self.precision}, seed {self.seed}"
        return f"{self.objective} ({self.digest[:12]}): {self.operator}, {facts}"

    @property
    def _summary(self) -> str:
        undecided = sum(item.passed is None for item in self.items)
        verdict = f"{'passed' if self.passed else 'FAILED'}{f', {undecided} undecided' if undecided else ''}"
        return f"{verdict}: {self.products} products, {self.points} points, {self.seconds:.2g} s"

    def __str__(self) -> str:
        return _text.printable("\n".join([self._title, *_text.table(rows_of(self.items)), self._summary]), keep="\n")

    def _repr_html_(self) -> str:
        return _html.grid(self._title, rows_of(self.items), self._summary)


def certify(
    point: "Point",
    at: Callable[[Array], Curved],
    *,
    operator: OperatorName = "hessian",
    eps: float,
    seed: int,
    probes: Any,
) -> Certificate:
    """Return the certificate of an operator at a point.

    Args:
        point: The base point.
        at: Makes a point of the same objective and data from a flat vector in its
            dtype.
        operator: One of `OPERATORS`.
        eps: Relative precision of the products' arithmetic, from `verdicts.resolution`.
        seed: Seed of numpy's generator.
        probes: Number of tangents to draw, or the tangents, of shape (k, n).

    Raises:
        InvalidArgumentError: The seed, the probes or the operator cannot be used, or
            the objective does not have the operator.
    """
    started = time.perf_counter()
    check_choice(operator, "operator", OPERATORS)
    H = getattr(point, operator)()
    counter = Counter(point, at, eps, point.objective.mode, H.kind)
    try:
        rng = np.random.default_rng([index(seed), 1])
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f"seed must be an integer from 0, got {_text.described(seed)}", reason="INVALID_OPTION"
        ) from None
    tangents = _tangents(probes, point, rng)
    with np.errstate(all="ignore"):  # The item "finite" reports NaN and infinity.
        items = tuple(_items(counter, H, operator, tangents, rng, point.objective.precision))
    objective = point.objective
    return Certificate(
        objective=objective.label,
        digest=objective.digest,
        operator=operator,
        n=point.n,
        dtype=point.dtype.name,
        precision=objective.precision,
        seed=int(seed),
        items=items,
        products=counter.products,
        points=counter.points,
        seconds=time.perf_counter() - started,
    )


def brief(point: Curved, at: Callable[[Array], Curved], *, eps: float, mode: str) -> tuple[Item, ...]:
    """Return the items finite, symmetry, linearity and difference of the Hessian.

    Three products and two more gradients show that an objective is right. An item that
    does not pass is measured again as in `certify`, along one tangent, before it is
    called wrong. NaN or infinity in x or in the value leave all items undecided,
    because many users register at an x outside of the domain, such as zeros. If the
    value is finite, and the gradient or products are not, the item finite fails.

    Args:
        point: The base point.
        at: As for `certify`.
        eps: As for `certify`.
        mode: The mode of the bundle: how products are made.
    """
    started = time.perf_counter()
    counter = Counter(point, at, eps, mode, curvature_pb2.OPERATOR_HESSIAN)
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        found = _multiplied(counter, _tangents(1, point, rng), rng)
        finite = _finite(counter, found)
        if not finite.passed:
            if {"x", "value"} & set(counter.point.nonfinite):
                finite = dataclasses.replace(finite, passed=None)
            return (finite, *_skipped(_BRIEF[1:]))
        items = _first_look(counter, found)
        if all(item.passed for item in items):
            return finite, *items
        if time.perf_counter() - started > _PATIENCE:
            unclear = "; a second look takes too long here: run objective.check(x)"
            return finite, *(
                item if item.passed else dataclasses.replace(item, passed=None, meaning=item.meaning + unclear)
                for item in items
            )
        return finite, *_second_look(counter, found, rng)


def _first_look(counter: Counter, found: "_Products") -> tuple[Item, ...]:
    """Return symmetry, linearity and difference at little cost.

    An item that does not pass here may still be right.
    """
    eps, rounding = counter.eps, least_rounding(counter)
    scale = (norm(counter.x) or math.sqrt(counter.n)) / norm(found.V[0])
    d, Hd = scale * found.V[0], scale * found.HV[0]
    size = norm(Hd) or norm(counter.gradient) or 1.0
    # Here rounding and truncation of a plain difference meet (Nocedal and Wright,
    # section 8.1).
    t = 2.0 ** round(math.log2(min(max(rounding.gradient / size, eps), 1.0)) / 3)
    ahead, behind = (counter.at(counter.x + step * d)[0] for step in (t, -t))
    error = math.inf
    if not (ahead.nonfinite or behind.nonfinite):
        error = norm((ahead.gradient.astype(np.float64) - behind.gradient) / (2 * t) - Hd) / size
    meaning = f"{MEANINGS['difference']}; t = {t:.1g} |x|/|v|"
    return (
        *_algebra(counter, found, rounding),
        Item("difference", error, sharp(eps), error <= sharp(eps), meaning),
    )


def _second_look(counter: Counter, found: "_Products", rng: np.random.Generator) -> Iterator[Item]:
    """Yield symmetry, linearity and difference with the thresholds of a certificate."""
    repeatable = np.array_equal(counter.multiply(found.V), counter.multiply(found.V))
    rounding = measure_rounding(counter, found.V, rng, repeatable=repeatable)
    yield from _algebra(counter, found, rounding)
    yield from walk(counter, found.V, found.HV, rounding, values=False)


def _algebra(counter: Counter, found: "_Products", rounding: Rounding) -> Iterator[Item]:
    """Yield symmetry and linearity."""
    yield _bounded("symmetry", found.symmetry(), counter.contract, rounding)
    yield _bounded("linearity", found.linearity(), counter.contract, rounding)


def _tangents(probes: Any, point: Curved, rng: np.random.Generator) -> Array:
    """Return the caller's tangents, or drawn ones, of shape (k, n) in x's dtype."""
    array = np.asarray(probes)
    if array.ndim == 0:
        if array.dtype.kind not in "iu" or array < 1:
            raise InvalidArgumentError(
                f"probes must be a number of tangents from 1, or an array of them, got {_text.described(probes)}",
                reason="INVALID_OPTION",
            )
        return rng.standard_normal((int(array), point.n)).astype(point.dtype)
    if array.ndim != 2 or array.shape[1] != point.n or not len(array) or array.dtype.kind not in "fiu":
        raise InvalidArgumentError(
            f"probes must be a number, or real tangents of shape (k, {point.n}), got {array.dtype}{list(array.shape)}",
            reason="SHAPE",
        )
    with np.errstate(over="ignore"):
        tangents = array.astype(point.dtype)
    for row, tangent in enumerate(tangents):
        if not np.isfinite(tangent).all():
            raise InvalidArgumentError(
                f"probes[{row}] holds NaN or infinity in {point.dtype}: products of it prove nothing",
                reason="NOT_FINITE",
            )
        if not tangent.any():
            raise InvalidArgumentError(f"probes[{row}] is zero: the product of it proves nothing", reason="DEGENERATE")
        with np.errstate(over="ignore", under="ignore"):
            usable = 2.0**-500 < norm(tangent) < 2.0**500
        if not usable:
            raise InvalidArgumentError(
                f"probes[{row}] is too long or too short for {point.dtype}: scale it to about 1", reason="DEGENERATE"
            )
    return tangents


@dataclasses.dataclass(frozen=True)
class _Products:
    """Products of V[k,n], U[k,n] and W = a V + b U. U is drawn."""

    V: Array
    U: Array
    a: Array
    """Factors of shape (k, 1)."""
    b: Array
    HV: Array
    HU: Array
    HW: Array

    def symmetry(self) -> float:
        """Return the largest of the k errors of symmetry."""
        return max(
            ratio(abs(u @ hv - v @ hu), max(norm(u) * norm(hv), norm(v) * norm(hu)))
            for u, v, hu, hv in zip(self.U, self.V, self.HU, self.HV, strict=True)
        )

    def linearity(self) -> float:
        """Return the largest of the k errors of linearity."""
        return max(
            ratio(norm(hw - a * hv - b * hu), norm(a * hv) + norm(b * hu))
            for hw, hv, hu, a, b in zip(self.HW, self.HV, self.HU, self.a, self.b, strict=True)
        )


def _multiplied(counter: Counter, tangents: Array, rng: np.random.Generator) -> _Products:
    """Multiply tangents, random vectors, and sums of both."""
    k, n = tangents.shape
    # Scale all to about the same length, by powers of two, so that none hides the
    # errors of another.
    V = tangents.astype(np.float64)
    V *= np.array([2.0 ** -round(math.log2(norm(v) / math.sqrt(n))) for v in V])[:, None]
    U = rng.standard_normal((k, n)).astype(counter.dtype).astype(np.float64)
    a, b = rng.uniform(0.5, 2.0, (2, k, 1))
    W = (a * V + b * U).astype(counter.dtype).astype(np.float64)
    return _Products(V, U, a, b, *np.split(counter.multiply(np.concatenate([V, U, W])), 3))


def _finite(counter: Counter, found: _Products) -> Item:
    """Return the item finite."""
    wrong = list(counter.point.nonfinite)
    if not all(np.isfinite(product).all() for product in (found.HV, found.HU, found.HW)):
        wrong.append("products")
    message = f"NaN or infinity in {', '.join(wrong)}" if wrong else MEANINGS["finite"]
    if "value" in wrong and "x" not in wrong:
        message += " (perhaps from NaN in the data)"
    return Item("finite", float(len(wrong)), 0.0, not wrong, message)


def _skipped(names: Sequence[str]) -> Iterator[Item]:
    """Yield undecided items, because of NaN or infinity."""
    for name in names:
        yield Item(name, math.nan, math.nan, None, f"{MEANINGS[name]}; skipped, since something is not finite")


def _items(
    counter: Counter, H: Any, operator: str, tangents: Array, rng: np.random.Generator, precision: str
) -> Iterator[Item]:
    """Yield the items of a certificate, in its order."""
    found = _multiplied(counter, tangents, rng)
    finite = _finite(counter, found)
    yield finite
    if not finite.passed:
        apart = ("definite",) if operator == "hessian" else ("difference", "taylor")
        yield from _skipped([name for name in MEANINGS if name not in ("finite", *apart)])
        return

    V, U = found.V, found.U
    # The server may switch single products to another program than blocks in the course
    # of the check.
    rows = np.concatenate([V, U, rng.standard_normal((max(_WIDTHS), counter.n))])
    singles = [counter.multiply(rows[:1]) for _ in range(_REPEATS)]
    blocks = [counter.multiply(rows[: max(_WIDTHS)]) for _ in range(_REPEATS)]
    repeatable = any(np.array_equal(one, next_) for one, next_ in itertools.pairwise(blocks))

    rounding = measure_rounding(counter, V, rng, repeatable=repeatable)
    yield from _algebra(counter, found, rounding)
    contract = _BLOCK_EPS * counter.eps
    counter.products += 2 * len(V)
    columns = np.array([H @ v for v in V.astype(counter.dtype)], np.float64)
    yield _bounded("matmat", difference(np.asarray(H @ V.T, np.float64).T, columns), contract, rounding)
    measured = max(difference(again, group[0]) for group in (singles, blocks) for again in group[1:])
    same = all(np.array_equal(again, group[0]) for group in (singles, blocks) for again in group[1:])
    meaning = f"{MEANINGS['repeats']}, {_REPEATS} times, alone and in a block: bits {'equal' if same else 'differ'}"
    yield _bounded("repeats", measured, contract, rounding, meaning)
    by_width = [counter.multiply(rows[:width]) for width in _WIDTHS]
    measured = max(difference(product, by_width[-1][: len(product)]) for product in by_width)
    yield _bounded("widths", measured, contract, rounding)
    yield _precision(counter, rounding, precision)
    if operator == "hessian":
        yield from walk(counter, V, found.HV, rounding)
    else:
        yield _definite(counter, found, rounding, operator)


def _bounded(name: str, measured: float, contract: float, rounding: Rounding, meaning: str = "") -> Item:
    """Return an item whose threshold is the contract, or the rounding of products.

    The larger of both counts.
    """
    threshold = max(contract, MARGIN * rounding.product)
    meaning = meaning or MEANINGS[name]
    if threshold > 4 * contract:
        meaning += f"; products are known to {rounding.product:.1g} here"
    if not measured <= threshold:
        return Item(name, measured, threshold, False, meaning)
    return Item(name, measured, threshold, True if threshold <= coarse(rounding.eps) else None, meaning)


def _precision(counter: Counter, rounding: Rounding, precision: str) -> Item:
    """Return the item precision, which never fails.

    If a function is ill-conditioned, no product in this dtype is more exact.
    """
    meaning = f"precision {precision}: {MEANINGS['precision']}"
    threshold = max(counter.product_contract, MARGIN * counter.truncation)
    if not math.isfinite(rounding.moved):
        return Item("precision", math.nan, threshold, None, f"{meaning}; it cannot be measured close to this x")
    if rounding.moved <= threshold:
        return Item("precision", rounding.moved, threshold, True, meaning)
    why = "the function is ill-conditioned here, which is no error of the product"
    return Item("precision", rounding.moved, threshold, None, f"{meaning}; {why}")


def _definite(counter: Counter, found: _Products, rounding: Rounding, operator: str) -> Item:
    """Return the item definite: v.Gv is at least 0, up to rounding.

    That holds for every Fisher matrix, and for Gauss-Newton if the loss is convex.
    """
    tangents, products = np.concatenate([found.V, found.U]), np.concatenate([found.HV, found.HU])
    # Relative to the largest product, because products of the null space hold its
    # rounding.
    largest = max(norm(product) / norm(v) for v, product in zip(tangents, products, strict=True))
    least = min(float(v @ product) / norm(v) ** 2 for v, product in zip(tangents, products, strict=True))
    measured = math.copysign(ratio(abs(least), largest), least)
    tolerance = max(counter.product_contract, MARGIN * rounding.product)
    meaning = MEANINGS["definite"]
    passed: bool | None = True if tolerance <= coarse(rounding.eps) else None
    if not measured >= -tolerance:
        passed = None if operator == "ggn" else False
        if operator == "ggn":
            meaning += "; negative where the loss is not convex in the model's output, as it need not be"
    elif passed is None:
        meaning += f"; products are known to {rounding.product:.1g} here"
    return Item("definite", measured, -tolerance, passed, meaning)


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
