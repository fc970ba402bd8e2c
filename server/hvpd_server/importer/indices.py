"""Integers in the body of a loop that depend linearly on the round, such as the row
that a round reads.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from hvpd_server.importer.graph import Operation
from hvpd_server.importer.loops import Counter, Loop, constant, induction


@dataclasses.dataclass(frozen=True)
class Linear:
    """The array offset + scale * round."""

    scale: "np.ndarray[Any, Any]"
    offset: "np.ndarray[Any, Any]"

    def map(self, function: Callable[..., Any]) -> "Linear":
        return Linear(function(self.scale), function(self.offset))

    def ends(self, rounds: int) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
        """Return the least and the greatest value of each element."""
        last = self.offset + self.scale * (rounds - 1)
        return np.minimum(self.offset, last), np.maximum(self.offset, last)


class Indices:
    """The integers in the body of a loop that depend linearly on the round."""

    def __init__(self, loop: Loop, counter: Counter) -> None:
        self._loop, self._counter = loop, counter
        self._found: dict[int, Linear | None] = {}
        for index, value in enumerate(loop.body.arguments):
            line = induction(loop, index)
            if line is None:
                self._found[value] = self._fixed(value)
            elif self._fits(line, loop.call.operands[index].dtype):
                self._found[value] = Linear(integers(line[1]), integers(line[0]))
            else:
                self._found[value] = None

    def _fits(self, line: tuple[int, int], dtype: Any) -> bool:
        """Return whether a counter other than the loop's own stays in the range of its
        dtype.
        """
        start, step = line
        range_ = np.iinfo(dtype)
        return bool(range_.min <= start + step * self._counter.rounds <= range_.max)

    def __call__(self, value: int) -> Linear | None:
        """Return how a value depends on the round, or None if the dependence is not
        linear.
        """
        if value not in self._found:
            maker = self._loop.makers.get(value)
            self._found[value] = self._fixed(value) if maker is None else self._made(maker)
        return self._found[value]

    def _fixed(self, value: int) -> Linear | None:
        found = constant(self._loop, value)
        return None if found is None else _constant_line(found)

    def _made(self, maker: Operation) -> Linear | None:
        name = maker.name.removeprefix("stablehlo.")
        if name == "constant":
            return self._fixed(maker.results[0])
        # Arithmetic of booleans is another one.
        if name not in _LINES or (maker.types[0].dtype == "bool" and name != "compare"):
            return None
        parts = [self(value) for value in maker.operands]
        if any(part is None for part in parts) or any(extent is None for extent in maker.types[0].shape):
            return None
        result = _LINES[name](maker, [part for part in parts if part is not None], self._counter.rounds)
        if result is None or not result.offset.shape == result.scale.shape == maker.types[0].shape:
            return None
        type_ = maker.types[0].dtype
        if type_ != "bool":
            # A value that wraps around is not linear.
            range_ = np.iinfo(np.dtype(type_)) if np.dtype(type_).kind in "iu" else None
            low, high = result.ends(self._counter.rounds)
            if range_ is None or np.any(low < range_.min) or np.any(high > range_.max):
                return None
        return result


def _constant_line(values: "np.ndarray[Any, Any]") -> Linear:
    exact = values.astype(object)
    return Linear(integers(exact * 0), exact)


_Line = Callable[[Operation, Sequence[Linear], int], "Linear | None"]


def _sum(maker: Operation, parts: Sequence[Linear], rounds: int) -> Linear:
    x, y = parts
    return Linear(integers(x.scale + y.scale), integers(x.offset + y.offset))


def _difference(maker: Operation, parts: Sequence[Linear], rounds: int) -> Linear:
    x, y = parts
    return Linear(integers(x.scale - y.scale), integers(x.offset - y.offset))


def _product(maker: Operation, parts: Sequence[Linear], rounds: int) -> Linear | None:
    x, y = parts
    if np.any(x.scale != 0) and np.any(y.scale != 0):
        return None
    return Linear(integers(x.scale * y.offset + x.offset * y.scale), integers(x.offset * y.offset))


def _comparison(maker: Operation, parts: Sequence[Linear], rounds: int) -> Linear | None:
    """Compare, if each round has the same outcome."""
    low, high = _difference(maker, parts, rounds).ends(rounds)
    direction = maker.attributes.get("comparison_direction")
    if direction not in ("LT", "GE") or maker.types[0].shape:
        return None
    if high < 0 or low >= 0:
        return _constant_line(np.array((high < 0) == (direction == "LT")))
    return None


def _choice(maker: Operation, parts: Sequence[Linear], rounds: int) -> Linear | None:
    which, on_true, on_false = parts
    if which.offset.shape or np.any(which.scale != 0):
        return None
    return on_true if which.offset else on_false


def _clamp(maker: Operation, parts: Sequence[Linear], rounds: int) -> Linear | None:
    """Clamp, if this changes the operand in no round."""
    low, x, high = parts
    (least, greatest), (_, floor), (ceiling, _) = (each.ends(rounds) for each in (x, low, high))
    return x if np.all(least >= floor) and np.all(greatest <= ceiling) else None


def _concatenate(maker: Operation, parts: Sequence[Linear], rounds: int) -> Linear:
    axis = maker.attributes.get("dimension", 0)
    return Linear(
        np.concatenate([part.scale for part in parts], axis), np.concatenate([part.offset for part in parts], axis)
    )


def _reshape(maker: Operation, parts: Sequence[Linear], rounds: int) -> Linear:
    return parts[0].map(lambda array: integers(array).reshape(maker.types[0].shape))


def _slice(maker: Operation, parts: Sequence[Linear], rounds: int) -> Linear:
    bounds = (maker.attributes[name] for name in ("start_indices", "limit_indices", "strides"))
    cut = tuple(slice(*each) for each in zip(*bounds, strict=True))
    return parts[0].map(lambda array: integers(array[cut]))


def _broadcast(maker: Operation, parts: Sequence[Linear], rounds: int) -> Linear | None:
    # Only scalars become index vectors of one element.
    shape = maker.types[0].shape
    if parts[0].offset.size != 1 or shape not in ((), (1,)):
        return None
    return parts[0].map(lambda array: integers(array).reshape(shape))


def integers(array: Any) -> "np.ndarray[Any, Any]":
    """Make an array of Python integers: NumPy turns results without axes into the
    integers themselves.
    """
    return np.asarray(array, object)


_LINES: Final[Mapping[str, _Line]] = {
    "add": _sum,
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "compare": _comparison,
    "concatenate": _concatenate,
    "convert": lambda maker, parts, rounds: parts[0],
    "multiply": _product,
    "negate": lambda maker, parts, rounds: parts[0].map(lambda array: integers(-array)),
    "reshape": _reshape,
    "select": _choice,
    "slice": _slice,
    "subtract": _difference,
}
