"""Loops that count, as scans: which values are carried, which arrays are read in rows,
and which are written in rows.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from hvpd_server.importer.graph import Operation, TensorType
from hvpd_server.importer.indices import Indices, Linear, integers
from hvpd_server.importer.loops import INDEXING, Counter, Loop, needed, used_by
from hvpd_server.importer.table import Value


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that a loop reads or writes: in round t the row first + step * t, where step
    is 1 or -1.
    """

    index: int
    """Position of the array among the values of the loop."""
    least: int
    """Lowest row."""
    step: int
    value: int
    """Read: the value in the body that is the row. Written: the value that becomes the
    row. Both keep the axis of extent 1.
    """
    type: TensorType


class Plan:
    """A loop that counts as a scan: which of its values are carried, read in rows, and
    written in rows.
    """

    def __init__(self, loop: Loop, counter: Counter) -> None:
        self._loop, self._counter = loop, counter
        self._indices = Indices(loop, counter)
        self._uses: collections.Counter[int] = collections.Counter(loop.body.returns)
        self._users: dict[int, list[Operation]] = collections.defaultdict(list)
        for each in loop.body.operations:
            for value in used_by(each):
                self._uses[value] += 1
                self._users[value].append(each)
        self._reads: list[Rows] = []
        self._writes: list[Rows] = []
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
            operations=needed(kept, returns),
            returns=tuple(returns),
            result_types=(),
        )

    def _read(self, index: int, argument: int) -> list[Rows]:
        """Return the rows that are read of an array that does not change; none if the
        array is used in another way.
        """
        array = self._loop.call.operands[index]
        if np.ndim(array) == 0:
            return []
        users = self._users[argument]
        # The array is also returned, unchanged.
        if self._uses[argument] != len(users) + 1:
            return []
        found = [self._slice(index, argument, each) for each in users]
        return [each for each in found if each is not None] if all(found) else []

    def _slice(self, index: int, argument: int, each: Operation) -> Rows | None:
        shape = np.shape(self._loop.call.operands[index])
        if each.operands[0] != argument or argument in each.operands[1:] or each.name not in INDEXING:
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

    def _bounds(self, each: Operation) -> "tuple[list[Linear | None], np.ndarray[Any, Any]] | None":
        """Return the starts and sizes of a slice whose bounds are computed."""
        start, limit, strides = (self._indices(value) for value in each.operands[1:4])
        if start is None or limit is None or strides is None or np.any(limit.scale != start.scale):
            return None
        if np.any(strides.scale != 0) or np.any(strides.offset != 1):
            return None
        starts: list[Linear | None] = [
            Linear(integers(scale), integers(offset)) for scale, offset in zip(start.scale, start.offset, strict=True)
        ]
        return starts, limit.offset - start.offset

    def _write(self, index: int, argument: int) -> Rows | None:
        """Return the rows that are written of an array, or None if the loop uses the
        array in another way.
        """
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
        """Return the shape of a value; None stands for an extent that is not known."""
        stated = maker.types[maker.results.index(value)].shape
        if None not in stated or maker.name not in ("stablehlo.dynamic_broadcast_in_dim", "stablehlo.dynamic_reshape"):
            return stated
        computed = self._indices(maker.operands[1])
        return stated if computed is None or np.any(computed.scale != 0) else tuple(map(int, computed.offset))

    def _rows(
        self, index: int, starts: Sequence[Linear | None], extent: int, value: int, type_: TensorType
    ) -> Rows | None:
        if any(start is None for start in starts):
            return None
        first, *others = (start for start in starts if start is not None)
        if any(np.any(start.scale != 0) or np.any(start.offset != 0) for start in others):
            return None
        step = int(first.scale)
        least, greatest = (int(end) for end in first.ends(self._counter.rounds))
        if abs(step) != 1 or least < 0 or greatest >= extent:
            return None
        return Rows(index, least, step, value, type_)

    def run(self) -> list[Value]:
        """Run the scan, and return the values of the loop after its last round."""
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
        call.check_rounds(counter.rounds, start)
        (*carried, _), written = lax.scan(step, start, xs, length=counter.rounds, reverse=reverse)
        for index, value in zip(self._carried, carried, strict=True):
            results[index] = value
        for each, rows in zip(self._writes, written, strict=True):
            results[each.index] = self._put(each, rows, reverse=reverse)
        return results

    def _taken(self, rows: Rows, *, reverse: bool) -> Value:
        """Return the rows that are read, in the order in which the scan takes them."""
        array = jnp.asarray(self._loop.call.operands[rows.index])
        if (rows.least, self._counter.rounds) != (0, array.shape[0]):
            array = lax.slice_in_dim(array, rows.least, rows.least + self._counter.rounds)
        return array if (rows.step < 0) == reverse else lax.rev(array, (0,))

    def _put(self, rows: Rows, written: Value, *, reverse: bool) -> Value:
        """Return the array with the rows that were written."""
        array = self._loop.call.operands[rows.index]
        written = written if (rows.step < 0) == reverse else lax.rev(written, (0,))
        if written.shape == np.shape(array):
            return written
        return lax.dynamic_update_slice_in_dim(jnp.asarray(array), written, rows.least, 0)
