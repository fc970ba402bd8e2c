"""A walk to x + t d and x - t d for falling t: the items difference and taylor.

Gradients make central differences, to hold products against. Values make the remainder
of Taylor's second-order model. Its order in t shows whether products fit the values.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from hvpd._check.rounding import MARGIN, Counter, Rounding, coarse, norm, ratio, sharp
from hvpd._check.verdicts import MEANINGS, Item
from hvpd._wire.codec import Array

_RUNGS = 26
"""Largest number of steps of the walk. Few walks need more than seven."""

SLOPE = 2.5
"""Least order that passes: between the third order of a right Hessian's remainder and
the second order of a wrong one's."""

_ABOVE = 20.0
"""Least remainder that is fitted, as a multiple of its rounding."""


def walk(counter: Counter, V: Array, HV: Array, rounding: Rounding, *, values: bool = True) -> Iterator[Item]:
    """Yield the item difference and, from values, the item taylor.

    d has the length of x. The first t follows from the rounding. Let r be the
    rounding's share in a unit change of the gradient. An extrapolated central
    difference then errs by t^4 + r / t, which is least at r^(1/5). For a plain one the
    best t is r^(1/3) (Nocedal and Wright, Numerical Optimization, 2nd edition, section
    8.1). The first t is larger if rounding would hide the change. Then t falls until
    both items are decided.
    """
    length = norm(counter.x) or math.sqrt(counter.n)
    scales = [length / norm(v) for v in V]
    lines = [_Line(counter, scale * v, scale * hv, rounding) for scale, v, hv in zip(scales, V, HV, strict=True)]
    share = rounding.gradient / norm(np.array([line.size for line in lines])) * math.sqrt(len(lines))
    share = min(share, 1.0)
    # No further, because rounding hides the answer if it takes more, as at a kink.
    t = min(max(16.0 * share**0.2, 16.0 * share / sharp(rounding.eps)), 16.0)
    factor = 4.0 if rounding.eps < 1e-10 else 2.0  # float32 has room for few scales
    t = 2.0 ** round(math.log2(t)) if share else 2.0**-4
    taylor = _Taylor(rounding)
    taylor.done = not values
    for _ in range(_RUNGS):
        if taylor.done and all(line.done for line in lines):
            break
        remainders = [line.visit(t) for line in lines if not (taylor.done and line.done)]
        if not taylor.done:
            taylor.add(t, [pair for pair in remainders if pair is not None])
        t /= factor
    judged = _judge_lines(lines)
    yield judged
    if values:
        yield taylor.judge(lines, agrees=judged.passed is True)


@dataclasses.dataclass(frozen=True)
class _Remainder:
    """The remainder of the second-order model along one direction, to both sides."""

    both: float
    """Root mean square of the two sides."""
    even: float
    """(f(x + s) + f(x - s)) / 2 - f: the curvature of the values alone."""
    floor: float
    """Rounding of the remainders."""
    quadratic: float
    """t^2/2 |d.Hd|."""


class _Line:
    """Central differences along one direction d.

    Each two neighbouring steps give an extrapolated difference (Richardson).

    Args:
        counter: The base point.
        d: The direction, of shape (n,).
        Hd: Its product.
        rounding: Rounding at the base point.
    """

    def __init__(self, counter: Counter, d: Array, Hd: Array, rounding: Rounding) -> None:
        self._counter, self.rounding = counter, rounding
        self.d, self.Hd = d, Hd
        self._curvature = float(d @ Hd)
        self.size = norm(Hd) or norm(counter.gradient) or 1.0
        """Scale of errors: |Hd|, or if that is 0, |g| over the length of x."""
        self._last: tuple[float, Array] | None = None
        self._extrapolated: Array | None = None
        self.best: tuple[float, float, float] | None = None
        """(error, threshold, t) of the step with the tightest bound; relative."""
        self.done = False

    def visit(self, t: float) -> _Remainder | None:
        """Go to x + t d and x - t d; return None if f is not finite there."""
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
            # s.Hs of the rounded step, from the known product: the rest is of second
            # order in the rounding.
            linear, quadratic = float(counter.gradient @ step), s * float(step @ self.Hd) - t**2 / 2 * self._curvature
            remainders.append(there.value - base.value - linear - quadratic)
            # An ulp of each x counts too, because near a minimum there is no other
            # rounding.
            sizes = abs(there.value) + abs(base.value) + abs(linear) + abs(quadratic) + norm(there.gradient * there.x)
            floors.append(self.rounding.value + self.rounding.eps * sizes)
        return _Remainder(
            both=math.sqrt((remainders[0] ** 2 + remainders[1] ** 2) / 2),
            even=abs((ahead.value - base.value) + (behind.value - base.value)) / 2,
            floor=max(floors),
            quadratic=t**2 / 2 * abs(self._curvature),
        )

    def _difference(self, t: float, quotient: Array) -> None:
        """Add a step's difference; decide whether smaller steps are of use."""
        eps = self.rounding.eps
        noise = MARGIN * self.rounding.gradient / t
        if self._last is not None:
            factor = (self._last[0] / t) ** 2
            extrapolated = (factor * quotient - self._last[1]) / (factor - 1)
            if self._extrapolated is not None:
                error = norm(extrapolated - self.Hd) / self.size
                spread = norm(extrapolated - self._extrapolated)
                threshold = (spread + noise) / self.size + MARGIN * self.rounding.product
                if self.best is None or error + threshold < sum(self.best[:2]):
                    self.best = error, threshold, t
                error, threshold, _ = self.best
                # Either the error is known well enough, or noise hides it at smaller
                # steps.
                enough = sharp(eps) if error <= threshold else 0.0
                hidden = (error + threshold if error <= threshold else coarse(eps)) * self.size
                self.done = threshold <= enough or noise > min(hidden, coarse(eps) * self.size)
            self._extrapolated = extrapolated
        self._last = t, quotient

    def kinked(self, t: float) -> bool:
        """Return whether products along the line jump, as at the switch of a ReLU.

        Along a smooth line, third differences of H(x + s d) d fall by a factor of eight
        as the step halves. Products at x take no part, because they are in doubt.
        """
        counter = self._counter

        def product(s: float) -> Array:
            multiplied: Array = counter.multiply(self.d[None], counter.at(counter.x + s * self.d)[0])[0]
            return multiplied

        sizes = []
        odd = [product(s) - product(-s) for s in (t, t / 2, t / 4)]
        for wide, narrow in itertools.pairwise(odd):
            sizes.append(norm(wide - 2 * narrow))
        noise = max(30 * self.rounding.eps, MARGIN * self.rounding.product) * norm(self.Hd)
        return sizes[1] > noise and sizes[1] > 0.3 * sizes[0]


def _judge_lines(lines: Sequence[_Line]) -> Item:
    """Return the item difference."""
    name = "difference"
    meaning, widest = f"{MEANINGS[name]}, extrapolated in t", coarse(lines[0].rounding.eps)
    decided: list[tuple[float, float]] = []
    kinked = False
    for line in lines:
        if line.best is None:
            continue
        error, threshold, t = line.best
        if error > threshold:
            # Scattered differences prove no error. Zero products cannot show kinks, so
            # they need a clearer error.
            clear = threshold <= widest and (line.Hd.any() or error > 4 * threshold)
            if clear and not line.kinked(t):
                return Item(name, error, threshold, False, f"{meaning}; t = {t:.1g} |x|/|v|")
            kinked = True
        elif threshold <= widest:
            decided.append((error, threshold))
    if kinked:
        meaning += "; kinks within the step"
    elif decided:
        error, threshold = max(decided, key=lambda pair: ratio(*pair))
        return Item(name, error, threshold, True, meaning)
    else:
        meaning += "; hidden by rounding, or by a kink at x"
    seen = [line.best[:2] for line in lines if line.best is not None]
    error, threshold = max(seen, default=(math.nan, math.nan))
    return Item(name, error, threshold, None, meaning)


class _Taylor:
    """The order of the remainder over the walk.

    Remainders are root mean squares over directions and sides.

    Args:
        rounding: Rounding at the base point.
    """

    def __init__(self, rounding: Rounding) -> None:
        self._rounding = rounding
        self._seen: list[tuple[float, _Remainder]] = []
        self.done = False

    def add(self, t: float, remainders: Sequence[_Remainder]) -> None:
        """Add a step of the walk; done at the second step that rounding covers."""
        if not remainders:
            return

        def mean(name: str) -> float:
            return norm(np.array([getattr(remainder, name) for remainder in remainders])) / math.sqrt(len(remainders))

        self._seen.append((t, _Remainder(*(mean(field.name) for field in dataclasses.fields(_Remainder)))))
        self.done = len(self._seen) > 3 and all(r.both <= _ABOVE * r.floor for _, r in self._seen[-2:])

    def judge(self, lines: Sequence[_Line], *, agrees: bool) -> Item:
        """Return the item taylor.

        A remainder of third order passes, and so does one that is all rounding. If the
        values are smooth, first order fails, because the gradient does not belong to
        them. Second order fails unless products agree with the gradient at smaller
        steps. If they do, there are kinks on the way to the larger steps.

        Args:
            lines: The lines of the walk.
            agrees: Whether products agree with differences of gradients.
        """
        name, meaning = "taylor", MEANINGS["taylor"]
        # The smallest steps above the rounding show the order.
        above = [(t, r) for t, r in self._seen if r.both > _ABOVE * r.floor][-4:]
        if len(above) < 3:
            sharpest = min((ratio(_ABOVE * r.floor, r.quadratic) for _, r in self._seen), default=math.inf)
            if sharpest <= coarse(self._rounding.eps):
                return Item(name, math.nan, SLOPE, True, f"{meaning}; only rounding: f is quadratic")
            return Item(name, math.nan, SLOPE, None, f"{meaning}; hidden by rounding, or by a kink at x")
        slope = _slope([(t, r.both) for t, r in above])
        if slope >= SLOPE:
            return Item(name, slope, SLOPE, True, meaning)
        orders = [_slope([(t, r.both) for t, r in pair]) for pair in itertools.pairwise(above)]
        smooth = abs(_slope([(t, r.even) for t, r in above]) - 2) < 0.15 or all(
            r.even < 0.01 * r.both for _, r in above
        )
        if smooth and all(abs(order - 1) < 0.1 for order in orders):
            return Item(name, slope, SLOPE, False, f"{meaning}; the gradient does not fit the values")
        second = smooth and all(abs(order - 2) < 0.3 for order in orders)
        if agrees or not second or any(line.kinked(above[-1][0]) for line in lines):
            why = "orders are mixed" if smooth and not second else "f is not smooth"
            return Item(name, slope, SLOPE, None, f"{meaning}; {why} at these steps")
        return Item(name, slope, SLOPE, False, meaning)


def _slope(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the slope of a line through (log t, log size)."""
    t, size = np.log(np.maximum(np.array(pairs).T, np.finfo(np.float64).tiny))
    return float(np.polynomial.polynomial.polyfit(t, size, 1)[1])
