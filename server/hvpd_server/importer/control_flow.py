"""Calls, branches and loops. A loop that counts becomes a scan, so that it can be differentiated in reverse mode.

A loop is raised in these steps; each keeps the loop as it is when it does not apply:
1. Small functions that only compute indices and slices are put in place of their calls.
2. `_counting` finds the counter, its step and its limit; all are known while the program is read.
3. `_Indices` follows the integers that depend linearly on the counter.
4. `_Plan` finds rows that are read (xs) and rows that are written (ys) at such integers, and takes them out of the body.
Then time and memory are those of `jax.lax.scan`, and not of a loop that carries whole arrays.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd_server.importer.graph import Block, Operation, TensorType
from hvpd_server.importer.table import Call, Value, known, operation

DYNAMIC_LOOP: Final = "a loop whose trip count depends on data: forward mode only"
"""Noted for each loop that stays a while loop."""

RAISED_LOOP: Final = "a loop that counts, as a scan"
"""Noted for each loop that becomes a scan."""


@operation("func.call", attributes=["callee"])
def _call(call: Call) -> Sequence[Value]:
    return call.call(call.attributes["callee"], *call.operands)


@operation("stablehlo.if", regions=2)
def _if(call: Call) -> Sequence[Value]:
    (predicate,) = call.operands
    if known(predicate):
        return call.run(call.regions[0 if predicate else 1])
    return list(lax.cond(jnp.asarray(predicate), _arrays(call.region(0)), _arrays(call.region(1))))


@operation("stablehlo.case", regions=-1)
def _case(call: Call) -> Sequence[Value]:
    (index,) = call.operands
    last = len(call.regions) - 1
    if known(index):
        return call.run(call.regions[int(index) if 0 <= index <= last else last])
    if last == 0:
        return call.run(call.regions[0])
    # An index out of range takes the last branch; lax.switch would take the first for a negative one.
    inside = jnp.where(index < 0, last, index)
    return list(lax.switch(inside, [_arrays(call.region(each)) for each in range(last + 1)]))


def _arrays(function: Callable[..., list[Value]]) -> Callable[..., list[Value]]:
    """Return a function whose results are jax arrays, as branches and loops of jax need them."""
    return lambda *args: [jnp.asarray(each) for each in function(*args)]


@operation("stablehlo.while", regions=2)
def _while(call: Call) -> Sequence[Value]:
    condition, body = call.regions
    if not len(call.operands) == len(body.arguments) == len(body.returns) == len(condition.arguments):
        raise call.refuse("whose regions do not take and return the values of the loop")
    body = _with_small_functions(call, body)
    loop = _Loop(call, condition, body)
    counter = _counting(loop)
    if counter is None:
        return _dynamic(loop)
    call.report.recognised[RAISED_LOOP] += 1
    return _Plan(loop, counter).run()


@dataclasses.dataclass
class _Loop:
    call: Call
    condition: Block
    body: Block

    def __post_init__(self) -> None:
        pairs = zip(self.body.arguments, self.body.returns, strict=True)
        self.invariant = [argument == returned for argument, returned in pairs]
        self.makers = {result: each for each in self.body.operations for result in each.results}

    def constants(self) -> dict[int, Value]:
        """The values in the body that are the same in each round."""
        pairs = zip(self.body.arguments, self.call.operands, self.invariant, strict=True)
        return {argument: value for argument, value, invariant in pairs if invariant}


def _dynamic(loop: _Loop) -> list[Value]:
    """Rebuild a loop as a while loop that carries the values that change."""
    call = loop.call
    call.report.presumed[DYNAMIC_LOOP] += 1
    changing = [index for index, invariant in enumerate(loop.invariant) if not invariant]

    def filled(carried: Sequence[Value]) -> list[Value]:
        values = list(call.operands)
        for index, value in zip(changing, carried, strict=True):
            values[index] = value
        return values

    def holds(carried: Sequence[Value]) -> Value:
        return jnp.asarray(call.run(loop.condition, *filled(carried))[0])

    def step(carried: Sequence[Value]) -> list[Value]:
        results = call.run(loop.body, *filled(carried))
        return [jnp.asarray(results[index]) for index in changing]

    return filled(lax.while_loop(holds, step, [jnp.asarray(call.operands[index]) for index in changing]))


# Small functions.

_SMALL: Final = frozenset(
    f"stablehlo.{name}"
    for name in (
        "add",
        "broadcast_in_dim",
        "clamp",
        "compare",
        "concatenate",
        "constant",
        "convert",
        "dynamic_broadcast_in_dim",
        "dynamic_reshape",
        "dynamic_slice",
        "dynamic_update_slice",
        "get_dimension_size",
        "maximum",
        "minimum",
        "multiply",
        "negate",
        "real_dynamic_slice",
        "reshape",
        "select",
        "slice",
        "subtract",
    )
)
_INDEXING: Final = frozenset(
    ["stablehlo.dynamic_slice", "stablehlo.dynamic_update_slice", "stablehlo.real_dynamic_slice"]
)
_fresh: Final[Iterator[int]] = itertools.count(-1, -1)
"""Numbers of values that no program has."""


def _with_small_functions(call: Call, body: Block) -> Block:
    """Put functions that only compute indices and slices in place of their calls, so that a loop's rows can be seen."""
    operations: list[Operation] = []
    for each in body.operations:
        callee = call.signature(each.attributes["callee"]) if each.name == "func.call" else None
        made = {result for inner in callee.operations for result in inner.results} if callee else set()
        fits = (
            callee is not None
            and {inner.name for inner in callee.operations} <= _SMALL
            and any(inner.name in _INDEXING for inner in callee.operations)
            and set(callee.returns) <= made
            and len(set(callee.returns)) == len(callee.returns) == len(each.results)
            and len(callee.arguments) == len(each.operands)
        )
        if not fits or callee is None:
            operations.append(each)
            continue
        names = dict(zip(callee.arguments, each.operands, strict=True))
        names |= dict(zip(callee.returns, each.results, strict=True))
        names |= {value: next(_fresh) for value in made - set(callee.returns)}
        operations += [
            dataclasses.replace(
                inner,
                operands=tuple(names[value] for value in inner.operands),
                results=tuple(names[value] for value in inner.results),
            )
            for inner in callee.operations
        ]
    return dataclasses.replace(body, operations=operations)


# The counter.


@dataclasses.dataclass(frozen=True)
class _Counter:
    index: int
    """Position among the values of the loop."""
    start: int
    step: int
    rounds: int
    dtype: np.dtype[Any]


MAX_TESTS: Final = 8
"""Most tests that a loop's condition may join for the loop to become a scan."""

_FLIPPED: Final = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


def _counting(loop: _Loop) -> _Counter | None:
    """The counter of a loop, or None: its start, step and limit have to be known."""
    counters = [_counted(loop, test) for test in _tests(loop)]
    found = [each for each in counters if each is not None]
    # A loop with several limits ends at the first that is met.
    return min(found, key=lambda each: each.rounds) if found and len(found) == len(counters) else None


def _tests(loop: _Loop) -> Sequence[Operation | None]:
    """The tests that all have to hold for another round; None stands for one that is not recognised."""
    makers = {result: each for each in loop.condition.operations for result in each.results}
    pending, found = list(loop.condition.returns), []
    while pending:
        maker = makers.get(pending.pop())
        if maker is not None and maker.name == "stablehlo.and" and len(pending) < len(makers):
            pending += maker.operands
        else:
            found.append(maker)
        if len(found) > MAX_TESTS:
            return [None]
    return found


def _counted(loop: _Loop, test: Operation | None) -> _Counter | None:
    """The counter that a test compares with its limit."""
    limited = None if test is None or test.name != "stablehlo.compare" else _limit(loop, test)
    if limited is None:
        return None
    index, direction, limit = limited
    line = _induction(loop, index)
    if line is None:
        return None
    start, step = line
    dtype = loop.call.operands[index].dtype
    rounds = _rounds(start, step, limit, direction, np.iinfo(dtype))
    return None if rounds is None else _Counter(index, start, step, rounds, dtype)


def _induction(loop: _Loop, index: int) -> tuple[int, int] | None:
    """The start and step of a value of the loop to which each round adds the same, if both are known."""
    start, step = loop.call.operands[index], _step(loop, index)
    if step is None or not known(start) or start.ndim or start.dtype.kind not in "iu":
        return None
    return int(start), step


def _limit(loop: _Loop, test: Operation) -> tuple[int, str, int] | None:
    """The counter's position, the direction in which it is compared while the loop goes on, and the limit."""
    block = loop.condition
    direction = test.attributes.get("comparison_direction")
    if direction not in _FLIPPED:
        return None
    changing = {value for value, fixed in zip(block.arguments, loop.invariant, strict=True) if not fixed}
    for argument, limit, sense in (
        (test.operands[0], test.operands[1], direction),
        (test.operands[1], test.operands[0], _FLIPPED[direction]),
    ):
        if argument not in changing:
            continue
        needed = _needed(block.operations, [limit])
        used = {limit, *(value for each in needed for value in _uses(each))}
        if not changing.isdisjoint(used):
            return None
        part = dataclasses.replace(block, operations=needed, returns=(limit,), result_types=())
        (value,) = loop.call.run(part, *loop.call.operands)
        return (block.arguments.index(argument), sense, int(value)) if known(value) and not value.ndim else None
    return None


def _step(loop: _Loop, index: int) -> int | None:
    """What each round adds to a value of the loop, if this is known."""
    argument, returned = loop.body.arguments[index], loop.body.returns[index]
    add = loop.makers.get(returned)
    if add is None or add.name not in ("stablehlo.add", "stablehlo.subtract") or argument not in add.operands:
        return None
    first, second = add.operands
    if add.name == "stablehlo.subtract" and first != argument:
        return None
    value = _constant(loop, second if first == argument else first)
    if value is None or value.ndim:
        return None
    return int(value) if add.name == "stablehlo.add" else -int(value)


def _constant(loop: _Loop, value: int) -> "np.ndarray[Any, Any] | None":
    """A value of the body that is known and the same in each round, without running operations other than constants."""
    if value in loop.makers:
        maker = loop.makers[value]
        if maker.name != "stablehlo.constant":
            return None
        (found,) = loop.call.run(Block((), (), [maker], (value,), maker.types))
    else:
        found = loop.constants().get(value) if value in loop.body.arguments else loop.call.values.get(value)
    return found if isinstance(found, np.ndarray) and known(found) else None


def _rounds(start: int, step: int, limit: int, direction: str, range_: Any) -> int | None:
    """How often a loop runs that counts from start by step, or None if the counter misses its limit or wraps around."""
    distance = limit - start
    if direction in ("LE", "GE"):
        distance += 1 if direction == "LE" else -1
    if direction == "NE":
        if step == 0 or distance % step or distance // step < 0:
            return None
        rounds = distance // step
    elif (direction in ("LT", "LE") and distance <= 0) or (direction in ("GT", "GE") and distance >= 0):
        rounds = 0
    elif (direction in ("LT", "LE")) != (step > 0) or step == 0:
        return None
    else:
        rounds = -(-distance // step)
    return rounds if range_.min <= start + rounds * step <= range_.max else None


def _needed(operations: Sequence[Operation], values: Sequence[int]) -> list[Operation]:
    """The operations of a block on which values depend, in order."""
    wanted, kept = set(values), []
    for each in reversed(operations):
        # An operation without results, such as an assertion, is never dropped.
        if not each.results or wanted.intersection(each.results):
            kept.append(each)
            wanted.update(_uses(each))
    return kept[::-1]


def _uses(each: Operation) -> Iterator[int]:
    """The values that an operation uses, those in its regions included."""
    yield from each.operands
    for region in each.regions:
        yield from region.returns
        for inner in region.operations:
            yield from _uses(inner)


# Integers that depend linearly on the round.


@dataclasses.dataclass(frozen=True)
class _Linear:
    """The array offset + scale * round."""

    scale: "np.ndarray[Any, Any]"
    offset: "np.ndarray[Any, Any]"

    def map(self, function: Callable[..., Any]) -> "_Linear":
        return _Linear(function(self.scale), function(self.offset))

    def ends(self, rounds: int) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
        """The least and the greatest value of each element."""
        last = self.offset + self.scale * (rounds - 1)
        return np.minimum(self.offset, last), np.maximum(self.offset, last)


class _Indices:
    """The integers in the body of a loop that depend linearly on the round."""

    def __init__(self, loop: _Loop, counter: _Counter) -> None:
        self._loop, self._counter = loop, counter
        self._found: dict[int, _Linear | None] = {}
        for index, value in enumerate(loop.body.arguments):
            line = _induction(loop, index)
            if line is None:
                self._found[value] = self._fixed(value)
            elif self._fits(line, loop.call.operands[index].dtype):
                self._found[value] = _Linear(_object(line[1]), _object(line[0]))
            else:
                self._found[value] = None

    def _fits(self, line: tuple[int, int], dtype: Any) -> bool:
        """Whether a counter other than the loop's own stays in the range of its dtype."""
        start, step = line
        range_ = np.iinfo(dtype)
        return bool(range_.min <= start + step * self._counter.rounds <= range_.max)

    def __call__(self, value: int) -> _Linear | None:
        """How a value depends on the round, or None if it does in another way."""
        if value not in self._found:
            maker = self._loop.makers.get(value)
            self._found[value] = self._fixed(value) if maker is None else self._made(maker)
        return self._found[value]

    def _fixed(self, value: int) -> _Linear | None:
        constant = _constant(self._loop, value)
        return None if constant is None else _constant_line(constant)

    def _made(self, maker: Operation) -> _Linear | None:
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


def _constant_line(constant: "np.ndarray[Any, Any]") -> _Linear:
    exact = constant.astype(object)
    return _Linear(_object(exact * 0), exact)


_Line = Callable[[Operation, Sequence[_Linear], int], "_Linear | None"]


def _sum(maker: Operation, parts: Sequence[_Linear], rounds: int) -> _Linear:
    x, y = parts
    return _Linear(_object(x.scale + y.scale), _object(x.offset + y.offset))


def _difference(maker: Operation, parts: Sequence[_Linear], rounds: int) -> _Linear:
    x, y = parts
    return _Linear(_object(x.scale - y.scale), _object(x.offset - y.offset))


def _product(maker: Operation, parts: Sequence[_Linear], rounds: int) -> _Linear | None:
    x, y = parts
    if np.any(x.scale != 0) and np.any(y.scale != 0):
        return None
    return _Linear(_object(x.scale * y.offset + x.offset * y.scale), _object(x.offset * y.offset))


def _comparison(maker: Operation, parts: Sequence[_Linear], rounds: int) -> _Linear | None:
    """A comparison with the same outcome in each round."""
    low, high = _difference(maker, parts, rounds).ends(rounds)
    direction = maker.attributes.get("comparison_direction")
    if direction not in ("LT", "GE") or maker.types[0].shape:
        return None
    if high < 0 or low >= 0:
        return _constant_line(np.array((high < 0) == (direction == "LT")))
    return None


def _choice(maker: Operation, parts: Sequence[_Linear], rounds: int) -> _Linear | None:
    which, on_true, on_false = parts
    if which.offset.shape or np.any(which.scale != 0):
        return None
    return on_true if which.offset else on_false


def _clamp(maker: Operation, parts: Sequence[_Linear], rounds: int) -> _Linear | None:
    """A clamp that never changes its operand."""
    low, x, high = parts
    (least, greatest), (_, floor), (ceiling, _) = (each.ends(rounds) for each in (x, low, high))
    return x if np.all(least >= floor) and np.all(greatest <= ceiling) else None


def _concatenate(maker: Operation, parts: Sequence[_Linear], rounds: int) -> _Linear:
    axis = maker.attributes.get("dimension", 0)
    return _Linear(
        np.concatenate([part.scale for part in parts], axis), np.concatenate([part.offset for part in parts], axis)
    )


def _reshape(maker: Operation, parts: Sequence[_Linear], rounds: int) -> _Linear:
    return parts[0].map(lambda array: _object(array).reshape(maker.types[0].shape))


def _broadcast(maker: Operation, parts: Sequence[_Linear], rounds: int) -> _Linear | None:
    # Only scalars become index vectors of one element.
    shape = maker.types[0].shape
    if parts[0].offset.size != 1 or shape not in ((), (1,)):
        return None
    return parts[0].map(lambda array: _object(array).reshape(shape))


def _object(array: Any) -> "np.ndarray[Any, Any]":
    """Make an array of Python integers: NumPy turns results without axes into the integers themselves."""
    return np.asarray(array, object)


_LINES: Final[Mapping[str, _Line]] = {
    "add": _sum,
    "broadcast_in_dim": _broadcast,
    "clamp": _clamp,
    "compare": _comparison,
    "concatenate": _concatenate,
    "convert": lambda maker, parts, rounds: parts[0],
    "multiply": _product,
    "negate": lambda maker, parts, rounds: parts[0].map(lambda array: _object(-array)),
    "reshape": _reshape,
    "select": _choice,
    "subtract": _difference,
}


# Rows.


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows that a loop reads or writes: in round t the row first + step * t, where step is 1 or -1."""

    index: int
    """Position of the array among the values of the loop."""
    least: int
    """Lowest row."""
    step: int
    value: int
    """Read: the value in the body that is the row. Written: the value that becomes the row. Both keep the axis of extent 1."""
    type: TensorType


class _Plan:
    """A loop that counts as a scan: which of its values are carried, read in rows, and written in rows."""

    def __init__(self, loop: _Loop, counter: _Counter) -> None:
        self._loop, self._counter = loop, counter
        self._indices = _Indices(loop, counter)
        self._uses: collections.Counter[int] = collections.Counter(loop.body.returns)
        self._users: dict[int, list[Operation]] = collections.defaultdict(list)
        for each in loop.body.operations:
            for value in _uses(each):
                self._uses[value] += 1
                self._users[value].append(each)
        self._reads: list[_Rows] = []
        self._writes: list[_Rows] = []
        gone: set[int] = set()
        for index, argument in enumerate(loop.body.arguments):
            if index == counter.index:
                continue
            if loop.invariant[index]:
                rows = self._read(index, argument)
                self._reads += rows
                gone.update(each.value for each in rows)
            elif (written := self._write(index, argument)) is not None:
                self._writes.append(written)
        self._written = {each.index for each in self._writes}
        self._carried = [
            index
            for index, invariant in enumerate(loop.invariant)
            if not invariant and index != counter.index and index not in self._written
        ]
        returns = [loop.body.returns[index] for index in self._carried] + [each.value for each in self._writes]
        kept = [each for each in loop.body.operations if gone.isdisjoint(each.results)]
        self._body = dataclasses.replace(
            loop.body,
            arguments=(*loop.body.arguments, *(each.value for each in self._reads)),
            types=(*loop.body.types, *(each.type for each in self._reads)),
            operations=_needed(kept, returns),
            returns=tuple(returns),
            result_types=(),
        )

    def _read(self, index: int, argument: int) -> list[_Rows]:
        """The rows that are read of an array that does not change, if it is used in no other way."""
        array = self._loop.call.operands[index]
        if np.ndim(array) == 0:
            return []
        users = self._users[argument]
        # The array is also returned, unchanged.
        if self._uses[argument] != len(users) + 1:
            return []
        found = [self._slice(index, argument, each) for each in users]
        return [each for each in found if each is not None] if all(found) else []

    def _slice(self, index: int, argument: int, each: Operation) -> _Rows | None:
        shape = np.shape(self._loop.call.operands[index])
        if each.operands[0] != argument or argument in each.operands[1:] or each.name not in _INDEXING:
            return None
        if each.name == "stablehlo.dynamic_slice":
            starts = [self._indices(value) for value in each.operands[1:]]
            if tuple(each.attributes["slice_sizes"]) != (1, *shape[1:]):
                return None
        elif each.name == "stablehlo.real_dynamic_slice":
            parts = self._bounds(each)
            if parts is None or not np.array_equal(parts[1], (1, *shape[1:])):
                return None
            starts = parts[0]
        else:
            return None
        return self._rows(index, starts, shape[0], each.results[0], each.types[0])

    def _bounds(self, each: Operation) -> "tuple[list[_Linear | None], np.ndarray[Any, Any]] | None":
        """The starts and sizes of a slice whose bounds are computed."""
        start, limit, strides = (self._indices(value) for value in each.operands[1:4])
        if start is None or limit is None or strides is None or np.any(limit.scale != start.scale):
            return None
        if np.any(strides.scale != 0) or np.any(strides.offset != 1):
            return None
        starts: list[_Linear | None] = [
            _Linear(_object(scale), _object(offset)) for scale, offset in zip(start.scale, start.offset, strict=True)
        ]
        return starts, limit.offset - start.offset

    def _write(self, index: int, argument: int) -> _Rows | None:
        """The rows that are written of an array, if the loop uses it in no other way."""
        returned = self._loop.body.returns[index]
        update = self._loop.makers.get(returned)
        if update is None or update.name != "stablehlo.dynamic_update_slice" or update.operands[0] != argument:
            return None
        if self._uses[argument] != 1 or self._uses[returned] != 1:
            return None
        value = update.operands[1]
        maker = self._loop.makers.get(value)
        shape = np.shape(self._loop.call.operands[index])
        if maker is None or not shape or self._shape(maker, value) != (1, *shape[1:]):
            return None
        type_ = maker.types[maker.results.index(value)]
        return self._rows(index, [self._indices(each) for each in update.operands[2:]], shape[0], value, type_)

    def _shape(self, maker: Operation, value: int) -> tuple[int | None, ...]:
        """The shape of a value, where it is stated or known."""
        stated = maker.types[maker.results.index(value)].shape
        if None not in stated or maker.name not in ("stablehlo.dynamic_broadcast_in_dim", "stablehlo.dynamic_reshape"):
            return stated
        computed = self._indices(maker.operands[1])
        return stated if computed is None or np.any(computed.scale != 0) else tuple(map(int, computed.offset))

    def _rows(
        self, index: int, starts: Sequence[_Linear | None], extent: int, value: int, type_: TensorType
    ) -> _Rows | None:
        if any(start is None for start in starts):
            return None
        first, *others = (start for start in starts if start is not None)
        if any(np.any(start.scale != 0) or np.any(start.offset != 0) for start in others):
            return None
        step = int(first.scale)
        least, greatest = (int(end) for end in first.ends(self._counter.rounds))
        if abs(step) != 1 or least < 0 or greatest >= extent:
            return None
        return _Rows(index, least, step, value, type_)

    def run(self) -> list[Value]:
        """Run the scan."""
        call, counter = self._loop.call, self._counter
        results = list(call.operands)
        results[counter.index] = np.asarray(counter.start + counter.rounds * counter.step, counter.dtype)
        if counter.rounds == 0:
            return results
        steps = [each.step for each in (*self._reads, *self._writes)]
        reverse = bool(steps) and steps.count(-1) > steps.count(1)
        xs = [self._taken(each, reverse=reverse) for each in self._reads]
        stride = np.asarray(counter.step, counter.dtype)

        def step(carried: Sequence[Value], read: Sequence[Value]) -> tuple[list[Value], list[Value]]:
            values = list(call.operands)
            for index, value in zip((*self._carried, counter.index), carried, strict=True):
                values[index] = value
            returned = [jnp.asarray(each) for each in call.run(self._body, *values, *(each[None] for each in read))]
            count = len(self._carried)
            following = [*returned[:count], lax.add(carried[-1], stride)]
            return following, [jnp.squeeze(each, 0) for each in returned[count:]]

        start = [jnp.asarray(call.operands[index]) for index in (*self._carried, counter.index)]
        (*carried, _), written = lax.scan(step, start, xs, length=counter.rounds, reverse=reverse)
        for index, value in zip(self._carried, carried, strict=True):
            results[index] = value
        for each, rows in zip(self._writes, written, strict=True):
            results[each.index] = self._put(each, rows, reverse=reverse)
        return results

    def _taken(self, rows: _Rows, *, reverse: bool) -> Value:
        """The rows that are read, in the order in which the scan takes them."""
        array = jnp.asarray(self._loop.call.operands[rows.index])
        if (rows.least, self._counter.rounds) != (0, array.shape[0]):
            array = lax.slice_in_dim(array, rows.least, rows.least + self._counter.rounds)
        return array if (rows.step < 0) == reverse else lax.rev(array, (0,))

    def _put(self, rows: _Rows, written: Value, *, reverse: bool) -> Value:
        """The array with the rows that were written."""
        array = self._loop.call.operands[rows.index]
        written = written if (rows.step < 0) == reverse else lax.rev(written, (0,))
        if written.shape == np.shape(array):
            return written
        return lax.dynamic_update_slice_in_dim(jnp.asarray(array), written, rows.least, 0)
