"""Vectors and products that arrive, of which some chunks have come and others have not. Knows the wire's messages, and no gRPC."""

import collections
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hvpd import _codec
from hvpd.v1 import curvature_pb2
from hvpd_server import _buffers
from hvpd_server._calls import Arrivals
from hvpd_server._engine import Engine
from hvpd_server._errors import Code, ServiceError
from hvpd_server._objective import program_of
from hvpd_server._point import Point

_ARRIVING = 16
"""Most products whose chunks may interleave on one stream."""

_REFUSED = 256
"""Most products of a stream whose remaining chunks are known to be of no use."""


class Vectors:
    """A block V[k,n] that arrives in chunks. One that comes whole is used where it lies.

    Args:
        k: Its vectors.
        n: Their length.
        dtype: Of their elements.
        arrivals: Counts the bytes of what comes in pieces, for as long as this is there.
        tenant: For whom.
    """

    def __init__(
        self, k: int, n: int, dtype: "np.dtype[Any]", arrivals: Arrivals | None = None, tenant: str = ""
    ) -> None:
        self._arrivals, self._tenant = arrivals, tenant
        self._counted = False
        self._shape, self._dtype = (k, n), dtype
        self.size = k * n * self._dtype.itemsize
        self._received = 0
        self._buffer: Any = None
        self.arrived = time.monotonic()
        self.receiving: float | None = None
        """Seconds from the first chunk to the last, where there were several."""

    def append(self, chunk: _codec.Buffer) -> bool:
        """Takes the next bytes; returns whether all are there."""
        end = self._received + len(chunk)
        if end > self.size:
            self._received = end
            raise ServiceError(
                Code.INVALID_ARGUMENT, "SIZE_MISMATCH", f"the vectors have the wrong size: {self.progress}"
            )
        if end - self._received == self.size:
            self._buffer = chunk
        else:
            if self._buffer is None:
                if self._arrivals is not None:
                    self._arrivals.take(self._tenant, self.size)
                    self._counted = True
                self._buffer = _buffers.empty((self.size,), np.dtype(np.uint8)).data
            self._buffer[self._received : end] = chunk
            if end == self.size:
                self.receiving = time.monotonic() - self.arrived
        self._received = end
        return self.complete

    def room(self, size: int, spare: memoryview | None = None) -> memoryview:
        """Memory for `size` bytes that come all at once, to be filled by whoever receives them.

        Args:
            size: How many.
            spare: Memory to be used, where it is as much; nobody else uses it, or will.

        Raises:
            ServiceError: It is not as many as there must be, or there is no room for them.
        """
        self._received = size
        if size != self.size:
            raise ServiceError(
                Code.INVALID_ARGUMENT, "SIZE_MISMATCH", f"the vectors have the wrong size: {self.progress}"
            )
        if self._arrivals is not None and size > _codec.CHUNK_BYTES:
            self._arrivals.take(self._tenant, size)
            self._counted = True
        if spare is None or len(spare) != size:
            spare = _buffers.empty((size,), np.dtype(np.uint8)).data
        self._buffer = found = spare
        return found

    def __del__(self) -> None:
        if self._counted and self._arrivals is not None:
            self._arrivals.give_back(self._tenant, self.size)

    @property
    def complete(self) -> bool:
        return self._received == self.size

    @property
    def progress(self) -> str:
        k, n = self._shape
        return f"got {self._received} bytes, {k} x {n} of {self._dtype.name} are {self.size}"

    @property
    def block(self) -> _codec.Array:
        return np.ndarray(self._shape, self._dtype, self._buffer)


def whole(vector: Vectors, chunks: Iterable[_codec.Buffer]) -> _codec.Array:
    """One vector from its chunks; takes no more of them than it needs."""
    for chunk in chunks:
        if vector.append(chunk):
            found: _codec.Array = vector.block[0]
            return found
    raise ServiceError(Code.INVALID_ARGUMENT, "SIZE_MISMATCH", f"x ended early: {vector.progress}")


def vectors_of(
    spec: curvature_pb2.ProductSpec, point: Point, arrivals: Arrivals | None = None, tenant: str = ""
) -> Vectors:
    """For the vectors of a product."""
    objective = point.objective
    columns = objective.columns(program_of(spec, objective.bundle))
    return Vectors(spec.k, columns, objective.dtype, arrivals, tenant)


class Product(NamedTuple):
    """A product that is asked for."""

    spec: curvature_pb2.ProductSpec
    point: Point
    vectors: Vectors


class Arriving:
    """The products of one stream of which some chunks have come, and others have not.

    Args:
        engine: Knows the points.
        owner: Whose points.
        tenant: Who asks.
        arrivals: Counts the bytes of what comes in pieces.
    """

    def __init__(self, engine: Engine, owner: str, tenant: str, arrivals: Arrivals) -> None:
        self._engine = engine
        self._owner = owner
        self._tenant = tenant
        self._arrivals = arrivals
        self._products: dict[int, Product] = {}
        self.computing: dict[int, Callable[[], None]] = {}
        """By tag, what cancels a product that has come and is not answered yet."""
        self._refused: collections.OrderedDict[int, None] = collections.OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._products)

    def take(self, message: curvature_pb2.StreamProductsRequest, chunk: _codec.Buffer) -> Product | None:
        """Takes one message; returns the product that it completes.

        Raises:
            ServiceError: The product is refused. Those of its chunks that are on their way are of no use to anybody.
        """
        tag = message.tag
        try:
            return self._take(message, chunk)
        except Exception:
            self._products.pop(tag, None)
            self._refused[tag] = None
            if len(self._refused) > _REFUSED:
                self._refused.popitem(last=False)
            raise

    def _take(self, message: curvature_pb2.StreamProductsRequest, chunk: _codec.Buffer) -> Product | None:
        tag = message.tag
        if message.HasField("spec"):
            if tag in self._products or tag in self.computing:
                raise ServiceError(Code.INVALID_ARGUMENT, "INVALID_TAG", f"tag {tag} is in use")
            if len(self._products) >= _ARRIVING:
                raise ServiceError(
                    Code.INVALID_ARGUMENT,
                    "INVALID_TAG",
                    f"{_ARRIVING} products of this stream are arriving: send the rest of one before product {tag}",
                )
            point = self._engine.resident(message.spec, self._owner)
            vectors = vectors_of(message.spec, point, self._arrivals, self._tenant)
            self._products[tag] = Product(message.spec, point, vectors)
            self._refused.pop(tag, None)
        elif tag not in self._products:
            if tag in self._refused:
                return None
            raise ServiceError(
                Code.INVALID_ARGUMENT,
                "INVALID_TAG",
                f"no product of tag {tag} is arriving: the first message has its spec",
            )
        if not self._products[tag].vectors.append(chunk):
            return None
        return self._products.pop(tag)

    def unfinished(self) -> Iterator[tuple[int, ServiceError]]:
        """What ended in the middle, now that nothing more comes, and the error that answers it."""
        for tag, product in self._products.items():
            message = f"the vectors ended early: {product.vectors.progress}"
            yield tag, ServiceError(Code.INVALID_ARGUMENT, "SIZE_MISMATCH", message)
