"""A block on its way to the server and back.

A wide block consists of several products. This file tracks which of them are answered,
and knows the messages. `retry` decides about repetitions.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import grpc
import numpy as np

from hvpd._errors import Failure, failure_of_status
from hvpd._transport import tracing
from hvpd._transport.stream import Filling, RpcFailure, Stream
from hvpd._transport.vector_pool import VectorStream
from hvpd._wire import codec
from hvpd._wire.frames import Frame
from hvpd.v1 import curvature_pb2

ProductStream: TypeAlias = (
    "Stream[Frame[curvature_pb2.StreamProductsRequest], Frame[curvature_pb2.StreamProductsResponse]]"
)

_AHEAD = 8
"""Products of one block that are sent before the first answer.

They keep a device busy, and leave room for other callers."""


_MOST_LEAVES = 4096
"""Leaves of the largest block past gRPC. Their numbers take at most 12 KiB.

The server takes a ProductSpec of 16 KiB at most."""


class Asked(NamedTuple):
    """The operator of a product, as in ProductSpec."""

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
        asked: The operator.
        block: V[k,n], at least one vector.
        limit: Most vectors of one product. A wider block is several products, and only
            refused ones are sent again.
        priority: Priority of the products.

    Attributes:
        result: HV[k,n] or v'Hv[k], complete after an attempt without a failure.
    """

    def __init__(self, asked: Asked, block: codec.Array, *, limit: int, priority: int) -> None:
        self._asked = asked
        self._priority = priority
        self._block = block
        self._limit = limit
        count = -(-len(block) // limit)
        self.single = count == 1
        """Whether the block is one product."""
        self.fits_vector_port = self.single and len(asked.leaves) <= _MOST_LEAVES
        """Whether the block can go past gRPC."""
        self.result: codec.Array = np.empty(block.shape[: 1 if asked.quadratic_form else 2], block.dtype)
        self._missing = set(range(count))  # Numbers of the products without an answer.

    def attempt(
        self,
        stream: ProductStream,
        on_info: Callable[[curvature_pb2.ProductInfo], None],
        span: "tracing.Span | None" = None,
    ) -> RpcFailure | None:
        """Send the products without an answer, and wait for their answers.

        Answers are kept for the next attempt.

        Args:
            stream: A stream that no other caller uses meanwhile.
            on_info: Receives the times of each answered product.
            span: The span of the block, if spans are made.

        Returns:
            The failure of a refused product, if there is one. The stream can be used
            again.

        Raises:
            RpcFailure: The stream broke.
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
        span: "tracing.Span | None" = None,
    ) -> RpcFailure | None:
        """Send the only product past gRPC.

        Args:
            stream: A connection that no other caller uses meanwhile.
            left: Seconds that the product may take; None for no limit.
            on_info: Receives the times of the product.
            span: The span of the block, if spans are made.

        Returns:
            The failure of a refused product. The connection can be used again.

        Raises:
            RpcFailure: The connection broke.
        """
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
        span: "tracing.Span | None",
    ) -> Failure | None:
        """Send products until one is refused; return the first failure."""
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
        for chunk in codec.chunks(codec.payload(block)):
            yield Frame(message, chunk)
            chunk.release()  # gRPC keeps the last frame while the stream is idle, and with it the caller's vector.
            message = curvature_pb2.StreamProductsRequest(tag=tag)

    def _part(self, rows: codec.Array, part: int) -> codec.Array:
        return rows[part * self._limit : (part + 1) * self._limit]


def _spec(asked: Asked, priority: int, k: int = 0) -> curvature_pb2.ProductSpec:
    return curvature_pb2.ProductSpec(**asked._asdict(), priority=priority, k=k)


@functools.lru_cache
def _encoded(asked: Asked, priority: int, k: int) -> bytes:
    """Return the spec as bytes, because a solver repeats the same request."""
    return _spec(asked, priority, k).SerializeToString()
