"""Data sources: run a program over all rows of a point's data.

The data is on the device as a whole, or it stays in the store and goes through the
device in chunks of rows. Knows neither jax nor gRPC.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from hvpd._wire import codec
from hvpd.v1 import objective_pb2
from hvpd_server.device.device import add, computed, rounded
from hvpd_server.device.programs import Kernels

CHUNK_BYTES = 256 << 20
"""Most bytes of a chunk. It is large enough that reading takes longer than the overhead
of a launch.
"""

MAX_CHUNKS = 1 << 16
"""Most chunks. If so many chunks are too large for the room, the data cannot be
used.
"""


class Compiles(Protocol):
    """Programs that are compiled on request: `Kernels`, or several of them."""

    @property
    def rows(self) -> Hashable: ...
    def request(self, name: str, width: int = 0) -> "Pending": ...
    def ready(self, name: str, width: int = 0) -> bool: ...
    def widths(self, name: str) -> list[int]: ...
    def compiles(self) -> list[objective_pb2.Compile]: ...


class Pending(Protocol):
    """A compile that was requested."""

    def result(self) -> Any:
        """Wait for the compile, and raise its error."""

    def cancel(self) -> bool:
        """Drop the compile, unless it has begun."""


class Source(Protocol):
    """The data of a point, with the programs for its size."""

    @property
    def kernels(self) -> Compiles:
        """The programs; one that is compiled can be called without waiting."""

    @property
    def sample(self) -> "Source":
        """A source that runs the same executables on the same data or a part of it."""

    def call(self, name: str, width: int, *front: Any, seed: int | None = None) -> Any:
        """Run a program over all rows. Its first arguments are `front` and, if it draws
        random numbers, the key of `seed`.
        """


@dataclasses.dataclass(frozen=True)
class Resident:
    """Data that is on the device as a whole."""

    kernels: Kernels
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
        """Return the arguments that `apply` takes after its vectors, at x."""
        results, arguments = self.kernels.call("prepare", 0, x, *self.args)[2:], [x, *self.args]
        return [
            results[residual.result] if residual.WhichOneof("source") == "result" else arguments[residual.argument]
            for residual in of
        ]


@dataclasses.dataclass(frozen=True)
class Streamed:
    """Data that stays in the store. Programs run chunk by chunk, while the next chunk
    is read.

    A mean over all rows is the mean of the chunks' means, weighted by their rows. The
    last chunk may be shorter; no row is padded or dropped. Sums are taken in float64.
    """

    kernels: "Several"
    """The programs for a whole chunk, and for the last one."""
    spans: Sequence[slice]
    """The rows of each chunk."""
    reduction: str
    """A program's reduction over rows: "mean" or "sum"."""
    load: Callable[[slice], Sequence[Any]]
    """Puts a chunk on the device, and returns the captured arrays and the data of these
    rows.
    """
    ahead: concurrent.futures.Executor
    """The thread that reads the next chunk."""
    on_chunk: Callable[[], object] = lambda: None
    """Called in the caller's thread when a chunk is on the device."""

    @property
    def sample(self) -> "Streamed":
        """The first and the last chunk: one of each size."""
        return dataclasses.replace(self, spans=[self.spans[0], *self.spans[1:][-1:]])

    def call(self, name: str, width: int, *front: Any, seed: int | None = None) -> Any:
        """See `Source`."""
        rows = sum(map(_size, self.spans))
        total: Any = None
        part: Any = None
        for index, span, args in self._chunks():
            drawn = [] if seed is None else [random_key(seed, index)]
            # Computed before the chunk after the next is read: otherwise three chunks
            # would be on the device.
            part = computed(self.kernels.for_rows(_size(span)).call(name, width, *front, *drawn, *args))
            mean = _size(span) / rows
            share = mean if self.reduction == "mean" else 1.0
            # Kronecker factors come in pairs. The first is always a mean.
            weights = [mean, share] if name.endswith("kfac") else [share]
            total = add(total, weights, part)
            del args
        return rounded(total, part)

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
    """The programs of one objective, for data of several sizes."""

    of: Sequence[Kernels]

    @property
    def rows(self) -> tuple[int, ...]:
        """The numbers of rows."""
        return tuple(kernels.rows for kernels in self.of)

    def for_rows(self, rows: int) -> Kernels:
        """Return the programs for one size."""
        return next(kernels for kernels in self.of if kernels.rows == rows)

    def request(self, name: str, width: int = 0) -> Pending:
        """Start the compile of a program for all sizes."""
        return _All([kernels.request(name, width) for kernels in self.of])

    def ready(self, name: str, width: int = 0) -> bool:
        """Return whether a program is compiled for all sizes."""
        return all(kernels.ready(name, width) for kernels in self.of)

    def widths(self, name: str) -> list[int]:
        """Return the block widths that a program is compiled for, for all sizes."""
        return sorted(set.intersection(*(set(kernels.widths(name)) for kernels in self.of)))

    def compiles(self) -> list[objective_pb2.Compile]:
        """Return the state of every compile, size by size."""
        return [compile_ for kernels in self.of for compile_ in kernels.compiles()]


@dataclasses.dataclass(frozen=True)
class _All:
    pending: Sequence[Pending]

    def result(self) -> Any:
        for each in self.pending:
            each.result()

    def cancel(self) -> bool:
        cancelled = [each.cancel() for each in self.pending]
        return all(cancelled)


def spans(rows: int, row_bytes: int, room_bytes: int, multiple: int = 1) -> list[slice]:
    """Cut rows into as few chunks of equal length as possible, so that two chunks fit
    into a quarter of the room.

    Args:
        rows: Number of rows.
        row_bytes: Bytes of a row.
        room_bytes: Bytes for chunks, and for the points that use them.
        multiple: Every chunk but the last has a multiple of so many rows, if so many
            fit.
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


def random_key(seed: int, chunk: int = 0) -> codec.Array:
    """Return the data of jax.random.key(seed), for its default generator; a different
    key for each chunk.
    """
    return np.array([(seed >> 32) ^ chunk, seed & 0xFFFFFFFF], np.uint32)
