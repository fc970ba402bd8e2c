"""Vectors and products that arrive in chunks. This module knows the wire's messages,
and no gRPC.
"""

import collections
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hvpd._wire import codec
from hvpd.v1 import curvature_pb2
from hvpd_server.engine.engine import Engine
from hvpd_server.engine.objective import program_of
from hvpd_server.engine.point import Point
from hvpd_server.errors import ServiceError, invalid
from hvpd_server.rpc.call_limits import Arrivals
from hvpd_server.scheduling import blocks

_ARRIVING = 16
"""Most products whose chunks may interleave on one stream."""

_REFUSED = 256
"""Most refused products of a stream whose remaining chunks are dropped."""


class Vectors:
    """A block V[k,n] that arrives in chunks. A block that comes whole is not copied.

    Args:
        k: The number of vectors.
        n: Their length.
        dtype: The type of their elements.
        arrivals: Counts the bytes of the vectors, of their product and of the message,
            from the first byte until `release`.
        tenant: The tenant that the bytes count for.
        beside: Bytes of the message that has the first chunk, beside that chunk.
    """

    def __init__(
        self,
        k: int,
        n: int,
        dtype: "np.dtype[Any]",
        arrivals: Arrivals | None = None,
        tenant: str = "",
        beside: int = 0,
    ) -> None:
        self._arrivals, self._tenant = arrivals, tenant
        self._held = 0
        self._shape, self._dtype = (k, n), dtype
        self.size = k * n * self._dtype.itemsize
        self.transit_bytes = 2 * self.size + beside
        """Bytes of the vectors, of their product, which has as many, and of the
        message.
        """
        self._received = 0
        self._buffer: Any = None
        self.arrived = time.monotonic()
        self.receiving: float | None = None
        """Seconds from the first chunk to the last, if there were several."""

    def append(self, chunk: codec.Buffer) -> bool:
        """Take the next bytes. Return whether all are there."""
        end = self._received + len(chunk)
        if end > self.size:
            self._received = end
            raise invalid("SIZE_MISMATCH", f"the vectors have the wrong size: {self.progress}")
        if end - self._received == self.size:
            self._take()
            self._buffer = chunk
        else:
            if self._buffer is None:
                buffer = blocks.empty((self.size,), np.dtype(np.uint8)).data
                self._take()
                self._buffer = buffer
            self._buffer[self._received : end] = chunk
            if end == self.size:
                self.receiving = time.monotonic() - self.arrived
        self._received = end
        return self.complete

    def room(self, size: int, spare: memoryview | None = None) -> memoryview:
        """Return memory for `size` bytes that come all at once. The caller fills it.

        Args:
            size: The number of bytes.
            spare: Memory to use if it has this size. Nothing else may use it.

        Raises:
            ServiceError: The size is wrong, or there is no room for the bytes.
        """
        self._received = size
        if size != self.size:
            raise invalid("SIZE_MISMATCH", f"the vectors have the wrong size: {self.progress}")
        if spare is None or len(spare) != size:
            spare = blocks.empty((size,), np.dtype(np.uint8)).data
        self._take()
        self._buffer = found = spare
        return found

    def _take(self) -> None:
        """Count the bytes, unless they are counted. Nothing may fail between this and
        the code that ends in `release`.
        """
        if self._arrivals is not None and not self._held:
            self._arrivals.take(self._tenant, self.transit_bytes)
            self._held = self.transit_bytes

    def release(self) -> None:
        """Drop the vectors, and count their bytes no more. Call this where the product
        ends, however it ends.

        The memory is dropped here, because an error's traceback may keep this object
        until the next garbage collection.
        """
        self._buffer = None
        held, self._held = self._held, 0
        if held and self._arrivals is not None:
            self._arrivals.give_back(self._tenant, held)

    @property
    def complete(self) -> bool:
        return self._received == self.size

    @property
    def progress(self) -> str:
        k, n = self._shape
        return f"got {self._received} bytes, {k} x {n} of {self._dtype.name} are {self.size}"

    @property
    def block(self) -> codec.Array:
        return np.ndarray(self._shape, self._dtype, self._buffer)


def whole(vector: Vectors, chunks: Iterable[codec.Buffer]) -> codec.Array:
    """Return one vector from its chunks. Take no more chunks than it needs."""
    for chunk in chunks:
        if vector.append(chunk):
            found: codec.Array = vector.block[0]
            return found
    raise invalid("SIZE_MISMATCH", f"x ended early: {vector.progress}")


class Product(NamedTuple):
    """A product that a client asks for."""

    spec: curvature_pb2.ProductSpec
    point: Point
    program: str
    """The program that multiplies."""
    vectors: Vectors


def product_of(
    spec: curvature_pb2.ProductSpec, point: Point, arrivals: Arrivals, tenant: str, beside: int = 0
) -> Product:
    """Return a product whose vectors are yet to come; see `Vectors`."""
    objective = point.objective
    program = program_of(spec, objective.bundle)
    vectors = Vectors(spec.k, objective.columns(program), objective.dtype, arrivals, tenant, beside)
    return Product(spec, point, program, vectors)


class Arriving:
    """The products of one stream that have not come as a whole.

    Args:
        engine: Knows the points.
        owner: The owner of the points.
        tenant: The tenant that the bytes count for.
        arrivals: Counts the bytes of vectors and products.
    """

    def __init__(self, engine: Engine, owner: str, tenant: str, arrivals: Arrivals) -> None:
        self._engine = engine
        self._owner = owner
        self._tenant = tenant
        self._arrivals = arrivals
        self._products: dict[int, Product] = {}
        self.computing: dict[int, Callable[[], None]] = {}
        """Functions by tag. Each cancels a product that has come and is not
        answered.
        """
        self._refused: collections.OrderedDict[int, None] = collections.OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._products)

    def take(self, message: curvature_pb2.StreamProductsRequest, chunk: codec.Buffer) -> Product | None:
        """Take one message. Return the product that it completes, whose vectors the
        caller must release.

        Raises:
            ServiceError: The product is refused. Its remaining chunks will be dropped.
        """
        tag = message.tag
        try:
            return self._take(message, chunk)
        except Exception:
            refused = self._products.pop(tag, None)
            if refused is not None:
                refused.vectors.release()
            self._refused[tag] = None
            if len(self._refused) > _REFUSED:
                self._refused.popitem(last=False)
            raise

    def _take(self, message: curvature_pb2.StreamProductsRequest, chunk: codec.Buffer) -> Product | None:
        tag = message.tag
        if message.HasField("spec"):
            if tag in self._products or tag in self.computing:
                raise invalid("INVALID_TAG", f"tag {tag} is in use")
            if len(self._products) >= _ARRIVING:
                raise invalid(
                    "INVALID_TAG",
                    f"{_ARRIVING} products of this stream are arriving: send the rest of one before product {tag}",
                )
            point = self._engine.resident(message.spec, self._owner)
            beside = _beside(message, chunk)
            self._products[tag] = product_of(message.spec, point, self._arrivals, self._tenant, beside)
            self._refused.pop(tag, None)
        elif tag not in self._products:
            if tag in self._refused:
                return None
            raise invalid("INVALID_TAG", f"no product of tag {tag} is arriving: the first message has its spec")
        if not self._products[tag].vectors.append(chunk):
            return None
        return self._products.pop(tag)

    def unfinished(self) -> Iterator[tuple[int, ServiceError]]:
        """Yield the tag and the error of each product that ended early, now that
        nothing more comes.
        """
        for tag, product in self._products.items():
            message = f"the vectors ended early: {product.vectors.progress}"
            yield tag, invalid("SIZE_MISMATCH", message)

    def close(self) -> None:
        """Drop the products that have not come as a whole."""
        for product in self._products.values():
            product.vectors.release()
        self._products.clear()


def _beside(message: curvature_pb2.StreamProductsRequest, chunk: codec.Buffer) -> int:
    """Return the bytes that a message takes beside its chunk: as it came, and once more
    as it was read.
    """
    if isinstance(chunk, memoryview) and isinstance(chunk.obj, bytes):
        return 2 * (len(chunk.obj) - len(chunk))
    return 2 * message.ByteSize()
