"""A block on its way to the server and back: the products that it is made of, which of them are answered, and which are not yet.

Knows the messages, and the stream that takes them; what is repeated, and when, is up to `Transport.call`.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import grpc
import numpy as np

from hvpd import _codec, _tracing
from hvpd._errors import Failure, failure_of_status
from hvpd._frames import Frame
from hvpd._stream import Filling, RpcFailure, Stream
from hvpd._vector_pool import VectorStream
from hvpd.v1 import curvature_pb2

ProductStream: TypeAlias = (
    "Stream[Frame[curvature_pb2.StreamProductsRequest], Frame[curvature_pb2.StreamProductsResponse]]"
)

_AHEAD = 8
"""Products of one block that are sent before the first of them is answered: so many keep a device busy, and leave room for others."""


class Asked(NamedTuple):
    """What multiplies, as in ProductSpec."""

    point_id: str
    operator: int = curvature_pb2.OPERATOR_HESSIAN
    quadratic_form: bool = False
    seed: int = 0
    leaves: tuple[int, ...] = ()
    mode: str = ""
    precision: str = ""


class Exchange:
    """V[k,n] -> HV[k,n], or k numbers v'Hv for a quadratic form.

    Args:
        asked: What multiplies.
        block: V[k,n], at least one vector.
        limit: Most vectors of one product: a wider block is several, of which those that the server refuses are sent again, and no others.
        priority: Of all of them.

    Attributes:
        result: Whole when `attempt` has returned.
    """

    def __init__(self, asked: Asked, block: _codec.Array, *, limit: int, priority: int) -> None:
        self._asked = asked
        self._priority = priority
        self._block = block
        self._limit = limit
        count = -(-len(block) // limit)
        self.single = count == 1
        """Whether it is one product, as mostly."""
        self.result: _codec.Array = np.empty(block.shape[: 1 if asked.quadratic_form else 2], block.dtype)
        self._missing = set(range(count))  # The products that are not answered: the n-th of `limit` vectors each.

    def attempt(
        self,
        stream: ProductStream,
        on_info: Callable[[curvature_pb2.ProductInfo], None],
        span: "_tracing.Span | None" = None,
    ) -> RpcFailure | None:
        """Sends what is not answered yet, and waits for the answers.

        Args:
            stream: Which this has to itself until it returns.
            on_info: Told of each product that is answered.
            span: Of all of this, where it is traced.

        Returns:
            Why a product was refused, if one was: the stream goes on. What was answered is kept.

        Raises:
            RpcFailure: The stream broke. Likewise.
        """
        tries = sorted(self._missing)
        first = stream.reserve_tags(len(tries))
        spec = _spec(self._asked, self._priority)
        if span is not None:
            spec.traceparent = span.traceparent
            span.sent(f"{stream.request_id}/{first}")
        try:
            failure = self._run(stream, spec, tries, first, on_info, span)
        except RpcFailure as error:
            error.progress = len(self._missing) < len(tries)
            raise
        return None if failure is None else RpcFailure(failure, progress=len(self._missing) < len(tries))

    def attempt_past(
        self,
        stream: VectorStream,
        left: float | None,
        on_info: Callable[[curvature_pb2.ProductInfo], None],
        span: "_tracing.Span | None" = None,
    ) -> RpcFailure | None:
        """The same past gRPC, of a single product, within so many seconds; None: as long as it takes."""
        if span is None:
            spec = _encoded(self._asked, self._priority, len(self._block))
        else:
            message = _spec(self._asked, self._priority, len(self._block))
            message.traceparent = span.traceparent
            spec = message.SerializeToString()
            span.sent(f"{stream.request_id}/{stream.tag + 1}")
        found = stream.multiply(spec, self._block, self.result, left)
        if isinstance(found, Failure):
            return RpcFailure(found)
        on_info(found)
        if span is not None:
            span.made(found)
        self._missing.clear()
        return None

    def _run(
        self,
        stream: ProductStream,
        spec: curvature_pb2.ProductSpec,
        tries: list[int],
        first: int,
        on_info: Callable[[curvature_pb2.ProductInfo], None],
        span: "_tracing.Span | None",
    ) -> Failure | None:
        """Returns why something was refused, where it was: then nothing more is sent."""
        parts = dict(enumerate(tries, first))
        answers = {tag: self._answer(part) for tag, part in parts.items()}
        unsent, awaited, informed = iter(parts.items()), set[int](), set[int]()
        failure: Failure | None = None
        for tag, part in itertools.islice(unsent, _AHEAD):
            stream.send(self._messages(spec, tag, part))
            awaited.add(tag)
        while awaited:
            response, chunk = stream.receive()
            tag = response.tag
            if tag not in awaited:
                said = "the server answered a product twice, or one that was not asked for"
                raise RpcFailure(Failure(grpc.StatusCode.DATA_LOSS, said))
            if response.HasField("error"):
                failure = failure or failure_of_status(response.error)
            else:
                if response.HasField("info") and tag not in informed:
                    informed.add(tag)
                    on_info(response.info)
                    if span is not None:
                        span.made(response.info)
                answers[tag].append(chunk)
                if not answers[tag].complete:
                    continue
                self._missing.remove(parts[tag])
            awaited.remove(tag)
            following = next(unsent, None) if failure is None else None
            if following is not None:
                stream.send(self._messages(spec, *following))
                awaited.add(following[0])
        return failure

    def _answer(self, part: int) -> Filling:
        target = self._part(self.result, part)
        return Filling(target.shape, target.dtype, target)

    def _messages(
        self, spec: curvature_pb2.ProductSpec, tag: int, part: int
    ) -> Iterator[Frame[curvature_pb2.StreamProductsRequest]]:
        block = self._part(self._block, part)
        message = curvature_pb2.StreamProductsRequest(tag=tag, spec=spec)
        message.spec.k = len(block)
        message.spec.pipelined = not self.single
        for chunk in _codec.chunks(_codec.payload(block)):
            yield Frame(message, chunk)
            chunk.release()  # gRPC holds on to the last frame while the stream is idle, and would keep the caller's vector.
            message = curvature_pb2.StreamProductsRequest(tag=tag)

    def _part(self, rows: _codec.Array, part: int) -> _codec.Array:
        return rows[part * self._limit : (part + 1) * self._limit]


def _spec(asked: Asked, priority: int, k: int = 0) -> curvature_pb2.ProductSpec:
    return curvature_pb2.ProductSpec(**asked._asdict(), priority=priority, k=k)


@functools.lru_cache
def _encoded(asked: Asked, priority: int, k: int) -> bytes:
    """The same as bytes: a solver asks for the same again and again."""
    return _spec(asked, priority, k).SerializeToString()
