"""The certificate of an objective at a point: do its products behave like the Hessian of its values and gradients?

What it is not: a proof. It sees what random tangents and the dtype's rounding let it see, and says "undecided" where rounding
or a kink hides the answer. Nothing here needs jax, or knows how the products are made.

    rounding   value, gradient and products 2^7 and 2^8 ulp of x away, on both sides: what every threshold is widened by
    algebra    symmetry, linearity, matmat, repeats, widths: products at x against each other
    walk       x + t d and x - t d for falling t: gradients for the central difference, values for the Taylor remainder

Gauss-Newton and Fisher matrices are no derivative of the gradient: instead of the walk, their quadratic form is looked at.
`brief` is the cheap part, which the server makes of what was registered.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from operator import index
from typing import Any, Protocol, Self

import numpy as np

from hvpd import _text
from hvpd._codec import Array
from hvpd._errors import InvalidArgumentError
from hvpd._objective import Point
from hvpd.v1 import curvature_pb2, objective_pb2

OPERATORS = ("hessian", "ggn", "fisher", "empirical_fisher")
"""What can be checked, as the methods of `Point` are called."""

REGISTRATION_BYTES = 64 << 20
"""Largest x at which the server checks what was registered: larger ones are not sent for that alone."""

_EPS: Mapping[str, float] = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "TF32": 2.0**-10,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}

_CONTRACT: Mapping[str, float] = {"float64": 1e-12, "float32": 1e-5}
"""Of symmetry and linearity, relative. float64: 4500 eps. float32: 84 eps, as much as its products may be off: rounding errors
of dot products grow like sqrt(n) eps (Higham and Mary, 2019, doi:10.1137/18M1226312) and a random u averages them down again.
What is computed in less than float32 has as many eps of its own."""

_PRODUCT: Mapping[str, float] = {"float64": 1e-10, "float32": 1e-5}
"""Of a product against the truth, relative; likewise."""

_BLOCK_EPS = 10.0
"""A block against its columns, in eps of the largest element: block widths differ in rounding, not in more."""

_ULPS = 2.0**7
"""Relative size, in eps, of the perturbations of x that measure rounding. Large, so that what rounding does and what a change
of x does can be told apart; smaller where that is 1/64 of x, as in bfloat16."""

_PERTURBATIONS = 2
"""Directions in which x is perturbed, each both ways, once and twice as far."""

_MARGIN = 8.0
"""Thresholds over measured rounding, which is a sample of few."""

_WIDTHS = (1, 2, 4, 8)
_REPEATS = 4
_RUNGS = 26
"""Most steps of the walk; few need more than seven."""

_SLOPE = 2.5
"""Between a remainder of third order and one of second, which is what a wrong Hessian leaves."""

_ABOVE = 20.0
"""A remainder is fitted where it is so many times its rounding."""

_PATIENCE = 10.0
"""Seconds that the first look of `brief` may take if a second is to follow, which costs some ten times as much."""

_ITEMS = {
    "finite": "x, value, gradient and products hold no NaN and no infinity",
    "symmetry": "|u.Hv - v.Hu| / (|u| |Hv|)",
    "linearity": "|H(au + bv) - aHu - bHv| / (|aHu| + |bHv|)",
    "matmat": "H @ V against H @ v, relative to the largest element",
    "repeats": "the same product again",
    "widths": "the same product in blocks of 1, 2, 4 and 8",
    "precision": "how far rounding moves a product, relative",
    "definite": "least v.Gv / |v|^2, relative to the largest |Gv| / |v|",
    "difference": "|Hv - (g(x + tv) - g(x - tv)) / 2t| / |Hv|",
    "taylor": "order in t of f(x + td) - f - t g.d - t^2/2 d.Hd",
}

_LEAST = ("definite", "taylor")
"""Items whose threshold is the least that passes."""

_BRIEF = ("finite", "symmetry", "linearity", "difference")


class Curved(Protocol):
    """A point as a check sees it: `hvpd.Point`, or what a server has of one."""

    n: int
    dtype: np.dtype[Any]
    x: Array
    value: float
    gradient: Array
    nonfinite: tuple[str, ...]

    def multiply(self, block: Array, operator: int = ..., /) -> Array:
        """V[k,n] -> HV[k,n]."""


@dataclasses.dataclass(frozen=True)
class Item:
    """One line of a certificate."""

    name: str
    """finite, symmetry, linearity, matmat, repeats, widths, precision, difference, taylor; definite in place of the last two."""
    measured: float
    """Relative error; the order of the remainder for taylor; NaN where there was nothing to measure."""
    threshold: float
    """Most that passes; for definite and taylor the least. NaN where there is none."""
    passed: bool | None
    """None: undecided, because rounding or a kink hides the answer."""
    meaning: str
    """What was measured, and what the verdict rests on."""

    @property
    def verdict(self) -> str:
        """passed, failed or undecided."""
        return {True: "passed", False: "FAILED", None: "undecided"}[self.passed]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What `Objective.check` found; `str` of it is a table."""

    objective: str
    """The objective's name, or the beginning of its digest."""
    digest: str
    """SHA-256 of what was registered."""
    operator: str
    """Whose products were checked: hessian, ggn, fisher or empirical_fisher."""
    n: int
    """Number of elements of x."""
    dtype: str
    """float32 or float64; thresholds follow from it."""
    precision: str
    """Matrix-multiplication precision that the objective was traced with."""
    seed: int
    """Of the probes: the same seed asks the same questions."""
    items: tuple[Item, ...]
    """In the order of the table."""
    products: int
    """Vectors that were multiplied."""
    points: int
    """Points whose value and gradient were computed."""
    seconds: float
    """How long it took."""

    @property
    def passed(self) -> bool:
        """Whether no item failed; undecided ones do not count."""
        return all(item.passed is not False for item in self.items)

    def to_json(self) -> dict[str, Any]:
        """Plain types, for json.dumps; NaN and infinity as the strings "nan", "inf" and "-inf"."""
        items = [
            dataclasses.asdict(item)
            | {"measured": _plain(item.measured), "threshold": _plain(item.threshold), "verdict": item.verdict.lower()}
            for item in self.items
        ]
        return dataclasses.asdict(self) | {"passed": self.passed, "items": items}

    def __str__(self) -> str:
        rows = [("ITEM", "MEASURED", "THRESHOLD", "VERDICT", "MEANING")]
        for item in self.items:
            bound = (
                "" if math.isnan(item.threshold) else f"{'>=' if item.name in _LEAST else '<='} {item.threshold:.2g}"
            )
            measured = "-" if math.isnan(item.measured) else f"{item.measured:.2g}"
            rows.append((item.name, measured, bound, item.verdict, item.meaning))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        undecided = sum(item.passed is None for item in self.items)
        facts = f"n = {self.n}, {self.dtype}, precision {self.precision}, seed {self.seed}"
        title = f"{self.objective} ({self.digest[:12]}): {self.operator}, {facts}"
        verdict = f"{'passed' if self.passed else 'FAILED'}{f', {undecided} undecided' if undecided else ''}"
        cost = f"{self.products} products, {self.points} points, {self.seconds:.2g} s"
        return _text.printable("\n".join([title, *table, f"{verdict}: {cost}"]), keep="\n")


def resolution(dtypes: Collection[str], precision: str) -> float:
    """The coarsest eps that a computation has which starts from leaves of these dtypes, at this matmul precision."""
    narrow = ["TF32"] if precision != "highest" and "float64" not in dtypes else []
    return max(_EPS[name] for name in [*dtypes, *narrow])


@dataclasses.dataclass(frozen=True)
class RegistrationCheck:
    """What the server found at the x of the registration, by `Objective.registration_check`."""

    verdict: str
    """passed, failed, undecided, pending; empty where nothing was checked."""
    items: tuple[Item, ...]
    """finite, symmetry, linearity, difference: what the verdict rests on."""
    reason: str
    """Why there are no items, in words; empty where there are."""

    @classmethod
    def of(cls, message: objective_pb2.RegistrationCheck) -> Self:
        """As it came from the server."""
        decided = {objective_pb2.VERDICT_PASSED: True, objective_pb2.VERDICT_FAILED: False}
        items = (
            Item(item.name, item.measured, item.threshold, decided.get(item.verdict), item.meaning)
            for item in message.items
        )
        return cls(verdict_of(message), tuple(items), message.reason)


def verdict_of(message: objective_pb2.RegistrationCheck) -> str:
    """passed, failed, undecided, pending; empty where nothing was checked, and for verdicts of a newer server."""
    words = {
        objective_pb2.VERDICT_PENDING: "pending",
        objective_pb2.VERDICT_PASSED: "passed",
        objective_pb2.VERDICT_FAILED: "failed",
        objective_pb2.VERDICT_UNDECIDED: "undecided",
    }
    return words.get(message.verdict, "")


def certify(
    point: Point, at: Callable[[Array], Curved], *, operator: str = "hessian", eps: float, seed: int, probes: Any
) -> Certificate:
    """The certificate of an operator at `point`.

    Args:
        point: Where.
        at: Makes other points of the same objective and data, from flat vectors in its dtype.
        operator: Of `OPERATORS`.
        eps: Of what products are computed in: from `resolution`.
        seed: Of numpy's generator.
        probes: How many tangents are drawn, or the tangents, of shape (k, n).

    Raises:
        InvalidArgumentError: A seed or probes that cannot be used; an operator that is none, or that the objective lacks.
    """
    started = time.perf_counter()
    if operator not in OPERATORS:
        raise InvalidArgumentError(f"operator must be one of {', '.join(OPERATORS)}, got {operator!r}")
    H = getattr(point, operator)()
    counter = _Counter(point, at, eps, point.objective.mode, H.kind)
    try:
        rng = np.random.default_rng([index(seed), 1])
    except (TypeError, ValueError):
        raise InvalidArgumentError(f"seed must be an integer from 0, got {seed!r}") from None
    tangents = _tangents(probes, point, rng)
    with np.errstate(all="ignore"):  # What is not finite is looked for, and reported.
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
    """The items finite, symmetry, linearity and difference of the Hessian, from 3 products and 2 more gradients.

    That shows what is right. What does not look right at that price is looked at again as `certify` does it, along one tangent,
    before it is called wrong. What is not finite is undecided: it may be the x that is at fault, and people register at zeros.

    Args:
        point: Where.
        at: As for `certify`.
        eps: As for `certify`.
        mode: Bundle.mode.
    """
    started = time.perf_counter()
    counter = _Counter(point, at, eps, mode, curvature_pb2.OPERATOR_HESSIAN)
    rng = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        found = _multiplied(counter, _tangents(1, point, rng), rng)
        finite = _finite(counter, found)
        if finite.passed is False:
            return (dataclasses.replace(finite, passed=None), *_skipped(_BRIEF[1:]))
        items = _seen(counter, found, _floor(counter))
        if all(item.passed for item in items):
            return finite, *items
        if time.perf_counter() - started > _PATIENCE:
            unclear = "; a second look takes too long here: run objective.check(x)"
            return finite, *(
                item if item.passed else dataclasses.replace(item, passed=None, meaning=item.meaning + unclear)
                for item in items
            )
        return finite, *_looked_at_again(counter, found, rng)


def _seen(counter: "_Counter", found: "_Products", rounding: "_Rounding") -> tuple[Item, ...]:
    """symmetry, linearity and difference at first sight: what does not pass may be right all the same."""
    eps = counter.eps
    scale = (_norm(counter.x) or math.sqrt(counter.n)) / _norm(found.V[0])
    d, Hd = scale * found.V[0], scale * found.HV[0]
    size = _norm(Hd) or _norm(counter.gradient) or 1.0
    # Where rounding and truncation of a plain difference meet (Nocedal and Wright, section 8.1).
    t = 2.0 ** round(math.log2(min(max(rounding.gradient / size, eps), 1.0)) / 3)
    ahead, behind = (counter.at(counter.x + step * d)[0] for step in (t, -t))
    error = math.inf
    if not (ahead.nonfinite or behind.nonfinite):
        error = _norm((ahead.gradient.astype(np.float64) - behind.gradient) / (2 * t) - Hd) / size
    meaning = f"{_ITEMS['difference']}; t = {t:.1g} |x|/|v|"
    return (
        _bounded("symmetry", found.symmetry(), counter.contract, rounding),
        _bounded("linearity", found.linearity(), counter.contract, rounding),
        Item("difference", error, _sharp(eps), error <= _sharp(eps), meaning),
    )


def _looked_at_again(counter: "_Counter", found: "_Products", rng: np.random.Generator) -> Iterator[Item]:
    """symmetry, linearity and difference with the thresholds of a certificate."""
    repeatable = np.array_equal(counter.multiply(found.V), counter.multiply(found.V))
    rounding = _rounding(counter, found.V, rng, repeatable=repeatable)
    yield _bounded("symmetry", found.symmetry(), counter.contract, rounding)
    yield _bounded("linearity", found.linearity(), counter.contract, rounding)
    yield from _walk(counter, found.V, found.HV, rounding, values=False)


class _Counter:
    """The point and its neighbours, counting what they cost. Vectors come and go in float64."""

    def __init__(self, point: Curved, at: Callable[[Array], Curved], eps: float, mode: str, kind: int) -> None:
        self.point = point
        self.products = 0
        self.points = 1
        self.n, self.dtype, self.mode = point.n, point.dtype, mode
        self.eps = eps
        coarser = _CONTRACT["float32"] / _EPS["float32"] * eps if eps > _EPS["float32"] else 0.0
        self.contract = max(_CONTRACT[point.dtype.name], coarser)
        self.product_contract = max(_PRODUCT[point.dtype.name], coarser)
        self.ulps = max(2.0, min(_ULPS, 2.0**-6 / eps))
        self.x = point.x.astype(np.float64)
        self.gradient = point.gradient.astype(np.float64)
        self._at = at
        self._kind = kind

    def at(self, x: Array) -> tuple[Curved, Array]:
        """The point nearest to x in the dtype, and the step there from the base point without the rounding of x."""
        self.points += 1
        there = self._at(x.astype(self.dtype))
        return there, there.x.astype(np.float64) - self.x

    def multiply(self, block: Array, point: Curved | None = None) -> Array:
        """V[k,n] -> HV[k,n] at the base point, or at another."""
        self.products += len(block)
        product = (point or self.point).multiply(np.ascontiguousarray(block, self.dtype), self._kind)
        return product.astype(np.float64)


def _tangents(probes: Any, point: Curved, rng: np.random.Generator) -> Array:
    """The caller's tangents, or seeded ones, in the point's dtype, of shape (k, n)."""
    array = np.asarray(probes)
    if array.ndim == 0:
        if array.dtype.kind not in "iu" or array < 1:
            raise InvalidArgumentError(
                f"probes must be a number of tangents from 1, or an array of them, got {probes!r}"
            )
        return rng.standard_normal((int(array), point.n)).astype(point.dtype)
    if array.ndim != 2 or array.shape[1] != point.n or not len(array) or array.dtype.kind not in "fiu":
        raise InvalidArgumentError(
            f"probes must be a number, or real tangents of shape (k, {point.n}), got {array.dtype}{list(array.shape)}"
        )
    with np.errstate(over="ignore"):
        tangents = array.astype(point.dtype)
    for row, tangent in enumerate(tangents):
        with np.errstate(over="ignore", under="ignore"):
            unusable = tangent.any() and not 2.0**-500 < _norm(tangent) < 2.0**500
        if np.isfinite(tangent).all() and unusable:
            raise InvalidArgumentError(f"probes[{row}] is too long or too short for {point.dtype}: scale it to about 1")
        if not np.isfinite(tangent).all():
            raise InvalidArgumentError(
                f"probes[{row}] holds NaN or infinity in {point.dtype}: products of it prove nothing"
            )
        if not tangent.any():
            raise InvalidArgumentError(f"probes[{row}] is zero: the product of it proves nothing")
    return tangents


@dataclasses.dataclass(frozen=True)
class _Products:
    """Of V[k,n], U and W = a V + b U, where U is drawn."""

    V: Array
    U: Array
    a: Array
    """Of shape (k, 1)."""
    b: Array
    HV: Array
    HU: Array
    HW: Array

    def symmetry(self) -> float:
        """The largest of the k errors."""
        return max(
            _ratio(abs(u @ hv - v @ hu), max(_norm(u) * _norm(hv), _norm(v) * _norm(hu)))
            for u, v, hu, hv in zip(self.U, self.V, self.HU, self.HV, strict=True)
        )

    def linearity(self) -> float:
        """Likewise."""
        return max(
            _ratio(_norm(hw - a * hv - b * hu), _norm(a * hv) + _norm(b * hu))
            for hw, hv, hu, a, b in zip(self.HW, self.HV, self.HU, self.a, self.b, strict=True)
        )


def _multiplied(counter: _Counter, tangents: Array, rng: np.random.Generator) -> _Products:
    k, n = tangents.shape
    # All about as long, by powers of two: none hides another's errors.
    V = tangents.astype(np.float64)
    V *= np.array([2.0 ** -round(math.log2(_norm(v) / math.sqrt(n))) for v in V])[:, None]
    U = rng.standard_normal((k, n)).astype(counter.dtype).astype(np.float64)
    a, b = rng.uniform(0.5, 2.0, (2, k, 1))
    W = (a * V + b * U).astype(counter.dtype).astype(np.float64)
    return _Products(V, U, a, b, *np.split(counter.multiply(np.concatenate([V, U, W])), 3))


def _finite(counter: _Counter, found: _Products) -> Item:
    wrong = list(counter.point.nonfinite)
    if not all(np.isfinite(product).all() for product in (found.HV, found.HU, found.HW)):
        wrong.append("products")
    message = f"NaN or infinity in {', '.join(wrong)}" if wrong else _ITEMS["finite"]
    return Item("finite", float(len(wrong)), 0.0, not wrong, message)


def _skipped(names: Sequence[str]) -> Iterator[Item]:
    for name in names:
        yield Item(name, math.nan, math.nan, None, f"{_ITEMS[name]}; skipped, since something is not finite")


def _items(
    counter: _Counter, H: Any, operator: str, tangents: Array, rng: np.random.Generator, precision: str
) -> Iterator[Item]:
    found = _multiplied(counter, tangents, rng)
    finite = _finite(counter, found)
    yield finite
    if not finite.passed:
        apart = ("definite",) if operator == "hessian" else ("difference", "taylor")
        yield from _skipped([name for name in _ITEMS if name not in ("finite", *apart)])
        return

    V, U = found.V, found.U
    # Single products may come from another program than blocks, and change from one to the other.
    rows = np.concatenate([V, U, rng.standard_normal((max(_WIDTHS), counter.n))])
    singles = [counter.multiply(rows[:1]) for _ in range(_REPEATS)]
    blocks = [counter.multiply(rows[: max(_WIDTHS)]) for _ in range(_REPEATS)]
    repeatable = any(np.array_equal(one, next_) for one, next_ in itertools.pairwise(blocks))

    rounding = _rounding(counter, V, rng, repeatable=repeatable)
    yield _bounded("symmetry", found.symmetry(), counter.contract, rounding)
    yield _bounded("linearity", found.linearity(), counter.contract, rounding)
    contract = _BLOCK_EPS * counter.eps
    counter.products += 2 * len(V)
    columns = np.array([H @ v for v in V.astype(counter.dtype)], np.float64)
    yield _bounded("matmat", _difference(np.asarray(H @ V.T, np.float64).T, columns), contract, rounding)
    measured = max(_difference(again, group[0]) for group in (singles, blocks) for again in group[1:])
    same = all(np.array_equal(again, group[0]) for group in (singles, blocks) for again in group[1:])
    meaning = f"{_ITEMS['repeats']}, {_REPEATS} times, alone and in a block: bits {'equal' if same else 'differ'}"
    yield _bounded("repeats", measured, contract, rounding, meaning)
    by_width = [counter.multiply(rows[:width]) for width in _WIDTHS]
    measured = max(_difference(product, by_width[-1][: len(product)]) for product in by_width)
    yield _bounded("widths", measured, contract, rounding)
    yield _precision(counter, rounding, precision)
    if operator == "hessian":
        yield from _walk(counter, V, found.HV, rounding)
    else:
        yield _definite(counter, found, rounding, operator)


def _precision(counter: _Counter, rounding: "_Rounding", precision: str) -> Item:
    """Never failed: where a function is ill-conditioned, no product in this dtype is known better."""
    meaning = f"precision {precision}: {_ITEMS['precision']}"
    threshold = max(counter.product_contract, _MARGIN * _truncation(counter))
    if not math.isfinite(rounding.moved):
        return Item("precision", math.nan, threshold, None, f"{meaning}; it cannot be measured close to this x")
    if rounding.moved <= threshold:
        return Item("precision", rounding.moved, threshold, True, meaning)
    why = "the function is ill-conditioned here, which is no error of the product"
    return Item("precision", rounding.moved, threshold, None, f"{meaning}; {why}")


def _definite(counter: _Counter, found: _Products, rounding: "_Rounding", operator: str) -> Item:
    """v.Gv is at least 0 up to rounding, of Fisher matrices by what they are, of Gauss-Newton where the loss is convex."""
    tangents, products = np.concatenate([found.V, found.U]), np.concatenate([found.HV, found.HU])
    # Relative to the largest product: what a tangent of the null space leaves is rounding of it.
    largest = max(_norm(product) / _norm(v) for v, product in zip(tangents, products, strict=True))
    least = min(float(v @ product) / _norm(v) ** 2 for v, product in zip(tangents, products, strict=True))
    measured = math.copysign(_ratio(abs(least), largest), least)
    tolerance = max(counter.product_contract, _MARGIN * rounding.product)
    meaning = _ITEMS["definite"]
    passed: bool | None = True if tolerance <= _coarse(rounding.eps) else None
    if not measured >= -tolerance:
        passed = None if operator == "ggn" else False
        if operator == "ggn":
            meaning += "; negative where the loss is not convex in the model's output, as it need not be"
    elif passed is None:
        meaning += f"; products are known to {rounding.product:.1g} here"
    return Item("definite", measured, -tolerance, passed, meaning)


@dataclasses.dataclass(frozen=True)
class _Rounding:
    """How exactly things are known at the base point, measured at points some ulp away.

    Half the difference of both sides is what x does, and is divided by its ulps; the third difference is what rounding does.
    The larger counts: no algorithm in this dtype can be expected to know better. Products at the base point and other blocks
    take no part, so that what is wrong with them cannot excuse itself.
    """

    eps: float
    value: float
    """Of f, absolute; at least eps |f|."""
    gradient: float
    """Of the gradient, in the 2-norm; at least eps |g|."""
    product: float
    """Of products, relative: as far as they may excuse themselves."""
    moved: float
    """Likewise, all of it; NaN where it could not be measured."""


def _truncation(counter: _Counter) -> float:
    """What a product lacks by its mode, relative: that of finite differences with such a step. Their rounding is measured."""
    return 2 * counter.eps ** (2 / 3) if counter.mode == "finite_difference" else 0.0


def _floor(counter: _Counter) -> _Rounding:
    """The rounding that there is anywhere, without a look at neighbours."""
    eps, truncation = counter.eps, _truncation(counter)
    value, gradient = eps * abs(counter.point.value), eps * _norm(counter.gradient)
    return _Rounding(eps, value, gradient, truncation, math.nan)


def _rounding(counter: _Counter, V: Array, rng: np.random.Generator, *, repeatable: bool) -> _Rounding:
    """Rounding at the base point, after the idea of Moré and Wild, 2011, doi:10.1137/100786125: look at close neighbours.

    Products that are not repeatable may excuse themselves up to the contract's figure only.
    """
    x, floor = counter.x, _floor(counter)
    size = np.abs(x)
    size[size == 0] = size[size > 0].min() if size.any() else 1.0  # a zero has no ulp of its own
    value, gradient, product, moved = floor.value, floor.gradient, floor.product, math.nan
    for _ in range(_PERTURBATIONS):
        delta = counter.ulps * counter.eps * size * rng.choice([-1.0, 1.0], counter.n)
        near = [counter.at(x + step * delta)[0] for step in (-2, -1, 1, 2)]
        if any(there.nonfinite for there in near):
            continue
        value = max(value, *_known([there.value for there in near], counter.ulps))
        gradient = max(gradient, *_known([there.gradient.astype(np.float64) for there in near], counter.ulps))
        # As a block and alone, since these round differently.
        for products in zip(
            *([*counter.multiply(V, there), *counter.multiply(V[:1], there)] for there in near), strict=True
        ):
            length = _norm(products[0])
            by_x, by_rounding = _known(products, counter.ulps)
            moved = max(floor.product if math.isnan(moved) else moved, _ratio(max(by_x, by_rounding), length))
            if not repeatable:
                by_rounding = min(by_rounding, counter.contract / _MARGIN * length)
            product = max(product, _ratio(max(by_x, by_rounding), length))
    return _Rounding(counter.eps, value, gradient, product if math.isfinite(product) else 0.0, moved)


def _known(near: Sequence[Any], ulps: float) -> tuple[float, float]:
    """What one ulp of x does, and what rounding does, from what was found at -2, -1, 1 and 2 perturbations."""
    far_behind, behind, ahead, far_ahead = near
    return _norm(ahead - behind) / 2 / ulps, _norm((far_ahead - far_behind) - 2 * (ahead - behind)) / 2


def _bounded(name: str, measured: float, contract: float, rounding: _Rounding, meaning: str = "") -> Item:
    """An item whose threshold is the contract's, or as much as products are known to where that is less."""
    threshold = max(contract, _MARGIN * rounding.product)
    meaning = meaning or _ITEMS[name]
    if threshold > 4 * contract:
        meaning += f"; products are known to {rounding.product:.1g} here"
    if not measured <= threshold:
        return Item(name, measured, threshold, False, meaning)
    return Item(name, measured, threshold, True if threshold <= _coarse(rounding.eps) else None, meaning)


def _walk(counter: _Counter, V: Array, HV: Array, rounding: _Rounding, *, values: bool = True) -> Iterator[Item]:
    """The items difference and, from values, taylor: gradients and values at x + t d and x - t d for falling t.

    d has the length of x. The first t comes from the rounding: with r its share in a unit change of the gradient, an extrapolated
    central difference errs by t^4 + r / t, least at r^(1/5), as a plain one at r^(1/3) (Nocedal and Wright, Numerical
    Optimization, 2nd edition, section 8.1); it is larger where rounding would drown the change. Then t falls until both are decided.
    """
    length = _norm(counter.x) or math.sqrt(counter.n)
    scales = [length / _norm(v) for v in V]
    lines = [_Line(counter, scale * v, scale * hv, rounding) for scale, v, hv in zip(scales, V, HV, strict=True)]
    share = rounding.gradient / _norm(np.array([line.size for line in lines])) * math.sqrt(len(lines))
    share = min(share, 1.0)
    # No further than that: where it takes more, as at a kink, rounding hides the answer.
    t = min(max(16.0 * share**0.2, 16.0 * share / _sharp(rounding.eps)), 16.0)
    ratio = 4.0 if rounding.eps < 1e-10 else 2.0  # float32 has room for few scales
    t = 2.0 ** round(math.log2(t)) if share else 2.0**-4
    taylor = _Taylor(rounding)
    taylor.done = not values
    for _ in range(_RUNGS):
        if taylor.done and all(line.done for line in lines):
            break
        remainders = [line.visit(t) for line in lines if not (taylor.done and line.done)]
        if not taylor.done:
            taylor.add(t, [pair for pair in remainders if pair is not None])
        t /= ratio
    difference = _judge_lines(lines)
    yield difference
    if values:
        yield taylor.judge(lines, agrees=difference.passed is True)


@dataclasses.dataclass(frozen=True)
class _Remainder:
    """Of the second-order model on both sides of x along one direction."""

    both: float
    """Root mean square of the two."""
    even: float
    """(f(x + s) + f(x - s)) / 2 - f: the curvature as values see it, whatever the product says."""
    floor: float
    """What rounding leaves of them."""
    quadratic: float
    """t^2/2 |d.Hd|."""


class _Line:
    """Central differences along one direction d, extrapolated (Richardson) from each two neighbouring steps."""

    def __init__(self, counter: _Counter, d: Array, Hd: Array, rounding: _Rounding) -> None:
        self._counter, self.rounding = counter, rounding
        self.d, self.Hd = d, Hd
        self._curvature = float(d @ Hd)
        self.size = _norm(Hd) or _norm(counter.gradient) or 1.0
        """What errors are relative to: where the product is zero, the gradient, over the length of x."""
        self._last: tuple[float, Array] | None = None
        self._extrapolated: Array | None = None
        self.best: tuple[float, float, float] | None = None
        """(error, threshold, t) of the step that bounds the product's error best; relative."""
        self.done = False

    def visit(self, t: float) -> _Remainder | None:
        """Goes to x + t d and x - t d; None where the function is not finite."""
        counter = self._counter
        base = counter.point
        ahead, step_ahead = counter.at(counter.x + t * self.d)
        behind, step_behind = counter.at(counter.x - t * self.d)
        if ahead.nonfinite or behind.nonfinite:
            self._last = self._extrapolated = None
            return None
        if not self.done:
            self._difference(t, (ahead.gradient.astype(np.float64) - behind.gradient) / (2 * t))
        remainders, floors = [], []
        for there, step, s in ((ahead, step_ahead, t), (behind, step_behind, -t)):
            # s.Hs of the rounded step, from the product that is known: the rest is of second order in the rounding.
            linear, quadratic = float(counter.gradient @ step), s * float(step @ self.Hd) - t**2 / 2 * self._curvature
            remainders.append(there.value - base.value - linear - quadratic)
            # An ulp of each x counts too: near a minimum it is all there is.
            sizes = abs(there.value) + abs(base.value) + abs(linear) + abs(quadratic) + _norm(there.gradient * there.x)
            floors.append(self.rounding.value + self.rounding.eps * sizes)
        return _Remainder(
            both=math.sqrt((remainders[0] ** 2 + remainders[1] ** 2) / 2),
            even=abs((ahead.value - base.value) + (behind.value - base.value)) / 2,
            floor=max(floors),
            quadratic=t**2 / 2 * abs(self._curvature),
        )

    def _difference(self, t: float, quotient: Array) -> None:
        eps = self.rounding.eps
        noise = _MARGIN * self.rounding.gradient / t
        if self._last is not None:
            ratio = (self._last[0] / t) ** 2
            extrapolated = (ratio * quotient - self._last[1]) / (ratio - 1)
            if self._extrapolated is not None:
                error = _norm(extrapolated - self.Hd) / self.size
                spread = _norm(extrapolated - self._extrapolated)
                threshold = (spread + noise) / self.size + _MARGIN * self.rounding.product
                if self.best is None or error + threshold < sum(self.best[:2]):
                    self.best = error, threshold, t
                error, threshold, _ = self.best
                # Known well enough; or smaller steps can tell no more, of what agrees or at all.
                enough = _sharp(eps) if error <= threshold else 0.0
                hidden = (error + threshold if error <= threshold else _coarse(eps)) * self.size
                self.done = threshold <= enough or noise > min(hidden, _coarse(eps) * self.size)
            self._extrapolated = extrapolated
        self._last = t, quotient

    def kinked(self, t: float) -> bool:
        """Whether products along the line jump rather than bend, as where a ReLU switches.

        Third differences of H(x + s d) d fall eight times as the step halves where it is smooth. Products at x itself take no
        part: they are what is in doubt.
        """
        counter = self._counter

        def product(s: float) -> Array:
            multiplied: Array = counter.multiply(self.d[None], counter.at(counter.x + s * self.d)[0])[0]
            return multiplied

        sizes = []
        odd = [product(s) - product(-s) for s in (t, t / 2, t / 4)]
        for wide, narrow in itertools.pairwise(odd):
            sizes.append(_norm(wide - 2 * narrow))
        noise = max(30 * self.rounding.eps, _MARGIN * self.rounding.product) * _norm(self.Hd)
        return sizes[1] > noise and sizes[1] > 0.3 * sizes[0]


def _judge_lines(lines: Sequence[_Line]) -> Item:
    name = "difference"
    meaning, coarse = f"{_ITEMS[name]}, extrapolated in t", _coarse(lines[0].rounding.eps)
    decided: list[tuple[float, float]] = []
    kinked = False
    for line in lines:
        if line.best is None:
            continue
        error, threshold, t = line.best
        if error > threshold:
            # Differences that scatter themselves accuse nobody. Where products are zero they cannot show kinks, so it takes more.
            clear = threshold <= coarse and (line.Hd.any() or error > 4 * threshold)
            if clear and not line.kinked(t):
                return Item(name, error, threshold, False, f"{meaning}; t = {t:.1g} |x|/|v|")
            kinked = True
        elif threshold <= coarse:
            decided.append((error, threshold))
    if kinked:
        meaning += "; kinks within the step"
    elif decided:
        error, threshold = max(decided, key=lambda pair: _ratio(*pair))
        return Item(name, error, threshold, True, meaning)
    else:
        meaning += "; hidden by rounding"
    seen = [line.best[:2] for line in lines if line.best is not None]
    error, threshold = max(seen, default=(math.nan, math.nan))
    return Item(name, error, threshold, None, meaning)


class _Taylor:
    """The order of the remainder over the walk, root mean square over directions and sides."""

    def __init__(self, rounding: _Rounding) -> None:
        self._rounding = rounding
        self._seen: list[tuple[float, _Remainder]] = []
        self.done = False

    def add(self, t: float, remainders: Sequence[_Remainder]) -> None:
        """A step of the walk; done at the second one that rounding covers."""
        if not remainders:
            return

        def mean(name: str) -> float:
            return _norm(np.array([getattr(remainder, name) for remainder in remainders])) / math.sqrt(len(remainders))

        self._seen.append((t, _Remainder(*(mean(field.name) for field in dataclasses.fields(_Remainder)))))
        self.done = len(self._seen) > 3 and all(r.both <= _ABOVE * r.floor for _, r in self._seen[-2:])

    def judge(self, lines: Sequence[_Line], *, agrees: bool) -> Item:
        """Third order, or all rounding, passes.

        Where the values themselves are smooth, first order fails: the gradient is not theirs. So does second order, unless
        products agree with the gradient at smaller steps: then there are kinks on the way to the larger ones.
        """
        name, meaning = "taylor", _ITEMS["taylor"]
        # The smallest steps that are above the rounding: there the order shows.
        above = [(t, r) for t, r in self._seen if r.both > _ABOVE * r.floor][-4:]
        if len(above) < 3:
            sharpest = min((_ratio(_ABOVE * r.floor, r.quadratic) for _, r in self._seen), default=math.inf)
            if sharpest <= _coarse(self._rounding.eps):
                return Item(name, math.nan, _SLOPE, True, f"{meaning}; only rounding: f is quadratic")
            return Item(name, math.nan, _SLOPE, None, f"{meaning}; hidden by rounding")
        slope = _slope([(t, r.both) for t, r in above])
        if slope >= _SLOPE:
            return Item(name, slope, _SLOPE, True, meaning)
        orders = [_slope([(t, r.both) for t, r in pair]) for pair in itertools.pairwise(above)]
        smooth = abs(_slope([(t, r.even) for t, r in above]) - 2) < 0.15 or all(
            r.even < 0.01 * r.both for _, r in above
        )
        if smooth and all(abs(order - 1) < 0.1 for order in orders):
            return Item(name, slope, _SLOPE, False, f"{meaning}; the gradient does not fit the values")
        second = smooth and all(abs(order - 2) < 0.3 for order in orders)
        if agrees or not second or any(line.kinked(above[-1][0]) for line in lines):
            why = "orders are mixed" if smooth and not second else "f is not smooth"
            return Item(name, slope, _SLOPE, None, f"{meaning}; {why} at these steps")
        return Item(name, slope, _SLOPE, False, meaning)


def _sharp(eps: float) -> float:
    """Half the dtype's digits: as good as a difference needs to be."""
    return math.sqrt(eps)


def _coarse(eps: float) -> float:
    """A quarter of the dtype's digits: with a threshold above, nothing is decided."""
    return float(eps**0.25)


def _slope(pairs: Sequence[tuple[float, float]]) -> float:
    t, size = np.log(np.maximum(np.array(pairs).T, np.finfo(np.float64).tiny))
    return float(np.polynomial.polynomial.polyfit(t, size, 1)[1])


def _difference(found: Array, expected: Array) -> float:
    """The largest difference of elements, relative to the largest element."""
    return _ratio(float(np.abs(found - expected).max()), float(np.abs(expected).max()))


def _norm(vector: Any) -> float:
    """The 2-norm, also where squares would overflow or vanish."""
    largest = float(np.abs(vector).max())
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm(vector / largest))


def _ratio(part: float, whole: float) -> float:
    """The quotient, 0 where both are."""
    if whole:
        return float(part / whole)
    return math.inf if part else 0.0


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
