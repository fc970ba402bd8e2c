"""Loops of StableHLO: which of their values stay the same, and whether the loop counts
to a known limit.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from hvpd_server.importer import recognise
from hvpd_server.importer.graph import Block, Operation, TensorType
from hvpd_server.importer.table import TABLE, Call, Value, known


@dataclasses.dataclass
class Loop:
    """A loop, with the known facts about its values.

    `invariant` says for each value whether it stays the same.
    """

    call: Call
    condition: Block
    body: Block

    def __post_init__(self) -> None:
        pairs = zip(self.body.arguments, self.body.returns, strict=True)
        self.invariant = [argument == returned for argument, returned in pairs]
        self.makers = {result: each for each in self.body.operations for result in each.results}

    def constants(self) -> dict[int, Value]:
        """Return the values in the body that are the same in each round."""
        pairs = zip(self.body.arguments, self.call.operands, self.invariant, strict=True)
        return {argument: value for argument, value, invariant in pairs if invariant}


INDEXING: Final = frozenset(
    ["stablehlo.dynamic_slice", "stablehlo.dynamic_update_slice", "stablehlo.real_dynamic_slice"]
)
"""Operations that read or write a part of an array."""

_MAX_CALLS: Final = 64
"""Most functions inside each other that are put in place of their calls."""

_KEEPING: Final = frozenset(f"stablehlo.{name}" for name in ("concatenate", "convert", "reshape", "slice"))
"""Operations that return their only operand if the types of operand and result are the
same.
"""

_fresh: Final[Iterator[int]] = itertools.count(-1, -1)
"""Numbers of values that no program has: a program's numbers are not negative."""


def flat(call: Call, block: Block) -> Block:
    """Put functions in place of their calls; leave out operations that change nothing.

    A function that has a derivative rule by its name stays a call.
    """
    types = dict(zip(block.arguments, block.types, strict=True))
    operations: list[Operation] = []

    def add(part: Block, names: dict[int, int], calls: int) -> None:
        """Add the operations of a block; `names` says which value each value of the
        block becomes.
        """
        for each in part.operations:
            operands = [names.get(value, value) for value in each.operands]
            callee = _callee(call, each) if calls else None
            if callee is not None:
                inner = dict(zip(callee.arguments, operands, strict=True))
                add(callee, inner, calls - 1)
                names.update(zip(each.results, [inner[value] for value in callee.returns], strict=True))
            elif _keeps(each, [types.get(value) for value in operands]):
                names[each.results[0]] = operands[0]
            else:
                operations.append(_renamed(each, names))
                types.update(zip(operations[-1].results, each.types, strict=True))

    names: dict[int, int] = {}
    add(block, names, _MAX_CALLS)
    returns = tuple(names.get(value, value) for value in block.returns)
    return dataclasses.replace(block, operations=operations, returns=returns)


def _callee(call: Call, each: Operation) -> Block | None:
    """Return the body that can take the place of an operation, or None if the operation
    is no such call.
    """
    if each.name != "func.call" or each.attributes.keys() != {"callee"}:
        return None
    symbol = each.attributes["callee"]
    callee = call.signature(symbol)
    fits = len(callee.arguments) == len(each.operands) and len(callee.returns) == len(each.results)
    return callee if fits and not recognise.has_rule(call, symbol) else None


def _keeps(each: Operation, operands: Sequence[TensorType | None]) -> bool:
    """Return whether the result of an operation is its operand."""
    return (
        each.name in _KEEPING
        and [*operands] == [*each.types]
        and None not in each.types[0].shape
        and each.attributes.keys() <= TABLE[each.name].attributes
    )


def _renamed(each: Operation, names: dict[int, int]) -> Operation:
    """Return an operation with fresh numbers for the values that the operation and its
    regions make.
    """
    regions = []
    for region in each.regions:
        names.update((value, next(_fresh)) for value in region.arguments)
        regions.append(
            dataclasses.replace(
                region,
                arguments=tuple(names[value] for value in region.arguments),
                operations=[_renamed(inner, names) for inner in region.operations],
                returns=tuple(names.get(value, value) for value in region.returns),
            )
        )
    operands = tuple(names.get(value, value) for value in each.operands)
    names.update((value, next(_fresh)) for value in each.results)
    results = tuple(names[value] for value in each.results)
    return dataclasses.replace(each, operands=operands, results=results, regions=tuple(regions))


@dataclasses.dataclass(frozen=True)
class Counter:
    """The value of a loop that is start + step * t in round t, and so the number of
    rounds.
    """

    index: int
    """Position among the values of the loop."""
    start: int
    step: int
    rounds: int
    dtype: np.dtype[Any]


MAX_TESTS: Final = 8
"""Most tests that a loop's condition may join for the loop to become a scan."""

_FLIPPED: Final = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE"}


def counting(loop: Loop) -> Counter | None:
    """Return a loop's counter, or None if its start, step or limit is not known."""
    counters = [_counted(loop, test) for test in _tests(loop)]
    found = [each for each in counters if each is not None]
    # A loop with several limits ends at the first that is met.
    return min(found, key=lambda each: each.rounds) if found and len(found) == len(counters) else None


def _tests(loop: Loop) -> Sequence[Operation | None]:
    """Return the tests that all have to hold for another round; None stands for a test
    that is not recognised.
    """
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


def _counted(loop: Loop, test: Operation | None) -> Counter | None:
    """Return the counter that a test compares with its limit."""
    limited = None if test is None or test.name != "stablehlo.compare" else _limit(loop, test)
    if limited is None:
        return None
    index, direction, limit = limited
    line = induction(loop, index)
    if line is None:
        return None
    start, step = line
    dtype = loop.call.operands[index].dtype
    rounds = _rounds(start, step, limit, direction, np.iinfo(dtype))
    return None if rounds is None else Counter(index, start, step, rounds, dtype)


def induction(loop: Loop, index: int) -> tuple[int, int] | None:
    """Return the start and step of a value to which each round adds the same, or None
    if either is not known.
    """
    start, step = loop.call.operands[index], _step(loop, index)
    if step is None or not known(start) or start.ndim or start.dtype.kind not in "iu":
        return None
    return int(start), step


def _limit(loop: Loop, test: Operation) -> tuple[int, str, int] | None:
    """Return the counter's position, the direction of its comparison, and the limit;
    None if the limit is not known.
    """
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
        before = needed(block.operations, [limit])
        used = {limit, *(value for each in before for value in used_by(each))}
        if not changing.isdisjoint(used):
            return None
        part = dataclasses.replace(block, operations=before, returns=(limit,), result_types=())
        (value,) = loop.call.run(part, *loop.call.operands)
        return (block.arguments.index(argument), sense, int(value)) if known(value) and not value.ndim else None
    return None


def _step(loop: Loop, index: int) -> int | None:
    """Return the number that each round adds to a value of the loop, or None if this is
    not known.
    """
    argument, returned = loop.body.arguments[index], loop.body.returns[index]
    add = loop.makers.get(returned)
    if add is None or add.name not in ("stablehlo.add", "stablehlo.subtract") or argument not in add.operands:
        return None
    first, second = add.operands
    if add.name == "stablehlo.subtract" and first != argument:
        return None
    value = constant(loop, second if first == argument else first)
    if value is None or value.ndim:
        return None
    return int(value) if add.name == "stablehlo.add" else -int(value)


def constant(loop: Loop, value: int) -> "np.ndarray[Any, Any] | None":
    """Return a value of the body that is known and the same in each round.

    Runs no operation other than constants.
    """
    if value in loop.makers:
        maker = loop.makers[value]
        if maker.name != "stablehlo.constant":
            return None
        (found,) = loop.call.run(Block((), (), [maker], (value,), maker.types))
    else:
        found = loop.constants().get(value) if value in loop.body.arguments else loop.call.values.get(value)
    return found if isinstance(found, np.ndarray) and known(found) else None


def _rounds(start: int, step: int, limit: int, direction: str, range_: Any) -> int | None:
    """Return the rounds of a loop that counts, or None if the counter misses its limit
    or wraps around.
    """
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


def needed(operations: Sequence[Operation], values: Sequence[int]) -> list[Operation]:
    """Return the operations of a block on which values depend, in order."""
    wanted, kept = set(values), []
    for each in reversed(operations):
        # An operation without results, such as an assertion, is never dropped.
        if not each.results or wanted.intersection(each.results):
            kept.append(each)
            wanted.update(used_by(each))
    return kept[::-1]


def used_by(each: Operation) -> Iterator[int]:
    """Return the values that an operation uses, those in its regions included."""
    yield from each.operands
    for region in each.regions:
        yield from region.returns
        for inner in region.operations:
            yield from used_by(inner)
