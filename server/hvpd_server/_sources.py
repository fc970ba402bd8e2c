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

    def call(self, name: str, width: int, *front: Any, seed: int | None = None) -> Any:
        """Runs a program over all rows: its first arguments are `front` and, of programs that draw, the key of `seed`."""


@dataclasses.dataclass(frozen=True)
class Resident:
    """Data that is on the device."""

    kernels: _kernels.Kernels
    args: Sequence[Any]
    """The captured arrays and the data."""

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

    def call(self, name: str, width: int, *front: Any, seed: int | None = None) -> Any:
        """See `Source`."""
        rows = self.spans[-1].stop
        total: Any = None
        for index, (span, args) in enumerate(self._chunks()):
            drawn = [] if seed is None else [random_key(seed, index)]
            size = span.stop - span.start
            part = self.kernels.for_rows(size).call(name, width, *front, *drawn, *args)
            mean, share = size / rows, size / rows if self.reduction == "mean" else 1.0
            # Kronecker factors come in pairs, of which the first is a mean whatever the second is.
            weights = [mean, share] if name.endswith("kfac") else [share]
            total = _kernels.add(total, weights, part)
        return _kernels.rounded(total, part)

    def _chunks(self) -> Iterator[tuple[slice, Sequence[Any]]]:
        following = self.ahead.submit(self.load, self.spans[0])
        for span, next_ in zip(self.spans, [*self.spans[1:], None], strict=True):
            args = following.result()
            if next_ is not None:
                following = self.ahead.submit(self.load, next_)
            yield span, args


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


def spans(rows: int, row_bytes: int, room_bytes: int) -> list[slice]:
    """Cuts rows into as few chunks as fit twice into half of the room, about as long as each other."""
    most = max(min(room_bytes // 4, CHUNK_BYTES) // max(row_bytes, 1), 1)
    size = -(-rows // -(-rows // most))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def random_key(seed: int, chunk: int = 0) -> _codec.Array:
    """The data of jax.random.key(seed), for its default generator; of later chunks another."""
    return np.array([(seed >> 32) ^ chunk, seed & 0xFFFFFFFF], np.uint32)
