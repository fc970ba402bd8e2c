"""Where the data of a point is while its programs run: on the device as a whole, or in the store, gone through in chunks of rows.

A source is asked for a program and gives the result over all rows. Knows neither jax nor gRPC.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from hvpd import _codec
from hvpd.v1 import objective_pb2
from hvpd_server import _kernels

CHUNK_BYTES = 256 << 20
"""Most bytes of a chunk of rows: large enough that reading it, not starting it, takes the time."""


MAX_CHUNKS = 1 << 16
"""Most chunks; where that makes them larger than there is room for, there is too little."""


class Compiles(Protocol):
    """Programs that are compiled, or can be: `_kernels.Kernels`, or several of them."""

    @property
    def rows(self) -> Hashable: ...
    def request(self, name: str, width: int = 0) -> "Pending": ...
    def ready(self, name: str, width: int = 0) -> bool: ...
    def widths(self, name: str) -> list[int]: ...
    def compiles(self) -> list[objective_pb2.Compile]: ...


class Pending(Protocol):
    """What has been asked for."""

    def result(self) -> Any:
        """Waits, and raises what went wrong."""


class Source(Protocol):
    """The data of a point, with the programs for its size."""

    @property
    def kernels(self) -> Compiles:
        """What must be compiled before it can be called without waiting."""

    @property
    def sample(self) -> "Source":
        """What runs the same compiled programs on the same data, or on less of it."""

    def call(self, name: str, width: int, *front: Any, seed: int | None = None) -> Any:
        """Runs a program over all rows: its first arguments are `front` and, of programs that draw, the key of `seed`."""


@dataclasses.dataclass(frozen=True)
class Resident:
    """Data that is on the device."""

    kernels: _kernels.Kernels
    args: Sequence[Any]
    """The captured arrays and the data."""

    @property
    def sample(self) -> "Resident":
        """See `Source`."""
        return self

    def call(self, name: str, width: int, *front: Any, seed: int | None = None) -> Any:
        """See `Source`."""
        drawn = [] if seed is None else [random_key(seed)]
        return self.kernels.call(name, width, *front, *drawn, *self.args)

    def residuals(self, of: Sequence[objective_pb2.Residual], x: Any) -> list[Any]:
        """What `apply` takes after its vectors, at x."""
        results, arguments = self.kernels.call("prepare", 0, x, *self.args)[2:], [x, *self.args]
        return [
            results[residual.result] if residual.WhichOneof("source") == "result" else arguments[residual.argument]
            for residual in of
        ]


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Data that stays in the store: what goes over its rows is computed chunk by chunk, the next one being read meanwhile.

    A mean over all rows is the mean of the chunks' means, each weighted by its rows: the last chunk may be shorter, and no row is
    padded or dropped. Sums are taken in float64.
    """

    kernels: "Several"
    """For a whole chunk, and for the last one."""
    spans: Sequence[slice]
    """The rows of each chunk."""
    reduction: str
    """How programs go over rows: "mean" or "sum"."""
    load: Callable[[slice], Sequence[Any]]
    """Puts a chunk on the device: the captured arrays and the data, of these rows."""
    ahead: concurrent.futures.Executor
    """Where the next chunk is read."""
    on_chunk: Callable[[], object] = lambda: None
    """Told, in the thread that calls, whenever a chunk is there."""

    @property
    def sample(self) -> "Streamed":
        """The first and the last chunk."""
        return dataclasses.replace(self, spans=[self.spans[0], *self.spans[1:][-1:]])

    def call(self, name: str, width: int, *front: Any, seed: int | None = None) -> Any:
        """See `Source`."""
        rows = sum(map(_size, self.spans))
        total: Any = None
        part: Any = None
        for index, span, args in self._chunks():
            drawn = [] if seed is None else [random_key(seed, index)]
            # Computed before the chunk after the next is read: else there would be three on the device.
            part = _kernels.computed(self.kernels.for_rows(_size(span)).call(name, width, *front, *drawn, *args))
            mean = _size(span) / rows
            share = mean if self.reduction == "mean" else 1.0
            # Kronecker factors come in pairs, of which the first is a mean whatever the second is.
            weights = [mean, share] if name.endswith("kfac") else [share]
            total = _kernels.add(total, weights, part)
            del args
        return _kernels.rounded(total, part)

    def _chunks(self) -> Iterator[tuple[int, slice, Sequence[Any]]]:
        following = self.ahead.submit(self.load, self.spans[0])
        for index, span in enumerate(self.spans):
            args = following.result()
            self.on_chunk()
            if index + 1 < len(self.spans):
                following = self.ahead.submit(self.load, self.spans[index + 1])
            yield index, span, args
            del args


@dataclasses.dataclass(frozen=True)
class Several:
    """The same programs for data of several sizes."""

    of: Sequence[_kernels.Kernels]

    @property
    def rows(self) -> tuple[int, ...]:
        """Of each."""
        return tuple(kernels.rows for kernels in self.of)

    def for_rows(self, rows: int) -> _kernels.Kernels:
        """Those for one size."""
        return next(kernels for kernels in self.of if kernels.rows == rows)

    def request(self, name: str, width: int = 0) -> Pending:
        """Has a program compiled for all sizes."""
        return _All([kernels.request(name, width) for kernels in self.of])

    def ready(self, name: str, width: int = 0) -> bool:
        """Whether it is, for all."""
        return all(kernels.ready(name, width) for kernels in self.of)

    def widths(self, name: str) -> list[int]:
        """The block widths for which it is, for all."""
        return sorted(set.intersection(*(set(kernels.widths(name)) for kernels in self.of)))

    def compiles(self) -> list[objective_pb2.Compile]:
        """Of all sizes, one after the other."""
        return [compile_ for kernels in self.of for compile_ in kernels.compiles()]


@dataclasses.dataclass(frozen=True)
class _All:
    pending: Sequence[Pending]

    def result(self) -> Any:
        for each in self.pending:
            each.result()


def spans(rows: int, row_bytes: int, room_bytes: int, multiple: int = 1) -> list[slice]:
    """Cuts rows into as few chunks as fit twice into a quarter of the room, about as long as each other, each of a row at least.

    Args:
        rows: How many there are.
        row_bytes: Size of each.
        room_bytes: What there is for chunks, and for the points that go through them.
        multiple: Of which chunks have whole numbers of rows, where so many fit; what is left over is the last chunk.
    """
    most = min(room_bytes // 8, CHUNK_BYTES) // max(row_bytes, 1)
    multiple = multiple if multiple <= min(most, rows) else 1
    least = -(-rows // (MAX_CHUNKS * multiple)) * multiple
    most = max(most - most % multiple, least)
    whole = rows - rows % multiple
    size = -(-whole // -(-whole // most))
    size += -size % multiple
    starts = [*range(0, whole, size), *([whole] if whole < rows else [])]
    return list(map(slice, starts, [*starts[1:], rows]))


def _size(span: slice) -> int:
    size: int = span.stop - span.start
    return size


def random_key(seed: int, chunk: int = 0) -> _codec.Array:
    """The data of jax.random.key(seed), for its default generator; of later chunks another."""
    return np.array([(seed >> 32) ^ chunk, seed & 0xFFFFFFFF], np.uint32)
